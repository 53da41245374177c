"""What experiments.py compares: methods, the settings that are tried for each, the data, the tables' columns."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("experiments")
Methods = dict[str, list[str]]  # name -> the overrides of the config that make it
Parts = tuple[Path, Path, Path, Path]
LONG_TAIL = 20  # the most frequent digit is so many times as frequent as the rarest


@dataclass(frozen=True, eq=False)
class Stage:
    """Methods that stand in one table of docs/results.md, between the markers of its name. settings: what is tried for
    each method on the hold-out; only: a method's setting that was chosen before. columns: metric -> heading, the first
    chooses the setting. start: the method of the study's first stage whose checkpoints are gone on from. ratio: the
    method whose time is 1; paired: to whose seeds the first metric is compared. whole: no table before all seeds are
    there."""

    marker: str
    methods: Methods
    settings: Methods
    columns: dict[str, str]
    start: str | None = None
    only: dict[str, str] | None = None
    ratio: str | None = None
    paired: str | None = None
    whole: bool = False


@dataclass(frozen=True, eq=False)
class Study:
    """retrain: the settings are chosen by runs on four fifths of the training set, and the figures are of runs on all
    of it. Else all runs are on four fifths, and the rest both chooses and is what decisions are fitted on. scores: what
    is decided by, names of rewards; `f1`: thresholds of boxes. until: a run ends when it gets to that value of its
    first metric. data: the folders to train on (all of it, four fifths), to choose by and to judge by; below DIR, for a
    study that takes --data."""

    name: str  # of its figures, and the begin of its runs' names
    config: str
    data: Callable[[Path | None], Parts]
    seeds: int
    selection_seeds: int
    eval_interval: int
    minutes: float  # of a run, as long as none was timed
    stages: tuple[Stage, ...]
    common: tuple[str, ...] = ()
    retrain: bool = False
    scores: tuple[str, ...] = ()
    until: float | None = None


# --- Data -------------------------------------------------------------------------------------------------------------


def hold_out(train_dir: Path, group: Callable[[str], str] = str) -> tuple[Path, Path]:
    """The training folder split once more, every fifth image (of a class) held out, or every fifth group of images that
    belong together: two folders. group: of a file's name."""
    parts = [ROOT / f"holdout_{'_'.join(train_dir.parts).strip('/_')}_{part}" for part in ("train", "eval")]
    for held, part in enumerate(parts):

        def others(folder: str, names: list[str], held: int = held) -> list[str]:
            below = Path(folder) != train_dir
            places = {key: i for i, key in enumerate(sorted({group(name) for name in names}))}
            return [name for name in names if below and (places[group(name)] % 5 == 0) != held]

        shutil.copytree(train_dir, part, ignore=others, dirs_exist_ok=True)
        annotations = part / "annotations.json"
        if annotations.exists():
            coco = json.loads(annotations.read_text())
            images = [row for row in coco["images"] if (part / "images" / row["file_name"]).exists()]
            kept = {row["id"] for row in images}
            rows = [row for row in coco["annotations"] if row["image_id"] in kept]
            annotations.write_text(json.dumps(coco | {"images": images, "annotations": rows}))
    return parts[0], parts[1]


def folders(train: str, evaluation: str, group: Callable[[str], str] = str) -> Callable[[Path | None], Parts]:
    """The parts of two folders, below the one that the command line names if it names one. group: see `hold_out`."""

    def parts(base: Path | None) -> Parts:
        whole, judged = (base or Path()) / train, (base or Path()) / evaluation
        return whole, *hold_out(whole, group), judged

    return parts


def micrograph(tile: str) -> str:
    """The micrograph that a tile, <micrograph>_<y>_<x>.png, was cut from: neighbours look alike."""
    return tile.partition("_")[0]


def long_tail(base: Path | None) -> Parts:
    """The digits as if each were rarer than the one before, the last 20 times rarer than the first. Of data/train every
    fifth image of a class is held out; of the others the first are trained on, as many as the class is frequent. The
    hold-out and data/eval keep all their scans, each as often as its class is frequent: no class is judged by two or
    three scans."""
    source = Path("data/train"), Path("data/eval")
    parts = [ROOT / f"long_tail_{name}" for name in ("train", "holdout", "eval")]
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
    for k in range(10):
        share = LONG_TAIL ** (-k / 9)
        scans, judged = (sorted((folder / str(k)).glob("*.png")) for folder in source)
        held, rest = scans[::5], [scan for i, scan in enumerate(scans) if i % 5]
        copies = round(LONG_TAIL * share)
        for part, chosen, times in zip(parts, (rest[: round(100 * share)], held, judged), (1, copies, copies)):
            (part / str(k)).mkdir(parents=True)
            for scan in chosen:
                for i in range(times):
                    shutil.copy(scan, part / str(k) / f"{scan.stem}_{i}.png")
    return parts[0], parts[0], parts[1], parts[2]


