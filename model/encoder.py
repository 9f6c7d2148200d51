"""The encoder: a timm ViT with rotary positions, run on any subset of tokens and on several crop sizes at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from timm.layers import apply_rot_embed_cat
from timm.models import is_model_in_modules
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class EncoderOutput:
    """One group of crops, encoded. `tokens`: `[n, K, D]`, patch tokens after the final norm, without prefix tokens.

    `layers`: one `[n, K, D]` per requested layer, patch tokens straight after that block.
    """

    tokens: torch.Tensor
    layers: tuple[torch.Tensor, ...]


class MultiCropEncoder(nn.Module):
    """Encodes groups of crops in one pass; each group has one crop size and one number of tokens.

    Crops of `uint8`, 0..255, are normalised here with `mean` and `std` of each channel, given for pixels in 0..1; crops of a
    floating type are taken as normalised. Either may have its channels last in memory, which is the fast way. Pixels of tokens
    that are not kept are neither normalised nor embedded.

    Norms, projections and MLPs run once on the tokens of all groups together, attention once per group. With all tokens kept
    the result equals timm's `forward_features`. `crop_sizes` are the sizes in pixels that `forward` will meet. With
    the attribute `grad_checkpointing` the backward pass computes the inside of each block again instead of keeping it.

    Raises ValueError for a timm model of another family than Eva with rotary positions, and for a size that the patch size
    does not divide.
    """

    offset: torch.Tensor
    spread: torch.Tensor

    def __init__(
        self,
        name: str,
        crop_sizes: Sequence[int],
        /,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        **timm_kwargs: object,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.vit = create_vit(name, **timm_kwargs)
        self.width, self.depth = self.vit.embed_dim, len(self.vit.blocks)
        self.num_prefix = self.vit.num_prefix_tokens
        self.patch_size = self.vit.patch_embed.patch_size[0]
        # One value for each number of a patch, not for each channel: adding rows of three is slow on CPUs. Not in the state,
        # which stays that of the timm model.
        for buffer, values in (("offset", mean), ("spread", std)):
            self.register_buffer(buffer, 255 * torch.tensor(values).repeat(self.patch_size**2), persistent=False)
        for size in set(crop_sizes):
            if size % self.patch_size:
                raise ValueError(f"crop size {size}: not a multiple of the patch size {self.patch_size} of {name}")
            # timm builds this table on the CPU at every call; kept here, the step copies nothing to the device.
            table = self.vit.rope.get_embed((size // self.patch_size,) * 2)
            self.register_buffer(f"rope_{size}", table, persistent=False)

    def forward(
        self, groups: Sequence[tuple[torch.Tensor, torch.Tensor | None]], layers: Sequence[int] = ()
    ) -> list[EncoderOutput]:
        """Encode `(crops [n, 3, S, S] uint8 or float, keep [n, K] int64 or None for all tokens)` groups.

        `layers` numbers blocks from 0; their outputs are returned in the order asked for.
        """
        embedded = [self._embed(crops, keep) for crops, keep in groups]
        shapes = [tokens.shape[:2] for tokens, _ in embedded]
        ropes = [rope for _, rope in embedded]
        packed = torch.cat([tokens.flatten(0, 1) for tokens, _ in embedded])
        taken: dict[int, list[torch.Tensor]] = {}
        for number, block in enumerate(self.vit.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                packed = checkpoint(packed_block, block, packed, shapes, ropes, use_reentrant=False)
            else:
                packed = packed_block(block, packed, shapes, ropes)
            if number in layers:
                taken[number] = self._unpack(packed, shapes)
        tokens = self._unpack(self.vit.norm(packed), shapes)
        return [
            EncoderOutput(tokens[group], tuple(taken[number][group] for number in layers))
            for group in range(len(groups))
        ]

    def _embed(self, crops: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch tokens of one group with the prefix tokens in front, and the rotary table of its patch tokens."""
        patches, rope = patchify(crops, self.patch_size), getattr(self, f"rope_{crops.shape[-1]}")
        if keep is not None:
            patches = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
            rope = rope[keep][:, None]  # one table per sample, shared by the heads
        if patches.dtype == torch.uint8:
            patches = (patches - self.offset).div_(self.spread)
        # timm's convolution, whose steps are as long as its kernel, as the matrix product that it is.
        projection = self.vit.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = self.vit.patch_embed.norm(F.linear(patches, weight, projection.bias))
        prefix = [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        tokens = torch.cat([*(token.expand(len(crops), -1, -1) for token in prefix), tokens], dim=1)
        return self.vit.norm_pre(self.vit.pos_drop(tokens)), rope

    def _unpack(self, packed: torch.Tensor, shapes: list[torch.Size]) -> list[torch.Tensor]:
        parts = packed.split([n * length for n, length in shapes])
        return [part.unflatten(0, shape)[:, self.num_prefix :] for part, shape in zip(parts, shapes, strict=True)]


def patchify(crops: torch.Tensor, size: int) -> torch.Tensor:
    """`[n, 3, S, S] -> [n, (S / size)^2, size * size * 3]`, same dtype: patches row by row, pixels row by row, channels last."""
    grid = crops.permute(0, 2, 3, 1).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)


