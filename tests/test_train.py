"""train.py: it learns, logs what it says, stops and goes on without a trace, refuses what it cannot do in one line."""

import copy
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoint import files, same
from test_make_scenes import make_scenes
from torch.distributions import Distribution
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import train
from checkpoint import load_checkpoint
from config import SCHEMA, check, flatten, read_yaml
from grpo import classification_policy_adapter, keyed_rng, rollout
from vision_task import VisionClassificationDataset, classification_reward, prepare
from vit_model import VisionTransformer

ROOT = Path(__file__).parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM)
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

# --- Helpers ----------------------------------------------------------------------------------------------------------

TINY = {
    "model": {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "dropout_blocks": 1},
    "data": {"train_dir": "train", "eval_dir": "eval", "num_workers": 0},
    "rollout": {"num_mc_samples": 2, "actions_per_sample": 4},
    "training": {"steps": 12, "batch_size": 16, "warmup_steps": 3, "device": "cpu", "seed": 7}
    | {"log_interval": 5, "eval_interval": 6, "save_interval": 3, "keep_checkpoints": 9},
}
REWARDS = '''
"""Rewards of a user."""
import torch
calls = 0

def count():
    global calls
    calls += 1
    return calls

def right(actions, outputs, targets, metadata):
    return (actions == targets[:, None, None]).float()

def half(actions, outputs, targets, metadata):
    return 0.5 * (actions == targets[:, None, None])

def one(actions, outputs, targets, metadata):
    return torch.ones(actions.shape)

def rare(actions, outputs, targets, metadata):  # groups of class 0 alone can be live
    return ((actions == 0) & (targets == 0)[:, None, None]).float()

def flat(actions, outputs, targets, metadata):
    return right(actions, outputs, targets, metadata).mean(2)

def nothing(actions, outputs, targets, metadata):
    return None

def nan(actions, outputs, targets, metadata):
    return right(actions, outputs, targets, metadata) * (torch.nan if count() > 4 else 1)

def negative(actions, outputs, targets, metadata):
    return right(actions, outputs, targets, metadata) - (1.5 if count() > 4 else 0)

def huge(actions, outputs, targets, metadata):
    return right(actions, outputs, targets, metadata) * (1e30 if count() > 4 else 1)

number = 5
'''


def make_folders(root: Path) -> None:
    """train (3 classes x 8 of the bundled digits), eval (3 x 4), tiny.yaml and rewards.py in `root`."""
    for split, count in (("train", 8), ("eval", 4)):
        for name in "014":
            (root / split / name).mkdir(parents=True)
            for path in sorted((ROOT / "data" / split / name).glob("*.png"))[:count]:
                shutil.copy(path, root / split / name)
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (root / "rewards.py").write_text(REWARDS)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An own folder to run in; what `train.main` changes in the process is put back. One thread: tiny models."""
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    handlers, threads = [signal.getsignal(number) for number in SIGNALS], torch.get_num_threads()
    validate = Distribution._validate_args
    torch.set_num_threads(1)
    yield tmp_path
    for number, handler in zip(SIGNALS, handlers):
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    Distribution.set_default_validate_args(validate)


def run(*arguments: str) -> int:
    """train.py --config tiny.yaml …, in this process; returns the exit status."""
    Distribution.set_default_validate_args(True)
    return train.main(["--config", "tiny.yaml", *arguments])


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that exits with 2, without its `train.py: `."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: ")
    return lines[0].removeprefix("train.py: ")


def configured(**keys) -> dict:
    """The config `run` has, with some flat keys `section__key` changed."""
    overrides = {name.replace("__", "."): value for name, value in keys.items()}
    return check(("tiny.yaml", flatten(TINY, "")), ("test", overrides))


def ckpt(name: str) -> dict:
    return load_checkpoint(Path("ckpt") / name)


def learned(name: str) -> list:
    """What must not depend on how often a run was stopped: everything in its checkpoint but the config."""
    return [value for key, value in ckpt(name).items() if key != "config"]


def events(name: str) -> EventAccumulator:
    return EventAccumulator(
        f"logs/{name}", size_guidance=dict.fromkeys(("scalars", "images", "histograms"), 0)
    ).Reload()


def scalars(name: str) -> dict[str, dict[int, float]]:
    """tag -> step -> value; a step that is there twice fails. Times are left out."""
    accumulator = events(name)
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith("speed/")]
    for tag in tags:
        steps = [event.step for event in accumulator.Scalars(tag)]
        assert steps == sorted(set(steps)), (tag, steps)
    return {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags}


def at_update(monkeypatch, number: int, function) -> None:
    """Call `function` in the middle of the update `number`, counted from 1."""
    calls = []

    def update(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            function()
        return update_policy(*arguments, **options)

    update_policy = train.update_policy
    monkeypatch.setattr(train, "update_policy", update)


def stop_after(monkeypatch, number: int, *arguments: str, by: int = signal.SIGTERM) -> int:
    """`run`, asked to stop by a signal in the update `number`."""
    with monkeypatch.context() as patch:
        at_update(patch, number, lambda: os.kill(os.getpid(), by))
        return run(*arguments)


def watch_weights(monkeypatch) -> list[dict]:
    """A list that gets a copy of the model's weights after each update."""
    seen = []

    def update(model, *arguments, **options):
        metrics = update_policy(model, *arguments, **options)
        seen.append(copy.deepcopy(dict(model.model.state_dict())))
        return metrics

    update_policy = train.update_policy
    monkeypatch.setattr(train, "update_policy", update)
    return seen


# --- Schedule and optimizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup, steps, low", [(5, 30, 0.0), (2, 9, 1e-4), (10, 11, 1e-5)])
def test_learning_rate_is_linear_warm_up_then_cosine(warmup, steps, low):
    """Against torch's LinearLR followed by CosineAnnealingLR, at every step."""
    training = SimpleNamespace(warmup_steps=warmup, steps=steps, learning_rate=1e-3, min_learning_rate=low)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    cosine = CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=low)
    chain = SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
    for step in range(steps):
        assert train.learning_rate(step, training) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        chain.step()
    assert train.learning_rate(steps, training) == pytest.approx(low, abs=1e-12)


def test_learning_rate_at_the_borders():
    """No warm-up starts at the top; nothing but warm-up, or a part of it, is linear."""
    training = SimpleNamespace(warmup_steps=0, steps=4, learning_rate=0.8, min_learning_rate=0.0)
    assert [train.learning_rate(step, training) for step in (0, 2)] == pytest.approx([0.8, 0.4])
    for training.steps in (4, 2):
        training.warmup_steps = 4
        assert [train.learning_rate(step, training) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_weight_decay_is_for_weight_matrices_alone():
    """Every parameter is there once; biases, norms, class token and position embedding do not decay."""
    model = VisionTransformer(**TINY["model"], num_classes=3)
    training = SimpleNamespace(weight_decay=0.3, learning_rate=0.01, betas=[0.8, 0.9], layer_decay=1.0)
    optimizer = train.build_optimizer(model, training)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    decaying = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers} | {"head.weight"}
    assert dict(found) == {
        name: 0.3 if name in decaying | {"patch_embed.proj.weight"} else 0.0 for name in names.values()
    }
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 0.01 for group in optimizer.param_groups)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 1.0]


# --- Fine-tuning ------------------------------------------------------------------------------------------------------

EMBEDDING = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def frozen_names(k: int) -> set[str]:
    """What training.freeze_blocks=k leaves as it is in a ViT of at most nine blocks."""
    model = VisionTransformer(**TINY["model"] | {"depth": 3}, num_classes=3)
    blocks = tuple(f"blocks.{i}." for i in range(k))
    return {name for name, _ in model.named_parameters() if k and (name in EMBEDDING or name.startswith(blocks))}


