"""Settings of a grid that fall behind are given up early: optuna's asynchronous successive halving (Li et al., MLSys
2020), over a sweep's runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rose_ds.experiments.cell_key import settings_key
from rose_ds.experiments.cells import Cell
from rose_ds.experiments.evaluation import TRAJECTORY, sound_lines

JOURNAL = "halving.journal"
_MODEL = ("model", "preset")


class Halving:
    """Compares the settings that a method tries on a task under one seed, by clean accuracy along training.

    At a run's 1st, FACTOR-th, FACTOR^2-th ... evaluation it goes on if it is among the best 1/FACTOR of those that have
    come so far, in any process that shares the journal; the first to come always does.

    Args:
        journal: optuna's file, made if it is not there.
        cells: of the sweep.

    Raises:
        ValueError: there is nothing to compare, or no optuna.
    """

    def __init__(self, journal: Path, cells: Sequence[Cell], factor: int) -> None:
        if factor < 2:
            raise ValueError(f"halving={factor} must be at least 2")
        if max(Counter(_group(cell) for cell in cells).values(), default=0) < 2:
            raise ValueError(
                "halving chooses among the settings of a grid, and every method has one alone: give --grid"
            )
        if any(cell.settings.get("eval_strategy", "steps") in ("no", False) for cell in cells):
            raise ValueError("halving looks at evaluations along training: eval_strategy must not be no")
        try:
            import optuna
        except ImportError as error:
            raise ValueError("halving needs optuna: pip install 'rose_ds[sweep]'") from error
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        self.pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
        self._seen: dict[str, int] = {}
        """Cell's key -> when its trajectory was last changed."""

    def is_behind(self, cell: Cell, run: Path) -> bool:
        """Whether to give a cell up, after the evaluations in its run's folder."""
        path = run / TRAJECTORY
        changed = path.stat().st_mtime_ns if path.is_file() else 0
        if self._seen.get(cell.key, 0) == changed:
            return False
        self._seen[cell.key] = changed
        from optuna.trial import TrialState

        study, trial = self._trial(cell)
        known = self.storage.get_trial(trial._trial_id)
        if known.state is TrialState.PRUNED:  # decided before, by a sweep that was killed
            return True
        steps = cell.settings.get("max_steps", -1)
        end = steps if steps > 0 else float("inf")  # -1 is Trainer's word for epochs
        for evaluation, line in enumerate(sound_lines(path), start=1):
            if "clean" not in line or evaluation in known.intermediate_values or line["step"] >= end:
                continue  # at its end there is nothing left to save
            trial.report(line["clean"], evaluation)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                return True
        return False

    def _trial(self, cell: Cell) -> tuple[Any, Any]:
        """Optuna's study and trial of a cell; a run that goes on has the one that it began with."""
        import optuna

        study = optuna.create_study(
            storage=self.storage,
            study_name=_group(cell),
            direction="maximize",
            pruner=self.pruner,
            sampler=optuna.samplers.RandomSampler(seed=0),  # suggests nothing
            load_if_exists=True,
        )
        for known in study.get_trials(deepcopy=False):
            if known.user_attrs.get("cell") == cell.key:
                return study, optuna.trial.Trial(study, known._trial_id)
        trial = study.ask()
        trial.set_user_attr("cell", cell.key)
        return study, trial


def _group(cell: Cell) -> str:
    """Of cells that differ in what the grid varies alone, the model excepted."""
    alike = {name: value for name, value in cell.portable.items() if name not in cell.varied or name in _MODEL}
    return f"{cell.task} {cell.method} seed {cell.seed} {settings_key(alike)}"
