"""GRPO against closed forms, exact gradients by enumeration or autograd, and slow loops."""

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import message
from hypothesis import example, given, settings
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.utils._python_dispatch import TorchDispatchMode

import choices
import grpo
from data_types import Credit, Episode, TensorMiniBatch
from grpo import action_log_prob, classification_policy_adapter, compute_advantages, keyed_rng
from vit_model import VisionTransformer

ESTIMATORS = ("grpo", "rloo", "maxrl")
KINDS = ("class", "elements", "counted")  # an action: a class; three elements; three of which COUNTED count
COUNTED = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)


# --- Small things to experiment on ------------------------------------------------------------------------------------


def make_model(dtype: torch.dtype = torch.float64, num_classes: int = 3, **options) -> VisionTransformer:
    """A tiny ViT, all of whose parameters are random and large enough to matter."""
    sizes = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "dropout": 0.3}
    with keyed_rng("weights"), torch.no_grad():
        model = VisionTransformer(**(sizes | options), num_classes=num_classes)
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model.to(dtype)


def make_batch(B: int, dtype: torch.dtype = torch.float64) -> TensorMiniBatch:
    with keyed_rng("images"):
        metadata = {"paths": [f"{i}.png" for i in range(B)], "indices": torch.arange(B)}
        return TensorMiniBatch(torch.randn(B, 3, 8, 8, dtype=dtype), torch.arange(B) % 3, metadata)


def model_and_batch(kind: str) -> tuple[VisionTransformer, TensorMiniBatch]:
    """Of four images."""
    if kind == "class":
        return make_model(), make_batch(4)
    counted = COUNTED if kind == "counted" else None
    return make_model(num_classes=6), replace(make_batch(4), targets=torch.arange(12).view(4, 3) % 2, counted=counted)


def elements_adapter(outputs) -> Categorical:
    """Six logits -> three elements of two classes each."""
    return Categorical(logits=outputs.unflatten(-1, (3, 2)))


def adapter_of(targets: torch.Tensor):
    return classification_policy_adapter if targets.ndim == 1 else elements_adapter


def correct(actions, outputs, targets, metadata):
    """Right or wrong, per element; NaN where one does not count, which must not be looked at."""
    reward = (actions == targets[:, None, None]).double()
    return torch.where(metadata["counted"][:, None, None], reward, torch.nan) if "counted" in metadata else reward


def any_score(actions, outputs, targets, metadata):
    """One score per action."""
    return (actions * torch.tensor([4, 2, 1])).sum(-1).double()


def graded(actions, outputs, targets, metadata):
    """Every action of a group earns something else, so that no group is dead."""
    return torch.arange(actions[0].numel()).view(actions.shape[1:]).expand(actions.shape).float()


def constant(actions, outputs, targets, metadata):
    return torch.full(actions.shape, 0.1)


def credit(actions, outputs, targets, metadata):
    """Finished advantages per element; the score behind them is one per action."""
    advantages = torch.linspace(-1, 2, actions.numel(), dtype=torch.float64).view(actions.shape)
    return Credit(advantages, advantages.mean(-1))


def roll(model, batch, rewards=correct, T=2, A=2, action="sample", advantage="maxrl", **options) -> Episode:
    rewards = rewards if isinstance(rewards, dict) else {"r": (rewards, 1.0)}
    how = grpo.RolloutSettings(T, A, action, advantage, log_values=options.pop("log_values", False))
    return grpo.rollout(model, batch, rewards, adapter_of(batch.targets), how, **options)


def update(model, episodes, lr=0.0, optimizer=None, reference=None, **options):
    """All gradients as one vector, and the metrics; the weights stay unless there is a learning rate."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    episodes = list(episodes)
    how = grpo.UpdateSettings(**{"max_grad_norm": 1e9} | options)
    size, adapter = sum(map(grpo.size_of, episodes)), adapter_of(episodes[0].metadata["targets"])
    metrics = grpo.update_policy(model, optimizer, episodes, adapter, how, batch_size=size, reference=reference)
    assert all(p.grad is not None for p in model.parameters())
    return flat([p.grad for p in model.parameters()]), metrics


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).clone()


def gradient_of(model, loss) -> torch.Tensor:
    return flat(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


# --- Advantages -------------------------------------------------------------------------------------------------------


def slow_advantages(group: list[float], estimator: str) -> list[float]:
    """The formulas of the design, in plain Python, for one group."""
    n = len(group)
    mean = math.fsum(group) / n
    if estimator == "maxrl" and min(group) < 0:
        return [math.nan] * n
    if min(group) == max(group):
        return [0.0] * n
    if estimator == "grpo":
        return [(r - mean) / (math.sqrt(math.fsum((x - mean) ** 2 for x in group) / n) + 1e-4) for r in group]
    if estimator == "rloo":  # against the mean of the others
        return [r - (math.fsum(group) - r) / (n - 1) for r in group]
    return [(r - mean) / mean for r in group]


@st.composite
def reward_tensors(draw, low: float = -4.0):
    """float64 rewards [B, T, A, E…]; often 0/1, often equal, of any size from one action up."""
    element = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4)), *element)
    values = [st.sampled_from([0.0, 1.0]), st.sampled_from([0.1, 0.3]), st.floats(low, 4.0, width=32)]
    size = math.prod(shape)
    drawn = draw(st.lists(draw(st.sampled_from(values)), min_size=size, max_size=size))
    return torch.tensor(drawn, dtype=torch.float64).view(shape)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(rewards=st.one_of(reward_tensors(), reward_tensors(low=0.0)))
@example(rewards=torch.full((2, 3, 1), 0.1, dtype=torch.float64))
@example(rewards=torch.tensor([[[-1.0]], [[0.5]]], dtype=torch.float64))
def test_advantages_follow_their_formula(estimator, rewards):
    """Each group (one image, one element; over passes and actions) by its formula, dead ones exactly 0, a group with a
    negative reward NaN under maxrl, whatever the other groups hold."""
    advantages = compute_advantages(rewards, estimator)
    assert advantages.shape == rewards.shape
    B, T, A = rewards.shape[:3]
    groups, results = (x.reshape(B, T * A, -1).transpose(1, 2).flatten(0, 1) for x in (rewards, advantages))
    for group, result in zip(groups, results):
        expected = slow_advantages(group.tolist(), estimator)
        if not any(expected):
            assert result.tolist() == expected, "a dead group must be exactly 0"
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (1, 1), (3, 11)])
def test_dead_groups_are_exactly_zero(estimator, shape):
    """Equal float32 rewards whose mean is off by rounding still give 0, and the group counts as dead; a live one next
    to it counts as live."""
    for value in (0.0, 0.1, 1 / 3, 1e-30, 7.3e20):
        rewards = torch.full((2, *shape), value)
        assert (compute_advantages(rewards, estimator) == 0).all()
        rewards[1, 0, 0] = 2.0 + 2 * value
        assert grpo.live_groups(compute_advantages(rewards, estimator)).tolist() == [False, shape != (1, 1)]


def test_live_groups_with_elements():
    """One element that differs makes its image live, and only its own element's group gets advantages."""
    rewards = torch.full((3, 2, 2, 4), 0.1)
    rewards[1, 0, 1, 2] = 1.0
    advantages = compute_advantages(rewards, "rloo")
    assert grpo.live_groups(advantages).tolist() == [False, True, False]
    assert (advantages != 0).sum((0, 1, 2)).tolist() == [0, 0, 4, 0]