def test_layer_decay_is_the_closed_form(monkeypatch):
    """At each step, each parameter: learning_rate(step) * decay^(depth + 1 - layer); the weight decay is as ever."""
    rates = []

    def update(network, optimizer, *arguments, **options):
        names = {parameter: name for name, parameter in network.model.named_parameters()}
        groups = optimizer.param_groups
        rates.append({names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]})
        return update_policy(network, optimizer, *arguments, **options)

    update_policy = train.update_policy
    monkeypatch.setattr(train, "update_policy", update)
    assert run("training.layer_decay=0.6", "model.depth=3", "training.steps=6") == 0
    training = SimpleNamespace(**configured(training__steps=6)["training"])
    layers = dict.fromkeys(EMBEDDING, 0) | dict.fromkeys(["norm.weight", "norm.bias", "head.weight", "head.bias"], 4)
    assert len(rates) == 6 and len(rates[0]) == 4 + 3 * 12 + 4
    for step, found in enumerate(rates):
        for name, (rate, weight_decay) in found.items():
            layer = layers[name] if name in layers else int(name.split(".")[1]) + 1  # block i of 0, 1, 2 is i + 1
            assert rate == pytest.approx(train.learning_rate(step, training) * 0.6 ** (4 - layer), rel=1e-12), name
            decays = name.endswith(".weight") and "norm" not in name
            assert weight_decay == (training.weight_decay if decays else 0.0), name


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("objective", ["grpo", "supervised"])
def test_frozen_blocks_stay_as_they_are(k, objective):
    """They get no gradient and no place in the optimizer, and nothing is kept for their backward pass; the rest
    learns, however the passes are made (one pass, or replays of the live groups)."""
    keys = (f"training.freeze_blocks={k}", "model.depth=3", "training.steps=4", "training.update_epochs=2")
    assert run(*keys, f"training.objective={objective}") == 0
    config = configured(training__freeze_blocks=k, model__depth=3)
    start, end = train.build_model(config, 3, torch.device("cpu")), ckpt("tiny")
    frozen, names = frozen_names(k), [name for name, _ in start.named_parameters()]
    assert {name for name, weight in start.named_parameters() if not weight.requires_grad} == frozen
    assert {name for name in names if torch.equal(end["model"][name], start.state_dict()[name])} == frozen
    optimizer = train.build_optimizer(start, SimpleNamespace(**config["training"]))
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {weight for name, weight in start.named_parameters() if name not in frozen}
    assert len(end["optimizer"]["state"]) == len(held)

    needs_gradient = []
    for block in start.blocks:
        block.register_forward_hook(lambda module, arguments, output: needs_gradient.append(output.requires_grad))
    start(torch.rand(2, 3, 8, 8), start.sample_masks(2, 4)).sum().backward()
    assert needs_gradient == [i >= k for i in range(3)]
    assert {name for name, weight in start.named_parameters() if weight.grad is None} == frozen


def test_freezing_takes_part_in_replays_and_micro_batches(monkeypatch):
    """A run that replays the live groups, frozen up to the last block, ends where one without replays ends."""
    keys = ("training.freeze_blocks=2", "training.micro_batch_size=8", "data.eval_dir=null", "training.steps=6")
    ends = []
    for replay in (2.0, 0.0):
        monkeypatch.setattr(train, "REPLAY_BELOW", replay)
        assert run(f"training.run_name=r{replay:.0f}", *keys) == 0
        ends.append(ckpt(f"r{replay:.0f}")["model"])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "keys", [["layer_decay=0.7"], ["freeze_blocks=1"], ["freeze_blocks=2"], ["layer_decay=0.7", "freeze_blocks=1"]]
)
def test_fine_tuning_survives_a_resume(monkeypatch, keys):
    """Stopped in mid-epoch and resumed: the bits of a run in one piece."""
    keys = [f"training.{key}" for key in (*keys, "kl_coef=0.1")]
    assert run("training.run_name=whole", *keys) == 0
    assert stop_after(monkeypatch, 5, *keys) == 143
    assert run("--resume", "ckpt/tiny") == 0
    assert same(learned("tiny"), learned("whole"))
    assert run("training.run_name=plain", "training.kl_coef=0.1") == 0
    assert not same(learned("plain"), learned("whole"))


@pytest.mark.parametrize("keys", [["freeze_blocks=0"], ["freeze_blocks=2"], ["layer_decay=0.7"]])
def test_what_is_frozen_cannot_change_on_resume(capsys, keys):
    """One line that names the keys, and the run stays as it is; a new run may start from it."""
    assert run("training.steps=3", "training.freeze_blocks=1") == 0
    before = files(Path("ckpt/tiny")) | files(Path("logs/tiny"))
    text = refused(capsys, "--resume", "ckpt/tiny", "training.steps=5", *[f"training.{key}" for key in keys])
    told = {"freeze_blocks": 1, "layer_decay": 1.0} | yaml.safe_load(keys[0].replace("=", ": "))
    assert text == (
        f"ckpt/tiny: its optimizer does not fit training.freeze_blocks: {told['freeze_blocks']} with "
        f"training.layer_decay: {told['layer_decay']}; drop these keys, or start a new run from it with "
        "model.checkpoint_path"
    )
    assert files(Path("ckpt/tiny")) | files(Path("logs/tiny")) == before
    key = [f"training.{key}" for key in keys]
    assert run("model.checkpoint_path=ckpt/tiny/last.pt", "training.run_name=new", "training.steps=3", *key) == 0


def test_layer_decay_may_change_on_resume():
    """From one below 1 to another: the new one counts."""
    assert run("training.steps=3", "training.layer_decay=0.7") == 0
    assert run("--resume", "ckpt/tiny", "training.steps=5", "training.layer_decay=0.5") == 0
    scales = {group["lr_scale"] for group in ckpt("tiny")["optimizer"]["param_groups"]}
    assert scales == {1.0, 0.5, 0.25, 0.125}


