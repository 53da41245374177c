"""What photographs.py compares: data sets, scores, methods, the settings that are tried for each, folds."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HOME), str(HOME / "examples")]

import judging
from dice_of_one import dice_of_one
from price_list import price_list
from studies import LABEL, ROOT, Methods, micrograph

from folders import find_images
from scores import READY

FOLDS = 5
LABEL_COEF = "training.label_coef=0.3"


@dataclass(frozen=True, eq=False)
class Score:
    """A row of the table. judge: what a prediction is worth by it; reward: the overrides that train by it; settings:
    tried for the methods by reward, as many as for the others, in place of the data set's."""

    name: str
    judge: judging.Judge
    reward: list[str]
    settings: Methods | None = None


@dataclass(frozen=True, eq=False)
class DataSet:
    """common: overrides of all runs; steps: of each half; starts: settings of the first half, by the label; tricks: the
    losses that the label's second half is tried with; logged: the reward of runs by the label, which is only logged, so
    that a cheap one will do; settings: tried for each method. predictions, draw: what is kept of a model's outputs, and
    shown. searched: the folds by which settings are chosen. unit: of an image file, what
    stays together in a fold. minutes: of a run, before one was timed. The rest is what experiments.py asks of a
    study."""

    name: str
    common: tuple[str, ...]
    scores: tuple[Score, ...]
    tricks: tuple[str, ...]
    predictions: Callable
    draw: Callable
    searched: tuple[int, ...]
    minutes: float
    unit: Callable[[str], str] = str
    logged: tuple[str, ...] = ()
    steps: int = 150
    starts: Methods = field(default_factory=lambda: doubts(3e-4, 1e-3, start=START))
    settings: Methods = field(default_factory=lambda: doubts(*HIGHER, small=SMALL, large=LARGE))
    config: str = "config_dinov2.yaml"
    until: float | None = None
    eval_interval: int = 10**6

    def by_label(self) -> Methods:
        """The label, and the label with each trick: the loss of the second half."""
        label = [*LABEL, *self.logged]
        return {"label": label} | {name: [*label, f"training.supervised_loss={name}"] for name in self.tricks}

    def methods(self) -> Methods:
        found = self.by_label()
        for score in self.scores:
            found |= {f"reward: {score.name}": score.reward}
            found |= {f"label and reward: {score.name}": [*score.reward, LABEL_COEF]}
        return found

    def tried(self, method: str) -> Methods:
        """The settings of a method."""
        own = next((score.settings for score in self.scores if method.endswith(f"reward: {score.name}")), None)
        return own or self.settings

    def judged_by(self, method: str) -> list[Score]:
        """The scores whose cells a method may fill."""
        return [score for score in self.scores if method in self.by_label() or method.endswith(f"reward: {score.name}")]


# --- Folds ------------------------------------------------------------------------------------------------------------


def fold_of(train_dir: Path, unit: Callable[[str], str] = str) -> dict[Path, int]:
    """The fold of each image file (and mask) below a training folder: of each folder every fifth unit."""
    found = {}
    paths = [Path(path).relative_to(train_dir) for path in find_images(str(train_dir))]
    for folder in {path.parent for path in paths}:
        names = [path.name for path in paths if path.parent == folder]
        place = {name: i % FOLDS for i, name in enumerate(sorted(set(map(unit, names))))}
        found |= {folder / name: place[unit(name)] for name in names}
    return found


def make_folds(train_dir: Path, folder: Path, unit: Callable[[str], str] = str) -> Path:
    """Below `folder` the training folder in parts, of links, once: <fold>/train without the fold, <fold>/held it alone,
    each in the format of the whole."""
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    train_dir = train_dir.resolve()
    folds = fold_of(train_dir, unit)
    others = [path for path in train_dir.iterdir() if path.is_file() and path.suffix in (".txt", ".json")]
    for fold in range(FOLDS):
        for part in ("train", "held"):
            kept = [path for path, of in folds.items() if (of == fold) == (part == "held")]
            for path in kept:
                target = unfinished / str(fold) / part / path
                target.parent.mkdir(parents=True, exist_ok=True)
                os.symlink(train_dir / path, target)
            for path in others:
                text = path.read_text(encoding="utf-8")
                if path.suffix == ".json":
                    text = json.dumps(of_images(json.loads(text), {path.name for path in kept}))
                (unfinished / str(fold) / part / path.name).write_text(text, encoding="utf-8")
    unfinished.replace(folder)
    return folder


