"""checkpoint.py: round trips, crashes at every moment of a write, full disks, damaged files, weights to start from."""

import argparse
import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_vit_model import timm_names

import checkpoint
from checkpoint import load_checkpoint, load_weights, resample_positions, save_checkpoint
from data_types import InputError
from vit_model import VisionTransformer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


# --- Helpers ----------------------------------------------------------------------------------------------------------


def state(step: int) -> dict:
    """A checkpoint of the step; its tensors tell which one it is."""
    momentum = {"state": {0: {"exp_avg": torch.full((3,), 0.5 * step)}}, "param_groups": [{"betas": (0.9, 0.999)}]}
    rows = [{"reward/mean": torch.tensor(0.1 * step)}]
    config, weights = {"model": {"depth": 2}, "training": {"run_name": None}}, {"w": torch.full((40_000,), float(step))}
    return {"step": step, "model": weights, "optimizer": momentum, "config": config, "classes": ["a", "b"]} | {
        "best_figure": 0.25,
        "rows": rows,
    }


def same(a, b) -> bool:
    """Equal bit for bit, types included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def files(directory: Path) -> dict[str, bytes]:
    """Everything in the folder, hidden files too."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def message(function, *arguments, **options) -> str:
    """The text of the InputError that `function` raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def tiny(num_classes: int = 3, **options) -> VisionTransformer:
    torch.manual_seed(num_classes)
    shape = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**shape | options, num_classes=num_classes)


# --- Saving -----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    """Tensors, tuples, null, nested: as they were; by the folder or by the file; the folder is made."""
    run = tmp_path / "ckpt" / "run"
    assert save_checkpoint(state(200), run, best=True, keep=3) == run / "step_000200.pt"
    assert sorted(files(run)) == ["best.pt", "last.pt", "step_000200.pt"]
    for path in (run, run / "last.pt", run / "best.pt", run / "step_000200.pt"):
        assert same(load_checkpoint(path), state(200))
    assert not same(load_checkpoint(run), state(201))


def test_last_and_best_are_the_step_file(tmp_path):
    """Hard links: no byte is written twice; best.pt stays where it was unless told."""
    save_checkpoint(state(1), tmp_path, best=True, keep=3)
    save_checkpoint(state(2), tmp_path, best=False, keep=3)
    inode = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert inode["best.pt"] == inode["step_000001.pt"] != inode["last.pt"] == inode["step_000002.pt"]


def test_copies_where_there_are_no_hard_links(tmp_path, monkeypatch):
    """A file system without them (exFAT, some mounts): the same contents, another inode."""

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    save_checkpoint(state(1), tmp_path, best=True, keep=3)
    save_checkpoint(state(2), tmp_path, best=False, keep=3)
    found = files(tmp_path)
    assert sorted(found) == ["best.pt", "last.pt", "step_000001.pt", "step_000002.pt"]
    assert found["last.pt"] == found["step_000002.pt"] != found["best.pt"] == found["step_000001.pt"]
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 4


def test_the_oldest_beyond_keep_go(tmp_path):
    """Of six step files the newest two stay, by number and not by name; best.pt outlives its step file."""
    for step in (1, 2, 999_999, 1_000_000, 2_000_000):
        save_checkpoint(state(step), tmp_path, best=step == 2, keep=2)
    assert sorted(files(tmp_path)) == ["best.pt", "last.pt", "step_1000000.pt", "step_2000000.pt"]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2 and load_checkpoint(tmp_path)["step"] == 2_000_000


def test_what_was_just_written_is_never_pruned(tmp_path):
    """After going on from an older step, newer files may be around; keep = 1 still keeps the one last.pt is."""
    for step in (3, 4):
        save_checkpoint(state(step), tmp_path, best=False, keep=5)
    save_checkpoint(state(2), tmp_path, best=False, keep=1)
    assert {"last.pt", "step_000002.pt", "step_000004.pt"} == set(files(tmp_path))
    assert load_checkpoint(tmp_path)["step"] == load_checkpoint(tmp_path / "step_000002.pt")["step"] == 2


def test_the_same_step_can_be_written_again(tmp_path):
    """A resumed run meets the step it was killed at."""
    save_checkpoint(state(1), tmp_path, best=True, keep=3)
    save_checkpoint(state(1) | {"best_figure": 0.75}, tmp_path, best=False, keep=3)
    assert load_checkpoint(tmp_path)["best_figure"] == 0.75
    assert load_checkpoint(tmp_path / "best.pt")["best_figure"] == 0.25


# --- Killed while writing ---------------------------------------------------------------------------------------------

# Each point of `save_checkpoint` where a SIGKILL can fall, the step last.pt and best.pt hold afterwards, and the files.
KILLS = {
    "half of the file is written": (1, 1, {"step_000001.pt"}),
    "written, not renamed": (1, 1, {"step_000001.pt"}),
    "renamed, not linked": (1, 1, {"step_000001.pt", "step_000002.pt"}),
    "linked, best.pt not renamed": (1, 1, {"step_000001.pt", "step_000002.pt"}),
    "best.pt renamed, last.pt not": (1, 2, {"step_000001.pt", "step_000002.pt"}),
    "last.pt renamed, folder not synced": (2, 2, {"step_000001.pt", "step_000002.pt"}),
    "old step file about to go": (2, 2, {"step_000001.pt", "step_000002.pt"}),
}
SCRIPT = """
import io, os, resource, signal, sys
from pathlib import Path
import torch
import checkpoint
from test_checkpoint import KILLS, state

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(what, file, save=torch.save):
    buffer = io.BytesIO()
    save(what, buffer)
    file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    file.flush()
    die()

