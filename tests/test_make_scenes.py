"""data/make_scenes.py: the masks, the boxes and the pictures are of the same scenes, and these follow from the seed."""

import importlib.util
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("make_scenes", ROOT / "data" / "make_scenes.py")
make_scenes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_scenes)
TRAIN, EVAL = 60, 12


def write(out: Path, *options: str, train=TRAIN, evaluation=EVAL) -> dict[str, bytes]:
    """Runs the script into `out`; every file's bytes by its path there."""
    assert make_scenes.main(["--out", str(out), "--train", str(train), "--eval", str(evaluation), *options]) == 0
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def read(folder: Path) -> tuple[dict, np.ndarray, np.ndarray]:
    """The annotations, the images [n, H, W] and the masks [n, H, W] of one split."""
    coco = json.loads((folder / "annotations.json").read_text())
    names = [image["file_name"] for image in coco["images"]]
    images, masks = ([Image.open(folder / part / name) for name in names] for part in ("images", "masks"))
    assert {picture.mode for picture in images + masks} == {"L"}
    return coco, np.stack(images), np.stack(masks)


def inside(mask: np.ndarray, box: list[float]) -> np.ndarray:
    x, y, w, h = (int(v) for v in box)
    return mask[y : y + h, x : x + w]


def by_image(coco: dict) -> list[list[dict]]:
    return [[a for a in coco["annotations"] if a["image_id"] == image["id"]] for image in coco["images"]]


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("binary")
    write(out)
    return out


@pytest.fixture(scope="module")
def eleven(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("eleven")
    write(out, "--mask-classes", "11")
    return out


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_scenes(tmp_path):
    first = write(tmp_path / "a", train=5, evaluation=2)
    assert write(tmp_path / "a", train=5, evaluation=2) == write(tmp_path / "b", train=5, evaluation=2) == first
    other = write(tmp_path / "c", "--seed", "1", train=5, evaluation=2)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first if "images" in name)


def test_a_scene_does_not_depend_on_how_many_there_are_or_on_the_mask_classes(tmp_path, binary, eleven):
    few = write(tmp_path, train=3, evaluation=1)
    scenes = [name for name in few if name.endswith(".png")]
    assert len(scenes) == 16 and all((binary / name).read_bytes() == few[name] for name in scenes)
    assert all((eleven / name).read_bytes() == few[name] for name in scenes if "images" in name)
    few, many = (json.loads((out / "train" / "annotations.json").read_text()) for out in (tmp_path, binary))
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]
    assert (binary / "train/images/000000.png").read_bytes() != (binary / "eval/images/000000.png").read_bytes()


def test_noisy_scenes_are_the_same_scenes_under_more_noise(binary):
    for split in ("train", "eval"):
        (coco, images, masks), (noisy_coco, noisy_images, noisy_masks) = map(
            read, (binary / split, binary / f"noisy_{split}")
        )
        assert coco == noisy_coco and np.array_equal(masks, noisy_masks)
        assert all((image != noisy).mean() > 0.5 for image, noisy in zip(images, noisy_images))


@pytest.mark.parametrize("noise", make_scenes.NOISE.values(), ids=make_scenes.NOISE)
def test_noise_has_the_standard_deviation_it_says(noise):
    """Against the same scenes without noise, where hardly a pixel is clipped at black or white."""
    digits, spread = make_scenes.load_digits(ROOT / "data" / "train"), []
    for i in range(60):
        (noisy, mask, _), (clean, same_mask, _) = (
            make_scenes.make_scene(digits, 32, level, np.random.default_rng(i)) for level in (noise, (0, 0))
        )
        assert np.array_equal(mask, same_mask)
        grey = abs(clean - 127.0) < 20
        if grey.sum() > 100:
            spread.append((noisy.astype(float) - clean)[grey].std())
    assert len(spread) > 5
    assert noise[0] * 0.8 < min(spread) and max(spread) < noise[1] * 1.2
    assert np.mean(spread) == pytest.approx(np.mean(noise), rel=0.15)


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN), ("eval", EVAL)])
def test_counts_sizes_and_categories(binary, split, count):
    coco, images, masks = read(binary / split)
    names = [f"{i:06d}.png" for i in range(count)]
    assert images.shape == masks.shape == (count, 32, 32)
    assert [image["file_name"] for image in coco["images"]] == names
    assert all(sorted(path.name for path in (binary / split / part).iterdir()) == names for part in ("images", "masks"))
    assert all((image["width"], image["height"]) == (32, 32) for image in coco["images"])
    assert [(c["id"], c["name"]) for c in coco["categories"]] == [(d + 1, str(d)) for d in range(10)]
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    assert all(1 <= len(annotations) <= 4 for annotations in by_image(coco))


def test_masks_hold_the_classes_of_classes_txt(binary, eleven):
    for out, names in (
        (binary, ["background", "digit"]),
        (eleven, ["background", *(str(d) for d in range(10))]),
    ):
        masks = read(out / "train")[2]
        assert (out / "train" / "classes.txt").read_text().splitlines() == names
        assert np.unique(masks).tolist() == list(range(len(names)))
    assert np.array_equal(read(binary / "train")[2], read(eleven / "train")[2] > 0)


