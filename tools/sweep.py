"""Train every combination of some settings: `python tools/sweep.py CONFIG training.lr=1e-3,2e-3 seed=0,1 [--parallel N]`.

A setting with commas outside of brackets has several values. Each combination is a run of its own in runs/NAME-sweep, named by
its values. The same command continues a stopped sweep and skips complete runs; at the end stands a comparison of all.
"""

import argparse
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from pipeline.text import plural, say
from tools.compare_runs import write_comparison
from tools.own_process import die_with_parent
from train.command import CommandParser, count_argument, path_argument, run_command
from train.config.load import load_config

COMMAS = re.compile(r",(?![^\[{]*[\]}])")  # outside of brackets


def plan(config: Path, settings: Sequence[str]) -> dict[str, list[str]]:
    """Return the settings of each run by its name. Raises ValueError for wrong settings and when none has several values."""
    choices = [[f"{key}={value}" for value in COMMAS.split(text)] for key, _, text in (s.partition("=") for s in settings)]
    if all(len(values) == 1 for values in choices):
        raise ValueError("no setting has several values; for example training.lr=1e-3,2e-3")
    folder, runs = "", dict[str, list[str]]()
    for combination in itertools.product(*choices):
        logging = load_config(config, combination).logging
        folder = folder or f"{Path(logging.run_dir) / logging.run_name}-sweep"
        varied = [text for text, values in zip(combination, choices, strict=True) if len(values) > 1]
        words = (text.partition("=") for text in varied)
        name = "__".join(re.sub(r"[^\w.-]+", "_", f"{key.rpartition('.')[2]}_{value}") for key, _, value in words)
        if name in runs:
            raise ValueError("two combinations have one name: give each value once")
        kept = [text for text in combination if not text.startswith(("logging.run_dir=", "logging.run_name="))]
        runs[name] = [*kept, f"logging.run_dir={folder}", f"logging.run_name={name}"]
    return runs


def sweep(args: argparse.Namespace) -> int:
    runs = plan(args.config, args.settings)
    say(f"{plural(len(runs), 'run')}, {args.parallel} at a time")
    folder = Path(next(iter(runs.values()))[-2].partition("=")[2])
    folder.mkdir(parents=True, exist_ok=True)

    def train(name: str) -> int:
        output = folder / f"{name}.log"
        with output.open("a") as log:
            command = [sys.executable, "-m", "train.run", str(args.config), *runs[name]]
            # A sweep that is killed has its runs save and stop.
            stop = partial(die_with_parent, number=signal.SIGTERM)
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=stop).returncode
        say(f"{name}: {'complete' if code == 0 else f'ended with code {code}; see {output}'}")
        return code

    with ThreadPoolExecutor(args.parallel) as pool:
        codes = list(pool.map(train, runs))
    if trained := {name: folder / name for name, code in zip(runs, codes, strict=True) if code == 0}:
        write_comparison(trained, folder / "comparison.html")
    return max(codes, key=abs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", type=path_argument, help="The YAML file of the runs.")
    add("settings", nargs="+", metavar="section.key=VALUE[,VALUE...]", help="Settings, some with several values.")
    add("--parallel", type=count_argument, default=1, metavar="N", help="Runs at a time. The default is %(default)s.")
    args = parser.parse_intermixed_args(arguments)
    return run_command("sweep", lambda: sweep(args), "interrupted; the same command continues the runs")


if __name__ == "__main__":
    sys.exit(main())
