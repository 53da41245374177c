"""Ten scores on photographs, a pretrained ViT: by the label, by its best trick, by reward; cells.py has what is tried.

    uv run tools/photographs.py cifar10 --data DIR --start vits14.pth --search   # settings, chosen by held-out folds
    uv run tools/photographs.py cifar10 --data DIR --start vits14.pth            # the runs of the table
    uv run tools/photographs.py cifar10 --data DIR --start vits14.pth --training "quadratic kappa"  # is it overfitted?
    uv run tools/photographs.py --tables                                         # tables and chart again, without a run

DIR has train/ and eval/. `membrane` and `blood-cells` likewise. With --minutes 60 nothing is begun that would end
later; the same command goes on. Model f of five is trained without fold f of DIR/train, and its predictions for fold f
choose settings and fit decisions: those of all models together, so that each image is predicted by a model that was not
trained on it. DIR/eval judges, and chooses nothing. Half of the steps are by the label, the same for all columns, half
by a column's own method. Runs and predictions are in experiments/; docs/photographs.json keeps what the tables need.
"""

import argparse
import math
import os
import re
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HOME), str(HOME / "tools")]

import numpy as np
import torch
from cells import DATA_SETS, FOLDS, LABEL_COEF, DataSet, Score, make_folds
from experiments import RESULTS, Figures, Runner, commit, machine, write_between
from judging import PASSES, Found, pool, resample
from studies import ROOT
from torch.utils.tensorboard import SummaryWriter

from build import build_model, configure, layer_of, open_set
from checkpoint import load_checkpoint
from config import flatten
from evaluation import draw_sheet, load_pyplot
from grpo import keyed_rng
from images import ordered_batches, prepare
from token_cache import CHUNK, kept_blocks

FIGURES, README, CHART = HOME / "docs" / "photographs.json", HOME / "README.md", HOME / "assets" / "photographs.png"
RESAMPLES, UNIT = 1000, 1e-4  # of the evaluation images; what the kept scores of resamples are counted in
LABEL_DECIDED, LABEL_TRICK = "label + decision", "label + its best trick"
BY_REWARD = ("reward", "reward + decision", "label and reward", "label and reward + decision")
NOT_YET = "Not run yet."

# --- Runs -------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where the data set and the weights that all start from are."""

    data: Path
    weights: Path


@dataclass(frozen=True)
class Run:
    """The second half of a model's steps, or without `start` the first. prefix: of the names of a second run of it."""

    study: DataSet
    method: str
    setting: str
    fold: int
    start: "Run | None" = None
    prefix: str = ""

    @property
    def keys(self) -> tuple[str, str, str, str]:
        return self.study.name, self.method, self.tried, str(self.fold)

    @property
    def tried(self) -> str:
        return f"{self.setting} from {self.start.setting}" if self.start else self.setting

    @property
    def name(self) -> str:
        return self.prefix + "-".join(re.sub(r"[^\w.]+", "_", key) for key in self.keys)

    def overrides(self, source: Source) -> list[str]:
        study = self.study
        keys = study.methods()[self.method if self.start else "label"]
        keys = [*study.common, *keys, *(study.tried(self.method) if self.start else study.starts)[self.setting]]
        keys += [f"data.train_dir={folds_of(study)}/{self.fold}/train", f"training.steps={study.steps}"]
        begin = f"{ROOT}/ckpt/{self.start.name}/last.pt" if self.start else source.weights
        keys += [f"training.seed={self.fold}", f"model.checkpoint_path={begin}"]
        return keys


def folds_of(study: DataSet) -> Path:
    return ROOT / "folds" / study.name


