"""Several ranks under torchrun, over gloo: the same data and losses as one, stops, and what happens when one is lost."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_run import QUICKSTART as CONFIG
from tests.train.test_run import ROOT, command
from tools.studies.ranks import SETTINGS, compare
from train.distributed import CHECKPOINT_WRITER, LOST, Ranks, Watchdog, process_group
from train.run import main

EVERY_STEP = ["training.max_steps=24", "logging.log_frequency=1", "checkpoint.save_frequency=1000"]
RANKS = 3
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])  # so that each rank starts at once
HANGS_S = 900  # only ends a hang: processes that share one busy core take minutes


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def torchrun(arguments: list[str], ranks: int = 2) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*line, "-m", "train.run", *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    log = run / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, by rank."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found.update({int(v[5:]): int(child) for v in environment if v.startswith(b"RANK=")})
    return [found[rank] for rank in sorted(found)]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_two_ranks_stopped_by_sigterm_and_resumed_on_one_rank_that_accumulates_equal_an_uninterrupted_run(
    data_path: Path, tmp_path: Path
) -> None:
    """Bit for bit, where the loss is a mean over the images: without the terms that compare them with one another."""
    terms = ["loss.view_weight=0", "loss.sigreg_weight=0", "data.batch_size=4"]
    alone = [*EVERY_STEP, *terms, "training.accumulation_steps=2"]
    assert main(command(CONFIG, data_path, tmp_path, *alone, "logging.run_name=whole")) == 0
    process = torchrun(command(CONFIG, data_path, tmp_path, *EVERY_STEP, *terms, "logging.run_name=parts"))
    wait_for_step(tmp_path / "parts", 11, process)
    os.kill(ranks_of(process)[1], signal.SIGTERM)  # one of them is enough
    said = process.communicate(timeout=HANGS_S)[0]
    assert said.count("stopped at step") == 1, said
    assert re.search(r"exitcode\s*: 75", said)
    (checkpoint,) = (tmp_path / "parts" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] >= 11
    assert main(command(CONFIG, data_path, tmp_path, *alone, "logging.run_name=parts")) == 0
    assert_same_checkpoint(*(tmp_path / name / "checkpoints" / "step_00000024" for name in ("whole", "parts")))
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[(line["step"], line["epoch"], line["loss"]) for line in map(json.loads, log) if "loss" in line] for log in logs]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_one_run_has_the_same_curve_on_one_two_and_four_ranks_and_after_a_change_in_the_middle(
    data_path: Path, tmp_path: Path
) -> None:
    _, *settings = command(CONFIG, data_path, tmp_path)
    taken = {setting.partition("=")[0] for setting in (*SETTINGS, "data.batch_size=", "logging.run_dir=")}
    differences = compare([each for each in settings if each.partition("=")[0] not in taken], 6, tmp_path / "out")
    assert set(differences) == {"2 ranks", "4 ranks", "4, then 2 ranks"}
    assert max(differences.values()) < 1e-5
    assert (tmp_path / "out" / "ranks.csv").read_text().count("\n") == 7
    assert (tmp_path / "out" / "ranks.png").stat().st_size > 5_000


@pytest.mark.slow
def test_torchrun_stopped_by_sigterm_and_started_again_ends_with_the_weights_of_an_uninterrupted_run(
    data_path: Path, tmp_path: Path
) -> None:
    """With all terms of the loss, whose statistics are those of both ranks."""
    for name in ("whole", "parts"):
        process = torchrun(command(CONFIG, data_path, tmp_path, *EVERY_STEP, f"logging.run_name={name}"))
        if name == "parts":
            wait_for_step(tmp_path / name, 5, process)
            process.send_signal(signal.SIGTERM)
            assert "stopped at step" in process.communicate(timeout=HANGS_S)[0]
            process = torchrun(command(CONFIG, data_path, tmp_path, *EVERY_STEP, f"logging.run_name={name}"))
        said = process.communicate(timeout=HANGS_S)[0]
        assert process.returncode == 0, said
    assert_same_checkpoint(*(tmp_path / name / "checkpoints" / "step_00000024" for name in ("whole", "parts")))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_run_and_the_others_say_where_they_stood(
    trouble: signal.Signals, data_path: Path, tmp_path: Path
) -> None:
    settings = ["training.epochs=10000", "training.timeout_s=60", "logging.log_frequency=1"]
    process = torchrun(command(CONFIG, data_path, tmp_path, *settings))
    wait_for_step(tmp_path / "quickstart", 5, process)
    victim = ranks_of(process)[1]
    os.kill(victim, trouble)
    said = process.communicate(timeout=HANGS_S)[0]  # a stopped process takes torchrun's half minute to be killed
    assert process.returncode == 1
    if trouble == signal.SIGKILL:
        assert f"rank 0 of 2: lost rank 1 (process {victim})" in said
    else:
        assert "rank 0 of 2: no step for 60 s (training.timeout_s); it stands in" in said
    assert "trainer.py" in said
    assert json.loads((tmp_path / "quickstart" / "heartbeat.json").read_text())["status"] != "complete"


def rank_in_trouble(trouble: str, rank: int, folder: Path) -> None:
    """The loop of training around ranks that agree on every step, of which rank 1 comes to grief in its tenth."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(folder.name), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    ranks = Ranks(rank, RANKS)
    with process_group(ranks, torch.device("cpu")), Watchdog(ranks, 2.0) as watchdog:
        for step in count():
            if step == 10 and rank == 1:
                threading.Thread(target=save_slowly, args=(folder,), name=CHECKPOINT_WRITER).start()
                come_to_grief(trouble)
            ranks.barrier()
            watchdog.beat()


