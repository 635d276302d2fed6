"""The store: claims that die with their holder, results that survive a kill, status, failures."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rose_ds.attack.settings import AttackSettings, PlannedAttack
from rose_ds.experiments.cells import Cell
from rose_ds.experiments.evaluation import PREDICTIONS, TRAJECTORY, write_lines
from rose_ds.experiments.launchers import LAUNCHERS, Launcher, slurm
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.progress import remaining_seconds
from rose_ds.experiments.store import RESULTS, Status, Store
from rose_ds.experiments.sweep import Runner, counts
from rose_ds.training.sole_use import sole_use_of

pytestmark = pytest.mark.fast

CELL = Cell("sst2", "vanilla", 0, {"learning_rate": 1e-4, "data": "here"}, {"learning_rate": 1e-4})
OTHER = Cell("sst2", "vanilla", 1, {"learning_rate": 1e-4})
OTHER2 = Cell("sst2", "vanilla", 2, {})


def finish(store: Store, cell: Cell) -> None:
    """What a run leaves behind."""
    run = store.run_folder(cell)
    (run / "checkpoint-100").mkdir(parents=True)
    (run / "model.safetensors").write_bytes(b"weights")
    Metrics(task=cell.task, model="m", method=cell.method, seed=cell.seed, glue_accuracy=0.5).write(run)
    write_lines(run / PREDICTIONS, [{"set": "clean", "label": [0, 1], "prediction": [0, 0]}])
    write_lines(run / TRAJECTORY, [{"step": 100, "clean": 0.5}])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.create()
    return store


def test_one_claim_at_a_time(store: Store) -> None:
    claim = store.claim(CELL)
    assert claim is not None
    assert store.claim(CELL) is None
    assert Store(store.root).claim(CELL) is None
    assert store.status(CELL, {}) is Status.RUNNING
    other = store.claim(OTHER)
    assert other is not None
    claim.release()
    again = store.claim(CELL)
    assert again is not None
    again.release()
    other.release()


_HOLDER = """
import subprocess, sys, time
from pathlib import Path
from rose_ds.experiments.cells import Cell
from rose_ds.experiments.store import Store
claim = Store(Path(sys.argv[1])).claim(Cell("sst2", "vanilla", 0, {"learning_rate": 1e-4}))
run = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(claim.descriptor,))
print(run.pid, flush=True)
time.sleep(60)
"""


def test_a_claim_outlives_a_killed_sweep_and_dies_with_its_run(store: Store) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(store.root)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    run = int(holder.stdout.readline())
    try:
        assert store.claim(CELL) is None
        holder.kill()
        holder.wait()
        assert store.claim(CELL) is None  # its run goes on
    finally:
        os.kill(run, signal.SIGKILL)
    deadline = time.monotonic() + 20
    claim = None
    while claim is None and time.monotonic() < deadline:
        claim = store.claim(CELL)
        time.sleep(0.01)
    assert claim is not None
    claim.release()


def test_a_run_whose_sweep_and_launcher_were_killed_keeps_its_cell(store: Store) -> None:
    """The deepspeed launcher's ranks have no claim of their own, and go on; their job has the run's folder."""
    claim = store.claim(CELL)
    assert claim is not None
    claim.release()
    with sole_use_of(store.run_folder(CELL)):
        assert store.claim(CELL) is None
        assert store.status(CELL, {}) is Status.RUNNING
    again = store.claim(CELL)
    assert again is not None
    again.release()
    assert store.status(CELL, {}) is Status.NOT_STARTED  # no sweep has launched it


def test_statuses(store: Store) -> None:
    assert store.status(CELL, store.results()) is Status.NOT_STARTED
    claim = store.claim(CELL)
    assert claim is not None
    store.log(CELL).write_text("one\n" * 30 + "step 3\rstep 4\nthe reason\n")
    claim.release()
    assert store.status(CELL, store.results()) is Status.INCOMPLETE
    store.fail(CELL, 7)
    assert store.status(CELL, store.results()) is Status.FAILED
    failure = store.failure(CELL)
    assert (failure["exit_code"], failure["log"][-3:], len(failure["log"])) == (
        7,
        ["step 3", "step 4", "the reason"],
        20,
    )
    assert store.claim(CELL) is None  # not before someone says so
    store.forgive(CELL)
    assert store.status(CELL, store.results()) is Status.INCOMPLETE
    finish(store, CELL)
    store.record(CELL, 1.5, keep_models=False)
    assert store.status(CELL, store.results()) is Status.DONE
    assert store.claim(CELL) is None
    assert counts(store, [CELL, OTHER]) == {
        "done": 1,
        "running": 0,
        "failed": 0,
        "given up": 0,
        "incomplete": 0,
        "not started": 1,
    }


def test_a_line_has_all_that_came_out(store: Store) -> None:
    store.folder(CELL).mkdir()
    finish(store, CELL)
    store.record(CELL, 1.5, keep_models=False)
    line = store.results()[CELL.key]
    assert (line["method"], line["seed"], line["seconds"], line["varied"]) == (
        "vanilla",
        0,
        1.5,
        {"learning_rate": 1e-4},
    )
    assert line["settings"] == {"learning_rate": 1e-4}  # where the data lay is nobody's business
    assert line["metrics"]["glue_accuracy"] == 0.5
    assert line["trajectory"] == [{"step": 100, "clean": 0.5}]
    assert store.predictions(CELL.key)["clean"]["prediction"] == [0, 0]
    run = store.run_folder(CELL)
    assert not list(run.glob("checkpoint-*"))
    assert not list(run.glob("*.safetensors"))
    store.record(CELL, 2.0, keep_models=False)
    assert len((store.root / RESULTS).read_text().splitlines()) == 1


def test_models_are_kept_on_demand(store: Store) -> None:
    store.folder(CELL).mkdir()
    finish(store, CELL)
    store.record(CELL, None, keep_models=True)
    assert (store.run_folder(CELL) / "model.safetensors").is_file()


def test_checkpoints_that_a_kill_left_behind_a_line_go(store: Store) -> None:
    store.folder(CELL).mkdir()
    finish(store, CELL)
    store.record(CELL, None, keep_models=True)
    left = store.run_folder(CELL) / "checkpoint-100"
    left.mkdir()
    assert Runner(store, [CELL]).run() == {CELL.key: Status.DONE}
    assert not left.exists() and (store.run_folder(CELL) / "model.safetensors").is_file()


def test_a_line_torn_by_a_kill_is_passed_over_and_replaced(store: Store) -> None:
    for cell in (CELL, OTHER):
        store.folder(cell).mkdir()
        finish(store, cell)
    store.record(CELL, 1.0, keep_models=True)
    path = store.root / RESULTS
    whole = path.read_text()
    path.write_text(whole + '{"cell": "' + OTHER.key)
    assert set(Store(store.root).results()) == {CELL.key}
    store.record(OTHER, 1.0, keep_models=True)
    assert set(store.results()) == {CELL.key, OTHER.key}
    assert path.read_text().startswith(whole)
    path.write_text(whole.replace('"cell"', '"sell"'))
    with pytest.raises(ValueError, match=rf"{RESULTS}:1 is not a finished cell's line"):
        store.results()


def test_many_writers_lose_no_line(store: Store) -> None:
    cells = [Cell("sst2", "vanilla", seed, {}) for seed in range(12)]
    for cell in cells:
        store.folder(cell).mkdir()
        finish(store, cell)
    threads = [threading.Thread(target=lambda c=c: Store(store.root).record(c, 1.0, keep_models=True)) for c in cells]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(store.results()) == {cell.key for cell in cells}


# --- the runner, with runs that take no time ---


def fake_launcher(script: str) -> Any:
    """Runs ``script`` with the output folder as argument."""

    def launch(flags: Any, extra: Any) -> list[str]:
        return [sys.executable, "-c", script, flags[flags.index("--output_dir") + 1], flags[flags.index("--seed") + 1]]

    return Launcher(launch)


_RUN = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
(out.parent / "starts").open("a").write("x")
if sys.argv[2] == "1":
    sys.exit("no memory left")
(out / "predictions.jsonl").write_text("")
(out / "metrics.json").write_text(json.dumps({"task": "sst2", "model": "m", "version": 3}))
"""


