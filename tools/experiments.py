"""Compares what learns, over seeds, on the bundled digits and on the scenes made of them.

    uv run tools/experiments.py                # the digits: about half an hour on 2 cores
    uv run tools/experiments.py segmentation   # masks, after uv run data/make_scenes.py: about twenty minutes
    uv run tools/experiments.py detection      # boxes, after the same: an hour and a half

Every run is `train.py` with the task's shipped config and overrides: same model, T, dropout and steps for all. The
learning rate of each method is chosen from one grid on a hold-out of the training set (every fifth image); metrics are
those of the last step. What is done already is not run again. Writes the results into docs/results.md, between its
markers, and for the digits assets/learning_curves.png.
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
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HOME), str(HOME / "examples")]

import torch
from cheque_reward import cheque_cost
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from build import build_model, configure
from checkpoint import load_checkpoint
from config import flatten, read_yaml
from evaluation import evaluate, load_pyplot
from images import ordered_batches

RESULTS = HOME / "docs" / "results.md"
ROOT = Path("experiments")
Methods = dict[str, list[str]]  # name -> the overrides of the config that make it


@dataclass(frozen=True)
class Study:
    """Methods from scratch, and what tunes the checkpoint that `start`, one of them, leaves, over seeds. columns: of a
    table, metric -> heading; the first metric chooses the learning rates."""

    name: str  # the config is config_NAME.yaml
    seeds: int
    selection_seeds: int
    eval_interval: int
    rates: tuple[float, ...]
    tuning_rates: tuple[float, ...]
    tuning_steps: int
    start: str
    methods: Methods
    tuning: Methods
    columns: dict[str, str]
    tuning_columns: dict[str, str]
    markers: tuple[str, str]  # the tables' places in docs/results.md


LABEL = ["training.objective=supervised"]
NO_BONUS = "training.entropy_coef=0"
CHEQUE = "examples/cheque_reward.py:cheque_reward"
MASKS = {"mean_iou": "mean IoU", "iou/digit": "IoU of the digits", "pixel_accuracy": "pixel accuracy"}
BOXES = {"map": "mAP@[.5:.95]", "ap50": "AP50", "ap75": "AP75", "f1": "F1@0.5"}
STUDIES = {
    "digits": Study(
        "digits", 5, 2, 25, (5e-4, 1e-3, 2e-3), (5e-4, 1e-3, 2e-3), 500, "supervised",
        methods={"supervised": LABEL}
        | {name: [f"rollout.advantage={name}"] for name in ("grpo", "rloo", "maxrl")}
        | {"argmax": ["rollout.action=argmax", "rollout.advantage=grpo"]},
        tuning={
            "label": LABEL,
            "cost": [f"rollout.reward={CHEQUE}", "rollout.advantage=rloo", "training.entropy_coef=0.03"],
        },
        columns={"accuracy": "eval accuracy", "nll": "NLL", "ece": "ECE"},
        tuning_columns={"cost": "mean cost", "accuracy": "eval accuracy"}, markers=("results", "cost"),
    ),
    "segmentation": Study(
        "segmentation", 3, 1, 100, (2e-3, 4e-3, 8e-3), (1e-3, 2e-3, 4e-3), 300, "supervised",
        methods={"supervised": [*LABEL, NO_BONUS], "mask_iou_credit": []},
        tuning={
            "label": [*LABEL, NO_BONUS],
            "mask_iou_credit": [],
            "mask_iou_credit+pixel_reward": ["rollout.reward={mask_iou_credit: 0.3, pixel_reward: 1}", NO_BONUS],
        },
        columns=MASKS, tuning_columns=MASKS, markers=("masks", "masks-tuned"),
    ),
    "detection": Study(
        "detection", 3, 1, 500, (2e-3, 4e-3, 8e-3), (1e-3, 2e-3, 4e-3), 500, "supervised-log_prob",
        methods={
            "supervised-log_prob": [*LABEL, NO_BONUS, "detection.supervised_loss=log_prob"],
            "supervised-iou": [*LABEL, NO_BONUS, "detection.supervised_loss=iou"],
            "supervised-iou-entropy": LABEL,  # with the reward's entropy bonus
            "detection_reward": [],
        },
        tuning={  # box_std=0.1 makes the label worse: mAP 0.43 for 0.45 on the hold-out
            "label": [*LABEL, NO_BONUS, "detection.supervised_loss=log_prob"],
            "detection_reward": ["detection.box_std=0.1"],  # as narrow as at the end of the run it goes on from
        },
        columns=BOXES, tuning_columns=BOXES, markers=("boxes", "boxes-tuned"),
    ),
}  # fmt: skip


def hold_out(train_dir: Path) -> list[str]:
    """The training folder split once more, every fifth image (of a class) to evaluate on; the overrides that use it."""
    parts = [ROOT / f"holdout_{'_'.join(train_dir.parts)}_{part}" for part in ("train", "eval")]
    for held, part in enumerate(parts):

        def others(folder: str, names: list[str], held: int = held) -> list[str]:
            below = Path(folder) != train_dir
            return [name for i, name in enumerate(sorted(names)) if below and (i % 5 == 0) != held]

        shutil.copytree(train_dir, part, ignore=others, dirs_exist_ok=True)
        annotations = part / "annotations.json"
        if annotations.exists():
            coco = json.loads(annotations.read_text())
            images = [row for row in coco["images"] if (part / "images" / row["file_name"]).exists()]
            kept = {row["id"] for row in images}
            rows = [row for row in coco["annotations"] if row["image_id"] in kept]
            annotations.write_text(json.dumps(coco | {"images": images, "annotations": rows}))
    return [f"data.train_dir={parts[0]}", f"data.eval_dir={parts[1]}"]


def mean_cost(checkpoint: Path) -> float:
    """Mean cheque cost of the deterministic network's argmax over its eval images."""
    state = load_checkpoint(checkpoint)
    config, task = configure((str(checkpoint), flatten(state["config"], str(checkpoint))))
    model = build_model(task, len(state["classes"]), torch.device("cpu"))
    model.load_state_dict(state["model"])
    dataset = task.open(config["data"]["eval_dir"], state["classes"])
    deterministic, _, targets, _ = evaluate(task, task.network(model), ordered_batches(dataset, 64), dataset).columns()
    return float(cheque_cost(deterministic.argmax(-1), targets).mean())


