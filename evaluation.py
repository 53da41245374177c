"""Evaluation, for every task: predictions of a data set, how sure they are, metrics of class probabilities, charts."""

import math
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from data_types import InputError, TensorMiniBatch
from grpo import keyed_rng
from processes import gathered, rank_and_world

REJECTED = (0, 5, 10, 20, 50)  # percent of the images, the most uncertain
WRITTEN = {"nll": "NLL", "ece": "ECE", "map": "mAP", "ap50": "AP50", "ap75": "AP75", "f1": "F1"}


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


def confusion_matrix(predicted: Tensor, targets: Tensor, num_classes: int, counted: Tensor | None = None) -> Tensor:
    """Counts by [truth, prediction], int64 [K, K]. counted: which elements count (None: all); all of one shape."""
    index = targets * num_classes + predicted
    index = index.flatten() if counted is None else index[counted]
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def accuracy_of_kept(uncertainty: Tensor, right: Tensor) -> Tensor:
    """Accuracy of the k least uncertain of n images (of equals the first), k = 1 … n: [n]. right: bool [n]."""
    order = uncertainty.argsort(stable=True)
    return right[order].double().cumsum(0) / torch.arange(1, len(right) + 1)


def metrics_line(metrics: dict[str, float]) -> str:
    """The metrics but those of single classes, on one line; the sum of the rewards if there are several."""
    parts = {"eval": [], "eval_mc": []}
    several = sum(key.startswith("eval/reward/") for key in metrics) > 1
    for key, value in metrics.items():
        predictor, _, name = key.partition("/")
        of, _, short = name.partition("/")
        if of in ("reward", "reward_argmax"):
            by_argmax = " by argmax" if of == "reward_argmax" else ""
            if short or several:
                parts[predictor].append(f"{short.rpartition(':')[2] or 'reward'}{by_argmax} {value:.4f}")
        elif "/" not in name:
            parts[predictor].append(f"{WRITTEN.get(name, name.replace('_', ' '))} {value:.4f}")
    return f"{' '.join(parts['eval'])} (mean over passes: {' '.join(parts['eval_mc'])})"


