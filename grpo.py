"""Group Relative Policy Optimisation on Monte Carlo Dropout passes: rollout, advantages, loss, update.

Knows no task and no ViT: a model is anything with `sample_masks(B, T)` and `model(inputs, masks)`, a policy adapter
turns its outputs into a `torch.distributions.Distribution` of batch shape [B, T, E…], a reward judges actions.

B images, T passes, A actions per pass, E… the elements of an action; N = T * A actions are the group of one image.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributions import Categorical, Distribution, kl_divergence

from data_types import Credit, Episode, InputError, TensorMiniBatch

# reward(actions [B, T, A, E…], outputs [B, T, …], targets [B, E…], metadata) -> [B, T, A] or [B, T, A, E…]
Reward = Callable[[Tensor, Tensor, Tensor, dict], Tensor | Credit]
PolicyAdapter = Callable[[Tensor], Distribution]
SupervisedLoss = Callable[[Distribution, Tensor], Tensor]  # (policy, targets [B, T, 1, E…]) -> [B, T, 1, E…]


@contextmanager
def keyed_rng(*key: int | str) -> Iterator[None]:
    """All draws inside are a function of `key` alone; torch's own random state is as before afterwards.

    torch.distributions takes no generator, so the global one is forked and seeded. No state is carried from step to
    step, so there is none to save and restore.
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace for each absent backend
        for backend in (torch.cuda, torch.mps):
            if backend.is_available():
                backend.manual_seed(seed)
        yield


# --- Policy: torch puts samples first, [A, B, T, E…]; these two functions alone touch that layout -------------------


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


def nll(policy: Distribution, targets: Tensor) -> Tensor:
    """-log π(targets) of targets [B, T, 1, E…], in the same layout: what learning from labels minimises."""
    return -action_log_prob(policy, targets)


# --- Elements that count --------------------------------------------------------------------------------------------


def only_counted(values: Tensor, counted: Tensor | None) -> Tensor:
    """`values` [B, …, E…] with 0 (never NaN) where an element does not count. counted: [B, E…] bool; None: all."""
    if counted is None:
        return values
    return torch.where(
        counted.reshape(len(counted), *[1] * (values.ndim - counted.ndim), *counted.shape[1:]), values, 0
    )


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
    return only_counted(values, counted).reshape(len(values), -1).sum(1) / (
        repeats * counted.flatten(1).count_nonzero(1)
    ).clamp(min=1)


# --- Advantages -----------------------------------------------------------------------------------------------------


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

    A group whose rewards are all equal gets exactly 0: that is told by max = min, since a small standard deviation
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


