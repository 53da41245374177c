"""Average precision equals pycocotools' on anything, ties included; one case is computed by hand."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import coco, cocoeval

from coco_ap import average_precision


def detected(boxes=(), scores=(), labels=()) -> dict:
    """Detections of an image; boxes of whole or eighth pixels go through COCO's x y w h without rounding."""
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def true(boxes=(), labels=(), crowd=None) -> dict:
    """The truths of an image, by default no crowds."""
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "crowd": torch.tensor([False] * len(labels) if crowd is None else crowd, dtype=torch.bool),
    }


def to_coco(images: list[dict], num_classes: int):
    """The images as a COCO data set, ids from 1 since COCOeval takes an id of 0 for no match."""
    annotations = []
    for i, image in enumerate(images):
        for j, (x0, y0, x1, y1) in enumerate(image["boxes"].double().tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(image["labels"][j]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": int(image["crowd"][j]) if "crowd" in image else 0,
                    "score": float(image["scores"][j]) if "scores" in image else 0.0,
                }
            )
    result = coco.COCO()
    result.dataset = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": k} for k in range(num_classes)],
        "annotations": annotations,
    }
    result.createIndex()
    return result


def pycocotools(detections: list[dict], truths: list[dict], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """What COCOeval says: map, ap50, ap75, and mAP per class; nan for its -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        ours, theirs = to_coco(truths, num_classes), to_coco(detections, num_classes)
        evaluation = cocoeval.COCOeval(ours, theirs, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = evaluation.eval["precision"][:, :, :, 0, 2].mean((0, 1))  # [T, R, K, areas, maxDets]
    return tuple(np.where(x == -1, np.nan, x) for x in (evaluation.stats[:3], per_class))


def check(detections: list[dict], truths: list[dict], num_classes: int) -> dict:
    """Both agree; returns ours."""
    result = average_precision(detections, truths, num_classes)
    overall, per_class = pycocotools(detections, truths, num_classes)
    np.testing.assert_allclose([result["map"], result["ap50"], result["ap75"]], overall, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result["ap_per_class"], per_class, rtol=0, atol=1e-9)
    return result


def random_set(seed: int, num_images: int = 12, num_classes: int = 3, grid: int = 8, crowds: float = 0.15):
    """Random truths and mostly shifted copies of them, on a coarse grid, so that IoUs and scores (tenths) tie."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        corner, size = rng.integers(0, grid, (n, 2)), rng.integers(0, grid, (n, 2))
        return np.hstack([corner, corner + size])

    detections, truths = [], []
    for _ in range(num_images):
        num_truths, num_guesses = rng.integers(0, 9), rng.integers(0, 9)
        truth = boxes(num_truths)
        labels = rng.integers(0, num_classes, num_truths)
        copied = rng.permutation(np.repeat(np.arange(num_truths), 2))[: rng.integers(0, 2 * num_truths + 1)]
        shifted = truth[copied] + rng.integers(-1, 2, (len(copied), 4)) * (rng.random((len(copied), 4)) < 0.3)
        shifted[:, 2:] = np.maximum(shifted[:, :2], shifted[:, 2:])
        scores = rng.integers(0, 11, len(copied) + num_guesses) / 10
        guessed = rng.integers(0, num_classes, num_guesses)
        detections.append(
            detected(
                np.vstack([shifted, boxes(num_guesses)]).tolist(),
                scores.tolist(),
                np.concatenate([labels[copied], guessed]).tolist(),
            )
        )
        truths.append(true(truth.tolist(), labels.tolist(), (rng.random(num_truths) < crowds).tolist()))
    return detections, truths, num_classes


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("grid", [4, 8, 64])
def test_equals_pycocotools_on_random_sets_full_of_ties(seed, grid):
    """Copies of the truths moved by 0 or 1 pixel, crowds, images without truths or without detections, empty boxes."""
    result = check(*random_set(seed, grid=grid))
    assert 0 < result["map"] < result["ap50"] < 1


@pytest.mark.parametrize("seed", range(5))
def test_equals_pycocotools_among_many_crowds(seed):
    check(*random_set(seed, num_images=30, num_classes=1, grid=5, crowds=0.6))


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools_on_boxes_off_the_grid(seed):
    """float32 coordinates and scores as a model has them: x0 + w may round, which moves an IoU by 1e-16 only."""
    detections, truths, num_classes = random_set(seed, grid=64)
    generator = torch.Generator().manual_seed(seed)
    for image in detections + truths:
        image["boxes"] = image["boxes"] + torch.rand(image["boxes"].shape, generator=generator)
        image["boxes"][:, 2:] = torch.maximum(image["boxes"][:, :2], image["boxes"][:, 2:])
    for image in detections:
        image["scores"] = torch.rand(image["scores"].shape, generator=generator)
    check(detections, truths, num_classes)


coordinate = st.integers(0, 4)
box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
label = st.integers(0, 1)
detections_of_image = st.lists(st.tuples(box, st.sampled_from([0.25, 0.5, 0.75]), label), max_size=6)
truths_of_image = st.lists(st.tuples(box, label, st.booleans()), max_size=5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(detections_of_image, truths_of_image), min_size=1, max_size=3))
def test_equals_pycocotools_on_small_sets(images):
    detections = [detected(*zip(*d)) for d, _ in images]
    truths = [true(*zip(*t)) for _, t in images]
    check(detections, truths, 2)


