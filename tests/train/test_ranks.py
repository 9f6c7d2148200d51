"""Several ranks under torchrun, over gloo: the same data and losses as one, stops, and what happens when one is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_run import QUICKSTART as CONFIG
from tests.train.test_run import ROOT, command
from train.run import main

EVERY_STEP = ["training.max_steps=24", "logging.log_frequency=1", "checkpoint.save_frequency=1000"]
HANGS_S = 900  # only ends a hang: processes that share one busy core take minutes


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
    losses = [[(line["step"], line["epoch"], line["loss"]) for line in map(json.loads, log)] for log in logs]
    assert losses[0] == losses[1]


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
    os.kill(ranks_of(process)[1], trouble)
    said = process.communicate(timeout=HANGS_S)[0]  # a stopped process takes torchrun's half minute to be killed
    assert process.returncode == 1
    if trouble == signal.SIGKILL:
        assert "rank 0: lost the others at step" in said
    else:
        assert re.search(r"rank 0, process \d+: ends with its stacks after 60 s without a step \(training.timeout_s\)", said)
        assert "Timeout (0:01:00)!" in said
    assert "trainer.py" in said


def test_the_watchdog_shows_the_stack_of_a_process_that_stands_still_and_ends_it() -> None:
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
    assert re.match(r"rank 3, process \d+: ends with its stacks after 1 s without a step \(training.timeout_s\)\n", result.stderr)
    assert "Timeout (0:00:01)!" in result.stderr
    assert "asleep_at_the_wheel" in result.stderr
