"""Settings that fall behind are given up; sweeps that share a store share its work."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rose_ds.experiments.cells import Cell
from rose_ds.experiments.comparison.gather import gather
from rose_ds.experiments.halving import JOURNAL, Halving
from rose_ds.experiments.launchers import LAUNCHERS, Launcher
from rose_ds.experiments.store import GIVEN_UP, Status, Store
from rose_ds.experiments.sweep import Runner

#: A run whose clean accuracy is its learning rate; below the least that it is given, it waits to be stopped.
_RUN = """
import json, pathlib, signal, sys, time
out, rate, evaluations = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
out.mkdir(parents=True, exist_ok=True)
(out.parent / "starts").open("a").write("x")
def stop(*_):
    time.sleep(0.5)
    (out.parent / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
lines = ""
for step in range(1, evaluations + 1):
    lines += json.dumps({"step": step, "clean": rate}) + "\\n"
    (out / "new").write_text(lines)
    (out / "new").replace(out / "trajectory.jsonl")
    time.sleep(float(sys.argv[4]) if rate >= float(sys.argv[5]) else 60)
(out / "predictions.jsonl").write_text("")
(out / "metrics.json").write_text(json.dumps({"task": "sst2", "model": "m", "version": 4, "glue_accuracy": rate}))
"""


def launcher(seconds: float, least: float = 0.0) -> Launcher:
    def launch(flags: Any, extra: Any) -> list[str]:
        values = [flags[flags.index(name) + 1] for name in ("--output_dir", "--learning_rate")]
        return [sys.executable, "-c", _RUN, *values, "2", str(seconds), str(least)]

    return Launcher(launch)


def cells(*rates: float, method: str = "vanilla") -> list[Cell]:
    return [Cell("sst2", method, 0, {"learning_rate": rate}, {"learning_rate": rate}) for rate in rates]


def test_settings_that_fall_behind_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in two goes on, of those that have come so far: the first always, then whoever is among the best half."""
    pytest.importorskip("optuna")
    monkeypatch.setitem(LAUNCHERS, "local", launcher(1.0, least=0.45))
    store, tried = Store(tmp_path / "store"), cells(0.5, 0.4, 0.9, 0.1)
    found = Runner(store, tried, halving=2).run()
    assert [found[cell.key] for cell in tried] == [Status.DONE, Status.GIVEN_UP, Status.DONE, Status.GIVEN_UP]
    assert {key: record["trajectory"] for key, record in store.given_up().items()} == {
        tried[1].key: [{"step": 1, "clean": 0.4}],
        tried[3].key: [{"step": 1, "clean": 0.1}],
    }
    assert not store.run_folder(tried[1]).exists()
    again = Runner(store, tried, halving=2).run()  # nothing is left to do
    assert [cell.key for cell in store.plan()] == [cell.key for cell in tried]
    entry = gather([store]).entries["sst2", "vanilla"]
    assert (entry.chosen.label, entry.tried, len(entry.candidates)) == ("learning_rate=0.9", 4, 2)
    assert again == found and [(store.folder(c) / "starts").read_text() for c in tried] == ["x"] * 4
    lines = (store.root / GIVEN_UP).read_text()
    (store.root / GIVEN_UP).write_text(lines.replace('"cell"', '"sell"'))
    with pytest.raises(ValueError, match=rf"{GIVEN_UP}:1 is not a line of a cell"):
        store.given_up()


def test_methods_and_seeds_are_not_compared_with_each_other(tmp_path: Path) -> None:
    """Nor models; and what another process has seen counts, as does what a killed one had begun."""
    pytest.importorskip("optuna")
    store = Store(tmp_path)
    store.create()
    mine, others = cells(0.9, 0.2), cells(0.2, 0.9, method="r-drop")
    halving = Halving(store.cells / JOURNAL, [*mine, *others], 2)

    def shown(to: Halving, cell: Cell, *clean: float) -> bool:
        folder = store.run_folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"step": i, "clean": value}) + "\n" for i, value in enumerate(clean)]
        (folder / "trajectory.jsonl").write_text("".join(lines))
        return to.is_behind(cell, folder)

    assert not shown(halving, mine[0], 0.9)
    assert not shown(halving, others[0], 0.2)
    second = Halving(store.cells / JOURNAL, [*mine, *others], 2)
    assert shown(second, mine[1], 0.2)
    assert not shown(second, others[1], 0.9)
    third = Halving(store.cells / JOURNAL, [*mine, *others], 2)  # a sweep that is started again looks again
    assert third.is_behind(mine[1], store.run_folder(mine[1]))
    assert not third.is_behind(mine[0], store.run_folder(mine[0]))
    assert len(third.storage.get_all_studies()) == 2
    larger = [replace(cell, settings={**cell.settings, "model": "larger"}) for cell in mine]
    assert not shown(Halving(store.cells / JOURNAL, larger, 2), larger[1], 0.2)
    last = [replace(cell, settings={**cell.settings, "max_steps": 1}) for cell in cells(0.9, 0.2)]
    ending = Halving(store.cells / JOURNAL, last, 2)
    assert not shown(ending, last[0], 0.5, 0.9) and not shown(ending, last[1], 0.9, 0.2)  # step 1 is the end


