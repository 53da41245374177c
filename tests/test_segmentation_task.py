"""Masks: the data set, the policy, rewards and credit against slow references, the metrics against scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import same
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score
from torch.distributions import Categorical

import segmentation_task as seg
from build import configure
from data_types import Credit, TensorMiniBatch
from evaluation import confusion_matrix
from images import ordered_batches, stream_batches

TASK = configure(("test", {"task": "segmentation", "model.image_size": 8, "model.patch_size": 4}))[1]


def case(num_classes: int, absent: bool = False):
    """Random actions [2, 2, 3, H, W], logits [2, 2, H, W, K], targets [2, H, W] and counted pixels [2, H, W]."""
    g = torch.Generator().manual_seed(num_classes)
    actions = torch.randint(num_classes, (2, 2, 3, 3, 4), generator=g)
    outputs = torch.randn(2, 2, 3, 4, num_classes, generator=g, dtype=torch.float64) * 2
    targets = torch.randint(num_classes - absent, (2, 3, 4), generator=g)
    return actions, outputs, targets, torch.rand(2, 3, 4, generator=g) < 0.8


def slow_mean_iou(action, target, counted) -> float:
    """Mean over the classes of the truth of intersection over union, pixel by pixel."""
    pairs = [(int(a), int(y)) for a, y, c in zip(action.flatten(), target.flatten(), counted.flatten()) if c]
    ious = []
    for k in sorted({y for _, y in pairs}):
        union = sum(a == k or y == k for a, y in pairs)
        ious.append(sum(a == k and y == k for a, y in pairs) / union)
    return sum(ious) / len(ious) if ious else 1.0


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_rewards_against_loops(num_classes):
    """Where some pixels count, where none does, and without a mask of what counts."""
    actions, outputs, targets, counted = case(num_classes, absent=num_classes > 2)
    actions[1, 1, 2] = targets[1]  # a perfect one
    none, pixels = torch.zeros_like(counted), seg.pixel_reward(actions, outputs, targets, {})
    assert pixels.shape == actions.shape and pixels.dtype == torch.float32
    for metadata, counts in (({"counted": counted}, counted), ({"counted": none}, none), ({}, ~none)):
        reward = seg.mask_iou_reward(actions, outputs, targets, metadata)
        for b, t, a in itertools.product(range(2), range(2), range(3)):
            expected = slow_mean_iou(actions[b, t, a], targets[b], counts[b])
            assert float(reward[b, t, a]) == pytest.approx(expected, abs=1e-6)
            assert torch.equal(pixels[b, t, a], (actions[b, t, a] == targets[b]).float())


PAIRS = torch.cartesian_prod(torch.arange(2), torch.arange(2))  # masks of 1x2 pixels, all of them
LONE = PAIRS.view(1, 1, 4, 1, 2).expand(4, 1, 4, 1, 2), torch.zeros(4, 1, 1, 2, 2).double(), PAIRS[:, None]


@pytest.mark.parametrize(
    "actions, outputs, targets, counted",
    [case(2), case(3), case(3, absent=True), case(6, absent=True), (*LONE, torch.ones(4, 1, 2, dtype=torch.bool))],
)
def test_credit_against_brute_force(actions, outputs, targets, counted):
    """The values of all K classes at each counted pixel differ as R(a with the pixel set to k), mean over the draws,
    times the counted pixels. Of masks of two pixels, too, where a class vanishes when its only pixel leaves: 0 / 0
    counts as 0."""
    credit = seg.mask_iou_credit(actions, outputs, targets, {"counted": counted})
    assert isinstance(credit, Credit) and credit.advantages is None and credit.values.shape == outputs.shape
    assert torch.equal(credit.rewards, seg.mask_iou_reward(actions, outputs, targets, {"counted": counted}))
    (B, T, A), (H, W, K) = actions.shape[:3], outputs.shape[2:]
    for b, t, y, x in itertools.product(*map(range, (B, T, H, W))):
        if counted[b, y, x]:
            expected = torch.zeros(K, dtype=torch.float64)
            for a, k in itertools.product(range(A), range(K)):
                other = actions[b, t, a].clone()
                other[y, x] = k
                expected[k] += slow_mean_iou(other, targets[b], counted[b]) * int(counted[b].sum()) / A
            values = credit.values[b, t, y, x]
            torch.testing.assert_close(values - values[0], expected - expected[0], rtol=0, atol=1e-5)


def test_credit_keeps_its_precision_on_large_masks():
    """Changes of 1e-6 in a score near 1, in float32: written without cancellation. Times the pixels they are as large
    as on small masks."""
    targets = torch.zeros(1, 512, 512, dtype=torch.int64)
    targets[:, :256] = 1
    actions = targets[:, None, None].clone()
    actions[..., 0, 0] = 0
    values = seg.mask_iou_credit(actions, torch.zeros(1, 1, 512, 512, 2), targets, {}).values[0, 0]
    n = 512 * 256
    # the wrong pixel: class 0 has IoU n / (n + 1), class 1 (n - 1) / n; right they would both be 1
    assert float(values[0, 0, 1] - values[0, 0, 0]) / 512**2 == pytest.approx((1 / (n + 1) + 1 / n) / 2, rel=1e-5)
    # a right pixel of class 1, were it 0: class 1 loses 1 / n, class 0 goes from n / (n + 1) to n / (n + 2)
    lost = (1 / n + n / (n + 1) - n / (n + 2)) / 2
    assert float(values[0, 1, 1] - values[0, 1, 0]) / 512**2 == pytest.approx(lost, rel=1e-5)


def test_policy_is_a_categorical_by_pixel():
    actions, outputs, _, _ = case(5)
    policy = TASK.policy(outputs.to(torch.bfloat16))
    assert policy.batch_shape == (2, 2, 3, 4) and policy.logits.dtype == torch.float32
    for a in range(3):
        got = TASK.policy(outputs).log_prob(actions[:, :, a])
        assert torch.equal(got, Categorical(logits=outputs).log_prob(actions[:, :, a]))
    assert torch.allclose(TASK.probabilities(outputs), outputs.softmax(-1), atol=1e-12)


@pytest.mark.parametrize("num_classes", [1, 2, 11])
def test_policy_draws_each_class_as_often_as_its_probability(num_classes):
    torch.manual_seed(0)
    outputs = torch.randn(1, 2, 3, 4, num_classes) * 2
    outputs[..., 0, num_classes // 2] = -torch.inf if num_classes > 1 else 0  # a class that must never come
    policy, n = TASK.policy(outputs), 20_000
    drawn = policy.sample((n,))
    assert drawn.shape == (n, 1, 2, 3, 4) and drawn.dtype == torch.int64
    expected = outputs.softmax(-1)
    deviation = F.one_hot(drawn, num_classes).float().mean(0) - expected
    deviation /= (expected * (1 - expected) / n).sqrt().clamp(min=1e-6)
    assert deviation.abs().max() < 4.5  # standard deviations, of at most 264 shares
    if num_classes > 1:  # pixels are drawn independently of each other (nan: one that is always the same)
        correlation = torch.corrcoef(drawn.float().flatten(1).T).nan_to_num(0)
        assert correlation.triu(1).abs().max() < 4.5 / n**0.5
    assert policy.sample().shape == (1, 2, 3, 4) and policy.sample((2, 5)).shape == (2, 5, 1, 2, 3, 4)


def test_arrange_puts_each_logit_in_its_place():
    """Token (r, c), channel ((y, x), k) -> pixel (4 r + y, 4 c + x), class k."""
    assert TASK.head_size(3) == 48
    tokens = torch.randn(2, 5, 4, 48)
    pixels = TASK.arrange(tokens)
    assert pixels.shape == (2, 5, 8, 8, 3)
    for r, c, y, x, k in itertools.product(range(2), range(2), range(4), range(4), range(3)):
        assert torch.equal(pixels[:, :, 4 * r + y, 4 * c + x, k], tokens[:, :, 2 * r + c, (4 * y + x) * 3 + k])
    assert torch.equal(TASK.arrange(tokens[:, 0]), pixels[:, 0])


def folder(root, mask=None, count=2, classes="background\nthing\n"):
    """`count` images with the same mask, or with random ones of two classes and ignored pixels."""
    for name in ("images", "masks"):
        (root / name / "deep").mkdir(parents=True)
    for stem in ["0", *(f"deep/{i}" for i in range(1, count))]:
        drawn = mask or Image.effect_noise((8, 8), 50).point(lambda value: 255 if value > 160 else value > 128)
        drawn.save(root / "masks" / f"{stem}.png")
        Image.effect_noise(drawn.size, 50).convert("RGB").save(root / "images" / f"{stem}.png")
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


@pytest.mark.parametrize("mode", ["L", "P"])
def test_dataset_reads_values_not_colours(tmp_path, mode):
    mask = Image.fromarray(np.array([[0, 1, 2, 255]] * 4, dtype=np.uint8))
    if mode == "P":
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [7] * 759)
    dataset = seg.SegmentationDataset(str(folder(tmp_path, mask, classes="a\nb\nc\n")), 4)
    assert dataset.classes == ["a", "b", "c"] and len(dataset) == 2 and dataset[0].shape == (4, 4, 4)
    batch = dataset.batch(torch.tensor([1, 0]), torch.stack([dataset[1], dataset[0]]))
    assert torch.equal(batch.targets[0], torch.tensor([[0, 1, 2, 0]] * 4)) and batch.targets.dtype == torch.int64
    assert torch.equal(batch.counted[0], torch.tensor([[True, True, True, False]] * 4))
    assert batch.inputs.shape == (2, 3, 4, 4) and batch.metadata["classes"] == ("a", "b", "c")
    assert [p.split("images/")[1] for p in batch.metadata["paths"]] == ["deep/1.png", "0.png"]


def test_mirroring_turns_images_masks_and_what_counts_alike():
    g = torch.Generator().manual_seed(0)
    inputs = torch.randint(255, (64, 3, 4, 4), generator=g, dtype=torch.uint8)
    targets, counted = inputs[:, 0].long() % 3, inputs[:, 1] < 200
    torch.manual_seed(1)
    flipped = TASK.mirror(TensorMiniBatch(inputs, targets, {"a": 1}, counted))
    chosen = (flipped.inputs != inputs).flatten(1).any(1)
    assert 20 < chosen.sum() < 44 and flipped.metadata == {"a": 1}
    for before, after in ((inputs, flipped.inputs), (targets, flipped.targets), (counted, flipped.counted)):
        assert torch.equal(after[chosen], before[chosen].flip(-1)) and torch.equal(after[~chosen], before[~chosen])


def test_batches_are_the_same_from_files_and_from_the_cache(tmp_path):
    """The mask is kept with its image."""
    dataset, order = seg.SegmentationDataset(str(folder(tmp_path, count=5)), 8), lambda _: torch.arange(5)
    plain, kept = (
        [vars(batch) for batch in stream_batches(dataset, order, 2, range(9), cache=cache)] for cache in (False, True)
    )
    assert same(plain, kept)


@pytest.mark.parametrize("num_classes, absent", [(2, False), (4, False), (4, True)])
def test_metrics_against_scikit_learn(num_classes, absent):
    """One confusion matrix over the data set, ignored pixels left out, not the mean of the images' IoUs."""
    g = torch.Generator().manual_seed(num_classes)
    targets = torch.randint(num_classes - absent, (6, 5, 5), generator=g)
    predicted = torch.where(torch.rand(6, 5, 5, generator=g) < 0.6, targets, (targets + 1) % (num_classes - absent))
    counted = torch.rand(6, 5, 5, generator=g) < 0.7
    confusion = confusion_matrix(predicted, targets, num_classes, counted)
    truth, guess = targets[counted].numpy(), predicted[counted].numpy()
    assert np.array_equal(confusion, sklearn_confusion(truth, guess, labels=range(num_classes)))
    metrics = seg.segmentation_metrics(confusion, [f"c{k}" for k in range(num_classes)])
    expected = {"mean_iou": jaccard_score(truth, guess, average="macro"), "pixel_accuracy": (truth == guess).mean()}
    expected |= {f"iou/c{k}": value for k, value in enumerate(jaccard_score(truth, guess, average=None))}
    assert len(expected) == 2 + num_classes - absent and metrics == pytest.approx(expected, abs=1e-12)


