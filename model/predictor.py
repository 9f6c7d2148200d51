"""The predictors of target features: of queried cells from context tokens, and of all cells from the mean context token."""

import math
from collections.abc import Sequence

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F

from model.encoder import run_block
from model.geometry import Cells
from model.losses import weighted_sum

# Rotary wavelengths as multiples of the source image's side: from four images, on which positions never wrap around, down to
# twice the finest cell of a small local crop, the shortest wavelength that still tells neighbours apart.
MAX_WAVELENGTH, MIN_WAVELENGTH = 4.0, 1 / 16
SUMMARY_HIDDEN_RATIO = 4  # hidden width / encoder width, as in the MLP of a ViT block


class Predictor(nn.Module):
    """A narrow transformer over context tokens and one query per cell and level, with one output head per level.

    Positions are rotary in the coordinates of the SOURCE image, and each token also carries the logarithm of its cell's size,
    so that crops of any position and scale share one coordinate system. `grad_checkpointing` acts as in `MultiCropEncoder`.
    Raises ValueError if `width / num_heads` is not a multiple of four.
    """

    waves: Tensor

    def __init__(self, encoder_width: int, width: int, depth: int, num_heads: int, num_levels: int) -> None:
        super().__init__()
        self.grad_checkpointing = False
        head_width, rest = divmod(width, num_heads)
        if rest or head_width % 4:
            raise ValueError(f"predictor width {width} over {num_heads} heads: the width of a head must be a multiple of 4")
        self.enter = nn.Linear(encoder_width, width)
        self.query = nn.Parameter(torch.empty(num_levels, width))
        self.size_embed = nn.Linear(2, width)
        self.blocks = nn.ModuleList(
            [EvaBlock(width, num_heads, qkv_bias=False, num_prefix_tokens=0, rotate_half=True) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList([nn.Linear(width, encoder_width) for _ in range(num_levels)])
        exponents = torch.arange(head_width // 4, dtype=torch.float32) / max(head_width // 4 - 1, 1)
        waves = 2 * math.pi / (MAX_WAVELENGTH * (MIN_WAVELENGTH / MAX_WAVELENGTH) ** exponents)
        self.register_buffer("waves", waves, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(
        self, features: Tensor, cells: Cells, queries: Sequence[Cells], sources: Tensor, real: Tensor | None = None
    ) -> list[Tensor]:
        """Predict the queried cells of each of B x G crops: one `[B * G, M_l, encoder_width]` per level.

        `features`: `[B, S, encoder_width]`, all encoded tokens of each image, and `cells`, `[B, S]`, where they lie. `queries`:
        per level the cells to predict, `[B * G, M_l]`. `sources`, `real`: `[B, G, C]`, as in `MaskPlan`.
        """
        # Embed the tokens of an image once, although several of its crops can be predicted from them; then gather each crop's.
        context = _take(self.enter(features) + self.size_embed(cells.log_sizes), sources)
        # A query knows its level, the size of its cell and, through the rotation, its position; everything else it must infer.
        parts = [context]
        for level, query in enumerate(queries):
            parts.append(self.query[level].to(context.dtype) + self.size_embed(query.log_sizes))
        x = torch.cat(parts, dim=1)
        rope = self._rope(torch.cat([_take(cells.centres, sources), *(query.centres for query in queries)], dim=1))
        mask = None
        if real is not None:
            mask = F.pad(real.flatten(0, 1), (0, x.shape[1] - real.shape[2]), value=True)[:, None, None]
        for block in self.blocks[:-1]:
            x = run_block(self.grad_checkpointing, block, x, rope, mask)
        # The last block's context outputs are unused, so only the queries are computed.
        x = self.norm(run_block(self.grad_checkpointing, _last_block, self.blocks[-1], x, rope, mask, context.shape[1]))
        counts = [part.shape[1] for part in parts[1:]]
        return [head(part) for head, part in zip(self.heads, x.split(counts, dim=1), strict=True)]

    def _rope(self, centres: Tensor) -> Tensor:
        """Return the rotary table `[n, 1, L, 2 * head_width]` of `[n, L, 2]` centres: sines, then cosines, for half rotation."""
        angles = (centres[..., None] * self.waves).flatten(-2)
        angles = torch.cat([angles, angles], dim=-1)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, None]


def _last_block(block: EvaBlock, x: Tensor, rope: Tensor, mask: Tensor | None, start: int) -> Tensor:
    """Return `EvaBlock.forward(x)[:, start:]`, `[n, L, W] -> [n, L - start, W]`, with only those tokens as queries."""
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


def _take(rows: Tensor, sources: Tensor) -> Tensor:
    """Gather `[B, S, W]` rows at `[B, G, C]` indices: `[B * G, C, W]`."""
    return torch.take_along_dim(rows, sources.flatten(1)[..., None], dim=1).view(-1, sources.shape[2], rows.shape[-1])


class SummaryPredictor(nn.Module):
    """Per level, one hidden layer over the summary s `[width]` and a learned vector per cell q: B_l GELU(A_l s + e_lq).

    The token predictor infers a masked cell from its surroundings. This one infers all cells from the pooled feature, which is
    what is used after training and so has to hold the layout of the image at every level.
    """

    def __init__(self, width: int, cells: Sequence[int]) -> None:
        super().__init__()
        hidden = SUMMARY_HIDDEN_RATIO * width
        self.enter = nn.ModuleList(nn.Linear(width, hidden) for _ in cells)
        self.places = nn.ParameterList(nn.Parameter(0.5 * torch.randn(count, hidden)) for count in cells)
        self.heads = nn.ModuleList(nn.Linear(hidden, width) for _ in cells)

    def forward(self, summaries: Tensor) -> list[Tensor]:
        """Predict the maps of all levels, `[n, D] -> [n, cells, D]` per level."""
        levels = zip(self.enter, self.places, self.heads, strict=True)
        return [head(F.gelu(enter(summaries)[:, None] + place)) for enter, place, head in levels]


def summary_loss(predictions: list[Tensor], targets: list[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum over the levels of the mean smooth L1 distance of all cells, `[] float32`."""
    errors = [F.smooth_l1_loss(guess.float(), target) for guess, target in zip(predictions, targets, strict=True)]
    return weighted_sum(weights, errors)
