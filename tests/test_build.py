"""build.py: tasks, rewards, settings, device, frozen layers, parameter groups and the learning rate of a config."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, message, same
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import build
from config import flatten
from grpo import RolloutSettings
from vision_task import Task, classification_reward
from vit_model import VisionTransformer

CPU = torch.device("cpu")
EMBEDDING = {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
REWARDS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Fine:  # looks its module up by name, as annotations are text
    size: float = 0.5

def half(actions, outputs, targets, metadata):
    return Fine().size * (actions == targets[:, None, None])

def vandal(actions, outputs, targets, metadata):
    for tensor in (actions, outputs, targets, metadata["counted"], metadata["indices"]):
        tensor.zero_()
    metadata["paths"].clear()
    metadata.clear()
    return actions.float()

def divides(actions, *others):
    none = actions.sum() * 0
    return 1 / int(none)

def deep(actions, *others):  # the error is torch's, the line is ours
    return actions.view(-1, 7, 7)

def beside(actions, *others):
    import beside_the_rewards  # when it is called
    return beside_the_rewards.price * actions.float()

def three(actions, outputs, targets):
    return actions

def named(actions, outputs, targets, *, metadata):
    return actions

def defaults(a, b, c, d, e=5):
    return a.float()

number = 5
"""


def make_task(**keys) -> Task:
    """The task of the tiny config, with some flat keys `section__key` changed."""
    overrides = {name.replace("__", "."): value for name, value in keys.items()}
    return build.configure(("tiny.yaml", flatten(TINY, "")), ("test", overrides))[1]


def training(**keys) -> SimpleNamespace:
    """The section of the tiny config, with some keys changed."""
    return SimpleNamespace(**make_task().config["training"] | keys)


# --- Tasks, rewards, settings -----------------------------------------------------------------------------------------


def test_a_task_is_configured_by_name():
    """The last layer that names it counts; its first reward is the default; keys of the others may stand there."""
    firsts = zip(build.TASKS, ("classification_reward", "mask_iou_credit", "detection_reward"))
    for name, reward in firsts:
        layers = ("file", {"task": "detection", "detection.box_std": 0.25}), ("command line", {"task": name})
        config, task = build.configure(*layers)
        assert type(task) is build.TASKS[name] and task.config is config
        assert config["task"] == name and config["detection"]["box_std"] == 0.25
        assert build.load_rewards(task) == {reward: (task.rewards[reward], 1.0)}
    allowed = "is not allowed; expected classification | segmentation | detection | path/to/file.py[:ClassName]"
    assert message(build.configure, ("file", {"task": "boxes"})) == f"task: 'boxes' {allowed}"
    assert message(build.configure, ("file", {"task": 5})) == f"task: 5 {allowed}"


