"""Group Relative Policy Optimisation on Monte Carlo Dropout passes: rollout, advantages, loss, update.

Knows no task and no ViT: a model is anything with `sample_masks(B, T)` and `model(inputs, masks)`, a policy adapter
turns its outputs into a `torch.distributions.Distribution` of batch shape [B, T, E…], a reward judges actions.

B images, T passes, A actions per pass, E… the elements of an action; N = T * A actions are the group of one image.
With `action: all` every one of the K choices of a categorical element takes the place of A draws.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributions import Categorical, Distribution, kl_divergence

from choices import choice_log_probs, every_choice, expected_advantages, join, log_weights, value_advantages
from data_types import Credit, Episode, InputError, TensorMiniBatch

# reward(actions [B, T, A, E…], outputs [B, T, …], targets [B, E…], metadata) -> [B, T, A] or [B, T, A, E…]
Reward = Callable[[Tensor, Tensor, Tensor, dict], Tensor | Credit]
PolicyAdapter = Callable[[Tensor], Distribution]
SupervisedLoss = Callable[[Distribution, Tensor, Tensor | None], Tensor]  # policy, targets, counted -> [B, T, 1, E…]


@contextmanager
def keyed_rng(*key: int | str) -> Iterator[None]:
    """All draws inside are a function of `key` alone; torch's own random state is as before afterwards. The global
    generator is forked and seeded, because torch.distributions takes no other."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace for each absent backend
        for backend in (torch.cuda, torch.mps):
            if backend.is_available():
                backend.manual_seed(seed)
        yield


# --- Policy: torch puts samples first, [A, B, T, E…]; these two functions alone touch that layout ---------------------


def classification_policy_adapter(outputs: Tensor) -> Categorical:
    """Logits [B, T, K] -> a class per pass, in float32 (or better) whatever the autocast: log_probs are small
    differences of large numbers."""
    return Categorical(logits=outputs.to(torch.promote_types(outputs.dtype, torch.float32)))


def sample_actions(policy: Distribution, num_actions: int) -> Tensor:
    """Draw A actions from each pass: [B, T, A, E…]."""
    return policy.sample((num_actions,)).movedim(0, 2)


def action_log_prob(policy: Distribution, actions: Tensor) -> Tensor:
    """log π(action) of actions [B, T, A, E…], in the same layout."""
    return policy.log_prob(actions.movedim(2, 0)).movedim(0, 2)


def all_log_probs(policy: Distribution, actions: Tensor, choices: bool) -> Tensor:
    """log π of the drawn actions [B, T, A, E…] and, with `choices`, of every choice after them: [B, T, N, E…]."""
    if not choices:
        return action_log_prob(policy, actions)
    log_probs = choice_log_probs(policy)[0]
    return torch.cat([action_log_prob(policy, actions), log_probs], 2) if actions.shape[2] else log_probs


