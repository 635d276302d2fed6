"""A folder with the cells of sweeps: what is done, what was claimed by whom, and what came out.

STORE/plan.jsonl           a line a cell that a sweep was asked for
STORE/results.jsonl        a line a finished cell: what it was, what it measured, where and with which code
STORE/given_up.jsonl       a line a cell that others of its grid have left behind: how far it came
STORE/predictions/KEY.jsonl    its answers, item by item
STORE/cells/KEY/           working files, not for version control: settings.json, log.txt, run/ (the run's output
                           folder, with its checkpoints), claim, failed.json
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock

from rose_ds.attack.settings import AttackSettings
from rose_ds.experiments.cells import Cell
from rose_ds.experiments.claims import Claim, is_claimed, lock
from rose_ds.experiments.evaluation import PREDICTIONS, TRAJECTORY, read_trajectory, sound_lines
from rose_ds.experiments.metrics import FILE, Metrics, NewerVersion, write_whole
from rose_ds.experiments.resumable import records_of
from rose_ds.training.sole_use import is_used

PLAN = "plan.jsonl"
RESULTS = "results.jsonl"
GIVEN_UP = "given_up.jsonl"
_LOG_LINES = 20


class Status(Enum):
    """Of a cell."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    GIVEN_UP = "given up"
    INCOMPLETE = "incomplete"
    NOT_STARTED = "not started"


