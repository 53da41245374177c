"""pretrained.py: the weights of other people's ViTs, as they are published, resampled, or refused in one line."""

import argparse
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import message, same

from data_types import InputError
from pretrained import load_weights, resample_positions
from vit_model import VisionTransformer


def tiny(num_classes: int = 3, **options) -> VisionTransformer:
    torch.manual_seed(num_classes)
    shape = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**shape | options, num_classes=num_classes)


def changed(model: VisionTransformer) -> dict[str, torch.Tensor]:
    """A state dict of the model's shapes, every number of which is another."""
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


def weights_file(tmp_path, content) -> str:
    torch.save(content, tmp_path / "w.pt")
    return str(tmp_path / "w.pt")


def loads(tmp_path, content, model: VisionTransformer) -> list[str]:
    """The lines of `load_weights`, without the file's name."""
    path = weights_file(tmp_path, content)
    lines = load_weights(model, path).splitlines()
    assert lines[0].startswith(f"{path}: ")
    return [lines[0].removeprefix(f"{path}: "), *lines[1:]]


def refuses(tmp_path, content, **options) -> str:
    """The message of `load_weights`, without file and key."""
    path = weights_file(tmp_path, content)
    text = message(load_weights, tiny(**options), path)
    assert text.startswith(f"{path}: model.checkpoint_path: ")
    return text.removeprefix(f"{path}: model.checkpoint_path: ")


# --- What is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [False, True], ids=["state dict", "checkpoint"])
def test_load_weights(tmp_path, ours):
    """All tensors, bit for bit, from a state dict or from a checkpoint of this repo, which needs no warning; dropout
    goes into a model that was trained without."""
    weights, model = changed(tiny(dropout=0.0)), tiny(dropout=0.5)
    content = {"step": 1, "model": weights, "optimizer": {}, "config": {}, "classes": []} if ours else weights
    first, *others = loads(tmp_path, content, model)
    assert first == "32 tensors loaded" and same(dict(model.state_dict()), weights)
    assert [line[:47] for line in others] == ([] if ours else ["warning: no state dict tells data.mean and data"])


