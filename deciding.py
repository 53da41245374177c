"""Deciding by reward: of a trained model's class probabilities the choices with the highest expected reward.

With probabilities that are right this is the best that can be done without training, so it is the rival of every claim
that a reward beats the label. For a score of the confusion matrix the choices follow from gains that are fitted on a
hold-out, for boxes from score thresholds. B images, T passes, E… elements, K choices, G tags (or 1), n elements in all.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli

from data_types import InputError
from grpo import Reward
from scores import ConfusionScore, Score, count_confusion, gradient

ITERATIONS = 50
LEAST_COUNT = 1e-3  # of a cell of the confusion matrix: its gradient is finite
MOST_ELEMENTS = 500_000  # that a fit looks at, drawn from the hold-out; pixels are many


@dataclass(frozen=True)
class Decision:
    """What was fitted on a hold-out. checkpoint: `digest` of the one it is for. score: on the hold-out, by argmax (or
    at a detection's score of 0.5) and by what was fitted. scale, bias: of the log-probabilities, [G] and [G, K]. gains:
    by truth and choice, [G, K, K]; None: by the rewards. thresholds: of a detection's score, by class."""

    checkpoint: str
    holdout: str
    rewards: list[str]
    score: tuple[float, float] | None = None
    scale: list | None = None
    bias: list | None = None
    gains: list | None = None
    thresholds: dict[str, float] | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))


def digest(state: dict) -> str:
    """A checkpoint by its step and its weights."""
    weights = hashlib.blake2b(digest_size=8)
    for tensor in state["model"].values():
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"step {state['step']}, weights {weights.hexdigest()}"


def decision_path(checkpoint: str | Path) -> Path:
    """Where the fit for a run, or a file of it, is kept."""
    path = Path(checkpoint)
    return (path if path.is_dir() else path.parent) / "decision.json"


def load_decision(path: Path, checkpoint: str, rewards: list[str]) -> Decision:
    """What `save` wrote to `path`. Raises InputError where it is for another checkpoint or other rewards."""
    hint = "fit it with predict.py ckpt/<run> --fit DIR"
    try:
        decision = Decision(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {hint}") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); {hint}") from None
    if (decision.checkpoint, decision.rewards) != (checkpoint, rewards):
        theirs, ours = f"{decision.checkpoint}, {', '.join(decision.rewards)}", f"{checkpoint}, {', '.join(rewards)}"
        raise InputError(f"{path}: fitted for {theirs}, not for {ours}; {hint}")
    return decision


# --- Fitting ----------------------------------------------------------------------------------------------------------


