"""COCO's average precision of detections, equal to pycocotools' COCOeval (iouType bbox) tie for tie.

An image of one class has D detections and G truths; T = 10 IoU thresholds are judged at once. A truth is to be found; a
crowd need not be, and a detection that matches it counts neither way.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

# As COCO computes them: np.arange(0.5, …) and k / 100 round otherwise, and so decide otherwise at a tie.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # per image and class


def box_iou(a: Tensor, b: Tensor, crowd: Tensor | None = None) -> Tensor:
    """IoU of boxes [..., 4] (x0 y0 x1 y1) with boxes [..., 4], broadcast: […]; 0 for empty ones. Where b is a crowd
    (bool […]) it is the share of a that lies inside."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b)]
    union = areas[0] + areas[1] - intersection
    union = union if crowd is None else torch.where(crowd, areas[0], union)
    return intersection / union.clamp(min=1e-9)


def match(iou: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give each detection, best first, the truth it overlaps most among those left; a crowd only for want of others.
    iou: [D, G] in descending order of score; crowd: [G] bool. Returns two bool [T, D] for T IoU thresholds: whether the
    detection has a truth, and whether that is a crowd, so that the detection counts neither way."""
    found = np.zeros((len(IOU_THRESHOLDS), len(iou)), bool)
    void = found.copy()
    taken = np.zeros((len(IOU_THRESHOLDS), len(crowd)), bool)
    for d in np.flatnonzero((iou >= IOU_THRESHOLDS[0]).any(1)):
        allowed = (iou[d] >= IOU_THRESHOLDS[:, None]) & (crowd | ~taken)  # a crowd is never used up
        allowed &= ~crowd | ~(allowed & ~crowd).any(1, keepdims=True)
        rank = np.where(allowed, iou[d], -1)
        best = rank.shape[1] - 1 - rank[:, ::-1].argmax(1)  # of equal IoUs COCO takes the last
        t = np.flatnonzero(allowed.any(1))
        found[t, d] = taken[t, best[t]] = True
        void[t, d] = crowd[best[t]]
    return found, void


def interpolated_precision(scores: np.ndarray, hit: np.ndarray, miss: np.ndarray, num_truths: int) -> np.ndarray:
    """Mean over RECALLS of the best precision at that recall or more, 0 where it is not reached: AP [T]. scores: [D] in
    any order; hit, miss: [T, D] bool, a true positive, a false positive (neither if ignored)."""
    order = np.argsort(-scores, kind="stable")  # of equal scores the earlier image's comes first
    hits, misses = hit[:, order].cumsum(1), miss[:, order].cumsum(1)
    precision = hits / (hits + misses + np.spacing(1))  # COCO's way out of 0 / 0, when all so far are ignored
    precision = np.pad(np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))
    return np.array([p[np.searchsorted(r, RECALLS)].mean() for p, r in zip(precision, hits / num_truths)])


def matched(detections: list[dict[str, Tensor]], truths: list[dict[str, Tensor]]) -> dict[int, list[tuple]]:
    """Class -> of each image with it the scores [D], hit [T, D], miss [T, D], and the number of truths that are no
    crowds; see `average_precision`."""
    parts = defaultdict(list)
    for detected, true in zip(detections, truths, strict=True):
        labels, true_labels = detected["labels"].numpy(), true["labels"].numpy()
        all_boxes, all_true = (x["boxes"].double().reshape(-1, 4) for x in (detected, true))
        all_scores, all_crowd = detected["scores"].double().numpy(), true["crowd"].bool().numpy()
        for k in np.union1d(labels, true_labels):
            best = np.flatnonzero(labels == k)
            best = best[np.argsort(-all_scores[best], kind="stable")[:MAX_DETECTIONS]]
            chosen = np.flatnonzero(true_labels == k)
            crowd = all_crowd[chosen]
            iou = box_iou(all_boxes[best][:, None], all_true[chosen], torch.from_numpy(crowd))
            found, void = match(iou.numpy(), crowd)
            parts[k].append((all_scores[best], found & ~void, ~found, (~crowd).sum()))
    return parts


def average_precision(
    detections: list[dict[str, Tensor]], truths: list[dict[str, Tensor]], num_classes: int
) -> dict[str, float | list[float]]:
    """COCO's mAP@[.5:.95], AP50 and AP75 over one data set: all areas, the best 100 detections per image and class.

    detections: per image {"boxes": [n, 4] x0 y0 x1 y1 in pixels, "scores": [n], "labels": [n] in 0…num_classes - 1}
    truths: per image {"boxes": [m, 4], "labels": [m], "crowd": [m] bool}; other labels are left out, as in COCO
    Returns {"map", "ap50", "ap75": means over the classes with a truth that is no crowd, "ap_per_class": list
    of the mAP of each, nan for the others}, all in 0…1. Without any such class the means are nan (pycocotools: -1).
    """
    parts = matched(detections, truths)
    ap = np.full((num_classes, len(IOU_THRESHOLDS)), np.nan)
    for k in range(num_classes):
        if num_truths := sum(part[3] for part in parts[k]):
            scores, hit, miss = (np.concatenate(x, -1) for x in list(zip(*parts[k]))[:3])
            ap[k] = interpolated_precision(scores, hit, miss, num_truths)
    known = ap[~np.isnan(ap[:, 0])]
    mean = known.mean(0) if len(known) else np.full(len(IOU_THRESHOLDS), np.nan)
    means = {"map": float(mean.mean()), "ap50": float(mean[0]), "ap75": float(mean[5])}
    return means | {"ap_per_class": ap.mean(1).tolist()}
