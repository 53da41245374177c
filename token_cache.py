"""Tokens that leave frozen blocks, kept: they are the same in every epoch, so that the trunk runs once per image."""

import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_types import InputError
from images import Prepared, prepare

CHUNK = 16  # images at a time, always: products of one shape round an image's tokens alike, whatever comes with it


def kept_blocks(model: dict[str, Any], freeze_blocks: int) -> int:
    """How many frozen blocks precede the first mask: their tokens can be kept. model: the section of the config."""
    stochastic = model["dropout_blocks"]
    return 0 if stochastic is None else min(freeze_blocks, model["depth"] - stochastic)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """An empty tensor in memory, or in a file in `folder` that has no name, so that it is gone with the process,
    however that ends. Its space is reserved now. Raises InputError where there is none."""
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    size = max(torch.Size(shape).numel() * dtype.itemsize, 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a write into a hole that finds no space would be a bus error
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        hint = "name another folder with data.token_cache_dir, or set data.token_cache: never"
        raise InputError(f"{folder}: no room for {size / 1e9:.1f} GB of tokens ({error.strerror}); {hint}") from None
    return torch.frombuffer(mapped, dtype=dtype).view(shape)


class TokenCache:
    """Tokens of images by the images' own bytes, so that every mirrored version has its own and nobody has to say which
    it is. store: a place for each version of each image, [places, L, D]. Where all places are taken, tokens are
    computed each time. With a store in bfloat16 all tokens are rounded to it, those just computed too."""

    def __init__(self, store: Tensor):
        self.store, self.places = store, {}  # 16 bytes of hash -> place

    def tokens(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """uint8 images [B, C, H, W] -> tokens [B, L, D], float32, on the images' device. compute: the same of CHUNK
        images."""
        rows = images.cpu().contiguous().numpy()
        keys = [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
        unknown = list({key: i for i, key in enumerate(keys) if key not in self.places}.items())
        without_place = {}
        for start in range(0, len(unknown), CHUNK):
            part = unknown[start : start + CHUNK]
            chunk = [i for _, i in part]
            chunk += chunk[-1:] * (CHUNK - len(chunk))
            for (key, _), tokens in zip(part, compute(images[chunk]).to("cpu", self.store.dtype)):
                place = len(self.places)
                if place < len(self.store):
                    self.store[place], self.places[key] = tokens, place
                else:
                    without_place[key] = tokens
        if without_place:
            found = torch.stack([self.store[self.places[k]] if k in self.places else without_place[k] for k in keys])
        else:
            found = self.store.index_select(0, torch.tensor([self.places[key] for key in keys]))
        return found.to(images.device, torch.float32)


class Cached(nn.Module):
    """A `Prepared` network whose first `blocks` blocks come from a cache: the same function of images and masks."""

    def __init__(self, network: Prepared, blocks: int, cache: TokenCache):
        super().__init__()
        self.network, self.blocks, self.cache = network, blocks, cache
        self.sample_masks = network.sample_masks

    @torch.no_grad()
    def trunk(self, images: Tensor) -> Tensor:
        return self.network.model.trunk(prepare(images, self.network.mean, self.network.std), self.blocks)

    def forward(self, images: Tensor, masks: dict[str, Tensor] | None = None) -> Tensor:
        tokens = self.cache.tokens(images, self.trunk)
        return self.network.arrange(self.network.model(tokens, masks, start=self.blocks))
