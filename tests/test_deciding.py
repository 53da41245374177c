"""Deciding by reward against brute force and slow loops; fits are found again, and are for their checkpoint alone."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_folders, message, refused
from torch.distributions import Bernoulli

import deciding
import detection_task as det
import predict
import scores
import train
from checkpoint import load_checkpoint
from vision_task import Task

COSTS = torch.tensor([[1.0, 0.0, 0.2], [0.9, 1.0, 0.0], [0.0, 0.8, 1.0]], dtype=torch.float64)  # by truth and choice


def draw(n: int, num_classes: int, scale=1.0, seed=0, shift=0.9) -> tuple[torch.Tensor, torch.Tensor]:
    """Class probabilities, uneven, and truths drawn from them: [n, K], [n]."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, num_classes, generator=g, dtype=torch.float64)
    probs = (logits - shift * torch.arange(num_classes)).softmax(-1)
    return probs, torch.multinomial(probs, 1, generator=g)[:, 0]


def test_calibration_finds_scale_and_bias():
    """Log-probabilities that were bent are made straight again, for each tag by itself."""
    (first, y), (second, z) = draw(5000, 3, 2.0), draw(5000, 3, 2.0, seed=1)
    bend = torch.tensor([0.5, -1.0, 0.5], dtype=torch.float64)
    bent = torch.stack([((first.log() - bend) / 2.5).log_softmax(-1), (second.log() / 0.5).log_softmax(-1)], 1)
    scale, bias = deciding.calibrate(bent, torch.stack([y, z], 1))
    assert scale.tolist() == pytest.approx([2.5, 0.5], rel=0.1)
    straight = (scale[:, None] * bent + bias).softmax(-1)
    assert (straight - torch.stack([first, second], 1)).abs().max() < 0.06
    sure = torch.eye(3, dtype=torch.float64).clamp(min=1e-30).log()[:, None]  # without an error: finite all the same
    assert all(x.isfinite().all() for x in deciding.calibrate(sure, torch.arange(3)[:, None]))


@pytest.mark.parametrize("name", ["macro_f1", "mean_iou", "balanced_accuracy", "g_mean", "mcc"])
def test_gains_are_as_good_as_the_best_threshold(name):
    """Of two classes a decision is a threshold, and all of them can be tried."""
    probs, targets = draw(3000, 2, 1.5, shift=2.5)
    score = scores.READY[name]
    gains, before, after = deciding.fit_gains(score, probs[:, None], targets[:, None], tags=False)

    def judged(decided):
        return float(score(torch.bincount(targets * 2 + decided, minlength=4).view(2, 2).double()))

    assert before == pytest.approx(judged(probs.argmax(-1)))
    assert after == pytest.approx(judged(deciding.by_gains(probs[:, None], gains)[:, 0])) and after >= before
    best = max(judged((probs[:, 1] > limit).long()) for limit in torch.linspace(0.01, 0.98, 200))
    assert after > before and after > best - 0.02


def test_a_fit_that_gains_nothing_leaves_the_model_as_it_is():
    """All are right by argmax, though by probabilities that a calibration would move."""
    targets = torch.arange(3).repeat(20)
    probs = torch.tensor([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]])[targets]
    found = deciding.fit(scores.macro_f1, probs, targets, None, tags=False)
    expected = {"scale": [1.0], "bias": [[0.0] * 3], "gains": [torch.eye(3).tolist()], "score": (1.0, 1.0)}
    assert found == expected
    assert deciding.fit(None, probs, targets, None, tags=False)["scale"][0] > 2  # without a score it is calibrated