def test_a_run_that_is_given_up_has_saved_before_its_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launcher may end before its ranks do."""
    pytest.importorskip("optuna")
    program = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"

    def launch(flags: Any, extra: Any) -> list[str]:
        values = [flags[flags.index(name) + 1] for name in ("--output_dir", "--learning_rate")]
        return [sys.executable, "-c", program, sys.executable, "-c", _RUN, *values, "2", "0.1", "0.5"]

    monkeypatch.setitem(LAUNCHERS, "local", Launcher(launch, tells_ranks=False))
    store, tried = Store(tmp_path / "store"), cells(0.9, 0.1)
    store.create()
    halving = Halving(store.cells / JOURNAL, tried, 2)
    best = store.run_folder(tried[0])
    best.mkdir(parents=True)
    (best / "trajectory.jsonl").write_text('{"step": 1, "clean": 0.9}\n')
    assert not halving.is_behind(tried[0], best)
    found = Runner(store, tried[1:] + cells(0.05), halving=2).run()
    assert set(found.values()) == {Status.GIVEN_UP}
    assert (store.folder(tried[1]) / "saved").is_file() and not store.run_folder(tried[1]).exists()


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'rose_ds\[sweep\]'"):
        Runner(Store(tmp_path), cells(0.1, 0.2), halving=2)


@pytest.mark.parametrize(
    ("given", "factor", "message"),
    [
        (cells(0.1, 0.2), 1, "halving=1 must be at least 2"),
        (cells(0.1) + cells(0.1, method="r-drop"), 2, "give --grid"),
        ([replace(c, settings={**c.settings, "eval_strategy": False}) for c in cells(0.1, 0.2)], 2, "must not be no"),
    ],
)
def test_what_cannot_be_halved(given: list[Cell], factor: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Runner(Store(tmp_path), given, halving=factor)


# --- several sweeps, one store ---

_SWEEP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_sweep_halving as here
here.LAUNCHERS["local"] = here.launcher(0.05)
here.Runner(here.Store(Path(sys.argv[1])), here.cells(*[i / 10 for i in range(10)]), jobs=2).run()
"""


def test_two_sweeps_do_no_cell_twice(tmp_path: Path) -> None:
    """Started together on one store, both end when all is done, and each cell was started once."""
    command = [sys.executable, "-c", _SWEEP, str(tmp_path), str(Path(__file__).parent)]
    both = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [sweep.wait(timeout=120) for sweep in both] == [0, 0]
    store, tried = Store(tmp_path), cells(*[i / 10 for i in range(10)])
    assert [(store.folder(cell) / "starts").read_text() for cell in tried] == ["x"] * 10
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["cell"] for line in lines) == sorted(cell.key for cell in tried)


def test_a_cell_that_was_stopped_is_not_counted_as_finished(tmp_path: Path, capsys: Any) -> None:
    """By the bar, at whose end it would look like a result."""
    command = [sys.executable, "-c", _SWEEP.replace("0.05", "30"), str(tmp_path), str(Path(__file__).parent)]
    sweep = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("cells/*/starts"))) < 2:
            assert time.monotonic() < deadline and sweep.poll() is None
            time.sleep(0.05)
        sweep.send_signal(signal.SIGTERM)
        _, shown = sweep.communicate(timeout=60)
    finally:
        if sweep.poll() is None:
            sweep.kill()
            sweep.wait()
    assert "| 0/10 cells" in shown.replace("\r", "\n").splitlines()[-1]
