"""The registry of methods: what each minimises, which parameters it updates, and the range that a sweep searches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rose_ds.config import RoseConfig
from rose_ds.objectives import OBJECTIVES

#: The alternatives of one dimension of a search, each a setting (or several that change together) by its flag.
Axis = tuple[Mapping[str, Any], ...]


def _axis(flag: str, values: Iterable[Any]) -> Axis:
    return tuple({flag: value} for value in values)


_FRACTIONS = tuple(i / 10 for i in range(1, 10))
#: ROSE's paper searches ten learning rates and nine thresholds for each method and task.
_LEARNING_RATE = _axis("learning_rate", (float(f"{i}e-5") for i in range(1, 11)))
_KEEP_FIRST = _axis("keep_first", _FRACTIONS)
_KEEP_SECOND = _axis("keep_second", _FRACTIONS)
_KEEP_BOTH: Axis = tuple({"keep_first": c, "keep_second": c} for c in _FRACTIONS)  # the authors have one for both


@dataclass(frozen=True)
class Method:
    """One method. It has no training arguments of its own: methods are compared with all else equal, and what was
    published for one is a preset (``rose_ds.experiments.presets``).
    """

    name: str
    text: str
    """What it is, in a few words."""
    rose: Mapping[str, Any] = field(default_factory=lambda: {"strategy": "none"})
    """The fields of RoseConfig that make the method; the others are free."""
    objective: str = "task"
    """A name in ``rose_ds.objectives.OBJECTIVES``; its constants are free."""
    search: tuple[Axis, ...] = (_LEARNING_RATE,)
    """A sweep's dimensions; their product is the grid."""


def _mask(name: str, text: str, search: tuple[Axis, ...], **rose: Any) -> Method:
    return Method(name, text, rose, search=(_LEARNING_RATE, *search))


def _objective(name: str, text: str, search: Axis) -> Method:
    return Method(name, text, objective=name, search=(_LEARNING_RATE, search))


#: By name; beside these there are their combinations, see ``method_named``.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("vanilla", "AdamW"),
        # published searches: R-Drop's alpha, SMART's lambda, Child-Tuning_D's p are those of their papers; FreeLB's
        # step spans what its scripts use
        _objective("r-drop", "two dropout passes must agree", _axis("rdrop_alpha", (0.1, 0.5, 1.0))),
        _mask(
            "child-tuning",
            "Child-Tuning_D: only the weights of largest Fisher information",
            (_axis("keep_first", (0.1, 0.2, 0.3)),),
            strategy="child-tuning",
        ),
        _objective("smart", "smooth in a ball round the embeddings", _axis("smart_weight", (1.0, 3.0, 5.0))),
        _objective("freelb", "adversarial embeddings", _axis("freelb_step_size", (5e-2, 1e-1, 2e-1))),
        _mask("rose-first", "small KL gradient between two dropout passes (Eq. 2)", (_KEEP_FIRST,), strategy="first"),
        _mask("rose-second", "gradient agrees with momentum (Eq. 4)", (_KEEP_SECOND,), strategy="second"),
        _mask("rose-ensemble", "both, as a soft mask (Eq. 5)", (_KEEP_BOTH,), strategy="ensemble"),
        _mask("random-mask", "control: random parameters, each step anew", (_KEEP_FIRST,), strategy="random"),
        _mask(
            "inverted-mask",
            "control: rose-first that keeps the largest KL gradients",
            (_KEEP_FIRST,),
            strategy="first",
            keep_largest=True,
        ),
        _mask("gradient-mask", "largest gradients, each step anew", (_KEEP_FIRST,), strategy="gradient-mask"),
        _mask("gallop", "largest |gradient / weight|, found once", (_KEEP_FIRST,), strategy="gallop"),
        _mask("cautious", "gradient and update have one sign", (), strategy="cautious"),
    )
}
#: What stands before and after the + of a combination.
COMBINABLE_OBJECTIVES = tuple(m.name for m in METHODS.values() if m.objective != "task")
COMBINABLE_MASKS = tuple(m.name for m in METHODS.values() if m.rose["strategy"] != "none")


def method_named(name: str) -> Method:
    """The method called ``name``, or the combination OBJECTIVE+MASK, e.g. r-drop+rose-first.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if name in METHODS:
        return METHODS[name]
    first, _, second = name.partition("+")
    if first not in COMBINABLE_OBJECTIVES or second not in COMBINABLE_MASKS:
        raise ValueError(
            f"method={name!r} is not one of {list(METHODS)}, nor OBJECTIVE+MASK with OBJECTIVE of "
            f"{list(COMBINABLE_OBJECTIVES)} and MASK of {list(COMBINABLE_MASKS)}"
        )
    objective, mask = METHODS[first], METHODS[second]
    search = objective.search + tuple(axis for axis in mask.search if axis not in objective.search)
    return Method(name, f"{objective.text}; {mask.text}", mask.rose, objective.objective, search)


def method_with(objective: str, rose: RoseConfig) -> Method:
    """The method that minimises ``objective`` under the masks of ``rose``.

    Raises:
        ValueError: no such objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is not one of {list(OBJECTIVES)}")
    if rose.strategy == "none":
        return METHODS["vanilla" if objective == "task" else objective]
    masks = [METHODS[name] for name in COMBINABLE_MASKS if METHODS[name].rose["strategy"] == rose.strategy]
    # keep_largest makes a method of its own of one strategy; of the others it is a setting
    exact = [m for m in masks if m.rose.get("keep_largest", False) == rose.keep_largest]
    mask = (exact or masks)[0]
    return mask if objective == "task" else method_named(f"{objective}+{mask.name}")