def test_unknown_estimator():
    with pytest.raises(ValueError, match="gae"):
        compute_advantages(torch.rand(1, 2, 2), "gae")


def enumerate_gradient(logits, rewards, A: int, estimator: str) -> torch.Tensor:
    """Exact expectation of the gradient step (minus the loss's gradient) over ALL A actions of T passes.

    logits: [T, K]; rewards: [T, K], what an action earns in a pass. Every combination is one image of a big batch, its
    loss weighted by its probability.
    """
    T, K = logits.shape
    actions = torch.tensor(list(itertools.product(range(K), repeat=T * A))).view(-1, T, A)
    policy = Categorical(logits=logits.expand(len(actions), T, K))
    log_probs = action_log_prob(policy, actions)
    earned = rewards.expand(len(actions), T, K).gather(2, actions)
    advantages = compute_advantages(earned, estimator)
    losses = grpo.clipped_loss(log_probs, log_probs.detach(), advantages, 0.2, 0.28)[0]
    probability = log_probs.detach().sum((1, 2)).exp()
    assert_close(probability.sum(), 1.0)
    return -torch.autograd.grad((probability * losses.mean((1, 2))).sum(), logits)[0]


@pytest.mark.parametrize("T, A, K", [(2, 2, 3), (3, 2, 2), (1, 3, 4), (4, 1, 3)])
def test_rloo_climbs_the_expected_reward_exactly(T, A, K):
    """Unbiased across passes: the expected step is the gradient of the mean over passes of the expected reward."""
    torch.manual_seed(T)
    logits = torch.randn(T, K, dtype=torch.float64, requires_grad=True)
    rewards = 3 * torch.randn(T, K, dtype=torch.float64)
    exact = torch.autograd.grad((logits.softmax(-1) * rewards).sum(-1).mean(), logits)[0]
    assert exact.abs().max() > 0.05
    assert_close(enumerate_gradient(logits, rewards, A, "rloo"), exact, 1e-12)


@pytest.mark.parametrize("N", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("K, shift", [(2, -1.5), (3, 0.0), (2, 2.0)])
def test_maxrl_climbs_the_truncated_likelihood_exactly(N, K, shift):
    """For T = 1 and 0/1 rewards the expected step is the gradient of log p's series in 1 - p, cut after order N - 1:
    J = -sum over k = 1 … N - 1 of (1 - p)^k / k. So it is short of the likelihood's by the factor 1 - (1 - p)^(N-1)."""
    torch.manual_seed(N)
    logits = torch.randn(1, K, dtype=torch.float64)
    logits = (logits + shift * F.one_hot(torch.tensor(0), K)).requires_grad_()
    success = F.one_hot(torch.tensor([0]), K).double()
    step = enumerate_gradient(logits, success, N, "maxrl")

    p = logits.softmax(-1)[0, 0]
    J = sum((-((1 - p) ** k) / k for k in range(1, N)), 0 * p)
    likelihood = torch.autograd.grad(p.log(), logits, retain_graph=True)[0]
    assert_close(step, torch.autograd.grad(J, logits)[0], 1e-12)
    assert_close(step, likelihood * (1 - (1 - p.detach()) ** (N - 1)), 1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_each_estimator_climbs_with_many_actions(estimator):
    """With p the mean over passes of the chance of success: grpo 2·arcsin√p, rloo p, maxrl log p."""
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.0, 0.5, -1.0], [-2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]])
    logits = logits.double().requires_grad_()
    policy = Categorical(logits=logits[None])
    actions = grpo.sample_actions(policy, 100_000)
    advantages = compute_advantages((actions == 0).double(), estimator)
    step = torch.autograd.grad((action_log_prob(policy, actions) * advantages).mean(), logits)[0]

    p = logits.softmax(-1)[:, 0].mean()
    objective = {"grpo": 2 * p.sqrt().arcsin(), "rloo": p, "maxrl": p.log()}[estimator]
    exact = torch.autograd.grad(objective, logits)[0]
    assert (step - exact).norm() < 0.02 * exact.norm()


# --- Layout, randomness, rollout --------------------------------------------------------------------------------------


def test_keyed_rng_is_a_function_of_its_key_and_leaves_no_trace():
    """Same key same draws, whatever was drawn before, and other keys others, also if they run together as text; torch's
    state is as it was, after an exception too."""

    def draw(*key):
        with keyed_rng(*key):
            return torch.rand(4).tolist() + [int(torch.randint(10**9, ()))]

    first = draw(1, 2, "masks", 3)
    torch.rand(3)
    state = torch.get_rng_state()
    assert draw(1, 2, "masks", 3) == first
    with pytest.raises(KeyError), keyed_rng(1):
        torch.rand(2)
        raise KeyError
    assert torch.get_rng_state().equal(state)
    keys = [*itertools.product(range(12), range(12), "ab"), (1, 23, "a"), (12, 3, "a"), (123, 0, "a"), (0, 123, "a")]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_rollout_is_a_function_of_its_key():
    """Same key, same masks and actions, with graph or without and whatever was drawn before; seed, step and index each
    change both; more actions leave the masks alone."""
    model, batch = make_model(), make_batch(4)
    first = roll(model, batch, T=3, A=5, key=(1, 2, 3))
    torch.rand(7)
    for again in (roll(model, batch, T=3, A=5, key=(1, 2, 3), keep_graph=graph) for graph in (True, False)):
        assert all(first.masks[name].equal(again.masks[name]) for name in first.masks)
        assert first.actions.equal(again.actions) and first.log_probs.equal(again.log_probs)
    others = [(0, 2, 3), (1, 0, 3), (1, 2, 0)]
    for key in others:
        other = roll(model, batch, T=3, A=5, key=key)
        assert not any(first.masks[name].equal(other.masks[name]) for name in first.masks)
    same = make_model(dropout=0.0)  # one policy whatever the masks, so that only the actions' own draw can differ
    drawn = [roll(same, batch, T=3, A=5, key=key).actions for key in ((1, 2, 3), *others)]
    assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == 4
    more = roll(model, batch, T=3, A=6, key=(1, 2, 3))
    assert all(first.masks[name].equal(more.masks[name]) for name in first.masks)


