"""How many collectives a step takes under FSDP2 and ZeRO-3: of passes, and of thresholds."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch_jobs
import zero_jobs
from reference import train
from spawn import run_ranks
from tiny import Case
from torch.utils._python_dispatch import TorchDispatchMode

CASES = {
    "none": Case("none"),
    "second": Case("second"),
    "first": Case("first"),
    "ensemble": Case("ensemble"),
    "accumulated": Case("ensemble", accumulation=2),
    "fast": Case("first", first_order="fast"),
    "halves": Case("ensemble", first_order="halves", accumulation=2),
}
DEPTHS = (2, 4)
WARM = 4
"""Steps after which DeepSpeed's traces have settled."""


class Collectives(TorchDispatchMode):
    """Counts them by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.counts[func.__name__.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def count(rank: int, world: int, engine: str) -> dict[tuple[str, int], Counter[str]]:
    """Of one step, by case and depth."""
    warnings.filterwarnings("ignore")
    found = {}
    for name, case in CASES.items():
        for depth in DEPTHS:
            case = replace(case, depth=depth, steps=WARM)
            if engine == "zero3":
                model, stepper = zero_jobs.start(zero_jobs.Job(case, 3), world)
            else:
                model, stepper = torch_jobs.start(torch_jobs.Job(case, engine))
            train(stepper, model, case, rank, world)
            stepper.gather_parameters = dict
            with Collectives() as mode:
                train(stepper, model, replace(case, steps=1), rank, world, first_step=WARM + 1)
            found[name, depth] = mode.counts
    return found


@pytest.fixture(scope="module")
def counted(extensions: object) -> Any:
    """By engine, on 2 ranks, which count alike."""

    def of(engine: str) -> Any:
        one, other = run_ranks(count, 2, engine, process_group=engine != "zero3")
        assert one == other
        return one

    return torch_jobs.once(of)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_thresholds(counted: Any, engine: str, depth: int) -> None:
    """Three exchanges, whatever the model's depth, the number of micro-batches, and that of rankings."""
    found = {name: counted(engine)[name, depth]["allgather"] for name in CASES}
    base = found.pop("none")
    assert set(found) == {"second", "first", "fast", "ensemble", "accumulated", "halves"}
    assert {n - base for n in found.values()} == {3}


@pytest.mark.parametrize("depth", DEPTHS)
def test_fsdp2(counted: Any, depth: int) -> None:
    """A model of d blocks and a root, which stays gathered from a forward pass to its backward pass: d + 1 are gathered
    in the one and d in the other, and d + 1 are reduced. An exact risk takes two forward and three backward passes, a
    fast one two of both, and one of halves no more than the micro-batches have."""
    found = {name: counted("fsdp2")[name, depth] for name in CASES}
    units = depth + 1
    assert {name: c["allgather_base"] for name, c in found.items()} == {
        "none": 2 * units - 1,
        "second": 2 * units - 1,
        "first": 5 * units - 2,
        "ensemble": 5 * units - 2,
        "accumulated": 2 * (5 * units - 2),
        "fast": 4 * units - 2,
        "halves": 2 * (2 * units - 1),
    }
    assert {name: c["reduce_scatter_base"] for name, c in found.items()} == {
        "none": units,
        "second": units,
        "first": 3 * units,
        "ensemble": 3 * units,
        "accumulated": 6 * units,
        "fast": 2 * units,
        "halves": 2 * units,
    }


@pytest.mark.parametrize("depth", DEPTHS)
def test_zero3(counted: Any, depth: int) -> None:
    """An exact risk takes three forward and three backward passes, but gathers the model hardly more than twice: all
    go along one trace, which says what is used again soon. Ranks compare traces by broadcasts
    where one was thrown away."""
    found = {name: counted("zero3")[name, depth] for name in CASES}
    assert all(c["broadcast"] == 0 for c in found.values())
    plain, ensemble = found["none"], found["ensemble"]
    assert found["second"]["allgather_base"] == plain["allgather_base"]
    assert found["first"]["allgather_base"] == ensemble["allgather_base"] < 2.5 * plain["allgather_base"]
    assert found["accumulated"]["allgather_base"] < 2 * ensemble["allgather_base"]
    scattered = {name: c["reduce_scatter_base"] / plain["reduce_scatter_base"] for name, c in found.items()}
    assert scattered == {"none": 1, "second": 1, "first": 3, "ensemble": 3, "accumulated": 6, "fast": 2, "halves": 2}
    assert found["halves"]["allgather_base"] <= 2 * plain["allgather_base"]
