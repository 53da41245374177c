"""predict.py: what it says of an image is what --evaluate counts and depends on nothing else; pictures; bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch.distributions import Distribution

import predict
import train
from config import check
from vision_task import classification_metrics

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "data" / "eval")
DENSE = {  # of scenes of 32x32 pixels: enough steps to predict something
    "segmentation": ["training.steps=30"],
    "detection": ["training.steps=40", "training.objective=supervised", "detection.score_threshold=0.01"],
}
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

# --- Helpers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models; what `train.main` changes in the process is put back."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers, threads = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    validate = Distribution._validate_args
    torch.set_num_threads(1)
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    Distribution.set_default_validate_args(validate)


def trained(root: Path, config: str, *overrides: str) -> str:
    """ckpt/<run> of a run of a shipped config."""
    folders = [f"training.ckpt_dir={root}/ckpt", f"training.log_dir={root}/logs"]
    rare = ["training.eval_interval=999", "training.save_interval=999", "data.num_workers=0"]
    assert train.main(["--config", str(ROOT / f"{config}.yaml"), *folders, *rare, *overrides]) == 0
    return str(root / "ckpt" / config)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    """A classifier of 50 training digits a class: right about nine times in ten."""
    root = tmp_path_factory.mktemp("digits")
    for name in "0123456789":
        (root / "train" / name).mkdir(parents=True)
        for path in sorted((ROOT / "data" / "train" / name).glob("*.png"))[:50]:
            shutil.copy(path, root / "train" / name)
    keys = [f"data.train_dir={root}/train", f"data.eval_dir={DIGITS}", "training.steps=400", "training.batch_size=48"]
    return trained(root, "config_digits", *keys)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """train (64 scenes) and eval (8), each with masks and boxes."""
    root = tmp_path_factory.mktemp("scenes")
    command = [
        sys.executable,
        str(ROOT / "data" / "make_scenes.py"),
        "--out",
        str(root),
        "--train",
        "64",
        "--eval",
        "8",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return root


@pytest.fixture(scope="module")
def dense(tmp_path_factory, scenes) -> dict[str, str]:
    """Task -> ckpt/<run>."""
    root = tmp_path_factory.mktemp("dense")
    folders = [f"data.train_dir={scenes}/train", f"data.eval_dir={scenes}/eval"]
    common = ["training.batch_size=16", "training.warmup_steps=5", "rollout.num_mc_samples=3"]
    return {task: trained(root, f"config_{task}", *folders, *common, *keys) for task, keys in DENSE.items()}


def run(capsys, *arguments, status: int = 0) -> str:
    """predict.py in this process; what it prints on stdout. Nothing is on stderr if it succeeds."""
    capsys.readouterr()
    assert predict.main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    assert bool(err) == bool(status)
    return out


def as_json(capsys, *arguments, status: int = 0) -> dict:
    return json.loads(run(capsys, *arguments, "--json", status=status))


def refused(capsys, *arguments) -> str:
    """The one line on stderr of a command that exits with 2 and prints nothing else, without its `predict.py: `."""
    capsys.readouterr()
    assert predict.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("predict.py: ") and not out
    return lines[0].removeprefix("predict.py: ")


def probabilities(document: dict) -> torch.Tensor:
    """The images' class probabilities, float32 [n, K]."""
    rows = [[image["probabilities"][name] for name in document["classes"]] for image in document["images"]]
    return torch.tensor(rows, dtype=torch.float64).float()