def test_checkpoints_from_before_layer_decay_can_be_resumed(monkeypatch):
    """Their parameter groups have no lr_scale, their config not the keys; they end in the undisturbed run's bits."""
    assert run("training.run_name=whole") == 0
    assert stop_after(monkeypatch, 5) == 143
    state = ckpt("tiny")
    for key in ("layer_decay", "freeze_blocks"):
        del state["config"]["training"][key]
    for group in state["optimizer"]["param_groups"]:
        del group["lr_scale"]
    state["best_accuracy"] = state.pop("best_figure")
    torch.save(state, "ckpt/tiny/last.pt")
    assert run("--resume", "ckpt/tiny") == 0
    tiny, whole = ckpt("tiny"), ckpt("whole")
    assert same(tiny["model"], whole["model"]) and same(tiny["optimizer"]["state"], whole["optimizer"]["state"])
    assert tiny["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]


def test_a_pretrained_vit_is_fine_tuned(capsys):
    """A timm-named file of another image size and other classes, frozen but for the last block: what the run prints,
    and what it starts from and leaves."""
    other = VisionTransformer(**TINY["model"] | {"image_size": 16}, num_classes=7)
    weights = {f"module.backbone.{name}": tensor for name, tensor in other.state_dict().items()}
    torch.save({"teacher": weights | {"module.head.mlp.0.bias": torch.ones(3)}}, "dino.pth")
    keys = ("model.checkpoint_path=dino.pth", "training.freeze_blocks=1", "training.layer_decay=0.75")
    capsys.readouterr()
    assert run(*keys, "training.steps=3") == 0
    out = capsys.readouterr().out
    line = "dino.pth: 30 tensors loaded, pos_embed resampled from 4x4 to 2x2, 2 left fresh (head.weight, head.bias)"
    assert f"{line}, 1 ignored (module.head.mlp.0.bias)\nwarning: no state dict tells data.mean and data.std; " in out
    end, start = ckpt("tiny")["model"], other.state_dict()
    assert torch.equal(end["blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])
    assert 0 < (end["blocks.1.mlp.fc1.weight"] - start["blocks.1.mlp.fc1.weight"]).abs().max() < 0.01


# --- It learns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective, bound", [("grpo", 0.7), ("supervised", 0.6)])
def test_the_quick_start_learns(folder, objective, bound):
    """config_digits.yaml, four digits, 120 steps of 32: far above the 0.25 of chance, from rewards as from labels."""
    for split in ("train", "eval"):
        (folder / "digits" / split).mkdir(parents=True)
        for name in "0147":
            os.symlink(ROOT / "data" / split / name, folder / "digits" / split / name)
    keys = [
        "steps=120",
        "batch_size=32",
        "warmup_steps=10",
        "eval_interval=120",
        "log_interval=20",
        "run_name=r",
        "learning_rate=1e-3",
    ]
    status = train.main(
        ["--config", str(ROOT / "config_digits.yaml"), "data.train_dir=digits/train", "data.eval_dir=digits/eval"]
        + ["data.num_workers=0", "rollout.num_mc_samples=2", f"training.objective={objective}", "training.device=cpu"]
        + [f"training.{key}" for key in keys]
    )
    found = scalars("r")
    assert status == 0 and found["eval/accuracy"][120] == pytest.approx(ckpt("r")["best_figure"])
    assert found["eval/accuracy"][120] > bound and found["eval_mc/accuracy"][120] > bound
    assert found["eval/nll"][120] < 1.0 < math.log(4) and found["eval_mc/nll"][120] < 1.0
    assert found["reward/mean"][1] < 0.4 and found["reward/mean"][120] > 0.6


# --- What one sees ----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_what_it_should(capsys):
    """Every tag, at its steps; values against what is recomputed by hand."""
    rewards = "{classification_reward: 1, rewards.py:half: 2}"
    assert run(f"rollout.reward={rewards}", "training.kl_coef=0.1", "training.update_epochs=2") == 0
    found, terms = scalars("tiny"), ["classification_reward", "rewards.py:half"]
    steps = {"eval": [6, 12], "log": [1, 5, 10, 12]}
    logged = ["reward/mean", "reward/std", "reward/min", "groups/live", "loss", "grad_norm", "learning_rate"]
    logged += [f"policy/{name}" for name in ("entropy", "ratio", "clip_fraction", "kl")] + [
        f"reward/{t}" for t in terms
    ]
    evaluated = [f"{kind}/{name}" for kind in ("eval", "eval_mc") for name in ("accuracy", "nll", "ece")]
    expected = dict.fromkeys(logged, steps["log"]) | dict.fromkeys(evaluated, steps["eval"])
    assert found["data/bad_images"] == dict.fromkeys(steps["log"], 0.0)
    assert {tag: list(values) for tag, values in found.items() if tag != "data/bad_images"} == expected
    training = SimpleNamespace(**configured()["training"])
    rates = {step: train.learning_rate(step - 1, training) for step in steps["log"]}
    assert found["learning_rate"] == pytest.approx(rates, rel=1e-6)
    accumulator = events("tiny")
    for tag in ("speed/images_per_second", "speed/data_wait"):
        speeds = {event.step: event.value for event in accumulator.Scalars(tag)}
        assert list(speeds) == steps["log"] and all(value > 0 for value in speeds.values())

    # The first step, by hand: seeded weights, the first 16 places of the seeded order, the rollout of its key.
    config = configured(rollout__reward=dict.fromkeys(terms, 1))
    model = train.build_model(config, 3, torch.device("cpu"))
    dataset = VisionClassificationDataset("train", 8)
    with keyed_rng(7, "order", 0):
        indices = torch.randperm(24)[:16]
    batch = dataset.batch(indices, torch.stack([dataset[i] for i in indices]))
    batch.inputs = prepare(batch.inputs, config["data"]["mean"], config["data"]["std"])
    options = {"num_mc_samples": 2, "actions_per_sample": 4, "key": (7, 0, 0)}
    episode = rollout(model, batch, {"r": (classification_reward, 2.0)}, classification_policy_adapter, **options)
    groups = episode.rewards.flatten(1)  # 1 * reward + 2 * half the reward
    first = {tag: values[1] for tag, values in found.items() if 1 in values}
    assert first["reward/mean"] == pytest.approx(float(groups.mean()))
    assert first["reward/std"] == pytest.approx(float(groups.std(1, correction=0).mean()))
    assert first["reward/classification_reward"] == pytest.approx(float(groups.mean()) / 2)
    assert first["reward/rewards.py:half"] == pytest.approx(float(groups.mean()) / 4)
    assert first["reward/min"] == 0.0
    assert first["groups/live"] == pytest.approx(float((groups.amax(1) != groups.amin(1)).float().mean()))
    assert first["policy/entropy"] == pytest.approx(float(episode.policy.entropy().detach().mean()), rel=1e-5)
    assert first["policy/ratio"] == pytest.approx(1, abs=0.05) and first["policy/ratio"] != 1  # of two epochs
    assert 0 < first["policy/kl"] < found["policy/kl"][12] and first["grad_norm"] > 0

    # Histogram, picture, text.
    histograms = accumulator.Histograms("groups/success_rate")
    assert [(event.step, event.histogram_value.num) for event in histograms] == [
        (6, 16),
        (12, 32),
    ]  # since the last log
    assert all(0 <= event.histogram_value.min <= event.histogram_value.max <= 2 for event in histograms)
    pictures = accumulator.Images("eval/most_uncertain")
    assert [event.step for event in pictures] == [6, 12]
    picture = Image.open(io.BytesIO(pictures[0].encoded_image_string))
    assert picture.size[0] == 4 * 128 and len(picture.convert("RGB").getcolors(99999)) > 16
    text = accumulator.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text.strip("`")) == ckpt("tiny")["config"]

    # The eval figures: the checkpoint's network by hand, and what --evaluate prints.
    model.load_state_dict(ckpt("tiny")["model"])
    eval_set = VisionClassificationDataset("eval", 8)
    images = prepare(torch.stack([eval_set[i] for i in range(12)]), config["data"]["mean"], config["data"]["std"])
    with torch.no_grad():
        logits = model(images)
    assert found["eval/accuracy"][12] == pytest.approx(float((logits.argmax(1) == eval_set.targets).float().mean()))
    nll = torch.nn.functional.cross_entropy(logits, eval_set.targets)
    assert found["eval/nll"][12] == pytest.approx(float(nll), rel=1e-5)
    line = "accuracy {:.4f} NLL {:.4f} ECE {:.4f} (mean over passes: accuracy {:.4f} NLL {:.4f} ECE {:.4f})"
    line = "step 12: " + line.format(*(found[tag][12] for tag in evaluated))
    assert line in capsys.readouterr().out.splitlines()
    before = files(Path("ckpt/tiny")) | files(Path("logs/tiny"))
    for path in ("ckpt/tiny", "ckpt/tiny/", "ckpt/tiny/step_000012.pt"):
        assert run("--evaluate", path) == 0
        assert capsys.readouterr().out.splitlines()[-1] == line
    assert files(Path("ckpt/tiny")) | files(Path("logs/tiny")) == before


def test_tensorboard_is_on_disk_before_the_checkpoint(monkeypatch):
    """A run killed after a save has the points up to it: they will not be made again."""
    calls = []
    for owner, name in ((train.SummaryWriter, "flush"), (train, "save_checkpoint")):

        def called(*arguments, function=getattr(owner, name), name=name, **options):  # noqa: B008
            calls.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, called)
    assert run() == 0
    saves = [i for i, name in enumerate(calls) if name == "save_checkpoint"]
    assert len(saves) == 4 and all(calls[i - 1] == "flush" for i in saves)


def test_evaluate_is_of_the_checkpoint_and_may_be_overridden(capsys):
    """best.pt, and another folder; without one there is nothing to print."""
    assert run("training.objective=supervised", "training.learning_rate=1e-2") == 0
    step = load_checkpoint(Path("ckpt/tiny/best.pt"))["step"]
    capsys.readouterr()
    assert run("--evaluate", "ckpt/tiny/best.pt", "data.eval_dir=train") == 0
    out = capsys.readouterr().out.splitlines()
    accuracy = float(re.fullmatch(rf"step {step}: accuracy (\S+) NLL .*", out[-1])[1])
    assert out[0] == "train: 24 images" and accuracy * 24 == pytest.approx(round(accuracy * 24), abs=0.01)
    text = refused(capsys, "--evaluate", "ckpt/tiny", "data.eval_dir=null")
    assert text == "data.eval_dir: null; --evaluate needs a folder of images"
    assert refused(capsys, "--evaluate", "ckpt/none") == "ckpt/none: no such file"


def test_console_without_a_terminal(capsys):
    """What was found, then plain lines now and then: one progress line at once, evaluations all stay."""
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    count = sum(p.numel() for p in ckpt("tiny")["model"].values()) / 1e6
    assert lines[:4] == [
        "train: 24 images of 3 classes",
        "eval: 12 images",
        "data.cache: auto: 0 MB of decoded images, kept in memory after the first epoch",
        f"{count:.2f} M parameters on cpu, float32",
    ]
    progress = r"step 1/12  reward 0\.\d{3}  live groups \d+%  \d+ images/s  \d+:\d\d:\d\d left"
    assert re.fullmatch(progress, lines[4])
    assert [line.split(":")[0] for line in lines[5:]] == ["step 6", "step 12", "done"]
    assert lines[-1] == "done: ckpt/tiny/step_000012.pt" and "\r" not in "".join(lines)


def test_help_lists_the_keys(capsys):
    """--help: every key, exit 0."""
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"\n  {name} = " in text for name in SCHEMA)


