"""Costs, choices and tables of experiments.py; its runs are too long for a test."""

import json
import math
from dataclasses import replace
from pathlib import Path

import experiments
import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image

DIGITS = replace(experiments.STUDIES["digits"], methods={"m": ["a.b=c"], "n": []}, start="n")


def test_cheque_reward_is_one_minus_a_tenth_of_the_cost_matrix():
    """All pairs of digits, against the matrix written out."""
    cost = torch.tensor([[0.0 if a == t else 10.0 if a > t else 1.0 for t in range(10)] for a in range(10)])
    actions = torch.arange(10)[None, None, :].expand(10, 2, 10)  # each digit for each of ten images
    rewards = load_script("examples/cheque_reward.py").cheque_reward(actions, None, torch.arange(10), {})
    assert rewards.shape == (10, 2, 10) and rewards.min() == 0
    assert torch.equal(rewards[:, 0], 1 - cost.T / 10) and torch.equal(rewards[:, 1], rewards[:, 0])


@pytest.fixture
def asked(monkeypatch) -> dict[str, list[str]]:
    """The overrides of each run that was asked for, by its name; its metrics are functions of the learning rate."""
    runs = {}

    def run(study, name, overrides):
        runs[name] = overrides
        rate = next(float(text.split("=")[1]) for text in overrides if text.startswith("training.learning_rate="))
        return {"accuracy": rate, "cost": rate, "map": 1 - abs(rate - 4e-3), "seconds": 1.0, "name": name}

    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(experiments, "hold_out", lambda folder: [f"data.train_dir={folder}-held"])
    return runs


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 2e-3), ("cost", 5e-4)])
def test_the_rate_with_the_best_mean_on_the_hold_out_is_taken(asked, metric, best):
    """The highest accuracy, the lowest cost. The results are those of all seeds, in order, at that rate."""
    rates, results = experiments.run_best(DIGITS, DIGITS.methods, DIGITS.rates, metric)
    assert rates == {"m": best, "n": best} and len(asked) == 2 * 2 * 3 + 2 * 5
    assert [result["name"] for result in results["m"]] == [f"m-{seed}" for seed in range(5)]
    assert asked["holdout-m-0.001-1"][:2] == ["a.b=c", "data.train_dir=data/train-held"]
    assert asked["n-3"] == [f"training.learning_rate={best}", "training.seed=3"]


def test_a_study_tunes_the_runs_of_its_start_and_writes_two_tables(asked, monkeypatch):
    """Tuning goes on from the start's run of the same seed, at its best rate; on the hold-out, from one on that."""
    written, columns = {}, {"map": "mAP"}
    monkeypatch.setattr(experiments, "write_between", lambda path, marker, text: written.update({marker: text}))
    study = replace(experiments.STUDIES["detection"], columns=columns, tuning_columns=columns)
    results = experiments.compare(study)
    own = [*study.tuning["label"], "training.learning_rate=0.004", "training.seed=2", "training.steps=500"]
    start = "model.checkpoint_path=experiments/ckpt/{}/last.pt".format
    held = start("holdout-detection-supervised-log_prob-0.004-0")
    assert asked["holdout-detection-tuned-label-0.001-0"][-2:] == [held, own[-1]]
    assert asked["detection-tuned-label-2"] == [*own[:-1], start("detection-supervised-log_prob-2"), own[-1]]
    assert list(results) == list(study.methods) and len(results["detection_reward"]) == 3
    names = {"boxes": study.methods, "boxes-tuned": ["supervised-log_prob, where all start", *study.tuning]}
    for marker, methods in names.items():
        rows = [f"| {method} | 0.004 | 1.0000 ± 0.0000 |" for method in methods]
        assert written[marker].split("\n") == ["| trained by | learning rate | mAP |", "|---|---|---|", *rows]


def test_the_hold_out_splits_classes_masks_and_boxes_alike(monkeypatch, tmp_path):
    """Every fifth image is held out, with its mask and its annotations."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path / "e")
    folder = tmp_path / "train"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
        for i in range(11):
            Image.fromarray(np.full((2, 2), i, dtype=np.uint8)).save(folder / name / f"{i:02d}.png")
    images = [{"id": i + 50, "file_name": f"{i:02d}.png"} for i in range(11)]
    rows = [{"id": i, "image_id": 50 + i % 11} for i in range(30)]
    (folder / "annotations.json").write_text(json.dumps({"images": images, "annotations": rows, "categories": [1]}))
    (folder / "classes.txt").write_text("a\nb\n")
    parts = [Path(override.split("=")[1]) for override in experiments.hold_out(folder)]
    for part, kept in zip(parts, ([i for i in range(11) if i % 5], [0, 5, 10])):
        for name in ("images", "masks"):
            assert sorted(int(path.stem) for path in (part / name).iterdir()) == kept
        coco = json.loads((part / "annotations.json").read_text())
        assert [row["id"] - 50 for row in coco["images"]] == kept and coco["categories"] == [1]
        assert [row["id"] for row in coco["annotations"]] == [i for i in range(30) if i % 11 in kept]
        assert (part / "classes.txt").read_text() == "a\nb\n"


def test_the_table_has_median_ratios_to_supervised():
    """Times are medians of the ratios to the supervised run of the seed; a method that never gets to 0.95 says so."""

    def result(seconds, accuracies):
        curve = [((i + 1) * 10, (i + 1) * seconds / 2, accuracy) for i, accuracy in enumerate(accuracies)]
        return {"seconds": seconds, "curve": curve, "accuracy": accuracies[-1], "nll": 0.5, "ece": 0.1}

    results = {"supervised": [result(10, (0.9, 0.96)), result(10, (0.95, 0.94))], "dead": 2 * [result(5, (0.1, 0.1))]}
    results["slow"] = [result(15, (0.5, 0.95)), result(15, (0.5, 0.97))]
    times = [experiments.seconds_to(0.95, results[name][0]) for name in ("supervised", "slow", "dead")]
    assert times == [10, 15, math.inf]
    rows = experiments.table(dict.fromkeys(results, 5e-4), results, DIGITS.columns, times=True).split("\n")
    assert rows[4] == "| slow | 0.0005 | 0.9600 ± 0.0141 | 0.5000 ± 0.0000 | 0.1000 ± 0.0000 | 1.50 | 2.25 |"
    assert rows[3].endswith("| 0.50 | never |")


def test_write_between_replaces_only_what_is_between(tmp_path):
    path = tmp_path / "x.md"
    path.write_text("a\n<!-- m -->\nold\n<!-- /m -->\nb\n")
    for text in ("new", "newer"):
        experiments.write_between(path, "m", text)
    assert path.read_text() == "a\n<!-- m -->\nnewer\n<!-- /m -->\nb\n"