def test_a_fit_on_a_part_of_the_pixels_sees_every_column(monkeypatch):
    """Masks of 8 columns of which two are noise, and room for a quarter of their pixels."""
    probs, targets = draw(8000, 2, 3.0)
    noise = torch.randint(2, (8000,), generator=torch.Generator().manual_seed(0))
    targets = torch.where(torch.arange(8000) % 4 == 0, noise, targets).view(125, 8, 8)
    probs = probs.view(125, 8, 8, 2)
    whole = deciding.fit(scores.mean_iou, probs, targets, None, tags=False)["score"]
    monkeypatch.setattr(deciding, "MOST_ELEMENTS", 2000)
    part = deciding.fit(scores.mean_iou, probs, targets, None, tags=False)["score"]
    assert part == pytest.approx(whole, abs=0.03) and part != whole


def test_gains_of_tags_are_each_tags_own():
    first, y = draw(500, 2, 1.5)
    probs, targets = torch.stack([first, first.flip(1)], 1), torch.stack([y, 1 - y], 1)

    def recall_and_precision(confusion):  # of [..., 2, 2, 2]
        hits = confusion[..., 1, 1]
        return (2 * hits / (confusion[..., 1, :].sum(-1) + confusion[..., :, 1].sum(-1))).mean(-1)

    gains, before, after = deciding.fit_gains(recall_and_precision, probs, targets, tags=True)
    assert gains.shape == (2, 2, 2) and after > before + 0.01


def price(actions, outputs, targets, metadata):
    """By truth and choice; looks at what it is given."""
    assert metadata["classes"] == ("a", "b", "c") and outputs.shape == (*actions.shape[:2], *actions.shape[3:], 3)
    return COSTS[targets[:, None, None], actions]


@pytest.mark.parametrize("elements", [(), (2, 2)])
def test_the_highest_expected_reward_against_loops(elements):
    outputs = 2 * torch.randn(40, 3, *elements, 3, generator=torch.manual_seed(0), dtype=torch.float64)
    rewards = {"price": (price, 2.0), "right": (lambda a, o, y, m: (a == y[:, None, None]).double(), 0.1)}
    decided = deciding.Decider(Task({}), rewards)(outputs, {"classes": ("a", "b", "c")})
    probs = outputs.softmax(-1).mean(1)
    for place in itertools.product(*map(range, decided.shape)):
        p = probs[place].tolist()
        expected = [sum(p[y] * (2 * float(COSTS[y, k]) + 0.1 * (y == k)) for y in range(3)) for k in range(3)]
        assert int(decided[place]) == expected.index(max(expected))
    assert not torch.equal(decided, probs.argmax(-1))


def test_calibration_comes_before_the_reward_and_gains():
    outputs = torch.randn(40, 2, 3, generator=torch.manual_seed(0), dtype=torch.float64)
    fitted = {"scale": [0.5], "bias": [[0.0, 1.0, -1.0]]}
    logits = 0.5 * outputs.softmax(-1).mean(1).log() + torch.tensor([0.0, 1.0, -1.0])
    right = {"r": (lambda a, o, y, m: (a == y[:, None, None]).double(), 1.0)}
    decider = deciding.Decider(Task({}), right, deciding.Decision("", "", [], **fitted))
    assert torch.equal(decider(outputs, {}), logits.argmax(-1))
    mine = {"s": (scores.ConfusionScore("s", scores.macro_f1, Task({})), 1.0)}
    decision = deciding.Decision("", "", [], **fitted, gains=[COSTS.tolist()])
    assert torch.equal(deciding.Decider(Task({}), mine, decision)(outputs, {}), (logits.softmax(-1) @ COSTS).argmax(-1))


class Tags(Task):
    def policy(self, outputs, progress=1.0):
        return Bernoulli(logits=outputs)


def test_tags_are_decided_by_expected_reward():
    """A missed tag costs nine times a wrong one: yes from 0.1 on."""
    outputs = 2 * torch.randn(6, 2, 4, generator=torch.manual_seed(0))
    cost = {"cost": (lambda a, o, y, m: -(a != y[:, None, None]).float() * (1 + 8 * y[:, None, None]), 1.0)}
    decided = deciding.Decider(Tags({}), cost)(outputs, {})
    assert torch.equal(decided.bool(), outputs.sigmoid().mean(1) > 0.1) and decided.float().std() > 0