@pytest.mark.parametrize("value, why", [("null", "null"), ("nowhere", "nowhere: no such folder")])
def test_without_an_eval_folder_it_trains_and_says_so(capsys, value, why):
    """No evaluation, no best.pt, all the rest."""
    assert run(f"data.eval_dir={value}", "training.run_name=null") == 0
    assert f"data.eval_dir: {why}; training without evaluation" in capsys.readouterr().out.splitlines()
    assert "best.pt" not in files(Path("ckpt/tiny")) and ckpt("tiny")["step"] == 12
    assert not [tag for tag in scalars("tiny") if tag.startswith("eval")]


WARNING = "warning: no live group in 50 steps: the rewards of every group are all equal, so nothing is learned."


def test_a_dead_run_warns_once(capsys):
    """A constant reward: nothing is learned, which is said after 50 steps and not again."""
    assert run("rollout.reward=rewards.py:one", "training.steps=110", "training.save_interval=99") == 0
    out = capsys.readouterr().out
    assert out.count("warning: ") == out.count(WARNING) == 1
    assert set(scalars("tiny")["groups/live"].values()) == {0.0} and ckpt("tiny")["dead_steps"] == 110


def test_a_dead_run_that_was_stopped_warns_once(capsys, monkeypatch):
    """The count is in the checkpoint: pending steps included, 33 before and 17 after make 50."""
    quick = ("rollout.reward=rewards.py:one", "training.steps=80", "training.save_interval=99", "data.eval_dir=null")
    assert stop_after(monkeypatch, 33, *quick) == 143
    assert WARNING not in capsys.readouterr().out
    assert ckpt("tiny")["dead_steps"] == 30 and len(ckpt("tiny")["rows"]) == 3
    assert stop_after(monkeypatch, 17 + 3, "--resume", "auto") == 143  # after step 53
    assert capsys.readouterr().out.count(WARNING) == 1
    assert run("--resume", "auto") == 0
    assert WARNING not in capsys.readouterr().out


# --- Stopped and resumed ----------------------------------------------------------------------------------------------

