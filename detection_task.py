"""Detection of objects by boxes: data set, policy, rewards, losses, decoding, COCO's metric, pictures.

P: patches, row by row; K: classes; M: most objects of an image in the batch. An action has two elements per patch, its
class (K: background) and its box, [2, P], and each element is four numbers, [2, P, 4], of which a class uses the first.
A box in the head's raw space is (dx, dy, log w, log h): its centre from the patch's centre and its size, in patches.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence, register_kl
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from augment import turned, turned_boxes
from coco_annotations import read_annotations
from coco_ap import average_precision, box_iou, matched
from config import FRACTION, POSITIVE, Key, one_of
from data_types import Credit, InputError, TensorMiniBatch
from evaluation import DenseEvaluation, predictive_entropy, to_picture, to_tensor
from folders import plain_name, upright_size
from frame import Crop, Frame, to_file, to_input
from grpo import compute_advantages, nll
from images import ImageDataset, draw_mirrored
from label_losses import CLASS_LOSSES
from set_credit import THRESHOLDS, set_values
from vision_task import Task

BOX_PIXELS = 192  # side of a picture with boxes
SHOWN_SCORE = 0.5  # from which on a detection counts for F1 where no threshold is fitted
MOST_COUNTED = 5000  # images whose patches are counted before a run
MAX_LOG_SIZE = math.log(1000.0)  # patches; beyond lies overflow, not a box


class DetectionDataset(ImageDataset):
    """A folder of images and an annotation file in COCO's format, or that file. Images without objects belong to it.

    classes: the class names whose order gives the ids; None takes the file's categories by ascending id. annotations:
    which file, see `coco_annotations.find_annotations`. skip_bad: image files that cannot be read are met when they are
    decoded. Item i is the image, uint8 [3, H, W]. `boxes` are all objects where the image lies in the input, also where
    it was cut off: as all scales are per axis, their IoU is that in the file's own pixels. Raises InputError for what
    does not fit COCO's format, the images or `classes`.
    """

    def __init__(
        self,
        root: str,
        image_size: int | Frame,
        patch_size: int,
        classes: list[str] | None = None,
        annotations: str | None = None,
        skip_bad: bool = False,
    ):
        found = read_annotations(root, annotations, skip_bad)
        self.root, self.image_size, self.patch_size = found.root, Frame.of(image_size), patch_size
        self.paths, self.sizes = found.paths, found.sizes
        names = list(found.categories.values())
        self.classes = list(classes) if classes else names
        if not self.classes:
            raise InputError(f"{found.file}: it names no category")
        place = {plain_name(name): i for i, name in enumerate(self.classes)}
        label = torch.tensor([place.get(plain_name(name), -1) for name in names] or [-1])
        used = torch.bincount(torch.from_numpy(found.category), minlength=len(label)) > 0
        if unknown := sorted(name for name, known, u in zip(names, label >= 0, used) if u and not known):
            raise InputError(f"{found.file}: categories unknown in training: {', '.join(unknown)}")
        image, order = torch.from_numpy(found.image).sort(stable=True)
        affine = self.affine(found.sizes)
        labels = label[torch.from_numpy(found.category)]
        boxes = to_input(torch.from_numpy(found.boxes), affine[torch.from_numpy(found.image)]).float()
        values = {"boxes": boxes, "labels": labels, "crowd": torch.from_numpy(found.crowd)}
        counts = torch.bincount(image, minlength=len(self)).tolist()
        # per image: [m, 4] x0 y0 x1 y1 in pixels of the input, [m], [m]
        self.boxes, self.labels, self.crowd = (list(x[order].split(counts)) for x in values.values())
        self.notes = (*found.notes, *self.without_objects(labels))

    def without_objects(self, labels: Tensor) -> list[str]:
        """A note if there are no objects, or none of some classes."""
        counts = torch.bincount(labels, minlength=len(self.classes)).tolist()
        none = [name for name, count in zip(self.classes, counts) if not count]
        if len(none) == len(self.classes):
            return ["no object at all: there is nothing to find"]
        listed = ", ".join(none[:10]) + ", …" * (len(none) > 10)
        return [f"no object of {len(none)} of {len(self.classes)} classes: {listed}"] if none else []

    def __getstate__(self) -> dict:
        """For a worker that was not forked: views of one tensor would each be sent with the whole of it."""
        lists = {name: torch.cat(getattr(self, name)) for name in ("boxes", "labels", "crowd")}
        return vars(self) | lists | {"counts": [len(x) for x in self.labels]}

    def __setstate__(self, state: dict) -> None:
        counts = state.pop("counts")
        lists = {name: list(state[name].split(counts)) for name in ("boxes", "labels", "crowd")}
        vars(self).update(state | lists)

    def affine(self, sizes: list[tuple[int, int]], crops: list[Crop] | None = None) -> Tensor:
        """Where files of these sizes, or crops of them, lie in the input, see `Placement.affine`: float64 [n, 4]."""
        crops = crops or [None] * len(sizes)
        rows = [self.image_size.place(*place).affine() for place in zip(sizes, crops)]
        return torch.tensor(rows, dtype=torch.float64).view(-1, 4)

    def objects(self, indices: Tensor) -> dict[str, Tensor]:
        """All objects of the images, with padding: `boxes` [B, M, 4] x0 y0 x1 y1 in pixels of the input, `labels`
        [B, M] (-1: no object), `crowd` [B, M]."""
        lists = {"boxes": (self.boxes, 0), "labels": (self.labels, -1), "crowd": (self.crowd, False)}
        return {
            name: pad_sequence([values[i] for i in indices.tolist()], batch_first=True, padding_value=padding)
            for name, (values, padding) in lists.items()
        }

    def batch(self, indices: Tensor, inputs: Tensor, crops: list[Crop] | None = None) -> TensorMiniBatch:
        """inputs [B, 3, H, W] with targets [B, 2, P, 4], counted [B, 2, P] and, in the metadata, the `objects` that are
        left in the input, the rectangle `content` [B, 4] that the image fills of it, and `patch_size` and `columns` of
        the grid."""
        frame, objects = self.image_size, self.objects(indices)
        sizes = [self.sizes[i] for i in indices.tolist()]
        if crops:
            old, new = self.affine(sizes), self.affine(sizes, crops)
            in_file = to_file(objects["boxes"].double(), old[:, None])
            objects["boxes"] = to_input(in_file, new[:, None]).float()
        content = [frame.place(*place).content for place in zip(sizes, crops or [None] * len(sizes))]
        content = torch.tensor(content, dtype=torch.float32).view(-1, 4)
        if crops or frame.resize == "crop":
            objects |= visible(**objects, content=content)
        metadata = objects | {"content": content, "patch_size": self.patch_size}
        metadata |= {"columns": frame.width // self.patch_size}
        metadata = self.metadata(indices) | metadata
        targets, counted = right_actions(metadata, frame)
        return TensorMiniBatch(inputs, targets, metadata, counted)


def visible(boxes: Tensor, labels: Tensor, crowd: Tensor, content: Tensor) -> dict[str, Tensor]:
    """What is left of the objects in the rectangles `content` [B, 4]: an object is cut there, and is none any more
    where less than a quarter of it is left or its centre is outside; a crowd is always only cut. See `objects`."""
    low, high = content[:, None, [0, 1, 0, 1]], content[:, None, [2, 3, 2, 3]]
    cut = torch.minimum(torch.maximum(boxes, low), high)
    area, left = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (boxes, cut))
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    inside = ((centre >= low[..., :2]) & (centre <= high[..., :2])).all(-1)
    kept = crowd | (inside & (left >= area / 4))
    return {"boxes": torch.where(kept[..., None], cut, 0), "labels": torch.where(kept, labels, -1)}


def right_actions(metadata: dict, frame: Frame) -> tuple[Tensor, Tensor]:
    """`encode` of a batch's objects; nothing counts in a patch whose centre is padding. metadata: see
    `DetectionDataset.batch`."""
    objects, patch_size = [metadata[name] for name in ("boxes", "labels", "crowd")], metadata["patch_size"]
    targets, counted = encode(*objects, frame, patch_size, len(metadata["classes"]))
    inside = in_content(metadata["content"], patch_size, counted.shape[-1], metadata["columns"])
    return targets, counted & inside[:, None]


def in_content(content: Tensor, patch_size: int, patches: int, columns: int) -> Tensor:
    """Whether the centres of P patches lie in the rectangles `content` [B, 4], and not in padding, or the patches hold
    the middle of a thinner one: bool [B, P]. What the others predict was never trained, so it is no detection."""
    centres = patch_centres(patches // columns, columns, content.device) * patch_size
    low, high = content[:, None].split(2, -1)  # [B, 1, 2]
    return ((centres - (low + high) / 2).abs() <= ((high - low) / 2).clamp(min=patch_size / 2)).all(-1)


def patch_centres(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """x, y of the centres of patches, row by row, in patches: [P, 2]."""
    x, y = (torch.arange(n, device=device) + 0.5 for n in (columns, rows))
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], -1)


def pack(labels: Tensor, boxes: Tensor) -> Tensor:
    """Classes [..., P] and raw boxes [..., P, 4] as an action [..., 2, P, 4]."""
    return torch.stack([F.pad(labels[..., None].to(boxes.dtype), (0, 3)), boxes], -3)


def encode(
    boxes: Tensor, labels: Tensor, crowd: Tensor, image_size: int | Frame, patch_size: int, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The right action [B, 2, P, 4] for objects (see `DetectionDataset.batch`), and which elements count [B, 2, P].

    A patch is assigned to the smallest object of which it holds the centre, or whose middle three quarters (in both
    directions) have the patch's centre. An unassigned patch is background and its box does not count; within a crowd
    its class does not count either. Empty boxes are no objects.
    """
    frame = Frame.of(image_size)
    centres = patch_centres(frame.height // patch_size, frame.width // patch_size, boxes.device)  # [P, 2]
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


def decode_boxes(raw: Tensor, patch_size: int, columns: int | None = None) -> Tensor:
    """Raw boxes [..., P, 4] -> x0 y0 x1 y1 in pixels of the input. columns: patches in a row; None: the grid is a
    square."""
    columns = columns or math.isqrt(raw.shape[-2])
    centres = patch_centres(raw.shape[-2] // columns, columns, raw.device)
    return (raw_to_corners(raw) + centres.repeat(1, 2)) * patch_size


class ClassAndBox(Distribution):
    """A class ~ Categorical and a box ~ Normal for each patch, as two elements: batch shape [..., 2, P], event shape
    [4]. logits: [..., P, K + 1]; boxes: raw [..., P, 4]; std: of the box in raw space."""

    arg_constraints = {}

    def __init__(self, logits: Tensor, boxes: Tensor, std: float):
        self.classes = Categorical(logits=logits)
        self.classes.probs = self.classes.logits.exp()  # softmax is slow over few classes
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

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Each class with the mean box: [K + 1, ..., 2, P, 4]."""
        classes = self.classes.enumerate_support()
        return pack(classes, self.boxes.mean.expand(len(classes), *self.boxes.mean.shape))

    def choice_log_probs(self) -> tuple[Tensor, Tensor]:
        """Of `choices.py`: log π of each class, [K + 1, ..., 2, P] (of a box, which has no choices, that of K + 1 equal
        ones); and that classes alone are categorical, [2, 1]."""
        logits = self.classes.logits.movedim(-1, 0)  # [K + 1, ..., P]
        log_probs = torch.stack([logits, torch.full_like(logits, -math.log(len(logits)))], -2)
        return log_probs, torch.tensor([[True], [False]], device=logits.device)


@register_kl(ClassAndBox, ClassAndBox)
def kl_class_and_box(p: ClassAndBox, q: ClassAndBox) -> Tensor:
    return torch.stack([kl_divergence(p.classes, q.classes), kl_divergence(p.boxes, q.boxes)], -2)


def box_policy_adapter(outputs: Tensor, std: float = 0.3) -> ClassAndBox:
    """Outputs [B, T, P, K + 1 + 4] -> a class and a box per patch, in float32 (or better)."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return ClassAndBox(outputs[..., :-4], outputs[..., -4:], std)


def cross_entropy_iou_loss(policy: ClassAndBox, targets: Tensor) -> Tensor:
    """Cross-entropy of the classes, 1 - IoU of the predicted boxes: [B, T, 1, 2, P]. targets: [B, T, 1, 2, P, 4]."""
    classes = -policy.classes.log_prob(targets[:, :, 0, 0, :, 0].long())
    iou = box_iou(raw_to_corners(policy.boxes.mean), raw_to_corners(targets[:, :, 0, 1]))
    return torch.stack([classes, 1 - iou], -2)[:, :, None]


def detection_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """Per element: 1 for a patch's right class (or background), 0 otherwise; for its box the IoU with the object
    assigned to the patch. actions: [B, T, A, 2, P, 4]; targets: [B, 2, P, 4]; returns [B, T, A, 2, P]."""
    targets = targets[:, None, None]
    right = (actions[..., 0, :, 0] == targets[..., 0, :, 0]).to(actions.dtype)
    iou = box_iou(raw_to_corners(actions[..., 1, :, :]), raw_to_corners(targets[..., 1, :, :]))
    return torch.stack([right, iou], -2)


def detection_f1_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """One score per image: F1 at IoU 0.5 of the set that an action decodes to, [B, T, A]; 1 for rightly nothing.
    actions: [B, T, A, 2, P, 4]; outputs: [B, T, P, K + 1 + 4], whose class probabilities are the detections' scores."""
    probs = box_policy_adapter(outputs).classes.probs
    hits, found, true = (x.view(actions.shape[:3]) for x in match_sets(actions, probs, metadata))
    return torch.where(found + true == 0, 1.0, 2 * hits / (found + true).clamp(min=1)).to(probs.dtype)


def detection_set_credit(
    actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict, thresholds: tuple[float, ...] = THRESHOLDS
) -> Credit:
    """The set of boxes that an action decodes to, scored as a whole (`set_credit.py`), with exact credit: the values of
    all choices of each patch's class, the others as drawn, mean over the draws, times M + 1, so that an object weighs
    about as much in full and in empty images. Crowds and empty boxes are no objects; a patch in a crowd is not in the
    set. A box learns beside it from its IoU with the patch's object, by maxrl's advantages.

    actions: [B, T, A, 2, P, 4]; outputs: [B, T, P, K + 1 + 4]; metadata: see `DetectionDataset.batch`. Values are
    [B, T, 2, P, K + 1], 0 for boxes; the scores are one per action, [B, T, A]."""
    num_classes, (truth, labels, crowd) = outputs.shape[-1] - 5, (metadata[x] for x in ("boxes", "labels", "crowd"))
    empty = (truth[..., 2:] <= truth[..., :2]).any(-1)
    labels = F.pad(torch.where(crowd | empty, -1, labels), (0, 1), value=-1)  # [B, M + 1]
    grid = metadata["patch_size"], metadata.get("columns")
    own = decode_boxes(targets[:, 1], *grid)[:, :, None]  # each patch's own object beside all objects, [B, P, 1, 4]
    truth = torch.cat([truth.to(own.dtype)[:, None].expand(-1, own.shape[1], -1, -1), own], 2)  # [B, P, M + 1, 4]
    classes = actions[..., 0, :, 0].long()
    if (counted := metadata.get("counted")) is not None:
        classes = torch.where(counted[:, None, None, 0], classes, num_classes)
    iou = box_iou(decode_boxes(actions[..., 1, :, :], *grid)[..., None, :], truth[:, None, None])  # [B, T, A, P, M + 1]
    labels = labels[:, None, None].expand(*iou.shape[:3], -1)
    score, values = set_values(classes, iou, labels, num_classes, thresholds)
    values = values.mean(2) * ((labels[:, :1, 0] >= 0).sum(-1) + 1)[..., None, None]  # [B, T, P, K + 1]
    advantages = F.pad(compute_advantages(iou[..., -1], "maxrl").unsqueeze(-2), (0, 0, 1, 0))
    return Credit(advantages, score, F.pad(values.unsqueeze(2), (0, 0, 0, 0, 0, 1)))


def detection_set_credit_50(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Credit:
    """`detection_set_credit` at one threshold, IoU 0.5, as F1 is counted."""
    return detection_set_credit(actions, outputs, targets, metadata, thresholds=THRESHOLDS[:1])


def count_ranks(kept: Tensor) -> int:
    """How many ranks a loop over sets sorted by score has to visit: bool [S, n]. A GPU would have to be waited for."""
    if kept.device.type != "cpu" or kept.numel() == 0:
        return kept.shape[1]
    return int((kept * torch.arange(1, kept.shape[1] + 1)).max())


def nms(boxes: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Class-wise non-maximum suppression of S sets, each sorted by descending score. boxes: [S, n, 4]; labels: [S, n],
    -1 where there is none. Returns which are kept, bool [S, n]."""
    kept = labels >= 0
    for i in range(count_ranks(kept)):  # all sets at once
        overlap = box_iou(boxes[:, i, None], boxes[:, i + 1 :]) > iou_threshold
        kept[:, i + 1 :] &= ~(overlap & (labels[:, i, None] == labels[:, i + 1 :]) & kept[:, i, None])
    return kept


def match_sets(actions: Tensor, probs: Tensor, metadata: dict, iou_threshold: float = 0.5) -> tuple[Tensor, ...]:
    """Class-wise NMS of what each action decodes to, then matching with the image's objects, the best score first:
    hits, detections and objects, counts [B · T · A] each. A detection of which more than half lies in a crowd of its
    class is not counted unless it is a hit.

    actions: [B, T, A, 2, P, 4]; probs: of the classes [B, T, P, K + 1]; metadata: see `DetectionDataset.batch`.
    """
    classes = actions[..., 0, :, 0].long()  # [B, T, A, P]
    scores = probs[:, :, None].expand(*classes.shape, -1).gather(-1, classes[..., None])[..., 0].flatten(0, 2)
    none = classes == probs.shape[-1] - 1
    if (content := metadata.get("content")) is not None:
        inside = in_content(content, metadata["patch_size"], classes.shape[-1], metadata["columns"])
        none = none | ~inside[:, None, None]
    labels = torch.where(none, -1, classes).flatten(0, 2)  # -1: background, no detection
    order = scores.masked_fill(labels < 0, -1).argsort(dim=-1, descending=True, stable=True)
    boxes = decode_boxes(actions[..., 1, :, :], metadata["patch_size"], metadata.get("columns")).flatten(0, 2)
    boxes, labels = boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)  # [S, P, 4], [S, P]
    repeats = actions.shape[1] * actions.shape[2]
    truth, truth_labels, crowd = (metadata[name].repeat_interleave(repeats, 0) for name in ("boxes", "labels", "crowd"))
    kept = nms(boxes, labels, iou_threshold)
    hit = torch.zeros_like(kept)
    free = (truth_labels >= 0) & ~crowd  # [S, M]
    objects, places = free.sum(1), torch.arange(free.shape[1], device=free.device)
    if free.shape[1]:
        for i in range(count_ranks(kept)):
            iou = box_iou(boxes[:, i, None], truth).masked_fill(~(free & (truth_labels == labels[:, i, None])), -1)
            best, index = iou.max(1)
            hit[:, i] = kept[:, i] & (best >= iou_threshold)
            free = free & ~((places == index[:, None]) & hit[:, i, None])
        # without a loop over the objects' few crowds: [S, P, M]
        inside = box_iou(boxes[:, :, None], truth[:, None], torch.ones_like(crowd[:, None])) > 0.5
        ignored = (inside & crowd[:, None] & (truth_labels[:, None] == labels[..., None])).any(-1)
        kept &= hit | ~ignored
    return hit.sum(1), kept.sum(1), objects


def decode(probs: Tensor, raw: Tensor, config: dict, content: Tensor | None = None) -> list[dict[str, Tensor]]:
    """Detections of each image, best first: {"boxes": [n, 4] x0 y0 x1 y1 in pixels of the input, "scores": [n],
    "labels": [n], "likely": [n], whether it is its patch's most likely choice, background included}. probs:
    [B, P, K + 1]; raw: boxes [B, P, 4]; content: the rectangles that the images fill of the input, at which boxes are
    cut, [B, 4]; None: the whole; on the CPU. Every class of a patch whose probability is at least
    detection.score_threshold is a candidate; then class-wise NMS at detection.nms_iou."""
    frame, patch_size = Frame.from_config(config), config["model"]["patch_size"]
    content = torch.tensor([frame.bounds], dtype=raw.dtype) if content is None else content
    low, high = content[:, None, [0, 1, 0, 1]], content[:, None, [2, 3, 2, 3]]
    num_classes = probs.shape[-1] - 1
    scores = probs[..., :-1].flatten(1)  # [B, P · K]
    candidate = scores >= config["detection"]["score_threshold"]
    inside = in_content(content, patch_size, raw.shape[1], frame.width // patch_size)
    candidate &= inside.repeat_interleave(num_classes, 1)
    order = scores.masked_fill(~candidate, -1).argsort(dim=-1, descending=True, stable=True)
    order = order[:, : int(candidate.sum(1).max())]
    scores, candidate = scores.gather(1, order), candidate.gather(1, order)
    labels = torch.where(candidate, order % num_classes, -1)
    likely = labels == probs.argmax(-1).gather(1, order // num_classes)
    patch = (order // num_classes)[..., None].expand(-1, -1, 4)
    boxes = decode_boxes(raw, patch_size, frame.width // patch_size)
    boxes = torch.minimum(torch.maximum(boxes, low), high).gather(1, patch)
    kept = nms(boxes, labels, config["detection"]["nms_iou"])
    columns = {"boxes": boxes, "scores": scores, "labels": labels, "likely": likely}
    return [{name: x[i][kept[i]] for name, x in columns.items()} for i in range(len(kept))]


def draw_boxes(picture: Image.Image, boxes: Tensor, names: list[str]) -> Image.Image:
    """The picture with boxes [n, 4], x0 y0 x1 y1 in its pixels, and their names."""
    draw = ImageDraw.Draw(picture)
    for (x0, y0, x1, y1), name in zip(boxes.tolist(), names):
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline="lime", width=max(picture.width // 150, 1))
        draw.text((x0 + 3, y0 + 1), name, fill="yellow")
    return picture


def draw_objects(image: Tensor, boxes: Tensor, names: list[str]) -> Tensor:
    """image: uint8 [3, H, W] with boxes [n, 4] in its pixels and their names: uint8 [3, BOX_PIXELS, width]."""
    scale = BOX_PIXELS / image.shape[1]
    size = max(round(image.shape[2] * scale), 1), BOX_PIXELS
    return to_tensor(draw_boxes(to_picture(image).resize(size, Image.Resampling.NEAREST), boxes * scale, names))


Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def f1_curves(detections: list[dict[str, Tensor]], truths: list[dict[str, Tensor]], classes: list[str]) -> Curves:
    """For each class that truth or detections hold its scores [D], the best first, and the F1 at IoU 0.5 of the data
    set's best 0, 1 … D detections, [D + 1]."""
    curves = {}
    for k, parts in matched(detections, truths).items():
        scores, hit, miss, objects = zip(*parts)
        scores, hit, miss = np.concatenate(scores), np.concatenate(hit, 1)[0], np.concatenate(miss, 1)[0]
        order = np.argsort(-scores, kind="stable")
        hits, misses = hit[order].cumsum(), miss[order].cumsum()
        curves[classes[k]] = scores[order], np.append(0, 2 * hits / np.maximum(hits + misses + sum(objects), 1))
    return curves


def best_thresholds(curves: Curves) -> dict[str, float]:
    """The score of each class from which on its detections have the highest F1, in the middle of the gap below it."""
    thresholds = {}
    for name, (scores, f1) in curves.items():
        edges = np.concatenate([[1.0], scores, [0.0]])
        cuts = edges[:-1] > edges[1:]  # after so many detections; between equal scores there is none
        best = int(np.where(cuts, f1, -1).argmax())
        thresholds[name] = float(edges[best : best + 2].mean())
    return thresholds


def mean_f1(curves: Curves, thresholds: dict[str, float]) -> float:
    """The mean over the classes of F1 by the detections from a threshold on; SHOWN_SCORE where there is none."""
    kept = {name: (scores >= thresholds.get(name, SHOWN_SCORE)).sum() for name, (scores, _) in curves.items()}
    return float(np.mean([f1[kept[name]] for name, (_, f1) in curves.items()])) if curves else math.nan


class BoxEvaluation(DenseEvaluation):
    """Collects truths and decoded detections; of the mean over T passes of class probabilities and raw boxes."""

    size = BOX_PIXELS

    def __init__(self, task: Task, dataset: DetectionDataset, shown: int = 8):
        super().__init__(task, dataset, shown)
        self.truths: list[dict[str, Tensor]] = []
        self.detections: tuple[list, list] = [], []
        self.counts = torch.zeros(2, 3)  # of both: hits, detections, objects

    def add(self, batch: TensorMiniBatch, outputs: Tensor, outputs_mc: Tensor) -> None:
        """outputs: [B, P, K + 1 + 4] of the deterministic network; outputs_mc: [B, T, P, K + 1 + 4] of T passes."""
        batch, data = batch.to("cpu"), self.dataset
        for i in batch.metadata["indices"].tolist():
            self.truths.append({"boxes": data.boxes[i], "labels": data.labels[i], "crowd": data.crowd[i]})
        whole = batch.metadata | data.objects(batch.metadata["indices"])  # a crop of the input hides none from metrics
        single, passes = box_policy_adapter(outputs.cpu()), box_policy_adapter(outputs_mc.cpu())
        mean = passes.classes.probs.mean(1)
        predictors = (single.classes.probs, single.boxes.mean), (mean, passes.boxes.mean.mean(1))
        for detections, counts, (probs, raw) in zip(self.detections, self.counts, predictors):
            detections += decode(probs, raw, self.task.config, batch.metadata["content"])
            actions = pack(probs.max(-1).indices, raw)[:, None, None]
            counts += torch.stack([x.sum() for x in match_sets(actions, probs[:, None], whole)])
        truths, found = self.truths[-len(batch) :], self.detections[1][-len(batch) :]

        def draw_parts(i: int) -> list[Tensor]:
            sure = {name: x[found[i]["likely"]] for name, x in found[i].items()}
            return [self.draw_objects(batch.inputs[i], objects) for objects in (truths[i], sure)]

        grid = -1, batch.metadata["columns"]
        inside = in_content(batch.metadata["content"], data.patch_size, mean.shape[1], grid[1])
        self.keep((predictive_entropy(mean) * inside).mean(-1), passes.classes.probs.unflatten(2, grid), draw_parts)

    def draw_objects(self, image: Tensor, objects: dict[str, Tensor]) -> Tensor:
        """image: uint8 [3, H, W] with the boxes of truth or detections, BOX_PIXELS high."""
        names = [self.dataset.classes[label] for label in objects["labels"].tolist()]
        return draw_objects(image, objects["boxes"], names)

    def curves(self) -> Curves:
        """F1 over the score's threshold, of the mean over passes."""
        return f1_curves(self.detections[1], self.truths, self.dataset.classes)

    def lines(self) -> list[str]:
        if self.task.thresholds is None:
            return []
        plain, fitted = (mean_f1(self.curves(), thresholds) for thresholds in ({}, self.task.thresholds))
        return [f"F1, mean over the classes: {plain:.4f} at a score of {SHOWN_SCORE}, {fitted:.4f} by fitted scores"]

    def metrics_of_both(self) -> Iterator[dict[str, float]]:
        """mAP, AP50, AP75 as COCO's, F1 at IoU 0.5 of the patches' most likely classes, and each class's AP."""
        classes = self.dataset.classes
        for detections, (hits, found, objects) in zip(self.detections, self.counts):
            ap = average_precision(detections, self.truths, len(classes))
            by_class = {f"ap/{name}": x for name, x in zip(classes, ap.pop("ap_per_class")) if not math.isnan(x)}
            yield ap | {"f1": float(2 * hits / (found + objects).clamp(min=1))} | by_class


class Detection(Task):
    """A class, background included, and a box for each patch."""

    keys = {
        "detection.annotations": Key(
            None, str, "COCO's file below the folder; null: annotations.json, or the only one that there is", path=True
        ),
        "detection.box_std": Key(0.3, float, "standard deviation of a box action in raw space, in patches", **POSITIVE),
        "detection.box_std_end": Key(
            None, float, "where it ends, by a geometric schedule; null: it stays", **POSITIVE, optional=True
        ),
        "detection.supervised_loss": Key(
            "iou", str, "of a box: -log π(target), or 1 - IoU", **one_of("log_prob", "iou")
        ),
        "detection.score_threshold": Key(0.05, float, "the least probability of a detection", **FRACTION),
        "detection.nms_iou": Key(
            0.5, float, "of two detections of a class that overlap more the weaker is dropped", **FRACTION
        ),
    }
    rewards = {
        reward.__name__: reward
        for reward in (detection_reward, detection_f1_reward, detection_set_credit, detection_set_credit_50)
    }
    losses = CLASS_LOSSES
    best = "eval/map"
    dense = True
    thresholds: dict[str, float] | None = None  # by class, the least score of a detection, where one was fitted

    def open(self, root: str, classes: list[str] | None = None) -> DetectionDataset:
        patch_size, skip_bad = self.config["model"]["patch_size"], self.config["data"]["on_bad_image"] == "skip"
        annotations = self.config["detection"]["annotations"]
        return DetectionDataset(root, Frame.from_config(self.config), patch_size, classes, annotations, skip_bad)

    def head_size(self, num_classes: int) -> int:
        """Logits of the classes and of the background, and a raw box."""
        return num_classes + 1 + 4

    def policy(self, outputs: Tensor, progress: float = 1.0) -> ClassAndBox:
        """The standard deviation goes from box_std to box_std_end geometrically."""
        begin, end = self.config["detection"]["box_std"], self.config["detection"]["box_std_end"]
        return box_policy_adapter(outputs, begin * ((end or begin) / begin) ** progress)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Of the classes of each patch, the background last: […, P, K + 1]."""
        return self.policy(outputs).classes.probs

    def deployed(self, outputs: Tensor) -> dict[str, Tensor]:
        """The candidates before threshold and suppression, a patch each: boxes x0 y0 x1 y1 in pixels of the input
        [B, P, 4], and the classes' probabilities, the background last [B, P, K + 1]."""
        policy, (*_, width, height) = self.policy(outputs), Frame.from_config(self.config).bounds
        patch_size = self.config["model"]["patch_size"]
        boxes = decode_boxes(policy.boxes.mean, patch_size, width // patch_size).unbind(-1)
        boxes = torch.stack([x.clamp(0, most) for x, most in zip(boxes, (width, height) * 2)], -1)
        return {"boxes": boxes, "probabilities": policy.classes.probs}

    def count_classes(self, dataset: DetectionDataset) -> Tensor:
        """Patches of each class that count, the background last, [K + 1]: of all images, or of an even sample."""
        counts, n = torch.zeros(len(dataset.classes) + 1, dtype=torch.int64), len(dataset)
        most = min(n, MOST_COUNTED)
        for part in (torch.arange(most) * n // most).split(256):
            batch = dataset.batch(part, part)  # its targets do not depend on what the images show
            labels = batch.targets[:, 0, :, 0][batch.counted[:, 0]].long()
            counts += torch.bincount(labels, minlength=len(counts))
        return counts

    def supervised_loss(self, policy: ClassAndBox, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Of the boxes detection.supervised_loss, of the classes training.supervised_loss."""
        log_prob = self.config["detection"]["supervised_loss"] == "log_prob"
        loss = nll(policy, targets) if log_prob else cross_entropy_iou_loss(policy, targets)
        if self.config["training"]["supervised_loss"] == "cross_entropy":
            return loss
        counted = None if counted is None else counted[:, 0]
        classes = super().supervised_loss(policy.classes, targets[..., 0, :, 0], counted)
        return torch.stack([classes, loss[..., 1, :]], -2)

    def mirror(self, batch: TensorMiniBatch) -> TensorMiniBatch:
        return self.turn(batch, F.pad(draw_mirrored(batch.inputs)[:, None], (1, 1)))

    def turn(self, batch: TensorMiniBatch, turns: Tensor) -> TensorMiniBatch:
        """Patches change places, and their targets turn about their centres, so that just as many count."""
        metadata, sizes = dict(batch.metadata), batch.inputs.shape[:-3:-1]  # width, height
        metadata["boxes"] = turned_boxes(metadata["boxes"], turns, *sizes)
        metadata["content"] = turned_boxes(metadata["content"][:, None], turns, *sizes)[:, 0]
        grid = torch.arange(batch.targets.shape[2], device=turns.device).view(1, -1, metadata["columns"])
        places = turned(grid.expand(len(batch), -1, -1), turns).flatten(1)[:, None]  # [B, 1, P]
        targets = batch.targets.gather(2, places[..., None].expand_as(batch.targets))
        raw = torch.where(turns[:, :1, None], targets[:, 1][..., [1, 0, 3, 2]], targets[:, 1])  # dx, dy, log w, log h
        signs = F.pad(1 - 2 * turns[:, None, 1:].to(raw.dtype), (0, 2), value=1.0)  # [B, 1, 4]
        targets = torch.stack([targets[:, 0], raw * signs], 1)
        counted = batch.counted.gather(2, places.expand_as(batch.counted))
        return TensorMiniBatch(turned(batch.inputs, turns), targets, metadata, counted)

    def show(self, batch: TensorMiniBatch, i: int) -> tuple[Tensor, list[str]]:
        """Patches are assigned to the objects that are drawn; crowds are in brackets."""
        labels, crowd, boxes = (batch.metadata[name][i] for name in ("labels", "crowd", "boxes"))
        names = [batch.metadata["classes"][label] for label in labels[labels >= 0].tolist()]
        names = [f"({name})" if is_crowd else name for name, is_crowd in zip(names, crowd[labels >= 0].tolist())]
        return draw_objects(batch.inputs[i], boxes[labels >= 0], names), [f"{len(names)} objects"]

    def evaluation(self, dataset: Dataset) -> BoxEvaluation:
        return BoxEvaluation(self, dataset)

    def describe(self, outputs: Tensor, path: str, classes: list[str]) -> tuple[dict, int]:
        """The detections, best first, their boxes x0 y0 x1 y1 in pixels of the image file; and the file's width.
        outputs: [T, P, K + 1 + 4]."""
        policy, patch_size, frame = (
            self.policy(outputs),
            self.config["model"]["patch_size"],
            Frame.from_config(self.config),
        )
        probs, raw = policy.classes.probs.mean(0, keepdim=True), policy.boxes.mean.mean(0, keepdim=True)
        placement = frame.place(size := upright_size(path))
        content = torch.tensor([placement.content], dtype=raw.dtype)
        inside = in_content(content, patch_size, raw.shape[1], frame.width // patch_size)[0]
        found = decode(probs, raw, self.config, content)[0]
        in_file = to_file(found["boxes"].double(), torch.tensor(placement.affine(), dtype=torch.float64))
        columns = found["labels"].tolist(), found["scores"].tolist(), found["likely"].tolist(), in_file.tolist()
        boxes = [
            {"class": classes[label], "score": score, "most_likely": likely, "box": box}
            for label, score, likely, box in zip(*columns)
        ]
        if self.thresholds is not None:
            boxes = [box for box in boxes if box["score"] >= self.thresholds.get(box["class"], SHOWN_SCORE)]
        return {"boxes": boxes} | self.uncertainty(outputs[:, inside]), size[0]

    def shown(self, record: dict) -> list[dict]:
        """The boxes for words and pictures: those that were decided on, or are their patch's most likely choice."""
        decided = self.thresholds is not None
        return [box for box in record["boxes"] if decided or box["most_likely"]]

    def in_words(self, record: dict) -> str:
        shown = self.shown(record)
        words = [f"{b['class']} ({b['score']:.0%}) at {' '.join(f'{x:.0f}' for x in b['box'])}" for b in shown]
        return ", ".join(words) or "nothing"

    def draw(self, picture: Image.Image, record: dict, found: int) -> dict[str, tuple[str, Image.Image]]:
        shown = self.shown(record)
        boxes = torch.tensor([box["box"] for box in shown]).view(-1, 4) * picture.width / found
        return {"picture": ("", draw_boxes(picture, boxes, [box["class"] for box in shown]))}
