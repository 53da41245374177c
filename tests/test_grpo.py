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
from hypothesis import example, given, settings
from torch.distributions import Categorical, Distribution
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
from data_types import Credit, Episode, TensorMiniBatch
from grpo import action_log_prob, classification_policy_adapter, compute_advantages, keyed_rng
from vit_model import VisionTransformer

ESTIMATORS = ("grpo", "rloo", "maxrl")


# --- Small things to experiment on ----------------------------------------------------------------------------------


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


def correct(actions, outputs, targets, metadata):
    return (actions == targets[:, None, None]).float()


def graded(actions, outputs, targets, metadata):
    """Every action of a group earns something else, so that no group is dead."""
    return torch.arange(actions[0].numel()).view(actions.shape[1:]).expand(actions.shape).float()


def constant(actions, outputs, targets, metadata):
    return torch.full(actions.shape, 0.1)


def roll(model, batch, reward=correct, T=2, A=2, adapter=classification_policy_adapter, **options) -> Episode:
    return grpo.rollout(model, batch, {"r": (reward, 1.0)}, adapter, num_mc_samples=T, actions_per_sample=A, **options)


def update(model, episodes, lr=0.0, optimizer=None, adapter=classification_policy_adapter, **options):
    """All gradients as one vector, and the metrics; the weights stay unless there is a learning rate."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    episodes = list(episodes)
    B = sum(len(episode) for episode in episodes)
    options = {"batch_size": B, "micro_batch_size": B, "policy_adapter": adapter, "max_grad_norm": 1e9} | options
    metrics = grpo.update_policy(model, optimizer, episodes, **options)
    assert all(p.grad is not None for p in model.parameters())
    return flat([p.grad for p in model.parameters()]), metrics


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).clone()


def gradient_of(model, loss) -> torch.Tensor:
    return flat(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


def with_graph(model, part: Episode) -> Episode:
    """An episode's forward pass made anew, under its own masks and for its own actions."""
    policy = classification_policy_adapter(model(part.inputs, part.masks))
    terms = {"targets": part.metadata["targets"], "reward_terms": {}, "entropy": policy.entropy().detach()}
    return replace(part, policy=policy, log_probs=action_log_prob(policy, part.actions), metadata=terms)


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


# --- Advantages -----------------------------------------------------------------------------------------------------


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
    values = draw(
        st.sampled_from([st.sampled_from([0.0, 1.0]), st.sampled_from([0.1, 0.3]), st.floats(low, 4.0, width=32)])
    )
    size = math.prod(shape)
    return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float64).view(shape)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(rewards=st.one_of(reward_tensors(), reward_tensors(low=0.0)))
@example(rewards=torch.full((2, 3, 1), 0.1, dtype=torch.float64))
@example(rewards=torch.tensor([[[-1.0]], [[0.5]]], dtype=torch.float64))
def test_advantages_follow_their_formula(estimator, rewards):
    """Each group (one image, one element; over passes and actions) by its formula, dead ones exactly 0, a group with a
    negative reward NaN under maxrl, whatever the other groups hold."""
    advantages = compute_advantages(rewards, estimator)
    assert advantages.shape == rewards.shape
    groups = rewards.flatten(3) if rewards.ndim > 3 else rewards.unsqueeze(-1)  # [B, T, A, elements]
    results = advantages.reshape(groups.shape)
    for b in range(groups.shape[0]):
        for e in range(groups.shape[3]):
            expected = slow_advantages(groups[b, :, :, e].flatten().tolist(), estimator)
            result = results[b, :, :, e].flatten()
            if not any(expected):
                assert result.tolist() == expected, "a dead group must be exactly 0"
            torch.testing.assert_close(
                result, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8, equal_nan=True
            )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e-30, 7.3e20])
@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (1, 1), (3, 11)])
def test_dead_groups_are_exactly_zero(estimator, value, shape):
    """Equal float32 rewards whose mean is off by rounding still give 0, and the group counts as dead; a live one next
    to it counts as live."""
    rewards = torch.full((2, *shape), value)
    assert (compute_advantages(rewards, estimator) == 0).all()
    rewards[1, 0, 0] = 2.0 + 2 * value
    live = [False, shape != (1, 1)]
    assert grpo.live_groups(compute_advantages(rewards, estimator)).tolist() == live


def test_live_groups_with_elements():
    """One element that differs makes its image live, and only its own element's group gets advantages."""
    rewards = torch.full((3, 2, 2, 4), 0.1)
    rewards[1, 0, 1, 2] = 1.0
    advantages = compute_advantages(rewards, "rloo")
    assert grpo.live_groups(advantages).tolist() == [False, True, False]
    assert (advantages != 0).sum((0, 1, 2)).tolist() == [0, 0, 4, 0]


def test_unknown_estimator():
    """A ValueError that names it."""
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


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_each_estimator_climbs_with_many_actions(T, estimator):
    """With p the mean over passes of the chance of success: grpo 2·arcsin√p, rloo p, maxrl log p."""
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.0, 0.5, -1.0], [-2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]])[:T]
    logits = logits.double().requires_grad_()
    A = 100_000
    policy = Categorical(logits=logits[None])
    actions = grpo.sample_actions(policy, A)
    log_probs = action_log_prob(policy, actions)
    advantages = compute_advantages((actions == 0).double(), estimator)
    step = torch.autograd.grad((log_probs * advantages).mean(), logits)[0]

    p = logits.softmax(-1)[:, 0].mean()
    objective = {"grpo": 2 * p.sqrt().arcsin(), "rloo": p, "maxrl": p.log()}[estimator]
    exact = torch.autograd.grad(objective, logits, retain_graph=True)[0]
    assert (step - exact).norm() < 0.02 * exact.norm()
    if T > 1:  # and not the mean over passes of the log-likelihood
        other = torch.autograd.grad(logits.log_softmax(-1)[:, 0].mean(), logits)[0]
        assert (step - other).norm() > 0.2 * other.norm()


