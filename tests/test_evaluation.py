"""evaluation.py: metrics of class probabilities against other implementations, evaluations, pictures and charts."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import message
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss

import evaluation
from data_types import TensorMiniBatch
from evaluation import classification_metrics, draw_sheet, predictive_entropy
from vision_task import Classification

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def random_probs(seed: int, n: int, num_classes: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [n, num_classes] of very different sharpness, and targets [n] that often agree with them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_classes, generator=generator, dtype=dtype)
    probs = (logits * 4 * torch.rand(n, 1, generator=generator, dtype=dtype)).softmax(-1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


def slow_ece(probs: np.ndarray, targets: np.ndarray, num_bins: int) -> float:
    """sum over bins (i / num_bins, (i + 1) / num_bins] of count / n * |accuracy - mean confidence|."""
    total = 0.0
    for i in range(num_bins):
        rows = [r for r in range(len(probs)) if i / num_bins < max(probs[r]) <= (i + 1) / num_bins]
        if rows:
            accuracy = sum(int(np.argmax(probs[r])) == targets[r] for r in rows) / len(rows)
            total += len(rows) / len(probs) * abs(accuracy - sum(max(probs[r]) for r in rows) / len(rows))
    return total


@EXAMPLES
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 6), st.integers(1, 20))
def test_calibration_error_equals_a_slow_loop(seed, n, num_classes, num_bins):
    probs, targets = random_probs(seed, n, num_classes)
    got = float(evaluation.expected_calibration_error(probs, targets, num_bins))
    assert got == pytest.approx(slow_ece(probs.numpy(), targets.numpy(), num_bins), abs=1e-12)


def test_metrics_by_hand():
    """A confidence on an edge belongs to the bin below it; certainty has a bin, and what rounding puts beyond it. The
    NLL of probability 0 is -log of the smallest normal float32, not infinity; that of certainty is 0."""
    probs = torch.tensor([[0.5, 0.5], [0.75, 0.25]])  # right at 0.5 and wrong at 0.75, in two bins
    assert float(evaluation.expected_calibration_error(probs, torch.tensor([0, 1]), num_bins=2)) == 0.625
    certain = torch.tensor([[1.0, 0.0]] * 4)
    got = classification_metrics(certain, torch.tensor([0, 0, 0, 1]))
    nll = -np.log(np.finfo(np.float32).tiny) / 4
    assert got == {"accuracy": 0.75, "nll": pytest.approx(nll, rel=1e-6), "ece": 0.25}
    rounded = torch.tensor([[1.0000001, 0.0]])  # a mean over passes may come out so
    assert float(evaluation.expected_calibration_error(rounded, torch.tensor([1]))) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_equal_scikit_learn(dtype):
    """Accuracy and negative log-likelihood as scikit-learn has them, calibration error of 15 bins as the slow loop."""
    probs, targets = random_probs(2, 500, 5, dtype)
    got, exact = classification_metrics(probs, targets), probs.double().numpy()
    assert list(got) == ["accuracy", "nll", "ece"] and all(type(value) is float for value in got.values())
    assert got["accuracy"] == pytest.approx(accuracy_score(targets, probs.argmax(-1)), abs=1e-12)
    exact_nll = log_loss(targets, exact / exact.sum(1, keepdims=True), labels=range(5))
    assert got["nll"] == pytest.approx(exact_nll, rel=1e-5)
    assert got["ece"] == pytest.approx(slow_ece(exact, targets.numpy(), 15), abs=1e-6)
    confusion = evaluation.confusion_matrix(probs.argmax(-1), targets, 5)
    assert confusion.tolist() == confusion_matrix(targets, probs.argmax(-1)).tolist()
    assert 0.3 < got["accuracy"] < 0.9 and got["ece"] > 0.005


def test_entropy_of_passes_that_are_sure_and_disagree_and_of_passes_that_agree():
    """In nats. One class each: ln 2, and all of it from the passes. The same for all: nothing from the passes."""
    for passes, mutual in ((torch.eye(2), np.log(2)), (torch.full((4, 2), 0.5), 0)):
        assert float(predictive_entropy(passes.mean(0))) == pytest.approx(np.log(2))
        assert float(evaluation.mutual_information(passes)) == pytest.approx(mutual)


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_accuracy_of_kept_against_a_slow_loop(rows):
    """Take the most uncertain away one by one, of equals the last, and count what is right among the rest."""
    entropy, right = torch.tensor(rows).unbind(1)
    kept, expected = list(rows), []
    while kept:
        expected.append(sum(right for _, right in kept) / len(kept))
        del kept[max(range(len(kept)), key=lambda i: (kept[i][0], i))]
    found = evaluation.accuracy_of_kept(entropy.float(), right.bool())
    assert found.tolist() == pytest.approx(expected[::-1], abs=1e-12)


class Pictures(list):
    classes = ["ant", "bee"]


def evaluated(probs: torch.Tensor, targets: torch.Tensor, places: torch.Tensor, dataset: Pictures):
    """An evaluation of two batches, of a network with uniform probabilities and two passes whose mean is `probs`."""
    result = Classification({}).evaluation(dataset)
    for part in (slice(0, 1), slice(1, None)):
        tilt = probs[part].amin(1, keepdim=True) * torch.tensor([0.9, -0.9])
        outputs = torch.stack([probs[part] + tilt, probs[part] - tilt], 1).log()
        batch = TensorMiniBatch(torch.empty(len(outputs)), targets[part], {"indices": places[part]})
        result.add(batch, torch.zeros(len(outputs), probs.shape[1]), outputs)
    return result


def test_evaluation_of_the_images_predicted():
    """Metrics of both predictors over all batches, and the accuracy without the most uncertain."""
    probs, targets = random_probs(4, 60, 2, torch.float32)
    result = evaluated(probs, targets, torch.arange(60), Pictures())
    for prefix, of in (("eval", torch.full((60, 2), 0.5)), ("eval_mc", probs)):
        expected = classification_metrics(of, targets)
        assert {k: result.metrics()[f"{prefix}/{k}"] for k in expected} == pytest.approx(expected, abs=1e-6)
    right = (probs.argmax(1) == targets)[predictive_entropy(probs).argsort(stable=True)]
    shares = {"0": 60, "5": 57, "10": 54, "20": 48, "50": 30}
    expected = {percent: float(right[:kept].double().mean()) for percent, kept in shares.items()}
    assert result.details() == {"accuracy_when_rejected": pytest.approx(expected)}
    assert result.lines()[1] == f"accuracy {expected['5']:.4f} without the most uncertain  5 %"


def test_draw_shows_the_highest_entropy_first(monkeypatch):
    """The `count` images of highest entropy, the highest first, with class, prediction and entropy in nats."""
    dataset = Pictures(torch.full((3, 8, 8), i, dtype=torch.uint8) for i in range(4))
    probs = torch.tensor([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    monkeypatch.setattr(evaluation, "draw_sheet", lambda *arguments: arguments)
    result = evaluated(probs, torch.tensor([0, 0, 1, 1]), torch.tensor([3, 2, 1, 0]), dataset)
    drawn, captions = result.draw(count=3)
    assert [int(image[0, 0, 0]) for image in drawn] == [2, 0, 3]
    assert captions == [
        ["true ant", "ant (50%)", "entropy 0.69"],
        ["true bee", "bee (75%)", "entropy 0.56"],
        ["true ant", "ant (90%)", "entropy 0.33"],
    ]


# --- Pictures and charts ----------------------------------------------------------------------------------------------


def test_draw_sheet_puts_each_image_at_its_place():
    """Row by row, each tile inside a white border of 2, enlarged without blur, captions in black below."""
    pixels = torch.randint(0, 200, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sheet = draw_sheet(list(pixels), [["one", "two"], [], ["three"], [], ["five"]], columns=2, size=32)
    height = 32 + 2 * 12 + 4
    assert sheet.dtype == torch.uint8 and sheet.shape == (3, 3 * height, 2 * 32)
    for i in range(6):
        cell = sheet[:, i // 2 * height :, i % 2 * 32 :][:, :height, :32]
        if i == 5:
            assert bool((cell == 255).all())  # an unused place
            continue
        assert torch.equal(cell[:, 2:30, 2:30], pixels[i].repeat_interleave(7, 1).repeat_interleave(7, 2))
        assert all(bool((border == 255).all()) for border in (cell[:, :2], cell[:, :32, :2], cell[:, :32, 30:]))
        first, second = (bool((cell[:, top : top + 12] < 128).any()) for top in (32, 44))
        assert (first, second) == [(True, True), (False, False), (True, False), (False, False), (True, False)][i]


@pytest.mark.parametrize("name", ["a" * 300, "W" * 20, "犬 chien ß"])
def test_long_class_names_stay_in_their_cell(name):
    """A caption of any length or script leaves the neighbours and all images alone."""
    pixels = [torch.full((3, 8, 8), 77, dtype=torch.uint8)] * 2
    sheet, blank = (draw_sheet(pixels, [[c, c], ["", ""]], columns=2, size=64) for c in (name, ""))
    rows, columns = (sheet != blank).any(0).nonzero().unbind(1)
    assert sheet.shape == (3, 64 + 2 * 12 + 4, 128)
    assert len(rows) > 10 and int(columns.max()) < 64 and int(rows.min()) >= 64


@pytest.fixture
def axes(monkeypatch):
    """Charts are their axes instead of pixels."""
    monkeypatch.setattr(evaluation, "render", lambda figure: figure.axes[0])
    yield
    plt.close("all")


@pytest.mark.parametrize("num_classes", [2, 30, 31, 1000])
def test_confusion_chart(axes, num_classes):
    """A cell a class, as blue as its share of the truth; up to thirty classes have names and counts."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    confusion[:2, :2] = torch.tensor([[4115226, 12345678], [3, 1]])
    classes = [f"class {i}" for i in range(num_classes)]
    chart = evaluation.draw_confusion(confusion, classes)
    assert (chart.get_xlabel(), chart.get_ylabel()) == ("prediction", "truth")
    [image] = chart.images
    assert image.get_array()[:2, :2].tolist() == [[0.25, 0.75], [0.75, 0.25]] and image.get_array().sum() == 2
    assert image.get_array().shape == (num_classes, num_classes) and image.get_clim() == (0, 1)
    assert image.get_cmap().name == "Blues"
    written = {text.get_position(): text.get_text() for text in chart.texts}  # x is the prediction
    expected = {(0, 0): "4e+06", (1, 0): "1e+07", (0, 1): "3", (1, 1): "1"}
    assert written == (expected if num_classes <= 30 else {})
    for labels in (chart.get_xticklabels(), chart.get_yticklabels()):
        assert ([label.get_text() for label in labels] == classes) == (num_classes <= 30)


@pytest.mark.parametrize("values", [[1.0], [1.0, 0.5, 2 / 3, 0.25]])
def test_rejection_chart(axes, values):
    """From one image kept to none rejected, at the share rejected."""
    chart = evaluation.draw_rejection(torch.tensor(values))
    assert "rejected" in chart.get_xlabel() and "accuracy" in chart.get_ylabel()
    [line] = chart.lines
    assert line.get_xdata() == pytest.approx([1 - k / len(values) for k in range(1, len(values) + 1)])
    assert line.get_ydata() == pytest.approx(values)


def test_charts_are_pictures_and_only_they_need_matplotlib(monkeypatch):
    probs, targets = random_probs(0, 4, 2, torch.float32)
    result = evaluated(probs, targets, torch.arange(4), Pictures(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)))
    charts = result.charts()
    assert list(charts) == ["accuracy_rejection", "confusion"] and plt.get_fignums() == []
    assert all(chart.mode == "RGB" and min(chart.size) > 200 for chart in charts.values())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib, which is not installed" in message(result.charts)
    result.draw(), result.metrics(), result.details()
