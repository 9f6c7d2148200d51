"""The exported encoder for other libraries. Each one runs what was written, on random images, and must give torch's features."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

BATCHES = (1, 3)
TOLERANCE = 1e-4  # of features that a layer norm has brought to about 1


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
    compare(path.name, encoder, size, lambda images: map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


@torch.inference_mode()
def compare(
    name: str, ours: Callable[[Tensor], Iterable[Tensor]], size: int, theirs: Callable[[Tensor], Iterable[Tensor]]
) -> None:
    """Print the largest difference between two ways to compute features. Raises ValueError for one above the tolerance."""
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for count in BATCHES:
        images = torch.randn(count, 3, size, size, generator=generator)
        for expected, given in zip(ours(images), theirs(images), strict=True):
            largest = max(largest, float((expected - given).abs().max()))
    told = f"{name}: features differ from torch's by {largest:.1e} at most ({' and '.join(map(str, BATCHES))} random images)"
    if not largest <= TOLERANCE:
        raise ValueError(f"{told}; {TOLERANCE:g} is allowed, so nothing was exported")
    print(told)
