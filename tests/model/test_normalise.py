"""The encoder normalises uint8 crops."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.encoder import MultiCropEncoder
from model.hjepa import HJEPA
from model.masks import STRATEGIES
from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD

Maker = Callable[..., HJEPA]
Inputs = Callable[..., dict]
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
FORMATS = [torch.channels_last, torch.contiguous_format]


def bytes_like(crops: list[torch.Tensor], memory_format: torch.memory_format) -> list[torch.Tensor]:
    return [torch.randint_like(crop, 256).byte().contiguous(memory_format=memory_format) for crop in crops]


def looking_encoder(**changes: object) -> MultiCropEncoder:
    """Return an encoder with the identity as patch embedding: a token holds its patch's numbers, channels last."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 4}
    sizes |= {"class_token": False, "num_reg_tokens": 0, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    encoder = MultiCropEncoder("vit_small_patch16_dinov3", [32], **{**sizes, **changes})
    with torch.no_grad():
        encoder.vit.patch_embed.proj.weight.copy_(torch.eye(192).view(192, 8, 8, 3).permute(0, 3, 1, 2))
        encoder.vit.patch_embed.proj.bias.zero_()
    return encoder


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"mean": (0.5, 0.0, 1.0), "std": (0.5, 0.25, 1.0)}])
def test_all_values_of_a_byte_become_what_plain_arithmetic_makes_of_them(
    memory_format: torch.memory_format, options: dict
) -> None:
    encoder = looking_encoder(**options)
    values = (torch.arange(3072).view(1, 3, 32, 32) % 256).byte()
    mean, std = (torch.tensor(options[key])[:, None, None] for key in ("mean", "std")) if options else (MEAN, STD)
    expected = (values.float() / 255 - mean) / std
    with torch.no_grad():
        tokens, _ = encoder._embed(values.contiguous(memory_format=memory_format), None)
        untouched, _ = encoder._embed(expected, None)
    seen = tokens.view(1, 4, 4, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 32, 32)
    assert float((seen - expected).abs().max()) <= 1e-6
    assert torch.equal(untouched.flatten().sort().values, expected.flatten().sort().values)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_give_the_losses_and_gradients_of_crops_normalised_outside(
    make_model: Maker, make_inputs: Inputs, strategy: str, memory_format: torch.memory_format, amp: bool
) -> None:
    inputs, results = make_inputs(strategy), []
    raw = bytes_like(inputs["crops"], memory_format)
    for crops in (raw, [(crop.float() / 255 - MEAN) / STD for crop in raw]):
        model = make_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            losses = model(**{**inputs, "crops": crops})
        losses["loss"].backward()
        results.append([losses["loss"].detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    # In bfloat16 a number halfway between two can be rounded either way.
    tolerance = {"atol": 2e-2, "rtol": 5e-2} if amp else {"atol": 2e-6, "rtol": 1e-4}
    torch.testing.assert_close(results[0], results[1], **tolerance)


class Written(TorchDispatchMode):
    """Counts the numbers that operators write to new memory, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        taken = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if result.untyped_storage().data_ptr() not in taken:
            self.numbers[result.dtype] = self.numbers.get(result.dtype, 0) + result.numel()
        return result


def test_only_kept_patches_become_floats_and_once() -> None:
    encoder, crops = looking_encoder(), torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    crops, keep = crops.contiguous(memory_format=torch.channels_last), torch.arange(6).expand(5, -1)
    with torch.no_grad(), Written() as written:
        encoder._embed(crops, keep)
    patches, tokens, weights = 5 * 6 * 192, 5 * 6 * 192, 192 * 192
    assert written.numbers[torch.uint8] == 5 * 16 * 192 + patches  # patchified, then gathered
    rope = 5 * 6 * encoder.rope_32.shape[-1]
    # Tokens are written twice, by the product and by the concatenation with the prefix; the weights once, in patch layout.
    assert written.numbers[torch.float32] == patches + 2 * tokens + weights + rope


def test_the_state_holds_nothing_of_the_normalisation(make_model: Maker) -> None:
    model = make_model()
    assert not [name for name in model.state_dict() if name.endswith(("pixel_mean", "pixel_std"))]
    assert model.target.pixel_mean.tolist() == model.encoder.pixel_mean.tolist()