def on_call(number, function):
    calls = []
    def replacement(*arguments):
        calls.append(arguments)
        return die() if len(calls) == number else function(*arguments)
    return replacement

def fork(function):
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.waitpid(child, 0)[1]

def save(directory, point):
    remove = Path.unlink
    owner, name, replacement = [
        (torch, "save", half),
        (os, "replace", on_call(1, os.replace)),
        (os, "link", die),
        (os, "replace", on_call(2, os.replace)),
        (os, "replace", on_call(3, os.replace)),
        (checkpoint, "fsync_directory", die),
        (Path, "unlink", lambda path, **_: die() if path.name.startswith("step") else remove(path, missing_ok=True)),
    ][list(KILLS).index(point)]
    setattr(owner, name, replacement)
    checkpoint.save_checkpoint(state(2), directory, best=True, keep=1)

def full(directory):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:
        checkpoint.save_checkpoint(state(2), directory, best=True, keep=1)
    except Exception as error:
        (directory.parent / "full.txt").write_text(f"{type(error).__name__} {error}")

root = Path(sys.argv[1])
for point in [*KILLS, "full"]:
    checkpoint.save_checkpoint(state(1), root / point, best=True, keep=1)
for point in KILLS:
    print(fork(lambda: save(root / point, point)))
print(fork(lambda: full(root / "full")))
"""


@pytest.fixture(scope="module")
def crashes(tmp_path_factory) -> Path:
    """Folders after a step 1 and a crashed step 2, one per point of `KILLS`; and `full`, after a disk full at step 2.

    One process that forks, since importing torch is what takes its time.
    """
    root = tmp_path_factory.mktemp("crashes")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, root], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(KILLS) + ["0"], done.stderr
    return root


@pytest.mark.parametrize("point", KILLS)
def test_a_kill_while_writing_loses_nothing(crashes, point):
    """What has a final name is whole; last.pt is the state before or the one after; the next save works and tidies."""
    directory = crashes / point
    last, best, steps = KILLS[point]
    assert same(load_checkpoint(directory), state(last)) and same(load_checkpoint(directory / "best.pt"), state(best))
    assert {path.name for path in directory.glob("step_*")} == steps
    for path in directory.glob("*.pt"):
        if not path.name.startswith("."):
            load_checkpoint(path)
    save_checkpoint(state(3), directory, best=False, keep=1)
    assert sorted(files(directory)) == ["best.pt", "last.pt", "step_000003.pt"]
    assert same(load_checkpoint(directory), state(3))


# --- Disks that are full, folders that are none -----------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint(crashes, tmp_path):
    """The kernel refuses to write on: one line; earlier files byte for byte; nothing half-written stays."""
    path = crashes / "full" / "step_000002.pt"
    text = (crashes / "full.txt").read_text()
    reason = "the write came out short: is the disk full?"
    assert text == f"InputError {path}: cannot be written ({reason}); earlier checkpoints are untouched"
    save_checkpoint(state(1), tmp_path, best=True, keep=1)
    assert files(crashes / "full") == files(tmp_path)


@pytest.mark.parametrize("where", ["save", "fsync", "copy"])
def test_no_space_left(tmp_path, monkeypatch, where):
    """ENOSPC while writing, while syncing, and while copying to last.pt: one line, nothing half-written stays."""
    save_checkpoint(state(1), tmp_path, best=True, keep=3)
    before = files(tmp_path)

    def no_space(*arguments):
        if where == "save":
            arguments[1].write(b"half")
        elif where == "copy":
            Path(arguments[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "copy":
            patch.setattr(os, "link", no_space)
        owner, name = {"save": (torch, "save"), "fsync": (os, "fsync"), "copy": (shutil, "copyfile")}[where]
        patch.setattr(owner, name, no_space)
        text = message(save_checkpoint, state(2), tmp_path, best=True, keep=3)
    path = tmp_path / "step_000002.pt"
    assert text == f"{path}: cannot be written (No space left on device); earlier checkpoints are untouched"
    after = files(tmp_path)
    if where == "copy":  # the step itself was written before
        assert same(torch.load(path, weights_only=True), state(2)) and after.pop(path.name)
    assert after == before


@pytest.mark.parametrize("inside, reason", [("", "File exists"), ("run", "Not a directory")])
def test_a_file_where_the_folder_should_be(tmp_path, inside, reason):
    """ckpt_dir, or the run, is a file: one line, and the file stays as it was."""
    (tmp_path / "ckpt").write_text("a file")
    path = tmp_path / "ckpt" / inside / "step_000001.pt"
    text = message(save_checkpoint, state(1), tmp_path / "ckpt" / inside, best=False, keep=1)
    assert text == f"{path}: cannot be written ({reason}); earlier checkpoints are untouched"
    assert files(tmp_path) == {"ckpt": b"a file"}


def test_a_folder_where_a_file_should_be(tmp_path):
    """last.pt is a folder, for whatever reason."""
    (tmp_path / "last.pt").mkdir()
    text = message(save_checkpoint, state(1), tmp_path, best=False, keep=1)
    path = tmp_path / "step_000001.pt"
    assert text == f"{path}: cannot be written (Is a directory); earlier checkpoints are untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "step_000001.pt"]


# --- Files that are no checkpoints ------------------------------------------------------------------------------------


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


DAMAGED = "not a checkpoint that can be read (damaged, or more than tensors and plain values)"


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "garbage", "text", "code", "code in options", "bare pickle with code", "flipped"]
)
def test_damaged_files(tmp_path, kind):
    """One line, the same from every reader, and no code was run."""
    path, marker = tmp_path / "step_000001.pt", tmp_path / "the code was run"
    save_checkpoint(state(1), tmp_path, best=False, keep=1)
    data = path.read_bytes()
    if kind == "code":
        torch.save(state(1) | {"extra": Code(marker)}, path)
    elif kind == "code in options":
        torch.save(state(1) | {"args": argparse.Namespace(lr=1.0, extra=Code(marker))}, path)
    elif kind == "bare pickle with code":
        path.write_bytes(pickle.dumps(state(1) | {"extra": Code(marker)}))
    else:
        damage = {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "garbage": bytes(range(256)) * 9,
            "text": b"hi\nho",
        }
        path.write_bytes(damage.get(kind, b"\x80\x02" + data[2:]))
    model = tiny()
    assert message(load_checkpoint, path) == f"{path}: {DAMAGED}"
    assert message(load_weights, model, str(path)) == f"{path}: {DAMAGED}"
    assert not marker.exists()
    with pytest.raises(FileExistsError):  # the marker would have told
        marker.mkdir()
        pickle.loads(pickle.dumps(Code(marker)))


def test_missing_files(tmp_path):
    """No such run, a run without last.pt, for going on and for weights."""
    (tmp_path / "run").mkdir()
    assert message(load_checkpoint, tmp_path / "no") == f"{tmp_path / 'no'}: no such file"
    assert message(load_checkpoint, tmp_path / "run") == f"{tmp_path / 'run' / 'last.pt'}: no such file"
    assert message(load_weights, tiny(), str(tmp_path / "run")) == f"{tmp_path / 'run' / 'last.pt'}: no such file"


@pytest.mark.parametrize(
    "content, lacks",
    [
        ({"w": torch.zeros(2)}, "classes, config, model, optimizer, step"),
        ({"step": 1, "model": {}, "optimizer": {}, "config": {}}, "classes"),
        (torch.zeros(3), "classes, config, model, optimizer, step"),
        ([1, 2], "classes, config, model, optimizer, step"),
    ],
)
def test_other_files_are_no_checkpoints_of_this_repo(tmp_path, content, lacks):
    """A bare state dict can be started from, but not gone on with."""
    path = tmp_path / "a.pt"
    torch.save(content, path)
    assert message(load_checkpoint, path) == f"{path}: not a checkpoint of this repo (it has no {lacks})"


# --- Weights to start from --------------------------------------------------------------------------------------------


def weights_file(tmp_path, weights) -> str:
    torch.save(weights, tmp_path / "w.pt")
    return str(tmp_path / "w.pt")


def changed(model: VisionTransformer) -> dict[str, torch.Tensor]:
    """A state dict of the model's shapes, every number of which is another."""
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


