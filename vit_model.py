"""Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929) as a pure function of weights, images
and dropout masks. Parameter names and numerics are those of timm's `VisionTransformer`.

`model(images)` is the deterministic network. `model(images, masks)` makes T Monte Carlo Dropout passes per image (Gal &
Ghahramani 2016, https://arxiv.org/abs/1506.02142): a pass is one set of masks, shared by all tokens, so it is one
sampled function. Nothing depends on `model.train()` or `model.eval()`.

Shapes: B images, T passes, L tokens (class token first), D = embed_dim, H = num_heads. The activations are
[B, T, L, D] with T = 1 until the first mask is met; from there broadcasting repeats them, so that what lies before
the first stochastic site is computed once per image whatever T is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Masks = dict[str, Tensor]  # name of the stochastic site -> [B, T, 1, width], values 0 or 1 / (1 - dropout)


def apply_mask(x: Tensor, masks: Masks | None, site: str) -> Tensor:
    """x: [B, 1 or T, L, width] -> [B, T, L, width] if `masks` has a mask for `site`, else x itself."""
    mask = None if masks is None else masks.get(site)
    return x if mask is None else x * mask.to(x.dtype)  # the cast keeps bfloat16 activations in bfloat16


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, C, h, w] -> [B, D, h/p, w/p] -> [B, P, D]


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_queries: int) -> Tensor:
        """x: [B, T, L, D] -> [B, T, num_queries, D]; only the first `num_queries` tokens ask, all tokens answer."""
        B, T, L, D = x.shape
        qkv = self.qkv(x).view(B * T, L, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [BT, H, L, D/H]
        x = F.scaled_dot_product_attention(q[:, :, :num_queries], k, v)  # [BT, H, num_queries, D/H]
        return self.proj(x.transpose(1, 2).reshape(B, T, num_queries, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)


class Block(nn.Module):
    """Pre-norm encoder block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, name: str, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.name = name  # "blocks.3": the sites' masks are found under it
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def sites(self) -> dict[str, int]:
        """The block's stochastic sites, name -> width."""
        dim, hidden = self.mlp.fc1.in_features, self.mlp.fc1.out_features
        return {
            f"{self.name}.attn.proj_drop": dim,
            f"{self.name}.mlp.drop1": hidden,
            f"{self.name}.mlp.drop2": dim,
        }

    def forward(self, x: Tensor, masks: Masks | None, num_queries: int) -> Tensor:
        """x: [B, 1 or T, L, D] -> [B, T, num_queries, D]."""
        attended = self.attn(self.norm1(x), num_queries)
        x = x[:, :, :num_queries] + apply_mask(attended, masks, f"{self.name}.attn.proj_drop")
        hidden = apply_mask(F.gelu(self.mlp.fc1(self.norm2(x))), masks, f"{self.name}.mlp.drop1")  # exact GELU
        return x + apply_mask(self.mlp.fc2(hidden), masks, f"{self.name}.mlp.drop2")


class VisionTransformer(nn.Module):
    """A ViT classifier whose dropout masks are an argument.

    image_size: height and width of the square input, a multiple of patch_size.
    dense: the head reads each patch token (for masks and boxes) instead of the class token.
    dropout: probability of a zero in a mask. dropout_blocks: k puts dropout in the last k encoder blocks only, None
    everywhere (after the position embedding too).
    activation_checkpointing: keep of each block its input alone, and compute the rest again in the backward pass.
    autocast_dtype: torch.bfloat16 runs the forward pass under autocast (weights stay as they are), None does not.
    Raises ValueError where sizes do not fit together.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        dropout_blocks: int | None = None,
        num_classes: int = 1000,
        dense: bool = False,
        activation_checkpointing: bool = False,
        autocast_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} is not in [0, 1)")
        if dropout_blocks is not None and not 1 <= dropout_blocks <= depth:
            raise ValueError(f"dropout_blocks {dropout_blocks} is not between 1 and depth {depth}")
        self.dropout = dropout
        self.dense = dense
        self.activation_checkpointing = activation_checkpointing
        self.autocast_dtype = autocast_dtype

        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, embed_dim))  # [1, L, D]
        self.blocks = nn.ModuleList(Block(f"blocks.{i}", embed_dim, num_heads, mlp_ratio) for i in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

        self.sites = {"pos_drop": embed_dim} if dropout_blocks is None else {}  # name -> width, in forward order
        for block in self.blocks[depth - (depth if dropout_blocks is None else dropout_blocks) :]:
            self.sites |= block.sites()

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def sample_masks(self, batch_size: int, num_samples: int) -> Masks:
        """Draw the masks of T passes over B images from torch's global generator: name -> [B, T, 1, width]."""
        keep = 1.0 - self.dropout
        weight = self.head.weight
        shape = (batch_size, num_samples, 1, sum(self.sites.values()))
        # twice as fast on the CPU as bernoulli_, which is serial there
        flat = torch.rand(shape, dtype=weight.dtype, device=weight.device).lt_(keep).div_(keep)
        return dict(zip(self.sites, flat.split(list(self.sites.values()), dim=-1)))

    def forward_features(self, images: Tensor, masks: Masks | None, class_token_only: bool) -> Tensor:
        """images: [B, C, h, w] -> the normalised tokens [B, T, L or 1, D] (T = 1 without masks).

        With `class_token_only` the last block computes no other token: none of them reaches the classifier.
        """
        x = self.patch_embed(images)  # [B, P, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # [B, L, D]
        x = apply_mask(x.unsqueeze(1), masks, "pos_drop")  # [B, 1 or T, L, D]
        for block in self.blocks:
            last = block is self.blocks[-1]
            num_queries = 1 if last and class_token_only else x.shape[2]
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, masks, num_queries, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, masks, num_queries)
        return self.norm(x)

    def forward(self, images: Tensor, masks: Masks | None = None) -> Tensor:
        """images: [B, C, h, w] -> logits [B, num_classes], or [B, T, num_classes] under masks of T passes; with `dense`
        [B, P, num_classes] or [B, T, P, num_classes], patches row by row."""
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            x = self.forward_features(images, masks, class_token_only=not self.dense)  # [B, 1 or T, 1 or L, D]
            logits = self.head(x[:, :, 1:] if self.dense else x[:, :, 0])  # [B, 1 or T, (P,) num_classes]
        return logits[:, 0] if masks is None else logits
