"""One run, from its settings to its pictures. `train/run.py` is the command in front of it."""

import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console

from pipeline.dataset import resolve_device
from train.checkpoint import checkpoint_path
from train.config.schema import Config
from train.distributed import Watchdog, joined, ranks_from_environment
from train.loop import gone_wrong, train_steps
from train.memory import is_out_of_memory, out_of_memory_advice
from train.output.advice import advice
from train.output.display import Display, summary_table
from train.output.folder import StopSignal
from train.output.log import MetricsLog
from train.output.pictures import NEIGHBOURS, QUERIES, draw_run, read_picture
from train.output.report import write_report, write_summary
from train.prepare import Session, newest, prepare

LOST = 1  # another rank died or hangs
STOPPED = 75  # EX_TEMPFAIL: stopped on request with a checkpoint; the same command goes on from it
NOT_WRITTEN = 4  # the disk refused the last checkpoint or the summary
DIVERGED = 3  # too many steps without finite numbers; the last checkpoint is sound


def run(config: Config, console: Console) -> int:
    """Train, evaluate and draw; returns the exit code. On rank 0 alone there is something to see."""
    ranks, kind = ranks_from_environment(), resolve_device(config.device)
    with joined(ranks, kind):
        session = prepare(config, console, ranks, ranks.device(kind))
        with StopSignal(console.print) as stop:
            try:
                code = train(session, stop)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise ValueError(
                        out_of_memory_advice(config, ranks.device(kind), session.settings.use_amp)
                    ) from None
                if ranks.world_size == 1:
                    raise
                # Most likely another rank has died, and its own message says why; where this one stood may help as well.
                traceback.print_exc()
                print(f"rank {ranks.rank}: lost the others at step {session.state.step}", file=sys.stderr)
                return LOST
    code = code if code or not ranks.is_first else finish(session)
    session.tell_status({0: "complete", STOPPED: "stopped", DIVERGED: "diverged"}.get(code, "failed"))
    if session.wandb is not None:
        session.wandb.finish(exit_code=code)
    return code


def train(session: Session, stop: StopSignal) -> int:
    """Train to the end: 0, STOPPED or DIVERGED. Numbers gone wrong send the run back to its last checkpoint, once each."""
    gone_back_to: Path | None = None
    while True:
        train_once(session, stop)
        state = session.state
        if not gone_wrong(state, session.settings):
            break
        last_sound = newest(session)
        bad = f"step {state.step}: {state.skipped_in_a_row} steps in a row without a finite loss and gradient"
        if last_sound is None or last_sound == gone_back_to:
            again = " again" if last_sound else ""
            session.say(
                f"{bad}{again}; stopped. No weight was touched by them. Lower training.lr or training.grad_clip, lengthen "
                "training.warmup_epochs, or set training.use_amp=false; the same command then goes on"
            )
            return DIVERGED
        session.say(f"{bad}; going back to the last checkpoint")
        gone_back_to = last_sound
        session.restore(last_sound)
    if state.step < session.settings.total_steps:
        session.save()
        session.writer.wait()
        session.ranks.any(False)  # torchrun gives the others half a minute once one rank has left
        session.say(f"stopped at step {state.step}; the same command goes on from there")
        return STOPPED
    session.writer.wait()
    return 0


def train_once(session: Session, stop: StopSignal) -> None:
    """Until the end, a stop, or numbers gone wrong."""
    config, state, settings, ranks = session.config, session.state, session.settings, session.ranks
    per_epoch = len(session.loader) // settings.accumulation_steps
    with (
        open_metrics(session) as metrics,
        Display(session.console, config.logging.run_name, state.step, settings.total_steps, per_epoch) as display,
        Watchdog(ranks, config.training.timeout_s) as watchdog,
    ):

        def log(values: dict[str, float]) -> None:
            if metrics is not None:
                metrics.write(state.step, values)

        def probe() -> None:
            watchdog.rest()
            probe_now(session, log, metrics)
            watchdog.beat()

        def show() -> None:
            display.update(state)
            if session.heartbeat is not None:
                session.heartbeat.beat(state)

        def stop_now() -> bool:
            watchdog.beat()
            return ranks.any(stop.asked)

        train_steps(
            session.model,
            session.replica,
            session.masks,
            session.optimizer,
            session.loader,
            state,
            settings,
            ranks,
            log=log,
            tell=session.say,
            show=show,
            probe=probe,
            save=session.save,
            stop=stop_now,
        )


def probe_now(session: Session, log: Callable[[dict[str, float]], None], metrics: MetricsLog | None) -> None:
    """Measure k-NN and draw, on the first rank, while the others wait."""
    if session.probe is not None:
        figures = session.probe.online()
        session.state.knn, session.state.knn_step = figures.get("knn"), session.state.step
        log(figures)
        show_pictures(session, metrics)
    session.ranks.any(False)


def open_metrics(session: Session) -> AbstractContextManager[MetricsLog | None]:
    if not session.ranks.is_first:
        return nullcontext()
    tensorboard = session.config.logging.tensorboard
    return MetricsLog(session.folder, tensorboard, session.state.step, session.say, session.wandb)


def show_pictures(session: Session, metrics: MetricsLog | None) -> list[Path]:
    """Draw the pictures of the run as it is now, and put them into its log."""
    neighbours = [] if session.probe is None else session.probe.neighbours(QUERIES, NEIGHBOURS)
    figures = draw_run(session.folder, session.config, session.dataset, session.model, session.masks, neighbours)
    if metrics is not None:
        for figure in figures:
            metrics.picture(session.state.step, figure.stem, read_picture(figure))
    return figures


def finish(session: Session) -> int:
    """Evaluate and draw, on rank 0."""
    session.console.print("evaluating and drawing ...", style="dim")
    assert session.probe is not None
    folder, state = session.folder, session.state
    session.tell_status("evaluating")
    try:
        with open_metrics(session) as metrics:
            summary = write_summary(folder, session.config, state, session.probe, session.model.encoder.width)
            figures = show_pictures(session, metrics)
        hints = advice(session.config, summary)
        write_report(folder, summary, hints, figures)
    except OSError as error:
        session.say(f"{folder}: the summary could not be written ({error}); the same command tries again")
        return NOT_WRITTEN
    session.console.print(summary_table(summary))
    for hint in hints:
        session.say(hint)
    session.say(f"report: {folder / 'report.md'}, pictures: {folder / 'figures'}")
    if checkpoint_path(session.checkpoints, state.step).exists():
        return 0
    session.say(
        f"the weights of step {state.step} are NOT saved: free some space; the same command goes on from the last"
    )
    return NOT_WRITTEN