def calibrate(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A scale (one over the temperature) and a bias per class of the log-probabilities, by maximum likelihood: [G] and
    [G, K]. log_probs: [n, G, K], float64; targets: [n, G]. A weak pull to 1 and 0 keeps them finite where classes can
    be told apart without an error."""
    scale = log_probs.new_ones(log_probs.shape[1], requires_grad=True)
    bias = log_probs.new_zeros(log_probs.shape[1:], requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = scale[:, None] * log_probs + bias
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        value = nll + 1e-4 * ((scale - 1) ** 2).mean() + 1e-4 * (bias**2).mean()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return scale.detach(), bias.detach()


def by_gains(probs: Tensor, gains: Tensor) -> Tensor:
    """Of each element the choice k of the highest Σ_y p(y) · gains[y, k], [n, G]. probs: [n, G, K]; gains:
    [G, K, K]."""
    return torch.einsum("ngy,gyk->ngk", probs, gains).argmax(-1)


def fit_gains(score: Score, probs: Tensor, targets: Tensor, tags: bool) -> tuple[Tensor, float, float]:
    """Gains [G, K, K] with which `by_gains` does well by a score of the confusion matrix, and the score by argmax and
    by them. Gains are the score's gradient at the confusion matrix of the decisions by the gains before, again and
    again, once plain and once at the mean matrix so far; the best is kept, argmax is the first (Narasimhan et al. 2015,
    https://proceedings.mlr.press/v37/narasimhanb15.html). probs: [n, G, K]; targets: [n, G]."""
    num_tags, num_classes = probs.shape[1:]

    def judged(gains: Tensor) -> tuple[Tensor, float]:
        decided = F.one_hot(by_gains(probs, gains), num_classes).to(probs.dtype)
        confusion = count_confusion(targets, decided, None, tags)
        return confusion, float(score(confusion))

    argmax = torch.eye(num_classes, dtype=probs.dtype).expand(num_tags, -1, -1)
    first, before = judged(argmax)
    best, best_score = argmax, before
    for averaging in (False, True):
        confusion = first
        for i in range(ITERATIONS):
            slope = gradient(score, confusion.clamp(min=LEAST_COUNT))[1].view_as(argmax)
            gains = slope / slope.abs().max().clamp(min=1e-30)
            latest, found = judged(gains)
            if found > best_score or best_score != best_score:
                best, best_score = gains, found
            confusion = confusion + (latest - confusion) / (i + 2) if averaging else latest
    return best, before, best_score


def fit(score: Score | None, probs: Tensor, targets: Tensor, counted: Tensor | None, tags: bool) -> dict:
    """Calibration, and gains for a score of the confusion matrix, of a hold-out: fields of `Decision`. probs: the mean
    over passes [N, E…, K]; targets: [N, E…]; counted: bool, None: all."""
    probs, targets = probs.double(), targets.long()
    lead = targets.shape[1] if tags else 1
    if counted is not None:
        probs, targets = probs[counted], targets[counted]
    probs, targets = probs.reshape(-1, lead, probs.shape[-1]), targets.reshape(-1, lead)
    if len(probs) > MOST_ELEMENTS:  # drawn: every fourth pixel would be every fourth column, one place in each patch
        drawn = torch.randint(len(probs), (MOST_ELEMENTS,), generator=torch.Generator().manual_seed(0))
        probs, targets = probs[drawn], targets[drawn]
    log_probs = probs.clamp(min=torch.finfo(torch.float32).tiny).log()
    scale, bias = calibrate(log_probs, targets)
    found = {"scale": scale.tolist(), "bias": bias.tolist()}
    if score:
        gains, before, after = fit_gains(score, (scale[:, None] * log_probs + bias).softmax(-1), targets, tags)
        plain = F.one_hot(probs.argmax(-1), probs.shape[-1]).to(probs.dtype)
        before = float(score(count_confusion(targets, plain, None, tags)))  # of the model as it is
        if before >= after:  # nothing is gained: it stays as it is
            scale, bias, after = torch.ones_like(scale), torch.zeros_like(bias), before
            gains = torch.eye(probs.shape[-1], dtype=probs.dtype).expand_as(gains)
            found = {"scale": scale.tolist(), "bias": bias.tolist()}
        found |= {"gains": gains.tolist(), "score": (before, after)}
    return found


# --- Deciding ---------------------------------------------------------------------------------------------------------


def score_of(rewards: dict[str, tuple[Reward, float]]) -> Score | None:
    """The score of the confusion matrix that a run's rewards are, if they are one. Raises InputError where others
    stand beside it, since gains are fitted for it alone."""
    scores = [reward for reward, _ in rewards.values() if isinstance(reward, ConfusionScore)]
    if scores and len(rewards) > 1:
        raise InputError(f"rollout.reward: to decide by {scores[0].name} no other reward may stand beside it")
    return scores[0].score if scores else None


class Decider:
    """Decides by a run's rewards, after calibration if a fit is given: by its gains, or by the expected reward."""

    def __init__(self, task, rewards: dict[str, tuple[Reward, float]], decision: Decision | None = None):
        self.task, self.rewards, self.decision = task, rewards, decision
        if score_of(rewards) and not (decision and decision.gains):
            name = next(iter(rewards))
            raise InputError(f"rollout.reward: {name} is decided by gains; fit them: predict.py ckpt/<run> --fit DIR")

    def __call__(self, outputs: Tensor, metadata: dict) -> Tensor:
        """Outputs of T passes [B, T, …] -> the choice of each element [B, E…], under the mean over the passes."""
        tags, probs = isinstance(self.task.policy(outputs), Bernoulli), self.task.probabilities(outputs).mean(1)
        if self.decision:
            scale, bias = (torch.tensor(x).to(probs) for x in (self.decision.scale, self.decision.bias))
            if not tags:  # one for all elements
                scale, bias = scale[0], bias[0]
            log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
            probs = (scale[..., None] * log_probs + bias).softmax(-1)
        if self.decision and self.decision.gains:
            elements = probs.unsqueeze(-2) if not tags else probs
            gains = torch.tensor(self.decision.gains).to(probs)
            flat = elements.reshape(-1, len(gains), probs.shape[-1])
            return by_gains(flat, gains).view(probs.shape[:-1])
        return self.expected(probs, metadata, tags).argmax(1)

    def expected(self, probs: Tensor, metadata: dict, tags: bool) -> Tensor:
        """Σ_y p(y) · R(k, y) of each choice k, [B, K, E…], each element as if all others were like it. probs:
        [B, E…, K]. Raises InputError for a reward that does not judge each element by itself."""
        num_classes, shape = probs.shape[-1], probs.shape[:-1]
        kind = probs.dtype if tags else torch.int64
        every = torch.arange(num_classes, device=probs.device).view(1, 1, -1, *[1] * (probs.ndim - 2)).to(kind)
        actions = every.expand(shape[0], 1, -1, *shape[1:])  # [B, 1, K, E…]
        logits = probs.logit() if tags else probs.log()
        outputs = (logits[..., 1] if tags else logits).unsqueeze(1)
        total = 0
        for y in range(num_classes):
            targets = torch.full(shape, y, dtype=kind, device=probs.device)
            for name, (reward, weight) in self.rewards.items():
                judged = reward(actions, outputs, targets, metadata)
                if not isinstance(judged, Tensor) or judged.shape != actions.shape:
                    hint = "decide by a score of the confusion matrix, as predict.py --fit DIR --reward mean_iou"
                    raise InputError(f"rollout.reward: {name} does not judge each element by itself; {hint}")
                total = total + weight * judged[:, 0].to(probs) * probs[..., y].unsqueeze(1)
        if not total.isfinite().all():
            raise InputError(f"rollout.reward: {', '.join(self.rewards)}: NaN or infinity cannot be decided by")
        return total


def decide_with(task, decider: Callable[[Tensor, dict], Tensor]) -> None:
    """From now on the task describes images by what the decider decides."""

    def decide(outputs: Tensor, path: str, classes: list[str]) -> Tensor:
        metadata = {"paths": [path], "indices": torch.zeros(1, dtype=torch.int64), "classes": tuple(classes)}
        return decider(outputs.unsqueeze(0), metadata)[0]

    task.decide = decide
