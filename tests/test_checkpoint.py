"""checkpoint.py: round trips, crashes at every moment of a write, full disks, damaged files, weights to start from."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import load_checkpoint, load_weights, save_checkpoint
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


@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage", "text", "code", "bare pickle with code", "flipped"])
def test_damaged_files(tmp_path, kind):
    """One line, the same from every reader, and no code was run."""
    path, marker = tmp_path / "step_000001.pt", tmp_path / "the code was run"
    save_checkpoint(state(1), tmp_path, best=False, keep=1)
    data = path.read_bytes()
    if kind == "code":
        torch.save(state(1) | {"extra": Code(marker)}, path)
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


@pytest.mark.parametrize("bare", [True, False], ids=["state dict", "checkpoint"])
def test_load_weights(tmp_path, bare):
    """All tensors, bit for bit, from a bare state dict or from a checkpoint of this repo."""
    source, model = tiny(), tiny()
    torch.nn.init.normal_(source.head.weight)
    content = source.state_dict() if bare else state(1) | {"model": source.state_dict()}
    path = weights_file(tmp_path, content)
    assert not same(dict(model.state_dict()), dict(source.state_dict()))
    assert load_weights(model, path) == f"{path}: {len(source.state_dict())} tensors loaded"
    assert same(dict(model.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize("head", ["other", "none"])
def test_another_number_of_classes_leaves_the_head_fresh(tmp_path, head):
    """Pretrained on other classes, or without a head: everything else is loaded, and the line says so."""
    source, model = tiny(5), tiny(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {k: v for k, v in source.state_dict().items() if head == "other" or not k.startswith("head.")}
    path = weights_file(tmp_path, given)
    count = len(before) - 2
    assert load_weights(model, path) == f"{path}: {count} tensors loaded, head.weight, head.bias left fresh"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("head.") else source.state_dict()[name])


def test_weights_of_another_precision_are_cast(tmp_path):
    """A float16 file into a float32 model."""
    source, model = tiny().half(), tiny(3)
    load_weights(model, weights_file(tmp_path, source.state_dict()))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, source.state_dict()[name].float())


def drop(name):
    return lambda weights: {k: v for k, v in weights.items() if k not in name}


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            drop(["norm.bias"]),
            "model.checkpoint_path has no norm.bias (1 missing, 0 unknown tensors)",
        ),
        (
            lambda weights: weights | {"fc_norm.weight": torch.zeros(2), "dist_token": torch.zeros(2)},
            "model.checkpoint_path has dist_token, which this ViT has not (0 missing, 2 unknown tensors)",
        ),
        (
            lambda weights: drop(["norm.bias", "cls_token"])(weights) | {"ln.bias": torch.zeros(2)},
            "model.checkpoint_path has no cls_token (2 missing, 1 unknown tensors)",
        ),
        (
            lambda weights: weights | {"pos_embed": torch.zeros(1, 17, 16)},
            "model.checkpoint_path: pos_embed has the shape [1, 17, 16], the configured model's is [1, 5, 16]; "
            "set the model section to fit",
        ),
        (lambda weights: {}, "model.checkpoint_path has no blocks.0.attn.proj.bias (30 missing, 0 unknown tensors)"),
        (lambda weights: weights | {"epoch": 3}, "model.checkpoint_path should name a state dict, name -> tensor"),
        (lambda weights: [weights], "model.checkpoint_path should name a state dict, name -> tensor"),
        (lambda weights: {"model": 3}, "model.checkpoint_path should name a state dict, name -> tensor"),
    ],
    ids=["missing", "unknown", "both", "shape", "nothing", "more than tensors", "list", "no model"],
)
def test_weights_that_do_not_fit(tmp_path, change, expected):
    """The line names the first tensor; the model is as it was, bit for bit."""
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    path = weights_file(tmp_path, change(other))
    assert message(load_weights, model, path) == f"{path}: {expected}"
    assert same(dict(model.state_dict()), before)


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