@pytest.mark.parametrize("action", ["sample", "argmax"])
def test_rollout_hands_over_what_the_update_needs(action):
    """Actions (with argmax one of each pass, the most probable one, however many are configured), prediction, targets
    and metadata of an episode, and which of its tensors have a graph."""
    model, batch = make_model(), make_batch(6)
    episode = roll(model, batch, T=3, A=5, action=action)
    logits = model(batch.inputs, episode.masks)
    assert episode.actions.shape == episode.rewards.shape == (6, 3, 5 if action == "sample" else 1)
    assert episode.actions.equal(logits.argmax(-1).unsqueeze(2)) == (action == "argmax")
    assert_close(episode.log_probs, logits.log_softmax(-1).gather(2, episode.actions), 1e-12)
    assert episode.metadata["predicted"].equal(logits.argmax(-1))
    assert episode.metadata["targets"].equal(batch.targets) and episode.metadata["paths"] == batch.metadata["paths"]
    graphs = {name for name, value in vars(episode).items() if isinstance(value, torch.Tensor) and value.requires_grad}
    assert graphs == {"log_probs"}
    assert not roll(model, batch, keep_graph=False).log_probs.requires_grad


def test_sampled_actions_follow_their_own_pass():
    """The frequencies of many actions are the probabilities of that image, that pass and that element."""
    with keyed_rng("frequencies"):
        logits = 2 * torch.randn(2, 3, 2, 4)
        actions = grpo.sample_actions(Categorical(logits=logits), 20_000)
    assert actions.shape == (2, 3, 20_000, 2)
    assert_close(F.one_hot(actions, 4).double().mean(2), logits.double().softmax(-1), 0.02)


