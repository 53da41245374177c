"""Folds, decisions, resamples, choices and tables of photographs.py; its trainings are too long for a test."""

import itertools
import json
import shutil
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cells
import judging
import numpy as np
import photographs
import pytest
import torch
from cells import DATA_SETS, FOLDS
from conftest import TINY, NoTraining, make_folders
from dice_of_one import dice_of_one
from experiments import Figures
from photographs import BY_REWARD, LABEL_DECIDED, LABEL_TRICK, Runs, Source
from PIL import Image
from price_list import COSTS, price_list

from build import build_model, configure, layer_of, load_rewards
from checkpoint import save_checkpoint
from coco_ap import average_precision
from config import flatten, parse_override, read_yaml
from data_types import TensorMiniBatch
from deciding import Decider, Decision
from detection_task import BoxEvaluation, best_thresholds, f1_curves, mean_f1
from grpo import keyed_rng
from scores import READY, ConfusionScore
from segmentation_task import Segmentation
from vision_task import Classification

# --- Folds ------------------------------------------------------------------------------------------------------------


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((2, 2), dtype=np.uint8)).save(path)


def held_and_train(folder: Path, pattern: str) -> list[tuple[set[str], set[str]]]:
    """Of each fold the names that are held out, and those that are trained on."""
    names = [[{p.name for p in (folder / str(f) / part).glob(pattern)} for part in ("held", "train")] for f in range(5)]
    return [tuple(pair) for pair in names]


def check_folds(pairs: list[tuple[set[str], set[str]]], whole: set[str]) -> None:
    assert Counter(name for held, _ in pairs for name in held) == Counter(whole)
    assert all(train == whole - held for held, train in pairs)


def test_each_image_of_a_class_is_in_one_fold(tmp_path):
    """Also a rare class is in all."""
    counts = {"a": 23, "b": 7}
    for name, count in counts.items():
        for i in range(count):
            write(tmp_path / "train" / name / f"{name}{i}.png")
    folder = cells.make_folds(tmp_path / "train", tmp_path / "folds")
    for name, count in counts.items():
        pairs = held_and_train(folder, f"{name}/*.png")
        check_folds(pairs, {f"{name}{i}.png" for i in range(count)})
        assert {len(held) for held, _ in pairs} <= {count // 5, -(-count // 5)}
    (folder / "mark").touch()
    assert (cells.make_folds(tmp_path / "train", folder) / "mark").exists()  # made once


def test_micrographs_stay_whole_with_their_masks(tmp_path):
    names = {f"{i}_{y}_{x}.png" for i in range(7) for y in (0, 128) for x in (0, 128)}
    for part, name in itertools.product(("images", "masks"), names):
        write(tmp_path / "train" / part / name)
    (tmp_path / "train" / "classes.txt").write_text("cell\nmembrane\n")
    folder = cells.make_folds(tmp_path / "train", tmp_path / "folds", cells.micrograph)
    pairs = held_and_train(folder, "images/*")
    check_folds(pairs, names)
    assert pairs == held_and_train(folder, "masks/*")
    held = [{name.split("_")[0] for name in held} for held, _ in pairs]
    assert sum(map(len, held)) == 7 and (folder / "3" / "held" / "classes.txt").exists()


def test_boxes_go_with_their_images(tmp_path):
    names = {f"{i}.png" for i in range(11)}
    for name in names:
        write(tmp_path / "train" / "images" / name)
    images = [{"id": i + 50, "file_name": f"{i}.png"} for i in range(11)]
    rows = [{"id": i, "image_id": 50 + i % 11} for i in range(30)]
    text = json.dumps({"images": images, "annotations": rows, "categories": [1]})
    (tmp_path / "train" / "annotations.json").write_text(text)
    folder = cells.make_folds(tmp_path / "train", tmp_path / "folds")
    pairs = held_and_train(folder, "images/*")
    check_folds(pairs, names)
    for fold, part in itertools.product(range(5), (0, 1)):
        coco = json.loads((folder / str(fold) / ("held", "train")[part] / "annotations.json").read_text())
        ids = {int(name.split(".")[0]) + 50 for name in pairs[fold][part]}
        assert {row["id"] for row in coco["images"]} == ids and coco["categories"] == [1]
        assert coco["annotations"] == [row for row in rows if row["image_id"] in ids]


# --- Predictions and scores -------------------------------------------------------------------------------------------

SCORES = [*READY.values(), judging.accuracy, price_list]


def class_found(n: int, seed: int, num_classes: int = 10) -> dict:
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_classes, (n,), generator=draw) * torch.randint(2, (n,), generator=draw)  # 0 is frequent
    logits = torch.randn(n, num_classes, generator=draw) + 1.5 * torch.nn.functional.one_hot(targets, num_classes)
    return {"probs": logits.softmax(-1), "targets": targets}