SCRIPT = """
import fcntl, os, pty, signal, struct, sys, termios
import train

def fork(name, function):
    child, terminal = pty.fork() if name == "terminal" else (os.fork(), None)
    if child == 0:
        try:
            if name != "terminal":
                out = os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT)
                os.dup2(out, 1), os.dup2(out, 2), os.setsid()
            train.torch.set_num_threads(1)
            function(name)
            status = train.main(["--config", "tiny.yaml", f"training.run_name={name}", *OPTIONS.get(name, [])])
        except BaseException as error:
            print(repr(error), flush=True)
            status = 99
        os._exit(status)
    if terminal is not None:
        data = b""
        while True:
            try:
                data += os.read(terminal, 9999)
            except OSError:
                break
        open("terminal.txt", "wb").write(data)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

OPTIONS = {
    "term": ["data.num_workers=1", "data.cache=never"],
    "terminal": ["training.log_interval=1"],
    "bad": ["training.steps=0"],
}

def at(name, number, act):
    function, calls = getattr(train, name), []
    def replacement(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            act()
        return function(*arguments, **options)
    setattr(train, name, replacement)

def kill(number, group=False):
    os.killpg(os.getpgrp(), number) if group else os.kill(os.getpid(), number)

def twice():
    kill(signal.SIGINT)
    kill(signal.SIGINT)

CASES = {
    "in_step": lambda _: at("update_policy", 12, lambda: kill(signal.SIGKILL)),
    "in_save": lambda _: at("save_checkpoint", 4, lambda: kill(signal.SIGKILL)),
    "term": lambda _: at("update_policy", 8, lambda: kill(signal.SIGTERM, group=True)),
    "twice": lambda _: at("update_policy", 8, twice),
    "terminal": lambda _: fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0)),
    "bad": lambda _: None,
}
for name, function in CASES.items():
    print(name, fork(name, function))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """A folder where processes were killed, stopped, or had a terminal; and their exit statuses.

    One process that forks them, since importing torch is what takes its time.
    """
    root = tmp_path_factory.mktemp("processes")
    make_folders(root)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    statuses = dict(line.split() for line in done.stdout.splitlines())
    assert len(statuses) == 6, done.stderr
    return root, {name: int(status) for name, status in statuses.items()}


@pytest.mark.parametrize("name", ["in_step", "in_save"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(folder, processes, name):
    """SIGKILL in step 12, or in the save at step 12, with a later point already in TensorBoard: the resumed run ends in
    the weights, optimizer and history of one that was never stopped, with the same points, none doubled."""
    root, statuses = processes
    assert statuses[name] == -signal.SIGKILL
    for part in ("ckpt", "logs"):
        shutil.copytree(root / part / name, folder / part / name)
    assert ckpt(name)["step"] == 9 and len(ckpt(name)["rows"]) == 4  # steps 6 to 9 are pending: logged at 10
    steps = [event.step for event in events(name).Scalars("reward/mean")]
    assert steps == [1, 5, 10, 12] if name == "in_save" else steps[:2] == [1, 5]  # points of steps to be done again
    assert run("training.run_name=whole") == 0
    time.sleep(1.1 - time.time() % 1)  # TensorBoard sorts its files by the second
    assert run("--resume", f"ckpt/{name}") == 0
    assert same(learned(name), learned("whole"))
    assert scalars(name) == scalars("whole")
    assert list(scalars(name)["reward/mean"]) == [1, 5, 10, 12]
    assert list(files(Path("ckpt", name))) == list(files(Path("ckpt/whole")))
    assert len(os.listdir(Path("logs", name))) == 2  # the same TensorBoard run


def test_sigterm_to_the_process_group(folder, processes):
    """As a scheduler sends it, workers and all: the step is finished, saved, the line says how to go on, exit 143."""
    root, statuses = processes
    assert statuses["term"] == 143
    lines = (root / "term.txt").read_text().splitlines()
    stopped = "stopped after step 8, saved ckpt/term/step_000008.pt; go on with --resume ckpt/term"
    assert lines[-1] == stopped and "Traceback" not in "".join(lines)
    shutil.copytree(root / "ckpt" / "term", folder / "ckpt" / "term")
    assert run("training.run_name=whole") == 0 and run("--resume", "ckpt/term", "data.num_workers=0") == 0
    assert same(learned("term"), learned("whole"))


def test_a_second_ctrl_c_stops_at_once(processes):
    """In the middle of a step: killed by the signal, what was saved before stays."""
    root, statuses = processes
    assert statuses["twice"] == -signal.SIGINT
    assert load_checkpoint(root / "ckpt" / "twice")["step"] == 6
    assert "stopped" not in (root / "twice.txt").read_text()


def test_bad_input_exits_with_2(processes):
    """The process as a whole: one line, status 2."""
    root, statuses = processes
    expected = "train.py: training.steps: 0 is not allowed; expected a whole number >= 1\n"
    assert (statuses["bad"], (root / "bad.txt").read_text()) == (2, expected)


def test_console_on_a_terminal(processes):
    """The progress line rewrites itself and fits the 50 columns; evaluations and the end stay as lines."""
    root, statuses = processes
    assert statuses["terminal"] == 0
    text = (root / "terminal.txt").read_bytes().decode()
    shown = [part.removeprefix("\x1b[K") for part in re.split("\r(?!\n)", text)]
    progress = [part for part in shown if re.match(r"step \d+/12  reward", part)]
    assert [int(re.search(r"\d+", part)[0]) for part in progress] == list(range(1, 13))
    assert all("\n" not in part and len(part) == 49 for part in progress)
    lines = [part for part in shown if part.endswith("\r\n")]
    assert lines[-1] == "done: ckpt/terminal/step_000012.pt\r\n"
    assert [line.split(": ")[0] for line in lines[-3:-1]] == ["step 6", "step 12"]
    assert text.count("\n") == 7


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(capsys, monkeypatch, number, status):
    """The step is finished and saved; going on gives what a run never stopped gives, bit for bit."""
    assert run("training.run_name=whole") == 0
    assert stop_after(monkeypatch, 7, by=number) == status
    expected = "stopped after step 7, saved ckpt/tiny/step_000007.pt; go on with --resume ckpt/tiny"
    assert capsys.readouterr().out.splitlines()[-1] == expected
    assert ckpt("tiny")["step"] == 7
    assert run("--resume", "ckpt/tiny") == 0
    out = capsys.readouterr().out.splitlines()
    assert "ckpt/tiny: going on after step 7" in out and out[-1] == "done: ckpt/tiny/step_000012.pt"
    assert same(learned("tiny"), learned("whole")) and scalars("tiny") == scalars("whole")


def test_a_signal_in_the_last_step_is_the_end(capsys, monkeypatch):
    """Nothing is left to go on with: exit 0."""
    assert stop_after(monkeypatch, 12) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "done: ckpt/tiny/step_000012.pt"


@pytest.mark.parametrize("workers, cache", [(0, "never"), (1, "always"), (1, "never")])
def test_resuming_in_mid_epoch_depends_on_no_loader(monkeypatch, workers, cache):
    """5 steps of 16 of 24 images, then on with another loader: the weights of a run in one piece, flips included."""
    common = ("data.augment=true", "data.eval_dir=null")
    assert run("training.run_name=whole", "data.cache=always", *common) == 0
    assert stop_after(monkeypatch, 5, "training.run_name=parts", *common) == 143
    assert run("--resume", "ckpt/parts", f"data.num_workers={workers}", f"data.cache={cache}") == 0
    assert same(learned("parts"), learned("whole"))
    assert run("training.run_name=plain", "data.eval_dir=null") == 0
    assert not same(learned("plain"), learned("whole"))  # the flips did something


def test_kl_reference_and_epochs_survive_a_resume(monkeypatch):
    """The reference is the model training started from; it is in the checkpoint; two epochs, micro-batches, argmax."""
    keys = ("training.kl_coef=0.5", "training.update_epochs=2", "training.micro_batch_size=8", "rollout.action=argmax")
    assert run("training.run_name=whole", *keys) == 0
    assert stop_after(monkeypatch, 5, *keys) == 143
    start = dict(train.build_model(configured(), 3, torch.device("cpu")).state_dict())
    for name in ("whole", "tiny"):
        assert same(dict(ckpt(name)["reference"]), start) and not same(dict(ckpt(name)["model"]), start)
    assert run("--resume", "ckpt/tiny") == 0
    assert same(learned("tiny"), learned("whole"))
    found = scalars("whole")
    assert found["policy/kl"][12] > found["policy/kl"][1] > 0 and scalars("tiny") == found
    assert ckpt("tiny")["optimizer"]["state"][0]["step"] == 24


def test_kl_needs_the_reference_of_the_run(capsys):
    """A run without one cannot get it later."""
    assert run() == 0
    expected = "training.kl_coef: this run keeps no reference; start a new one with model.checkpoint_path"
    before = files(Path("ckpt/tiny"))
    assert refused(capsys, "--resume", "auto", "training.kl_coef=0.1", "training.steps=20") == expected
    assert files(Path("ckpt/tiny")) == before


def test_a_run_that_exists_is_not_overwritten(capsys):
    """Neither its checkpoints nor, alone, its TensorBoard events."""
    assert run() == 0
    before = files(Path("ckpt/tiny")) | files(Path("logs/tiny"))
    end = "exists: go on with --resume auto, delete it, or name a new run with training.run_name=NAME"
    assert refused(capsys) == f"ckpt/tiny {end}"
    assert files(Path("ckpt/tiny")) | files(Path("logs/tiny")) == before
    assert refused(capsys, "training.ckpt_dir=elsewhere") == f"logs/tiny {end}"
    assert files(Path("logs/tiny")) == {k: v for k, v in before.items() if "tfevents" in k}
    assert not Path("elsewhere").exists()
    assert run("training.run_name=other", "training.steps=3") == 0 and ckpt("other")["step"] == 3


def test_resume_auto(capsys, monkeypatch):
    """Without a run it starts one; with one it goes on; with a finished one there is nothing to do."""
    assert stop_after(monkeypatch, 4, "--resume", "auto") == 143
    assert "going on" not in capsys.readouterr().out and ckpt("tiny")["step"] == 4
    assert run("--resume", "auto") == 0
    assert "ckpt/tiny: going on after step 4" in capsys.readouterr().out.splitlines()
    before = files(Path("ckpt/tiny")) | files(Path("logs/tiny"))
    assert run("--resume", "auto") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to do: training.steps is 12"
    assert files(Path("ckpt/tiny")) | files(Path("logs/tiny")) == before


def test_a_run_can_go_on_for_longer():
    """training.steps on the command line: more steps, on the longer cosine."""
    assert run() == 0
    assert run("--resume", "ckpt/tiny", "training.steps=20") == 0
    state, training = ckpt("tiny"), SimpleNamespace(**configured(training__steps=20)["training"])
    assert state["step"] == state["config"]["training"]["steps"] == 20
    rates = scalars("tiny")["learning_rate"]
    assert list(rates) == [1, 5, 10, 12, 15, 20]
    expected = [train.learning_rate(step - 1, training) for step in (15, 20)]
    assert [rates[15], rates[20]] == pytest.approx(expected, rel=1e-6)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(expected[1])


def test_the_checkpoints_config_wins_over_the_file_and_the_command_line_over_both(monkeypatch):
    """A file edited since does not matter; a key that was typed does, in the optimizer too."""
    assert stop_after(monkeypatch, 4, "training.seed=3") == 143
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY | {"training": {"seed": 5, "warmup_steps": 1}}))
    keys = ("training.weight_decay=0.5", "training.betas=[0.5, 0.6]", "training.learning_rate=2e-3")
    assert run("--resume", "ckpt/tiny", *keys) == 0
    state = ckpt("tiny")
    training = state["config"]["training"]
    assert (training["seed"], training["warmup_steps"], training["steps"]) == (3, 3, 12)
    assert (training["weight_decay"], training["betas"], training["learning_rate"]) == (0.5, [0.5, 0.6], 2e-3)
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.5, 0.0]
    assert all(group["betas"] == (0.5, 0.6) for group in state["optimizer"]["param_groups"])


def test_a_run_can_be_moved_and_resumed_from_one_of_its_files(monkeypatch):
    """It goes on where it lies now; from an older step it comes to the same end."""
    assert run() == 0
    whole = learned("tiny")
    shutil.move("ckpt/tiny", "elsewhere/moved")
    shutil.move("logs/tiny", "logs/moved")
    assert run("--resume", "elsewhere/moved/step_000006.pt") == 0
    state = load_checkpoint(Path("elsewhere/moved"))
    assert (state["config"]["training"]["ckpt_dir"], state["config"]["training"]["run_name"]) == ("elsewhere", "moved")
    assert same([value for key, value in state.items() if key != "config"], whole)
    assert not Path("ckpt/tiny").exists() and list(scalars("moved")["reward/mean"]) == [1, 5, 10, 12]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--resume", "ckpt/none"], "ckpt/none: no such file"),
        (["--resume", "ckpt"], "ckpt/last.pt: no such file"),
        (
            ["--resume", "ckpt/tiny", "model.embed_dim=32"],
            "ckpt/tiny: its weights do not fit the model section; drop the model.* keys",
        ),
        (["--resume", "tiny.yaml"], "tiny.yaml: not a checkpoint that can be read (damaged, or more than tensors and"),
    ],
)
def test_what_cannot_be_resumed(capsys, arguments, expected):
    """One line, and the run stays as it is."""
    assert run("training.steps=3") == 0
    before = files(Path("ckpt/tiny")) | files(Path("logs/tiny"))
    assert refused(capsys, *arguments, "training.steps=5").startswith(expected)
    assert files(Path("ckpt/tiny")) | files(Path("logs/tiny")) == before


# --- Ways to compute the same -----------------------------------------------------------------------------------------


def test_replaying_the_live_groups_gives_the_same_weights(monkeypatch):
    """Few live groups: a pass without a graph and a replay of the live ones, against one pass with a graph for all."""
    kept = []

    def watch(*arguments, **options):
        kept.append(options["keep_graph"])
        return rollout(*arguments, **options)

    monkeypatch.setattr(train, "rollout", watch)
    keys = ("rollout.reward=rewards.py:rare", "training.log_interval=2", "training.micro_batch_size=8")
    assert run("training.run_name=replayed", *keys) == 0
    assert max(list(scalars("replayed")["groups/live"].values())) < train.REPLAY_BELOW
    assert kept == [True] * 2 + [False] * 22  # from the first log on, two micro-batches a step
    kept.clear()
    monkeypatch.setattr(train, "REPLAY_BELOW", 0.0)
    assert run("training.run_name=one_pass", *keys) == 0
    assert kept == [True] * 24
    start = train.build_model(configured(), 3, torch.device("cpu")).state_dict()
    for name, tensor in ckpt("one_pass")["model"].items():
        torch.testing.assert_close(ckpt("replayed")["model"][name], tensor, atol=1e-5, rtol=1e-3)
        assert not torch.allclose(tensor, start[name], atol=1e-4) or name == "cls_token"


def test_micro_batches_give_the_same_gradients():
    """Without draws (labels, no dropout), 4 at a time or 16: the same weights up to rounding."""
    plain = ("training.objective=supervised", "model.dropout=0", "rollout.num_mc_samples=1")
    assert run("training.run_name=whole", *plain) == 0
    assert run("training.run_name=parts", "training.micro_batch_size=4", *plain) == 0
    assert run("training.run_name=uneven", "training.micro_batch_size=5", *plain) == 0
    for name, tensor in ckpt("whole")["model"].items():
        for other in ("parts", "uneven"):
            torch.testing.assert_close(ckpt(other)["model"][name], tensor, atol=2e-4, rtol=1e-3)
    whole, parts = scalars("whole"), scalars("parts")
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert parts["eval/nll"] == pytest.approx(whole["eval/nll"], rel=1e-3)


@pytest.mark.parametrize("size", [4, 16])
def test_micro_batches_of_rewards(monkeypatch, size):
    """Each micro-batch draws with a key of its own; all groups are counted; the plain policy gradient has ratio 1."""
    keys = []

    def watch(model, batch, *arguments, **options):
        keys.append((len(batch), options["key"]))
        return rollout(model, batch, *arguments, **options)

    monkeypatch.setattr(train, "rollout", watch)
    assert run(f"training.micro_batch_size={size}") == 0
    assert keys == [(size, (7, step, index)) for step in range(12) for index in range(0, 16, size)]
    assert set(scalars("tiny")["policy/ratio"].values()) == {1.0}
    assert events("tiny").Histograms("groups/success_rate")[0].histogram_value.num == 16
    assert ckpt("tiny")["rows"] == [] and ckpt("tiny")["step"] == 12


def test_compiled(monkeypatch):
    """model.compile: the same weights, under the same names (traced by dynamo, run by eager kernels)."""
    compiled = []

    def compile_with(self, **options):
        compiled.append(options)
        return compile_module(self, backend="aot_eager", **options)

    compile_module = torch.nn.Module.compile
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


def test_bfloat16(capsys):
    """Autocast over float32 weights, on the CPU as well."""
    assert run("training.dtype=bfloat16") == 0
    assert "M parameters on cpu, bfloat16 autocast" in capsys.readouterr().out
    assert {tensor.dtype for tensor in ckpt("tiny")["model"].values()} == {torch.float32}


def test_start_from_supervised_weights(capsys, monkeypatch):
    """Likelihood first, reward second: the run starts from the checkpoint's weights; the reference is they."""
    assert run("training.run_name=first", "training.objective=supervised") == 0
    start = dict(ckpt("first")["model"])
    keys = ("training.kl_coef=0.1", "training.steps=3", "model.checkpoint_path=ckpt/first/last.pt")
    capsys.readouterr()
    assert run("training.run_name=second", *keys) == 0
    line = f"ckpt/first/last.pt: {len(start)} tensors loaded"
    assert line in capsys.readouterr().out.splitlines() and same(dict(ckpt("second")["reference"]), start)
    text = refused(capsys, "training.run_name=third", "model.checkpoint_path=none.pt")
    assert text == "none.pt: no such file" and not Path("ckpt/third").exists()


