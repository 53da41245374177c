"""The losses of labels against torch, scikit-learn and definitions in plain Python; what counts in them, and where
their class counts come from."""

import copy
import os
import signal
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_folders, make_scenes, message, refused, same
from hypothesis import given, settings
from PIL import Image
from sklearn.metrics import f1_score, jaccard_score
from sklearn.utils.class_weight import compute_class_weight
from torch.distributions import Bernoulli, Categorical, Normal

import build
import grpo
import label_losses
import train
from build import configure
from checkpoint import load_checkpoint
from choices import choice_log_probs
from data_types import TensorMiniBatch
from detection_task import box_policy_adapter, cross_entropy_iou_loss
from grpo import keyed_rng, mean_counted, nll
from label_losses import CLASS_LOSSES, MASK_LOSSES
from segmentation_task import Segmentation, mask_policy_adapter
from vision_task import Classification

EXAMPLE = str(ROOT / "examples" / "multilabel_task.py")
COUNTS = torch.tensor([60, 3, 20, 17])  # of four classes


def task_of(name: str, loss: str = "cross_entropy", **keys):
    """The task with this loss and the class counts that are given."""
    counts, keys = keys.pop("counts", None), {key.replace("__", "."): value for key, value in keys.items()}
    sizes = {"model.image_size": 16, "model.patch_size": 4, "training.supervised_loss": loss}
    task = configure(("test", {"task": name} | sizes | keys))[1]
    task.class_counts = counts
    return task


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(num_classes: int, B: int = 3, T: int = 2, H: int = 3, W: int = 4, seed: int = 0):
    """Logits [B, T, H, W, K], targets [B, H, W] without the last class in the first image, and what counts of them."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_classes, (B, H, W), generator=g)
    targets[0] %= max(num_classes - 1, 1)
    return random_logits(B, T, H, W, num_classes, seed=seed), targets, torch.rand(B, H, W, generator=g) < 0.7


def of_passes(targets: torch.Tensor, T: int) -> torch.Tensor:
    """[B, E…] -> [B, T, 1, E…]."""
    return targets[:, None, None].expand(len(targets), T, 1, *targets.shape[1:])


# --- Of an element ----------------------------------------------------------------------------------------------------


def references(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of logits [n, 4] and targets [n] by torch and scikit-learn, of a training set with COUNTS."""
    labels = np.repeat(np.arange(4), COUNTS)
    weights = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(4), y=labels))
    prior = COUNTS.double() / COUNTS.sum()
    right = logits.softmax(-1).gather(-1, targets[:, None])[:, 0]
    return {
        "cross_entropy": F.cross_entropy(logits, targets, reduction="none"),
        "weighted": F.cross_entropy(logits, targets, weight=weights, reduction="none"),
        "logit_adjusted": F.cross_entropy(logits + prior.log(), targets, reduction="none"),
        "focal": -((1 - right) ** 2) * right.log(),
    }


@pytest.mark.parametrize("loss", ["cross_entropy", *CLASS_LOSSES])
@pytest.mark.parametrize("shape", [(5, 2), (2, 2, 3, 4)], ids=["classes", "pixels"])
def test_losses_of_elements_are_those_of_torch(shape, loss):
    """Of an image's class and of pixels, values and gradients, in the layout of the targets."""
    logits = random_logits(*shape, 4).requires_grad_()
    targets = torch.randint(4, shape[:1] + shape[2:], generator=torch.Generator().manual_seed(1))
    spread = of_passes(targets, 2)
    task = task_of("classification" if len(shape) == 2 else "segmentation", loss, counts=COUNTS)
    found = task.supervised_loss(task.policy(logits), spread, None)
    assert found.shape == spread.shape and found.dtype == torch.float64
    expected = references(logits.flatten(0, -2), spread[:, :, 0].flatten())[loss].view(shape).unsqueeze(2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((x * (1 + x.detach())).sum(), logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
    assert task.supervised_loss(task.policy(logits.bfloat16()), spread, None).dtype == torch.float32


@pytest.mark.parametrize("loss", ["cross_entropy", *CLASS_LOSSES])
def test_losses_of_tags_are_those_of_two_classes(loss):
    """Each tag has its own counts; against binary cross-entropy."""
    logits, yes = random_logits(6, 2, 3), torch.tensor([5.0, 50.0, 99.0])  # of 100 images
    targets = torch.randint(2, (6, 3), generator=torch.Generator().manual_seed(1)).double()
    task = task_of(EXAMPLE, loss, counts=torch.stack([100 - yes, yes]))
    found = task.supervised_loss(task.policy(logits), of_passes(targets, 2), None)[:, :, 0]
    truth, share = targets[:, None].expand(6, 2, 3), (yes / 100).double()
    plain = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    shifted = logits + (share / (1 - share)).log()
    expected = {
        "cross_entropy": plain,
        "weighted": plain / (2 * torch.where(truth > 0, share, 1 - share)),
        "logit_adjusted": F.binary_cross_entropy_with_logits(shifted, truth, reduction="none"),
        "focal": plain * (truth - logits.sigmoid()) ** 2,
    }[loss]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # `share` is a float32's


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=6).filter(any))
@settings(max_examples=50, deadline=None)
def test_weights_have_mean_one_over_the_training_set(counts):
    """And each class that is there the same share of them; one that is not has the weight of the rarest."""
    weights = label_losses.class_weights(torch.tensor(counts)).tolist()
    there = [n for n in counts if n]
    assert sum(n * w for n, w in zip(counts, weights)) == pytest.approx(sum(counts))
    for n, weight in zip(counts, weights):
        assert weight * (n or min(there)) == pytest.approx(sum(counts) / len(there))