class Store:
    """See the module's text."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cells = root / "cells"
        self._read: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}
        """By file: its size and time when it was last read, and what it held."""

    def create(self) -> None:
        """Make the folders. Raises ValueError where they cannot be made."""
        try:
            for folder in (self.cells, self.root / "predictions"):
                folder.mkdir(parents=True, exist_ok=True)
            (self.cells / ".gitignore").write_text("*\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot make the store {self.root}: {error.strerror}") from error

    def folder(self, cell: Cell) -> Path:
        """The cell's working files."""
        return self.cells / cell.key

    def run_folder(self, cell: Cell) -> Path:
        """The --output_dir of its run."""
        return self.folder(cell) / "run"

    def log(self, cell: Cell) -> Path:
        """What its runs printed."""
        return self.folder(cell) / "log.txt"

    def add_to_plan(self, cells: Iterable[Cell]) -> None:
        """Note what was asked for, so that a report knows what is missing."""
        with FileLock(self.cells / "results.lock"):
            there = {cell.key for cell in self.plan()}
            new = [cell for cell in cells if cell.key not in there]
            lines = [json.dumps({"cell": c.key, **_portable(c)}, separators=(",", ":")) + "\n" for c in new]
            if lines:
                _append(self.root / PLAN, "".join(lines))

    # --- what is there ---

    def plan(self) -> list[Cell]:
        """Every cell that was asked for. Raises ValueError where a line is damaged."""
        return list(self._lines(PLAN, "a planned cell's line", _planned).values())

    def results(self) -> dict[str, dict[str, Any]]:
        """The finished cells' lines, by key; a last line that a killed process left unfinished is passed over.

        Raises:
            ValueError: another line is damaged; names it.
        """
        return self._lines(RESULTS, "a finished cell's line", _finished)

    def given_up(self) -> dict[str, dict[str, Any]]:
        """Lines of the cells that were given up, by key. Raises ValueError where one is damaged."""
        return self._lines(GIVEN_UP, "a line of a cell", lambda record: record)

    def _lines(self, name: str, what: str, of: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """What a file's lines say of cells, by key; read again only where it has changed."""
        path, found = self.root / name, {}
        try:
            file = path.open(encoding="utf-8")
        except FileNotFoundError:
            return {}
        with file:  # of the open file: NFS asks its server at open, and stat may be seconds old
            now = os.fstat(file.fileno())
            stamp = (now.st_size, now.st_mtime_ns)
            before = self._read.get(name)
            if before is not None and before[0] == stamp:
                return before[1]
            lines = file.read().split("\n")[:-1]  # what a killed process left without its end is passed over
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                found[record["cell"]] = of(record)
            except NewerVersion as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number} is not {what} ({error}): delete it") from error
        self._read[name] = stamp, found
        return found

    def predictions(self, key: str) -> dict[str, dict[str, Any]]:
        """A finished cell's answers by set; see ``rose_ds.experiments.evaluation.Predictions.record``.

        Raises:
            ValueError: they are not there, or damaged.
        """
        return _answers(self.root / "predictions" / f"{key}.jsonl")

    def status(self, cell: Cell, results: Mapping[str, Any]) -> Status:
        """Of one cell; ``results``: those of ``results()``."""
        folder = self.folder(cell)
        if cell.key in results:
            return Status.DONE
        if cell.key in self.given_up():
            return Status.GIVEN_UP
        if not folder.is_dir():
            return Status.NOT_STARTED
        if is_claimed(folder) or is_used(self.run_folder(cell)):
            return Status.RUNNING
        if (folder / "failed.json").is_file():
            return Status.FAILED
        return Status.INCOMPLETE if self.log(cell).is_file() else Status.NOT_STARTED

    def failure(self, cell: Cell) -> dict[str, Any]:
        """What is known of a failed cell: exit_code, host, log (its last lines)."""
        found: dict[str, Any] = json.loads((self.folder(cell) / "failed.json").read_text(encoding="utf-8"))
        return found

    # --- what happens to a cell ---

    def claim(self, cell: Cell) -> Claim | None:
        """Claim a cell; None where another process has it or its run, or it is done, given up or failed."""
        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        claim = lock(folder)
        if claim is None:
            return None
        done = cell.key in self.results() or cell.key in self.given_up()
        failed = (folder / "failed.json").is_file()
        # settled while this process looked elsewhere; or ranks go on whose sweep and launcher were killed
        if done or failed or is_used(self.run_folder(cell)):
            claim.release()
            return None
        os.ftruncate(claim.descriptor, 0)
        os.pwrite(claim.descriptor, f"{platform.node()} {os.getpid()}\n".encode(), 0)  # for a person who looks
        write_whole(folder / "settings.json", json.dumps({"name": cell.name, **asdict(cell)}, indent=2) + "\n")
        return claim

    def finished(self, cell: Cell) -> bool:
        """Whether the cell's run has come to its end, recorded or not."""
        return (self.run_folder(cell) / FILE).is_file() and (self.run_folder(cell) / PREDICTIONS).is_file()

    def record(self, cell: Cell, seconds: float | None, *, keep_models: bool) -> None:
        """Add a finished cell's line, and delete its checkpoints and, unless ``keep_models``, its model.

        Args:
            seconds: wall-clock time of its last attempt; None: nobody measured it.
        """
        run = self.run_folder(cell)
        metrics = Metrics.read(run)
        known = cell.portable
        for name in metrics.config.keys() & {"data", *cell.digests}:  # nobody's folders
            metrics.config[name] = known.get(name) or Path(metrics.config[name] or "").name or None
        if "model" in cell.digests:
            metrics.model = known["model"]
        line = {
            "cell": cell.key,
            **_portable(cell),
            "host": platform.node(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": seconds,
            "metrics": asdict(metrics),
            "trajectory": read_trajectory(run),
        }
        answers = (run / PREDICTIONS).read_text(encoding="utf-8")
        answers += "".join(json.dumps(made, separators=(",", ":")) + "\n" for made in _attacks(run))
        write_whole(self.root / "predictions" / f"{cell.key}.jsonl", answers)
        if not keep_models:  # before the line: who is killed in between records it again, without them
            for weights in run.glob("*.safetensors"):
                weights.unlink()
        with FileLock(self.cells / "results.lock"):
            if cell.key not in self.results():
                _append(self.root / RESULTS, json.dumps(line, separators=(",", ":")) + "\n")
        self.unmark(cell)
        self._delete_checkpoints(cell)

    def give_up(self, cell: Cell) -> None:
        """Add a line of a cell that was stopped for good, and delete its run."""
        way = list(sound_lines(self.run_folder(cell) / TRAJECTORY))
        line = {"cell": cell.key, **_portable(cell), "trajectory": way}
        with FileLock(self.cells / "results.lock"):
            if cell.key not in self.given_up():
                _append(self.root / GIVEN_UP, json.dumps(line, separators=(",", ":")) + "\n")
        self.restart(cell)

    def tidy(self, cell: Cell) -> None:
        """Delete the checkpoints of a finished cell whose process was killed before it could."""
        if self.run_folder(cell).is_dir() and (claim := lock(self.folder(cell))) is not None:
            self._delete_checkpoints(cell)
            claim.release()

    def _delete_checkpoints(self, cell: Cell) -> None:
        for checkpoint in self.run_folder(cell).glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)  # NFS keeps the name of a file that is still open

    def fail(self, cell: Cell, exit_code: int) -> None:
        """Record that a cell's run failed, with its log's last lines."""
        text = self.log(cell).read_text(encoding="utf-8", errors="replace") if self.log(cell).is_file() else ""
        lines = text.replace("\r", "\n").splitlines()
        record = {"exit_code": exit_code, "host": platform.node(), "log": lines[-_LOG_LINES:]}
        write_whole(self.folder(cell) / "failed.json", json.dumps(record, indent=2) + "\n")

    def forgive(self, cell: Cell) -> None:
        """Let a failed cell be tried again. Figures that cannot be read are set aside, and the run, from its last
        checkpoint, measures again.
        """
        if self.finished(cell):
            run = self.run_folder(cell)
            try:
                Metrics.read(run), read_trajectory(run), _answers(run / PREDICTIONS)
            except (NewerVersion, OSError):
                pass  # nothing is wrong with them, as far as anybody knows
            except ValueError as error:
                if not isinstance(error.__cause__, OSError):
                    (run / FILE).replace(run / f"{FILE}.damaged")
        self.unmark(cell)

    def unmark(self, cell: Cell) -> None:
        """Forget that the cell has failed."""
        (self.folder(cell) / "failed.json").unlink(missing_ok=True)

    def answered(self, cell: Cell) -> int:
        """How many rows of the clean dev set the cell's run has answered."""
        recorded = cell.key in self.results()
        found = self.predictions(cell.key) if recorded else _answers(self.run_folder(cell) / PREDICTIONS)
        return len(found["clean"]["label"]) if "clean" in found else 0

    def restart(self, cell: Cell) -> None:
        """Let a cell be trained from its beginning: nothing of its run stays."""
        shutil.rmtree(self.run_folder(cell), ignore_errors=True)


