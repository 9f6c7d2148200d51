"""Measure a trained encoder: `python -m train.evaluate RUN|CHECKPOINT --data SHARDS --probe knn linear`.

Features are those of the moving-average encoder on deterministic centre crops, made by the same DALI pipeline as in training.
Each probe also measures raw pixels and the run's random initialisation; placement accuracy, which needs no labels, is always
measured. The same command prints the same numbers.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from train.command import CommandParser, device_argument, path_argument, place_argument, run_command, show_messages, write_json
from train.output.display import LOADING
from train.shards import with_shards

PROBES = ("knn", "linear", "dense")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m train.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, probes = parser.add_argument, f"The probes: any of {', '.join(PROBES)}. The default is knn and linear."
    add("run", type=path_argument, help="The folder of a run, whose newest checkpoint is measured, or one of its checkpoints.")
    add("--probe", nargs="+", choices=PROBES, default=["knn", "linear"], metavar="PROBE", help=probes)
    masks = "For dense: train/ and val/ with NAME.seg.png beside images, or a tree of VOC, ADE20K or Cityscapes."
    add("--masks", type=path_argument, metavar="FOLDER", help=masks)
    parser.add_json("the results")
    add = parser.add_argument_group("instead of what the run was trained with").add_argument
    add("--data", type=place_argument, metavar="SHARDS", help="Measure on this folder, which contains train/ and val/.")
    add("--config", type=path_argument, help="Read the settings from this file instead of the run's config.yaml.")
    add("--max-samples", type=int, metavar="N", help="Use at most this many images of each split.")
    add("--device", type=device_argument, choices=("auto", "cpu", "gpu"), help="Measure on this device.")
    return parser.parse_args(arguments)


def evaluate_checkpoint(args: argparse.Namespace) -> None:
    if ("dense" in args.probe) != (args.masks is not None):
        raise ValueError("--probe dense and --masks FOLDER need each other")
    # cuBLAS is deterministic only with its own workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    show_messages()
    print(LOADING, file=sys.stderr)
    import torch

    from train.evaluation.offline import evaluate, find_checkpoint, report_table

    torch.use_deterministic_algorithms(True, warn_only=True)
    checkpoint, config = find_checkpoint(args.run, args.config, args.data, args.max_samples, args.device)
    report, tables = {}, []
    if pooled := tuple(probe for probe in args.probe if probe != "dense"):
        report = evaluate(checkpoint, with_shards(config), pooled)
        tables.append(report_table(report))
    if args.masks is not None:
        from train.evaluation.dense import dense_table, evaluate_dense

        report["dense"] = evaluate_dense(checkpoint, config, args.masks)
        tables.append(dense_table(report["dense"]))
    if args.json != "-":
        print("\n\n".join(tables))
    if args.json is not None:
        write_json(args.json, report)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return run_command("evaluate", lambda: evaluate_checkpoint(args))


if __name__ == "__main__":
    sys.exit(main())
