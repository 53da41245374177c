"""Compares what learns, over seeds; the studies are those of studies.py.

    uv run tools/experiments.py                   # the digits
    uv run tools/experiments.py boxes             # after uv run data/make_scenes.py
    uv run tools/experiments.py --minutes 60      # as far as an hour goes; the same command goes on
    uv run tools/experiments.py --tables          # the tables of all studies again, without a run

Every run is `train.py` with the study's shipped config and overrides: same model, T, dropout and steps for all, one
thread. The settings of each method are chosen from one list on a hold-out of the training set, every fifth image, never
on the evaluation set. The figures of finished runs are kept in docs/figures.json: such a run is not run again, and one
that was stopped goes on. The tables of docs/results.md and for the digits assets/learning_curves.png are made of the
figures alone. Times are CPU seconds of training steps, without evaluations.
"""

import argparse
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HOME), str(HOME / "examples"), str(HOME / "tools")]

import numpy as np
import torch
from cheque_reward import cheque_cost
from studies import ROOT, STUDIES, Parts, Stage, Study
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import predict
from build import build_model, configure
from checkpoint import load_checkpoint
from config import flatten
from detection_task import mean_f1
from evaluation import evaluate, load_pyplot
from images import BadImages, ordered_batches
from scores import RewardEvaluation

RESULTS, FIGURES = HOME / "docs" / "results.md", HOME / "docs" / "figures.json"
LEVEL = 0.95  # the accuracy to which the time is told
# train.py with a clock that counts the process's CPU seconds: others on the machine change them less
TRAIN = "import runpy, time; time.perf_counter = time.process_time; runpy.run_path('train.py', run_name='__main__')"

# --- The figures of runs ----------------------------------------------------------------------------------------------


def mean_cost(checkpoint: Path) -> float:
    """Mean cheque cost of the deterministic network's argmax over its eval images."""
    state = load_checkpoint(checkpoint)
    config, task = configure((str(checkpoint), flatten(state["config"], str(checkpoint))))
    model = build_model(task, len(state["classes"]), torch.device("cpu"))
    model.load_state_dict(state["model"])
    dataset = task.open(config["data"]["eval_dir"], state["classes"])
    deterministic, _, targets, _ = evaluate(task, task.network(model), ordered_batches(dataset, 64), dataset).columns()
    return float(cheque_cost(deterministic.argmax(-1), targets).mean())


def decided(checkpoint: Path, score: str, hold_out: Path, judged: Path) -> dict[str, float]:
    """The metrics of a folder, and the score there by argmax and (`score, decided`) by what is fitted on the hold-out;
    both on the hold-out too (`holdout/…`). score: a score of the confusion matrix, or f1, of boxes: the mean over the
    classes from a detection's score of 0.5, or of fitted ones, on."""
    boxes = score == "f1"
    args = argparse.Namespace(
        checkpoint=str(checkpoint), fit=str(hold_out), decide="reward", reward=None if boxes else score
    )
    args.task, args.passes, args.batch_size = None, None, 100
    if predict.fit(args):
        raise SystemExit(f"{checkpoint}: could not be fitted on {hold_out}")
    network, task, classes, digest = predict.open_checkpoint(args)
    rewards, decider = predict.open_decision(args, task, digest)
    fitted = predict.load_decision(predict.decision_path(checkpoint), digest, list(predict.load_rewards(task)))
    dataset = task.open(str(judged), classes)
    evaluation, judge = task.evaluation(dataset), RewardEvaluation(task, rewards, decider)
    for batch in predict.batches_of(args, task, dataset, BadImages(len(dataset), predict.complain)):
        outputs, outputs_mc = network(batch.inputs, passes=False), network(batch.inputs)
        evaluation.add(batch, outputs, outputs_mc)
        judge.add(batch, outputs, outputs_mc)
    metrics = judge.metrics()
    if boxes:
        pair = [mean_f1(evaluation.curves(), thresholds) for thresholds in ({}, task.thresholds)]
    else:
        pair = [metrics["eval/reward_argmax"], metrics["eval/reward"]]
    score = "mean_f1" if boxes else score
    found = {key.removeprefix("eval/"): x for key, x in evaluation.metrics().items() if key.startswith("eval/")}
    found |= {score: pair[0], f"{score}, decided": pair[1]}
    return found | {f"holdout/{score}": fitted.score[0], f"holdout/{score}, decided": fitted.score[1]}