# --- Layout, randomness, rollout ------------------------------------------------------------------------------------


def test_keyed_rng_is_a_function_of_its_key_and_leaves_no_trace():
    """Same key same draws, whatever was drawn before; torch's state is as it was, after an exception too."""

    def draw(*key):
        with keyed_rng(*key):
            return torch.rand(4).tolist() + [int(torch.randint(10**9, ()))]

    torch.manual_seed(5)
    first = draw(1, 2, "masks", 3)
    torch.manual_seed(6)
    torch.rand(3)
    state = torch.get_rng_state()
    assert draw(1, 2, "masks", 3) == first
    with pytest.raises(KeyError), keyed_rng(1):
        torch.rand(2)
        raise KeyError
    assert torch.get_rng_state().equal(state)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(keys=st.lists(st.tuples(*[st.integers(0, 300)] * 2, st.sampled_from("ab")), min_size=2, max_size=8, unique=True))
@example(keys=[(1, 23, "a"), (12, 3, "a"), (123, 0, "a"), (0, 123, "a")])
def test_keyed_rng_differs_over_keys(keys):
    """No two keys draw alike, nor do keys that would run together as text."""
    drawn = set()
    for key in keys:
        with keyed_rng(*key):
            drawn.add(int(torch.randint(2**62, ())))
    assert len(drawn) == len(keys)


def test_rollout_is_a_function_of_its_key():
    """Same key, same masks and actions, with graph or without and whatever was drawn before; seed, step and index each
    change both; more actions leave the masks alone."""
    model, batch = make_model(), make_batch(4)
    first = roll(model, batch, T=3, A=5, key=(1, 2, 3))
    torch.rand(7)
    for again in (roll(model, batch, T=3, A=5, key=(1, 2, 3), keep_graph=graph) for graph in (True, False)):
        assert all(first.masks[name].equal(again.masks[name]) for name in first.masks)
        assert first.actions.equal(again.actions) and first.log_probs.equal(again.log_probs)
        assert first.advantages.equal(again.advantages)
    for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        other = roll(model, batch, T=3, A=5, key=key)
        assert not any(first.masks[name].equal(other.masks[name]) for name in first.masks)
        assert not first.actions.equal(other.actions)
    same = make_model(dropout=0.0)  # one policy whatever the masks, so that only the actions' own draw can differ
    drawn = [roll(same, batch, T=3, A=5, key=k).actions for k in ((1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0))]
    assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == 4
    more = roll(model, batch, T=3, A=6, key=(1, 2, 3))
    assert all(first.masks[name].equal(more.masks[name]) for name in first.masks)


def test_rollout_hands_over_what_the_update_needs():
    """Shapes, log_probs, rewards, prediction and metadata of an episode, and which of them have a graph."""
    model, batch = make_model(), make_batch(4)
    episode = roll(model, batch, T=3, A=5)
    logits = model(batch.inputs, episode.masks)
    assert episode.actions.shape == episode.log_probs.shape == episode.rewards.shape == (4, 3, 5)
    assert_close(episode.log_probs, logits.log_softmax(-1).gather(2, episode.actions), 1e-12)
    assert episode.rewards.equal((episode.actions == batch.targets[:, None, None]).double())
    assert episode.advantages.equal(compute_advantages(episode.rewards, "maxrl"))
    assert episode.metadata["predicted"].equal(logits.argmax(-1))
    assert episode.metadata["targets"].equal(batch.targets) and episode.metadata["paths"] == batch.metadata["paths"]
    graphs = {name for name, value in vars(episode).items() if isinstance(value, torch.Tensor) and value.requires_grad}
    assert graphs == {"log_probs"}
    assert not roll(model, batch, keep_graph=False).log_probs.requires_grad


def test_argmax_takes_the_mode_of_each_pass():
    """One action a pass, the most probable one, however many actions are configured."""
    model, batch = make_model(), make_batch(6)
    episode = roll(model, batch, T=3, A=4, action="argmax")
    assert episode.actions.equal(model(batch.inputs, episode.masks).argmax(-1).unsqueeze(2))
    assert episode.actions.shape == episode.rewards.shape == (6, 3, 1)


def test_sampled_actions_follow_their_own_pass():
    """The frequencies of many actions are the probabilities of that image, that pass and that element."""
    with keyed_rng("frequencies"):
        logits = 2 * torch.randn(2, 3, 2, 4)
        actions = grpo.sample_actions(Categorical(logits=logits), 20_000)
    assert actions.shape == (2, 3, 20_000, 2)
    assert_close(F.one_hot(actions, 4).double().mean(2), logits.double().softmax(-1), 0.02)


def elements_adapter(outputs):
    """Logits [B, T, P * K] -> K-way choices of P elements."""
    return Categorical(logits=outputs.unflatten(-1, (-1, 4)))


