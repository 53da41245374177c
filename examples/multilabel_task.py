r"""A task of one's own in one file: images that have any number of tags, each tag a yes or a no.

    uv run train.py task=examples/multilabel_task.py data.train_dir=photos/train data.eval_dir=photos/eval \
        training.run_name=tags
    uv run predict.py ckpt/tags photos/new

A folder holds the images, at any depth, and `labels.csv`: the header `file,<tag>,<tag>,…`, then a line for each image
with its path below the folder and a 0 or a 1 for each tag. An action is a set of tags: E… is [K], K the number of tags.
"""

import csv
import os

import torch
from torch import Tensor
from torch.distributions import Bernoulli

from config import Key, at_least
from data_types import InputError
from images import ImageDataset
from label_losses import CLASS_LOSSES
from vision_task import Task

NUMBERS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}  # as pandas may write them


def read_labels(path: str) -> tuple[list[str], dict[str, list[float]]]:
    """labels.csv -> the tags, and file -> its row of 0 and 1. Raises InputError, with the line that is wrong."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in enumerate(csv.reader(file), 1) if line[1]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); it should be a CSV file in UTF-8") from None
    header = lines[0][1] if lines else []
    tags = [tag.strip() for tag in header[1:]]
    if header[:1] != ["file"] or not tags or "" in tags or len(set(tags)) < len(tags):
        raise InputError(
            f"{path}: line 1 should be file,<tag>,… with different tags, not {','.join(header) or 'empty'}"
        )
    rows: dict[str, list[float]] = {}
    for number, (name, *values) in lines[1:]:
        name, values = os.path.normpath(name.strip()), [NUMBERS.get(value.strip().lower(), value) for value in values]
        if len(values) != len(tags):
            raise InputError(f"{path}: line {number} has {len(values)} values for {len(tags)} tags")
        if wrong := [value for value in values if value not in (0, 1)]:
            raise InputError(f"{path}: line {number}: {wrong[0]!r} should be 0 or 1")
        if name in rows:
            raise InputError(f"{path}: line {number}: {name} is there twice")
        if not os.path.isfile(os.path.join(os.path.dirname(path), name)):
            raise InputError(f"{path}: line {number}: there is no file {name} beside it")
        rows[name] = values
    if not rows:
        raise InputError(f"{path}: no image in it; a line for each follows the header")
    return tags, rows


class TaggedImages(ImageDataset):
    """Images with `targets` [n, K] of 0 and 1. classes: the tags in the order of the ids; None: that of the file."""

    def __init__(self, root: str, image_size: int, beta: float, classes: list[str] | None = None):
        path = os.path.join(root, "labels.csv")
        tags, rows = read_labels(path)
        self.root, self.image_size, self.beta = root, image_size, beta
        self.classes = list(classes) if classes else tags
        if sorted(tags) != sorted(self.classes):
            raise InputError(f"{path}: its tags are {', '.join(tags)}, in training they were {', '.join(self.classes)}")
        self.paths = [os.path.join(root, name) for name in rows]
        self.targets = torch.tensor(list(rows.values()))[:, [tags.index(tag) for tag in self.classes]]

    def metadata(self, indices: Tensor) -> dict:
        return super().metadata(indices) | {"beta": self.beta}


def f_score(hits: Tensor, found: Tensor, true: Tensor, beta: float = 1.0) -> Tensor:
    """F-beta of counts, (1 + β²) hits / (found + β² true); 1 where there is nothing and nothing was found."""
    denominator = found + beta**2 * true
    return torch.where(denominator == 0, 1.0, (1 + beta**2) * hits / denominator.clamp(min=1e-9))


def f_beta_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """F-beta of each image's set of tags. actions: [B, T, A, K]; targets: [B, K]; returns [B, T, A]."""
    targets = targets[:, None, None]
    hits = (actions * targets).sum(-1)
    return f_score(hits, actions.sum(-1), targets.sum(-1), metadata["beta"])


def macro_f1(confusion: Tensor) -> Tensor:
    """The mean over the tags of F1 over the data set, a score of the confusion matrix. confusion: [..., K, 2, 2]."""
    return f_score(confusion[..., 1, 1], confusion[..., 1].sum(-1), confusion[..., 1, :].sum(-1)).mean(-1)


class Multilabel(Task):
    """Tags of an image: a Bernoulli for each, over the logits of the class token."""

    keys = {"multilabel.beta": Key(1.0, float, "above 1 a missed tag costs more than a wrong one", **at_least(0))}
    rewards = {"f_beta_reward": f_beta_reward, "macro_f1": macro_f1}
    losses = CLASS_LOSSES

    def open(self, root: str, classes: list[str] | None = None) -> TaggedImages:
        return TaggedImages(root, self.config["model"]["image_size"], self.config["multilabel"]["beta"], classes)

    def count_classes(self, dataset: TaggedImages) -> Tensor:
        """Images without and with each tag: [2, K]."""
        yes = dataset.targets.sum(0)
        return torch.stack([len(dataset) - yes, yes])

    def policy(self, outputs: Tensor, progress: float = 1.0) -> Bernoulli:
        """outputs: logits [B, T, K]; in float32 or better, whatever the autocast."""
        return Bernoulli(logits=outputs.to(torch.promote_types(outputs.dtype, torch.float32)))

    def metrics(self, probs: Tensor, targets: Tensor) -> dict[str, float]:
        """probs: [n, K, 2], no and yes; targets: [n, K]. Micro-F1 counts over all tags, macro-F1 is the tags' mean."""
        found = (probs[..., 1] > 0.5).float()
        counts = torch.stack([found * targets, found, targets]).sum(1)  # hits, found, true: [3, K]
        return {"micro_f1": float(f_score(*counts.sum(1))), "macro_f1": float(f_score(*counts).mean())}

    def caption(self, probs: Tensor, target: Tensor, classes: list[str]) -> list[str]:
        names = [[c for c, yes in zip(classes, chosen.tolist()) if yes] for chosen in (target, probs[:, 1] > 0.5)]
        return [f"true {', '.join(names[0])}", f"found {', '.join(names[1])}"]

    def describe(self, outputs: Tensor, path: str, classes: list[str]) -> tuple[dict, None]:
        probabilities = dict(zip(classes, self.probabilities(outputs).mean(0)[:, 1].tolist()))
        tags = [tag for tag, yes in zip(classes, self.decide(outputs, path, classes).tolist()) if yes]
        return {"tags": tags, "probabilities": probabilities}, None

    def in_words(self, record: dict) -> str:
        return ", ".join(record["tags"]) or "no tag"
