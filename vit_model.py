"""Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929) as a pure function of weights, images
and dropout masks. Parameter names and numerics are those of timm's `VisionTransformer`. With registers and rotary
positions it is DINOv2's and DINOv3's ViT, too (https://arxiv.org/abs/2304.07193, https://arxiv.org/abs/2508.10104).

`model(images)` is the deterministic network. `model(images, masks)` makes T Monte Carlo Dropout passes per image (Gal &
Ghahramani 2016, https://arxiv.org/abs/1506.02142): a pass is one set of masks, shared by all tokens, so it is one
sampled function. Nothing depends on `model.train()` or `model.eval()`.

Shapes: B images, T passes, L = 1 + R + P tokens (class token, registers, patches row by row), D = embed_dim,
H = num_heads. The activations are [B, T, L, D] with T = 1 until the first mask is met; from there broadcasting repeats
them, so that what lies before the first stochastic site is computed once per image whatever T is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Masks = dict[str, Tensor]  # name of the stochastic site -> [B, T, 1, width], values 0 or 1 / (1 - dropout)


def apply_mask(x: Tensor, masks: Masks | None, site: str) -> Tensor:
    """x: [B, 1 or T, L, width] -> [B, T, L, width] if `masks` has a mask for `site`, else x itself."""
    mask = None if masks is None else masks.get(site)
    return x if mask is None else x * mask.to(x.dtype)  # the cast keeps bfloat16 activations in bfloat16


def rotary_angles(height: int, width: int, head_dim: int) -> Tensor:
    """Cosine and sine of DINOv3's angles for a grid of height x width patches, [2, P, D/H]. Of the D/H numbers of a
    head the first quarter turns with y, the second with x, and the other half repeats them: the angles are
    2π · y · 100^(-4i / (D/H)), i = 0, 1, …; y and x are the middle of the patch, from -1 to 1 over the image."""
    y, x = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (height, width))
    frequencies = 100.0 ** (-torch.arange(head_dim // 4) / (head_dim / 4))
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(-1, 2, 1)  # [P, (y, x), 1]
    angles = (2 * math.pi * places * frequencies).flatten(1).tile(2)  # [P, 2, D/4H] -> [P, D/2H] -> [P, D/H]
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Queries or keys x [BT, H, L, D/H] with the patches' rotated by their positions (https://arxiv.org/abs/2104.09864);
    class token and registers have none. rotary: see `rotary_angles`."""
    cos, sin = rotary
    others, patches = x.split([x.shape[2] - len(cos), len(cos)], dim=2)
    first, second = patches.chunk(2, dim=-1)
    patches = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([others, patches.to(x.dtype)], dim=2)


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

    def forward(self, x: Tensor, num_queries: int, rotary: Tensor | None = None) -> Tensor:
        """x: [B, T, L, D] -> [B, T, num_queries, D]; only the first `num_queries` tokens ask, all tokens answer. Where
        one asks, qkv is not called, since no token needs a key or value: q·(W_k x + b_k) is (W_kᵀ q)·x and a constant,
        which the softmax drops, and Σ a·(W_v x + b_v) over the tokens is W_v Σ a·x + b_v."""
        B, T, L, D = x.shape
        H = self.num_heads
        if num_queries == 1 and rotary is None:
            (w_q, w_k, w_v), (b_q, _, b_v) = (p.unflatten(0, (3, H, -1)) for p in (self.qkv.weight, self.qkv.bias))
            q = torch.einsum("btd,hed->bthe", x[:, :, 0], w_q) + b_q  # [B, T, H, D/H]
            q = torch.einsum("bthe,hed->bthd", q, w_k)
            x = F.scaled_dot_product_attention(q, x, x, scale=(D // H) ** -0.5)  # [B, T, H, D]
            x = torch.einsum("bthd,hed->bthe", x, w_v) + b_v
        else:
            q, k, v = self.qkv(x).view(B * T, L, 3, H, D // H).permute(2, 0, 3, 1, 4)  # 3 x [BT, H, L, D/H]
            if rotary is not None:
                q, k = rotate(q, rotary), rotate(k, rotary)
            x = F.scaled_dot_product_attention(q[:, :, :num_queries], k, v)  # [BT, H, num_queries, D/H]
            x = x.transpose(1, 2)
        return self.proj(x.reshape(B, T, num_queries, D))


class Block(nn.Module):
    """Pre-norm encoder block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, name: str, dim: int, num_heads: int, mlp_ratio: float, norm_eps: float):
        super().__init__()
        self.name = name  # "blocks.3": the sites' masks are found under it
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def sites(self) -> dict[str, int]:
        """The block's stochastic sites, name -> width."""
        dim, hidden = self.mlp.fc1.in_features, self.mlp.fc1.out_features
        sites = {"attn.proj_drop": dim, "mlp.drop1": hidden, "mlp.drop2": dim}
        return {f"{self.name}.{site}": width for site, width in sites.items()}

    def forward(self, x: Tensor, masks: Masks | None, num_queries: int, rotary: Tensor | None = None) -> Tensor:
        """x: [B, 1 or T, L, D] -> [B, T, num_queries, D]."""
        attended = self.attn(self.norm1(x), num_queries, rotary)
        x = x[:, :, :num_queries] + apply_mask(attended, masks, f"{self.name}.attn.proj_drop")
        hidden = apply_mask(F.gelu(self.mlp.fc1(self.norm2(x))), masks, f"{self.name}.mlp.drop1")  # exact GELU
        return x + apply_mask(self.mlp.fc2(hidden), masks, f"{self.name}.mlp.drop2")


class VisionTransformer(nn.Module):
    """A ViT classifier whose dropout masks are an argument.

    image_size: height and width of the input, or both in one number; multiples of patch_size.
    dense: the head reads each patch token (for masks and boxes) instead of the class token.
    dropout: probability of a zero in a mask. dropout_blocks: k puts dropout in the last k encoder blocks only, None
    everywhere (after the position embedding too), 0 on what the head reads and nowhere else.
    registers: R further tokens without a position. positions: `learned`, an embedding of class token and patches that
    is added; or `rotary`, none, and queries and keys are rotated. norm_eps: of the LayerNorms.
    activation_checkpointing: keep of each block its input alone, and compute the rest again in the backward pass.
    autocast_dtype: torch.bfloat16 runs the forward pass under autocast (weights stay as they are), None does not.
    Raises ValueError where sizes do not fit together.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
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
        registers: int = 0,
        positions: str = "learned",
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        if any(side % patch_size for side in sides):
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} is not in [0, 1)")
        if dropout_blocks is not None and not 0 <= dropout_blocks <= depth:
            raise ValueError(f"dropout_blocks {dropout_blocks} is not between 0 and depth {depth}")
        if positions not in ("learned", "rotary"):
            raise ValueError(f"positions {positions!r} is none of learned, rotary")
        if positions == "rotary" and embed_dim // num_heads % 4:
            raise ValueError(f"rotary positions: embed_dim {embed_dim} / num_heads {num_heads} is not a multiple of 4")
        self.dropout = dropout
        self.dense = dense
        self.activation_checkpointing = activation_checkpointing
        self.autocast_dtype = autocast_dtype
        self.grid = rows, columns = sides[0] // patch_size, sides[1] // patch_size  # of patches
        self.num_patches = rows * columns

        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        learned = positions == "learned"
        self.reg_token = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, embed_dim)) if learned else None
        self.register_buffer("rotary", None if learned else rotary_angles(rows, columns, embed_dim // num_heads), False)
        blocks = (Block(f"blocks.{i}", embed_dim, num_heads, mlp_ratio, norm_eps) for i in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = nn.Linear(embed_dim, num_classes)

        self.sites = {"pos_drop": embed_dim} if dropout_blocks is None else {}  # name -> width, in forward order
        for block in self.blocks[depth - (depth if dropout_blocks is None else dropout_blocks) :]:
            self.sites |= block.sites()
        if dropout_blocks == 0:
            self.sites = {"head_drop": embed_dim}

        if learned:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if registers:
            nn.init.normal_(self.reg_token, std=1e-6)

    def sample_masks(self, batch_size: int, num_samples: int) -> Masks:
        """Draw the masks of T passes over B images from torch's global generator: name -> [B, T, 1, width]."""
        keep = 1.0 - self.dropout
        weight = self.head.weight
        shape = (batch_size, num_samples, 1, sum(self.sites.values()))
        # twice as fast on the CPU as bernoulli_, which is serial there
        flat = torch.rand(shape, dtype=weight.dtype, device=weight.device).lt_(keep).div_(keep)
        return dict(zip(self.sites, flat.split(list(self.sites.values()), dim=-1)))

    def embed(self, images: Tensor) -> Tensor:
        """images: [B, C, h, w] -> the tokens that enter the first block, [B, L, D]."""
        x = self.patch_embed(images)  # [B, P, D]
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # [B, 1 + P, D]
        x = x if self.pos_embed is None else x + self.pos_embed
        if self.reg_token is None:
            return x
        return torch.cat([x[:, :1], self.reg_token.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)

    def run_blocks(self, x: Tensor, masks: Masks | None, first: int, end: int, class_token_only: bool) -> Tensor:
        """The tokens that enter block `first`, [B, 1 or T, L, D] -> those that enter block `end`, or leave the last.

        With `class_token_only` the last block computes no other token: none of them reaches the classifier.
        """
        for i in range(first, end):
            num_queries = 1 if class_token_only and i == len(self.blocks) - 1 else x.shape[2]
            arguments = x, masks, num_queries, self.rotary
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[i], *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.blocks[i](*arguments)
        return x

    def trunk(self, images: Tensor, end: int) -> Tensor:
        """images: [B, C, h, w] -> the tokens that enter block `end`, without any mask, [B, L, D]; for end = depth only
        those that the head reads, [B, 1 or P, D]. `forward` goes on from them with `start=end`."""
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            x = self.run_blocks(self.embed(images).unsqueeze(1), None, 0, end, class_token_only=not self.dense)[:, 0]
        return x[:, -self.num_patches :] if self.dense and end == len(self.blocks) else x

    def forward_features(self, x: Tensor, masks: Masks | None, class_token_only: bool, start: int = 0) -> Tensor:
        """x: images [B, C, h, w], or with `start` tokens of `trunk` -> the normalised tokens [B, T, L or 1, D] (T = 1
        without masks)."""
        x = (x if start else self.embed(x)).unsqueeze(1)  # [B, 1, L, D]
        x = apply_mask(x, masks, "pos_drop")  # [B, 1 or T, L, D]
        x = self.run_blocks(x, masks, start, len(self.blocks), class_token_only)
        return apply_mask(self.norm(x), masks, "head_drop")

    def forward(self, inputs: Tensor, masks: Masks | None = None, start: int = 0) -> Tensor:
        """inputs: images [B, C, h, w], or with `start` the tokens that enter that block, as `trunk` has them -> logits
        [B, num_classes], or [B, T, num_classes] under masks of T passes; with `dense` [B, P, num_classes] or
        [B, T, P, num_classes], patches row by row."""
        with torch.autocast(inputs.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            x = self.forward_features(inputs, masks, not self.dense, start)  # [B, 1 or T, 1 or L, D]
            x = x[:, :, -self.num_patches :] if self.dense else x[:, :, 0]
            logits = self.head(x)  # [B, 1 or T, (P,) num_classes]
        return logits[:, 0] if masks is None else logits
