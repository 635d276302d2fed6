"""What a classifier answers on the clean, adversarial and perturbed dev sets: item by item, and along training."""

from __future__ import annotations

import json
import logging
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState

from rose_ds.data import TaskData, assign_families, perturb, tokenize
from rose_ds.engines.rng import RngState, replay
from rose_ds.experiments.metrics import write_whole
from rose_ds.experiments.settings import RunSettings
from rose_ds.training.records import may_be_lost

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.jsonl"
TRAJECTORY = "trajectory.jsonl"
#: Set -> the prefix of its figures in metrics.json.
SETS = {"clean": "glue", "adversarial": "advglue", "perturbed": "perturbed"}
#: Bins of equal width over the confidence (Guo et al., ICML 2017).
ECE_BINS = 15

_Array = np.ndarray[Any, np.dtype[Any]]


def answers(logits: _Array) -> _Array:
    """Of logits (..., classes) the ids (...) of the likeliest class; -1, which is right for no item, where one of an
    item's is not finite.
    """
    return np.where(np.isfinite(logits).all(axis=-1), logits.argmax(axis=-1), -1)


def expected_calibration_error(logits: _Array, labels: _Array) -> float:
    """Mean |accuracy - confidence| over ECE_BINS bins of the confidence, weighted by their counts; a fraction.

    Args:
        logits: (items, classes), finite.
        labels: (items,) ids.
    """
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    confidence = shifted.max(axis=1) / shifted.sum(axis=1)
    hit = answers(logits) == labels
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = [abs(hit[bins == b].sum() - confidence[bins == b].sum()) for b in np.unique(bins)]
    return float(sum(gaps) / len(labels))


@dataclass(frozen=True)
class Predictions:
    """A classifier's answers on one set, in the set's order."""

    idx: list[int]
    """The rows' ``idx``."""
    labels: _Array
    """(items,) ids."""
    logits: _Array
    """(items, classes), fp32."""

    @property
    def hit(self) -> _Array:
        """(items,) whether each is right."""
        return np.asarray(answers(self.logits) == self.labels)

    def scores(self) -> dict[str, float | None]:
        """Accuracy and calibration, fractions. Logits that are not finite are a wrong answer, and nobody can say how
        sure it is: there is no calibration then.
        """
        sound = np.isfinite(self.logits).all()
        ece = expected_calibration_error(self.logits, self.labels) if sound else None
        return {"accuracy": float(self.hit.mean()), "ece": ece}

    def record(self, name: str) -> dict[str, Any]:
        """As PREDICTIONS has it, a line a set; logits to four decimals."""
        return {
            "set": name,
            "idx": self.idx,
            "label": self.labels.tolist(),
            "prediction": answers(self.logits).tolist(),
            "logits": np.round(self.logits.astype(np.float64), 4).tolist(),
        }