class Evaluation:
    """Collects the predictions for a data set, of the deterministic network and of the mean over T passes. This one
    keeps the class probabilities for `Task.metrics`; a task whose metrics are no function of those has its own."""

    def __init__(self, task, dataset: Dataset):
        self.task, self.dataset = task, dataset
        self.rows: list[tuple[Tensor, ...]] = []

    def add(self, batch: TensorMiniBatch, outputs: Tensor, outputs_mc: Tensor) -> None:
        """outputs: [B, …] of the deterministic network; outputs_mc: [B, T, …] of T passes; of `Task.arrange`."""
        deterministic, passes = self.task.probabilities(outputs), self.task.probabilities(outputs_mc)
        row = deterministic, passes.mean(1), batch.targets, batch.metadata["indices"]
        self.rows.append(tuple(part.cpu() for part in row))

    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Probabilities of both [n, E…, K], targets [n, E…], places in the data set [n]: each over all images."""
        return tuple(torch.cat(column) for column in zip(*self.rows))

    def metrics(self) -> dict[str, float]:
        """eval/… of the deterministic network, eval_mc/… of the mean over passes."""
        both = zip(("eval", "eval_mc"), self.metrics_of_both())
        return {f"{prefix}/{name}": value for prefix, metrics in both for name, value in metrics.items()}

    def metrics_of_both(self) -> Iterable[dict[str, float]]:
        """The metrics of the deterministic network, then those of the mean over passes."""
        *both, targets, _ = self.columns()
        return (self.task.metrics(probs, targets) for probs in both)

    def draw(self, count: int = 16) -> Tensor:
        """The images of highest predictive entropy (nats) with truth and prediction: uint8 [3, height, width]."""
        _, probs, targets, places = self.columns()
        entropy = predictive_entropy(probs).reshape(len(probs), -1).mean(1)
        shown = entropy.argsort(descending=True)[:count].tolist()
        classes = self.dataset.classes
        captions = [[*self.task.caption(probs[i], targets[i], classes), f"entropy {entropy[i]:.2f}"] for i in shown]
        return draw_sheet([self.dataset[int(places[i])] for i in shown], captions)

    def details(self) -> dict:
        """What `predict.py --evaluate` reports beside the metrics: JSON."""
        return {}

    def lines(self) -> list[str]:
        """The details in words."""
        return []

    def charts(self) -> dict[str, Image.Image]:
        """Charts for `predict.py --evaluate --out`, by file name."""
        return {}


class ClassEvaluation(Evaluation):
    """Of one class an image: also the accuracy on what is left when the most uncertain images go to a person."""

    def kept(self) -> Tensor:
        _, probs, targets, _ = self.columns()
        return accuracy_of_kept(predictive_entropy(probs), probs.argmax(-1) == targets)

    def details(self) -> dict:
        accuracy = self.kept()
        rejected = {str(percent): float(accuracy[-1 - len(accuracy) * percent // 100]) for percent in REJECTED}
        return {"accuracy_when_rejected": rejected}

    def lines(self) -> list[str]:
        rejected = self.details()["accuracy_when_rejected"]
        return [f"accuracy {x:.4f} without the most uncertain {percent:>2} %" for percent, x in rejected.items()]

    def charts(self) -> dict[str, Image.Image]:
        _, probs, targets, _ = self.columns()
        classes = self.dataset.classes
        confusion = confusion_matrix(probs.argmax(-1), targets, len(classes))
        return {"accuracy_rejection": draw_rejection(self.kept()), "confusion": draw_confusion(confusion, classes)}


class DenseEvaluation(Evaluation):
    """Of predictions at each place of an image: keeps pictures of the `shown` most uncertain images."""

    parts = "truth, prediction, disagreement"  # of a picture, from the left
    size = 128  # pixels that a picture is high on the sheet

    def __init__(self, task, dataset: Dataset, shown: int = 8):
        super().__init__(task, dataset)
        self.shown = shown
        self.pictures: list[tuple[float, Tensor]] = []  # (mean entropy, picture), the most uncertain first

    def keep(self, entropy: Tensor, passes: Tensor, draw_parts: Callable[[int], list[Tensor]]) -> None:
        """entropy: mean of each image, nats, [B]; passes: class probabilities [B, T, H, W, K]; draw_parts(i): image i's
        `parts` but the disagreement (mutual information of pass and class), uint8 [3, height, width] each."""
        for i in entropy.argsort(descending=True)[: self.shown].tolist():
            *parts, heat = (part.cpu() for part in (*draw_parts(i), heat_map(mutual_information(passes[i]))))
            heat = F.interpolate(heat[None], size=parts[0].shape[1:])[0]
            self.pictures.append((float(entropy[i]), torch.cat([*parts, heat], -1)))
        self.pictures = sorted(self.pictures, key=lambda row: -row[0])[: self.shown]

    def draw(self) -> Tensor:
        """The most uncertain images, each with its `parts`: uint8 [3, height, width]."""
        captions = [[f"{self.parts}; entropy {entropy:.2f}"] for entropy, _ in self.pictures]
        return draw_sheet([picture for _, picture in self.pictures], captions, columns=2, size=self.size)


@torch.no_grad()
def evaluate(
    task,
    network,
    batches: Iterable[TensorMiniBatch],
    dataset: Dataset,
    group: dist.ProcessGroup | None = None,
    rewards=None,
) -> Evaluation:
    """The task's `Evaluation` over all batches, on the network's device. network: see `Task.network`. group: where
    several processes have every world-th batch; rank 0's evaluation is of them all, those of the others are empty.
    rewards: a `scores.RewardEvaluation` that sees the same. Raises InputError where no image can be decoded."""
    config, evaluation, device = task.config, task.evaluation(dataset), next(network.parameters()).device

    def outputs() -> Iterator[tuple[TensorMiniBatch, Tensor, Tensor]]:
        rank, world = rank_and_world() if group else (0, 1)
        for index, batch in enumerate(batches):
            if len(batch):  # 0 where none of its images can be decoded
                batch = batch.to(device)
                with keyed_rng(config["training"]["seed"], "evaluation", index * world + rank):
                    masks = network.sample_masks(len(batch), config["rollout"]["num_mc_samples"])
                yield batch, network(batch.inputs), network(batch.inputs, masks)

    size = min(config["training"]["micro_batch_size"] or config["training"]["batch_size"], len(dataset))
    rows = gathered(outputs(), math.ceil(len(dataset) / size), group) if group else outputs()
    empty = not (group and rank_and_world()[0])
    for row in rows:
        evaluation.add(*row)
        empty = False
        if rewards:
            rewards.add(*row)
    if empty:
        raise InputError(f"{dataset.root}: none of its images can be decoded")
    return evaluation


def to_picture(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] or [H, W] as an image."""
    return Image.fromarray((image if image.ndim == 2 else image.permute(1, 2, 0)).cpu().numpy())