# --- Uncertainty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3), (4, 10), (5, 6, 2), (3, 4, 4, 7)])
def test_uncertainty_against_loops(shape):
    """Means over the elements of H(mean of p) and of H(mean of p) - mean of H(p)."""
    passes = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2).softmax(-1)
    total, mutual = [], []
    for element in passes.flatten(1, -2).unbind(1) if len(shape) > 2 else [passes]:  # [T, K]
        rows = element.tolist()
        mean = [sum(column) / len(rows) for column in zip(*rows)]
        total.append(-sum(p * math.log(p) for p in mean))
        mutual.append(total[-1] - sum(-sum(p * math.log(p) for p in row) for row in rows) / len(rows))
    found = predict.uncertainty(passes)
    assert found["predictive_entropy"] == pytest.approx(sum(total) / len(total), abs=1e-12)
    assert found["mutual_information"] == pytest.approx(sum(mutual) / len(mutual), abs=1e-12)
    assert 0 <= found["mutual_information"] <= found["predictive_entropy"]


def test_passes_that_are_sure_and_disagree_and_passes_that_agree():
    """One class each: ln 2, and all of it from the passes. The same for all: nothing from the passes."""
    opposite = predict.uncertainty(torch.eye(2))
    assert list(opposite.values()) == pytest.approx([math.log(2)] * 2)
    agreeing = predict.uncertainty(torch.full((4, 2), 0.5))
    assert list(agreeing.values()) == pytest.approx([math.log(2), 0])


def test_without_dropout_the_passes_agree(digits, tmp_path, capsys):
    """The same weights with model.dropout 0: no mutual information, and the passes are the deterministic network."""
    state = torch.load(f"{digits}/last.pt", weights_only=True)
    state["config"]["model"]["dropout"] = 0.0
    state["config"]["rollout"]["num_mc_samples"] = 1
    torch.save(state, tmp_path / "dry.pt")
    images = as_json(capsys, tmp_path / "dry.pt", f"{DIGITS}/8", "--passes", "5")["images"]
    assert len(images) > 30 and max(image["mutual_information"] for image in images) < 1e-6
    figures = as_json(capsys, tmp_path / "dry.pt", "--evaluate", DIGITS)["figures"]
    assert figures["eval/nll"] == pytest.approx(figures["eval_mc/nll"], abs=1e-6)
    wet = as_json(capsys, digits, f"{DIGITS}/8")["images"]
    assert max(image["mutual_information"] for image in wet) > 1e-3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_accuracy_of_kept_against_a_slow_loop(rows):
    """Take the most uncertain away one by one, of equals the last, and count what is right among the rest."""
    entropy = torch.tensor([float(value) for value, _ in rows])
    found = predict.accuracy_of_kept(entropy, torch.tensor([right for _, right in rows]))
    kept, expected = list(rows), []
    while kept:
        expected.append(sum(right for _, right in kept) / len(kept))
        worst = max(range(len(kept)), key=lambda i: (kept[i][0], i))
        del kept[worst]
    assert found.tolist() == pytest.approx(expected[::-1], abs=1e-12)


# --- Classification ---------------------------------------------------------------------------------------------------


