"""Fakes of `srun`, `scontrol` and `scancel` for docker/slurm.sbatch: every node is a process group on this machine.

The first argument is the command's name. The folder FAKE_SLURM holds `nodes` (the process groups of the job step) and `calls`.
"""

import os
import signal
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])
ENTRYPOINT = Path(__file__).parents[2] / "docker" / "entrypoint"


def srun(arguments: list[str]) -> int:
    """Run the command on every node, through the image's entrypoint if an image is named. A node that fails ends them all.

    Each node has one core, or SRUN_CPUS_PER_TASK.
    """
    options = list(takewhile(lambda word: word.startswith("-"), arguments))
    command = arguments[len(options) :]
    if any(word.startswith("--container-image=") for word in options):
        command = [str(ENTRYPOINT), *command]
    cores = sorted(os.sched_getaffinity(0))[: int(os.environ.get("SRUN_CPUS_PER_TASK", "1"))]
    os.sched_setaffinity(0, cores)  # since 22.05, --cpus-per-task of the job is not read
    environment = {**os.environ, "SLURM_CPUS_PER_TASK": str(len(cores))}
    nodes = [
        subprocess.Popen(command, env={**environment, "SLURM_NODEID": str(number)}, start_new_session=True)
        for number in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
    ]
    (FOLDER / "nodes").write_text(" ".join(str(node.pid) for node in nodes))
    left, code = {node.pid: node for node in nodes}, 0
    while left:
        pid, status = os.wait()
        left.pop(pid, None)
        if os.waitstatus_to_exitcode(status) and not code:
            code = abs(os.waitstatus_to_exitcode(status))
            signal_nodes(signal.SIGTERM)
    return code


def signal_nodes(number: signal.Signals) -> None:
    for group in (FOLDER / "nodes").read_text().split():
        try:
            os.killpg(int(group), number)
        except ProcessLookupError:
            continue


def main(name: str, arguments: list[str]) -> int:
    with (FOLDER / "calls").open("a") as calls:
        print(name, *arguments, file=calls)
    if name == "srun":
        return srun(arguments)
    if name == "scancel":
        signal_nodes(signal.SIGTERM)
    elif arguments[:2] == ["show", "hostnames"]:
        for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
            print("127.0.0.1", flush=True)  # so that a reader that stops after one line causes SIGPIPE
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).name, sys.argv[2:]))
