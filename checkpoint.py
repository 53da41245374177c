"""Our own checkpoints: written so that a crash at any moment loses nothing, read without running code."""

import argparse
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_types import InputError
from processes import rank_and_world


def fsync_directory(directory: Path) -> None:
    """Make renames in `directory` last through a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(source: Path, target: Path) -> None:
    """`target` becomes another name of `source` (a copy where the file system has no hard links), atomically."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)


def save_checkpoint(state: dict[str, Any], directory: Path, *, best: bool, keep: int) -> Path:
    """Write `state` as step_000200.pt (from its `step`) and let last.pt, and best.pt if `best`, be that file: under a
    temporary name, fsynced and renamed, so that a file under a final name is whole. Of the step files the newest `keep`
    stay. Of several processes rank 0 writes, the others only get the path. Raises InputError where the disk is full or
    the folder cannot be written; what was there before is untouched then."""
    path = directory / f"step_{state['step']:06d}.pt"
    if rank_and_world()[0]:
        return path
    temporary = directory / f".{path.name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # left by a kill, it may be best.pt or last.pt by another name
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            if best:  # before last.pt: a crash between the two repeats this step, and then this
                link(temporary, directory / "best.pt")
            link(temporary, directory / "last.pt")
        finally:  # after last.pt: a crash between the two leaves no step file newer than what --resume reads
            os.replace(temporary, path)
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


def plain_classes() -> list:
    """What a file may hold beside tensors and Python's own values, because it runs no code: command lines, paths (as
    plain text paths of either system), numpy's scalars and arrays; under the names of older numpy and newer Python."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    classes = [argparse.Namespace, np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgFD"}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        classes += [(scalar, f"{module}.scalar"), (rebuild, f"{module}._reconstruct")]
    for module in ("pathlib", "pathlib._local"):
        for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            pure = pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
            classes.append((pure, f"{module}.{name}"))
    return classes


def read_file(path: Path) -> Any:
    """What `torch.save`, or for *.safetensors that package, wrote to `path`, on the CPU. Runs no code from it
    (`weights_only=True`). Raises InputError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # optional

            return load_file(path)
        with torch.serialization.safe_globals(plain_classes()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        how = "uv run --extra safetensors …, or pip install safetensors"
        raise InputError(f"{path}: reading it needs the safetensors package: {how}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # unpickling a damaged file may raise nearly anything
        unopened = getattr(error, "filename", None)  # in one that was cut off a seek may fail
        reason = error.strerror if unopened else "damaged, or more than tensors and plain values"
        if refused := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            reason = f"it holds a {refused[1]}, and making one could run code; save the weights alone: "
            reason += "torch.save(model.state_dict(), file)"
        raise InputError(f"{path}: not a checkpoint that can be read ({reason})") from None


def load_checkpoint(path: Path, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote to the file `path`, or last to the folder `path`. say: where the folder's
    last.pt is damaged or gone, the newest whole step_*.pt is taken, and a line says so. Raises InputError."""
    if not path.is_dir():
        return load_whole(path)
    try:
        return load_whole(path / "last.pt")
    except InputError as error:
        for step in sorted(path.glob("step_*.pt"), key=lambda file: (len(file.name), file.name), reverse=True):
            try:
                state = load_whole(step)
            except InputError:
                continue
            if not say:
                raise InputError(f"{error}; the newest whole one is {step}, name it instead") from None
            say(f"warning: {error}; going on from {step}, the newest whole one")
            return state
        raise


def load_whole(path: Path) -> dict[str, Any]:
    """The state in a file of `save_checkpoint`. Raises InputError."""
    state = read_file(path)
    missing = {"step", "model", "optimizer", "config", "classes"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise InputError(f"{path}: not a checkpoint of this repo (it has no {', '.join(sorted(missing))})")
    return state


def best_metric(state: dict[str, Any]) -> float | None:
    """That of best.pt, under older names too; None: the run was never evaluated."""
    metric = state.get("best_metric", state.get("best_figure", state.get("best_accuracy")))
    return None if metric == -math.inf else metric  # as older runs began


@dataclass
class Progress:
    """What is carried from step to step beside the weights; all of it is in the checkpoint. step: how many are done.
    best_metric: of best.pt, None before the first evaluation. best_name: its name. stale: how many evaluations there
    were since. live_share: of live groups, at the last log. dead_steps: the last ones without a live group. rows:
    `update_policy`'s metrics since the last log. confusions: the state of each `ConfusionScore`."""

    step: int = 0
    best_metric: float | None = None
    best_name: str | None = None
    stale: int = 0
    live_share: float = 1.0
    dead_steps: int = 0
    rows: list[dict[str, Tensor]] = field(default_factory=list)
    confusions: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def is_best(self, name: str, value: float, lower: bool) -> bool:
        """Whether an evaluation's metric is the best of its name so far, as the first one is; takes note of it. lower:
        whether less is better."""
        best = self.best_metric if self.best_name in (name, None) else None  # a resumed run may go by another metric
        better = best is None or (value < best if lower else value > best) or (math.isnan(best) and value == value)
        self.best_name, self.best_metric, self.stale = name, value if better else best, 0 if better else self.stale + 1
        return better


def restore(state: dict[str, Any], optimizer: torch.optim.Optimizer, config: dict) -> Progress:
    """The optimizer as the checkpoint has it, but for hyperparameters that may be overridden; what was carried on.
    Raises InputError."""
    kept = [{k: group[k] for k in ("weight_decay", "betas", "lr_scale")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        training, why = config["training"], "is missing; have the whole checkpoint"
        if isinstance(error, ValueError):
            why = f"does not fit training.freeze_blocks: {training['freeze_blocks']} with training.layer_decay: "
            why += f"{training['layer_decay']}; drop these keys"
        run = f"{training['ckpt_dir']}/{training['run_name']}"
        raise InputError(f"{run}: its optimizer {why}, or start a new run from it with model.checkpoint_path") from None
    for group, own in zip(optimizer.param_groups, kept):
        group |= own
    state = state | {"best_metric": best_metric(state)}
    progress = Progress(**{name: state[name] for name in Progress.__dataclass_fields__ if name in state})
    device = optimizer.param_groups[0]["params"][0].device
    progress.rows = [{name: value.to(device) for name, value in row.items()} for row in progress.rows]
    return progress
