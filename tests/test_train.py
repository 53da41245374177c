"""train.py: it learns, logs what it says, stops and goes on without a trace, refuses what it cannot do in one line."""

import copy
import io
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml
from conftest import ROOT, TINY, files, make_folders, make_scenes, refused, same
from PIL import Image
from sklearn.metrics import f1_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import build
import train
from checkpoint import load_checkpoint
from config import SCHEMA, flatten
from evaluation import metrics_line
from grpo import keyed_rng, rollout
from images import prepare
from vision_task import Classification, Task, VisionClassificationDataset, classification_reward

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

# --- Helpers ----------------------------------------------------------------------------------------------------------

REWARDS = """
import itertools, torch
calls = itertools.count(1)
right = lambda actions, outputs, targets, metadata: (actions == targets[:, None, None]).float()
one = lambda actions, *_: torch.ones(actions.shape)
steps = lambda confusion: confusion.trace().round()  # a score of the confusion matrix, which is flat
rare = lambda actions, *others: right(actions, *others) * (actions == 0)  # groups of class 0 alone can be live
flat = lambda *arguments: right(*arguments).mean(2)
nan = lambda *arguments: right(*arguments) * (torch.nan if next(calls) > 4 else 1)
huge = lambda *arguments: right(*arguments) * (1e30 if next(calls) > 4 else 1)
"""
SMALL = ["training.steps=6", "training.batch_size=12", "training.log_interval=2", "training.eval_interval=3"]
NO_LABEL = "training.label_coef=0"
SMALL += ["training.save_interval=3", "training.device=cpu", "training.run_name=tiny", "model.embed_dim=16"]
SMALL += ["model.depth=2", "data.num_workers=0", "data.train_dir=scenes/train", "data.eval_dir=scenes/eval"]
SMALL += ["rollout.actions_per_sample=3", "detection.score_threshold=0.1"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    assert make_scenes.main(["--out", str(root), "--train", "64", "--eval", "16"]) == 0
    return root


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, scenes) -> Path:
    """An own folder to run in."""
    make_folders(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "scenes").symlink_to(scenes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, task: str = "classification") -> int:
    """train.py --config …, in this process; returns the exit status."""
    config = ["tiny.yaml"] if task == "classification" else [str(ROOT / f"config_{task}.yaml"), *SMALL]
    return train.main(["--config", *config, *arguments])


def refusal(capsys, *arguments: str) -> str:
    return refused(capsys, train.main, "--config", "tiny.yaml", *arguments)


def make_task() -> Task:
    """The task of `run`."""
    return build.configure(("tiny.yaml", flatten(TINY, "")))[1]


def ckpt(name: str = "tiny") -> dict:
    return load_checkpoint(Path("ckpt", name))


def learned(name: str = "tiny") -> list:
    """What must not depend on how often a run was stopped: everything in its checkpoint but the config."""
    return [value for key, value in ckpt(name).items() if key != "config"]


def left(name: str = "tiny") -> dict[str, bytes]:
    """All files of a run."""
    return files(Path("ckpt", name)) | files(Path("logs", name))


def events(name: str = "tiny") -> EventAccumulator:
    return EventAccumulator(f"logs/{name}", dict.fromkeys(("scalars", "images", "histograms"), 0)).Reload()


def scalars(name: str = "tiny") -> dict[str, dict[int, float]]:
    """tag -> step -> value; a step that is there twice fails. Times are left out."""
    accumulator, found = events(name), {}
    for tag in accumulator.Tags()["scalars"]:
        steps = [event.step for event in accumulator.Scalars(tag)]
        assert steps == sorted(set(steps)), (tag, steps)
        found[tag] = {event.step: event.value for event in accumulator.Scalars(tag)}
    return {tag: values for tag, values in found.items() if not tag.startswith("speed/")}


def before_each(monkeypatch, name: str, look) -> None:
    """Call look(number, *arguments, **options) before each call of train's function `name`, counted from 1."""
    function, numbers = getattr(train, name), iter(range(1, 10**6))

    def call(*arguments, **options):
        look(next(numbers), *arguments, **options)
        return function(*arguments, **options)

    monkeypatch.setattr(train, name, call)


def stop_after(monkeypatch, step: int, *arguments: str, by: int = signal.SIGTERM, **options) -> int:
    """`run`, asked to stop by a signal in its update number `step`; its workers, who get it too, ignore it."""

    def stop(number: int, *_, **__) -> None:
        if number == step:
            states = [Path(f"/proc/{child.pid}/status").read_text() for child in multiprocessing.active_children()]
            assert all(int(re.search(r"SigIgn:\s*(\w+)", state)[1], 16) >> (by - 1) & 1 for state in states)
            os.kill(os.getpid(), by)

    with monkeypatch.context() as patch:
        before_each(patch, "update_policy", stop)
        return run(*arguments, **options)


# --- It learns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective, bound", [("grpo", 0.7), ("supervised", 0.6)])
def test_the_quick_start_learns(folder, objective, bound):
    """config_digits.yaml, four digits, 120 steps of 32: far above the 0.25 of chance, from rewards as from labels."""
    for split in ("train", "eval"):
        (folder / "digits" / split).mkdir(parents=True)
        for name in "0147":
            (folder / "digits" / split / name).symlink_to(ROOT / "data" / split / name)
    keys = ["steps=120", "batch_size=32", "warmup_steps=10", "eval_interval=120", "log_interval=20", "run_name=tiny"]
    keys = [f"training.{key}" for key in [*keys, "learning_rate=1e-3", "device=cpu", f"objective={objective}"]]
    keys += ["data.train_dir=digits/train", "data.eval_dir=digits/eval", "data.num_workers=0"]
    assert train.main(["--config", str(ROOT / "config_digits.yaml"), *keys, "rollout.num_mc_samples=2"]) == 0
    found = scalars()
    assert found["eval/accuracy"][120] == pytest.approx(ckpt()["best_metric"])
    assert found["eval/accuracy"][120] > bound and found["eval_mc/accuracy"][120] > bound
    assert found["eval/nll"][120] < 1.0 < math.log(4) and found["eval_mc/nll"][120] < 1.0
    assert found["reward/mean"][1] < 0.4 and found["reward/mean"][120] > 0.6