def test_boxes_lie_inside_the_image_and_hold_foreground(binary):
    coco, _, masks = read(binary / "train")
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and w >= 1 and h >= 1 and x + w <= 32 and y + h <= 32
        assert all(isinstance(v, float) for v in (x, y, w, h)) and annotation["iscrowd"] == 0
        assert inside(masks[annotation["image_id"]], annotation["bbox"]).sum() >= 0.4 * annotation["area"]


def test_the_only_digit_of_a_scene_fills_its_box(eleven):
    coco, images, masks = read(eleven / "train")
    single = [annotations[0] for annotations in by_image(coco) if len(annotations) == 1]
    assert len(single) >= 5
    for annotation in single:
        mask, image = masks[annotation["image_id"]], images[annotation["image_id"]]
        ys, xs = np.nonzero(mask)
        box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert annotation["bbox"] == box and annotation["area"] == len(xs)
        assert set(mask[ys, xs]) == {annotation["category_id"]}
        assert image[mask > 0].mean() > image[mask == 0].mean() + 40


def test_digits_overlap_a_little_and_masks_agree_with_the_categories(eleven):
    coco, _, masks = read(eleven / "train")
    overlaps, alone = [], 0
    for annotations, mask in zip(by_image(coco), masks):
        union = np.zeros(mask.shape, dtype=bool)
        for annotation in annotations:
            others = [make_scenes.iou(annotation["bbox"], a["bbox"]) for a in annotations if a is not annotation]
            part = inside(mask, annotation["bbox"])
            inside(union, annotation["bbox"])[:] = True
            assert (part == annotation["category_id"]).sum() >= 0.4 * annotation["area"]
            if not any(others):
                alone += 1
                assert set(np.unique(part)) - {0} == {annotation["category_id"]}
                assert (part > 0).sum() == annotation["area"]
        assert not mask[~union].any()
        overlaps += [make_scenes.iou(a["bbox"], b["bbox"]) for a, b in combinations(annotations, 2)]
    assert alone >= 20 and 0 < max(overlaps) <= 0.2


def test_iou_against_pixels_counted():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (tuple(int(v) for v in rng.integers(1, 8, 4)) for _ in range(2))
        drawn = np.zeros((2, 16, 16), dtype=bool)
        for canvas, box in zip(drawn, (a, b)):
            inside(canvas, box)[:] = True
        assert make_scenes.iou(a, b) == pytest.approx(drawn.all(0).sum() / drawn.any(0).sum())


def test_pycocotools_reads_the_annotations(binary):
    coco, total = COCO(binary / "train" / "annotations.json"), 0
    assert len(coco.getImgIds()) == TRAIN and coco.getCatIds() == list(range(1, 11))
    for image in coco.getImgIds():
        total += len(coco.loadAnns(coco.getAnnIds(imgIds=[image])))
    assert total == len(coco.anns) == len(coco.dataset["annotations"])
    assert len(coco.loadRes([{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]).anns) == 1


@pytest.mark.parametrize("size", [24, 48])
def test_digits_scale_with_the_size(tmp_path, size):
    write(tmp_path, "--size", str(size), train=20, evaluation=1)
    coco, images, _ = read(tmp_path / "train")
    heights = [a["bbox"][3] for a in coco["annotations"]]
    assert images.shape == (20, size, size)
    assert size * 0.25 <= min(heights) and size * 0.45 <= max(heights) <= size * 0.6


def test_every_digit_leaves_a_mask_at_the_smallest_size():
    for digits in (make_scenes.load_digits(ROOT / "data" / split) for split in ("train", "eval")):
        for scan in sum(digits, []):
            for seed in range(3):
                assert (make_scenes.draw_ink([[scan]], 16, np.random.default_rng(seed))[1] > 0.5).sum() >= 2


def fails(capsys, *argv: str) -> str:
    """The one line of a run that exits with 2."""
    with pytest.raises(SystemExit) as stop:
        make_scenes.main(list(argv))
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert printed.err.startswith("make_scenes.py: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--size", "15"), ("--train", "0"), ("--eval", "-1"), ("--seed", "-1"), ("--mask-classes", "3"), ("--train", "x")],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, option, value):
    assert option in fails(capsys, "--out", str(tmp_path / "out"), option, value)
    assert not (tmp_path / "out").exists()


def test_missing_digits_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_scenes, "HERE", tmp_path)
    assert str(tmp_path / "train" / "0") in fails(capsys, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_files_of_other_names_stay_and_stop_the_run(tmp_path, capsys):
    """Scenes of an earlier, larger run are such files too: they have no annotations in the smaller one."""
    before = write(tmp_path, train=3, evaluation=1)
    capsys.readouterr()
    message = fails(capsys, "--out", str(tmp_path), "--train", "2", "--eval", "1", "--seed", "1")
    assert str(tmp_path / "noisy_train" / "images" / "000002.png") in message
    assert (tmp_path / "train" / "images" / "000000.png").read_bytes() == before["train/images/000000.png"]
    assert str(tmp_path / "train") in fails(capsys, "--out", str(tmp_path / "train" / "classes.txt"))
