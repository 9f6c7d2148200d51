import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.hjepa import HJEPA
from model.masks import STRATEGIES, MaskPlan
from tools import bench
from tools.benchmarks import step as bench_step


def test_with_nothing_masked_the_naive_loop_of_the_benchmark_computes_our_loss(
    make_model: Callable[..., HJEPA], make_inputs: Callable[..., dict]
) -> None:
    """The benchmark compares two ways of computing the same thing."""
    model, inputs = make_model(), make_inputs("global_only", 2, 0)
    sources = torch.arange(72).view(1, 2, 36).expand(6, -1, -1)
    inputs["plan"] = MaskPlan(torch.arange(36).expand(6, 2, -1), inputs["plan"].queries, sources)
    torch.testing.assert_close(bench_step.naive_losses(model, **inputs)["loss"], model(**inputs)["loss"])


def test_the_operations_are_within_their_targets() -> None:
    """FLOPs are the same on every machine, so they are held here; times are not."""
    steps = bench_step.make_steps(bench_step.ENCODERS["tiny"], 1, torch.device("cpu"))
    flops = {name: bench_step.count_flops(steps[name]) for name in ("ours/global_only", "naive", "unmasked-2")}
    assert flops["ours/global_only"] <= 0.5 * flops["naive"]
    assert flops["ours/global_only"] <= flops["unmasked-2"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], pytest.param(["--device", "gpu"], marks=pytest.mark.gpu)])
def test_every_row_is_measured_and_written(options: list[str], tmp_path: Path) -> None:
    command = ["step", "--model", "tiny", "--batch", "1", "--rounds", "1", "--json", str(tmp_path / "rows.json")]
    assert bench.main([*command, *options]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows] == [*(f"ours/{name}" for name in STRATEGIES), "naive", "unmasked-2"]
    for row in rows:
        assert row.keys() == {"name", "time_s", "peak_bytes", "flops"}
        assert min(row["time_s"], row["peak_bytes"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["step", "--device", "gpu"]) == 2
    assert capsys.readouterr().err == "bench: --device gpu: torch sees no CUDA GPU; write cpu or auto\n"