def run(study: Study, name: str, overrides: list[str]) -> dict:
    """Train on one thread unless done before; the metrics of the last step, the curve and the wall-clock seconds."""
    result = ROOT / f"{name}.json"
    if result.exists():
        return json.loads(result.read_text())
    for folder in (ROOT / "ckpt" / name, ROOT / "logs" / name):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off: its wall-clock would mean nothing
    command = [sys.executable, "train.py", "--config", f"config_{study.name}.yaml", *overrides]
    command += [f"training.ckpt_dir={ROOT}/ckpt", f"training.log_dir={ROOT}/logs", f"training.run_name={name}"]
    command += [f"training.eval_interval={study.eval_interval}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    events, metric = EventAccumulator(str(ROOT / "logs" / name)).Reload(), next(iter(study.columns))
    begin = events.Scalars("reward/mean")[0].wall_time  # of step 1: start-up does not count
    keys = [tag.removeprefix("eval/") for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
    metrics = {key: events.Scalars(f"eval/{key}")[-1].value for key in keys}
    if "cost" in study.tuning_columns:
        metrics["cost"] = mean_cost(ROOT / "ckpt" / name)
    curve = [(p.step, p.wall_time - begin, p.value) for p in events.Scalars(f"eval/{metric}")]
    metrics |= {"seconds": curve[-1][1], "curve": curve}
    result.write_text(json.dumps(metrics))
    print(f"{name}: {metric} {metrics[metric]:.4f}, {metrics['seconds']:.0f} s", flush=True)
    return metrics


def run_all(study: Study, methods: Methods, rates: dict[str, tuple], start: float | None, split: list[str]) -> dict:
    """Each method at each of its learning rates, over the seeds: (method, rate) -> the results. As many runs at a time
    as there are cores, each on one thread. start: the rate of the run of `study.start` that is tuned, if one is. split:
    the overrides of the hold-out, if it is used."""
    jobs, seeds = {}, range(study.selection_seeds if split else study.seeds)

    def run_name(method: str, rate: float, seed: int) -> str:
        name = method if study.name == "digits" else f"{study.name}-{method}"
        return f"holdout-{name}-{rate}-{seed}" if split else f"{name}-{seed}"

    for seed, method in itertools.product(seeds, methods):
        for rate in rates[method]:
            overrides = [*methods[method], *split, f"training.learning_rate={rate}", f"training.seed={seed}"]
            if start:
                overrides += [f"model.checkpoint_path={ROOT}/ckpt/{run_name(study.start, start, seed)}/last.pt"]
                overrides += [f"training.steps={study.tuning_steps}"]
            jobs[method, rate, seed] = run_name(f"tuned-{method}" if start else method, rate, seed), overrides
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(jobs, pool.map(lambda job: run(study, *job), jobs.values())))
    return {(m, rate): [results[m, rate, seed] for seed in seeds] for m in methods for rate in rates[m]}


def run_best(study: Study, methods: Methods, grid: tuple, metric: str, start: float | None = None) -> tuple[dict, dict]:
    """Each method's learning rate with the best mean metric on the hold-out, and its results with that on the whole
    training set. start: as for `run_all`."""
    split = hold_out(Path(read_yaml(f"config_{study.name}.yaml")["data.train_dir"]))
    sign = -1 if metric == "cost" else 1
    tried = run_all(study, methods, dict.fromkeys(methods, grid), start, split)
    means = {key: sign * statistics.mean(result[metric] for result in results) for key, results in tried.items()}
    rates = {method: max(grid, key=lambda rate, m=method: means[m, rate]) for method in methods}
    results = run_all(study, methods, {method: (rate,) for method, rate in rates.items()}, start, [])
    return rates, {method: results[method, rate] for method, rate in rates.items()}


def compare(study: Study) -> dict[str, list[dict]]:
    """All runs of a study, and its two tables; returns the results from scratch."""
    rates, results = run_best(study, study.methods, study.rates, next(iter(study.columns)))
    write_between(RESULTS, study.markers[0], table(rates, results, study.columns, times=study.name == "digits"))
    start, first = rates[study.start], f"{study.start}, where all start"
    rates, tuned = run_best(study, study.tuning, study.tuning_rates, next(iter(study.tuning_columns)), start)
    rows = {first: results[study.start]} | tuned
    write_between(RESULTS, study.markers[1], table(rates | {first: start}, rows, study.tuning_columns))
    return results


def seconds_to(accuracy: float, result: dict) -> float:
    """Wall-clock until the first evaluation with that accuracy, infinite if there is none."""
    return next((seconds for _, seconds, value in result["curve"] if value >= accuracy), math.inf)


def table(rates: dict[str, float], results: dict[str, list[dict]], columns: dict[str, str], times: bool = False) -> str:
    """Mean and standard deviation over the seeds, in markdown. times: also those of a run and to an accuracy of 0.95,
    as median ratios to the supervised run of the same seed, which ran at about the same moment (the machine's speed
    drifts)."""
    heads = [*columns.values()] + ["time ÷ supervised", "time to 0.95 ÷ supervised"] * times
    lines = [f"| trained by | learning rate | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for method, runs in results.items():
        values = [[run[key] for run in runs] for key in columns]
        cells = [f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for v in values]
        if times:
            pairs = list(zip(runs, results["supervised"]))
            reached = statistics.median(seconds_to(0.95, run) / seconds_to(0.95, other) for run, other in pairs)
            cells += [f"{statistics.median(run['seconds'] / other['seconds'] for run, other in pairs):.2f}"]
            cells += [f"{reached:.2f}" if math.isfinite(reached) else "never"]
        lines.append(f"| {method} | {rates[method]:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(results: dict[str, list[dict]], path: Path) -> None:
    """Eval accuracy over steps: mean over the seeds, and their range."""
    figure, axes = load_pyplot().subplots(figsize=(7, 4), layout="constrained")
    for method, runs in results.items():
        steps = [step for step, _, _ in runs[0]["curve"]]
        columns = list(zip(*[[value for _, _, value in result["curve"]] for result in runs]))
        axes.plot(steps, [statistics.mean(column) for column in columns], label=method)
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15)
    axes.set(xlabel="step", ylabel="eval accuracy", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def write_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands in `path` between <!-- marker --> and <!-- /marker -->."""
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {marker} -->")
    after = rest.split(f"<!-- /{marker} -->")[1]
    path.write_text(f"{before}<!-- {marker} -->\n{text}\n<!-- /{marker} -->{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", default="digits", choices=STUDIES)
    study = STUDIES[parser.parse_args().study]
    ROOT.mkdir(exist_ok=True)
    results = compare(study)
    if study.name == "digits":
        draw_curves(results, HOME / "assets" / "learning_curves.png")


if __name__ == "__main__":
    main()