@pytest.mark.parametrize("kind", ["elements", "counted"])
@pytest.mark.parametrize("rewarded", ["action", "element", "both"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_elements_against_slow_loops(estimator, rewarded, kind):
    """log_probs, advantages from rewards per action, per element, or one of each, and the gradient of
    -Σ advantage · log π over the elements that count ÷ their number, T and A. Nothing leaks from the others."""
    model, batch = model_and_batch(kind)
    rewards = {"action": (any_score, 0.5), "element": (correct, 2.0)}
    rewards = rewards if rewarded == "both" else {rewarded: rewards[rewarded]}
    episode = roll(model, batch, rewards, A=4, advantage=estimator)
    assert episode.actions.shape == episode.log_probs.shape == (4, 2, 4, 3)
    assert episode.rewards.shape == episode.advantages.shape == ((4, 2, 4) if rewarded == "action" else (4, 2, 4, 3))
    log_softmax = model(batch.inputs, episode.masks).view(4, 2, 3, 2).log_softmax(-1)
    counted = COUNTED if kind == "counted" else torch.ones(4, 3, dtype=torch.bool)
    loss = 0.0
    for b, e in counted.nonzero().tolist():
        earned, log_probs = [], []
        for t, a in itertools.product(range(2), range(4)):
            action = episode.actions[b, t, a].tolist()
            log_probs.append(log_softmax[b, t, e, action[e]])
            assert_close(episode.log_probs[b, t, a, e], log_probs[-1].item(), 1e-12)
            right = 2.0 * (action[e] == batch.targets[b, e].item())
            terms = {"action": 0.5 * (4 * action[0] + 2 * action[1] + action[2]), "element": right}
            earned.append(sum(terms[name] for name in rewards))
        advantages = torch.tensor(slow_advantages(earned, estimator), dtype=torch.float64)
        found = episode.advantages[b] if rewarded == "action" else episode.advantages[b, ..., e]
        assert_close(found.flatten(), advantages)
        loss = loss - (advantages * torch.stack(log_probs)).mean() / counted.sum()
    exact = gradient_of(model, loss)
    assert exact.norm() > 0.01
    assert_close(update(model, [episode])[0], exact)


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_weighted_summed_and_reported(kind):
    """rewards = Σ weight · term. The metrics are means over the images of the means over what counts, each term before
    its weight."""
    model, batch = model_and_batch(kind)
    rewards = {"right": (correct, 0.75), "graded": (graded, -2.0), "ints": (lambda actions, *_: actions, 3)}
    episode = roll(model, batch, rewards, A=3, advantage="rloo")
    counted = COUNTED if kind == "counted" else torch.ones_like(batch.targets, dtype=torch.bool)

    def by_image(values):  # [B, E…] -> [B]
        return torch.stack([v[c].mean() if c.any() else 0 * v.sum() for v, c in zip(values, counted)])

    right = (episode.actions == batch.targets[:, None, None]).double()
    terms = {"right": right, "graded": graded(episode.actions, None, None, None), "ints": episode.actions}
    total = 0.75 * right - 2 * terms["graded"] + 3 * terms["ints"]
    metrics, rewards = update(model, [episode])[1], total * counted[:, None, None]
    assert_close(episode.rewards, rewards, 1e-12)
    assert_close(metrics["reward/min"], rewards.min(), 0)
    assert_close(metrics["group_rewards"], by_image(total.mean((1, 2))), 1e-12)
    expected = {f"reward/{name}": term.double().mean((1, 2)) for name, term in terms.items()}
    expected |= {"reward/mean": total.mean((1, 2)), "reward/std": total.std((1, 2), correction=0)}
    policy = adapter_of(batch.targets)(model(batch.inputs, episode.masks).detach())
    expected["policy/entropy"] = policy.entropy().mean(1)
    for name, values in expected.items():
        assert_close(metrics[name], by_image(values).mean(), 1e-12)


@pytest.mark.parametrize(
    "returned, named",
    [
        (lambda actions: actions[:, 0].float(), "[4, 3]"),
        (lambda actions: actions.float().unsqueeze(-1), "[4, 2, 3, 1]"),
        (lambda actions: actions.float().mean(), "[]"),
        (lambda actions: actions.tolist(), "list"),
        (lambda actions: Credit(torch.zeros(4, 2), torch.zeros(4, 2, 3)), "[4, 2]"),
        (lambda actions: Credit(torch.zeros(4, 2, 3), None), "NoneType"),
        (lambda actions: Credit(None, torch.zeros(4, 2, 3), [1, 2]), "values list"),
    ],
)
def test_a_reward_of_another_shape_or_type_is_refused(returned, named):
    """The line names the reward, what it returned and what was expected."""
    text = message(roll, make_model(), make_batch(4), {"mine": (lambda actions, *_: returned(actions), 1.0)}, A=3)
    assert text.startswith("rollout.reward: mine returned ")
    expected = "not [B, T, …, K] = [4, 2, 'K']" if "values" in named else "a tensor of shape [B, T, A, …] = [4, 2, 3]"
    assert named in text and text.endswith(expected)


# --- Finished advantages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("A", [1, 3])
def test_finished_advantages_pass_through(A):
    """No estimator touches them, not even in a group of one, which no other reward may have; weights scale them; what
    does not count is 0; those of other rewards are added."""
    model, batch = model_and_batch("counted")
    episode = roll(model, batch, {"c": (credit, 0.5)}, T=1, A=A)
    finished = credit(episode.actions, None, None, None)
    expected = 0.5 * finished.advantages * COUNTED[:, None, None]
    assert torch.equal(episode.advantages, expected) and torch.equal(episode.rewards, 0.5 * finished.rewards)
    log_probs = action_log_prob(elements_adapter(model(batch.inputs, episode.masks)), episode.actions)
    exact = gradient_of(model, -(expected * log_probs).sum() / (A * COUNTED.sum()))
    gradient, metrics = update(model, [episode])
    assert_close(gradient, exact)
    assert metrics["groups/live"] == 0.75
    both = {"score": (any_score, 2.0), "c": (credit, 0.5)}
    if A == 1:
        text = message(roll, model, batch, both, T=1, A=1)
        assert text.startswith("rollout.actions_per_sample: a group needs two actions")
    else:
        plain = compute_advantages(2.0 * any_score(episode.actions, None, None, None), "maxrl")
        assert_close(roll(model, batch, both, T=1, A=A).advantages, plain[..., None] + expected)


# --- Every choice -----------------------------------------------------------------------------------------------------


def graded_by_choice(actions, outputs, targets, metadata):
    """[B, T, A, E…], a number >= 0 for each truth and choice."""
    return torch.tensor([[0.9, 0.2, 0.0], [0.1, 0.7, 0.4], [0.3, 0.0, 2.0]])[targets[:, None, None], actions].double()


def exact_gradient(model, batch, masks, reward, estimator) -> torch.Tensor:
    """What N → ∞ draws climb, by autograd through the probabilities: per image and element, with μ the mean over passes
    of the expected reward: rloo μ, maxrl log μ, grpo μ / (σ + 1e-4) with σ held; the mean over what counts."""
    kind = batch.targets.shape[1:]
    log_p = model(batch.inputs, masks).unflatten(-1, (*kind, -1)).log_softmax(-1)  # [B, T, E…, K]
    p, K = log_p.exp(), log_p.shape[-1]
    r = torch.stack([reward(torch.full((4, p.shape[1], 1, *kind), k), None, batch.targets, {}) for k in range(K)], -1)
    r = r.squeeze(2)  # [B, T, E…, K]
    mean = (p * r).sum(-1).mean(1)
    std = (p * (r - mean[:, None, ..., None]) ** 2).sum(-1).mean(1).sqrt().detach()
    climbed = {"rloo": mean, "maxrl": mean.log(), "grpo": mean / (std + 1e-4)}[estimator]
    counted = torch.ones_like(batch.targets, dtype=torch.bool) if batch.counted is None else batch.counted
    return gradient_of(model, -climbed[counted].mean())


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_all_actions_climb_the_expectation_itself(estimator, kind, keep_graph):
    """The gradient is that of the enumerated expectation, without noise, and the metrics are means under the policy."""
    model, batch = model_and_batch(kind)
    episode = roll(model, batch, graded_by_choice, action="all", advantage=estimator, keep_graph=keep_graph)
    K = 3 if kind == "class" else 2
    assert episode.actions.numel() == 0 and episode.log_probs.shape[:3] == (4, 2, K)
    gradient, metrics = update(model, [episode])
    exact = exact_gradient(model, batch, episode.masks, graded_by_choice, estimator)
    assert exact.norm() > 0.01
    assert_close(gradient, exact, 1e-9)
    probs = adapter_of(batch.targets)(model(batch.inputs, episode.masks).detach()).probs.movedim(-1, 2)
    every = torch.arange(K).view(1, 1, K, *[1] * (batch.targets.ndim - 1)).expand(probs.shape)
    r = graded_by_choice(every, None, batch.targets, {})
    mean = (probs * r).sum(2).mean(1)
    std = (probs * (r - mean[:, None, None]) ** 2).sum(2).mean(1).sqrt()
    for name, values in (("reward/mean", mean), ("reward/r", mean), ("reward/std", std)):
        assert_close(metrics[name], grpo.mean_per_image(values, batch.counted).mean())
    assert_close(metrics["policy/ratio"], 1.0)


def test_sampled_actions_tend_to_all_actions():
    """The same advantages, in the mean over very many draws."""
    model, batch = make_model(), make_batch(2)
    for estimator in ESTIMATORS:
        every, many = (
            update(model, [roll(model, batch, graded_by_choice, A=40_000, action=action, advantage=estimator)])[0]
            for action in ("all", "sample")
        )
        assert (every - many).norm() < 0.02 * every.norm()


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.7, "entropy_coef": 0.3}])
@pytest.mark.parametrize("keep_graph", [True, False])
def test_all_actions_over_epochs_are_a_slow_loop(keep_graph, options):
    """Three steps: weights and old log_probs are the rollout's, each choice is clipped by itself."""
    model, batch = make_model(), make_batch(4)
    mine, reference = copy.deepcopy(model), make_model(depth=1)
    episode = roll(model, batch, graded_by_choice, action="all", advantage="rloo", keep_graph=keep_graph)
    optimizer, clips = torch.optim.AdamW(mine.parameters(), lr=0.02), []
    old = mine(batch.inputs, episode.masks).detach().log_softmax(-1)
    r = torch.stack([graded_by_choice(torch.full((4, 2, 1), k), None, batch.targets, {})[..., 0] for k in range(3)], -1)
    advantages = r - (old.exp() * r).sum(-1, keepdim=True).mean(1, keepdim=True)
    for _ in range(3):
        log_p = mine(batch.inputs, episode.masks).log_softmax(-1)
        log_q = reference(batch.inputs, episode.masks).detach().log_softmax(-1)
        ratio = (log_p - old).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
        clips.append((old.exp() * (gain < ratio * advantages)).sum(-1).mean().item())
        loss = -(old.exp() * gain).sum(-1).mean()
        loss = loss + options.get("kl_coef", 0) * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss = loss + options.get("entropy_coef", 0) * (log_p.exp() * log_p).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    steps = torch.optim.AdamW(model.parameters(), lr=0.02)
    options = options | {"reference": reference, "update_epochs": 3, "micro_batch_size": 3}
    metrics = update(model, [episode], optimizer=steps, **options)[1]
    assert clips[-1] > 0.01
    assert_close(flat(model.parameters()), flat(mine.parameters()))
    assert_close(metrics["policy/clip_fraction"], math.fsum(clips) / 3)