def read_events(folder: Path) -> dict:
    """Of a run's TensorBoard events the metrics of the last evaluation, and CPU seconds of training: of all steps, and
    at each evaluation, `curve`: (step, seconds, the first metric)."""
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
    metrics = {tag.removeprefix("eval/"): events.Scalars(tag)[-1].value for tag in tags if "/reward" not in tag}
    speeds, batch_size = events.Scalars("speed/images_per_second"), 64  # ratios of times alone are shown
    steps = [0] + [point.step for point in speeds]
    seconds = np.cumsum([0] + [(b - a) * batch_size / point.value for a, b, point in zip(steps, steps[1:], speeds)])
    points = events.Scalars(tags[0])  # float32: 0.95 would be a little less
    curve = [(p.step, round(float(np.interp(p.step, steps, seconds)), 2), round(p.value, 6)) for p in points]
    return metrics | {"seconds": float(seconds[-1]), "curve": curve}


def machine() -> str:
    """The processor, and how many cores."""
    try:
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


class Figures:
    """docs/figures.json: study -> method -> setting -> seed -> the metrics of a finished run."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.kept: dict = json.loads(path.read_text()) if path.exists() else {}

    def get(self, *keys: str) -> dict | None:
        found = self.kept
        for key in keys:
            found = found.get(key, {})
        return found or None

    def add(self, metrics: dict, *keys: str) -> None:
        """Keeps the metrics of a run, and writes the file anew, a run a line."""

        def lines(node: dict, indent: str) -> str:
            if "date" in node:
                return json.dumps(node)
            inner = [f"{indent} {json.dumps(key)}: {lines(node[key], indent + ' ')}" for key in sorted(node)]
            return "{\n" + ",\n".join(inner) + f"\n{indent}}}"

        with self.lock:
            inner = self.kept
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            inner[keys[-1]] = metrics
            part = self.path.with_suffix(".part")
            part.write_text(lines(self.kept, "") + "\n")
            part.replace(self.path)


def commit() -> str:
    """Of the code, with a + where the scripts or configs differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=HOME).stdout.strip()

    changed = git("diff", "HEAD", "--name-only", "--", ":(glob)*.py", ":(glob)*.yaml", ":(glob)examples/*.py")
    return (git("rev-parse", "--short", "HEAD") or "?") + "+" * bool(changed)


