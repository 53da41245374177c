"""What a task is, written down once (`Task`), and the first of them: classification of an image folder."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.utils.data import Dataset

from augment import turned
from choices import choice_log_probs
from config import Key
from data_types import InputError, TensorMiniBatch
from evaluation import (
    ClassEvaluation,
    Evaluation,
    classification_metrics,
    draw_caption,
    mutual_information,
    predictive_entropy,
)
from folders import SUFFIXES, class_notes, find_classes, find_images, inner_hint, not_read_note, plain_name
from frame import Frame
from grpo import Reward, classification_policy_adapter, nll
from images import ImageDataset, Prepared, draw_mirrored, mirror
from label_losses import CLASS_LOSSES, LabelLoss


class Task:
    """Everything that this repo knows of a task. A subclass in a file of yours is one more: `task: path/to/file.py`.

    `open`, `rewards` and `metrics` have to be given, for the others the defaults serve where an action is one class of
    a softmax. B images, T passes, A actions, E… the elements of an action (nothing for a class), K classes.
    """

    keys: dict[str, Key] = {}  # config keys of its own: "section.key" -> default, type, meaning, range
    rewards: dict[str, Reward] = {}  # the names that rollout.reward takes; the first is the default
    losses: dict[str, LabelLoss] = {}  # the names that training.supervised_loss takes beside cross_entropy
    class_counts: Tensor | None = None  # of the training set, where the loss needs them, see `count_classes`
    best: str | None = None  # the metric by which best.pt is chosen; None: the first, of eval/
    lower_is_better: tuple[str, ...] = ("nll", "ece")  # metrics; of the others more is better
    dense = False  # whether the head reads each patch token, instead of the class token

    def __init__(self, config: dict):
        """config: section -> key -> value, checked."""
        self.config = config

    def open(self, root: str, classes: list[str] | None = None) -> ImageDataset:
        """The data set in the folder `root`. classes: those of the training folder, by id; None: this is it. Raises
        InputError with one line for whatever is wrong with the folder."""
        raise NotImplementedError

    def head_size(self, num_classes: int) -> int:
        """Width of the head's output."""
        return num_classes

    def arrange(self, outputs: Tensor) -> Tensor:
        """The head's outputs [B, …, width], or [B, …, P, width] of P patches, in the shape that `policy` reads."""
        return outputs

    def network(self, model: nn.Module) -> Prepared:
        """`model` as a function of uint8 images [B, 3, H, W] (and masks) to arranged outputs."""
        return Prepared(model, self.config["data"]["mean"], self.config["data"]["std"], self.arrange)

    def policy(self, outputs: Tensor, progress: float = 1.0) -> Distribution:
        """Arranged outputs [B, T, …] -> the distribution over actions, batch shape [B, T, E…], in float32 or better.
        progress: the share of the run that is over."""
        return classification_policy_adapter(outputs)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Arranged outputs [B, …] -> class probabilities [B, …, E…, K]; of a Bernoulli K is 2, no and yes."""
        policy = self.policy(outputs)
        return policy.probs if isinstance(policy, Categorical) else torch.stack([1 - policy.probs, policy.probs], -1)

    def decide(self, outputs: Tensor, path: str, classes: list[str]) -> Tensor:
        """What T passes [T, …] say of an image file, each element by itself: choices [E…]. The most probable ones;
        `predict.py --decide reward` puts those of the highest expected reward in its place."""
        return self.probabilities(outputs).mean(0).argmax(-1)

    def deployed(self, outputs: Tensor) -> dict[str, Tensor]:
        """What an exported model returns: arranged outputs [B, …] -> name -> [B, …]."""
        return {"probabilities": self.probabilities(outputs)}

    def count_classes(self, dataset: Dataset) -> Tensor:
        """Elements of each class in the training set, [K], or [K, E…] where each element has classes of its own."""
        return torch.bincount(dataset.targets.flatten(), minlength=len(dataset.classes))

    def supervised_loss(self, policy: Distribution, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """What `training.objective: supervised` minimises: targets [B, T, 1, E…] -> a loss of each, the same shape.
        counted: [B, E…] bool, the elements that count; None: all."""
        name = self.config["training"]["supervised_loss"]
        if name == "cross_entropy":
            return nll(policy, targets)
        log_probs = choice_log_probs(policy)[0]
        if self.class_counts is not None:
            self.class_counts = self.class_counts.to(log_probs)  # once: a copy to the GPU would be waited for each step
        return self.losses[name](log_probs, targets.long(), counted, self.class_counts)

    def mirror(self, batch: TensorMiniBatch) -> TensorMiniBatch:
        """Half of the images left to right, drawn from torch's global generator, with all that has a place in them."""
        return replace(batch, inputs=mirror(batch.inputs, draw_mirrored(batch.inputs)))

    def turn(self, batch: TensorMiniBatch, turns: Tensor) -> TensorMiniBatch:
        """The images turned, see `augment.turned`, with all that has a place in them. turns: bool [B, 3]."""
        return replace(batch, inputs=turned(batch.inputs, turns))

    def show(self, batch: TensorMiniBatch, i: int) -> tuple[Tensor, list[str]]:
        """Image i of a batch with its target drawn: uint8 [3, height, width], and the lines of text under it."""
        return batch.inputs[i], [f"true {batch.targets[i].tolist()}"]

    def metrics(self, probs: Tensor, targets: Tensor) -> dict[str, float]:
        """Metrics of a whole data set: probabilities [n, E…, K], targets [n, E…]."""
        raise NotImplementedError

    def evaluation(self, dataset: Dataset) -> Evaluation:
        """What collects the predictions for a data set, and has the metrics."""
        return Evaluation(self, dataset)

    def best_metric(self, metrics: dict[str, float]) -> tuple[str, float, bool]:
        """The metric by which best.pt is chosen: its name, its value, and whether less is better. It is training.best;
        where that is null the reward, if it is not the task's own, else `best`. Raises InputError if there is none."""
        chosen, rewards = self.config["training"]["best"], self.config["rollout"]["reward"]
        own = "eval/reward" if rewards and list(rewards) != [next(iter(self.rewards))] else self.best
        name = chosen or own or next(iter(metrics), None)
        name = name if name in metrics else f"eval/reward/{name}"  # a score of the confusion matrix
        if name not in metrics:
            key = "training.best" if chosen else "task"
            name = name.removeprefix("eval/reward/")
            raise InputError(f"{key}: the best checkpoint is chosen by {name}, which is none of {', '.join(metrics)}")
        return name, metrics[name], name.rpartition("/")[2] in self.lower_is_better

    def caption(self, probs: Tensor, target: Tensor, classes: list[str]) -> list[str]:
        """Lines of text under an evaluated image: probabilities [E…, K], target [E…]."""
        return [f"true {target.tolist()}", f"found {probs.argmax(-1).tolist()}"]

    def describe(self, outputs: Tensor, path: str, classes: list[str]) -> tuple[dict, Any]:
        """What T passes [T, …] say of an image file: a record for --json, and whatever else `draw` needs. The record
        gets the image's uncertainties from `predict.py`, where it has none."""
        return {"probabilities": self.probabilities(outputs).mean(0).tolist()}, None

    def in_words(self, record: dict) -> str:
        """The record in a few words, for the table and under the picture."""
        return str(next(iter(record.values())))

    def draw(self, picture: Image.Image, record: dict, found: Any) -> dict[str, tuple[str, Image.Image]]:
        """An image file's picture with what `describe` found in it: name in the record -> (folder, picture). The
        record has the uncertainties."""
        lines = [f"{key.replace('_', ' ')} {record[key]:.3f}" for key in ("predictive_entropy", "mutual_information")]
        return {"picture": ("", draw_caption(picture, [self.in_words(record), *lines]))}

    def uncertainty(self, outputs: Tensor) -> dict[str, float]:
        """Predictive entropy and mutual information (nats) of T passes [T, …], each the mean over the elements."""
        passes = self.probabilities(outputs)
        return {
            "predictive_entropy": float(predictive_entropy(passes.mean(0)).mean()),
            "mutual_information": float(mutual_information(passes).mean()),
        }


