"""Compares what learns, over seeds, on the bundled digits and on the scenes made of them.

    uv run experiments.py                # the digits: about half an hour on 2 cores
    uv run experiments.py segmentation   # the scenes' masks (first: uv run data/make_scenes.py), about twenty minutes
    uv run experiments.py detection      # the scenes' boxes, an hour and a half

Every run is `train.py` with the task's shipped config and overrides: same model, T, dropout and steps for all. The
learning rate of each method is chosen from one grid on a hold-out of the training set (every fifth image); figures are
those of the last step. What is done already is not run again. Writes the results into README.md, between its markers,
and for the digits learning_curves.png.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from checkpoint import load_checkpoint
from config import read_yaml
from train import build_model, evaluate
from vision_task import VisionClassificationDataset, ordered_batches

ROOT = Path("experiments")


@dataclass(frozen=True)
class Study:
    """One data set with its config. prefix: of the runs' names. figure: the eval figure that is compared; sign: 1 if
    high is good, -1 if low."""

    config: str
    prefix: str
    figure: str
    sign: int
    seeds: range
    selection_seeds: range
    rates: tuple[float, ...]
    eval_interval: int


DIGITS = Study("config_digits.yaml", "", "accuracy", 1, range(5), range(2), (5e-4, 1e-3, 2e-3), 25)
METHODS = {
    "supervised": ["training.objective=supervised"],
    "grpo": ["rollout.advantage=grpo"],
    "rloo": ["rollout.advantage=rloo"],
    "maxrl": ["rollout.advantage=maxrl"],
    "argmax": ["rollout.action=argmax", "rollout.advantage=grpo"],
}
COST = Study("config_digits.yaml", "", "cost", -1, range(5), range(2), (5e-4, 1e-3, 2e-3), 25)
TUNING_METHODS = {  # both start from the supervised run of the same seed
    "label": ["training.objective=supervised"],
    "cost": ["rollout.reward=experiments.py:cheque_reward", "rollout.advantage=rloo", "training.entropy_coef=0.03"],
}
COST_STEPS = 500

MASKS = Study("config_segmentation.yaml", "segmentation-", "mean_iou", 1, range(3), range(1), (2e-3, 4e-3, 8e-3), 100)
MASK_METHODS = {
    "supervised": ["training.objective=supervised", "training.entropy_coef=0"],
    "mask_iou_credit": [],
}
MASK_TUNING = {
    "label": MASK_METHODS["supervised"],
    "mask_iou_credit": [],
    "mask_iou_credit+pixel_reward": [
        "rollout.reward={mask_iou_credit: 300, pixel_reward: 1}",
        "training.entropy_coef=0",
    ],
}
MASK_STEPS = 300
TUNING_RATES = (1e-3, 2e-3, 4e-3)

BOXES = Study("config_detection.yaml", "detection-", "map", 1, range(3), range(1), (2e-3, 4e-3, 8e-3), 500)
BOX_METHODS = {
    f"supervised-{loss}": [
        "training.objective=supervised",
        "training.entropy_coef=0",
        f"detection.supervised_loss={loss}",
    ]
    for loss in ("log_prob", "iou")
} | {
    "supervised-iou-entropy": ["training.objective=supervised"],  # the reward's entropy bonus, for the label too
    "detection_reward": [],
}
BOX_TUNING = {
    "label": BOX_METHODS["supervised-log_prob"],  # box_std=0.1 makes it worse: mAP 0.43 for 0.45 on the hold-out
    "detection_reward": ["detection.box_std=0.1"],  # as narrow as at the end of the run it goes on from
}
BOX_STEPS = 500


def cheque_cost(predicted: Tensor, targets: Tensor) -> Tensor:
    """What a misread digit of a cheque costs: 10 if read too high (we pay too much), 1 if read too low (they ask)."""
    return 10.0 * (predicted > targets) + 1.0 * (predicted < targets)


def cheque_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """actions: [B, T, A] class ids; targets: [B]; returns [B, T, A] in [0, 1], as `maxrl` wants no negative reward."""
    return 1 - cheque_cost(actions, targets[:, None, None]) / 10


# --- One run ----------------------------------------------------------------------------------------------------------


def hold_out(train_dir: Path) -> list[str]:
    """The training folder split once more, every fifth image (of a class) to evaluate on; the overrides that use it."""
    target = [ROOT / f"holdout_{'_'.join(train_dir.parts)}_{part}" for part in ("train", "eval")]
    place = {}  # file stem -> which part
    for folder in sorted(path for path in train_dir.iterdir() if path.is_dir()):
        for i, image in enumerate(sorted(folder.iterdir())):
            part = place[image.name] = int(i % 5 == 0)
            copy = target[part] / folder.name / image.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, copy)
    for part in range(2):
        if (train_dir / "classes.txt").exists():
            shutil.copyfile(train_dir / "classes.txt", target[part] / "classes.txt")
        if (train_dir / "annotations.json").exists():
            coco = json.loads((train_dir / "annotations.json").read_text())
            images = [row for row in coco["images"] if place[row["file_name"]] == part]
            kept = {row["id"] for row in images}
            rows = [row for row in coco["annotations"] if row["image_id"] in kept]
            (target[part] / "annotations.json").write_text(json.dumps(coco | {"images": images, "annotations": rows}))
    return [f"data.train_dir={target[0]}", f"data.eval_dir={target[1]}"]


def mean_cost(checkpoint: Path) -> float:
    """Mean cheque cost of the deterministic network's argmax over its eval images."""
    state = load_checkpoint(checkpoint)
    config = state["config"]
    model = build_model(config, len(state["classes"]), torch.device("cpu"))
    model.load_state_dict(state["model"])
    dataset = VisionClassificationDataset(config["data"]["eval_dir"], config["model"]["image_size"], state["classes"])
    evaluation = evaluate(model, ordered_batches(dataset, 64), dataset, config, torch.device("cpu"))
    deterministic, _, targets, _ = evaluation.columns()
    return float(cheque_cost(deterministic.argmax(-1), targets).mean())


