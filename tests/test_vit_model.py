"""The ViT against transformers', against a naive reference, and against itself."""

import pytest
import torch
import torch.nn.functional as F
from conftest import timm_names

from grpo import classification_policy_adapter, keyed_rng
from vit_model import VisionTransformer


def make_model(dtype: torch.dtype = torch.float64, **options) -> VisionTransformer:
    """A small ViT, all of whose parameters are random and large enough to matter."""
    sizes = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 3.0}
    with keyed_rng("weights"), torch.no_grad():
        model = VisionTransformer(**(sizes | {"dropout": 0.3, "num_classes": 5} | options))
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model.to(dtype)


def make_inputs(model: VisionTransformer, B: int, T: int):
    """Images [B, 3, 8, 8] and the masks of T passes."""
    with keyed_rng("inputs"):
        return torch.randn(B, 3, 8, 8, dtype=model.head.weight.dtype), model.sample_masks(B, T)


def gradients(model: VisionTransformer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))


def naive_vit(model: VisionTransformer, images, masks, num_heads: int):
    """The same ViT pass by pass, head by head, every token in every block: the head on each token, [B, T, L, K]."""
    w = dict(model.named_parameters())
    dim = model.cls_token.shape[-1]
    depth, patch_size, head_dim = len(model.blocks), w["patch_embed.proj.weight"].shape[-1], dim // num_heads

    def norm(x, name):
        variance = x.var(-1, correction=0, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)  # [B, P, C * p * p], row by row
    embedded = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    passes = []
    for t in range(next(iter(masks.values())).shape[1]):

        def drop(x, site, t=t):
            return x * masks[site][:, t] if site in masks else x

        x = torch.cat([w["cls_token"].repeat(len(images), 1, 1), embedded], 1) + w["pos_embed"]
        x = drop(x, "pos_drop")
        for i in range(depth):
            q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(dim, -1)
            heads = []
            for part in (slice(h * head_dim, (h + 1) * head_dim) for h in range(num_heads)):
                scores = (q[..., part] @ k[..., part].transpose(1, 2) / head_dim**0.5).exp()
                heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., part])
            x = x + drop(linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj"), f"blocks.{i}.attn.proj_drop")
            hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
            hidden = drop(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"blocks.{i}.mlp.drop1")
            x = x + drop(linear(hidden, f"blocks.{i}.mlp.fc2"), f"blocks.{i}.mlp.drop2")
        passes.append(linear(drop(norm(x, "norm"), "head_drop"), "head"))
    return torch.stack(passes, 1)


# --- Other implementations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image_size, patch_size, num_channels, dim, depth, heads, hidden, labels",
    [
        (8, 4, 3, 12, 1, 1, 24, 2),
        (32, 8, 3, 48, 3, 4, 96, 10),
        (28, 7, 1, 24, 2, 3, 120, 7),
        (224, 16, 3, 384, 12, 6, 1536, 1000),  # ViT-S/16
    ],
)
def test_logits_are_those_of_transformers(image_size, patch_size, num_channels, dim, depth, heads, hidden, labels):
    """With the same random weights, biases and norms that matter, ViTForImageClassification gives the same logits."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": hidden}
    shape |= {"image_size": image_size, "patch_size": patch_size, "num_channels": num_channels, "num_labels": labels}
    with keyed_rng("transformers", depth), torch.no_grad():
        config = transformers.ViTConfig(**shape, layer_norm_eps=1e-6)
        other = transformers.ViTForImageClassification(config).eval()
        for p in other.parameters():
            p.add_(torch.randn(p.shape) * (0.1 if dim < 100 else 0.05))
        images = torch.randn(2, num_channels, image_size, image_size)
    sizes = image_size, patch_size, num_channels, dim, depth, heads, hidden / dim
    model = VisionTransformer(*sizes, num_classes=labels)
    model.load_state_dict(timm_names(other.state_dict()))
    with torch.no_grad():
        expected, logits = other(images).logits, model(images)
    assert expected.std() > 0.1
    tolerance = 1e-5 if dim < 100 else 1e-4
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


def test_parameter_names_and_shapes_are_timms():
    """Those of vit_small_patch16_224, written down from its definition: the 152 tensors and nothing else."""
    expected = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
    layers = {"patch_embed.proj": (384, 3, 16, 16), "norm": (384,), "head": (1000, 384)}
    for i in range(12):
        layers |= {f"blocks.{i}.norm1": (384,), f"blocks.{i}.norm2": (384,)}
        layers |= {f"blocks.{i}.attn.qkv": (1152, 384), f"blocks.{i}.attn.proj": (384, 384)}
        layers |= {f"blocks.{i}.mlp.fc1": (1536, 384), f"blocks.{i}.mlp.fc2": (384, 1536)}
    for layer, shape in layers.items():
        expected |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    assert {name: tuple(tensor.shape) for name, tensor in VisionTransformer().state_dict().items()} == expected
    assert len(expected) == 152


def test_parameter_names_of_registers_are_timms():
    """reg_token, as timm calls it; rotary positions have no parameter and are in no checkpoint."""
    plain = make_model().state_dict().keys()
    assert make_model(registers=4).state_dict().keys() == plain | {"reg_token"}
    assert make_model(registers=4, positions="rotary").state_dict().keys() == (plain | {"reg_token"}) - {"pos_embed"}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dropout_blocks", [None, 3, 2, 1, 0])
def test_masked_vit_equals_a_naive_one(dropout_blocks, dense):
    """Pass by pass, head by head, all tokens to the end: same logits, same gradients. So the last block's shortcut (the
    class token alone asks) and the shared trunk are exact, and a dense head reads each patch token, row by row."""
    model = make_model(dropout_blocks=dropout_blocks, dense=dense)
    images, masks = make_inputs(model, B=3, T=4)
    expected = naive_vit(model, images, masks, num_heads=2)
    expected = expected[:, :, 1:] if dense else expected[:, :, 0]
    logits = model(images, masks)
    assert logits.shape == ((3, 4, 4, 5) if dense else (3, 4, 5))
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert (logits[:, 1:] - logits[:, :1]).abs().amin() > 0
    weight = torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).view(logits.shape)
    expected = gradients(model, (expected * weight).sum())
    for name, gradient in gradients(model, (logits * weight).sum()).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11, msg=name)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("options", [{}, {"registers": 2}, {"registers": 4, "positions": "rotary", "num_heads": 4}])
def test_the_class_token_alone_is_its_row_among_all_tokens(options):
    """Values and gradients, though the last block computes no key and value for it, unless positions are rotary."""
    model = make_model(**options)
    images, masks = make_inputs(model, 3, 2)
    with keyed_rng("weights of the sum"):
        weights = torch.randn(3, 2, 16, dtype=torch.float64)
    found = [model.forward_features(images, masks, class_token_only=alone)[:, :, 0] for alone in (True, False)]
    assert torch.allclose(*found, rtol=0, atol=1e-12)
    used = [p for name, p in model.named_parameters() if not name.startswith("head")]
    for one, among in zip(*(torch.autograd.grad((x * weights).sum(), used) for x in found)):
        assert torch.allclose(one, among, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dense", [False, True])
def test_without_masks_is_all_ones_masks(dense):
    """model(images) is the network whose masks keep everything; dropout 0 draws those. The masks alone are random: bit
    for bit the same logits in train and eval mode, and no draw from torch's generator."""
    model = make_model(dense=dense)
    images, masks = make_inputs(model, B=3, T=2)
    state = torch.get_rng_state()
    for arguments in ((images,), (images, masks)):
        assert model.train()(*arguments).equal(model.eval()(*arguments))
    assert torch.get_rng_state().equal(state)
    ones, logits = make_model(dropout=0.0).sample_masks(3, 2), model(images)
    assert all((mask == 1).all() for mask in ones.values())
    assert logits.shape == ((3, 4, 5) if dense else (3, 5))
    torch.testing.assert_close(model(images, ones), torch.stack([logits] * 2, 1), rtol=1e-12, atol=1e-12)


