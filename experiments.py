"""Compares what learns on the bundled digits, over five seeds: supervised, `grpo`, `rloo`, `maxrl`, argmax actions; and
then label against reward where mistakes differ in cost.

    uv run experiments.py             # about half an hour on 2 cores; what is done already is not run again

Every run is `train.py --config config_digits.yaml` with overrides: same model, T, dropout and steps. The learning rate
of each method is chosen from one grid on a hold-out of data/train (every fifth image of a class, two seeds); figures
are those of the last step. Writes the results into README.md, between its markers, and learning_curves.png.
"""

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from checkpoint import load_checkpoint
from train import build_model, evaluate
from vision_task import VisionClassificationDataset, ordered_batches

ROOT = Path("experiments")
SEEDS = range(5)
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
SELECTION_SEEDS = range(2)
METHODS = {
    "supervised": ["training.objective=supervised"],
    "grpo": ["rollout.advantage=grpo"],
    "rloo": ["rollout.advantage=rloo"],
    "maxrl": ["rollout.advantage=maxrl"],
    "argmax": ["rollout.action=argmax", "rollout.advantage=grpo"],
}
TUNING_STEPS = 500
TUNING_METHODS = {  # both start from the supervised run of the same seed
    "label": ["training.objective=supervised"],
    "cost": ["rollout.reward=experiments.py:cheque_reward", "rollout.advantage=rloo", "training.entropy_coef=0.03"],
}


def cheque_cost(predicted: Tensor, targets: Tensor) -> Tensor:
    """What a misread digit of a cheque costs: 10 if read too high (we pay too much), 1 if read too low (they ask)."""
    return 10.0 * (predicted > targets) + 1.0 * (predicted < targets)


def cheque_reward(actions: Tensor, outputs: Tensor, targets: Tensor, metadata: dict) -> Tensor:
    """actions: [B, T, A] class ids; targets: [B]; returns [B, T, A] in [0, 1], as `maxrl` wants no negative reward."""
    return 1 - cheque_cost(actions, targets[:, None, None]) / 10


# --- One run ----------------------------------------------------------------------------------------------------------


def hold_out() -> list[str]:
    """data/train split once more, every fifth image of a class to evaluate on; the overrides that use it."""
    for folder in sorted(Path("data/train").iterdir()):
        for i, image in enumerate(sorted(folder.iterdir())):
            target = ROOT / ("holdout_eval" if i % 5 == 0 else "holdout_train") / folder.name / image.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target)
    return [f"data.train_dir={ROOT}/holdout_train", f"data.eval_dir={ROOT}/holdout_eval"]


def mean_cost(checkpoint: Path) -> float:
    """Mean cheque cost of the deterministic network's argmax over its eval images."""
    state = load_checkpoint(checkpoint)
    config = state["config"]
    model = build_model(config, len(state["classes"]), torch.device("cpu"))
    model.load_state_dict(state["model"])
    dataset = VisionClassificationDataset(config["data"]["eval_dir"], config["model"]["image_size"], state["classes"])
    evaluation = evaluate(model, ordered_batches(dataset, 64), dataset, config, torch.device("cpu"))
    deterministic, _, targets = evaluation.columns()
    return float(cheque_cost(deterministic.argmax(-1), targets).mean())