@pytest.mark.parametrize("rewarded", ["action", "element", "both"])
def test_policies_over_elements(rewarded):
    """Actions of P elements: [B, T, A, P]; log_prob, advantages and the loss's gradient equal slow loops, with rewards
    per action, per element, and one of each."""
    B, T, A, P = 3, 2, 3, 5
    model, batch = make_model(num_classes=4 * P), make_batch(B)
    rewards = {
        "action": (lambda actions, *_: actions.double().mean(-1), 0.5),
        "element": (lambda actions, outputs, targets, _: (actions == targets[:, None, None, None]).float(), 2.0),
    }
    rewards = rewards if rewarded == "both" else {rewarded: rewards[rewarded]}
    options = {"num_mc_samples": T, "actions_per_sample": A, "advantage": "rloo"}
    episode = grpo.rollout(model, batch, rewards, elements_adapter, **options)
    assert episode.actions.shape == episode.log_probs.shape == (B, T, A, P)
    assert episode.rewards.shape == episode.advantages.shape == ((B, T, A) if rewarded == "action" else (B, T, A, P))

    log_softmax = model(batch.inputs, episode.masks).view(B, T, P, 4).log_softmax(-1)
    loss = 0.0
    for b, p in itertools.product(range(B), range(P)):
        earned = []
        for t, a in itertools.product(range(T), range(A)):
            action = episode.actions[b, t, a]
            assert_close(episode.log_probs[b, t, a, p], log_softmax[b, t, p, action[p]].item(), 1e-12)
            parts = {"action": 0.5 * action.double().mean().item(), "element": 2.0 * (action[p] == b % 3).item()}
            earned.append(sum(parts[name] for name in rewards))
        advantages = slow_advantages(earned, "rloo")
        for (t, a), expected in zip(itertools.product(range(T), range(A)), advantages):
            advantage = episode.advantages[b, t, a] if rewarded == "action" else episode.advantages[b, t, a, p]
            assert_close(advantage, expected, 1e-6)  # `mean` and 0/1 are float64 or exact; weights are
            loss = loss - expected * log_softmax[b, t, p, episode.actions[b, t, a, p]] / (B * T * A * P)
    expected = gradient_of(model, loss)
    assert expected.norm() > 0.01
    assert_close(update(model, [episode], adapter=elements_adapter)[0], expected)
    stored = grpo.rollout(model, batch, rewards, elements_adapter, keep_graph=False, **options)
    assert_close(update(model, [stored], adapter=elements_adapter, pad_to=4, micro_batch_size=2)[0], expected)


def test_several_rewards_are_weighted_summed_and_each_reported():
    """rewards = sum of weight * term; `reward_terms` and the metrics hold each term before its weight."""
    model, batch = make_model(), make_batch(6)
    rewards = {"correct": (correct, 0.75), "graded": (graded, -2.0), "ints": (lambda actions, *_: actions, 3)}
    episode = grpo.rollout(model, batch, rewards, classification_policy_adapter, num_mc_samples=2, actions_per_sample=3)
    terms = {
        "correct": (episode.actions == batch.targets[:, None, None]).double(),
        "graded": torch.arange(6.0, dtype=torch.float64).view(2, 3).expand(6, 2, 3),
        "ints": episode.actions.double(),
    }
    assert all(episode.metadata["reward_terms"][name].equal(term) for name, term in terms.items())
    assert_close(episode.rewards, 0.75 * terms["correct"] - 2 * terms["graded"] + 3 * terms["ints"], 1e-12)
    metrics = update(model, [replace(episode, advantages=torch.randn(6, 2, 3))])[1]
    for name, term in terms.items():
        assert_close(metrics[f"reward/{name}"], term.mean().item(), 1e-12)
    assert_close(metrics["reward/mean"], episode.rewards.mean().item(), 1e-12)
    assert_close(metrics["reward/std"], episode.rewards.flatten(1).std(1, correction=0).mean().item(), 1e-12)
    assert_close(metrics["reward/min"], episode.rewards.min().item(), 0)
    assert_close(metrics["group_rewards"], episode.rewards.flatten(1).mean(1), 1e-12)


@pytest.mark.parametrize(
    "returned, named",
    [
        (lambda actions: actions[:, 0].float(), "[4, 3]"),
        (lambda actions: actions.float().unsqueeze(-1), "[4, 2, 3, 1]"),
        (lambda actions: actions.float().transpose(1, 2), "[4, 3, 2]"),
        (lambda actions: actions.float().mean(), "[]"),
        (lambda actions: actions.tolist(), "list"),
        (lambda actions: None, "NoneType"),
    ],
)
def test_a_reward_of_another_shape_or_type_is_refused(returned, named):
    """ValueError with the reward's name, what it returned and what was expected."""
    rewards = {"mine": (lambda actions, *_: returned(actions), 1.0)}
    options = {"num_mc_samples": 2, "actions_per_sample": 3}
    with pytest.raises(ValueError) as error:
        grpo.rollout(make_model(), make_batch(4), rewards, classification_policy_adapter, **options)
    assert "mine" in str(error.value) and named in str(error.value) and "[4, 2, 3]" in str(error.value)