# --- Runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of a stage. held: on four fifths of the training set, to choose a setting of a study that trains on all
    of it. start: the run it goes on from."""

    study: Study
    stage: Stage
    method: str
    setting: str
    seed: int
    held: bool
    start: "Run | None" = None

    @property
    def keys(self) -> tuple[str, str, str, str]:
        """Where its figures are kept."""
        study = f"{self.study.name}, hold-out" if self.held else self.study.name
        return study, f"tuned {self.method}" if self.start else self.method, self.setting, str(self.seed)

    @property
    def name(self) -> str:
        return "-".join(re.sub(r"[^\w.]+", "_", key) for key in self.keys)

    def overrides(self, parts: Parts) -> list[str]:
        whole, train, hold_out, judged = parts
        on_all = self.study.retrain and not self.held
        data = [f"data.train_dir={whole if on_all else train}", f"data.eval_dir={judged if on_all else hold_out}"]
        data += [] if self.study.retrain else ["data.num_workers=0"]
        start = [f"model.checkpoint_path={ROOT}/ckpt/{self.start.name}/last.pt"] if self.start else []
        own = [*self.study.common, *self.stage.methods[self.method], *self.stage.settings[self.setting]]
        return [*data, *own, f"training.seed={self.seed}", *start]


class Runner:
    """Runs what has no figures yet, until `deadline` (of time.monotonic), `jobs` at a time; 0 runs nothing. base: the
    folder of --data."""

    def __init__(self, figures: Figures, jobs: int = 0, deadline: float = math.inf, base: Path | None = None):
        self.figures, self.jobs, self.deadline, self.base = figures, jobs, deadline, base
        self.left: dict[tuple, float] = {}  # what was not run -> the minutes it may take
        self.parts: dict[str, Parts] = {}
        self.alone = threading.RLock()  # predictions draw from the process's random state

    def minutes(self, study: Study) -> float:
        """What a run of the study takes about."""
        methods = self.figures.kept.get(study.name, {}).values()
        known = [run["minutes"] for settings in methods for runs in settings.values() for run in runs.values()]
        return statistics.median(known) if known else study.minutes

    def run_all(self, runs: list[Run]) -> dict[Run, dict | None]:
        """The figures of each run, None where there was no time for it."""
        if not self.jobs:
            return dict(zip(runs, map(self.run, runs)))
        with ThreadPoolExecutor(self.jobs) as pool:
            return dict(zip(runs, pool.map(self.run, runs)))

    def run(self, run: Run) -> dict | None:
        found = self.figures.get(*run.keys)
        if found:
            return found
        minutes = self.minutes(run.study)
        if not self.jobs or time.monotonic() + 60 * minutes > self.deadline:
            self.left[run.keys] = minutes
            return None
        begin = time.monotonic()
        with self.alone:
            if run.study.name not in self.parts:
                self.parts[run.study.name] = run.study.data(self.base)
            if run.start and not (ROOT / "ckpt" / run.start.name / "last.pt").exists():
                self.train(run.start)  # its figures are kept, but it was run on another machine
        if not self.train(run):
            self.left[run.keys] = minutes
            return None
        metrics = self.judge(run)
        metrics = {key: round(x, 5) if isinstance(x, float) else x for key, x in metrics.items() if "ap/" not in key}
        shown = " ".join(f"{key} {x:g}" for key, x in metrics.items() if isinstance(x, float))
        about = {"minutes": round((time.monotonic() - begin) / 60, 2), "machine": machine()}
        self.figures.add(metrics | about | {"date": time.strftime("%Y-%m-%d"), "commit": commit()}, *run.keys)
        print(f"{run.name}: {shown}", flush=True)
        return self.figures.get(*run.keys)

    def train(self, run: Run) -> bool:
        """train.py to the end of a run, or until it is as good as it should be; one that was stopped goes on. Whether
        it went well."""
        command = [sys.executable, "-c", TRAIN, "--config", run.study.config, "--resume", "auto"]
        command += [*run.overrides(self.parts[run.study.name]), f"training.eval_interval={run.study.eval_interval}"]
        command += [f"training.ckpt_dir={ROOT}/ckpt", f"training.log_dir={ROOT}/logs", f"training.run_name={run.name}"]
        until, environment = run.study.until, os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stdout:
                value = re.match(r"step \d+: \w+ ([\d.]+)", line)
                if until and value and float(value[1]) >= until:
                    process.terminate()  # it saves a checkpoint; a second signal would end it at once
                    until = None
        stopped = 128 + signal.SIGTERM if run.study.until else 0
        if process.returncode not in (0, stopped):
            print(f"{run.name}: train.py ended with {process.returncode}", flush=True)
        return process.returncode in (0, stopped)

    def judge(self, run: Run) -> dict:
        """The figures of a run that is trained; those on the hold-out as holdout/…"""
        folder, study = ROOT / "ckpt" / run.name, run.study
        metrics = read_events(ROOT / "logs" / run.name)
        curve, seconds = metrics.pop("curve"), metrics.pop("seconds")
        if study.until:
            reached = next((point for point in curve if point[2] >= study.until), (math.inf, math.inf))
            return {"step": reached[0], "seconds": reached[1]}
        if study.name == "digits":
            metrics |= {"curve": [(step, at, round(value, 4)) for step, at, value in curve], "cost": mean_cost(folder)}
        if not study.retrain:
            metrics = {f"holdout/{key}": value for key, value in metrics.items()}
        with self.alone:
            for score in study.scores:
                metrics |= decided(folder, score, *self.parts[study.name][2:])
        return metrics | {"seconds": seconds}


# --- Choices ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Of a table: a method, by argmax or as its reward decides, with the setting that is best so; and its runs."""

    method: str
    decided: bool
    setting: str
    runs: dict[int, dict]  # by seed

    @property
    def name(self) -> str:
        return f"{self.method}, decided" if self.decided else self.method


def value_of(run: dict, key: str, decided: bool) -> float | None:
    """A figure of a run; None if decisions do not change it, or it was not taken."""
    return run.get(f"{key}, decided" if decided else key)


