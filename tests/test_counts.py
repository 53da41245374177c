"""The reward by counts against brute force, and the pure parts of tools/counts.py."""

import json
from pathlib import Path

import counts
import judging
import pytest
import torch
from conftest import NoTraining, load_script
from experiments import Figures
from photographs import Source
from PIL import Image

from build import configure, load_rewards
from config import parse_override, read_yaml
from data_types import Credit
from detection_task import DetectionDataset

count = load_script("examples/count_credit.py")


def brute_force(classes: list[int], overlap: torch.Tensor, known: list[float]) -> float:
    """The score of one set by loops."""
    scores = []
    for k, m in enumerate(known):
        mine = [p for p, c in enumerate(classes) if c == k]
        n = sum(1 / sum(q == p or bool(overlap[p, q]) for q in mine) for p in mine)
        scores.append((min(n, m) + 1) / (max(n, m) + 1))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
def test_values_are_the_scores_with_each_choice(density):
    """Also with elements that do not count, none of a kind and no detection at all."""
    draw = torch.Generator().manual_seed(0)
    sets, patches, num_classes = 4, 7, 3
    overlap = torch.rand(sets, patches, patches, generator=draw) < density
    overlap = overlap | overlap.mT | torch.eye(patches, dtype=torch.bool)
    classes = torch.randint(num_classes + 1, (sets, patches), generator=draw)
    classes[-1] = num_classes
    known = torch.tensor([[0.0, 0, 0], [2, 1, 0], [9, 1, 2], [1, 0, 3]], dtype=torch.float64)
    scores, values = count.count_values(classes, overlap, known)
    assert values.shape == (sets, patches, num_classes + 1)
    for i in range(sets):
        chosen = classes[i].tolist()
        assert float(scores[i]) == pytest.approx(brute_force(chosen, overlap[i], known[i].tolist()))
        for p in range(patches):
            for k in range(num_classes + 1):
                other = [*chosen[:p], k, *chosen[p + 1 :]]
                assert float(values[i, p, k]) == pytest.approx(brute_force(other, overlap[i], known[i].tolist()))


def test_patches_that_all_overlap_are_one_object():
    overlap = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool()
    for classes, right in ([0, 0, 0, 0, 0], [2.0, 0]), ([0, 0, 1, 0, 0], [2.0, 1]), ([2] * 5, [0.0, 0]):
        score, values = count.count_values(torch.tensor(classes), overlap, torch.tensor(right))
        assert float(score) == pytest.approx(1) and float(values.max()) <= 1 + 1e-6


def test_the_reward_finds_the_counts_beside_the_images(tmp_path):
    """And says where they should be."""
    count.read_counts.cache_clear()
    counts = {"a.png": {"x": 1}, "b.png": {"x": 2, "y": 1}}
    (tmp_path / "images").mkdir()
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    paths = [str(tmp_path / "images" / name) for name in counts]
    assert count.known_counts(paths, ["y", "x"]).tolist() == [[0, 1], [1, 2]]
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2, 3, 2, 16, 1), generator=draw).float()
    actions = torch.stack([torch.nn.functional.pad(labels, (0, 3)), torch.randn(2, 3, 2, 16, 4, generator=draw)], 3)
    inside = torch.rand(2, 16, generator=draw) < 0.8
    metadata = {"paths": paths, "classes": ["x", "y"], "patch_size": 4, "columns": 4}
    metadata["counted"] = torch.stack([inside, torch.zeros_like(inside)], 1)
    credit = count.count_credit(actions, torch.zeros(2, 3, 16, 7), None, metadata)
    assert isinstance(credit, Credit) and credit.advantages is None
    assert credit.rewards.shape == (2, 3, 2) and credit.values.shape == (2, 3, 2, 16, 3)
    assert not credit.values[:, :, 1].any() and credit.values[:, :, 0].std(-1).max() > 0
    boxes = count.decode_boxes(actions[1, 2, :, 1], 4, 4)
    for a, expected in enumerate(credit.rewards[1, 2].tolist()):
        overlap = count.box_iou(boxes[a, :, None], boxes[a, None]) > 0.5
        classes = torch.where(inside[1], labels[1, 2, a, :, 0], 2).int().tolist()
        assert expected == pytest.approx(brute_force(classes, overlap, [2, 1]), rel=1e-5)
    metadata |= {"boxes": torch.tensor([[[0.0, 0, 4, 4]], [[1.0, 1, 9, 9]]]), "labels": torch.tensor([[-1], [1]])}
    metadata["crowd"], targets = torch.zeros(2, 1, dtype=torch.bool), torch.randn(2, 2, 16, 4, generator=draw)
    mixed, boxes = (
        function(actions, torch.zeros(2, 3, 16, 7), targets, metadata)
        for function in (count.count_or_box_credit, count.detection_set_credit_50)
    )
    for own, of_counts, of_boxes in zip((mixed.rewards, mixed.values), (credit.rewards, credit.values),
                                        (boxes.rewards, boxes.values)):  # fmt: skip
        assert torch.equal(own[0], of_counts[0]) and torch.equal(own[1], of_boxes[1])
        assert not torch.equal(own[1], of_counts[1])
    assert not mixed.advantages[0].any() and torch.equal(mixed.advantages[1], boxes.advantages[1])
    assert boxes.advantages[1].any()
    with pytest.raises(FileNotFoundError, match="counts.json"):
        count.known_counts([str(tmp_path.parent / "c.png")], ["x"])