def test_losses_by_counts_of_equal_classes_are_cross_entropy():
    logits, targets = random_logits(5, 2, 3), of_passes(torch.tensor([0, 1, 2, 1, 0]), 2)
    policy = Categorical(logits=logits)
    for loss in ("weighted", "logit_adjusted"):
        found = CLASS_LOSSES[loss](choice_log_probs(policy)[0], targets, None, torch.full((3,), 7))
        torch.testing.assert_close(found, nll(policy, targets))


def test_focal_is_cross_entropy_of_what_is_wrong_and_nothing_of_what_is_right():
    """Sure of the right class, value and gradient vanish; sure of a wrong one, they are those of cross-entropy. Of a
    choice that is impossible the loss is no NaN."""
    logits = torch.tensor([[[30.0, 0.0], [-30.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    loss = label_losses.focal(choice_log_probs(Categorical(logits=logits))[0], torch.zeros(1, 2, 1, dtype=torch.int64))
    gradient = torch.autograd.grad(loss.sum(), logits)[0][0]
    assert loss.flatten().tolist() == pytest.approx([0, 30]) and 0 <= loss.flatten().tolist()[0] < 1e-20
    assert gradient.flatten().tolist() == pytest.approx([0, 0, -1, 1], abs=1e-10)
    impossible = Categorical(logits=torch.tensor([[[0.0, -torch.inf]]]))
    log_probs, right = choice_log_probs(impossible)[0], torch.zeros(1, 1, 1, dtype=torch.int64)
    assert not label_losses.focal(log_probs, right).isnan().any()


def test_the_best_logits_of_logit_adjusted_are_the_balanced_posterior():
    """Of a joint distribution of five images and three classes: minimised over all logits, their softmax is
    p(x | y) / Σ p(x | y'), whatever the classes' frequencies; that of cross-entropy is p(y | x)."""
    joint = random_logits(5, 3).softmax(0) * torch.tensor([0.9, 0.08, 0.02], dtype=torch.float64)  # [x, y]
    likelihood = joint / joint.sum(0)
    best = {"logit_adjusted": likelihood / likelihood.sum(1, keepdim=True)}
    best["cross_entropy"] = joint / joint.sum(1, keepdim=True)
    assert (best["logit_adjusted"].argmax(1) != best["cross_entropy"].argmax(1)).any()
    targets = torch.arange(3).repeat(5)[:, None, None]
    for name, expected in best.items():
        task = task_of("classification", name, counts=1000 * joint.sum(0))
        logits = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

        def risk(task=task, logits=logits, optimizer=optimizer):
            optimizer.zero_grad()
            policy = task.policy(logits.repeat_interleave(3, 0)[:, None])
            loss = (joint.flatten() * task.supervised_loss(policy, targets, None).flatten()).sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(risk)
        torch.testing.assert_close(logits.detach().softmax(1), expected, rtol=0, atol=1e-6)


# --- Of a mask --------------------------------------------------------------------------------------------------------


def jaccard_loss(wrong: set[int], true: set[int]) -> float:
    """1 - IoU of a class whose pixels are `true` if the pixels `wrong` are wrong about it (Berman et al., eq. 6)."""
    return len(wrong) / len(true | wrong)


def slow_lovasz(probs: list[list[float]], truth: list[int]) -> float:
    """The Lovász extension as Choquet's integral of the set function over the errors' level sets, mean over the classes
    of the truth. probs: of each pixel that counts, for each class."""
    losses = []
    for k in sorted(set(truth)):
        errors = [1 - p[k] if y == k else p[k] for p, y in zip(probs, truth)]
        true, levels = {i for i, y in enumerate(truth) if y == k}, [*sorted(set(errors) - {0.0}, reverse=True), 0.0]
        losses.append(0.0)
        for high, low in zip(levels, levels[1:]):
            losses[-1] += (high - low) * jaccard_loss({i for i, e in enumerate(errors) if e >= high}, true)
    return sum(losses) / len(losses) if losses else 0.0


def slow_dice(probs: list[list[float]], truth: list[int]) -> float:
    losses = []
    for k in sorted(set(truth)):
        both = sum(p[k] for p, y in zip(probs, truth) if y == k)
        losses.append(1 - 2 * both / (sum(p[k] for p in probs) + truth.count(k)))
    return sum(losses) / len(losses) if losses else 0.0


SLOW = {"lovasz": slow_lovasz, "dice": slow_dice}


@pytest.mark.parametrize("loss", SLOW)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_losses_of_masks_against_their_definitions(loss, seed, num_classes, some_count, coarse):
    """Each image and pass by itself, with ties where probabilities are coarse; all of its pixels have its loss."""
    logits, targets, counted = masks(num_classes, seed=seed)
    logits = logits.round() if coarse else logits
    counted = counted if some_count else None
    log_probs = choice_log_probs(mask_policy_adapter(logits))[0]
    found = MASK_LOSSES[loss](log_probs, of_passes(targets, 2), counted)
    assert found.shape == (3, 2, 1, 3, 4) and torch.equal(found, found[..., :1, :1].expand_as(found))
    for b in range(3):
        chosen = torch.ones(12, dtype=torch.bool) if counted is None else counted[b].flatten()
        for t in range(2):
            probs = logits[b, t].softmax(-1).flatten(0, 1)[chosen].tolist()
            expected = SLOW[loss](probs, targets[b].flatten()[chosen].tolist())
            assert float(found[b, t, 0, 0, 0]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss, score", [("lovasz", jaccard_score), ("dice", f1_score)])
def test_of_hard_predictions_they_are_the_scores_of_scikit_learn(loss, score):
    """1 - IoU and 1 - F1, mean over the classes of the truth, of pixels that count."""
    _, targets, counted = masks(4, B=6, seed=3)
    predicted = torch.randint(4, (6, 1, 3, 4), generator=torch.Generator().manual_seed(4))
    predicted[1, 0] = targets[1]  # a perfect one
    log_probs = choice_log_probs(mask_policy_adapter(1e4 * F.one_hot(predicted, 4).double()))[0]
    found = MASK_LOSSES[loss](log_probs, of_passes(targets, 1), counted)[:, 0, 0, 0, 0].tolist()
    for b in range(6):
        truth, guess = targets[b][counted[b]], predicted[b, 0][counted[b]]
        expected = score(truth, guess, labels=truth.unique(), average="macro", zero_division=0)
        assert found[b] == pytest.approx(1 - expected)
    assert found[1] == 0 and max(found) > 0.5


@pytest.mark.parametrize("loss", SLOW)
def test_gradients_of_masks_are_those_of_finite_differences(loss):
    logits, targets, counted = masks(3)

    def mean(logits):
        log_probs = choice_log_probs(mask_policy_adapter(logits))[0]
        return mean_counted(MASK_LOSSES[loss](log_probs, of_passes(targets, 2), counted), counted)

    assert torch.autograd.gradcheck(mean, logits.requires_grad_())


def test_lovasz_keeps_its_precision_on_large_masks():
    """In float32 the weights of single pixels of a large mask, 1e-6, are those of float64."""
    targets = torch.zeros(1, 512, 512, dtype=torch.int64)
    targets[:, 100:300, 50:450] = 1
    logits = random_logits(1, 1, 512, 512, 2)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype).requires_grad_()
        loss = label_losses.lovasz(choice_log_probs(mask_policy_adapter(x))[0], of_passes(targets, 1))
        gradients.append(torch.autograd.grad(loss.mean(), x)[0].double())
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-4


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_pixels_that_do_not_count_do_not_matter(loss):
    """Neither what is predicted there nor their target; they get no gradient. Where none counts the loss
    is 0, and where all do it is that without a mask of what counts."""
    logits, targets, counted = masks(4)
    counted[2] = False

    def value_and_gradient(logits, targets, counted):
        logits = logits.clone().requires_grad_()
        log_probs = choice_log_probs(mask_policy_adapter(logits))[0]
        value = mean_counted(MASK_LOSSES[loss](log_probs, of_passes(targets, 2), counted, COUNTS), counted)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    value, gradient = value_and_gradient(logits, targets, counted)
    outside = ~counted[:, None, ..., None]
    assert value > 0.1 and gradient.abs().max() > 1e-3 and not gradient.masked_select(outside).any()
    for other in (random_logits(*logits.shape, seed=9), 1e4 * random_logits(*logits.shape, seed=9)):
        changed = torch.where(outside, other, logits), torch.where(counted, targets, 3 - targets), counted
        assert (changed[0] != logits).any() and (changed[1] != targets).any()
        assert same(list(value_and_gradient(*changed)), [value, gradient])
    value, gradient = value_and_gradient(logits, targets, torch.zeros_like(counted))
    assert value == 0 and not gradient.any()
    every = value_and_gradient(logits, targets, torch.ones_like(counted)), value_and_gradient(logits, targets, None)
    for a, b in zip(*every):
        torch.testing.assert_close(a, b)


class Pixelwise(torch.nn.Module):
    """Logits of 3 × 4 pixels from three numbers of an image, the same in each pass."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 12 * 4).double()

    def sample_masks(self, B: int, T: int) -> dict:
        return {"drop": torch.ones(B, T, 1, 1)}

    def forward(self, inputs, masks):
        return self.head(inputs).unflatten(-1, (1, 3, 4, 4)).expand(-1, masks["drop"].shape[1], -1, -1, -1)


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("loss", ["cross_entropy", *MASK_LOSSES])
def test_micro_batches_do_not_matter(loss, keep_graph):
    """Of 4, 3 and 1, or 2 images each, whose pixels do not all count: the same gradient, that of the mean over what
    counts, where an image weighs as much as it has pixels that count."""
    task = task_of("segmentation", loss, counts=COUNTS, training__objective="supervised")
    _, targets, counted = masks(4, B=4)
    counted[0], counted[1, 1:] = True, False
    batch = TensorMiniBatch(random_logits(4, 3), targets, {}, counted)
    with keyed_rng("net"):
        model = Pixelwise()
    log_probs = choice_log_probs(task.policy(model(batch.inputs, model.sample_masks(4, 2))))[0]
    each = -log_probs.gather(2, of_passes(targets, 2))
    if loss != "cross_entropy":
        each = MASK_LOSSES[loss](log_probs, of_passes(targets, 2), counted, COUNTS)
    number = counted.flatten(1).sum(1)
    by_image = [each[b].mean(0)[0][counted[b]].mean() for b in range(4)]
    expected = sum(n * x for n, x in zip(number, by_image)) / number.sum()
    exact = torch.cat([x.flatten() for x in torch.autograd.grad(expected, list(model.parameters()))])
    assert exact.norm() > 1e-3 and len(set(number.tolist())) > 1
    settings = build.update_settings(task, 2)
    assert settings.micro_batch_size == 2
    for parts in ([slice(0, 4)], [slice(0, 3), slice(3, 4)], [slice(0, 2), slice(2, 4)]):
        net, how = copy.deepcopy(model), grpo.RolloutSettings(2, 3)
        rewards = {"r": (task.rewards["pixel_reward"], 1.0)}
        episodes = (grpo.rollout(net, batch[p], rewards, task.policy, how, keep_graph=keep_graph) for p in parts)
        optimizer, size = torch.optim.SGD(net.parameters(), lr=0.0), grpo.size_of(batch)
        metrics = grpo.update_policy(net, optimizer, episodes, task.policy, settings, batch_size=size)
        clip = min(1.0, settings.max_grad_norm / float(exact.norm()))
        found = torch.cat([p.grad.flatten() for p in net.parameters()])
        torch.testing.assert_close(found, exact * clip, rtol=1e-5, atol=1e-9)
        assert float(metrics["loss"]) == pytest.approx(expected.item())


# --- Of boxes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", ["iou", "log_prob"])
@pytest.mark.parametrize("loss", ["cross_entropy", *CLASS_LOSSES])
def test_of_patches_the_classes_alone_have_the_loss(loss, box):
    """Three classes and background; the box keeps that of detection.supervised_loss."""
    outputs = random_logits(2, 2, 16, 4 + 4)
    labels = torch.randint(4, (2, 16), generator=torch.Generator().manual_seed(1))
    targets = torch.stack([F.pad(labels[..., None].double(), (0, 3)), random_logits(2, 16, 4) / 4], 1)
    counted = torch.ones(2, 2, 16, dtype=torch.bool)
    task = task_of("detection", loss, counts=COUNTS, detection__supervised_loss=box)
    policy, targets = box_policy_adapter(outputs), of_passes(targets, 2)
    found = task.supervised_loss(policy, targets, counted)
    plain = nll(policy, targets) if box == "log_prob" else cross_entropy_iou_loss(policy, targets)
    assert found.shape == plain.shape == (2, 2, 1, 2, 16) and torch.equal(found[..., 1, :], plain[..., 1, :])
    spread = of_passes(labels, 2)[:, :, 0]
    expected = references(outputs[..., :4].flatten(0, 2), spread.flatten())[loss].view(2, 2, 16)
    torch.testing.assert_close(found[:, :, 0, 0], expected)
    assert torch.equal(found, plain) == (loss == "cross_entropy")


# --- Counts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def handed_over(task, root: str) -> torch.Tensor | None:
    build.hand_over_counts(task, build.open_set(task, root))
    return task.class_counts


def test_classes_are_counted_where_the_loss_asks_for_it(folder):
    for name in sorted(os.listdir("train/4"))[3:]:
        os.remove(f"train/4/{name}")
    for loss in ("weighted", "logit_adjusted"):
        assert handed_over(task_of("classification", loss), "train").tolist() == [8, 8, 3]
    assert handed_over(task_of("classification", "focal"), "train") is None
    task = task_of("classification", "weighted")  # of a run that goes on, one of whose classes has lost its images
    assert task.count_classes(task.open("train", ["0", "1", "4", "9"])).tolist() == [8, 8, 3, 0]


def test_tags_are_counted_each(folder):
    Path("train/labels.csv").write_text(
        "file,a,b\n" + "\n".join(f"0/{name},{i % 4 == 0:d},0" for i, name in enumerate(sorted(os.listdir("train/0"))))
    )
    assert handed_over(task_of(EXAMPLE, "weighted"), "train").tolist() == [[6, 8], [2, 0]]


def test_pixels_are_counted_as_the_masks_hold_them(tmp_path):
    """Of masks as large as the input they are those that the network is given; a larger mask weighs no more; what is
    ignored counts nowhere; a class that no mask has has none."""
    g = np.random.default_rng(0)
    for i, size in enumerate((16, 16, 32)):
        values = g.choice([0, 1, 2, 255], p=[0.7, 0.1, 0.1, 0.1], size=(16, 16)).astype(np.uint8)
        values = values.repeat(size // 16, 0).repeat(size // 16, 1)
        for name, array in (("masks", values), ("images", np.zeros((size, size, 3), np.uint8))):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{i}.png")
    (tmp_path / "classes.txt").write_text("sky\nsea\nsand\nsnow\n")
    task = task_of("segmentation", "weighted")
    counts = handed_over(task, str(tmp_path))
    dataset = build.open_set(task, str(tmp_path))
    batch = dataset.batch(torch.arange(3), torch.stack([dataset[i] for i in range(3)]))
    expected = torch.bincount(batch.targets[batch.counted], minlength=4)
    torch.testing.assert_close(counts * 256, expected.double())
    assert expected[3] == 0 and 0 < expected[1] < expected[0] and not batch.counted.all()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    assert make_scenes.main(["--out", str(root), "--train", "24", "--eval", "4"]) == 0
    return root


def test_patches_are_counted_with_their_background(scenes, monkeypatch):
    """All images', as training meets them, or those of an even sample; none of what pads an image."""
    task = task_of("detection", "logit_adjusted", model__image_size=[32, 48], data__resize="letterbox")
    dataset, counts = build.open_set(task, str(scenes / "train")), handed_over(task, str(scenes / "train"))

    def expected(images) -> list[int]:
        batch = dataset.batch(torch.tensor(images), torch.stack([dataset[i] for i in images]))
        labels = batch.targets[:, 0, :, 0][batch.counted[:, 0]].long().tolist()
        assert len(labels) == len(images) * 8 * 8  # of 8 × 12
        return [labels.count(k) for k in range(11)]

    assert counts.tolist() == expected(range(24)) and counts[10] > counts[:10].sum() > 24
    monkeypatch.setattr("detection_task.MOST_COUNTED", 5)
    assert handed_over(task, str(scenes / "train")).tolist() == expected([0, 4, 9, 14, 19])


def test_a_data_set_without_targets_is_told_what_it_needs(scenes):
    class Own(Segmentation):
        count_classes = Classification.count_classes

    task = Own(task_of("segmentation", "weighted").config)
    told = "training.supervised_loss: weighted: without `targets` of the data set it needs count_classes"
    assert message(build.hand_over_counts, task, build.open_set(task, str(scenes / "noisy_train"))) == told


# --- Names, and losses of one's own -----------------------------------------------------------------------------------


NAMES = {
    "classification": ["weighted", "logit_adjusted", "focal"],
    "detection": ["weighted", "logit_adjusted", "focal"],
    "segmentation": ["weighted", "logit_adjusted", "focal", "dice", "lovasz"],
    EXAMPLE: ["weighted", "logit_adjusted", "focal"],
}


@pytest.mark.parametrize("name", NAMES)
def test_each_task_lists_the_losses_that_it_has(name):
    for loss in ["cross_entropy", *NAMES[name]]:
        task = task_of(name, loss)
        assert build.update_settings(task, 2).supervised_loss == task.supervised_loss
    expected = f"is not allowed; expected {' | '.join(['cross_entropy', *NAMES[name]])}"
    for loss in {"dice", "hinge", "Focal"} - set(NAMES[name]):
        told = f"training.supervised_loss: {loss!r} {expected}"
        assert message(build.update_settings, task_of(name, loss), 2) == told


def test_a_loss_that_the_task_has_not_ends_the_run_at_its_start(folder, capsys):
    told = refused(capsys, train.main, "--config", "tiny.yaml", "training.supervised_loss=dice")
    assert told.startswith("training.supervised_loss: 'dice' is not allowed; expected cross_entropy | weighted | ")
    assert not Path("ckpt").exists()


def test_a_loss_of_ones_own_goes_on_as_it_was():
    """A task that overrides `supervised_loss(policy, targets)` gets just these, also if it has further parameters; the
    names are for losses that know of them."""

    class Squares(Classification):
        def supervised_loss(self, policy, targets, scale=3.0):
            assert scale == 3.0
            return scale * (policy.probs.unsqueeze(2).gather(-1, targets[..., None])[..., 0] - 1) ** 2

    class Aware(Classification):
        losses = Classification.losses

        def supervised_loss(self, policy, targets, counted=None):
            return 2 * super().supervised_loss(policy, targets, counted)

    logits, targets = random_logits(4, 2, 3), torch.tensor([0, 1, 2, 1])
    policy, episode = Categorical(logits=logits), grpo.Episode(*[torch.zeros(4, 2, 1)] * 6, {"targets": targets})
    right = logits.softmax(-1)[torch.arange(4), :, targets]
    own, _ = grpo.policy_loss(
        episode, policy, torch.zeros(4, 2, 1), build.update_settings(Squares(of_supervised("cross_entropy")), 4)
    )
    assert float(own) == pytest.approx(float(3 * ((right - 1) ** 2).mean()))
    told = message(build.update_settings, Squares(of_supervised("focal")), 4)
    assert told == "training.supervised_loss: 'focal' is not allowed; expected cross_entropy"
    aware, _ = grpo.policy_loss(
        episode, policy, torch.zeros(4, 2, 1), build.update_settings(Aware(of_supervised("focal")), 4)
    )
    assert float(aware) == pytest.approx(float(-2 * ((1 - right) ** 2 * right.log()).mean()))


def of_supervised(loss: str) -> dict:
    return task_of("classification", loss, training__objective="supervised").config


@pytest.mark.parametrize("kind", ["classes", "pixels", "tags", "numbers", "boxes"])
def test_the_default_is_what_it_was(kind):
    """-log π(targets) bit for bit, of any distribution; of boxes 1 - IoU."""
    name = {"pixels": "segmentation", "boxes": "detection", "tags": EXAMPLE}.get(kind, "classification")
    logits, targets = random_logits(4, 2, 3), torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1]])
    if kind == "boxes":
        policy, targets = box_policy_adapter(random_logits(4, 2, 16, 8)), torch.rand(4, 2, 16, 4).round()
    elif kind == "pixels":
        policy, targets = mask_policy_adapter(random_logits(4, 2, 3, 4, 2)), torch.ones(4, 3, 4).long()
    elif kind == "classes":
        policy, targets = Categorical(logits=logits), targets[:, 0]
    else:
        policy = Bernoulli(logits=logits) if kind == "tags" else Normal(logits, 0.5)
        targets = targets.double()
    targets = of_passes(targets, 2)
    expected = cross_entropy_iou_loss(policy, targets) if kind == "boxes" else nll(policy, targets)
    assert torch.equal(task_of(name).supervised_loss(policy, targets, None), expected)


# --- Whole runs -------------------------------------------------------------------------------------------------------


SMALL = ["training.steps=6", "training.batch_size=8", "training.save_interval=3", "training.device=cpu"]
SMALL += ["model.embed_dim=16", "model.depth=2", "data.num_workers=0", "rollout.actions_per_sample=3"]
RUNS = [
    ("classification", "logit_adjusted", "training.objective=supervised"),
    ("segmentation", "lovasz", "training.label_coef=0.5"),
    ("detection", "weighted", "training.objective=supervised"),
]


@pytest.mark.parametrize("task, loss, how", RUNS)
def test_a_run_goes_on_to_the_same_bits(folder, scenes, monkeypatch, task, loss, how):
    """Stopped and resumed it ends as the run in one piece, in other weights than by cross-entropy; its checkpoint needs
    no counts."""
    arguments = ["--config", "tiny.yaml", how]
    if task != "classification":
        split = "noisy_train" if task == "segmentation" else "train"
        arguments = ["--config", str(ROOT / f"config_{task}.yaml"), *SMALL, how, "data.eval_dir=null"]
        arguments += [f"data.train_dir={scenes / split}"]
    else:
        for name in sorted(os.listdir("train/4"))[2:]:
            os.remove(f"train/4/{name}")

    def weights(name: str) -> dict:
        return load_checkpoint(Path("ckpt", name))["model"]

    arguments += ["training.steps=6", f"training.supervised_loss={loss}"]
    update, calls = train.update_policy, []

    def stop(*given, **options):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*given, **options)

    assert train.main([*arguments, "training.run_name=whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "update_policy", stop)
        assert train.main([*arguments, "training.run_name=parts"]) == 143
    assert load_checkpoint(Path("ckpt/parts"))["step"] == 4 and train.main(["--resume", "ckpt/parts"]) == 0
    assert same(weights("parts"), weights("whole"))
    assert train.main([*arguments[:-1], "training.run_name=plain"]) == 0
    assert not same(weights("plain"), weights("whole"))


def test_an_older_checkpoint_goes_on_by_cross_entropy(folder):
    """One whose config has no training.supervised_loss."""
    keys = ["training.objective=supervised", "training.steps=6"]
    assert train.main(["--config", "tiny.yaml", *keys, "training.run_name=whole"]) == 0
    assert train.main(["--config", "tiny.yaml", *keys, "training.run_name=parts", "training.save_interval=3"]) == 0
    path = Path("ckpt/parts/step_000003.pt")
    state = torch.load(path, weights_only=True)
    assert state["config"]["training"].pop("supervised_loss") == "cross_entropy"
    for file in Path("ckpt/parts").iterdir():
        file.unlink()
    torch.save(state, path)
    path.rename("ckpt/parts/last.pt")
    assert train.main(["--resume", "ckpt/parts"]) == 0
    whole, parts = (load_checkpoint(Path("ckpt", name)) for name in ("whole", "parts"))
    assert parts["step"] == 6 and same(parts["model"], whole["model"])
