"""predict.py: what it says of an image is what --evaluate counts and depends on nothing else; pictures; bad input."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_scenes, refused
from PIL import Image, ImageChops, ImageFilter

import predict
import train
from build import TASKS
from evaluation import classification_metrics

DIGITS = str(ROOT / "data" / "eval")
RUNS = {  # of the shipped configs, one each: enough steps to predict something
    "digits": ["training.steps=600", "training.batch_size=32"],
    "segmentation": ["training.steps=20", "training.batch_size=16"],
    "detection": ["training.steps=20", "training.batch_size=16", "detection.score_threshold=0.01"],
}
COMMON = ["training.objective=supervised", "training.warmup_steps=5", "rollout.num_mc_samples=3", "data.num_workers=0"]
COMMON += ["training.eval_interval=999", "training.save_interval=999", "model.depth=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """scenes/train (64) and scenes/eval (8), each with masks and boxes."""
    root = tmp_path_factory.mktemp("predict")
    assert make_scenes.main(["--out", str(root / "scenes"), "--train", "64", "--eval", "8"]) == 0
    return root


@cache
def trained(root: Path, name: str) -> str:
    """ckpt/<run>. Trained once, but within a test, because `process_state` puts back what `train.main` changes."""
    data = ROOT / "data" if name == "digits" else root / "scenes"
    folders = [f"training.ckpt_dir={root}/ckpt", f"training.log_dir={root}/logs"]
    folders += [f"data.train_dir={data}/train", f"data.eval_dir={data}/eval"]
    assert train.main(["--config", str(ROOT / f"config_{name}.yaml"), *folders, *COMMON, *RUNS[name]]) == 0
    return f"{root}/ckpt/config_{name}"


@pytest.fixture
def digits(root) -> str:
    """A classifier that is right about nineteen times in twenty."""
    return trained(root, "digits")


def run(capsys, *arguments, status: int = 0) -> str:
    """predict.py in this process; what it prints on stdout. Nothing is on stderr if it succeeds."""
    capsys.readouterr()
    assert predict.main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    assert bool(err) == bool(status)
    return out


def as_json(capsys, *arguments, status: int = 0) -> dict:
    return json.loads(run(capsys, *arguments, "--json", status=status))


def changed(checkpoint: str, path: Path, **sections: dict) -> str:
    """The checkpoint with other keys in sections of its config, as the file `path`."""
    state = torch.load(f"{checkpoint}/last.pt", weights_only=True)
    for section, keys in sections.items():
        state["config"][section] |= keys
    torch.save(state, path)
    return str(path)


def test_json_of_the_images_is_what_evaluate_counts(digits, capsys):
    """Accuracy, NLL and ECE of the JSON's probabilities are --evaluate's to the bit, and so is every rejection, which
    raises the accuracy."""
    document, evaluated = as_json(capsys, digits, DIGITS), as_json(capsys, digits, "--evaluate", DIGITS)
    images, rejected = document["images"], evaluated["accuracy_when_rejected"]
    assert len(images) == evaluated["num_images"] == 360 and document["passes"] == evaluated["passes"] == 3
    truth = [Path(image["path"]).parent.name for image in images]
    right = [image["class"] == name for image, name in zip(images, truth)]
    rows = [[image["probabilities"][name] for name in document["classes"]] for image in images]
    probs = torch.tensor(rows, dtype=torch.float64).float()
    expected = classification_metrics(probs, torch.tensor([document["classes"].index(name) for name in truth]))
    assert {name: evaluated["figures"][f"eval_mc/{name}"] for name in ("accuracy", "nll", "ece")} == expected
    assert sum(right) / 360 == expected["accuracy"]
    order = sorted(range(360), key=lambda i: images[i]["predictive_entropy"])
    for percent in (0, 5, 10, 20, 50):
        kept = order[: 360 - 360 * percent // 100]
        assert rejected[str(percent)] == pytest.approx(sum(right[i] for i in kept) / len(kept), abs=1e-12)
    assert 0.9 < rejected["0"] < rejected["10"] - 0.02 < 0.98
    for image, row in zip(images, probs):
        assert image["probability"] == max(image["probabilities"].values())
        assert image["predictive_entropy"] == pytest.approx(float(-(row * row.log()).sum()), abs=1e-6)
        assert sum(image["probabilities"].values()) == pytest.approx(1, abs=1e-6)


def test_without_dropout_the_passes_agree(digits, tmp_path, capsys):
    """The same weights with model.dropout 0: no mutual information, and the passes are the deterministic network."""
    dry = changed(digits, tmp_path / "dry.pt", model={"dropout": 0.0}, rollout={"num_mc_samples": 1})
    largest = [
        max(image["mutual_information"] for image in as_json(capsys, *command, f"{DIGITS}/8")["images"])
        for command in ([dry, "--passes", 5], [digits])
    ]
    assert largest[0] < 1e-6 and largest[1] > 1e-3
    metrics = as_json(capsys, dry, "--evaluate", DIGITS)["figures"]
    assert metrics["eval/nll"] == pytest.approx(metrics["eval_mc/nll"], abs=1e-6)


def test_noise_is_more_uncertain_than_digits(digits, tmp_path, capsys):
    """Digits blurred until none can be read, under strong noise: at least twice the predictive entropy."""
    for path in sorted(Path(DIGITS).glob("*/*.png"))[::4]:
        blurred = Image.open(path).convert("L").filter(ImageFilter.GaussianBlur(4))
        ImageChops.add(blurred, Image.effect_noise(blurred.size, 40), offset=-128).save(tmp_path / path.name)
    noise, clean = (
        np.mean([image["predictive_entropy"] for image in as_json(capsys, digits, folder)["images"]])
        for folder in (tmp_path, DIGITS)
    )
    assert len(os.listdir(tmp_path)) == 90 and noise >= 2 * clean


def test_what_is_said_of_an_image_depends_on_nothing_else(digits, capsys):
    """The same bits in another order, with other images, alone and again; with other batches but for rounding."""
    paths = [str(path) for path in sorted(Path(DIGITS).glob("*/*.png"))[::9]]  # 40: two batches and a half
    first = as_json(capsys, digits, *paths)["images"]
    assert [image["path"] for image in first] == paths
    assert as_json(capsys, digits, *paths)["images"] == first
    assert as_json(capsys, digits, *paths[::-1])["images"] == first[::-1]
    assert as_json(capsys, digits, paths[7])["images"] == [first[7]]
    assert as_json(capsys, digits, *paths[:5], DIGITS)["images"][:5] == first[:5]
    for batch_size in (1, 7, 64):
        other = as_json(capsys, digits, *paths, "--batch-size", batch_size)["images"]
        for a, b in zip(first, other, strict=True):
            uncertainties = [[x["predictive_entropy"], x["mutual_information"]] for x in (a, b)]
            assert uncertainties[0] == pytest.approx(uncertainties[1], abs=1e-5)
            assert a["class"] == b["class"] and b["probabilities"] == pytest.approx(a["probabilities"], abs=1e-5)


def test_passes_can_be_set(digits, tmp_path, capsys):
    """One has nothing to disagree with, and may be asked for where training cannot do with one."""
    digits = changed(digits, tmp_path / "argmax.pt", rollout={"action": "argmax"})
    for passes in (1, 9):
        document = as_json(capsys, digits, f"{DIGITS}/3", "--passes", passes)
        mutual = max(image["mutual_information"] for image in document["images"])
        assert document["passes"] == passes and (mutual == 0) == (passes == 1)
    one, three = (as_json(capsys, digits, "--evaluate", DIGITS, *options) for options in (["--passes", "1"], []))
    assert one["figures"]["eval/nll"] == three["figures"]["eval/nll"]


def test_the_deterministic_metrics_are_those_of_the_training(digits, capsys):
    """eval/… is what train.py --evaluate says of the same checkpoint."""
    assert train.main(["--evaluate", digits]) == 0
    trained_line = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
    out = run(capsys, digits, "--evaluate", DIGITS).splitlines()
    assert out[0] == f"{DIGITS}: 360 images, T = 3"
    assert trained_line.partition(" (")[0].startswith(out[1].partition(" (")[0] + " classification_reward 0.")
    assert [line.split()[-2] for line in out[2:]] == ["0", "5", "10", "20", "50"]


def test_the_table_says_what_the_json_says(digits, capsys):
    images = as_json(capsys, f"{digits}/last.pt", f"{DIGITS}/5")["images"]
    header, *rows = run(capsys, digits, f"{DIGITS}/5").splitlines()
    assert header.split() == ["image", "entropy", "mutual", "information", "found"]
    for image, row in zip(images, rows, strict=True):
        numbers = [f"{image[name]:.4f}" for name in ("predictive_entropy", "mutual_information")]
        assert row.split() == [image["path"], *numbers, image["class"], f"({image['probability']:.1%})"]


def test_pictures(digits, tmp_path, capsys):
    """One per image, of the same name below the folder; a name that is taken is numbered; nothing is overwritten."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/x.png", "a/b/x.png", "a/b/X.PNG", "X.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    Image.new("RGB", (3000, 600)).save(tmp_path / "a" / "wide.jpg")
    images = as_json(capsys, digits, tmp_path / "a", tmp_path / "X.png", "--out", tmp_path / "out")["images"]
    written = [os.path.relpath(image["picture"], tmp_path / "out") for image in images]
    assert written == ["b/X.png", "b/x-2.png", "wide.png", "x.png", "X-2.png"]
    sizes = [Image.open(image["picture"]).size for image in images]
    assert sizes[0][0] == 256 and sizes[0][1] > 256 and sizes[2][0] == 1024 and sizes[2][1] > 205
    for taken in ("out", "X.png"):
        text = refused(capsys, predict.main, digits, f"{tmp_path}/a", "--out", f"{tmp_path}/{taken}")
        assert text == f"{tmp_path}/{taken} exists: nothing is overwritten; name a new folder with --out"


