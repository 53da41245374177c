"""Where an image file lies in the model's input, and the way back: stretched, letterboxed or cropped, whole or a part.

Places are x, y of corners: pixel i reaches from i to i + 1. Rectangles are x0 y0 x1 y1. Sizes of images are width and
height, as Pillow has them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

MODES = ("stretch", "letterbox", "crop")
Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True)
class Crop:
    """What a random crop was drawn as, for an image of any size. share: of its area; aspect: -1 … 1, how wide it is
    beside the input's shape, from 3:4 to 4:3; x, y: 0 … 1, where it lies."""

    share: float
    aspect: float
    x: float
    y: float

    def region(self, size: tuple[int, int], frame: "Frame") -> Rectangle:
        """The part of an image of this size, in whole pixels. As torchvision's RandomResizedCrop, but where that draws
        again since the crop is wider or higher than the image, the aspect's range is narrowed to those that fit."""
        (width, height), area = size, self.share * size[0] * size[1]
        middle, spread = math.log(frame.width / frame.height), math.log(4 / 3)
        fitting = math.log(area / height**2), math.log(width**2 / area)  # of the logarithm of width / height
        low, high = (min(max(middle + end, fitting[0]), fitting[1]) for end in (-spread, spread))
        ratio = math.exp((low + high) / 2 + (high - low) / 2 * self.aspect)
        sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        wide, high = (min(max(side, 1), most) for side, most in zip(sides, size))
        left, above = size[0] - wide, size[1] - high
        x, y = min(int(self.x * (left + 1)), left), min(int(self.y * (above + 1)), above)
        return x, y, x + wide, y + high


@dataclass(frozen=True)
class Placement:
    """`region`, of a file of this `size`, fills `content`, of the input."""

    size: tuple[int, int]
    region: Rectangle
    content: Rectangle

    def affine(self) -> tuple[float, float, float, float]:
        """Scales and offsets of x and y: a place of the file, times the scale, plus the offset, is one of the input."""
        (x0, y0, x1, y1), (u0, v0, u1, v1) = self.region, self.content
        x_scale, y_scale = (u1 - u0) / (x1 - x0), (v1 - v0) / (y1 - y0)
        return x_scale, y_scale, u0 - x_scale * x0, v0 - y_scale * y0

    def enough(self) -> tuple[int, int]:
        """The size at which the whole image still has a pixel for each of the content's."""
        (x0, y0, x1, y1), (u0, v0, u1, v1), (width, height) = self.region, self.content, self.size
        return -(-(u1 - u0) * width // (x1 - x0)), -(-(v1 - v0) * height // (y1 - y0))

    def fill(self, image: Image.Image, frame: "Frame", method: Image.Resampling, padding: Any) -> Image.Image:
        """The input, from the whole image, which may be decoded at a part of its size."""
        scales = [now / full for now, full in zip(image.size * 2, self.size * 2)]
        box = tuple(x * scale for x, scale in zip(self.region, scales))
        u0, v0, u1, v1 = self.content
        content = image.resize((u1 - u0, v1 - v0), method, box)
        if content.size == (frame.width, frame.height):
            return content
        whole = Image.new(image.mode, (frame.width, frame.height), padding)
        whole.paste(content, (u0, v0))
        return whole

    def restore(self, mask: Image.Image, unseen: int) -> Image.Image:
        """A mask of the input (mode L) as one of the file, by nearest neighbour; `unseen` where that was cut off."""
        x0, y0, x1, y1 = self.region
        seen = mask.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST, self.content)
        if seen.size == self.size:
            return seen
        whole = Image.new("L", self.size, unseen)
        whole.paste(seen, (x0, y0))
        return whole


@dataclass(frozen=True)
class Frame:
    """The model's input, and how an image fits into it. resize: `stretch`, each side by its own factor; `letterbox`,
    the whole image in its own shape, in the middle of `padding` (red, green, blue); `crop`, the middle of its longer
    side."""

    height: int
    width: int
    resize: str = "stretch"
    padding: tuple[int, int, int] = (0, 0, 0)

    @staticmethod
    def of(image_size: "int | Sequence[int] | Frame") -> "Frame":
        """A frame as it is; one of a height and width, or of both in one number."""
        if isinstance(image_size, Frame):
            return image_size
        return Frame(*((image_size, image_size) if isinstance(image_size, int) else image_size))

    @staticmethod
    def from_config(config: dict) -> "Frame":
        """That of model.image_size and data.resize, padded with data.mean."""
        frame, data = Frame.of(config["model"]["image_size"]), config.get("data", {})
        padding = tuple(round(255 * mean) for mean in data.get("mean", (0, 0, 0)))
        return Frame(frame.height, frame.width, data.get("resize", "stretch"), padding)

    @property
    def bounds(self) -> Rectangle:
        return 0, 0, self.width, self.height

    def place(self, size: tuple[int, int], crop: Crop | None = None) -> Placement:
        """Where an image of this size lies, or the crop of it."""
        return place(self, tuple(size), crop.region(size, self) if crop else (0, 0, *size))


@lru_cache(maxsize=4096)
def place(frame: Frame, size: tuple[int, int], region: Rectangle) -> Placement:
    """See `Frame.place`; photographs mostly share a few sizes."""
    (x0, y0, x1, y1), inputs = region, (frame.width, frame.height)
    sides = x1 - x0, y1 - y0
    if frame.resize == "stretch":
        return Placement(size, region, frame.bounds)
    scales = [most / side for most, side in zip(inputs, sides)]
    if frame.resize == "letterbox":
        wide, high = (max(round(side * min(scales)), 1) for side in sides)
        u, v = (frame.width - wide) // 2, (frame.height - high) // 2
        return Placement(size, region, (u, v, u + wide, v + high))
    wide, high = (min(max(round(most / max(scales)), 1), side) for most, side in zip(inputs, sides))
    x, y = x0 + (sides[0] - wide) // 2, y0 + (sides[1] - high) // 2
    return Placement(size, (x, y, x + wide, y + high), frame.bounds)


def to_input(boxes: Tensor, affine: Tensor) -> Tensor:
    """Boxes [..., 4] of files in the input. affine: see `Placement.affine`, [..., 4]."""
    scale, offset = affine.split(2, -1)
    return boxes * torch.cat([scale, scale], -1) + torch.cat([offset, offset], -1)


def to_file(boxes: Tensor, affine: Tensor) -> Tensor:
    """The inverse of `to_input`."""
    scale, offset = affine.split(2, -1)
    return (boxes - torch.cat([offset, offset], -1)) / torch.cat([scale, scale], -1)
