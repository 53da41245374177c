"""Boxes: COCO's format, assignment, the policy, rewards and losses against slow references, decoding, the metrics."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import message
from PIL import Image
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn.functional import cross_entropy, one_hot

import detection_task as det
import grpo
from build import configure
from coco_ap import average_precision
from data_types import TensorMiniBatch
from grpo import action_log_prob, nll, sample_actions
from images import ordered_batches

SIDE, K = 4, 3  # 16x16 pixels, 4x4 patches of 4 pixels, 3 classes


def task_with(**keys) -> det.Detection:
    """The task with keys of its section."""
    keys = {f"detection.{name}": value for name, value in keys.items()}
    return configure(("test", {"task": "detection", "model.image_size": 16, "model.patch_size": 4} | keys))[1]


def shared(a, b) -> float:
    """The area that two boxes x0 y0 x1 y1 share, in plain Python; of a box with itself it is its area."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def iou(a, b) -> float:
    return shared(a, b) / (shared(a, a) + shared(b, b) - shared(a, b))


def slow_nms(boxes, labels, order, threshold=0.5) -> list[int]:
    """Class-wise, the places in `order`, one by one, in plain Python."""
    kept: list[int] = []
    for p in order:
        if all(labels[q] != labels[p] or iou(boxes[q], boxes[p]) <= threshold for q in kept):
            kept.append(p)
    return kept


