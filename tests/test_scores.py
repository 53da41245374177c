"""Scores of the confusion matrix against scikit-learn, brute force over single changes, autograd and slow loops."""

from types import SimpleNamespace

import pytest
import torch
from conftest import load_script, message
from sklearn import metrics
from torch.distributions import Bernoulli

import grpo
import scores
from data_types import TensorMiniBatch
from detection_task import box_policy_adapter
from segmentation_task import mask_policy_adapter
from vision_task import Task

tag_f1 = load_script("examples/multilabel_task.py").macro_f1


def draw(num_classes: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Truth and prediction of n elements, unevenly many a class, two thirds right."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.multinomial(torch.arange(1.0, num_classes + 1), n, replacement=True, generator=g)
    other = torch.randint(num_classes, (n,), generator=g)
    return truth, torch.where(torch.rand(n, generator=g) < 0.66, truth, other)


def count(truth, predicted, num_classes: int) -> torch.Tensor:
    return torch.bincount(truth * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1).double()


@pytest.mark.parametrize("num_classes, absent", [(2, False), (5, False), (5, True)])
def test_ready_scores_equal_scikit_learn(num_classes, absent):
    """Also where a class is neither in the truth nor predicted."""
    truth, predicted = draw(num_classes - absent, 300)
    confusion = count(truth, predicted, num_classes)
    recalls = metrics.recall_score(truth, predicted, average=None)
    expected = {
        "macro_f1": metrics.f1_score(truth, predicted, average="macro"),
        "dice": metrics.f1_score(truth, predicted, average="macro"),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, predicted),
        "g_mean": recalls.prod() ** (1 / len(recalls)),
        "quadratic_kappa": metrics.cohen_kappa_score(truth, predicted, weights="quadratic"),
        "mcc": metrics.matthews_corrcoef(truth, predicted),
        "mean_iou": metrics.jaccard_score(truth, predicted, average="macro"),
    }
    assert {name: float(score(confusion)) for name, score in scores.READY.items()} == pytest.approx(expected)
    both = torch.stack([confusion, confusion.T])
    for score in scores.READY.values():
        assert torch.allclose(score(both), torch.stack([score(matrix) for matrix in both]))


def tags_of(confusion: torch.Tensor) -> torch.Tensor:
    """Three tags with counts of their own."""
    return torch.stack([confusion, confusion.flip(0, 1), confusion.T])


@pytest.mark.parametrize("name", [*scores.READY, "tag_f1"])
def test_the_gradient_prices_every_single_change(name):
    """Of an element of truth y from a to k, against the score of the changed counts; the relative error falls as
    1 / n."""
    score, K = scores.READY.get(name, tag_f1), 2 if name == "tag_f1" else 4
    errors = []
    for n in (60, 600, 6000):
        confusion = count(*draw(K, 600), K) * (n / 600) + n / 600  # the same shares
        confusion = tags_of(confusion) if name == "tag_f1" else confusion
        value, slope = scores.gradient(score, confusion)
        worst = 0.0
        for *tag, y, a in confusion.nonzero().tolist():
            for k in set(range(K)) - {a}:
                changed = confusion.clone()
                changed[(*tag, y, a)] -= 1
                changed[(*tag, y, k)] += 1
                exact, priced = score(changed) - value, slope[(*tag, y, k)] - slope[(*tag, y, a)]
                worst = max(worst, float((priced - exact).abs()))
        errors.append(worst / float(slope.abs().max()))
    assert errors[0] < 0.4 and errors[1] == pytest.approx(errors[0] / 10, rel=0.5)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.2)


class Pixels(Task):
    def policy(self, outputs, progress=1.0):
        return mask_policy_adapter(outputs)


class Tags(Task):
    def policy(self, outputs, progress=1.0):
        return Bernoulli(logits=outputs)


def mean_gain(confusion):
    """Of a price list that is not symmetric, as the gradients of the ready scores are: truth and choice cannot swap."""
    prices = torch.tensor([[1.0, 0.2, 0.0], [0.7, 1.0, 0.4], [0.0, 0.9, 1.0]], dtype=confusion.dtype)
    return (prices * confusion).sum((-2, -1)) / confusion.sum((-2, -1))