def pixel_found(n: int, seed: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """And the probabilities [n, 8, 8] and the truth that they are of."""
    draw = torch.Generator().manual_seed(seed)
    targets = (torch.rand(n, 8, 8, generator=draw) < 0.2).long()
    probs = (torch.randn(n, 8, 8, generator=draw) + 1.2 * targets - 1).sigmoid()
    outputs = torch.stack([torch.zeros_like(probs), probs.logit()], -1)[:, None]
    batch = TensorMiniBatch(torch.zeros(n, 3, 8, 8), targets, {}, torch.ones(n, 8, 8, dtype=torch.bool))
    return judging.pixel_predictions(Segmentation({}), None, batch, outputs), probs, targets


def box_found(n: int, seed: int) -> tuple[dict, list[dict], list[dict]]:
    """Of scattered boxes around true ones: the predictions, the detections, the truths."""
    draw, detections, truths = torch.Generator().manual_seed(seed), [], []
    for _ in range(n):
        m = int(torch.randint(0, 5, (1,), generator=draw))
        low = 20 * torch.rand(m, 2, generator=draw)
        truth = torch.cat([low, low + 8], -1)
        labels = torch.randint(3, (m,), generator=draw)
        truths.append({"boxes": truth, "labels": labels, "crowd": torch.zeros(m, dtype=torch.bool)})
        boxes = torch.cat([truth + torch.randn(m, 4, generator=draw), 20 * torch.rand(3, 4, generator=draw)])
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        more = torch.randint(3, (3,), generator=draw)
        scores = torch.rand(m + 3, generator=draw).sort(descending=True)[0]
        detections.append({"boxes": boxes, "scores": scores, "labels": torch.cat([labels, more])})
    dataset = SimpleNamespace(classes="abc", **{key: [t[key] for t in truths] for key in truths[0]})
    batch = TensorMiniBatch(torch.zeros(n, 3, 1, 1), None, {"indices": torch.arange(n), "content": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "detections", lambda task, content, outputs: detections)
        found = judging.box_predictions(None, dataset, batch, torch.zeros(n))
    return found, detections, truths


def test_resamples_draw_whole_units_with_one_seed():
    unit = torch.tensor([0, 0, 1, 2, 2, 2])
    weights = judging.resample(unit, 400)
    assert torch.equal(weights, judging.resample(unit, 400)) and weights.shape == (400, 6)
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all() and torch.equal(weights[:, 3], weights[:, 5])
    assert weights[:, [0, 2, 3]].mean(0).sub(1).abs().max() < 0.15


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
def test_classes_are_decided_as_deciding_does_and_resampled_as_by_a_loop(score):
    judge, found = judging.Classes(score), class_found(400, 0)
    fitted = judge.fit(found)
    decision = Decision("", "", [""], **fitted)
    reward = ConfusionScore("", score, Classification({}))
    logits = found["probs"].log()[:, None]  # one pass
    expected = Decider(Classification({}), {"": (reward, 1.0)}, decision)(logits, {})
    chosen = judge.choices(found, fitted)
    assert (chosen == expected).float().mean() > 0.995  # in float32 ties are broken otherwise
    assert judge.value(found, fitted) == pytest.approx(fitted["score"][1]) and judge.value(found) <= fitted["score"][1]
    assert judge.value(found) == pytest.approx(fitted["score"][0])
    weights = judging.resample(torch.arange(400), 5)
    for value, row in zip(judge.judged(found, weights, fitted), weights):
        confusion = torch.zeros(10, 10, dtype=torch.float64)
        for i, times in enumerate(row.tolist()):
            confusion[found["targets"][i], chosen[i]] += times
        assert float(value) == pytest.approx(float(score(confusion)))


@pytest.mark.parametrize("score", [READY["mean_iou"], dice_of_one], ids=lambda score: score.__name__)
def test_pixels_are_decided_by_the_best_of_all_thresholds(score):
    judge, (found, probs, targets) = judging.Pixels(score), pixel_found(30, 1)

    def plain(chosen: torch.Tensor, rows: torch.Tensor) -> float:
        confusion = torch.zeros(2, 2, dtype=torch.float64)
        for y, k in itertools.product(range(2), range(2)):
            confusion[y, k] = ((targets[rows] == y) & (chosen[rows] == k)).sum()
        return float(score(confusion))

    all_rows = torch.arange(30)
    values = [plain((probs * 256).floor() >= least, all_rows) for least in range(257)]
    least = judge.fit(found)
    assert judge.value(found, least) == pytest.approx(max(values)) and values[least] == max(values)
    assert judge.value(found) == pytest.approx(plain(probs >= 0.5, all_rows))
    unit = torch.arange(30) // 3
    for value, row in zip(judge.judged(found, weights := judging.resample(unit, 4), least), weights):
        rows = torch.tensor([i for i, times in enumerate(row.tolist()) for _ in range(int(times))])
        assert float(value) == pytest.approx(plain((probs * 256).floor() >= least, rows))


def test_boxes_have_the_values_of_the_evaluation_in_resamples_too():
    found, detections, truths = box_found(25, 2)
    f1, ap = judging.BoxF1(), judging.BoxAP()
    thresholds = best_thresholds(f1_curves(detections, truths, list("012")))
    assert f1.fit(found) == pytest.approx(thresholds)
    weights = torch.cat([torch.ones(1, 25).double(), judging.resample(torch.arange(25), 6)])
    values = [f1.judged(found, weights), f1.judged(found, weights, thresholds), ap.judged(found, weights)]
    for i, row in enumerate(weights):
        repeated = [
            [x for x, times in zip(rows, row.tolist()) for _ in range(int(times))] for rows in (detections, truths)
        ]
        curves = f1_curves(*repeated, list("012"))
        assert float(values[0][i]) == pytest.approx(mean_f1(curves, {}))
        assert float(values[1][i]) == pytest.approx(mean_f1(curves, thresholds))
        assert float(values[2][i]) == pytest.approx(average_precision(*repeated, 3)["map"])


def test_box_predictions_are_those_of_the_evaluation():
    """Of a network's outputs, through decoding and matching."""
    layers = ("c", read_yaml("config_detection.yaml")), ("", {"data.eval_dir": None})
    _, task = configure(*layers)
    draw = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[2.0, 2, 14, 14], [12, 12, 30, 28]])
    objects = {"boxes": [boxes, boxes[:1]], "labels": [torch.tensor([0, 1]), torch.tensor([1])]}
    objects |= {"crowd": [torch.zeros(2, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)]}
    dataset = SimpleNamespace(classes=["a", "b"], patch_size=4, **objects)
    padded = {"boxes": torch.stack([boxes, boxes * torch.tensor([[1.0], [0]])])}
    padded |= {"labels": torch.tensor([[0, 1], [1, -1]]), "crowd": torch.zeros(2, 2, dtype=torch.bool)}
    dataset.objects = lambda indices: padded
    metadata = {
        "indices": torch.arange(2),
        "content": torch.tensor([[0.0, 0, 32, 32]] * 2),
        "patch_size": 4,
        "columns": 8,
    }
    outputs = torch.randn(2, 3, 64, 7, generator=draw)
    batch = TensorMiniBatch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2), metadata)
    evaluation = BoxEvaluation(task, dataset)
    evaluation.add(batch, outputs[:, 0], outputs)
    found = judging.box_predictions(task, dataset, batch, outputs)
    assert judging.BoxAP().value(found) == pytest.approx(evaluation.metrics()["eval_mc/map"])
    assert judging.BoxF1().value(found) == pytest.approx(mean_f1(evaluation.curves(), {}))


