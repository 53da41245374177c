"""bench.py at tiny sizes: that it measures what it says. No timing is asserted here."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_make_scenes import make_scenes
from torch.distributions import Distribution

import bench
import train
from config import check, read_yaml

ROOT = Path(__file__).parent.parent
SIZES = {"image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "dropout_blocks": 1}


@pytest.fixture(autouse=True)
def keep_validation(monkeypatch):
    """`bench.main` switches it off for the process."""
    monkeypatch.setattr(Distribution, "_validate_args", Distribution._validate_args)


@pytest.fixture
def path(tmp_path) -> str:
    """A config file of a tiny ViT on five of the bundled digits of each class."""
    for folder in sorted((ROOT / "data" / "train").iterdir()):
        (tmp_path / "images" / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:5]:
            (tmp_path / "images" / folder.name / file.name).symlink_to(file)
    config = {"model": SIZES, "data": {"train_dir": str(tmp_path / "images")}, "training": {"batch_size": 12}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "tiny.yaml")


def test_a_row_shows_median_quartiles_and_bound():
    assert str(bench.Row("x", [3.0, 1.0, 2.0], at_most=2.0)) == "| x | 2.000 (1.500–2.500) | ≤ 2.00 |"
    assert str(bench.Row("x", [0.75], at_least=0.5)) == "| x | 0.750 (0.750–0.750) | ≥ 0.50 |"
    assert str(bench.Row("x", [100.2])) == "| x | 100 (100–100) | – |"


@pytest.mark.parametrize("bound", [{"at_most": 1.1}, {"at_least": 1.3}])
def test_a_figure_beyond_its_bound_is_marked(bound):
    assert "**1.200 (1.200–1.200), beyond**" in str(bench.Row("x", [1.2], **bound))


def test_a_fifth_of_the_groups_is_live_and_alone_replayed(path):
    seen, sizes = bench.build_with_images(path, bench.ALL_BLOCKS, 10), []
    seen.rewards = {"some_live": (bench.some_live, 1.0)}
    seen.model.register_forward_hook(lambda module, inputs, output: sizes.append((len(output), output.requires_grad)))
    metrics = bench.grpo_step(seen, keep_graph=False)
    assert metrics["groups/live"] == pytest.approx(0.2)
    assert metrics["grad_norm"] > 0
    assert sizes == [(10, False), (2, True)]


def test_steps_leave_the_model_untrained(path):
    setup = bench.build_with_images(path, bench.ALL_BLOCKS)
    before = copy.deepcopy(setup.model.state_dict())
    assert bench.grpo_step(setup)["grad_norm"] > 0
    bench.plain_step(setup, *bench.prepared(setup, 0))
    assert all(torch.equal(before[name], value) for name, value in setup.model.state_dict().items())


def test_the_plain_step_has_the_inputs_and_masks_of_the_rollout(path):
    setup, seen = bench.build_with_images(path, bench.ALL_BLOCKS | {"data.augment": True}), []
    setup.model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments))
    bench.grpo_step(setup, 3)
    bench.plain_step(setup, *bench.prepared(setup, 3))
    (inputs, masks), (plain_inputs, plain_masks) = seen
    assert torch.equal(inputs, plain_inputs)
    assert masks.keys() == plain_masks.keys() and len(masks) == 1 + 3 * SIZES["depth"]
    assert all(torch.equal(masks[name], plain_masks[name]) for name in masks)


@pytest.mark.parametrize("passes", [0, 3], ids=["deterministic", "three passes"])
def test_flop_of_a_plain_step(path, passes):
    """Against the matrix products counted by hand: 2 FLOP a multiply-add, backward twice the forward, but once for the
    patches (images need no gradient) and 2.5 times for attention (which repeats q @ k.T)."""
    setup = bench.build_with_images(path, bench.ALL_BLOCKS | {"rollout.num_mc_samples": max(passes, 1)})
    inputs, masks = bench.prepared(setup, 0)
    B, D, P = len(inputs), SIZES["embed_dim"], (SIZES["image_size"] // SIZES["patch_size"]) ** 2
    L, T = P + 1, max(passes, 1)
    patches = 2 * P * (3 * SIZES["patch_size"] ** 2) * D
    linear = attention = 0
    for queries in (L, L, 1):  # only the class token leaves the last block
        linear += 2 * (L * D * 3 * D + queries * (D * D + 2 * 4 * D * D))
        attention += 2 * (2 * queries * L * D)
    linear += 2 * D * 10
    expected = B * (patches * 2 + T * (linear * 3 + attention * 3.5))
    counted = bench.count_flop(lambda: bench.plain_step(setup, inputs, masks if passes else None))
    assert counted == pytest.approx(expected, rel=0.02)


def test_figures_at_tiny_size(path):
    rows = bench.step_over_plain(path, 0) + bench.mostly_dead(path, 0) + bench.actions_are_free(path, 0)
    rows += bench.data_wait(path, windows=2, steps=2) + bench.speed(path, 0, 0.5, size=64)
    assert "100% of groups live" in rows[0].figure and "(cached)" in rows[3].figure
    assert [len(row.values) >= 2 and min(row.values) >= 0 for row in rows] == [True] * 6
    assert rows[3].values[0] < 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_of_a_fresh_process(path, capfd):
    assert bench.main(["--config", path, "--threads", str(torch.get_num_threads()), "--memory", "replay", "32"]) == 0
    assert 0 <= int(capfd.readouterr().out) < 1e9


def test_bad_config_ends_with_one_line(capsys):
    assert bench.main(["--config", "nowhere.yaml", "--threads", str(torch.get_num_threads())]) == 2
    assert capsys.readouterr().err.startswith("bench.py: nowhere.yaml: cannot be read")


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout_blocks", [None, 2])
def test_the_memory_plan_is_what_a_forward_pass_keeps(task, dtype, dropout_blocks):
    """Bytes of the tensors saved for the backward pass of a small ViT, weights not counted, within a tenth."""
    keys = {"task": task, "model.image_size": 64, "model.patch_size": 8, "model.embed_dim": 128, "model.depth": 6}
    keys |= {"model.num_heads": 2, "model.dropout_blocks": dropout_blocks, "training.dtype": dtype}
    keys |= {"training.batch_size": 4}
    config = check(("test", keys))
    model = train.build_model(config, 2, torch.device("cpu"))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        cast = any(tensor.numel() == p.numel() for p in model.parameters())  # the weights in bfloat16
        if storage.data_ptr() not in weights and not cast:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(4, 3, 64, 64), model.sample_masks(4, 4))
    plan = bench.memory_plan(config)
    assert plan["images at a time"] == 4
    assert plan["activations"] == pytest.approx(sum(kept.values()), rel=0.1)


def test_the_shipped_plan():
    """config_24GB.yaml fits into 24 GB, and with two GPUs each has half the images."""
    config = check(("config_24GB.yaml", read_yaml("config_24GB.yaml")))
    one, two = bench.memory_plan(config), bench.memory_plan(config, 2)
    assert (
        one["parameters"] == pytest.approx(22.07e6, rel=1e-3)
        and one["weights, gradients, AdamW"] == 16 * one["parameters"]
    )
    assert 12e9 < one["in all"] < 18e9 and two["activations"] * 2 == one["activations"]


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_plain_step_of_masks_and_boxes_is_the_supervised_one(tmp_path, task):
    """The same gradients as train.py's with objective: supervised, under the same masks, ignored pixels left out."""
    assert make_scenes.main(["--out", str(tmp_path), "--train", "6", "--eval", "1"]) == 0
    mask = np.array(Image.open(tmp_path / "train" / "masks" / "000002.png"))
    mask[:9] = 255
    Image.fromarray(mask).save(tmp_path / "train" / "masks" / "000002.png")
    keys = {
        "data.train_dir": str(tmp_path / "train"),
        "model.embed_dim": 16,
        "model.depth": 2,
        "training.batch_size": 6,
    }
    keys |= {"training.objective": "supervised", "training.max_grad_norm": 1e9, "training.entropy_coef": 0}
    path = str(ROOT / f"config_{task}.yaml")
    s = bench.build_with_images(path, keys)
    inputs, masks = bench.prepared(s, 0)
    bench.plain_step(s, inputs, masks)
    plain = [p.grad.clone() for p in s.model.parameters()]
    bench.grpo_step(s, 0)
    assert max(float(grad.abs().max()) for grad in plain) > 1e-3
    for one, p in zip(plain, s.model.parameters()):
        torch.testing.assert_close(one, p.grad, rtol=1e-4, atol=1e-6)
    [row] = bench.task_step_over_plain(path, keys, "tiny", 1.25, 0.0)
    assert len(row.values) == 3 and min(row.values) > 0 and row.at_most == 1.25
