"""What is minimised: one short file a method, each a program over the forward passes of a micro-batch.

An objective is a frozen dataclass of its constants, called with a ``MicroBatch`` (``rose_ds.objectives.base``); it
knows no engine, no rank and no mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rose_ds.objectives.base import Objective
from rose_ds.objectives.freelb import FreeLB
from rose_ds.objectives.rdrop import RDrop
from rose_ds.objectives.smart import Smart
from rose_ds.objectives.task import Task

__all__ = ["OBJECTIVES", "FreeLB", "Objective", "RDrop", "Smart", "Task", "resolve"]

#: By the names that users write.
OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (Task, RDrop, Smart, FreeLB)}


def resolve(objective: str | Mapping[str, Any] | Objective) -> Objective:
    """An objective from its name, from ``{"name": "r-drop", "alpha": 0.5}``, or as it is.

    Raises:
        ValueError/TypeError: no such objective, or it has no such constant; lists those there are.
    """
    if isinstance(objective, Objective):
        return objective
    constants: Mapping[str, Any] = {}
    if isinstance(objective, Mapping):
        constants = {key: value for key, value in objective.items() if key != "name"}
        objective = objective.get("name", "task")
    if not isinstance(objective, str):
        raise TypeError(f"objective={objective!r} must be a name, an object with a name, or a rose_ds.objectives class")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is not one of {list(OBJECTIVES)}")
    known = [f.name for f in fields(OBJECTIVES[objective])]
    unknown = sorted(set(constants) - set(known), key=str)
    if unknown:
        raise ValueError(f"unknown constant(s) {unknown} of objective {objective!r}; known: {known}")
    return OBJECTIVES[objective](**constants)