def figures_of(row: Row, key: str, seeds: list[int]) -> list[float | None]:
    return [value_of(row.runs[seed], key, row.decided) for seed in seeds]


def make_run(study: Study, stage: Stage, started: str | None, method: str, setting: str, seed: int, held: bool) -> Run:
    """started: the setting of the run of the first stage that it goes on from, if the stage tunes."""
    start = Run(study, study.stages[0], stage.start, started, seed, held) if stage.start else None
    return Run(study, stage, method, setting, seed, held, start)


def compare(runner: Runner, study: Study) -> dict[str, list[Row]]:
    """All runs of a study for which there is time: the rows of each table, by its marker."""
    tables: dict[str, list[Row]] = {}
    chosen: dict[str, str] = {}  # the setting of each method of the first stage
    for stage in study.stages:
        if stage.start and stage.start not in chosen:
            runs = len(stage.methods) * (len(stage.settings) * study.selection_seeds + study.seeds)
            runner.left[study.name, stage.marker] = runs * runner.minutes(study)
            continue

        job = partial(make_run, study, stage, chosen.get(stage.start))
        settings = choose(runner, study, stage, job)
        chosen |= {method: setting for (method, by), setting in settings.items() if not (by or stage.start)}
        wanted = {(method, setting) for (method, _), setting in settings.items()}
        jobs = {(*key, seed): job(*key, seed, False) for seed in range(study.seeds) for key in sorted(wanted)}
        found = runner.run_all(list(jobs.values()))
        begun = [row for row in tables.get(study.stages[0].marker, []) if row.method == stage.start]
        tables[stage.marker] = [replace(row, method=f"{row.method}, where all start") for row in begun]
        for (method, by), setting in settings.items():
            runs = {seed: found[jobs[method, setting, seed]] for seed in range(study.seeds)}
            kept = {seed: run for seed, run in runs.items() if run}
            tables[stage.marker].append(Row(method, by, setting, kept))
    return tables


def choose(runner: Runner, study: Study, stage: Stage, job: Callable) -> dict[tuple[str, bool], str]:
    """Of each method, by argmax and as decided, the setting with the best mean on the hold-out; without those whose
    runs are not all there."""
    metric = next(iter(stage.columns))
    prefix, sign = "" if study.retrain else "holdout/", -1 if metric == "cost" else 1
    only, ways = stage.only or {}, (False, True) if study.scores else (False,)
    jobs = {
        (method, setting): [job(method, setting, seed, study.retrain) for seed in range(study.selection_seeds)]
        for method, setting in itertools.product(stage.methods, stage.settings)
        if method not in only
    }
    found = runner.run_all([run for runs in jobs.values() for run in runs])
    best = {(method, by): only[method] for method in stage.methods if method in only for by in ways}
    for method in stage.methods:
        tried = {setting: [found[run] for run in runs] for (of, setting), runs in jobs.items() if of == method}
        if not tried:
            continue
        if not all(all(runs) for runs in tried.values()):
            later = study.seeds - (0 if study.retrain else study.selection_seeds)
            runner.left[study.name, stage.marker, method] = later * runner.minutes(study)
            continue
        for by in ways:
            key = prefix + metric  # boxes' mAP is the same as decided
            values = {
                setting: [run.get(f"{key}, decided", run[key]) if by else run[key] for run in runs]
                for setting, runs in tried.items()
            }
            best[method, by] = max(values, key=lambda setting, v=values: sign * statistics.mean(v[setting]))
    return best


# --- Tables -----------------------------------------------------------------------------------------------------------


def seconds_to(accuracy: float, run: dict) -> float:
    """CPU seconds of training until the first evaluation with that accuracy, infinite if there is none."""
    return next((seconds for _, seconds, value in run["curve"] if value >= accuracy), math.inf)


