"""Detection of objects by boxes: data set, policy, rewards, losses, decoding, COCO's metric, pictures.

P: patches, row by row; K: classes; M: most objects of an image in the batch. An action has two elements per patch, its
class (K: background) and its box, [2, P], and each element is four numbers, [2, P, 4], of which a class uses the first.
A box in the head's raw space is (dx, dy, log w, log h): its centre from the patch's centre and its size, in patches.
"""

import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence, register_kl
from torch.utils.data import Dataset

from coco_ap import average_precision
from data_types import InputError, TensorMiniBatch
from grpo import nll
from vision_task import (
    Prepared,
    decode_image,
    draw_mirrored,
    draw_predictions,
    heat_map,
    mirror,
    mutual_information,
    predictive_entropy,
    upright_size,
)

DEFAULT_REWARD = {"detection_reward": 1.0}
BEST = "eval/map"  # what best.pt is chosen by
BOX_PIXELS = 192  # side of a picture with boxes
MAX_LOG_SIZE = math.log(1000.0)  # patches; beyond lies overflow, not a box


# --- Data -----------------------------------------------------------------------------------------------------------


def read_annotations(root: str) -> tuple[list[dict], dict[int, str]]:
    """root/annotations.json in COCO's format -> images, each with `objects`: (category id, x, y, w, h, crowd), and the
    categories, id -> name. Raises InputError with one line for whatever does not fit together."""
    path = Path(root, "annotations.json")

    def bad(what: str) -> InputError:
        return InputError(f"{path}: {what}")

    def number(value) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    try:
        coco = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise bad("no such file; a detection folder holds images/ and annotations.json in COCO's format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise bad(f"cannot be read ({' '.join(str(error).split())})") from None
    for section, keys in {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }.items():
        rows = coco.get(section) if isinstance(coco, dict) else None
        if not isinstance(rows, list):
            raise bad(f"it should hold a list of {section}")
        for i, row in enumerate(rows):
            missing = [key for key in keys if key not in row] if isinstance(row, dict) else keys
            if missing:
                raise bad(f"{section}[{i}] has no {missing[0]}")
            if not all(type(row[key]) is int for key in keys if key.endswith("id")):
                raise bad(f"{section}[{i}]: its ids should be whole numbers")
    categories, images = {}, {}
    for row in coco["categories"]:
        if row["id"] in categories or row["name"] in categories.values():
            raise bad(f"category {row['id']} ({row['name']}) is there twice")
        categories[row["id"]] = str(row["name"])
    for row in coco["images"]:
        name = f"image {row['id']} ({row['file_name']})"
        if row["id"] in images:
            raise bad(f"{name} is there twice")
        if not all(type(row[side]) is int and row[side] > 0 for side in ("width", "height")):
            raise bad(f"{name}: width and height should be whole numbers > 0")
        file = os.path.join(root, "images", str(row["file_name"]))
        if not os.path.isfile(file):
            raise bad(f"{name}: there is no file {file}")
        images[row["id"]] = {"path": file, "size": (row["width"], row["height"]), "objects": []}
    if not images:
        raise bad("it names no image")
    for i, row in enumerate(coco["annotations"]):
        name = f"annotation {row.get('id', i)}"
        image, box = images.get(row["image_id"]), row["bbox"]
        if image is None:
            raise bad(f"{name}: there is no image {row['image_id']}")
        if row["category_id"] not in categories:
            raise bad(f"{name}: there is no category {row['category_id']}")
        if not (isinstance(box, list) and len(box) == 4 and all(map(number, box)) and min(box[2:]) >= 0):
            raise bad(f"{name}: bbox {box} should be four finite numbers: x, y, width >= 0, height >= 0")
        width, height = image["size"]
        if box[0] < -1 or box[1] < -1 or box[0] + box[2] > width + 1 or box[1] + box[3] > height + 1:  # 1: rounding
            raise bad(f"{name}: bbox {box} is outside its image of {width}x{height} pixels")
        image["objects"].append((row["category_id"], *box, bool(row.get("iscrowd", 0))))
    return list(images.values()), categories


class DetectionDataset(Dataset):
    """A folder of `images/` and `annotations.json` in COCO's format. Images without objects belong to it.

    classes: the class names whose order gives the ids; None takes the file's categories by ascending id.
    Item i is the image, uint8 [3, image_size, image_size]; boxes are scaled with it.
    Raises InputError for a file that does not fit COCO's format, the images or `classes`.
    """

    channels = 3

    def __init__(self, root: str, image_size: int, patch_size: int, classes: list[str] | None = None):
        images, categories = read_annotations(root)
        self.root, self.image_size, self.patch_size = root, image_size, patch_size
        self.classes = list(classes) if classes else [categories[i] for i in sorted(categories)]
        if not self.classes:
            raise InputError(f"{os.path.join(root, 'annotations.json')}: it names no category")
        unknown = sorted(set(categories.values()) - set(self.classes))
        if unknown:
            raise InputError(
                f"{os.path.join(root, 'annotations.json')}: categories unknown in training: {', '.join(unknown)}"
            )
        label = {i: self.classes.index(name) for i, name in categories.items()}
        self.paths = [image["path"] for image in images]
        self.sizes = [image["size"] for image in images]
        self.boxes, self.labels, self.crowd = [], [], []  # per image: [m, 4] x0 y0 x1 y1 in resized pixels, [m], [m]
        for image in images:
            rows = torch.tensor([row[1:5] for row in image["objects"]], dtype=torch.float64).view(-1, 4)
            corners = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:]], 1)
            scale = image_size / torch.tensor(image["size"] * 2, dtype=torch.float64)
            self.boxes.append((corners * scale).float())
            self.labels.append(torch.tensor([label[row[0]] for row in image["objects"]], dtype=torch.int64))
            self.crowd.append(torch.tensor([row[5] for row in image["objects"]], dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = decode_image(self.paths[index], self.image_size)
        if upright_size(self.paths[index]) != self.sizes[index]:
            width, height = upright_size(self.paths[index])
            raise InputError(
                f"{self.paths[index]}: the image has {width}x{height} pixels, annotations.json says "
                f"{self.sizes[index][0]}x{self.sizes[index][1]}"
            )
        return image

    def batch(self, indices: Tensor, inputs: Tensor) -> TensorMiniBatch:
        """inputs [B, 3, H, W] with targets [B, 2, P, 4], counted [B, 2, P] and, in the metadata, the objects: `boxes`
        [B, M, 4] x0 y0 x1 y1 in pixels of the input, `labels` [B, M] (-1: no object), `crowd` [B, M]."""
        rows = indices.tolist()
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        boxes = pad([self.boxes[i] for i in rows])
        labels = pad([self.labels[i] for i in rows], padding_value=-1)
        crowd = pad([self.crowd[i] for i in rows], padding_value=False)
        targets, counted = encode(boxes, labels, crowd, self.image_size, self.patch_size, len(self.classes))
        metadata = {"paths": [self.paths[i] for i in rows], "indices": indices, "classes": tuple(self.classes)}
        metadata |= {"boxes": boxes, "labels": labels, "crowd": crowd, "patch_size": self.patch_size}
        return TensorMiniBatch(inputs, targets, metadata, counted)


def open_dataset(root: str, config: dict, classes: list[str] | None) -> DetectionDataset:
    return DetectionDataset(root, config["model"]["image_size"], config["model"]["patch_size"], classes)


def patch_centres(side: int, device: torch.device | None = None) -> Tensor:
    """x, y of the centres of side² patches, row by row, in patches: [P, 2]."""
    places = torch.arange(side, device=device) + 0.5
    return torch.stack([places.repeat(side), places.repeat_interleave(side)], -1)


def pack(labels: Tensor, boxes: Tensor) -> Tensor:
    """Classes [..., P] and raw boxes [..., P, 4] as an action [..., 2, P, 4]."""
    classes = F.pad(labels[..., None].to(boxes.dtype), (0, 3))
    return torch.stack([classes, boxes], -3)


def encode(
    boxes: Tensor, labels: Tensor, crowd: Tensor, image_size: int, patch_size: int, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The right action [B, 2, P, 4] for objects (see `DetectionDataset.batch`), and which elements count [B, 2, P].

    A patch is assigned to the smallest object of which it holds the centre, or whose middle three quarters (in both
    directions) have the patch's centre. An unassigned patch is background and its box does not count; within a crowd
    its class does not count either. Empty boxes are no objects.
    """
    centres = patch_centres(image_size // patch_size, boxes.device)  # [P, 2]
    boxes, crowd = F.pad(boxes, (0, 0, 0, 1)), F.pad(crowd, (0, 1))  # a row of padding, for there may be no object
    labels = F.pad(labels, (0, 1), value=-1)
    low, high = boxes[:, :, None, :2] / patch_size, boxes[:, :, None, 2:] / patch_size  # [B, M, 1, 2]
    middle, size = (low + high) / 2, high - low
    real = (labels >= 0) & (size > 0).all(-1)[..., 0]  # [B, M]
    near = ((centres - middle).abs() <= (size * 0.375).clamp(min=0.5)).all(-1)  # [B, M, P]
    area = size.prod(-1).masked_fill(~(near & (real & ~crowd)[..., None]), torch.inf)  # [B, M, P]
    smallest, owner = area.min(1)  # [B, P]
    assigned = smallest < torch.inf
    owner_middle, owner_size = (
        x[:, :, 0].gather(1, owner[..., None].expand(-1, -1, 2)) for x in (middle, size.clamp(min=1e-6))
    )
    raw = torch.cat([owner_middle - centres, owner_size.log()], -1)  # [B, P, 4]
    raw = torch.where(assigned[..., None], raw, 0)
    inside = ((centres >= low) & (centres <= high)).all(-1) & (real & crowd)[..., None]  # [B, M, P]
    classes = torch.where(assigned, labels.gather(1, owner), num_classes)
    return pack(classes, raw), torch.stack([assigned | ~inside.any(1), assigned], 1)


def raw_to_corners(raw: Tensor) -> Tensor:
    """Raw boxes [..., 4] -> x0 y0 x1 y1 in patches from the patch's centre."""
    half = raw[..., 2:].clamp(max=MAX_LOG_SIZE).exp() / 2
    return torch.cat([raw[..., :2] - half, raw[..., :2] + half], -1)


def decode_boxes(raw: Tensor, patch_size: int) -> Tensor:
    """Raw boxes [..., P, 4] -> x0 y0 x1 y1 in pixels of the input."""
    centres = patch_centres(math.isqrt(raw.shape[-2]), raw.device)
    return (raw_to_corners(raw) + centres.repeat(1, 2)) * patch_size


def mirror_batch(batch: TensorMiniBatch) -> TensorMiniBatch:
    """Half of the images left to right, with their boxes."""
    chosen = draw_mirrored(batch.inputs)
    side = math.isqrt(batch.targets.shape[2])
    targets = mirror(batch.targets.unflatten(2, (side, side)).movedim(4, 1), chosen).movedim(1, 4).flatten(2, 3)
    sign = torch.ones_like(targets[:1])
    sign[:, 1, :, 0] = -1  # dx
    targets = torch.where(chosen[:, None, None, None], targets * sign, targets)
    counted = mirror(batch.counted.unflatten(2, (side, side)), chosen).flatten(2)
    boxes, width = batch.metadata["boxes"], batch.inputs.shape[-1]
    mirrored = torch.stack([width - boxes[..., 2], boxes[..., 1], width - boxes[..., 0], boxes[..., 3]], -1)
    boxes = torch.where(chosen[:, None, None], mirrored, boxes)
    return TensorMiniBatch(mirror(batch.inputs, chosen), targets, batch.metadata | {"boxes": boxes}, counted)


# --- Policy and supervised losses -----------------------------------------------------------------------------------


class ClassAndBox(Distribution):
    """A class ~ Categorical and a box ~ Normal for each patch, as two elements: batch shape [..., 2, P], event shape
    [4]. logits: [..., P, K + 1]; boxes: raw [..., P, 4]; std: of the box in raw space."""

    arg_constraints = {}

    def __init__(self, logits: Tensor, boxes: Tensor, std: float):
        self.classes = Categorical(logits=logits)
        self.boxes = Independent(Normal(boxes, std), 1)
        super().__init__(logits.shape[:-2] + (2, logits.shape[-2]), torch.Size([4]), validate_args=False)

    def sample(self, sample_shape: torch.Size | tuple = ()) -> Tensor:
        return pack(self.classes.sample(sample_shape), self.boxes.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        labels, boxes = value[..., 0, :, 0].long(), value[..., 1, :, :]
        return torch.stack([self.classes.log_prob(labels), self.boxes.log_prob(boxes)], -2)

    def entropy(self) -> Tensor:
        return torch.stack([self.classes.entropy(), self.boxes.entropy()], -2)

    @property
    def mode(self) -> Tensor:
        return pack(self.classes.mode, self.boxes.mode)


@register_kl(ClassAndBox, ClassAndBox)
def kl_class_and_box(p: ClassAndBox, q: ClassAndBox) -> Tensor:
    return torch.stack([kl_divergence(p.classes, q.classes), kl_divergence(p.boxes, q.boxes)], -2)


def head_size(num_classes: int, patch_size: int) -> int:
    """Width of the dense head: logits of the classes and of the background, a raw box."""
    return num_classes + 1 + 4


def network(model: nn.Module, config: dict) -> Prepared:
    """`model` as a function of uint8 images to [B, P, K + 1 + 4], or [B, T, P, K + 1 + 4] under masks."""
    return Prepared(model, config["data"]["mean"], config["data"]["std"])


def box_policy_adapter(outputs: Tensor, std: float = 0.3) -> ClassAndBox:
    """Outputs [B, T, P, K + 1 + 4] -> a class and a box per patch, in float32 (or better)."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return ClassAndBox(outputs[..., :-4], outputs[..., -4:], std)


def policy_adapter(config: dict, progress: float):
    """The adapter at this share of the run: the standard deviation goes from box_std to box_std_end geometrically."""
    begin, end = config["detection"]["box_std"], config["detection"]["box_std_end"]
    return partial(box_policy_adapter, std=begin * ((end or begin) / begin) ** progress)


def cross_entropy_iou_loss(policy: ClassAndBox, targets: Tensor) -> Tensor:
    """Cross-entropy of the classes and 1 - IoU of the predicted boxes. targets: [B, T, 1, 2, P, 4]; returns
    [B, T, 1, 2, P]."""
    classes = -policy.classes.log_prob(targets[:, :, 0, 0, :, 0].long())
    iou = paired_iou(raw_to_corners(policy.boxes.mean), raw_to_corners(targets[:, :, 0, 1]))
    return torch.stack([classes, 1 - iou], -2)[:, :, None]


def supervised_loss(config: dict):
    return {"log_prob": nll, "iou": cross_entropy_iou_loss}[config["detection"]["supervised_loss"]]


# --- Rewards --------------------------------------------------------------------------------------------------------


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes [..., 4] (x0 y0 x1 y1) with boxes [..., 4], broadcast: […]; 0 for empty ones."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b)]
    return intersection / (areas[0] + areas[1] - intersection).clamp(min=1e-9)


def detection_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """Per element: 1 for a patch's right class (or background), 0 otherwise; for its box the IoU with the object
    assigned to the patch. actions: [B, T, A, 2, P, 4]; targets: [B, 2, P, 4]; returns [B, T, A, 2, P]."""
    targets = targets[:, None, None]
    right = (actions[..., 0, :, 0] == targets[..., 0, :, 0]).to(actions.dtype)
    iou = paired_iou(raw_to_corners(actions[..., 1, :, :]), raw_to_corners(targets[..., 1, :, :]))
    return torch.stack([right, iou], -2)


def detection_f1_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """One score per image: F1 at IoU 0.5 of the set that an action decodes to, [B, T, A]; 1 for rightly nothing.

    actions: [B, T, A, 2, P, 4]; outputs: [B, T, P, K + 1 + 4], whose class probabilities are the detections' scores.
    """
    B, T, A = actions.shape[:3]
    labels = actions[..., 0, :, 0].long()
    probs = box_policy_adapter(outputs).classes.probs[:, :, None].expand(B, T, A, -1, -1)
    scores = probs.gather(-1, labels[..., None])[..., 0]
    labels = torch.where(labels == probs.shape[-1] - 1, -1, labels)  # background
    boxes = decode_boxes(actions[..., 1, :, :], metadata["patch_size"])
    hits, found, true = (x.view(B, T, A) for x in match_sets(boxes, scores, labels, metadata))
    return torch.where(found + true == 0, 1.0, 2 * hits / (found + true).clamp(min=1)).to(scores.dtype)


def match_sets(
    boxes: Tensor, scores: Tensor, labels: Tensor, metadata: dict, iou_threshold: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Class-wise NMS of sets of detections, then matching with the image's objects, the best score first.

    boxes: [B, T, A, P, 4] in pixels; scores, labels: [B, T, A, P] (-1: no detection); metadata: see
    `DetectionDataset.batch`. Returns hits, detections and objects, counts [B · T · A] each. A detection of which more
    than half lies in a crowd of its class is not counted unless it is a hit.
    """
    n = boxes.shape[1] * boxes.shape[2]
    truth, truth_labels, crowd = (metadata[name].repeat_interleave(n, 0) for name in ("boxes", "labels", "crowd"))
    order = scores.flatten(0, 2).masked_fill(labels.flatten(0, 2) < 0, -1).argsort(dim=-1, descending=True, stable=True)
    boxes = boxes.flatten(0, 2).gather(1, order[..., None].expand(-1, -1, 4))  # [S, P, 4]
    labels = labels.flatten(0, 2).gather(1, order)  # [S, P], the best first
    kept = labels >= 0
    hit = torch.zeros_like(kept)
    free = (truth_labels >= 0) & ~crowd  # [S, M]
    objects, places = free.sum(1), torch.arange(free.shape[1], device=free.device)
    most = int(kept.sum(1).max()) if boxes.device.type == "cpu" else kept.shape[1]  # a GPU would have to be waited for
    for i in range(most):  # ranks, all sets at once
        box, label = boxes[:, i, None], labels[:, i, None]
        overlap = paired_iou(box, boxes) > iou_threshold
        kept[:, i + 1 :] &= ~(overlap & (labels == label) & kept[:, i, None])[:, i + 1 :]
        if free.shape[1]:
            iou = paired_iou(box, truth).masked_fill(~(free & (truth_labels == label)), -1)
            best, index = iou.max(1)
            hit[:, i] = kept[:, i] & (best >= iou_threshold)
            free = free & ~((places == index[:, None]) & hit[:, i, None])
    if free.shape[1]:  # without a loop over the objects' few crowds: [S, P, M]
        low, high = (
            torch.maximum(boxes[:, :, None, :2], truth[:, None, :, :2]),
            torch.minimum(boxes[:, :, None, 2:], truth[:, None, :, 2:]),
        )
        inside = (high - low).clamp(min=0).prod(-1) > 0.5 * (boxes[..., 2:] - boxes[..., :2]).prod(-1)[..., None]
        ignored = (inside & crowd[:, None] & (truth_labels[:, None] == labels[..., None])).any(-1)
        kept &= hit | ~ignored
    return hit.sum(1), kept.sum(1), objects


# --- Decoding, metric, pictures -------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Class-wise non-maximum suppression of boxes [n, 4], scores [n], labels [n]: the indices kept, best first."""
    order = scores.argsort(descending=True, stable=True)
    suppresses = paired_iou(boxes[order][:, None], boxes[order]) > iou_threshold
    suppresses = (suppresses & (labels[order][:, None] == labels[order])).numpy()
    kept = np.ones(len(order), dtype=bool)
    for i in range(len(order)):
        if kept[i]:
            kept[i + 1 :] &= ~suppresses[i, i + 1 :]
    return order[torch.from_numpy(kept)]


def decode(probs: Tensor, raw: Tensor, config: dict) -> list[dict[str, Tensor]]:
    """Detections of each image, best first: {"boxes": [n, 4] x0 y0 x1 y1 in pixels of the input, "scores": [n],
    "labels": [n]}. probs: [B, P, K + 1]; raw: boxes [B, P, 4]; on the CPU. Every class of a patch whose probability is
    at least detection.score_threshold is a candidate; then class-wise NMS at detection.nms_iou."""
    size, patch_size = config["model"]["image_size"], config["model"]["patch_size"]
    decoded = decode_boxes(raw, patch_size).clamp(0, size)
    detections = []
    for p, boxes in zip(probs[..., :-1], decoded):
        patch, labels = (p >= config["detection"]["score_threshold"]).nonzero(as_tuple=True)
        boxes, scores = boxes[patch], p[patch, labels]
        kept = nms(boxes, scores, labels, config["detection"]["nms_iou"])
        detections.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
    return detections


class Evaluation:
    """Collects the predictions for a data set: of the deterministic network, and of the mean over T passes of class
    probabilities and raw boxes."""

    def __init__(self, dataset: DetectionDataset, config: dict, shown: int = 8):
        self.classes, self.config, self.shown = dataset.classes, config, shown
        self.truths: list[dict[str, Tensor]] = []
        self.detections: tuple[list, list] = [], []
        self.counts = [torch.zeros(3), torch.zeros(3)]  # hits, detections, objects
        self.pictures: list[tuple[float, Tensor]] = []  # the most uncertain: (mean entropy, picture)

    def add(self, batch: TensorMiniBatch, outputs: Tensor, outputs_mc: Tensor) -> None:
        """outputs: [B, P, K + 1 + 4] of the deterministic network; outputs_mc: [B, T, P, K + 1 + 4] of T passes."""
        batch, outputs, outputs_mc = batch.to("cpu"), outputs.cpu(), outputs_mc.cpu()
        boxes, labels, crowd = (batch.metadata[name] for name in ("boxes", "labels", "crowd"))
        self.truths += [
            {"boxes": b[real], "labels": k[real], "crowd": c[real]}
            for b, k, c, real in zip(boxes, labels, crowd, labels >= 0)
        ]
        single, passes = box_policy_adapter(outputs), box_policy_adapter(outputs_mc)
        predictors = (
            (single.classes.probs, single.boxes.mean),
            (passes.classes.probs.mean(1), passes.boxes.mean.mean(1)),
        )
        for detections, counts, (probs, raw) in zip(self.detections, self.counts, predictors):
            detections += decode(probs, raw, self.config)
            score, label = probs.max(-1)
            label = torch.where(label == len(self.classes), -1, label)
            found = decode_boxes(raw, batch.metadata["patch_size"])
            sets = (x[:, None, None] for x in (found, score, label))
            counts += torch.stack([x.sum() for x in match_sets(*sets, batch.metadata)])
        entropy = predictive_entropy(predictors[1][0]).mean(-1)  # [B], nats
        for i in entropy.argsort(descending=True)[: self.shown].tolist():
            detected = self.detections[1][i - len(batch)]
            confident = detected["scores"] >= 0.5
            side = math.isqrt(outputs.shape[1])
            heat = mutual_information(passes.classes.probs[i]).view(side, side)
            picture = [
                draw_boxes(
                    batch.inputs[i], self.truths[i - len(batch)]["boxes"], self.names(self.truths[i - len(batch)])
                ),
                draw_boxes(batch.inputs[i], detected["boxes"][confident], self.names(detected, confident)),
                F.interpolate(heat_map(heat)[None], size=(BOX_PIXELS, BOX_PIXELS))[0],
            ]
            self.pictures.append((float(entropy[i]), torch.cat(picture, -1)))
        self.pictures = sorted(self.pictures, key=lambda row: -row[0])[: self.shown]

    def names(self, objects: dict[str, Tensor], chosen: Tensor | slice = slice(None)) -> list[str]:
        return [self.classes[label] for label in objects["labels"][chosen].tolist()]

    def figures(self) -> dict[str, float]:
        """mAP, AP50, AP75 as COCO's, each class's AP, and F1 at IoU 0.5 of the patches' most likely classes."""
        figures = {}
        for prefix, detections, counts in zip(("eval", "eval_mc"), self.detections, self.counts):
            ap = average_precision(detections, self.truths, len(self.classes))
            by_class = {f"ap/{name}": x for name, x in zip(self.classes, ap.pop("ap_per_class")) if not math.isnan(x)}
            f1 = {"f1": float(2 * counts[0] / (counts[1] + counts[2]).clamp(min=1))}
            figures |= {f"{prefix}/{name}": value for name, value in (ap | f1 | by_class).items()}
        return figures

    def draw(self) -> Tensor:
        """The most uncertain images, each with true boxes, predicted boxes (score at least 0.5) and the passes'
        disagreement (mutual information of pass and class, by patch): uint8 [3, height, width]."""
        captions = [[f"truth, prediction, disagreement; entropy {entropy:.2f}"] for entropy, _ in self.pictures]
        return draw_predictions([picture for _, picture in self.pictures], captions, columns=2, size=BOX_PIXELS)


def draw_boxes(image: Tensor, boxes: Tensor, names: list[str]) -> Tensor:
    """image: uint8 [3, H, W]; boxes: [n, 4] in its pixels -> uint8 [3, BOX_PIXELS, BOX_PIXELS] with boxes and names."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((BOX_PIXELS, BOX_PIXELS), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for (x0, y0, x1, y1), name in zip((boxes * BOX_PIXELS / image.shape[-1]).tolist(), names):
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline="lime")
        draw.text((x0 + 2, y0), name, fill="yellow")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