class Runs(Runner):
    """Of a finished run what was trained, and its predictions, are kept in experiments/; `figures` has that it is
    finished."""

    def __init__(self, figures: Figures, source: Source, jobs: int = 0, deadline: float = math.inf):
        super().__init__(figures, jobs, deadline, source)
        self.opened: dict[str, tuple] = {}  # a folder's data set, its batches with the tokens that leave frozen blocks

    def run(self, run: Run) -> dict | None:
        if self.jobs:
            with self.alone:
                self.prepare(run)
                self.parts[run.study.name] = self.base
        return super().run(run)

    def prepare(self, run: Run) -> None:
        """Makes the folders that a run needs."""
        make_folds(self.base.data / "train", folds_of(run.study), run.study.unit)

    def folder(self, run: Run, part: str) -> Path:
        """What a run predicts."""
        return self.base.data / "eval" if part == "eval" else folds_of(run.study) / str(run.fold) / part

    def judge(self, run: Run) -> dict:
        """Keeps what a run has trained and its predictions for the held-out fold; its checkpoint goes, if nothing
        starts from it."""
        state = load_checkpoint(ROOT / "ckpt" / run.name)
        sizes = state["config"]["model"]
        same = kept_blocks(sizes, state["config"]["training"]["freeze_blocks"])  # of a head alone the last block too
        names = [name for name in state["model"] if layer_of(name, sizes["depth"]) > same]
        trunk, kept = self.trunk(run.study), {name: state["model"].pop(name) for name in names}
        with self.alone:
            if not trunk.exists():
                save({"model": state["model"]}, trunk)
        if not all(torch.equal(x, state["model"][name]) for name, x in load(trunk)["model"].items()):
            raise SystemExit(f"{trunk}: of other weights than --start; delete {ROOT}/, or give the former ones")
        save({"model": kept} | {key: state[key] for key in ("config", "classes")}, self.path("models", run))
        self.predictions(run, "held")
        for folder in ("ckpt", "logs") if run.start else ():
            shutil.rmtree(ROOT / folder / run.name)
        return {}

    def trunk(self, study: DataSet) -> Path:
        return ROOT / "models" / f"trunk-{study.name}.pt"

    def path(self, folder: str, run: Run, part: str = "") -> Path:
        return ROOT / folder / f"{run.name}{part and '-'}{part}.pt"

    @torch.no_grad()
    def outputs(self, run: Run, part: str):
        """task, data set and, batch for batch, the outputs [B, T, …] for a part: held or eval. The passes are PASSES
        functions, drawn from the run's seed, the same for every image."""
        state, trunk = load(self.path("models", run)), load(self.trunk(run.study))
        _, task = configure(("checkpoint", flatten(state["config"], "checkpoint")))
        model = build_model(task, len(state["classes"]), torch.device("cpu"))
        model.load_state_dict(trunk["model"] | state["model"])
        blocks = kept_blocks(task.config["model"], task.config["training"]["freeze_blocks"])
        folder = str(self.folder(run, part))
        with self.alone:
            if folder not in self.opened:
                dataset, batches, data = open_set(task, folder, state["classes"]), [], task.config["data"]
                for batch in ordered_batches(dataset, CHUNK):
                    batches.append((batch, model.trunk(prepare(batch.inputs, data["mean"], data["std"]), blocks)))
                self.opened[folder] = dataset, batches
            dataset, batches = self.opened[folder]
            with keyed_rng(run.fold, "predict"):
                masks = model.sample_masks(1, PASSES)

        def stream():
            for batch, tokens in batches:
                own = {name: mask.expand(len(batch), -1, -1, -1) for name, mask in masks.items()}
                with torch.no_grad():
                    yield batch, task.arrange(model(tokens, own, start=blocks))

        return task, dataset, stream()

    def predict_all(self, runs: list[Run], part: str) -> None:
        """Their predictions are kept; `jobs` at a time."""
        with ThreadPoolExecutor(self.jobs) as threads:
            list(threads.map(lambda run: self.predictions(run, part), runs))

    def predictions(self, run: Run, part: str) -> Found:
        path = self.path("predictions", run, part)
        if not path.exists():
            task, dataset, stream = self.outputs(run, part)
            found = pool([run.study.predictions(task, dataset, *row) for row in stream])
            _, unit = np.unique([run.study.unit(name) for name in dataset.paths], return_inverse=True)
            save(found | {"unit": torch.from_numpy(unit)}, path)
        return load(path)


