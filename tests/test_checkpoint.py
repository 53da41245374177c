"""checkpoint.py: round trips, crashes at every moment of a write, full disks, damaged files, going on."""

import argparse
import errno
import io
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import files, message, same

import checkpoint
from checkpoint import Progress, load_checkpoint, restore, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*multi-threaded")


def state(step: int) -> dict:
    """A checkpoint of the step; its tensors tell which one it is."""
    momentum = {"state": {0: {"exp_avg": torch.full((3,), 0.5 * step)}}, "param_groups": [{"betas": (0.9, 0.999)}]}
    config, weights = {"model": {"depth": 2}, "training": {"run_name": None}}, {"w": torch.full((40_000,), float(step))}
    carried = {"best_metric": 0.25, "rows": [{"reward/mean": torch.tensor(0.1 * step)}]}
    return {"step": step, "model": weights, "optimizer": momentum, "config": config, "classes": ["a", "b"]} | carried


# --- Saving -----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    """Tensors, tuples, null, nested: as they were; by the folder or by the file; the folder is made. A resumed run may
    write the step again that it was killed at."""
    run = tmp_path / "ckpt" / "run"
    assert save_checkpoint(state(200), run, best=True, keep=3) == run / "step_000200.pt"
    assert sorted(files(run)) == ["best.pt", "last.pt", "step_000200.pt"]
    for path in (run, run / "last.pt", run / "best.pt", run / "step_000200.pt"):
        assert same(load_checkpoint(path), state(200))
    assert not same(load_checkpoint(run), state(201))
    save_checkpoint(state(200) | {"best_metric": 0.75}, run, best=False, keep=3)
    assert load_checkpoint(run)["best_metric"] == 0.75 and load_checkpoint(run / "best.pt")["best_metric"] == 0.25


@pytest.mark.parametrize("links", [True, False])
def test_last_and_best_are_the_step_file(tmp_path, monkeypatch, links):
    """Hard links, so that no byte is written twice; where the file system has none (exFAT, some mounts), copies.
    best.pt stays where it was unless told."""

    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    save_checkpoint(state(1), tmp_path, best=True, keep=3)
    save_checkpoint(state(2), tmp_path, best=False, keep=3)
    found, inodes = files(tmp_path), {path.stat().st_ino for path in tmp_path.iterdir()}
    assert sorted(found) == ["best.pt", "last.pt", "step_000001.pt", "step_000002.pt"]
    assert found["last.pt"] == found["step_000002.pt"] != found["best.pt"] == found["step_000001.pt"]
    assert len(inodes) == (2 if links else 4)


def test_the_oldest_beyond_keep_go(tmp_path):
    """The newest two stay, by number and not by name; best.pt outlives its step file. What was just written stays, also
    where newer files are around after going on from an older step."""
    for step in (1, 2, 999_999, 1_000_000, 2_000_000):
        save_checkpoint(state(step), tmp_path, best=step == 2, keep=2)
    assert sorted(files(tmp_path)) == ["best.pt", "last.pt", "step_1000000.pt", "step_2000000.pt"]
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2 and load_checkpoint(tmp_path)["step"] == 2_000_000
    save_checkpoint(state(3), tmp_path, best=False, keep=1)
    assert sorted(files(tmp_path)) == ["best.pt", "last.pt", "step_000003.pt", "step_2000000.pt"]
    assert load_checkpoint(tmp_path)["step"] == 3


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
    expected = ["fsync", "replace last.pt", "replace step_000002.pt", f"fsync_directory {tmp_path.name}", "fsync"]
    assert calls == [*expected, "unlink step_000001.pt"]


# --- Killed while writing ---------------------------------------------------------------------------------------------


def exit_code(function) -> int:
    """Of a process that forks off, calls `function` and ends."""
    process = multiprocessing.get_context("fork").Process(target=function, daemon=True)
    process.start()
    process.join(60)
    return process.exitcode


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half(what, file, save=torch.save):
    buffer = io.BytesIO()
    save(what, buffer)
    file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    file.flush()
    die()


def at_replace(name, replace=os.replace):
    return lambda source, target: die() if Path(target).name == name else replace(source, target)


def at_unlink(path, unlink=Path.unlink, **_):
    return die() if path.name.startswith("step") else unlink(path, missing_ok=True)


# Each point of `save_checkpoint` where a SIGKILL can fall: where it does, the steps that last.pt and best.pt hold
# afterwards, and of which there are files.
KILLS = {
    "half of the file is written": (torch, "save", half, 1, 1, {1}),
    "written, not linked": (os, "link", die, 1, 1, {1}),
    "linked, best.pt not renamed": (os, "replace", at_replace("best.pt"), 1, 1, {1}),
    "best.pt renamed, last.pt not": (os, "replace", at_replace("last.pt"), 1, 2, {1}),
    "last.pt renamed, step file not": (os, "replace", at_replace("step_000002.pt"), 2, 2, {1}),
    "step file renamed, folder not synced": (checkpoint, "fsync_directory", die, 2, 2, {1, 2}),
    "old step file about to go": (Path, "unlink", at_unlink, 2, 2, {1, 2}),
}


@pytest.mark.parametrize("point", KILLS)
def test_a_kill_while_writing_loses_nothing(tmp_path, point):
    """What has a final name is whole; last.pt is the state before or the one after; the next save works and tidies."""
    owner, name, replacement, last, best, steps = KILLS[point]
    save_checkpoint(state(1), tmp_path, best=True, keep=1)

    def killed():
        setattr(owner, name, replacement)
        save_checkpoint(state(2), tmp_path, best=True, keep=1)

    assert exit_code(killed) == -signal.SIGKILL
    assert same(load_checkpoint(tmp_path), state(last)) and same(load_checkpoint(tmp_path / "best.pt"), state(best))
    assert {load_checkpoint(path)["step"] for path in tmp_path.glob("step_*")} == steps
    save_checkpoint(state(3), tmp_path, best=False, keep=1)
    assert sorted(files(tmp_path)) == ["best.pt", "last.pt", "step_000003.pt"]
    assert same(load_checkpoint(tmp_path), state(3))


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_write_after_a_kill_goes_to_a_file_of_its_own(tmp_path, monkeypatch, name):
    """Killed when `name` was another name of the temporary file already, whose step is written again, and that fails:
    `name` stays whole."""
    save_checkpoint(state(2), tmp_path, best=True, keep=1)
    (tmp_path / "step_000002.pt").unlink()
    os.link(tmp_path / name, tmp_path / ".step_000002.pt.tmp")

    def fail(_, file):
        file.write(b"half")
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "save", fail)
    assert "Input/output error" in message(save_checkpoint, state(2), tmp_path, best=True, keep=1)
    assert sorted(files(tmp_path)) == ["best.pt", "last.pt"] and same(load_checkpoint(tmp_path / name), state(2))


# --- Disks that are full, folders that are none -----------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The kernel refuses to write on: one line; earlier files byte for byte; nothing half-written stays."""
    run, told = tmp_path / "run", tmp_path / "told"
    save_checkpoint(state(1), run, best=True, keep=1)
    before = files(run)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        told.write_text(message(save_checkpoint, state(2), run, best=True, keep=1))

    assert exit_code(full) == 0
    reason = "the write came out short: is the disk full?"
    expected = f"{run / 'step_000002.pt'}: cannot be written ({reason}); earlier checkpoints are untouched"
    assert told.read_text() == expected and files(run) == before


