"""rose-ds doctor under launchers: two ranks that agree, and ranks that do not come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, deepspeed, run, torchrun
from spawn import free_port


def checks(output: str) -> dict[str, dict[str, Any]]:
    """The checks by name, out of what a launcher printed."""
    lines = [line for line in output.splitlines() if line.lstrip().startswith('{"ok"')]
    assert len(lines) == 1, output  # one rank prints
    found = json.loads(lines[0])
    assert found["world_size"] == 2
    return {check["check"]: check for check in found["checks"]}


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks_agree(launcher: str, tmp_path: Path, extensions: Path) -> None:
    start = (
        [*torchrun(), "-m"] if launcher == "torchrun" else [*deepspeed(), "--module"]
    )  # which gives --local_rank=N before the command
    flags = ["--json", "--deepspeed", "ds_configs/zero3.json", "--model", "minilm", "--output_dir", str(tmp_path)]
    done = run([*start, "rose_ds", "doctor", *flags], timeout=200)
    assert done.returncode == 0
    found = checks(done.stdout)
    assert all(check["status"] == "ok" and check["ranks"] == [] for check in found.values()), found
    assert found["ranks"]["text"] == "all 2 reach each other"
    # the 60th percentile of the squares of normal numbers is 0.7083
    assert 0.69 < float(found["threshold gloo"]["text"].split()[0]) < 0.73
    assert "for 2 ranks" in found["memory"]["text"]
    assert not list(tmp_path.iterdir())


def test_a_fault_of_one_rank_fails_the_job(tmp_path: Path) -> None:
    """Only rank 1 has another extension folder, with the lock of a killed build in it."""
    lock = tmp_path / "ext" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        f"os.environ['RANK'] == '1' and os.environ.update(TORCH_EXTENSIONS_DIR={str(tmp_path / 'ext')!r})\n"
        "from rose_ds.cli import program\n"
        "program(['doctor', *sys.argv[1:]])\n"
    )
    done = run([*torchrun(), str(script), "--json"], timeout=200)
    assert done.returncode != 0
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"ok"')]
    failed = [check for check in json.loads(lines[0])["checks"] if check["status"] == "failed"]
    assert [(check["check"], check["ranks"], check["mend"]) for check in failed] == [("extensions", [1], f"rm {lock}")]


def test_json_alone_is_on_standard_output(tmp_path: Path) -> None:
    """DeepSpeed says there that it found no GPU, unless DS_ACCELERATOR has said so before."""
    env = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "rose_ds", "doctor", "--json", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert {"versions", "disk"} <= {check["check"] for check in json.loads(done.stdout)["checks"]}
    assert torch.cuda.is_available() or "Setting accelerator to CPU" in done.stderr


def start(rank: int, world: int, port: int, seconds: float) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "rose_ds", "doctor", "--timeout", str(seconds)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_ranks_that_do_not_come_are_named_in_bounded_time() -> None:
    port, begin = free_port(), time.monotonic()
    processes = [start(rank, 4, port, 15) for rank in (0, 2)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert time.monotonic() - begin < 100
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 1
        assert "FAILED   ranks: 2 of 4 did not come within 15 s: 1, 3; there: 0 (" in output


def test_a_master_that_is_not_there() -> None:
    process = start(1, 2, free_port(), 3)
    try:
        output = process.communicate(timeout=100)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "cannot reach MASTER_ADDR:MASTER_PORT 127.0.0.1:" in output and "--master_port" in output
