"""Running a sweep's cells: some at a time on this machine, beside other processes that share the store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from rose_ds.attack.settings import PlannedAttack
from rose_ds.experiments.cells import Cell
from rose_ds.experiments.claims import Claim
from rose_ds.experiments.evaluation import read_trajectory
from rose_ds.experiments.halving import JOURNAL, Halving
from rose_ds.experiments.launchers import LAUNCHERS, places
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.progress import BAR, clock, remaining_seconds
from rose_ds.experiments.store import RESULTS, Status, Store

_POLL_SECONDS = 0.2
_WAIT_SECONDS = 2.0
_SETTLED = (Status.DONE, Status.FAILED, Status.GIVEN_UP)
#: A run that SIGTERM stopped at a checkpoint, by the shell's code and by Python's.
_STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


@dataclass
class _Running:
    cell: Cell
    claim: Claim
    slot: int
    words: list[str]
    """The command that it is at."""
    process: subprocess.Popen[bytes]
    log: Any
    started: float = field(default_factory=time.monotonic)
    given_up: bool = False
    """It was told to stop, for good."""


class Runner:
    """Runs what is not done, ``jobs`` cells at a time.

    Args:
        launcher: a name in LAUNCHERS; ``launcher_args``: more words for it.
        retry_failed: try failed cells again.
        attack: made on each trained model before it is deleted.
        keep_models: keep the trained models, 90 MB each for MiniLM.
        halving: give settings of the grid up that fall behind; keep one in so many (``Halving``). None: finish all.
    """

    def __init__(
        self,
        store: Store,
        cells: Sequence[Cell],
        *,
        jobs: int = 1,
        launcher: str = "local",
        launcher_args: Sequence[str] = (),
        retry_failed: bool = False,
        keep_models: bool = False,
        attack: PlannedAttack | None = None,
        halving: int | None = None,
    ) -> None:
        if jobs < 1:
            raise ValueError(f"jobs={jobs} must be at least 1")
        if launcher not in LAUNCHERS:
            raise ValueError(f"launcher={launcher!r} is not one of {list(LAUNCHERS)}")
        self.store, self.cells = store, list({cell.key: cell for cell in cells}.values())
        self.jobs, self.launcher = jobs, LAUNCHERS[launcher]
        fixed = all(_has_fixed_batch(cell.settings) for cell in cells)
        self._places = places(launcher, jobs, launcher_args, fixed_batch=fixed)
        self.retry_failed, self.keep_models, self.attack = retry_failed, keep_models, attack
        self.halving: Halving | None = None
        if halving is not None:
            store.create()
            self.halving = Halving(store.cells / JOURNAL, self.cells, halving)
        self._running: list[_Running] = []
        self._settled: set[str] = set()
        """Cells that are done, were given up, or have failed."""
        self._left_alone: set[str] = set()
        """Cells that somebody stopped: a later sweep goes on with them."""
        self._looked = 0.0
        """When cells of other processes were last looked at."""
        self._stop = False

    def run(self) -> dict[str, Status]:
        """Run until every cell is done or has failed, whoever runs it; status by key. On SIGTERM or Ctrl-C the runs
        save a checkpoint and end, and this returns.
        """
        self.store.create()
        self.store.add_to_plan(self.cells)
        results = self.store.results()
        for cell in self.cells:
            status = self.store.status(cell, results)
            if status is Status.FAILED and self.retry_failed:
                self.store.forgive(cell)
            elif status in _SETTLED:
                self._settled.add(cell.key)
            if status is Status.DONE:
                self.store.tidy(cell)
        self._tell_of_attacks_not_made(results)
        bar = tqdm(total=len(self.cells), initial=len(self._settled), desc="sweep", bar_format=BAR, dynamic_ncols=True)
        pause = 1.0 if sys.stderr.isatty() else 600.0  # a log file needs no moving clock
        shown = -pause
        with self._listening(), bar:
            while not self._stop and (self._running or self._waiting()):
                changed = self._reap() + self._start()
                self._give_up_laggards()
                if changed or time.monotonic() - shown > pause:
                    bar.n, shown = len(self._settled), time.monotonic()
                    bar.set_postfix_str(self._progress())
                time.sleep(_POLL_SECONDS if self._running or changed else _WAIT_SECONDS)
            self._end()
            bar.n = len(self._settled)
        results = self.store.results()
        return {cell.key: self.store.status(cell, results) for cell in self.cells}

    def _tell_of_attacks_not_made(self, results: Mapping[str, Any]) -> None:
        if self.attack is None:
            return
        done = [cell for cell in self.cells if cell.key in results]
        without = [cell for cell in done if not self._attacked(cell, results[cell.key]["metrics"])]
        if without:
            tqdm.write(
                f"{len(without)} finished cells were not attacked by {self.attack.settings.name}, {self.attack.items} "
                f"items ({without[0].name}, ...), and a sweep trains none again: take their lines out of "
                f"{self.store.root / RESULTS} to train and attack them"
            )

    # --- cells ---

    def _attacked(self, cell: Cell, metrics: Mapping[str, Any]) -> bool:
        """Whether a recorded cell was; one whose answers are gone was."""
        assert self.attack is not None
        try:
            return self.attack.made(metrics.get("under_attack", {}), self.store.answered(cell))
        except ValueError:
            return True

    def _start(self) -> int:
        """Start cells in free places; how many."""
        started = 0
        if time.monotonic() - self._looked < _WAIT_SECONDS:
            return 0
        for cell in self._waiting():
            if len(self._running) >= self.jobs or self._stop:
                break
            claim = None
            try:
                claim = self.store.claim(cell)
                if claim is None:  # another process's
                    if self.store.status(cell, self.store.results()) in _SETTLED:
                        self._settled.add(cell.key)
                    continue
                left, damage = self._left_of(cell)
                if left:
                    slot = min(set(range(self.jobs)) - {r.slot for r in self._running})
                    self._running.append(_Running(cell, claim, slot, left, *self._launch(left, cell, claim, slot)))
                    started += 1
                    continue
                if damage is None:  # a process that was killed before it could record it
                    self.store.record(cell, None, keep_models=self.keep_models)
                else:
                    self._failed(cell, 0, damage)
                self._settled.add(cell.key)
            except OSError as error:
                self._leave_alone(cell, error)
            if claim is not None:
                claim.release()
        else:  # all were tried, so what waits is others': not to be asked for again at once
            self._looked = time.monotonic()
        return started

    def _waiting(self) -> list[Cell]:
        """Cells to start here, or to wait for while another process has them."""
        taken = self._settled | self._left_alone | {run.cell.key for run in self._running}
        return [cell for cell in self.cells if cell.key not in taken]

    def _left(self, cell: Cell) -> list[str]:
        """The command that the cell waits for: its training, then its attack; none: all is there."""
        folder = self.store.run_folder(cell)
        if not self.store.finished(cell):
            return ["train", *cell.flags(folder)]
        metrics, _ = Metrics.read(folder), read_trajectory(folder)  # or else recording it would find what is damaged
        rows = self.store.answered(cell)
        if self.attack is None or self.attack.made(metrics.under_attack, rows):
            return []
        if not list(folder.glob("*.safetensors")):  # of a cell whose line was taken out of the results
            self.store.restart(cell)
            return ["train", *cell.flags(folder)]
        # its run may have been another machine's, with other folders
        return ["attack", "--model", str(folder), *cell.source(), *self.attack.words(rows)]

    def _left_of(self, cell: Cell) -> tuple[list[str], str | None]:
        """The same, and why the figures of a run that has ended cannot be read. The run stays as it is: they may be a
        newer version's, or a file server's that does not answer.
        """
        try:
            return self._left(cell), None
        except ValueError as error:
            return [], f"{error}; the run is left as it is, and --retry_failed goes on with it"

    def _launch(self, words: Sequence[str], cell: Cell, claim: Claim, slot: int) -> tuple[subprocess.Popen[bytes], Any]:
        """Start a ``rose-ds`` command; its process, and its log."""
        place = self._places[slot]
        command = self.launcher.command(words, place.words)
        log = self.store.log(cell).open("ab")
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
        log.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**place.defaults, **os.environ, **place.chosen},
                pass_fds=(claim.descriptor,),
                start_new_session=True,  # Ctrl-C is for the sweep, which tells its runs
            )
        except OSError as error:
            raise ValueError(f"cannot start {command[0]}: {error.strerror}") from error
        return process, log

    def _reap(self) -> int:
        """Record the runs that have ended; how many."""
        ended = [r for r in self._running if r.process.poll() is not None]
        ended = [r for r in ended if not r.given_up or self.launcher.has_ended(r.process)]
        for run in ended:
            try:
                if self._goes_on(run):
                    continue
            except OSError as error:
                self._leave_alone(run.cell, error)
            self._running.remove(run)
            run.claim.release()
        return len(ended)

    def _goes_on(self, run: _Running) -> bool:
        """Whether a run whose command has ended has another one, which is started; or else record what came of it."""
        run.log.close()
        code = run.process.returncode
        trained = code == 0 and self.store.finished(run.cell)
        left, damage = self._left_of(run.cell) if trained else ([], None)
        if left == run.words:
            left, damage = [], f"rose-ds {' '.join(left)} has ended without what it was to leave"
        if left and not self._stop:
            run.words = left
            run.process, run.log = self._launch(left, run.cell, run.claim, run.slot)
            return True
        if damage is not None:
            self._failed(run.cell, code, damage)
        elif run.given_up and not trained:
            self.store.give_up(run.cell)
        elif trained and not left:
            self.store.record(run.cell, time.monotonic() - run.started, keep_models=self.keep_models)
        elif not trained and code not in _STOPPED and not self._stop:
            self._failed(run.cell, code)
        else:
            self._left_alone.add(run.cell.key)
            return False
        self._settled.add(run.cell.key)
        return False

    def _leave_alone(self, cell: Cell, error: OSError) -> None:
        """A full disk, or a file server that does not answer: what is there stays for a later sweep."""
        self._left_alone.add(cell.key)
        tqdm.write(f"left alone: {cell.name} ({error}); start the sweep again when that is mended")

    def _failed(self, cell: Cell, code: int, why: str | None = None) -> None:
        if why is not None:
            with self.store.log(cell).open("a", encoding="utf-8") as log:
                log.write(f"{why}\n")
        self.store.fail(cell, code)
        tqdm.write(f"failed: {cell.name} ({why or f'exit code {code}'}); {self.store.log(cell)}")

    def _give_up_laggards(self) -> None:
        """Stop the runs that others of their grid have left behind."""
        if self.halving is None:
            return
        for run in self._running:
            if run.given_up or self.store.finished(run.cell):  # it may be under attack
                continue
            if self.halving.is_behind(run.cell, self.store.run_folder(run.cell)):
                run.given_up = True
                self.launcher.tell_to_stop(run.process)
                tqdm.write(f"given up, behind others of its grid: {run.cell.name}")

    def _end(self) -> None:
        """Let the runs that are under way save and end."""
        for run in self._running:
            self.launcher.tell_to_stop(run.process)
        for run in self._running:
            self.launcher.wait(run.process)
        self._reap()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def stop(*_: Any) -> None:
            self._stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- progress ---

    def _progress(self) -> str:
        names = ", ".join(r.cell.name for r in self._running)
        results = self.store.results()
        left = remaining_seconds(
            [cell for cell in self._waiting() if cell.key not in results],
            results.values(),
            self.jobs,
            [(run.cell, time.monotonic() - run.started) for run in self._running],
        )
        return f"{names}{'' if left is None else f'; about {clock(left)} to go'}"


def _has_fixed_batch(settings: Mapping[str, Any]) -> bool:
    """Whether a run's global batch is one on any number of ranks; a preset divides its own among them."""
    preset = "preset" in settings and "per_device_train_batch_size" not in settings
    return preset or "global_batch_size" in settings


def counts(store: Store, cells: Sequence[Cell]) -> Mapping[str, int]:
    """How many cells there are of each status."""
    results = store.results()
    found = Counter(store.status(cell, results).value for cell in cells)
    return {status.value: found[status.value] for status in Status}
