"""The ViT against transformers', against a naive reference, and against itself pass by pass."""

import pytest
import torch
import torch.nn.functional as F

from grpo import classification_policy_adapter, keyed_rng
from vit_model import VisionTransformer

SITES = ("attn.proj_drop", "mlp.drop1", "mlp.drop2")


def make_model(dtype: torch.dtype = torch.float64, **options) -> VisionTransformer:
    """A small ViT, all of whose parameters are random and large enough to matter."""
    sizes = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 3.0}
    with keyed_rng("weights"), torch.no_grad():
        model = VisionTransformer(**(sizes | {"dropout": 0.3, "num_classes": 5} | options))
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model.to(dtype)


def make_inputs(model: VisionTransformer, B: int, T: int, image_size: int = 8):
    """Images [B, 3, h, w] and the masks of T passes."""
    with keyed_rng("inputs"):
        return torch.randn(B, 3, image_size, image_size, dtype=model.head.weight.dtype), model.sample_masks(B, T)


def gradients(model: VisionTransformer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))


def naive_vit(model: VisionTransformer, images, masks, num_heads: int):
    """The same ViT pass by pass, head by head, every token in every block: logits [B, T, K]."""
    w = dict(model.named_parameters())
    dim = model.cls_token.shape[-1]
    depth, patch_size, head_dim = len(model.blocks), w["patch_embed.proj.weight"].shape[-1], dim // num_heads

    def norm(x, name):
        variance = x.var(-1, correction=0, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)  # [B, P, C * p * p]
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
        passes.append(linear(norm(x, "norm")[:, 0], "head"))
    return torch.stack(passes, 1)


def timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of transformers' ViTForImageClassification under timm's names."""
    renamed = {
        "cls_token": state["vit.embeddings.cls_token"],
        "pos_embed": state["vit.embeddings.position_embeddings"],
    }
    modules = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    for i in range(sum(name.endswith("q_proj.weight") for name in state)):
        parts = {"norm1": "layernorm_before", "attn.proj": "attention.o_proj", "norm2": "layernorm_after"}
        for new, old in (parts | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
            modules[f"blocks.{i}.{new}"] = f"vit.layers.{i}.{old}"
        for kind in ("weight", "bias"):
            qkv = [state[f"vit.layers.{i}.attention.{x}_proj.{kind}"] for x in "qkv"]
            renamed[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    return renamed | {f"{n}.{kind}": state[f"{o}.{kind}"] for n, o in modules.items() for kind in ("weight", "bias")}


# --- Other implementations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image_size, patch_size, in_channels, embed_dim, depth, num_heads, hidden, num_classes",
    [(8, 4, 3, 12, 1, 1, 24, 2), (32, 8, 3, 48, 3, 4, 96, 10), (28, 7, 1, 24, 2, 3, 120, 7)],
)
def test_logits_are_those_of_transformers(
    image_size, patch_size, in_channels, embed_dim, depth, num_heads, hidden, num_classes
):
    """With the same random weights, ViTForImageClassification gives the same logits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=embed_dim,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        intermediate_size=hidden,
        image_size=image_size,
        patch_size=patch_size,
        num_channels=in_channels,
        num_labels=num_classes,
        layer_norm_eps=1e-6,
    )
    with keyed_rng("transformers", depth):
        other = transformers.ViTForImageClassification(config).eval()
        for p in other.parameters():
            p.data.add_(0.1 * torch.randn(p.shape))
        images = torch.randn(3, in_channels, image_size, image_size)
    model = VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        in_channels=in_channels,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=hidden / embed_dim,
        num_classes=num_classes,
    )
    model.load_state_dict(timm_names(other.state_dict()))
    with torch.no_grad():
        expected, logits = other(images).logits, model(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_parameter_names_and_shapes_are_timms():
    """The state dict of a one-block ViT has timm's names in timm's shapes, and nothing else."""
    model = VisionTransformer(8, 4, 3, embed_dim=16, depth=1, num_heads=2, mlp_ratio=3.0, num_classes=5)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "cls_token": (1, 1, 16),
        "pos_embed": (1, 5, 16),
        "patch_embed.proj.weight": (16, 3, 4, 4),
        "patch_embed.proj.bias": (16,),
        "blocks.0.norm1.weight": (16,),
        "blocks.0.norm1.bias": (16,),
        "blocks.0.attn.qkv.weight": (48, 16),
        "blocks.0.attn.qkv.bias": (48,),
        "blocks.0.attn.proj.weight": (16, 16),
        "blocks.0.attn.proj.bias": (16,),
        "blocks.0.norm2.weight": (16,),
        "blocks.0.norm2.bias": (16,),
        "blocks.0.mlp.fc1.weight": (48, 16),
        "blocks.0.mlp.fc1.bias": (48,),
        "blocks.0.mlp.fc2.weight": (16, 48),
        "blocks.0.mlp.fc2.bias": (16,),
        "norm.weight": (16,),
        "norm.bias": (16,),
        "head.weight": (5, 16),
        "head.bias": (5,),
    }


