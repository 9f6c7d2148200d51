"""The progress that a person watches, in terminals of several widths and in a log file."""

import io

import pytest
from rich.console import Console

from train.output.display import Display, ProgressDisplay
from train.state import RunState


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_terminal_shows_steps_and_eta_on_one_line_and_cuts_the_details_where_it_is_narrow(width: int) -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=width, color_system=None)
    state = RunState(
        step=84_123, images=84_123 * 64, train_s=84_123 * 0.9, wait_s=84_123 * 0.07, loss_last=12.3456, loss_step=84_120
    )
    with Display(console, "multicrop_training", 0, 2_001_700, 20_017) as display:
        display.update(state)
    last = said.getvalue().rsplit("\x1b[2K", 1)[-1].splitlines()[0]
    assert "84123/2001700" in last
    assert "ETA" in last
    assert "loss 12.3456" in last
    assert ("loss 12.3456 (step 84120) · 71 images/s · data wait 8% · epoch 4.2/100" in last) == (width > 80)


def test_the_loss_has_the_step_it_is_of_and_a_run_shorter_than_an_epoch_counts_none() -> None:
    written, state = io.StringIO(), RunState(images=64, train_s=1.0)
    with Display(Console(file=written, width=80), "short", 0, 20, 342) as display:
        for state.step in range(1, 21):
            if state.step % 8 == 0:
                state.loss_last, state.loss_step = 5.0 - state.step // 8, state.step
            display.update(state)
    last = written.getvalue().splitlines()[-1]
    assert last.startswith("short: step 20/20 · loss 3.0000 (step 16) · ")
    assert "epoch" not in last


def test_a_log_file_gets_the_first_and_the_last_line_and_few_between_each_with_name_count_and_details() -> None:
    written = io.StringIO()
    with ProgressDisplay(Console(file=written, width=80), "train", "image", 500) as progress:
        for done in range(501):
            progress.show(done, f"{done} rejected")
        progress.show(500, "500 rejected")
    lines = written.getvalue().splitlines()
    assert lines[0].startswith("train: image 1/500 · 1 rejected · ETA ")
    assert sum("500/500" in line for line in lines) == 1
    assert lines[-1] == "train: image 500/500 · 500 rejected · ETA 0:00:00"
    assert len(lines) < 10


def test_short_transient_work_leaves_no_line_in_a_log_file() -> None:
    written = io.StringIO()
    with ProgressDisplay(Console(file=written, width=80), "train", "image", 3, transient=True) as progress:
        for done in range(4):
            progress.show(done, "")
    assert written.getvalue() == ""