def save(value: dict, path: Path) -> None:
    """A file under its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, unfinished := path.with_suffix(".part"))
    unfinished.replace(path)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


# --- Search -----------------------------------------------------------------------------------------------------------


def held_values(study: DataSet, method: str, parts: list[Found]) -> dict[str, list[float]]:
    """By each score that judges a method: of all held-out predictions by argmax, and as decided by a fit on the folds
    but the one that is decided."""
    scores = study.judged_by(method) if method != "start" else study.scores[:1]
    return {s.name: [round(s.judge.value(pool(parts)), 5), round(s.judge.cross_fitted(parts), 5)] for s in scores}


def search(runner: Runs, figures: Figures, study: DataSet) -> None:
    """Runs each method at each setting, as far as there is time."""
    runs = {("start", setting): start_runs(study, setting)[: len(study.searched)] for setting in study.starts}
    search_these(runner, figures, study, runs)
    start = chosen_start(figures, study)
    if not start:
        return
    tried = [(method, setting) for method in study.methods() for setting in study.tried(method)]
    runs = {key: [runs_of(study, *key, start)[fold] for fold in study.searched] for key in tried}
    search_these(runner, figures, study, runs)


def search_these(runner: Runs, figures: Figures, study: DataSet, runs: dict[tuple[str, str], list[Run]]) -> None:
    """runs: of the folds that choose, by method and setting."""
    wanted = {key: mine for key, mine in runs.items() if not figures.get(study.name, "search", key[0], mine[0].tried)}
    found = runner.run_all([run for mine in wanted.values() for run in mine])
    for (method, _), mine in wanted.items():
        if all(found[run] for run in mine):
            values = held_values(study, method, [runner.predictions(run, "held") for run in mine])
            minutes = round(sum(found[run]["minutes"] for run in mine), 2)
            record = {"held": values, "folds": len(mine), "minutes": minutes} | about()
            figures.add(record, study.name, "search", method, mine[0].tried)


def about() -> dict[str, str]:
    return {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "commit": commit()}


def start_runs(study: DataSet, setting: str) -> list[Run]:
    return [Run(study, "start", setting, fold) for fold in range(FOLDS)]


def runs_of(study: DataSet, method: str, setting: str, start: str) -> list[Run]:
    """Of all folds."""
    return [Run(study, method, setting, begun.fold, begun) for begun in start_runs(study, start)]


# --- Choices ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Of the table: the method and setting that the held-out folds chose for a score and a column, and their score
    there."""

    study: DataSet
    score: Score
    column: str
    method: str
    setting: str
    start: str
    decided: bool
    held: float

    @property
    def runs(self) -> list[Run]:
        return runs_of(self.study, self.method, self.setting, self.start)

    @property
    def keys(self) -> tuple[str, str, str, str]:
        """Where its figures are kept."""
        tried = f"{self.method}, {self.runs[0].tried}"
        return self.study.name, self.score.name, tried, "decided" if self.decided else "argmax"

    @property
    def words(self) -> str:
        return self.method.partition(":")[0] + ", decided" * self.decided


def chosen_start(figures: Figures, study: DataSet) -> str | None:
    """The setting of the first half that is best by the first score; None before all are tried."""
    found = {setting: figures.get(study.name, "search", "start", setting) for setting in study.starts}
    if not all(found.values()):
        return None
    return max(found, key=lambda setting: found[setting]["held"][study.scores[0].name][0])


def choose(figures: Figures, study: DataSet, score: Score) -> dict[str, Cell]:
    """The cells of a row, without those for which not all is tried."""
    start, reward = chosen_start(figures, study), f"reward: {score.name}"
    by_label, ways = list(study.by_label()), (False, True) if score.judge.decides else (False,)
    columns = {"label": (["label"], (False,)), LABEL_DECIDED: (["label"], ways[1:]), LABEL_TRICK: (by_label, ways)}
    for column, method in (("reward", reward), ("label and reward", f"label and {reward}")):
        columns |= {column: ([method], (False,)), f"{column} + decision": ([method], ways[1:])}
    cells = {}
    for column, (methods, decided) in columns.items():
        tried = [(method, setting) for method in methods for setting in study.tried(method)]
        found = [figures.get(study.name, "search", m, Run(study, m, s, 0, start_runs(study, start)[0]).tried)
                 for m, s in tried] if start else [None]  # fmt: skip
        if all(found) and decided:
            values = {(*key, by): run["held"][score.name][by] for key, run in zip(tried, found) for by in decided}
            method, setting, by = max(values, key=values.get)
            cells[column] = Cell(study, score, column, method, setting, start, by, values[method, setting, by])
    return cells


def best_by_reward(cells: dict[str, Cell], columns: tuple[str, ...] = BY_REWARD) -> Cell | None:
    """The best by the held-out folds of the columns with a reward."""
    found = [cells[column] for column in columns if column in cells]
    return max(found, key=lambda cell: cell.held) if {"reward", "label and reward"} <= cells.keys() else None