@pytest.mark.parametrize("kind", ["classes", "pixels", "boxes"])
def test_what_is_decided_was_never_fitted_on(kind):
    """Cross-fitted: each part by a fit on the others alone; against a loop."""
    make, judge = {
        "classes": (lambda i: class_found(120, i), judging.Classes(READY["macro_f1"])),
        "pixels": (lambda i: pixel_found(6, i)[0], judging.Pixels(dice_of_one)),
        "boxes": (lambda i: box_found(9, i)[0], judging.BoxF1()),
    }[kind]
    parts, fitted = [make(i) for i in range(3)], []
    fit = judge.fit
    judge.fit = lambda found: fitted.append(found) or fit(found)
    value = judge.cross_fitted(parts)
    total = 0
    for i, part in enumerate(parts):
        others = judging.pool([other for other in parts if other is not part])
        assert all(torch.equal(fitted[i][key], others[key]) for key in others)
        total = total + judge.counts(part, fit(others)).double().sum(0)
    assert value == pytest.approx(float(judge.score(total[None])))
    pooled = judging.pool(parts)
    assert judge.size(pooled) == sum(map(judge.size, parts))
    each = [judge.counts(part).sum(0) for part in parts]
    assert torch.allclose(judge.counts(pooled).sum(0), sum(each))


