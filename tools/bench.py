"""Measure the project: `python tools/bench.py {convert,pipeline,save,scale,step,windows} [--json OUT]`.

One subcommand per file in `tools/benchmarks/`.
"""

import argparse
import json
import sys
from pathlib import Path

from tools.benchmarks import convert as bench_convert
from tools.benchmarks import pipeline as bench_pipeline
from tools.benchmarks import save as bench_save
from tools.benchmarks import scale as bench_scale
from tools.benchmarks import step as bench_step
from tools.benchmarks import windows as bench_windows


def main(arguments: list[str] | None = None) -> int:
    """Each subcommand prints its own table and returns the figures for `--json`."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in {
        "convert": bench_convert,
        "pipeline": bench_pipeline,
        "save": bench_save,
        "scale": bench_scale,
        "step": bench_step,
        "windows": bench_windows,
    }.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        command.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    try:
        figures = parsed.run(parsed)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if parsed.json:
        parsed.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
