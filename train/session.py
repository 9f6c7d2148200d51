"""One run, from its settings to its pictures. `train/run.py` is the command in front of it."""

import os
from pathlib import Path

import torch
from rich.console import Console

from train.build import (
    build_dataset,
    build_loader,
    build_masks,
    build_model,
    loop_settings,
    torch_device,
    torch_threads,
)
from train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from train.config import Config
from train.display import Display, summary_table
from train.loop import RunState, train_steps
from train.metrics import MetricsLog
from train.optim import build_optimizer
from train.probe import Probe
from train.report import draw_figures, write_summary
from train.run_folder import StopSignal, open_run_folder

STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint; the same command goes on from it


def run(config: Config, console: Console) -> int:
    """Train, evaluate and draw; returns the exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("torchrun: several ranks are not supported yet; start one process")
    device = torch_device(config)
    if device.type == "cpu":
        torch.set_num_threads(torch_threads())
    dataset = build_dataset(config)
    loader = build_loader(config, dataset, config.data.batch_size)
    settings = loop_settings(config, len(loader), device)
    model = build_model(config, device)
    masks = build_masks(config, model, device)
    if config.training.compile:
        model.compile(dynamic=False)  # in place: the parameters keep their names
    optimizer = build_optimizer(model, config.training.weight_decay, config.training.betas)

    folder = open_run_folder(config, console.print)
    checkpoints = folder / "checkpoints"
    probe = Probe(config, folder, model, console.print)
    probe.measure_baselines()
    state = RunState()
    newest = None
    if config.checkpoint.resume == "auto":
        newest = newest_checkpoint(checkpoints, console.print)
    elif config.checkpoint.resume != "none":
        newest = Path(config.checkpoint.resume)
    if newest is not None:
        saved = load_checkpoint(newest, model, optimizer)
        state = RunState(**saved["run"])
        loader.load_state_dict(saved["loader"])
        console.print(f"going on from {newest} (step {state.step} of {settings.total_steps})", highlight=False)
        if state.step >= settings.total_steps:
            console.print("this run is complete: a higher training.epochs goes on, checkpoint.resume=none starts over")

    def save() -> None:
        saved = {"step": state.step, "run": state.as_dict(), "loader": loader.state_dict()}
        save_checkpoint(checkpoints, model, optimizer, saved, config.checkpoint.keep_last_n)

    with (
        StopSignal(console.print) as stop,
        MetricsLog(folder, config.logging.tensorboard, state.step) as metrics,
        Display(console, config.logging.run_name, state.step, settings.total_steps, len(loader)) as display,
    ):
        train_steps(
            model,
            masks,
            optimizer,
            loader,
            state,
            settings,
            log=lambda values: metrics.write(state.step, values),
            show=lambda: display.update(state),
            probe=lambda: metrics.write(state.step, probe.online()),
            save=save,
            stop=lambda: stop.asked,
        )
        if state.step < settings.total_steps:
            save()
            console.print(f"stopped at step {state.step}; the same command goes on from there", highlight=False)
            return STOPPED
    console.print("evaluating and drawing ...", style="dim")
    summary = write_summary(folder, config, state, probe, model.encoder.width)
    figures = draw_figures(folder, config, dataset, model, masks)
    console.print(summary_table(summary))
    console.print("pictures: " + ", ".join(os.path.relpath(figure) for figure in figures), highlight=False)
    return 0