def test_json_of_the_images_is_what_evaluate_counts(digits, capsys):
    """Accuracy, NLL and ECE of the JSON's probabilities are --evaluate's to the bit, and so is every rejection."""
    document, evaluated = as_json(capsys, digits, DIGITS), as_json(capsys, digits, "--evaluate", DIGITS)
    images, figures = document["images"], evaluated["figures"]
    assert len(images) == evaluated["num_images"] == 360 and document["passes"] == evaluated["passes"] == 4
    targets = torch.tensor([document["classes"].index(Path(image["path"]).parent.name) for image in images])
    probs = probabilities(document)
    right = [image["class"] == Path(image["path"]).parent.name for image in images]
    assert sum(right) / 360 == figures["eval_mc/accuracy"]
    assert float(F.nll_loss(probs.log(), targets)) == figures["eval_mc/nll"]
    assert classification_metrics(probs, targets) == {
        name: figures[f"eval_mc/{name}"] for name in ("accuracy", "nll", "ece")
    }
    order = sorted(range(360), key=lambda i: images[i]["predictive_entropy"])
    for percent in (0, 5, 10, 20, 50):
        kept = order[: 360 - 360 * percent // 100]
        expected = sum(right[i] for i in kept) / len(kept)
        assert evaluated["accuracy_when_rejected"][str(percent)] == pytest.approx(expected, abs=1e-12)
    for image, row in zip(images, probs):
        assert image["probability"] == max(image["probabilities"].values())
        assert image["predictive_entropy"] == pytest.approx(float(-(row * row.log()).sum()), abs=1e-6)
        assert sum(image["probabilities"].values()) == pytest.approx(1, abs=1e-6)


def test_rejecting_the_most_uncertain_raises_accuracy(digits, capsys):
    kept = as_json(capsys, digits, "--evaluate", DIGITS)["accuracy_when_rejected"]
    assert 0.85 <= kept["0"] <= 0.95
    assert kept["10"] >= kept["0"] + 0.02 and kept["50"] > kept["10"] > kept["5"] > kept["0"]


def test_noise_is_more_uncertain_than_digits(digits, tmp_path, capsys):
    """Digits blurred until none can be read, under strong noise: at least twice the predictive entropy."""
    rng = np.random.default_rng(0)
    for i, path in enumerate(sorted(Path(DIGITS).glob("*/*.png"))[::4]):
        blurred = np.asarray(Image.open(path).convert("L").filter(ImageFilter.GaussianBlur(4)), dtype=float)
        noisy = (blurred + rng.normal(0, 40, blurred.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / f"{i}.png")
    noise, clean = (
        [image["predictive_entropy"] for image in as_json(capsys, digits, folder)["images"]]
        for folder in (tmp_path, DIGITS)
    )
    assert np.mean(noise) >= 2 * np.mean(clean)


def test_an_images_figures_depend_on_nothing_else(digits, capsys):
    """The same bits in another order, with other images, alone and again; with other batches but for rounding."""
    paths = [str(path) for path in sorted(Path(DIGITS).glob("*/*.png"))[::9]]  # 40: two batches and a half
    first = as_json(capsys, digits, *paths)["images"]
    assert [image["path"] for image in first] == paths
    by_path = {image["path"]: image for image in first}
    assert as_json(capsys, digits, *paths)["images"] == first
    assert as_json(capsys, digits, *paths[::-1])["images"] == first[::-1]
    assert as_json(capsys, digits, paths[7])["images"] == [by_path[paths[7]]]
    assert as_json(capsys, digits, *paths[:5], DIGITS)["images"][:5] == first[:5]
    for batch_size in (1, 7, 64):
        other = as_json(capsys, digits, *paths, "--batch-size", batch_size)["images"]
        for a, b in zip(first, other):
            assert a["class"] == b["class"] and b["probabilities"] == pytest.approx(a["probabilities"], abs=1e-5)
            for name in ("predictive_entropy", "mutual_information"):
                assert b[name] == pytest.approx(a[name], abs=1e-5)


def test_passes_can_be_set_and_default_to_the_trainings(digits, capsys):
    for passes in (1, 9):
        document = as_json(capsys, digits, f"{DIGITS}/3", "--passes", passes)
        assert document["passes"] == passes
        mutual = max(image["mutual_information"] for image in document["images"])
        assert mutual == 0 if passes == 1 else mutual > 0
    deterministic = as_json(capsys, digits, "--evaluate", DIGITS, "--passes", "1")["figures"]["eval/nll"]
    assert deterministic == as_json(capsys, digits, "--evaluate", DIGITS)["figures"]["eval/nll"]


def test_the_deterministic_figures_are_those_of_the_training(digits, capsys):
    """eval/… is what train.py --evaluate says of the same checkpoint."""
    assert train.main(["--evaluate", digits]) == 0
    trained_line = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
    out = run(capsys, digits, "--evaluate", DIGITS).splitlines()
    assert out[0] == f"{DIGITS}: 360 images, T = 4"
    assert out[1].partition(" (")[0] == trained_line.partition(" (")[0]
    assert [line.split()[-2] for line in out[2:]] == ["0", "5", "10", "20", "50"]


def test_the_table_says_what_the_json_says(digits, capsys):
    images = as_json(capsys, f"{digits}/last.pt", f"{DIGITS}/5")["images"]
    header, *rows = run(capsys, digits, f"{DIGITS}/5").splitlines()
    assert header.split() == ["image", "entropy", "mutual", "information", "found"]
    for image, row in zip(images, rows, strict=True):
        path, entropy, mutual, name, share = row.split()
        assert (path, name, share) == (image["path"], image["class"], f"({image['probability']:.1%})")
        assert float(entropy) == pytest.approx(image["predictive_entropy"], abs=6e-5)
        assert float(mutual) == pytest.approx(image["mutual_information"], abs=6e-5)


def test_pictures(digits, tmp_path, capsys):
    """One per image, of the same name below the folder; a name that is taken is numbered; nothing is overwritten."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    source = sorted(Path(f"{DIGITS}/2").glob("*.png"))[0]
    for name in ("a/x.png", "a/b/x.png", "a/b/X.PNG", "x.png"):
        shutil.copy(source, tmp_path / name)
    Image.new("RGB", (3000, 600)).save(tmp_path / "a" / "wide.jpg")
    images = as_json(capsys, digits, tmp_path / "a", tmp_path / "x.png", "--out", tmp_path / "out")["images"]
    written = [os.path.relpath(image["picture"], tmp_path / "out") for image in images]
    assert written == ["b/X.png", "b/x-2.png", "wide.png", "x.png", "x-2.png"]
    sizes = [Image.open(image["picture"]).size for image in images]
    assert sizes[0][0] == 256 and sizes[0][1] > 256 and sizes[2][0] == 1024 and sizes[2][1] > 205
    text = refused(capsys, digits, tmp_path / "a", "--out", tmp_path / "out")
    assert text == f"{tmp_path}/out exists: nothing is overwritten; name a new folder with --out"
    assert "exists" in refused(capsys, digits, tmp_path / "a", "--out", tmp_path / "x.png")


def test_charts(digits, tmp_path, capsys):
    run(capsys, digits, "--evaluate", DIGITS, "--out", tmp_path / "out")
    names = ["accuracy_rejection.png", "confusion.png", "most_uncertain.png"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert all(Image.open(tmp_path / "out" / name).getextrema() != ((255, 255),) * 3 for name in names)


@pytest.mark.parametrize("num_classes", [2, 3, 60, 1000])
def test_the_confusion_matrix_is_blue_where_the_counts_are(num_classes):
    """Each cell's corner against its share of the row, from 2 classes to ImageNet's 1000."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    confusion[0, 1], confusion[1, 1], confusion[1, 0] = 12345678, 1, 3
    picture = np.array(predict.draw_confusion(confusion, [f"class {i}" for i in range(num_classes)]))
    assert max(picture.shape) < 2100
    cell = min(max(800 // num_classes, 2), 44)
    margin = len(picture) - cell * num_classes
    for row, column, share in ((0, 1, 1.0), (1, 1, 0.25), (1, 0, 0.75), (0, 0, 0.0)):
        corner = picture[margin + row * cell + 1, margin + column * cell + 1]
        assert corner.tolist() == [round(255 + share * (dark - 255)) for dark in (30, 80, 160)]


@pytest.mark.parametrize("values", [[1.0], [0.0], [1.0] * 7, [1.0, 0.5, 2 / 3]])
def test_curves_of_few_images(values):
    """The line begins at the right edge with one image kept and stays inside the axes."""
    picture = np.array(predict.draw_curve(torch.tensor(values)))
    blue = np.argwhere((picture == (0, 0, 255)).all(-1))
    assert len(blue) and blue[:, 0].min() >= 22 and blue[:, 0].max() <= 326 and blue[:, 1].min() >= 58


# --- Masks and boxes --------------------------------------------------------------------------------------------------


@pytest.fixture
def shapes(scenes, tmp_path) -> dict[str, tuple[int, int]]:
    """Images of other sizes than the model's, turned ones among them: path -> its upright size."""
    source = Image.open(scenes / "eval" / "images" / "000000.png").convert("RGB")
    paths = {str(tmp_path / "wide.png"): (70, 40), str(tmp_path / "one.png"): (1, 9)}
    for path, size in paths.items():
        source.resize(size).save(path)
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    for name in ("turned.jpg", "turned.tif"):
        source.resize((50, 30)).save(tmp_path / name, exif=exif)
        paths[str(tmp_path / name)] = (30, 50)
    return paths


def test_masks(dense, scenes, shapes, tmp_path, capsys):
    """At the image's size, of class values alone, with the shares that are told; overlays for people."""
    checkpoint, paths = dense["segmentation"], [*shapes, scenes / "eval" / "images"]
    document = as_json(capsys, checkpoint, *paths, "--out", tmp_path / "out")
    images = document["images"]
    assert len(images) == len(shapes) + 8 and document["classes"] == ["background", "digit"]
    for image in images:
        mask = Image.open(image["mask"])
        values = np.asarray(mask)
        assert mask.mode == "L" and mask.size == shapes.get(image["path"], (32, 32))
        assert set(np.unique(values)) <= {0, 1}
        shares = {"background": float((values == 0).mean()), "digit": float((values == 1).mean())}
        assert image["shares"] == pytest.approx({name: share for name, share in shares.items() if share})
        assert 0 <= image["mutual_information"] <= image["predictive_entropy"] <= math.log(2)
        picture = Image.open(image["picture"])
        assert max(picture.size) == 256 and picture.mode == "RGB"
    names = [os.path.relpath(image["mask"], tmp_path / "out" / "masks") for image in images[:3]]
    assert names == ["wide.png", "one.png", "turned.png"]
    assert any(image["shares"].get("digit") for image in images)
    assert as_json(capsys, checkpoint, *shapes)["images"][0]["shares"] == images[0]["shares"]  # the same without --out


def test_masks_are_those_that_evaluate_counts(dense, scenes, tmp_path, capsys):
    """Pixel accuracy of the written masks is --evaluate's: the scenes have the model's size."""
    images = as_json(capsys, dense["segmentation"], scenes / "eval" / "images", "--out", tmp_path / "out")["images"]
    pairs = [
        (np.asarray(Image.open(image["mask"])), np.asarray(Image.open(image["path"].replace("/images/", "/masks/"))))
        for image in images
    ]
    figures = as_json(capsys, dense["segmentation"], "--evaluate", scenes / "eval")["figures"]
    assert np.mean([found == truth for found, truth in pairs]) == figures["eval_mc/pixel_accuracy"]


def test_boxes(dense, scenes, shapes, tmp_path, capsys):
    """Inside the image as it is on disk, best first."""
    paths = *shapes, scenes / "eval" / "images"
    images = as_json(capsys, dense["detection"], *paths, "--out", tmp_path / "out")["images"]
    assert sum(len(image["boxes"]) for image in images) > 10
    for image in images:
        width, height = shapes.get(image["path"], (32, 32))
        scores = [box["score"] for box in image["boxes"]]
        assert scores == sorted(scores, reverse=True) and all(0.01 <= score <= 1 for score in scores)
        for box in image["boxes"]:
            x0, y0, x1, y1 = box["box"]
            assert 0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height and box["class"] in "0123456789"
        assert 0 <= image["mutual_information"] <= image["predictive_entropy"] <= math.log(11)
        assert max(Image.open(image["picture"]).size) == 256


def test_a_box_in_closed_form(tmp_path):
    """Two patches wide and high around the centre of patch (1, 1), 4 pixels of 32 each, in an image of 64x48."""
    path = str(tmp_path / "x.png")
    Image.new("RGB", (64, 48)).save(path)
    config = check(("test", {"task": "detection", "model.image_size": 32, "model.patch_size": 4}))
    outputs = torch.zeros(2, 64, 3 + 4)  # two classes and the background
    outputs[..., 2] = 20
    outputs[:, 9, :3] = torch.tensor([1.0, 20.0, 0.0])
    outputs[:, 9, 5:] = math.log(2)
    record, _ = predict.describe_boxes(outputs, path, ["cat", "dog"], config)
    (box,) = record["boxes"]
    assert box["class"] == "dog" and box["score"] == pytest.approx(1, abs=1e-6)
    assert box["box"] == pytest.approx([2 * 2, 2 * 1.5, 10 * 2, 10 * 1.5], abs=1e-4)
    assert predict.in_words(record) == "dog (100%) at 4 3 20 15"
    assert predict.in_words({"boxes": [box | {"score": 0.4}]}) == "nothing"
    picture = tmp_path / "out" / "x.png"
    predict.write_pictures(tmp_path / "out", path, "x", record, record["boxes"])
    lime = np.argwhere((np.array(Image.open(picture)) == (0, 255, 0)).all(-1))  # at four times the size
    assert lime.min(0).tolist() == [12, 16] and lime.max(0).tolist() == [59, 79]


@pytest.mark.parametrize("task", DENSE)
def test_figures_of_masks_and_boxes(dense, scenes, tmp_path, capsys, task):
    """The task's own, twice the same, as JSON and as a line; charts without the curve."""
    figures = as_json(capsys, dense[task], "--evaluate", scenes / "eval", "--out", tmp_path / "out")["figures"]
    again = as_json(capsys, dense[task], "--evaluate", scenes / "eval")
    assert again["figures"] == figures and "accuracy_when_rejected" not in again
    best = train.TASKS[task].BEST
    assert {best, best.replace("eval/", "eval_mc/")} <= figures.keys()
    out = run(capsys, dense[task], "--evaluate", scenes / "eval").splitlines()
    assert len(out) == 2 and f"{figures[best]:.4f}" in out[1]
    charts = {"segmentation": ["confusion.png", "most_uncertain.png"], "detection": ["most_uncertain.png"]}
    assert sorted(os.listdir(tmp_path / "out")) == charts[task]


def test_figures_that_do_not_exist_are_null(dense, scenes, tmp_path, capsys):
    """mAP where nothing is annotated: JSON has no NaN."""
    shutil.copytree(scenes / "eval", tmp_path / "eval")
    path = tmp_path / "eval" / "annotations.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    out = run(capsys, dense["detection"], "--evaluate", tmp_path / "eval", "--json")
    assert "NaN" not in out and json.loads(out)["figures"]["eval/map"] is None


# --- Bad input --------------------------------------------------------------------------------------------------------


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
    assert [Path(image["path"]).name for image in images] == ["0.png", "1.png", "2.png", "photo"]
    assert [image["path"] for image in images] == [str(tmp_path / Path(image["path"]).name) for image in images]
    errors = done.stderr.splitlines()
    assert len(errors) == 2 and "Traceback" not in done.stderr
    for error, name in zip(errors, ("0a.png", r"1\na.png")):
        assert error.startswith(f"predict.py: {tmp_path}/{name}: not a readable image (")
    assert images[:3] == as_json(capsys, digits, *(tmp_path / f"{i}.png" for i in range(3)))["images"]
    assert as_json(capsys, digits, tmp_path / "0a.png", status=2)["images"] == []


def test_bad_arguments(digits, tmp_path, capsys):
    """One line that names the file or option; nothing on stdout."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"model": {}}, tmp_path / "weights.pt")
    for arguments, expected in (
        ([digits], "no images: name files or folders, or --evaluate a folder"),
        ([digits, tmp_path / "empty"], f"{tmp_path}/empty: no images (.png "),
        ([digits, DIGITS, tmp_path / "none.png"], f"{tmp_path}/none.png: no such file or folder"),
        ([tmp_path / "none", DIGITS], f"{tmp_path}/none: no such file"),
        ([tmp_path / "empty", DIGITS], f"{tmp_path}/empty/last.pt: no such file"),
        ([tmp_path / "text.pt", DIGITS], f"{tmp_path}/text.pt: not a checkpoint that can be read"),
        ([tmp_path / "weights.pt", DIGITS], f"{tmp_path}/weights.pt: not a checkpoint of this repo (it has no classes"),
        ([digits, DIGITS, "--passes", "0"], "--passes 0: must be at least 1"),
        ([digits, DIGITS, "--batch-size", "-3"], "--batch-size -3: must be at least 1"),
        ([digits, DIGITS, "--evaluate", DIGITS], f"{DIGITS}: --evaluate takes its images from {DIGITS} alone"),
        ([digits, "--evaluate", tmp_path / "none"], f"{tmp_path}/none: no such folder"),
        ([digits, "--evaluate", tmp_path / "empty"], f"{tmp_path}/empty: no subdirectories"),
        ([digits, "--evaluate", tmp_path], f"{tmp_path}: classes unknown in the training folder: empty"),
        ([digits, DIGITS, "--out", tmp_path / "text.pt" / "out"], "[Errno 20] Not a directory"),
    ):
        assert refused(capsys, *arguments).startswith(expected)
    with pytest.raises(SystemExit) as stopped:
        predict.main([digits, DIGITS, "--passes", "many"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("what", ["weights", "width", "key"])
def test_checkpoints_that_were_tampered_with(digits, tmp_path, capsys, what):
    state = torch.load(f"{digits}/last.pt", weights_only=True)
    if what == "weights":
        state["model"]["norm.bias"][0] = torch.nan
    elif what == "width":
        state["config"]["model"]["embed_dim"] = 32
    else:
        state["config"]["model"]["colour"] = 1
    torch.save(state, tmp_path / "x.pt")
    expected = {
        "weights": "its weights hold NaN or infinity; take another checkpoint of the run",
        "width": "its weights do not fit its config; take another checkpoint of the run",
        "key": "unknown key model.colour",
    }
    assert refused(capsys, tmp_path / "x.pt", DIGITS).startswith(f"{tmp_path}/x.pt: {expected[what]}")


def test_a_damaged_image_cannot_be_evaluated(digits, tmp_path, capsys):
    (tmp_path / "eval" / "3").mkdir(parents=True)
    (tmp_path / "eval" / "3" / "x.png").write_text("no image")
    assert refused(capsys, digits, "--evaluate", tmp_path / "eval").startswith(
        f"{tmp_path}/eval/3/x.png: not a readable"
    )


def test_an_evaluation_leaves_bad_images_out_if_the_run_did(digits, tmp_path, capsys):
    """data.on_bad_image: skip of the checkpoint: the file is named on stderr, figures are those without it."""
    for name in "0123456789":
        (tmp_path / "eval" / name).mkdir(parents=True)
        for path in sorted(Path(DIGITS, name).iterdir())[:3]:
            shutil.copy(path, tmp_path / "eval" / name)
    without = as_json(capsys, digits, "--evaluate", tmp_path / "eval")["figures"]
    (tmp_path / "eval" / "3" / "bad.png").write_text("no picture")
    assert predict.main([digits, "--evaluate", str(tmp_path / "eval")]) == 2
    state = torch.load(f"{digits}/last.pt", weights_only=True)
    state["config"]["data"]["on_bad_image"] = "skip"
    torch.save(state, tmp_path / "skip.pt")
    capsys.readouterr()
    assert predict.main([str(tmp_path / "skip.pt"), "--evaluate", str(tmp_path / "eval"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and "3/bad.png: not a readable image" in err
    assert json.loads(out)["figures"] == pytest.approx(without, abs=1e-9)
