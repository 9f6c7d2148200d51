"""The encoder: a timm ViT with rotary positions that runs on any subset of tokens and on several crop sizes at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
import torch
from timm.layers import apply_rot_embed_cat
from timm.models import is_model_in_modules
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class EncoderOutput:
    """The encoding of one group of n crops.

    `tokens`: `[n, K, D]`, patch tokens after the final norm, without prefix tokens. `layers`: one `[n, K, D]` per requested
    block, the patch tokens that leave it.
    """

    tokens: Tensor
    layers: tuple[Tensor, ...]


class MultiCropEncoder(nn.Module):
    """Encode groups of crops in one pass; the crops of a group share one size and one number of tokens.

    Norms, projections and MLPs run once on the packed tokens of all groups, attention once per group. If all tokens are kept,
    the result equals timm's `forward_features`.

    `crop_sizes` are the sizes in pixels that `forward` accepts. `uint8` crops, 0..255, are normalised here with the per-channel
    `mean` and `std` of pixels in 0..1; floating-point crops must already be normalised. Channels-last memory is the faster
    format for both. The pixels of dropped tokens are neither normalised nor embedded. With the attribute `grad_checkpointing`
    the backward pass recomputes the inside of each block instead of storing it. Raises ValueError if timm's `name` is not an
    Eva model with rotary positions, or if the patch size does not divide a size.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, name: str, crop_sizes: Sequence[int], /, *, mean: Channels, std: Channels, **timm_kwargs: object) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.vit = create_vit(name, **timm_kwargs)
        self.width, self.depth = self.vit.embed_dim, len(self.vit.blocks)
        self.num_prefix = self.vit.num_prefix_tokens
        self.patch_size = self.vit.patch_embed.patch_size[0]
        # One value per number of a patch instead of one per channel: broadcasting over rows of three is slow on CPUs.
        # Not persistent, so that the state dict stays that of the timm model.
        for buffer, values in (("pixel_mean", mean), ("pixel_std", std)):
            self.register_buffer(buffer, 255 * torch.tensor(values).repeat(self.patch_size**2), persistent=False)
        for size in set(crop_sizes):
            if size % self.patch_size:
                raise ValueError(f"crop size {size}: not a multiple of the patch size {self.patch_size} of {name}")
            # timm builds this table on the CPU in every call; stored as a buffer, it costs no copy to the device per step.
            table = self.vit.rope.get_embed((size // self.patch_size,) * 2)
            self.register_buffer(f"rope_{size}", table, persistent=False)

    def forward(self, groups: Sequence[tuple[Tensor, Tensor | None]], layers: Sequence[int] = ()) -> list[EncoderOutput]:
        """Encode groups of `(crops [n, 3, S, S] uint8 or float, keep [n, K] int64, or None for all tokens)`.

        `layers` are block numbers, counted from 0; `EncoderOutput.layers` follows their order.
        """
        # Embed each group separately, since crop sizes differ, then pack all tokens into one [sum of n * L, D] matrix: one large
        # matrix product per layer is faster than one per group, and there is no padding to compute or to mask.
        embedded = [self._embed(crops, keep) for crops, keep in groups]
        shapes = [tokens.shape[:2] for tokens, _ in embedded]
        ropes = [rope for _, rope in embedded]
        packed = torch.cat([tokens.flatten(0, 1) for tokens, _ in embedded])
        outputs: dict[int, list[Tensor]] = {}
        for number, block in enumerate(self.vit.blocks):
            packed = run_block(self.grad_checkpointing, packed_block, block, packed, shapes, ropes)
            if number in layers:
                outputs[number] = self._unpack(packed, shapes)
        tokens = self._unpack(self.vit.norm(packed), shapes)
        return [EncoderOutput(tokens[group], tuple(outputs[number][group] for number in layers)) for group in range(len(groups))]

    def _embed(self, crops: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return a group's tokens, prefix tokens first, `[n, prefix + K, D]`, and the rotary table of its patch tokens."""
        patches, rope = patchify(crops, self.patch_size), getattr(self, f"rope_{crops.shape[-1]}")
        # Drop masked patches while they are still bytes, before any arithmetic is spent on them.
        if keep is not None:
            patches = torch.take_along_dim(patches, keep[..., None], dim=1)
            rope = rope[keep][:, None]  # one table per sample, shared by the heads
        if patches.dtype == torch.uint8:
            patches = (patches - self.pixel_mean).div_(self.pixel_std)
        # timm's patch convolution has stride = kernel size, so it is a matrix product on the flattened patches.
        projection = self.vit.patch_embed.proj
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = self.vit.patch_embed.norm(F.linear(patches, weight, projection.bias))
        prefix = [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        tokens = torch.cat([*(token.expand(len(crops), -1, -1) for token in prefix), tokens], dim=1)
        return self.vit.norm_pre(self.vit.pos_drop(tokens)), rope

    def _unpack(self, packed: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
        """Split packed tokens into one `[n, K, D]` per group, without prefix tokens."""
        parts = packed.split([n * length for n, length in shapes])
        return [part.unflatten(0, shape)[:, self.num_prefix :] for part, shape in zip(parts, shapes, strict=True)]


def patchify(crops: Tensor, size: int) -> Tensor:
    """Cut crops into row-major patches of row-major pixels: `[n, 3, S, S] -> [n, (S / size)^2, size * size * 3]`, same dtype."""
    grid = crops.permute(0, 2, 3, 1).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)


def create_vit(name: str, /, **timm_kwargs: object) -> Eva:
    """Return the untrained timm model without a head; raise ValueError if it cannot run on subsets of its tokens."""
    wrong_family = (
        f"encoder {name!r}: not a timm Eva model with rotary positions only. Use vit_{{small,base,large}}_patch16_dinov3, "
        "or another of timm.list_models('vit_*_dinov3*')"
    )
    base = name.partition(".")[0]
    # Checked before timm can reject the arguments: with another model they are not the problem.
    if timm.is_model(base) and not is_model_in_modules(base, ("eva",)):
        raise ValueError(wrong_family)
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, **timm_kwargs)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm cannot build encoder {name!r} with {timm_kwargs}: {error}") from None
    attention = vit.blocks[0].attn if isinstance(vit, Eva) else None
    usable = isinstance(attention, EvaAttention) and attention.qkv is not None and attention.gate is None
    if not usable or vit.rope is None or vit.rope_mixed or vit.pos_embed is not None or not vit.dynamic_img_size:
        raise ValueError(wrong_family)
    return vit


def run_block(recompute: bool, function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Return `function(*arguments)`; with `recompute`, store only the arguments for the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def packed_block(block: EvaBlock, packed: Tensor, shapes: list[torch.Size], ropes: list[Tensor]) -> Tensor:
    """Apply `EvaBlock.forward` to packed tokens `[sum of n * L, D]`; only attention needs to know the groups."""
    attended = packed_attention(block.attn, block.norm1(packed), shapes, ropes)
    packed = packed + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)
    mixed = block.mlp(block.norm2(packed))
    return packed + block.drop_path2(mixed if block.gamma_2 is None else block.gamma_2 * mixed)


def packed_attention(attention: EvaAttention, packed: Tensor, shapes: list[torch.Size], ropes: list[Tensor]) -> Tensor:
    """Apply `EvaAttention.forward` to packed tokens: one joint projection in and out, one attention call per group."""
    bias = None
    if attention.q_bias is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = F.linear(packed, attention.qkv.weight, bias)
    parts = []
    for part, (n, length), rope in zip(qkv.split([n * length for n, length in shapes]), shapes, ropes, strict=True):
        q, k, v = part.view(n, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = _rotate(attention, attention.q_norm(q), rope), _rotate(attention, attention.k_norm(k), rope)
        # As timm does: the rotation can promote q and k to float32, and the fused kernels need one dtype.
        parts.append(F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v).transpose(1, 2).reshape(n * length, -1))
    return attention.proj_drop(attention.proj(attention.norm(torch.cat(parts))))


def _rotate(attention: EvaAttention, heads: Tensor, rope: Tensor) -> Tensor:
    # Prefix tokens have no place in the image and are not rotated.
    prefix, patches = heads.tensor_split([attention.num_prefix_tokens], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attention.rotate_half)], dim=2)