@pytest.mark.parametrize(
    "task, metric, keys, bound",
    [
        ("segmentation", "mean_iou", [], 0.7),
        ("segmentation", "mean_iou", ["rollout.reward=mask_iou_credit", "training.best=null"], 0.7),
        ("segmentation", "mean_iou", ["rollout.reward=pixel_reward", "training.best=eval/reward"], 0.65),
        ("detection", "ap50", ["detection.supervised_loss=log_prob", "training.learning_rate=8e-3"], 0.25),
        ("detection", "ap50", ["rollout.reward=detection_reward", "rollout.actions_per_sample=16", NO_LABEL], 0.25),
    ],
)
def test_masks_and_boxes_are_learned_and_shown(capsys, task, metric, keys, bound):
    """The shipped configs on few scenes, evaluated on those that they learn; --evaluate says what the run said."""
    steps, best, line = {"segmentation": (50, "mean_iou", "mean iou 0."), "detection": (120, "map", "mAP 0.")}[task]
    keys = [*keys, "training.batch_size=16", "training.warmup_steps=20", "model.embed_dim=48", "model.depth=3"]
    keys += [f"training.steps={steps}", f"training.eval_interval={steps // 2}", "detection.score_threshold=0.02"]
    assert run(*keys, "data.train_dir=scenes/eval", task=task) == 0
    found, said = scalars(), capsys.readouterr().out.splitlines()[-2]
    assert found[f"eval/{metric}"][steps] > bound and found[f"eval_mc/{metric}"][steps] > bound
    best = "reward" if "rollout.reward=pixel_reward" in keys else best  # one that is not the task's first
    assert ckpt()["best_metric"] == pytest.approx(max(found[f"eval/{best}"].values()))
    picture = Image.open(io.BytesIO(events().Images("eval/most_uncertain")[0].encoded_image_string))
    assert len(picture.convert("RGB").getcolors(100_000)) > 50
    assert said.startswith(f"step {steps}: {line}")
    assert run("--evaluate", "ckpt/tiny") == 0 and capsys.readouterr().out.splitlines()[-1] == said


# --- What one sees ----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_what_it_should(capsys):
    """Every tag, at its steps; values against what is recomputed by hand."""
    reward = "{classification_reward: 1, rewards.py:right: 2}"
    assert run(f"rollout.reward={reward}", "training.kl_coef=0.1", "training.update_epochs=2") == 0
    found, accumulator, terms = scalars(), events(), ["classification_reward", "rewards.py:right"]
    logged = ["reward/mean", "reward/std", "reward/min", "groups/live", "loss", "grad_norm", "learning_rate"]
    logged += [f"policy/{name}" for name in ("entropy", "ratio", "clip_fraction", "kl")] + ["data/bad_images"]
    evaluated = [f"{kind}/{name}" for kind in ("eval", "eval_mc") for name in ("accuracy", "nll", "ece")]
    evaluated += ["eval/reward", *(f"eval/reward/{term}" for term in terms)]
    expected = dict.fromkeys([*logged, *(f"reward/{term}" for term in terms)], [1, 5, 10, 12])
    assert {tag: list(values) for tag, values in found.items()} == expected | dict.fromkeys(evaluated, [6, 12])
    task = make_task()
    for tag in ("speed/images_per_second", "speed/data_wait"):
        assert [event.step for event in accumulator.Scalars(tag) if event.value > 0] == [1, 5, 10, 12]

    # The first step, by hand: seeded weights, the first 16 places of the seeded order, the rollout of its key.
    model = build.build_model(task, 3, torch.device("cpu"))
    dataset = VisionClassificationDataset("train", 8)
    with keyed_rng(7, "order", 0):
        indices = torch.randperm(24)[:16]
    batch = dataset.batch(indices, torch.stack([dataset[i] for i in indices]))
    batch.inputs = prepare(batch.inputs, task.config["data"]["mean"], task.config["data"]["std"])
    settings = build.rollout_settings(task.config)
    episode = rollout(model, batch, {"r": (classification_reward, 3.0)}, task.policy, settings, key=(7, 0, 0))
    groups = episode.rewards.flatten(1)  # 1 * reward + 2 * the same reward
    first = {tag: values[1] for tag, values in found.items() if 1 in values}
    assert first["reward/mean"] == pytest.approx(float(groups.mean()))
    assert first["reward/std"] == pytest.approx(float(groups.std(1, correction=0).mean()))
    assert [first[f"reward/{term}"] for term in terms] == pytest.approx([float(groups.mean()) / 3] * 2)
    assert first["groups/live"] == pytest.approx(float((groups.amax(1) != groups.amin(1)).float().mean()))
    assert first["policy/entropy"] == pytest.approx(float(episode.policy.entropy().detach().mean()), rel=1e-5)
    assert first["policy/ratio"] == pytest.approx(1, abs=0.05) and first["policy/ratio"] != 1  # of two epochs
    assert 0 < first["policy/kl"] < found["policy/kl"][12] and first["grad_norm"] > 0 == first["reward/min"]

    # Histogram, picture, text.
    histograms = [(event.step, event.histogram_value) for event in accumulator.Histograms("groups/success_rate")]
    assert [(step, values.num) for step, values in histograms] == [(6, 16), (12, 32)]  # since the last log
    assert all(0 <= values.min <= values.max <= 3 for _, values in histograms)
    pictures = accumulator.Images("eval/most_uncertain")
    picture = Image.open(io.BytesIO(pictures[0].encoded_image_string))
    assert [event.step for event in pictures] == [6, 12] and picture.size[0] == 4 * 128
    assert len(picture.convert("RGB").getcolors(99999)) > 16
    text = accumulator.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text.strip("`")) == ckpt()["config"]

    # The evaluation: the checkpoint's network by hand, and what --evaluate prints.
    model.load_state_dict(ckpt()["model"])
    eval_set = VisionClassificationDataset("eval", 8)
    with torch.no_grad():
        logits = task.network(model)(torch.stack([eval_set[i] for i in range(12)]))
    assert found["eval/accuracy"][12] == pytest.approx(float((logits.argmax(1) == eval_set.targets).float().mean()))
    nll = torch.nn.functional.cross_entropy(logits, eval_set.targets)
    assert found["eval/nll"][12] == pytest.approx(float(nll), rel=1e-5)
    line = f"step 12: {metrics_line({tag: found[tag][12] for tag in evaluated})}"
    assert line in capsys.readouterr().out.splitlines()
    before = left()
    for path in ("ckpt/tiny", "ckpt/tiny/", "ckpt/tiny/step_000012.pt"):
        assert run("--evaluate", path) == 0
        assert capsys.readouterr().out.splitlines()[-1] == line
    assert run("--evaluate", "ckpt/tiny/step_000006.pt", "data.eval_dir=train") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "train: 24 images" and out[-1].startswith("step 6: accuracy ") and left() == before