def test_a_failed_run_stops_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAUNCHERS, "local", fake_launcher(_RUN))
    cells = [Cell("sst2", "vanilla", seed, {}) for seed in range(4)]
    found = Runner(store, cells, jobs=2).run()
    assert [found[c.key].value for c in cells] == ["done", "failed", "done", "done"]
    assert store.failure(cells[1])["log"][-1] == "no memory left"
    assert store.failure(cells[1])["exit_code"] == 1
    Runner(store, cells, jobs=2).run()  # nothing is left to do, a failed run is not tried again by itself
    starts = [(store.folder(c) / "starts").read_text() for c in cells]
    assert starts == ["x", "x", "x", "x"]
    Runner(store, cells, jobs=2, retry_failed=True).run()
    assert (store.folder(cells[1]) / "starts").read_text() == "xx"


def test_a_cell_that_is_named_twice_is_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAUNCHERS, "local", fake_launcher(_RUN))
    again = Cell("sst2", "vanilla", 0, {"max_steps": 100.0})
    assert Runner(store, [Cell("sst2", "vanilla", 0, {"max_steps": 100}), again]).run() == {again.key: Status.DONE}


def test_a_cell_to_be_attacked_whose_model_is_gone_is_trained_anew(store: Store) -> None:
    runner = Runner(store, [CELL], attack=PlannedAttack(AttackSettings("pruthi"), 8))
    store.folder(CELL).mkdir()
    finish(store, CELL)
    (store.run_folder(CELL) / "model.safetensors").unlink()
    assert runner._left(CELL)[0] == "train"
    assert not store.run_folder(CELL).exists()