# --- Rewards of one's own ---------------------------------------------------------------------------------------------


def test_several_rewards_with_weights():
    """Their weighted sum is learned from, each is logged by itself; a lone weight of 2 changes nothing under maxrl."""
    mixed = "rollout.reward={rewards.py:right: 0.5, rewards.py:one: 2, classification_reward: 1}"
    assert run("training.run_name=mixed", mixed) == 0
    found = scalars("mixed")
    for step in (1, 5, 10, 12):
        right = found["reward/rewards.py:right"][step]
        assert 0 < right < 1 and found["reward/rewards.py:one"][step] == 1
        assert found["reward/classification_reward"][step] == right
        assert found["reward/mean"][step] == pytest.approx(2 + 1.5 * right)
    assert found["reward/min"][1] == 2
    assert run("training.run_name=single", "rollout.reward=rewards.py:right") == 0
    assert run("training.run_name=double", "rollout.reward={rewards.py:right: 2}") == 0
    assert run("training.run_name=own") == 0
    models = {name: dict(ckpt(name)["model"]) for name in ("single", "double", "own", "mixed")}
    assert same(models["single"], models["double"]) and same(models["single"], models["own"])
    assert not same(models["single"], models["mixed"])


@pytest.mark.parametrize(
    "reward, expected",
    [
        ("nope.py:f", "nope.py cannot be loaded ([Errno 2] No such file or directory: "),
        ("rewards.py:nope", "no function nope in rewards.py"),
        ("rewards.py:number", "no function number in rewards.py"),
        ("accuracy", "no function accuracy in vision_task; one of your own is path/to/file.py:function"),
        ("broken.py:f", "broken.py cannot be loaded (expected ':' (broken.py, line 1))"),
        ("raising.py:f", "raising.py cannot be loaded (division by zero)"),
    ],
)
def test_rewards_that_cannot_be_loaded(capsys, reward, expected):
    """Missing file, missing function, syntax error, error: one line, nothing made."""
    Path("broken.py").write_text("def f()\n")
    Path("raising.py").write_text("1 / 0\n")
    assert refused(capsys, f"rollout.reward={reward}").startswith(f"rollout.reward: {expected}")
    assert not Path("ckpt").exists() and not Path("logs").exists()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("flat", "rewards.py:flat returned a tensor of shape [16, 2]; "),
        ("nothing", "rewards.py:nothing returned NoneType; "),
    ],
)
def test_rewards_of_a_wrong_shape(capsys, monkeypatch, name, expected):
    """The line says what it returned and what was expected; no step was made."""
    seen = watch_weights(monkeypatch)
    end = "expected a tensor of shape [B, T, A, …] = [16, 2, 4]"
    assert refused(capsys, f"rollout.reward=rewards.py:{name}") == f"rollout.reward: {expected}{end}"
    assert seen == [] and not Path("ckpt").exists()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nan", r"rollout.reward: (rewards.py:nan) returned nan at step 5; expected finite numbers"),
        (
            "negative",
            r"rollout.reward: returned -1.5 at step 5; rollout.advantage: (maxrl) expects rewards >= 0: add a constant "
            r"to it, or take rloo",
        ),
        (
            "huge",
            r"the loss is (\S+), the gradient norm inf at step 5; the weights were not touched: lower "
            r"training.learning_rate; --resume goes on from the last checkpoint, if there is one",
        ),
    ],
)
def test_a_run_that_goes_wrong_stops_before_the_weights_are_touched(capsys, monkeypatch, name, expected):
    """From step 5 on the reward is bad, which is looked for at step 8: the weights stayed those of step 4, and the last
    checkpoint is good to go on from."""
    seen = watch_weights(monkeypatch)
    advantage = "maxrl" if name != "huge" else "rloo"
    keys = [f"rollout.reward=rewards.py:{name}", f"rollout.advantage={advantage}", "training.log_interval=8"]
    text = refused(capsys, *keys, "training.save_interval=4", "training.eval_interval=99")
    assert re.fullmatch(expected, text)
    assert len(seen) == 8 and not same(seen[2], seen[3])
    assert all(same(weights, seen[3]) for weights in seen[4:])
    assert all(torch.isfinite(tensor).all() for tensor in seen[-1].values())
    assert ckpt("tiny")["step"] == 4 and same(dict(ckpt("tiny")["model"]), seen[3])
    assert sorted(files(Path("ckpt/tiny"))) == ["last.pt", "step_000004.pt"]
    assert run("--resume", "auto", "rollout.reward=rewards.py:right") == 0  # mended
    assert ckpt("tiny")["step"] == 12