# --- Classification ---------------------------------------------------------------------------------------------------


class VisionClassificationDataset(ImageDataset):
    """An image folder: one subdirectory per class, images at any depth inside.

    root: the folder. classes: the class names whose order gives the ids; None takes the subdirectories of `root` (of
    the training folder, that is; an evaluation folder is given the training folder's), numbers in them by their value.
    Item i is the decoded image, uint8 [3, H, W]. `targets` is [n] int64, `paths` the n file names.
    Raises InputError where there is no folder, no class, no image in a class, or a class not in `classes`.
    """

    def __init__(self, root: str, image_size: int | Frame, classes: list[str] | None = None):
        folders, not_read = find_classes(root, classes), Counter()
        self.root, self.image_size = root, image_size
        self.classes = list(folders) if classes is None else list(classes)
        ids = {plain_name(name): i for i, name in enumerate(self.classes)}
        self.paths: list[str] = []
        targets = []
        for name in sorted(folders, key=ids.get):
            folder = folders[name]
            paths = find_images(folder, not_read)
            if not paths and classes is None:
                found = f", but {'; '.join(not_read_note(not_read))}" if not_read else f" ({' '.join(SUFFIXES)})"
                raise InputError(f"{folder}: no images{found}; add some or remove it")
            self.paths += paths
            targets += [ids[name]] * len(paths)
        if not self.paths:
            raise InputError(f"{root}: no images ({' '.join(SUFFIXES)}) in its subdirectories")
        self.targets = torch.tensor(targets)
        self.notes = (*not_read_note(not_read), *class_notes(root, folders))