def run(study: Study, name: str, overrides: list[str]) -> dict:
    """Train on one thread unless done before; the figures of the last step, the curve and the wall-clock seconds."""
    result = ROOT / f"{name}.json"
    if result.exists():
        return json.loads(result.read_text())
    for folder in (ROOT / "ckpt" / name, ROOT / "logs" / name):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off: its wall-clock would mean nothing
    command = [sys.executable, "train.py", "--config", study.config, *overrides, f"training.run_name={name}"]
    command += [f"training.ckpt_dir={ROOT}/ckpt", f"training.log_dir={ROOT}/logs"]
    command += [f"training.eval_interval={study.eval_interval}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    events = EventAccumulator(str(ROOT / "logs" / name)).Reload()
    begin = events.Scalars("reward/mean")[0].wall_time  # of step 1: start-up does not count
    keys = [tag.removeprefix("eval/") for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
    figures = {key: events.Scalars(f"eval/{key}")[-1].value for key in keys}
    if "accuracy" in figures:
        figures["cost"] = mean_cost(ROOT / "ckpt" / name)
    tag = "eval/accuracy" if study.figure == "cost" else f"eval/{study.figure}"
    curve = [(point.step, point.wall_time - begin, point.value) for point in events.Scalars(tag)]
    figures |= {"seconds": curve[-1][1], "curve": curve}
    result.write_text(json.dumps(figures))
    print(f"{name}: {study.figure} {figures[study.figure]:.4f}, {figures['seconds']:.0f} s", flush=True)
    return figures


def run_all(study: Study, jobs: dict[tuple, tuple[str, list[str]]]) -> dict[tuple, dict]:
    """All jobs, (name, overrides), as many at a time as there are cores, each on one thread."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(lambda job: run(study, *job), jobs.values())))


# --- All runs ---------------------------------------------------------------------------------------------------------


def choose_rates(
    study: Study, methods: dict[str, list[str]], start: str | None = None, steps: int | None = None
) -> dict[str, float]:
    """The learning rate of each method with the best mean figure on the hold-out."""
    split, jobs = hold_out(Path(read_yaml(study.config)["data.train_dir"])), {}
    for seed, rate, method in itertools.product(study.selection_seeds, study.rates, methods):
        overrides = [*methods[method], *split, f"training.learning_rate={rate}", f"training.seed={seed}"]
        name = f"holdout-{study.prefix}{method}-{rate}-{seed}"
        jobs[method, rate, seed] = name, overrides + start_from(start, seed, steps)
    results = run_all(study, jobs)

    def score(method: str, rate: float) -> float:
        return study.sign * statistics.mean(results[method, rate, s][study.figure] for s in study.selection_seeds)

    return {method: max(study.rates, key=lambda rate, m=method: score(m, rate)) for method in methods}


def run_seeds(
    study: Study,
    methods: dict[str, list[str]],
    rates: dict[str, float],
    start: str | None = None,
    steps: int | None = None,
) -> dict[str, list[dict]]:
    """Each method over the seeds on the whole training set: its results, one per seed."""
    jobs = {}
    for seed, method in itertools.product(study.seeds, methods):
        overrides = [*methods[method], f"training.learning_rate={rates[method]}", f"training.seed={seed}"]
        jobs[method, seed] = f"{study.prefix}{method}-{seed}", overrides + start_from(start, seed, steps)
    results = run_all(study, jobs)
    return {method: [results[method, seed] for seed in study.seeds] for method in methods}


def start_from(run_name: str | None, seed: int, steps: int | None) -> list[str]:
    """The overrides that go on for some steps from the last checkpoint of an earlier run of the same seed."""
    if run_name is None:
        return []
    return [f"model.checkpoint_path={ROOT}/ckpt/{run_name}-{seed}/last.pt", f"training.steps={steps}"]


def mean_std(results: list[dict], key: str) -> str:
    values = [result[key] for result in results]
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def seconds_to(accuracy: float, result: dict) -> float:
    """Wall-clock until the first evaluation with that accuracy, infinite if there is none."""
    return next((seconds for _, seconds, value in result["curve"] if value >= accuracy), math.inf)


def table(rates: dict[str, float], results: dict[str, list[dict]]) -> str:
    """Accuracy, NLL, ECE, time of a run and time to 0.95: a markdown table. A time is the median ratio to the
    supervised run of the same seed, which ran at about the same moment (the machine's speed drifts)."""
    lines = [
        "| what learns | learning rate | eval accuracy | NLL | ECE | time ÷ supervised | time to 0.95 ÷ supervised |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in results.items():
        pairs = list(zip(runs, results["supervised"]))
        whole = statistics.median(run["seconds"] / other["seconds"] for run, other in pairs)
        reached = statistics.median(seconds_to(0.95, run) / seconds_to(0.95, other) for run, other in pairs)
        lines.append(
            f"| {method} | {rates[method]:g} | {mean_std(runs, 'accuracy')} | {mean_std(runs, 'nll')} | "
            f"{mean_std(runs, 'ece')} | {whole:.2f} | "
            f"{f'{reached:.2f}' if math.isfinite(reached) else 'never'} |"
        )
    return "\n".join(lines)


def draw_curves(results: dict[str, list[dict]], path: str) -> None:
    """Eval accuracy over steps: mean over the seeds, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for method, runs in results.items():
        steps = [step for step, _, _ in runs[0]["curve"]]
        columns = list(zip(*[[value for _, _, value in result["curve"]] for result in runs]))
        axes.plot(steps, [statistics.mean(column) for column in columns], label=method)
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15)
    axes.set(xlabel="step", ylabel="eval accuracy", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands in `path` between <!-- marker --> and <!-- /marker -->."""
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {marker} -->")
    after = rest.split(f"<!-- /{marker} -->")[1]
    path.write_text(f"{before}<!-- {marker} -->\n{text}\n<!-- /{marker} -->{after}", encoding="utf-8")


def digits() -> None:
    """The tables of the digits, the learning curves, and label against cost."""
    rates = choose_rates(DIGITS, METHODS)
    results = run_seeds(DIGITS, METHODS, rates)
    draw_curves(results, "learning_curves.png")
    write_between(Path("README.md"), "results", table(rates, results))
    start = f"holdout-supervised-{rates['supervised']}"
    tuning_rates = choose_rates(COST, TUNING_METHODS, start, COST_STEPS)
    tuning = {"supervised, where both start": results["supervised"]}
    tuning |= run_seeds(COST, TUNING_METHODS, tuning_rates, "supervised", COST_STEPS)
    columns = {"cost": "mean cost", "accuracy": "eval accuracy"}
    rates |= tuning_rates | {"supervised, where both start": rates["supervised"]}
    write_between(Path("README.md"), "cost", figures_table(rates, tuning, columns))


def figures_table(rates: dict[str, float], results: dict[str, list[dict]], columns: dict[str, str]) -> str:
    """Mean and standard deviation over the seeds; columns: figure -> its heading."""
    lines = [f"| trained by | learning rate | {' | '.join(columns.values())} |", "|---" * (2 + len(columns)) + "|"]
    for method, runs in results.items():
        figures = " | ".join(mean_std(runs, key) for key in columns)
        lines.append(f"| {method} | {rates[method]:g} | {figures} |")
    return "\n".join(lines)


def scenes(
    study: Study,
    methods: dict[str, list[str]],
    tuning_methods: dict[str, list[str]],
    start: str,
    steps: int,
    columns: dict[str, str],
    marker: str,
) -> None:
    """Methods from scratch, then tuning the checkpoints of method `start` for `steps` further steps."""
    rates = choose_rates(study, methods)
    results = run_seeds(study, methods, rates)
    write_between(Path("README.md"), marker, figures_table(rates, results, columns))
    held = f"holdout-{study.prefix}{start}-{rates[start]}"
    tuned = {f"tuned-{name}": overrides for name, overrides in tuning_methods.items()}
    tuning_rates = choose_rates(replace(study, rates=TUNING_RATES), tuned, held, steps)
    tuning = run_seeds(study, tuned, tuning_rates, f"{study.prefix}{start}", steps)
    rows = {f"{start}, where all start": results[start]}
    rows |= {name.removeprefix("tuned-"): runs for name, runs in tuning.items()}
    rates = {f"{start}, where all start": rates[start]}
    rates |= {name.removeprefix("tuned-"): rate for name, rate in tuning_rates.items()}
    write_between(Path("README.md"), f"{marker}-tuned", figures_table(rates, rows, columns))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="experiments.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", default="digits", choices=("digits", "segmentation", "detection"))
    study = parser.parse_args().study
    ROOT.mkdir(exist_ok=True)
    if study == "digits":
        digits()
    elif study == "segmentation":
        columns = {"mean_iou": "mean IoU", "iou/digit": "IoU of the digits", "pixel_accuracy": "pixel accuracy"}
        scenes(MASKS, MASK_METHODS, MASK_TUNING, "supervised", MASK_STEPS, columns, "masks")
    else:
        columns = {"map": "mAP@[.5:.95]", "ap50": "AP50", "ap75": "AP75", "f1": "F1@0.5"}
        scenes(BOXES, BOX_METHODS, BOX_TUNING, "supervised-log_prob", BOX_STEPS, columns, "boxes")


if __name__ == "__main__":
    main()
