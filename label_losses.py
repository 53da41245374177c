"""Losses of labels by name (`training.supervised_loss`), beside cross-entropy: for classes that are not equally
frequent, and of whole masks.

All take the same. log_probs: log π of each class, [B, T, K, E…], as `choices.choice_log_probs` lays them out; targets:
int64 [B, T, 1, E…]; counted: bool [B, E…], the elements that count, None: all; counts: elements of each class in the
training set, [K], or of tags [2, tags]. All return a loss of each element, [B, T, 1, E…], which depends on its image
alone, so that a run depends neither on micro-batches nor on the number of processes. Of an element that does not count
it may be anything; `grpo.mean_counted` drops it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LabelLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
BY_COUNTS = ("weighted", "logit_adjusted")  # these need counts, for the others they may be None


# --- Of an element ----------------------------------------------------------------------------------------------------


def filled(counts: Tensor) -> Tensor:
    """`counts` [K, …] as floats, a class without any as the rarest that has some: counts may be of a sample of the
    training set, and then its elements are rare, but neither impossible nor worth without end."""
    counts = counts if counts.is_floating_point() else counts.double()  # Apple's GPU has no float64
    rarest = torch.where(counts > 0, counts, torch.inf).amin(0).nan_to_num(posinf=1.0)
    return torch.where(counts > 0, counts, rarest)


def class_weights(counts: Tensor) -> Tensor:
    """n / (K · n_k), [K, …], of n elements of which n_k are of class k, K the number of classes that are there:
    by inverse frequency, with mean 1 over the elements; scikit-learn calls it balanced."""
    present = (counts > 0).sum(0).clamp(min=1)
    return counts.sum(0) / (present * filled(counts))


def beside(values: Tensor, log_probs: Tensor) -> Tensor:
    """Values of classes [K, …] in a shape that goes with log_probs, [K, E…]."""
    return values.to(log_probs).reshape(*values.shape, *[1] * (log_probs.ndim - 2 - values.ndim))


def weighted(log_probs: Tensor, targets: Tensor, counted: Tensor | None, counts: Tensor) -> Tensor:
    """Cross-entropy times `class_weights`."""
    return -(beside(class_weights(counts), log_probs) * log_probs).gather(2, targets)


def logit_adjusted(log_probs: Tensor, targets: Tensor, counted: Tensor | None, counts: Tensor) -> Tensor:
    """Cross-entropy of logits + log prior (Menon et al. 2021, https://arxiv.org/abs/2007.07314, τ = 1). So the plain
    logits, which predict, learn the posterior under equally frequent classes, whose argmax has the best balanced
    accuracy."""
    shifted = log_probs + beside(filled(counts).log(), log_probs)
    return -shifted.log_softmax(2).gather(2, targets)


def focal(log_probs: Tensor, targets: Tensor, counted: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """-(1 - π(target))² · log π(target) (Lin et al. 2017, https://arxiv.org/abs/1708.02002, γ = 2, without their α)."""
    right = log_probs.gather(2, targets)
    return -(right.expm1() ** 2) * right


# --- Of a whole mask --------------------------------------------------------------------------------------------------


def pixels(log_probs: Tensor, targets: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probability and truth (0 or 1) of each class, [B, T, K, P], both 0 where a pixel does not count: so it adds to no
    sum, and its error is 0."""
    probs = log_probs.exp().flatten(3)
    truth = torch.zeros_like(probs).scatter(2, targets.flatten(3), 1.0)
    if counted is None:
        return probs, truth
    counted = counted.flatten(1)[:, None, None]
    return torch.where(counted, probs, 0), torch.where(counted, truth, 0)


def of_image(losses: Tensor, present: Tensor, targets: Tensor) -> Tensor:
    """The mean over the classes that are present, 0 where there is none, as the loss of each pixel: so an image weighs
    as much as it has pixels that count, and a sum over micro-batches is the sum over the batch. losses, present:
    [B, T, K]."""
    mean = torch.where(present, losses, 0).sum(2) / present.sum(2).clamp(min=1)
    return mean.reshape(*mean.shape, *[1] * (targets.ndim - 2)).expand(targets.shape)


def dice(log_probs: Tensor, targets: Tensor, counted: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """1 - soft Dice, 2 Σ p·y / (Σ p + Σ y), of each image, mean over the classes that its truth has (Milletari et al.
    2016, https://arxiv.org/abs/1606.04797, with plain sums in the denominator)."""
    probs, truth = pixels(log_probs, targets, counted)
    true = truth.sum(3)
    return of_image(1 - 2 * (probs * truth).sum(3) / (probs.sum(3) + true.clamp(min=1)), true > 0, targets)


def lovasz(log_probs: Tensor, targets: Tensor, counted: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """Lovász-Softmax (Berman et al. 2018, https://arxiv.org/abs/1705.08790) of each image, mean over the classes that
    its truth has: 1 - IoU, extended from wrong and right to errors |y - p| in between.

    Sorted by error, the largest first, each pixel's error is multiplied by what 1 - IoU gains when this pixel, too, is
    wrong: 1 / U for one of the class, I / (U - 1) - I / U for another, which is written without the cancellation.
    """
    probs, truth = pixels(log_probs, targets, counted)
    errors, order = (truth - probs).abs().sort(3, descending=True)
    true, truth = truth.sum(3, keepdim=True), truth.gather(3, order)
    intersection, union = true - truth.cumsum(3), true + (1 - truth).cumsum(3)
    gain = torch.where(truth > 0, 1 / union.clamp(min=1), intersection / (union * (union - 1)).clamp(min=1))
    return of_image((errors * gain).sum(3), true[..., 0] > 0, targets)


CLASS_LOSSES: dict[str, LabelLoss] = {loss.__name__: loss for loss in (weighted, logit_adjusted, focal)}
MASK_LOSSES = CLASS_LOSSES | {loss.__name__: loss for loss in (dice, lovasz)}
