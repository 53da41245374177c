"""Scores of the confusion matrix: rewards of a whole data set, such as macro-F1, that are no sum over its images.

C[y, k] counts the elements (images, pixels) of truth y that are predicted as k. A score maps C, [..., K, K], to [...]
in torch operations that can be differentiated; of tags there is one matrix a tag, [..., tags, 2, 2], no and yes.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Categorical
from torch.utils.data import Dataset

from data_types import Credit, InputError, TensorMiniBatch
from grpo import Reward, mean_per_image

Score = Callable[[Tensor], Tensor]
WINDOW = 256  # images: a row of the running confusion is the mean over about so many that hold its class
LEAST = 1e-7  # of a probability: a logarithm of a cell stays finite

# --- Ready by name: means over the classes that are there -------------------------------------------------------------


def mean_ratio(part: Tensor, whole: Tensor) -> Tensor:
    """The mean over the last dimension of part / whole, where whole > 0; no gradient is NaN elsewhere."""
    there = whole > 0
    ratios = torch.where(there, part / torch.where(there, whole, 1), 0)
    return ratios.sum(-1) / there.sum(-1)


def parts(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each class the hits, how many are true and how many predicted: [..., K] each."""
    return confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1), confusion.sum(-2)


def macro_f1(confusion: Tensor) -> Tensor:
    """The mean over the classes of 2 · hits / (true + predicted)."""
    hits, true, predicted = parts(confusion)
    return mean_ratio(2 * hits, true + predicted)


def dice(confusion: Tensor) -> Tensor:
    """Dice of the data set's pixels, mean over the classes: by another name the macro-F1."""
    return macro_f1(confusion)


def mean_iou(confusion: Tensor) -> Tensor:
    """The mean over the classes of hits / (true + predicted - hits)."""
    hits, true, predicted = parts(confusion)
    return mean_ratio(hits, true + predicted - hits)


def balanced_accuracy(confusion: Tensor) -> Tensor:
    """The mean recall of the classes."""
    hits, true, _ = parts(confusion)
    return mean_ratio(hits, true)


def g_mean(confusion: Tensor) -> Tensor:
    """The geometric mean of the classes' recalls."""
    hits, true, _ = parts(confusion)
    there = true > 0
    recalls = torch.where(there, hits / torch.where(there, true, 1), 1)
    return (recalls.log().sum(-1) / there.sum(-1)).exp()


def quadratic_kappa(confusion: Tensor) -> Tensor:
    """Cohen's kappa with quadratic weights: classes are grades, and two grades off costs four times one."""
    grades = torch.arange(confusion.shape[-1], device=confusion.device)
    cost = (grades[:, None] - grades) ** 2
    _, true, predicted = parts(confusion)
    by_chance = true[..., :, None] * predicted[..., None, :] / confusion.sum((-2, -1), keepdim=True)
    return 1 - (cost * confusion).sum((-2, -1)) / (cost * by_chance).sum((-2, -1))


def mcc(confusion: Tensor) -> Tensor:
    """Matthews' correlation coefficient of K classes (Gorodkin 2004, https://doi.org/10.1016/j.compbiolchem.2004.09.006)."""
    hits, true, predicted = parts(confusion)
    n = confusion.sum((-2, -1))
    spread = [n**2 - (x**2).sum(-1) for x in (true, predicted)]
    return (hits.sum(-1) * n - (true * predicted).sum(-1)) / (spread[0] * spread[1]).sqrt()


READY: dict[str, Score] = {
    score.__name__: score for score in (macro_f1, balanced_accuracy, g_mean, quadratic_kappa, mcc, mean_iou, dice)
}


# --- As a reward ------------------------------------------------------------------------------------------------------


def count_confusion(targets: Tensor, probs: Tensor, counted: Tensor | None, tags: bool) -> Tensor:
    """Elements by truth, spread over the predictions by probability: [K, K], or with `tags` a matrix for each element,
    [E…, K, K]. targets: [B, E…]; probs: [B, E…, K]; counted: [B, E…] bool, None: all."""
    truth = F.one_hot(targets.long(), probs.shape[-1]).to(probs.dtype)
    truth = truth if counted is None else truth * counted[..., None]
    if tags:
        return torch.einsum("b...y,b...k->...yk", truth, probs)
    return truth.flatten(0, -2).T @ probs.flatten(0, -2)


def gradient(score: Score, confusion: Tensor) -> tuple[Tensor, Tensor]:
    """The score of a confusion matrix, and its gradient there: what one more element in each cell is worth."""
    with torch.enable_grad():
        confusion = confusion.detach().requires_grad_()
        value = score(confusion)
        return value.detach(), torch.autograd.grad(value, confusion)[0]


