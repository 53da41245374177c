"""Checkpoints: written so that a crash at any moment loses nothing, read without running code."""

import argparse
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """What `torch.save`, or for *.safetensors that package, wrote to `path`, on the CPU. Runs no code from it
    (`weights_only=True`). Raises InputError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # optional

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values: the options of DINO, MAE, DeiT
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError(f"{path}: reading it needs the safetensors package: pip install safetensors") from None
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


# --- Weights to start from --------------------------------------------------------------------------------------------

ANCHOR = "patch_embed.proj.weight"  # every ViT with timm's names has it; what stands before it is before all names
BACKBONE = re.compile(r"(patch_embed|cls_token|pos_embed|blocks|norm)(\.|$)")  # the rest of our own names is the head
IGNORED = re.compile(r"(\w*head\w*|decoder\w*|mask\w*)(\.|$)")  # DINO's projection head, MAE's decoder and mask token
VARIANTS = {  # what other ViTs have under timm's names and this one has not: pattern of names -> what it is
    r"dist_token|head_dist\.": "a distillation token",
    r"reg_token|register_tokens|storage_tokens": "register tokens",
    r"fc_norm\.": "a norm after pooling over the patches (MAE's fine-tuned and timm's global-pool models)",
    r"pre_logits\.": "a layer between norm and head",
    r".*\.(ls[12]\.|gamma_)": "layer scale",
    r".*\.[qk]_norm\.": "norms of queries and keys",
    r".*(rel_pos|relative_position)": "relative position biases",
    r"(.*\.)?rope": "rotary positions",
    r".*\.[qkv]_bias": "biases apart from qkv (BEiT)",
    r".*\.mlp\.(w\d|fc1_)": "a gated MLP (SwiGLU)",
}
FOREIGN = (
    "warning: no state dict tells data.mean and data.std; timm's AugReg ViTs want [0.5, 0.5, 0.5] for both, DeiT, DINO "
    "and MAE ImageNet's (the default)"
)


def shown(names: Iterable[str]) -> str:
    """The first three names, on one line and without control characters: they come from a file."""
    names = ["".join(c if c.isprintable() else "?" for c in name)[:80] for name in names]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def is_plain(value: Any) -> bool:
    """Whether `value` is a tensor that is dense, not nested, and has its numbers here."""
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    return is_dense and value.device.type == "cpu"


def find_weights(state: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The ViT in what a file holds, name -> tensor under timm's names, and the names of what is beside it.

    Looks under `model` (DeiT, MAE), `state_dict` (timm, Lightning) and `teacher` (DINO), and takes off what all names
    of the ViT begin with: `module.`, `backbone.`, `module.backbone.`, … Raises InputError.
    """
    for key in ("model", "state_dict", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and is_plain(v) for k, v in state.items()):
        raise InputError("should name a state dict, name -> tensor, by itself or under model, state_dict or teacher")
    prefixes = [name.removesuffix(ANCHOR) for name in state if f".{name}".endswith(f".{ANCHOR}")]
    if not prefixes:
        raise InputError(f"has no {ANCHOR}: its names are not timm's ({shown(state) or 'there are none'})")
    if len(prefixes) > 1:
        raise InputError(f"holds {len(prefixes)} ViTs ({shown(prefixes)}); save the one to start from by itself")
    prefix = prefixes[0]
    weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return weights, [name for name in state if not name.startswith(prefix)]


