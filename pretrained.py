"""Other people's ViTs: their weights found in a file, checked, and loaded under our names."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import read_file
from data_types import InputError

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
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and value.is_cpu


def find_weights(state: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The ViT in what a file holds, name -> tensor under timm's names, and the names of what is beside it. Looks under
    `model` (DeiT, MAE), `state_dict` (timm, Lightning) and `teacher` (DINO), and takes off what all names of the ViT
    begin with: `module.`, `backbone.`, `module.backbone.`, … Raises InputError."""
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
    for name in (ANCHOR, *(f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2"))):
        if name not in weights:
            raise InputError(f"has no {name}: no block of it fits this ViT")
        shape, ours = list(weights[name].shape), list(own[name].shape)
        possible = len(shape) == len(ours) and min(shape) > 0
        if not possible or (name == ANCHOR and (shape[1] != ours[1] or shape[2] != shape[3])):
            raise InputError(f"{name} has the shape {shape}, the configured model's is {ours}")
    (dim, _, _, patch), (hidden, _) = weights[ANCHOR].shape, weights["blocks.0.mlp.fc1.weight"].shape
    if hidden == 2 * weights["blocks.0.mlp.fc2.weight"].shape[1]:
        raise InputError(f"has {hidden} hidden units of which half are gates: SwiGLU, which this ViT has not")
    depth, own_depth = (len({name.split(".")[1] for name in w if name.startswith("blocks.")}) for w in (weights, own))
    (own_dim, _, _, own_patch), own_hidden = own[ANCHOR].shape, len(own["blocks.0.mlp.fc1.weight"])
    sizes = ("patch_size", patch, own_patch), ("embed_dim", dim, own_dim), ("depth", depth, own_depth)
    differing = [f"model.{key}={size}" for key, size, own_size in sizes if size != own_size]
    if hidden * own_dim != own_hidden * dim:
        ratio = (hidden if int(dim * (hidden / dim)) == hidden else hidden + 0.5) / dim  # the model rounds it down
        differing.append(f"model.mlp_ratio={ratio}")
    if differing:
        heads = " (and model.num_heads: no tensor tells it; ViT-Ti to L have embed_dim / 64)" if dim != own_dim else ""
        raise InputError(f"is a ViT of another size: set {' '.join(differing)}{heads}")


def resample_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """A position embedding [1, 1 + g * g, D] for another grid of patches, [1, 1 + grid * grid, D]: bicubic, with
    antialiasing, the class token's entry as it is. For the same grid `pos_embed` itself."""
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
        expected, entries = shape, shape[1]
        if math.isqrt(entries) ** 2 == entries:
            raise InputError(f"pos_embed has {entries} entries, none for the class token, which has one in this ViT")
        if math.isqrt(entries - 1) ** 2 != entries - 1:
            what = "not those of a class token and a square grid of patches"
            raise InputError(f"pos_embed has {entries} entries, {what}")
    if shape != expected:
        raise InputError(f"{name} has the shape {shape}, the configured model's is {expected}")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"{name} is of {tensor.dtype}; expected floating-point numbers")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise InputError(f"{name} has the shape {shape}, but fewer numbers")


def load_weights(model: nn.Module, path: str) -> str:
    """Load the weights of a checkpoint of this repo, or of a timm, DeiT, DINO or MAE ViT, into `model`. The position
    embedding is resampled to the model's grid; the head stays fresh if its shapes do not fit; projection heads,
    decoders and what else is no part of a ViT are ignored. Returns what to print: a line of what was done, and for a
    foreign file a warning. Raises InputError for anything else that does not fit."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    state, own = read_file(path), model.state_dict()
    try:
        weights, ignored = find_weights(state)
        check_kind(weights, own)
        head = [name for name in own if not BACKBONE.match(name)]
        if not all(name in weights and weights[name].shape == own[name].shape for name in head):
            weights = {name: tensor for name, tensor in weights.items() if name not in head}
        for name in filter(weights.__contains__, own):
            check_tensor(name, weights[name], own[name])
            weights[name] = weights[name].to(own[name].dtype)
            if not weights[name].isfinite().all():
                raise InputError(f"{name} holds NaN or infinity")
        grids = [math.isqrt(tensors["pos_embed"].shape[1] - 1) for tensors in (weights, own) if "pos_embed" in tensors]
        if len(set(grids)) == 2:
            weights["pos_embed"] = resample_positions(weights["pos_embed"], grids[1])
        fresh, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in fresh if name not in head]
        unknown = [name for name in unexpected if not IGNORED.match(name)]
        if unknown or missing:
            problem = f"has no {missing[0]}" if missing else f"has {shown(unknown[:1])}, which this ViT has not"
            raise InputError(f"{problem} ({len(missing)} missing, {len(unknown)} unknown tensors)")
    except InputError as error:
        raise InputError(f"{path}: model.checkpoint_path: {error}") from None
    done = [f"{len(own) - len(fresh)} tensors loaded"]
    if len(set(grids)) == 2:
        done.append("pos_embed resampled from {0}x{0} to {1}x{1}".format(*grids))
    for names, what in ((fresh, "left fresh"), (ignored + unexpected, "ignored")):
        if names:
            done.append(f"{len(names)} {what} ({shown(names)})")
    ours = {"config", "classes", "step"} <= state.keys()
    return f"{path}: {', '.join(done)}" + ("" if ours else f"\n{FOREIGN}")
