"""Average precision equals pycocotools' on anything, ties included; one case is computed by hand."""

import contextlib
import copy
import io
import math

import numpy as np
import pytest
import torch
from conftest import same
from pycocotools import coco, cocoeval

from coco_ap import average_precision

BOX, FAR = [0, 0, 10, 10], [50, 50, 60, 60]


def detected(boxes=(), scores=None, labels=None) -> dict:
    """Detections of an image, by default of falling scores and of class 0; boxes of whole or eighth pixels go through
    COCO's x y w h without rounding."""
    scores = [0.9 - i / 10 for i in range(len(boxes))] if scores is None else scores
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor([0] * len(boxes) if labels is None else labels, dtype=torch.int64),
    }


def true(boxes=(), labels=None, crowd=None) -> dict:
    """The truths of an image, by default all of class 0 and no crowds."""
    zeros = [0] * len(boxes)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(zeros if labels is None else labels, dtype=torch.int64),
        "crowd": torch.tensor(zeros if crowd is None else crowd, dtype=torch.bool),
    }


def to_coco(images: list[dict], num_classes: int):
    """The images as a COCO data set, ids from 1 since COCOeval takes an id of 0 for no match."""
    annotations = []
    for i, image in enumerate(images):
        for j, (x0, y0, x1, y1) in enumerate(image["boxes"].double().tolist()):
            row = {"id": len(annotations) + 1, "image_id": i, "category_id": int(image["labels"][j])}
            row |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            row |= {"iscrowd": int(image["crowd"][j]) if "crowd" in image else 0}
            annotations.append(row | ({"score": float(image["scores"][j])} if "scores" in image else {}))
    result = coco.COCO()
    ids = {"images": [{"id": i} for i in range(len(images))], "categories": [{"id": k} for k in range(num_classes)]}
    result.dataset = ids | {"annotations": annotations}
    result.createIndex()
    return result


