"""data/make_scenes.py: the masks, the boxes and the pictures are of the same scenes, and these follow from the seed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_scenes
from PIL import Image
from pycocotools.coco import COCO

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
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Scenes with masks of two classes, and with masks of eleven."""
    binary, eleven = (tmp_path_factory.mktemp(name) for name in ("binary", "eleven"))
    write(binary)
    write(eleven, "--mask-classes", "11")
    return binary, eleven


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_scenes(tmp_path):
    first = write(tmp_path / "a", train=5, evaluation=2)
    assert write(tmp_path / "a", train=5, evaluation=2) == write(tmp_path / "b", train=5, evaluation=2) == first
    other = write(tmp_path / "c", "--seed", "1", train=5, evaluation=2)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first if "images" in name)


def test_a_scene_does_not_depend_on_how_many_there_are_or_on_the_mask_classes(tmp_path, folders):
    binary, eleven = folders
    few = write(tmp_path, train=3, evaluation=1)
    scenes = [name for name in few if name.endswith(".png")]
    assert len(scenes) == 16 and all((binary / name).read_bytes() == few[name] for name in scenes)
    assert all((eleven / name).read_bytes() == few[name] for name in scenes if "images" in name)
    few, many = (json.loads((out / "train" / "annotations.json").read_text()) for out in (tmp_path, binary))
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]
    assert (binary / "train/images/000000.png").read_bytes() != (binary / "eval/images/000000.png").read_bytes()