def loads(tmp_path, content, model: VisionTransformer | None = None) -> list[str]:
    """The lines of `load_weights`, without the file's name."""
    path = weights_file(tmp_path, content)
    lines = load_weights(model or tiny(), path).splitlines()
    assert lines[0].startswith(f"{path}: ")
    return [lines[0].removeprefix(f"{path}: "), *lines[1:]]


def refuses(tmp_path, content, **options) -> str:
    """The message of `load_weights`, without file and key; the model must be as it was, bit for bit."""
    model, path = tiny(**options), weights_file(tmp_path, content)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = message(load_weights, model, path)
    assert text.startswith(f"{path}: model.checkpoint_path: ")
    assert same(dict(model.state_dict()), before)
    return text.removeprefix(f"{path}: model.checkpoint_path: ")


@pytest.mark.parametrize("ours", [False, True], ids=["state dict", "checkpoint"])
def test_load_weights(tmp_path, ours):
    """All tensors, bit for bit, from a state dict or from a checkpoint of this repo, which needs no warning."""
    source, model = tiny(), tiny()
    torch.nn.init.normal_(source.head.weight)
    content = state(1) | {"model": source.state_dict()} if ours else source.state_dict()
    assert not same(dict(model.state_dict()), dict(source.state_dict()))
    lines = loads(tmp_path, content, model)
    assert lines[0] == f"{len(source.state_dict())} tensors loaded"
    assert same(dict(model.state_dict()), dict(source.state_dict()))
    if ours:
        assert len(lines) == 1
    else:
        assert len(lines) == 2 and lines[1].startswith("warning: ") and "data.mean and data.std" in lines[1]