def to_tensor(picture: Image.Image) -> Tensor:
    """The inverse of `to_picture`."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def heat_map(values: Tensor) -> Tensor:
    """Values [H, W] >= 0, from black through red and yellow to white at the highest: uint8 [3, H, W]."""
    scaled = 3 * values / values.max().clamp(min=1e-6)
    return (255 * torch.stack([(scaled - i).clamp(0, 1) for i in range(3)])).to(torch.uint8)


def draw_sheet(images: list[Tensor], captions: list[list[str]], columns: int = 4, size: int = 128) -> Tensor:
    """A grid of uint8 images [3, H, W], all of one shape, over their captions (lines of text), each `size` pixels high:
    uint8 [3, height, width]."""
    line, (_, rows, pixels) = 12, images[0].shape
    width, height = size * pixels // rows, size + line * max(len(caption) for caption in captions) + 4
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, (image, caption) in enumerate(zip(images, captions)):
        cell = Image.new("RGB", (width, height), "white")  # by itself, so that a long caption ends at its border
        cell.paste(to_picture(image).resize((width - 4, size - 4), Image.Resampling.NEAREST), (2, 2))
        for j, text in enumerate(caption):
            ImageDraw.Draw(cell).text((2, size + j * line), text, fill="black")
        sheet.paste(cell, (i % columns * width, i // columns * height))
    return to_tensor(sheet)


def draw_batch(task, parts: Iterable[tuple[int, TensorMiniBatch]], count: int = 16) -> Tensor:
    """What the model is given to learn from, with its targets: the first images of `images.micro_batches`, uint8 [3,
    height, width]."""
    shown = []
    for _, part in parts:
        part = part.to("cpu")
        shown += [task.show(part, i) for i in range(len(part))]
        if len(shown) >= count:
            break
    return draw_sheet(*map(list, zip(*shown[:count])), size=196)  # lines of boxes survive: 192 high within


def draw_caption(picture: Image.Image, lines: list[str]) -> Image.Image:
    """The picture over lines of text."""
    sheet = Image.new("RGB", (max(picture.width, 200), picture.height + 14 * len(lines) + 4), "white")
    sheet.paste(picture)
    ImageDraw.Draw(sheet).multiline_text((3, picture.height + 1), "\n".join(lines), fill="black", spacing=3)
    return sheet


def load_pyplot() -> ModuleType:
    """matplotlib, which draws the charts; training never needs it. Raises InputError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "charts are drawn by matplotlib, which is not installed: uv run --extra charts …, or pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def render(figure) -> Image.Image:
    """A matplotlib figure as an image; the figure is closed."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    load_pyplot().close(figure)
    return picture


def draw_confusion(confusion: Tensor, classes: list[str]) -> Image.Image:
    """Counts by [truth, prediction], [K, K], as a chart: a cell is as blue as its share of the truth; up to thirty
    classes are named and their counts written."""
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(max(4.0, 0.45 * len(classes) + 2), 14)
    figure, axes = load_pyplot().subplots(figsize=(side, side), layout="constrained")
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction", ylabel="truth")
    if len(classes) <= 30:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for row, column in confusion.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            count = int(confusion[row, column])
            axes.text(column, row, f"{count}" if count < 10**5 else f"{count:.0e}", ha="center", va="center", c=colour)
    return render(figure)


def draw_rejection(accuracy: Tensor) -> Image.Image:
    """The accuracy-rejection curve. accuracy: of the k least uncertain of n images, k = 1 … n, [n]."""
    figure, axes = load_pyplot().subplots(figsize=(6, 4), layout="constrained")
    rejected = 1 - torch.arange(1, len(accuracy) + 1) / len(accuracy)
    axes.plot(rejected.numpy(), accuracy.numpy())
    axes.set(xlabel="share rejected, the highest predictive entropy first", ylabel="accuracy on the images kept")
    axes.grid(alpha=0.3)
    return render(figure)