# --- Rollout --------------------------------------------------------------------------------------------------------


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
    estimator: str,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rewards and advantages of the actions, each [B, T, A] or [B, T, A, E…], and each reward by itself by its name.

    shape: [B, T, A, E…]. The weighted sum of the rewards goes through the estimator; advantages that are finished
    (`Credit`), weighted too, are added. Elements that do not count have reward and advantage 0.
    Raises InputError if a reward returns something else than tensors of one of the two shapes, or would need a group.
    """
    total = plain = finished = None
    terms, allowed = {}, {shape[:3], shape}
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    metadata = batch.metadata if batch.counted is None else batch.metadata | {"counted": batch.counted}
    for name, (reward, weight) in rewards.items():
        returned = reward(actions, outputs, batch.targets, metadata)
        parts = (returned.rewards, returned.advantages) if isinstance(returned, Credit) else (returned,)
        for part in parts:
            if not isinstance(part, Tensor) or part.shape not in allowed:
                what = f"a tensor of shape {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                expected = " or ".join(str(list(shape)) for shape in sorted(allowed))
                raise InputError(
                    f"rollout.reward: {name} returned {what}; expected a tensor of shape [B, T, A, …] = {expected}"
                )
        parts = [part.to(actions.device, dtype) for part in parts]
        parts = [only_counted(part, batch.counted) if part.shape == shape else part for part in parts]
        terms[name] = parts[0]
        total = add(total, weight * parts[0])
        if len(parts) == 2:
            finished = add(finished, weight * parts[1])
        elif shape[1] * shape[2] > 1:
            plain = add(plain, weight * parts[0])
        else:
            raise InputError(
                "rollout.actions_per_sample: a group needs two actions; raise it or rollout.num_mc_samples"
            )
    advantages = finished if plain is None else compute_advantages(plain, estimator)
    if plain is not None and finished is not None:
        advantages = add(advantages, finished)
    return total, advantages, terms


def rollout(
    model,
    batch: TensorMiniBatch,
    rewards: Mapping[str, tuple[Reward, float]],
    policy_adapter: PolicyAdapter,
    *,
    num_mc_samples: int,
    actions_per_sample: int,
    action: str = "sample",
    advantage: str = "maxrl",
    key: tuple[int, int, int] = (0, 0, 0),
    keep_graph: bool = True,
) -> Episode:
    """T stochastic passes over a micro-batch, A actions from each, their rewards and advantages.

    rewards: name -> (function, weight). action: `sample`, or `argmax` (the mode of each pass, A = 1).
    key: (seed, step, index in the global batch of the micro-batch's first image): all draws are a function of it.
    keep_graph: the forward pass can be differentiated through `Episode.log_probs` and `Episode.policy`; without it
    `update_policy` repeats the pass for the live groups.
    """
    seed, step, index = key
    with torch.set_grad_enabled(keep_graph):
        with keyed_rng(seed, step, "masks", index):
            masks = model.sample_masks(len(batch), num_mc_samples)
        outputs = model(batch.inputs, masks)  # [B, T, …]
        policy = policy_adapter(outputs)  # batch shape [B, T, E…]
        with torch.no_grad():
            drawn_from = policy_adapter(outputs.nan_to_num())  # NaN cannot be drawn from; the loss will tell of it
            if action == "sample":
                with keyed_rng(seed, step, "actions", index):
                    actions = sample_actions(drawn_from, actions_per_sample)  # [B, T, A, E…]
            else:
                actions = drawn_from.mode.unsqueeze(2)  # [B, T, 1, E…]
            shape = actions.shape[:3] + policy.batch_shape[2:]  # [B, T, A, E…]
            total, advantages, terms = score(rewards, actions, outputs.detach(), batch, shape, advantage)
            entropy = drawn_from.entropy()  # here, where the probabilities are at hand
        log_probs = action_log_prob(policy, actions)
    metadata = batch.metadata | {"targets": batch.targets, "predicted": drawn_from.mode, "reward_terms": terms}
    metadata["entropy"] = entropy
    return Episode(batch.inputs, masks, actions, log_probs, total, advantages, metadata, policy, batch.counted)


# --- Loss and update ------------------------------------------------------------------------------------------------


def clipped_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's pessimistic surrogate with DAPO's asymmetric clip (https://arxiv.org/abs/2503.14476), per element.

    log_probs, old_log_probs: [B, T, A, E…]; advantages the same or [B, T, A].
    Returns loss, ratio and whether the clip was active, each [B, T, A, E…].
    """
    advantages = advantages.reshape(*advantages.shape, *[1] * (log_probs.ndim - advantages.ndim))
    ratio = torch.exp(log_probs - old_log_probs)
    unclipped = ratio * -advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * -advantages
    active = clipped > unclipped
    return torch.where(active, clipped, unclipped), ratio, active


def select_live(episodes: list[Episode], pad_to: int) -> Episode | None:
    """The live images of detached episodes as one episode; replaying it gives the gradient of all of them.

    Its size is rounded up to a multiple of `pad_to` by repeating the last image with advantages 0, so that a compiled
    model meets few shapes. None if no group is live. Looking which groups live is the step's one host-device sync.
    """
    live = torch.cat([live_groups(episode.advantages) for episode in episodes]).cpu()
    indices = [part.nonzero().flatten() for part in live.split([len(episode) for episode in episodes])]
    count = int(live.sum())  # on the host already
    if count == 0:
        return None
    episode = Episode.cat([episode[index] for episode, index in zip(episodes, indices) if len(index)])
    if count % pad_to:
        episode = episode[torch.arange(count + -count % pad_to).clamp(max=count - 1)]
        episode.advantages[count:] = 0
    return episode


def policy_loss(
    episode: Episode,
    policy: Distribution,
    log_probs: Tensor,
    *,
    objective: str,
    supervised_loss: SupervisedLoss,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    entropy_coef: float,
    reference_policy: Distribution | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over an episode's images, passes, actions and counted elements, and what is worth logging.

    policy, log_probs: of the current weights, under the episode's masks; episode.log_probs are the old ones.
    """
    log, counted = {}, episode.counted
    if objective == "supervised":
        targets = episode.metadata["targets"]  # [B, E…] -> an action of each pass, [B, T, 1, E…]
        targets = targets[:, None, None].expand(len(targets), log_probs.shape[1], 1, *targets.shape[1:])
        loss = mean_counted(supervised_loss(policy, targets), counted)
    else:
        old_log_probs = episode.log_probs.detach()
        losses, ratio, clipped = clipped_loss(log_probs, old_log_probs, episode.advantages, clip_low, clip_high)
        loss = mean_counted(losses, counted)
        log = {
            "policy/ratio": mean_counted(ratio.detach(), counted),
            "policy/clip_fraction": mean_counted(clipped.to(ratio.dtype), counted),
        }
    if kl_coef:
        kl = mean_counted(kl_divergence(policy, reference_policy), counted)
        loss = loss + kl_coef * kl
        log["policy/kl"] = kl.detach()
    if entropy_coef:
        loss = loss - entropy_coef * mean_counted(policy.entropy(), counted)
    return loss, log | {"loss": loss.detach()}


def sum_over_processes(params: list[Tensor], loss: Tensor) -> Tensor:
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
    before clipping.

    A fused optimizer is told on the device (`found_inf`, as torch.amp does it), at no sync: once bad it stays where it
    is until the caller has read the norm. With another one it is looked at here and raises FloatingPointError.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for p in params:  # a batch without a live group has zero gradients, not none
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    loss = sum_over_processes(params, loss)
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
    return {name: sum(weight * row[name] for weight, row in rows) / total for name in (rows[0][1] if rows else ())}


def update_policy(
    model,
    optimizer: torch.optim.Optimizer,
    episodes: Iterable[Episode],
    *,
    batch_size: int,
    micro_batch_size: int,
    policy_adapter: PolicyAdapter,
    num_counted: Tensor | None = None,
    objective: str = "grpo",
    supervised_loss: SupervisedLoss = nll,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    update_epochs: int = 1,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    reference=None,
    max_grad_norm: float = 1.0,
    pad_to: int = 1,
) -> dict[str, Tensor]:
    """`update_epochs` optimizer steps on one batch of experience. Returns metrics, 0-dim tensors on the device, and
    `group_rewards`, the mean reward of each group, [batch_size].

    episodes: the micro-batches' rollouts, best a generator: each is differentiated and let go before the next is made,
        so that memory follows the micro-batch. Rollouts without a graph (`keep_graph=False`) are kept instead, and
        their live images replayed under the stored masks and actions. Both ways give the same gradient.
    batch_size: images in the whole batch (of all processes), dead groups included: the denominator, known before the
        first backward. num_counted: where episodes have `counted`, the elements that count in the whole batch instead.
    micro_batch_size: images at a time in a replay. pad_to: see `select_live`.
    objective: `grpo`, clipped surrogate + kl_coef * KL(policy || reference) - entropy_coef * entropy; or `supervised`,
        supervised_loss(policy, targets) under the same passes, per element. reference: the frozen model of the KL term,
        run under the same masks.
    max_grad_norm: gradients are clipped to this norm over all parameters.
    """
    seen, updated, lowest, group_rewards = [], [], [], []  # (share, measurements) of rollouts and of backward passes

    def share(episode: Episode) -> float | Tensor:  # of the batch's elements that count
        if episode.counted is None:
            return len(episode) / batch_size
        return episode.counted.sum().to(episode.log_probs.dtype) / num_counted.clamp(min=1)

    def backward(episode: Episode, policy: Distribution, log_probs: Tensor) -> None:
        reference_policy = None
        if kl_coef:
            with torch.no_grad():
                reference_policy = policy_adapter(reference(episode.inputs, episode.masks))
        loss, log = policy_loss(
            episode,
            policy,
            log_probs,
            objective=objective,
            supervised_loss=supervised_loss,
            clip_low=clip_low,
            clip_high=clip_high,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
            reference_policy=reference_policy,
        )
        (loss * share(episode)).backward()
        updated.append((share(episode), log))

    def replay(episodes: list[Episode]) -> None:
        for episode in episodes:
            for start in range(0, len(episode), micro_batch_size):
                part = episode[start : start + micro_batch_size]
                policy = policy_adapter(model(part.inputs, part.masks))
                backward(part, policy, action_log_prob(policy, part.actions))

    def step() -> Tensor:
        loss = sum((weight * log["loss"] for weight, log in updated), torch.zeros_like(lowest[0]))
        return optimizer_step(optimizer, max_grad_norm, loss)

    optimizer.zero_grad(set_to_none=False)  # made anew amid a graph, gradients would leave holes in the memory
    stored = []
    for episode in episodes:
        with torch.no_grad():
            rewards, shape = episode.rewards, episode.log_probs.shape
            counted = episode.counted if rewards.shape == shape else None
            group_rewards.append(mean_per_image(rewards, counted))
            log = {
                "reward/mean": group_rewards[-1].mean(),
                "reward/std": mean_per_image(rewards.std((1, 2), correction=0), counted).mean(),
                "groups/live": live_groups(episode.advantages).to(rewards.dtype).mean(),
                "policy/entropy": mean_per_image(episode.metadata["entropy"], episode.counted).mean(),
            }
            for name, term in episode.metadata["reward_terms"].items():
                log[f"reward/{name}"] = mean_per_image(term, episode.counted if term.shape == shape else None).mean()
            seen.append((len(episode), log))
            lowest.append(rewards.min())
        one_pass = episode.log_probs.requires_grad
        if one_pass:
            backward(episode, episode.policy, episode.log_probs)
        if not one_pass or update_epochs > 1:
            stored.append(episode.detach())
        del episode  # before the next one is made
    if stored and objective == "grpo" and kl_coef == 0 and entropy_coef == 0:
        live = select_live(stored, pad_to)
        stored = [live] if live is not None else []
    if not one_pass:
        replay(stored)
    grad_norm = step()
    for _ in range(1, update_epochs):
        optimizer.zero_grad(set_to_none=False)
        replay(stored)
        grad_norm = step()

    metrics = weighted_mean(seen) | weighted_mean(updated)
    zero = torch.zeros_like(grad_norm)
    metrics["loss"] = sum((weight * log["loss"] for weight, log in updated), zero) / update_epochs
    return metrics | {
        "policy/ratio": metrics.get("policy/ratio", zero + 1),
        "policy/clip_fraction": metrics.get("policy/clip_fraction", zero),
        "policy/kl": metrics.get("policy/kl", zero),
        "reward/min": torch.stack(lowest).min(),
        "grad_norm": grad_norm,
        "group_rewards": torch.cat(group_rewards),
    }