@pytest.mark.parametrize("kind", ["class", "elements"])
def test_all_actions_with_maxrl_and_one_pass_are_the_label(kind):
    """Cross-entropy's gradient; over several passes that of the likelihood of their mean."""
    model, batch = model_and_batch(kind)
    gradient = update(model, [roll(model, batch, T=1, action="all")])[0]
    assert_close(gradient, update(model, [roll(model, batch, T=1)], objective="supervised")[0], 1e-12)
    episode = roll(model, batch, T=3, action="all")
    probs = adapter_of(batch.targets)(model(batch.inputs, episode.masks)).probs
    truth = batch.targets[:, None, ..., None].expand(*probs.shape[:-1], 1)
    exact = gradient_of(model, -probs.gather(-1, truth).mean(1).log().mean())
    assert_close(update(model, [episode])[0], exact, 1e-12)


@pytest.mark.parametrize("gap", [95.0, 2000.0])
def test_a_right_choice_too_rare_for_float32_still_counts_under_maxrl(gap):
    """Its probability is below float32's smallest number; the gradient is cross-entropy's, and nothing is NaN."""
    logits = torch.tensor([[[0.0, gap, 1.0]]], requires_grad=True)
    policy = classification_policy_adapter(logits)
    log_probs, _ = choices.choice_log_probs(policy)
    advantages = choices.expected_advantages(torch.tensor([[[1.0, 0.0, 0.0]]]), log_probs.detach(), "maxrl")
    loss = grpo.clipped_loss(log_probs, log_probs.detach(), advantages, 0.2, 0.28)[0].mean()
    gradient = torch.autograd.grad(loss, logits)[0]
    assert_close(gradient, F.one_hot(torch.tensor([[1]]), 3) - F.one_hot(torch.tensor([[0]]), 3), 1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_choice_that_is_impossible_changes_nothing(estimator):
    """A logit of -inf: its gradient is 0, the others' is that of a policy without the choice."""
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    rewards, gradients = torch.rand(2, 3, 4, dtype=torch.float64), []
    for K in (4, 3):
        given = logits.clone()
        given[..., 3] = -torch.inf
        given = given[..., :K].requires_grad_()
        log_probs = choices.choice_log_probs(classification_policy_adapter(given))[0]
        advantages = choices.expected_advantages(rewards[..., :K], log_probs.detach(), estimator)
        loss = grpo.clipped_loss(log_probs, log_probs.detach(), advantages, 0.2, 0.28)[0].sum(2).mean() / K
        gradients.append(torch.autograd.grad(loss, given)[0])
    assert (gradients[0][..., 3] == 0).all()
    assert_close(gradients[0][..., :3], gradients[1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_of_all_actions_are_dead(estimator):
    """Exactly, though weights sum to 1 but for rounding, which moves the mean; a negative one is maxrl's NaN."""
    log_weights = (torch.randn(3, 2, 7, generator=torch.manual_seed(0)) * 3).log_softmax(2)
    rewards = torch.tensor([0.0, 0.1, 7.3e20]).view(3, 1, 1).expand(3, 2, 7)
    assert (choices.expected_advantages(rewards, log_weights, estimator) == 0).all()
    values = rewards.unsqueeze(2).movedim(-1, 3).squeeze(2)
    assert (choices.value_advantages(values, log_weights) == 0).all()
    negative = torch.where(torch.arange(7) == 3, -0.5, rewards[:2])
    found = choices.expected_advantages(negative, log_weights[:2], estimator)
    assert found.isnan().all() if estimator == "maxrl" else found.isfinite().all()
    with pytest.raises(ValueError, match="gae"):
        choices.expected_advantages(rewards, log_weights, "gae")


def test_all_tags_are_judged_by_themselves():
    """A Bernoulli has two choices, no and yes."""
    model, targets = make_model(), torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    batch = replace(make_batch(2), targets=targets)

    def right(actions, outputs, targets, metadata):
        assert actions.shape == (2, 2, 2, 3) and actions[0, 0, :, 0].tolist() == [0, 1]
        return (actions == targets[:, None, None]).double()

    def adapter(logits):
        return Bernoulli(logits=logits)

    episode = grpo.rollout(model, batch, {"r": (right, 1.0)}, adapter, grpo.RolloutSettings(2, 4, "all", "rloo"))
    loss, _ = grpo.policy_loss(episode, episode.policy, episode.log_probs, grpo.UpdateSettings())
    p = model(batch.inputs, episode.masks).sigmoid()
    chance = torch.where(targets[:, None] == 1, p, 1 - p)
    assert_close(gradient_of(model, loss), gradient_of(model, -chance.mean()))


def test_what_cannot_be_enumerated_is_said_in_one_line():
    model, batch = model_and_batch("elements")
    every = grpo.RolloutSettings(2, 4, "all", "rloo", max_choices=2)

    def refusal(reward, adapter=elements_adapter, settings=every):
        return message(grpo.rollout, model, batch, {"mine": (reward, 1.0)}, adapter, settings)

    hint = "as rollout.action: all judges each choice of an element by itself"
    expected = f"expected a tensor of shape [B, T, A, …] = [4, 2, 2, 3], {hint}"
    assert refusal(any_score) == f"rollout.reward: mine returned a tensor of shape [4, 2, 2]; {expected}"
    assert refusal(credit).endswith(hint)  # what has its own credit assignment judges whole actions
    text = refusal(correct, lambda outputs: Normal(outputs, 1.0))
    assert text == "rollout.action: all: a Normal has no choices that could be enumerated; take sample"
    text = refusal(correct, lambda outputs: Categorical(logits=outputs.unflatten(-1, (2, 3))))
    assert text == "rollout.action: all: 3 choices, rollout.max_choices is 2"


# --- Values of alternatives -------------------------------------------------------------------------------------------


def values_of(actions, outputs, targets, metadata):
    """Any values of two choices, which differ by pass; the scores behind them are one per action."""
    values = (
        torch.linspace(-1, 2, outputs[..., :1].numel() * 6, dtype=torch.float64).sin().view(*outputs.shape[:2], 3, 2)
    )
    return Credit(None, actions.double().mean(-1), values)


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("action, beside", [("sample", ()), ("sample", ("element", "credit")), ("all", ("element",))])
def test_values_of_alternatives_are_taken_exactly(action, beside, keep_graph):
    """The gradient of Σ_k π(k) · value_k, whatever was drawn, plus that of other rewards; over several epochs too the
    policy is compared with the rollout's."""
    model, batch = model_and_batch("counted")
    rewards = {"element": (correct, 2.0), "credit": (credit, 0.5), "values": (values_of, 3.0)}
    if action == "all":
        rewards["values"] = (lambda *arguments: replace(values_of(*arguments), rewards=correct(*arguments)), 3.0)
    rewards = {name: rewards[name] for name in (*beside, "values")}
    options = {"A": 3, "action": action, "advantage": "rloo", "keep_graph": keep_graph}
    episode = roll(model, batch, rewards, **options)
    assert episode.log_probs.shape == (4, 2, (3 if action == "sample" and beside else 0) + 2, 3)
    probs = elements_adapter(model(batch.inputs, episode.masks)).probs
    values = values_of(torch.zeros(4, 2, 1, 3), model(batch.inputs, episode.masks), batch.targets, {}).values
    loss = -3 * (probs * values).sum(-1)[COUNTED[:, None].expand(4, 2, 3)].mean()
    exact = gradient_of(model, loss)
    others = {name: rewards[name] for name in beside}
    if others:
        exact = exact + update(model, [roll(model, batch, others, **options)])[0]
    gradient, metrics = update(model, [roll(model, batch, rewards, **options)], lr=0.5, update_epochs=1)
    assert_close(gradient, exact)
    assert metrics["groups/live"] == 0.75  # in one image nothing counts
    assert_close(metrics["policy/ratio"], 1.0)
    episode = roll(model, batch, rewards, **options)
    metrics = update(model, [episode], lr=2.0, update_epochs=3)[1]
    assert metrics["policy/clip_fraction"] > 0


@pytest.mark.parametrize("keep_graph", [True, False])
def test_log_values_climb_the_logarithm_of_the_expected_value(keep_graph):
    """Δ · log of Σ_k π(k) · value_k above the lowest value, mean over the passes first: its gradient by autograd."""
    model, batch = model_and_batch("counted")
    episode = roll(model, batch, {"values": (values_of, 3.0)}, A=3, log_values=True, keep_graph=keep_graph)
    outputs = model(batch.inputs, episode.masks)
    values = 3 * values_of(torch.zeros(4, 2, 1, 3), outputs.detach(), batch.targets, {}).values
    above = values - values.amin(-1, keepdim=True)
    expected = (elements_adapter(outputs).probs * above).sum(-1).mean(1)  # [B, E…]
    exact = gradient_of(model, -(above.amax(-1).mean(1) * expected.log())[COUNTED].mean())
    gradient, metrics = update(model, [episode])
    assert_close(gradient, exact)
    assert metrics["groups/live"] == 0.75  # in one image nothing counts


@pytest.mark.parametrize("gap", [1.0, 95.0, 2000.0])
def test_log_values_of_one_choice_are_its_cross_entropy(gap):
    """Times its value, also where its probability is below float32's smallest number; 0 where all values are equal."""
    logits = torch.tensor([[[0.0, gap, 1.0]]], requires_grad=True)
    policy = classification_policy_adapter(logits)
    log_probs, _ = choices.choice_log_probs(policy)
    values = torch.tensor([[[2.5, -0.5, -0.5]]])
    advantages = choices.value_advantages(values, log_probs.detach(), log_values=True)
    loss = grpo.clipped_loss(log_probs, log_probs.detach(), advantages, 0.2, 0.28)[0].sum(2).mean()
    label = 3 * F.cross_entropy(logits[0], torch.tensor([0]))
    assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(label, logits)[0], 1e-5)
    assert (choices.value_advantages(torch.full((1, 1, 3), 7.3), log_probs.detach(), log_values=True) == 0).all()
    unknown, counts = torch.tensor([[[1.0, torch.nan, 0]]]), torch.tensor([True])
    for counted, how in itertools.product((None, counts), (False, True)):
        found = choices.value_advantages(unknown, log_probs.detach(), counted, how)
        assert found.isnan().any()  # which the step refuses; as 0 it would be wrong in silence


def test_values_of_another_shape_are_refused():
    model, batch = model_and_batch("elements")
    for change, expected in (
        (lambda c: replace(c, values=c.values[:, :1]), "values [4, 1, 3, 2], not [B, T, …, K] = [4, 2, 3, 'K']"),
        (lambda c: replace(c, values=torch.cat([c.values] * 2, -1)), "values of 4 choices; the policy has 2"),
        (lambda c: replace(c, values=None), "mine returned a Credit without advantages and without values"),
    ):
        text = message(roll, model, batch, {"mine": (lambda *x, change=change: change(values_of(*x)), 1.0)}, A=3)
        assert text.startswith("rollout.reward: ") and expected in text


# --- Loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_element", [False, True])
def test_clipped_loss_is_the_scalar_one(per_element):
    """Over signs of the advantage and ratios in and outside the clip: value, ratio, flag and gradient of a scalar loop.
    The gradient is 0 where the clip is active and -ratio * advantage elsewhere."""
    low, high = 0.2, 0.28
    advantages = torch.tensor([-2.0, -0.3, 0.0, 0.7, 3.0], dtype=torch.float64).view(5, 1, 1)
    ratios = torch.tensor([0.1, 0.79, 0.81, 1.0, 1.27, 1.29, 4.0], dtype=torch.float64)
    old = -torch.rand(5, 1, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    new = (old + ratios.log()).requires_grad_()
    given_advantages = advantages[..., None].expand(5, 1, 1, 7) if per_element else advantages
    loss, ratio, clipped = grpo.clipped_loss(new, old, given_advantages, low, high)
    assert loss.shape == ratio.shape == clipped.shape == (5, 1, 1, 7)
    assert_close(ratio, ratios.expand(5, 1, 1, 7), 1e-12)
    loss.sum().backward()
    for i, j in itertools.product(range(5), range(7)):
        advantage, r = advantages[i].item(), ratios[j].item()
        active = (advantage > 0 and r > 1 + high) or (advantage < 0 and r < 1 - low)
        bound = 1 + high if advantage > 0 else 1 - low
        assert_close(loss[i, 0, 0, j], -(bound if active else r) * advantage, 1e-12)
        assert_close(new.grad[i, 0, 0, j], 0.0 if active else -r * advantage, 0 if active else 1e-12)
        assert bool(clipped[i, 0, 0, j]) == active
    assert clipped.sum() == 2 * 2 + 2 * 2


@pytest.mark.parametrize("keep_graph", [True, False])
def test_ratios_are_one_under_the_rollouts_masks_and_not_under_others(keep_graph, monkeypatch):
    """Before the first step each is 1, exactly in one pass and to rounding in a replay; after it, or under fresh masks,
    they are off by far."""
    ratios, original = [], grpo.clipped_loss

    def spy(*arguments):
        result = original(*arguments)
        ratios.append(result[1].detach())
        return result

    monkeypatch.setattr(grpo, "clipped_loss", spy)
    model = make_model()
    episode = roll(model, make_batch(8), graded, keep_graph=keep_graph)
    metrics = update(model, [episode], lr=0.1, update_epochs=2)[1]
    first, second = ratios
    assert_close(first, torch.ones(8, 2, 2), 0 if keep_graph else 1e-14)
    assert (second - 1).abs().median() > 1e-3
    assert_close(metrics["policy/ratio"], (first.mean() + second.mean()) / 2)
    model = make_model()
    with keyed_rng("fresh"):
        fresh = replace(episode.detach(), masks=model.sample_masks(8, 2), metadata=episode.metadata)
    metrics = update(model, [fresh])[1]
    assert abs(metrics["policy/ratio"] - 1) > 0.01 and metrics["policy/clip_fraction"] > 0.1


# --- Micro-batches, replay, dead groups -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"kl_coef": 0.7, "label_coef": 0.3}, {"objective": "supervised"}, {"update_epochs": 2}]
)
def test_micro_batches_and_replays_give_the_batchs_gradient(options, kind, keep_graph):
    """For given masks and actions, uneven parts, in one of which nothing may count, accumulate the gradient of one pass
    over the whole batch, dead groups included, and its metrics; so do replays, padded or not."""
    model, batch = model_and_batch(kind)
    options = options | {"lr": 0.1, "reference": make_model(num_classes=model.head.out_features, depth=1)}
    whole = roll(model, batch, key=(0, 2, 0))
    stored, averaged_over_the_live = whole.detach(), {"policy/ratio", "policy/clip_fraction"}
    expected, metrics = update(model, [whole], **options)
    assert expected.norm() > 0.01 and (metrics["groups/live"] < 1 or kind == "elements")
    for pad_to, size in [(1, 64)] if keep_graph else [(1, 64), (1, 1), (3, 2), (64, 64)]:
        model, parts = model_and_batch(kind)[0], []
        for images in (slice(0, 1), slice(1, 2), slice(2, 4)):
            part = stored[images]
            policy = adapter_of(batch.targets)(model(part.inputs, part.masks))
            log_probs = action_log_prob(policy, part.actions)
            log_probs = log_probs if keep_graph else log_probs.detach()
            metadata = part.metadata | {"reward_terms": {}, "entropy": policy.entropy().detach()}
            parts.append(replace(part, policy=policy, log_probs=log_probs, metadata=metadata))
        gradient, part_metrics = update(model, parts, micro_batch_size=size, pad_to=pad_to, **options)
        assert_close(gradient, expected)
        assert part_metrics.keys() == metrics.keys() - {"reward/r"}
        for name in part_metrics.keys() - (averaged_over_the_live if "update_epochs" in options else set()):
            assert_close(part_metrics[name], metrics[name])


@pytest.mark.parametrize("pad_to, padding", [(1, 0), (4, 3)])
def test_a_replay_forwards_no_dead_image(pad_to, padding):
    """The model sees the live images only, in order, the last one repeated up to a multiple of pad_to."""
    model, batch = make_model(), make_batch(12)
    episode = roll(model, batch, keep_graph=False)
    live, seen = [1, 2, 5, 8, 10], []
    episode.advantages.zero_()[live, 1, 0] = 1.0
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    update(model, [episode], pad_to=pad_to, micro_batch_size=3)
    expected = live + [live[-1]] * padding
    assert [len(images) for images in seen] == [len(expected[i : i + 3]) for i in range(0, len(expected), 3)]
    assert torch.cat(seen).equal(batch.inputs[expected])


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("update_epochs", [1, 2])
@pytest.mark.parametrize("kind, reward", [("class", constant), ("counted", correct)])
def test_a_batch_without_a_live_group_has_zero_gradients(kind, reward, update_epochs, keep_graph):
    """Zero, not none (`update` looks), so that all ranks step alike; nothing is NaN, and weights do not move."""
    model, batch = model_and_batch(kind)
    batch.counted = torch.zeros_like(COUNTED) if kind == "counted" else None  # nothing counts at all
    before = flat(model.parameters())
    episodes = [roll(model, batch, reward, keep_graph=keep_graph, key=(0, 0, i)) for i in range(2)]
    gradient, metrics = update(model, episodes, lr=1.0, update_epochs=update_epochs)
    assert (gradient == 0).all() and flat(model.parameters()).equal(before)
    assert (metrics["groups/live"], metrics["loss"], metrics["grad_norm"]) == (0, 0, 0)
    assert all(value.isfinite().all() for value in metrics.values())


# --- KL, entropy, supervised, epochs ----------------------------------------------------------------------------------


def squares(policy, targets, counted):  # [B, T, 1, E…], [B, E…]
    return (policy.logits[..., 1].unsqueeze(2) - targets) ** 2


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "term, options",
    [
        ("reward", {}),
        ("kl", {"kl_coef": 0.7}),
        ("entropy", {"entropy_coef": 0.3}),
        ("supervised", {"objective": "supervised"}),
        ("squares", {"objective": "supervised", "supervised_loss": squares}),
        ("label", {"label_coef": 0.6, "supervised_loss": squares}),
    ],
)
def test_each_term_of_the_loss(term, options, kind, keep_graph):
    """Value and gradient of the policy gradient, of the exact KL to the reference under the same masks, of the entropy,
    of the cross-entropy to the targets, of another loss, and of that beside the policy gradient: means over images,
    passes and what counts, dead groups included; the reference gets no gradient."""
    model, batch = model_and_batch(kind)
    reference = copy.deepcopy(model)
    with keyed_rng("reference"), torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    rewarded = correct if term in ("reward", "label") else constant
    episode = roll(model, batch, rewarded, T=3, A=1, keep_graph=keep_graph)
    shape = 4, 3, *batch.targets.shape[1:], -1
    log_p, log_q = (m(batch.inputs, episode.masks).view(shape).log_softmax(-1) for m in (model, reference))
    targets = batch.targets[:, None].expand(log_p.shape[:-1])
    ratio = (log_p - log_p.detach()).exp().gather(-1, episode.actions.movedim(2, -1)).squeeze(-1)
    each = {
        "reward": lambda: -episode.advantages.squeeze(2) * ratio,
        "kl": lambda: 0.7 * (log_p.exp() * (log_p - log_q)).sum(-1),
        "entropy": lambda: 0.3 * (log_p.exp() * log_p).sum(-1),
        "supervised": lambda: F.cross_entropy(log_p.flatten(0, -2), targets.flatten(), reduction="none"),
        "squares": lambda: (log_p[..., 1] - targets) ** 2,
        "label": lambda: 0.6 * (log_p[..., 1] - targets) ** 2 - episode.advantages.squeeze(2) * ratio,
    }[term]()
    each = each.view(targets.shape).mean(1)  # [B, E…]
    loss = (each[COUNTED] if kind == "counted" else each).mean()
    exact = gradient_of(model, loss)
    gradient, metrics = update(model, [episode], reference=reference, micro_batch_size=2, **options)
    assert exact.norm() > 1e-3 and (metrics["groups/live"] < 1 or kind == "elements")
    assert_close(gradient, exact)
    assert_close(metrics["grad_norm"], exact.norm())
    assert_close(metrics["loss"], loss.item())
    assert_close(metrics["policy/kl"], loss.item() / 0.7 if term == "kl" else 0.0)
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("keep_graph", [True, False])
def test_three_epochs_are_three_steps_on_the_rollouts_log_probs(keep_graph):
    """Weights and metrics equal a hand-written PPO loop with KL whose old log_probs are the rollout's."""
    model, batch = make_model(), make_batch(6)
    mine, reference = copy.deepcopy(model), copy.deepcopy(model)
    episode = roll(model, batch, graded, advantage="grpo", keep_graph=keep_graph)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=0.02)
    old, rows = episode.log_probs.detach().clone(), []
    for _ in range(3):
        log_p = mine(batch.inputs, episode.masks).log_softmax(-1)
        log_q = reference(batch.inputs, episode.masks).detach().log_softmax(-1)
        ratio = (log_p.gather(2, episode.actions) - old).exp()
        bounded = torch.where(ratio > 1.28, 1.28, torch.where(ratio < 0.8, 0.8, ratio))
        gain = torch.minimum(ratio * episode.advantages, bounded * episode.advantages)
        loss = 0.1 * (log_p.exp() * (log_p - log_q)).sum(-1).mean() - gain.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.5)
        optimizer.step()
        clipped = (gain < ratio * episode.advantages).double()
        rows.append([loss.item(), ratio.mean().item(), clipped.mean().item(), norm.item()])
    options = {"update_epochs": 3, "kl_coef": 0.1, "reference": reference, "max_grad_norm": 0.5}
    steps = torch.optim.AdamW(model.parameters(), lr=0.02)
    _, metrics = update(model, [episode], optimizer=steps, micro_batch_size=4, **options)
    table = torch.tensor(rows, dtype=torch.float64)
    assert table[0, 2] == 0 and table[1:, 2].min() > 0 and table[:, 3].max() > 0.5
    assert_close(flat(model.parameters()), flat(mine.parameters()))
    for name, mean in zip(("loss", "policy/ratio", "policy/clip_fraction"), table.mean(0)):
        assert_close(metrics[name], mean)
    assert_close(metrics["grad_norm"], table[-1, 3])


