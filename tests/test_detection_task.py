"""Boxes: COCO's format, assignment, the policy, rewards and losses against slow references, decoding."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn.functional import cross_entropy

import detection_task as det
from coco_ap import average_precision
from config import check
from data_types import InputError
from grpo import action_log_prob, nll, sample_actions
from vision_task import ordered_batches

CONFIG = check(
    (
        "test",
        {
            "task": "detection",
            "model.image_size": 16,
            "model.patch_size": 4,
            "model.embed_dim": 8,
            "model.num_heads": 1,
        },
    )
)
SIDE, K = 4, 3  # 16x16 pixels, 4x4 patches of 4 pixels, 3 classes


def iou(a, b) -> float:
    """IoU of two boxes x0 y0 x1 y1, in plain Python."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def objects(boxes, labels, crowd=None):
    """One image's objects as a batch of one."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(1, -1, 4)
    crowd = torch.tensor([crowd or [False] * len(labels)], dtype=torch.bool).view(1, -1)
    return boxes, torch.tensor([labels], dtype=torch.int64).view(1, -1), crowd


# --- Assignment -------------------------------------------------------------------------------------------------------


def test_an_object_goes_to_the_patches_of_its_middle():
    """A box of 12x6 pixels at (2, 3): its middle spans x 3.5..12.5, y 3.75..8.25; patch centres are 2, 6, 10, 14."""
    targets, counted = det.encode(*objects([[2, 3, 14, 9]], [1]), 16, 4, K)
    classes = targets[0, 0, :, 0].view(SIDE, SIDE)
    expected = torch.full((SIDE, SIDE), float(K))
    expected[1, 1] = expected[1, 2] = 1  # y 6, x 6 and 10
    assert torch.equal(classes, expected)
    assert counted[0, 0].all() and torch.equal(counted[0, 1].view(SIDE, SIDE), expected == 1)
    raw = targets[0, 1].view(SIDE, SIDE, 4)[1, 1]
    assert raw.tolist() == pytest.approx([(8 - 6) / 4, 0, math.log(12 / 4), math.log(6 / 4)])
    corners = det.decode_boxes(targets[0, 1], 4).view(SIDE, SIDE, 4)
    for x in (1, 2):
        assert corners[1, x].tolist() == pytest.approx([2, 3, 14, 9], abs=1e-5)


def test_a_small_object_goes_to_the_patch_of_its_centre():
    targets, counted = det.encode(*objects([[8.5, 12.5, 9.5, 13.5]], [2]), 16, 4, K)
    assert counted[0, 1].nonzero().flatten().tolist() == [3 * SIDE + 2]
    assert targets[0, 0, 3 * SIDE + 2, 0] == 2


def test_the_smaller_object_wins_and_empty_boxes_are_none():
    big, small, empty = [0, 0, 16, 16], [5, 5, 7, 7], [9, 9, 9, 12]
    targets, counted = det.encode(*objects([big, small, empty], [0, 1, 2]), 16, 4, K)
    assert targets[0, 0, :, 0].view(SIDE, SIDE)[1, 1] == 1
    assert targets[0, 0, :, 0].view(SIDE, SIDE)[2, 2] == 0 and not (targets[0, 0, :, 0] == 2).any()
    swapped, _ = det.encode(*objects([small, empty, big], [1, 2, 0]), 16, 4, K)
    assert torch.equal(swapped, targets)


def test_in_a_crowd_the_class_does_not_count():
    targets, counted = det.encode(*objects([[0, 0, 8, 16], [1, 1, 3, 3]], [0, 1], [True, False]), 16, 4, K)
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[:, :2] = True
    inside[0, 0] = False  # an object's own patch counts
    assert torch.equal(counted[0, 0].view(SIDE, SIDE), ~inside)
    assert counted[0, 1].nonzero().flatten().tolist() == [0] and targets[0, 0, 0, 0] == 1
    assert (targets[0, 0, 1:, 0] == K).all()


def test_no_object_in_the_whole_batch():
    targets, counted = det.encode(*objects([], []), 16, 4, K)
    assert (targets[:, 0, :, 0] == K).all() and counted[:, 0].all() and not counted[:, 1].any()


# --- Data -------------------------------------------------------------------------------------------------------------


def coco(root, **changes):
    """A folder of two images of 8x16 pixels, 32x16 and one without objects; ids with gaps."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (8, 16), "b.jpg": (32, 16), "c.png": (16, 16)}.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3)).astype(np.uint8)).save(root / "images" / name)
    data = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 8, "height": 16},
            {"id": 3, "file_name": "b.jpg", "width": 32, "height": 16},
            {"id": 9, "file_name": "c.png", "width": 16, "height": 16},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 4, 4, 8], "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 5, "bbox": [0, 0, 16, 16.5], "iscrowd": 1},
            {"id": 3, "image_id": 3, "category_id": 90, "bbox": [8, 8, 0, 4]},
        ],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 5, "name": "ant"}],
    } | changes
    (root / "annotations.json").write_text(json.dumps(data))
    return root, data