def check_kind(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises InputError for a ViT of another kind, which it names, or of another size, with the keys to set."""
    for pattern, what in VARIANTS.items():
        if names := [name for name in weights if re.match(pattern, name)]:
            raise InputError(f"has {shown(names[:1])}: {what}, which this ViT has not")
    layers = [f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
    for name in layers:
        if name not in weights:
            raise InputError(f"has no {name}: no block of it fits this ViT")
    for name in (ANCHOR, *layers):
        shape, ours = list(weights[name].shape), list(own[name].shape)
        if (
            len(shape) != len(ours)
            or min(shape) < 1
            or (name == ANCHOR and (shape[1] != ours[1] or shape[2] != shape[3]))
        ):
            raise InputError(f"{name} has the shape {shape}, the configured model's is {ours}")
    (dim, _, _, patch), (hidden, _) = weights[ANCHOR].shape, weights["blocks.0.mlp.fc1.weight"].shape
    if hidden == 2 * weights["blocks.0.mlp.fc2.weight"].shape[1]:
        raise InputError(f"has {hidden} hidden units of which half are gates: SwiGLU, which this ViT has not")
    depth, own_depth = (len({name.split(".")[1] for name in w if name.startswith("blocks.")}) for w in (weights, own))
    (own_dim, _, _, own_patch), own_hidden = own[ANCHOR].shape, len(own["blocks.0.mlp.fc1.weight"])
    ratio = (hidden if int(dim * (hidden / dim)) == hidden else hidden + 0.5) / dim  # the model rounds it down
    keys = (
        (f"patch_size={patch}", patch != own_patch),
        (f"embed_dim={dim}", dim != own_dim),
        (f"depth={depth}", depth != own_depth),
        (f"mlp_ratio={ratio}", hidden * own_dim != own_hidden * dim),
    )
    differing = [f"model.{key}" for key, differs in keys if differs]
    if differing:
        heads = " (and model.num_heads: no tensor tells it; ViT-Ti to L have embed_dim / 64)" if dim != own_dim else ""
        raise InputError(f"is a ViT of another size: set {' '.join(differing)}{heads}")


def resample_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """A position embedding [1, 1 + g * g, D] for another grid of patches: [1, 1 + grid * grid, D].

    Bicubic, antialiased; the class token's entry stays. For the same grid `pos_embed` itself.
    """
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    token, patches = pos_embed[:, :1], pos_embed[:, 1:]
    image = patches.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # [1, g * g, D] -> [1, D, g, g]
    image = F.interpolate(image, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([token, image.flatten(2).transpose(1, 2)], 1)


def check_tensor(name: str, tensor: Tensor, own: Tensor) -> None:
    """Raises InputError for a tensor that cannot be the model's `own`; a position embedding may have another square
    grid. Looks at no number, so that a shape without the memory behind it (an expanded tensor) is no harm."""
    shape, expected = list(tensor.shape), list(own.shape)
    if name == "pos_embed" and tensor.ndim == 3 and shape[1] > 1 and [shape[0], shape[2]] == [expected[0], expected[2]]:
        entries, grid = shape[1], math.isqrt(shape[1] - 1)
        if grid * grid == entries - 1:
            expected = shape
        elif math.isqrt(entries) ** 2 == entries:
            raise InputError(f"pos_embed has {entries} entries, none for the class token, which has one in this ViT")
        else:
            raise InputError(
                f"pos_embed has {entries} entries, not those of a class token and a square grid of patches"
            )
    if shape != expected:
        raise InputError(f"{name} has the shape {shape}, the configured model's is {expected}")
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if tensor.dtype not in dtypes:
        raise InputError(f"{name} is of {tensor.dtype}; expected floating-point numbers")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise InputError(f"{name} has the shape {shape}, but fewer numbers")


def load_weights(model: nn.Module, path: str) -> str:
    """Load the weights of a checkpoint of this repo, or of a timm, DeiT, DINO or MAE ViT, into `model`.

    The position embedding is resampled to the model's grid; the head stays fresh if its shapes do not fit; projection
    heads, decoders and what else is no part of a ViT are ignored. Returns what to print: a line of what was done, and
    for a foreign file a warning. Raises InputError, with the model as it was, for anything else that does not fit.
    """
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    state, own = read_file(path), model.state_dict()
    try:
        weights, ignored = find_weights(state)
        check_kind(weights, own)
        head = [name for name in own if not BACKBONE.match(name)]
        head_fits = all(name in weights and weights[name].shape == own[name].shape for name in head)
        wanted = [name for name in own if head_fits or name not in head]
        unknown = [name for name in weights if name not in wanted and name not in head and not IGNORED.match(name)]
        missing = [name for name in wanted if name not in weights]
        if unknown or missing:
            problem = f"has no {missing[0]}" if missing else f"has {shown(unknown[:1])}, which this ViT has not"
            raise InputError(f"{problem} ({len(missing)} missing, {len(unknown)} unknown tensors)")
        for name in wanted:
            check_tensor(name, weights[name], own[name])
        loaded = {name: weights[name].to(own[name].dtype) for name in wanted}
        for name, tensor in loaded.items():
            if not tensor.isfinite().all():
                raise InputError(f"{name} holds NaN or infinity")
    except InputError as error:
        raise InputError(f"{path}: model.checkpoint_path: {error}") from None
    done = [f"{len(loaded)} tensors loaded"]
    old, new = (math.isqrt(tensors["pos_embed"].shape[1] - 1) for tensors in (loaded, own))
    if old != new:
        loaded["pos_embed"] = resample_positions(loaded["pos_embed"], new)
        done.append(f"pos_embed resampled from {old}x{old} to {new}x{new}")
    model.load_state_dict(loaded, strict=False)
    ignored += [name for name in weights if name not in own]
    for names, what in (([name for name in head if not head_fits], "left fresh"), (ignored, "ignored")):
        if names:
            done.append(f"{len(names)} {what} ({shown(names)})")
    ours = isinstance(state, dict) and {"config", "classes", "step"} <= state.keys()
    return f"{path}: {', '.join(done)}" + ("" if ours else f"\n{FOREIGN}")
