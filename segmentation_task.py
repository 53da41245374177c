"""Segmentation of images into classes by pixel: data set, policy, rewards, metric, pictures.

H, W: height and width of image and mask; K: classes. An action is a whole mask, its elements are the pixels.
"""

import math
import re

import torch
from PIL import Image
from torch import Tensor
from torch.distributions import Categorical
from torch.utils.data import Dataset

from augment import turned
from config import Key, one_of
from data_types import Credit, TensorMiniBatch
from evaluation import DenseEvaluation, confusion_matrix, draw_confusion, predictive_entropy, to_picture, to_tensor
from folders import upright_size
from frame import Crop, Frame
from images import ImageDataset, decode_image, draw_mirrored, mirror
from label_losses import MASK_LOSSES
from mask_files import IGNORED, MaskClasses, check_sizes, decode_mask, find_pairs
from vision_task import Task

COLOURS = {"rule": "rrggbb rrggbb …", "valid": re.compile(r"[0-9a-fA-F]{6}( [0-9a-fA-F]{6}){1,253}").fullmatch}


class SegmentationDataset(ImageDataset):
    """A folder of `images/` and `masks/` with the same stems; `mask_files.py` has what a mask may be.

    classes, and further options: see `mask_files.MaskClasses`. Item i is uint8 [4, H, W]: the image and, as its fourth
    channel, the mask, 255 where the image was padded. Raises InputError for images and masks that do not fit each
    other, and for masks that do not fit the classes.
    """

    channels = 4  # the mask is the fourth

    def __init__(
        self,
        root: str,
        image_size: int | Frame,
        classes: list[str] | None = None,
        skip: bool = False,
        **options,
    ):
        self.root, self.image_size = root, image_size
        self.paths, self.mask_paths, notes = find_pairs(root)
        check_sizes(self.paths, self.mask_paths, skip)
        self.masks = MaskClasses(root, self.mask_paths, classes, skip=skip, **options)
        self.classes, self.notes = self.masks.classes, (*notes, *self.masks.notes)

    def item(self, index: int, crop: Crop | None = None) -> Tensor:
        image = decode_image(self.paths[index], self.image_size, crop)
        mask = decode_mask(self.mask_paths[index], self.image_size, self.masks.ids, self.masks.colours, crop)
        return torch.cat([image, mask[None]])

    def batch(self, indices: Tensor, items: Tensor, crops: list[Crop] | None = None) -> TensorMiniBatch:
        """Items [B, 4, H, W] -> inputs [B, 3, H, W], targets [B, H, W] int64 (0 where ignored) and counted pixels."""
        counted = items[:, 3] != IGNORED
        targets = torch.where(counted, items[:, 3], 0).long()
        return TensorMiniBatch(items[:, :3], targets, self.metadata(indices), counted)


def unpatchify(tokens: Tensor, patch_size: int, columns: int | None = None) -> Tensor:
    """[…, P, patch_size² · K] -> [..., H, W, K]: the logits of each patch's pixels (row by row) in their place.
    columns: patches in a row; None: the grid is a square."""
    columns = columns or math.isqrt(tokens.shape[-2])
    x = tokens.unflatten(-1, (patch_size, patch_size, -1)).unflatten(-4, (-1, columns))  # […, row, column, y, x, K]
    return x.transpose(-4, -3).flatten(-5, -4).flatten(-3, -2)  # […, row, y, column, x, K] -> […, H, W, K]


class PixelClasses(Categorical):
    """Categorical over many pixels and few classes: it draws by inversion, where torch.multinomial takes the pixels one
    by one, and takes its probabilities from the normalised logits, as softmax is slow over few classes."""

    def __init__(self, logits: Tensor):
        super().__init__(logits=logits)
        self.probs = self.logits.exp()

    def sample(self, sample_shape: torch.Size | tuple = ()) -> Tensor:
        uniform = torch.rand(self._extended_shape(sample_shape), device=self.probs.device)
        drawn = torch.zeros_like(uniform, dtype=torch.int16)  # quicker to add up than int64
        for cumulative in self.probs.cumsum(-1)[..., :-1].unbind(-1):  # of each class but the last
            drawn += uniform >= cumulative
        return drawn.long()