# --- Optimizer step ---------------------------------------------------------------------------------------------------

BAD = pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])


def make_parameters() -> list[torch.nn.Parameter]:
    with keyed_rng("parameters"):
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]
        for p in parameters:
            p.grad = torch.randn(p.shape)
    return parameters


@BAD
def test_a_bad_step_of_a_fused_optimizer_changes_nothing_and_stays_bad(loss, gradient):
    """Weights and Adam's moments are bit for bit as before, and after good steps that follow too."""
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True)

    def everything():
        moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq", "step")]
        return flat([*parameters, *moments])

    start = flat(parameters)
    grpo.optimizer_step(optimizer, 1.0, torch.tensor(0.5))
    before = everything()
    assert (flat(parameters) - start).abs().min() > 1e-3
    parameters[1].grad[2] = gradient
    norm = grpo.optimizer_step(optimizer, 1.0, torch.tensor(loss))
    assert norm.isfinite() == math.isfinite(gradient)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        grpo.optimizer_step(optimizer, 1.0, torch.tensor(0.5))
    assert everything().equal(before)


@BAD
def test_a_bad_step_of_another_optimizer_raises(loss, gradient):
    """FloatingPointError, and the weights were not touched."""
    parameters = make_parameters()
    before = flat(parameters)
    parameters[0].grad[1, 1] = gradient
    with pytest.raises(FloatingPointError, match="nan|inf"):
        grpo.optimizer_step(torch.optim.AdamW(parameters, lr=0.1), 1.0, torch.tensor(loss))
    assert flat(parameters).equal(before)


