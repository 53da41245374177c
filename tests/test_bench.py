"""bench.py at tiny sizes: that it measures what it says. No timing is asserted here."""

import copy
from pathlib import Path

import bench
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, make_folders, make_scenes, refused, same
from PIL import Image

import build
from config import flatten, read_yaml

SIZES = TINY["model"]


@pytest.fixture
def path(tmp_path, monkeypatch) -> str:
    """The config file of a tiny ViT on 24 digits of three classes."""
    make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    return "tiny.yaml"


def test_a_row_shows_median_quartiles_and_bound():
    """A figure without a bound has a dash, a large one no decimals, one beyond its bound is marked."""
    assert str(bench.Row("x", [3.0, 1.0, 2.0], at_most=2.0)) == "| x | 2.000 (1.500–2.500) | ≤ 2.00 |"
    assert str(bench.Row("x", [0.75], at_least=0.5)) == "| x | 0.750 (0.750–0.750) | ≥ 0.50 |"
    assert str(bench.Row("x", [100.2])) == "| x | 100 (100–100) | – |"
    assert str(bench.Row("x", [1.2], at_most=1.1)) == "| x | **1.200 (1.200–1.200), beyond** | ≤ 1.10 |"
    assert str(bench.Row("x", [1.2], at_least=1.3)) == "| x | **1.200 (1.200–1.200), beyond** | ≥ 1.30 |"


def test_a_fifth_of_the_groups_is_live_and_alone_replayed(path):
    setup, sizes = bench.build_setup(path, bench.ALL_BLOCKS, 10), []
    setup.rewards = {"some_live": (bench.some_live, 1.0)}
    setup.model.register_forward_hook(lambda module, inputs, output: sizes.append((len(output), output.requires_grad)))
    metrics = bench.grpo_step(setup, keep_graph=False)
    assert metrics["groups/live"] == pytest.approx(0.2) and metrics["grad_norm"] > 0
    assert sizes == [(10, False), (2, True)]


def test_the_plain_step_has_the_inputs_and_masks_of_the_rollout(path):
    """And neither step changes the model."""
    setup, seen = bench.build_setup(path, bench.ALL_BLOCKS | {"data.augment": True}), []
    assert setup.is_softmax  # asked before, because it runs the model once
    before = copy.deepcopy(dict(setup.model.state_dict()))
    setup.model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments))
    assert bench.grpo_step(setup, 3)["grad_norm"] > 0
    bench.plain_step(setup, *bench.prepared(setup, 3))
    assert same(*seen) and len(seen[0][1]) == 1 + 3 * SIZES["depth"]
    assert same(before, dict(setup.model.state_dict()))