# --- tools/counts.py --------------------------------------------------------------------------------------------------


def found_of(scores: list[list[list[float]]], objects: list[list[int]]) -> dict:
    """Predictions of boxes; scores: by image and kind."""
    rows = [(i, k, x) for i, image in enumerate(scores) for k, mine in enumerate(image) for x in mine]
    image, label, score = zip(*rows)
    judged = torch.zeros(len(rows), 10, dtype=torch.bool)
    columns = {"image": torch.tensor(image), "label": torch.tensor(label), "hit": judged, "miss": ~judged}
    return columns | {"score": torch.tensor(score).double(), "objects": torch.tensor(objects).float()}


def with_nms(parts: dict[float, dict]) -> dict:
    columns = [part | {"nms": torch.full_like(part["score"], iou)} for iou, part in parts.items()]
    found = {key: torch.cat([part[key] for part in columns]) for key in judging.COLUMNS}
    return found | {"objects": columns[0]["objects"]}


def test_decoding_has_the_smallest_error_of_the_counts():
    draw = torch.Generator().manual_seed(0)
    objects = torch.randint(5, (8, 3), generator=draw)
    scores = {
        u: [[torch.rand(6, generator=draw).tolist() for _ in "abc"] for _ in range(8)] for u in (0.5, 0.4, 0.3, 0.2)
    }
    found = with_nms({iou: found_of(mine, objects.tolist()) for iou, mine in scores.items()})

    def error(iou: float, k: int, level: float) -> float:
        return sum(abs(sum(x >= level for x in scores[iou][i][k]) - int(objects[i, k])) for i in range(8)) / 8

    iou, least = judging.fit_decoding(found)
    expected = [error(iou, k, level) for k, level in enumerate(least.tolist())]
    assert judging.count_errors(found, (iou, least)).tolist() == pytest.approx(expected)
    best = {u: sum(min(error(u, k, x / 100) for x in range(5, 100)) for k in range(3)) for u in judging.SUPPRESSIONS}
    assert sum(expected) == pytest.approx(min(best.values())) and best[iou] == min(best.values())
    counted = judging.box_counts(found, judging.undecided(found))
    assert counted.tolist() == [[sum(x >= 0.5 for x in mine) for mine in image] for image in scores[0.5]]
    for u, mine in scores.items():
        assert torch.equal(judging.suppressed(found, u)["score"], found_of(mine, objects.tolist())["score"])


def folder_of(path, images: int) -> dict:
    """A folder of blank photographs with some cells; its annotations."""
    (path / "images").mkdir(parents=True)
    rows, boxes = [], []
    for i in range(images):
        Image.new("RGB", (8, 8)).save(path / "images" / f"{i}.png")
        rows.append({"id": i, "file_name": f"{i}.png", "width": 8, "height": 8})
        boxes += [
            {"image_id": i, "category_id": 1 + j % 2, "bbox": [1, 1, 4, 4], "iscrowd": int(j == 4)}
            for j in range(i % 6)
        ]
    kinds = [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}]
    coco = {"images": rows, "annotations": [row | {"id": i} for i, row in enumerate(boxes)], "categories": kinds}
    (path / "annotations.json").write_text(json.dumps(coco))
    return coco