def test_an_attack_that_leaves_nothing_is_not_made_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends well, and its figures are not what was asked for."""

    def launch(words: Any, extra: Any) -> list[str]:
        out = words[words.index("--model") + 1] if words[0] == "attack" else words[words.index("--output_dir") + 1]
        return [sys.executable, "-c", _RUN + "(out / 'model.safetensors').touch()", out, "0"]

    monkeypatch.setitem(LAUNCHERS, "local", Launcher(launch))
    found = Runner(store, [CELL], attack=PlannedAttack(AttackSettings("pruthi"), 8)).run()
    assert found == {CELL.key: Status.FAILED}
    assert "rose-ds attack --model" in store.failure(CELL)["log"][-1]
    assert (store.folder(CELL) / "starts").read_text() == "xx"


def test_a_run_whose_figures_cannot_be_read_has_failed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    script = _RUN.replace('"version": 3', '"version": 3, "glue_accuracy": float("nan")')
    monkeypatch.setitem(LAUNCHERS, "local", fake_launcher(script))
    cells = [Cell("sst2", "vanilla", seed, {}) for seed in (0, 2)]
    found = Runner(store, cells).run()
    assert set(found.values()) == {Status.FAILED}
    assert "metrics.json" in store.failure(cells[0])["log"][-1]
    assert set(Runner(store, cells, retry_failed=True).run().values()) == {Status.FAILED}
    assert (store.folder(cells[0]) / "starts").read_text() == "xx"  # what it measured was set aside, and measured again


def test_a_run_of_a_newer_version_is_left_as_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package was brought up to date while an older process sweeps on."""
    script = _RUN.replace('"version": 3', '"version": 99, "new": 1')
    monkeypatch.setitem(LAUNCHERS, "local", fake_launcher(script))
    assert Runner(store, [OTHER2]).run() == {OTHER2.key: Status.FAILED}
    assert "version=99 is of a newer rose_ds" in store.failure(OTHER2)["log"][-1]
    metrics = store.run_folder(OTHER2) / "metrics.json"
    assert Runner(store, [OTHER2], retry_failed=True).run() == {OTHER2.key: Status.FAILED}
    assert "99" in metrics.read_text()
    metrics.write_text('{"task": "sst2", "model": "m", "version": 3}')  # as if this were the newer version
    assert Runner(store, [OTHER2], retry_failed=True).run() == {OTHER2.key: Status.DONE}
    assert (store.folder(OTHER2) / "starts").read_text() == "x"
    with (store.root / RESULTS).open("a") as file:
        file.write(json.dumps({"cell": "0", "metrics": {"task": "t", "model": "m", "version": 99, "new": 1}}) + "\n")
    with pytest.raises(ValueError, match=rf"{RESULTS}:2: version=99 is of a newer rose_ds, .*: upgrade$"):
        store.results()