def mask_policy_adapter(outputs: Tensor) -> PixelClasses:
    """Logits [B, T, H, W, K] -> a class per pixel, in float32 (or better)."""
    return PixelClasses(outputs.to(torch.promote_types(outputs.dtype, torch.float32)))


def pixel_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """1 for a pixel's right class, 0 otherwise: float [B, T, A, H, W]. actions: [B, T, A, H, W]; targets: [B, H, W]."""
    return (actions == targets[:, None, None]).float()


def pixel_cases(actions: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """The chosen class where it is wrong, K + it where it is right. actions: [B, T, A, H, W]; targets: [B, H, W];
    returns [B, T, A, HW]."""
    chosen = actions.flatten(3)
    return torch.add(chosen, chosen == targets.flatten(1)[:, None, None], alpha=num_classes)


def pixel_counts(cases: Tensor, targets: Tensor, counted: Tensor | None, num_classes: int) -> tuple[Tensor, ...]:
    """Counted pixels of each class: intersection I, predicted P, true Y, each float [B, T, A, K]. cases: [B, T, A, HW],
    see `pixel_cases`; targets, counted (None: all count): [B, H, W]."""
    weight = (torch.ones_like(targets) if counted is None else counted).flatten(1).float()  # [B, HW]
    zeros = weight.new_zeros(*cases.shape[:3], 2 * num_classes)
    wrong, intersection = zeros.scatter_add(3, cases, weight[:, None, None].expand_as(cases)).split(num_classes, 3)
    true = weight.new_zeros(len(targets), num_classes).scatter_add(1, targets.flatten(1), weight)
    return intersection, intersection + wrong, true[:, None, None].expand_as(wrong)


def mean_iou(intersection: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """Mean over the classes with Y > 0 of I / (P + Y - I): [..., K] each -> […]; 1 where no pixel counts."""
    present = true > 0
    iou = torch.where(present, intersection / (predicted + true - intersection).clamp(min=1), 0)
    return torch.where(present.any(-1), iou.sum(-1) / present.sum(-1).clamp(min=1), 1)


def mask_iou_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """One score per mask: IoU, mean over the classes present in the truth. actions: [B, T, A, H, W]; outputs: logits
    [B, T, H, W, K]; targets: [B, H, W]; returns [B, T, A]."""
    cases = pixel_cases(actions, targets, outputs.shape[-1])
    return mean_iou(*pixel_counts(cases, targets, metadata.get("counted"), outputs.shape[-1]))


def mask_iou_credit(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Credit:
    """`mask_iou_reward` with exact credit: the value of each class k at a pixel is R(a with this pixel set to k), up to
    what is the same for all k, mean over the draws, times the image's counted pixels; values [B, T, H, W, K]. Their
    advantage is the counterfactual one (COMA, https://arxiv.org/abs/1705.08926). Exact for any K; needs no group.

    Without the pixel a class has its IoU = I / U; a pixel of its truth adds 1 / U, another takes I / U - I / (U + 1),
    which is counted for the classes that it has not, and with U - 1 for the one that it has. Absent classes count 0.
    """
    num_classes, counted = outputs.shape[-1], metadata.get("counted")
    cases = pixel_cases(actions, targets, num_classes)  # [B, T, A, HW]
    counts = pixel_counts(cases, targets, counted, num_classes)
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    intersection, predicted, true = (count.to(dtype) for count in counts)  # [B, T, A, K]
    union, present = predicted + true - intersection, true > 0
    scale = true.sum(-1, keepdim=True) / actions.shape[2]  # counted pixels, for the mean over the draws
    weight = present * scale / present.sum(-1, keepdim=True).clamp(min=1)
    # I / (U + 1) - I / U and so on, written without the cancellation
    right = (weight / union.clamp(min=1)).sum(2)  # [B, T, K]
    joining = -weight * intersection / (union * (union + 1)).clamp(min=1)
    staying = -weight * intersection / (union * (union - 1)).clamp(min=1)
    wrong = torch.cat([staying - joining, torch.zeros_like(joining)], -1).gather(-1, cases)  # 0 where it is right
    chosen, truth = actions.flatten(3), targets.flatten(1)[:, None].expand(*right.shape[:2], -1)
    values = joining.sum(2)[:, :, None].repeat(1, 1, truth.shape[-1], 1)  # [B, T, HW, K]
    values.scatter_add_(-1, chosen.movedim(2, -1), wrong.movedim(2, -1))
    values.scatter_(-1, truth[..., None], right.gather(-1, truth)[..., None])
    return Credit(None, mean_iou(*counts), values.unflatten(2, actions.shape[3:]))


def segmentation_metrics(confusion: Tensor, classes: list[str]) -> dict[str, float]:
    """IoU of each class, their mean over the classes that truth or prediction hold, and pixel accuracy. confusion:
    [K, K] over the whole data set, which is not the mean of the images' IoUs."""
    hits = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - hits
    iou = (hits / union)[union > 0]
    metrics = {"mean_iou": float(iou.mean()), "pixel_accuracy": float(hits.sum() / confusion.sum())}
    return metrics | {f"iou/{classes[i]}": float(hits[i] / union[i]) for i in (union > 0).nonzero().flatten().tolist()}


def overlay(image: Tensor, mask: Tensor) -> Tensor:
    """image: uint8 [3, H, W]; mask: class ids [H, W]. Class 0 stays as it is, ignored pixels are white."""
    phase = torch.tensor([0, 1 / 3, 2 / 3], device=mask.device)[:, None, None]
    hue = mask * 0.381966 + phase  # golden-ratio steps around the colour wheel
    colour = torch.where(mask == IGNORED, 255.0, 127.5 + 127.5 * torch.cos(2 * math.pi * hue))
    return torch.where(mask == 0, image.float(), 0.4 * image + 0.6 * colour).to(torch.uint8)


class MaskEvaluation(DenseEvaluation):
    """Counts pixels by truth and prediction over the data set."""

    parts = "image, truth, prediction, disagreement"

    def __init__(self, task: Task, dataset: SegmentationDataset, shown: int = 8):
        super().__init__(task, dataset, shown)
        self.confusions = torch.zeros(2, len(dataset.classes), len(dataset.classes), dtype=torch.int64)

    def add(self, batch: TensorMiniBatch, outputs: Tensor, outputs_mc: Tensor) -> None:
        """outputs: logits [B, H, W, K] of the deterministic network; outputs_mc: [B, T, H, W, K] of T passes."""
        passes = mask_policy_adapter(outputs_mc).probs
        mean = passes.mean(1)  # [B, H, W, K]
        for confusion, scores in zip(self.confusions, (outputs, mean)):
            confusion += confusion_matrix(scores.argmax(-1), batch.targets, len(confusion), batch.counted).cpu()

        def draw_parts(i: int) -> list[Tensor]:
            truth = batch.targets[i].where(batch.counted[i], IGNORED)
            image, prediction = batch.inputs[i], mean[i].argmax(-1)
            return [image, overlay(image, truth), overlay(image, prediction)]

        self.keep((predictive_entropy(mean) * batch.counted).mean((1, 2)), passes, draw_parts)

    def metrics_of_both(self) -> list[dict[str, float]]:
        return [segmentation_metrics(confusion, self.dataset.classes) for confusion in self.confusions]

    def charts(self) -> dict[str, Image.Image]:
        return {"confusion": draw_confusion(self.confusions[1], self.dataset.classes)}


class Segmentation(Task):
    """A class for each pixel: each patch token gives the class logits of its patch_size² pixels."""

    keys = {
        "segmentation.value_255": Key(
            "auto",
            str,
            "what 255 in a mask is; auto: the foreground of two classes if the masks hold only 0 and 255",
            **one_of("auto", "ignored", "foreground"),
        ),
        "segmentation.colours": Key(
            None, str, "colours of the classes in order, then of what is ignored; null: those in classes.txt", **COLOURS
        ),
    }
    rewards = {"mask_iou_credit": mask_iou_credit, "mask_iou_reward": mask_iou_reward, "pixel_reward": pixel_reward}
    losses = MASK_LOSSES
    best = "eval/mean_iou"
    dense = True

    def open(self, root: str, classes: list[str] | None = None) -> SegmentationDataset:
        """The training folder decides what masks mean; the config keeps that for the others and in the checkpoint."""
        model, own = self.config["model"], self.config["segmentation"]
        skip = self.config["data"]["on_bad_image"] == "skip"
        frame = Frame.from_config(self.config)
        dataset = SegmentationDataset(root, frame, classes, skip, num_classes=model["num_classes"], **own)
        if classes is None:
            own |= {"value_255": dataset.masks.value_255, "colours": dataset.masks.colours}
        return dataset

    def count_classes(self, dataset: SegmentationDataset) -> Tensor:
        """Not pixels, but the sum over the masks of each class's share of a mask, which was counted when they were
        opened: as in training each image weighs the same."""
        return torch.from_numpy(dataset.masks.shares)

    def head_size(self, num_classes: int) -> int:
        return self.config["model"]["patch_size"] ** 2 * num_classes

    def arrange(self, outputs: Tensor) -> Tensor:
        """[…, P, patch_size² · K] -> logits […, H, W, K]."""
        patch_size = self.config["model"]["patch_size"]
        return unpatchify(outputs, patch_size, Frame.from_config(self.config).width // patch_size)

    def policy(self, outputs: Tensor, progress: float = 1.0) -> PixelClasses:
        return mask_policy_adapter(outputs)

    def mirror(self, batch: TensorMiniBatch) -> TensorMiniBatch:
        chosen = draw_mirrored(batch.inputs)
        inputs, targets, counted = (mirror(x, chosen) for x in (batch.inputs, batch.targets, batch.counted))
        return TensorMiniBatch(inputs, targets, batch.metadata, counted)

    def turn(self, batch: TensorMiniBatch, turns: Tensor) -> TensorMiniBatch:
        inputs, targets, counted = (turned(x, turns) for x in (batch.inputs, batch.targets, batch.counted))
        return TensorMiniBatch(inputs, targets, batch.metadata, counted)

    def show(self, batch: TensorMiniBatch, i: int) -> tuple[Tensor, list[str]]:
        truth = batch.targets[i].where(batch.counted[i], IGNORED)
        return torch.cat([batch.inputs[i], overlay(batch.inputs[i], truth)], -1), ["image, truth"]

    def evaluation(self, dataset: Dataset) -> MaskEvaluation:
        return MaskEvaluation(self, dataset)

    def describe(self, outputs: Tensor, path: str, classes: list[str]) -> tuple[dict, Image.Image]:
        """The shares of the mask's pixels; the mask (mode L) at the image file's size, 255 where the file was cut off.
        outputs: logits [T, H, W, K]."""
        mask = to_picture(self.decide(outputs, path, classes).to(torch.uint8))
        placement = Frame.from_config(self.config).place(upright_size(path))
        mask, (x0, y0, x1, y1) = placement.restore(mask, IGNORED), placement.content
        counts = mask.histogram()[: len(classes)]
        record = {"shares": {name: count / sum(counts) for name, count in zip(classes, counts) if count}}
        return record | self.uncertainty(outputs[:, y0:y1, x0:x1]), mask

    def in_words(self, record: dict) -> str:
        return ", ".join(f"{name} {share:.1%}" for name, share in record["shares"].items())

    def draw(self, picture: Image.Image, record: dict, found: Image.Image) -> dict[str, tuple[str, Image.Image]]:
        """The mask, whose pixel values are the classes, and the picture under it."""
        small = to_tensor(found.resize(picture.size, Image.Resampling.NEAREST))
        return {"mask": ("masks", found), "picture": ("overlays", to_picture(overlay(to_tensor(picture), small)))}