@pytest.mark.parametrize("where", ["fsync", "copy"])
def test_no_space_left(tmp_path, monkeypatch, where):
    """ENOSPC while syncing, and while copying to last.pt: one line, nothing half-written stays."""
    save_checkpoint(state(1), tmp_path, best=True, keep=3)
    before = files(tmp_path)

    def no_space(*arguments):
        if where == "copy":
            Path(arguments[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        for owner, name in [(os, "fsync")] if where == "fsync" else [(os, "link"), (shutil, "copyfile")]:
            patch.setattr(owner, name, no_space)
        text = message(save_checkpoint, state(2), tmp_path, best=True, keep=3)
    path = tmp_path / "step_000002.pt"
    assert text == f"{path}: cannot be written (No space left on device); earlier checkpoints are untouched"
    after = files(tmp_path)
    if where == "copy":  # the step itself was written before
        assert same(torch.load(path, weights_only=True), state(2)) and after.pop(path.name)
    assert after == before


@pytest.mark.parametrize(
    "make, inside, reason, left",
    [
        (lambda path: path.write_text("a file"), "", "File exists", []),  # ckpt_dir is a file
        (lambda path: path.write_text("a file"), "run", "Not a directory", []),
        (lambda path: (path / "last.pt").mkdir(parents=True), "", "Is a directory", ["last.pt", "step_000001.pt"]),
    ],
)
def test_what_stands_in_the_way(tmp_path, make, inside, reason, left):
    """A file where the folder should be, a folder where a file should be: one line, and it stays as it was."""
    make(tmp_path / "ckpt")
    path = tmp_path / "ckpt" / inside / "step_000001.pt"
    text = message(save_checkpoint, state(1), tmp_path / "ckpt" / inside, best=False, keep=1)
    assert text == f"{path}: cannot be written ({reason}); earlier checkpoints are untouched"
    assert sorted(path.name for path in tmp_path.glob("ckpt/*")) == left
    assert left or (tmp_path / "ckpt").read_text() == "a file"


# --- Files that are no checkpoints ------------------------------------------------------------------------------------


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


KINDS = ["truncated", "cut", "empty", "text", "flipped", "code", "code in options", "pickled code"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(tmp_path, kind):
    """One line, and no code was run."""
    path, code = tmp_path / "step_000001.pt", Code(tmp_path / "the code was run")
    data = save_checkpoint(state(1), tmp_path, best=False, keep=1).read_bytes()
    damage = {"truncated": data[: len(data) // 2], "empty": b"", "text": b"hi\nho", "flipped": b"\x80\x02" + data[2:]}
    large = save_checkpoint(state(2) | {"more": torch.zeros(10000)}, tmp_path, best=False, keep=2).read_bytes()
    damage["cut"] = large[: len(large) // 2]  # in one of this size it is a seek that fails
    damage["pickled code"] = pickle.dumps(state(1) | {"extra": code})
    if kind in damage:
        path.write_bytes(damage[kind])
    else:
        torch.save(state(1) | {"args": argparse.Namespace(lr=1.0, extra=code) if "options" in kind else code}, path)
    damaged = "not a checkpoint that can be read (damaged, or more than tensors and plain values)"
    assert message(load_checkpoint, path) == f"{path}: {damaged}"
    assert not Path(code.path).exists()
    pickle.loads(pickle.dumps(code))
    assert Path(code.path).exists()  # the folder would have told


@pytest.mark.parametrize(
    "content, lacks",
    [
        ({"step": 1, "model": {}, "optimizer": {}, "config": {}}, "classes"),
        ({"w": torch.zeros(2)}, "classes, config, model, optimizer, step"),
        ([1, 2], "classes, config, model, optimizer, step"),
    ],
)
def test_other_files_are_no_checkpoints_of_this_repo(tmp_path, content, lacks):
    """A bare state dict can be started from, but not gone on with; nor can a run without last.pt."""
    assert message(load_checkpoint, tmp_path / "no") == f"{tmp_path / 'no'}: no such file"
    assert message(load_checkpoint, tmp_path) == f"{tmp_path / 'last.pt'}: no such file"
    torch.save(content, tmp_path / "last.pt")
    assert message(load_checkpoint, tmp_path).endswith(f"/last.pt: not a checkpoint of this repo (it has no {lacks})")


def test_the_newest_whole_checkpoint_takes_the_place_of_a_damaged_or_missing_one(tmp_path):
    """It is named; taken where `say` is given (--resume auto), which hears of it. If none is whole,
    the first complaint stays."""
    for step in (8, 9, 10):
        save_checkpoint(state(step), tmp_path, best=False, keep=3)
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:100]), Path.unlink):
        damage(tmp_path / "last.pt")  # step_000010.pt by another name, as long as that is there
        newest = tmp_path / "step_000009.pt" if damage is not Path.unlink else tmp_path / "step_000008.pt"
        text = message(load_checkpoint, tmp_path)
        assert text.startswith(f"{tmp_path}/last.pt: ") and text.endswith(
            f"newest whole one is {newest}, name it instead"
        )
        said = []
        assert same(load_checkpoint(tmp_path, said.append), state(int(newest.stem[5:])))
        assert len(said) == 1 and said[0].endswith(f"; going on from {newest}, the newest whole one")
        newest.write_bytes(b"")
    (tmp_path / "step_000008.pt").unlink()
    assert message(load_checkpoint, tmp_path, print) == f"{tmp_path}/last.pt: no such file"


# --- Going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best_metric", "best_figure", "best_accuracy"])
def test_restore(name):
    """The optimizer's moments and what was carried on, under older names too; but the hyperparameters are today's."""

    parameter = torch.nn.Parameter(torch.ones(2))
    groups = ([{"params": [parameter], "lr_scale": 1.0, "weight_decay": decay}] for decay in (0.1, 0.2))
    before, after = map(torch.optim.AdamW, groups)
    parameter.sum().backward()
    before.step()
    rows = [{"loss": torch.tensor(2.0)}]
    saved = {"step": 7, name: 0.5, "live_share": 0.25, "dead_steps": 3, "rows": rows, "optimizer": before.state_dict()}
    progress = restore(saved, after, {})
    expected = {"step": 7, "best_metric": 0.5, "best_name": None, "stale": 0, "live_share": 0.25, "dead_steps": 3}
    assert same(vars(progress), expected | {"rows": rows, "confusions": {}})
    assert same(after.state_dict()["state"], before.state_dict()["state"])
    assert after.param_groups[0]["weight_decay"] == 0.2
    assert restore(saved | {name: -math.inf}, after, {}).best_metric is None  # as runs without an evaluation began


def test_the_first_metric_is_the_best_and_then_the_better_one():
    """Higher or lower, NaN only as the first; another name, after a resume with another training.best, begins anew."""
    for lower, sign in ((False, 1), (True, -1)):
        progress = Progress(best_metric=sign * 2.0)  # of an older checkpoint, which has no name for it
        found = [progress.is_best("a", sign * x, lower) for x in (1.0, 3.0, 3.0, math.nan, 4.0)]
        assert found == [False, True, False, False, True] and (progress.best_metric, progress.stale) == (sign * 4.0, 0)
        progress = Progress()
        assert [progress.is_best("a", x, lower) for x in (math.nan, math.nan, sign * -9.0)] == [True, False, True]
        assert progress.is_best("b", sign * -50.0, lower) and not progress.is_best("b", sign * -51.0, lower)
        assert progress.best_metric == sign * -50.0 and progress.stale == 1
