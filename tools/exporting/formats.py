"""The exported encoder for other libraries. Each one runs what was written, on random images, and must give torch's features."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from pipeline.files import write_atomic

BATCHES = (1, 3)
TOLERANCE = 1e-4  # of features that a layer norm has brought to about 1
Encoder = Callable[[Tensor], Iterable[Tensor]]
CONSTANTS = ("lambda1", "mask_token", "register_tokens")  # kept as they begin where timm's model has no LayerScale or registers
NAMES = {
    "cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings", "blocks.": "model.layer.", ".attn.proj.": ".attention.o_proj.",
    ".attn.q_bias": ".attention.q_proj.bias", ".attn.v_bias": ".attention.v_proj.bias", ".attn.": ".attention.",
    ".gamma_1": ".layer_scale1.lambda1", ".gamma_2": ".layer_scale2.lambda1",
    ".fc1_g.": ".gate_proj.", ".fc1_x.": ".up_proj.", ".fc1.": ".up_proj.", ".fc2.": ".down_proj.",
}  # fmt: skip


class FeaturesAndTokens(nn.Module):
    """Normalised images `[n, 3, S, S] float32 ->` timm's pooled features `[n, D]` and the patch tokens `[n, T, D]`."""

    def __init__(self, vit: Eva) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vit.forward_features(images)
        return self.vit.forward_head(tokens, pre_logits=True), tokens[:, self.vit.num_prefix_tokens :]


def write_onnx(vit: Eva, size: int, folder: Path) -> None:
    """Write model.onnx, for any number of images of `size` pixels. Raises ValueError if onnxruntime computes other features."""
    import onnxruntime
    import onnxscript  # noqa: F401  torch imports it, and would name another way to install it

    path, encoder = folder / "model.onnx", FeaturesAndTokens(vit).eval()
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of each operator that it leaves as it is
    program = torch.onnx.export(
        encoder, (torch.randn(2, 3, size, size),), input_names=["images"], output_names=["features", "tokens"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compare(path.name, size, encoder, lambda images: map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def write_transformers(vit: Eva, settings: dict[str, Any], folder: Path) -> None:
    """Write a folder for AutoModel and AutoImageProcessor; `settings` are timm's. Raises ValueError for other architectures."""
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    block, size, out = vit.blocks[0], settings["input_size"][-1], folder / "transformers"
    has_bias, is_gated = block.attn.q_bias is not None, hasattr(block.mlp, "fc1_g")
    config = transformers.DINOv3ViTConfig(
        patch_size=vit.patch_embed.patch_size[0], hidden_size=vit.embed_dim, intermediate_size=block.mlp.fc2.in_features,
        num_hidden_layers=len(vit.blocks), num_attention_heads=block.attn.num_heads, image_size=size,
        hidden_act="silu" if is_gated else "gelu", use_gated_mlp=is_gated, layer_norm_eps=vit.norm.eps, query_bias=has_bias,
        key_bias=False, value_bias=has_bias, num_register_tokens=vit.num_prefix_tokens - 1, pos_embed_rescale=None,
        rope_theta=getattr(vit.rope, "temperature", 100.0),
    )  # fmt: skip
    try:
        if vit.cls_token is None:
            raise ValueError("the encoder has no class token")
        model = transformers.DINOv3ViTModel(config)
        constants = {name: value for name, value in model.state_dict().items() if name.endswith(CONSTANTS)}
        model.load_state_dict(constants | renamed(vit))
        model.save_pretrained(out)
        weights = out / "model.safetensors"
        write_atomic(weights, weights.read_bytes())  # with the mode of the umask; theirs is for this user alone
        crop = {"height": size, "width": size}
        transformers.DINOv3ViTImageProcessor(
            size={"shortest_edge": int(size / settings["crop_pct"])}, do_center_crop=True, crop_size=crop,
            image_mean=settings["mean"], image_std=settings["std"],
        ).save_pretrained(out)  # fmt: skip
        loaded = transformers.AutoModel.from_pretrained(out).eval()
        compare(out.name, size, lambda images: [vit.forward_features(images)], lambda images: [loaded(images).last_hidden_state])
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--transformers: DINOv3ViTModel cannot express this encoder ({str(error).splitlines()[-1].strip()}); possible are "
            "the vit_*_dinov3 encoders with model.encoder_kwargs.class_token: true and any img_size, patch_size, embed_dim, "
            "depth, num_heads, mlp_ratio, qkv_bias, num_reg_tokens, init_values and rope_temperature"
        ) from None


def renamed(vit: Eva) -> dict[str, Tensor]:
    """Return the state dict under transformers' names, with a projection each for queries, keys and values."""
    state = {}
    for name, value in vit.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        parts = zip("qkv", value.chunk(3), strict=True) if ".qkv." in name else [("", value)]
        state.update({name.replace(".qkv.", f".{letter}_proj."): part for letter, part in parts})
    return state


@torch.inference_mode()
def compare(name: str, size: int, ours: Encoder, theirs: Encoder) -> None:
    """Print the largest difference between the two on random images. Raises ValueError if it is above the tolerance."""
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for count in BATCHES:
        images = torch.randn(count, 3, size, size, generator=generator)
        pairs = zip(ours(images), theirs(images), strict=True)
        largest = max(largest, *(float((expected - given).abs().max()) for expected, given in pairs))
    told = f"{name}: features differ from torch's by {largest:.1e} at most (batches of {' and '.join(map(str, BATCHES))})"
    if not largest <= TOLERANCE:
        raise ValueError(f"{told}; {TOLERANCE:g} is allowed, so nothing was exported")
    print(told)
