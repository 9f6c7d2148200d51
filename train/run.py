"""Train from one YAML file: `python -m train.run configs/multicrop_training.yaml [section.key=value ...]`.

Several GPUs: `torchrun --nproc_per_node=8 -m train.run configs/multicrop_training.yaml`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from pipeline.shards.index import split_folder
from train.command import show_messages
from train.config.load import SHORT_FLAGS, annotated, load_config_with_origins
from train.config.schema import Config
from train.config.yaml12 import ConfigError
from train.output.display import LOADING

BAD_INPUT = 2
INTERRUPTED = 128 + 2  # the shell's number for SIGINT


def parse_arguments(arguments: Sequence[str] | None) -> tuple[Path, list[str], argparse.Namespace]:
    """The config file, all overrides as `section.key=value`, and the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m train.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--config", dest="config_flag", metavar="CONFIG", help="the same as the first argument")
    for flag, key in SHORT_FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="VALUE", help=f"short for {key}=VALUE")
    parser.add_argument(
        "--print-config", action="store_true", help="print every setting and where it comes from; no more"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="the same, and try data, model and memory; write nothing"
    )
    given = parser.parse_intermixed_args(arguments)
    overrides = list(given.overrides)
    if given.config_flag and given.config:
        overrides.insert(0, given.config)
    config = given.config_flag or given.config
    if config is None:
        parser.error("which config? For example: python -m train.run configs/quickstart.yaml")
    overrides += [f"{key}={value}" for flag, key in SHORT_FLAGS.items() if (value := getattr(given, flag)) is not None]
    return Path(config), overrides, given


def refuse_early(config: Config) -> None:
    """Raise ValueError or FileNotFoundError for what can be told at once, without torch."""
    split_folder(config.data.dataset, config.data.data_path, "train")
    resume = config.checkpoint.resume
    if resume not in ("auto", "none") and not (Path(resume) / "manifest.json").is_file():
        raise FileNotFoundError(
            f"checkpoint.resume: {resume} is no checkpoint; a folder runs/NAME/checkpoints/step_*, auto or none"
        )
    if config.logging.wandb.enabled and find_spec("wandb") is None:
        raise ValueError(
            "logging.wandb.enabled: the package wandb is not installed; `pip install wandb`, or write false"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    path, overrides, given = parse_arguments(arguments)
    is_first = os.environ.get("RANK", "0") == "0"
    console = Console(soft_wrap=True, quiet=not is_first)
    show_messages(console)
    try:
        config, origins = load_config_with_origins(path, overrides)
        if given.print_config or given.dry_run:
            console.out(annotated(config, origins), highlight=False)
        if given.print_config:
            return 0
        refuse_early(config)
        console.print(LOADING, style="dim")
        # Only now: they take about ten seconds, and a wrong setting should be told at once.
        if given.dry_run:
            from train.dry_run import dry_run

            for line in dry_run(config):
                console.print(line, highlight=False)
            return 0
        from train.session import run

        return run(config, console)
    except (ValueError, OSError) as error:  # OSError: a disk or a folder that refuses, which is none of ours
        if is_first or not isinstance(error, ConfigError):  # a wrong file is told once, what befell a rank by that rank
            print(error, file=sys.stderr)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        print(
            f"{error}: pip install --require-hashes -r requirements.lock; python tools/doctor.py says more",
            file=sys.stderr,
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        # While training, a signal is caught and answered with a checkpoint; this one came before or after.
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