def objects(boxes, labels, crowd=None):
    """One image's objects as a batch of one."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(1, -1, 4)
    crowd = torch.tensor([crowd or [False] * len(labels)], dtype=torch.bool).view(1, -1)
    return boxes, torch.tensor([labels], dtype=torch.int64).view(1, -1), crowd


TARGETS = det.encode(*objects([[2, 3, 14, 9], [1, 9, 6, 15]], [1, 0]), 16, 4, K)[0]


def test_an_object_goes_to_the_patches_of_its_middle():
    """A box of 11x6 pixels at (1, 3): its middle spans x 2.4..10.6, y 3.75..8.25; patch centres are 2, 6, 10, 14."""
    targets, counted = det.encode(*objects([[1, 3, 12, 9]], [1]), 16, 4, K)
    expected = torch.full((SIDE, SIDE), float(K))
    expected[1, 1] = expected[1, 2] = 1  # y 6, x 6 and 10
    assert torch.equal(targets[0, 0, :, 0].view(SIDE, SIDE), expected)
    assert counted[0, 0].all() and torch.equal(counted[0, 1].view(SIDE, SIDE), expected == 1)
    raw = targets[0, 1].view(SIDE, SIDE, 4)[1, 1]
    assert raw.tolist() == pytest.approx([(6.5 - 6) / 4, 0, math.log(11 / 4), math.log(6 / 4)])
    for corners in det.decode_boxes(targets[0, 1], 4)[counted[0, 1]]:
        assert corners.tolist() == pytest.approx([1, 3, 12, 9], abs=1e-5)
    small, counted = det.encode(*objects([[8.5, 12.5, 9.5, 13.5]], [2]), 16, 4, K)  # only the centre's patch
    assert counted[0, 1].nonzero().tolist() == [[3 * SIDE + 2]] and small[0, 0, 3 * SIDE + 2, 0] == 2


def test_the_smaller_object_wins_and_empty_boxes_are_none():
    """A batch may have no object at all."""
    big, small, empty = [0, 0, 16, 16], [5, 5, 7, 7], [9, 9, 9, 12]
    targets, _ = det.encode(*objects([big, small, empty], [0, 1, 2]), 16, 4, K)
    classes = targets[0, 0, :, 0].view(SIDE, SIDE)
    assert classes[1, 1] == 1 and classes[2, 2] == 0 and not (classes == 2).any()
    swapped, _ = det.encode(*objects([small, empty, big], [1, 2, 0]), 16, 4, K)
    assert torch.equal(swapped, targets)
    targets, counted = det.encode(*objects([], []), 16, 4, K)
    assert (targets[:, 0, :, 0] == K).all() and counted[:, 0].all() and not counted[:, 1].any()


def test_in_a_crowd_the_class_does_not_count():
    targets, counted = det.encode(*objects([[0, 0, 8, 16], [1, 1, 3, 3]], [0, 1], [True, False]), 16, 4, K)
    inside = torch.tensor([[True, True, False, False]] * SIDE)
    inside[0, 0] = False  # an object's own patch counts
    assert torch.equal(counted[0, 0].view(SIDE, SIDE), ~inside)
    assert counted[0, 1].nonzero().flatten().tolist() == [0] and targets[0, 0, 0, 0] == 1
    assert (targets[0, 0, 1:, 0] == K).all()


def coco(root):
    """A folder of two images with objects and one without, turned by their EXIF; ids with gaps."""
    (root / "images").mkdir(parents=True)
    exif, images = Image.Exif(), {"a.jpg": (7, 8, 16), "b.jpg": (3, 32, 16), "c.png": (9, 16, 16)}
    exif[274] = 6  # stored lying
    for name, (_, width, height) in images.items():
        Image.effect_noise((height, width), 50).convert("RGB").save(root / "images" / name, exif=exif)
    data = {
        "images": [{"id": i, "file_name": n, "width": w, "height": h} for n, (i, w, h) in images.items()],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 4, 4, 8], "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 5, "bbox": [0, 0, 16, 16.5], "iscrowd": 1},
            {"id": 3, "image_id": 3, "category_id": 90, "bbox": [8, 8, 0, 4]},
        ],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 5, "name": "ant"}],
    }
    (root / "annotations.json").write_text(json.dumps(data))
    return det.DetectionDataset(str(root), 16, 4), data


def test_dataset_reads_coco_and_scales_boxes_with_the_image(tmp_path):
    """[x, y, w, h] of 8x16 and 32x16 images -> corners at 16x16; categories by ascending id; padding is -1."""
    _, data = coco(tmp_path)
    data["annotations"].append({"id": 4, "image_id": 3, "category_id": 90, "bbox": [16, 2, 8, 4]})
    (tmp_path / "annotations.json").write_text(json.dumps(data))
    dataset = task_with().open(str(tmp_path))
    assert dataset.classes == ["ant", "zebra"] and len(dataset) == 3 and dataset[0].shape == (3, 16, 16)
    batch = dataset.batch(torch.arange(3), torch.stack([dataset[i] for i in range(3)]))
    assert batch.metadata["boxes"][0, 0].tolist() == [4, 4, 12, 12]
    assert batch.metadata["boxes"][1].tolist() == [[0, 0, 8, 16], [8, 2, 12, 6]]
    assert batch.metadata["labels"].tolist() == [[1, -1], [0, 1], [-1, -1]]
    assert batch.metadata["crowd"].tolist() == [[False, False], [True, False], [False, False]]
    assert batch.targets.shape == (3, 2, 16, 4) and batch.metadata["patch_size"] == 4
    assert batch.counted[:, 1].sum(1).tolist() == [4, 2, 0]  # the crowd is assigned to no patch
    assert dataset.notes == ("boxes over the border of their image, clipped: 1", "boxes without area, skipped: 1")


def test_evaluation_folder_uses_the_training_folders_classes(tmp_path):
    coco(tmp_path)
    dataset = task_with().open(str(tmp_path), ["bee", "zebra", "ant"])
    assert dataset.labels[0].tolist() == [1] and dataset.labels[1].tolist() == [2]
    expected = f"{tmp_path}/annotations.json: categories unknown in training: ant"
    assert message(task_with().open, str(tmp_path), ["zebra"]) == expected
    assert message(task_with().open, f"{tmp_path}/no").startswith(f"{tmp_path}/no/annotations.json: no such file; ")


def test_mirroring_is_encoding_the_mirrored_boxes(tmp_path):
    dataset, _ = coco(tmp_path)
    batch = dataset.batch(torch.arange(3).repeat(20), torch.stack([dataset[i] for i in range(3)]).repeat(20, 1, 1, 1))
    torch.manual_seed(0)
    mirrored = task_with().mirror(batch)
    chosen = (mirrored.inputs != batch.inputs).flatten(1).any(1)
    assert 15 < chosen.sum() < 45 and torch.equal(mirrored.inputs[chosen], batch.inputs[chosen].flip(-1))
    boxes = batch.metadata["boxes"].clone()
    boxes[chosen, :, 0], boxes[chosen, :, 2] = 16 - batch.metadata["boxes"][chosen][..., 2], 16 - boxes[chosen, :, 0]
    assert torch.equal(mirrored.metadata["boxes"], boxes)
    targets, counted = det.encode(boxes, batch.metadata["labels"], batch.metadata["crowd"], 16, 4, 2)
    assert torch.allclose(mirrored.targets, targets, atol=1e-6) and torch.equal(mirrored.counted, counted)


def outputs_and_actions():
    """Outputs [2, 2, P, K + 5], actions [2, 2, 3, 2, P, 4] and their labels."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(K + 1, (2, 2, 3, 16), generator=g)
    actions = det.pack(labels, torch.randn(2, 2, 3, 16, 4, generator=g) * 0.4)
    return torch.randn(2, 2, 16, K + 5, generator=g), actions, labels