def test_what_cannot_be_decided_is_said_in_one_line():
    score, plain = scores.ConfusionScore("s", scores.macro_f1, None), lambda a, o, y, m: a[..., 0].float()
    text = message(deciding.Decider, None, {"s": (score, 1.0), "r": (plain, 1.0)})
    assert text == "rollout.reward: to decide by s no other reward may stand beside it"
    assert "s is decided by gains; fit them: predict.py" in message(deciding.Decider, None, {"s": (score, 1.0)})
    for reward in (plain, lambda a, o, y, m: 1.0):
        text = message(deciding.Decider(Task({}), {"r": (reward, 1.0)}), torch.zeros(1, 2, 4, 3), {})
        assert text.startswith("rollout.reward: r does not judge each element by itself; decide by a score of the")
    for value in (torch.nan, torch.inf):  # of one of the choices
        reward = lambda a, o, y, m, value=value: torch.where(a == 1, value, 0.0)  # noqa: E731
        text = message(deciding.Decider(Task({}), {"r": (reward, 1.0)}), torch.zeros(1, 2, 3), {})
        assert text == "rollout.reward: r: NaN or infinity cannot be decided by"


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_of_detections_against_brute_force(seed):
    """Every threshold between two scores, some of which tie; a class without truth, one without detections."""
    g = torch.Generator().manual_seed(seed)
    classes, truths, detections = ["a", "b", "c", "d"], [], []
    for _ in range(6):
        boxes = torch.cat([torch.randint(8, (3, 2), generator=g), torch.full((3, 2), 12)], 1).double()
        truths.append({"boxes": boxes, "labels": torch.tensor([0, 1, 3]), "crowd": torch.tensor([False, False, False])})
        found = boxes.repeat(2, 1) + torch.randint(3, (6, 4), generator=g)
        labels, marks = torch.randint(3, (6,), generator=g), torch.randint(1, 10, (6,), generator=g) / 10
        detections.append({"boxes": found, "labels": labels, "scores": marks})
    curves = det.f1_curves(detections, truths, classes)
    fitted = det.best_thresholds(curves)
    assert fitted.keys() == curves.keys() == set(classes)
    f1s = []
    for k, name in enumerate(classes):

        def f1(limit, k=k):
            sure = [{key: x[(d["labels"] == k) & (d["scores"] >= limit)] for key, x in d.items()} for d in detections]
            of = [{key: x[t["labels"] == k] for key, x in t.items()} for t in truths]
            matches = det.matched(sure, of)[k]
            rows = [(0, 0, 0), *((hit[0].sum(), miss[0].sum(), number) for _, hit, miss, number in matches)]
            hits, misses, objects = (sum(column) for column in zip(*rows))
            return 2 * hits / (hits + misses + objects) if hits else 0.0

        best = max(f1(limit) for limit in [x / 20 for x in range(1, 21, 2)])
        assert f1(fitted[name]) == pytest.approx(best)
        f1s.append(best)
    assert det.mean_f1(curves, fitted) == pytest.approx(sum(f1s) / 4)
    assert det.mean_f1(curves, {}) <= det.mean_f1(curves, fitted) and det.best_thresholds({}) == {}


