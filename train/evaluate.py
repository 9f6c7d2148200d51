"""Measure a trained encoder: `python -m train.evaluate RUN|CHECKPOINT --data SHARDS --probe knn linear attentive lowshot`.

Features are those of the moving-average encoder on deterministic centre crops, made by the same DALI pipeline as in training.
Each probe is also given raw pixels and the run's random initialisation. The same command gives the same figures.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from train.output.display import LOADING

PROBES = ("knn", "linear", "attentive", "lowshot")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, help="a run's folder, whose newest checkpoint is taken, or one checkpoint of it"
    )
    parser.add_argument("--data", type=Path, metavar="SHARDS", help="holds train/ and val/; default: the run's own")
    parser.add_argument(
        "--probe", nargs="+", choices=PROBES, default=["knn", "linear"], metavar="PROBE",
        help=f"of {', '.join(PROBES)}; default: knn linear",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, help="settings of the checkpoint; default: config.yaml of its run")
    parser.add_argument("--max-samples", type=int, metavar="N", help="images of each split; default: the run's own")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), help="default: the run's own")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse_arguments(arguments)
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS repeats itself only with a workspace of its own
    print(LOADING, file=sys.stderr)
    try:
        import torch

        from train.evaluation.offline import evaluate, find_checkpoint, table

        torch.use_deterministic_algorithms(True, warn_only=True)
        checkpoint, config = find_checkpoint(given.run, given.config, given.data, given.max_samples, given.device)
        report = evaluate(checkpoint, config, tuple(given.probe), lambda text: print(text, file=sys.stderr))
        print(table(report))
        if given.json is not None:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(report, indent=1) + "\n")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