def test_dataset_reads_coco_and_scales_boxes_with_the_image(tmp_path):
    """[x, y, w, h] of 8x16 and 32x16 images -> corners at 16x16; categories by ascending id; padding is -1."""
    dataset = det.DetectionDataset(str(coco(tmp_path)[0]), 16, 4)
    assert dataset.classes == ["ant", "zebra"] and len(dataset) == 3 and dataset[0].shape == (3, 16, 16)
    batch = dataset.batch(torch.arange(3), torch.stack([dataset[i] for i in range(3)]))
    assert batch.metadata["boxes"][0, 0].tolist() == [4, 4, 12, 12]
    assert batch.metadata["boxes"][1].tolist() == [[0, 0, 8, 16.5], [4, 8, 4, 12]]
    assert batch.metadata["labels"].tolist() == [[1, -1], [0, 1], [-1, -1]]
    assert batch.metadata["crowd"].tolist() == [[False, False], [True, False], [False, False]]
    assert batch.targets.shape == (3, 2, 16, 4) and batch.counted.shape == (3, 2, 16)
    assert batch[1:].metadata["boxes"].shape == (2, 2, 4) and batch[1:].metadata["patch_size"] == 4
    assert batch.counted[:, 1].sum(1).tolist() == [4, 0, 0]  # the crowd and the empty box are assigned to no patch


def test_evaluation_folder_uses_the_training_folders_classes(tmp_path):
    root, _ = coco(tmp_path)
    dataset = det.DetectionDataset(str(root), 16, 4, ["bee", "zebra", "ant"])
    assert dataset.labels[0].tolist() == [1] and dataset.labels[1].tolist() == [2, 1]
    with pytest.raises(InputError, match="annotations.json: categories unknown in training: ant"):
        det.DetectionDataset(str(root), 16, 4, ["zebra"])


def row(data, section, i, **changes):
    return {section: [r | changes if j == i else r for j, r in enumerate(data[section])]}


