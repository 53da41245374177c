"""Tokens that leave frozen blocks, kept: they are the same in every epoch, so that the trunk runs once per image; with
data.token_cache: keep in every run, too."""

import hashlib
import math
import mmap
import os
import shutil
import struct
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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
KEY = 16  # bytes of an image's hash
FORMAT = b"frozen tokens 1\n"
HEAD = struct.Struct("<16s16sqq16x")  # FORMAT, digest, images, bytes of an image's tokens; the keys follow, then tokens
Places = dict[bytes, tuple[Tensor, int]]  # an image's hash -> tokens of many images [n, L, D], and which of them


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
    it is. store: a place for each version of each image, [places, L, D]; spare(): more of them, when all are taken.
    Where there are none, tokens are computed each time. With a store in bfloat16 all tokens are rounded to it, those
    just computed too. files: of tokens that earlier runs computed."""

    def __init__(self, store: Tensor, spare: Callable[[], Tensor] | None = None, files: "TokenFiles | None" = None):
        self.stores, self.spare, self.files, self.dtype = [store], spare, files, store.dtype
        self.places: Places = {}  # of those computed
        self.kept = files.kept if files else {}
        self.found: set[bytes] = set()  # of those kept, the ones that were asked for

    def free_place(self) -> tuple[Tensor, int] | None:
        place = len(self.places)
        for store in self.stores:
            if place < len(store):
                return store, place
            place -= len(store)
        if self.spare is None:
            return None
        self.stores, self.spare = [*self.stores, self.spare()], None
        return self.free_place()

    def tokens(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """uint8 images [B, C, H, W] -> tokens [B, L, D], float32, on the images' device. compute: the same of CHUNK
        images."""
        rows = images.cpu().contiguous().numpy()
        keys = [hashlib.blake2b(row, digest_size=KEY).digest() for row in rows]
        self.found.update(key for key in keys if key in self.kept)
        unknown = list({k: i for i, k in enumerate(keys) if k not in self.places and k not in self.kept}.items())
        without_place: Places = {}
        for start in range(0, len(unknown), CHUNK):
            part = unknown[start : start + CHUNK]
            chunk = [i for _, i in part]
            chunk += chunk[-1:] * (CHUNK - len(chunk))
            computed = compute(images[chunk]).to("cpu", self.dtype)
            for i, (key, _) in enumerate(part):
                if place := self.free_place():
                    place[0][place[1]], self.places[key] = computed[i], place
                else:
                    without_place[key] = computed, i
        at = [self.places.get(key) or self.kept.get(key) or without_place[key] for key in keys]
        if len({id(store) for store, _ in at}) == 1:  # as nearly always; faster by 2 µs an image
            found = at[0][0].index_select(0, torch.tensor([place for _, place in at]))
        else:
            found = torch.stack([store[place] for store, place in at])
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


def digest_of(trunk: Cached, images: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """Of all that an image's tokens depend on but the image: the trunk's weights, and what it makes of noise, which
    tells heads, epsilon and code, and whether the machine rounds alike. images: their shape, [C, H, W]."""
    model, blocks = trunk.network.model, trunk.blocks
    others = ("norm.", "head.", *(f"blocks.{i}." for i in range(blocks, len(model.blocks))))
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith(others)}
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    noise = torch.randint(0, 256, (CHUNK, *images), dtype=torch.uint8, generator=generator)
    weights["noise"] = trunk.trunk(noise.to(device))
    about = torch.__version__, device.type, images, blocks, trunk.network.mean, trunk.network.std, dtype
    found = hashlib.blake2b(repr(about).encode(), digest_size=16)
    for name, weight in weights.items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.digest()


@dataclass
class TokenFiles:
    """The files in `folder` of what earlier runs computed, and kept. A run reads those that are there when it begins,
    and at its end adds one of what none of them has. None is ever changed, so runs at a time do each other no harm.
    shape: of an image's tokens, [L, D]. limit: the most bytes that a file may take; None: what there is."""

    folder: Path
    digest: bytes
    shape: tuple[int, int]
    dtype: torch.dtype
    limit: Callable[[Path], float] | None
    console: Console

    def __post_init__(self):
        self.name = f"tokens_{self.digest.hex()[:16]}"
        self.pattern = self.folder / f"{self.name}_*.bin"
        self.row_size = math.prod(self.shape) * self.dtype.itemsize
        self.kept = self.read()

    def read(self, tell: bool = True) -> Places:
        """What the files hold. tell: a line for each that cannot be used."""
        places: Places = {}
        for path in sorted(self.folder.glob(self.pattern.name)):
            try:
                places |= self.read_file(path)
            except (OSError, ValueError) as error:
                if tell:
                    why = getattr(error, "strerror", None) or error
                    self.console.line(f"warning: {path}: not used ({why}); its tokens are computed anew: delete it")
        return places

    def read_file(self, path: Path) -> Places:
        """Raises OSError or ValueError."""
        with open(path, "rb") as file:
            head, size = file.read(HEAD.size), os.fstat(file.fileno()).st_size
            about = HEAD.unpack(head) if len(head) == HEAD.size else (b"", b"", 0, 0)
            count, begin = about[2], HEAD.size + KEY * about[2]
            if about != (FORMAT, self.digest, count, self.row_size) or count < 1:
                raise ValueError("of another format")
            if size != begin + count * self.row_size:
                raise ValueError("cut off")
            keys = file.read(KEY * count)
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            store = torch.frombuffer(mapped, dtype=self.dtype, offset=begin).view(count, *self.shape)
        return {keys[KEY * i : KEY * (i + 1)]: (store, i) for i in range(count)}

    def write(self, places: Places) -> Path:
        """A new file of these tokens, its path. It is written under a temporary name, fsynced and renamed, so that a
        file under a final name is whole. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".tokens_*.tmp"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:  # by a kill; one that is being written is younger
                    left.unlink()
        path = self.folder / f"{self.name}_{uuid.uuid4().hex[:8]}.bin"
        size, temporary = HEAD.size + len(places) * (KEY + self.row_size), path.with_name(f".{path.name}.tmp")
        if self.limit and size > self.limit(self.folder):
            raise OSError(0, f"{size / 1e9:.1f} GB are more than half of what is free; name a data.token_cache_dir")
        try:
            with open(temporary, "xb") as file:
                if hasattr(os, "posix_fallocate"):  # no room is known before the disk is full
                    os.posix_fallocate(file.fileno(), 0, size)
                file.write(HEAD.pack(FORMAT, self.digest, len(places), self.row_size) + b"".join(places))
                for store, place in places.values():
                    file.write(store[place].view(torch.uint8).numpy())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
        return path


def keep_tokens(network: nn.Module) -> None:
    """At a run's end, with data.token_cache: keep: what it computed goes into a file for later runs, unless another run
    was first. A line says how many were found, and computed; or why they are not kept."""
    cache = network.cache if isinstance(network, Cached) else None
    if not (cache and cache.files):
        return
    files = cache.files
    files.console.line(f"data.token_cache: tokens of {len(cache.found)} images found, of {len(cache.places)} computed")
    there = files.read(tell=False)
    if not (new := {key: place for key, place in cache.places.items() if key not in there}):
        return
    try:
        path = files.write(new)
        files.console.line(f"{path}: tokens of {len(new)} images, for later runs")
    except OSError as error:
        files.console.line(f"warning: {files.folder}: tokens are not kept for later runs ({error.strerror or error})")


def most_for_a_file(folder: Path) -> float:
    """Half of the bytes that are free where `folder` is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free / 2


