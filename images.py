"""Images, for every task: decoded, put into the input's frame, streamed in batches, mirrored, normalised."""

import atexit
import hashlib
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from config import load_file, one_line
from data_types import InputError, TensorMiniBatch
from folders import has_pages, open_image
from frame import Crop, Frame
from grpo import keyed_rng
from processes import gather_everywhere, rank_and_world, settle

FEW_BAD = 3  # images that cannot be decoded; so many are skipped, however few images there are
WHITE = 65535  # of 16 bits
LOOKED_AT = 8  # images of a folder that are opened before a run, see `look_at`
PREFETCHED = 4  # batches that a worker decodes ahead of need


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB: 16-bit grey is scaled, not clipped; transparency lies on white. Raises
    ValueError for pixels whose range is not known."""
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is how 16-bit grey comes from some formats
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > WHITE:
            raise ValueError(f"pixels from {grey.min()} to {grey.max()}; shift and scale them into 0 to {WHITE}")
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode_image(path: str, image_size: int | Sequence[int] | Frame, crop: Crop | None = None) -> Tensor:
    """The image file, or a crop of it, as uint8 [3, height, width], upright, resized with antialiasing. image_size: see
    `Frame.of`, which without a mode stretches. Raises InputError, which names the file."""
    frame, size = Frame.of(image_size), None
    try:
        with open_image(path) as image:
            if image.format in ("JPEG", "MPO"):  # decode at 1/2, 1/4, 1/8 where that is still enough
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                size = image.size[::-1] if turned else image.size
                enough = frame.place(size, crop).enough()
                image.draft(None, enough[::-1] if turned else enough)
            rgb = to_rgb(ImageOps.exif_transpose(image))
        rgb = frame.place(size or rgb.size, crop).fill(rgb, frame, Image.Resampling.BICUBIC, frame.padding)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"{path}: not a readable image ({one_line(error)}); repair or remove it") from error
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()  # [h, w, 3] -> [3, h, w]


def look_at(paths: Sequence[str]) -> list[str]:
    """Lines on an even sample of the files: TIFFs with pages that are not read, and 16-bit grey that is nearly black,
    as 12 bits in 16 are."""
    n, most, pages, highest = len(paths), min(len(paths), LOOKED_AT), 0, []
    for i in range(most):
        with suppress(Exception), open_image(paths[i * n // most]) as image:  # whoever decodes it says what is wrong
            pages += has_pages(image)
            if image.mode.startswith("I"):
                highest.append(np.asarray(image).max())
    notes = []
    if pages:
        notes.append(f"of {most} images looked at, {pages} are TIFFs with several pages: only the first is read")
    if highest and max(highest) <= WHITE // 4:
        what = f"of the 16-bit images, {len(highest)} looked at, no pixel is above {max(highest)} of {WHITE}"
        notes.append(f"{what}: they are nearly black; scale them to the whole range, or to 8 bits")
    return notes


class ImageDataset(Dataset):
    """Image files and what is known about them: what every task's `open` returns. A subclass sets root, the folder;
    image_size, of the input, see `Frame.of`; paths, the n files; classes, the K names by id; and `targets` [n, E…], or
    it has a `batch` of its own. notes: what the run says of the folder before it begins, one a line."""

    channels = 3  # of an item
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Item `index` as a worker decodes it: uint8 [channels, H, W]. Raises InputError."""
        return self.item(index)

    def item(self, index: int, crop: Crop | None = None) -> Tensor:
        """The same of a crop of its image."""
        return decode_image(self.paths[index], self.image_size, crop)

    def batch(self, indices: Tensor, items: Tensor, crops: list[Crop] | None = None) -> TensorMiniBatch:
        """The items at the places `indices` [B], uint8 [B, channels, H, W], with their targets."""
        return TensorMiniBatch(items, self.targets[indices], self.metadata(indices))

    def metadata(self, indices: Tensor) -> dict:
        """What a reward is told beside the targets."""
        paths = [self.paths[i] for i in indices.tolist()]
        return {"paths": paths, "indices": indices, "classes": tuple(self.classes)}


@dataclass(frozen=True)
class Loading:
    """How files become batches. num_workers: processes that decode, ahead of need; 0: this one. pin_memory: for copies
    to a GPU that overlap. on_bad: what happens where a file cannot be decoded: `error` raises InputError; `skip` lets
    the next good one take its place, `drop` none; report(file -> what is wrong) hears of it, each time."""

    num_workers: int = 0
    pin_memory: bool = False
    on_bad: str = "error"
    report: Callable[[dict[str, str]], None] = lambda bad: None