# --- Studies ----------------------------------------------------------------------------------------------------------


def rates(*values: float, **others: list[str]) -> Methods:
    """Settings: each learning rate, with each of the other overrides if there are some."""
    plain = {f"{rate:g}": [f"training.learning_rate={rate:g}"] for rate in values}
    if not others:
        return plain
    return {f"{rate} {name}": [*a, *b] for rate, a in plain.items() for name, b in others.items()}


def with_label(methods: Methods) -> Methods:
    """The methods, and each with 0.3 times the label's loss."""
    return methods | {f"{name} + label": [*method, "training.label_coef=0.3"] for name, method in methods.items()}


LABEL = ["training.objective=supervised"]
NO_BONUS = "training.entropy_coef=0"
CHEQUE = "examples/cheque_reward.py:cheque_reward"
MAXRL_ALL = ["rollout.advantage=maxrl", "rollout.action=all"]
QUALITY = {"accuracy": "eval accuracy", "nll": "NLL", "ece": "ECE"}
CHOSEN = {"supervised": "0.001", "maxrl": "0.002", "maxrl_all": "0.002"}  # by docs/results.md's first table
SUBSET = {"small": ["model.dropout=0.1", "training.entropy_coef=0.03"]}
SUBSET |= {"large": ["model.dropout=0.5", "training.entropy_coef=0.3"]}
DOUBT = {
    f"dropout {dropout} entropy {entropy}": [f"model.dropout={dropout}", f"training.entropy_coef={entropy}"]
    for dropout, entropy in ((0.5, 0.3), (0.5, 0.1), (0.5, 0.03), (0.7, 0.3), (0.7, 0.1))
}
IOU_CREDIT = ["rollout.reward=mask_iou_credit", "rollout.log_values=false", "training.entropy_coef=0.5"]
LOG_IOU = ["rollout.reward=mean_iou", "rollout.log_values=true", NO_BONUS]
PIXELS = {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy"}
DIGITS = folders("data/train", "data/eval")


def tuned_by_score(score: str, heading: str) -> Stage:
    """On the long-tailed digits: going on by the label, by the score, by its logarithm, and by score and label."""
    by_score = [f"rollout.reward={score}", "rollout.action=all"]
    methods = {
        "label": LABEL,
        score: by_score,
        f"log {score}": [*by_score, "rollout.log_values=true"],
        f"{score} + label": [*by_score, "training.label_coef=0.3"],
    }
    steps = {name: [*method, "training.steps=300"] for name, method in methods.items()}
    columns = {score: heading, "accuracy": "accuracy"}
    return Stage(f"long-tail-{score}", steps, rates(1e-3, **DOUBT), columns, "label", paired="label")


def masks(name: str, data: Callable) -> Study:
    """Masks from scratch, and tuned from the label's checkpoints for half as many steps."""
    methods = {
        "label": [*LABEL, NO_BONUS],
        "mask_iou_credit": IOU_CREDIT,
        "log mean_iou": LOG_IOU,
        "log mean_iou + label": [*LOG_IOU, "training.label_coef=0.3"],
    }
    tuning = {method: [*keys, "training.steps=300"] for method, keys in methods.items()}
    scratch = Stage(name, methods, rates(4e-3, 8e-3), PIXELS, paired="label")
    tuned = Stage(f"{name}-tuned", tuning, rates(2e-3, 4e-3), PIXELS, start="label", paired="label")
    return Study(name, "config_segmentation.yaml", data, 3, 1, 600, 3, (scratch, tuned), scores=("mean_iou",))


BY_REWARD = ["rollout.reward=detection_reward", "training.label_coef=0"]
BY_BOXES = {
    "label": [*LABEL, "detection.supervised_loss=iou"],
    "detection_reward": [*BY_REWARD, "rollout.actions_per_sample=64"],
    "detection_reward, all": [*BY_REWARD, "rollout.action=all", "rollout.actions_per_sample=8"],
    "detection_set_credit + label": ["rollout.reward=detection_set_credit", "training.label_coef=0.3"],
}
TUNED_BOXES = {name: BY_BOXES[name] for name in ("label", "detection_reward", "detection_set_credit + label")} | {
    "label by log_prob": [*LABEL, "detection.supervised_loss=log_prob"],
    "detection_set_credit": ["rollout.reward=detection_set_credit", "training.label_coef=0"],
}
BOXES = {"map": "mAP@[.5:.95]", "ap50": "AP50", "ap75": "AP75", "f1": "F1@0.5", "mean_f1": "F1, mean of classes"}
STUDIES = {
    "digits": Study(
        "digits", "config_digits.yaml", DIGITS, 5, 2, 25, 3, retrain=True,
        stages=(
            Stage(
                "results",
                {"supervised": LABEL}
                | {name: [f"rollout.advantage={name}"] for name in ("grpo", "rloo", "maxrl")}
                | {"argmax": ["rollout.action=argmax", "rollout.advantage=grpo"]},
                rates(5e-4, 1e-3, 2e-3), QUALITY, ratio="supervised", whole=True,
            ),
            Stage(
                "cost",
                {
                    "label": [*LABEL, "training.steps=500"],
                    "cost": [f"rollout.reward={CHEQUE}", "rollout.advantage=rloo", "training.entropy_coef=0.03",
                             "training.steps=500"],
                },
                rates(5e-4, 1e-3, 2e-3), {"cost": "mean cost", "accuracy": "eval accuracy"}, start="supervised",
                whole=True,
            ),
        ),
    ),
    "all-actions": Study(
        "digits", "config_digits.yaml", DIGITS, 5, 2, 25, 3, retrain=True,
        stages=(
            Stage(
                "all-actions", {"maxrl": ["rollout.advantage=maxrl"], "maxrl_all": MAXRL_ALL},
                rates(5e-4, 1e-3, 2e-3), QUALITY, only=CHOSEN, ratio="maxrl",
                paired="maxrl",
            ),
        ),
    ),
    "time": Study(
        "time", "config_digits.yaml", DIGITS, 15, 2, 5, 1.5, retrain=True, until=0.95,
        common=("training.log_interval=5",),
        stages=(
            Stage(
                "time", {"supervised": LABEL, "maxrl_all": MAXRL_ALL}, rates(5e-4, 1e-3, 2e-3),
                {"step": "steps"}, only=CHOSEN, ratio="supervised",
            ),
        ),
    ),
    "long-tail": Study(
        "long-tail", "config_digits.yaml", long_tail, 5, 2, 300, 1.5, common=("training.steps=600",),
        scores=("balanced_accuracy", "macro_f1"),
        stages=(
            Stage("long-tail", {"label": LABEL}, rates(1e-3, **SUBSET),
                  {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1", "accuracy": "accuracy"}),
            tuned_by_score("balanced_accuracy", "balanced accuracy"),
            tuned_by_score("macro_f1", "macro-F1"),
        ),
    ),
    "masks-noisy": masks("masks-noisy", folders("data/scenes/noisy_train", "data/scenes/noisy_eval")),
    "masks-clear": masks("masks-clear", folders("data/scenes/train", "data/scenes/eval")),
    "micrographs": Study(
        "micrographs", "config_segmentation.yaml", folders("train", "eval", micrograph), 3, 1, 500, 15,
        scores=("mean_iou",),
        common=("model.image_size=128", "model.patch_size=8", "data.augment={flip: hv, rotate90: true}",
                "training.batch_size=16", "training.steps=1500"),
        stages=(
            Stage(
                "micrographs",
                {"label": [*LABEL, NO_BONUS]} | with_label({"log mean_iou": LOG_IOU}),
                rates(2e-3, 4e-3), PIXELS, paired="label",
            ),
        ),
    ),
    "boxes": Study(
        "boxes", "config_detection.yaml", folders("data/scenes/train", "data/scenes/eval"), 3, 1, 500, 8,
        scores=("f1",),
        stages=(
            Stage("boxes-fitted", BY_BOXES, rates(4e-3, 8e-3), BOXES, paired="label"),
            Stage(
                "boxes-fitted-tuned",
                {name: [*keys, "training.steps=600", "detection.box_std=0.1"] for name, keys in TUNED_BOXES.items()},
                rates(1e-3, 2e-3), BOXES, start="label", paired="label",
            ),
        ),
    ),
}  # fmt: skip
