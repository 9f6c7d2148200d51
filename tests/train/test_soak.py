"""Real training processes killed at random moments, and checkpoint files damaged at random. Long: `make soak`."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_run import QUICKSTART, command
from train.checkpoint import list_checkpoints, newest_checkpoint
from train.run import main

# Forked from a process that has imported everything, so that a start takes a second and not ten.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train.trainer"])


def run_quietly(arguments: list[str]) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        sys.exit(main(arguments))


def logged(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def killed_at_random(arguments: list[str], run: Path, rng: random.Random, most_s: float) -> bool:
    """Start training and SIGKILL it within `most_s` of its first new step; False if it came to its end first."""
    process = SERVER.Process(target=run_quietly, args=(arguments,))
    before = len(list((run / "checkpoints").glob("step_*"))), logged(run)
    process.start()
    started = time.monotonic()
    while process.is_alive() and logged(run) in (0, before[1]) and time.monotonic() - started < 60:
        time.sleep(0.01)
    process.join(rng.uniform(0, most_s))
    ended = process.exitcode is not None
    if not ended:
        process.kill()
    process.join()
    assert process.exitcode == (0 if ended else -signal.SIGKILL)
    return not ended


def survive(kills: int, steps: int, data_path: Path, tmp_path: Path) -> None:
    """The run killed `kills` times ends with the weights, the optimiser and the log of one that was left alone."""
    config, rng = QUICKSTART, random.Random(kills)
    settings = ["training.epochs=10000", f"training.max_steps={steps}", "checkpoint.save_frequency=2"]
    settings += ["logging.log_frequency=1", "checkpoint.keep_last_n=2"]
    whole = command(config, data_path, tmp_path, *settings, "logging.run_name=whole")
    parts = command(config, data_path, tmp_path, *settings, "logging.run_name=parts")
    assert main(whole) == 0
    cut_short = 0
    for number in range(kills):
        assert killed_at_random(parts, tmp_path / "parts", rng, most_s=0.5), f"the run was over after {number} kills"
        cut_short += any((tmp_path / "parts" / "checkpoints").glob(".*.partial"))
    assert main(parts) == 0
    print(f"\n{kills} kills over {steps} steps, {cut_short} of them in the middle of a save")
    newest = [list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts")]
    assert newest[0].name == newest[1].name == f"step_{steps:08d}"
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(path / file) for path in newest)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    states = [json.loads((path / "state.json").read_text()) for path in newest]
    assert states[0]["loader"] == states[1]["loader"]
    assert states[0]["run"]["images"] == states[1]["run"]["images"] == 8 * steps
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    seen = [[(line["step"], line["epoch"], line["loss"]) for line in map(json.loads, log) if "loss" in line] for log in logs]
    assert seen[0] == seen[1]
    assert [step for step, _, _ in seen[1]] == list(range(1, steps + 1))


@pytest.mark.slow
def test_a_run_killed_three_times_ends_as_if_it_had_been_left_alone(data_path: Path, tmp_path: Path) -> None:
    survive(3, 80, data_path, tmp_path)


@pytest.mark.slow
def test_a_run_killed_fifty_times_ends_as_if_it_had_been_left_alone(data_path: Path, tmp_path: Path) -> None:
    survive(50, 2500, data_path, tmp_path)


@pytest.mark.slow
def test_two_hundred_damages_to_a_real_checkpoint_are_all_detected(
    data_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["training.max_steps=4", "checkpoint.save_frequency=2"]
    assert main(command(QUICKSTART, data_path, tmp_path, *settings)) == 0
    folder, rng = tmp_path / "quickstart" / "checkpoints", random.Random(0)
    older, newer = list_checkpoints(folder)
    whole = tmp_path / "whole"
    shutil.copytree(newer, whole)
    for trial in range(200):
        path = newer / sorted(file.name for file in whole.iterdir())[trial % 4]
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        if trial % 8 < 5:
            content[place] ^= 1 << rng.randrange(8)
        else:
            del content[place:]
        path.write_bytes(content)
        caplog.clear()
        assert newest_checkpoint(folder) == older, (trial, path.name, place)
        (message,) = caplog.messages
        assert newer.name in message
        shutil.copyfile(whole / path.name, path)
    assert newest_checkpoint(folder) == newer