@pytest.mark.parametrize("head", ["other", "none", "no bias"])
def test_another_number_of_classes_leaves_the_head_fresh(tmp_path, head):
    """Pretrained on other classes, or without a head, or half of one: everything else is loaded, the line says so."""
    weights, model = changed(tiny(3 if head == "no bias" else 5)), tiny(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dropped = {"other": "-", "none": "head.", "no bias": "head.bias"}[head]
    given = {k: v for k, v in weights.items() if not k.startswith(dropped)}
    assert loads(tmp_path, given, model)[0] == "30 tensors loaded, 2 left fresh (head.weight, head.bias)"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("head.") else weights[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grid", [2, 4, 1])
def test_another_precision_and_another_image_size(tmp_path, dtype, grid):
    """Cast to float32; the position embedding is resampled in float32, and the line says it."""
    weights, model = {name: tensor.to(dtype) for name, tensor in changed(tiny()).items()}, tiny(image_size=4 * grid)
    resampled = f", pos_embed resampled from 2x2 to {grid}x{grid}" if grid != 2 else ""
    assert loads(tmp_path, weights, model)[0] == f"32 tensors loaded{resampled}"
    expected = {name: tensor.float() for name, tensor in weights.items()}
    expected["pos_embed"] = resample_positions(expected["pos_embed"], grid)
    assert same(dict(model.state_dict()), expected)


def prefixed(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


PROJECTION = {f"head.mlp.{i}.{kind}": torch.ones(2) for i in (0, 2, 4) for kind in ("weight", "bias")}
PROJECTION |= {"head.last_layer.weight_g": torch.ones(2)}
DECODER = ("mask_token", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.bias")
DECODER = {name: torch.ones(2) for name in DECODER}
ALL, HEADLESS = "32 tensors loaded", "30 tensors loaded, 2 left fresh (head.weight, head.bias)"
IGNORED = f"{HEADLESS}, 7 ignored (head.mlp.0.weight, head.mlp.0.bias, head.mlp.2.weight, …)"


@pytest.mark.parametrize(
    "wrap, expected",
    {  # w: the ViT's body, h: its head
        "deit": (lambda w, h: {"model": w | h}, ALL),
        "ddp": (lambda w, h: {"state_dict": prefixed("module.", w | h), "epoch": 3}, ALL),
        "lightning": (lambda w, h: {"state_dict": prefixed("model.", w | h), "hyper_parameters": {"lr": 1.0}}, ALL),
        "nested": (lambda w, h: prefixed("module.backbone.encoder.", w | h), ALL),
        "backbone": (lambda w, h: w, HEADLESS),
        "dino": (
            lambda w, h: {
                "student": prefixed("module.backbone.", w),
                "teacher": prefixed("backbone.", w) | PROJECTION,
                "args": argparse.Namespace(arch="vit_small", lr=0.1, betas=(0.9, 0.99)),
            },
            IGNORED,
        ),
        "dino bare": (lambda w, h: w | PROJECTION, IGNORED),
        "mae": (
            lambda w, h: {"model": w | DECODER, "args": argparse.Namespace(), "epoch": 1},
            f"{HEADLESS}, 4 ignored (mask_token, decoder_pos_embed, decoder_blocks.0.attn.qkv.weight, …)",
        ),
        "head beside": (  # the ViT, so not its own
            lambda w, h: prefixed("backbone.", w) | {"head.weight": torch.ones(3, 16), "fc\n.bias": torch.ones(1)},
            f"{HEADLESS}, 2 ignored (head.weight, fc?.bias)",
        ),
    }.values(),
)
def test_published_layouts(tmp_path, wrap, expected):
    """Nested and prefixed as they are published; what is no part of a ViT is ignored and listed."""
    model = tiny()
    weights, fresh = changed(model), model.head.weight.clone()
    head = {name: tensor for name, tensor in weights.items() if name.startswith("head.")}
    body = {name: tensor for name, tensor in weights.items() if name not in head}
    assert loads(tmp_path, wrap(body, head), model)[0] == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]) == (not name.startswith("head.") or "fresh" not in expected), name
    assert torch.equal(model.head.weight, fresh) == ("fresh" in expected)


def test_old_files_and_folders(tmp_path):
    """torch's format before 1.6, whatever the ending; last.pt of a folder."""
    for name, path in (("a.pth", tmp_path / "a.pth"), ("last.pt", tmp_path)):
        model = tiny()
        torch.save(changed(model), tmp_path / name, _use_new_zipfile_serialization=False)
        weights = changed(model)
        assert load_weights(model, str(path)).startswith(f"{tmp_path / name}: 32 tensors loaded")
        assert same(dict(model.state_dict()), weights)
    (tmp_path / "last.pt").unlink()
    assert message(load_weights, tiny(), str(tmp_path)) == f"{tmp_path / 'last.pt'}: no such file"


def test_safetensors(tmp_path, monkeypatch):
    """Where the package is; one line where it is not, for a damaged file and for none."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    weights, model, path = changed(tiny()), tiny(), str(tmp_path / "model.safetensors")
    save_file(weights, path)
    assert load_weights(model, path).startswith(f"{path}: 32 tensors loaded\nwarning: ")
    assert same(dict(model.state_dict()), weights)
    data = Path(path).read_bytes()
    for damage in (b"", data[:100], data[:-5], b"\xff" * 64):
        Path(path).write_bytes(damage)
        assert message(load_weights, tiny(), path).startswith(f"{path}: not a checkpoint that can be read (damaged")
    assert message(load_weights, tiny(), f"{path[:-12]}_.safetensors").endswith("_.safetensors: no such file")
    for name in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    expected = f"{path}: reading it needs the safetensors package: pip install safetensors"
    assert message(load_weights, tiny(), path) == expected


# --- Position embeddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, functions",
    [  # Keys' cubic reproduces a parabola; a ramp stays one; a chequerboard shrinks to its mean
        (14, 16, (lambda y, x: 3 * x * x - 2 * y * y + x * y, lambda y, x: 5 * y - x)),
        (8, 4, (lambda y, x: 8 * x, lambda y, x: -8 * y)),
        (15, 5, (lambda y, x: ((x * 15).floor() + (y * 15).floor()) % 2 if len(x) == 15 else 0 * x + 0.5,)),
    ],
)
def test_resampling_positions(old, new, functions):
    """Bicubic and antialiased: away from the border the functions seen at the middles of the other grid's patches, rows
    and columns and features apart. The class token's entry stays; the same grid is left alone."""

    def positions(grid: int) -> torch.Tensor:
        middles = (torch.arange(grid) + 0.5) / grid
        patches = torch.stack([function(*torch.meshgrid(middles, middles, indexing="ij")) for function in functions], 2)
        return torch.cat([torch.full((1, 1, len(functions)), 9.0), patches.reshape(1, grid * grid, -1)], 1)

    assert resample_positions(positions(old), old).equal(positions(old))
    found, expected = resample_positions(positions(old), new), positions(new)
    assert found.shape == expected.shape and (found[:, 0] == 9).all()
    border = new // 4
    found, expected = (p[0, 1:].unflatten(0, (new, new))[border:-border, border:-border] for p in (found, expected))
    torch.testing.assert_close(found, expected, atol=1e-5 if new > old else 0.1, rtol=0)


# --- What is refused --------------------------------------------------------------------------------------------------


def drop(*names):
    return lambda weights: {k: v for k, v in weights.items() if k not in names}


def add(*names):
    return lambda weights: weights | {name: torch.zeros(2) for name in names}


def put(name, change):
    return lambda weights: weights | {name: change(weights[name])}


NO_DICT = "should name a state dict, name -> tensor, by itself or under model, state_dict or teacher"
HF = ("vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight", "classifier.bias", "x")
PATCH, PATCH_SHAPE = "patch_embed.proj.weight", "the configured model's is [16, 3, 4, 4]"


@pytest.mark.parametrize(
    "change, expected",
    [
        (drop("norm.bias", "cls_token"), "has no cls_token (2 missing, 0 unknown tensors)"),
        (add("norm_pre.bias", "x\ny"), "has norm_pre.bias, which this ViT has not (0 missing, 2 unknown tensors)"),
        (lambda w: add("ln.bias")(drop("norm.bias")(w)), "has no norm.bias (1 missing, 1 unknown tensors)"),
        (drop("blocks.1.attn.qkv.bias"), "has no blocks.1.attn.qkv.bias (1 missing, 0 unknown tensors)"),
        (lambda w: {}, f"has no {PATCH}: its names are not timm's (there are none)"),
        (lambda w: add(*HF)({}), f"has no {PATCH}: its names are not timm's ({', '.join(HF[:3])}, …)"),
        (lambda w: w | {"epoch": 3}, NO_DICT),
        (lambda w: w | {3: torch.zeros(1)}, NO_DICT),
        (lambda w: {"model": 3}, NO_DICT),
        (lambda w: {"student": w}, NO_DICT),
        (put("norm.bias", lambda w: w.to_sparse()), NO_DICT),
        (put("norm.bias", lambda w: w.to("meta")), NO_DICT),
        (
            lambda w: prefixed("module.base_encoder.", w) | prefixed("module.momentum_encoder.", w),
            "holds 2 ViTs (module.base_encoder., module.momentum_encoder.); save the one to start from by itself",
        ),
        (
            lambda w: {name.replace("blocks", "layers.0.blocks"): tensor for name, tensor in w.items()},
            "has no blocks.0.attn.qkv.weight: no block of it fits this ViT",
        ),
        (put(PATCH, lambda w: w[:, :1]), f"{PATCH} has the shape [16, 1, 4, 4], {PATCH_SHAPE}"),
        (put(PATCH, lambda w: w[..., :2]), f"{PATCH} has the shape [16, 3, 4, 2], {PATCH_SHAPE}"),
        (put(PATCH, lambda w: w[:0]), f"{PATCH} has the shape [0, 3, 4, 4], {PATCH_SHAPE}"),
        (
            lambda w: put("norm.weight", lambda x: x[:5])(put("norm.bias", lambda x: x / 0)(w)),
            "norm.weight has the shape [5], the configured model's is [16]",
        ),
        (
            put("pos_embed", lambda w: w[:, 1:]),
            "pos_embed has 4 entries, none for the class token, which has one in this ViT",
        ),
        (
            put("pos_embed", lambda w: w.repeat(1, 3, 1)),
            "pos_embed has 15 entries, not those of a class token and a square grid of patches",
        ),
        (
            put("pos_embed", lambda w: w[:, :1].expand(1, 10**6 + 1, 16)),
            "pos_embed has the shape [1, 1000001, 16], but fewer numbers",
        ),
        (put("pos_embed", lambda w: w.long()), "pos_embed is of torch.int64; expected floating-point numbers"),
        (put("blocks.1.norm1.bias", lambda w: w / 0), "blocks.1.norm1.bias holds NaN or infinity"),
        (put("head.bias", lambda w: w * torch.nan), "head.bias holds NaN or infinity"),
        (put("norm.bias", lambda w: w.double() + 1e300), "norm.bias holds NaN or infinity"),  # once it is float32
        (  # timm's SwiGLUPacked has no name of its own: fc1 gives twice what fc2 takes
            put("blocks.0.mlp.fc2.weight", lambda w: w[:, :32]),
            "has 64 hidden units of which half are gates: SwiGLU, which this ViT has not",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, expected):
    """The line names the first tensor."""
    assert refuses(tmp_path, change(changed(tiny()))) == expected


@pytest.mark.parametrize(
    "name, what",
    [
        ("dist_token", "a distillation token"),
        ("head_dist.weight", "a distillation token"),
        ("reg_token", "register tokens"),
        ("register_tokens", "register tokens"),
        ("storage_tokens", "register tokens"),
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


HEADS = " (and model.num_heads: no tensor tells it; ViT-Ti to L have embed_dim / 64)"


@pytest.mark.parametrize(
    "theirs, keys",
    [
        ({"patch_size": 2}, "model.patch_size=2"),
        ({"depth": 3}, "model.depth=3"),
        ({"mlp_ratio": 3.0}, "model.mlp_ratio=3.0"),
        ({"patch_size": 8, "depth": 12}, "model.patch_size=8 model.depth=12"),
        ({"embed_dim": 12}, f"model.embed_dim=12{HEADS}"),
        ({"embed_dim": 48, "mlp_ratio": 49 / 48}, f"model.embed_dim=48 model.mlp_ratio=1.0208333333333333{HEADS}"),
        # the model rounds embed_dim * mlp_ratio down, and hidden / embed_dim may come out a hair too small
        *(({"embed_dim": d, "mlp_ratio": h / d}, None) for d, h in ((50, 1.5), (192, 1.5), (162, 193.5), (100, 29.5))),
    ],
)
def test_another_size_is_refused_with_the_keys_to_set(tmp_path, theirs, keys):
    """Set as the line says, it loads."""
    weights = changed(tiny(**theirs))
    text = refuses(tmp_path, weights)
    assert text == f"is a ViT of another size: set {keys}" or not keys
    model = tiny(**{key: yaml.safe_load(value) for key, value in re.findall(r"model\.(\w+)=(\S+)", text)})
    assert " tensors loaded" in loads(tmp_path, weights, model)[0]
    assert same(dict(model.state_dict()), weights)


def hostile_tensors() -> list[torch.Tensor]:
    """What a file can hold and weights are not: shapes of nothing, of integers, without the memory behind them."""
    zero, some = torch.zeros(()), torch.zeros(16)
    shapes = [(), (0,), (16,), (1, 5, 16), (1, 0, 16), (0, 3, 4, 4), (16, 3, 4, 4), (10**6, 10**6), (1, 10**12 + 1, 16)]
    tensors = [zero.to(dtype).expand(shape) for shape in shapes for dtype in (torch.float32, torch.int8)]
    tensors += [torch.nested.nested_tensor([zero]), some.to_sparse(), torch.zeros(10**9, 10**6, device="meta")]
    return [*tensors, torch.quantize_per_tensor(some, 0.1, 0, torch.qint8), some.to(torch.float8_e4m3fn)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["cls_token", "pos_embed", PATCH, "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"]
    + ["blocks.1.norm1.bias", "head.weight", "blocks.9999999999999999.norm1.bias", "blocks.x", "\x1b[2J"],
)
def test_hostile_tensors_give_one_line(tmp_path, name):
    """In the place of a tensor, or beside the ViT's: one line (a head may be left fresh); nothing allocates what a
    shape alone promises."""
    model = tiny()
    weights = changed(model)
    for tensor in hostile_tensors():
        path = weights_file(tmp_path, weights | {name: tensor})
        try:
            line = load_weights(model, path).splitlines()[0]
            assert name == "head.weight" and line.endswith("2 left fresh (head.weight, head.bias)")
        except InputError as error:
            assert str(error).isprintable()
