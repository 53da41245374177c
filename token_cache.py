"""Tokens that leave frozen blocks, kept: they are the same in every epoch, so that the trunk runs once per image."""

import hashlib
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from augment import Settings
from data_types import InputError
from images import Prepared, item_shape, keep_decoded, prepare
from processes import rank_and_world
from report import Console
from vision_task import Task

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


def most_for_a_file(folder: Path) -> float:
    """Half of the bytes that are free where `folder` is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free / 2


def open_networks(
    task: Task, model: nn.Module, reference: nn.Module | None, datasets: tuple, console: Console
) -> tuple[nn.Module, nn.Module | None]:
    """The model and the reference as functions of uint8 images. They share the tokens that leave the frozen blocks,
    which are kept if they can be. datasets: of training and evaluation (or None). A line says what is kept where, or
    why nothing is. Raises InputError where data.token_cache_dir has no room."""
    networks = [task.network(network) if network else None for network in (model, reference)]
    data, training = (SimpleNamespace(**task.config[section]) for section in ("data", "training"))
    blocks, augment = kept_blocks(task.config["model"], training.freeze_blocks), Settings.of(data.augment)
    if not training.freeze_blocks:
        return tuple(networks)
    reasons = {
        "data.token_cache: never": data.token_cache == "never",
        "of several processes": rank_and_world()[1] > 1,
        "of a network of the task's own": any(type(network) is not Prepared for network in filter(None, networks)),
        "dropout comes before their end; set model.dropout_blocks lower": blocks < 1,
        "data.augment: each step has other crops or colours": bool(augment.crop or augment.color),
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        console.line(f"frozen blocks: run again each epoch ({why[0]})")
        return tuple(networks)
    dtype, versions = getattr(torch, data.token_dtype), augment.turns
    black = torch.zeros(1, 3, *item_shape(datasets[0])[1:], dtype=torch.uint8, device=next(model.parameters()).device)
    shape = (
        len(datasets[0]) * versions + len(datasets[1] or ()),
        *Cached(networks[0], blocks, None).trunk(black).shape[1:],
    )
    size, (cached, images) = math.prod(shape) * dtype.itemsize, keep_decoded(data, *datasets)
    in_memory = size + images * cached <= data.cache_limit_gb * 1e9
    folder = None if in_memory else Path(data.token_cache_dir or training.ckpt_dir)
    limit = f"data.cache_limit_gb is {data.cache_limit_gb:g}"
    if folder and not data.token_cache_dir and size > most_for_a_file(folder):
        why = f"their tokens take {size / 1e9:.1f} GB, more than half of what is free in {folder}, and {limit}"
        console.line(f"frozen blocks: run again each epoch ({why}; data.token_cache_dir names another folder)")
        return tuple(networks)
    cache = TokenCache(allocate(shape, dtype, folder))
    what = f"the tokens that leave {blocks} of {len(model.blocks)} blocks are kept"
    also = f", in {versions} versions" if versions > 2 else ", mirrored too" * (versions > 1)
    where = f"a file in {folder}, as {limit}" if folder else "memory"
    console.line(f"frozen blocks: {what}{also}: {size / 1e6:.0f} MB in {where}")
    return tuple(Cached(network, blocks, cache) if network else None for network in networks)