def test_the_console_tells_what_was_found_and_how_it_goes(capsys):
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "train: 24 images of 3 classes (id name): 0 0, 1 1, 2 4",
        "eval: 12 images",
        "data.cache: auto: 0 MB of decoded images, kept in memory after the first epoch",
        f"{sum(p.numel() for p in ckpt()['model'].values()) / 1e6:.2f} M parameters on cpu, float32",
    ]
    assert [line.split(":")[0] for line in lines[5:]] == ["step 6", "step 12", "done"]
    assert lines[4].startswith("step 1/12  reward 0.") and lines[-1] == "done: ckpt/tiny/step_000012.pt"


def test_help_lists_the_keys(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"\n  {name} = " in text for name in [*SCHEMA, "detection.box_std"])


def test_best_is_the_first_of_the_best_evaluations():
    assert run("training.eval_interval=1", "training.save_interval=99", "training.learning_rate=1e-2") == 0
    accuracy, step = scalars()["eval/accuracy"], ckpt("tiny/best.pt")["step"]
    assert step == max(accuracy, key=accuracy.get) < 12
    assert ckpt()["best_metric"] == pytest.approx(accuracy[step])


def test_a_metric_below_zero_has_a_best_checkpoint_too(monkeypatch):
    monkeypatch.setattr(Classification, "metrics", lambda self, probs, targets: {"accuracy": -7.0})
    assert run("training.steps=3", "training.eval_interval=1") == 0
    assert ckpt("tiny/best.pt")["step"] == 1 and ckpt()["best_metric"] == -7