def test_charts_need_matplotlib(digits, tmp_path, capsys, monkeypatch):
    """The metrics by themselves do not."""
    evaluation = digits, "--evaluate", DIGITS
    run(capsys, *evaluation, "--out", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["accuracy_rejection.png", "confusion.png", "most_uncertain.png"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    late = "no checkpoint", "--evaluate", DIGITS, "--out", f"{tmp_path}/none"  # it is said before anything is read
    assert refused(capsys, predict.main, *late).startswith("charts are drawn by matplotlib, which is not installed")
    run(capsys, *evaluation)


@pytest.fixture
def shapes(root, tmp_path) -> dict[str, tuple[int, int]]:
    """Images of other sizes than the model's, turned ones among them: path -> its upright size."""
    source, exif = Image.open(root / "scenes/eval/images/000000.png").convert("RGB"), Image.Exif()
    exif[274] = 6  # turned by a quarter
    sizes = {"wide.png": (70, 40), "one.png": (1, 9), "turned.jpg": (30, 50), "turned.tif": (30, 50)}
    for name, size in sizes.items():
        turned = name.startswith("turned")
        source.resize(size[::-1] if turned else size).save(tmp_path / name, **({"exif": exif} if turned else {}))
    return {str(tmp_path / name): size for name, size in sizes.items()}


def test_masks(root, shapes, tmp_path, capsys):
    """At the image's size, of class values alone, with the shares that are told, and as --evaluate counts them."""
    checkpoint, scenes = trained(root, "segmentation"), root / "scenes" / "eval"
    images = as_json(capsys, checkpoint, *shapes, scenes / "images", "--out", tmp_path / "out")["images"]
    assert len(images) == len(shapes) + 8
    masks = [Image.open(image["mask"]) for image in images]
    for image, mask in zip(images, masks):
        values = np.asarray(mask)
        assert mask.mode == "L" and mask.size == shapes.get(image["path"], (32, 32))
        shares = {"background": float((values == 0).mean()), "digit": float((values == 1).mean())}
        assert image["shares"] == pytest.approx({name: share for name, share in shares.items() if share})
        assert 0 <= image["mutual_information"] <= image["predictive_entropy"] <= math.log(2)
        upright = tuple(max(round(side * 256 / max(mask.size)), 1) for side in mask.size)
        assert Image.open(image["picture"]).size == upright
    assert Path(images[3]["mask"]) == tmp_path / "out" / "masks" / "turned-2.png"
    assert as_json(capsys, checkpoint, *shapes)["images"][0]["shares"] == images[0]["shares"]  # the same without --out
    truths = [Image.open(image["path"].replace("/images/", "/masks/")) for image in images[4:]]
    accuracy = (np.stack(masks[4:]) == np.stack(truths)).mean()
    metrics = as_json(capsys, checkpoint, "--evaluate", scenes)["figures"]
    assert accuracy == metrics["eval_mc/pixel_accuracy"] and metrics["eval_mc/iou/digit"] > 0


def test_boxes(root, shapes, tmp_path, capsys):
    """Inside the image as it is on disk."""
    paths = *shapes, root / "scenes" / "eval" / "images", "--out", tmp_path / "out"
    images = as_json(capsys, trained(root, "detection"), *paths)["images"]
    assert sum(len(image["boxes"]) for image in images) > 10
    for image in images:
        width, height = shapes.get(image["path"], (32, 32))
        for x0, y0, x1, y1 in (box["box"] for box in image["boxes"]):
            assert 0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height
        assert 0 <= image["mutual_information"] <= image["predictive_entropy"] <= math.log(11)
        assert max(Image.open(image["picture"]).size) == 256


@pytest.mark.parametrize("task, charts", [("segmentation", ["confusion.png"]), ("detection", [])])
def test_metrics_of_masks_and_boxes(root, tmp_path, capsys, task, charts):
    """The task's own, twice the same, as JSON and as a line; charts without the curve."""
    evaluation = trained(root, task), "--evaluate", root / "scenes" / "eval"
    metrics = as_json(capsys, *evaluation, "--out", tmp_path / "out")["figures"]
    again = as_json(capsys, *evaluation)
    assert again["figures"] == metrics and "accuracy_when_rejected" not in again
    best = TASKS[task].best
    assert {best, best.replace("eval/", "eval_mc/")} <= metrics.keys()
    out = run(capsys, *evaluation).splitlines()
    assert len(out) == 2 and f"{metrics[best]:.4f}" in out[1]
    assert sorted(os.listdir(tmp_path / "out")) == [*charts, "most_uncertain.png"]


def test_metrics_that_do_not_exist_are_null(root, tmp_path, capsys):
    """mAP where nothing is annotated: JSON has no NaN."""
    shutil.copytree(root / "scenes" / "eval", tmp_path / "eval")
    path = tmp_path / "eval" / "annotations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    out = run(capsys, trained(root, "detection"), "--evaluate", tmp_path / "eval", "--json")
    assert "NaN" not in out and json.loads(out)["figures"]["eval/map"] is None


def test_images_that_cannot_be_decoded(digits, tmp_path, capsys):
    """A line each on stderr, the others are predicted, exit status 2; in a process of its own, as a program sees it."""
    source = sorted(Path(f"{DIGITS}/7").glob("*.png"))[:3]
    for i, path in enumerate(source):
        shutil.copy(path, tmp_path / f"{i}.png")
    (tmp_path / "0a.png").write_text("no image")
    (tmp_path / "1\na.png").write_bytes(source[0].read_bytes()[:40])
    shutil.copy(source[0], tmp_path / "photo")  # named by itself it is taken whatever its suffix
    command = [sys.executable, "predict.py", digits, str(tmp_path), str(tmp_path / "photo"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    images = json.loads(done.stdout)["images"]
    assert [os.path.relpath(image["path"], tmp_path) for image in images] == ["0.png", "1.png", "2.png", "photo"]
    note, *errors = done.stderr.splitlines()
    assert note.startswith("predict.py: not read: 1 without a suffix (the formats that are: .png ")
    for error, name in zip(errors, ("0a.png", r"1\na.png"), strict=True):
        assert error.startswith(f"predict.py: {tmp_path}/{name}: not a readable image (")
    assert images[:3] == as_json(capsys, digits, *(tmp_path / f"{i}.png" for i in range(3)))["images"]
    assert as_json(capsys, digits, tmp_path / "0a.png", status=2)["images"] == []


def test_bad_arguments(digits, tmp_path, capsys, monkeypatch):
    """One line that names the file or option; nothing on stdout."""
    monkeypatch.setenv("HOME", str(tmp_path))
    at = f"{tmp_path}/"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"model": {}}, tmp_path / "weights.pt")
    changed(digits, tmp_path / "width.pt", model={"embed_dim": 32})
    changed(digits, tmp_path / "key.pt", model={"colour": 1})
    state = torch.load(f"{digits}/last.pt", weights_only=True)
    state["model"]["norm.bias"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    for arguments, expected in (
        ([digits], "no images: name files or folders, or --evaluate a folder"),
        ([digits, f"{at}empty"], f"{at}empty: no images (.png "),
        ([digits, DIGITS, f"{at}none.png"], f"{at}none.png: no such file or folder"),
        ([f"{at}none", DIGITS], f"{at}none: no such file"),
        ([f"{at}empty", DIGITS], f"{at}empty/last.pt: no such file"),
        ([f"{at}text.pt", DIGITS], f"{at}text.pt: not a checkpoint that can be read"),
        ([f"{at}weights.pt", DIGITS], f"{at}weights.pt: not a checkpoint of this repo (it has no classes"),
        ([f"{at}width.pt", DIGITS], f"{at}width.pt: its weights do not fit its config; take another checkpoint"),
        ([f"{at}key.pt", DIGITS], f"{at}key.pt: unknown key model.colour"),
        ([f"{at}nan.pt", DIGITS], f"{at}nan.pt: its weights hold NaN or infinity; take another checkpoint"),
        ([digits, DIGITS, "--passes", "0"], "--passes 0: must be at least 1"),
        ([digits, DIGITS, "--batch-size", "-3"], "--batch-size -3: must be at least 1"),
        ([digits, DIGITS, "--reward", "macro_f1"], "--reward macro_f1: it is for --decide reward and for --fit; add "),
        ([digits, DIGITS, "--out=~/text.pt"], f"{at}text.pt exists: nothing is overwritten; name a new folder"),
        ([digits, "~/none.png"], f"{at}none.png: no such file or folder"),
        ([digits, DIGITS, "--evaluate", DIGITS], f"{DIGITS}: --evaluate takes its images from {DIGITS} alone"),
        ([digits, "--evaluate", f"{at}none"], f"{at}none: no such folder"),
        ([digits, "--evaluate", f"{at}empty"], f"{at}empty: no subdirectories"),
        ([digits, "--evaluate", str(tmp_path)], f"{tmp_path}: classes unknown in the training folder: empty"),
        ([digits, DIGITS, "--out", f"{at}text.pt/out"], "[Errno 20] Not a directory"),
    ):
        assert run(capsys, *arguments, status=2) == ""
        assert refused(capsys, predict.main, *arguments).startswith(expected)


def test_an_evaluation_leaves_bad_images_out_if_the_run_did(digits, tmp_path, capsys):
    """data.on_bad_image: skip of the checkpoint: the file is named on stderr once, the metrics and counts are those
    without it, and the exit status tells. Too many of them, or nothing else, end in one line."""
    for path in sorted(Path(DIGITS).glob("*/*.png"))[::12]:
        (tmp_path / "eval" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "eval" / path.parent.name)
    evaluation = "--evaluate", f"{tmp_path}/eval", "--json"
    without = as_json(capsys, digits, *evaluation)["figures"]
    bad = tmp_path / "eval" / "3" / "bad.png"
    bad.write_text("no picture")
    assert refused(capsys, predict.main, digits, *evaluation).startswith(f"{bad}: not a readable image")
    skipping = changed(digits, tmp_path / "skip.pt", data={"on_bad_image": "skip"})
    assert predict.main([skipping, *evaluation]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and f"{bad}: not a readable image" in err
    assert json.loads(out)["figures"] == pytest.approx(without, abs=1e-9)
    good = len(list(Path(tmp_path / "eval").glob("*/*.png"))) - 1
    assert json.loads(out)["num_images"] == good
    assert predict.main([skipping, "--evaluate", f"{tmp_path}/eval"]) == 2
    assert capsys.readouterr().out.startswith(f"{tmp_path}/eval: {good} of {good + 1} images, T = ")
    for i in range(3):
        bad.with_name(f"bad{i}.png").write_text("no picture")
    assert predict.main([skipping, *evaluation]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"predict.py: data.on_bad_image: skip: 4 of {good + 4} images cannot be decoded, ")
    for path in (tmp_path / "eval").glob("*/*.png"):
        path.unlink() if path.parent.name > "1" else path.write_text("no picture")
    for path in sorted((tmp_path / "eval").glob("*/*.png"))[3:]:
        path.unlink()
    assert predict.main([skipping, *evaluation]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == f"predict.py: {tmp_path}/eval: none of its 3 images can be decoded"
    )
    folder = str(tmp_path / "eval")
    assert predict.main([digits, folder, folder]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 4 and err.endswith("predict.py: none of the 6 images can be decoded\n")