# --- Figures of the table ---------------------------------------------------------------------------------------------


def fill(runner: Runs, figures: Figures, study: DataSet) -> None:
    """The figures of each cell for which all is chosen, as far as there is time."""
    cells = [cell for score in study.scores for cell in choose(figures, study, score).values()]
    cells = list({cell.keys: cell for cell in cells if not figures.get(*cell.keys)}.values())
    runs = list(dict.fromkeys(run for cell in cells for run in cell.runs))
    runner.run_all(list(dict.fromkeys(run.start for run in runs)))  # else each would be trained while all others wait
    found = runner.run_all(runs)
    runner.predict_all([run for run in runs if found[run]], "eval")
    for cell in cells:
        if all(found[run] for run in cell.runs):
            judged = [runner.predictions(run, "eval") for run in cell.runs]
            scores, resampled = judge_cell(cell, [runner.predictions(run, "held") for run in cell.runs], judged)
            figures.add({"scores": scores, "resampled": resampled} | about(), *cell.keys)
            print(*cell.keys, scores, flush=True)


def judge_cell(cell: Cell, held: list[Found], judged: list[Found]) -> tuple[list[float], list[int]]:
    """Of the evaluation images the score of each model, and the mean of the models' in each resample, in UNITs. The
    decision is fitted on the held-out predictions of all models together."""
    judge = cell.score.judge
    decision = judge.fit(pool(held)) if cell.decided else None
    scores = [round(judge.value(found, decision), 5) for found in judged]
    weights = resample(judged[0]["unit"], RESAMPLES)
    resampled = torch.stack([judge.judged(found, weights, decision) for found in judged]).mean(0)
    return scores, (resampled / UNIT).round().long().tolist()


def look_at_training(runner: Runs, figures: Figures, study: DataSet, score: Score) -> None:
    """By a score and by the study's first one: what the models of fold 0 are worth on the images that they were trained
    on, and on the held-out fold."""
    for method in ("label", f"reward: {score.name}"):
        for setting in study.tried(method):
            run = runs_of(study, method, setting, chosen_start(figures, study))[0]
            parts = [runner.predictions(run, part) for part in ("train", "held")]
            values = [round(s.judge.value(part), 5) for s in (score, study.scores[0]) for part in parts]
            figures.add({"values": values} | about(), study.name, f"training: {score.name}", method, run.tried)


def again(runner: Runs, figures: Figures, cell: Cell, fold: int) -> bool:
    """Trains a model of a cell anew, from the weights on, and tells whether its score is the kept one."""
    fresh = replace(cell.runs[fold], prefix="again-")
    fresh = replace(fresh, start=replace(fresh.start, prefix="again-"))
    clean()
    second = Runs(Figures(ROOT / "again.json"), runner.base, 1)
    second.opened = runner.opened
    runs = [fresh if run.fold == fold else run for run in cell.runs]
    others = [run for run in runs if run is not fresh] if cell.decided else []  # what the decision is fitted on
    if not all([*runner.run_all(others).values(), second.run(fresh)]):
        raise SystemExit("a run of it did not end")
    decision = cell.score.judge.fit(pool([runner.predictions(run, "held") for run in runs])) if cell.decided else None
    value, kept = cell.score.judge.value(runner.predictions(fresh, "eval"), decision), figures.get(*cell.keys)
    clean()
    print(f"{', '.join(cell.keys)}, fold {fold}: kept {kept['scores'][fold]:.5f}, again {value:.5f}")
    return round(value, 5) == kept["scores"][fold]