# --- Loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_element", [False, True])
def test_clipped_loss_is_the_scalar_one(per_element):
    """Over signs of the advantage and ratios in and outside the clip: value, ratio, flag and gradient of a scalar loop.
    The gradient is 0 where the clip is active and -ratio * advantage elsewhere."""
    low, high = 0.2, 0.28
    advantages = torch.tensor([-2.0, -0.3, 0.0, 0.7, 3.0], dtype=torch.float64)
    ratios = torch.tensor([0.1, 0.79, 0.81, 1.0, 1.27, 1.29, 4.0], dtype=torch.float64)
    old = -torch.rand(5, 1, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    new = (old + ratios.log()).requires_grad_()
    given_advantages = advantages.view(5, 1, 1, 1).expand(5, 1, 1, 7) if per_element else advantages.view(5, 1, 1)
    loss, ratio, clipped = grpo.clipped_loss(new, old, given_advantages, low, high)
    assert loss.shape == ratio.shape == clipped.shape == (5, 1, 1, 7)
    loss.sum().backward()
    seen = 0
    for i, advantage in enumerate(advantages.tolist()):
        for j, r in enumerate(ratios.tolist()):
            if advantage > 0 and r > 1 + high:
                expected, slope = -(1 + high) * advantage, 0.0
            elif advantage < 0 and r < 1 - low:
                expected, slope = -(1 - low) * advantage, 0.0
            else:
                expected, slope = -r * advantage, -r * advantage
            active = advantage != 0 and slope == 0
            seen += active
            assert_close(loss[i, 0, 0, j], expected, 1e-12)
            assert_close(ratio[i, 0, 0, j], r, 1e-12)
            assert bool(clipped[i, 0, 0, j]) == active
            assert new.grad[i, 0, 0, j] == 0 if active else abs(new.grad[i, 0, 0, j] - slope) < 1e-12
    assert seen == 2 * 2 + 2 * 2


def test_ratio_is_one_under_the_rollouts_masks_and_not_under_others():
    """Before the first step: exactly 1 in one pass, 1 to rounding in a replay; under fresh masks off by far."""
    model, batch = make_model(), make_batch(8)
    kept, stored = (roll(model, batch, graded, keep_graph=graph) for graph in (True, False))
    assert update(model, [kept])[1]["policy/ratio"] == 1
    assert_close(update(model, [stored], micro_batch_size=3)[1]["policy/ratio"], 1.0, 1e-14)
    with keyed_rng("fresh"):
        fresh = replace(stored, masks=model.sample_masks(8, 2))
    metrics = update(model, [fresh])[1]
    assert abs(metrics["policy/ratio"] - 1) > 0.01 and metrics["policy/clip_fraction"] > 0.1


@pytest.mark.parametrize("keep_graph", [True, False])
def test_every_ratio_of_the_first_epoch_is_one(keep_graph, monkeypatch):
    """Of two update epochs the first sees nothing but ratios 1, element by element, the second does not."""
    ratios, original = [], grpo.clipped_loss

    def spy(*arguments):
        result = original(*arguments)
        ratios.append(result[1].detach())
        return result

    monkeypatch.setattr(grpo, "clipped_loss", spy)
    model = make_model()
    update(model, [roll(model, make_batch(8), graded, keep_graph=keep_graph)], lr=0.1, update_epochs=2)
    first, second = ratios
    assert_close(first, torch.ones(8, 2, 2), 0 if keep_graph else 1e-14)
    assert (second - 1).abs().median() > 1e-3


# --- Micro-batches, replay, dead groups -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.3, "entropy_coef": 0.2}, {"objective": "supervised"}])
def test_gradients_of_micro_batches_are_the_batchs(options):
    """For given masks and actions, uneven parts accumulate the whole batch's gradient and the same metrics."""
    model, batch = make_model(), make_batch(9)
    reference = make_model(depth=1) if "kl_coef" in options else None
    whole = roll(model, batch, T=2, A=3)
    stored = whole.detach()
    expected, metrics = update(model, [whole], reference=reference, **options)
    assert expected.norm() > 0.01 and 0 < metrics["groups/live"] < 1
    parts = (with_graph(model, stored[part]) for part in (slice(0, 4), slice(4, 5), slice(5, 9)))
    gradient, part_metrics = update(model, parts, reference=reference, **options)
    assert_close(gradient, expected, 1e-12)
    assert part_metrics.keys() == metrics.keys() - {"reward/r"}
    for name in part_metrics:
        assert_close(part_metrics[name], metrics[name], 1e-12)


@pytest.mark.parametrize("pad_to, micro_batch_size", [(1, 8), (1, 3), (4, 8), (4, 3), (5, 2), (64, 64)])
@pytest.mark.parametrize("update_epochs", [1, 2])
def test_replaying_live_groups_gives_the_gradient_of_one_pass(pad_to, micro_batch_size, update_epochs):
    """keep_graph=False, live images only, padded or not, in micro-batches of any size, from two rollouts: the same
    gradient (of the last epoch) and loss as one pass over everything, with denominators that count the dead."""
    batch = make_batch(12)
    results = []
    for keep_graph in (True, False):
        model = make_model()
        episodes = [roll(model, batch[s], key=(0, 0, s.start), keep_graph=keep_graph) for s in (slice(7), slice(7, 12))]
        options = {"pad_to": 1, "micro_batch_size": 12} if keep_graph else {}
        options = {"pad_to": pad_to, "micro_batch_size": micro_batch_size, "update_epochs": update_epochs} | options
        results.append(update(model, episodes, lr=0.1, **options))
    (expected, metrics), (gradient, replayed) = results
    live = metrics["groups/live"]
    assert expected.norm() > 0.01 and 0 < live < 1 and live == replayed["groups/live"]
    assert_close(gradient, expected)
    for name in ("loss", "grad_norm", "reward/mean", "group_rewards"):
        assert_close(replayed[name], metrics[name])


@pytest.mark.parametrize("keep_graph", [True, False])
def test_the_gradient_counts_all_images(keep_graph):
    """It is that of -(advantage * log_prob) summed and divided by B * T * A, dead groups among the B."""
    model, batch = make_model(), make_batch(12)
    episode = roll(model, batch, keep_graph=keep_graph)
    assert 0 < grpo.live_groups(episode.advantages).sum() < 12
    log_probs = model(batch.inputs, episode.masks).log_softmax(-1).gather(2, episode.actions)
    expected = gradient_of(model, -(episode.advantages * log_probs).sum() / (12 * 2 * 2))
    gradient, metrics = update(model, [episode])
    assert_close(gradient, expected, 1e-12)
    assert_close(metrics["grad_norm"], expected.norm(), 1e-12)
    assert_close(metrics["loss"], -episode.advantages.mean().item(), 1e-12)  # ratio 1


@pytest.mark.parametrize("pad_to, forwarded", [(1, 0), (4, 3)])
def test_a_replay_forwards_no_dead_image(pad_to, forwarded):
    """The model sees the live images only, in order, the last one repeated up to a multiple of pad_to."""
    model, batch = make_model(), make_batch(12)
    episode = roll(model, batch, keep_graph=False)
    live, seen = [1, 2, 5, 8, 10], []
    episode.advantages.zero_()[live, 1, 0] = 1.0
    hook = model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    update(model, [episode], pad_to=pad_to, micro_batch_size=3)
    hook.remove()
    expected = live + [live[-1]] * forwarded
    assert [len(images) for images in seen] == [len(expected[i : i + 3]) for i in range(0, len(expected), 3)]
    assert torch.cat(seen).equal(batch.inputs[expected])


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("update_epochs", [1, 2])
def test_a_batch_without_a_live_group_has_zero_gradients(keep_graph, update_epochs):
    """Zero, not none (`update` looks), so that all ranks step alike; nothing is NaN, and weights do not move."""
    model = make_model()
    before = flat(model.parameters())
    episodes = [roll(model, make_batch(3), constant, keep_graph=keep_graph, key=(0, 0, i)) for i in range(2)]
    gradient, metrics = update(model, episodes, lr=1.0, update_epochs=update_epochs)
    assert (gradient == 0).all() and flat(model.parameters()).equal(before)
    assert (metrics["groups/live"], metrics["loss"], metrics["grad_norm"]) == (0, 0, 0)
    assert metrics["policy/ratio"] == 1 and all(value.isfinite().all() for value in metrics.values())


# --- KL, entropy, epochs, supervised --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_graph", [True, False])
def test_kl_is_exact_and_under_the_same_masks(keep_graph):
    """policy/kl is the mean over images and passes of sum p (log p - log q), its gradient kl_coef times that, even if
    every group is dead; the reference gets no gradient."""
    model, batch = make_model(), make_batch(5)
    reference = copy.deepcopy(model)
    with keyed_rng("reference"), torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    episode = roll(model, batch, constant, keep_graph=keep_graph)
    log_p = model(batch.inputs, episode.masks).log_softmax(-1)
    log_q = reference(batch.inputs, episode.masks).detach().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert kl > 1e-3
    expected = gradient_of(model, 0.7 * kl)
    gradient, metrics = update(model, [episode], kl_coef=0.7, reference=reference, micro_batch_size=2)
    assert_close(metrics["policy/kl"], kl.item(), 1e-12)
    assert_close(metrics["loss"], 0.7 * kl.item(), 1e-12)
    assert_close(gradient, expected, 1e-12)
    assert all(p.grad is None for p in reference.parameters())


def test_kl_to_itself_is_zero():
    """A reference with the policy's weights: KL and gradient 0 (another one under other masks would not do this)."""
    model = make_model()
    episode = roll(model, make_batch(5), constant)
    gradient, metrics = update(model, [episode], kl_coef=1.0, reference=copy.deepcopy(model))
    assert abs(metrics["policy/kl"]) < 1e-15 and gradient.norm() < 1e-14


@pytest.mark.parametrize("keep_graph", [True, False])
def test_entropy_bonus(keep_graph):
    """Its gradient is that of -entropy_coef * mean entropy, dead groups included; the metric is the mean entropy."""
    model, batch = make_model(), make_batch(5)
    episode = roll(model, batch, constant, keep_graph=keep_graph)
    log_p = model(batch.inputs, episode.masks).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    expected = gradient_of(model, -0.3 * entropy)
    gradient, metrics = update(model, [episode], entropy_coef=0.3, micro_batch_size=2)
    assert_close(metrics["policy/entropy"], entropy.item(), 1e-12)
    assert_close(metrics["loss"], -0.3 * entropy.item(), 1e-12)
    assert expected.norm() > 1e-3
    assert_close(gradient, expected, 1e-12)


@pytest.mark.parametrize("keep_graph", [True, False])
def test_three_epochs_are_three_steps_on_the_rollouts_log_probs(keep_graph):
    """Weights and metrics equal a hand-written PPO loop with KL whose old log_probs are the rollout's."""
    model, batch = make_model(), make_batch(6)
    mine, reference = copy.deepcopy(model), copy.deepcopy(model)
    episode = roll(model, batch, graded, advantage="grpo", keep_graph=keep_graph)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=0.02)
    old, losses, ratios, clipped, norms = episode.log_probs.detach().clone(), [], [], [], []
    for _ in range(3):
        log_p = mine(batch.inputs, episode.masks).log_softmax(-1)
        log_q = reference(batch.inputs, episode.masks).detach().log_softmax(-1)
        ratio = (log_p.gather(2, episode.actions) - old).exp()
        bounded = torch.where(ratio > 1.28, 1.28, torch.where(ratio < 0.8, 0.8, ratio))
        gain = torch.minimum(ratio * episode.advantages, bounded * episode.advantages)
        loss = 0.1 * (log_p.exp() * (log_p - log_q)).sum(-1).mean() - gain.mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.5).item())
        optimizer.step()
        losses.append(loss.item())
        ratios.append(ratio.mean().item())
        clipped.append((gain < ratio * episode.advantages).double().mean().item())
    options = {"update_epochs": 3, "kl_coef": 0.1, "reference": reference, "max_grad_norm": 0.5}
    steps = torch.optim.AdamW(model.parameters(), lr=0.02)
    _, metrics = update(model, [episode], optimizer=steps, micro_batch_size=4, **options)
    assert clipped[0] == 0 and min(clipped[1:]) > 0 and max(norms) > 0.5
    assert_close(flat(model.parameters()), flat(mine.parameters()))
    assert_close(metrics["loss"], sum(losses) / 3)
    assert_close(metrics["policy/ratio"], sum(ratios) / 3)
    assert_close(metrics["policy/clip_fraction"], sum(clipped) / 3)
    assert_close(metrics["grad_norm"], norms[-1])