def run(job: tuple[str, list[str]]) -> dict:
    """Train on one thread unless done before; the figures of the last step, the curve and the wall-clock seconds."""
    name, overrides = job
    result = ROOT / f"{name}.json"
    if result.exists():
        return json.loads(result.read_text())
    for folder in (ROOT / "ckpt" / name, ROOT / "logs" / name):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off: its wall-clock would mean nothing
    command = [sys.executable, "train.py", "--config", "config_digits.yaml", *overrides, f"training.run_name={name}"]
    command += [f"training.ckpt_dir={ROOT}/ckpt", f"training.log_dir={ROOT}/logs", "training.eval_interval=25"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    events = EventAccumulator(str(ROOT / "logs" / name)).Reload()
    begin = events.Scalars("reward/mean")[0].wall_time  # of step 1: start-up does not count
    curve = [(point.step, point.wall_time - begin, point.value) for point in events.Scalars("eval/accuracy")]
    figures = {key: events.Scalars(f"eval/{key}")[-1].value for key in ("accuracy", "nll", "ece")}
    figures |= {"seconds": curve[-1][1], "curve": curve, "cost": mean_cost(ROOT / "ckpt" / name)}
    result.write_text(json.dumps(figures))
    print(
        f"{name}: accuracy {figures['accuracy']:.4f} cost {figures['cost']:.3f}, {figures['seconds']:.0f} s", flush=True
    )
    return figures


def run_all(jobs: dict[tuple, tuple[str, list[str]]]) -> dict[tuple, dict]:
    """All jobs, as many at a time as there are cores, each on one thread."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(run, jobs.values())))


# --- All runs ---------------------------------------------------------------------------------------------------------


def choose_rates(methods: dict[str, list[str]], figure: str, sign: int, start: str | None = None) -> dict[str, float]:
    """The learning rate of each method with the best mean `figure` on the hold-out; sign 1: the highest is best."""
    split, jobs = hold_out(), {}
    for seed, rate, method in itertools.product(SELECTION_SEEDS, LEARNING_RATES, methods):
        overrides = [*methods[method], *split, f"training.learning_rate={rate}", f"training.seed={seed}"]
        jobs[method, rate, seed] = f"holdout-{method}-{rate}-{seed}", overrides + start_from(start, seed)
    results = run_all(jobs)

    def score(method: str, rate: float) -> float:
        return sign * statistics.mean(results[method, rate, seed][figure] for seed in SELECTION_SEEDS)

    return {method: max(LEARNING_RATES, key=lambda rate, m=method: score(m, rate)) for method in methods}


def run_seeds(
    methods: dict[str, list[str]], rates: dict[str, float], start: str | None = None
) -> dict[str, list[dict]]:
    """Each method over the seeds on all of data/train: its results, one per seed."""
    jobs = {}
    for seed, method in itertools.product(SEEDS, methods):
        overrides = [*methods[method], f"training.learning_rate={rates[method]}", f"training.seed={seed}"]
        jobs[method, seed] = f"{method}-{seed}", overrides + start_from(start, seed)
    results = run_all(jobs)
    return {method: [results[method, seed] for seed in SEEDS] for method in methods}


def start_from(run_name: str | None, seed: int) -> list[str]:
    """The overrides that go on from the last checkpoint of an earlier run of the same seed."""
    if run_name is None:
        return []
    return [f"model.checkpoint_path={ROOT}/ckpt/{run_name}-{seed}/last.pt", f"training.steps={TUNING_STEPS}"]


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


def main() -> None:
    ROOT.mkdir(exist_ok=True)
    rates = choose_rates(METHODS, "accuracy", 1)
    results = run_seeds(METHODS, rates)
    draw_curves(results, "learning_curves.png")
    write_between(Path("README.md"), "results", table(rates, results))

    tuning_rates = choose_rates(TUNING_METHODS, "cost", -1, start=f"holdout-supervised-{rates['supervised']}")
    tuning = {"supervised, where both start": results["supervised"]}
    tuning |= run_seeds(TUNING_METHODS, tuning_rates, start="supervised")
    lines = ["| trained by | learning rate | mean cost | eval accuracy |", "|---|---|---|---|"]
    for method, runs in tuning.items():
        rate = tuning_rates.get(method, rates["supervised"])
        lines.append(f"| {method} | {rate:g} | {mean_std(runs, 'cost')} | {mean_std(runs, 'accuracy')} |")
    write_between(Path("README.md"), "cost", "\n".join(lines))


if __name__ == "__main__":
    main()