BROKEN = {
    "annotations.json: cannot be read": "not json {",
    "it should hold a list of images": lambda d: {"images": 5},
    "it names no image": lambda d: {"images": [], "annotations": []},
    r"images\[1\] has no file_name": lambda d: {"images": [d["images"][0], {"id": 1, "width": 2, "height": 3}]},
    r"annotations\[0\] has no image_id": lambda d: {"annotations": ["box"]},
    r"annotations\[1\]: its ids should be whole": lambda d: row(d, "annotations", 1, image_id="3"),
    r"there is no file .*images/missing.png": lambda d: row(d, "images", 0, file_name="missing.png"),
    r"image 3 \(b.jpg\) is there twice": lambda d: {"images": d["images"] + [d["images"][1]]},
    r"image 7 \(a.png\): width and height should": lambda d: row(d, "images", 0, width=0),
    r"category 5 \(zebra\) is there twice": lambda d: row(d, "categories", 1, name="zebra"),
    "annotation 1: there is no image 8": lambda d: row(d, "annotations", 0, image_id=8),
    "annotation 1: there is no category 6": lambda d: row(d, "annotations", 0, category_id=6),
    r"annotation 1: bbox \[2, 4, nan, 8\] should be four": lambda d: row(d, "annotations", 0, bbox=[2, 4, math.nan, 8]),
    r"annotation 1: bbox \[2, 4, -1, 8\] should be four": lambda d: row(d, "annotations", 0, bbox=[2, 4, -1, 8]),
    r"annotation 1: bbox \[2, 4, 8\] should be four": lambda d: row(d, "annotations", 0, bbox=[2, 4, 8]),
    r"annotation 1: bbox None should be four": lambda d: row(d, "annotations", 0, bbox=None),
    r"annotation 1: bbox .* is outside its image of 8x16": lambda d: row(d, "annotations", 0, bbox=[2, 4, 8, 8]),
    r"a.png: the image has 8x16 pixels, annotations.json says 9x16": lambda d: row(d, "images", 0, width=9),
    "it names no category": lambda d: {"categories": [], "annotations": []},
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_is_broken_is_named_in_one_line(tmp_path, message):
    root, data = coco(tmp_path)
    change = BROKEN[message]
    text = change if isinstance(change, str) else json.dumps(data | change(data))
    (root / "annotations.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        dataset = det.DetectionDataset(str(root), 16, 4)
        dataset[0]
    assert "\n" not in str(error.value)


def test_without_annotations(tmp_path):
    with pytest.raises(InputError, match="annotations.json: no such file; a detection folder holds"):
        det.DetectionDataset(str(tmp_path), 16, 4)


def test_mirroring_is_encoding_the_mirrored_boxes(tmp_path):
    dataset = det.DetectionDataset(str(coco(tmp_path)[0]), 16, 4)
    indices = torch.arange(3).repeat(20)
    batch = dataset.batch(indices, torch.stack([dataset[i] for i in range(3)]).repeat(20, 1, 1, 1))
    torch.manual_seed(0)
    mirrored = det.mirror_batch(batch)
    chosen = (mirrored.inputs != batch.inputs).flatten(1).any(1)
    assert 15 < chosen.sum() < 45
    assert torch.equal(mirrored.inputs[chosen], batch.inputs[chosen].flip(-1))
    boxes = batch.metadata["boxes"].clone()
    boxes[chosen, :, 0], boxes[chosen, :, 2] = 16 - batch.metadata["boxes"][chosen][..., 2], 16 - boxes[chosen, :, 0]
    assert torch.equal(mirrored.metadata["boxes"], boxes)
    targets, counted = det.encode(boxes, batch.metadata["labels"], batch.metadata["crowd"], 16, 4, 2)
    assert torch.allclose(mirrored.targets, targets, atol=1e-6) and torch.equal(mirrored.counted, counted)


# --- Policy and losses ------------------------------------------------------------------------------------------------


def outputs_and_actions(seed=0, B=2, T=2, A=3):
    g = torch.Generator().manual_seed(seed)
    outputs = torch.randn(B, T, SIDE * SIDE, K + 1 + 4, generator=g)
    labels = torch.randint(K + 1, (B, T, A, SIDE * SIDE), generator=g)
    return outputs, det.pack(labels, torch.randn(B, T, A, SIDE * SIDE, 4, generator=g) * 0.4), labels


def test_log_prob_is_that_of_a_categorical_and_a_normal():
    outputs, actions, labels = outputs_and_actions()
    policy = det.box_policy_adapter(outputs, std=0.2)
    assert policy.batch_shape == (2, 2, 2, 16) and policy.event_shape == (4,)
    got = action_log_prob(policy, actions)
    assert got.shape == (2, 2, 3, 2, 16)
    for a in range(3):
        classes = Categorical(logits=outputs[..., :-4]).log_prob(labels[:, :, a])
        boxes = Normal(outputs[..., -4:], 0.2).log_prob(actions[:, :, a, 1]).sum(-1)
        assert torch.allclose(got[:, :, a], torch.stack([classes, boxes], 2), atol=1e-5)
    reference = det.box_policy_adapter(outputs + 0.1 * outputs.flip(0), std=0.2)
    kl = kl_divergence(policy, reference)
    assert kl.shape == policy.entropy().shape == (2, 2, 2, 16)
    between = kl_divergence(Normal(outputs[..., -4:], 0.2), Normal(reference.boxes.mean, 0.2)).sum(-1)
    assert torch.allclose(kl[:, :, 1], between, atol=1e-5)
    assert torch.allclose(policy.entropy()[:, :, 0], Categorical(logits=outputs[..., :-4]).entropy())


def test_samples_have_the_policys_mean_and_std_and_classes():
    outputs, _, _ = outputs_and_actions(B=1, T=1)
    torch.manual_seed(0)
    policy = det.box_policy_adapter(outputs, std=0.5)
    drawn = sample_actions(policy, 4000)
    assert drawn.shape == (1, 1, 4000, 2, 16, 4)
    boxes, labels = drawn[0, 0, :, 1], drawn[0, 0, :, 0, :, 0].long()
    assert torch.allclose(boxes.mean(0), outputs[0, 0, :, -4:], atol=0.05)
    assert torch.allclose(boxes.std(0), torch.tensor(0.5), atol=0.03)
    shares = torch.stack([(labels == k).float().mean(0) for k in range(K + 1)], -1)
    assert torch.allclose(shares, policy.classes.probs[0, 0], atol=0.04)
    assert torch.equal(policy.mode[0, 0, 0, :, 0], outputs[0, 0, :, :-4].argmax(-1).float())
    assert torch.equal(policy.mode[0, 0, 1], outputs[0, 0, :, -4:])


def test_supervised_losses():
    """-log π(targets), and cross-entropy with 1 - IoU."""
    outputs, _, _ = outputs_and_actions()
    targets, _ = det.encode(
        *(x.repeat(2, *[1] * (x.ndim - 1)) for x in objects([[2, 3, 14, 9], [1, 11, 5, 15]], [1, 0])), 16, 4, K
    )
    policy, wanted = det.box_policy_adapter(outputs, 0.3), targets[:, None, None].expand(2, 2, 1, 2, 16, 4)
    assert torch.equal(nll(policy, wanted), -action_log_prob(policy, wanted))
    loss = det.cross_entropy_iou_loss(policy, wanted)
    assert loss.shape == (2, 2, 1, 2, 16)
    classes = targets[:, 0, :, 0].long()
    for t in range(2):
        expected = cross_entropy(outputs[:, t, :, :-4].flatten(0, 1), classes.flatten(), reduction="none")
        assert torch.allclose(loss[:, t, 0, 0].flatten(), expected, atol=1e-5)
        ours, theirs = det.decode_boxes(outputs[:, t, :, -4:], 4), det.decode_boxes(targets[:, 1], 4)
        for b, p in itertools.product(range(2), range(16)):
            expected = 1 - iou(ours[b, p].tolist(), theirs[b, p].tolist())
            assert float(loss[b, t, 0, 1, p]) == pytest.approx(expected, abs=1e-5)
    for name, function in (("log_prob", nll), ("iou", det.cross_entropy_iou_loss)):
        assert det.supervised_loss({"detection": {"supervised_loss": name}}) is function


def test_standard_deviation_goes_from_its_beginning_to_its_end():
    config = {"detection": {"box_std": 0.5, "box_std_end": 0.125}}
    assert [det.policy_adapter(config, x).keywords["std"] for x in (0, 0.5, 1)] == pytest.approx([0.5, 0.25, 0.125])
    config["detection"]["box_std_end"] = None
    assert [det.policy_adapter(config, x).keywords["std"] for x in (0, 0.5, 1)] == [0.5] * 3


# --- Rewards ----------------------------------------------------------------------------------------------------------


def test_detection_reward_against_loops():
    _, actions, labels = outputs_and_actions()
    outputs = torch.zeros(2, 2, 16, K + 5)
    targets, _ = det.encode(
        *(torch.cat([x, x.flip(1)]) for x in objects([[2, 3, 14, 9], [1, 9, 6, 15]], [1, 0])), 16, 4, K
    )
    reward = det.detection_reward(actions, outputs, targets, {})
    assert reward.shape == (2, 2, 3, 2, 16)
    boxes, truth = det.decode_boxes(actions[..., 1, :, :], 4), det.decode_boxes(targets[:, 1], 4)
    for b, t, a, p in itertools.product(range(2), range(2), range(3), range(16)):
        assert reward[b, t, a, 0, p] == float(labels[b, t, a, p] == targets[b, 0, p, 0])
        assert float(reward[b, t, a, 1, p]) == pytest.approx(
            iou(boxes[b, t, a, p].tolist(), truth[b, p].tolist()), abs=1e-5
        )


def slow_f1(boxes, labels, scores, truths, true_labels, crowds) -> float:
    """NMS, then matching, best score first, in plain Python."""
    order = sorted((p for p in range(len(labels)) if labels[p] < K), key=lambda p: -scores[p])
    kept: list[int] = []
    for p in order:
        if all(labels[q] != labels[p] or iou(boxes[q], boxes[p]) <= 0.5 for q in kept):
            kept.append(p)
    free = [m for m in range(len(truths)) if not crowds[m]]
    count, hits = len(free), 0
    found = 0
    for p in kept:
        able = [m for m in free if true_labels[m] == labels[p] and iou(boxes[p], truths[m]) >= 0.5]
        if able:
            free.remove(max(able, key=lambda m: iou(boxes[p], truths[m])))
            hits += 1
            found += 1
            continue
        x0, y0, x1, y1 = boxes[p]
        inside = [
            max(min(x1, t[2]) - max(x0, t[0]), 0) * max(min(y1, t[3]) - max(y0, t[1]), 0) / ((x1 - x0) * (y1 - y0))
            for m, t in enumerate(truths)
            if crowds[m] and true_labels[m] == labels[p]
        ]
        found += not any(share > 0.5 for share in inside)
    return 1.0 if found + count == 0 else 2 * hits / (found + count)


@pytest.mark.parametrize("seed", range(6))
def test_f1_reward_against_loops(seed):
    """Random sets near the truth, with overlaps to suppress, crowds, padding and an image without objects."""
    g = torch.Generator().manual_seed(seed)
    truths = [[[2, 3, 14, 9], [1, 9, 6, 15], [9, 9, 15, 15]], [[0, 0, 16, 16], [4, 4, 12, 10]], []]
    true_labels, crowds = [[1, 0, 1], [0, 2], []], [[False, False, True], [True, False], []]
    pad = torch.nn.utils.rnn.pad_sequence
    metadata = {
        "boxes": pad([torch.tensor(x, dtype=torch.float32).view(-1, 4) for x in truths], batch_first=True),
        "labels": pad([torch.tensor(x, dtype=torch.int64) for x in true_labels], batch_first=True, padding_value=-1),
        "crowd": pad([torch.tensor(x, dtype=torch.bool) for x in crowds], batch_first=True),
        "patch_size": 4,
    }
    targets, _ = det.encode(metadata["boxes"], metadata["labels"], metadata["crowd"], 16, 4, K)
    shape = (3, 2, 4, 16)
    outputs = torch.randn(3, 2, 16, K + 5, generator=g)
    labels = targets[:, None, None, 0, :, 0].long().expand(shape)
    labels = torch.where(torch.rand(shape, generator=g) < 0.2, torch.randint(K + 1, shape, generator=g), labels)
    raw = targets[:, None, None, 1] + 0.3 * torch.randn(*shape, 4, generator=g)
    actions = det.pack(labels, raw)
    reward = det.detection_f1_reward(actions, outputs, targets, metadata)
    assert reward.shape == (3, 2, 4)
    probs, boxes = outputs[..., :-4].softmax(-1), det.decode_boxes(raw, 4)
    for b, t, a in itertools.product(range(3), range(2), range(4)):
        scores = probs[b, t].gather(-1, labels[b, t, a][:, None])[:, 0].tolist()
        expected = slow_f1(
            boxes[b, t, a].tolist(), labels[b, t, a].tolist(), scores, truths[b], true_labels[b], crowds[b]
        )
        assert float(reward[b, t, a]) == pytest.approx(expected, abs=1e-6)
    assert 0 < reward.mean() < 1


def test_f1_of_the_truth_is_one_and_of_nothing_zero():
    boxes, labels, crowd = objects([[2, 3, 14, 9], [1, 9, 6, 15]], [1, 0])
    metadata = {"boxes": boxes, "labels": labels, "crowd": crowd, "patch_size": 4}
    targets, _ = det.encode(boxes, labels, crowd, 16, 4, K)
    outputs, right = torch.zeros(1, 1, 16, K + 5), targets[:, None, None]
    assert det.detection_f1_reward(right, outputs, targets, metadata).item() == 1
    nothing = det.pack(torch.full((1, 1, 1, 16), K), torch.zeros(1, 1, 1, 16, 4))
    assert det.detection_f1_reward(nothing, outputs, targets, metadata).item() == 0
    empty = {"boxes": torch.zeros(1, 0, 4), "labels": torch.zeros(1, 0).long(), "crowd": torch.zeros(1, 0).bool()}
    assert det.detection_f1_reward(nothing, outputs, targets, metadata | empty).item() == 1
    assert det.detection_f1_reward(right, outputs, targets, metadata | empty).item() == 0


# --- Decoding and metric ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_nms_against_loops(seed):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(40, 2, generator=g) * 10
    boxes = torch.cat([corner, corner + 1 + torch.rand(40, 2, generator=g) * 6], 1)
    scores, labels = torch.rand(40, generator=g).mul(10).round() / 10, torch.randint(3, (40,), generator=g)
    kept: list[int] = []
    for p in sorted(range(40), key=lambda p: -scores[p]):
        if all(labels[q] != labels[p] or iou(boxes[q].tolist(), boxes[p].tolist()) <= 0.4 for q in kept):
            kept.append(p)
    assert det.nms(boxes, scores, labels, 0.4).tolist() == kept and 5 < len(kept) < 40
    assert det.nms(boxes[:0], scores[:0], labels[:0], 0.4).tolist() == []


def test_decode_finds_the_truth_and_drops_what_is_unlikely():
    boxes, labels, crowd = objects([[2, 3, 14, 9], [1, 9, 6, 15]], [1, 0])
    targets, _ = det.encode(boxes, labels, crowd, 16, 4, K)
    probs = torch.nn.functional.one_hot(targets[:, 0, :, 0].long(), K + 1).float() * 0.94 + 0.015
    (found,) = det.decode(probs, targets[:, 1], CONFIG)
    assert sorted(found["labels"].tolist()) == [0, 1] and found["scores"].tolist() == pytest.approx([0.955] * 2)
    for box, label in zip(found["boxes"], found["labels"]):
        assert box.tolist() == pytest.approx(boxes[0, 0 if label == 1 else 1].tolist(), abs=1e-4)
    low = CONFIG | {"detection": CONFIG["detection"] | {"score_threshold": 0.01}}
    assert len(det.decode(probs, targets[:, 1], low)[0]["labels"]) > 20
    outside = targets[:, 1] + torch.tensor([9.0, 0, 0, 0])
    assert det.decode(probs, outside, CONFIG)[0]["boxes"].max() <= 16


def test_evaluation_is_coco_of_both_predictors(tmp_path):
    """The truth as prediction has AP 1 but for the empty box, which nothing finds; a shifted one has less."""
    dataset = det.DetectionDataset(str(coco(tmp_path)[0]), 16, 4)
    evaluation = det.Evaluation(dataset, CONFIG)
    for batch in ordered_batches(dataset, 2):
        logits = torch.nn.functional.one_hot(batch.targets[:, 0, :, 0].long(), 3) * 9.0
        right = torch.cat([logits, batch.targets[:, 1]], -1)
        shifted = torch.cat([logits, batch.targets[:, 1] + torch.tensor([0.3, 0, 0, 0])], -1)
        evaluation.add(batch, right, torch.stack([right, shifted], 1))
    figures = evaluation.figures()
    assert figures["eval/ap/zebra"] == figures["eval/map"] == pytest.approx(51 / 101)
    assert "eval/ap/ant" not in figures  # its only truth is a crowd
    mean = iou([4, 4, 12, 12], [4.6, 4, 12.6, 12])  # boxes averaged over the passes are 0.15 patches off
    assert figures["eval_mc/map"] == pytest.approx(51 / 101 * sum(t <= mean for t in np.linspace(0.5, 0.95, 10)) / 10)
    assert figures["eval/f1"] == pytest.approx(2 * 1 / (1 + 2))  # one hit of one detection, two objects
    expected = average_precision(evaluation.detections[0], evaluation.truths, 2)
    assert figures["eval/ap50"] == expected["ap50"]
    picture = evaluation.draw()
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3 and picture.float().std() > 1


def test_true_boxes_are_drawn_where_they_are():
    picture = det.draw_boxes(torch.zeros(3, 16, 16, dtype=torch.uint8), torch.tensor([[4.0, 4, 12, 12]]), [""])
    edge = (picture == torch.tensor([0, 255, 0])[:, None, None]).all(0).nonzero()
    scale = det.BOX_PIXELS / 16
    assert edge.min(0).values.tolist() == [4 * scale] * 2 and edge.max(0).values.tolist() == [12 * scale - 1] * 2
