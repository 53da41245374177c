"""Augmentation (data.augment): what is drawn for each image of a step, and how images move with what is in them.

All draws are a function of (seed, step, purpose) for the whole batch of all processes, of which each takes its places:
neither workers, micro-batches, processes nor a resumed run change them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data_types import TensorMiniBatch
from frame import Crop
from grpo import keyed_rng

QUARTERS = ((0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0))  # turns to the left: transposed, left to right, upside down
LUMA = (0.299, 0.587, 0.114)  # of red, green, blue in a pixel's grey, as Pillow's


@dataclass(frozen=True)
class Settings:
    """data.augment. crop: the least and the greatest share of an image's area; None: no crops. flip: `h`, `v`, `hv`, or
    nothing. color: how far the factors of brightness, contrast and saturation are from 1. rotate90: by 0 to 3 quarters.
    mirror: it was `true`, and `Task.mirror` does it all."""

    crop: tuple[float, float] | None = None
    flip: str = ""
    color: float = 0.0
    rotate90: bool = False
    mirror: bool = False

    @staticmethod
    def of(augment: bool | dict) -> "Settings":
        return Settings(flip="h", mirror=True) if augment is True else Settings(**augment or {})

    @property
    def turns(self) -> int:
        """How many versions of an image flips and rotations give."""
        return (8 if self.flip else 4) if self.rotate90 else 2 ** len(self.flip)


def draw_crops(step: int, seed: int, count: int, shares: tuple[float, float]) -> list[Crop]:
    """The crops of a step's images, of all processes."""
    with keyed_rng(seed, step, "crops"):
        rows = torch.rand(count, 4, dtype=torch.float64).tolist()
    low, high = shares
    return [Crop(low + (high - low) * share, 2 * aspect - 1, x, y) for share, aspect, x, y in rows]


def draw_turns(uniform: Tensor, settings: Settings) -> Tensor:
    """Which images are transposed, then mirrored left to right, then turned upside down: bool [B, 3]. uniform: numbers
    from 0 to 1, [B, 3]."""
    quarter = (uniform[:, 0] * 4 * settings.rotate90).long()
    flips = torch.stack([(uniform[:, i] < 0.5) & (name in settings.flip) for i, name in ((1, "h"), (2, "v"))], 1)
    turns = torch.tensor(QUARTERS, dtype=torch.bool)[quarter]
    return torch.cat([turns[:, :1], turns[:, 1:] ^ flips], 1)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, …, H, W] with each image turned, see `draw_turns`; only a square can be transposed."""
    transposed, mirrored, upside_down = turns.view(len(x), 3, *[1] * (x.ndim - 1)).unbind(1)
    if x.shape[-1] == x.shape[-2]:
        x = torch.where(transposed, x.mT, x)
    x = torch.where(mirrored, x.flip(-1), x)
    return torch.where(upside_down, x.flip(-2), x)


def turned_boxes(boxes: Tensor, turns: Tensor, width: int, height: int) -> Tensor:
    """Boxes [B, M, 4], x0 y0 x1 y1 in images of this size, that go with `turned` images."""
    transposed, mirrored, upside_down = turns.view(-1, 3, 1).unbind(1)
    x0, y0, x1, y1 = torch.where(transposed[..., None], boxes[..., [1, 0, 3, 2]], boxes).unbind(-1)
    x0, x1 = torch.where(mirrored, width - x1, x0), torch.where(mirrored, width - x0, x1)
    y0, y1 = torch.where(upside_down, height - y1, y0), torch.where(upside_down, height - y0, y1)
    return torch.stack([x0, y0, x1, y1], -1)


def recoloured(images: Tensor, factors: Tensor) -> Tensor:
    """uint8 images [B, 3, H, W] with brightness, contrast and saturation times the factors [B, 3], as Pillow's
    ImageEnhance has them, one after the other."""
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    luma = torch.tensor(LUMA, device=images.device).view(3, 1, 1)
    x = (images * brightness).clamp(0, 255)
    mean = (x * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    x = torch.lerp(mean, x, contrast).clamp(0, 255)
    grey = (x * luma).sum(1, keepdim=True)
    return torch.lerp(grey, x, saturation).clamp(0, 255).round().to(torch.uint8)


def augmentation(task) -> Callable[[TensorMiniBatch, tuple[int, int], int, int], TensorMiniBatch] | None:
    """What `images.micro_batches` does to each part of a batch, by data.augment, on the batch's device. (Crops are cut
    while files are decoded.)"""
    settings = Settings.of(task.config["data"]["augment"])

    def mirror(part: TensorMiniBatch, key: tuple[int, int], place: int, total: int) -> TensorMiniBatch:
        with keyed_rng(*key, "flips", place):
            return task.mirror(part)

    def augment(part: TensorMiniBatch, key: tuple[int, int], place: int, total: int) -> TensorMiniBatch:
        with keyed_rng(*key, "augment"):
            uniform = torch.rand(total, 6)[place : place + len(part)]
        device = part.inputs.device
        if settings.turns > 1:
            part = task.turn(part, draw_turns(uniform[:, :3], settings).to(device, non_blocking=True))
        if settings.color:
            factors = (1 + settings.color * (2 * uniform[:, 3:] - 1)).to(device, non_blocking=True)
            part.inputs = recoloured(part.inputs, factors)
        return part

    if settings.mirror:
        return mirror
    return augment if settings.turns > 1 or settings.color else None
