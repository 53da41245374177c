"""Other people's ViTs: their weights found in a file, brought under timm's names, checked, and loaded."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import read_file
from data_types import InputError

ANCHOR = "patch_embed.proj.weight"  # every ViT has it, by this name or transformers'; what stands before it is a prefix
ANCHORS = re.compile(r"((?:.*\.)?)(patch_embed\.proj|embeddings\.patch_embeddings(?:\.projection)?)\.weight")
PREFERRED = ("teacher", "target_encoder", "state_dict_ema", "model_ema", "ema", "model", "state_dict", "module")
RENAMED = [  # names of transformers, in published files and in memory, and of the originals -> timm's, in this order
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(register|storage)_tokens$", "reg_token"),
    (r"^((encoder|model)\.)?layers?\.(?=\d)", "blocks."),
    (r"^blocks\.\d+\.(?=\d)", "blocks."),  # DINOv2's chunks of blocks, in which these are numbered through
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.(layer_scale|gamma_)([12])(\.lambda1)?$", r".ls\2.gamma"),
]
BACKBONE = re.compile(r"(patch_embed|cls_token|pos_embed|reg_token|blocks|norm)(\.|$)")  # what else is ours is the head
IGNORED = re.compile(r"(\w*head\w*|decoder\w*|mask\w*|pooler)(\.|$)")  # projection heads, MAE's decoder, mask tokens
ROTARY = r"(.*\.)?rope\."
VARIANTS = {  # what other ViTs have under timm's names and this one has not: pattern of names -> what it is
    r"dist(illation)?_token|head_dist\.": "a distillation token",
    r"fc_norm\.": "a norm after pooling over the patches (MAE's fine-tuned and timm's global-pool models)",
    r"pre_logits\.": "a layer between norm and head",
    r".*\.[qk]_norm\.": "norms of queries and keys",
    r".*(rel_pos|relative_position)": "relative position biases",
    ROTARY: "rotary positions of another kind than DINOv3's",
    r".*\.lambda_[12]": "layer scale of BEiT",
    r".*\.mlp\.(w\d|fc1_|gate_proj|weights_)": "a gated MLP (SwiGLU)",
}
FOREIGN = (
    "warning: no state dict tells data.mean and data.std; timm's AugReg ViTs and transformers' ViT want [0.5, 0.5, "
    "0.5] for both, DeiT, DINO, DINOv2, DINOv3 and MAE ImageNet's (the default)"
)


@dataclass
class Pretrained:
    """A ViT as a file holds it. path: the file. weights: under timm's names, layer scale folded. told: what the file
    says of the model, key of the config's `model` section -> value; assumed: what no tensor tells, as that kind of ViT
    has it. ignored: names beside the ViT. of: the key that it stood under, where there are several ViTs. antialias,
    offset: how the publisher's own code resamples the position embedding, see `resample_positions`. own: the rest of a
    checkpoint of this repo, else None."""

    path: Path
    weights: dict[str, Tensor]
    told: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    of: str = ""
    antialias: bool = True
    offset: float = 0.0
    own: dict[str, Any] | None = None


# --- Finding ----------------------------------------------------------------------------------------------------------


def shown(names: Iterable[str]) -> str:
    """The first three names, on one line and without control characters: they come from a file."""
    names = ["".join(c if c.isprintable() else "?" for c in name)[:80] for name in names]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def is_plain(value: Any) -> bool:
    """Whether `value` is a tensor that is dense, not nested, and has its numbers here."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and value.is_cpu


def dicts_in(state: Any, keys: tuple[str, ...] = (), seen: set[int] | None = None) -> Iterator[tuple[tuple, dict]]:
    """The dictionaries in what a file holds, each with the keys that lead there; at most five deep, each once."""
    seen = set() if seen is None else seen
    if isinstance(state, dict) and id(state) not in seen and len(keys) < 5:
        seen.add(id(state))
        yield keys, state
        for key, value in state.items():
            yield from dicts_in(value, (*keys, str(key)), seen)