class _BatchDecoder(Dataset):
    """What a loader's worker does: decode the items at `indices`. Hands an error back as a value, because DataLoader
    would wrap its message in a worker's traceback."""

    def __init__(self, dataset: Dataset, on_bad: str):
        self.dataset, self.on_bad = dataset, on_bad

    def __getitem__(
        self, indices: list[int] | list[tuple[int, Crop]]
    ) -> tuple[list[int], dict[str, str], Tensor] | InputError:
        """The places that were decoded (with `drop` perhaps fewer), what is wrong with others, by file, the items."""
        found, bad, items = [], {}, []
        n = len(self.dataset)
        for index in indices:
            index, *crop = index if isinstance(index, tuple) else (index,)
            for place in range(index, index + n if self.on_bad == "skip" else index + 1):
                try:
                    items.append(self.dataset.item(place % n, *crop) if crop else self.dataset[place % n])
                    found.append(place % n)
                    break
                except InputError as error:
                    if self.on_bad == "error":
                        return error
                    bad[self.dataset.paths[place % n]] = str(error)
        if not items and self.on_bad == "skip":
            return InputError(f"{self.dataset.root}: no image that can be decoded")
        shape = 0, *item_shape(self.dataset)
        batch = torch.stack(items) if items else torch.empty(shape, dtype=torch.uint8)
        return found, bad, share(batch) if get_worker_info() else batch

    def __reduce__(self) -> tuple:
        """A worker that was not forked loads the file of the data set's class before it reads the data set."""
        module = sys.modules[type(self.dataset).__module__]
        file = module.__file__ if getattr(module, "loaded_by_path", False) else None
        return _unpickle_decoder, (file, pickle.dumps(self.dataset), self.on_bad)


def item_shape(dataset: Dataset) -> tuple[int, int, int]:
    """Channels, height and width of an item of an `ImageDataset`."""
    frame = Frame.of(dataset.image_size)
    return dataset.channels, frame.height, frame.width


def share(batch: Tensor) -> Tensor | np.ndarray:
    """What a worker hands over: the batch in shared memory, or, where that is full, an array, which goes through a pipe
    instead. Left to DataLoader, a full one would be met in a thread of its queue, and the run would wait for ever."""
    try:
        return batch.share_memory_()
    except RuntimeError:  # no space left on the device
        return batch.numpy()


def shared_memory_note(num_workers: int, batch_bytes: int, folder: str = "/dev/shm") -> list[str]:
    """A line if the batches that workers decode ahead do not fit into shared memory."""
    wanted = num_workers * PREFETCHED * batch_bytes
    free = shutil.disk_usage(folder).free if os.path.isdir(folder) else wanted
    if free >= wanted:
        return []
    return [
        f"note: shared memory ({folder}) has room for {free / 1e6:.0f} MB, the workers can fill {wanted / 1e6:.0f}: "
        "batches that find no room go through pipes, which is slower. data.num_workers=0 needs none, docker run "
        f"--shm-size={math.ceil(2 * wanted / 1e9)}g gives more"
    ]


def _unpickle_decoder(file: str | None, dataset: bytes, on_bad: str) -> _BatchDecoder:
    if file:
        load_file(file)
    return _BatchDecoder(pickle.loads(dataset), on_bad)


