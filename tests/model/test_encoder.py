import pytest
import timm
import torch

from model.encoder import MultiCropEncoder
from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD

NORMAL = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
ARCHITECTURE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2, "init_values": 0.1}
SMALL = {**ARCHITECTURE, **NORMAL}


def small_encoder(**changes: object) -> MultiCropEncoder:
    torch.manual_seed(0)
    return MultiCropEncoder("vit_small_patch16_dinov3", [32, 16], **{**SMALL, **changes}).eval()


@pytest.mark.parametrize("changes", [{}, {"class_token": False, "num_reg_tokens": 0}, {"qkv_bias": True}])
@pytest.mark.parametrize("size", [32, 16])
def test_keeping_all_tokens_equals_timms_forward_features(changes: dict, size: int) -> None:
    encoder, crops = small_encoder(**changes), torch.randn(3, 3, size, size)
    expected = encoder.vit.forward_features(crops)[:, encoder.num_prefix :]
    tokens = (size // 8) ** 2
    for keep in (None, torch.arange(tokens).expand(3, -1)):
        torch.testing.assert_close(encoder([(crops, keep)])[0].tokens, expected, atol=3e-6, rtol=0)  # a few roundings


@pytest.mark.parametrize("name", ["vit_tiny_patch16_dinov3_qkvb", "vit_small_patch16_dinov3"])
def test_the_shipped_families_equal_timm_at_both_resolutions(name: str) -> None:
    torch.manual_seed(0)
    encoder = MultiCropEncoder(name, [224, 96], depth=2, **NORMAL).eval()
    for size in (224, 96):
        crops = torch.randn(1, 3, size, size)
        expected = encoder.vit.forward_features(crops)[:, encoder.num_prefix :]
        torch.testing.assert_close(encoder([(crops, None)])[0].tokens, expected, atol=1e-5, rtol=0)


def test_the_packed_pass_equals_one_crop_at_a_time() -> None:
    encoder = small_encoder()
    large, small = torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)
    keep = torch.stack([torch.randperm(16)[:7].sort().values for _ in range(4)])
    packed = encoder([(large, keep), (small, None)], layers=(0, 2))
    for i in range(4):
        alone = encoder([(large[i : i + 1], keep[i : i + 1])], layers=(0, 2))[0]
        torch.testing.assert_close(packed[0].tokens[i], alone.tokens[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[0].layers[1][i], alone.layers[1][0], atol=1e-5, rtol=0)
    for i in range(6):
        alone = encoder([(small[i : i + 1], None)])[0]
        torch.testing.assert_close(packed[1].tokens[i], alone.tokens[0], atol=1e-5, rtol=0)


def test_pixels_of_dropped_tokens_have_exactly_no_influence() -> None:
    encoder = small_encoder()
    crops = torch.randn(2, 3, 32, 32, requires_grad=True)
    keep = torch.tensor([[0, 1, 5, 10], [3, 7, 8, 15]])
    encoder([(crops, keep)])[0].tokens.square().sum().backward()
    gradient = crops.grad.abs().sum(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((-1, -2)).flatten(1)  # [2, 16] by patch
    seen = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, keep, True)
    assert bool((gradient[seen] > 0).all())
    assert bool((gradient[~seen] == 0).all())


def test_layers_are_the_outputs_of_timms_blocks() -> None:
    encoder, crops = small_encoder(), torch.randn(2, 3, 32, 32)
    maps = encoder.vit.forward_intermediates(crops, indices=[0, 2], norm=False, intermediates_only=True)
    for ours, theirs in zip(encoder([(crops, None)], layers=(0, 2))[0].layers, maps, strict=True):
        torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), atol=1e-6, rtol=0)


def test_the_trained_encoder_loads_back_with_timm_alone() -> None:
    encoder, crops = small_encoder(), torch.randn(2, 3, 32, 32)
    loaded = timm.create_model("vit_small_patch16_dinov3", pretrained=False, num_classes=0, **ARCHITECTURE).eval()
    loaded.load_state_dict(encoder.vit.state_dict())
    torch.testing.assert_close(loaded(crops), encoder([(crops, None)])[0].tokens.mean(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet18", {}, "not a timm Eva model"),
        ("resnet50", {"img_size": 96}, "not a timm Eva model"),  # with arguments that are wrong too
        ("vit_tiny_patch16_224", {}, "not a timm Eva model"),
        ("no_such_model", {}, "timm cannot build encoder 'no_such_model'"),
        ("vit_tiny_patch16_dinov3_qkvb", {"no_such_option": 1}, "timm cannot build encoder"),
        ("vit_tiny_patch16_dinov3_qkvb", {"name": "x"}, "timm cannot build encoder"),
    ],
)
def test_an_unusable_encoder_is_refused_in_one_line(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiCropEncoder(name, [224], **NORMAL, **kwargs)


def test_a_crop_size_that_the_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="crop size 100: not a multiple of the patch size 16"):
        MultiCropEncoder("vit_tiny_patch16_dinov3_qkvb", [100], **NORMAL)