def check(detections: list[dict], truths: list[dict], num_classes: int = 1) -> dict:
    """Ours, once COCOeval is seen to say the same of all images and of each class; its -1 is our nan."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = cocoeval.COCOeval(to_coco(truths, num_classes), to_coco(detections, num_classes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = evaluation.eval["precision"][:, :, :, 0, 2].mean((0, 1))  # [T, R, K, areas, maxDets]
    expected = np.concatenate([evaluation.stats[:3], per_class])
    result = average_precision(detections, truths, num_classes)
    ours = [result["map"], result["ap50"], result["ap75"], *result["ap_per_class"]]
    np.testing.assert_allclose(ours, np.where(expected == -1, np.nan, expected), rtol=0, atol=1e-9)
    return result


def random_set(seed: int, grid: int, crowds: float, on_grid: bool):
    """Random truths of three classes and mostly shifted copies of them. On a coarse grid IoUs and scores (tenths) tie;
    off it x0 + w may round, which moves an IoU by 1e-16 only."""
    rng = np.random.default_rng(seed)
    fraction = np.zeros if on_grid else rng.random

    def boxes(n):
        corner, size = rng.integers(0, grid, (n, 2)) + fraction((n, 2)), rng.integers(0, grid, (n, 2))
        return np.hstack([corner, corner + size * (1 + fraction((n, 2)))])

    detections, truths = [], []
    for _ in range(12):
        num_truths, num_guesses = rng.integers(0, 9), rng.integers(0, 9)
        truth = boxes(num_truths)
        labels = rng.integers(0, 3, num_truths)
        copied = rng.permutation(np.repeat(np.arange(num_truths), 2))[: rng.integers(0, 2 * num_truths + 1)]
        shifted = truth[copied] + rng.integers(-1, 2, (len(copied), 4)) * (rng.random((len(copied), 4)) < 0.3)
        shifted[:, 2:] = np.maximum(shifted[:, :2], shifted[:, 2:])
        scores = rng.integers(0, 11, len(copied) + num_guesses) / 10 + fraction(len(copied) + num_guesses)
        found = np.concatenate([labels[copied], rng.integers(0, 3, num_guesses)])
        detections.append(detected(np.vstack([shifted, boxes(num_guesses)]).tolist(), scores.tolist(), found.tolist()))
        truths.append(true(truth.tolist(), labels.tolist(), (rng.random(num_truths) < crowds).tolist()))
    return detections, truths


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "grid, crowds, on_grid", [(4, 0.15, True), (8, 0.15, True), (64, 0.15, True), (5, 0.5, True), (64, 0.15, False)]
)
def test_random_sets(seed, grid, crowds, on_grid):
    """Full of ties, with images without truths or without detections and empty boxes. Nothing is changed in place."""
    detections, truths = random_set(seed, grid, crowds, on_grid)
    before = copy.deepcopy(detections + truths)
    result = check(detections, truths, 3)
    assert 0 < result["map"] < result["ap50"] < 1 and same(detections + truths, before)


@pytest.mark.parametrize("seed", range(3))
def test_more_than_a_hundred_detections_of_tied_scores(seed):
    rng = np.random.default_rng(seed)
    boxes, truths = (np.array(BOX) + rng.integers(-2, 3, (n, 4)) for n in (250, 20))
    check([detected(boxes.tolist(), (rng.integers(0, 4, 250) / 4).tolist())], [true(truths.tolist())])


def test_an_iou_at_the_threshold_counts():
    for part in range(1, 20):  # k / 20 of the truth: on each threshold, rounded as both compute it
        check([detected([[0, 0, 20, part]])], [true([[0, 0, 20, 20]])])


def test_recalls_on_the_101_points_are_rounded_as_in_coco():
    """Image i has a hit and i misses: every k / 100 is a recall, precision falls from each to the next. COCO's points
    35, 41, … are an ulp above k / 100, and so not reached by it."""
    check([detected([BOX] + [FAR] * i, [1 - i / 128] * (i + 1)) for i in range(100)], [true([BOX])] * 100)


def test_closed_form():
    """Two truths; of the detections the best has IoU 0.8, the second misses, the third is exact.

    Up to IoU 0.8 it is hit, miss, hit: precision 1 up to recall 1/2 (51 of the 101 points), 2/3 beyond. From 0.85 on
    it is miss, miss, hit: 1/3 up to recall 1/2, 0 beyond. 7 of the 10 thresholds are at most 0.8.
    """
    detections = [detected([[0, 0, 10, 8], FAR]), detected([BOX], [0.7])]
    result = check(detections, [true([BOX]), true([BOX])])
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 3 / 101
    assert result["ap50"] == result["ap75"] == pytest.approx(low, abs=1e-12)
    assert result["map"] == pytest.approx((7 * low + 3 * high) / 10, abs=1e-12)
    assert result["ap_per_class"] == [result["map"]]


LEFT, MIDDLE, RIGHT = [0, 0, 8, 8], [2, 0, 10, 8], [4, 0, 12, 8]  # the middle one has the same IoU with the others
EMPTY = [[5, 5, 5, 5], [0, 0, 0, 10], [3, 3, 7, 3]]
CASES = {  # detections, truths, number of classes, AP50
    "perfect": ([detected([BOX, FAR])], [true([FAR, BOX])], 1, 1),
    "no detection": ([detected(), detected()], [true([BOX]), true()], 1, 0),
    "no truth in an image": ([detected([BOX], [0.5]), detected([BOX])], [true([BOX]), true()], 1, 1 / 2),
    "no detection in an image": ([detected([BOX]), detected()], [true([BOX]), true([BOX])], 1, 51 / 101),
    "no image": ([], [], 2, math.nan),
    "no truth": ([detected([BOX])], [true()], 2, math.nan),
    "crowds alone": ([detected([BOX, FAR])], [true([BOX, BOX], [0, 0], [1, 1])], 1, math.nan),
    "a class without truth": ([detected([BOX, BOX], None, [0, 1])], [true([BOX, FAR], [0, 2])], 3, 1 / 2),
    "a crowd forgives any number of detections": (
        [detected([[0, 0, 5, 5], [1, 1, 6, 6], [2, 2, 7, 7], BOX]), detected([BOX], [0.5])],
        [true([BOX], [0], [1]), true([BOX])],
        *(1, 1),
    ),
    "a truth goes before a crowd": ([detected([[0, 0, 10, 6]] * 2)], [true([BOX, BOX], [0, 0], [1, 0])], 1, 1),
    "of equal IoUs the last truth": ([detected([MIDDLE, RIGHT])], [true([LEFT, RIGHT])], 1, 51 / 101),
    "of equal IoUs the last truth, luckily": ([detected([MIDDLE, RIGHT])], [true([RIGHT, LEFT])], 1, 1),
    "labels out of range": ([detected([BOX] * 3, None, [-1, 5, 0])], [true([BOX, FAR], [0, -1])], 1, 1),
    "empty boxes": ([detected([*EMPTY, BOX])], [true([*EMPTY, BOX], [0] * 4, [0, 0, 1, 0])], 1, 34 / 4 / 101),
}


@pytest.mark.parametrize("detections, truths, num_classes, ap50", CASES.values(), ids=CASES)
def test_one_rule_at_a_time(detections, truths, num_classes, ap50):
    assert check(detections, truths, num_classes)["ap50"] == pytest.approx(ap50, nan_ok=True)


@pytest.mark.parametrize("place", [98, 99, 100, 101])
def test_only_the_best_hundred_of_an_image_and_class_count(place):
    """The one good detection comes after `place` bad ones; another class and another image have their own hundred."""
    scores = [0.9] * place + [0.5] + [0.9 if place < 100 else 0.4] * 5  # later ones of a better score push it out
    boxes = [FAR] * place + [BOX] + [FAR] * 5
    detections = [detected(boxes + [BOX], scores + [0.1], [0] * len(boxes) + [1]), detected([BOX], [0.3])]
    truths = [true([BOX, BOX], [0, 1]), true([BOX])]
    assert check(detections, truths, 2)["ap_per_class"][1] == pytest.approx(1)


def test_both_lists_are_as_long():
    with pytest.raises(ValueError):
        average_precision([], [true()], 1)
