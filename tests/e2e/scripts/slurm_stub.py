"""A Slurm of two nodes, node1 and node2, as far as launch/slurm/ uses it; called by the name of one of its programs.

sbatch reads a script's #SBATCH lines as Slurm does, and runs it on this node. srun really starts one task on each node,
through ssh, with the variables of a job's step. scancel signals every process of the tasks. scontrol knows "show
hostnames", "show job" and "requeue", which is written down. SLURM_STUB is a folder for what they must tell each other.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

NODES = ["node1", "node2"]
#: Options that the scripts may use; another one is an error, as it is to sbatch.
_SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "output", "open-mode"}
_SBATCH |= {"requeue", "signal"}
_SRUN = {"kill-on-bad-exit", "ntasks-per-node", "export"}

#: What a task's shell does: says which process it is, and becomes the command.
_TASK = 'echo "$$" >"$SLURM_STUB/task-$SLURM_NODEID.pid"; exec "$@"'
#: Signals a process and all below it.
_SIGNAL = """
import psutil, sys
process = psutil.Process(int(sys.argv[1]))
for one in [process, *process.children(recursive=True)]:
    one.send_signal(int(sys.argv[2]))
"""


def options(arguments: list[str], known: set[str]) -> tuple[dict[str, str], list[str]]:
    """The leading options, all of the form --name or --name=value, and the rest."""
    found = {}
    while arguments and arguments[0].startswith("--"):
        name, _, value = arguments[0][2:].partition("=")
        if name not in known:
            sys.exit(f"unrecognized option '--{name}'")
        found[name] = value
        arguments = arguments[1:]
    return found, arguments


def sbatch(arguments: list[str]) -> int:
    """Run a script as a job; its exit code."""
    given, (script, *rest) = options(arguments, _SBATCH)
    lines = Path(script).read_text().splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            break  # Slurm reads no further
        if line.startswith("#SBATCH "):
            more, _ = options([line[8:].split(" #")[0].strip()], _SBATCH)
            given = {**more, **given}
    asked = sum(line.startswith("#SBATCH") for line in lines)
    if asked != sum(line.startswith("#SBATCH") for line in lines[: _first_command(lines)]):
        sys.exit("#SBATCH after the first command is not read")
    if int(given["nodes"]) != len(NODES) or given["ntasks-per-node"] != "1" or "requeue" not in given:
        sys.exit(f"not a job for this cluster: {given}")
    if not re.fullmatch(r"B:USR1@\d+", given["signal"]):
        sys.exit(f"--signal={given['signal']} is not what the preemption test sends")
    job = {
        "SLURM_JOB_ID": os.environ.get("SLURM_JOB_ID", "4711"),
        "SLURM_JOB_NODELIST": f"node[1-{len(NODES)}]",
        "SLURM_NNODES": given["nodes"],
        "SLURM_GPUS_PER_NODE": given["gpus-per-node"],
        "SLURM_SUBMIT_DIR": str(Path.cwd()),
    }
    os.execvpe("bash", ["bash", script, *rest], {**os.environ, **job})


def _first_command(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if line and not line.startswith("#")), len(lines))


def srun(arguments: list[str]) -> int:
    """One task on each node; when one fails, the others are killed."""
    given, command = options(arguments, _SRUN)
    assert given == {"kill-on-bad-exit": "1", "ntasks-per-node": "1", "export": "ALL"}, given
    tasks = []
    for i, node in enumerate(NODES):
        env = {**os.environ, "SLURM_NODEID": str(i), "SLURM_PROCID": str(i), "SLURM_NTASKS": str(len(NODES))}
        exported = [f"{name}={value}" for name, value in env.items() if re.fullmatch(r"\w+", name)]
        remote = ["cd", str(Path.cwd())], ["env", "-i", *exported, "bash", "-c", _TASK, "task", *command]
        tasks.append(subprocess.Popen(["ssh", node, " && ".join(shlex.join(part) for part in remote)]))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # scancel is what stops tasks
    while any(task.poll() is None for task in tasks):
        if any(task.poll() not in (None, 0) for task in tasks):
            time.sleep(2)  # the others may be ending by themselves
            scancel(["--signal=KILL", os.environ["SLURM_JOB_ID"]])
            break
        time.sleep(0.1)
    return max(abs(task.wait()) for task in tasks)


def scancel(arguments: list[str]) -> int:
    """Signal the job's tasks, and not the batch script."""
    given, (job,) = options(arguments, {"signal"})
    assert job == os.environ["SLURM_JOB_ID"], job
    number = str(int(getattr(signal, f"SIG{given['signal']}")))
    for i, node in enumerate(NODES):
        pid = (Path(os.environ["SLURM_STUB"]) / f"task-{i}.pid").read_text().strip()
        command = shlex.join([sys.executable, "-c", _SIGNAL, pid, number])
        subprocess.run(["ssh", node, command], stderr=subprocess.DEVNULL)
    return 0


def scontrol(arguments: list[str]) -> int:
    """``show hostnames``, ``show job`` and ``requeue``."""
    if arguments[:2] == ["show", "hostnames"]:
        assert arguments[2] == f"node[1-{len(NODES)}]"
        print("\n".join(NODES))
        return 0
    if arguments[:2] == ["show", "job"]:
        print(f"JobId={arguments[2]} JobName=rose\n   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None")
        return 0
    verb, job = arguments
    assert (verb, job) == ("requeue", os.environ["SLURM_JOB_ID"])
    with (Path(os.environ["SLURM_STUB"]) / "requeued").open("a") as file:
        file.write(f"{job}\n")
    return 0


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    sys.exit({"sbatch": sbatch, "srun": srun, "scancel": scancel, "scontrol": scontrol}[name](sys.argv[1:]))
