"""pretrained.py: the weights of other people's ViTs, as they are published, resampled, or refused in one line."""

import argparse
import json
import re
import sys
from fractions import Fraction
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import message, same

from data_types import InputError
from grpo import keyed_rng
from pretrained import Pretrained, load_weights, read_pretrained, resample_positions
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


def test_a_checkpoint_of_this_repo_is_compared_with_the_run(tmp_path):
    """The head's rows follow the names of the classes; with other classes, or of another task, the head stays fresh.
    Another mean, std or number of heads is a warning. A config that makes no sense says nothing."""
    data = {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0]}
    then = {"task": "classification", "data": data, "model": {"num_heads": 4}}
    config = {"task": "classification", "data": data, "model": {"num_heads": 4}}

    def lines(names: list, run: dict = config, then: dict = then) -> tuple[str, list[str], VisionTransformer]:
        model = tiny()
        content = {"step": 1, "model": weights, "optimizer": {}, "config": then, "classes": names}
        path = weights_file(tmp_path, content)
        first, *others = load_weights(model, path, run, ["a", "b", "c"]).splitlines()
        return first.removeprefix(f"{path}: "), others, model

    weights = changed(tiny())
    assert lines(["a", "b", "c"])[:2] == ("32 tensors loaded", [])
    first, _, model = lines(["c", "a", "b"])
    assert first == "32 tensors loaded, the head's rows put into the order of this run's classes"
    for name in ("head.weight", "head.bias"):
        assert model.state_dict()[name].equal(weights[name][[1, 2, 0]])
    fresh = "30 tensors loaded, the head not taken, as its {}, 2 left fresh (head.weight, head.bias)"
    for names, run, what in (
        (["a", "b", "d\n"], config, "classes were a, b, d?"),
        (["a", "b", "c", "d"], config, "classes were a, b, c, …"),
        (["a", "b", "c"], config | {"task": "x/own.py"}, "task was classification"),
    ):
        first, others, model = lines(names, run)
        assert (first, others) == (fresh.format(what), []) and not model.head.bias.equal(weights["head.bias"])
    run = {"data": {"mean": [0.4, 0.5, 0.5], "std": [1.0, 1.0, 2.0]}, "model": {"num_heads": 2}}
    assert lines(["a", "b", "c"], config | run)[1] == [
        "warning: data.mean: [0.4, 0.5, 0.5], the weights were trained with [0.5, 0.5, 0.5]",
        "warning: data.std: [1.0, 1.0, 2.0], the weights were trained with [1.0, 1.0, 1.0]",
        "warning: model.num_heads: 2, the weights were trained with 4",
    ]
    for nonsense in ([], {"model": 3, "data": []}, {"model": {"num_heads": "4"}, "data": {"mean": 3}, "task": 5}):
        assert lines(3, then=nonsense)[:2] == ("32 tensors loaded", [])


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
    resampled = f", pos_embed resampled from 2x2 to {grid}x{grid} with antialiasing" if grid != 2 else ""
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
IGNORED = "7 ignored (head.mlp.0.weight, head.mlp.0.bias, head.mlp.2.weight, …)"
IGNORED = f"30 tensors loaded{{}}, 2 left fresh (head.weight, head.bias), {IGNORED}"


EMA = "32 tensors loaded from state_dict_ema"


def chunked(weights: dict) -> dict:
    """As DINOv2's training names them: chunks of blocks, which are numbered through."""
    return {re.sub(r"^blocks\.(\d)", r"blocks.\1.\1", name): tensor for name, tensor in weights.items()}


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
            IGNORED.format(" from teacher"),
        ),
        "dino bare": (lambda w, h: w | PROJECTION, IGNORED.format("")),
        "student": (lambda w, h: {"student": prefixed("module.", w)}, HEADLESS),
        "averages": (lambda w, h: {"state_dict": w | {"norm.bias": w["norm.bias"] / 0}, "state_dict_ema": w | h}, EMA),
        "wrapped": (lambda w, h: {"ema": {"module": prefixed("encoder.", w | h)}, "epoch": 3}, ALL),
        "dinov2": (lambda w, h: {"model": {"teacher": prefixed("backbone.", chunked(w))} | {"x": 3}}, HEADLESS),
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
    begin = f"{tmp_path}: model.checkpoint_path: "
    problem = "no last.pt, model.safetensors or pytorch_model.bin in this folder"
    assert message(load_weights, tiny(), str(tmp_path)) == begin + problem
    (tmp_path / "model.safetensors.index.json").touch()
    problem = "model.safetensors.index.json: its weights lie in several files; save them in one"
    assert message(load_weights, tiny(), str(tmp_path)) == begin + problem
    assert message(load_weights, tiny(), str(tmp_path / "none.pt")) == f"{tmp_path / 'none.pt'}: no such file"