def _ignore_signals(_worker_id: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the main process finishes its step and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python ends daemons by SIGTERM, which workers ignore, and would wait for ever for those of an unclosed stream."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def stream_batches(
    dataset: Dataset,
    order: Callable[[int], Tensor],
    batch_size: int,
    steps: range,
    loading: Loading = Loading(),
    *,
    cache: bool = False,
    part: slice = slice(None),
    crops: Callable[[int], list[Crop]] | None = None,
) -> Iterator[TensorMiniBatch]:
    """The uint8 batches of the given steps of an endless pass over an `ImageDataset`: epoch after epoch, no image
    dropped. Step s takes places s * batch_size … of the epochs laid end to end, so they are a function of s alone.

    order(epoch): the epoch's permutation, [n]. cache: decoded images are kept in memory, and after a whole epoch no
    file is opened any more. part: the images of each batch that this process is to have; not with `cache`, which would
    never be full. crops(step): of the whole batch's images, [batch_size]; not with `cache` either.
    """
    n = len(dataset)
    order = lru_cache(maxsize=2)(order)

    def indices(step: int) -> Tensor:  # [batch_size]
        places = torch.arange(step * batch_size, (step + 1) * batch_size)
        epochs = range(int(places[0]) // n, int(places[-1]) // n + 1)
        return torch.cat([order(epoch)[places[places // n == epoch] % n] for epoch in epochs])[part]

    def wanted(step: int) -> list[int] | list[tuple[int, Crop]]:  # lists: a tensor would go through shared memory
        places = indices(step).tolist()
        return list(zip(places, crops(step)[part])) if crops else places

    decode = steps
    if cache:
        seen_all = (-(-steps.start * batch_size // n) + 1) * n  # where the first epoch entered at its start ends
        decode = range(steps.start, min(steps.stop, -(-seen_all // batch_size)))
        store = torch.empty(n, *item_shape(dataset), dtype=torch.uint8)
        source = torch.arange(n)  # the place that a place's image is taken from
    loader = DataLoader(
        _BatchDecoder(dataset, loading.on_bad),
        sampler=map(wanted, decode),
        batch_size=None,  # an item is a batch already
        num_workers=loading.num_workers,
        collate_fn=as_is,  # the default would make a tensor of what `share` made an array
        prefetch_factor=PREFETCHED if loading.num_workers else None,
        pin_memory=loading.pin_memory,
        worker_init_fn=_ignore_signals,
    )
    for decoded, step in zip(explained(loader), decode):
        if isinstance(decoded, InputError):
            raise decoded
        found, bad, items = decoded
        items = torch.as_tensor(items)
        if bad:
            loading.report(bad)
        if cache:
            store[found] = items
            source[indices(step)] = torch.tensor(found)
        moved = (crops(step)[part],) if crops else ()
        batch = dataset.batch(torch.tensor(found, dtype=torch.int64), items, *moved)
        yield batch.pin_memory() if loading.pin_memory else batch
    for step in range(decode.stop, steps.stop):
        found = source[indices(step)]
        batch = dataset.batch(found, store[found])
        yield batch.pin_memory() if loading.pin_memory else batch


def as_is(x: Any) -> Any:
    return x


def explained(loader: DataLoader) -> Iterator:
    """The loader's items. Raises InputError where a worker is gone; DataLoader's own handler of SIGCHLD would raise its
    complaint in the midst of whatever the main thread is doing."""
    handler = signal.getsignal(signal.SIGCHLD)
    if loader.num_workers:
        settle()
    try:
        items = iter(loader)
        if loader.num_workers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        yield from items
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not re.match(r"DataLoader worker .* exited unexpectedly", str(error)):
            raise
        raise InputError(
            "data.num_workers: a process that decodes images was killed by the system; the memory may be too small for "
            "so many: lower data.num_workers, or set it to 0"
        ) from None


def ordered_batches(
    dataset: Dataset, batch_size: int, loading: Loading = Loading(), first: int = 0, every: int = 1
) -> Iterator[TensorMiniBatch]:
    """Every image once, in order, of the batches first, first + every, …; a batch may be empty with on_bad: drop."""
    n = len(dataset)
    batch_size = min(batch_size, n)
    steps = range(first, -(-n // batch_size), every)
    for step, batch in zip(steps, stream_batches(dataset, lambda _: torch.arange(n), batch_size, steps, loading)):
        in_order = batch.metadata["indices"] >= step * batch_size  # the last batch is filled up from the next epoch
        yield batch[: int(in_order.sum())]


def micro_batches(
    batch: TensorMiniBatch, size: int, key: tuple[int, int], augment: Callable | None
) -> Iterator[tuple[int, TensorMiniBatch]]:
    """The batch in parts of `size` images, each with its place in the batch of all processes. augment: see
    `augment.augmentation`; its draws are a function of key, (seed, step), and the place."""
    rank, world = rank_and_world()
    for start in range(0, len(batch), size):
        part, index = batch[start : start + size], rank * len(batch) + start
        yield index, augment(part, key, index, world * len(batch)) if augment else part


class Batches:
    """Batches that can be gone through again and again: made again by `make()` each time, or made once and kept."""

    def __init__(self, make: Callable[[], Iterable[TensorMiniBatch]], keep: bool):
        self.make = lru_cache(lambda: list(make())) if keep else make

    def __iter__(self) -> Iterator[TensorMiniBatch]:
        return iter(self.make())


class BadImages:
    """Hears of images that cannot be decoded: says each once, and stops a run that meets too many of them. images: of
    all data sets together. say: prints a line. Of several processes each hears of its own until they `share`."""

    def __init__(self, images: int, say: Callable[[str], None]):
        self.images, self.say, self.seen, self.unshared = images, say, set(), {}

    def __call__(self, bad: dict[str, str]) -> None:
        """bad: file -> what is wrong with it. Raises InputError where they are more than 1 % of the images, and more
        than three."""
        new = {path: wrong for path, wrong in bad.items() if path not in self.seen}
        for wrong in new.values():
            self.say(f"warning: {wrong}")
        self.seen.update(new)
        self.unshared |= new
        if rank_and_world()[1] == 1:  # else all stop together, in `share`
            self.stop_at_too_many()

    def share(self, group: dist.ProcessGroup | None) -> None:
        """Every process hears of what the others met. Raises InputError as above."""
        for bad in gather_everywhere(self.unshared, group):
            self(bad)
        self.unshared = {}
        self.stop_at_too_many()

    def stop_at_too_many(self) -> None:
        if len(self.seen) > max(self.images / 100, FEW_BAD):
            raise InputError(
                f"data.on_bad_image: skip: {len(self.seen)} of {self.images} images cannot be decoded, more than 1 % "
                f"and more than {FEW_BAD}, {sorted(self.seen)[0]} the first; repair or remove them"
            )

    def left(self, dataset: ImageDataset) -> str:
        """How many of the data set's images could be decoded, in words."""
        bad = len(self.seen.intersection(dataset.paths))
        return f"{len(dataset) - bad} of {len(dataset)} images" if bad else f"{len(dataset)} images"


def epoch_order(epoch: int, seed: int, size: int) -> Tensor:
    """The epoch's permutation of the training images, [size]."""
    with keyed_rng(seed, "order", epoch):
        return torch.randperm(size)


def keep_decoded(data: SimpleNamespace, *datasets: Dataset | None) -> tuple[bool, int]:
    """Whether decoded images are kept in memory (data.cache), and how many bytes they are."""
    size = sum(math.prod(item_shape(dataset)) * len(dataset) for dataset in datasets if dataset)
    alone = rank_and_world()[1] == 1  # a process would see all images only after many epochs
    return alone and (data.cache == "always" or (data.cache == "auto" and size <= data.cache_limit_gb * 1e9)), size


def fingerprint(dataset: Dataset) -> str:
    """The number of images and a hash of their names: another order of epochs follows from another one."""
    names = "\n".join(os.path.relpath(path, dataset.root) for path in dataset.paths)
    return f"{len(dataset)} images ({hashlib.blake2b(os.fsencode(names), digest_size=4).hexdigest()})"


def draw_mirrored(images: Tensor) -> Tensor:
    """Which of the images [B, …] to mirror: each with probability 1/2, from torch's global generator. [B] bool."""
    return torch.rand(len(images), device=images.device) < 0.5


def mirror(x: Tensor, chosen: Tensor) -> Tensor:
    """x [B, …, W] with the chosen [B] left to right."""
    return torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


def prepare(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 [B, C, H, W] -> float32, scaled to [0, 1], normalised by channel."""
    return (images - per_channel(tuple(mean), images.device)).div_(per_channel(tuple(std), images.device))


class Prepared(nn.Module):
    """A model as a function of uint8 images: an episode kept for a replay holds these, a quarter of the floats.
    arrange: puts the model's output into the task's shape."""

    def __init__(self, model: nn.Module, mean: list[float], std: list[float], arrange: Callable = lambda x: x):
        super().__init__()
        self.model, self.mean, self.std, self.arrange = model, mean, std, arrange
        self.sample_masks = model.sample_masks

    def forward(self, images: Tensor, masks: dict[str, Tensor] | None = None) -> Tensor:
        return self.arrange(self.model(prepare(images, self.mean, self.std), masks))


@lru_cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Mean or std in units of uint8, [C, 1, 1]; kept, because a copy to the GPU would wait for it at every step."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] * 255