def clean() -> None:
    """No file of a second run is left."""
    (ROOT / "again.json").unlink(missing_ok=True)
    for path in ROOT.glob("*/again-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- Tables -----------------------------------------------------------------------------------------------------------


def spread(values: list[float], signed: bool = False) -> str:
    return f"{statistics.mean(values):{'+' if signed else ''}.4f} ± {statistics.stdev(values):.4f}"


def gains(run: dict, other: dict) -> list[float]:
    """The differences of the models' scores, fold by fold."""
    return [a - b for a, b in zip(run["scores"], other["scores"])]


def interval(run: dict, other: dict | None = None) -> tuple[float, float]:
    """Of the mean score, or of the difference to another one's in the same resamples: where 95 % of them are."""
    values = np.array(run["resampled"]) - (np.array(other["resampled"]) if other else 0)
    low, high = np.quantile(values * UNIT, [0.025, 0.975])
    return float(low), float(high)


def compared(run: dict, other: dict) -> str:
    low, high = interval(run, other)
    return f"{spread(gains(run, other), signed=True)} [{low:+.4f}, {high:+.4f}]"


def table(figures: Figures, study: DataSet) -> str:
    """All cells that are filled, each with its choice and with its differences to the label's."""
    heads = ["score", "learned by", "chosen", "held-out folds", "evaluation", "− label", f"− {LABEL_DECIDED}"]
    heads += [f"− {LABEL_TRICK} [95 %]"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for score in study.scores:
        cells = choose(figures, study, score)
        found = {column: figures.get(*cell.keys) for column, cell in cells.items()}
        best = best_by_reward(cells)
        for column in (column for column, run in found.items() if run):
            run, cell, trick = found[column], cells[column], found.get(LABEL_TRICK)
            row = [score.name, f"**{column}**" if cell is best else column, f"{cell.words}: {cell.setting}"]
            row += [f"{cell.held:.4f}", spread(run["scores"])]
            for other in ("label", LABEL_DECIDED):
                row += [spread(gains(run, found[other]), signed=True) if found.get(other) and column != other else ""]
            row += [compared(run, trick) if trick and column != LABEL_TRICK else ""]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_YET


def training_table(figures: Figures) -> str:
    """What `look_at_training` found."""
    heads = ["score", "learned by", "of images trained on", "held out", "first score of images trained on", "held out"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rows = [(study, score) for study in DATA_SETS.values() for score in study.scores]
    for study, score in rows:
        for method, settings in (figures.get(study.name, f"training: {score.name}") or {}).items():
            for tried, found in settings.items():
                cells = [score.name, f"{method.partition(':')[0]}: {tried.partition(' from ')[0]}"]
                lines.append(f"| {' | '.join([*cells, *(f'{x:.3f}' for x in found['values'])])} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_YET


def complete_rows(
    figures: Figures, by_reward: tuple[str, ...] = BY_REWARD
) -> list[tuple[Score, list[tuple[Cell, dict]]]]:
    """The scores for which all is there, each with the cells, and their figures, of the label, the label with a
    decision (without, where none is made), its best trick and the best by reward."""
    rows = []
    for study in DATA_SETS.values():
        for score in study.scores:
            cells = choose(figures, study, score)
            four = [cells.get("label"), cells.get(LABEL_DECIDED, cells.get("label")), cells.get(LABEL_TRICK)]
            four += [best_by_reward(cells, by_reward)]
            found = [figures.get(*cell.keys) if cell else None for cell in four]
            if all(found):
                rows.append((score, list(zip(four, found))))
    return rows


def small_table(figures: Figures) -> str:
    """A row a score; in brackets what was chosen, of the label its score as decided; "both" is label and reward."""
    lines = [
        f"| score | label (decided) | {LABEL_TRICK} | by reward | reward − trick [95 %] |",
        "|---|---|---|---|---|",
    ]
    for score, ((_, label), (decided, by_decision), (trick, by_trick), (own, by_reward)) in complete_rows(figures):
        means = [f"{statistics.mean(run['scores']):.3f}" for run in (label, by_decision, by_trick, by_reward)]
        low, high = interval(by_reward, by_trick)
        row = [score.name, f"{means[0]} ({means[1]})" if decided.decided else means[0]]
        row += [f"{means[2]} ({trick.words})", f"{means[3]} ({own.words})".replace("label and reward", "both")]
        row += [f"{statistics.mean(gains(by_reward, by_trick)):+.3f} [{low:+.3f}, {high:+.3f}]"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_YET


def beyond_deviation(run: dict, other: dict) -> int:
    """1 if the mean difference is above the standard deviation of the five, -1 if it is below it, else 0."""
    mean, deviation = statistics.mean(gains(run, other)), statistics.stdev(gains(run, other))
    return (mean > deviation) - (mean < -deviation)


def verdict(figures: Figures) -> str:
    """Of how many scores the best by reward is ahead or behind: of the label, and of the label with a decision, by more
    than the standard deviation of the five differences, of the label's best trick by the whole interval."""
    heads = ["the best of", "scores", "ahead of label", "behind", f"ahead of {LABEL_DECIDED}", "behind"]
    heads += [f"ahead of {LABEL_TRICK}", "neither", "behind"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for columns in (BY_REWARD[:1], BY_REWARD[::2], BY_REWARD):
        signs = []
        for _, four in complete_rows(figures, columns):
            label, decided, trick, own = (run for _, run in four)
            low, high = interval(own, trick)
            signs.append((beyond_deviation(own, label), beyond_deviation(own, decided), (low > 0) - (high < 0)))
        of_label, of_decided, of_trick = zip(*signs) if signs else ((), (), ())
        counts = [len(signs), *(x.count(sign) for x in (of_label, of_decided) for sign in (1, -1))]
        counts += map(of_trick.count, (1, 0, -1))
        lines.append(f"| {', '.join(columns)} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) if signs else NOT_YET


def tried() -> str:
    """What the search tries and how often, of all data sets."""
    blocks = []
    for study in DATA_SETS.values():
        methods, folds = study.methods(), len(study.searched)
        settings = {"by label": study.settings}
        count = folds * (len(study.starts) + len(methods) * len(study.settings))
        lines = [
            f"**{study.name}**: on {folds} folds {len(study.starts)} settings of the first half, then {len(methods)} "
            f"methods with {len(study.settings)} settings each: {count} runs of {study.steps} steps. In all of them",
            f"`{' '.join(study.common)}`.",
            "",
        ]
        label = study.by_label()["label"]
        lines += [f"- first half: `{' '.join([*label, *keys])}`" for keys in study.starts.values()]
        lines += [f"- {name}: `{' '.join(keys)}`" for name, keys in study.by_label().items()]
        with_label = f", and the same with `{LABEL_COEF}`"
        lines += [f"- reward, {score.name}: `{' '.join(score.reward)}`{with_label}" for score in study.scores]
        for score in study.scores:  # of scores with the same settings once
            own = score.settings or study.settings
            same = next((names for names, them in settings.items() if names != "by label" and them == own), None)
            settings.pop(same, None)
            settings[f"{same}, {score.name}" if same else f"by reward: {score.name}"] = own
        for whose, own in settings.items():
            lines += [f"- setting {whose}, *{name}*: `{' '.join(keys)}`" for name, keys in own.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def draw_chart(figures: Figures, path: Path) -> None:
    """Of each score the label, its best trick and the best by reward, with the intervals over resampled images."""
    rows = [(score, [four[0], *four[2:]]) for score, four in complete_rows(figures)]
    figure, axes = load_pyplot().subplots(figsize=(8, 0.9 * len(rows) + 1), layout="constrained")
    places, names = np.arange(len(rows)), ("label", LABEL_TRICK, "by reward")
    for i, (name, colour) in enumerate(zip(names, ("#9aa5b1", "#4c78a8", "#e4572e"))):
        means = [statistics.mean(three[i][1]["scores"]) for _, three in rows]
        bounds = [interval(three[i][1]) for _, three in rows]
        errors = np.abs([[m - low, high - m] for m, (low, high) in zip(means, bounds)]).T
        axes.barh(places + 0.27 * (i - 1), means, 0.25, xerr=errors, label=name, color=colour, ecolor="#333333")
    axes.set_yticks(places, [score.name for score, _ in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="score on the evaluation images, mean of five models; bars: 95 % of resamples")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def write_tables(figures: Figures) -> None:
    """All that is made of the kept figures."""
    for study in DATA_SETS.values():
        write_between(RESULTS, f"photographs-{study.name}", table(figures, study))
    write_between(RESULTS, "photographs-verdict", verdict(figures))
    write_between(RESULTS, "photographs-training", training_table(figures))
    write_between(RESULTS, "photographs-tried", tried())
    if complete_rows(figures):
        draw_chart(figures, CHART)
        if "<!-- photographs -->" in README.read_text(encoding="utf-8"):
            write_between(README, "photographs", small_table(figures))


# --- Pictures ---------------------------------------------------------------------------------------------------------


def differing(judge, pair: list[Found], decisions: list, count: int = 6) -> list[int]:
    """The images for which two models' counts differ most; of equals at random, always the same."""
    one, other = (judge.counts(found, decision).double().flatten(1) for found, decision in zip(pair, decisions))
    order = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))
    return order[(one - other).abs().sum(1)[order].argsort(descending=True, stable=True)][:count].tolist()


def draw_both(runner: Runs, figures: Figures, study: DataSet) -> None:
    """A sheet of six evaluation images in TensorBoard: truth, by the label, by the best reward; of the first score that
    has decisions and the models of fold 0."""
    score = next(score for score in study.scores if score.judge.decides)
    cells = choose(figures, study, score)
    pair = [cells.get("label"), best_by_reward(cells)]
    if not all(cell and figures.get(*cell.keys) for cell in pair):
        return
    held = [pool([runner.predictions(run, "held") for run in cell.runs]) for cell in pair]
    decisions = [score.judge.fit(found) if cell.decided else None for cell, found in zip(pair, held)]
    chosen = differing(score.judge, [runner.predictions(cell.runs[0], "eval") for cell in pair], decisions)
    views = [drawn(runner, cell, decision, chosen) for cell, decision in zip(pair, decisions)]
    images, captions = [], []
    for (truth, by_label, words, label_words), (_, by_reward, _, reward_words) in zip(*views):
        images.append(torch.cat([picture for picture in (truth, by_label, by_reward) if picture is not None], -1))
        captions.append([words, f"by label {label_words}", f"by reward {reward_words}"])
    with SummaryWriter(f"logs/photographs/{study.name}") as log:
        log.add_image(f"truth, by label, by {pair[1].words}", draw_sheet(images, captions, 2, 192), 0)


def drawn(runner: Runs, cell: Cell, decision, chosen: list[int]) -> list[tuple]:
    """Of the chosen images what the study draws by the cell's first model."""
    task, dataset, stream = runner.outputs(cell.runs[0], "eval")
    found = {}
    for batch, outputs in stream:
        for i, place in enumerate(batch.metadata["indices"].tolist()):
            if place in chosen:
                part = batch[i : i + 1], outputs[i : i + 1]
                found[place] = cell.study.draw(cell.score.judge, task, dataset, *part, decision)
    return [found[place] for place in chosen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", nargs="?", choices=DATA_SETS)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder with train/ and eval/")
    parser.add_argument("--start", type=Path, metavar="FILE", help="the weights of a ViT, see docs/pretrained.md")
    parser.add_argument("--search", action="store_true", help="run what settings are chosen by")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run that would end after so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (as many as there are cores)")
    parser.add_argument("--again", nargs=3, metavar=("SCORE", "COLUMN", "FOLD"), help="train one model a second time")
    parser.add_argument("--training", metavar="SCORE", help="judge models on the images that they were trained on, too")
    parser.add_argument("--tables", action="store_true", help="only write the tables and the chart, of all data sets")
    args = parser.parse_args()
    if not args.tables and not (args.data_set and args.data and args.start):
        parser.error("name a data set, its --data, and the weights to --start from; or --tables")
    figures, deadline = Figures(FIGURES), time.monotonic() + 60 * args.minutes
    source = None if args.tables else Source(args.data.resolve(), args.start.resolve())
    os.chdir(HOME)
    torch.set_num_threads(1)
    if args.tables:
        write_tables(figures)
        return 0
    study = DATA_SETS[args.data_set]
    runner = Runs(Figures(ROOT / "photographs.json"), source, args.jobs, deadline)
    name, column, fold = args.again or (args.training, None, None)
    score = next((score for score in study.scores if score.name == name), None)
    if args.again:
        cell = choose(figures, study, score).get(column) if score else None
        if not cell or not figures.get(*cell.keys) or int(fold) not in range(FOLDS):
            parser.error(f"--again: {name}, {column}, {fold}: no figures of it")
        return 0 if again(runner, figures, cell, int(fold)) else 1
    if args.training:
        if not score or not chosen_start(figures, study):
            parser.error(f"--training: {name}: no score of {study.name} that is searched")
        look_at_training(runner, figures, study, score)
    elif args.search:
        search(runner, figures, study)
    else:
        fill(runner, figures, study)
        draw_both(runner, figures, study)
    write_tables(figures)
    if runner.left:
        print(
            f"{study.name}: about {sum(runner.left.values()) / 60:.1f} hours of runs are left; the same command goes on"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