@pytest.mark.parametrize("passes", [0, 3], ids=["deterministic", "three passes"])
def test_flop_of_a_plain_step(path, passes):
    """Against the matrix products counted by hand: 2 FLOP a multiply-add, backward twice the forward, but once for the
    patches (images need no gradient) and 2.5 times for attention (which repeats q @ k.T)."""
    setup = bench.build_setup(path, bench.ALL_BLOCKS | {"rollout.num_mc_samples": max(passes, 1)})
    assert setup.is_softmax  # asked before the count, because it runs the model once
    inputs, masks = bench.prepared(setup, 0)
    B, D, P = len(inputs), SIZES["embed_dim"], (SIZES["image_size"] // SIZES["patch_size"]) ** 2
    L, T, H, others = P + 1, max(passes, 1), SIZES["num_heads"], SIZES["depth"] - 1
    patches = 2 * P * (3 * SIZES["patch_size"] ** 2) * D
    rows = L * others + 1  # only the class token leaves the last block: its query, W_k and W_v are applied once
    linear = 2 * (rows * 3 * D * D + rows * (D * D + 2 * 4 * D * D) + D * 3)
    expected = B * (2 * patches + T * (3 * linear + 3.5 * 2 * (2 * (others * L + H) * L * D)))
    counted = bench.count_flop(lambda: bench.plain_step(setup, inputs, masks if passes else None))
    assert counted == pytest.approx(expected, rel=0.02)


def test_figures_at_tiny_size(path):
    """All but the one of 224 x 224 pixels and those of memory."""
    rows = [bench.step_over_plain(path, bench.ALL_BLOCKS, "tiny", 1.1, 0), bench.mostly_dead(path, 0)]
    rows += [bench.actions_are_free(path, 0), bench.data_wait(path, windows=2, steps=2)]
    rows += bench.speed(path, 0, 0.5, size=64)
    assert rows[0].figure.endswith("tiny.yaml, tiny, 100% of groups live") and "(cached)" in rows[3].figure
    assert [len(row.values) for row in rows] == [3, 3, 3, 2, 3, 3] and min(min(row.values) for row in rows) >= 0
    assert max(rows[3].values) < 1
    assert [row.at_most for row in rows] == [1.1, 0.6, 1.1, 0.05, None, None] and rows[4].at_least == 0.5


def test_the_three_steps_of_a_frozen_trunk_do_the_same(path, monkeypatch):
    """With tokens computed, kept and given: the same loss, and the trunk runs in the first alone."""
    tiny = {f"model.{name}": value for name, value in (SIZES | {"depth": 12}).items()}
    monkeypatch.setattr(bench, "VIT_S", tiny | {"rollout.num_mc_samples": 2})
    losses, step = [], bench.grpo_step

    def looked_at(s, *arguments, **options):
        calls = []
        hook = s.model.patch_embed.register_forward_hook(lambda *_: calls.append(1))
        losses.append((float(step(s, *arguments, **options)["loss"]), len(calls)))
        hook.remove()
        return {}

    monkeypatch.setattr(bench, "grpo_step", looked_at)
    rows = list(bench.frozen_trunk(path, None, 0))
    assert [len(row.values) for row in rows] == [3] * 8 and [row.at_least for row in rows[2::4]] == [8.0, 25.0]
    for part in (losses[:20], losses[20:]):
        assert len({loss for loss, _ in part}) == 1
        computed = [calls for _, calls in part]
        assert computed[::2][:5] == [1] * 5 and not any(computed[1::2][1:] + computed[10:])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_of_a_fresh_process(path, capfd):
    assert bench.main(["--config", path, "--threads", "1", "--memory", "replay", "32"]) == 0
    assert 0 <= int(capfd.readouterr().out) < 1e9


def test_bad_config_ends_with_one_line(capsys):
    assert refused(capsys, bench.main, "--config", "nowhere.yaml").startswith("nowhere.yaml: cannot be read")


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("dtype, positions", [("float32", "learned"), ("bfloat16", "learned"), ("bfloat16", "rotary")])
@pytest.mark.parametrize("dropout_blocks", [None, 2, 0])
def test_the_memory_plan_is_what_a_forward_pass_keeps(task, dtype, positions, dropout_blocks):
    """Bytes of the tensors saved for the backward pass of a small ViT, weights not counted, within a tenth."""
    model = {"image_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 2, "positions": positions}
    keys = flatten({"task": task, "model": model | {"dropout_blocks": dropout_blocks}}, "")
    _, task = build.configure(("test", keys | {"training.dtype": dtype, "training.batch_size": 4}))
    model = build.build_model(task, 2, torch.device("cpu"))
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        cast = any(tensor.numel() == p.numel() for p in model.parameters())  # the weights in bfloat16
        if storage.data_ptr() not in weights and not cast:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(4, 3, 64, 64), model.sample_masks(4, 4))
    plan = bench.memory_plan(task)
    assert plan["images at a time"] == 4 and plan["activations"] == pytest.approx(sum(kept.values()), rel=0.1)


def test_the_shipped_plan(capsys):
    """config_24GB.yaml fits into 24 GB, and with two GPUs each has half the images."""
    _, task = build.configure(("config_24GB.yaml", read_yaml(str(ROOT / "config_24GB.yaml"))))
    one, two = bench.memory_plan(task), bench.memory_plan(task, 2)
    assert one["parameters"] == one["weights, gradients, AdamW"] / 16 == pytest.approx(22.07e6, rel=1e-3)
    assert 12e9 < one["in all"] < 18e9 and two["activations"] * 2 == one["activations"]
    assert bench.main(["--plan", "--threads", "1", "--config", str(ROOT / "config_24GB.yaml")]) == 0
    assert f"in all                     {one['in all'] / 1e9:.3f} GB" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_plain_step_of_masks_and_boxes_is_the_supervised_one(tmp_path, task):
    """The same gradients as train.py's with objective: supervised, under the same masks, ignored pixels left out."""
    assert make_scenes.main(["--out", str(tmp_path), "--train", "6", "--eval", "1"]) == 0
    mask = np.array(Image.open(tmp_path / "train" / "masks" / "000002.png"))
    mask[:9] = 255
    Image.fromarray(mask).save(tmp_path / "train" / "masks" / "000002.png")
    keys = {"data.train_dir": str(tmp_path / "train"), "model.embed_dim": 16, "model.depth": 2}
    keys |= {"training.batch_size": 6, "training.objective": "supervised", "training.entropy_coef": 0}
    keys["training.max_grad_norm"] = 1e9
    path = str(ROOT / f"config_{task}.yaml")
    setup = bench.build_setup(path, keys)
    bench.plain_step(setup, *bench.prepared(setup, 0))
    plain = [p.grad.clone() for p in setup.model.parameters()]
    bench.grpo_step(setup, 0)
    assert max(float(grad.abs().max()) for grad in plain) > 1e-3
    for grad, p in zip(plain, setup.model.parameters()):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-6)
    assert len(bench.step_over_plain(path, keys, "tiny", 1.25, 0.0).values) == 3


def test_opening_boxes_is_measured_beside_their_headers(capsys):
    """Three pairs of both at least."""
    row = bench.scan_boxes(40, budget=0, per_image=30)
    assert len(row.values) == 3 and row.at_most == 1.5
    assert "opening 40 images with 30 boxes each" in row.figure and capsys.readouterr().out.endswith("their sizes\n")