def test_evaluation_is_that_of_both_predictors_over_all_batches(tmp_path):
    dataset = seg.SegmentationDataset(str(folder(tmp_path, count=5)), 8)
    evaluation = seg.MaskEvaluation(TASK, dataset, shown=3)
    torch.manual_seed(0)
    rows = []
    for batch in ordered_batches(dataset, 2):
        outputs, passes = torch.randn(len(batch), 8, 8, 2), torch.randn(len(batch), 3, 8, 8, 2)
        evaluation.add(batch, outputs, passes)
        mean = passes.softmax(-1).mean(1)
        entropy = torch.special.entr(mean).sum(-1) * batch.counted
        rows.append((batch.counted, batch.targets, outputs.argmax(-1), mean.argmax(-1), entropy))
    counted, *columns, entropy = map(torch.cat, zip(*rows))
    truth, single, mean = (column[counted].numpy() for column in columns)
    metrics = evaluation.metrics()
    assert metrics["eval/mean_iou"] == pytest.approx(jaccard_score(truth, single, average="macro"))
    assert metrics["eval_mc/mean_iou"] == pytest.approx(jaccard_score(truth, mean, average="macro"))
    assert metrics["eval_mc/iou/thing"] == pytest.approx(jaccard_score(truth, mean))
    picture = evaluation.draw()
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3 and picture.float().std() > 1
    expected = entropy.mean((1, 2)).sort(descending=True).values[:3].tolist()
    assert [shown for shown, _ in evaluation.pictures] == pytest.approx(expected)


def test_pictures_show_classes_and_ignored_pixels():
    image = torch.full((3, 1, 4), 100, dtype=torch.uint8)
    shown = seg.overlay(image, torch.tensor([[0, 1, 2, 255]]))
    assert shown[:, 0, 0].tolist() == [100] * 3  # the background stays
    assert len({tuple(shown[:, 0, i].tolist()) for i in range(4)}) == 4
    assert shown[:, 0, 3].tolist() == [193] * 3  # 0.4 * 100 + 0.6 * 255