# --- Masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_blocks", [None, 1, 2, 3])
def test_masks_have_one_row_for_all_tokens_and_two_values(dropout_blocks):
    """[B, T, 1, width] for each site of the last blocks, or of all and after the position embedding, in forward order;
    values 0 and 1 / (1 - p), both of them present."""
    model = make_model(dropout=0.2, embed_dim=32, dropout_blocks=dropout_blocks)
    assert list(make_model(dropout_blocks=0).sample_masks(3, 4)) == ["head_drop"]
    widths = {"attn.proj_drop": 32, "mlp.drop1": 96, "mlp.drop2": 32}
    blocks = range(3 - (dropout_blocks or 3), 3)
    expected = {f"blocks.{i}.{site}": width for i in blocks for site, width in widths.items()}
    expected = expected if dropout_blocks else {"pos_drop": 32} | expected
    masks = model.sample_masks(3, 4)
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        assert mask.shape == (3, 4, 1, expected[name]) and mask.dtype == torch.float64
        assert mask.unique().tolist() == [0, 1 / (1 - 0.2)], name


def test_masks_differ_over_images_passes_and_sites_and_follow_the_key():
    """Every (image, pass, site) draws for itself; the same key draws the same masks, another key others."""
    model = make_model(embed_dim=64)
    drawn = []
    for key in ("a", "a", "b"):
        with keyed_rng(key):
            drawn.append(model.sample_masks(3, 4))
    first, again, other = drawn
    assert all(first[name].equal(again[name]) for name in first)
    assert not any(first[name].equal(other[name]) for name in first)
    rows = torch.cat([mask.flatten(0, 2) for mask in first.values() if mask.shape[-1] == 64])  # [7 sites * B * T, 64]
    assert len(rows) == 7 * 12 and len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_keep_rate(dropout):
    """A share 1 - p of the entries is kept (within 5 standard errors), so the mean of a mask is 1."""
    model = make_model(dropout=dropout)
    with keyed_rng("rate"):
        masks = model.sample_masks(50, 40)
    for name, mask in masks.items():
        kept = (mask != 0).double()
        assert abs(kept.mean() - (1 - dropout)) <= 5 * (dropout * (1 - dropout) / mask.numel()) ** 0.5, name
        assert abs(mask.mean() - 1) <= 5 * (dropout / (1 - dropout) / mask.numel()) ** 0.5, name


