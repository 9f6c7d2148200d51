"""Train from one YAML file: `python -m train.run configs/multicrop_training.yaml [section.key=value ...]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.index import split_folder
from train.config_file import SHORT_FLAGS, load_config
from train.config_yaml import ConfigError

BAD_INPUT = 2
INTERRUPTED = 128 + 2  # the shell's number for SIGINT


def parse_arguments(arguments: Sequence[str] | None) -> tuple[Path, list[str]]:
    """The config file, and all overrides as `section.key=value`."""
    parser = argparse.ArgumentParser(prog="python -m train.run", description=__doc__)
    parser.add_argument("config", nargs="?", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--config", dest="config_flag", metavar="CONFIG", help="the same as the first argument")
    for flag, key in SHORT_FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="VALUE", help=f"short for {key}=VALUE")
    given = parser.parse_intermixed_args(arguments)
    overrides = list(given.overrides)
    if given.config_flag and given.config:
        overrides.insert(0, given.config)
    config = given.config_flag or given.config
    if config is None:
        parser.error("which config? For example: python -m train.run configs/quickstart.yaml")
    overrides += [f"{key}={value}" for flag, key in SHORT_FLAGS.items() if (value := getattr(given, flag)) is not None]
    return Path(config), overrides


def main(arguments: Sequence[str] | None = None) -> int:
    path, overrides = parse_arguments(arguments)
    console = Console(soft_wrap=True)
    try:
        config = load_config(path, overrides)
        split_folder(config.data.dataset, config.data.data_path, "train")
        if os.environ.get("RANK", "0") == "0":
            console.print("loading torch, DALI and timm ...", style="dim")
        # Only now: they take about ten seconds, and a wrong setting should be told at once.
        from train.session import run

        return run(config, console)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, ConfigError):
            print(error, file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        # While training, a signal is caught and answered with a checkpoint; this one came before or after.
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
