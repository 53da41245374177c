"""Checkpoints: written so that a crash at any moment loses nothing, read without running code."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_types import InputError

State = dict[str, Any]


def fsync_directory(directory: Path) -> None:
    """Make renames in `directory` last through a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(source: Path, target: Path) -> None:
    """`target` becomes another name of `source` (a copy where the file system has no hard links), at one stroke."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)


def save_checkpoint(state: State, directory: Path, *, best: bool, keep: int) -> Path:
    """Write `state` as step_000200.pt (from its `step`) and let last.pt, and best.pt if `best`, be that file.

    Written under a temporary name, fsynced and renamed, so that a file under a final name is whole. Of the step files
    the newest `keep` stay. Raises InputError where the disk is full or the folder cannot be written; what was there
    before is untouched then.
    """
    path = directory / f"step_{state['step']:06d}.pt"
    temporary = directory / f".{path.name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if best:  # before last.pt: a crash between the two repeats this step, and then this
            link(path, directory / "best.pt")
        link(path, directory / "last.pt")
        fsync_directory(directory)
        for old in sorted(directory.glob("step_*.pt"), key=lambda file: (len(file.name), file.name))[:-keep]:
            if old != path:
                old.unlink()
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when a write comes out short
        reason = getattr(error, "strerror", None) or "the write came out short: is the disk full?"
        raise InputError(f"{path}: cannot be written ({reason}); earlier checkpoints are untouched") from error
    finally:  # what failed just now, or was killed once
        with suppress(OSError):
            for temporary in directory.glob(".*.pt.tmp"):
                temporary.unlink()
    return path


def read_file(path: Path) -> Any:
    """What `torch.save` wrote to `path`, on the CPU. Runs no code from it (`weights_only=True`). Raises InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # unpickling a damaged file may raise nearly anything
        reason = getattr(error, "strerror", None) or "damaged, or more than tensors and plain values"
        raise InputError(f"{path}: not a checkpoint that can be read ({reason})") from None


def load_checkpoint(path: Path) -> State:
    """The state that `save_checkpoint` wrote to the file `path`, or last to the folder `path`. Raises InputError."""
    path = path / "last.pt" if path.is_dir() else path
    state = read_file(path)
    missing = {"step", "model", "optimizer", "config", "classes"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise InputError(f"{path}: not a checkpoint of this repo (it has no {', '.join(sorted(missing))})")
    return state


def load_weights(model: nn.Module, path: str) -> str:
    """Load the weights of a checkpoint of this repo, or of a bare state dict with timm's names, into `model`.

    The head stays fresh if its shape does not fit. Returns a line that says what was done. Raises InputError for any
    other missing, unknown or ill-shaped tensor.
    """
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    state = read_file(path)
    weights = state.get("model", state) if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise InputError(f"{path}: model.checkpoint_path should name a state dict, name -> tensor")
    own = model.state_dict()
    fresh = [
        name
        for name in own
        if name.startswith("head.") and own[name].shape != getattr(weights.get(name), "shape", None)
    ]
    loaded = {name: tensor for name, tensor in weights.items() if name not in fresh}
    unknown, missing = sorted(loaded.keys() - own.keys()), sorted(own.keys() - loaded.keys() - set(fresh))
    if unknown or missing:
        problem = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which this ViT has not"
        raise InputError(
            f"{path}: model.checkpoint_path {problem} ({len(missing)} missing, {len(unknown)} unknown tensors)"
        )
    for name, tensor in loaded.items():
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)}, the configured model's is {list(own[name].shape)}"
            raise InputError(
                f"{path}: model.checkpoint_path: {name} has the shape {shapes}; set the model section to fit"
            )
    model.load_state_dict(loaded, strict=False)
    return f"{path}: {len(loaded)} tensors loaded" + (f", {', '.join(fresh)} left fresh" if fresh else "")