@pytest.mark.parametrize("keep_graph", [True, False])
def test_supervised_is_cross_entropy_over_the_passes(keep_graph):
    """Loss and gradient are those of F.cross_entropy on every pass's logits under the same masks."""
    model, batch = make_model(), make_batch(7)
    episode = roll(model, batch, constant, T=3, A=4, keep_graph=keep_graph)
    logits = model(batch.inputs, episode.masks)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.repeat_interleave(3))
    exact = gradient_of(model, expected)
    gradient, metrics = update(model, [episode], objective="supervised", micro_batch_size=3)
    assert_close(metrics["loss"], expected.item(), 1e-12)
    assert_close(gradient, exact, 1e-12)


def test_supervised_with_elements():
    """Targets [B, P] are an action of each pass: cross-entropy over images, passes and elements."""
    model, batch = make_model(num_classes=12), make_batch(4)
    batch = replace(batch, targets=torch.tensor([[0, 1, 2], [3, 3, 0], [1, 0, 3], [2, 2, 1]]))
    episode = roll(model, batch, graded, T=2, A=2, adapter=elements_adapter)
    logits = model(batch.inputs, episode.masks).view(4, 2, 3, 4)
    expected = F.cross_entropy(logits.flatten(0, 2), batch.targets[:, None].expand(4, 2, 3).flatten())
    exact = gradient_of(model, expected)
    gradient, metrics = update(model, [episode], objective="supervised", adapter=elements_adapter)
    assert_close(metrics["loss"], expected.item(), 1e-12)
    assert_close(gradient, exact, 1e-12)