def test_the_examples_are_what_they_say():
    draw = torch.Generator().manual_seed(0)
    confusion = torch.randint(1, 30, (10, 10), generator=draw).double()
    cost = sum(COSTS[y][k] * float(confusion[y, k]) for y in range(10) for k in range(10)) / float(confusion.sum())
    assert float(price_list(confusion)) == pytest.approx(1 - cost) and price_list(
        confusion.expand(4, 10, 10)
    ).shape == (4,)
    costs, animal = np.array(COSTS), np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 0], dtype=bool)
    assert (costs.diagonal() == 0).all() and (costs[animal][:, ~animal] > costs[~animal][:, animal].max()).all()
    hits, missed, wrong = (float(confusion[y, k]) for y, k in ((1, 1), (1, 0), (0, 1)))
    assert float(dice_of_one(confusion[:2, :2])) == pytest.approx(2 * hits / (2 * hits + missed + wrong))


# --- Definitions ------------------------------------------------------------------------------------------------------


def test_the_table_has_ten_rows():
    assert sum(len(study.scores) for study in DATA_SETS.values()) == 10


@pytest.mark.parametrize("name", DATA_SETS)
def test_all_that_is_tried_can_be_run_and_as_often_for_each_method(name):
    """Half of the steps by the label, then by the method, from the checkpoint of the same fold."""
    study = DATA_SETS[name]
    source, methods = Source(Path("data"), Path("vit.pth")), study.methods()
    assert {len(study.tried(method)) for method in methods} == {len(study.settings)}
    sizes = {"model.embed_dim": 384, "model.depth": 12, "model.num_heads": 6, "model.patch_size": 14}
    for method, number in itertools.product(methods, range(len(study.settings))):
        run = photographs.runs_of(study, method, list(study.tried(method))[number], next(iter(study.starts)))[3]
        for half, begin in ((run, f"experiments/ckpt/{run.start.name}/last.pt"), (run.start, "vit.pth")):
            keys = dict(map(parse_override, half.overrides(source)))
            layers = (study.config, read_yaml(study.config)), ("weights", sizes), ("", keys)
            config, task = configure(*layers)
            assert load_rewards(task) and config["training"]["steps"] == study.steps
            assert config["training"]["seed"] == 3 and config["model"]["checkpoint_path"] == begin
            assert config["data"]["train_dir"] == f"experiments/folds/{name}/3/train" and not config["data"]["eval_dir"]
        assert run.start.fold == 3 and (config["training"]["objective"] == "supervised")
    names = [photographs.runs_of(study, m, s, "x")[0].name for m in methods for s in study.tried(m)]
    assert len(set(names)) == len(names)  # of a run, its folders


# --- Choices and tables -----------------------------------------------------------------------------------------------

BASE = DATA_SETS["cifar10"]
SETTINGS = dict(itertools.islice(BASE.settings.items(), 2))
SCORES = tuple(replace(score, settings=None) for score in BASE.scores[2:4])
STUDY = replace(BASE, scores=SCORES, tricks=("weighted",), settings=SETTINGS, searched=(0, 1), steps=2)