def test_log_prob_is_that_of_a_categorical_and_a_normal():
    outputs, actions, labels = outputs_and_actions()
    policy = task_with(box_std=0.2).policy(outputs)
    assert policy.batch_shape == (2, 2, 2, 16) and policy.event_shape == (4,)
    got = action_log_prob(policy, actions)
    classes = Categorical(logits=outputs[:, :, None, :, :-4]).log_prob(labels)
    boxes = Normal(outputs[:, :, None, :, -4:], 0.2).log_prob(actions[..., 1, :, :]).sum(-1)
    assert torch.allclose(got, torch.stack([classes, boxes], 3), atol=1e-5)
    reference = det.box_policy_adapter(outputs + 0.1 * outputs.flip(0), std=0.2)
    kl = kl_divergence(policy, reference)
    assert kl.shape == policy.entropy().shape == (2, 2, 2, 16)
    between = kl_divergence(Normal(outputs[..., -4:], 0.2), Normal(reference.boxes.mean, 0.2)).sum(-1)
    assert torch.allclose(kl[:, :, 1], between, atol=1e-5)
    assert torch.allclose(policy.entropy()[:, :, 0], Categorical(logits=outputs[..., :-4]).entropy())


def test_samples_have_the_policys_mean_and_std_and_classes():
    outputs = outputs_and_actions()[0][:1, :1]
    torch.manual_seed(0)
    policy = det.box_policy_adapter(outputs, std=0.5)
    drawn = sample_actions(policy, 4000)
    boxes, labels = drawn[0, 0, :, 1], drawn[0, 0, :, 0, :, 0].long()
    assert torch.allclose(boxes.mean(0), outputs[0, 0, :, -4:], atol=0.05)
    assert torch.allclose(boxes.std(0), torch.tensor(0.5), atol=0.03)
    assert torch.allclose(one_hot(labels, K + 1).float().mean(0), policy.classes.probs[0, 0], atol=0.04)
    assert torch.equal(policy.mode[0, 0, 0, :, 0], outputs[0, 0, :, :-4].argmax(-1).float())
    assert torch.equal(policy.mode[0, 0, 1], outputs[0, 0, :, -4:])


def test_every_choice_is_a_class_and_the_boxes_are_sampled():
    """With action: all the classes' gradient is that of the expected reward over each patch's classes, the boxes' is
    that of their draws; what does not count is in neither."""
    outputs = outputs_and_actions()[0].double().requires_grad_()
    targets, counted = TARGETS.expand(2, -1, -1, -1), torch.rand(2, 2, 16, generator=torch.manual_seed(0)) < 0.7
    batch = TensorMiniBatch(torch.zeros(2), targets, {}, counted)
    network = type("Net", (), {"sample_masks": lambda self, B, T: {}, "__call__": lambda self, x, masks: outputs})()
    how = grpo.RolloutSettings(2, 3, "all", "rloo")
    episode = grpo.rollout(network, batch, {"r": (det.detection_reward, 1.0)}, det.box_policy_adapter, how)
    assert episode.actions.shape == (2, 2, 3, 2, 16, 4) and episode.log_probs.shape == (2, 2, 3 + K + 1, 2, 16)
    loss, _ = grpo.policy_loss(episode, episode.policy, episode.log_probs, grpo.UpdateSettings())
    gradient = torch.autograd.grad(loss, outputs, retain_graph=True)[0]
    probs, right = outputs[..., :-4].softmax(-1), targets[:, 0, :, 0].long()
    expected = probs.gather(-1, right[:, None, :, None].expand(-1, 2, -1, -1))[..., 0]  # [B, T, P]
    iou = det.detection_reward(episode.actions, None, targets, {})[..., 1, :]
    advantages = iou - iou.mean((1, 2), keepdim=True)
    log_probs = action_log_prob(det.box_policy_adapter(outputs), episode.actions)[..., 1, :]
    total = (expected * counted[:, None, 0]).sum() / 2 + (advantages * log_probs * counted[:, None, None, 1]).sum() / 6
    exact = torch.autograd.grad(-total / counted.sum(), outputs)[0]
    assert torch.allclose(gradient, exact, atol=1e-9) and exact[..., :-4].norm() > 1e-3 < exact[..., -4:].norm()
    metrics = grpo.rollout_metrics(episode)
    each = (expected.mean(1) * counted[:, 0]).sum(-1) + (iou.mean((1, 2)) * counted[:, 1]).sum(-1)
    assert torch.allclose(metrics["group_rewards"], each / counted.flatten(1).sum(1))