def test_the_own_reward_is_evaluated_and_chooses_the_best(capsys):
    """Of the deterministic network's decisions over the evaluation set; a run with a reward of its own goes by the sum,
    --evaluate says the same; where the file is gone it warns."""
    Path("mine.py").write_text("import torch\nlow = lambda actions, *_: (actions == 1).float()\n")
    rewards = "rollout.reward={mine.py:low: 2, macro_f1: 0.5, classification_reward: 1}"
    assert run(rewards, "training.learning_rate=1e-2", "training.eval_interval=2", "rollout.action=all") == 0
    found, said = scalars(), capsys.readouterr().out.splitlines()[-2]
    assert found["eval/reward/classification_reward"] == found["eval/accuracy"]
    parts = zip(
        *(found[f"eval/reward/{name}"].values() for name in ("mine.py:low", "macro_f1", "classification_reward"))
    )
    totals = [2 * low + 0.5 * f1 + right for low, f1, right in parts]
    assert list(found["eval/reward"].values()) == pytest.approx(totals, abs=1e-6)
    assert ckpt()["best_name"] == "eval/reward" and ckpt()["best_metric"] == pytest.approx(max(totals))
    assert re.search(r" reward \d\.\d{4} low \d\.\d{4} macro_f1 \d\.\d{4} classification_reward \d\.\d{4} \(mean", said)
    task = build.configure(("tiny.yaml", flatten(ckpt()["config"], "")))[1]
    dataset, model = task.open("eval"), build.build_model(task, 3, torch.device("cpu"))
    model.load_state_dict(ckpt()["model"])
    decided = task.network(model)(torch.stack([dataset[i] for i in range(12)])).argmax(-1)
    expected = f1_score(dataset.targets, decided, average="macro")
    assert found["eval/reward/macro_f1"][12] == pytest.approx(expected, abs=1e-6)
    assert run("--evaluate", "ckpt/tiny") == 0 and capsys.readouterr().out.splitlines()[-1] == said
    Path("mine.py").unlink()
    assert run("--evaluate", "ckpt/tiny") == 0
    *_, warning, line = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: rollout.reward: mine.py cannot be loaded (") and line.startswith("step 12: acc")
    Path("mine.py").write_text("low = lambda *_: 1.0\n")
    problem = "rollout.reward: mine.py:low returned float; expected a tensor"
    assert refusal(capsys, "--evaluate", "ckpt/tiny") == problem


def test_the_best_by_a_metric_of_choice_and_no_more_patience(capsys):
    """Less of the NLL is better; a run ends after two evaluations without a better one, and is then over."""
    keys = ["training.eval_interval=1", "training.save_interval=99", "training.patience=2", "training.steps=40"]
    assert run(*keys, "training.best=eval/nll", "training.learning_rate=3e-2", "training.warmup_steps=0") == 0
    nll, lines = scalars()["eval/nll"], capsys.readouterr().out.splitlines()
    best, last = min(nll, key=nll.get), max(nll)
    assert ckpt("tiny/best.pt")["step"] == best and last == best + 2 == ckpt()["step"] < 40
    assert lines[-2] == f"training.patience: 2 evaluations had no better eval/nll than {nll[best]:.4f}"
    assert lines[-1] == f"done: ckpt/tiny/step_{last:06d}.pt"
    assert run("--resume", "ckpt/tiny") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to do: training.steps is 40, training.patience is 2"
    Path("score.py").write_text("def second(confusion):\n    return confusion[1, 1] / confusion[1].sum()\n")
    assert run("training.run_name=score", "training.eval_interval=3", "training.best=score.py:second") == 0
    found, state = scalars("score"), ckpt("score")
    assert state["best_name"] == "eval/reward/score.py:second"
    assert state["best_metric"] == pytest.approx(max(found["eval/reward/score.py:second"].values()))
    assert found["eval/reward"] == found["eval/reward/classification_reward"]  # its weight is 0
    shutil.rmtree(sorted(Path("eval").iterdir())[1])  # of which there is nothing to divide by
    capsys.readouterr()
    assert run("training.run_name=none", "training.steps=1", "training.best=score.py:second") == 0
    warning = "warning: eval/reward/score.py:second is NaN, so it chooses no best.pt; a class without images, perhaps"
    assert warning in capsys.readouterr().out.splitlines() and math.isnan(ckpt("none")["best_metric"])


def test_each_host_says_what_is_wrong_there(capsys, monkeypatch):
    """Of the processes of a host the first speaks, before they meet: another host may lack the data."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, local, said in (("2", "0", ["train.py, rank 2: none: no such folder; "]), ("3", "1", [])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert run("data.train_dir=none") == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(said) and all(map(str.startswith, lines, said))


def test_processes_that_go_on_from_different_steps_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(train.processes, "from_rank_zero", lambda function, group: (5, "other images"))
    assert refusal(capsys).startswith("step 0, 24 images (")


@pytest.mark.parametrize("objective, times", [("grpo", 1), ("supervised", 0)])
def test_dead_groups_are_a_warning_where_rewards_teach(capsys, monkeypatch, objective, times):
    monkeypatch.setattr("report.WARN_DEAD_STEPS", 4)
    assert run("rollout.reward=rewards.py:one", f"training.objective={objective}") == 0
    assert capsys.readouterr().out.count("warning: no live group in 4 steps") == times


def test_without_an_eval_folder_it_trains_and_says_so(capsys):
    """No evaluation, no best.pt, all the rest. Only a folder that nobody named may be missing; a checkpoint of an older
    version, which named it nevertheless, goes on."""
    assert refusal(capsys, "data.eval_dir=nowhere") == (
        "data.eval_dir: nowhere: no such folder; null trains without evaluation"
    )
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    del config["data"]["eval_dir"]
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    assert run("training.steps=6") == 0
    assert "data.eval_dir: null; training without evaluation" in capsys.readouterr().out.splitlines()
    state = ckpt()
    state["config"]["data"]["eval_dir"] = "data/eval"
    torch.save(state, "ckpt/tiny/last.pt")
    assert run("--resume", "auto", "training.steps=12") == 0
    assert "best.pt" not in left() and ckpt()["step"] == 12
    assert not [tag for tag in scalars() if tag.startswith("eval")]


# --- Stopped and resumed ----------------------------------------------------------------------------------------------

REGULAR = ["training.kl_coef=0.1", "training.update_epochs=2", "data.augment=true", "training.micro_batch_size=5"]
ARGMAX = ["rollout.action=argmax", "training.entropy_coef=0.1"]
ALL = ["rollout.action=all", "training.update_epochs=2", "training.micro_batch_size=5"]
MACRO_F1 = "rollout.reward={classification_reward: 1, macro_f1: 0.5}"


@pytest.mark.parametrize(
    "task, keys, loader",
    [
        ("classification", [], []),
        ("classification", ["data.augment=true"], ["data.num_workers=1", "data.cache=never"]),
        ("classification", REGULAR + ARGMAX, []),
        ("classification", [*ALL, MACRO_F1], []),
        ("classification", ["training.layer_decay=0.7", "training.freeze_blocks=1", "training.kl_coef=0.1"], []),
        ("segmentation", REGULAR, []),
        ("segmentation", [*ALL, "rollout.reward=pixel_reward"], []),
        ("detection", REGULAR, []),
        ("detection", [*ALL, "rollout.reward=detection_reward"], []),
    ],
)
def test_stopped_in_mid_epoch_and_resumed_it_is_the_run_in_one_piece(capsys, monkeypatch, task, keys, loader):
    """SIGTERM to all, workers too, as a scheduler sends it: the step is finished. The end is the same bit for bit,
    points in TensorBoard included, whatever loads the images."""
    steps = 12 if task == "classification" else 6
    assert run("training.run_name=whole", *keys, task=task) == 0
    assert stop_after(monkeypatch, 4, *keys, *loader, task=task) == 143
    stopped = "stopped after step 4, saved ckpt/tiny/step_000004.pt; go on with --resume ckpt/tiny"
    assert capsys.readouterr().out.splitlines()[-1] == stopped and ckpt()["step"] == 4
    time.sleep(1.1 - time.time() % 1)  # TensorBoard sorts its files by the second
    assert run("--resume", "ckpt/tiny", "data.num_workers=0", "data.cache=always") == 0
    out = capsys.readouterr().out.splitlines()
    assert "ckpt/tiny: going on after step 4" in out and out[-1] == f"done: ckpt/tiny/step_{steps:06d}.pt"
    assert same(learned(), learned("whole")) and scalars() == scalars("whole")
    assert run("training.run_name=plain", task=task) == 0
    assert same(ckpt("plain")["model"], ckpt("whole")["model"]) == (keys == [])  # the keys did something


def test_a_run_killed_in_a_save_leaves_no_point_twice(monkeypatch):
    """All points up to it are in TensorBoard, also of steps that will be made again: the resumed run ends in the
    weights, files and points of one that was never stopped."""

    def die(number: int, *_, **__) -> None:
        assert len(flushed) == number
        if number == 4:
            raise KeyboardInterrupt

    flushed, flush = [], train.Log.flush
    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "flush", lambda log: flushed.append(flush(log)))
        before_each(patch, "save_checkpoint", die)
        assert run() == 130
    assert list(scalars()["reward/mean"]) == [1, 5, 10, 12]
    assert ckpt()["step"] == 9 and len(ckpt()["rows"]) == 4  # steps 6 to 9 are pending: logged at 10
    assert run("training.run_name=whole") == 0
    time.sleep(1.1 - time.time() % 1)  # TensorBoard sorts its files by the second
    assert run("--resume", "ckpt/tiny") == 0
    assert same(learned(), learned("whole")) and scalars() == scalars("whole")
    assert list(files(Path("ckpt/tiny"))) == list(files(Path("ckpt/whole")))
    assert len(os.listdir("logs/tiny")) == 2  # the same TensorBoard run


@pytest.mark.parametrize("step, status, end", [(7, 130, "stopped after step 7, "), (12, 0, "done: ckpt/tiny/step_")])
def test_ctrl_c(capsys, monkeypatch, step, status, end):
    """The step is finished; in the last one nothing is left to go on with. A second one would stop at once."""
    assert stop_after(monkeypatch, step, by=signal.SIGINT) == status
    assert capsys.readouterr().out.splitlines()[-1].startswith(end) and ckpt()["step"] == step
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_resume_auto(capsys, monkeypatch):
    """Without a run it starts one; with one it goes on; with a finished one there is nothing to do. The count of steps
    without a live group is in the checkpoint, pending steps included: 33 before and 17 after make 50."""
    keys = ("rollout.reward=rewards.py:one", "training.steps=55", "training.save_interval=99", "data.eval_dir=null")
    assert stop_after(monkeypatch, 33, "--resume", "auto", *keys) == 143
    out = capsys.readouterr().out
    assert "going on" not in out and "warning" not in out
    assert ckpt()["dead_steps"] == 30 and len(ckpt()["rows"]) == 3 and set(scalars()["groups/live"].values()) == {0.0}
    assert run("--resume", "auto") == 0
    out = capsys.readouterr().out
    assert "ckpt/tiny: going on after step 33" in out and out.count("warning: no live group in 50 steps") == 1
    before = left()
    assert run("--resume", "auto") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to do: training.steps is 55"
    assert left() == before


def test_a_run_that_exists_is_not_overwritten(capsys):
    """Neither its checkpoints nor, alone, its TensorBoard events."""
    assert run() == 0
    before, end = left(), "exists: go on with --resume auto, delete it, or name a new run with training.run_name=NAME"
    assert refusal(capsys) == f"ckpt/tiny {end}"
    assert refusal(capsys, "training.ckpt_dir=elsewhere") == f"logs/tiny {end}"
    assert left() == before and not Path("elsewhere").exists()
    assert run("training.run_name=other", "training.steps=3") == 0 and ckpt("other")["step"] == 3


def test_the_checkpoints_config_wins_over_the_file_and_the_command_line_over_both(monkeypatch):
    """A file edited since does not matter; a key that was typed does, in the optimizer too: more steps on a longer
    cosine, say."""
    assert stop_after(monkeypatch, 4, "training.seed=3", "training.layer_decay=0.7", "rollout.advantage=grpo") == 143
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY | {"training": {"seed": 5, "warmup_steps": 1}}))
    changed = {"steps": 20, "weight_decay": 0.5, "betas": [0.5, 0.6], "learning_rate": 2e-3, "layer_decay": 0.5}
    assert run("--resume", "ckpt/tiny", *(f"training.{name}={value}" for name, value in changed.items())) == 0
    config, groups, rates = ckpt()["config"], ckpt()["optimizer"]["param_groups"], scalars()["learning_rate"]
    assert config["rollout"]["advantage"] == "grpo" and config["training"]["run_name"] == "tiny"
    expected = TINY["training"] | {"seed": 3} | changed
    assert {name: config["training"][name] for name in expected} == expected and ckpt()["step"] == 20
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert {group["betas"] for group in groups} == {(0.5, 0.6)}
    training = SimpleNamespace(**config["training"])
    last = {step: build.learning_rate(step - 1, training) for step in (5, 10, 15, 20)}
    assert rates.pop(1) < 1e-3 and rates == pytest.approx(last, rel=1e-6)
    scales = {group["lr_scale"]: group["lr"] for group in groups}
    assert scales == pytest.approx({scale: scale * last[20] for scale in (1.0, 0.5, 0.25, 0.125)})


def test_what_a_run_that_goes_on_cannot_follow_is_refused_or_said(capsys, monkeypatch):
    """Another name or checkpoint folder is refused; keys of an edited config file are named. A damaged last.pt gives
    way to the newest whole checkpoint for --resume auto."""
    assert stop_after(monkeypatch, 4) == 143
    for key, own in (("run_name", "tiny"), ("ckpt_dir", "ckpt")):
        expected = f"training.{key}: a run that goes on keeps its own, {own}; drop the key"
        assert refusal(capsys, "--resume", "ckpt/tiny", f"training.{key}=other") == expected
    assert run("--resume", "ckpt/tiny", "training.run_name=tiny", "training.steps=6") == 0
    edited = TINY | {"training": TINY["training"] | {"learning_rate": 0.5, "seed": 9}}
    Path("tiny.yaml").write_text(yaml.safe_dump(edited))
    Path("ckpt/tiny/last.pt").write_bytes(b"")  # as the file system left it; step_000006.pt is the same file
    capsys.readouterr()
    assert run("--resume", "auto", "training.steps=8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch("warning: .*last.pt: .*; going on from .*step_000004.pt, the newest whole one", lines[0])
    begin = "note: tiny.yaml has another training.learning_rate, training.seed than the run that goes on, "
    assert lines[1].startswith(begin) and "ckpt/tiny: going on after step 4" in lines


def test_a_run_can_be_moved_and_resumed_from_one_of_its_files():
    """It goes on where it lies now; from an older step, written when there was no layer_decay, to the same end."""
    assert run() == 0
    whole, path = ckpt(), Path("elsewhere/moved/step_000006.pt")
    shutil.move("ckpt/tiny", "elsewhere/moved")
    shutil.move("logs/tiny", "logs/moved")
    old = load_checkpoint(path)
    del old["config"]["training"]["layer_decay"], old["config"]["training"]["freeze_blocks"]
    for group in old["optimizer"]["param_groups"]:
        del group["lr_scale"]
    torch.save(old, path)
    assert run("--resume", str(path)) == 0
    end = load_checkpoint(Path("elsewhere/moved"))
    assert (end["config"]["training"]["ckpt_dir"], end["config"]["training"]["run_name"]) == ("elsewhere", "moved")
    assert end["optimizer"].pop("param_groups") == whole["optimizer"].pop("param_groups")
    assert all(same(end[key], whole[key]) for key in whole if key != "config")
    assert not Path("ckpt/tiny").exists() and list(scalars("moved")["reward/mean"]) == [1, 5, 10, 12]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--resume", "ckpt/none"], "ckpt/none: no such file"),
        (["--resume", "ckpt"], "ckpt/last.pt: no such file"),
        (["--resume", "tiny.yaml"], "tiny.yaml: not a checkpoint that can be read (damaged, or more than"),
        (["--resume", "auto", "model.depth=3"], "ckpt/tiny: its weights do not fit the model section; "),
        (["--resume", "auto", "training.kl_coef=0.1"], "training.kl_coef: this run keeps no reference; "),
        (["--resume", "auto", "training.freeze_blocks=2"], "ckpt/tiny: its optimizer does not fit training."),
        (["--resume", "auto", "training.layer_decay=0.7"], "ckpt/tiny: its optimizer does not fit training."),
        (["--resume", ""], "--resume, --evaluate: the run's name is empty; expected ckpt/<run>"),
        (["--evaluate", ""], "--resume, --evaluate: the run's name is empty; expected ckpt/<run>"),
        (["--evaluate", "auto", "training.run_name=none"], "ckpt/none: no such file"),
        (["--evaluate", "ckpt/none"], "ckpt/none: no such file"),
        (["--evaluate", "ckpt/tiny", "data.eval_dir=null"], "data.eval_dir: null; --evaluate needs a folder of images"),
    ],
)
def test_what_cannot_be_resumed_or_evaluated(capsys, arguments, expected):
    """One line, and the run stays as it is."""
    assert run("training.steps=3", "training.freeze_blocks=1") == 0
    before = left()
    assert refusal(capsys, *arguments, "training.steps=5").startswith(expected)
    assert left() == before


def test_a_checkpoint_without_its_optimizer_is_not_gone_on_from(capsys):
    """As people strip it to share the weights."""
    assert run("training.steps=1") == 0
    hint = "have the whole checkpoint, or start a new run from it with model.checkpoint_path"
    for left_over in ({}, None):
        torch.save(ckpt() | {"optimizer": left_over}, "ckpt/tiny/last.pt")
        assert refusal(capsys, "--resume", "auto", "training.steps=5") == f"ckpt/tiny: its optimizer is missing; {hint}"


def test_folders_that_a_run_should_not_go_by(capsys):
    """A header that cannot be read is met before the first step; the evaluation may be of the training images, and is
    said to be; a run that goes on has images of all its classes."""
    assert run("training.steps=1", "data.eval_dir=train") == 0
    warning = "warning: data.eval_dir is data.train_dir: the metrics are of images that are trained on"
    assert warning in capsys.readouterr().out.splitlines()
    bad, *folders = sorted(Path("train").iterdir())[1] / "bad.png", *sorted(Path("train").iterdir())
    bad.touch()
    assert refusal(capsys, "training.run_name=other").startswith(f"{bad}: not a readable image (")
    assert not Path("ckpt/other").exists()
    bad.unlink()
    shutil.rmtree(folders[0])
    problem = f"train: no image of {folders[0].name}; a run that goes on keeps its classes"
    assert refusal(capsys, "--resume", "auto", "training.steps=5") == problem


# --- Ways to compute the same -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_replaying_the_live_groups_gives_the_same_weights(monkeypatch, frozen):
    """Few live groups: a pass without a graph and a replay of the live ones, against one pass with a graph for all.
    Frozen blocks stay as they are in both, all other weights are learned."""
    kept = []
    before_each(monkeypatch, "rollout", lambda *_, keep_graph, **__: kept.append(keep_graph))
    keys = ["rollout.reward=rewards.py:rare", "training.log_interval=2", "training.micro_batch_size=8"]
    keys += [f"training.freeze_blocks={frozen}", "training.learning_rate=3e-3"]
    assert run("training.run_name=replayed", *keys) == 0
    assert max(scalars("replayed")["groups/live"].values()) < train.REPLAY_BELOW
    assert kept == [True] * 2 + [False] * 22  # from the first log on, two micro-batches a step
    kept.clear()
    monkeypatch.setattr(train, "REPLAY_BELOW", 0.0)
    assert run("training.run_name=one_pass", *keys) == 0
    assert kept == [True] * 24
    start, replayed = build.build_model(make_task(), 3, torch.device("cpu")).state_dict(), ckpt("replayed")["model"]
    held = ("cls_token", "pos_embed", "patch_embed.", *(f"blocks.{i}." for i in range(frozen))) if frozen else ()
    for name, tensor in ckpt("one_pass")["model"].items():
        torch.testing.assert_close(replayed[name], tensor, atol=1e-5, rtol=1e-3)
        assert torch.equal(tensor, start[name]) == torch.equal(replayed[name], start[name]) == name.startswith(held)


def test_micro_batches_give_the_same_gradients():
    """Without draws (labels, no dropout), 5 at a time or 16: the same weights up to rounding."""
    plain = ("training.objective=supervised", "model.dropout=0", "rollout.num_mc_samples=1")
    assert run("training.run_name=whole", *plain) == 0
    assert run("training.run_name=parts", "training.micro_batch_size=5", *plain) == 0
    for name, tensor in ckpt("whole")["model"].items():
        torch.testing.assert_close(ckpt("parts")["model"][name], tensor, atol=2e-4, rtol=1e-3)
    whole, parts = scalars("whole"), scalars("parts")
    for name in ("loss", "eval/nll"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-3)


def test_micro_batches_of_rewards(monkeypatch):
    """Each micro-batch draws with a key of its own; all groups are counted; the plain policy gradient has ratio 1."""
    keys = []

    def look(_, network, batch, rewards, policy, *__, key, **___) -> None:
        keys.append((len(batch), key, policy.keywords["progress"]))

    before_each(monkeypatch, "rollout", look)
    assert run("training.micro_batch_size=4") == 0
    assert keys == [(4, (7, step, place), step / 12) for step in range(12) for place in range(0, 16, 4)]
    assert set(scalars()["policy/ratio"].values()) == {1.0}
    assert events().Histograms("groups/success_rate")[0].histogram_value.num == 16
    assert ckpt()["rows"] == [] and ckpt()["step"] == 12


def test_every_choice_with_one_pass_is_the_label(monkeypatch):
    """config_digits.yaml in float64: maxrl's 0/1 reward, taken exactly, is cross-entropy, step by step."""
    monkeypatch.setattr("images.per_channel", lambda values, device: torch.tensor(values)[:, None, None] * 255)
    keys = ["--config", str(ROOT / "config_digits.yaml"), "training.steps=10", "training.batch_size=16"]
    keys += ["data.train_dir=train", "data.eval_dir=null", "data.num_workers=0", "training.device=cpu"]
    torch.set_default_dtype(torch.float64)
    try:
        for name in ("rollout.action=all", "training.objective=supervised"):
            assert train.main([*keys, name, "rollout.num_mc_samples=1", f"training.run_name={name.split('=')[1]}"]) == 0
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in ckpt("supervised")["model"].items():
        torch.testing.assert_close(ckpt("all")["model"][name], tensor, atol=1e-9, rtol=0)
    assert scalars("all")["loss"][10] != 0 and tensor.dtype == torch.float64


def test_compiled(monkeypatch):
    """model.compile: the same weights, under the same names (traced by dynamo, run by eager kernels)."""
    compiled, compile_module = [], torch.nn.Module.compile

    def compile_with(self, **options) -> None:
        compiled.append(options)
        compile_module(self, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with)
    keys = ("training.steps=3", "rollout.reward=rewards.py:rare", "training.log_interval=1")
    assert run("training.run_name=eager", *keys) == 0
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):  # train.py sets it
        assert run("training.run_name=compiled", "model.compile=true", *keys) == 0
    torch._dynamo.reset()
    assert compiled == [{"fullgraph": True, "dynamic": False}]
    assert list(ckpt("compiled")["model"]) == list(ckpt("eager")["model"])
    for name, tensor in ckpt("eager")["model"].items():
        torch.testing.assert_close(ckpt("compiled")["model"][name], tensor, atol=1e-5, rtol=1e-3)
    assert scalars("compiled")["eval/nll"] == pytest.approx(scalars("eager")["eval/nll"], rel=1e-4)


