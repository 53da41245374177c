"""Every choice of a categorical element, weighted by its probability, in the place of actions that are drawn.

B images, T passes, E… the elements of an action, K choices of an element, N actions on one axis: draws, then choices.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Distribution

from data_types import InputError

LEAST_LOG_PROB = -80.0  # of a choice in an expected value: what is rarer for float32 still counts in its logarithm


def every_choice(policy: Distribution) -> Tensor:
    """All K choices of each categorical element as actions [B, T, K, E…]."""
    return policy.enumerate_support().movedim(0, 2)


def choice_log_probs(policy: Distribution) -> tuple[Tensor, Tensor | None]:
    """log π of every choice, [B, T, K, E…], and which elements are categorical, bool [E…] (None: all). A policy that
    also has others has a method of this name, with K first. Raises InputError where there is nothing to enumerate."""
    if hasattr(policy, "choice_log_probs"):
        log_probs, categorical = policy.choice_log_probs()
    elif policy.has_enumerate_support and not policy.event_shape:
        logits, categorical = isinstance(policy, Categorical), None
        log_probs = policy.logits.movedim(-1, 0) if logits else policy.log_prob(policy.enumerate_support())
    else:
        name = type(policy).__name__
        raise InputError(f"rollout.action: all: a {name} has no choices that could be enumerated; take sample")
    log_probs = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # of an impossible choice the ratio is 1, not NaN
    return log_probs.movedim(0, 2).contiguous(), categorical  # choices last would make all that follows slower


def log_weights(log_probs: Tensor, categorical: Tensor | None, draws: int) -> Tensor:
    """Log of the weight of each action in an expectation, [B, T, draws + K, E…], after `draws` drawn ones the choices:
    an element that is categorical (see `choice_log_probs`) is averaged over its choices, another over its draws.
    log_probs: of the choices, [B, T, K, E…]."""
    drawn = log_probs[:, :, :1].expand(-1, -1, draws, *log_probs.shape[3:])
    if categorical is None:
        return torch.cat([torch.full_like(drawn, -torch.inf), log_probs], 2) if draws else log_probs
    drawn = torch.where(categorical, -torch.inf, -math.log(max(draws, 1))).to(log_probs).expand_as(drawn)
    return torch.cat([drawn, log_probs.masked_fill(~categorical, -torch.inf)], 2)


def expected_advantages(rewards: Tensor, log_weights: Tensor, estimator: str) -> Tensor:
    """`grpo.compute_advantages` for N → ∞: mean and standard deviation of the group are those of the policy itself
    (all-action policy gradient, Mean Actor Critic, https://arxiv.org/abs/1709.00503). rewards, log_weights:
    [B, T, N, E…]. Returns advantages times N times the weights, so that their plain mean is an expectation.

    maxrl's w · r / mean - w is computed in log space: of a right choice that is too rare for float32 it is still 1.
    """
    weights, passes = log_weights.exp(), rewards.shape[1]
    mean = (weights * rewards).sum(2, keepdim=True).mean(1, keepdim=True)
    centred = rewards - mean
    if estimator == "grpo":
        std = (weights * centred**2).sum(2, keepdim=True).mean(1, keepdim=True).sqrt()
        advantages = weights * centred / (std + 1e-4)
    elif estimator == "rloo":
        advantages = weights * centred
    elif estimator == "maxrl":
        earned = log_weights + rewards.log()  # NaN for a negative reward, as in `grpo.compute_advantages`
        total = earned.logsumexp((1, 2), keepdim=True)
        advantages = (earned - torch.where(total == -torch.inf, 0, total) + math.log(passes)).exp() - weights
    else:
        raise ValueError(f"advantage {estimator!r} is none of grpo, rloo, maxrl")
    dead = rewards.amax((1, 2), keepdim=True) == rewards.amin((1, 2), keepdim=True)
    return rewards.shape[2] * torch.where(dead & advantages.isfinite(), 0.0, advantages)


def value_advantages(
    values: Tensor, log_probs: Tensor, counted: Tensor | None = None, log_values: bool = False
) -> Tensor:
    """Of the values of each element's choices (`Credit`), [B, T, E…, K]: π(k) · (value_k - Σ_j π(j) value_j), in the
    layout of the choices' log_probs, [B, T, K, E…]. Exactly 0 where all values are equal, and where an element does
    not count. counted: [B, E…] bool; None: all.

    log_values: what is climbed is not the mean value μ above the lowest choice's, but Δ · log μ, Δ the highest value
    above the lowest one (both means over the passes): maxrl's advantages times Δ. By log x <= x - 1 this climbs a lower
    bound, Δ · (1 + log(μ / Δ)) <= μ, equal where the best choice is certain. A choice that is rare is learned as soon
    as one that is not. If one choice alone is worth anything, this is its cross-entropy times its value.
    """
    values = values.movedim(-1, 2).contiguous()
    above = values - values.amin(2, keepdim=True)
    highest = above.amax(2, keepdim=True)
    live = highest != 0 if counted is None else (highest != 0) & counted[:, None, None]  # NaN is not hidden
    probs = log_probs.clamp(min=LEAST_LOG_PROB).exp()
    mean = (probs * above).sum(2, keepdim=True)
    if log_values:
        highest = highest.mean(1, keepdim=True)
        advantages = probs * (above * (highest / mean.mean(1, keepdim=True)) - highest)
    else:
        advantages = probs * (above - mean)
    return torch.where(live, advantages, 0.0)


def join(advantages: Tensor | None, of_choices: Tensor, num_actions: int) -> Tensor:
    """Advantages of drawn actions, [B, T, A] or [B, T, A, E…] (or of N actions, which have their weights), and those of
    choices, [B, T, K, E…], over one axis of num_actions, N, choices last: their plain mean over it is the mean over the
    draws plus the sum over the choices."""
    if advantages is None and num_actions == of_choices.shape[2]:
        return num_actions * of_choices
    elements = [0, 0] * (of_choices.ndim - 3)
    total = F.pad(num_actions * of_choices, [*elements, num_actions - of_choices.shape[2], 0])
    if advantages is None:
        return total
    draws = advantages.shape[2]
    advantages = advantages.reshape(*advantages.shape, *[1] * (total.ndim - advantages.ndim))
    advantages = advantages.expand(*advantages.shape[:3], *total.shape[3:]) * (num_actions / draws)
    return total + F.pad(advantages, [*elements, 0, num_actions - draws])