@pytest.mark.parametrize(
    "dropout_blocks, attention, mlp",
    [
        (None, [28, 28, 28, 28], [28, 28, 28, 28]),
        (2, [7, 7, 7, 28], [7, 7, 28, 28]),
        (1, [7] * 4, [7, 7, 7, 28]),
        (0, [7] * 4, [7] * 4),
    ],
)
def test_what_precedes_the_first_stochastic_site_runs_once_per_image(dropout_blocks, attention, mlp):
    """B = 7, T = 4: 7 rows of tokens up to the first mask, 28 from there; one token a row in the last block's MLP."""
    model, seen = make_model(depth=4, dropout_blocks=dropout_blocks), {"attn": [], "mlp": []}
    images, masks = make_inputs(model, B=7, T=4)
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, arguments: seen["attn"].append(arguments[0].shape))
        block.mlp.fc1.register_forward_pre_hook(lambda _, arguments: seen["mlp"].append(arguments[0].shape))
    model(images, masks)
    assert {name: [B * T for B, T, *_ in shapes] for name, shapes in seen.items()} == {"attn": attention, "mlp": mlp}
    assert [shape[2] for shape in seen["attn"]] == [5, 5, 5, 5] and [shape[2] for shape in seen["mlp"]] == [5, 5, 5, 1]