def test_plain_values_beside_the_tensors_do_no_harm(tmp_path):
    """Steps, dates as text, paths, numpy's scalars and arrays, in the state dict and around it; a class that could run
    code is refused by its name, with what to do."""
    plain = {"epoch": 3, "loss": np.float64(0.5), "n": np.int64(3), "mean": np.ones(3), "out": tmp_path, 7: "x"}
    plain |= {"other": PureWindowsPath("c:/x"), "args": argparse.Namespace(out=tmp_path), "names": {"a"}}
    model = tiny()
    weights = changed(model)
    assert loads(tmp_path, plain | {"model": weights | plain}, model)[0] == ALL
    assert same(dict(model.state_dict()), weights)
    path = weights_file(tmp_path, {"model": weights, "lr": Fraction(1, 3)})
    refused = "it holds a fractions.Fraction, and making one could run code; save the weights alone: "
    expected = f"{path}: not a checkpoint that can be read ({refused}torch.save(model.state_dict(), file))"
    assert message(load_weights, tiny(), path) == expected


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
    expected = "reading it needs the safetensors package: uv run --extra safetensors …, or pip install safetensors"
    assert message(load_weights, tiny(), path) == f"{path}: {expected}"


# --- Other implementations --------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
OTHERS = {  # model, config, what the config has beside the sizes
    "vit": ("ViTModel", "ViTConfig", {"intermediate_size": 40}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 3}),
    "registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"num_register_tokens": 3}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"intermediate_size": 40, "num_register_tokens": 4}),
}