def open_cache(task: Task, trunk: Cached, datasets: tuple, versions: int, console: Console) -> TokenCache | None:
    """Places for the tokens of all versions of the images. A line says how much is kept where, or why nothing is."""
    data, training = (SimpleNamespace(**task.config[section]) for section in ("data", "training"))
    black = torch.zeros(1, 3, *item_shape(datasets[0])[1:], dtype=torch.uint8)
    shape = tuple(trunk.trunk(black.to(next(trunk.parameters()).device)).shape[1:])
    dtype, folder, files = getattr(torch, data.token_dtype), Path(data.token_cache_dir or training.ckpt_dir), None
    if data.token_cache == "keep":
        limit = None if data.token_cache_dir else most_for_a_file
        files = TokenFiles(folder, digest_of(trunk, tuple(black.shape[1:]), dtype), shape, dtype, limit, console)
    count, row = len(datasets[0]) * versions + len(datasets[1] or ()), math.prod(shape) * dtype.itemsize
    cached, images = keep_decoded(data, *datasets)
    in_memory = count * row + images * cached <= data.cache_limit_gb * 1e9
    # So many places are enough if what is kept is of these images. Where it turns out not to be, there are spare ones.
    places = max(count - len(files.kept), 0) if files else count
    why = f"data.cache_limit_gb is {data.cache_limit_gb:g}"
    if not (in_memory or data.token_cache_dir) and places * row > most_for_a_file(folder):
        why = f"their tokens take {places * row / 1e9:.1f} GB, more than half of what is free in {folder}, and {why}"
        console.line(f"frozen blocks: run again each epoch ({why}; data.token_cache_dir names another folder)")
        return None
    where = "memory" if in_memory else f"a file in {folder}, as {why}"

    def store(places: int) -> Tensor:
        return allocate((places, *shape), dtype, None if in_memory or not places else folder)

    def spare() -> Tensor:
        more = count - places
        try:
            if not in_memory and files.limit and more * row > files.limit(folder):
                raise InputError(f"{folder}: {more * row / 1e9:.1f} GB of tokens are more than half of what is free")
            found = store(more)
        except InputError as error:
            console.line(f"warning: {error}; these images' frozen blocks run again each epoch")
            return store(0)
        console.line(f"frozen blocks: up to {more * row / 1e6:.0f} MB more in {where}: the files are of other images")
        return found

    cache = TokenCache(store(places), spare if places < count else None, files)
    what = f"the tokens that leave {trunk.blocks} of {len(trunk.network.model.blocks)} blocks are kept"
    also = f", in {versions} versions" if versions > 2 else ", mirrored too" * (versions > 1)
    console.line(f"frozen blocks: {what}{also}: {places * row / 1e6:.0f} MB in {where}")
    if files:
        mapped = f"the tokens of {len(files.kept)} images ({len(files.kept) * row / 1e6:.0f} MB, mapped)"
        console.line(f"data.token_cache: keep: {files.pattern} have {mapped}")
    return cache


