"""Measure a trained encoder: `python -m train.evaluate RUN|CHECKPOINT --data SHARDS --probe knn linear attentive lowshot`.

Features are those of the moving-average encoder on deterministic centre crops, made by the same DALI pipeline as in training.
Each probe also measures raw pixels and the run's random initialisation. The same command gives the same numbers.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from train.command import run_command, show_messages
from train.output.display import LOADING

PROBES = ("knn", "linear", "attentive", "lowshot")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run",
        type=Path,
        help="The folder of a run, of which the newest checkpoint is measured, or one of its checkpoints.",
    )
    parser.add_argument(
        "--probe", nargs="+", choices=PROBES, default=["knn", "linear"], metavar="PROBE",
        help=f"What to measure: any of {', '.join(PROBES)}. The default is knn and linear.",
    )  # fmt: skip
    given = parser.add_argument_group("in place of what the run was trained with")
    given.add_argument(
        "--data", type=Path, metavar="SHARDS", help="Measure on this folder, which holds train/ and val/."
    )
    given.add_argument("--config", type=Path, help="Read the settings from this file, not from config.yaml of the run.")
    given.add_argument("--max-samples", type=int, metavar="N", help="Use at most this many images of each split.")
    given.add_argument("--device", choices=("auto", "cpu", "gpu"), help="Measure on this device.")
    parser.add_argument("--json", type=Path, metavar="OUT", help="Write the results to this file too.")
    return parser.parse_args(arguments)


def measure(given: argparse.Namespace) -> None:
    # cuBLAS gives the same results again only with a workspace of its own.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    show_messages()
    print(LOADING, file=sys.stderr)
    import torch

    from train.evaluation.offline import evaluate, find_checkpoint, report_table

    torch.use_deterministic_algorithms(True, warn_only=True)
    checkpoint, config = find_checkpoint(given.run, given.config, given.data, given.max_samples, given.device)
    report = evaluate(checkpoint, config, tuple(given.probe))
    print(report_table(report))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse_arguments(arguments)
    return run_command("evaluate", lambda: measure(given))


if __name__ == "__main__":
    sys.exit(main())
