"""Masks: the data set, the policy, rewards and credit against slow references, the metric against scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score
from torch.distributions import Categorical

import segmentation_task as seg
from data_types import Credit, InputError, TensorMiniBatch
from vision_task import ordered_batches

CONFIG = {
    "model": {"image_size": 8, "patch_size": 4, "num_classes": None},
    "data": {"mean": [0.5] * 3, "std": [0.25] * 3},
}


def case(num_classes: int, seed: int = 0, height: int = 3, width: int = 4, absent: bool = False):
    """Random actions [2, 2, 3, H, W], logits [2, 2, H, W, K], targets [2, H, W] and counted pixels [2, H, W]."""
    g = torch.Generator().manual_seed(seed)
    actions = torch.randint(num_classes, (2, 2, 3, height, width), generator=g)
    outputs = torch.randn(2, 2, height, width, num_classes, generator=g, dtype=torch.float64) * 2
    targets = torch.randint(num_classes - absent, (2, height, width), generator=g)
    counted = torch.rand(2, height, width, generator=g) < 0.8
    return actions, outputs, targets, counted


def slow_mean_iou(action, target, counted) -> float:
    """Mean over the classes of the truth of intersection over union, pixel by pixel."""
    pairs = [(int(a), int(y)) for a, y, c in zip(action.flatten(), target.flatten(), counted.flatten()) if c]
    ious = []
    for k in sorted({y for _, y in pairs}):
        union = sum(a == k or y == k for a, y in pairs)
        ious.append(sum(a == k and y == k for a, y in pairs) / union)
    return sum(ious) / len(ious) if ious else 1.0


# --- Rewards ----------------------------------------------------------------------------------------------------------


def test_pixel_reward():
    actions, outputs, targets, _ = case(3)
    reward = seg.pixel_reward(actions, outputs, targets, {})
    assert reward.shape == actions.shape and reward.dtype == torch.float32
    for b, t, a in itertools.product(range(2), range(2), range(3)):
        assert torch.equal(reward[b, t, a], (actions[b, t, a] == targets[b]).float())


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_mask_iou_reward_against_loops(num_classes):
    actions, outputs, targets, counted = case(num_classes, absent=num_classes > 2)
    reward = seg.mask_iou_reward(actions, outputs, targets, {"counted": counted})
    assert reward.shape == (2, 2, 3)
    for b, t, a in itertools.product(range(2), range(2), range(3)):
        assert float(reward[b, t, a]) == pytest.approx(
            slow_mean_iou(actions[b, t, a], targets[b], counted[b]), abs=1e-6
        )


def test_mask_iou_reward_where_nothing_counts_and_without_a_mask_of_what_counts():
    actions, outputs, targets, counted = case(3)
    nothing = torch.zeros_like(counted)
    assert torch.equal(seg.mask_iou_reward(actions, outputs, targets, {"counted": nothing}), torch.ones(2, 2, 3))
    everything = seg.mask_iou_reward(actions, outputs, targets, {"counted": torch.ones_like(counted)})
    assert torch.equal(seg.mask_iou_reward(actions, outputs, targets, {}), everything)
    perfect = targets[:, None, None].expand_as(actions)
    assert torch.equal(seg.mask_iou_reward(perfect, outputs, targets, {}), torch.ones(2, 2, 3))


@pytest.mark.parametrize("num_classes, absent", [(2, False), (3, False), (3, True), (6, True)])
def test_credit_against_brute_force(num_classes, absent):
    """R(a) - Σ_k π(k) R(a with the pixel set to k), over all K classes, pixel by pixel."""
    actions, outputs, targets, counted = case(num_classes, seed=num_classes, absent=absent)
    credit = seg.mask_iou_credit(actions, outputs, targets, {"counted": counted})
    assert isinstance(credit, Credit) and credit.advantages.shape == actions.shape
    assert torch.equal(credit.rewards, seg.mask_iou_reward(actions, outputs, targets, {"counted": counted}))
    probs = outputs.softmax(-1)
    checked = 0
    for place in itertools.product(*map(range, actions.shape)):
        b, t, a, y, x = place
        if not counted[b, y, x]:
            continue
        score = slow_mean_iou(actions[b, t, a], targets[b], counted[b])
        expected = 0.0
        for k in range(num_classes):
            other = actions[b, t, a].clone()
            other[y, x] = k
            expected += float(probs[b, t, y, x, k]) * slow_mean_iou(other, targets[b], counted[b])
        assert float(credit.advantages[place]) == pytest.approx(score - expected, abs=1e-6)
        checked += 1
    assert checked > 50


def test_credit_of_a_mask_of_one_class_and_of_a_lone_pixel():
    """Unions of one pixel, where a class vanishes when its pixel leaves: 0 / 0 counts as 0."""
    for target, action in itertools.product(itertools.product(range(2), repeat=2), repeat=2):
        targets = torch.tensor(target).view(1, 1, 2)
        actions = torch.tensor(action).view(1, 1, 1, 1, 2)
        outputs = torch.zeros(1, 1, 1, 2, 2, dtype=torch.float64)
        advantages = seg.mask_iou_credit(actions, outputs, targets, {}).advantages
        counted = torch.ones_like(targets, dtype=torch.bool)
        for x in range(2):
            flipped = actions.clone()
            flipped[..., x] = 1 - flipped[..., x]
            mean = (slow_mean_iou(actions, targets, counted) + slow_mean_iou(flipped, targets, counted)) / 2
            expected = slow_mean_iou(actions, targets, counted) - mean
            assert float(advantages[..., x]) == pytest.approx(expected, abs=1e-7)


def test_credit_keeps_its_precision_on_large_masks():
    """Changes of 1e-6 in a score near 1, in float32: written without cancellation."""
    targets = torch.zeros(1, 512, 512, dtype=torch.int64)
    targets[:, :256] = 1
    actions = targets[:, None, None].clone()
    actions[..., 0, 0] = 0
    advantages = seg.mask_iou_credit(actions, torch.zeros(1, 1, 512, 512, 2), targets, {}).advantages
    n = 512 * 256
    # the wrong pixel: class 0 has IoU n / (n + 1), class 1 (n - 1) / n; right they would both be 1
    assert float(advantages[..., 0, 0]) == pytest.approx(-0.5 * (1 / (n + 1) + 1 / n) / 2, rel=1e-5)
    # a right pixel of class 1, were it 0: class 1 loses 1 / n, class 0 goes from n / (n + 1) to n / (n + 2)
    lost = (1 / n + n / (n + 1) - n / (n + 2)) / 2
    assert float(advantages[..., 0, 1]) == pytest.approx(0.5 * lost, rel=1e-5)


def test_expected_credit_is_zero():
    """Σ_a π(a) A(a) = 0 at each pixel, the others held: the counterfactual baseline changes no expectation."""
    actions, outputs, targets, _ = case(4, seed=3)
    probs = outputs.softmax(-1)
    for y, x in ((0, 0), (1, 2)):
        total = 0.0
        for k in range(4):
            changed = actions.clone()
            changed[..., y, x] = k
            advantages = seg.mask_iou_credit(changed, outputs, targets, {}).advantages[..., y, x]
            total = total + probs[:, :, y, x, k][:, :, None] * advantages
        assert total.abs().max() < 1e-7


# --- Policy -----------------------------------------------------------------------------------------------------------


def test_adapter_is_a_categorical_by_pixel():
    actions, outputs, _, _ = case(5)
    policy = seg.mask_policy_adapter(outputs.to(torch.bfloat16))
    assert policy.batch_shape == (2, 2, 3, 4) and policy.logits.dtype == torch.float32
    expected = outputs.log_softmax(-1)[:, :, None].expand(2, 2, 3, 3, 4, 5).gather(-1, actions[..., None])[..., 0]
    got = seg.mask_policy_adapter(outputs).log_prob(actions.movedim(2, 0)).movedim(0, 2)
    assert torch.allclose(got, expected, atol=1e-12)
    assert torch.equal(got[:, :, 0], Categorical(logits=outputs).log_prob(actions[:, :, 0]))


@pytest.mark.parametrize("num_classes", [1, 2, 11])
def test_adapter_draws_each_class_as_often_as_its_probability(num_classes):
    torch.manual_seed(0)
    outputs = torch.randn(1, 2, 3, 4, num_classes) * 2
    outputs[..., 0, num_classes // 2] = -torch.inf if num_classes > 1 else 0  # a class that must never come
    policy = seg.mask_policy_adapter(outputs)
    n = 20_000
    drawn = policy.sample((n,))
    assert drawn.shape == (n, 1, 2, 3, 4) and drawn.dtype == torch.int64
    share = F.one_hot(drawn, num_classes).float().mean(0)
    expected = outputs.softmax(-1)
    deviation = (share - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp(min=1e-6)
    assert deviation.max() < 4.5  # standard deviations, of at most 264 shares
    neighbours = drawn.float().flatten(1)
    if num_classes > 1:  # pixels are drawn independently of each other (nan: one that is always the same)
        assert torch.corrcoef(neighbours.T).nan_to_num(0).triu(1).abs().max() < 4.5 / n**0.5
    assert policy.sample().shape == (1, 2, 3, 4) and policy.sample((2, 5)).shape == (2, 5, 1, 2, 3, 4)
    torch.manual_seed(1)
    first = policy.sample((3,))
    torch.manual_seed(1)
    assert first.equal(policy.sample((3,)))


def test_unpatchify_puts_each_logit_in_its_place():
    """Token (r, c), channel ((y, x), k) -> pixel (4 r + y, 4 c + x), class k."""
    patch, classes, side = 4, 3, 2
    assert seg.head_size(classes, patch) == 48
    tokens = torch.randn(2, 5, side * side, patch * patch * classes)
    pixels = seg.unpatchify(tokens, patch)
    assert pixels.shape == (2, 5, 8, 8, 3)
    for r, c, y, x, k in itertools.product(range(2), range(2), range(4), range(4), range(3)):
        expected = tokens[:, :, side * r + c, (patch * y + x) * classes + k]
        assert torch.equal(pixels[:, :, patch * r + y, patch * c + x, k], expected)
    assert torch.equal(seg.unpatchify(tokens[:, 0], patch), pixels[:, 0])


# --- Data -------------------------------------------------------------------------------------------------------------


def folder(root, size=(8, 8), count=2, classes="background\nthing\n", mode="L", values=None):
    for name in ("images", "masks"):
        (root / name / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        stem = f"deep/{i}" if i else "0"
        image = rng.integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
        mask = (rng.random((size[1], size[0])) < 0.5).astype(np.uint8) if values is None else values
        Image.fromarray(image).save(root / "images" / f"{stem}.png")
        saved = Image.fromarray(mask)
        if mode == "P":
            saved.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [7] * 759)
        saved.save(root / "masks" / f"{stem}.png")
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


@pytest.mark.parametrize("mode", ["L", "P"])
def test_dataset_reads_values_not_colours(tmp_path, mode):
    values = np.array([[0, 1, 2, 255]] * 4, dtype=np.uint8)
    root = folder(tmp_path, (4, 4), classes="a\nb\nc\n", mode=mode, values=values)
    dataset = seg.SegmentationDataset(str(root), 4)
    assert dataset.classes == ["a", "b", "c"] and len(dataset) == 2 and dataset[0].shape == (4, 4, 4)
    batch = dataset.batch(torch.tensor([1, 0]), torch.stack([dataset[1], dataset[0]]))
    assert torch.equal(batch.targets[0], torch.tensor([[0, 1, 2, 0]] * 4)) and batch.targets.dtype == torch.int64
    assert torch.equal(batch.counted[0], torch.tensor([[True, True, True, False]] * 4))
    assert batch.inputs.shape == (2, 3, 4, 4) and batch.metadata["classes"] == ("a", "b", "c")
    assert [p.split("images/")[1] for p in batch.metadata["paths"]] == ["deep/1.png", "0.png"]


@pytest.mark.parametrize("size", [2, 3, 8, 12])
def test_masks_are_resized_by_nearest_neighbour(tmp_path, size):
    """Output pixel i shows the input pixel that holds its centre: no new values, no shift."""
    values = np.arange(36, dtype=np.uint8).reshape(6, 6)
    Image.fromarray(values).save(tmp_path / "m.png")
    got = seg.decode_mask(str(tmp_path / "m.png"), (6, 6), size, 36)
    places = [int((i + 0.5) * 6 / size) for i in range(size)]
    assert torch.equal(got, torch.from_numpy(values[places][:, places]))


def test_mirroring_turns_images_masks_and_what_counts_alike():
    g = torch.Generator().manual_seed(0)
    inputs = torch.randint(255, (64, 3, 4, 4), generator=g, dtype=torch.uint8)
    targets, counted = inputs[:, 0].long() % 3, inputs[:, 1] < 200
    torch.manual_seed(1)
    flipped = seg.mirror_batch(TensorMiniBatch(inputs, targets, {"a": 1}, counted))
    chosen = (flipped.inputs != inputs).flatten(1).any(1)
    assert 20 < chosen.sum() < 44 and flipped.metadata == {"a": 1}
    for i in range(64):
        turn = (lambda x: x.flip(-1)) if chosen[i] else (lambda x: x)
        assert torch.equal(flipped.inputs[i], turn(inputs[i]))
        assert torch.equal(flipped.targets[i], turn(targets[i])) and torch.equal(flipped.counted[i], turn(counted[i]))


def test_batches_are_the_same_from_files_and_from_the_cache(tmp_path):
    dataset = seg.SegmentationDataset(str(folder(tmp_path, count=5)), 8)
    plain, kept = (list(ordered_batches(dataset, 2, cache=cache)) for cache in (False, True))
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
        assert torch.equal(a.counted, b.counted)


def test_classes_without_a_file_are_numbered(tmp_path):
    root = str(folder(tmp_path, classes=None))
    assert seg.SegmentationDataset(root, 8, num_classes=3).classes == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"classes.txt: no such file; .* set model.num_classes"):
        seg.SegmentationDataset(root, 8)


def break_it(root, how):
    if how == "folder":
        (root / "masks").rename(root / "labels")
    elif how == "mask missing":
        (root / "masks" / "0.png").unlink()
    elif how == "image missing":
        (root / "images" / "0.png").unlink()
    elif how == "twice":
        Image.open(root / "images" / "0.png").save(root / "images" / "0.jpg")
    elif how == "size":
        Image.new("L", (8, 7)).save(root / "masks" / "0.png")
    elif how == "value":
        Image.new("L", (8, 8), 2).save(root / "masks" / "0.png")
    elif how == "rgb":
        Image.new("RGB", (8, 8)).save(root / "masks" / "0.png")
    elif how == "NaN":
        Image.new("F", (8, 8), float("nan")).save(root / "masks" / "0.tif")
        (root / "masks" / "0.png").unlink()
    elif how == "garbage":
        (root / "masks" / "0.png").write_text("not a picture")
    elif how == "classes":
        (root / "classes.txt").write_text("one\n")


@pytest.mark.parametrize(
    "how, message",
    [
        ("folder", "no folder masks; it should hold images/ and masks/"),
        ("mask missing", r"images/0.png: it has no mask .*masks/0.png"),
        ("image missing", "masks/0.png: a mask without an image"),
        ("twice", "0.* has the same stem; remove one of them"),
        ("size", "masks/0.png: the mask has 8x7 pixels, its image 8x8"),
        ("value", r"masks/0.png: pixel value 2, but the classes are 0 to 1 \(255 is ignored\)"),
        ("rgb", "masks/0.png: a mask should be an 8-bit single-channel or palette PNG, not RGB"),
        ("NaN", "masks/0.tif: a mask should be an 8-bit single-channel or palette PNG, not F"),
        ("garbage", "masks/0.png: not a readable mask"),
        ("classes", "classes.txt: it should name 2 to 254 different classes"),
    ],
)
def test_what_is_broken_is_named_in_one_line(tmp_path, how, message):
    root = folder(tmp_path)
    break_it(root, how)
    with pytest.raises(InputError, match=message) as error:
        dataset = seg.SegmentationDataset(str(root), 8)
        dataset[0]
    assert "\n" not in str(error.value)


# --- Metric -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes, absent", [(2, False), (4, False), (4, True)])
def test_metrics_against_scikit_learn(num_classes, absent):
    """One confusion matrix over the data set, ignored pixels left out, not the mean of the images' IoUs."""
    g = torch.Generator().manual_seed(num_classes)
    targets = torch.randint(num_classes - absent, (6, 5, 5), generator=g)
    predicted = torch.where(torch.rand(6, 5, 5, generator=g) < 0.6, targets, (targets + 1) % (num_classes - absent))
    counted = torch.rand(6, 5, 5, generator=g) < 0.7
    confusion = seg.confusion_matrix(predicted, targets, counted, num_classes)
    truth, guess = targets[counted].numpy(), predicted[counted].numpy()
    assert np.array_equal(confusion, sklearn_confusion(truth, guess, labels=range(num_classes)))
    figures = seg.segmentation_metrics(confusion, [f"c{k}" for k in range(num_classes)])
    assert figures["mean_iou"] == pytest.approx(jaccard_score(truth, guess, average="macro"), abs=1e-12)
    assert figures["pixel_accuracy"] == pytest.approx((truth == guess).mean(), abs=1e-12)
    by_class = jaccard_score(truth, guess, average=None)
    assert [figures[f"iou/c{k}"] for k in range(num_classes - absent)] == pytest.approx(by_class, abs=1e-12)
    assert f"iou/c{num_classes - 1}" not in figures or not absent