def nll(policy: Distribution, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """-log π(targets) of targets [B, T, 1, E…], in the same layout: what learning from labels minimises."""
    return -action_log_prob(policy, targets)


@dataclass(frozen=True)
class RolloutSettings:
    """How the group of an image is made and judged. num_mc_samples: T. actions_per_sample: A. action: `sample`, or
    `argmax` (the mode of each pass, A = 1), or `all` (every choice, of which there may be max_choices, weighted by its
    probability; elements without choices are still sampled). advantage: the estimator, see `compute_advantages`.
    log_values: see `value_advantages`."""

    num_mc_samples: int = 4
    actions_per_sample: int = 16
    action: str = "sample"
    advantage: str = "maxrl"
    max_choices: int = 1000
    log_values: bool = False


@dataclass(frozen=True)
class UpdateSettings:
    """What is minimised, and how.

    objective: `grpo`, clipped surrogate + label_coef * supervised_loss + kl_coef * KL(policy || reference) -
        entropy_coef * entropy; or `supervised`, supervised_loss(policy, targets, counted) under the same passes, per
        element, with the last two terms.
    clip_low, clip_high: the ratio is clipped to 1 - clip_low … 1 + clip_high. update_epochs: steps per rollout.
    max_grad_norm: of all gradients. micro_batch_size: images at a time in a replay. pad_to: see `select_live`.
    """

    objective: str = "grpo"
    supervised_loss: SupervisedLoss = nll
    clip_low: float = 0.2
    clip_high: float = 0.28
    update_epochs: int = 1
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    label_coef: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_size: int = 64
    pad_to: int = 1

    @property
    def may_replay(self) -> bool:
        """Whether an image without a live group has no gradient, so that it needs no backward pass."""
        return self.objective == "grpo" and self.kl_coef == self.entropy_coef == self.label_coef == 0


# --- Elements that count ----------------------------------------------------------------------------------------------


def only_counted(values: Tensor, counted: Tensor | None) -> Tensor:
    """`values` [B, …, E…] with 0 (never NaN) where an element does not count. counted: [B, E…] bool; None: all."""
    if counted is None:
        return values
    shape = len(counted), *[1] * (values.ndim - counted.ndim), *counted.shape[1:]
    return torch.where(counted.reshape(shape), values, 0)


def mean_counted(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of `values` [B, …, E…] over all elements that count; 0 if none does."""
    if counted is None:
        return values.mean()
    repeats = values.numel() // counted.numel()  # of each element: passes, actions
    return only_counted(values, counted).sum() / (repeats * counted.count_nonzero()).clamp(min=1)


def mean_per_image(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of `values` [B, …, E…] over each image's elements that count, [B]; 0 if none does."""
    if counted is None:
        return values.reshape(len(values), -1).mean(1)
    repeats = values.numel() // counted.numel()
    sums = only_counted(values, counted).reshape(len(values), -1).sum(1)
    return sums / (repeats * counted.flatten(1).count_nonzero(1)).clamp(min=1)


def size_of(batch: TensorMiniBatch) -> int | Tensor:
    """What a mean over the batch divides by: its images, or (a tensor) its elements that count."""
    return len(batch) if batch.counted is None else batch.counted.sum()


def share_of(episode: Episode, batch_size: int | Tensor) -> float | Tensor:
    """The episode's share of the whole batch, whose `size_of` is batch_size."""
    if episode.counted is None:
        return len(episode) / batch_size
    return episode.counted.sum().to(episode.log_probs.dtype) / batch_size.clamp(min=1)


# --- Advantages and rollout -------------------------------------------------------------------------------------------


def live_groups(advantages: Tensor) -> Tensor:
    """[B] bool: whether some advantage [B, T, A, E…] of an image's group is not 0. A dead group teaches nothing."""
    return (advantages != 0).flatten(1).any(1)


def compute_advantages(rewards: Tensor, estimator: str) -> Tensor:
    """Advantages of rewards [B, T, A, E…] relative to the group (over T and A, for each image and element by itself).

    grpo:  (r - mean) / (std + 1e-4), population std (DeepSeekMath, https://arxiv.org/abs/2402.03300)
    rloo:  (r - mean) * N / (N - 1), unbiased for the expected reward (https://arxiv.org/abs/2402.14740)
    maxrl: (r - mean) / mean, 0 where mean is 0; for 0/1 rewards the likelihood truncated at order N - 1
           (https://arxiv.org/abs/2602.02710). Needs rewards >= 0: a group with a negative one becomes NaN, which
           `update_policy` refuses on the device, without waiting for the GPU to look.

    A group whose rewards are all equal gets exactly 0: which max = min detects, since a small standard deviation
    may be rounding. Raises ValueError for an unknown estimator.
    """
    mean = rewards.mean((1, 2), keepdim=True)
    centred = rewards - mean
    if estimator == "grpo":
        advantages = centred / (rewards.std((1, 2), correction=0, keepdim=True) + 1e-4)
    elif estimator == "rloo":
        group_size = rewards.shape[1] * rewards.shape[2]
        advantages = centred * (group_size / max(group_size - 1, 1))
    elif estimator == "maxrl":
        lowest = rewards.amin((1, 2), keepdim=True)
        advantages = centred / torch.where(lowest < 0, torch.nan, torch.where(mean == 0, 1.0, mean))
    else:
        raise ValueError(f"advantage {estimator!r} is none of grpo, rloo, maxrl")
    dead = rewards.amax((1, 2), keepdim=True) == rewards.amin((1, 2), keepdim=True)
    return torch.where(dead & advantages.isfinite(), 0.0, advantages)  # the mean of equal numbers may be off by an ulp


def add(total: Tensor | None, term: Tensor) -> Tensor:
    """The sum of two rewards or advantages, [B, T, A] or [B, T, A, E…]: one per action goes to all its elements."""
    if total is None:
        return term
    dims = max(total.ndim, term.ndim)
    total, term = (x.reshape(*x.shape, *[1] * (dims - x.ndim)) for x in (total, term))
    return total + term


def score(
    rewards: Mapping[str, tuple[Reward, float]],
    actions: Tensor,
    outputs: Tensor,
    batch: TensorMiniBatch,
    shape: torch.Size,
    settings: RolloutSettings,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, Tensor]]:
    """Rewards and advantages of the actions, each [B, T, A] or [B, T, A, E…], values of choices [B, T, E…, K], and each
    reward by itself by its name. The weighted sum of the rewards goes through the estimator; advantages and values that
    are finished (`Credit`), weighted too, are added up; where there are none it is None. Elements that do not count
    have reward and advantage 0. shape: [B, T, A, E…]. log_weights: see `expected_advantages`. Raises InputError if a
    reward returns something else than tensors of one of the two shapes, or would need a group."""
    total = plain = advantages = values = None
    terms, allowed = {}, {shape[:3], shape} if log_weights is None else {shape}
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    metadata = batch.metadata if batch.counted is None else batch.metadata | {"counted": batch.counted}

    def checked(name: str, part: Tensor | None, allowed: set[torch.Size]) -> Tensor:
        if not isinstance(part, Tensor) or part.shape not in allowed:
            what = f"a tensor of shape {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            expected = "a tensor of shape [B, T, A, …] = " + " or ".join(str(list(s)) for s in sorted(allowed))
            hint = "" if log_weights is None else ", as rollout.action: all judges each choice of an element by itself"
            raise InputError(f"rollout.reward: {name} returned {what}; expected {expected}{hint}")
        part = part.to(actions.device, dtype)
        return only_counted(part, batch.counted) if part.shape == shape else part

    for name, (reward, weight) in rewards.items():
        returned = reward(actions, outputs, batch.targets, metadata)
        credit = returned if isinstance(returned, Credit) else Credit(None, returned)
        terms[name] = checked(name, credit.rewards, allowed)
        total = add(total, weight * terms[name])
        if credit is not returned:
            plain = add(plain, weight * terms[name])
        if credit.advantages is not None:
            finished = weight * checked(name, credit.advantages, allowed)
            finished = finished if log_weights is None else shape[2] * log_weights.exp() * finished
            advantages = add(advantages, finished)
        elif credit is returned and credit.values is None:
            raise InputError(f"rollout.reward: {name} returned a Credit without advantages and without values")
        if credit.values is not None:
            found = list(credit.values.shape) if isinstance(credit.values, Tensor) else type(credit.values).__name__
            if found[:-1] != [*shape[:2], *shape[3:]]:
                expected = f"[B, T, …, K] = {[*shape[:2], *shape[3:], 'K']}"
                raise InputError(f"rollout.reward: {name} returned values {found}, not {expected}")
            values = add(values, weight * credit.values.to(actions.device, dtype))
    if plain is not None and shape[1] * shape[2] == 1:
        raise InputError("rollout.actions_per_sample: a group needs two actions; raise it or rollout.num_mc_samples")
    if plain is not None and log_weights is None:
        advantages = add(advantages, compute_advantages(plain, settings.advantage))
    elif plain is not None:
        advantages = add(advantages, expected_advantages(plain, log_weights, settings.advantage))
    return total, advantages, values, terms


def choose(policy: Distribution, settings: RolloutSettings) -> tuple[Tensor, Tensor, Tensor | None]:
    """Actions drawn [B, T, A, E…], or the mode of each pass; the actions to judge, which are these, and with `action:
    all` every choice after them; and then their log-weights (see `log_weights`). Raises InputError."""
    if settings.action == "argmax":
        actions = policy.mode.unsqueeze(2)
    elif settings.action == "sample":
        actions = sample_actions(policy, settings.actions_per_sample)
    else:
        log_probs, categorical = choice_log_probs(policy)
        if (found := log_probs.shape[2]) > settings.max_choices:
            raise InputError(f"rollout.action: all: {found} choices, rollout.max_choices is {settings.max_choices}")
        choices = every_choice(policy)
        draws = 0 if categorical is None else settings.actions_per_sample
        actions = sample_actions(policy, draws) if draws else choices[:, :, :0]
        return actions, torch.cat([actions, choices], 2), log_weights(log_probs, categorical, draws)
    return actions, actions, None


def rollout(
    model,
    batch: TensorMiniBatch,
    rewards: Mapping[str, tuple[Reward, float]],
    policy_adapter: PolicyAdapter,
    settings: RolloutSettings,
    *,
    key: tuple[int, int, int] = (0, 0, 0),
    keep_graph: bool = True,
) -> Episode:
    """T stochastic passes over a micro-batch, A actions from each or every choice, their rewards and advantages.

    rewards: name -> (function, weight).
    key: (seed, step, index in the global batch of the micro-batch's first image): all draws are a function of it.
    keep_graph: the forward pass can be differentiated through `Episode.log_probs` and `Episode.policy`; without it
    `update_policy` repeats the pass for the live groups.
    """
    seed, step, index = key
    with torch.set_grad_enabled(keep_graph):
        with keyed_rng(seed, step, "masks", index):
            masks = model.sample_masks(len(batch), settings.num_mc_samples)
        outputs = model(batch.inputs, masks)  # [B, T, …]
        policy = policy_adapter(outputs)  # batch shape [B, T, E…]
        with torch.no_grad():
            drawn_from = policy_adapter(outputs.nan_to_num())  # NaN cannot be drawn from; the loss will tell of it
            with keyed_rng(seed, step, "actions", index):
                actions, judged, weighting = choose(drawn_from, settings)
            shape = judged.shape[:3] + policy.batch_shape[2:]  # [B, T, A, E…]
            total, advantages, values, terms = score(
                rewards, judged, outputs.detach(), batch, shape, settings, weighting
            )
            metadata = batch.metadata | {"targets": batch.targets, "predicted": drawn_from.mode, "reward_terms": terms}
            metadata["entropy"] = drawn_from.entropy()  # here, where the probabilities are at hand
            metadata["reward_weights"] = None if weighting is None else weighting.exp() * weighting.shape[2]
            if values is not None:
                of_each, categorical = choice_log_probs(drawn_from)
                if (given := values.shape[-1]) != (found := of_each.shape[2]):
                    raise InputError(f"rollout.reward: returned values of {given} choices; the policy has {found}")
                if weighting is None:
                    actions = actions if advantages is not None else actions[:, :, :0]  # nothing is learned from them
                    weighting = log_weights(of_each, categorical, actions.shape[2])
                of_choices = value_advantages(values, of_each, batch.counted, settings.log_values)
                advantages = join(advantages, of_choices, weighting.shape[2])
            weights = None if weighting is None else weighting.exp() * weighting.shape[2]
        log_probs = all_log_probs(policy, actions, choices=weights is not None)
    return Episode(batch.inputs, masks, actions, log_probs, total, advantages, metadata, policy, batch.counted, weights)


def rollout_metrics(episode: Episode) -> dict[str, Tensor]:
    """What a rollout is worth logging for: 0-dim tensors, means over its images, and `group_rewards`, [B]."""
    rewards, weights = episode.rewards, episode.metadata.get("reward_weights")

    def expected(values: Tensor) -> Tensor:
        """The mean over the actions, an action counting as much as it is probable, and over what counts: [B]."""
        return mean_per_image(values if weights is None else weights * values, episode.counted_in(values))

    group_rewards = expected(rewards)
    if weights is None:
        std = rewards.std((1, 2), correction=0)  # by squares in float32 a huge reward's would be infinite
    else:
        std = (weights * (rewards - (weights * rewards).mean((1, 2), keepdim=True)) ** 2).mean((1, 2)).sqrt()
    metrics = {
        "reward/mean": group_rewards.mean(),
        "reward/std": mean_per_image(std, episode.counted_in(rewards)).mean(),
        "groups/live": live_groups(episode.advantages).to(rewards.dtype).mean(),
        "policy/entropy": mean_per_image(episode.metadata["entropy"], episode.counted).mean(),
    }
    for name, term in episode.metadata["reward_terms"].items():
        metrics[f"reward/{name}"] = expected(term).mean()
    return metrics | {"reward/min": rewards.min(), "group_rewards": group_rewards}


# --- Loss and update --------------------------------------------------------------------------------------------------


def clipped_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's pessimistic surrogate with DAPO's asymmetric clip (https://arxiv.org/abs/2503.14476), per element: loss,
    ratio and whether the clip was active, each [B, T, A, E…] as the log-probabilities; advantages may be [B, T, A]."""
    advantages = advantages.reshape(*advantages.shape, *[1] * (log_probs.ndim - advantages.ndim))
    ratio = torch.exp(log_probs - old_log_probs)
    unclipped = ratio * -advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * -advantages
    active = clipped > unclipped
    return torch.where(active, clipped, unclipped), ratio, active


def select_live(episodes: list[Episode], pad_to: int) -> list[Episode]:
    """The live images of detached episodes as one episode, or none; replaying it gives the gradient of all of them.
    Its size is rounded up to a multiple of `pad_to` by repeating the last image with advantages 0, so that a compiled
    model meets few shapes. Looking which groups live is the step's one host-device sync."""
    live = torch.cat([live_groups(episode.advantages) for episode in episodes]).cpu()
    indices = [part.nonzero().flatten() for part in live.split([len(episode) for episode in episodes])]
    count = int(live.sum())  # on the host already
    if count == 0:
        return []
    episode = Episode.cat([episode[index] for episode, index in zip(episodes, indices) if len(index)])
    if count % pad_to:
        episode = episode[torch.arange(count + -count % pad_to).clamp(max=count - 1)]
        episode.advantages[count:] = 0
    return [episode]


def policy_loss(
    episode: Episode,
    policy: Distribution,
    log_probs: Tensor,
    settings: UpdateSettings,
    reference_policy: Distribution | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over an episode's images, passes, actions and counted elements, and what is worth logging. policy,
    log_probs: of the current weights, under the episode's masks; episode.log_probs are the old ones."""
    log, counted, loss = {}, episode.counted, 0
    supervised = settings.objective == "supervised"
    if supervised or settings.label_coef:
        targets = episode.metadata["targets"]  # [B, E…] -> an action of each pass, [B, T, 1, E…]
        targets = targets[:, None, None].expand(len(targets), log_probs.shape[1], 1, *targets.shape[1:])
        label_loss = mean_counted(settings.supervised_loss(policy, targets, counted), counted)
        loss = label_loss if supervised else settings.label_coef * label_loss
    if not supervised:
        clip = settings.clip_low, settings.clip_high
        losses, ratio, clipped = clipped_loss(log_probs, episode.log_probs.detach(), episode.advantages, *clip)
        loss = loss + mean_counted(losses, counted)
        log = {"policy/ratio": ratio.new_ones(()), "policy/clip_fraction": ratio.new_zeros(())}
        if log_probs is not episode.log_probs:  # else each ratio is 1
            weights = 1 if episode.weights is None else episode.weights
            log["policy/ratio"] = mean_counted(weights * ratio.detach(), counted)
            log["policy/clip_fraction"] = mean_counted(weights * clipped.to(ratio.dtype), counted)
    if settings.kl_coef:
        kl = mean_counted(kl_divergence(policy, reference_policy), counted)
        loss = loss + settings.kl_coef * kl
        log["policy/kl"] = kl.detach()
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * mean_counted(policy.entropy(), counted)
    return loss, log | {"loss": loss.detach()}


def sum_gradients(params: list[Tensor], loss: Tensor) -> Tensor:
    """Sum the gradients over all processes in one message, where there are several; returns the sum of their losses."""
    if not (dist.is_available() and dist.is_initialized()):
        return loss
    flat = torch.cat([p.grad.flatten() for p in params] + [loss.to(params[0].dtype).view(1)])
    dist.all_reduce(flat)
    for p, grad in zip(params, flat.split([p.numel() for p in params] + [1])):
        p.grad.copy_(grad.view_as(p))
    return flat[-1]


def optimizer_step(optimizer: torch.optim.Optimizer, max_grad_norm: float, loss: Tensor) -> Tensor:
    """Clip the gradients (summed over all processes), step unless loss or gradient are not finite, return the norm
    before clipping. A fused optimizer is told on the device (`found_inf`, as torch.amp does it), without a sync: after
    a bad step it changes nothing until the caller has read the norm. Another one raises FloatingPointError."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for p in params:  # a batch without a live group has zero gradients, not none
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    loss = sum_gradients(params, loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
    bad = ~(grad_norm.isfinite() & loss.isfinite())
    if optimizer.defaults.get("fused"):
        bad = bad.float()
        optimizer.found_inf = torch.maximum(getattr(optimizer, "found_inf", bad), bad)
    elif bad:
        raise FloatingPointError(f"loss {float(loss)}, gradient norm {float(grad_norm)}: the weights were not touched")
    optimizer.step()
    return grad_norm


def weighted_mean(rows: list[tuple[float | Tensor, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Mean of each name over rows of (weight, measurements)."""
    total = sum(weight for weight, _ in rows)
    if isinstance(total, Tensor):  # elements that count, of which the batch may have none
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
    return {name: sum(weight * row[name] for weight, row in rows) / total for name in (rows[0][1] if rows else ())}


def update_policy(
    model,
    optimizer: torch.optim.Optimizer,
    episodes: Iterable[Episode],
    policy_adapter: PolicyAdapter,
    settings: UpdateSettings,
    *,
    batch_size: int | Tensor,
    reference=None,
) -> dict[str, Tensor]:
    """`update_epochs` optimizer steps on one batch of experience. Returns metrics, 0-dim tensors on the device, and
    `group_rewards`, the mean reward of each group, [batch_size].

    episodes: the micro-batches' rollouts, preferably a generator: each is differentiated and let go before the next is
        made, so that memory follows the micro-batch. Those without a graph (`keep_graph=False`) are kept instead, and
        their live images replayed under the stored masks and actions. Both ways give the same gradient.
    batch_size: `size_of` the whole batch (of all processes), dead groups included: the denominator of each mean.
    reference: the frozen model of the KL term, run under the same masks.
    """
    seen, updated, stored = [], [], []  # (weight, metrics) of rollouts and of backward passes; what is to be replayed

    def backward(episode: Episode, policy: Distribution, log_probs: Tensor) -> None:
        with torch.no_grad():
            reference_policy = policy_adapter(reference(episode.inputs, episode.masks)) if settings.kl_coef else None
        loss, log = policy_loss(episode, policy, log_probs, settings, reference_policy)
        share = share_of(episode, batch_size)
        (loss * share).backward()
        updated.append((share, log))

    def replay() -> None:
        for episode in stored:
            for start in range(0, len(episode), settings.micro_batch_size):
                part = episode[start : start + settings.micro_batch_size]
                policy = policy_adapter(model(part.inputs, part.masks))
                backward(part, policy, all_log_probs(policy, part.actions, part.weights is not None))

    optimizer.zero_grad(set_to_none=False)  # kept: gradients made again between graphs would fragment the memory
    for episode in episodes:
        with torch.no_grad():
            seen.append((len(episode), rollout_metrics(episode)))
        one_pass = episode.log_probs.requires_grad
        if one_pass:
            backward(episode, episode.policy, episode.log_probs)
        if not one_pass or settings.update_epochs > 1:
            stored.append(episode.detach())
        del episode  # before the next one is made
    if stored and settings.may_replay:
        stored = select_live(stored, settings.pad_to)
    lowest, group_rewards = ([log.pop(name) for _, log in seen] for name in ("reward/min", "group_rewards"))
    zero = torch.zeros_like(lowest[0])
    for epoch in range(settings.update_epochs):
        if epoch > 0:
            optimizer.zero_grad(set_to_none=False)
        if epoch > 0 or not one_pass:
            replay()
        loss = sum((weight * log["loss"] for weight, log in updated), zero)
        grad_norm = optimizer_step(optimizer, settings.max_grad_norm, loss)

    unmeasured = {"policy/ratio": 1 + zero, "policy/clip_fraction": zero, "policy/kl": zero}
    return (unmeasured | weighted_mean(seen) | weighted_mean(updated)) | {
        "loss": loss / settings.update_epochs,
        "reward/min": torch.stack(lowest).min(),
        "grad_norm": grad_norm,
        "group_rewards": torch.cat(group_rewards),
    }