def of_images(coco: dict, names: set[str]) -> dict:
    """COCO's annotations of the images of these file names alone."""
    images = [row for row in coco["images"] if Path(row["file_name"]).name in names]
    kept = {row["id"] for row in images}
    return coco | {"images": images, "annotations": [row for row in coco["annotations"] if row["image_id"] in kept]}


# --- Definitions ------------------------------------------------------------------------------------------------------


def doubts(*rates: float, **others: list[str]) -> Methods:
    """Settings: each learning rate with each of the others, the dropout and the entropy bonus."""
    return {f"{r:g} {name}": [f"training.learning_rate={r:g}", *keys] for name, keys in others.items() for r in rates}


def by_confusion(
    name: str, function: str, judge: Callable, rates: tuple[float, ...], score: Callable | None = None
) -> Score:
    """A score of the confusion matrix, ready in scores.py or given. Its logarithm needs no doubt, so that it is tried
    with little, and the score itself with much."""
    settings = doubts(*rates, **{"log small": [*SMALL, "rollout.log_values=true"], "large": LARGE})
    return Score(name, judge(score or READY[function]), [f"rollout.reward={function}", *judge.rollout], settings)


LOWER, HIGHER = (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3)  # 3e-4 and 1e-3, and one more where most choices were at an edge
SMALL, LARGE = (["model.dropout=0.1", "training.entropy_coef=0"], ["model.dropout=0.5", "training.entropy_coef=0.3"])
START = ["model.dropout=0.3", "training.entropy_coef=0"]
COMMON = ("data.augment=true", "data.num_workers=0", "data.eval_dir=null", "training.freeze_blocks=11")
COMMON += ("model.dropout_blocks=1", "training.warmup_steps=20", "training.save_interval=1000000")
COMMON += ("data.token_cache=keep", f"data.token_cache_dir={ROOT}/tokens")
DENSE = ("model.image_size=168", "training.batch_size=8", "rollout.num_mc_samples=2")
OF_CLASSES = partial(by_confusion, judge=judging.Classes, rates=LOWER)
OF_PIXELS = partial(by_confusion, judge=judging.Pixels, rates=HIGHER)
PRICES, DICE = "examples/price_list.py:price_list", "examples/dice_of_one.py:dice_of_one"
BY_CHOICE = {"maxrl small": [*SMALL, "rollout.advantage=maxrl"], "rloo large": [*LARGE, "rollout.advantage=rloo"]}
BOXES = ("rollout.actions_per_sample=2", "detection.box_std=0.1", "detection.supervised_loss=iou")
DATA_SETS = {
    "cifar10": DataSet(
        "cifar10",
        (*COMMON, "model.image_size=98", "training.batch_size=48", "rollout.num_mc_samples=4"),
        (
            Score(
                "accuracy", judging.Classes(judging.accuracy),
                ["rollout.reward=classification_reward", "rollout.action=all"], doubts(*LOWER, **BY_CHOICE),
            ),
            OF_CLASSES("balanced accuracy", "balanced_accuracy"),
            OF_CLASSES("G-mean", "g_mean"),
            OF_CLASSES("macro-F1", "macro_f1"),
            OF_CLASSES("quadratic kappa", "quadratic_kappa"),
            OF_CLASSES("1 − mean cost", PRICES, score=price_list),
        ),
        ("weighted", "logit_adjusted", "focal"),
        judging.class_predictions,
        judging.draw_class,
        tuple(range(FOLDS)),
        0.4,
        settings=doubts(*LOWER, small=SMALL, large=LARGE),
        steps=300,
    ),
    "membrane": DataSet(
        "membrane",
        (*COMMON, *DENSE, "task=segmentation"),
        (OF_PIXELS("mean IoU", "mean_iou"), OF_PIXELS("Dice of the membrane", DICE, score=dice_of_one)),
        ("weighted", "focal", "dice", "lovasz"),
        judging.pixel_predictions,
        judging.draw_pixels,
        (0, 1),
        3,
        unit=micrograph,
        logged=("rollout.reward=pixel_reward", "rollout.actions_per_sample=1"),
    ),
    "blood-cells": DataSet(
        "blood-cells",
        (*COMMON, *DENSE, *BOXES, "task=detection"),
        (
            Score("F1 at IoU 0.5", judging.BoxF1(), ["rollout.reward=detection_set_credit_50"]),
            Score("mAP@[.5:.95]", judging.BoxAP(), ["rollout.reward=detection_set_credit"]),
        ),
        ("weighted", "logit_adjusted", "focal"),
        judging.box_predictions,
        judging.draw_boxes,
        (0, 1),
        2.5,
    ),
}  # fmt: skip
