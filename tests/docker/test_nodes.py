"""Two machines that train together as docker/slurm.sbatch and docker/kubernetes.yaml start them, and lose one of them.

Each machine is one launch of the image's entrypoint; they communicate over loopback with gloo.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.test_ranks import CONFIG, HANGS_S, assert_same_checkpoint, free_port, wait_for_step
from tests.train.test_run import ROOT, command

pytestmark = pytest.mark.slow
STEPS = 120
SETTINGS = [f"training.max_steps={STEPS}", "logging.log_frequency=1", "checkpoint.save_frequency=10"]
DOCKER = ROOT / "docker"
CORES = len(os.sched_getaffinity(0))


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def start(line: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line, cwd=ROOT, env=environment(**more), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def both_nodes(arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Start the image's entrypoint on each machine, with the variables that Kubeflow's runtime torch-distributed sets."""
    port = str(free_port())
    common = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    line = [str(DOCKER / "entrypoint"), "train", *arguments]
    return [start(line, **common, PET_NODE_RANK=str(rank)) for rank in range(2)]


def lose(torchrun: int) -> None:
    """Kill all processes of one machine at once; the ranks have their own sessions and would outlive torchrun."""
    ranks = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    for process in (torchrun, *map(int, ranks)):
        os.kill(process, signal.SIGKILL)


def wait_for_success(nodes: list[subprocess.Popen[str]]) -> None:
    for node in nodes:
        output = node.communicate(timeout=HANGS_S)[0]
        assert node.returncode == 0, output


@pytest.fixture(scope="module")
def undisturbed(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of two machines that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    wait_for_success(both_nodes(command(CONFIG, data_path, folder, *SETTINGS)))
    return folder / "quickstart" / "checkpoints" / f"step_{STEPS:08d}"


@pytest.mark.parametrize("lost", [0, 1])
def test_after_the_loss_of_a_machine_a_restart_ends_with_the_weights_of_an_undisturbed_run(
    lost: int, undisturbed: Path, data_path: Path, tmp_path: Path
) -> None:
    arguments = command(CONFIG, data_path, tmp_path, *SETTINGS)
    nodes = both_nodes(arguments)
    wait_for_step(tmp_path / "quickstart", 25, nodes[0])
    lose(nodes[lost].pid)
    output = nodes[1 - lost].communicate(timeout=HANGS_S)[0]  # it notices without a signal
    assert nodes[1 - lost].returncode != 0, output
    nodes[lost].communicate()
    wait_for_success(both_nodes(arguments))
    assert_same_checkpoint(undisturbed, tmp_path / "quickstart" / "checkpoints" / undisturbed.name)


def test_the_slurm_job_survives_a_lost_machine_and_its_time_limit(undisturbed: Path, data_path: Path, tmp_path: Path) -> None:
    tools, slurm = tmp_path / "bin", tmp_path / "slurm"
    tools.mkdir()
    slurm.mkdir()
    for name in ("srun", "scontrol", "scancel"):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.docker.fake_slurm {name} "$@"\n')
        (tools / name).chmod(0o755)
    port = free_port()
    job = {
        "PATH": f"{tools}:{environment()['PATH']}", "FAKE_SLURM": str(slurm), "RUNS": str(tmp_path),
        "SLURM_JOB_ID": str(port), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "two",
        "SLURM_GPUS_ON_NODE": "1", "CACHE": str(tmp_path / "cache"), "SLURM_CPUS_PER_TASK": str(CORES),
    }  # fmt: skip
    line = ["bash", str(DOCKER / "slurm.sbatch"), *command(CONFIG, data_path, tmp_path, *SETTINGS)]
    run = tmp_path / "quickstart"

    batch = start(line, **job)
    wait_for_step(run, 25, batch)
    assert json.loads((run / "environment.json").read_text())["cores"] == CORES
    lose(int((slurm / "nodes").read_text().split()[1]))
    output = batch.communicate(timeout=HANGS_S)[0]
    assert batch.returncode != 0, output  # Slurm requeues a job whose machine is gone

    batch = start(line, **job)
    wait_for_step(run, 60, batch)
    batch.send_signal(signal.SIGUSR1)  # to the script only, three minutes before the limit
    output = batch.communicate(timeout=HANGS_S)[0]
    assert batch.returncode == 0, output
    assert "stopped at step" in output
    assert f"scontrol requeue {port}" in (slurm / "calls").read_text().splitlines()

    wait_for_success([start(line, **job)])
    assert_same_checkpoint(undisturbed, run / "checkpoints" / undisturbed.name)
