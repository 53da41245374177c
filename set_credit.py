"""The score of a set of boxes, and the exact marginal value in it of each patch's choice of a class."""

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLDS = tuple(x / 100 for x in range(50, 100, 5))  # of COCO's mAP


def claims(iou: Tensor, labels: Tensor, num_classes: int, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """For each patch and class the object of this class that its box overlaps most (of equals the first), if it reaches
    the lowest threshold, else M, none; and the share of the thresholds reached: [..., P, K] each. iou: of each patch's
    box and each object, [..., P, M]; labels: [..., M], -1 where there is no object."""
    num_objects = iou.shape[-1]
    shape = *iou.shape[:-1], num_classes + 1
    labels = torch.where(labels < 0, num_classes, labels).unsqueeze(-2).expand(iou.shape)  # one more class: no object
    best = iou.new_full(shape, -1).scatter_reduce(-1, labels, iou, "amax")
    first = torch.where(iou == best.gather(-1, labels), torch.arange(num_objects, device=iou.device), num_objects)
    best_object = first.new_full(shape, num_objects).scatter_reduce(-1, labels, first, "amin")[..., :-1]
    levels = torch.tensor(thresholds, dtype=iou.dtype, device=iou.device)
    reached = torch.bucketize(best[..., :-1].contiguous(), levels, right=True)
    return torch.where(reached > 0, best_object, num_objects), reached.to(iou.dtype) / len(thresholds)


def set_values(
    classes: Tensor, iou: Tensor, labels: Tensor, num_classes: int, thresholds: tuple[float, ...] = THRESHOLDS
) -> tuple[Tensor, Tensor]:
    """The score of sets of detections, [...], and the score with each of the K + 1 choices of each patch, the others
    as they are, [..., P, K + 1].

    A patch whose class is not K, background, is a detection. It claims the object of its class that its box overlaps
    most, if by the lowest threshold. With n detections, M objects and q the share of the thresholds that a claim
    reaches the score is (2 · Σ_objects max_claims q + 1) / (n + M + 1): misses, false positives and duplicates all
    cost, and the 1 lets a false positive cost something where nothing is right yet, and where there is no object.

    classes: [..., P], of an element that does not count K + 1, so that it is no detection; iou, labels: see `claims`.
    """
    objects, quality = claims(iou, labels, num_classes, thresholds)  # [..., P, K]
    num_objects = (labels >= 0).sum(-1).to(iou.dtype)[..., None]  # M, [..., 1]
    found = (classes < num_classes).to(iou.dtype)  # [..., P]
    own = classes.clamp(max=num_classes - 1)[..., None]
    claimed = torch.where(classes < num_classes, objects.gather(-1, own)[..., 0], iou.shape[-1])  # [..., P]
    claim = F.one_hot(claimed, iou.shape[-1] + 1)[..., :-1] * quality.gather(-1, own)  # [..., P, M]
    claim = F.pad(claim, (0, 1, 0, 1))  # a row and a column of 0: no second claim, no object
    best, second = claim.topk(2, dim=-2).values.unbind(-2)  # [..., M + 1] each
    best, second = best.unsqueeze(-2).expand(claim.shape), second.unsqueeze(-2).expand(claim.shape)
    others = torch.where((claim == best) & (claim > 0), second, best)[
        ..., :-1, :
    ]  # without this patch, [..., P, M + 1]
    total = best[..., 0, :].sum(-1, keepdim=True)  # [..., 1]
    rest = total - (best[..., :-1, :] - others).sum(-1)  # Q' without this patch, [..., P]
    number = found.sum(-1, keepdim=True) - found + num_objects  # n' + M, [..., P]
    gain = (quality - others.gather(-1, objects)).clamp(min=0) * (objects < iou.shape[-1])  # [..., P, K]
    chosen = (2 * (rest[..., None] + gain) + 1) / (number[..., None] + 2)
    background = (2 * rest + 1) / (number + 1)
    score = (2 * total + 1) / (found.sum(-1, keepdim=True) + num_objects + 1)
    return score[..., 0], torch.cat([chosen, background[..., None]], -1)
