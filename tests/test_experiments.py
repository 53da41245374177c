"""Runs, choices, figures and tables of experiments.py; its trainings are too long for a test."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import experiments
import numpy as np
import pytest
import studies
import torch
from conftest import load_script
from experiments import Figures, Row, Run, Runner
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from build import configure, load_rewards
from config import parse_override, read_yaml

PARTS = tuple(map(Path, ("whole", "train", "held", "judged")))
STAGE = studies.Stage("s", {"m": ["a.b=c"], "n": []}, studies.rates(1e-3, 2e-3, 4e-3), {"accuracy": "acc"})
STUDY = studies.Study("digits", "c.yaml", lambda base: PARTS, 3, 2, 25, 2.0, (STAGE,), retrain=True)
TUNED = replace(STAGE, marker="t", methods={"label": ["x.y=1"], "score": []}, start="n", paired="label")


def test_cheque_reward_is_one_minus_a_tenth_of_the_cost_matrix():
    """All pairs of digits, against the matrix written out."""
    cost = torch.tensor([[0.0 if a == t else 10.0 if a > t else 1.0 for t in range(10)] for a in range(10)])
    actions = torch.arange(10)[None, None, :].expand(10, 2, 10)  # each digit for each of ten images
    rewards = load_script("examples/cheque_reward.py").cheque_reward(actions, None, torch.arange(10), {})
    assert rewards.shape == (10, 2, 10) and rewards.min() == 0
    assert torch.equal(rewards[:, 0], 1 - cost.T / 10) and torch.equal(rewards[:, 1], rewards[:, 0])


class FakeRunner(Runner):
    """Metrics are functions of a run: accuracy is best at a rate of 0.002, the decided one at 0.004."""

    def __init__(self, path: Path, jobs: int = 1, **more):
        super().__init__(Figures(path), jobs, **more)
        self.trained: list[Run] = []

    def train(self, run):
        self.trained.append(run)
        return True

    def judge(self, run):
        rate = float(run.setting)
        metrics = {"accuracy": 1 - abs(rate - 2e-3), "accuracy, decided": 1 - abs(rate - 4e-3), "cost": rate}
        metrics |= {f"holdout/{key}": value for key, value in metrics.items()}
        return metrics | {"seconds": 1.0 + run.seed, "ap/cat": 0.5}


def test_settings_are_chosen_by_runs_on_the_hold_out_and_figures_are_of_all_seeds(tmp_path):
    runner = FakeRunner(tmp_path / "f.json", jobs=2)
    (rows,) = experiments.compare(runner, STUDY).values()
    assert [(row.method, row.decided, row.setting, list(row.runs)) for row in rows] == [
        (method, False, "0.002", [0, 1, 2]) for method in "mn"
    ]
    count = Counter(run.held for run in runner.trained)
    assert count == {True: 2 * 2 * 3, False: 2 * 3} and not runner.left
    held, own = (
        next(run for run in runner.trained if run.held is held and run.method == "m") for held in (True, False)
    )
    assert held.overrides(PARTS)[:3] == ["data.train_dir=train", "data.eval_dir=held", "a.b=c"]
    assert own.overrides(PARTS)[:2] == ["data.train_dir=whole", "data.eval_dir=judged"]
    assert "training.learning_rate=0.002" in own.overrides(PARTS) and own.keys[:3] == ("digits", "m", "0.002")
    assert held.keys[0] == "digits, hold-out" and held.name.startswith("digits_hold_out-m-0.001-")


def test_cost_is_better_when_lower(tmp_path):
    study = replace(STUDY, stages=(replace(STAGE, columns={"cost": "cost"}),))
    (rows,) = experiments.compare(FakeRunner(tmp_path / "f.json"), study).values()
    assert {row.setting for row in rows} == {"0.001"}


def test_kept_figures_are_not_run_again_and_a_chosen_setting_is_not_searched(tmp_path):
    only = replace(STUDY, stages=(replace(STAGE, only={"m": "0.004", "n": "0.001"}),))
    first = FakeRunner(tmp_path / "f.json")
    experiments.compare(first, only)
    assert {(run.method, run.setting, run.held) for run in first.trained} == {
        ("m", "0.004", False),
        ("n", "0.001", False),
    }
    again = FakeRunner(tmp_path / "f.json")
    rows = experiments.compare(again, only)["s"]
    assert not again.trained and rows[0].runs[2]["seconds"] == 3.0
    kept = json.loads((tmp_path / "f.json").read_text())
    assert set(kept["digits"]["m"]["0.004"]) == {"0", "1", "2"}
    run = kept["digits"]["m"]["0.004"]["0"]
    assert {"minutes", "machine", "date", "commit", "accuracy"} < set(run) and "ap/cat" not in run
    assert len((tmp_path / "f.json").read_text().splitlines()) == 2 + 2 + 2 * 2 * 2 + 2 * 3  # a run a line


@pytest.mark.parametrize(("jobs", "seconds"), [(0, 1e6), (1, 119)])
def test_what_does_not_fit_is_left_and_told(tmp_path, jobs, seconds):
    """Without jobs, or where a run of two minutes would end too late: the search, and the other seeds after it."""
    deadline = experiments.time.monotonic() + seconds
    runner = FakeRunner(tmp_path / "f.json", jobs, deadline=deadline)
    study = replace(STUDY, stages=(STAGE, TUNED))
    assert experiments.compare(runner, study) == {"s": []} and not runner.trained
    assert sum(runner.left.values()) == 2.0 * (2 * 3 * 2 + 2 * 3 + 2 * (3 * 2 + 3))
    assert experiments.table(STAGE, [], 3) is None


def test_all_is_trained_on_four_fifths_where_decisions_are_fitted(tmp_path):
    """The hold-out chooses a setting for argmax and one for decisions, and no run is made twice; what is tuned starts
    from the run of its seed at the best setting by argmax, trained again if its checkpoint is gone."""
    study = replace(STUDY, name="x", retrain=False, scores=("accuracy",), stages=(STAGE, TUNED))
    runner = FakeRunner(tmp_path / "f.json")
    tables = experiments.compare(runner, study)
    found = [(row.method, row.decided, row.setting) for row in tables["t"]]
    begun = [("n, where all start", by, rate) for by, rate in ((False, "0.002"), (True, "0.004"))]
    assert found == [*begun, *[(m, by, r) for m in ("label", "score") for by, r in ((False, "0.002"), (True, "0.004"))]]
    tuned = [run for run in runner.trained if run.start]
    assert len(tuned) == len({run.keys for run in tuned}) == 2 * (3 * 2 + 2)
    assert {(run.start.method, run.start.setting, run.start.seed == run.seed) for run in tuned} == {
        ("n", "0.002", True)
    }
    overrides = tuned[-1].overrides(PARTS)
    assert overrides[:3] == ["data.train_dir=train", "data.eval_dir=held", "data.num_workers=0"]
    assert overrides[-1] == "model.checkpoint_path=experiments/ckpt/x-n-0.002-2/last.pt"
    assert tuned[0].keys[:2] == ("x", "tuned label")
    starts = [run for run in runner.trained if not run.start and run.method == "n" and run.setting == "0.002"]
    assert len(starts) > 3  # as no checkpoint is there


def test_a_table_has_paired_differences_ratios_and_what_is_decided():
    """Over the seeds that all rows have, told if they are not all; the missing cells stay empty."""

    def run(accuracy, seconds, at):
        curve = [[25, at / 2, 0.9], [50, at, accuracy]]
        return {
            "accuracy": accuracy,
            "accuracy, decided": accuracy + 0.01,
            "nll": 1.0,
            "seconds": seconds,
            "curve": curve,
        }

    stage = replace(STAGE, columns={"accuracy": "acc", "nll": "NLL"}, paired="n", ratio="n")
    rows = [
        Row("n", False, "0.1", {0: run(0.96, 10, 4), 1: run(0.95, 10, 4), 2: run(0.99, 10, 4)}),
        Row("m", False, "0.2", {0: run(0.97, 15, 6), 1: run(0.98, 25, 8)}),
        Row("m", True, "0.2", {0: run(0.97, 15, 6), 1: run(0.98, 25, 8)}),
    ]
    lines = experiments.table(stage, rows, 3).split("\n")
    assert lines[0] == "So far 2 of 3 seeds:" and not lines[1]
    assert lines[2] == "| trained by | setting | acc | NLL | acc − that of n | time ÷ n | time to 0.95 ÷ n |"
    assert lines[4] == "| n | 0.1 | 0.9550 ± 0.0071 | 1.0000 ± 0.0000 |  | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) |"
    assert lines[5].startswith(
        "| m | 0.2 | 0.9750 ± 0.0071 | 1.0000 ± 0.0000 | +0.0200 ± 0.0100 | 2.00 (1.75–2.25) | 1.75"
    )
    assert lines[6].startswith("| m, decided | 0.2 | 0.9850 ± 0.0071 |  | +0.0300 ± 0.0100 |")
    assert experiments.table(replace(stage, whole=True), rows, 3) is None
    assert experiments.table(stage, rows[:1], 3) is None  # a method is missing
    decided = Row("n", True, "0.1", {0: run(0.94, 10, 4), 1: run(0.94, 10, 4)})
    lines = experiments.table(stage, [*rows, decided], 3).split("\n")
    assert "| acc − that of n | acc − that of n, decided |" in lines[2]  # 0.95 by both seeds
    assert lines[5].startswith("| m | 0.2 | 0.9750 ± 0.0071 | 1.0000 ± 0.0000 | +0.0200 ± 0.0100 | +0.0250 ± 0.0050 |")
    rows[1] = Row("m", False, "0.2", {0: run(0.1, 1, 1), 1: run(0.1, 1, 1)})
    assert experiments.table(stage, rows[:2], 3).endswith("| 0.10 (0.10–0.10) | never |")


@pytest.mark.parametrize(
    ("until", "status", "good"), [(None, 0, True), (None, 143, False), (0.95, 143, True), (0.95, 2, False)]
)
def test_a_run_is_ended_once_where_it_is_good_enough(monkeypatch, tmp_path, until, status, good):
    """A second signal would kill it before it has saved; one that fails is told, and left."""
    signals, lines = [], ["step 5: accuracy 0.9 NLL 1\n", "step 10: accuracy 0.9500 NLL\n", "step 15: accuracy 0.97\n"]

    class Process:
        stdout, returncode = lines, status

        def __init__(self, command, **more):
            assert command[-1] == "training.run_name=digits-m-0.001-0" and "--resume" in command

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def terminate(self):
            signals.append(1)

    monkeypatch.setattr(experiments.subprocess, "Popen", Process)
    study, runner = replace(STUDY, until=until), Runner(Figures(tmp_path / "f.json"), 1)
    runner.parts["digits"] = PARTS
    run = Run(study, STAGE, "m", "0.001", 0, False)
    assert runner.train(run) is good and len(signals) == (until is not None)
    assert good or (runner.run(run) is None and list(runner.left) == [run.keys])


def test_events_give_the_last_metrics_and_the_seconds_of_training(tmp_path):
    """64 images a step at 64 a second, then at 32: a second a step, then two."""
    with SummaryWriter(tmp_path) as log:
        for step, speed in ((1, 64), (10, 64), (20, 32)):
            log.add_scalar("speed/images_per_second", speed, step)
        for step, accuracy in ((15, 0.5), (20, 0.95)):
            log.add_scalar("eval/accuracy", accuracy, step)
            log.add_scalar("eval/reward/x", accuracy, step)
    found = experiments.read_events(tmp_path)
    assert found == {"accuracy": pytest.approx(0.95), "seconds": 30.0, "curve": [(15, 20.0, 0.5), (20, 30.0, 0.95)]}


def test_the_hold_out_splits_classes_masks_and_boxes_alike(monkeypatch, tmp_path):
    """Every fifth image is held out, with its mask and its annotations."""
    monkeypatch.setattr(studies, "ROOT", tmp_path / "e")
    folder = tmp_path / "train"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
        for i in range(11):
            Image.fromarray(np.full((2, 2), i, dtype=np.uint8)).save(folder / name / f"{i:02d}.png")
    images = [{"id": i + 50, "file_name": f"{i:02d}.png"} for i in range(11)]
    rows = [{"id": i, "image_id": 50 + i % 11} for i in range(30)]
    (folder / "annotations.json").write_text(json.dumps({"images": images, "annotations": rows, "categories": [1]}))
    (folder / "classes.txt").write_text("a\nb\n")
    whole, *parts, judged = studies.folders("train", "eval")(tmp_path)
    assert (whole, judged) == (folder, tmp_path / "eval")
    for part, kept in zip(parts, ([i for i in range(11) if i % 5], [0, 5, 10])):
        for name in ("images", "masks"):
            assert sorted(int(path.stem) for path in (part / name).iterdir()) == kept
        coco = json.loads((part / "annotations.json").read_text())
        assert [row["id"] - 50 for row in coco["images"]] == kept and coco["categories"] == [1]
        assert [row["id"] for row in coco["annotations"]] == [i for i in range(30) if i % 11 in kept]
        assert (part / "classes.txt").read_text() == "a\nb\n"


def test_all_tiles_of_a_micrograph_are_held_out_together(monkeypatch, tmp_path):
    monkeypatch.setattr(studies, "ROOT", tmp_path / "e")
    tiles = [f"{sheet}_{y}_{x}.png" for sheet in range(12) for y in (0, 128) for x in (0, 128)]
    for name in ("images", "masks"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for tile in tiles:
            (tmp_path / "train" / name / tile).touch()
    _, *parts, _ = studies.STUDIES["micrographs"].data(tmp_path)
    for name in ("images", "masks"):
        found = [{path.name for path in (part / name).iterdir()} for part in parts]
        sheets = [{tile.split("_")[0] for tile in part} for part in found]
        assert found[0] | found[1] == set(tiles) and not sheets[0] & sheets[1] and len(sheets[1]) == 3


def test_the_long_tail_is_twenty_times_as_frequent_at_its_head(monkeypatch, tmp_path):
    """In training by different scans, in the hold-out and the evaluation by copies; no scan is in two parts."""
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    _, *parts = studies.long_tail(None)
    counts = [[len(list((part / str(k)).iterdir())) for k in range(10)] for part in parts]
    assert counts[0] == [round(100 * 20 ** (-k / 9)) for k in range(10)] and counts[0][0] / counts[0][9] == 20
    scans = [{path.stem.rsplit("_", 1)[0] for path in part.rglob("*.png")} for part in parts]
    assert [len(found) for found in scans] == [sum(counts[0]), 291, 360]
    assert not (scans[0] & scans[1] or scans[0] & scans[2] or scans[1] & scans[2])
    assert counts[2][0] / counts[2][9] == 20 and counts[1][0] == 20 * 29


@pytest.mark.parametrize("name", studies.STUDIES)
def test_all_studies_have_configs_that_can_be_run(name):
    """Each method at each setting; the methods and settings that a stage names are there."""
    study = studies.STUDIES[name]
    for stage in study.stages:
        assert {stage.paired, stage.ratio} - {None} <= set(stage.methods)
        assert stage.start in (None, *study.stages[0].methods)
        for method, setting in itertools.product(stage.methods, stage.settings):
            assert (stage.only or {}).get(method, setting) in stage.settings
            overrides = Run(study, stage, method, setting, 0, False).overrides(PARTS)
            layers = (study.config, read_yaml(study.config)), ("", dict(map(parse_override, overrides)))
            config, task = configure(*layers)
            assert load_rewards(task) and config["training"]["learning_rate"] == float(setting.split()[0])


def test_write_between_replaces_only_what_is_between(tmp_path, capsys):
    path = tmp_path / "x.md"
    path.write_text("a\n<!-- m -->\nold\n<!-- /m -->\nb\n")
    for text in ("new", "newer"):
        experiments.write_between(path, "m", text)
    experiments.write_between(path, "other", "text")
    assert (
        path.read_text() == "a\n<!-- m -->\nnewer\n<!-- /m -->\nb\n" and "no <!-- other -->" in capsys.readouterr().out
    )


def test_the_tables_of_the_results_are_those_of_the_kept_figures():
    """What stands between the markers is what --tables would write."""
    text, runner = experiments.RESULTS.read_text(encoding="utf-8"), Runner(Figures(experiments.FIGURES))
    for study in studies.STUDIES.values():
        tables = experiments.compare(runner, study)
        for stage in study.stages:
            written = experiments.table(stage, tables.get(stage.marker, []), study.seeds)
            if written:
                assert f"<!-- {stage.marker} -->\n{written}\n<!-- /{stage.marker} -->" in text
