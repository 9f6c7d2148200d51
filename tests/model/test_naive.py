from collections.abc import Callable

import torch

from model.hjepa import HJEPA
from model.masks import MaskPlan
from tools.bench_naive import naive_losses


def test_with_nothing_masked_the_naive_loop_of_the_benchmark_computes_our_loss(
    make_model: Callable[..., HJEPA], make_inputs: Callable[..., dict]
) -> None:
    """So the benchmark compares two ways of computing one thing."""
    model, inputs = make_model(), make_inputs("global_only", 2, 0)
    sources = torch.arange(72).view(1, 2, 36).expand(6, -1, -1)
    inputs["plan"] = MaskPlan(torch.arange(36).expand(6, 2, -1), inputs["plan"].queries, sources)
    torch.testing.assert_close(naive_losses(model, **inputs)["loss"], model(**inputs)["loss"])