def test_only_the_labelled_photographs_keep_their_boxes(tmp_path):
    """The three parts are the whole; the counts are those of the boxes, without crowds; another seed draws others."""
    coco = folder_of(tmp_path / "train", 45)
    for seed in range(2):
        counts.make_parts(tmp_path / "train", tmp_path / str(seed), seed)
    names = {}
    for part in ("labelled", "counted", "held"):
        folder = tmp_path / "0" / part
        names[part] = sorted(path.name for path in (folder / "images").iterdir())
        assert all((folder / "images" / name).exists() for name in names[part])
        data = DetectionDataset(str(folder), 8, 4)
        assert (
            sorted(row["file_name"] for row in json.loads((folder / "annotations.json").read_text())["images"])
            == names[part]
        )
        assert data.classes == ["x", "y"] and (folder / "counts.json").exists() == (part != "labelled")
        for path, labels in zip(data.paths, data.labels):
            if part == "labelled":
                assert len(labels) == int(Path(path).stem) % 6
            else:
                boxes = [
                    row for row in coco["annotations"] if row["image_id"] == int(Path(path).stem) and not row["iscrowd"]
                ]
                expected = [[float(sum(row["category_id"] == k for row in boxes)) for k in (2, 1)]]
                assert not len(labels) and count.known_counts([path], ["y", "x"]).tolist() == expected
    assert sorted(sum(names.values(), [])) == sorted(row["file_name"] for row in coco["images"])
    assert [len(names[part]) for part in names] == [30, 12, 3]
    counts.merge_parts(tmp_path / "0", "mixed")
    both = DetectionDataset(str(tmp_path / "0" / "mixed"), 8, 4)
    assert sorted(Path(path).name for path in both.paths) == sorted(names["labelled"] + names["counted"])
    for path, labels in zip(both.paths, both.labels):
        number = int(Path(path).stem) % 6
        assert len(labels) == (number if Path(path).name in names["labelled"] else 0)
        assert int(count.known_counts([path], ["y", "x"]).sum()) == number - (number == 5)
    drawn = [sorted(path.name for path in (tmp_path / seed / "labelled" / "images").iterdir()) for seed in "01"]
    assert drawn[0] != drawn[1]