def open_networks(
    task: Task, model: nn.Module, reference: nn.Module | None, datasets: tuple, console: Console
) -> tuple[nn.Module, nn.Module | None]:
    """The model and the reference as functions of uint8 images. They share the tokens that leave the frozen blocks,
    which are kept if they can be. datasets: of training and evaluation (or None). A line says what is kept where, or
    why nothing is. Raises InputError where data.token_cache_dir has no room."""
    networks = [task.network(network) if network else None for network in (model, reference)]
    frozen, augment = task.config["training"]["freeze_blocks"], Settings.of(task.config["data"]["augment"])
    if not frozen:
        return tuple(networks)
    blocks = kept_blocks(task.config["model"], frozen)
    reasons = {
        "data.token_cache: never": task.config["data"]["token_cache"] == "never",
        "of several processes": rank_and_world()[1] > 1,
        "of a network of the task's own": any(type(network) is not Prepared for network in filter(None, networks)),
        "dropout comes before their end; set model.dropout_blocks lower": blocks < 1,
        "data.augment: each step has other crops or colours": bool(augment.crop or augment.color),
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        console.line(f"frozen blocks: run again each epoch ({why[0]})")
        return tuple(networks)
    cache = open_cache(task, Cached(networks[0], blocks, None), datasets, augment.turns, console)
    if cache is None:
        return tuple(networks)
    return tuple(Cached(network, blocks, cache) if network else None for network in networks)