@pytest.mark.parametrize("objective", ["grpo", "supervised"])
def test_a_run_that_diverges_stops_with_a_line(capsys, objective):
    """A learning rate that blows up the weights: the loss is not finite, which is said in one line."""
    text = refused(capsys, "training.learning_rate=1e30", f"training.objective={objective}", "data.eval_dir=null")
    assert re.match(r"the loss is (nan|inf), the gradient norm (nan|inf) at step 2; the weights were not touched", text)


# --- What is refused before it starts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["training.stepz=5"], "command line: unknown key training.stepz; did you mean training.steps?"),
        (["training.steps=many"], "training.steps: 'many' is not allowed; expected a whole number >= 1"),
        (["training.steps"], "training.steps: not an option; keys are overridden as section.key=value"),
        (["--config", "none.yaml"], "none.yaml: cannot be read (No such file or directory)"),
        (["model.num_heads=3"], "model.embed_dim: 16 is not a multiple of model.num_heads: 3"),
        (["data.train_dir=none"], "none: no such folder; it should hold one subdirectory of images per class"),
        (["model.num_classes=4"], "model.num_classes: 4, but train holds 3 classes; set it to null"),
        (["data.eval_dir=odd"], "odd: classes unknown in the training folder: cat, dog"),
        (["training.device=cuda"], "training.device: cuda is not available here ("),
        (["training.device=hpu"], "training.device: hpu is not available here (No module named 'torch.hpu')"),
        (["training.device=mps:0"], "training.device: mps:0 is not available here ("),
        (["training.device=abacus"], "training.device: abacus is not available here ("),
        (["training.device="], "training.device: None is not allowed; expected a text"),
        (["data.train_dir=broken", "data.eval_dir=null"], "broken/0/bad.png: not a readable image ("),
        (
            ["data.train_dir=broken", "data.eval_dir=null", "data.num_workers=1"],
            "broken/0/bad.png: not a readable image (",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input(capsys, arguments, expected):
    """One line, exit 2, no checkpoint."""
    if ("cuda" in expected and torch.cuda.is_available()) or ("mps" in expected and torch.backends.mps.is_available()):
        pytest.skip("there is a GPU")
    for name in ("cat", "dog", "0"):
        shutil.copytree("eval/0", f"odd/{name}")
    shutil.copytree("train", "broken")
    Path("broken/0/bad.png").write_bytes(next(Path("train/0").iterdir()).read_bytes()[:60])
    assert refused(capsys, *arguments).startswith(expected)
    assert not Path("ckpt").exists()


def test_folders_that_cannot_be_written(capsys):
    """ckpt_dir or log_dir is a file: a line that names it."""
    Path("a_file").write_text("text")
    text = refused(capsys, "training.ckpt_dir=a_file", "training.run_name=a")
    assert text == "a_file/a/step_000003.pt: cannot be written (Not a directory); earlier checkpoints are untouched"
    assert "a_file" in refused(capsys, "training.log_dir=a_file", "training.run_name=b")
    assert Path("a_file").read_text() == "text"


def test_every_shipped_key_can_be_overridden_from_the_command_line():
    """The value of the command line is the one in the checkpoint, where a run's config is kept."""
    assert run("training.steps=3", "training.learning_rate=1e-4", "rollout.advantage=grpo", "data.mean=[0, 0, 0]") == 0
    config = ckpt("tiny")["config"]
    assert (config["training"]["learning_rate"], config["rollout"]["advantage"]) == (1e-4, "grpo")
    assert config["data"]["mean"] == [0.0, 0.0, 0.0] and config["training"]["run_name"] == "tiny"
    keys = read_yaml("tiny.yaml") | {"training.steps": 3}
    flat = flatten(config, "")
    assert {name: flat[name] for name in keys} == keys


def test_one_class_is_nothing_to_learn(capsys, tmp_path):
    """A training folder with a single class is refused."""
    (tmp_path / "one" / "x").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "x" / "0.png")
    text = refused(capsys, f"data.train_dir={tmp_path}/one", "data.eval_dir=null")
    assert text == f"{tmp_path}/one: only one class, x; there is nothing to tell it from"


def test_a_reward_file_may_define_a_dataclass(tmp_path):
    """It is a module like others: `from __future__ import annotations` and dataclasses look it up by name."""
    (tmp_path / "classy.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Fine:\n    size: float = 2.0\n"
        "def reward(actions, outputs, targets, metadata):\n"
        "    return Fine().size * (actions == targets[:, None, None])\n"
    )
    ((function, weight),) = train.load_rewards(
        {"task": "classification", "rollout": {"reward": {f"{tmp_path}/classy.py:reward": 0.5}}}
    ).values()
    actions, targets = torch.tensor([[[0, 1]]]), torch.tensor([1])
    assert weight == 0.5 and function(actions, None, targets, {}).tolist() == [[[0.0, 2.0]]]


# --- Dirty data -------------------------------------------------------------------------------------------------------


def more_images() -> None:
    """160 training images instead of 24: the same under more names."""
    for path in sorted(Path("train").rglob("*.png")):
        for i in range(6):
            shutil.copy(path, path.with_name(f"{path.stem}-{i}.png"))


def test_bad_images_are_skipped_named_once_and_counted(capsys):
    more_images()
    bad = sorted(Path("train/1").iterdir())[3]
    bad.write_text("no picture")
    Path("eval/0", sorted(os.listdir("eval/0"))[0]).unlink()
    (Path("eval/0") / "broken.png").write_bytes(b"")
    assert refused(capsys, "training.steps=30").startswith(("train/1", "eval/0"))
    shutil.rmtree("ckpt", ignore_errors=True)
    shutil.rmtree("logs", ignore_errors=True)
    (Path("eval/0") / "broken.png").unlink()
    capsys.readouterr()
    assert run("training.steps=30", "data.on_bad_image=skip") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {bad}: not a readable image")
    assert scalars("tiny")["data/bad_images"][30] == 1


def test_more_than_one_percent_of_bad_images_stop_the_run(capsys):
    more_images()
    for path in sorted(Path("train/1").iterdir())[:3]:
        path.write_text("no picture")
    line = refused(capsys, "training.steps=30", "data.on_bad_image=skip")
    begin = r"data.on_bad_image: skip: \d of 180 images \(training and evaluation\) cannot be decoded, more than 1 %; "
    assert re.match(begin + "the last: train/1", line)