CASES = {  # task, score, shape of the targets of one image, whether the data set has them
    "classes": (Task({}), scores.macro_f1, (), True),
    "prices": (Task({}), mean_gain, (), True),
    "pixels": (Pixels({}), scores.mean_iou, (2, 3), False),
    "tags": (Tags({}), tag_f1, (3,), True),
}


def problem(kind: str, B: int = 12, T: int = 2):
    """A score as a reward, a data set of B images of three classes (two for a tag), and logits [B, T, …]."""
    task, score, elements, known = CASES[kind]
    g, K = torch.Generator().manual_seed(0), 2 if kind == "tags" else 3
    targets = torch.randint(K, (B, *elements), generator=g)
    targets[0] = 0  # so that each class is there
    targets[1:3] = torch.arange(1, 3).view(2, *[1] * len(elements)).clamp(max=K - 1)
    outputs = torch.randn(B, T, *elements, *([] if kind == "tags" else [K]), generator=g, dtype=torch.float64)
    dataset = [None] * B if not known else type("Set", (list,), {"targets": targets})([None] * B)
    reward = scores.ConfusionScore("mine", score, task)
    assert scores.open_scores({"mine": (reward, 1.0), "other": (len, 1.0)}, dataset, {}) == [reward]
    counted = torch.rand(B, *elements, generator=g) < 0.8 if kind == "pixels" else None
    if counted is not None:
        counted[:3] = True
    targets = targets.double() if kind == "tags" else targets
    return task, reward, TensorMiniBatch(torch.zeros(B, 1), targets, {}, counted), outputs.requires_grad_()


def soft_confusion(kind, task, batch, outputs) -> torch.Tensor:
    """By slow loops: the mean over passes of the probabilities of each counted element, in the row of its truth."""
    probs, K = task.probabilities(outputs).mean(1), 2 if kind == "tags" else 3
    lead = batch.targets.shape[1:] if kind == "tags" else ()
    rows = {}
    for place in torch.cartesian_prod(*map(torch.arange, batch.targets.shape)).view(-1, batch.targets.ndim).tolist():
        if batch.counted is None or batch.counted[tuple(place)]:
            key = (*(place[1:] if lead else ()), int(batch.targets[tuple(place)]))
            rows[key] = rows.get(key, 0) + probs[tuple(place)]
    everywhere = (
        [(*tag, y) for tag in ([i] for i in range(*lead)) for y in range(K)] if lead else [(y,) for y in range(K)]
    )
    return torch.stack([rows[key] for key in everywhere]).view(*lead, K, K)


def roll(task, reward, batch, outputs, action="sample", weight=1.0) -> grpo.Episode:
    network = type("Net", (), {"sample_masks": lambda *_: {}, "__call__": lambda self, inputs, masks: outputs})()
    settings = grpo.RolloutSettings(outputs.shape[1], 2, action, "maxrl")
    task.config = {"rollout": {"action": action}}
    return grpo.rollout(network, batch, {"mine": (reward, weight)}, task.policy, settings)


@pytest.mark.parametrize("action", ["sample", "all", "argmax"])
@pytest.mark.parametrize("kind", CASES)
def test_the_loss_climbs_the_score_of_the_data_set(kind, action):
    """Where the running confusion is that of the whole data set, and the batch is the data set, the gradient is the
    score's own, whatever is drawn, and finished: no estimator touches it."""
    task, reward, batch, outputs = problem(kind)
    roll(task, reward, batch, outputs, action)
    confusion = soft_confusion(kind, task, batch, outputs)
    reward.state["rows"].copy_(confusion.detach() / confusion.detach().sum(-1, keepdim=True))
    reward.state["counts"].copy_(confusion.detach().sum(-1))
    reward.price()
    episode = roll(task, reward, batch, outputs, action)
    loss, _ = grpo.policy_loss(episode, episode.policy, episode.log_probs, grpo.UpdateSettings())
    gradient = torch.autograd.grad(loss, outputs, retain_graph=True)[0]
    exact = torch.autograd.grad(-reward.score(confusion), outputs)[0]
    assert exact.norm() > 0.01
    torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-12)
    metrics = grpo.rollout_metrics(episode)
    assert float(metrics["reward/mean"]) == pytest.approx(float(reward.score(confusion.detach())))