def find_weights(state: Any) -> tuple[dict[str, Tensor], list[str], str]:
    """The ViT in what a file holds, name -> tensor without what all of its names begin with (`module.`, `backbone.`,
    `vit.`, …); the names of the tensors beside it; and the key that it stood under if there is a ViT under others, too:
    the teacher's and the average's are preferred. Raises InputError."""
    dicts = [(keys, {k: v for k, v in found.items() if isinstance(k, str)}) for keys, found in dicts_in(state)]
    vits = [(keys, found) for keys, found in dicts if any(map(ANCHORS.fullmatch, found))]
    if not vits:
        names = [name for _, found in dicts for name, value in found.items() if isinstance(value, Tensor)]
        if not names:
            raise InputError("should hold a state dict of a ViT, name -> tensor, by itself or under a key")
        raise InputError(f"has no {ANCHOR}: its names are neither timm's nor transformers' ({shown(names)})")

    def rank(vit: tuple[tuple[str, ...], dict]) -> int:
        return min([PREFERRED.index(key) for key in vit[0] if key in PREFERRED], default=len(PREFERRED))

    vits.sort(key=rank)
    if len(vits) > 1 and rank(vits[0]) == rank(vits[1]):
        under = shown(".".join(keys) or "no key" for keys, _ in vits)
        raise InputError(f"holds {len(vits)} ViTs, under {under}; save the one to start from by itself")
    keys, state = vits[0]
    anchors = list(filter(None, map(ANCHORS.fullmatch, state)))
    if len(anchors) > 1:
        prefixes = shown(anchor[1] for anchor in anchors)
        raise InputError(f"holds {len(anchors)} ViTs ({prefixes}); save the one to start from by itself")
    prefix, of_transformers = anchors[0][1], anchors[0][2].startswith("embeddings")
    weights, beside = {}, []
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue  # a step, a date: no part of the ViT
        if name.startswith(prefix) or (of_transformers and name.startswith("classifier.")):
            weights[name.removeprefix(prefix)] = value
        else:
            beside.append(name)
    return weights, beside, ".".join(keys) if len(vits) > 1 else ""