def ratios(run_pairs: list[tuple[dict, dict]], seconds: Callable[[dict], float]) -> str:
    """Median and quartiles of the ratios of times."""
    values = [seconds(a) / seconds(b) for a, b in run_pairs]
    if not math.isfinite(statistics.median(values)):
        return "never"
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def table(stage: Stage, rows: list[Row], num_seeds: int) -> str | None:
    """In markdown, over the seeds that all rows have: mean and standard deviation, differences to `stage.paired`, plain
    and decided, with their standard error, and times as ratios to `stage.ratio`. None where runs are missing."""
    seeds = [seed for seed in range(num_seeds) if all(seed in row.runs for row in rows)]
    missing = set(stage.methods) - {row.method for row in rows}
    if missing or len(seeds) < (num_seeds if stage.whole else 2):
        return None
    metric, plain = next(iter(stage.columns)), {row.method: row for row in rows if not row.decided}
    heads = list(stage.columns.values())
    rivals = [row for row in rows if row.method == stage.paired and None not in figures_of(row, metric, seeds)]
    heads += [f"{stage.columns[metric]} − that of {row.name}" for row in rivals]
    curves = stage.ratio and all("curve" in row.runs[seed] for row in rows for seed in seeds)
    heads += [f"time ÷ {stage.ratio}"] * bool(stage.ratio) + [f"time to {LEVEL} ÷ {stage.ratio}"] * bool(curves)
    lines = [] if len(seeds) == num_seeds else [f"So far {len(seeds)} of {num_seeds} seeds:", ""]
    lines += [f"| trained by | setting | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for row in rows:
        runs, cells = [row.runs[seed] for seed in seeds], []
        for key in stage.columns:
            values = figures_of(row, key, seeds)
            known = None not in values
            cells.append(f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" if known else "")
        for rival in rivals:
            both = zip(figures_of(row, metric, seeds), figures_of(rival, metric, seeds))
            gains = [a - b for a, b in both if a is not None]
            error = statistics.stdev(gains) / len(gains) ** 0.5 if gains else 0
            cells.append(f"{statistics.mean(gains):+.4f} ± {error:.4f}" if any(gains) else "")
        if stage.ratio:
            pairs = [(run, plain[stage.ratio].runs[seed]) for run, seed in zip(runs, seeds)]
            cells.append(ratios(pairs, lambda run: run["seconds"]))
            cells += [ratios(pairs, lambda run: seconds_to(LEVEL, run))] if curves else []
        lines.append(f"| {row.name} | {row.setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(rows: list[Row], path: Path) -> None:
    """Eval accuracy over steps: mean over the seeds, and their range."""
    figure, axes = load_pyplot().subplots(figsize=(7, 4), layout="constrained")
    for row in rows:
        runs = list(row.runs.values())
        steps = [step for step, _, _ in runs[0]["curve"]]
        columns = list(zip(*[[value for _, _, value in run["curve"]] for run in runs]))
        axes.plot(steps, [statistics.mean(column) for column in columns], label=row.method)
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15)
    axes.set(xlabel="step", ylabel="eval accuracy", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def write_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands in `path` between <!-- marker --> and <!-- /marker -->, if it is there."""
    before, found, rest = path.read_text(encoding="utf-8").partition(f"<!-- {marker} -->")
    if not found:
        print(f"{path}: no <!-- {marker} --> for\n{text}")
        return
    after = rest.split(f"<!-- /{marker} -->")[1]
    path.write_text(f"{before}<!-- {marker} -->\n{text}\n<!-- /{marker} -->{after}", encoding="utf-8")


def write_tables(study: Study, tables: dict[str, list[Row]]) -> None:
    """The tables of a study for which there are runs enough, and the digits' chart."""
    for stage in study.stages:
        rows = tables.get(stage.marker, [])
        text = table(stage, rows, study.seeds)
        if text:
            write_between(RESULTS, stage.marker, text)
        if text and stage.marker == "results":
            draw_curves(rows, HOME / "assets" / "learning_curves.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", default="digits", choices=STUDIES)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run that would end after so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (as many as there are cores)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="micrographs: the folder with train/ and eval/")
    parser.add_argument("--tables", action="store_true", help="only write the tables, of all studies")
    args = parser.parse_args()
    os.chdir(HOME)
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * args.minutes
    runner = Runner(Figures(FIGURES), 0 if args.tables else args.jobs, deadline, args.data)
    for name in STUDIES if args.tables else [args.study]:
        runner.left.clear()
        write_tables(STUDIES[name], compare(runner, STUDIES[name]))
        if runner.left:
            hours = sum(runner.left.values()) / 60
            print(f"{name}: about {hours:.1f} hours of runs are left; tools/experiments.py {name} goes on")


if __name__ == "__main__":
    main()