# --- Optimizer step -------------------------------------------------------------------------------------------------


def make_parameters() -> list[torch.nn.Parameter]:
    with keyed_rng("parameters"):
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]
        for p in parameters:
            p.grad = torch.randn(p.shape)
    return parameters


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_bad_step_of_a_fused_optimizer_changes_nothing_and_stays_bad(loss, gradient):
    """Weights and Adam's moments are bit for bit as before, and after good steps that follow too."""
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True)
    start = flat(parameters)
    grpo.optimizer_step(optimizer, 1.0, torch.tensor(0.5))
    before = flat(parameters)
    assert (before - start).abs().min() > 1e-3
    moments = [flat([optimizer.state[p][name] for p in parameters]) for name in ("exp_avg", "exp_avg_sq", "step")]

    parameters[1].grad[2] = gradient
    norm = grpo.optimizer_step(optimizer, 1.0, torch.tensor(loss))
    assert norm.isfinite() == math.isfinite(gradient)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        grpo.optimizer_step(optimizer, 1.0, torch.tensor(0.5))
    assert flat(parameters).equal(before)
    for name, moment in zip(("exp_avg", "exp_avg_sq", "step"), moments):
        assert flat([optimizer.state[p][name] for p in parameters]).equal(moment), name


@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_bad_step_of_another_optimizer_raises(loss, gradient):
    """FloatingPointError, and the weights were not touched."""
    parameters = make_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    before = flat(parameters)
    parameters[0].grad[1, 1] = gradient
    with pytest.raises(FloatingPointError, match="nan|inf"):
        grpo.optimizer_step(optimizer, 1.0, torch.tensor(loss))
    assert flat(parameters).equal(before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("keep_graph", [True, False])
def test_negative_rewards_under_maxrl_do_not_touch_the_weights(fused, keep_graph):
    """maxrl's NaN reaches the step, which is refused: on the device with a fused optimizer, by an error without."""
    model = make_model(torch.float32)
    before = flat(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    episode = roll(model, make_batch(4, torch.float32), lambda *a: correct(*a) - 0.5, keep_graph=keep_graph)
    if fused:
        assert not update(model, [episode], optimizer=optimizer)[1]["loss"].isfinite()
    else:
        with pytest.raises(FloatingPointError):
            update(model, [episode], optimizer=optimizer)
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


# --- Cost -----------------------------------------------------------------------------------------------------------


def training_step(B: int, T: int, A: int, keep_graph: bool) -> dict[str, torch.Tensor]:
    model, batch = make_model(torch.float32), make_batch(B, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step():
        return update(model, [roll(model, batch, graded, T=T, A=A, keep_graph=keep_graph)], optimizer=optimizer)

    return step


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
def test_a_step_reads_no_scalar_from_the_device(keep_graph, searches, monkeypatch):
    """One pass with a fused optimizer: no number comes back to the host. A replay brings to the host which groups
    live, and there sums once and searches once per episode."""
    monkeypatch.setattr(Distribution, "_validate_args", False)
    counts = count_ops(4, 2, 2, keep_graph)
    assert counts["_fused_adamw_"] == 1  # the counter did look
    assert counts["_local_scalar_dense"] == counts["nonzero"] == searches
    assert counts["item"] == counts["is_nonzero"] == counts["equal"] == counts["masked_select"] == 0


@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_step_costs_as_many_operators_whatever_the_sizes(keep_graph, monkeypatch):
    """No loop over images, passes or actions: as many aten operators for B, T, A = 4, 2, 2 as for 16, 4, 8."""
    monkeypatch.setattr(Distribution, "_validate_args", False)
    few, many = count_ops(4, 2, 2, keep_graph), count_ops(16, 4, 8, keep_graph)
    assert few == many and few.total() > 300


# --- Elements that count ----------------------------------------------------------------------------------------------


def patch_adapter(outputs):
    """Three elements of two classes each from six logits: batch shape [B, T, 3]."""
    return Categorical(logits=outputs.unflatten(-1, (3, 2)))


COUNTED = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)


def element_batch(counted=COUNTED) -> TensorMiniBatch:
    batch = make_batch(len(counted))
    return replace(batch, targets=torch.arange(3 * len(counted)).view(-1, 3) % 2, counted=counted)


def right_or_nan(actions, outputs, targets, metadata):
    """Right or wrong per element, and NaN where nothing counts: that must not be looked at."""
    reward = (actions == targets[:, None, None]).double()
    return torch.where(metadata["counted"][:, None, None], reward, torch.nan)


def any_score(actions, outputs, targets, metadata):
    """One score per action."""
    return (actions * torch.tensor([4, 2, 1])).sum(-1).double()


def element_update(model, episodes, counted=COUNTED, **options):
    options = {"num_counted": counted.sum(), "adapter": patch_adapter} | options
    return update(model, episodes, batch_size=len(counted), **options)


@pytest.mark.parametrize("reward", [right_or_nan, any_score])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_counted_elements_are_in_advantage_and_gradient(reward, estimator):
    """The gradient of Σ -log π(a)·adv over the counted elements, ÷ their number and T·A; nothing leaks from others."""
    model, batch = make_model(num_classes=6), element_batch()
    episode = roll(model, batch, reward, adapter=patch_adapter, advantage=estimator, A=4)
    assert episode.rewards.isfinite().all() and episode.advantages.isfinite().all()
    expected = 0.0
    policy = patch_adapter(model(batch.inputs, episode.masks))
    log_probs = action_log_prob(policy, episode.actions)
    for i, e in COUNTED.nonzero().tolist():
        raw = reward(episode.actions, None, batch.targets, {"counted": COUNTED})[i]
        raw = raw[..., e] if raw.ndim == 3 else raw
        advantages = torch.tensor(slow_advantages(raw.flatten().tolist(), estimator)).view(2, 4)
        expected = expected - (advantages * log_probs[i, ..., e]).mean()
    exact = gradient_of(model, expected / COUNTED.sum())
    gradient, metrics = element_update(model, [episode])
    assert_close(gradient, exact, 1e-6)
    assert gradient.abs().max() > 1e-4
    live = [bool((episode.advantages[i] != 0).any()) for i in range(4)]
    assert float(metrics["groups/live"]) == sum(live) / 4


def test_metrics_are_means_over_what_counts():
    model, batch = make_model(num_classes=6), element_batch()
    episode = roll(model, batch, right_or_nan, adapter=patch_adapter)
    _, metrics = element_update(model, [episode])
    right = (episode.actions == batch.targets[:, None, None]).double().mean((1, 2))  # [B, E]
    by_image = [right[i][COUNTED[i]].mean() if COUNTED[i].any() else torch.tensor(0.0) for i in range(4)]
    assert_close(metrics["group_rewards"], torch.stack(by_image).double())
    assert_close(metrics["reward/mean"], torch.stack(by_image).mean())
    assert_close(metrics["reward/r"], metrics["reward/mean"])
    entropy = patch_adapter(model(batch.inputs, episode.masks)).entropy().mean(1)
    by_image = [entropy[i][COUNTED[i]].mean() if COUNTED[i].any() else torch.tensor(0.0) for i in range(4)]
    assert_close(metrics["policy/entropy"], torch.stack(by_image).mean())
    assert float(metrics["policy/ratio"]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"objective": "supervised"}, {"entropy_coef": 0.3}, {"kl_coef": 0.7}, {"update_epochs": 2}]
)
def test_with_elements_too_micro_batches_and_replays_give_the_batchs_gradient(options, keep_graph):
    """However many elements of each micro-batch count, and where none does."""
    model, batch, gradients = make_model(num_classes=6), element_batch(), []
    options = options | ({"reference": make_model(num_classes=6, depth=1)} if "kl_coef" in options else {})
    whole = roll(model, batch, right_or_nan, adapter=patch_adapter, A=4)
    for size in (4, 2, 1):
        graph = replace(whole, policy=None, log_probs=whole.log_probs.detach(), metadata={"targets": batch.targets})
        parts = [graph[start : start + size] for start in range(0, 4, size)]
        episodes = []
        for part in parts:
            policy = patch_adapter(model(part.inputs, part.masks))
            log_probs = action_log_prob(policy, part.actions)
            metadata = {"targets": part.metadata["targets"], "reward_terms": {}, "entropy": policy.entropy()}
            log_probs = log_probs if keep_graph else log_probs.detach()
            episodes.append(replace(part, policy=policy, log_probs=log_probs, metadata=metadata))
        gradient, metrics = element_update(model, episodes, micro_batch_size=size, **options)
        gradients.append((gradient, metrics["loss"]))
    for gradient, loss in gradients[1:]:
        assert_close(gradient, gradients[0][0], 1e-9)
        assert_close(loss, gradients[0][1], 1e-9)
    assert gradients[0][0].abs().max() > 1e-4