@pytest.mark.parametrize("dropout_blocks", [None, 3, 2, 1])
def test_masked_vit_equals_a_naive_one(dropout_blocks):
    """Pass by pass, head by head, all tokens to the end: same logits, same gradients. So the last block's shortcut
    (the class token alone asks) and the shared trunk are exact."""
    model = make_model(dropout_blocks=dropout_blocks)
    images, masks = make_inputs(model, B=3, T=4)
    expected = naive_vit(model, images, masks, num_heads=2)
    logits = model(images, masks)
    assert logits.shape == (3, 4, 5)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 2, 60, dtype=torch.float64).view(3, 4, 5)
    expected = gradients(model, (expected * weight).sum())
    for name, gradient in gradients(model, (logits * weight).sum()).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11, msg=name)


def test_features_of_all_tokens_begin_with_the_class_token():
    """The other use of the trunk computes every token; its class token is what the classifier sees."""
    model = make_model()
    images, masks = make_inputs(model, B=2, T=3)
    tokens = model.forward_features(images, masks, class_token_only=False)
    alone = model.forward_features(images, masks, class_token_only=True)
    assert tokens.shape == (2, 3, 5, 16) and alone.shape == (2, 3, 1, 16)
    torch.testing.assert_close(tokens[:, :, :1], alone, rtol=1e-12, atol=1e-12)
    assert (tokens[:, :, 1:] - alone).abs().amin((0, 1, 3)).min() > 0


# --- Masks ----------------------------------------------------------------------------------------------------------


def test_masks_have_one_row_for_all_tokens_and_two_values():
    """[B, T, 1, width] for each site, in forward order; values 0 and 1 / (1 - p), both of them present."""
    model = make_model(dropout=0.2, embed_dim=32)
    masks = model.sample_masks(3, 4)
    widths = {"attn.proj_drop": 32, "mlp.drop1": 96, "mlp.drop2": 32}
    expected = {"pos_drop": 32} | {f"blocks.{i}.{site}": width for i in range(3) for site, width in widths.items()}
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


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
def test_keep_rate(dropout):
    """A share 1 - p of the entries is kept (within 5 standard errors), so the mean of a mask is 1."""
    model = make_model(dropout=dropout)
    with keyed_rng("rate"):
        masks = model.sample_masks(50, 40)
    for name, mask in masks.items():
        kept = (mask != 0).double()
        assert abs(kept.mean() - (1 - dropout)) <= 5 * (dropout * (1 - dropout) / mask.numel()) ** 0.5, name
        assert abs(mask.mean() - 1) <= 5 * (dropout / (1 - dropout) / mask.numel()) ** 0.5 + 1e-12, name


# --- Passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_blocks", [None, 2])
def test_passes_together_equal_passes_apart_in_value_and_gradient(dropout_blocks):
    """T passes at once are T calls with one pass's masks each, and so is the gradient of everything, the shared trunk
    included."""
    model = make_model(dropout_blocks=dropout_blocks)
    images, masks = make_inputs(model, B=3, T=4)
    weight = torch.linspace(-1, 2, 60, dtype=torch.float64).view(3, 4, 5)
    together = model(images, masks)
    apart = [model(images, {name: mask[:, t : t + 1] for name, mask in masks.items()}) for t in range(4)]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=1e-12, atol=1e-12)
    assert (together[:, 1:] - together[:, :1]).abs().amin() > 0
    expected = gradients(model, sum((x * weight[:, t : t + 1]).sum() for t, x in enumerate(apart)))
    for name, gradient in gradients(model, (together * weight).sum()).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11, msg=name)
        assert gradient.abs().max() > 0, name