def create_vit(name: str, /, **timm_kwargs: object) -> Eva:
    """`timm.create_model(name, pretrained=False, num_classes=0, ...)`, checked to be one that token subsets can be run on."""
    family = (
        f"encoder {name!r}: not a timm Eva model with rotary positions only. Use vit_{{small,base,large}}_patch16_dinov3, "
        "or another of timm.list_models('vit_*_dinov3*')"
    )
    base = name.partition(".")[0]
    if timm.is_model(base) and not is_model_in_modules(base, ("eva",)):
        raise ValueError(family)  # before its arguments are complained of
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, **timm_kwargs)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm cannot build encoder {name!r} with {timm_kwargs}: {error}") from None
    attention = vit.blocks[0].attn if isinstance(vit, Eva) else None
    usable = isinstance(attention, EvaAttention) and attention.qkv is not None and attention.gate is None
    if not usable or vit.rope is None or vit.rope_mixed or vit.pos_embed is not None or not vit.dynamic_img_size:
        raise ValueError(family)
    return vit


def packed_block(
    block: EvaBlock, packed: torch.Tensor, shapes: list[torch.Size], ropes: list[torch.Tensor]
) -> torch.Tensor:
    """`EvaBlock.forward` on `[sum of n * L, D]`: everything but attention sees one long row of tokens."""
    attended = packed_attention(block.attn, block.norm1(packed), shapes, ropes)
    packed = packed + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
    mixed = block.mlp(block.norm2(packed))
    return packed + block.drop_path2(mixed if block.gamma_2 is None else block.gamma_2 * mixed)


def packed_attention(
    attention: EvaAttention, packed: torch.Tensor, shapes: list[torch.Size], ropes: list[torch.Tensor]
) -> torch.Tensor:
    """`EvaAttention.forward`, one attention call per group between one shared projection in and out."""
    bias = None
    if attention.q_bias is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = F.linear(packed, attention.qkv.weight, bias)
    parts = []
    for part, (n, length), rope in zip(qkv.split([n * length for n, length in shapes]), shapes, ropes, strict=True):
        q, k, v = part.view(n, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = _rotate(attention, attention.q_norm(q), rope), _rotate(attention, attention.k_norm(k), rope)
        out = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v)
        parts.append(out.transpose(1, 2).reshape(n * length, -1))
    return attention.proj_drop(attention.proj(attention.norm(torch.cat(parts))))


def _rotate(attention: EvaAttention, heads: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    prefix, patches = heads.tensor_split([attention.num_prefix_tokens], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attention.rotate_half)], dim=2)