def test_supervised_losses():
    """-log π(targets), and cross-entropy with 1 - IoU."""
    outputs, _, _ = outputs_and_actions()
    policy, wanted = det.box_policy_adapter(outputs), TARGETS[:, None, None].expand(2, 2, 1, 2, 16, 4)
    assert torch.equal(task_with(supervised_loss="log_prob").supervised_loss(policy, wanted), nll(policy, wanted))
    loss = task_with(supervised_loss="iou").supervised_loss(policy, wanted)
    truth, boxes = det.decode_boxes(TARGETS[0, 1], 4).tolist(), det.decode_boxes(outputs[..., -4:], 4).tolist()
    for b, t in itertools.product(range(2), range(2)):
        expected = cross_entropy(outputs[b, t, :, :-4], TARGETS[0, 0, :, 0].long(), reduction="none")
        assert torch.allclose(loss[b, t, 0, 0], expected, atol=1e-5)
        expected = [1 - iou(ours, theirs) for ours, theirs in zip(boxes[b][t], truth)]
        assert loss[b, t, 0, 1].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("end, expected", [(0.125, [0.5, 0.25, 0.125]), (None, [0.5] * 3)])
def test_standard_deviation_goes_from_its_beginning_to_its_end(end, expected):
    task, outputs = task_with(box_std=0.5, box_std_end=end), torch.zeros(1, 1, 16, K + 5)
    assert [float(task.policy(outputs, x).boxes.stddev.max()) for x in (0, 0.5, 1)] == pytest.approx(expected)


def test_detection_reward_against_loops():
    outputs, actions, labels = outputs_and_actions()
    reward = det.detection_reward(actions, outputs, TARGETS.expand(2, -1, -1, -1), {})
    truth, boxes = det.decode_boxes(TARGETS[0, 1], 4).tolist(), det.decode_boxes(actions[..., 1, :, :], 4).tolist()
    for b, t, a in itertools.product(range(2), range(2), range(3)):
        assert torch.equal(reward[b, t, a, 0], (labels[b, t, a] == TARGETS[0, 0, :, 0]).float())
        expected = [iou(ours, theirs) for ours, theirs in zip(boxes[b][t][a], truth)]
        assert reward[b, t, a, 1].tolist() == pytest.approx(expected, abs=1e-5)


def slow_f1(boxes, labels, scores, truths, true_labels, crowds) -> float:
    """NMS, then matching, best score first, in plain Python."""
    order = sorted((p for p in range(len(labels)) if labels[p] < K), key=lambda p: -scores[p])
    free = [m for m in range(len(truths)) if true_labels[m] >= 0 and not crowds[m]]
    count, found = len(free), 0
    for p in slow_nms(boxes, labels, order):
        able = [m for m in free if true_labels[m] == labels[p] and iou(boxes[p], truths[m]) >= 0.5]
        if able:
            free.remove(max(able, key=lambda m: iou(boxes[p], truths[m])))
        crowded = [t for t, k, crowd in zip(truths, true_labels, crowds) if crowd and k == labels[p]]
        found += bool(able) or not any(shared(boxes[p], t) / shared(boxes[p], boxes[p]) > 0.5 for t in crowded)
    return 1.0 if found + count == 0 else 2 * (count - len(free)) / (found + count)