class FakeRuns(NoTraining, Runs):
    """Predictions are drawn from a run's name: their accuracy is a function of the setting."""

    def __init__(self, path: Path, **more):
        super().__init__(Figures(path / "runs.json"), Source(path, path / "vit.pth"), 1, **more)
        self.parts[STUDY.name] = self.base

    def run(self, run):
        return super(Runs, self).run(run)

    def predictions(self, run, part):
        self.seen.append((run, part))
        strength = {"label": 1.0, "weighted": 1.1}.get(run.method, 1.3) + (0.5 if run.setting == "0.001 small" else 0)
        found = class_found(80, run.fold + 10 * ("held", "eval", "train").index(part))
        return {
            "probs": found["probs"] ** strength / (found["probs"] ** strength).sum(-1, keepdim=True),
            "targets": found["targets"],
            "unit": torch.arange(80),
        }


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A folder with the figures of all runs of STUDY, f.json."""
    folder = tmp_path_factory.mktemp("filled")
    figures, runner = Figures(folder / "f.json"), FakeRuns(folder)
    photographs.search(runner, figures, STUDY)
    # no evaluation image is looked at in the search, and only the folds that choose are run
    assert {part for _, part in runner.seen} == {"held"}
    assert {run.fold for run in runner.trained if run.start} == {0, 1}
    assert len({run.keys for run in runner.trained if run.start}) == 2 * 6 * 2
    photographs.fill(runner, figures, STUDY)
    assert {run.fold for run in runner.trained if run.start} == set(range(FOLDS)) and not runner.left
    return folder


@pytest.mark.parametrize("score", STUDY.scores, ids=lambda score: score.name)
def test_settings_are_chosen_by_held_out_folds_and_judged_by_all(filled, score):
    figures, runner = Figures(filled / "f.json"), FakeRuns(filled)
    cells_of = photographs.choose(figures, STUDY, score)
    assert list(cells_of) == ["label", LABEL_DECIDED, LABEL_TRICK, *BY_REWARD]
    for column, cell in cells_of.items():
        kept = figures.get(*cell.keys)
        held = judging.pool([runner.predictions(run, "held") for run in cell.runs])
        decision = score.judge.fit(held) if cell.decided else None
        values = [score.judge.value(runner.predictions(run, "eval"), decision) for run in cell.runs]
        assert kept["scores"] == pytest.approx(values, abs=1e-5)
        assert len(kept["resampled"]) == photographs.RESAMPLES and cell.column == column
        own_method = [run["held"][score.name] for run in figures.kept[STUDY.name]["search"][cell.method].values()]
        assert cell.held == max(pair[cell.decided] for pair in own_method)
    best = photographs.best_by_reward(cells_of)
    assert best.held == max(cells_of[column].held for column in BY_REWARD)


def test_what_is_kept_is_not_run_again(filled):
    figures, before = Figures(filled / "f.json"), (filled / "f.json").read_text()
    for step in (photographs.search, photographs.fill):
        step(runner := FakeRuns(filled), figures, STUDY)
        assert not runner.trained
    assert (filled / "f.json").read_text() == before


def test_models_are_judged_on_the_images_that_they_were_trained_on(filled, tmp_path, monkeypatch):
    """By the row's score and by the first one, beside the held-out fold; no evaluation image is looked at."""
    monkeypatch.setattr(photographs, "DATA_SETS", {"cifar10": STUDY})
    figures, runner = Figures(Path(shutil.copy(filled / "f.json", tmp_path))), FakeRuns(filled)
    first, score = STUDY.scores
    photographs.look_at_training(runner, figures, STUDY, score)
    assert {part for _, part in runner.seen} == {"train", "held"} and {run.fold for run, _ in runner.seen} == {0}
    lines = photographs.training_table(figures).splitlines()[2:]
    assert len(lines) == 2 * len(SETTINGS)
    run = photographs.runs_of(STUDY, "label", "0.0003 small", photographs.chosen_start(figures, STUDY))[0]
    values = [s.judge.value(runner.predictions(run, part)) for s in (score, first) for part in ("train", "held")]
    shown = " | ".join(f"{x:.3f}" for x in values)
    assert f"| {score.name} | label: 0.0003 small | {shown} |" in lines and len(set(values)) == 4


def test_nothing_is_chosen_before_all_is_tried(filled, tmp_path):
    none = Figures(tmp_path / "f.json")
    photographs.search(runner := FakeRuns(tmp_path, deadline=0), none, STUDY)
    assert not none.kept and not runner.trained and runner.left
    assert photographs.choose(none, STUDY, STUDY.scores[0]) == {}
    figures = Figures(filled / "f.json")
    del figures.kept[STUDY.name]["search"]["weighted"]
    assert LABEL_TRICK not in photographs.choose(figures, STUDY, STUDY.scores[0])
    assert photographs.table(none, STUDY) == photographs.NOT_YET


