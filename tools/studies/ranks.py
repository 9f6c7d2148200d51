"""Does a run depend on its ranks? `python -m tools.studies.ranks SHARDS --out results`.

One run of configs/quickstart.yaml, with AdamW, is trained on 1, 2 and 4 ranks over gloo, and on 4 that become 2 halfway, with the
same global batch. ranks.csv gets the loss of every step, ranks.png the curves and their relative differences from one rank.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from train.command import path_argument, run_command
from train.output.log import read_metrics

mpl.use("agg")

from matplotlib import pyplot as plt

RUNS = {"1 rank": 1, "2 ranks": 2, "4 ranks": 4, "4, then 2 ranks": 2}
GLOBAL_BATCH = 32
SETTINGS = (
    "device=cpu", "data.num_workers=1", "training.optimizer=adamw", "training.lr=2e-3", "logging.log_frequency=1",
    "logging.tensorboard=false", "logging.pictures=false", "evaluation.eval_frequency=0", "evaluation.linear_epochs=0",
)  # fmt: skip


def train(settings: Sequence[str], steps: int, runs: Path) -> dict[str, list[float]]:
    """Return the loss of each step of each run; where one begins halfway, those before are the other run's."""
    losses, middle = dict[str, list[float]](), runs / "on-2" / "checkpoints" / f"step_{steps // 2:08d}"
    for name, ranks in RUNS.items():
        folder = f"on-{len(losses)}"
        changes = [f"data.batch_size={GLOBAL_BATCH // ranks}", f"logging.run_dir={runs}", f"logging.run_name={folder}"]
        changes += [f"training.max_steps={steps}", f"checkpoint.save_frequency={steps // 2}"]
        changes += [f"checkpoint.resume={middle}"] if "then" in name else []
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
        words = [sys.executable, *launcher, "-m", "train.run", "configs/quickstart.yaml", *SETTINGS, *settings, *changes]
        subprocess.run(words, check=True)
        values = [line["loss"] for line in read_metrics(runs / folder) if "loss" in line]
        losses[name] = losses["4 ranks"][: steps - len(values)] + values if "then" in name else values
    return losses


def compare(settings: Sequence[str], steps: int, out: Path) -> dict[str, float]:
    """Write OUT/ranks.csv and ranks.png, and return the largest relative difference of each run from the first one."""
    with tempfile.TemporaryDirectory() as runs:
        losses = train(settings, steps, Path(runs))
    (_, first), *others = losses.items()
    differences = {name: [abs(a / b - 1) for a, b in zip(values, first, strict=True)] for name, values in others}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "ranks.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", *losses), *zip(range(1, steps + 1), *losses.values(), strict=True)])
    figure, (upper, lower) = plt.subplots(2, figsize=(8, 6), sharex=True, layout="constrained")
    for number, (name, values) in enumerate(losses.items()):
        upper.plot(range(1, steps + 1), values, label=name, linewidth=7 - 2 * number)
        lower.semilogy(range(1, steps + 1), [max(value, 1e-8) for value in differences.get(name, [0.0] * steps)], f"C{number}")
    upper.set(ylabel="loss", title="One run on 1, 2 and 4 ranks, and on 4 that become 2 halfway")
    upper.legend()
    lower.set(ylabel="relative difference from 1 rank", xlabel="step")
    figure.savefig(out / "ranks.png", dpi=110)
    return {name: max(values) for name, values in differences.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=path_argument, help="The data, such as shards/sample.")
    parser.add_argument("--out", type=path_argument, default=Path("results"), help="The folder. The default is %(default)s.")
    args = parser.parse_args(arguments)
    return run_command("ranks", lambda: print(compare([f"data.data_path={args.shards}"], 100, args.out)))


if __name__ == "__main__":
    sys.exit(main())