@pytest.mark.parametrize("seed", range(6))
def test_f1_reward_against_loops(seed):
    """Random sets near the truth, with tied scores, overlaps to suppress, crowds, padding, an image without objects.
    The truth itself has 1; nothing has 0, or 1 where there is nothing."""
    g = torch.Generator().manual_seed(seed)
    truths = [[[2, 3, 14, 9], [1, 9, 6, 15], [9, 9, 15, 15]], [[0, 0, 16, 16], [4, 4, 12, 10], [0] * 4], [[0] * 4] * 3]
    true_labels, crowds = [[1, 0, 1], [0, 2, -1], [-1] * 3], [[False, False, True], [True, False, False], [False] * 3]
    truth = torch.tensor(truths).float(), torch.tensor(true_labels), torch.tensor(crowds)
    metadata = dict(zip(("boxes", "labels", "crowd"), truth)) | {"patch_size": 4}
    targets, _ = det.encode(*truth, 16, 4, K)
    shape = (3, 2, 4, 16)
    outputs = torch.randn(3, 2, 16, K + 5, generator=g)
    outputs[:, 0] = 0  # all scores are tied
    labels = targets[:, None, None, 0, :, 0].long().expand(shape)
    labels = torch.where(torch.rand(shape, generator=g) < 0.2, torch.randint(K + 1, shape, generator=g), labels)
    raw = targets[:, None, None, 1] + 0.3 * torch.randn(*shape, 4, generator=g)
    labels[:, :, 0], raw[:, :, 0], labels[:, :, 1] = targets[:, None, 0, :, 0].long(), targets[:, None, 1], K
    reward = det.detection_f1_reward(det.pack(labels, raw), outputs, targets, metadata)
    scores = outputs[..., :-4].softmax(-1)[:, :, None].expand(*shape, K + 1).gather(-1, labels[..., None])[..., 0]
    boxes = det.decode_boxes(raw, 4)
    for b, t, a in itertools.product(range(3), range(2), range(4)):
        found = (x[b, t, a].tolist() for x in (boxes, labels, scores))
        expected = slow_f1(*found, truths[b], true_labels[b], crowds[b])
        assert float(reward[b, t, a]) == pytest.approx(expected, abs=1e-6)
    assert (reward[:, :, 0] == 1).all() and reward[:, :, 1].tolist() == [[0, 0], [0, 0], [1, 1]]
    assert 0 < reward[:2, :, 2:].mean() < 1