KINDS = {
    "plain": {},
    "registers": {"registers": 3},
    "rotary": {"registers": 2, "positions": "rotary", "norm_eps": 1e-5},
    "rotary without registers": {"positions": "rotary"},
}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dropout_blocks", [None, 2, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_are_separate_calls_and_the_trunk_is_the_first_blocks(kind, dropout_blocks, dense):
    """For each kind: T passes equal T calls with one mask each, and B images B calls. Going on from the tokens that
    enter a block before the first mask is the whole network, bit for bit, with masks and without. Behind the last block
    they are those alone that the head reads."""
    model = make_model(dropout_blocks=dropout_blocks, dense=dense, **KINDS[kind])
    images, masks = make_inputs(model, B=3, T=4)
    logits = model(images, masks)
    for t in range(4):
        single = model(images, {site: mask[:, t : t + 1] for site, mask in masks.items()})
        torch.testing.assert_close(logits[:, t : t + 1], single, rtol=1e-12, atol=1e-12)
    single = model(images[1:2], {site: mask[1:2] for site, mask in masks.items()})
    torch.testing.assert_close(logits[1:2], single, rtol=1e-12, atol=1e-12)
    tokens = 5 + KINDS[kind].get("registers", 0)
    for end in range(1, 4 - dropout_blocks if dropout_blocks is not None else 1):
        kept = model.trunk(images, end)
        assert kept.shape == (3, (4 if dense else 1) if end == 3 else tokens, 16)
        assert model(kept, masks, start=end).equal(logits) and model(kept, start=end).equal(model(images))


# --- Constructor, compile, bfloat16, activation checkpointing ---------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 10}, "image_size 10 is not a multiple of patch_size 4"),
        ({"num_heads": 3}, "embed_dim 16 is not a multiple of num_heads 3"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"dropout_blocks": -1}, "dropout_blocks -1"),
        ({"dropout_blocks": 4}, "dropout_blocks 4 is not between 0 and depth 3"),
        ({"positions": "none"}, "positions 'none' is none of learned, rotary"),
        ({"positions": "rotary", "embed_dim": 12}, "embed_dim 12 / num_heads 2 is not a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
    """ValueError with the option and its value."""
    with pytest.raises(ValueError, match=message):
        make_model(**options)


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_compiles_without_a_graph_break(autocast_dtype):
    """torch.compile(fullgraph=True) takes both calls, forward and backward, and gives the same numbers."""
    model = make_model(torch.float32, depth=2, dropout_blocks=1, autocast_dtype=autocast_dtype)
    images, masks = make_inputs(model, B=2, T=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tolerance = 1e-5 if autocast_dtype is None else 2e-2
    try:
        for arguments in ((images,), (images, masks)):
            expected, logits = model(*arguments), compiled(*arguments)
            torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
            expected = gradients(model, expected.float().square().mean())
            for name, gradient in gradients(model, logits.float().square().mean()).items():
                assert (gradient - expected[name]).norm() <= 10 * tolerance * (expected[name].norm() + 1e-3), name
    finally:
        torch._dynamo.reset()


def test_bfloat16_autocast_is_close_and_leaves_weights_and_log_probs_in_float32():
    """Logits within bfloat16's 8 bits of float32's, weights, gradients and log_probs in float32."""
    exact = make_model(torch.float32, embed_dim=64)
    model = make_model(torch.float32, embed_dim=64, autocast_dtype=torch.bfloat16)
    images, masks = make_inputs(model, B=4, T=3)
    logits, expected = model(images, masks), exact(images, masks)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.03
    policy = classification_policy_adapter(logits)
    log_probs = policy.log_prob(torch.zeros(4, 3))
    assert policy.logits.dtype == log_probs.dtype == torch.float32
    log_probs.sum().backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dropout_blocks", [None, 1])
def test_activation_checkpointing_changes_memory_and_nothing_else(dropout_blocks):
    """The same outputs and gradients; what is kept for the backward pass is less by more than half."""
    outputs, grads, kept = [], [], []
    for checkpointing in (False, True):
        model = make_model(depth=4, dropout_blocks=dropout_blocks, activation_checkpointing=checkpointing)
        images, masks = make_inputs(model, 3, 2)
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(images, masks)
        outputs.append(output.detach())
        grads.append(gradients(model, output.square().sum()))
        kept.append(sum(sizes.values()))
    assert torch.equal(*outputs) and all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert kept[1] < 0.5 * kept[0]