@pytest.mark.parametrize("head", ["other", "none", "no bias"])
def test_another_number_of_classes_leaves_the_head_fresh(tmp_path, head):
    """Pretrained on other classes, or without a head, or half of one: everything else is loaded, the line says so."""
    source, model = tiny(3 if head == "no bias" else 5), tiny(3)
    torch.nn.init.normal_(source.head.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dropped = {"other": "-", "none": "head.", "no bias": "head.bias"}[head]
    given = {k: v for k, v in source.state_dict().items() if not k.startswith(dropped)}
    expected = f"{len(before) - 2} tensors loaded, 2 left fresh (head.weight, head.bias)"
    assert loads(tmp_path, given, model)[0] == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("head.") else source.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_cast(tmp_path, dtype):
    """A float16 file into a float32 model, with the position embedding resampled in float32."""
    source, model, larger = tiny().to(dtype), tiny(), tiny(image_size=16)
    loads(tmp_path, source.state_dict(), model)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, source.state_dict()[name].float())
    loads(tmp_path, source.state_dict(), larger)
    assert larger.pos_embed.dtype == torch.float32
    assert torch.equal(larger.pos_embed, resample_positions(source.pos_embed.detach().float(), 4))


# --- What is published ------------------------------------------------------------------------------------------------

SMALL = {"image_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}


def vit_s16() -> dict[str, torch.Size]:
    """Names and shapes of timm's vit_small_patch16_224, written down from its definition, not taken from our model."""
    names = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
    names |= {"patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,)}
    for i in range(12):
        for layer, shape in (
            ("norm1", (384,)),
            ("attn.qkv", (1152, 384)),
            ("attn.proj", (384, 384)),
            ("norm2", (384,)),
            ("mlp.fc1", (1536, 384)),
            ("mlp.fc2", (384, 1536)),
        ):
            names |= {f"blocks.{i}.{layer}.weight": shape, f"blocks.{i}.{layer}.bias": shape[:1]}
    return names | {"norm.weight": (384,), "norm.bias": (384,), "head.weight": (1000, 384), "head.bias": (1000,)}


def test_timms_vit_s16_loads_with_no_key_left_over(tmp_path):
    """All 152 tensors of it; every number arrives; for three classes all but the head."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in vit_s16().items()}
    model = VisionTransformer(**SMALL, num_classes=1000)
    assert loads(tmp_path, weights, model)[0] == "152 tensors loaded"
    assert same(dict(sorted(model.state_dict().items())), dict(sorted(weights.items())))
    expected = "150 tensors loaded, 2 left fresh (head.weight, head.bias)"
    assert loads(tmp_path, weights, VisionTransformer(**SMALL, num_classes=3))[0] == expected


def test_logits_of_a_loaded_vit_s16_are_those_of_transformers(tmp_path):
    """At 224 x 224, with random weights, biases and norms that matter, from the file on: to 1e-4."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    options = {"image_size": 224, "patch_size": 16, "num_labels": 1000, "layer_norm_eps": 1e-6}
    torch.manual_seed(0)
    other = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **options)).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape))
        images = torch.randn(2, 3, 224, 224)
        expected = other(images).logits
        model = VisionTransformer(**SMALL, num_classes=1000)
        assert loads(tmp_path, timm_names(other.state_dict()), model)[0] == "152 tensors loaded"
        assert expected.std() > 0.5
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)