def save_slowly(folder: Path) -> None:
    time.sleep(1)
    (folder / "saved").touch()


def come_to_grief(trouble: str) -> None:
    match trouble:
        case "raises":
            raise ArithmeticError("a bug in step 10")
        case "is given a bad file":
            raise ValueError("shards/mine: unreadable")
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs":
            time.sleep(600)


@pytest.mark.parametrize(
    ("trouble", "said", "code"),
    [
        ("raises", "rank 1 of 3: ArithmeticError: a bug in step 10", 1),
        ("is given a bad file", "rank 1 of 3: shards/mine: unreadable", 2),
        ("is killed", "of 3: lost rank 1 (process ", -signal.SIGKILL),
        ("hangs", "rank 1 of 3: no step for 2 s (training.timeout_s); it stands in come_to_grief of ", 1),
    ],
)
def test_when_one_of_three_ranks_fails_all_end_and_the_first_line_names_it(
    trouble: str, said: str, code: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / str(free_port())
    folder.mkdir()
    processes = [SERVER.Process(target=rank_in_trouble, args=(trouble, rank, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 30
    for process in processes:
        process.join(deadline - time.monotonic())
    still_there = [process.kill() for process in processes if process.exitcode is None]
    lines = (folder / "said").read_text().splitlines()
    assert still_there == [], lines
    assert said in lines[0]
    assert [process.exitcode for process in processes] == [LOST, code, LOST]
    if trouble != "is killed":
        gone = rf"lost (rank \d \(process \d+\), )*rank 1 \(process {processes[1].pid}\)"  # and perhaps the third
        assert all(any(re.match(f"rank {rank} of 3: {gone}", line) for line in lines) for rank in (0, 2)), lines
        assert (folder / "saved").exists()


def test_a_pause_of_the_watchdog_lasts_until_the_next_beat() -> None:
    text = (
        "import time; from train.distributed import Ranks, Watchdog\n"
        "def asleep_at_the_wheel(): time.sleep(60)\n"
        "with Watchdog(Ranks(3, 4), 1.0) as watchdog:\n"
        "    watchdog.beat(); time.sleep(0.5); watchdog.pause(); time.sleep(2); watchdog.beat()\n"
        "    print('awake', flush=True)\n"
        "    asleep_at_the_wheel()\n"
    )
    result = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (1, "awake\n")
    assert result.stderr.startswith("rank 3 of 4: no step for 1 s (training.timeout_s); it stands in asleep_at_the_wheel of ")
    assert "line 2 in asleep_at_the_wheel" in result.stderr
