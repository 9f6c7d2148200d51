"""Train from one YAML file: `python -m train.run configs/multicrop_training.yaml [section.key=value ...]`.

Several GPUs: `torchrun --nproc_per_node=8 -m train.run configs/multicrop_training.yaml`.
"""

import argparse
import os
import shutil
import signal
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from pipeline.files import expand_path
from train.command import BAD_INPUT, SETTING, CommandParser, StopSignal, on_signal, run_command, show_messages
from train.config.load import SHORT_FLAGS, load_config_with_origins
from train.config.schema import Config
from train.config.yaml12 import ConfigError
from train.output.display import LOADING
from train.shards import with_shards


def parse_arguments(arguments: Sequence[str] | None) -> tuple[Path, list[str], argparse.Namespace]:
    """Return the config file, all overrides as `section.key=value`, and the options."""
    parser = CommandParser(prog="python -m train.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", nargs="?", help="The YAML file of the run.")
    replacing = "Settings that replace those of the file, for example training.max_steps=500."
    add("overrides", nargs="*", metavar=SETTING, help=replacing)
    add("--config", dest="config_flag", metavar="CONFIG", help="The same as the first argument.")
    short = parser.add_argument_group("shortcuts for common settings")
    for flag, key in SHORT_FLAGS.items():
        short.add_argument(f"--{flag}", metavar="VALUE", help=f"Set {key}. By default the file decides.")
    trial = parser.add_argument_group("look before you train")
    for flag, effect in (
        ("--print-config", "Print every setting and where it comes from, and exit."),
        ("--dry-run", "Print the settings, take one step, print the memory that it used, and exit. Nothing is written."),
        ("--prove", "Train with three seeds from model.weights, and say in one line whether that helped, by k-NN of labels."),
    ):
        trial.add_argument(flag, action="store_true", help=effect)
    options = parser.parse_intermixed_args(arguments)
    overrides = list(options.overrides)
    if options.config_flag and options.config:  # the first positional argument is an override
        overrides.insert(0, options.config)
    config = options.config_flag or options.config
    if config is None:
        parser.error("which config? For example: python -m train.run configs/quickstart.yaml")
    shortcuts = {key: getattr(options, flag) for flag, key in SHORT_FLAGS.items()}
    overrides += [f"{key}={value}" for key, value in shortcuts.items() if value is not None]
    return Path(config), overrides, options


def check_settings(config: Config) -> Config:
    """Return the config with shards in data.data_path. Raises ValueError or FileNotFoundError for what needs no torch."""
    if (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1" and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"SLURM_NTASKS={tasks}, but without torchrun each task would train alone, all of them into one run folder. Start "
            "torchrun on each machine, as `sbatch docker/slurm.sbatch CONFIG` does, or one process: `srun --ntasks=1 ...`"
        )
    resume = config.checkpoint.resume
    if resume not in ("auto", "none") and not (Path(resume) / "manifest.json").is_file():
        raise FileNotFoundError(
            f"checkpoint.resume: {resume} is not a checkpoint; give a folder runs/NAME/checkpoints/step_*, auto or none"
        )
    if config.logging.wandb and find_spec("wandb") is None:
        raise ValueError("logging.wandb: the package wandb is not installed; `pip install wandb`, or set it to false")
    if config.training.compile:
        find_compiler()
    return with_shards(config)


def find_compiler() -> str:
    """Return the path of the C++ compiler that training.compile needs. Raises ValueError for what is missing."""
    compiler, header = shutil.which(os.environ.get("CXX", "g++")), Path(sysconfig.get_paths()["include"], "Python.h")
    if compiler is None or not header.is_file():
        missing = header if compiler else "C++ compiler"
        raise ValueError(
            f"training.compile: there is no {missing}, which torch.compile needs. `apt-get install g++ python3-dev`, or set "
            "training.compile=false"
        )
    return compiler