BOX, FAR = [0, 0, 10, 10], [50, 50, 60, 60]


def test_closed_form():
    """Two truths; of the detections the best has IoU 0.8, the second misses, the third is exact.

    Up to IoU 0.8 it is hit, miss, hit: precision 1 up to recall 1/2 (51 of the 101 points), 2/3 beyond. From 0.85 on
    it is miss, miss, hit: 1/3 up to recall 1/2, 0 beyond. 7 of the 10 thresholds are at most 0.8.
    """
    detections = [detected([[0, 0, 10, 8], FAR], [0.9, 0.8], [0, 0]), detected([BOX], [0.7], [0])]
    result = check(detections, [true([BOX], [0]), true([BOX], [0])], 1)
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 3 / 101
    assert result["ap50"] == result["ap75"] == pytest.approx(low, abs=1e-12)
    assert result["map"] == pytest.approx((7 * low + 3 * high) / 10, abs=1e-12)
    assert result["ap_per_class"] == [result["map"]]


def test_perfect_detections_score_one():
    truths = random_set(0, grid=64, crowds=0)[1]
    for truth in truths:  # an empty box is found by nobody
        truth["boxes"][:, 2:] += 1
    perfect = [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))} for t in truths]
    # a precision of n / (n + spacing(1)) may be an ulp short of 1
    assert check(perfect, truths, 3)["map"] == pytest.approx(1, abs=1e-12)


def test_images_without_truths_or_without_detections():
    detections = [detected([BOX], [0.5], [0]), detected(), detected([BOX], [0.4], [0]), detected()]
    truths = [true([BOX], [0]), true([BOX], [0]), true(), true()]
    assert check(detections, truths, 1)["map"] == pytest.approx(51 / 101)


def test_no_detection_scores_zero():
    assert check([detected(), detected()], [true([BOX], [0]), true()], 1)["map"] == 0


@pytest.mark.parametrize("detections", [[], [detected()], [detected([BOX], [0.5], [0])]])
def test_no_truth_at_all_is_nan(detections):
    result = check(detections, [true() for _ in detections], 2)
    assert all(math.isnan(result[key]) for key in ("map", "ap50", "ap75"))
    assert np.isnan(result["ap_per_class"]).all() and len(result["ap_per_class"]) == 2


def test_a_class_without_truth_is_left_out_of_the_mean():
    result = check([detected([BOX, BOX], [0.9, 0.8], [0, 1])], [true([BOX, FAR], [0, 2])], 3)
    assert result["map"] == pytest.approx(0.5)
    np.testing.assert_allclose(result["ap_per_class"], [1, np.nan, 0])