def test_evaluation_is_that_of_both_predictors_over_all_batches(tmp_path):
    dataset = seg.SegmentationDataset(str(folder(tmp_path, count=5)), 8)
    evaluation = seg.Evaluation(dataset, CONFIG, shown=3)
    torch.manual_seed(0)
    truth, single, mean, counted = [], [], [], []
    for batch in ordered_batches(dataset, 2):
        outputs, passes = torch.randn(len(batch), 8, 8, 2), torch.randn(len(batch), 3, 8, 8, 2)
        evaluation.add(batch, outputs, passes)
        truth.append(batch.targets)
        single.append(outputs.argmax(-1))
        mean.append(passes.softmax(-1).mean(1).argmax(-1))
        counted.append(batch.counted)
    truth, single, mean = (torch.cat(x).flatten().numpy() for x in (truth, single, mean))
    figures = evaluation.figures()
    assert figures["eval/mean_iou"] == pytest.approx(jaccard_score(truth, single, average="macro"))
    assert figures["eval_mc/mean_iou"] == pytest.approx(jaccard_score(truth, mean, average="macro"))
    assert figures["eval_mc/iou/thing"] == pytest.approx(jaccard_score(truth, mean))
    picture = evaluation.draw()
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3 and picture.float().std() > 1
    entropies = [entropy for entropy, _ in evaluation.pictures]
    assert len(entropies) == 3 and entropies == sorted(entropies, reverse=True)


def test_pictures_show_classes_and_ignored_pixels():
    image = torch.full((3, 1, 4), 100, dtype=torch.uint8)
    shown = seg.overlay(image, torch.tensor([[0, 1, 2, 255]]))
    assert shown[:, 0, 0].tolist() == [100] * 3  # the background stays
    assert len({tuple(shown[:, 0, i].tolist()) for i in range(4)}) == 4
    assert shown[:, 0, 3].tolist() == [193] * 3  # 0.4 * 100 + 0.6 * 255