class Evaluator:
    """The dev sets of one task, tokenized once and sorted by length, so that a batch holds little padding."""

    def __init__(self, data: TaskData, tokenizer: Any, run: RunSettings, order: Sequence[int]) -> None:
        self.run, self.task, self.labels = run, data.spec.name, data.spec.labels
        self._ids = np.asarray(order)
        """The model's id of each of the task's labels; what is kept is in the task's order."""
        sets = {"clean": data.validation, "adversarial": data.adversarial}
        if data.validation is not None:
            sets["perturbed"] = perturb(data.validation, data.spec.fields, seed=run.perturb_seed)
        self._idx = {name: list(rows["idx"]) for name, rows in sets.items() if rows is not None}
        self._order: dict[str, _Array] = {}
        self.rows: dict[str, Any] = {}
        """Set -> what a Trainer evaluates on."""
        read: dict[str, list[list[int]]] = {}
        for name in self._idx:
            tokens = tokenize(sets[name], data.spec, tokenizer, run.max_length, order)
            read[name] = list(tokens["input_ids"])
            self._order[name] = np.argsort([len(ids) for ids in tokens["input_ids"]], kind="stable")
            self.rows[name] = tokens.select(self._order[name])
        self._labels = {name: self._in_task_order(rows["labels"]) for name, rows in self.rows.items()}
        same = sum(map(operator.eq, read.get("clean", []), read.get("perturbed", [])))
        if same:
            logger.warning(
                "%d of %d perturbed texts are to the model what they were: they were changed beyond --max_length %d, "
                "or in what its tokenizer evens out",
                same,
                len(read["clean"]),
                run.max_length,
            )
        self._latest: Any = None
        self._at_step: tuple[int, dict[str, Predictions]] | None = None

    def _in_task_order(self, labels: Any) -> _Array:
        """The task's ids of the model's."""
        return np.asarray(np.argsort(self._ids)[np.asarray(labels)])

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """A Trainer's ``compute_metrics``; keeps the answers themselves."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        labels = self._in_task_order(prediction.label_ids)
        self._latest = np.asarray(logits, dtype=np.float32)[:, self._ids], labels
        if odd := int((~np.isfinite(self._latest[0]).all(axis=1)).sum()):
            logger.warning("logits of %d items of %d are not finite: they count as wrong", odd, len(labels))
        scores = Predictions([], self._latest[1], self._latest[0]).scores()
        # a metric_for_best_model has to be there
        return {name: math.nan if value is None else value for name, value in scores.items()}

    def measure(self, trainer: Any, *, clean_is_latest: bool = False) -> dict[str, Predictions]:
        """Answers on every set. Every rank calls it. Training goes on with the random numbers that it would have had.

        Args:
            clean_is_latest: the Trainer has just evaluated the clean set, with this object's ``compute_metrics``.

        Raises:
            RuntimeError: the Trainer's labels are not the rows', so that its answers would be other rows' answers.
        """
        found = {}
        with replay(RngState.now()):  # a DataLoader draws a seed
            for name, rows in self.rows.items():
                if not (clean_is_latest and name == "clean"):
                    trainer.predict(rows)
                back = np.argsort(self._order[name])
                logits, labels = self._latest
                if not np.array_equal(labels, self._labels[name]):
                    raise RuntimeError(
                        f"{type(trainer).__name__} evaluated the {name} set in another order, or other rows of it: its "
                        "evaluation must go through the rows in turn (get_eval_dataloader, _get_eval_sampler)"
                    )
                found[name] = Predictions(self._idx[name], labels[back], logits[back])
        return found

    def final(self, trainer: Any) -> dict[str, Predictions]:
        """Answers of the trained model; those of the last step's evaluation, if the model is still that step's."""
        step = trainer.state.global_step
        if self._at_step is not None and self._at_step[0] == step and not trainer.args.load_best_model_at_end:
            return self._at_step[1]
        return self.measure(trainer)

    def remember(self, step: int, found: dict[str, Predictions]) -> None:
        """Keep the answers after a step."""
        self._at_step = step, found

    def figures(self, found: Mapping[str, Predictions]) -> dict[str, Any]:
        """By metrics.json's names."""
        figures: dict[str, Any] = {}
        for name, predictions in found.items():
            figures |= {f"{SETS[name]}_{score}": value for score, value in predictions.scores().items()}
        if "perturbed" in found:
            hit = found["perturbed"].hit
            families = np.array(assign_families(len(hit), self.run.perturb_seed))
            figures["perturbed_by_family"] = {str(f): float(hit[families == f].mean()) for f in np.unique(families)}
        return figures


class TrajectoryCallback(TrainerCallback):
    """At each evaluation measures the other sets too, and adds a line to TRAJECTORY: step, accuracies, calibration.

    A run begins with the lines up to the checkpoint that it goes on from, and with none where it goes on from none.
    """

    def __init__(self, trainer: Any, evaluator: Evaluator, folder: Path) -> None:
        self.trainer, self.evaluator, self.path = trainer, evaluator, folder / TRAJECTORY

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take out the lines of another run of the folder, and of steps that come again."""
        if state.is_world_process_zero and self.path.is_file():
            with may_be_lost(self.path):
                step = state.global_step
                write_lines(self.path, [old for old in sound_lines(self.path) if step and old["step"] <= step])

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the clean set's evaluation."""
        self._add(state, self.evaluator.measure(self.trainer, clean_is_latest=True))

    def _add(self, state: TrainerState, found: dict[str, Predictions]) -> None:
        """A line, and the answers for the run's end."""
        self.evaluator.remember(state.global_step, found)
        if state.is_world_process_zero:
            line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
            for name, predictions in found.items():
                line |= {name if s == "accuracy" else f"{name}_{s}": v for s, v in predictions.scores().items()}
            with may_be_lost(self.path):
                earlier = [old for old in sound_lines(self.path) if old["step"] < state.global_step]
                write_lines(self.path, [*earlier, line])


def read_trajectory(folder: Path) -> list[dict[str, Any]]:
    """The lines of TRAJECTORY, by step; none where a run was not evaluated on its way.

    Raises:
        ValueError: a line is not one; names file and line.
    """
    path, lines = folder / TRAJECTORY, []
    if not path.is_file():
        return []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(_line(text))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: not a line of a trajectory ({error})") from error
    return lines


def _line(text: str) -> dict[str, Any]:
    line = json.loads(text)
    return {**line, "step": int(line["step"])}


def sound_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Those of a file that a machine's failure may have damaged: training goes on without the others."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            yield _line(text)
        except (ValueError, TypeError, KeyError):
            logger.warning("%s: passed over a line that is not one of a trajectory: %.80s", path, text)


def write_predictions(folder: Path, found: Mapping[str, Predictions]) -> None:
    """Write PREDICTIONS, whole or not at all."""
    write_lines(folder / PREDICTIONS, [predictions.record(name) for name, predictions in found.items()])


def write_lines(path: Path, records: Sequence[Any]) -> None:
    """JSON lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records))