@pytest.mark.parametrize("split, count", [("train", TRAIN), ("eval", EVAL)])
def test_counts_sizes_and_categories(folders, split, count):
    coco, images, masks = read(folders[0] / split)
    names = [f"{i:06d}.png" for i in range(count)]
    assert images.shape == masks.shape == (count, 32, 32)
    assert coco["images"] == [{"id": i, "file_name": n, "width": 32, "height": 32} for i, n in enumerate(names)]
    assert all(sorted(os.listdir(folders[0] / split / part)) == names for part in ("images", "masks"))
    assert coco["categories"] == [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    assert [a["id"] for a in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    assert all(1 <= len(annotations) <= 4 for annotations in by_image(coco))


def test_pycocotools_reads_the_annotations(folders):
    coco = COCO(folders[0] / "train" / "annotations.json")
    assert len(coco.getImgIds()) == TRAIN and coco.getCatIds() == list(range(1, 11))
    assert len(coco.loadAnns(coco.getAnnIds(imgIds=coco.getImgIds()))) == len(coco.dataset["annotations"])
    assert len(coco.loadRes([{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]).anns) == 1


def test_noisy_scenes_are_the_same_scenes_under_more_noise(folders):
    for split in ("train", "eval"):
        coco, images, masks = read(folders[0] / split)
        noisy_coco, noisy_images, noisy_masks = read(folders[0] / f"noisy_{split}")
        assert coco == noisy_coco and np.array_equal(masks, noisy_masks)
        assert ((images != noisy_images).mean((1, 2)) > 0.5).all()


@pytest.mark.parametrize("noise", make_scenes.NOISE.values(), ids=make_scenes.NOISE)
def test_noise_has_the_standard_deviation_it_says(noise):
    """Against the same scenes without noise, where hardly a pixel is clipped at black or white."""
    digits, spread = make_scenes.load_digits(ROOT / "data" / "train"), []
    for i in range(60):
        noisy, clean = (
            make_scenes.make_scene(digits, 32, level, np.random.default_rng(i))[0] for level in (noise, (0, 0))
        )
        grey = abs(clean - 127.0) < 20
        if grey.sum() > 100:
            spread.append((noisy.astype(float) - clean)[grey].std())
    assert len(spread) > 5 and noise[0] * 0.8 < min(spread) and max(spread) < noise[1] * 1.2
    assert np.mean(spread) == pytest.approx(np.mean(noise), rel=0.15)


def test_masks_hold_the_classes_of_classes_txt(folders):
    two, eleven = (read(out / "train")[2] for out in folders)
    for out, masks, names in zip(folders, (two, eleven), (["digit"], map(str, range(10)))):
        classes = (out / "train" / "classes.txt").read_text().splitlines()
        assert classes == ["background", *names] and np.unique(masks).tolist() == list(range(len(classes)))
    assert np.array_equal(two, eleven > 0)


def test_boxes_and_masks_are_of_the_same_digits(folders):
    """A box lies in the image and holds at least 0.4 of its digit; one that overlaps no other is tight. Digits are
    brighter than what is around them."""
    coco, images, masks = read(folders[1] / "train")
    overlaps, alone = [], 0
    for annotations, image, mask in zip(by_image(coco), images, masks):
        drawn = np.zeros((len(annotations), 32, 32), dtype=bool)
        for canvas, annotation in zip(drawn, annotations):
            x, y, w, h = box = annotation["bbox"]
            assert x >= 0 and y >= 0 and w >= 1 and h >= 1 and x + w <= 32 and y + h <= 32
            assert all(isinstance(v, float) for v in box) and annotation["iscrowd"] == 0
            inside(canvas, box)[:] = True
        ious = (drawn[:, None] & drawn).sum((2, 3)) / (drawn[:, None] | drawn).sum((2, 3)) - np.eye(len(drawn))
        for annotation, others in zip(annotations, ious):
            part, area = inside(mask, annotation["bbox"]), annotation["area"]
            assert (part == annotation["category_id"]).sum() >= 0.4 * area
            if not others.any():
                alone += 1
                assert set(np.unique(part)) - {0} == {annotation["category_id"]} and (part > 0).sum() == area
                assert all(part[[0, -1]].any(1)) and all(part[:, [0, -1]].any(0))
        assert not mask[~drawn.any(0)].any()
        assert len(annotations) > 1 or image[mask > 0].mean() > image[mask == 0].mean() + 40
        overlaps.append(ious.max())
    assert alone >= 20 and 0 < max(overlaps) <= 0.2


@pytest.mark.parametrize("size", [24, 48])
def test_digits_scale_with_the_size(tmp_path, size):
    write(tmp_path, "--size", str(size), train=20, evaluation=1)
    coco, images, _ = read(tmp_path / "train")
    heights = [a["bbox"][3] for a in coco["annotations"]]
    assert images.shape == (20, size, size)
    assert size * 0.25 <= min(heights) and size * 0.45 <= max(heights) <= size * 0.6


def test_every_digit_leaves_a_mask_at_the_smallest_size():
    digits = (make_scenes.load_digits(ROOT / "data" / split) for split in ("train", "eval"))
    for scan in sum(sum(digits, []), []):
        for seed in range(3):
            assert (make_scenes.draw_ink([[scan]], 16, np.random.default_rng(seed))[1] > 0.5).sum() >= 2


def fails(capsys, out: Path, *argv: str) -> str:
    """The one line of a run into `out` that exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        make_scenes.main(["--out", str(out), *argv])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert printed.err.startswith("make_scenes.py: ") and printed.err.count("\n") == 1
    return printed.err


def test_bad_arguments_and_missing_digits_are_one_line(tmp_path, monkeypatch, capsys):
    for argument in ("--size 15", "--train 0", "--eval -1", "--seed -1", "--mask-classes 3", "--train x"):
        assert argument.split()[0] in fails(capsys, tmp_path / "out", *argument.split())
    monkeypatch.setattr(make_scenes, "HERE", tmp_path)
    assert str(tmp_path / "train" / "0") in fails(capsys, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_other_names_stay_and_stop_the_run(tmp_path, capsys):
    """Scenes of an earlier, larger run are such files too: they have no annotations in the smaller one."""
    before = write(tmp_path, train=3, evaluation=1)
    line = fails(capsys, tmp_path, "--train", "2", "--eval", "1", "--seed", "1")
    assert str(tmp_path / "noisy_train" / "images" / "000002.png") in line
    assert (tmp_path / "train" / "images" / "000000.png").read_bytes() == before["train/images/000000.png"]
    assert str(tmp_path / "train") in fails(capsys, tmp_path / "train" / "classes.txt")