def test_the_counts_pick_the_best_detections_for_boxes(tmp_path):
    """In pixels of the file, which is half as large as the input; the labelled keep their own."""
    folder_of(tmp_path / "train", 45)
    counts.make_parts(tmp_path / "train", tmp_path / "0", 0)
    labelled, dataset = (DetectionDataset(str(tmp_path / "0" / part), 16, 4) for part in ("labelled", "counted"))
    sizes = {"model.image_size": 16, "model.patch_size": 4, "detection.nms_iou": 0.9}
    config, task = configure(("config_detection.yaml", read_yaml("config_detection.yaml")), ("", sizes))
    batch = dataset.batch(torch.arange(len(dataset)), torch.zeros(len(dataset), 3, 16, 16))
    outputs = torch.zeros(len(dataset), 1, 16, 2 + 5)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(len(dataset))])
    outputs[:, 0, :, 0] = 5 + order / 16  # patches of the first kind, the highest number is the surest; as large as one
    outputs[:, 0, ::2, 0], outputs[:, 0, ::2, 1] = 0, 5 + order[:, ::2] / 16
    counts.pick_boxes(tmp_path / "0", task, dataset, iter([(batch, outputs)]))
    found = DetectionDataset(str(tmp_path / "0" / "picked"), 8, 4)
    assert found.classes == ["x", "y"] and len(found) == len(labelled) + len(dataset) == 42
    own = dict(zip((Path(path).name for path in labelled.paths), labelled.labels))
    for path, boxes, labels in zip(found.paths, found.boxes, found.labels):
        if (name := Path(path).name) in own:
            assert torch.equal(labels, own[name]) and (boxes == torch.tensor([1.0, 1, 5, 5])).all()
            continue
        i = dataset.paths.index(path := path.replace("picked", "counted"))
        known = count.known_counts([path], found.classes)[0]
        expected = []
        for k, start in enumerate((1, 0)):
            patches = sorted(range(start, 16, 2), key=lambda p, i=i: -order[i, p])[: int(known[k])]
            expected += [[k, 2 * (p % 4), 2 * (p // 4), 2 * (p % 4) + 2, 2 * (p // 4) + 2] for p in patches]
        rows = torch.cat([labels[:, None].float(), boxes], 1).round(decimals=4).tolist()
        assert rows == expected


class FakeRuns(NoTraining, counts.CountRuns):
    """The error of the predictions is a function of the method and the setting."""

    def __init__(self, path, **more):
        super().__init__(Figures(path / "runs.json"), Source(path, path / "vit.pth"), 1, **more)

    def prepare(self, run):
        pass

    def predictions(self, run, part):
        self.seen.append((run, part))
        settings = list(counts.SETTINGS[run.method])
        wrong = 1 + settings.index(run.setting) + (run.method != "mixed") + run.fold / 10
        found = found_of([[[0.9, 0.8], [0.7], [0.6]]] * 4, [[2, 1, 1 + round(10 * wrong)]] * 4)
        return with_nms(dict.fromkeys(judging.SUPPRESSIONS, found))


def test_settings_are_chosen_by_held_out_counts_and_what_is_kept_is_not_run_again(tmp_path):
    figures, runner = Figures(tmp_path / "f.json"), FakeRuns(tmp_path)
    counts.fill(runner, figures)
    first = {method: list(settings)[0] for method, settings in counts.SETTINGS.items()}
    assert {run.setting for run, part in runner.seen if part == "eval"} == set(first.values())
    assert {run.fold for run, part in runner.seen if part == "held" and run.setting != first[run.method]} == {0, 1}
    assert all(run.start is None or run.start.setting == first["start"] for run in runner.trained)
    lines = counts.table(figures).splitlines()
    assert len(lines) == 3 + 2 * len(counts.SETTINGS) and "| -3.3333 ± 0.0000 |" in lines[-1]
    before = (tmp_path / "f.json").read_text()
    counts.fill(again := FakeRuns(tmp_path), Figures(tmp_path / "f.json"))
    assert not again.trained and (tmp_path / "f.json").read_text() == before
    none = Figures(tmp_path / "none.json")
    (tmp_path / "late").mkdir()
    counts.fill(late := FakeRuns(tmp_path / "late", deadline=0), none)
    assert late.left and not none.kept and counts.table(none) == counts.NOT_YET


def test_all_that_is_tried_can_be_run():
    """From the checkpoint of the same seed, on the images that the method may know."""
    sizes = {"model.embed_dim": 384, "model.depth": 12, "model.num_heads": 6, "model.patch_size": 14}
    names = []
    for method, settings in counts.SETTINGS.items():
        for setting in settings:
            run = counts.runs_of(method, setting, next(iter(counts.SETTINGS["start"])))[3]
            keys = dict(map(parse_override, run.overrides(Source(Path("data"), Path("vit.pth")))))
            config, task = configure((run.study.config, read_yaml(run.study.config)), ("weights", sizes), ("", keys))
            part = {"counts": "counted", "picked": "picked", "mixed": "mixed"}.get(method, "labelled")
            assert load_rewards(task) and config["data"]["train_dir"].endswith(f"/3/{part}")
            assert config["training"]["label_coef"] == 0 and not config["data"]["eval_dir"]
            begin = f"experiments/ckpt/{run.start.name}/last.pt" if run.start else "vit.pth"
            assert config["model"]["checkpoint_path"] == begin and (run.start is None) == (method == "start")
            names.append(run.name)
    assert len(set(names)) == len(names)


def test_the_table_of_the_results_is_that_of_the_kept_figures():
    text = counts.RESULTS.read_text(encoding="utf-8")
    assert f"<!-- counts -->\n{counts.table(Figures(counts.FIGURES))}\n<!-- /counts -->" in text