def oracle(kind: str):
    """One of transformers' models, width 16, two heads, two blocks, patch 4, grid 3x3; every weight matters."""
    name, config, options = OTHERS[kind]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}
    with keyed_rng("oracle", kind), torch.no_grad():
        model = getattr(transformers, name)(getattr(transformers, config)(**sizes | options)).eval()
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def original(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """transformers' tensors in memory under the names of the original DINOv2 and DINOv3, or of timm for `timm`."""
    v3 = "model.layer.0.norm1.weight" in state
    tokens = "register_tokens" if kind == "dinov2" else "reg_token" if kind == "timm" else "storage_tokens"
    names = {"patch_embeddings.projection.": "patch_embed.proj.", "patch_embeddings.": "patch_embed.proj."}
    names |= {"embeddings.register_tokens": tokens, "embeddings.position_embeddings": "pos_embed", "embeddings.": ""}
    names |= {"model.layer.": "blocks.", "encoder.layer.": "blocks.", "layernorm.": "norm."}
    names |= {"attention.o_proj": "attn.proj", "up_proj": "fc1", "down_proj": "fc2"}
    names |= {"layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
    renamed = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    for i in range(2):
        layer = f"blocks.{i}.attention."
        renamed[f"blocks.{i}.attn.qkv.weight"] = torch.cat([renamed.pop(f"{layer}{x}_proj.weight") for x in "qkv"])
        biases = [renamed.pop(f"{layer}{x}_proj.bias", torch.full((16,), torch.nan)) for x in "qkv"]  # k's is masked
        renamed[f"blocks.{i}.attn.qkv.bias"] = torch.cat(biases)
        if v3:
            renamed[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3, 16).index_fill(0, torch.tensor(1), 0).flatten()
    if v3:
        renamed["rope_embed.periods"] = (100 ** (torch.arange(2) / 2)).bfloat16()
    if kind == "timm":  # where there are registers, the class token has its position in it
        del renamed["mask_token"]
        if "reg_token" in renamed:
            renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
            renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    return renamed


def from_file(path, image_size: int, **config) -> tuple[VisionTransformer, Pretrained, str]:
    """The model of the sizes that the file says, two heads if it does not, with its weights."""
    found = read_pretrained(str(path))
    model = VisionTransformer(image_size, **{"num_heads": 2} | found.assumed | found.told, num_classes=3)
    return model, found, load_weights(model, str(path), {"model": config}).splitlines()[0]


@pytest.mark.parametrize("grid", [3, 2, 5])
@pytest.mark.parametrize("kind", OTHERS)
def test_features_are_those_of_transformers(tmp_path, kind, grid):
    """Under the same random weights all tokens behind the last norm are equal, at the native grid and at others; from
    the folder that `save_pretrained` writes (published names, config.json) and from the state dict in memory. The file
    says everything but the number of heads, which config.json says."""
    other = oracle(kind)
    images = torch.randn(2, 3, 4 * grid, 4 * grid, generator=torch.Generator().manual_seed(grid))
    with torch.no_grad():
        expected = other(images, **{"interpolate_pos_encoding": True} if kind == "vit" else {}).last_hidden_state
    other.save_pretrained(tmp_path / "folder")
    torch.save(other.state_dict(), tmp_path / "state.pt")
    for name in ("folder", "state.pt"):
        model, found, line = from_file(tmp_path / name, 4 * grid)
        with torch.no_grad():
            features = model.forward_features(images, None, class_token_only=False)[:, 0]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
        how = "with" if kind == "registers" else "without"
        resampled = grid != 3 and kind != "dinov3"
        assert (f"pos_embed resampled from 3x3 to {grid}x{grid} {how} antialiasing" in line) == resampled
        registers = OTHERS[kind][2].get("num_register_tokens", 0)
        told = {"patch_size": 4, "embed_dim": 16, "depth": 2, "registers": registers}
        told |= {"positions": "rotary" if kind == "dinov3" else "learned"}
        told |= {"mlp_ratio": {"vit": 2.5, "dinov3": 2.5, "dinov2": 3.0, "registers": 4.0}[kind]}
        eps = {"norm_eps": {"vit": 1e-12, "dinov3": 1e-5}.get(kind, 1e-6)}
        assert found.told == told | ({"num_heads": 2} | eps if name == "folder" else {}) and found.assumed == eps


@pytest.mark.parametrize("biased", [True, False])
def test_dinov3_under_the_names_of_timm(tmp_path, biased):
    """Biases of q and v by themselves or none at all, no periods; other rotary ViTs of timm have fewer registers."""
    other, images = oracle("dinov3"), torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    state = original(other.state_dict(), "dinov3")
    for name in ("mask_token", "rope_embed.periods", *(f"blocks.{i}.attn.qkv.bias_mask" for i in range(2))):
        del state[name]
    state["reg_token"] = state.pop("storage_tokens")
    for i in range(2):
        for k in (1, 2):
            state[f"blocks.{i}.gamma_{k}"] = state.pop(f"blocks.{i}.ls{k}.gamma")
        q, _, v = state.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        if biased:
            state |= {f"blocks.{i}.attn.q_bias": q, f"blocks.{i}.attn.v_bias": v}
        else:
            with torch.no_grad():
                q.zero_(), v.zero_()
                for x in "qv":
                    getattr(other.model.layer[i].attention, f"{x}_proj").bias.zero_()
    with torch.no_grad():
        expected = other(images).last_hidden_state
    torch.save(state, tmp_path / "w.pth")
    model, found, _ = from_file(tmp_path / "w.pth", (12, 16))
    assert found.told["positions"] == "rotary" and found.assumed == {"norm_eps": 1e-5}
    with torch.no_grad():
        features = model.forward_features(images, None, class_token_only=False)[:, 0]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    torch.save(state | {"reg_token": state["reg_token"][:, :1]}, tmp_path / "w.pth")
    assert "positions" not in read_pretrained(str(tmp_path / "w.pth")).told
    dinov2 = {re.sub(r"gamma_(.)", r"ls\1.gamma", name): tensor for name, tensor in state.items()}  # but for pos_embed
    torch.save(dinov2, tmp_path / "w.pth")
    assert "positions" not in read_pretrained(str(tmp_path / "w.pth")).told
    if biased:
        torch.save(state | {"blocks.1.attn.q_bias": torch.ones(3)}, tmp_path / "w.pth")
        problem = "blocks.1.attn.q_bias has the shape [3]; expected [16]"
        assert message(read_pretrained, str(tmp_path / "w.pth")).endswith(problem)


@pytest.mark.parametrize("kind, naming", [("dinov2", "dinov2"), ("registers", "dinov2"), ("dinov3", "dinov3")])
def test_features_under_the_original_names(tmp_path, kind, naming):
    """The same at the native grid; layer scale is folded, DINOv3's masked bias of k is none whatever it holds, and its
    periods say the number of heads. In chunks of blocks, as DINOv2's training has them, too."""
    other, images = oracle(kind), torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = other(images).last_hidden_state
    state = original(other.state_dict(), naming)
    for content in (state, {"teacher": prefixed("backbone.", chunked(state))}):
        torch.save(content, tmp_path / "w.pth")
        model, found, _ = from_file(tmp_path / "w.pth", 12)
        assert found.told.get("num_heads") == (2 if kind == "dinov3" else None)
        with torch.no_grad():
            features = model.forward_features(images, None, class_token_only=False)[:, 0]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dinov2", "registers"])
def test_features_under_timms_names(tmp_path, kind):
    """timm has the class token's position in the token where there are registers; the same at the native grid."""
    other, images = oracle(kind), torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.save(original(other.state_dict(), "timm"), tmp_path / "w.pth")
    model, found, _ = from_file(tmp_path / "w.pth", 12)
    assert (found.antialias, found.offset, found.told["registers"]) == (True, 0.0, 3 if kind == "registers" else 0)
    with torch.no_grad():
        features = model.forward_features(images, None, class_token_only=False)[:, 0]
        torch.testing.assert_close(features, other(images).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_logits_of_a_classifier_as_transformers_saves_it(tmp_path):
    """Its head stands beside the ViT's prefix; the pooler of ViTModel is ignored."""
    other = oracle("vit")
    config = transformers.ViTConfig(**other.config.to_diff_dict() | {"num_labels": 3})
    with keyed_rng("classifier"):
        classifier = transformers.ViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    model, _, line = from_file(tmp_path / "classifier", 12)
    assert line.endswith("model.safetensors: 32 tensors loaded")
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), classifier(images).logits, rtol=1e-4, atol=1e-4)
    (tmp_path / "classifier" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": 1}')
    lines = load_weights(model, str(tmp_path / "classifier"), {"data": {"mean": [0.1, 0.5, 0.5], "std": [1.0] * 3}})
    expected = "warning: data.mean: [0.1, 0.5, 0.5], the weights were trained with [0.5, 0.5, 0.5]"
    assert lines.splitlines()[1:] == [expected]
    (tmp_path / "timm").mkdir()  # as timm's models lie on the hub
    torch.save(tiny().state_dict(), tmp_path / "timm" / "pytorch_model.bin")
    for told, warned in ({"mean": [0.1, 0.5, 0.5], "std": [1.0] * 3}, 0), ({"mean": [0.5] * 3, "std": [1.0] * 3}, 1):
        (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": told}))
        lines = load_weights(tiny(), str(tmp_path / "timm"), {"data": {"mean": [0.1, 0.5, 0.5], "std": [1.0] * 3}})
        assert lines.splitlines()[1:] == [expected] * warned
    other.save_pretrained(tmp_path / "vit")
    line = from_file(tmp_path / "vit", 12)[2]
    assert line.endswith("2 left fresh (head.weight, head.bias), 2 ignored (pooler.dense.bias, pooler.dense.weight)")


@pytest.mark.parametrize(
    "change, expected",
    [
        ("{", "config.json beside it cannot be read as JSON"),
        ({"hidden_act": "quick_gelu"}, "config.json beside it says hidden_act: quick_gelu; this ViT has gelu"),
        (
            {"architecture": "vit_small_patch16_rope_ape_224"},
            "config.json beside it says vit_small_patch16_rope_ape_224: rotary positions of another kind than "
            "DINOv3's, which this ViT has not",
        ),
        ({"rope_theta": 10}, "config.json beside it says rope_theta: 10; this ViT has 100"),
    ],
)
def test_a_config_json_that_does_not_fit(tmp_path, change, expected):
    """One line; that of another width, or values of other types, say nothing."""
    oracle("vit").save_pretrained(tmp_path)
    text = change if isinstance(change, str) else json.dumps({"hidden_size": 16} | change)
    (tmp_path / "config.json").write_text(text)
    text = message(read_pretrained, str(tmp_path))
    assert text == f"{tmp_path / 'model.safetensors'}: model.checkpoint_path: {expected}"
    for content in ([], {"hidden_size": 32, "hidden_act": "relu"}, {"hidden_size": 16, "num_attention_heads": "2"}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert "num_heads" not in read_pretrained(str(tmp_path)).told


def test_the_original_dinov2_resamples_to_a_slightly_larger_grid(tmp_path):
    """As its hub loads it: no antialiasing, the scale of a grid of 0.1 patches more, (w + 0.1) / M. The key
    pos_embed_antialias overrules what the publisher does."""
    state = original(oracle("dinov2").state_dict(), "dinov2")
    torch.save(state, tmp_path / "w.pth")
    image = state["pos_embed"][:, 1:].reshape(1, 3, 3, 16).permute(0, 3, 1, 2)
    for asked, options in (
        ("auto", {"scale_factor": (5.1 / 3, 5.1 / 3), "antialias": False}),
        ("true", {"size": 5, "antialias": True}),
        ("false", {"size": 5, "antialias": False}),
    ):
        model, _, line = from_file(tmp_path / "w.pth", 20, pos_embed_antialias=asked)
        expected = F.interpolate(image, mode="bicubic", **options).flatten(2).transpose(1, 2)
        torch.testing.assert_close(model.pos_embed[:, 1:], expected, rtol=1e-5, atol=1e-6)
        how = {"auto": "without antialiasing, offset 0.1", "true": "with antialiasing"}.get(
            asked, "without antialiasing"
        )
        assert f"pos_embed resampled from 3x3 to 5x5 {how}, 2 left" in line


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


NO_DICT = "should hold a state dict of a ViT, name -> tensor, by itself or under a key"
TORCHVISION = ("class_token", "conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight", "x")
NAMES = "its names are neither timm's nor transformers'"
PATCH, PATCH_SHAPE = "patch_embed.proj.weight", "expected [width, channels, patch, patch]"


@pytest.mark.parametrize(
    "change, expected",
    [
        (drop("norm.bias", "cls_token"), "has no cls_token (2 missing, 0 unknown tensors)"),
        (add("norm_pre.bias", "x\ny"), "has norm_pre.bias, which this ViT has not (0 missing, 2 unknown tensors)"),
        (lambda w: add("ln.bias")(drop("norm.bias")(w)), "has no norm.bias (1 missing, 1 unknown tensors)"),
        (drop("blocks.1.attn.qkv.bias"), "has no blocks.1.attn.qkv.bias (1 missing, 0 unknown tensors)"),
        (lambda w: {}, NO_DICT),
        (lambda w: add(*TORCHVISION)({}), f"has no {PATCH}: {NAMES} ({', '.join(TORCHVISION[:3])}, …)"),
        (lambda w: {"model": 3}, NO_DICT),
        (lambda w: [w], NO_DICT),
        (
            lambda w: {"a": w, "b\n": {"c": dict(w)}},
            "holds 2 ViTs, under a, b?.c; save the one to start from by itself",
        ),
        (put("norm.bias", lambda w: w.to_sparse()), "norm.bias is not a dense tensor"),
        (put("norm.bias", lambda w: w.to("meta")), "norm.bias is not a dense tensor"),
        (lambda w: w | {"blocks.0.ls1.gamma": torch.ones(3)}, "blocks.0.ls1.gamma has the shape [3]; expected [16]"),
        (
            lambda w: w | {"blocks.7.gamma_2": torch.ones(16)},
            "has blocks.7.ls2.gamma without a layer blocks.7.mlp.fc2 that it fits",
        ),
        (add("reg_token"), "reg_token has the shape [2]; expected [1, registers, width]"),
        (drop("pos_embed"), "has no pos_embed (1 missing, 0 unknown tensors)"),
        (
            lambda w: drop("pos_embed")(w) | {"rope_embed.periods": torch.tensor([1.0, 2.0])},
            "rope_embed.periods are not DINOv3's, 100^(4i / (D/H))",
        ),
        (
            lambda w: prefixed("module.base_encoder.", w) | prefixed("module.momentum_encoder.", w),
            "holds 2 ViTs (module.base_encoder., module.momentum_encoder.); save the one to start from by itself",
        ),
        (
            lambda w: {name.replace("blocks", "layers.0.blocks"): tensor for name, tensor in w.items()},
            "has no blocks.0.attn.qkv.weight: no block of it fits this ViT",
        ),
        (
            put(PATCH, lambda w: w[:, :1]),
            f"{PATCH} has the shape [16, 1, 4, 4], the configured model's is [16, 3, 4, 4]",
        ),
        (put(PATCH, lambda w: w[..., :2]), f"{PATCH} has the shape [16, 3, 4, 2]; {PATCH_SHAPE}"),
        (put(PATCH, lambda w: w[:0]), f"{PATCH} has the shape [0, 3, 4, 4]; {PATCH_SHAPE}"),
        (
            lambda w: put("norm.weight", lambda x: x[:5])(put("norm.bias", lambda x: x / 0)(w)),
            "norm.weight has the shape [5], the configured model's is [16]",
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


def test_a_checkpoint_of_this_repo_has_its_biases(tmp_path):
    """In other people's files none of qkv in any block means 0."""
    weights = {name: x for name, x in changed(tiny()).items() if not name.endswith("qkv.bias")}
    ours = {"step": 1, "model": weights, "optimizer": {}, "config": {}, "classes": []}
    assert refuses(tmp_path, ours) == "has no blocks.0.attn.qkv.bias (2 missing, 0 unknown tensors)"
    model = tiny()
    assert loads(tmp_path, weights, model)[0] == "32 tensors loaded" and not model.blocks[1].attn.qkv.bias.any()


@pytest.mark.parametrize(
    "name, what",
    [
        ("dist_token", "a distillation token"),
        ("head_dist.weight", "a distillation token"),
        ("fc_norm.weight", "a norm after pooling over the patches (MAE's fine-tuned and timm's global-pool models)"),
        ("pre_logits.fc.weight", "a layer between norm and head"),
        ("blocks.0.lambda_1", "layer scale of BEiT"),
        ("embeddings.distillation_token", "a distillation token"),
        ("blocks.0.attn.q_norm.weight", "norms of queries and keys"),
        ("rel_pos_bias.relative_position_bias_table", "relative position biases"),
        ("blocks.0.attn.relative_position_bias_table", "relative position biases"),
        ("blocks.0.attn.rel_pos_h", "relative position biases"),
        ("rope.freqs", "rotary positions of another kind than DINOv3's"),
        ("blocks.0.mlp.w12.weight", "a gated MLP (SwiGLU)"),
        ("blocks.0.mlp.fc1_g.weight", "a gated MLP (SwiGLU)"),
        ("layer.0.mlp.gate_proj.weight", "a gated MLP (SwiGLU)"),
        ("encoder.layer.0.mlp.weights_in.weight", "a gated MLP (SwiGLU)"),
    ],
)
def test_other_kinds_of_vit_are_refused_by_name(tmp_path, name, what):
    """Before anything else: also where norm or biases are missing for it, under a prefix too."""
    weights = drop("norm.weight", "norm.bias", "blocks.0.attn.qkv.bias")(changed(tiny()))
    for prefix in ("", "backbone."):
        content = prefixed(prefix, weights | {name: torch.zeros(1)})
        ours = re.sub(r"^(embeddings\.|(encoder\.)?layer\.)", lambda m: "blocks." if "layer" in m[0] else "", name)
        assert refuses(tmp_path, content) == f"has {ours}: {what}, which this ViT has not"


HEADS = " (and model.num_heads: no tensor tells it; most ViTs have embed_dim / 64)"


@pytest.mark.parametrize(
    "theirs, keys",
    [
        ({"patch_size": 2}, "model.patch_size=2"),
        ({"depth": 3}, "model.depth=3"),
        ({"mlp_ratio": 3.0}, "model.mlp_ratio=3.0"),
        ({"patch_size": 8, "depth": 12}, "model.patch_size=8 model.depth=12"),
        ({"registers": 3}, "model.registers=3"),
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