def test_start_from_supervised_weights(capsys):
    """Likelihood first, reward second: the run starts from the checkpoint's weights; the reference is they, and stays
    so over a resume."""
    assert run("training.run_name=first", "training.objective=supervised") == 0
    start, keys = ckpt("first")["model"], ("training.kl_coef=0.1", "training.steps=3")
    capsys.readouterr()
    assert run("model.checkpoint_path=ckpt/first/last.pt", *keys) == 0
    assert f"ckpt/first/last.pt: {len(start)} tensors loaded" in capsys.readouterr().out.splitlines()
    assert run("--resume", "ckpt/tiny", "training.steps=6") == 0
    assert same(ckpt()["reference"], start) and not same(ckpt()["model"], start)
    text = refusal(capsys, "training.run_name=third", "model.checkpoint_path=none.pt")
    assert text == "none.pt: no such file" and not Path("ckpt/third").exists()


# --- What is refused, and what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["training.stepz=5"], "command line: unknown key training.stepz; did you mean training.steps?"),
        (["data.train_dir=none"], "none: no such folder; it should hold one subdirectory of images per class"),
        (["model.num_classes=4"], "model.num_classes: 4, but train holds 3 classes; set it to null"),
        (["data.eval_dir=odd"], "odd: classes unknown in the training folder: cat"),
        (["training.device=abacus"], "training.device: abacus is not available here ("),
        (["training.device=meta"], "training.device: meta is not available here ("),
        (["data.train_dir=odd", "data.eval_dir=null", "data.num_workers=1"], "odd/0/bad.png: not a readable image ("),
        (["training.log_dir=rewards.py"], "training.log_dir: rewards.py/tiny cannot be written (Not a directory)"),
        (["training.ckpt_dir=/proc/x"], "training.ckpt_dir: /proc/x/tiny cannot be written ("),
        (
            ["rollout.reward=rewards.py:steps"],
            "rollout.reward: rewards.py:steps has gradient 0 for ",
        ),
        (["training.best=eval/acc"], "training.best: the best checkpoint is chosen by eval/acc, which is none of "),
        (["training.best=accuracy"], "training.best: no function accuracy in classification_reward, macro_f1, "),
        (
            ["training.best=rewards.py:one"],
            "training.best: rewards.py:one: expected a metric, as eval/nll, or ",
        ),
        (["rollout.reward=rewards.py:flat"], "rollout.reward: rewards.py:flat returned a tensor of shape [16, 2]; "),
    ],
)
def test_bad_input(capsys, arguments, expected):
    """One line, exit 2, nothing made."""
    shutil.copytree("eval/0", "odd/cat")
    Path("odd/0").mkdir()
    Path("odd/0/bad.png").write_bytes(next(Path("train/0").iterdir()).read_bytes()[:60])
    assert refusal(capsys, *arguments).startswith(expected)
    assert not Path("ckpt").exists() and not Path("logs").exists()


