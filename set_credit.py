"""The score of a set of boxes, and the exact marginal value in it of each patch's choice of a class."""

import torch
from torch import Tensor

THRESHOLDS = tuple(x / 100 for x in range(50, 100, 5))  # of COCO's mAP


def claims(iou: Tensor, index: Tensor, num_classes: int, thresholds: tuple[float, ...]) -> Tensor:
    """The share of the thresholds that each patch's box would reach as a detection of each object's class, if it is the
    object that it would claim: of the class's objects the one that it overlaps most, of equals the first. Else 0.
    iou: of each patch's box and each object, [..., P, M]; index: the object's class, K where it is none, [..., P, M].
    """
    shape = *iou.shape[:-1], num_classes + 1
    levels = torch.tensor(thresholds, dtype=iou.dtype, device=iou.device)
    reached = torch.bucketize(iou.contiguous(), levels, right=True)
    highest = iou.new_zeros(shape).scatter_reduce(-1, index, iou, "amax")
    claimed = (iou == highest.gather(-1, index)) & (index < num_classes)
    place = torch.where(claimed, torch.arange(iou.shape[-1], device=iou.device), iou.shape[-1])
    first = place.new_full(shape, iou.shape[-1]).scatter_reduce(-1, index, place, "amin")
    return (reached * (claimed & (place == first.gather(-1, index)))).to(iou.dtype) / len(thresholds)


def set_values(
    classes: Tensor, iou: Tensor, labels: Tensor, num_classes: int, thresholds: tuple[float, ...] = THRESHOLDS
) -> tuple[Tensor, Tensor]:
    """The score of sets of detections, [...], and the score with each of the K + 1 choices of each patch, the others
    as they are, [..., P, K + 1].

    A patch whose class is not K, background, is a detection. It claims the object of its class that its box overlaps
    most, if by the lowest threshold. With n detections, M objects and q the share of the thresholds that a claim
    reaches the score is (2 · Σ_objects max_claims q + 1) / (n + M + 1): misses, false positives and duplicates all
    cost, and the 1 lets a false positive cost something where nothing is right yet, and where there is no object.

    classes: [..., P], of an element that does not count K + 1, so that it is no detection; iou: of each patch's box and
    each object, [..., P, M >= 1]; labels: [..., M], -1 where there is no object.
    """
    index = torch.where(labels < 0, num_classes, labels).unsqueeze(-2).expand(iou.shape)  # [..., P, M]
    quality = claims(iou, index, num_classes, thresholds)  # [..., P, M]
    claim = quality * (index == classes[..., None])
    best, by = claim.max(-2, keepdim=True)  # of each object, [..., 1, M]
    second = claim.scatter(-2, by, 0).amax(-2, keepdim=True)
    patch = torch.arange(iou.shape[-2], device=iou.device)[:, None]
    others = torch.where(patch == by, second, best)  # the best claim without this patch's, [..., P, M]
    total = best.sum(-1)  # [..., 1]
    rest = total - (best - others).sum(-1)  # without this patch, [..., P]
    gain = torch.zeros(*iou.shape[:-1], num_classes + 1, dtype=iou.dtype, device=iou.device)
    gain = gain.scatter_add(-1, index, (quality - others).clamp(min=0))  # of each choice; a class claims one object
    found = (classes < num_classes).to(iou.dtype)  # [..., P]
    objects = (labels >= 0).sum(-1).to(iou.dtype)[..., None]  # M, [..., 1]
    number = found.sum(-1, keepdim=True) - found + objects  # n' + M, [..., P]
    detections = (torch.arange(num_classes + 1, device=iou.device) < num_classes).to(iou.dtype)  # that a choice makes
    values = (2 * (rest[..., None] + gain) + 1) / (number[..., None] + detections + 1)
    score = (2 * total + 1) / (found.sum(-1, keepdim=True) + objects + 1)
    return score[..., 0], values