def prefixed(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def dino_head() -> dict[str, torch.Tensor]:
    return {f"mlp.{i}.{kind}": torch.ones(2) for i in (0, 2, 4) for kind in ("weight", "bias")} | {
        "last_layer.weight_g": torch.ones(2)
    }


def mae_decoder() -> dict[str, torch.Tensor]:
    names = ("mask_token", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.bias")
    return {name: torch.ones(2) for name in names}


HEADLESS = "30 tensors loaded, 2 left fresh (head.weight, head.bias)"


@pytest.mark.parametrize(
    "wrap, expected",
    [
        (lambda w, h: {"model": w | h}, "32 tensors loaded"),  # DeiT
        (lambda w, h: {"state_dict": prefixed("module.", w | h), "epoch": 3}, "32 tensors loaded"),  # timm under DDP
        (
            lambda w, h: {"state_dict": prefixed("model.", w | h), "hyper_parameters": {"lr": 1.0}},
            "32 tensors loaded",
        ),  # Lightning
        (lambda w, h: prefixed("_orig_mod.", w | h), "32 tensors loaded"),  # torch.compile
        (lambda w, h: prefixed("module.backbone.encoder.", w | h), "32 tensors loaded"),
        (lambda w, h: w, HEADLESS),  # DINO's and MAE's published backbones
        (
            lambda w, h: {
                "student": prefixed("module.backbone.", w),
                "teacher": prefixed("backbone.", w) | prefixed("head.", dino_head()),
                "args": argparse.Namespace(arch="vit_small", lr=0.1, betas=(0.9, 0.99)),
            },
            f"{HEADLESS}, 7 ignored (head.mlp.0.weight, head.mlp.0.bias, head.mlp.2.weight, …)",
        ),  # DINO's full checkpoint
        (
            lambda w, h: w | prefixed("head.", dino_head()),
            f"{HEADLESS}, 7 ignored (head.mlp.0.weight, head.mlp.0.bias, head.mlp.2.weight, …)",
        ),
        (
            lambda w, h: {"model": w | mae_decoder(), "args": argparse.Namespace(), "epoch": 1},
            f"{HEADLESS}, 4 ignored (mask_token, decoder_pos_embed, decoder_blocks.0.attn.qkv.weight, …)",
        ),  # MAE with its decoder
        (
            lambda w, h: prefixed("backbone.", w) | {"head.weight": torch.ones(3, 16), "fc\n.bias": torch.ones(1)},
            f"{HEADLESS}, 2 ignored (head.weight, fc?.bias)",
        ),  # a head beside the ViT is not the ViT's
    ],
    ids=["deit", "ddp", "lightning", "compiled", "nested", "backbone", "dino", "dino bare", "mae", "head beside"],
)
def test_published_layouts(tmp_path, wrap, expected):
    """Nested and prefixed as they are published; what is no part of a ViT is ignored and listed."""
    model = tiny()
    weights = changed(model)
    head = {name: tensor for name, tensor in weights.items() if name.startswith("head.")}
    body = {name: tensor for name, tensor in weights.items() if name not in head}
    fresh = model.head.weight.clone()
    assert loads(tmp_path, wrap(body, head), model)[0] == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]) == (not name.startswith("head.") or "fresh" not in expected), name
    assert torch.equal(model.head.weight, fresh) == ("fresh" in expected)


def test_old_files_and_other_endings(tmp_path):
    """torch's format before 1.6, and any ending."""
    weights = changed(tiny())
    for name, new_format in (("a.pth", False), ("b.bin", True), ("c.ckpt", False)):
        model = tiny()
        torch.save(weights, tmp_path / name, _use_new_zipfile_serialization=new_format)
        assert "32 tensors loaded" in load_weights(model, str(tmp_path / name))
        assert same(dict(model.state_dict()), weights)