def test_nothing_counts_at_all():
    counted = torch.zeros_like(COUNTED)
    model = make_model(num_classes=6)
    episode = roll(model, element_batch(counted), right_or_nan, adapter=patch_adapter)
    gradient, metrics = element_update(model, [episode], counted)
    assert not gradient.any() and float(metrics["loss"]) == 0 and float(metrics["groups/live"]) == 0


def test_supervised_and_entropy_leave_out_what_does_not_count():
    model, batch = make_model(num_classes=6), element_batch()
    episode = roll(model, batch, right_or_nan, adapter=patch_adapter)
    logits = model(batch.inputs, episode.masks).unflatten(-1, (3, 2))
    targets = batch.targets[:, None].expand(4, 2, 3)
    each = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(4, 2, 3).mean(1)
    exact = gradient_of(model, each[COUNTED].mean())
    assert_close(element_update(model, [episode], objective="supervised")[0], exact, 1e-8)
    episode = roll(model, batch, lambda actions, *_: torch.ones(actions.shape), adapter=patch_adapter)
    entropy = patch_adapter(model(batch.inputs, episode.masks)).entropy().mean(1)
    exact = gradient_of(model, -0.5 * entropy[COUNTED].mean())
    assert_close(element_update(model, [episode], entropy_coef=0.5)[0], exact, 1e-8)


