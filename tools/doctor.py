"""Find what would go wrong on this machine, each with a suggested fix: `python tools/doctor.py [CONFIG] [section.key=value ...]`.

The exit code is 1 when a check fails, and 2 when the settings themselves are wrong.
"""

import argparse
import faulthandler
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.text import printable, say
from tools.checks import machine, packages
from tools.checks.check import Case, Check, examine
from train.command import SETTING, CommandParser, path_argument, place_argument, run_command, write_json
from train.config.load import load_config

FAILED = 1
# In the order of the report: later checks rely on earlier ones.
CHECKS: dict[str, Check] = {
    "packages": packages.check_packages,
    "DALI and nvImageCodec": packages.check_dali,
    "shared memory": machine.check_shared_memory,
    "run folder": machine.check_run_folder,
    "cores and threads": machine.check_cores,
    "GPUs": machine.check_gpus,
    "decoder": machine.check_decoder,
    "shards": machine.check_shards,
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", nargs="?", type=path_argument, help="The YAML file of a run, whose data, threads and device are checked too.")
    add("overrides", nargs="*", metavar=SETTING, help="Settings that replace those of the file.")
    add("--data", type=place_argument, metavar="FOLDER", help="Check these shards. The default is data.data_path of the config.")
    add("--out", type=path_argument, metavar="FOLDER", help="Check this folder for runs. The default is the config's, or runs.")
    parser.add_json("a list of {name, status, text, fix, seconds}")
    return parser.parse_intermixed_args(arguments)


def make_case(options: argparse.Namespace) -> Case:
    """Raises ValueError for a wrong config, FileNotFoundError for a missing one."""
    if options.config is None:
        return Case(None, options.data and str(options.data), options.out or Path("runs"))
    changes = [f"data.data_path={options.data}"] if options.data else []
    changes += [f"logging.run_dir={options.out}"] if options.out else []
    config = load_config(options.config, [*options.overrides, *changes])
    return Case(config, config.data.data_path, Path(config.logging.run_dir))


def diagnose(options: argparse.Namespace) -> int:
    """Run all checks and print each finding at once, so that it is visible even if the next check takes the process down."""
    case, rows = make_case(options), []
    for name, check in CHECKS.items():
        started = time.monotonic()
        finding = examine(check, case)
        rows.append({"name": name, **asdict(finding), "seconds": round(time.monotonic() - started, 2)})
        if options.json != "-":
            fix = f"\n      -> {finding.fix}" if finding.fix else ""
            say(f"{finding.status:4}  {name}: {printable(finding.text)}{fix}")
    counts = Counter(row["status"] for row in rows)
    if options.json != "-":
        print("{ok} ok, {warn} with a warning, {fail} failed, {skip} skipped, for the reasons above".format_map(counts))
    if options.json:
        write_json(options.json, rows)
    return FAILED if counts["fail"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("doctor", lambda: diagnose(parse_arguments(arguments)))


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