def test_a_full_disk_ends_no_sweep(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run fails for want of room, and so does the note of it."""
    monkeypatch.setitem(LAUNCHERS, "local", fake_launcher(_RUN))
    cells = [Cell("sst2", "vanilla", seed, {}) for seed in range(3)]
    full = OSError(errno.ENOSPC, "No space left on device")
    fail, record = store.fail, store.record

    def no_room(*_: Any, **__: Any) -> None:
        raise full

    monkeypatch.setattr(store, "fail", no_room)
    monkeypatch.setattr(store, "record", lambda cell, *a, **k: (no_room if cell.seed == 2 else record)(cell, *a, **k))
    found = Runner(store, cells).run()
    assert [found[cell.key] for cell in cells] == [Status.DONE, Status.INCOMPLETE, Status.INCOMPLETE]
    monkeypatch.setattr(store, "fail", fail)
    monkeypatch.setattr(store, "record", record)
    found = Runner(store, cells).run()
    assert [found[cell.key] for cell in cells] == [Status.DONE, Status.FAILED, Status.DONE]
    assert (store.folder(cells[2]) / "starts").read_text() == "x"


def test_the_deepspeed_launchers_ranks_are_told_to_stop(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first process ends on SIGTERM and tells nobody; the sweep waits for those that it started."""
    runner = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]])\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-c", runner, _RANK, str(store.root / "marker")]
    stopped(store, monkeypatch, "deepspeed", Launcher(lambda words, extra: command, tells_ranks=False))