def classification_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """1 for the right class, 0 otherwise. actions: [B, T, A] class ids; targets: [B]; returns [B, T, A] float."""
    return (actions == targets[:, None, None]).float()


class Classification(Task):
    """One class an image: a Categorical over the logits of the class token."""

    rewards = {"classification_reward": classification_reward}
    losses = CLASS_LOSSES

    def open(self, root: str, classes: list[str] | None = None) -> VisionClassificationDataset:
        dataset = VisionClassificationDataset(root, Frame.from_config(self.config), classes)
        if len(dataset.classes) < 2:
            problem = f"{root}: only one class, {dataset.classes[0]}; there is nothing to tell it from"
            raise InputError(problem + inner_hint(root))
        return dataset

    def metrics(self, probs: Tensor, targets: Tensor) -> dict[str, float]:
        return classification_metrics(probs, targets)

    def evaluation(self, dataset: Dataset) -> ClassEvaluation:
        return ClassEvaluation(self, dataset)

    def show(self, batch: TensorMiniBatch, i: int) -> tuple[Tensor, list[str]]:
        return batch.inputs[i], [f"true {batch.metadata['classes'][int(batch.targets[i])]}"]

    def caption(self, probs: Tensor, target: Tensor, classes: list[str]) -> list[str]:
        return [f"true {classes[int(target)]}", f"{classes[int(probs.argmax())]} ({float(probs.max()):.0%})"]

    def describe(self, outputs: Tensor, path: str, classes: list[str]) -> tuple[dict, None]:
        mean, decided = self.probabilities(outputs).mean(0), int(self.decide(outputs, path, classes))
        record = {"class": classes[decided], "probability": float(mean[decided])}
        return record | {"probabilities": dict(zip(classes, mean.tolist()))}, None

    def in_words(self, record: dict) -> str:
        return f"{record['class']} ({record['probability']:.1%})"