def locate(path: str) -> Path:
    """The file with the weights: `path` itself, or in a folder last.pt of a run of this repo, or what transformers
    saves (model.safetensors, pytorch_model.bin). Raises InputError."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("last.pt", "model.safetensors", "pytorch_model.bin"):
        if (path / name).exists():
            return path / name
    problem = "no last.pt, model.safetensors or pytorch_model.bin in this folder"
    if parts := sorted(path.glob("*.index.json")):
        problem = f"{parts[0].name}: its weights lie in several files; save them in one"
    raise InputError(f"{path}: model.checkpoint_path: {problem}")


# --- Under timm's names -----------------------------------------------------------------------------------------------


def check_numbers(name: str, tensor: Tensor) -> None:
    """Raises InputError for a tensor that holds no floating-point numbers, or fewer than its shape says (an expanded
    one); looks at none of them."""
    if not is_plain(tensor):
        raise InputError(f"{name} is not a dense tensor")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"{name} is of {tensor.dtype}; expected floating-point numbers")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise InputError(f"{name} has the shape {list(tensor.shape)}, but fewer numbers")


def rename(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def to_timm(weights: Mapping[str, Tensor], own: bool = False) -> dict[str, Tensor]:
    """Under timm's names, float32, as a ViT without layer scale has them: q, k and v in one (a missing bias is 0, see
    `join_biases`), the bias under DINOv3's mask, layer scale multiplied into the layers before it, a position embedding
    without an entry of the class token with one of 0. Each is the same function. own: of this repo, which has that
    entry. Raises InputError."""
    weights = {rename(name): tensor for name, tensor in weights.items()}
    for pattern, what in VARIANTS.items():
        if names := [name for name in weights if re.match(pattern, name)]:
            raise InputError(f"has {shown(names[:1])}: {what}, which this ViT has not")
    for name, tensor in weights.items():
        if BACKBONE.match(name):
            check_numbers(name, tensor)
            weights[name] = tensor.float()

    def take(name: str, like: Tensor) -> Tensor:
        tensor = weights.pop(name)
        if tensor.shape != like.shape:
            raise InputError(f"{name} has the shape {list(tensor.shape)}; expected {list(like.shape)}")
        return tensor

    for name in [name for name in weights if re.fullmatch(r"blocks\.\d+\.attn\.q\.weight", name)]:
        layer, like = name.removesuffix("q.weight"), weights[name]
        if missing := [f"{layer}{x}.weight" for x in "kv" if f"{layer}{x}.weight" not in weights]:
            raise InputError(f"has no {missing[0]}")
        weights[f"{layer}qkv.weight"] = torch.cat([take(f"{layer}{x}.weight", like) for x in "qkv"])
        names, zero = [f"{layer}{x}.bias" for x in "qkv"], like.new_zeros(len(like))
        biases = [take(name, zero) if name in weights else zero for name in names]
        weights[f"{layer}qkv.bias"] = torch.cat(biases)
    if not own:
        join_biases(weights, take)
    for name in [name for name in weights if name.endswith(".bias_mask")]:
        bias = weights.get(name.removesuffix("_mask"), weights[name])
        mask = take(name, bias)
        weights[name.removesuffix("_mask")] = torch.where(mask == 0, 0, bias * mask)  # what is masked may be NaN
    for name in [name for name in weights if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        layer = re.sub(r"ls(.)\.gamma$", lambda found: {"1": "attn.proj.", "2": "mlp.fc2."}[found[1]], name)
        bias, weight = (weights.get(f"{layer}{kind}") for kind in ("bias", "weight"))
        if bias is None or weight is None or weight.ndim != 2 or len(weight) != len(bias):
            raise InputError(f"has {name} without a layer {layer[:-1]} that it fits")
        gamma = take(name, bias)
        weights |= {f"{layer}bias": bias * gamma, f"{layer}weight": weight * gamma[:, None]}
    pos_embed = weights.get("pos_embed")
    entries = 0 if own or pos_embed is None or pos_embed.ndim != 3 else pos_embed.shape[1]
    if math.isqrt(entries) ** 2 == entries > 1:
        weights["pos_embed"] = F.pad(pos_embed, (0, 0, 1, 0))  # timm's no_embed_class, DeiT III
    return weights


def join_biases(weights: dict[str, Tensor], take: Callable[[str, Tensor], Tensor]) -> None:
    """Where qkv has no bias in any block: that of timm's q_bias and v_bias, 0 for what there is not (timm's DINOv3).
    take(name, like): takes a tensor out of the weights, which should have the shape of `like`."""
    layers = [name.removesuffix("weight") for name in weights if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name)]
    if any(f"{layer}bias" in weights or not weights[f"{layer}weight"].ndim for layer in layers):
        return
    for layer in layers:
        zero = weights[f"{layer}weight"].new_zeros(len(weights[f"{layer}weight"]) // 3)
        names = [f"{layer.removesuffix('qkv.')}{x}_bias" for x in "qkv"]
        weights[f"{layer}bias"] = torch.cat([take(name, zero) if name in weights else zero for name in names])


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes say: patch_size, embed_dim, depth, mlp_ratio, registers. Raises InputError where they are no
    ViT's."""
    for name in (ANCHOR, *(f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2"))):
        if name not in weights:
            raise InputError(f"has no {name}: no block of it fits this ViT")
        shape, expected = list(weights[name].shape), "width, channels, patch, patch" if name == ANCHOR else "out, in"
        if len(shape) != len(expected.split()) or min(shape) < 1 or shape[2:] != shape[2:][::-1]:
            raise InputError(f"{name} has the shape {shape}; expected [{expected}]")
    (dim, _, _, patch), (hidden, _) = weights[ANCHOR].shape, weights["blocks.0.mlp.fc1.weight"].shape
    if hidden == 2 * weights["blocks.0.mlp.fc2.weight"].shape[1]:
        raise InputError(f"has {hidden} hidden units of which half are gates: SwiGLU, which this ViT has not")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    ratio = (hidden if int(dim * (hidden / dim)) == hidden else hidden + 0.5) / dim  # the model rounds it down
    registers = weights.get("reg_token", torch.empty(1, 0, dim))
    if registers.ndim != 3:
        raise InputError(f"reg_token has the shape {list(registers.shape)}; expected [1, registers, width]")
    return {"patch_size": patch, "embed_dim": dim, "depth": depth, "mlp_ratio": ratio} | {
        "registers": registers.shape[1]
    }


# --- What the file says -----------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """The mapping in a JSON file, {} if there is no such file. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path.name} beside it cannot be read as JSON") from None
    return content if isinstance(content, dict) else {}


def told_by_config(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """num_heads and norm_eps by transformers' config.json, if it is that of a ViT of this width. Raises InputError for
    what this ViT has not, also by timm's."""
    if "_rope_" in str(name := config.get("architecture")):
        raise InputError(f"config.json beside it says {shown([name])}: {VARIANTS[ROTARY]}, which this ViT has not")
    if config.get("hidden_size") != sizes["embed_dim"]:
        return {}
    for key, expected in (("hidden_act", "gelu"), ("rope_theta", 100)):
        if config.get(key, expected) != expected:
            raise InputError(f"config.json beside it says {key}: {shown([str(config[key])])}; this ViT has {expected}")
    return told_by_section({"num_heads": config.get("num_attention_heads"), "norm_eps": config.get("layer_norm_eps")})


def told_by_section(section: Any) -> dict[str, Any]:
    """What no shape says, by the `model` section of a config, where it has the right type."""
    section = section if isinstance(section, dict) else {}
    valid = {
        "num_heads": lambda value: type(value) is int and value > 0,
        "norm_eps": lambda value: type(value) in (int, float) and 0 < value < 1,
        "positions": lambda value: value in ("learned", "rotary"),
    }
    return {key: section[key] for key, is_valid in valid.items() if is_valid(section.get(key))}


def heads_by_periods(periods: Tensor, embed_dim: int) -> int:
    """num_heads by the periods of DINOv3's rotary positions, 100^(4i / (D/H)), which bfloat16 may have rounded. Raises
    InputError for others."""
    expected = 100.0 ** (torch.arange(periods.numel()) / max(periods.numel(), 1))
    if not periods.is_floating_point() or not torch.allclose(periods.float().flatten(), expected, rtol=0.01):
        raise InputError("rope_embed.periods are not DINOv3's, 100^(4i / (D/H))")
    return max(embed_dim // (4 * periods.numel()), 1)


def is_timm_dinov3(named: Mapping[str, Tensor]) -> bool:
    """Whether these are timm's tensors of DINOv3, which keeps no periods. timm's other ViTs of rotations alone turn
    otherwise; they have at most one register, or a norm that is refused."""
    registers = named.get("reg_token")
    return "blocks.0.gamma_1" in named and is_plain(registers) and registers.ndim == 3 and registers.shape[1] == 4


def read_pretrained(path: str) -> Pretrained:
    """The ViT in a file or folder, and what the file says of it. Raises InputError."""
    file = locate(path)
    state = read_file(file)
    own = state if isinstance(state, dict) and {"config", "classes", "step"} <= state.keys() else None
    try:
        named, ignored, of = find_weights(state)
        found = Pretrained(file, to_timm(named, own is not None), ignored=ignored, of=of, own=own)
        found.told = sizes_of(found.weights)
        periods, of_transformers = found.weights.pop("rope_embed.periods", None), "embeddings.cls_token" in named
        scaled = any(re.search(r"(ls1\.gamma|lambda1)$", name) for name in named)
        if "pos_embed" in found.weights:
            found.told["positions"] = "learned"
        elif periods is not None or "embeddings.patch_embeddings.weight" in named or is_timm_dinov3(named):
            found.told["positions"] = "rotary"
        rotary = found.told.get("positions") == "rotary"
        found.assumed["norm_eps"] = 1e-5 if rotary else 1e-12 if of_transformers and not scaled else 1e-6
        if periods is not None and is_plain(periods):
            found.told["num_heads"] = heads_by_periods(periods, found.told["embed_dim"])
        if own is not None:
            config = own["config"] if isinstance(own["config"], dict) else {}
            found.told |= told_by_section(config.get("model"))
            found.told.setdefault("norm_eps", 1e-6)  # of a checkpoint that is older than the key
        elif file.name in ("model.safetensors", "pytorch_model.bin"):
            found.told |= told_by_config(read_json(file.with_name("config.json")), found.told)
        no_registers = not found.told["registers"]
        if of_transformers and no_registers:  # ViTModel and Dinov2Model; Dinov2WithRegistersModel antialiases
            found.antialias = False
        elif own is None and scaled and "mask_token" in named and no_registers:  # the original, as its hub loads it
            found.antialias, found.offset = False, 0.1
    except InputError as error:
        raise InputError(f"{file}: model.checkpoint_path: {error}") from None
    return found


# --- Loading ----------------------------------------------------------------------------------------------------------


def grid_of(found: Pretrained) -> tuple[int, int] | None:
    """Rows and columns of patches of the position embedding, of which a checkpoint of this repo says what they are;
    else they are a square's, or None."""
    entries, then = found.weights["pos_embed"].shape[1] - 1, (found.own or {}).get("config")
    model = then.get("model") if isinstance(then, dict) else None
    size, patch = (model.get(key) for key in ("image_size", "patch_size")) if isinstance(model, dict) else (None, None)
    if isinstance(size, list) and len(size) == 2 and all(type(x) is int and x > 0 for x in (*size, patch)):
        grid = size[0] // patch, size[1] // patch
        if math.prod(grid) == entries:
            return grid
    side = math.isqrt(entries)
    return (side, side) if side**2 == entries else None


def resample_positions(
    pos_embed: Tensor,
    grid: int | tuple[int, int],
    antialias: bool = True,
    offset: float = 0.0,
    old: tuple[int, int] | None = None,
) -> Tensor:
    """A position embedding [1, 1 + rows * columns, D] of the grid `old` (None: a square) for another one: bicubic, with
    or without antialiasing, the class token's entry as it is. For the same grid `pos_embed` itself. offset: the
    original DINOv2's, which resamples to a grid larger by 0.1 patches and takes the first ones of each row."""
    grid = (grid, grid) if isinstance(grid, int) else grid
    old = old or (math.isqrt(pos_embed.shape[1] - 1),) * 2
    if old == grid:
        return pos_embed
    token, patches = pos_embed[:, :1], pos_embed[:, 1:]
    image = patches.unflatten(1, old).permute(0, 3, 1, 2)  # [1, P, D] -> [1, D, rows, columns]
    scales = [(new + offset) / side for new, side in zip(grid, old)]
    target = {"scale_factor": scales} if offset else {"size": grid}
    image = F.interpolate(image, mode="bicubic", antialias=antialias, **target)
    return torch.cat([token, image.flatten(2).transpose(1, 2)], 1)


def check_tensor(name: str, tensor: Tensor, own: Tensor, found: Pretrained) -> None:
    """Raises InputError for a tensor that cannot be the model's `own`; a position embedding may have another grid, a
    square or one that its file tells. Looks at no number, so that a shape without the memory behind it (an expanded
    tensor) is no harm."""
    check_numbers(name, tensor)
    shape, expected = list(tensor.shape), list(own.shape)
    if name == "pos_embed" and tensor.ndim == 3 and shape[1] > 1 and [shape[0], shape[2]] == [expected[0], expected[2]]:
        expected, entries = shape, shape[1]
        if grid_of(found) is None:
            what = "not those of a class token and a square grid of patches"
            raise InputError(f"pos_embed has {entries} entries, {what}")
    if shape != expected:
        raise InputError(f"{name} has the shape {shape}, the configured model's is {expected}")


def check_sizes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    """Raises InputError for a ViT of another size than the model's, with the keys to set."""
    ours = sizes_of(own) | {"positions": "learned" if "pos_embed" in own else "rotary"}
    hidden, own_hidden = (len(w["blocks.0.mlp.fc1.weight"]) for w in (weights, own))
    if hidden * ours["embed_dim"] == own_hidden * told["embed_dim"]:
        ours["mlp_ratio"] = told["mlp_ratio"]  # the same hidden units, whatever the rounding
    if differing := [f"model.{key}={told[key]}" for key in ours if told.get(key, ours[key]) != ours[key]]:
        other_width = told["embed_dim"] != ours["embed_dim"]
        heads = " (and model.num_heads: no tensor tells it; most ViTs have embed_dim / 64)" if other_width else ""
        raise InputError(f"is a ViT of another size: set {' '.join(differing)}{heads}")


def match_head(found: Pretrained, head: list[str], config: dict, classes: list[str] | None) -> str:
    """Bring the rows of the head of a checkpoint of this repo into the order of the run's `classes`, or take the head
    out of the weights, where its outputs mean something else; returns what was done."""
    then, theirs = (found.own or {}).get("config"), (found.own or {}).get("classes")
    task = then.get("task", "classification") if isinstance(then, dict) else None
    if not isinstance(theirs, list) or classes is None or not all(is_plain(found.weights.get(name)) for name in head):
        return ""
    other_task = os.path.basename(str(task)) != os.path.basename(config.get("task", "classification"))
    if theirs == classes and not other_task:
        return ""
    rows = {found.weights[name].shape[:1] for name in head}
    same_names = sorted(map(str, theirs)) == sorted(classes) and len(set(classes)) == len(classes)
    if same_names and not other_task and rows == {(len(classes),)}:
        for name in head:
            check_numbers(name, found.weights[name])
            found.weights[name] = found.weights[name][[theirs.index(c) for c in classes]]
        return "the head's rows put into the order of this run's classes"
    for name in head:
        del found.weights[name]
    what = f"task was {task}" if other_task else f"classes were {shown(map(str, theirs))}"
    return f"the head not taken, as its {what}"


def warnings(found: Pretrained, config: dict) -> list[str]:
    """Lines about what is not in the weights and changes what they mean: mean, std and heads other than the file says,
    or that it says nothing."""
    lines, data, model = [], config.get("data", {}), config.get("model", {})
    then = found.own["config"].get("data") if found.own and isinstance(found.own["config"], dict) else {}
    if found.own is None and found.path.name in ("model.safetensors", "pytorch_model.bin"):
        then, of_timm = (read_json(found.path.with_name(name)) for name in ("preprocessor_config.json", "config.json"))
        then = {"mean": then.get("image_mean"), "std": then.get("image_std")}
        then = of_timm.get("pretrained_cfg") if then["mean"] is None else then
    then = then if isinstance(then, dict) else {}
    for key in ("mean", "std"):
        if isinstance(then.get(key), list) and then[key] != data.get(key, then[key]):
            lines.append(f"warning: data.{key}: {data[key]}, the weights were trained with {str(then[key])[:80]}")
    heads = found.told.get("num_heads")
    if heads != model.get("num_heads", heads) and heads is not None:
        lines.append(f"warning: model.num_heads: {model['num_heads']}, the weights were trained with {heads}")
    return lines if found.own or then.get("mean") else [*lines, FOREIGN]


def load_weights(model: nn.Module, path: str, config: dict | None = None, classes: list[str] | None = None) -> str:
    """Load the weights of a checkpoint of this repo, or of a ViT by timm, transformers, DeiT, DINO, DINOv2, DINOv3 or
    MAE, into `model`. The position embedding is resampled to the model's grid; the head stays fresh if its shapes do
    not fit; projection heads, decoders and what else is no part of a ViT are ignored. config, classes: the run's, with
    which a checkpoint of this repo is compared. Returns what to print: a line of what was done, and warnings. Raises
    InputError for anything else that does not fit."""
    config = config or {}
    found, own = read_pretrained(path), model.state_dict()
    try:
        weights = found.weights
        check_sizes(weights, own, found.told)
        head = [name for name in own if not BACKBONE.match(name)]
        matched = match_head(found, head, config, classes)
        if not all(is_plain(weights.get(name)) and weights[name].shape == own[name].shape for name in head):
            for name in head:
                weights.pop(name, None)
        for name in filter(weights.__contains__, own):
            check_tensor(name, weights[name], own[name], found)
            weights[name] = weights[name].to(own[name].dtype)
            if not weights[name].isfinite().all():
                raise InputError(f"{name} holds NaN or infinity")
        grids = (grid_of(found), model.grid) if "pos_embed" in weights and "pos_embed" in own else ()
        resampled = len(set(grids)) == 2
        if resampled:
            asked = config.get("model", {}).get("pos_embed_antialias", "auto")
            antialias, offset = (found.antialias, found.offset) if asked == "auto" else (asked == "true", 0.0)
            weights["pos_embed"] = resample_positions(weights["pos_embed"], model.grid, antialias, offset, grids[0])
        fresh, unexpected = model.load_state_dict(weights, strict=False)
        missing = [name for name in fresh if name not in head]
        unknown = [name for name in unexpected if not IGNORED.match(name)]
        if unknown or missing:
            problem = f"has no {missing[0]}" if missing else f"has {shown(unknown[:1])}, which this ViT has not"
            raise InputError(f"{problem} ({len(missing)} missing, {len(unknown)} unknown tensors)")
        warned = warnings(found, config)
    except InputError as error:
        raise InputError(f"{found.path}: model.checkpoint_path: {error}") from None
    done = [f"{len(own) - len(fresh)} tensors loaded" + (f" from {shown([found.of])}" if found.of else "")]
    if resampled:
        how = f"{'with' if antialias else 'without'} antialiasing" + (f", offset {offset}" if offset else "")
        done.append("pos_embed resampled from {}x{} to {}x{} {}".format(*grids[0], *grids[1], how))
    done += [matched] if matched else []
    for names, what in ((fresh, "left fresh"), (found.ignored + unexpected, "ignored")):
        if names:
            done.append(f"{len(names)} {what} ({shown(names)})")
    return "\n".join([f"{found.path}: {', '.join(done)}", *warned])