def _answers(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a PREDICTIONS file by set. Raises ValueError where there is none, or it is damaged."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {record["set"]: record for record in records}
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _attacks(run: Path) -> Iterator[dict[str, Any]]:
    """Of each attack on a run: its label in metrics.json, and of every item whether the answer is right to its end."""
    for summary in sorted((run / "attack").glob("*.json")):
        logs = sorted(summary.parent.glob(f"{summary.stem}-*-of-*.jsonl"))
        items = sorted({record["idx"]: record for record in records_of(logs)}.items())
        found = json.loads(summary.read_text(encoding="utf-8"))
        how = AttackSettings(**{f.name: found[f.name] for f in fields(AttackSettings)})
        if summary.stem != how.key(found["rows"]):  # by an earlier version of the search
            continue
        yield {
            "set": how.label(found["items"], found["rows"]),
            "idx": [idx for idx, _ in items],
            "label": [record["label"] for _, record in items],
            "right": [record["outcome"] in ("held", "budget") for _, record in items],
        }


def _portable(cell: Cell) -> dict[str, Any]:
    """A cell without where its data lay on one machine."""
    known = {**asdict(cell), "settings": cell.portable}
    del known["digests"], known["recorded"]  # they are in the settings, and the line's own
    return known


def _planned(record: dict[str, Any]) -> Cell:
    known = {name: record[name] for name in ("task", "method", "seed", "settings", "varied")}
    return Cell(**known, recorded=record["cell"])


def _finished(record: dict[str, Any]) -> dict[str, Any]:
    Metrics.of(record["metrics"])
    return record


def _append(path: Path, text: str) -> None:
    """Add lines, in place of a last one without its end."""
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