@pytest.mark.parametrize(
    "reward, expected",
    [
        ("nope.py:f", "nope.py cannot be loaded ([Errno 2] No such file or directory: "),
        ("rewards.py:nope", "no function nope in rewards.py"),
        ("rewards.py:number", "no function number in rewards.py"),
        ("pixel_reward", "no function pixel_reward in classification_reward, macro_f1, balanced_accuracy, g_mean, "),
        ("broken.py:f", "broken.py cannot be loaded (expected ':' (broken.py, line 1))"),
        ("raising.py:f", "raising.py cannot be loaded (division by zero, line 1)"),
        ("rewards.txt:f", "rewards.txt cannot be loaded (its name should end in .py)"),
        ("rewards.py:three", "rewards.py:three takes (actions, outputs, targets); expected four parameters (actions, "),
        ("rewards.py:named", "rewards.py:named takes (actions, outputs, targets, *, metadata); expected four "),
    ],
)
def test_rewards_that_cannot_be_loaded(tmp_path, monkeypatch, reward, expected):
    """Missing file, missing function, syntax error, error: one line."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"rewards.py": REWARDS, "broken.py": "def f()\n", "raising.py": "1 / 0\n"}.items():
        (tmp_path / name).write_text(text)
    assert message(build.load_rewards, make_task(rollout__reward=reward)).startswith(f"rollout.reward: {expected}")


def test_rewards_of_the_task_and_of_ones_own(tmp_path):
    """By name, each with its weight."""
    name = f"{tmp_path}/rewards.py:half"
    (tmp_path / "rewards.py").write_text(REWARDS)
    rewards = build.load_rewards(make_task(rollout__reward={name: 3, "classification_reward": 0.5}))
    half, weight = rewards.pop(name)
    actions, targets = torch.tensor([[[0, 1]]]), torch.tensor([1])
    assert weight == 3.0 and half(actions, None, targets, {}).tolist() == [[[0.0, 0.5]]]
    assert rewards == {"classification_reward": (classification_reward, 0.5)}


def own_reward(folder, function: str):
    """One of REWARDS, loaded from a file, and its name."""
    (folder / "rewards.py").write_text(REWARDS)
    name = f"{folder}/rewards.py:{function}"
    return build.load_rewards(make_task(rollout__reward=name))[name][0], name


def arguments() -> tuple:
    """Of a reward, of one image."""
    metadata = {"paths": ["a.png"], "indices": torch.tensor([3]), "counted": torch.tensor([True])}
    return torch.tensor([[[0, 1]]]), torch.rand(1, 1, 3) + 1, torch.tensor([1]), metadata


def test_a_reward_of_ones_own_may_write_into_its_arguments(tmp_path):
    reward, _ = own_reward(tmp_path, "vandal")
    given = arguments()
    before = [given[0].clone(), given[1].clone(), given[2].clone(), dict(given[3])]
    assert reward(*given).tolist() == [[[0, 0]]]
    assert same(list(given), before) and given[3]["paths"] == ["a.png"] and int(given[3]["indices"]) == 3
    assert own_reward(tmp_path, "defaults")[0](*given).tolist() == [[[0, 1]]]


def test_an_error_inside_a_reward_names_it_and_the_line(tmp_path):
    """Also where it is raised by what the reward calls."""
    for function, error, text in (("divides", "ZeroDivisionError", "1 / int(none)"), ("deep", "RuntimeError", "7, 7")):
        reward, name = own_reward(tmp_path, function)
        line = next(i for i, row in enumerate(REWARDS.splitlines(), 1) if text in row)
        told = message(reward, *arguments())
        assert told.startswith(f"rollout.reward: {name}: {error}: ")
        assert told.endswith(f"({tmp_path}/rewards.py, line {line})")


def test_a_reward_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_the_rewards.py").write_text("price = 5")
    assert own_reward(tmp_path, "beside")[0](*arguments()).tolist() == [[[0, 5]]]


def test_settings_are_those_of_the_config():
    """Every field; live groups are padded only where shapes are compiled."""
    fields = {"clip_low": 0.1, "clip_high": 0.4, "update_epochs": 2, "kl_coef": 0.5, "entropy_coef": 0.25}
    fields["label_coef"] = 0.125
    fields |= {"max_grad_norm": 2.0, "objective": "supervised"}
    task = make_task(**{f"training__{name}": value for name, value in fields.items()})
    own = {"supervised_loss": task.supervised_loss, "micro_batch_size": 8, "pad_to": 1}
    assert vars(build.update_settings(task, 8)) == fields | own
    settings = build.update_settings(make_task(model__compile=True, training__micro_batch_size=12), 16)
    assert (settings.micro_batch_size, settings.pad_to) == (12, 3)
    config = make_task(rollout__action="argmax", rollout__advantage="rloo").config
    assert build.rollout_settings(config) == RolloutSettings(2, 4, "argmax", "rloo")


def test_the_images_of_each_of_two_processes(monkeypatch):
    """Equal parts, of whole micro-batches."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert build.images_per_rank(training()) == build.images_per_rank(training(micro_batch_size=4)) == 8
    begin, end = "training.batch_size:", "does not fall into equal parts for 2 processes"
    assert message(build.images_per_rank, training(batch_size=9)) == f"{begin} 9 {end}"
    text = message(build.images_per_rank, training(micro_batch_size=3))
    assert text == f"{begin} 16 {end} of whole micro-batches of 3"