@pytest.mark.parametrize("reward, wrong", [("nan", "rewards.py:nan returned nan"), ("huge", "gradient norm inf")])
def test_a_run_that_goes_wrong_stops_before_the_weights_are_touched(capsys, monkeypatch, reward, wrong):
    """From step 5 on the reward is bad, which is looked for at step 8: the weights stayed those of step 4, and the last
    checkpoint is good to go on from."""
    seen = []
    watch = lambda _, network, *__, **___: seen.append(copy.deepcopy(network.model.state_dict()))  # noqa: E731
    before_each(monkeypatch, "update_policy", watch)
    keys = [f"rollout.reward=rewards.py:{reward}", "rollout.advantage=rloo", "training.log_interval=8"]
    text = refusal(capsys, *keys, "training.save_interval=4", "training.eval_interval=99")
    assert f"{wrong} at step 5; " in text
    assert len(seen) == 8 and not same(seen[3], seen[4])
    assert all(same(weights, seen[4]) for weights in seen[5:])
    assert ckpt()["step"] == 4 and same(ckpt()["model"], seen[4])
    assert sorted(files(Path("ckpt/tiny"))) == ["last.pt", "step_000004.pt"]
    assert run("--resume", "auto", "rollout.reward=rewards.py:right") == 0  # mended
    assert ckpt()["step"] == 12