def test_safetensors(tmp_path, monkeypatch):
    """Where the package is; one line where it is not, for a damaged file and for none."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    weights, model, path = changed(tiny()), tiny(), str(tmp_path / "model.safetensors")
    save_file(weights, path)
    assert load_weights(model, path).startswith(f"{path}: 32 tensors loaded\nwarning: ")
    assert same(dict(model.state_dict()), weights)
    data = Path(path).read_bytes()
    for damage in (b"", data[:100], data[:-5], b"\xff" * 64, b"\x02" + bytes(7) + b"{}"):
        Path(path).write_bytes(damage)
        text = message(load_weights, tiny(), path)
        assert text.startswith(f"{path}: ") and (DAMAGED in text or "model.checkpoint_path: " in text)
    assert message(load_weights, tiny(), f"{path[:-12]}_.safetensors").endswith("_.safetensors: no such file")
    for name in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    expected = f"{path}: reading it needs the safetensors package: pip install safetensors"
    assert message(load_weights, tiny(), path) == expected


# --- Position embeddings ----------------------------------------------------------------------------------------------


def smooth_positions(grid: int, dim: int = 6) -> torch.Tensor:
    """[1, 1 + grid * grid, dim]: slow waves over the unit square, seen at the middles of the patches."""
    middles = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    waves = [torch.sin(3 * x + k) * torch.cos(2 * y - k) + 0.2 * k for k in range(dim)]
    return torch.cat([torch.full((1, 1, dim), 9.0), torch.stack(waves, -1).reshape(1, -1, dim)], 1)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_resampling_positions():
    """The same grid: itself. There and back, and against the function seen at the other grid: 5 % at most."""
    for grid in (1, 7, 14):
        positions = smooth_positions(grid)
        assert resample_positions(positions, grid) is positions
    there = resample_positions(smooth_positions(14), 16)
    back = resample_positions(there, 14)
    assert there.shape == (1, 257, 6) and back.shape == (1, 197, 6)
    for found, grid in ((there, 16), (back, 14), (resample_positions(smooth_positions(14), 7), 7)):
        assert torch.equal(found[:, 0], torch.full((1, 6), 9.0))  # the class token's stays
        assert relative_error(found[:, 1:], smooth_positions(grid)[:, 1:]) < 0.05


def test_resampling_positions_is_bicubic_and_antialiased():
    """Keys' cubic reproduces a parabola away from the border; a chequerboard shrinks to its mean, not to some of it."""

    def resample(function, old: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[new, new]: resampled from the old grid, and the function itself."""
        values = []
        for grid in (old, new):
            x = (torch.arange(grid) + 0.5) / grid
            values.append(function(*torch.meshgrid(x, x, indexing="ij")))
        positions = torch.cat([torch.zeros(1), values[0].flatten()]).view(1, -1, 1)
        return resample_positions(positions, new)[0, 1:, 0].view(new, new), values[1]

    found, expected = resample(lambda y, x: 3 * x * x - 2 * y * y + x * y, 14, 16)
    torch.testing.assert_close(found[3:-3, 3:-3], expected[3:-3, 3:-3], atol=1e-5, rtol=0)
    found, _ = resample(lambda y, x: ((x * 15).floor() + (y * 15).floor()) % 2, 15, 5)
    assert (found[1:-1, 1:-1] - 0.5).abs().max() < 0.1


def test_resampling_positions_keeps_rows_and_columns_apart():
    """A ramp from left to right stays one: no transposition of the grid, no mix of positions and features."""
    ramp = torch.arange(8.0).repeat(8, 1)
    patches = torch.stack([ramp, 10 * ramp.T], -1).reshape(1, 64, 2)
    found = resample_positions(torch.cat([torch.zeros(1, 1, 2), patches], 1), 4)[0, 1:].unflatten(0, (4, 4))
    inner = found[1:3, 1:3]
    torch.testing.assert_close(inner[..., 0], torch.tensor([[2.5, 4.5], [2.5, 4.5]]), atol=0.1, rtol=0)
    torch.testing.assert_close(inner[..., 1], torch.tensor([[25.0, 25.0], [45.0, 45.0]]), atol=1, rtol=0)


@pytest.mark.parametrize("sizes", [{"image_size": 16}, {"image_size": 4}])
def test_another_image_size_resamples_positions(tmp_path, sizes):
    """Everything else is loaded as it is, and the line says it."""
    model, weights = tiny(**sizes), tiny().state_dict()
    new = sizes["image_size"] // 4
    assert loads(tmp_path, weights, model)[0] == f"32 tensors loaded, pos_embed resampled from 2x2 to {new}x{new}"
    assert torch.equal(model.pos_embed, resample_positions(weights["pos_embed"], new))
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items() if name != "pos_embed")


# --- What is refused --------------------------------------------------------------------------------------------------


def drop(*names):
    return lambda weights: {k: v for k, v in weights.items() if k not in names}


def add(*names, shape=(2,)):
    return lambda weights: weights | {name: torch.zeros(shape) for name in names}


def put(name, change):
    return lambda weights: weights | {name: change(weights[name])}


NO_DICT = "should name a state dict, name -> tensor, by itself or under model, state_dict or teacher"
HF = ("vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight", "classifier.bias", "x")
TORCHVISION = ("class_token", "conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight", "heads.head.bias")
POSITIONS = "pos_embed has {} entries, not those of a class token and a square grid of patches"


@pytest.mark.parametrize(
    "change, expected",
    [
        (drop("norm.bias"), "has no norm.bias (1 missing, 0 unknown tensors)"),
        (add("norm_pre.bias", "x\ny"), "has norm_pre.bias, which this ViT has not (0 missing, 2 unknown tensors)"),
        (
            lambda weights: add("ln.bias")(drop("norm.bias", "cls_token")(weights)),
            "has no cls_token (2 missing, 1 unknown tensors)",
        ),
        (drop("blocks.1.attn.qkv.bias"), "has no blocks.1.attn.qkv.bias (1 missing, 0 unknown tensors)"),
        (lambda weights: {}, "has no patch_embed.proj.weight: its names are not timm's (there are none)"),
        (add("epoch", shape=()), "has epoch, which this ViT has not (0 missing, 1 unknown tensors)"),
        (lambda weights: weights | {"epoch": 3}, NO_DICT),
        (lambda weights: weights | {3: torch.zeros(1)}, NO_DICT),
        (lambda weights: [weights], NO_DICT),
        (lambda weights: {"model": 3}, NO_DICT),
        (lambda weights: {"student": weights}, NO_DICT),
        (lambda weights: weights | {"norm.bias": torch.zeros(16).to_sparse()}, NO_DICT),
        (lambda weights: weights | {"norm.bias": torch.zeros(16, device="meta")}, NO_DICT),
        (
            lambda weights: add(*HF)({}),
            f"has no patch_embed.proj.weight: its names are not timm's ({', '.join(HF[:3])}, …)",
        ),
        (
            lambda weights: add(*TORCHVISION)({}),
            f"has no patch_embed.proj.weight: its names are not timm's ({', '.join(TORCHVISION[:3])}, …)",
        ),
        (
            lambda weights: prefixed("module.base_encoder.", weights) | prefixed("module.momentum_encoder.", weights),
            "holds 2 ViTs (module.base_encoder., module.momentum_encoder.); save the one to start from by itself",
        ),
        (
            lambda weights: {name.replace("blocks", "layers.0.blocks"): tensor for name, tensor in weights.items()},
            "has no blocks.0.attn.qkv.weight: no block of it fits this ViT",
        ),
        (put("patch_embed.proj.weight", lambda w: w[:, :1]),)
        + ("patch_embed.proj.weight has the shape [16, 1, 4, 4], the configured model's is [16, 3, 4, 4]",),
        (lambda weights: put("patch_embed.proj.weight", lambda w: w[:, :1])(changed(tiny(depth=3))),)
        + ("patch_embed.proj.weight has the shape [16, 1, 4, 4], the configured model's is [16, 3, 4, 4]",),
        (put("patch_embed.proj.weight", lambda w: w[..., :2]),)
        + ("patch_embed.proj.weight has the shape [16, 3, 4, 2], the configured model's is [16, 3, 4, 4]",),
        (put("patch_embed.proj.weight", lambda w: w.flatten(1)),)
        + ("patch_embed.proj.weight has the shape [16, 48], the configured model's is [16, 3, 4, 4]",),
        (put("patch_embed.proj.weight", lambda w: w[:0]),)
        + ("patch_embed.proj.weight has the shape [0, 3, 4, 4], the configured model's is [16, 3, 4, 4]",),
        (put("blocks.0.mlp.fc1.weight", lambda w: w.sum()),)
        + ("blocks.0.mlp.fc1.weight has the shape [], the configured model's is [64, 16]",),
        (put("norm.weight", lambda w: w[:5]), "norm.weight has the shape [5], the configured model's is [16]"),
        (put("pos_embed", lambda w: w[:, 1:]),)
        + ("pos_embed has 4 entries, none for the class token, which has one in this ViT",),
        (
            put("pos_embed", lambda w: w[:, :1]),
            "pos_embed has the shape [1, 1, 16], the configured model's is [1, 5, 16]",
        ),
        (put("pos_embed", lambda w: w.sum()), "pos_embed has the shape [], the configured model's is [1, 5, 16]"),
        (put("pos_embed", lambda w: w.unflatten(1, (1, 5))),)
        + ("pos_embed has the shape [1, 1, 5, 16], the configured model's is [1, 5, 16]",),
        (put("pos_embed", lambda w: w[:, :4, :5]),)
        + ("pos_embed has the shape [1, 4, 5], the configured model's is [1, 5, 16]",),
        (put("pos_embed", lambda w: w.repeat(1, 3, 1)), POSITIONS.format(15)),
        (put("pos_embed", lambda w: w[:, :1].expand(1, 10**6 + 1, 16)),)
        + ("pos_embed has the shape [1, 1000001, 16], but fewer numbers",),
        (put("pos_embed", lambda w: w.long()), "pos_embed is of torch.int64; expected floating-point numbers"),
        (put("norm.bias", lambda w: w.to(torch.complex64)),)
        + ("norm.bias is of torch.complex64; expected floating-point numbers",),
        (put("blocks.1.norm1.bias", lambda w: w / 0), "blocks.1.norm1.bias holds NaN or infinity"),
        (put("head.bias", lambda w: w * torch.nan), "head.bias holds NaN or infinity"),
        (put("norm.bias", lambda w: w.double() + 1e300), "norm.bias holds NaN or infinity"),  # once it is float32
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, expected):
    """The line names the first tensor; the model is as it was, bit for bit."""
    assert refuses(tmp_path, change(changed(tiny()))) == expected


@pytest.mark.parametrize(
    "name, what",
    [
        ("dist_token", "a distillation token"),
        ("head_dist.weight", "a distillation token"),
        ("reg_token", "register tokens"),
        ("register_tokens", "register tokens"),
        ("fc_norm.weight", "a norm after pooling over the patches (MAE's fine-tuned and timm's global-pool models)"),
        ("pre_logits.fc.weight", "a layer between norm and head"),
        ("blocks.0.ls1.gamma", "layer scale"),
        ("blocks.1.gamma_1", "layer scale"),
        ("blocks.0.attn.q_norm.weight", "norms of queries and keys"),
        ("rel_pos_bias.relative_position_bias_table", "relative position biases"),
        ("blocks.0.attn.relative_position_bias_table", "relative position biases"),
        ("blocks.0.attn.rel_pos_h", "relative position biases"),
        ("rope.freqs", "rotary positions"),
        ("blocks.0.attn.q_bias", "biases apart from qkv (BEiT)"),
        ("blocks.0.mlp.w12.weight", "a gated MLP (SwiGLU)"),
        ("blocks.0.mlp.fc1_g.weight", "a gated MLP (SwiGLU)"),
    ],
)
def test_other_kinds_of_vit_are_refused_by_name(tmp_path, name, what):
    """Before anything else: also where norm or biases are missing for it, under a prefix too."""
    weights = drop("norm.weight", "norm.bias", "blocks.0.attn.qkv.bias")(changed(tiny()))
    for prefix in ("", "backbone."):
        content = prefixed(prefix, weights | {name: torch.zeros(1)})
        assert refuses(tmp_path, content) == f"has {name}: {what}, which this ViT has not"


def test_a_packed_gated_mlp_is_refused(tmp_path):
    """timm's SwiGLUPacked has no name of its own: fc1 gives twice what fc2 takes."""
    weights = put("blocks.0.mlp.fc2.weight", lambda w: w[:, :32])(changed(tiny()))
    assert refuses(tmp_path, weights) == "has 64 hidden units of which half are gates: SwiGLU, which this ViT has not"


@pytest.mark.parametrize(
    "theirs, keys",
    [
        ({"patch_size": 2}, "model.patch_size=2"),
        ({"depth": 3}, "model.depth=3"),
        ({"depth": 1}, "model.depth=1"),
        ({"mlp_ratio": 3.0}, "model.mlp_ratio=3.0"),
        ({"patch_size": 8, "depth": 12}, "model.patch_size=8 model.depth=12"),
        (
            {"embed_dim": 12},
            "model.embed_dim=12 (and model.num_heads: no tensor tells it; ViT-Ti to L have embed_dim / 64)",
        ),
        (
            {"embed_dim": 48, "mlp_ratio": 49 / 48},
            "model.embed_dim=48 model.mlp_ratio=1.0208333333333333 "
            "(and model.num_heads: no tensor tells it; ViT-Ti to L have embed_dim / 64)",
        ),
    ],
)
def test_another_size_is_refused_with_the_keys_to_set(tmp_path, theirs, keys):
    """Set as the line says, it loads."""
    source = tiny(**theirs)
    assert refuses(tmp_path, source.state_dict()) == f"is a ViT of another size: set {keys}"
    told = {key.split(".")[1]: yaml.safe_load(value) for key, value in re.findall(r"(\S+)=(\S+)", keys)}
    model = tiny(**told)
    assert " tensors loaded" in loads(tmp_path, source.state_dict(), model)[0]
    assert same(dict(model.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize("width, hidden", [(49, 1), (192, 1), (161, 193), (384, 1536), (100, 29)])
def test_the_mlp_ratio_that_is_told_gives_the_hidden_width(tmp_path, width, hidden):
    """The model rounds width * mlp_ratio down, and hidden / width may come out a hair too small."""
    source = tiny(embed_dim=width, num_heads=1, mlp_ratio=(hidden + 0.5) / width)
    assert source.blocks[0].mlp.fc1.out_features == hidden
    text = refuses(tmp_path, source.state_dict(), embed_dim=width, num_heads=1, mlp_ratio=2.0)
    ratio = float(re.search(r"model.mlp_ratio=(\S+)", text)[1])
    loads(tmp_path, source.state_dict(), tiny(embed_dim=width, num_heads=1, mlp_ratio=ratio))


def hostile_tensors() -> list[torch.Tensor]:
    """What a file can hold and weights are not: shapes of nothing, of integers, without the memory behind them."""
    zero = torch.zeros(())
    shapes = [(), (0,), (16,), (1, 5, 16), (1, 0, 16), (0, 3, 4, 4), (16, 3, 4, 4), (10**6, 10**6), (1, 10**12 + 1, 16)]
    dtypes = (torch.float32, torch.int8)
    tensors = [zero.to(dtype).expand(shape) for shape in shapes for dtype in dtypes]
    tensors += [
        torch.nested.nested_tensor([zero]),
        torch.zeros(16).to_sparse(),
        torch.zeros(10**9, 10**6, device="meta"),
    ]
    return [
        *tensors,
        torch.quantize_per_tensor(torch.zeros(16), 0.1, 0, torch.qint8),
        torch.zeros(16).to(torch.float8_e4m3fn),
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "names", [list(tiny().state_dict()), ["blocks.9999999999999999.norm1.bias", "blocks.x", "\x1b[2J"]]
)
def test_hostile_tensors_give_one_line(tmp_path, names):
    """In the place of each tensor, or beside them: one line (a head may be left fresh); an untouched model; nothing
    allocates what a shape alone promises."""
    model = tiny()
    weights, before = changed(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in names:
        for tensor in hostile_tensors():
            path = weights_file(tmp_path, weights | {name: tensor})
            try:
                line = load_weights(model, path).splitlines()[0]
                assert name.startswith("head.") and line.endswith("2 left fresh (head.weight, head.bias)")
                model.load_state_dict(before)
            except InputError as error:
                assert str(error).isprintable() and same(dict(model.state_dict()), before)


def test_dropout_goes_into_a_model_trained_without(tmp_path):
    """Masks are arguments: the file knows none. The loaded network is the source, and its passes differ."""
    source, model = tiny(dropout=0.0), tiny(dropout=0.5)
    for p in source.parameters():
        torch.nn.init.normal_(p, std=0.3)
    loads(tmp_path, source.state_dict(), model)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        logits = model(images, model.sample_masks(2, 4))
        assert torch.equal(model(images), source(images))
        torch.testing.assert_close(source(images, source.sample_masks(2, 4)), source(images)[:, None].expand(2, 4, 3))
    assert (logits.std(1) > 0).all()


def test_the_folder_is_synced_after_the_renames(tmp_path, monkeypatch):
    """A power cut: file first, then renames, then the folder, then the old ones go."""
    calls = []
    save_checkpoint(state(1), tmp_path, best=False, keep=1)

    def spy(owner, name):
        function = getattr(owner, name)

        def called(*arguments, **options):
            calls.append(f"{name} {arguments[-1].name}" if isinstance(arguments[-1], Path) else name)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, called)

    for owner, name in ((os, "fsync"), (os, "replace"), (checkpoint, "fsync_directory"), (Path, "unlink")):
        spy(owner, name)
    save_checkpoint(state(2), tmp_path, best=False, keep=1)
    calls = [call for call in calls if "tmp" not in call]
    expected = ["fsync", "replace step_000002.pt", "replace last.pt", f"fsync_directory {tmp_path.name}", "fsync"]
    assert calls == [*expected, "unlink step_000001.pt"]