def test_an_evaluation_leaves_bad_images_out(capsys):
    for path in sorted(Path("eval").rglob("*.png")):
        for i in range(20):
            shutil.copy(path, path.with_name(f"{path.stem}-{i}.png"))
    assert run("training.steps=3") == 0
    good = train.main(["--evaluate", "ckpt/tiny"])
    bad = sorted(Path("eval/4").iterdir())[5]
    text = bad.read_bytes()
    bad.write_text("no picture")
    capsys.readouterr()
    assert train.main(["--evaluate", "ckpt/tiny", "data.on_bad_image=skip"]) == good == 0
    dropped = capsys.readouterr().out.splitlines()[-1]
    bad.write_bytes(text)
    os.rename(bad, "aside.png")
    assert train.main(["--evaluate", "ckpt/tiny"]) == 0
    without = capsys.readouterr().out.splitlines()[-1]
    assert dropped.split(" (mean")[0] == without.split(" (mean")[0]  # the passes' draws are by place in a batch


def test_a_data_set_that_changed_before_a_resume_is_said(capsys, monkeypatch):
    assert stop_after(monkeypatch, 4) == 143
    shutil.copy(next(Path("train/0").iterdir()), "train/0/new.png")
    assert run("--resume", "ckpt/tiny") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert re.match(
        r"warning: train holds 25 images \(.*\), it held 24 images \(.*\): the rest of this epoch", warnings[0]
    )


def test_out_of_memory_is_a_line_that_names_the_keys(capsys, monkeypatch):
    def step(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n GPU 0 has ...")

    monkeypatch.setattr(train, "training_step", step)
    line = refused(capsys)
    assert line.startswith("out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...); lower")
    for key in ("training.micro_batch_size", "rollout.num_mc_samples", "model.activation_checkpointing"):
        assert key in line and (key in SCHEMA)


# --- Masks and boxes --------------------------------------------------------------------------------------------------


@pytest.fixture
def scenes(folder):
    """64 training scenes and 16 of evaluation in data/scenes of the own folder."""
    assert make_scenes.main(["--out", "data/scenes", "--train", "64", "--eval", "16"]) == 0
    return folder


SMALL = ["training.steps=6", "training.batch_size=12", "training.log_interval=2", "training.eval_interval=3"]
SMALL += [
    "training.save_interval=3",
    "training.device=cpu",
    "model.embed_dim=16",
    "model.depth=2",
    "data.num_workers=0",
]
SMALL += ["rollout.actions_per_sample=3", "training.run_name=r"]
SMALL += ["data.train_dir=data/scenes/train", "data.eval_dir=data/scenes/eval"]


def run_task(task: str, *arguments: str) -> int:
    Distribution.set_default_validate_args(True)
    return train.main(["--config", str(ROOT / f"config_{task}.yaml"), *SMALL, *arguments])


@pytest.mark.parametrize(
    "task, figure, keys, bound",
    [
        ("segmentation", "mean_iou", [], 0.7),
        ("segmentation", "mean_iou", ["rollout.reward=pixel_reward"], 0.7),
        ("detection", "ap50", [], 0.08),
        ("detection", "ap50", ["training.objective=supervised", "detection.supervised_loss=log_prob"], 0.08),
    ],
)
def test_masks_and_boxes_are_learned(scenes, capsys, task, figure, keys, bound):
    """The shipped configs at fewer steps, evaluated on the scenes they learn (which takes hundreds of scenes less)."""
    steps, actions = (100, 4) if task == "segmentation" else (250, 32)
    keys = [*keys, f"training.steps={steps}", "training.eval_interval=125", "model.embed_dim=48", "model.depth=3"]
    keys += [f"rollout.actions_per_sample={actions}", "data.eval_dir=data/scenes/train", "training.batch_size=16"]
    assert run_task(task, *keys) == 0
    found = scalars("r")
    assert found[f"eval/{figure}"][steps] > bound and found[f"eval_mc/{figure}"][steps] > bound
    best = {"segmentation": "eval/mean_iou", "detection": "eval/map"}[task]
    assert ckpt("r")["best_figure"] == pytest.approx(max(found[best].values()))


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_tensorboard_shows_masks_and_boxes(scenes, capsys, task):
    assert run_task(task, "training.steps=3") == 0
    names = {"segmentation": {"mean_iou", "pixel_accuracy", "iou/digit"}, "detection": {"map", "ap50", "ap75", "f1"}}
    found = scalars("r")
    assert {f"{prefix}/{name}" for prefix in ("eval", "eval_mc") for name in names[task]} <= set(found)
    reward = {"segmentation": "reward/mask_iou_credit", "detection": "reward/detection_reward"}[task]
    assert 0 < found[reward][1] < 1 and found[reward][1] == pytest.approx(found["reward/mean"][1], rel=1e-6)
    picture = Image.open(io.BytesIO(events("r").Images("eval/most_uncertain")[0].encoded_image_string))
    assert len(picture.convert("RGB").getcolors(100_000)) > 50
    line = {"segmentation": "step 3: mean iou 0.", "detection": "step 3: mAP 0."}[task]
    assert line in capsys.readouterr().out
    assert train.main(["--evaluate", "ckpt/r"]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("task", ["segmentation", "detection"])
@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["training.kl_coef=0.1", "training.update_epochs=2", "data.augment=true", "training.micro_batch_size=5"],
        ["rollout.action=argmax"],
    ],
)
def test_masks_and_boxes_resume_to_the_bit(scenes, monkeypatch, task, keys):
    assert run_task(task, *keys, "training.run_name=whole") == 0
    monkeypatch.setattr(sys, "argv", ["train.py"])
    original = train.training_step

    def stopping(*args, **kwargs):
        if args[5] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "training_step", stopping)
    assert run_task(task, *keys) == 143
    monkeypatch.setattr(train, "training_step", original)
    assert train.main(["--resume", "ckpt/r"]) == 0
    assert same(learned("r"), learned("whole"))


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_other_rewards_of_masks_and_boxes(scenes, task):
    """One score per action goes to all its elements, alone or with a reward per element."""
    both = {
        "segmentation": ("mask_iou_reward", "pixel_reward"),
        "detection": ("detection_f1_reward", "detection_reward"),
    }
    score, element = both[task]
    assert run_task(task, f"rollout.reward={score}", "training.entropy_coef=0") == 0
    assert run_task(task, f"rollout.reward={{{score}: 1, {element}: 0.5}}", "training.run_name=both") == 0
    found = scalars("both")
    means = {name: found[f"reward/{name}"][1] for name in both[task]}
    assert found["reward/mean"][1] == pytest.approx(
        means[score] + 0.5 * means[element], rel=0.05
    )  # by image, by element


@pytest.mark.parametrize(
    "task, arguments, expected",
    [
        ("segmentation", ["data.train_dir=train"], "train: no folder images; it should hold images/ and masks/"),
        ("detection", ["data.train_dir=train"], "train/annotations.json: no such file"),
        ("segmentation", ["rollout.reward=detection_reward"], "no function detection_reward in segmentation_task"),
        ("segmentation", ["model.num_classes=3"], "model.num_classes: 3, but data/scenes/train holds 2 classes"),
        ("detection", ["detection.box_std=0"], "detection.box_std: 0 is not allowed; expected a number > 0"),
        (
            "detection",
            ["task=boxes"],
            "task: 'boxes' is not allowed; expected classification | segmentation | detection",
        ),
        ("detection", ["tasks=detection"], "command line: unknown key tasks; did you mean task?"),
        (
            "segmentation",
            ["rollout.reward=pixel_reward", "rollout.num_mc_samples=1", "rollout.actions_per_sample=1"],
            "rollout.actions_per_sample: a group needs two actions",
        ),
    ],
)
def test_bad_input_of_masks_and_boxes(scenes, capsys, task, arguments, expected):
    capsys.readouterr()
    assert run_task(task, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and expected in lines[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_mask_ends_the_run_with_a_line(scenes, capsys, workers):
    Image.new("L", (32, 32), 9).save("data/scenes/train/masks/000005.png")
    assert run_task("segmentation", f"data.num_workers={workers}") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "000005.png: pixel value 9, but the classes are 0 to 1" in lines[0]