@pytest.mark.parametrize("place", [98, 99, 100, 101])
def test_only_the_best_hundred_of_an_image_and_class_count(place):
    """The one good detection comes after `place` bad ones; another class and another image have their own hundred."""
    scores = [0.9] * place + [0.5] + [0.9 if place < 100 else 0.4] * 5  # later ones of a better score push it out
    boxes = [FAR] * place + [BOX] + [FAR] * 5
    detections = [detected(boxes + [BOX], scores + [0.1], [0] * len(boxes) + [1]), detected([BOX], [0.3], [0])]
    truths = [true([BOX, BOX], [0, 1]), true([BOX], [0])]
    assert check(detections, truths, 2)["ap_per_class"][1] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_more_than_a_hundred_detections_of_tied_scores(seed):
    rng = np.random.default_rng(seed)
    boxes = np.array(BOX) + rng.integers(-2, 3, (250, 4))
    truths = [true((np.array(BOX) + rng.integers(-2, 3, (20, 4))).tolist(), [0] * 20)]
    check([detected(boxes.tolist(), (rng.integers(0, 4, 250) / 4).tolist(), [0] * 250)], truths, 1)


def test_empty_boxes_of_either_kind_match_nothing():
    empty = [[5, 5, 5, 5], [0, 0, 0, 10], [3, 3, 7, 3]]
    detections = [detected([*empty, BOX], [0.9, 0.8, 0.7, 0.6], [0] * 4)]
    truths = [true([*empty, BOX], [0] * 4, [False, False, True, False])]
    assert 0 < check(detections, truths, 1)["map"] < 1
    with np.errstate(all="raise"):  # no 0 / 0 on the way
        average_precision(detections, truths, 1)


def test_a_set_of_crowds_alone_has_no_truth():
    detections = [detected([BOX, FAR], [0.9, 0.8], [0, 0])]
    assert math.isnan(check(detections, [true([BOX, BOX], [0, 0], [True, True])], 1)["map"])


def test_crowds_forgive_any_number_of_detections():
    """Those inside a crowd count neither way: the one truth, in another image, is found at full precision."""
    inside = [[0, 0, 5, 5], [1, 1, 6, 6], [2, 2, 7, 7], BOX]
    detections = [detected(inside, [0.9, 0.8, 0.7, 0.6], [0] * 4), detected([BOX], [0.5], [0])]
    truths = [true([BOX], [0], [True]), true([BOX], [0])]
    assert check(detections, truths, 1)["map"] == pytest.approx(1)


def test_a_truth_goes_before_a_crowd_that_overlaps_more():
    detections = [detected([[0, 0, 10, 6], [0, 0, 10, 6]], [0.9, 0.8], [0, 0])]
    truths = [true([BOX, BOX], [0, 0], [True, False])]
    assert check(detections, truths, 1)["ap50"] == pytest.approx(1)


def test_of_equal_ious_the_last_truth_is_taken():
    """The first detection overlaps both truths alike and takes the second, the only one left for the other: AP is
    that of one truth found first, 51 / 101."""
    one, two = [0, 0, 8, 8], [4, 0, 12, 8]
    detections = [detected([[2, 0, 10, 8], two], [0.9, 0.8], [0, 0])]
    assert check(detections, [true([one, two], [0, 0])], 1)["ap50"] == pytest.approx(51 / 101)
    assert check(detections, [true([two, one], [0, 0])], 1)["ap50"] == pytest.approx(1)


def test_an_iou_at_the_threshold_counts():
    for part in range(1, 20):  # k / 20 of the truth: on each threshold, rounded as both compute it
        check([detected([[0, 0, 20, part]], [0.5], [0])], [true([[0, 0, 20, 20]], [0])], 1)


def test_recalls_on_the_101_points_are_rounded_as_in_coco():
    """Image i has a hit and i misses: every k / 100 is a recall, precision falls from each to the next. COCO's points
    35, 41, … are an ulp above k / 100, and so not reached by it."""
    falling = [detected([BOX] + [FAR] * i, [1 - i / 128] * (i + 1), [0] * (i + 1)) for i in range(100)]
    check(falling, [true([BOX], [0])] * 100, 1)


def test_labels_out_of_range_are_left_out():
    detections = [detected([BOX, BOX, BOX], [0.9, 0.8, 0.7], [-1, 5, 0])]
    assert check(detections, [true([BOX, FAR], [0, -1])], 1)["map"] == pytest.approx(1)


def test_input_is_not_changed_and_both_lists_are_as_long():
    detections, truths, num_classes = random_set(1)
    before = [{key: value.clone() for key, value in image.items()} for image in detections + truths]
    average_precision(detections, truths, num_classes)
    for one, other in zip(detections + truths, before):
        assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError):
        average_precision(detections[1:], truths, num_classes)