@pytest.mark.parametrize("keep_graph", [True, False])
def test_negative_rewards_under_maxrl_do_not_touch_the_weights(keep_graph):
    """maxrl's NaN reaches the step, also through a replay, and is refused there."""
    model = make_model(torch.float32)
    before = flat(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    episode = roll(model, make_batch(4, torch.float32), lambda *a: correct(*a) - 0.5, keep_graph=keep_graph)
    assert not update(model, [episode], optimizer=optimizer)[1]["loss"].isfinite()
    assert flat(model.parameters()).equal(before)


@pytest.mark.parametrize("max_grad_norm", [0.5, 100.0])
def test_gradients_are_clipped_as_torch_clips_them(max_grad_norm):
    """The step uses clip_grad_norm_'s gradients over all parameters; the norm returned is the one before."""
    parameters, copies = make_parameters(), make_parameters()
    norm = torch.nn.utils.clip_grad_norm_(copies, max_grad_norm)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    returned = grpo.optimizer_step(torch.optim.SGD(groups, lr=1.0), max_grad_norm, torch.tensor(0.0))
    assert returned == norm and 0.5 < norm < 100
    assert flat(parameters).equal(flat([p - p.grad for p in copies]))


def test_a_parameter_without_gradient_steps_with_zero():
    """None becomes zero, so weight decay alone moves it; a frozen parameter is left out."""
    parameters = make_parameters()
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    parameters[1].grad = None
    before = parameters[1].detach().clone()
    optimizer = torch.optim.AdamW([*parameters, frozen], lr=0.1, weight_decay=0.5)
    grpo.optimizer_step(optimizer, 1.0, torch.tensor(0.0))
    assert_close(parameters[1].detach(), 0.95 * before, 1e-6)
    assert frozen.grad is None and frozen.tolist() == [1, 1]


# --- Cost -------------------------------------------------------------------------------------------------------------


class CountOps(TorchDispatchMode):
    """How often each aten operator reaches the device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_ops(B: int, T: int, A: int, keep_graph: bool) -> Counter:
    """The operators of one rollout and update in float32 with fused AdamW."""
    model, batch = make_model(torch.float32), make_batch(B, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with CountOps() as ops:
        update(model, [roll(model, batch, graded, T=T, A=A, keep_graph=keep_graph)], optimizer=optimizer)
    return ops.counts


@pytest.mark.parametrize("keep_graph, searches", [(True, 0), (False, 1)])
def test_a_step_reads_no_scalar_from_the_device_and_loops_over_nothing(keep_graph, searches, monkeypatch):
    """In one pass no number comes back to the host; a replay brings to the host which groups live, and there sums once
    and searches once per episode. For B, T, A = 16, 4, 8 there are as many operators as for 4, 2, 2."""
    monkeypatch.setattr(Distribution, "_validate_args", False)
    counts = count_ops(4, 2, 2, keep_graph)
    assert counts["_fused_adamw_"] == 1  # the counter did look
    assert counts["_local_scalar_dense"] == counts["nonzero"] == searches
    assert counts["item"] == counts["is_nonzero"] == counts["equal"] == counts["masked_select"] == 0
    assert counts == count_ops(16, 4, 8, keep_graph) and counts.total() > 300