@pytest.mark.parametrize("kind", CASES)
def test_the_running_confusion_is_a_slow_loops(kind, monkeypatch):
    """Uniform at first, then row by row towards the step's mean over its own class; the same in micro-batches."""
    monkeypatch.setattr(scores, "WINDOW", 20)
    task, reward, batch, outputs = problem(kind)
    n, size, K = 12, 6 if kind == "pixels" else 1, 2 if kind == "tags" else 3
    order = torch.arange(12)
    rows = counts = None
    for step in range(3):
        taken = order[4 * step :] if step else order[:2]  # class 2 is not in the first
        for part in taken.split(3):
            some = TensorMiniBatch(batch.inputs[part], batch.targets[part], {}, batch.counted)
            some.counted = None if batch.counted is None else batch.counted[part]
            roll(task, reward, some, outputs[part])
            if rows is None:
                rows, counts = reward.state["rows"].clone(), reward.state["counts"].clone()
                assert (rows == 1 / K).all()
                if kind == "pixels":
                    assert (counts == n * size / K).all()
                else:
                    y = batch.targets.long()
                    assert torch.equal(counts.long(), torch.stack([(y == k).sum(0) for k in range(K)], -1))
        torch.testing.assert_close(reward.state["rows"], rows, rtol=1e-12, atol=1e-12)  # of earlier steps alone
        reward.update()
        probs, y = task.probabilities(outputs).detach().mean(1)[taken], batch.targets[taken].long()
        counted = torch.ones_like(y, dtype=torch.bool) if batch.counted is None else batch.counted[taken]
        old_counts = counts.clone()
        for key in [(j, k) for j in range(3) for k in range(K)] if kind == "tags" else [(k,) for k in range(K)]:
            chosen = counted & (y == key[-1]) if kind != "tags" else (y == key[-1]) & (torch.arange(3) == key[0])
            if m := int(chosen.sum()):
                share = min(1.0, m / min(20 * size, float(old_counts[key])))
                rows[key] += share * (probs[chosen].mean(0) - rows[key])
            if kind == "pixels":
                counts[key] += min(1.0, len(taken) / 12) * (m * n / len(taken) - counts[key])
        torch.testing.assert_close(reward.state["rows"], rows, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(reward.state["counts"], counts, rtol=1e-12, atol=1e-12)
    states = {}
    again = scores.ConfusionScore("mine", reward.score, task)
    scores.open_scores({"mine": (again, 1.0)}, [None] * 12, states)
    states["mine"] |= {key: tensor.clone() for key, tensor in reward.state.items()}
    roll(task, again, batch, outputs)
    assert torch.equal(again.prices, reward.prices) and again.state is states["mine"]


@pytest.mark.parametrize(
    "score, expected",
    [
        (
            lambda c: c.diagonal(dim1=-2, dim2=-1),
            "returned shape [3] for a confusion matrix [3, 3]; expected one ",
        ),
        (lambda c: 0.5, "returned float for a confusion matrix [3, 3]; expected one number, shape []"),
        (lambda c: (c.argmax(-1) == torch.arange(3)).double().mean(), "cannot be differentiated; "),
        (lambda c: scores.macro_f1(c.detach()), "cannot be differentiated; "),
        (lambda c: (c.sum() * 0).log(), "is -inf for a confusion matrix [3, 3]; expected it and its gradient finite"),
        (lambda c: (c.trace() - c.trace()).sqrt(), "is 0 for a confusion matrix [3, 3]; expected it and its gradient"),
        (
            lambda c: c.round().sum(),
            "has gradient 0 for a confusion matrix [3, 3]; rounding or argmax cannot ",
        ),
    ],
)
def test_a_score_that_cannot_be_climbed_is_refused_at_once(score, expected):
    task, reward, batch, outputs = problem("classes")
    reward.score = score
    assert message(roll, task, reward, batch, outputs).startswith(f"rollout.reward: mine {expected}")


def test_boxes_and_other_classes_are_refused():
    task, reward, batch, outputs = problem("classes")
    reward.task = SimpleNamespace(policy=box_policy_adapter, probabilities=lambda x: x.softmax(-1))
    text = message(roll, task, reward, batch, torch.cat([outputs] * 3, -1))
    assert text == "rollout.reward: mine: a confusion matrix is of classes, of pixels or of tags"
    reward.task, reward.state = task, {"rows": torch.ones(2, 2), "counts": torch.ones(2)}
    text = message(roll, task, reward, batch, outputs)
    assert text == "rollout.reward: mine: the checkpoint's confusion matrix is of other classes"