def slow_set_score(classes, boxes, truths, true_labels, thresholds) -> float:
    """(2 Σ_objects best share of the thresholds reached by its claims + 1) / (n + M + 1), in plain Python. Truths are
    the objects alone; a class of K or more is no detection."""
    best = dict.fromkeys(range(len(truths)), 0.0)
    for k, box in zip(classes, boxes):
        same = [m for m in range(len(truths)) if true_labels[m] == k < K]
        if same:
            overlaps = [iou(box, truths[m]) for m in same]
            m = same[overlaps.index(max(overlaps))]  # of equals the first
            best[m] = max(best[m], sum(max(overlaps) >= x for x in thresholds) / len(thresholds))
    return (2 * sum(best.values()) + 1) / (sum(k < K for k in classes) + len(truths) + 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("credit", [det.detection_set_credit, det.detection_set_credit_50])
def test_set_credit_against_brute_force(credit, seed):
    """Every choice of every patch, put into the set as drawn. Boxes lie on a grid, so that claims tie; two objects of a
    class have the same box; there is a crowd, an empty box, an image without an object and a draw without detection."""
    g = torch.Generator().manual_seed(seed)
    truths = [
        [[0, 0, 8, 8], [0, 0, 8, 8], [4, 4, 16, 12]],
        [[0, 0, 16, 16], [4, 4, 12, 12], [2, 2, 2, 6]],
        [[0] * 4] * 3,
    ]
    labels, crowds = [[1, 1, 0], [0, 2, 1], [-1] * 3], [[False] * 3, [True, False, False], [False] * 3]
    truth = torch.tensor(truths).double(), torch.tensor(labels), torch.tensor(crowds)
    counted = torch.rand(3, 2, 16, generator=g) < 0.85
    metadata = dict(zip(("boxes", "labels", "crowd"), truth)) | {"patch_size": 4, "counted": counted}
    targets = det.encode(*truth, 16, 4, K)[0].double()
    shape = (3, 2, 3, 16)
    chosen = torch.randint(K + 1, shape, generator=g)
    chosen[:, 0, 0] = K
    raw = torch.randint(1, 3, (*shape, 4), generator=g).double()  # centres half a patch off, sides of 2 or 4 patches
    raw *= torch.tensor([0.5, 0.5, math.log(2), math.log(2)], dtype=torch.float64)
    raw[..., :2] *= torch.randint(-1, 2, (*shape, 2), generator=g)
    actions = det.pack(chosen, raw)
    found = credit(actions, torch.zeros(3, 2, 16, K + 5), targets, metadata)
    thresholds = np.linspace(0.5, 0.95, 10).round(2)[: 10 if credit is det.detection_set_credit else 1]
    assert found.values.shape == (3, 2, 2, 16, K + 1) and not found.values[:, :, 1].any()
    for b, t in itertools.product(range(3), range(2)):
        real = [m for m in range(3) if labels[b][m] >= 0 and not crowds[b][m] and truths[b][m] != [2, 2, 2, 6]]
        objects = [truths[b][m] for m in real], [labels[b][m] for m in real]
        expected = torch.zeros(16, K + 1, dtype=torch.float64)
        for a in range(3):
            boxes = det.decode_boxes(raw[b, t, a], 4).tolist()
            classes = torch.where(counted[b, 0], chosen[b, t, a], K).tolist()
            score = slow_set_score(classes, boxes, *objects, thresholds)
            assert float(found.rewards[b, t, a]) == pytest.approx(score, abs=1e-9)
            for p, k in itertools.product(range(16), range(K + 1)):
                changed = [*classes[:p], k, *classes[p + 1 :]]
                expected[p, k] += (len(real) + 1) * slow_set_score(changed, boxes, *objects, thresholds) / 3
        inside = counted[b, 0]
        torch.testing.assert_close(found.values[b, t, 0][inside], expected[inside], rtol=0, atol=1e-9)
    iou_of_boxes = det.detection_reward(actions, None, targets, {})[..., 1, :]
    expected = grpo.compute_advantages(iou_of_boxes, "maxrl")
    torch.testing.assert_close(found.advantages[..., 1, :], expected, rtol=0, atol=1e-12)
    assert not found.advantages[..., 0, :].any()


def test_set_credit_of_a_batch_without_objects():
    """Nothing found is right: background is worth the most, and boxes learn nothing."""
    boxes, labels, crowd = objects([], [])
    metadata = {"boxes": boxes, "labels": labels, "crowd": crowd, "patch_size": 4}
    actions = det.pack(torch.full((1, 1, 2, 16), K), torch.zeros(1, 1, 2, 16, 4))
    targets = det.encode(boxes, labels, crowd, 16, 4, K)[0]
    found = det.detection_set_credit(actions, torch.zeros(1, 1, 16, K + 5), targets, metadata)
    assert (found.values[0, 0, 0, :, K] == 1).all() and (found.values[0, 0, 0, :, :K] == 0.5).all()
    assert (found.rewards == 1).all() and not found.advantages.any()


def test_decode_and_nms_against_loops():
    """Of tied scores the earlier patch's comes first, and of one patch the earlier class's. Boxes are on a grid: an IoU
    that is the threshold is not above it. The last image has no candidate."""
    g = torch.Generator().manual_seed(0)
    probs = torch.randint(1, 4, (20, 16, K + 1), generator=g).double()
    probs /= probs.sum(-1, keepdim=True)
    probs[-1] = torch.tensor([0, 0, 0, 1])
    raw = torch.randint(1, 3, (20, 16, 4), generator=g).double()  # centres half a patch off, sides of 2 or 4 patches
    raw *= torch.tensor([0.5, 0.5, math.log(2), math.log(2)], dtype=torch.float64)
    found = det.decode(probs, raw, task_with(score_threshold=0.2, nms_iou=0.5).config)
    labels, ties = list(range(K)) * 16, 0
    boxes = det.decode_boxes(raw, 4).clamp(0, 16).repeat_interleave(K, 1).tolist()
    for image, scores, corners in zip(found, probs[..., :-1].flatten(1).tolist(), boxes, strict=True):
        order = sorted((i for i in range(16 * K) if scores[i] >= 0.2), key=lambda i: -scores[i])
        kept = slow_nms(corners, labels, order)
        ties += sum(iou(corners[i], corners[j]) == 0.5 for i in kept for j in kept if labels[i] == labels[j])
        assert 5 < len(kept) < len(order) or not order
        assert image["labels"].tolist() == [labels[i] for i in kept]
        assert image["scores"].tolist() == [scores[i] for i in kept]
        assert image["boxes"].tolist() == [corners[i] for i in kept]
    assert ties > 20 and len(found[-1]["labels"]) == 0


def test_evaluation_is_coco_of_both_predictors(tmp_path):
    """The truth as prediction has AP 1; a shifted one has less."""
    dataset, _ = coco(tmp_path)
    evaluation = task_with().evaluation(dataset)
    for batch in ordered_batches(dataset, 2):
        logits = one_hot(batch.targets[:, 0, :, 0].long(), 3) * 9.0
        right = torch.cat([logits, batch.targets[:, 1]], -1)
        shifted = torch.cat([logits, batch.targets[:, 1] + torch.tensor([0.3, 0, 0, 0])], -1)
        evaluation.add(batch, right, torch.stack([right, shifted], 1))
    metrics = evaluation.metrics()
    assert metrics["eval/ap/zebra"] == metrics["eval/map"] == pytest.approx(1)
    assert "eval/ap/ant" not in metrics  # its only truth is a crowd
    mean = iou([4, 4, 12, 12], [4.6, 4, 12.6, 12])  # boxes averaged over the passes are 0.15 patches off
    assert metrics["eval_mc/map"] == pytest.approx(sum(t <= mean for t in np.linspace(0.5, 0.95, 10)) / 10)
    assert metrics["eval/f1"] == pytest.approx(1)  # one hit of one detection, one object
    assert metrics["eval/ap50"] == average_precision(evaluation.detections[0], evaluation.truths, 2)["ap50"]
    picture = evaluation.draw()
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3 and picture.float().std() > 1
    drawn = evaluation.draw_objects(torch.zeros(3, 16, 16, dtype=torch.uint8), evaluation.truths[0])
    edge, scale = (drawn == torch.tensor([0, 255, 0])[:, None, None]).all(0).nonzero(), det.BOX_PIXELS / 16
    assert edge.min(0).values.tolist() == [4 * scale] * 2 and edge.max(0).values.tolist() == [12 * scale - 1] * 2


def test_a_box_in_closed_form(tmp_path):
    """Two patches wide and high around the centre of patch (1, 1), 4 pixels of 16 each, in an image of 32x24."""
    path, task = str(tmp_path / "x.png"), task_with()
    Image.new("RGB", (32, 24)).save(path)
    outputs = torch.zeros(2, 16, 3 + 4)  # two passes; two classes and the background
    outputs[..., 2] = 20
    outputs[:, 5, :3] = torch.tensor([1.0, 20.0, 0.0])
    outputs[:, 5, 5:] = math.log(2)
    record, found = task.describe(outputs, path, ["cat", "dog"])
    (box,) = record["boxes"]
    assert box["class"] == "dog" and box["score"] == pytest.approx(1, abs=1e-6)
    assert box["box"] == pytest.approx([2 * 2, 2 * 1.5, 10 * 2, 10 * 1.5], abs=1e-4)
    assert task.in_words(record) == "dog (100%) at 4 3 20 15"
    for chance, shown in ((0.3, "cat (40%) at 4 3 20 15"), (0.5, "nothing")):  # of the background; the dog has 0.3
        outputs[:, 5, :3] = torch.tensor([0.7 - chance, 0.3, chance]).log()
        low, _ = task.describe(outputs, path, ["cat", "dog"])
        assert task.in_words(low).startswith(shown) and {b["class"] for b in low["boxes"]} == {"cat", "dog"}
    folder, picture = task.draw(Image.new("RGB", (128, 96)), record, found)["picture"]
    lime = np.argwhere((np.array(picture) == (0, 255, 0)).all(-1))  # at four times the size
    assert folder == "" and lime.min(0).tolist() == [12, 16] and lime.max(0).tolist() == [59, 79]