#: As far as a sweep uses it: SIGTERM ends the task at once, other signals are handed on.
_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
set -m # a process group of its own, all of which is signalled
"$@" & task=$!
trap 'kill -KILL -- -$task' TERM
trap 'kill -USR1 -- -$task' USR1
while kill -0 $task 2>/dev/null; do wait $task; code=$?; done
exit $code
"""


def test_a_task_that_slurm_itself_stops_saves(tmp_path: Path) -> None:
    """A preemption signals every process of the step; were the first to end, Slurm would kill what is left."""
    *_, bash, option, task, name, _, _, _ = slurm([], [])
    command = [bash, option, task, name, sys.executable, "-c", _RANK, str(tmp_path / "marker")]
    step = subprocess.Popen(command, start_new_session=True)
    try:
        until_started(tmp_path / "marker")
        os.killpg(step.pid, signal.SIGTERM)
        assert step.wait(timeout=20) == 0
    finally:
        if step.poll() is None:
            os.killpg(step.pid, signal.SIGKILL)
            step.wait()
    assert (tmp_path / "marker").read_text() == "saved"


@pytest.mark.parametrize("code", [0, 143])
def test_sruns_task_is_told_to_stop(store: Store, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """And has time to save; and a run that the sweep has stopped has not failed, whatever it ends with."""
    program = store.root / "bin" / "srun"
    program.parent.mkdir(parents=True)
    program.write_text(_SRUN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    *step, _, _ = slurm([], [])
    command = [*step, "-c", _RANK.replace("sys.exit(0)", f"sys.exit({code})"), str(store.root / "marker")]
    stopped(store, monkeypatch, "slurm", Launcher(lambda words, extra: command, stop=signal.SIGUSR1))


_RANK = (
    "import pathlib, signal, sys, time\n"
    "def stop(*_):\n    time.sleep(0.5); pathlib.Path(sys.argv[1]).write_text('saved'); sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, stop)\npathlib.Path(sys.argv[1]).write_text('started')\ntime.sleep(60)\n"
)


def until_started(marker: Path) -> None:
    deadline = time.monotonic() + 60
    while not marker.is_file() or marker.read_text() != "started":
        assert time.monotonic() < deadline, f"{marker} did not come"
        time.sleep(0.05)


def stopped(store: Store, monkeypatch: pytest.MonkeyPatch, name: str, launcher: Launcher) -> None:
    """A sweep that gets SIGTERM once its run has started leaves it incomplete, and waits until it has saved."""
    monkeypatch.setitem(LAUNCHERS, name, launcher)
    sweep, marker = Runner(store, [CELL], launcher=name), store.root / "marker"

    def stop_when_started() -> None:
        try:
            until_started(marker)
        finally:  # which the sweep waits for; where it has ended, nobody would take the signal
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_started)
    thread.start()
    try:
        assert sweep.run() == {CELL.key: Status.INCOMPLETE}
    finally:
        thread.join()
    assert marker.read_text() == "saved"


def test_whoever_only_looks_needs_no_right_to_write(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = store.claim(CELL)
    assert claim is not None
    opened = os.open

    def read_only(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if str(path).endswith("claim") and flags != os.O_RDONLY:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", read_only)
    assert store.status(CELL, {}) is Status.RUNNING
    claim.release()
    assert store.status(CELL, {}) is Status.NOT_STARTED
    with pytest.raises(ValueError, match="cannot claim .*Permission denied"):
        store.claim(CELL)


def test_a_run_that_ended_unrecorded_is_recorded_and_not_run_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAUNCHERS, "local", fake_launcher(_RUN))
    store.folder(CELL).mkdir()
    finish(store, CELL)
    assert Runner(store, [CELL]).run() == {CELL.key: Status.DONE}
    assert not (store.folder(CELL) / "starts").exists()


def test_an_attack_is_of_the_runs_own_data(store: Store) -> None:
    """In the folder of whoever attacks: its training may have been another machine's."""
    runner = Runner(store, [CELL], attack=PlannedAttack(AttackSettings("pruthi"), 8))
    cell = Cell("sst2", "vanilla", 0, {**CELL.settings, "data": "glue"})
    words = ["--search", "pruthi", "--max_eval_samples", "2"]  # as many as the run has answered
    assert runner._left(cell)[:3] == ["train", "--task", "sst2"]
    store.folder(cell).mkdir()
    finish(store, cell)
    run = str(store.run_folder(cell))
    assert runner._left(cell) == ["attack", "--model", run, "--data", "glue", *words]


def test_the_estimate_is_of_the_same_task_and_method() -> None:
    results = [
        {"task": "sst2", "method": "vanilla", "seconds": 10.0},
        {"task": "sst2", "method": "freelb", "seconds": 40.0},
        {"task": "rte", "method": "vanilla", "seconds": None},
    ]
    assert remaining_seconds([CELL, OTHER], results, jobs=2) == 10.0
    assert remaining_seconds([Cell("rte", "freelb", 0, {})], results, jobs=1) == 40.0
    assert remaining_seconds([Cell("rte", "smart", 0, {})], results, jobs=1) == 25.0
    assert remaining_seconds([CELL], [], jobs=1) is None


def test_the_estimate_counts_places_and_what_has_run() -> None:
    """One cell takes its time in however many places; one under way has a part of it behind it."""
    results = [
        {"task": "sst2", "method": "vanilla", "seconds": 60.0, "settings": {"max_steps": 300}},
        {"task": "sst2", "method": "vanilla", "seconds": 900.0, "settings": {"max_steps": 5000}},
    ]
    cell = Cell("sst2", "vanilla", 0, {"max_steps": 300})
    assert remaining_seconds([cell], results, jobs=4) == 60.0
    assert remaining_seconds([cell] * 3, results, jobs=2) == 120.0
    assert remaining_seconds([cell], results, jobs=2, running=[(cell, 45.0), (cell, 70.0)]) == 60.0
    assert remaining_seconds([cell], results, jobs=1, running=[(cell, 45.0)]) == 75.0


def test_settings_are_there_for_a_person(store: Store) -> None:
    claim = store.claim(CELL)
    assert claim is not None
    claim.release()
    written = json.loads((store.folder(CELL) / "settings.json").read_text())
    assert written["name"] == "sst2 vanilla seed 0 learning_rate=0.0001"