def test_another_supervised_loss():
    model, batch = make_model(num_classes=6), element_batch()
    episode = roll(model, batch, right_or_nan, adapter=patch_adapter)

    def squares(policy, targets):  # [B, T, 1, E]
        return (policy.logits[..., 1].unsqueeze(2) - targets) ** 2

    logits = patch_adapter(model(batch.inputs, episode.masks)).logits[..., 1]
    each = ((logits - batch.targets[:, None]) ** 2).mean(1)
    exact = gradient_of(model, each[COUNTED].mean())
    gradient, _ = element_update(model, [episode], objective="supervised", supervised_loss=squares)
    assert_close(gradient, exact, 1e-8)


# --- Finished advantages ----------------------------------------------------------------------------------------------


def credit(actions, outputs, targets, metadata):
    """Finished advantages per element; the score behind them is one per action."""
    advantages = torch.linspace(-1, 2, actions.numel(), dtype=torch.float64).view(actions.shape)
    return Credit(advantages, advantages.mean(-1))


@pytest.mark.parametrize("A", [1, 3])
def test_finished_advantages_pass_through(A):
    """No estimator touches them, not even in a group of one; weights scale them; what does not count is 0."""
    model, batch = make_model(num_classes=6), element_batch()
    options = {"num_mc_samples": 1, "actions_per_sample": A, "key": (3, 1, 0)}
    episode = grpo.rollout(model, batch, {"c": (credit, 0.5)}, patch_adapter, **options)
    expected = 0.5 * credit(episode.actions, None, None, None).advantages * COUNTED[:, None, None]
    assert torch.equal(episode.advantages, expected)
    assert torch.equal(episode.rewards, 0.5 * credit(episode.actions, None, None, None).rewards)
    log_probs = action_log_prob(patch_adapter(model(batch.inputs, episode.masks)), episode.actions)
    exact = gradient_of(model, -(expected * log_probs).sum() / (A * COUNTED.sum()))
    gradient, metrics = element_update(model, [episode])
    assert_close(gradient, exact, 1e-8)
    assert float(metrics["groups/live"]) == float((expected != 0).flatten(1).any(1).double().mean())


def test_finished_advantages_are_added_to_those_of_other_rewards():
    model, batch = make_model(num_classes=6), element_batch()
    rewards = {"score": (any_score, 2.0), "c": (credit, 0.5)}
    episode = grpo.rollout(model, batch, rewards, patch_adapter, num_mc_samples=2, actions_per_sample=3)
    plain = compute_advantages(2.0 * any_score(episode.actions, None, None, None), "maxrl")
    finished = 0.5 * credit(episode.actions, None, None, None).advantages * COUNTED[:, None, None]
    assert_close(episode.advantages, plain[..., None] + finished)
    assert set(episode.metadata["reward_terms"]) == {"score", "c"}


def test_a_group_of_one_needs_finished_advantages():
    model, batch = make_model(num_classes=6), element_batch()
    with pytest.raises(ValueError, match="rollout.actions_per_sample: a group needs two actions"):
        roll(model, batch, any_score, T=1, A=1, adapter=patch_adapter)


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 2, 2)])
def test_finished_advantages_of_another_shape_are_refused(shape):
    def wrong(actions, outputs, targets, metadata):
        return Credit(torch.zeros(shape), torch.zeros(4, 2, 2))

    with pytest.raises(ValueError, match=r"rollout.reward: r returned a tensor of shape"):
        roll(make_model(num_classes=6), element_batch(), wrong, adapter=patch_adapter)
