"""What a job of two ranks survives: SIGTERM, a full disk, a killed rank, NaN on one rank, another number of ranks.

Each engine lives through one run without interruption, and the same run with one fault after another. Both end with the
same weights, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launching import BIN, ROOT, accelerate, deepspeed
from safetensors.torch import load_file

from rose_ds.training import checkpoints

pytestmark = pytest.mark.timeout(1200)  # twelve launches; two minutes and a half where nothing else runs

FLAGS = ["--max_train_samples", "32", "--max_eval_samples", "8", "--max_length", "32", "--learning_rate", "1e-4"]
FLAGS += ["--max_steps", "5", "--save_steps", "3", "--save_total_limit", "2", "--logging_steps", "2"]
FLAGS += ["--disable_tqdm", "true", "--report_to", "none"]
BATCH = 8  # of 32 rows: an epoch has 4 steps
TIMEOUT = 200


def fsdp(config: str, folder: Path, ranks: int) -> tuple[list[str], list[str]]:
    """Launcher and flags."""
    return accelerate(config, folder, num_processes=ranks), []


def zero2(folder: Path, ranks: int) -> tuple[list[str], list[str]]:
    return [*deepspeed(ranks), "--no_local_rank"], ["--deepspeed", "ds_configs/zero2.json"]


ENGINES: dict[str, Callable[[Path, int], tuple[list[str], list[str]]]] = {
    "fsdp1": partial(fsdp, "fsdp1.yaml"),
    "fsdp2": partial(fsdp, "fsdp2.yaml"),
    "zero2": zero2,
}


@dataclass
class Job:
    """A launch that has ended."""

    code: int
    output: str
    out: Path
    """Where its ranks reported to."""
    seconds: float
    """From the fault to the end of all its processes; of the whole job where there was no fault."""


def launch(engine: str, output_dir: Path, faults: dict[str, Any], *flags: str, ranks: int = 2) -> Job:
    """Run a job to its end; with "pause", the launcher gets SIGTERM while all ranks are in that step."""
    out = output_dir.parent / f"report-{len(list(output_dir.parent.glob('report-*')))}"
    out.mkdir(parents=True)
    launcher, more = ENGINES[engine](out, ranks)
    command = [*launcher, "tests/e2e/scripts/faulty.py", "train", "--task", "snippets", *more, *FLAGS, *flags]
    command += ["--per_device_train_batch_size", str(BATCH // ranks), "--output_dir", str(output_dir)]
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "TOKENIZERS_PARALLELISM": "false"}
    env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "120"  # torch's own half a minute is near what a busy machine takes
    env["FAULTS"] = json.dumps({**faults, "out": str(out)})
    log = out / "log"
    with log.open("w") as file:
        start = time.time()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        if "pause" in faults:
            while len(list(out.glob("pausing-*"))) < ranks:
                assert process.poll() is None and time.time() < start + TIMEOUT, log.read_text()[-6000:]
                time.sleep(0.05)
            start = time.time()
            # deepspeed's runner would just die: its child is the launcher that starts and stops the ranks
            target = psutil.Process(process.pid).children()[0].pid if engine == "zero2" else process.pid
            os.kill(target, signal.SIGTERM)
            while not list(out.glob("told-*")):  # one is enough, as ranks agree on the step
                assert process.poll() is None and time.time() < start + 60, log.read_text()[-6000:]
                time.sleep(0.05)
            (out / "go").touch()
        family: set[psutil.Process] = set()
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family.update(psutil.Process(process.pid).children(recursive=True))
            assert time.time() < start + TIMEOUT, log.read_text()[-6000:]
            time.sleep(0.2)
        assert family and not psutil.wait_procs(family, timeout=30)[1], "a process outlived its launcher"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(log.read_text()[-8000:])
        if "--master_port" in launcher:  # DeepSpeed leaves its shared memory behind
            port = launcher[launcher.index("--master_port") + 1]
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
                left.unlink()
    if (out / "fault").exists():
        start = (out / "fault").stat().st_mtime
    return Job(process.returncode, log.read_text(), out, time.time() - start)


@dataclass
class Life:
    """What happened to one engine."""

    engine: str
    whole: Path
    """output_dir of the run without interruption."""
    hard: Path
    """output_dir of the run with every fault."""
    jobs: dict[str, Job]
    found: dict[str, Path | None]
    """The checkpoint that --resume auto would choose after each job."""


@pytest.fixture(scope="module", params=["fsdp2", "zero2"])
def life(
    request: pytest.FixtureRequest,
    two_layers: str,
    snippets: str,
    extensions: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Life]:
    folder = tmp_path_factory.mktemp(request.param)
    life = Life(request.param, folder / "whole", folder / "hard", {}, {})

    def live(name: str, output_dir: Path, faults: dict[str, Any], *flags: str, ranks: int = 2) -> None:
        job = life.jobs[name] = launch(life.engine, output_dir, faults, "--model", two_layers, *flags, ranks=ranks)
        life.found[name] = checkpoints.newest(output_dir)[0]
        print(f"{life.engine} {name}: exit code {job.code} after {job.seconds:.1f} s, whole: {life.found[name]}")

    nan = {"nan": [1, 1]}
    live("uninterrupted", life.whole, nan)
    # data loaders' workers are signalled too, by torchrun as of the same session, by deepspeed before their parent
    live("terminated", life.hard, {**nan, "pause": 1, "state": True}, "--dataloader_num_workers", "1")
    shutil.copytree(life.hard, folder / "moved")
    live("disk full", life.hard, {"full": [2, 1]}, "--resume", "auto")
    live("killed", life.hard, {"kill": [4, 1]}, "--resume", "auto")
    live("resumed", life.hard, {}, "--resume", "auto")
    others = {"fsdp2": 4, "zero2": 1}[life.engine]
    live("other ranks", folder / "moved", {"state": True}, "--resume", "auto", "--max_steps", "3", ranks=others)
    yield life
    shutil.rmtree(folder)


def history(output_dir: Path) -> list[dict[str, Any]]:
    state = json.loads((output_dir / "checkpoint-5" / "trainer_state.json").read_text())
    entries: list[dict[str, Any]] = state["log_history"]
    return entries


def test_nothing_is_lost_but_the_steps_since_the_checkpoint(life: Life) -> None:
    """Weights, losses and thresholds are those of the run without interruption, to the last bit."""
    assert [life.jobs[name].code for name in ("uninterrupted", "resumed")] == [0, 0], life.jobs["resumed"].output[
        -4000:
    ]
    one, other = (load_file(folder / "model.safetensors") for folder in (life.whole, life.hard))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [entry["step"] for entry in history(life.whole)] == [2, 4]
    assert history(life.hard) == history(life.whole)
    assert (life.hard / "masks.jsonl").read_text() == (life.whole / "masks.jsonl").read_text()
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (life.whole, life.hard)]
    for name in ("steps", "skipped_steps", "kept_fraction", "glue_accuracy", "world_size", "engine"):
        assert metrics[0][name] == metrics[1][name], name
    assert metrics[0]["engine"] == life.engine
    # what is deleted is older than two whole ones
    assert sorted(p.name for p in life.hard.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]


def test_nan_on_one_rank_skips_the_step_on_all(life: Life) -> None:
    first = history(life.whole)[0]
    assert first["rose/skipped"] == 1.0
    assert [entry["rose/skipped"] for entry in history(life.whole)[1:]] == [0.0]
    assert json.loads((life.whole / "metrics.json").read_text())["skipped_steps"] == 1
    out = life.jobs["uninterrupted"].out
    assert (out / "weights-0").read_text() == (out / "weights-1").read_text()
    assert all(torch.isfinite(tensor).all() for tensor in load_file(life.whole / "model.safetensors").values())


def test_sigterm_saves_a_checkpoint_on_all_ranks(life: Life) -> None:
    """accelerate and torchrun signal every rank, the deepspeed launcher rank 0 alone: both stop at the same step."""
    job = life.jobs["terminated"]
    assert job.code != 0
    assert "SIGTERM received: checkpoint saved at step 2, resume with --resume auto" in job.output
    assert life.found["terminated"] == life.hard / "checkpoint-2"
    assert job.seconds < 120
    assert "Traceback" not in job.output.split("SIGTERM received: checkpoint saved")[0]


def test_sigterm_is_not_the_end_of_training(life: Life) -> None:
    """Neither a model nor metrics, as if it had finished."""
    output_dir = life.hard.parent / "moved"
    names = {path.name for path in output_dir.iterdir()} - {"runs"}
    assert "resuming from" in life.jobs["disk full"].output
    assert names >= {"metrics.json"}  # of "other ranks", which went on there
    assert not any(name in life.jobs["terminated"].output for name in ("metrics.json in", "clean "))


def test_a_full_disk_is_named_and_the_checkpoint_before_it_stays(life: Life) -> None:
    job, torn = life.jobs["disk full"], life.hard / "checkpoint-3"
    assert job.code != 0
    assert f"{torn} could not be written; {life.hard / 'checkpoint-2'} is the newest whole one" in job.output
    assert life.found["disk full"] == life.hard / "checkpoint-2"
    assert f"checkpoint passed over: {torn / checkpoints.FILE} is missing" in life.jobs["killed"].output
    assert job.seconds < 60


def test_a_killed_rank_ends_the_job(life: Life) -> None:
    job = life.jobs["killed"]
    assert job.code != 0
    assert life.found["killed"] == life.hard / "checkpoint-3"
    assert {"fsdp2": "Signal 9 (SIGKILL)", "zero2": "return code = -9"}[life.engine] in job.output
    assert job.seconds < 60


def test_on_another_number_of_ranks_everything_is_carried_over(life: Life) -> None:
    """Weights, moments and the order of the rows; dropout, which cannot be, goes on from a seed that is logged."""
    job = life.jobs["other ranks"]
    assert job.code == 0, job.output[-4000:]
    before, after = (torch.load(path) for path in (life.jobs["terminated"].out / "end.pt", job.out / "begin.pt"))
    assert before.keys() == after.keys()
    assert any("exp_avg_sq" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    ranks = int(json.loads((life.hard.parent / "moved" / "metrics.json").read_text())["world_size"])

    def rows(job: Job, ranks: int) -> set[int]:
        return {row for rank in range(ranks) for row in json.loads((job.out / f"rows-{rank}.json").read_text())["2"]}

    assert rows(job, ranks) == rows(life.jobs["uninterrupted"], 2)
    assert len(rows(job, ranks)) == BATCH
    assert f"resuming on {ranks} ranks from a checkpoint of 2: dropout goes on with seed" in job.output
    assert f"resuming with another setting: world_size 2 -> {ranks}" in job.output


def test_fsdp1_resumed_is_the_uninterrupted_run(two_layers: str, snippets: str, tmp_path: Path) -> None:
    """accelerate alone loads no optimizer state into an FSDP1 optimizer that has none yet."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    model = ["--model", two_layers]
    assert launch("fsdp1", whole, {}, *model).code == 0
    shutil.copytree(whole / "checkpoint-3", half / "checkpoint-3")
    job = launch("fsdp1", half, {}, *model, "--resume", "auto")
    assert job.code == 0, job.output[-4000:]
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, half))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert history(half) == history(whole)