# --- The commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that learned balanced accuracy for a moment, and is unsure."""
    root = tmp_path_factory.mktemp("decide")
    make_folders(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        keys = ["rollout.reward=balanced_accuracy", "training.run_name=a", "rollout.action=all"]
        assert train.main(["--config", "tiny.yaml", *keys]) == 0
        assert train.main(["--config", "tiny.yaml", "training.steps=3", "training.run_name=b"]) == 0
    return root


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """A copy to work in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine.py").write_text(
        "def low(a, o, y, m):\n    return (a == y[:, None, None]).float() + 9.0 * (a == 0)\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *arguments: str) -> str:
    assert predict.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_fit_on_a_hold_out_then_decide(folder, capsys):
    """The fit is kept beside the checkpoint and names it; decisions are what it says; both are printed."""
    text = refused(capsys, predict.main, "ckpt/a", "eval", "--decide", "reward")
    assert text.startswith("rollout.reward: balanced_accuracy is decided by gains; fit them: predict.py ")
    line = said(capsys, "ckpt/a", "--fit", "train")
    assert line.startswith("train: 24 images: balanced_accuracy 0.") and "takes ckpt/a/decision.json" in line
    kept = json.loads(Path("ckpt/a/decision.json").read_text())
    assert kept["checkpoint"] == deciding.digest(load_checkpoint(Path("ckpt/a"))) and kept["holdout"] == "train"
    assert kept["score"][1] >= kept["score"][0] and f"{kept['score'][1]:.4f} by the fit" in line
    table = json.loads(said(capsys, "ckpt/a", "eval", "--json", "--decide", "reward"))
    plain = json.loads(said(capsys, "ckpt/a", "eval", "--json"))
    probs = torch.tensor([list(image["probabilities"].values()) for image in table["images"]], dtype=torch.float64)
    logits = kept["scale"][0] * probs.log() + torch.tensor(kept["bias"][0])
    decided = (logits.softmax(-1) @ torch.tensor(kept["gains"][0], dtype=torch.float64)).argmax(-1)
    assert [image["class"] for image in table["images"]] == ["014"[k] for k in decided]
    assert [image["probabilities"] for image in plain["images"]] == [i["probabilities"] for i in table["images"]]
    right = torch.arange(3).repeat_interleave(4)  # as many of each class
    mine, argmax = ((choice == right).double().mean() for choice in (decided, probs.argmax(-1)))
    expected = f"balanced_accuracy {mine:.4f} balanced_accuracy by argmax {argmax:.4f}"
    assert expected in said(capsys, "ckpt/a", "--evaluate", "eval", "--decide", "reward")
    assert train.main(["--evaluate", "ckpt/a", "training.decide=reward"]) == 0
    assert " balanced_accuracy by argmax 0." in capsys.readouterr().out
    shutil.copy("ckpt/a/decision.json", "ckpt/b")
    text = refused(capsys, predict.main, "ckpt/b", "eval", "--decide", "reward", "--reward", "balanced_accuracy")
    assert text.startswith("ckpt/b/decision.json: fitted for step 12, weights ") and ", not for step 3, w" in text
    Path("ckpt/b/decision.json").write_text("{}")
    assert "decision.json: cannot be read (" in refused(capsys, predict.main, "ckpt/b", "eval", "--decide", "reward")


def test_decide_by_a_reward_of_each_image(folder, capsys):
    """Needs no fit. Nine for a 0 and one for what is right: all are 0. In evaluations of a run as well."""
    table = json.loads(said(capsys, "ckpt/b", "eval", "--json", "--decide", "reward", "--reward", "mine.py:low"))
    assert {image["class"] for image in table["images"]} == {"0"}
    keys = ["rollout.reward=mine.py:low", "training.decide=reward", "rollout.advantage=rloo", "training.run_name=c"]
    assert train.main(["--config", "tiny.yaml", "training.steps=2", *keys]) == 0
    assert "low 9.3333 low by argmax " in capsys.readouterr().out
    keys = ["rollout.reward=macro_f1", "training.decide=reward", "training.run_name=d"]
    text = refused(capsys, train.main, "--config", "tiny.yaml", *keys)
    assert text.startswith("rollout.reward: macro_f1 is decided by gains; ") and not Path("ckpt/d").exists()
    text = refused(capsys, train.main, "--config", str(ROOT / "config_detection.yaml"), "training.decide=reward")
    assert text == "training.decide: reward: boxes are decided in predict.py alone, see --fit there"
