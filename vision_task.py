"""Classification of an image folder: data set, decoding, `prepare`, reward, metrics, pictures."""

import atexit
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data_types import InputError, TensorMiniBatch
from grpo import classification_policy_adapter, nll

DEFAULT_REWARD = {"classification_reward": 1.0}
BEST = "eval/accuracy"  # what best.pt is chosen by
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")


# --- Data -----------------------------------------------------------------------------------------------------------


def find_images(root: str) -> list[str]:
    """All image files at any depth below `root`, sorted; links are followed, hidden files and folders are not."""
    found, visited = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link in a circle
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            os.path.join(folder, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB: 16-bit grey is scaled, not clipped; transparency lies on white."""
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is how 16-bit grey comes from some formats
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode_image(path: str, image_size: int) -> Tensor:
    """The image file as uint8 [3, image_size, image_size], upright, resized (not cropped) with antialiasing.

    Raises InputError with one line that names the file.
    """
    try:
        with Image.open(path) as image:
            image.draft(None, (image_size, image_size))  # JPEG: decode at 1/2, 1/4, 1/8 where that is still enough
            rgb = to_rgb(ImageOps.exif_transpose(image))
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BICUBIC)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason}); repair or remove it") from error
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()  # [h, w, 3] -> [3, h, w]


def upright_size(path: str) -> tuple[int, int]:
    """Width and height of the image file as `decode_image` turns it, from its header."""
    with Image.open(path) as image:
        if image.format == "TIFF":  # Pillow turns these by itself, some versions on opening, others on loading
            image.load()
            return image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


class VisionClassificationDataset(Dataset):
    """An image folder: one subdirectory per class, images at any depth inside.

    root: the folder. classes: the class names whose order gives the ids; None takes the sorted subdirectories of
    `root` (of the training folder, that is; an evaluation folder is given the training folder's).
    Item i is the decoded image, uint8 [3, image_size, image_size]. `targets` is [n] int64, `paths` the n file names.
    Raises InputError where there is no folder, no class, no image in a class, or a class not in `classes`.
    """

    channels = 3

    def __init__(self, root: str, image_size: int, classes: list[str] | None = None):
        if not os.path.isdir(root):
            raise InputError(f"{root}: no such folder; it should hold one subdirectory of images per class")
        names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
        if not names:
            raise InputError(f"{root}: no subdirectories; it should hold one subdirectory of images per class")
        unknown = sorted(set(names) - set(names if classes is None else classes))
        if unknown:
            raise InputError(f"{root}: classes unknown in the training folder: {', '.join(unknown)}")
        self.root = root
        self.image_size = image_size
        self.classes = names if classes is None else list(classes)
        self.paths: list[str] = []
        targets = []
        for name in names:
            paths = find_images(os.path.join(root, name))
            if not paths and classes is None:
                raise InputError(f"{os.path.join(root, name)}: no images ({' '.join(SUFFIXES)}); add some or remove it")
            self.paths += paths
            targets += [self.classes.index(name)] * len(paths)
        if not self.paths:
            raise InputError(f"{root}: no images ({' '.join(SUFFIXES)}) in its subdirectories")
        self.targets = torch.tensor(targets)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return decode_image(self.paths[index], self.image_size)

    def batch(self, indices: Tensor, inputs: Tensor) -> TensorMiniBatch:
        paths = list(map(self.paths.__getitem__, indices.tolist()))
        metadata = {"paths": paths, "indices": indices, "classes": tuple(self.classes)}
        return TensorMiniBatch(inputs, self.targets[indices], metadata)


class _BatchDecoder(Dataset):
    """What a loader's worker does: decode the items at `indices`. Hands an error back as a value, because DataLoader
    would wrap its message in a worker's traceback.

    on_bad: what happens to one that cannot be decoded: `error`, `skip` (the next good one takes its place) or `drop`.
    """

    def __init__(self, dataset: Dataset, on_bad: str):
        self.dataset, self.on_bad = dataset, on_bad

    def __getitem__(self, indices: list[int]) -> tuple[list[int], list[int], Tensor, dict[str, str]] | InputError:
        """The places that were asked for and those that took their place (fewer with `drop`), the items there, and
        what is wrong with others, by file."""
        asked, found, items, bad = [], [], [], {}
        n = len(self.dataset)
        for index in indices:
            for place in range(index, index + n if self.on_bad == "skip" else index + 1):
                try:
                    items.append(self.dataset[place % n])
                    asked.append(index)
                    found.append(place % n)
                    break
                except InputError as error:
                    if self.on_bad == "error":
                        return error
                    bad[self.dataset.paths[place % n]] = str(error)
        if not items and self.on_bad == "skip":
            return InputError(f"{self.dataset.root}: no image that can be decoded")
        size = self.dataset.image_size
        shape = 0, self.dataset.channels, size, size
        return asked, found, torch.stack(items) if items else torch.empty(shape, dtype=torch.uint8), bad


def _ignore_signals(_worker_id: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the main process finishes its step and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python ends daemons by SIGTERM, which workers ignore, and would wait for ever for those of an unclosed stream."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would complain of a killed worker
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def stream_batches(
    dataset: Dataset,
    order: Callable[[int], Tensor],
    batch_size: int,
    steps: range,
    *,
    num_workers: int = 0,
    cache: bool = False,
    pin_memory: bool = False,
    part: slice = slice(None),
    on_bad: str = "error",
    report: Callable[[dict[str, str]], None] = lambda bad: None,
) -> Iterator[TensorMiniBatch]:
    """The uint8 batches of the given steps of an endless pass over the data: epoch after epoch, no image dropped.

    dataset: of any task: `len`, items (uint8 [channels, image_size, image_size]) and `batch(indices, items)`.
    order(epoch): the epoch's permutation, [n]. Step s takes places s * batch_size … of the epochs laid end to end, so
    the place in the data is a function of the step alone. Decoding runs in `num_workers` processes, ahead of need.
    With `cache` decoded images are kept in memory, and after a whole epoch no file is opened any more.
    part: the images of each batch that this process is to have; not with `cache`, which would never be full.
    on_bad: what happens where a file cannot be decoded: `error` raises InputError; `skip` lets the next good one take
    its place, `drop` none; report(file -> what is wrong) hears of it, each time.
    """
    n = len(dataset)
    order = lru_cache(maxsize=2)(order)

    def indices(step: int) -> Tensor:  # [batch_size]
        places = torch.arange(step * batch_size, (step + 1) * batch_size)
        epochs = range(int(places[0]) // n, int(places[-1]) // n + 1)
        return torch.cat([order(epoch)[places[places // n == epoch] % n] for epoch in epochs])[part]

    decode = steps
    store = None
    if cache:
        seen_all = (-(-steps.start * batch_size // n) + 1) * n  # where the first epoch entered at its start ends
        decode = range(steps.start, min(steps.stop, -(-seen_all // batch_size)))
        store = torch.empty(n, dataset.channels, dataset.image_size, dataset.image_size, dtype=torch.uint8)
        source = torch.arange(n)  # the place that a place's image is taken from
    loader = DataLoader(
        _BatchDecoder(dataset, on_bad),
        sampler=(indices(step).tolist() for step in decode),  # lists: a tensor would go through shared memory
        batch_size=None,  # an item is a batch already
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
    )
    for decoded in loader:
        if isinstance(decoded, InputError):
            raise decoded
        asked, found, items, bad = decoded
        if bad:
            report(bad)
        if store is not None:
            store[found] = items
            source[asked] = torch.tensor(found)
        batch = dataset.batch(torch.tensor(found, dtype=torch.int64), items)
        yield batch.pin_memory() if pin_memory else batch
    for step in range(decode.stop, steps.stop):
        found = source[indices(step)]
        batch = dataset.batch(found, store[found])
        yield batch.pin_memory() if pin_memory else batch


def ordered_batches(
    dataset: Dataset, batch_size: int, first: int = 0, every: int = 1, **options
) -> Iterator[TensorMiniBatch]:
    """Every image once, in order, of the batches first, first + every, …; options as for `stream_batches`."""
    n = len(dataset)
    batch_size = min(batch_size, n)
    steps = range(first, -(-n // batch_size), every)
    for step, batch in zip(steps, stream_batches(dataset, lambda _: torch.arange(n), batch_size, steps, **options)):
        in_order = batch.metadata["indices"] >= step * batch_size  # the last batch is filled up from the next epoch
        yield batch[: int(in_order.sum())]


def fingerprint(dataset: Dataset) -> str:
    """The number of images and a hash of their names: another order of epochs follows from another one."""
    names = "\n".join(os.path.relpath(path, dataset.root) for path in dataset.paths)
    return f"{len(dataset)} images ({hashlib.blake2b(os.fsencode(names), digest_size=4).hexdigest()})"


def open_dataset(root: str, config: dict, classes: list[str] | None) -> VisionClassificationDataset:
    """The data set of the config's model; without `classes` the one to train on. Raises InputError."""
    dataset = VisionClassificationDataset(root, config["model"]["image_size"], classes)
    if len(dataset.classes) < 2:
        raise InputError(f"{root}: only one class, {dataset.classes[0]}; there is nothing to tell it from")
    return dataset


def draw_mirrored(images: Tensor) -> Tensor:
    """Which of the images [B, …] to mirror: each with probability 1/2, from torch's global generator. [B] bool."""
    return torch.rand(len(images), device=images.device) < 0.5


def mirror(x: Tensor, chosen: Tensor) -> Tensor:
    """x [B, …, W] with the chosen [B] left to right."""
    return torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


def mirror_batch(batch: TensorMiniBatch) -> TensorMiniBatch:
    """Half of the images left to right."""
    return replace(batch, inputs=mirror(batch.inputs, draw_mirrored(batch.inputs)))


def prepare(images: Tensor, mean: list[float], std: list[float], augment: bool = False) -> Tensor:
    """uint8 [B, C, H, W] -> float32, scaled to [0, 1], normalised by channel; with `augment` after `mirror`."""
    images = mirror(images, draw_mirrored(images)) if augment else images
    return (images - per_channel(tuple(mean), images.device)).div_(per_channel(tuple(std), images.device))


class Prepared(nn.Module):
    """A model as a function of uint8 images: an episode kept for a replay holds these, a quarter of the floats.

    arrange: puts the model's output into the task's shape.
    """

    def __init__(self, model: nn.Module, mean: list[float], std: list[float], arrange: Callable | None = None):
        super().__init__()
        self.model, self.mean, self.std, self.arrange = model, mean, std, arrange
        self.sample_masks = model.sample_masks

    def forward(self, images: Tensor, masks: dict[str, Tensor] | None = None) -> Tensor:
        outputs = self.model(prepare(images, self.mean, self.std), masks)
        return self.arrange(outputs) if self.arrange else outputs


@lru_cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Mean or std in units of uint8, [C, 1, 1]; kept, because a copy to the GPU would wait for it at every step."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] * 255


# --- Policy and reward ----------------------------------------------------------------------------------------------


def head_size(num_classes: int, patch_size: int) -> int:
    """Width of the head."""
    return num_classes


def network(model: nn.Module, config: dict) -> Prepared:
    """`model` as a function of uint8 images to logits [B, K], or [B, T, K] under masks."""
    return Prepared(model, config["data"]["mean"], config["data"]["std"])


def policy_adapter(config: dict, progress: float):
    """The adapter at this share of the run."""
    return classification_policy_adapter


def supervised_loss(config: dict):
    """What `training.objective: supervised` minimises."""
    return nll


def classification_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """1 for the right class, 0 otherwise. actions: [B, T, A] class ids; targets: [B]; returns [B, T, A] float."""
    return (actions == targets[:, None, None]).float()


# --- Metrics and pictures -------------------------------------------------------------------------------------------


def predictive_entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of class probabilities [..., K]: [...]."""
    return torch.special.entr(probs).sum(-1)


def mutual_information(passes: Tensor) -> Tensor:
    """What the passes disagree on, in nats (BALD, https://arxiv.org/abs/1112.5745): the entropy of their mean minus the
    mean of their entropies. passes: class probabilities [T, ..., K]; returns [...]."""
    return (predictive_entropy(passes.mean(0)) - predictive_entropy(passes).mean(0)).clamp(min=0)


def expected_calibration_error(probs: Tensor, targets: Tensor, num_bins: int = 15) -> Tensor:
    """Mean gap of confidence and accuracy over equal-width bins of confidence, weighted by their counts (Guo et al.
    2017, https://arxiv.org/abs/1706.04599). probs: [n, K]; targets: [n]."""
    confidence, predicted = probs.max(-1)
    edges = torch.linspace(0, 1, num_bins + 1, device=probs.device, dtype=probs.dtype)[1:-1]
    bins = torch.bucketize(confidence, edges)  # bin i holds (edge i-1, edge i]
    gap = confidence - (predicted == targets).to(confidence.dtype)
    gaps = torch.zeros(num_bins, device=probs.device, dtype=probs.dtype).index_add(0, bins, gap)
    return gaps.abs().sum() / len(targets)


def classification_metrics(probs: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy, negative log-likelihood (nats) and expected calibration error of probs [n, K] against targets [n]."""
    return {
        "accuracy": float((probs.argmax(-1) == targets).double().mean()),
        "nll": float(F.nll_loss(probs.clamp_min(torch.finfo(probs.dtype).tiny).log(), targets)),
        "ece": float(expected_calibration_error(probs, targets)),
    }


def evaluation_figures(deterministic: Tensor, over_passes: Tensor, targets: Tensor) -> dict[str, float]:
    """`classification_metrics` of both predictors, probabilities [n, K]: eval/… is the deterministic network, eval_mc/…
    the mean over T passes."""
    figures = {f"eval/{name}": value for name, value in classification_metrics(deterministic, targets).items()}
    return figures | {f"eval_mc/{k}": v for k, v in classification_metrics(over_passes, targets).items()}


def heat_map(values: Tensor) -> Tensor:
    """Values [H, W] >= 0, from black through red and yellow to white at the highest: uint8 [3, H, W]."""
    scaled = 3 * values / values.max().clamp(min=1e-6)
    return (255 * torch.stack([(scaled - i).clamp(0, 1) for i in range(3)])).to(torch.uint8)


def draw_predictions(images: list[Tensor], captions: list[list[str]], columns: int = 4, size: int = 128) -> Tensor:
    """A grid of uint8 images [3, H, W], all of one shape, over their captions (lines of text), each `size` pixels high:
    uint8 [3, height, width]."""
    line, (_, rows, pixels) = 12, images[0].shape
    width, height = size * pixels // rows, size + line * max(len(caption) for caption in captions) + 4
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, (image, caption) in enumerate(zip(images, captions)):
        cell = Image.new("RGB", (width, height), "white")  # by itself, so that a long caption ends at its border
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        cell.paste(picture.resize((width - 4, size - 4), Image.Resampling.NEAREST), (2, 2))
        for j, text in enumerate(caption):
            ImageDraw.Draw(cell).text((2, size + j * line), text, fill="black")
        sheet.paste(cell, (i % columns * width, i // columns * height))
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def draw_most_uncertain(
    dataset: VisionClassificationDataset, probs: Tensor, targets: Tensor, places: Tensor, count: int = 16
) -> Tensor:
    """A picture of the images with the highest predictive entropy (nats), first the highest, with true class,
    prediction and uncertainty. probs: [n, K]; targets: [n]; places: of the images in the data set, [n]."""
    entropy = predictive_entropy(probs)
    shown = entropy.argsort(descending=True)[:count].tolist()
    captions = [
        [
            f"true {dataset.classes[int(targets[i])]}",
            f"{dataset.classes[int(probs[i].argmax())]} ({float(probs[i].max()):.0%})",
            f"entropy {float(entropy[i]):.2f}",
        ]
        for i in shown
    ]
    return draw_predictions([dataset[int(places[i])] for i in shown], captions)


class Evaluation:
    """Collects the predictions for a data set: class probabilities of the deterministic network and of the mean over
    T passes, both [n, K], targets and places in the data set, [n]."""

    def __init__(self, dataset: VisionClassificationDataset, config: dict):
        self.dataset = dataset
        self.rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, batch: TensorMiniBatch, outputs: Tensor, outputs_mc: Tensor) -> None:
        """outputs: logits [B, K] of the deterministic network; outputs_mc: [B, T, K] of T passes."""
        deterministic = classification_policy_adapter(outputs).probs
        over_passes = classification_policy_adapter(outputs_mc).probs.mean(1)
        row = deterministic, over_passes, batch.targets, batch.metadata["indices"]
        self.rows.append(tuple(part.cpu() for part in row))

    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Probabilities of both, targets, places: each over all images."""
        return tuple(torch.cat(column) for column in zip(*self.rows))

    def figures(self) -> dict[str, float]:
        return evaluation_figures(*self.columns()[:3])

    def draw(self) -> Tensor:
        """The most uncertain images, [3, height, width]."""
        return draw_most_uncertain(self.dataset, *self.columns()[1:])
