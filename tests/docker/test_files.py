"""The files that start the image, checked with their own linters; `make docker-check` tests the image itself."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
TOOLS = Path(sys.executable).parent
SCRIPTS = ["check", "entrypoint", "slurm.sbatch"]
VERBS = {"train", "convert", "doctor", "tensorboard"}
# Folders that the Dockerfile or the system makes writable.
MOUNT_POINTS = {"/app/shards", "/app/runs", "/cache", "/tmp", "/dev/shm", "/photos"}


def output_of(tool: str, *arguments: str | Path) -> str:
    result = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def test_hadolint_finds_nothing_and_does_find_what_is_wrong(tmp_path: Path) -> None:
    assert output_of("hadolint", DOCKER / "Dockerfile") == ""
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp\n")
    assert "DL3006" in output_of("hadolint", tmp_path / "Dockerfile")


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_and_the_shell_itself_accept_every_script(name: str) -> None:
    script = DOCKER / name
    shell = script.read_text().splitlines()[0].removeprefix("#!")
    assert subprocess.run([shell, "-n", script], capture_output=True, check=False).stderr == b""
    assert output_of("shellcheck", script) == ""
    assert os.access(script, os.X_OK) or name.endswith(".sbatch")


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def train_job() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "kubernetes.yaml").read_text())


def test_kubeflow_accepts_the_train_job_and_knows_every_key_in_it() -> None:
    job = train_job()
    parsed = TrainerV1alpha1TrainJob.from_dict(json.loads(json.dumps(job)))
    assert parsed is not None
    assert without_nulls(json.loads(parsed.to_json())) == job  # an unknown key would be dropped
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert set(mounts.values()) <= MOUNT_POINTS
    (memory,) = (volume for volume in pod["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory")
    assert mounts[memory["name"]] == "/dev/shm"
    assert container["securityContext"]["readOnlyRootFilesystem"]
    gpus = job["spec"]["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert int(gpus) == job["spec"]["trainer"]["numProcPerNode"]


def test_a_key_that_kubeflow_does_not_know_is_noticed() -> None:
    job = train_job()
    job["spec"]["trainer"]["numNode"] = 3
    parsed = TrainerV1alpha1TrainJob.from_dict(job)
    assert parsed is not None
    assert without_nulls(json.loads(parsed.to_json())) != job


def test_compose_and_kubernetes_use_commands_and_settings_that_exist() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"convert", "train", "tensorboard"}
    commands = [service["command"] for service in services.values()] + [train_job()["spec"]["trainer"]["args"]]
    for command in commands:
        words = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in command]
        assert words[0] in VERBS
        if words[0] == "train":
            settings = [sys.executable, "-m", "train.run", *words[1:], "--print-config"]
            subprocess.run(settings, cwd=ROOT, check=True, capture_output=True)
    for service in services.values():
        assert {volume.rsplit(":/", 1)[1].split(":")[0] for volume in service["volumes"]} <= {p[1:] for p in MOUNT_POINTS}
        assert service["read_only"]
        assert service["user"] == "${RUN_AS:-10001:10001}"


def test_every_launcher_gets_the_jpeg_engine() -> None:
    """The capability `video` enables it, and no launcher overrides the capabilities of the image."""
    (capabilities,) = re.findall(r"NVIDIA_DRIVER_CAPABILITIES=(\S+)", (DOCKER / "Dockerfile").read_text())
    assert {"compute", "utility", "video"} == set(capabilities.split(","))
    for name in ("compose.yaml", "kubernetes.yaml", "slurm.sbatch"):
        assert "NVIDIA_DRIVER_CAPABILITIES" not in (DOCKER / name).read_text()


def test_the_code_is_copied_after_the_packages_are_installed() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    copies = [line for line in lines if line.startswith("COPY")]
    assert copies == ["COPY requirements.lock /opt/requirements.lock", "COPY . ."]
    installation = next(i for i, line in enumerate(lines) if "--require-hashes" in line)
    assert installation < lines.index("COPY . .")


def health(runs: Path, **settings: str) -> tuple[int, str]:
    command = [sys.executable, "-I", "-S", DOCKER / "healthcheck.py", runs]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, check=False)
    assert result.stderr == ""
    return result.returncode, result.stdout


def test_the_health_check_fails_only_for_a_training_of_this_machine_that_stands_still(tmp_path: Path) -> None:
    assert health(tmp_path) == (0, "nothing trains here\n")
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "train.run"])
    try:
        run = tmp_path / "mine"
        run.mkdir()
        beat = {"status": "training", "step": 7, "total_steps": 9, "time": time.time() - 100, "pid": trainer.pid}
        (run / "heartbeat.json").write_text(json.dumps(beat))
        assert health(tmp_path)[0] == 0
        assert "step 7 of 9" in health(tmp_path)[1]
        assert health(tmp_path, HEARTBEAT_MAX_AGE_S="60")[0] == 1
        for status in ("evaluating", "complete", "stopped"):
            (run / "heartbeat.json").write_text(json.dumps({**beat, "status": status}))
            assert health(tmp_path, HEARTBEAT_MAX_AGE_S="60") == (0, "nothing trains here\n")
        of_another_machine = {**beat, "pid": os.getpid()}  # which is no training
        (run / "heartbeat.json").write_text(json.dumps(of_another_machine))
        assert health(tmp_path, HEARTBEAT_MAX_AGE_S="60")[0] == 0
        (run / "heartbeat.json").write_text("{")
        assert health(tmp_path)[0] == 0
    finally:
        trainer.kill()
        trainer.wait()


def test_slurms_first_machine_is_the_master_however_long_their_list_is(tmp_path: Path) -> None:
    for tool, script in {
        "scontrol": "seq -f node%06g 30000",
        "srun": 'echo "$PET_MASTER_ADDR" "$SRUN_CPUS_PER_TASK" "$@"',
    }.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / tool).chmod(0o755)
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNS": str(tmp_path), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[000001-030000]", "SLURM_JOB_NUM_NODES": "30000", "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "64",
    }  # fmt: skip
    batch = ["bash", str(DOCKER / "slurm.sbatch"), "CONFIG"]
    result = subprocess.run(batch, capture_output=True, text=True, env={**os.environ, **job}, check=False)
    assert result.returncode == 0, result.stderr
    masters, cores, commands = zip(*(line.split(maxsplit=2) for line in result.stdout.splitlines()), strict=True)
    assert set(masters) == {"node000001"}
    assert set(cores) == {"64"}
    assert commands[-1].endswith("train CONFIG")


def test_the_entrypoint_runs_any_command_and_returns_its_exit_code() -> None:
    assert subprocess.run([DOCKER / "entrypoint", "sh", "-c", "exit 75"], check=False).returncode == 75
    doctor = subprocess.run(
        [DOCKER / "entrypoint", "doctor", "--help"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stderr
    assert "section.key=value" in doctor.stdout


@pytest.mark.parametrize(("visible", "ranks"), [("0,1,3", 3), ("2", 1), ("", 1), ("GPU-1a,GPU-2b", 2), (None, 4)])
def test_the_entrypoint_starts_a_rank_for_each_visible_gpu(visible: str | None, ranks: int, tmp_path: Path) -> None:
    says = {"nvidia-smi": "for i in 0 1 2 3; do echo GPU $i; done", "python": 'echo "$PET_NPROC_PER_NODE" "$@"'}
    for tool, script in says.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / tool).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    line = subprocess.run([DOCKER / "entrypoint", "train", "X"], env=environment, capture_output=True, text=True, check=True)
    launcher = f"{DOCKER}/launch.py --standalone " if ranks > 1 else ""
    assert line.stdout == f"{ranks} {launcher}-m train.run X\n"


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_several_ranks_end_with_the_exit_code_of_the_first_that_fails(code: int, tmp_path: Path) -> None:
    """And compose does not start a run again that can only fail."""
    script = tmp_path / "rank.py"
    script.write_text(f"import os, sys, time\nif os.environ['RANK'] == '0': time.sleep(60 * bool({code}))\nsys.exit({code})\n")
    command = [sys.executable, DOCKER / "launch.py", "--standalone", "--nproc_per_node=2", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    train = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["train"]
    assert (str(code) in train["entrypoint"]) == (code in (2, 3))
