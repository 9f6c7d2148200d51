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
    state = RunState(step=84_123, images=84_123 * 64, train_s=84_123 * 0.9, wait_s=84_123 * 0.07, loss_last=12.3456)
    with Display(console, "multicrop_training", 0, 2_001_700, 20_017) as display:
        display.update(state)
    last = said.getvalue().rsplit("\x1b[2K", 1)[-1].splitlines()[0]
    assert "84123/2001700" in last
    assert "ETA" in last
    assert "loss 12.3456" in last
    assert ("loss 12.3456 · 71 images/s · data wait 8% · epoch 4.2/100" in last) == (width > 80)


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