def test_a_second_run_is_compared_with_the_kept_one(filled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(photographs, "ROOT", tmp_path)
    figures, runner = Figures(filled / "f.json"), FakeRuns(filled)
    monkeypatch.setattr(photographs, "Runs", lambda figures, source, jobs: FakeRuns(tmp_path))
    for cell in photographs.choose(figures, STUDY, STUDY.scores[0]).values():
        assert photographs.again(runner, figures, cell, 3)
    figures.get(*cell.keys)["scores"][3] += 1e-4
    assert not photographs.again(runner, figures, cell, 3) and "kept" in capsys.readouterr().out


def test_tables_are_means_paired_differences_and_intervals(filled, monkeypatch, tmp_path):
    """Written out for one row."""
    monkeypatch.setattr(photographs, "DATA_SETS", {"cifar10": STUDY})
    figures, score = Figures(filled / "f.json"), STUDY.scores[1]
    cells_of = photographs.choose(figures, STUDY, score)
    runs = {column: figures.get(*cell.keys) for column, cell in cells_of.items()}
    lines = photographs.table(figures, STUDY).replace("**", "").splitlines()
    line = next(line for line in lines if line.startswith("| macro-F1 | reward |"))
    columns = ("reward", "label", LABEL_DECIDED, LABEL_TRICK)
    own, label, decided, trick = (np.array(runs[column]["scores"]) for column in columns)
    difference = 1e-4 * np.sort(np.array(runs["reward"]["resampled"]) - runs[LABEL_TRICK]["resampled"])
    low, high = np.quantile(difference, 0.025), np.quantile(difference, 0.975)
    expected = [f"{own.mean():.4f} ± {own.std(ddof=1):.4f}"]
    expected += [f"{(own - label).mean():+.4f} ± {(own - label).std(ddof=1):.4f}"]
    expected += [f"{(own - decided).mean():+.4f} ± {(own - decided).std(ddof=1):.4f}"]
    expected += [f"{(own - trick).mean():+.4f} ± {(own - trick).std(ddof=1):.4f} [{low:+.4f}, {high:+.4f}]"]
    assert line.endswith(f"| {' | '.join(expected)} |") and f"{cells_of['reward'].held:.4f}" in line
    small = [line.split(" | ") for line in photographs.small_table(figures).splitlines()[2:]]
    for (name, *texts, _), (score, four) in zip(small, photographs.complete_rows(figures), strict=True):
        label, decided, *means = [f"{statistics.mean(run['scores']):.3f}" for _, run in four]
        assert name == f"| {score.name}" and [text.partition(" ")[0] for text in texts] == [label, *means]
        assert texts[0] == f"{label} ({decided})" and all("(" in text for text in texts)
    best = {by: photographs.complete_rows(figures, by) for by in (BY_REWARD[::2], BY_REWARD)}
    decided = [{own.decided for _, (*_, (own, _)) in rows} for rows in best.values()]
    assert decided[0] == {False} and True in decided[1]
    counts = photographs.verdict(figures).splitlines()[-1].split(" | ")[1:]
    assert counts[0] == f"{len(STUDY.scores)}" and sum(int(x.strip(" |")) for x in counts[5:]) == len(STUDY.scores)
    photographs.draw_chart(figures, tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").size[0] > 500
    assert "then 6 methods with 2 settings each: 28 runs of 2 steps" in photographs.tried()


def test_the_verdict_counts_leads_beyond_the_deviation_and_the_interval(monkeypatch):
    """By the reward alone, without the columns that are decided, and with them."""

    def run(scores, resampled):
        return None, {"scores": scores, "resampled": resampled}

    label, trick = run([0.1, 0.2, 0.3], [10, 20, 30]), run([0.2, 0.3, 0.4], [15, 25, 35])
    ahead, level, behind = (run([a + x for x in (0.1, 0.2, 0.3)], [b + x for x in (10, 20, 30)])
                            for a, b in ((0.3, 9), (0.0, 5), (-0.1, 2)))  # fmt: skip
    unsure = run([0.0, 0.4, 0.3], [0, 25, 40])  # a lead of 0.03 with a deviation of 0.15
    better = run([0.41, 0.51, 0.6], [10, 20, 30])  # than all others
    rows = {BY_REWARD: [ahead, unsure, behind, level], BY_REWARD[::2]: [ahead, ahead, level, behind]}
    rows |= {BY_REWARD[:1]: [behind, behind]}
    monkeypatch.setattr(
        photographs, "complete_rows", lambda _, by: [(None, (label, better, trick, own)) for own in rows[by]]
    )
    alone, undecided, decided = (line.split(" | ")[1:] for line in photographs.verdict(None).splitlines()[2:])
    assert alone == ["2", "0", "2", "0", "2", "0", "0", "2 |"]
    assert undecided == ["4", "2", "1", "0", "4", "2", "1", "1 |"]
    assert decided == ["4", "1", "1", "0", "4", "1", "2", "1 |"]


@pytest.mark.parametrize("frozen", [1, 2])  # 2: the head alone is trained, after a run that trained the last block
def test_of_a_run_is_kept_what_was_trained_and_what_the_whole_network_predicts(frozen, tmp_path, monkeypatch):
    """Through the tokens that are the same for all runs; weights that were frozen otherwise are refused."""
    monkeypatch.setattr(photographs, "ROOT", tmp_path)
    make_folders(tmp_path)
    runner = Runs(Figures(tmp_path / "f.json"), Source(tmp_path, tmp_path / "vit.pth"))
    run, other = photographs.runs_of(STUDY, "label", next(iter(SETTINGS)), "x")[:2]
    cells.make_folds(tmp_path / "train", photographs.folds_of(STUDY))
    config, task = configure(("", flatten(TINY, "") | {"training.freeze_blocks": frozen, "model.dropout": 0.5}))
    model = build_model(task, 3, torch.device("cpu"))
    about = {"config": config, "classes": ["0", "1", "4"], "model": model.state_dict(), "step": 1, "optimizer": {}}
    for name in (run.name, other.name):
        save_checkpoint(about, tmp_path / "ckpt" / name, best=False, keep=1)
        (tmp_path / "logs" / name).mkdir(parents=True)

    def draws(*key):
        assert runner.alone._is_owned()  # threads share torch's random state
        return keyed_rng(*key)

    monkeypatch.setattr(photographs, "keyed_rng", draws)
    runner.judge(run)
    found = runner.predictions(run, "held")
    dataset = task.open(str(tmp_path / "folds" / "cifar10" / "0" / "held"), about["classes"])
    with keyed_rng(0, "predict"):
        masks = model.sample_masks(1, judging.PASSES)
    masks = {name: mask.expand(len(dataset), -1, -1, -1) for name, mask in masks.items()}
    outputs = task.network(model)(torch.stack([dataset[i] for i in range(len(dataset))]), masks)
    assert torch.allclose(found["probs"], outputs.softmax(-1).mean(1), atol=1e-5) and len(found["unit"].unique()) == 6
    assert torch.equal(found["targets"], dataset.targets) and not (tmp_path / "ckpt" / run.name).exists()
    kept = photographs.load(runner.path("models", run))["model"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= set(kept)
    assert set(kept) == {name for name in about["model"] if layer_of(name, 2) > 1}
    runner.jobs = 2
    runner.predict_all([run], "eval")
    assert len(photographs.load(runner.path("predictions", run, "eval"))["targets"]) == 12
    about["model"]["cls_token"] += 1
    save_checkpoint(about, tmp_path / "ckpt" / other.name, best=False, keep=1)
    with pytest.raises(SystemExit, match="of other weights than --start"):
        runner.judge(other)


def test_pictures_are_of_the_images_that_differ_most():
    judge, (found, *_) = judging.Pixels(dice_of_one), pixel_found(12, 3)
    other = {"histogram": found["histogram"].clone()}
    for i, shift in ((4, 100), (7, 200)):
        other["histogram"][i] = other["histogram"][i].roll(shift, -1)
    assert set(photographs.differing(judge, [found, other], [None, None], 2)) == {4, 7}


def test_the_tables_of_the_results_are_those_of_the_kept_figures():
    """What stands between the markers is what --tables would write."""
    text, figures = photographs.RESULTS.read_text(encoding="utf-8"), Figures(photographs.FIGURES)
    parts = {study.name: photographs.table(figures, study) for study in DATA_SETS.values()}
    parts |= {"verdict": photographs.verdict(figures), "training": photographs.training_table(figures)}
    for name, written in (parts | {"tried": photographs.tried()}).items():
        assert f"<!-- photographs-{name} -->\n{written}\n<!-- /photographs-{name} -->" in text
    readme = photographs.README.read_text(encoding="utf-8")
    if "<!-- photographs -->" in readme:
        assert f"<!-- photographs -->\n{photographs.small_table(figures)}\n<!-- /photographs -->" in readme
