"""However a run ends, it leaves a checkpoint, one line, a documented exit code, and its status in heartbeat.json."""

import errno
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pipeline.shards.index import open_index, save_index
from tests.train.test_run import QUICKSTART, ROOT, command
from train.checkpoint import list_checkpoints
from train.command import StopSignal
from train.config.load import load_config
from train.recorder import open_recorder
from train.run import main
from train.trainer import Trainer

STEPS = ["training.max_steps=8", "logging.log_frequency=1", "checkpoint.save_frequency=100"]


def status(run: Path) -> str:
    return json.loads((run / "heartbeat.json").read_text())["status"]


@pytest.mark.parametrize("parts", [1, 3])
def test_a_loader_that_fails_ends_in_a_checkpoint_and_the_same_command_then_ends_as_if_nothing_had_been(
    parts: int, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(data_path, tmp_path / "data")
    index = open_index(data / "train")
    save_index(index.folder, index.shards, index.samples)  # before the damage
    settings = [*STEPS, "data.max_bad_share=0", f"training.accumulation_steps={parts}", "data.batch_size=4"]
    whole = command(QUICKSTART, data, tmp_path, *settings, "logging.run_name=whole")
    arguments = command(QUICKSTART, data, tmp_path, *settings, "logging.run_name=broken")
    assert main(whole) == 0
    (tmp_path / "broken").mkdir()  # the baselines would meet the damage before the first step
    shutil.copy(tmp_path / "whole" / "baselines.json", tmp_path / "broken")
    position = 4 * (4 * parts + parts - 1)  # in the last part of step 5
    (row,) = Trainer(load_config(QUICKSTART, whole[1:])).loader.rows_at(0, position, position + 1)
    sample = index.samples[row]
    tar = data / "train" / index.shards[sample["shard"]]
    before = tar.read_bytes()
    with tar.open("r+b") as file:
        file.seek(sample["offset"])
        file.write(bytes(sample["size"]))
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "data.max_bad_share" in line]
    (saved,) = list_checkpoints(tmp_path / "broken" / "checkpoints")
    step = int(saved.name[5:])
    assert 0 < step <= 4
    assert line.endswith(f"stopped at step {step}; the same command continues from there")
    assert status(tmp_path / "broken") == "failed"

    tar.write_bytes(before)
    (tmp_path / "broken" / "quarantine.jsonl").unlink()
    assert main(arguments) == 0
    assert status(tmp_path / "broken") == "complete"
    ours, theirs = (load_file(tmp_path / name / "checkpoints/step_00000008/model.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("broken", "whole")]
    losses = [[(line["step"], line["loss"], line["epoch"]) for line in map(json.loads, log) if "loss" in line] for log in logs]
    assert losses[0] == losses[1]


def test_a_run_goes_on_when_its_terminal_is_closed(data_path: Path, tmp_path: Path) -> None:
    run = tmp_path / "quickstart"

    def hang_up() -> None:
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGHUP)

    thread = threading.Thread(target=hang_up, daemon=True)
    thread.start()
    assert main(command(QUICKSTART, data_path, tmp_path, *STEPS)) == 0
    thread.join()
    assert status(run) == "complete"


def test_a_second_ctrl_c_interrupts_unless_it_is_the_first_passed_on_twice(data_path: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_config(QUICKSTART, command(QUICKSTART, data_path, tmp_path, *STEPS)[1:]))
    with ExitStack() as opened:
        recorder = open_recorder(trainer, Console(quiet=True), opened)
        assert recorder is not None
        stops: list[bool] = []

        def press(stop: StopSignal) -> None:
            while len(stops) < 100:
                os.kill(os.getpid(), signal.SIGINT)
                stops.append(stop.asked)
                time.sleep(0.1)

        with pytest.raises(KeyboardInterrupt), recorder, StopSignal() as stop:
            press(stop)
    assert stops == [True] * len(stops)
    assert 2 <= len(stops) < 100
    assert status(tmp_path / "quickstart") == "interrupted"


@pytest.mark.parametrize("cause", ["pipe", "disk"])
def test_output_that_cannot_be_written_ends_no_command(cause: str) -> None:
    text = (
        "import sys; from rich.console import Console; from train.command import run_command, show_messages\n"
        "show_messages()\n"
        "def work():\n"
        "    for number in range(3000): Console().print(f'line {number}'); print('plain', flush=True)\n"
        "    print('done', file=sys.stderr); return 7\n"
        "sys.exit(run_command('test', work))\n"
    )
    read, write = os.pipe() if cause == "pipe" else (os.open("/dev/null", os.O_RDONLY), os.open("/dev/full", os.O_WRONLY))
    os.close(read)
    command = [sys.executable, "-c", text]
    result = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert result.returncode == 7
    says = [] if cause == "pipe" else [f"output lost: {os.strerror(errno.ENOSPC)}; the command goes on without it"]
    assert result.stderr.splitlines() == [*says, "done"]


@pytest.mark.slow
def test_soak_a_closed_pipe_and_a_closed_terminal_end_no_run(data_path: Path, tmp_path: Path) -> None:
    settings = ["training.epochs=1000", "training.max_steps=300", "logging.pictures=true", "logging.tensorboard=true"]
    arguments = command(QUICKSTART, data_path, tmp_path, *settings, "logging.run_name=piped")
    run = [sys.executable, "-m", "train.run"]
    piped = subprocess.Popen([*run, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert piped.stdout is not None
    assert piped.stderr is not None
    assert piped.stdout.readline().startswith("loading")
    piped.stdout.close()
    assert piped.stderr.read() == ""
    assert piped.wait() == 0
    assert status(tmp_path / "piped") == "complete"

    arguments = command(QUICKSTART, data_path, tmp_path, *settings, "logging.run_name=hung_up")
    child, terminal = pty.fork()  # the child leads a session of its own on a terminal of its own
    if not child:
        os.chdir(ROOT)
        os.execv(sys.executable, [*run, *arguments])
    log = tmp_path / "hung_up" / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        os.read(terminal, 1 << 16)
    os.close(terminal)  # SIGHUP, and EIO for whatever is written from now on
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert status(tmp_path / "hung_up") == "complete"
    assert list_checkpoints(tmp_path / "hung_up" / "checkpoints")[-1].name == "step_00000300"


@pytest.mark.slow
def test_soak_of_two_writers_one_goes_on_and_the_other_changes_nothing(data_path: Path, tmp_path: Path) -> None:
    settings = ["training.epochs=1000", "training.max_steps=300", "logging.log_frequency=1", "checkpoint.save_frequency=10"]
    arguments = [sys.executable, "-m", "train.run", *command(QUICKSTART, data_path, tmp_path, *settings)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    writers = [subprocess.Popen(arguments, **pipes) for _ in range(3)]
    errors = [writer.communicate()[1] for writer in writers]
    codes = [writer.returncode for writer in writers]
    assert sorted(codes) == [0, 2, 2]
    first = writers[codes.index(0)].pid
    for code, error in zip(codes, errors, strict=True):
        assert code == 0 or error.startswith(f"train: {tmp_path / 'quickstart'}: in use by process {first} on ")
    lines = map(json.loads, (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 301))

    # A second start of the same conversion beside the first, which stands still in its middle.
    convert = [sys.executable, "-m", "tools.make_shards", "convert", str(data_path / "train"), "--out", str(tmp_path / "out")]
    convert += ["--num-shards", "40", "--workers", "1", "--verify", "full"]
    held = subprocess.Popen(convert, **pipes)
    while not list((tmp_path / "out").glob("train/.*.partial")):
        assert held.poll() is None
    held.send_signal(signal.SIGSTOP)
    second = subprocess.run(convert, check=False, **pipes)
    assert second.returncode == 2
    assert f"in use by process {held.pid} on " in second.stderr
    held.send_signal(signal.SIGCONT)
    assert held.communicate()[1] == ""
    assert held.returncode == 0
