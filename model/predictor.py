"""The predictor: from the context's features to the features of queried cells, at every level at once."""

import math
from collections.abc import Callable, Sequence

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import EvaBlock
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Rotary wavelengths, in source images: from four images down to two of the finest cells a small local crop has.
LONGEST, SHORTEST = 4.0, 1 / 16


class Predictor(nn.Module):
    """A narrow transformer over context tokens and one query per (level, cell), with one output head per level.

    Positions are rotary, in the frame of the SOURCE image, and each token also carries the logarithm of its cell's size: so
    crops of any place and scale share one coordinate system. The last block computes the queries alone.

    `grad_checkpointing`, an attribute, is as in `MultiCropEncoder`.

    Raises ValueError when `width / num_heads` is not a multiple of four.
    """

    waves: torch.Tensor

    def __init__(self, encoder_width: int, width: int, depth: int, num_heads: int, num_levels: int) -> None:
        super().__init__()
        self.grad_checkpointing = False
        head_width, rest = divmod(width, num_heads)
        if rest or head_width % 4:
            raise ValueError(
                f"predictor width {width} over {num_heads} heads: the width of a head must be a multiple of 4"
            )
        self.enter = nn.Linear(encoder_width, width)
        self.query = nn.Parameter(torch.empty(num_levels, width))
        self.size_embed = nn.Linear(2, width)
        self.blocks = nn.ModuleList(
            [EvaBlock(width, num_heads, qkv_bias=False, num_prefix_tokens=0, rotate_half=True) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList([nn.Linear(width, encoder_width) for _ in range(num_levels)])
        exponents = torch.arange(head_width // 4, dtype=torch.float32) / max(head_width // 4 - 1, 1)
        waves = 2 * math.pi / (LONGEST * (SHORTEST / LONGEST) ** exponents)
        self.register_buffer("waves", waves, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(
        self,
        tokens: torch.Tensor,
        places: torch.Tensor,
        sizes: torch.Tensor,
        sources: torch.Tensor,
        real: torch.Tensor | None,
        query_places: Sequence[torch.Tensor],
        query_sizes: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Predict the queried cells of each of B x G crops: one `[B * G, M_l, encoder_width]` per level.

        `tokens`: `[B, S, encoder_width]`, the encoded tokens of each image; `places`: `[B, S, 2]`, y and x in the source image;
        `sizes`: `[B, S, 2]`, their cells' log sizes. `sources`: `[B, G, C] int64`, which of them each crop is predicted from;
        `real`: `[B, G, C] bool`, false for those to be ignored, or None. `query_places`, `query_sizes`: per level
        `[B * G, M_l, 2]`.
        """
        context = _take(self.enter(tokens) + self.size_embed(sizes), sources)
        parts = [context]
        for level, size in enumerate(query_sizes):
            parts.append(self.query[level].to(context.dtype) + self.size_embed(size))
        x = torch.cat(parts, dim=1)
        rope = self._rope(torch.cat([_take(places, sources), *query_places], dim=1))
        mask = None
        if real is not None:
            mask = F.pad(real.flatten(0, 1), (0, x.shape[1] - real.shape[2]), value=True)[:, None, None]
        for block in self.blocks[:-1]:
            x = self._run(block, x, rope, mask)
        # Nobody reads what the last block would make of the context.
        x = self.norm(self._run(_last_block, self.blocks[-1], x, rope, mask, context.shape[1]))
        counts = [part.shape[1] for part in parts[1:]]
        return [head(part) for head, part in zip(self.heads, x.split(counts, dim=1), strict=True)]

    def _run(self, function: Callable[..., torch.Tensor], *arguments: object) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _rope(self, places: torch.Tensor) -> torch.Tensor:
        """`[n, L, 2]` places -> `[n, 1, L, 2 * head_width]`: sines, then cosines, each laid out for half rotation."""
        angles = (places[..., None] * self.waves).flatten(-2)
        angles = torch.cat([angles, angles], dim=-1)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, None]


def _last_block(
    block: EvaBlock, x: torch.Tensor, rope: torch.Tensor, mask: torch.Tensor | None, start: int
) -> torch.Tensor:
    """`[n, L, W] -> [n, L - start, W]`: what `EvaBlock.forward` gives for the tokens from `start` on, which see all."""
    attention, width = block.attn, x.shape[-1]
    normed, weight = block.norm1(x), attention.qkv.weight
    heads = (attention.num_heads, width // attention.num_heads)
    q = F.linear(normed[:, start:], weight[:width]).unflatten(2, heads).transpose(1, 2)
    k, v = F.linear(normed, weight[width:]).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
    q = apply_rot_embed_cat(q, rope[:, :, start:], half=True).type_as(v)
    k = apply_rot_embed_cat(k, rope, half=True).type_as(v)
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    x = x[:, start:] + attention.proj(seen)
    return x + block.mlp(block.norm2(x))


def _take(rows: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """`[B, S, W]` rows at `[B, G, C]` -> `[B * G, C, W]`."""
    taken = rows.gather(1, sources.flatten(1)[..., None].expand(-1, -1, rows.shape[-1]))
    return taken.view(-1, sources.shape[2], rows.shape[-1])