def launch(options: argparse.Namespace, path: Path, overrides: list[str]) -> int:
    """Load, print and check the settings, then train. Returns the exit code."""
    is_first = os.environ.get("RANK", "0") == "0"
    console = Console(soft_wrap=True, quiet=not is_first, stderr=options.prove)
    show_messages(console)
    try:
        config, origins = load_config_with_origins(Path(expand_path(str(path))), overrides)
    except ConfigError:
        if is_first:  # the same on all ranks: reported once
            raise
        return BAD_INPUT
    if options.print_config or options.dry_run:
        console.out(config.to_yaml(origins), end="", highlight=False)
    if options.print_config:
        return 0
    config = check_settings(config)
    console.print(LOADING, style="dim")
    return prove(config, console) if options.prove else execute(config, console, options.dry_run)


def prove(config: Config, console: Console) -> int:
    """Train with each seed, then print whether it helped. Returns the exit code."""
    from train.adapt.prove import seeded_runs, verdict
    from train.output.folder import run_folder

    if "WORLD_SIZE" in os.environ:
        raise ValueError("--prove: is for one process; start it without torchrun")
    runs = seeded_runs(config)
    for run in runs:
        if code := execute(run, console, is_dry_run=False):
            return code
    print(verdict([run_folder(run) for run in runs]))
    return 0


def execute(config: Config, console: Console, is_dry_run: bool) -> int:
    """Train, evaluate and report, or only take one step. Returns the exit code."""
    # Imported only now: it takes about ten seconds, and wrong settings are reported at once.
    import torch

    from pipeline.dataset import resolve_device
    from train.build import torch_threads
    from train.distributed import process_group, ranks_from_environment, use_device
    from train.output.folder import run_folder
    from train.recorder import dry_run, open_recorder
    from train.trainer import Trainer, train

    ranks, kind = ranks_from_environment(), resolve_device(config.device)
    device = use_device(ranks, kind)
    if kind == "cpu":
        torch.set_num_threads(torch_threads(config))
    with ExitStack() as opened:
        with process_group(ranks, device), out_of_memory_explained(config, device):
            if is_dry_run:
                dry_run(Trainer(config, ranks))
                return 0
            trainer = Trainer(config, ranks, quarantine=run_folder(config) / "quarantine.jsonl")
            recorder = open_recorder(trainer, console, opened)
            with StopSignal() as stop, recorder or nullcontext():
                code = train(trainer, recorder, stop)
                if recorder and code:  # here, where the signals of a torchrun that sees another rank leave do no harm
                    recorder.close(code)
        if recorder and not code:
            with recorder, out_of_memory_explained(config, device):
                code = recorder.report()  # rank 0 evaluates after the others have left
            recorder.close(code)
    return code


@contextmanager
def out_of_memory_explained(config: Config, device: object) -> Iterator[None]:
    """Turn the out-of-memory errors of torch, DALI and CUDA into a ValueError that names the settings to change, in order."""
    from pipeline.crops.device import is_out_of_memory  # loads torch

    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        crops, checkpointing = config.data.multicrop, str(config.model.grad_checkpointing).lower()
        raise ValueError(
            f"out of memory: a step does not fit the memory of {device}. Lower, in this order, "
            f"data.multicrop.num_local_crops (now {crops.num_local_crops}), data.batch_size (now {config.data.batch_size}) or "
            f"data.multicrop.local_crop_size (now {crops.local_crop_size}); then set model.grad_checkpointing=true (now "
            f"{checkpointing}), which takes more time. --dry-run prints what a step uses"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    path, overrides, options = parse_arguments(arguments)
    # While training, signals are caught and answered with a checkpoint; before and after that, they end the command as Ctrl-C
    # does. A terminal that is closed ends nothing.
    resumes, stop = "interrupted; the same command continues from the newest checkpoint", signal.default_int_handler
    with on_signal(signal.SIGHUP, signal.SIG_IGN), on_signal(signal.SIGTERM, stop), on_signal(signal.SIGUSR1, stop):
        return run_command("train", lambda: launch(options, path, overrides), interrupted=resumes)


if __name__ == "__main__":
    sys.exit(main())