def test_images_do_not_see_each_other():
    """A batch equals its images one by one under their own masks."""
    model = make_model()
    images, masks = make_inputs(model, B=4, T=2)
    alone = [model(images[i : i + 1], {name: mask[i : i + 1] for name, mask in masks.items()}) for i in range(4)]
    torch.testing.assert_close(model(images, masks), torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_without_masks_is_all_ones_masks():
    """model(images) is the network whose masks keep everything: dropout 0 draws those."""
    model = make_model()
    images, masks = make_inputs(model, B=3, T=2)
    ones = {name: torch.ones_like(mask) for name, mask in masks.items()}
    logits = model(images)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(model(images, ones), logits[:, None].expand(3, 2, 5), rtol=1e-12, atol=1e-12)
    assert all((mask == 1).all() for mask in make_model(dropout=0.0).sample_masks(3, 2).values())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_dropout_blocks_puts_sites_in_the_last_blocks_only(k):
    """k of 3 blocks: their three sites, nothing after the position embedding; None: everywhere."""
    assert list(make_model(dropout_blocks=k).sites) == [f"blocks.{i}.{site}" for i in range(3 - k, 3) for site in SITES]
    everywhere = ["pos_drop", *(f"blocks.{i}.{site}" for i in range(3) for site in SITES)]
    assert list(make_model().sites) == everywhere


@pytest.mark.parametrize(
    "dropout_blocks, attention, mlp",
    [(None, [28, 28, 28, 28], [28, 28, 28, 28]), (2, [7, 7, 7, 28], [7, 7, 28, 28]), (1, [7] * 4, [7, 7, 7, 28])],
)
def test_what_precedes_the_first_stochastic_site_runs_once_per_image(dropout_blocks, attention, mlp):
    """B = 7, T = 4: 7 rows of tokens up to the first mask, 28 from there; one token a row in the last block's MLP."""
    model = make_model(depth=4, dropout_blocks=dropout_blocks)
    images, masks = make_inputs(model, B=7, T=4)
    rows, tokens = {"attn": [], "mlp": []}, {"attn": [], "mlp": []}
    for block in model.blocks:
        for name, module in (("attn", block.attn), ("mlp", block.mlp.fc1)):

            def count(_module, args, name=name):
                rows[name].append(args[0].shape[0] * args[0].shape[1])
                tokens[name].append(args[0].shape[2])

            module.register_forward_pre_hook(count)
    model(images, masks)
    assert rows == {"attn": attention, "mlp": mlp}
    assert tokens == {"attn": [5, 5, 5, 5], "mlp": [5, 5, 5, 1]}


def test_train_and_eval_make_no_difference():
    """The masks alone are random: bit for bit the same logits in both modes, and no draw from torch's generator."""
    model = make_model()
    images, masks = make_inputs(model, B=2, T=3)
    state = torch.get_rng_state()
    for arguments in ((images,), (images, masks)):
        assert model.train()(*arguments).equal(model.eval()(*arguments))
    assert torch.get_rng_state().equal(state)


# --- Constructor, compile, bfloat16 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 10}, "image_size 10 is not a multiple of patch_size 4"),
        ({"num_heads": 3}, "embed_dim 16 is not a multiple of num_heads 3"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"dropout_blocks": 0}, "dropout_blocks 0"),
        ({"dropout_blocks": 4}, "dropout_blocks 4 is not between 1 and depth 3"),
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
    try:
        for arguments in ((images,), (images, masks)):
            expected, logits = model(*arguments), compiled(*arguments)
            tolerance = 1e-5 if autocast_dtype is None else 2e-2
            torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
            assert logits.dtype == expected.dtype
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


def test_a_dense_head_reads_each_patch_token():
    """[B, P, C], patches row by row, and [B, T, P, C] under masks; one token's output is the head on that token."""
    options = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "dropout": 0.3}
    torch.manual_seed(0)
    model = VisionTransformer(**options, num_classes=5, dense=True)
    images, masks = torch.randn(3, 3, 8, 8), model.sample_masks(3, 2)
    tokens = model.forward_features(images, masks, class_token_only=False)  # [B, T, L, D]
    expected = tokens[:, :, 1:] @ model.head.weight.T + model.head.bias
    assert model(images, masks).shape == (3, 2, 4, 5) and model(images).shape == (3, 4, 5)
    torch.testing.assert_close(model(images, masks), expected)
    classifier = VisionTransformer(**options, num_classes=5)
    classifier.load_state_dict(model.state_dict())
    torch.testing.assert_close(classifier(images, masks), tokens[:, :, 0] @ model.head.weight.T + model.head.bias)


def test_patches_are_in_row_major_order():
    """A bright patch changes the output of its own token most (attention of an untrained block mixes little)."""
    model = VisionTransformer(image_size=12, patch_size=4, embed_dim=8, depth=1, num_heads=1, num_classes=2, dense=True)
    with torch.no_grad():
        model.pos_embed.zero_()
    images = torch.zeros(1, 3, 12, 12)
    dark = model(images)
    images[:, :, 4:8, 8:12] = 5.0  # row 1, column 2
    changed = (model(images) - dark).norm(dim=-1)[0]
    assert changed.argmax() == 1 * 3 + 2


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
