"""Two machines that train together, as docker/slurm.sbatch and docker/kubernetes.yaml start them: two launches of the image's
entrypoint over loopback, with gloo. One is lost, all is started again, and the result is that of a run left alone."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.test_ranks import CONFIG, HANGS_S, assert_same_checkpoint, wait_for_step
from tests.train.test_run import ROOT, command

pytestmark = pytest.mark.slow
STEPS = 120
SETTINGS = [f"training.max_steps={STEPS}", "logging.log_frequency=1", "checkpoint.save_frequency=10"]
DOCKER = ROOT / "docker"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def started(line: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        line, cwd=ROOT, env=environment(**more), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def both_nodes(arguments: list[str]) -> list[subprocess.Popen[str]]:
    """The variables that Kubeflow's runtime torch-distributed sets, and the image's entrypoint on each machine."""
    port = str(free_port())
    common = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    line = [str(DOCKER / "entrypoint"), "train", *arguments]
    return [started(line, **common, PET_NODE_RANK=str(rank)) for rank in range(2)]


def lose(torchrun: int) -> None:
    """All processes of one machine at once; the ranks are sessions of their own, which would outlive torchrun."""
    ranks = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    for process in (torchrun, *map(int, ranks)):
        os.kill(process, signal.SIGKILL)


def finished(nodes: list[subprocess.Popen[str]]) -> None:
    for node in nodes:
        said = node.communicate(timeout=HANGS_S)[0]
        assert node.returncode == 0, said


@pytest.fixture(scope="module")
def whole(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of two machines that were left alone."""
    folder = tmp_path_factory.mktemp("whole")
    finished(both_nodes(command(CONFIG, data_path, folder, *SETTINGS)))
    return folder / "quickstart" / "checkpoints" / f"step_{STEPS:08d}"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_killed_and_both_started_again_end_as_if_nothing_had_happened(
    lost: int, whole: Path, data_path: Path, tmp_path: Path
) -> None:
    arguments = command(CONFIG, data_path, tmp_path, *SETTINGS)
    nodes = both_nodes(arguments)
    wait_for_step(tmp_path / "quickstart", 25, nodes[0])
    lose(nodes[lost].pid)
    said = nodes[1 - lost].communicate(timeout=HANGS_S)[0]  # it notices by itself
    assert nodes[1 - lost].returncode != 0, said
    nodes[lost].communicate()
    finished(both_nodes(arguments))
    assert_same_checkpoint(whole, tmp_path / "quickstart" / "checkpoints" / whole.name)


def test_the_slurm_job_survives_a_lost_machine_and_its_time_limit(whole: Path, data_path: Path, tmp_path: Path) -> None:
    tools, stand_in = tmp_path / "bin", tmp_path / "slurm"
    tools.mkdir()
    stand_in.mkdir()
    for name in ("srun", "scontrol", "scancel"):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.docker.slurm_stand_in {name} "$@"\n')
        (tools / name).chmod(0o755)
    port = free_port()
    job = {
        "PATH": f"{tools}:{environment()['PATH']}", "STAND_IN": str(stand_in), "RUNS": str(tmp_path),
        "SLURM_JOB_ID": str(port), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "two",
        "SLURM_GPUS_ON_NODE": "1", "CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    line = ["bash", str(DOCKER / "slurm.sbatch"), *command(CONFIG, data_path, tmp_path, *SETTINGS)]
    run = tmp_path / "quickstart"

    batch = started(line, **job)
    wait_for_step(run, 25, batch)
    lose(int((stand_in / "nodes").read_text().split()[1]))
    said = batch.communicate(timeout=HANGS_S)[0]
    assert batch.returncode != 0, said  # Slurm requeues a job whose machine is gone

    batch = started(line, **job)
    wait_for_step(run, 60, batch)
    batch.send_signal(signal.SIGUSR1)  # to the script alone, three minutes before the limit
    said = batch.communicate(timeout=HANGS_S)[0]
    assert batch.returncode == 0, said
    assert "stopped at step" in said
    assert f"scontrol requeue {port}" in (stand_in / "said").read_text().splitlines()

    finished([started(line, **job)])
    assert_same_checkpoint(whole, run / "checkpoints" / whole.name)