def test_device_and_precision(monkeypatch):
    """A device that is not there is said in one line; each process of a host has its own GPU; float32 is the default on
    a CPU."""
    assert build.pick_device("cpu") == CPU
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert build.pick_device("auto").type == best
    monkeypatch.setenv("LOCAL_RANK", "99")
    for name, tried in {"cuda": "cuda:99", "cuda:98": "cuda:98", "hpu": "hpu", "abacus": "abacus"}.items():
        assert message(build.pick_device, name).startswith(f"training.device: {tried} is not available here (")
    for dtype, expected in {"auto": None, "float32": None, "bfloat16": torch.bfloat16}.items():
        assert build.build_model(make_task(training__dtype=dtype), 3, CPU).autocast_dtype == expected


# --- Sizes of a checkpoint --------------------------------------------------------------------------------------------

VIT = {"image_size": 28, "patch_size": 14, "embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0}
TOLD = {"patch_size": 14, "embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "registers": 0}
TOLD |= {"positions": "learned", "norm_eps": 1e-6}


@pytest.fixture
def weights(tmp_path) -> str:
    """The state dict of a small ViT of patch 14."""
    torch.save(VisionTransformer(**VIT).state_dict(), tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


def configured(path: str, keys: dict, **given) -> tuple[dict, list[str]]:
    """The sizes that a run would have with the config file's keys and those of the command line, and the lines."""
    file = "a.yaml", {"model.image_size": 28, "model.checkpoint_path": path} | keys
    overrides = "command line", {f"model.{name}": value for name, value in given.items()}
    layers, lines = build.layers_of(file, overrides)
    model = build.configure(*layers)[0]["model"]
    return {key: model[key] for key in TOLD}, lines


def test_the_sizes_are_the_checkpoints(weights):
    """Nothing else is needed; null is as if left out, the same value does no harm. What a config file says yields, with
    a line; what was never in the file (num_heads, norm_eps) can be set."""
    used = "patch_size 14, embed_dim 128, depth 2, num_heads 2{}, mlp_ratio 1.0, registers 0, positions learned, "
    used += "norm_eps "
    guessed = f"{weights}: {used.format(' (embed_dim / 64: no tensor tells it)')}1e-06"
    assert configured(weights, {}) == (TOLD, [guessed])
    given = {"patch_size": 14, "num_heads": None, "mlp_ratio": "1e0"}
    assert configured(weights, {"model.depth": None}, **given) == (TOLD, [guessed])
    shipped = {"model.patch_size": 32, "model.embed_dim": 192, "model.num_heads": 3, "model.depth": 2}
    yielding = f"a.yaml yields to {weights}: patch_size 32 to 14, embed_dim 192 to 128, num_heads 3 to 2"
    assert configured(weights, shipped) == (TOLD, [yielding, guessed])
    line = [f"{weights}: {used.format('').replace('heads 2', 'heads 4')}0.001"]
    assert configured(weights, {}, num_heads=4, norm_eps="1e-3") == (TOLD | {"num_heads": 4, "norm_eps": 1e-3}, line)
    kept = {"model.num_heads": 4, "model.embed_dim": 128, "model.norm_eps": 1e-3}
    assert configured(weights, kept) == (TOLD | {"num_heads": 4, "norm_eps": 1e-3}, line)


def test_another_size_on_the_command_line_is_refused(weights, tmp_path):
    """The line names both values; a width that no head of 64 divides asks for num_heads; without a checkpoint the
    config is as it is."""
    for given, told in (({"patch_size": 16}, "14"), ({"mlp_ratio": 2}, "1.0"), ({"positions": "rotary"}, "learned")):
        (key, value), *_ = given.items()
        shown = float(value) if key == "mlp_ratio" else value
        text = message(configured, weights, {}, **given)
        assert text == f"command line: model.{key}={shown}, but {weights} has {told}; leave it out"
    assert message(configured, weights, {}, depth="two").startswith("model.depth: 'two' is not allowed")
    torch.save(VisionTransformer(**VIT | {"embed_dim": 48}).state_dict(), tmp_path / "narrow.pth")
    text = message(configured, str(tmp_path / "narrow.pth"), {})
    assert text.endswith("no tensor tells model.num_heads, and embed_dim 48 is no multiple of 64; set it")
    assert configured(str(tmp_path / "narrow.pth"), {}, num_heads=3)[0]["num_heads"] == 3
    assert message(configured, str(tmp_path / "none.pth"), {}).endswith("none.pth: no such file")
    assert configured(None, {"model.patch_size": 7})[0]["patch_size"] == 7
    assert configured(weights, {"model.patch_size": 7}, checkpoint_path=None)[0]["patch_size"] == 7


def test_a_checkpoint_of_this_repo_says_everything(tmp_path):
    """Heads and epsilon too, by its config; another number of heads on the command line is let through, for the warning
    of `load_weights`. One of before these keys has their defaults."""
    state = {
        "step": 1,
        "model": VisionTransformer(**VIT | {"num_heads": 4}).state_dict(),
        "optimizer": {},
        "classes": [],
    }
    for section, eps in (({"num_heads": 4}, 1e-6), ({"num_heads": 4, "norm_eps": 1e-5}, 1e-5)):
        torch.save(state | {"config": {"model": section}}, tmp_path / "last.pt")
        sizes, _ = configured(str(tmp_path), {"model.num_heads": 2, "model.embed_dim": 128, "model.norm_eps": 1e-3})
        assert sizes == TOLD | {"num_heads": 4, "norm_eps": eps}
        assert configured(str(tmp_path), {}, num_heads=8)[0]["num_heads"] == 8


# --- Learning rate and parameter groups -------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup, steps, low", [(5, 30, 0.0), (2, 9, 1e-4), (10, 11, 1e-5)])
def test_learning_rate_is_linear_warm_up_then_cosine(warmup, steps, low):
    """Against torch's LinearLR followed by CosineAnnealingLR, at every step."""
    section = training(warmup_steps=warmup, steps=steps, min_learning_rate=low)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    cosine = CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=low)
    chain = SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
    for step in range(steps):
        assert build.learning_rate(step, section) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        chain.step()
    assert build.learning_rate(steps, section) == pytest.approx(low, abs=1e-12)


@pytest.mark.parametrize("warmup, steps, rates", [(0, 2, [0.8, 0.4]), (4, 4, [0.2, 0.4, 0.6, 0.8]), (4, 2, [0.2, 0.4])])
def test_learning_rate_at_the_borders(warmup, steps, rates):
    """No warm-up starts at the top; nothing but warm-up, or a part of it, is linear."""
    section = training(warmup_steps=warmup, steps=steps, learning_rate=0.8)
    assert [build.learning_rate(step, section) for step in range(steps)] == pytest.approx(rates)


@pytest.mark.parametrize("decay", [1.0, 0.6])
def test_learning_rate_and_weight_decay_of_each_parameter(decay):
    """Each is there once, with decay^(depth + 1 - layer) of the learning rate; weight matrices alone decay, not biases,
    norms, class token and position embedding."""
    model = build.build_model(make_task(model__depth=3, model__registers=2), 3, CPU)
    optimizer = build.build_optimizer(model, training(weight_decay=0.3, betas=[0.8, 0.9], layer_decay=decay))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], group) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values()) and len(found) == 5 + 3 * 12 + 4
    for name, group in found:
        block = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 4  # of norm and head
        layer = 0 if name in EMBEDDING else block
        assert group["lr_scale"] == pytest.approx(decay ** (4 - layer), rel=1e-12), name
        assert group["weight_decay"] == (0.3 if name.endswith(".weight") and "norm" not in name else 0.0), name
        assert group["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_frozen_blocks_take_no_gradient(k):
    """They have no place in the optimizer, and nothing is kept for their backward pass."""
    task, needs_gradient = make_task(training__freeze_blocks=k, model__depth=3, model__registers=1), []
    model = build.build_model(task, 3, CPU)
    weights, blocks = dict(model.named_parameters()), tuple(f"blocks.{i}." for i in range(k))
    frozen = {name for name in weights if k and (name in EMBEDDING or name.startswith(blocks))}
    optimizer = build.build_optimizer(model, training())
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {weight for name, weight in weights.items() if name not in frozen}
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: needs_gradient.append(output.requires_grad))
    model(torch.rand(2, 3, 8, 8), model.sample_masks(2, 4)).sum().backward()
    assert needs_gradient == [i >= k for i in range(3)]
    assert {name for name, weight in weights.items() if weight.grad is None} == frozen
