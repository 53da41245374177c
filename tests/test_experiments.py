"""Costs, choices and tables of experiments.py; its runs are too long for a test."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import experiments


def test_cheque_reward_is_one_minus_a_tenth_of_the_cost_matrix():
    """All pairs of digits, against the matrix written out."""
    cost = torch.tensor([[0.0 if a == t else 10.0 if a > t else 1.0 for t in range(10)] for a in range(10)])
    actions = torch.arange(10)[None, None, :].expand(10, 2, 10)  # each digit for each of ten images
    rewards = experiments.cheque_reward(actions, None, torch.arange(10), {})
    assert rewards.shape == (10, 2, 10) and rewards.min() == 0
    assert torch.equal(rewards[:, 0], 1 - cost.T / 10) and torch.equal(rewards[:, 1], rewards[:, 0])


def fake_runs(monkeypatch, value):
    """Every job gives value(name); returns the jobs that were asked for."""
    asked = {}

    def run(study, name, overrides):
        asked[name] = overrides
        return value(name)

    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(experiments, "hold_out", lambda folder: [f"data.train_dir={folder}-held"])
    return asked


@pytest.mark.parametrize(("sign", "best"), [(1, 2e-3), (-1, 5e-4)])
def test_choose_rates_takes_the_best_mean_over_the_seeds(monkeypatch, sign, best):
    """The figure is the learning rate itself; the hold-out is used, and each seed starts from its own checkpoint."""
    asked = fake_runs(monkeypatch, lambda name: {"cost": float(name.split("-", 2)[2].rsplit("-", 1)[0])})
    study = replace(experiments.COST, sign=sign)
    assert experiments.choose_rates(study, {"m": ["a.b=c"]}, "first", 30) == {"m": best}
    assert len(asked) == 6 and asked["holdout-m-0.001-1"][:2] == ["a.b=c", "data.train_dir=data/train-held"]
    assert "model.checkpoint_path=experiments/ckpt/first-1/last.pt" in asked["holdout-m-0.001-1"]
    assert "training.steps=30" in asked["holdout-m-0.001-1"]


def test_scenes_train_from_scratch_then_tune_the_checkpoint_of_the_same_seed(monkeypatch, tmp_path):
    """Both tables are written; tuning starts from the start method's run at its best rate, hold-out from hold-out."""
    asked = fake_runs(monkeypatch, lambda name: {"map": 0.002 if "0.002" in name else 0.001, "ap50": 0.5})
    written = {}
    monkeypatch.setattr(experiments, "write_between", lambda path, marker, text: written.update({marker: text}))
    study = experiments.BOXES
    experiments.scenes(study, {"a": ["x.y=1"], "b": []}, {"label": ["x.y=1"]}, "a", 7, {"map": "mAP"}, "boxes")
    assert written["boxes"].split("\n")[2] == "| a | 0.002 | 0.0010 ± 0.0000 |"
    assert [row.split(" | ")[0] for row in written["boxes-tuned"].split("\n")[2:]] == [
        "| a, where all start",
        "| label",
    ]
    held = asked["holdout-detection-tuned-label-0.001-0"]
    assert "model.checkpoint_path=experiments/ckpt/holdout-detection-a-0.002-0/last.pt" in held
    tuned = asked["detection-tuned-label-2"]
    assert "model.checkpoint_path=experiments/ckpt/detection-a-2/last.pt" in tuned and "training.steps=7" in tuned
    assert "x.y=1" in tuned and "training.seed=2" in tuned


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


def test_run_seeds_keeps_the_seeds_in_order(monkeypatch):
    asked = fake_runs(monkeypatch, lambda name: {"name": name})
    results = experiments.run_seeds(experiments.DIGITS, {"a": [], "b": []}, {"a": 1e-3, "b": 2e-3})
    assert [result["name"] for result in results["b"]] == [f"b-{seed}" for seed in range(5)]
    assert asked["b-3"] == ["training.learning_rate=0.002", "training.seed=3"]


def test_the_table_has_median_ratios_to_supervised():
    """Times are medians of the ratios to the supervised run of the seed; a method that never gets to 0.95 says so."""

    def result(seconds, accuracies):
        curve = [((i + 1) * 10, (i + 1) * seconds / 2, accuracy) for i, accuracy in enumerate(accuracies)]
        return {"seconds": seconds, "curve": curve, "accuracy": accuracies[-1], "nll": 0.5, "ece": 0.1}

    results = {
        "supervised": [result(10, (0.9, 0.96)), result(10, (0.95, 0.94))],
        "slow": [result(15, (0.5, 0.95)), result(15, (0.5, 0.97))],
        "dead": [result(5, (0.1, 0.1)), result(5, (0.1, 0.1))],
    }
    assert experiments.seconds_to(0.95, results["supervised"][0]) == 10
    assert experiments.seconds_to(0.95, results["dead"][0]) == math.inf
    rows = experiments.table({"supervised": 1e-3, "slow": 5e-4, "dead": 1e-3}, results).split("\n")
    assert rows[3] == "| slow | 0.0005 | 0.9600 ± 0.0141 | 0.5000 ± 0.0000 | 0.1000 ± 0.0000 | 1.50 | 2.25 |"
    assert rows[4].endswith("| 0.50 | never |")


def test_write_between_replaces_only_what_is_between(tmp_path):
    path = tmp_path / "x.md"
    path.write_text("a\n<!-- m -->\nold\n<!-- /m -->\nb\n")
    experiments.write_between(path, "m", "new")
    experiments.write_between(path, "m", "newer")
    assert path.read_text() == "a\n<!-- m -->\nnewer\n<!-- /m -->\nb\n"