def check_score(name: str, score: Score, confusion: Tensor) -> None:
    """Raises InputError unless the score of a matrix like `confusion` is one finite number with a finite gradient that
    is not 0: where nothing is known yet, and where nearly all is right."""
    right = torch.eye(confusion.shape[-1], device=confusion.device, dtype=confusion.dtype)
    counts = confusion.sum(-1, keepdim=True)
    shape = f"a confusion matrix {list(confusion.shape)}"
    for matrix in (confusion, counts * (0.01 / confusion.shape[-1] + 0.99 * right)):
        with torch.enable_grad():
            value = score(matrix.clone().requires_grad_())
        if not isinstance(value, Tensor) or value.shape != ():
            what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"rollout.reward: {name} returned {what} for {shape}; expected one number, shape []")
        if not value.requires_grad:
            raise InputError(f"rollout.reward: {name} cannot be differentiated; it should be of torch operations alone")
        value, slope = gradient(score, matrix)
        if not (value.isfinite() and slope.isfinite().all()):
            raise InputError(f"rollout.reward: {name} is {value:g} for {shape}; expected it and its gradient finite")
        if not slope.any():
            raise InputError(f"rollout.reward: {name} has gradient 0 for {shape}; rounding or argmax cannot be climbed")


class ConfusionScore:
    """A score of the confusion matrix as a reward: to change one element of truth y from choice a to k changes it by
    G[y, k] - G[y, a], G the gradient at the confusion matrix (the relative error is about one over the class's count).
    So G is this step's price list, and a choice is worth C.sum() · G[y, k], finished (`Credit.values`).

    C[y, k] = counts[y] · rows[y, k]. rows: a running mean over earlier steps of the mean over passes of the class
    probabilities, starting uniform, a row moved by its own class's elements alone: the mean over the last 256 images'
    worth of them, or over its last epoch. counts: of the training set's labels, or (of pixels) a running mean. Both are
    of the global batch, and in the checkpoint; nothing else is carried from step to step.
    """

    def __init__(self, name: str, score: Score, task):
        self.name, self.score, self.task = name, score, task
        self.labels: Tensor | None = None  # of the training set, if it holds them: [n] or [n, tags]
        self.num_images = WINDOW  # of the training set
        self.state: dict[str, Tensor] = {}  # rows [..., K, K], counts [..., K]

    def start(self, outputs: Tensor, targets: Tensor, num_classes: int) -> None:
        """At the first rollout: what an element is, the matrix of a new run, the prices. Raises InputError."""
        policy = self.task.policy(outputs[:1])
        self.tags = isinstance(policy, Bernoulli)
        if not (self.tags or isinstance(policy, Categorical)):
            raise InputError(f"rollout.reward: {self.name}: a confusion matrix is of classes, of pixels or of tags")
        lead = targets.shape[1:] if self.tags else ()
        self.size = 1 if self.tags else targets[0].numel()  # elements of an image in a matrix
        known = self.labels is not None and self.labels.shape[1:] == targets.shape[1:] == lead
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        place = {"device": outputs.device, "dtype": dtype}
        counts = torch.full((*lead, num_classes), self.num_images * self.size / num_classes, **place)
        if known:
            counts = F.one_hot(self.labels.long(), num_classes).sum(0).to(**place)
        self.known = known
        fresh = {"rows": torch.full((*lead, num_classes, num_classes), 1 / num_classes, **place), "counts": counts}
        self.state.update({key: self.state.get(key, tensor).to(**place) for key, tensor in fresh.items()})
        if any(self.state[key].shape != tensor.shape for key, tensor in fresh.items()):
            raise InputError(f"rollout.reward: {self.name}: the checkpoint's confusion matrix is of other classes")
        self.seen = torch.zeros(fresh["rows"].numel() + 1, **place)  # the step's confusion, and its images
        check_score(self.name, self.score, counts.clamp(min=1)[..., None] * fresh["rows"])
        self.price()

    def price(self) -> None:
        """The price list of the next step, [..., K, K], and the score itself."""
        confusion = self.state["counts"].clamp(min=1)[..., None] * self.state["rows"].clamp(min=LEAST)
        self.value, slope = gradient(self.score, confusion)
        self.prices = confusion.sum() * slope

    def __call__(self, actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Credit:
        """actions: [B, T, A, E…]; targets: [B, E…]; values [B, T, E…, K] from the prices of earlier steps. Counts the
        batch for `update`."""
        probs = self.task.probabilities(outputs).mean(1)  # [B, E…, K]
        if not hasattr(self, "prices"):
            self.start(outputs, targets, probs.shape[-1])
        seen = count_confusion(targets, probs.to(self.seen.dtype), metadata.get("counted"), self.tags)
        self.seen += torch.cat([seen.flatten(), self.seen.new_full((1,), len(targets))])
        truth = targets.long()
        if self.tags:
            truth = F.one_hot(truth, probs.shape[-1]).to(self.seen.dtype)  # [B, E…, K]
            values = torch.einsum("b...y,...yk->b...k", truth, self.prices)
        else:
            values = F.embedding(truth, self.prices)  # [B, E…, K]; quicker than an index
        values = values.unsqueeze(1).expand(-1, actions.shape[1], *values.shape[1:])
        each = self.task.config.get("rollout", {}).get("action") == "all"  # it wants rewards of elements
        return Credit(None, self.value.expand(actions.shape if each else actions.shape[:3]), values)

    def update(self) -> None:
        """After a step: the matrix of the next one, from what all micro-batches of all processes have seen."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.seen)
        rows, counts = self.state["rows"], self.state["counts"]
        seen, images = self.seen[:-1].view(rows.shape), self.seen[-1]
        elements = seen.sum(-1)  # of each class, as probabilities sum to 1
        share = (elements / counts.clamp(min=1, max=WINDOW * self.size)).clamp(max=1)[..., None]
        mean = seen / elements.clamp(min=LEAST)[..., None]
        rows += share * (torch.where(elements[..., None] > 0, mean, rows) - rows)
        if not self.known:
            share = (images / min(WINDOW, self.num_images)).clamp(max=1)
            counts += share * (elements * self.num_images / images - counts)
        self.seen.zero_()
        self.price()


def open_scores(rewards: dict[str, tuple[Reward, float]], dataset: Dataset, states: dict) -> list[ConfusionScore]:
    """The scores of the confusion matrix among a run's rewards, told of its training set. states: name -> the state of
    each, which is in the checkpoint; empty for a new run."""
    scores = [reward for reward, _ in rewards.values() if isinstance(reward, ConfusionScore)]
    for score in scores:
        score.labels, score.num_images = getattr(dataset, "targets", None), len(dataset)
        score.state = states.setdefault(score.name, {})
    return scores


# --- In an evaluation -------------------------------------------------------------------------------------------------


class RewardEvaluation:
    """A run's rewards of the deterministic network's decisions, the mode of its policy, over an evaluation set: of a
    reward the mean over the images, of a score of the confusion matrix that of the whole set. decide: what decides by
    reward from outputs [B, T, …] and metadata; its decisions are then judged, and beside them those by argmax of the
    same passes."""

    def __init__(self, task, rewards: dict[str, tuple[Reward, float]], decide: Callable | None = None):
        self.task, self.rewards, self.decide, self.num_images = task, rewards, decide, 0
        self.sums: dict[tuple[str, str], Tensor] = {}  # (prefix, name) -> of the images' rewards, or a confusion matrix

    def add(self, batch: TensorMiniBatch, outputs: Tensor, outputs_mc: Tensor) -> None:
        """outputs: [B, …] of the deterministic network; outputs_mc: [B, T, …] of T passes."""
        self.num_images += len(batch)
        outputs = outputs.unsqueeze(1)  # one pass
        if not self.decide:
            self.judge("eval/reward", batch, outputs, self.task.policy(outputs).mode.nan_to_num().unsqueeze(2))
            return
        argmax = self.task.probabilities(outputs_mc).mean(1).argmax(-1)
        for prefix, decided in (
            ("eval/reward", self.decide(outputs_mc, batch.metadata)),
            ("eval/reward_argmax", argmax),
        ):
            self.judge(prefix, batch, outputs, decided.to(batch.targets.dtype)[:, None, None])

    def judge(self, prefix: str, batch: TensorMiniBatch, outputs: Tensor, actions: Tensor) -> None:
        """outputs: [B, 1, …]; actions: [B, 1, 1, E…]."""
        counted = {} if batch.counted is None else {"counted": batch.counted}
        for name, (reward, _) in self.rewards.items():
            if isinstance(reward, ConfusionScore):
                tags = isinstance(self.task.policy(outputs[:1]), Bernoulli)
                decided = F.one_hot(actions[:, 0, 0].long(), self.task.probabilities(outputs[:1]).shape[-1]).float()
                value = count_confusion(batch.targets, decided, batch.counted, tags)
            else:
                value = reward(actions, outputs, batch.targets, batch.metadata | counted)
                value = value.rewards if isinstance(value, Credit) else value
                if not isinstance(value, Tensor):
                    raise InputError(f"rollout.reward: {name} returned {type(value).__name__}; expected a tensor")
                whole = value.ndim < actions.ndim or batch.counted is None
                value = mean_per_image(value.float(), None if whole else batch.counted).sum()
            self.sums[prefix, name] = self.sums.get((prefix, name), 0) + value.cpu().double()

    def metrics(self) -> dict[str, float]:
        """eval/reward/<name>, and eval/reward, their sum by their weights; with `decide` eval/reward_argmax too."""
        metrics: dict[str, float] = {}
        for (prefix, name), total in self.sums.items():
            reward, weight = self.rewards[name]
            value = float(reward.score(total) if isinstance(reward, ConfusionScore) else total / self.num_images)
            metrics |= {prefix: metrics.get(prefix, 0.0) + weight * value, f"{prefix}/{name}": value}
        return metrics