@pytest.mark.parametrize("objective", ["grpo", "supervised"])
def test_a_run_that_diverges_stops_with_a_line(capsys, objective):
    """A learning rate that blows up the weights: the loss is not finite, which is said in one line."""
    text = refusal(capsys, "training.learning_rate=1e30", f"training.objective={objective}", "data.eval_dir=null")
    assert re.match(r"the loss is (nan|inf), the gradient norm (nan|inf) at step 2; the weights were not touched", text)


def test_out_of_memory_is_a_line_that_names_the_keys(capsys, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n GPU 0 has ...")
    monkeypatch.setattr(train, "update_policy", Mock(side_effect=error))
    line = refusal(capsys)
    assert line.startswith("out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...); lower")
    keys = {"training.micro_batch_size", "rollout.num_mc_samples", "model.activation_checkpointing"}
    assert keys <= set(re.findall(r"\w+\.\w+", line)) & set(SCHEMA)


def test_bad_images_are_skipped_named_once_and_counted(capsys):
    """Up to 1 % of training and evaluation together, or three; four of 229 stop the run. An evaluation leaves them
    out."""
    for path in sorted(Path("train").rglob("*.png")):
        for i in range(8):
            shutil.copy(path, path.with_name(f"{path.stem}-{i}.png"))
    keys, bad = ("training.steps=20", "data.on_bad_image=skip"), sorted(Path("train/1").iterdir())[:3]
    for path in (bad[0], Path("eval/4/bad.png")):
        path.write_text("no picture")
    assert run(*keys) == 0
    told = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert sorted(told) == ["eval/4/bad.png", str(bad[0])] and scalars()["data/bad_images"][20] == 2
    assert run("--evaluate", "ckpt/tiny") == 2
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("warning: eval/4/bad.png: ") and out[-1].endswith(" (12 of 13 images)")
    right = scalars()["eval/accuracy"][20] * 12
    assert right == pytest.approx(round(right), abs=1e-4)  # of 12 images, not of 13
    for path in bad:
        path.write_text("no picture")
    begin = r"data.on_bad_image: skip: \d of 229 images cannot be decoded, more than 1 % and more than 3, "
    assert re.match(begin + "(train/1/|eval/4/bad).* the first; ", refusal(capsys, *keys, "training.run_name=more"))
    shutil.rmtree("eval")
    for i in (0, 1):
        Path(f"eval/{i}").mkdir(parents=True)
        Path(f"eval/{i}/bad.png").write_text("no picture")
    assert run("--evaluate", "ckpt/tiny") == 2
    assert capsys.readouterr().err == "train.py: eval: none of its images can be decoded\n"


def test_a_data_set_that_changed_before_a_resume_is_said(capsys, monkeypatch):
    assert stop_after(monkeypatch, 4) == 143
    shutil.copy(next(Path("train/0").iterdir()), "train/0/new.png")
    assert run("--resume", "ckpt/tiny") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    begin = r"warning: train holds 25 images \(.*\), it held 24 images \(.*\): the rest of this epoch"
    assert len(warnings) == 1 and re.match(begin, warnings[0])
