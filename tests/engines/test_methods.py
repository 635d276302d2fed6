"""Invariant 1 for every objective x mask x engine: the parameters of the single-process twin, whoever runs it."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch_jobs
import zero_jobs
from plain_jobs import build
from reference import Run, reference, train
from spawn import run_ranks
from tiny import Case
from torch_jobs import check_runs, once
from zero_jobs import believe_in_fp16, check_ranks_agree, fp16, runs_of

from rose_ds.objectives import FreeLB, Objective, RDrop, Smart, Task

#: Constants that make each term count in three steps of a tiny model.
OBJECTIVES: dict[str, Objective] = {
    "task": Task(),
    "r-drop": RDrop(alpha=1.7),
    "r-drop-sum": RDrop(alpha=0.3, kl_reduction="sum"),
    "smart": Smart(weight=2.0, steps=2, init_std=1e-2, step_size=0.5, radius=0.3),
    "smart-proximal": Smart(init_std=1e-2, radius=0.2, proximal=1.5, decay=0.7, early_decay=0.4, early_steps=1),
    "freelb": FreeLB(passes=3, step_size=0.3, init_mag=0.5, max_norm=0.4),
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {"strategy": "none"},
    "first": {"strategy": "first"},
    "first-tensor": {"strategy": "first", "granularity": "tensor"},
    "second": {"strategy": "second"},
    "second-tensor": {"strategy": "second", "granularity": "tensor"},
    "ensemble": {"strategy": "ensemble"},
    "ensemble-tensor": {"strategy": "ensemble", "granularity": "tensor"},
    "inverted": {"strategy": "first", "keep_first": 0.55, "keep_largest": True},
    "child-tuning": {"strategy": "child-tuning", "keep_first": 0.3},
    "random": {"strategy": "random"},
    "random-tensor": {"strategy": "random", "granularity": "tensor"},
    "gradient-mask": {"strategy": "gradient-mask"},
    "gallop": {"strategy": "gallop"},
    "cautious": {"strategy": "cautious"},
}


def case_of(objective: str, mask: str, accumulation: int = 2, **more: Any) -> Case:
    return Case(**{"steps": 3, **MASKS[mask], **more}, accumulation=accumulation, objective=OBJECTIVES[objective])


def key_of(case: Case) -> tuple[str, str]:
    objective = next(name for name, value in OBJECTIVES.items() if value == case.objective)
    alike = [
        [n for n, m in MASKS.items() if all(getattr(case, k) == m.get(k, getattr(Case(), k)) for k in names)]
        for names in (MASKED, MASKED[:2])
    ]
    return objective, alike[0][0] if alike[0] else f"{alike[1][0]}-inverted"


MASKED = ("strategy", "granularity", "keep_largest")

#: The sum of a divergence over a rank's rows depends on the number of ranks, by definition: compared on one alone.
SHARED = [name for name in OBJECTIVES if name != "r-drop-sum"]
#: Every objective with every mask, and a second micro-batch, where most mistakes show. The second step has momentum.
TABLE = [case_of(o, m, steps=2, depth=1) for o, m in itertools.product(SHARED, MASKS)]
#: Of engines that differ from the others in what they do with passes, and not in what masks do.
PASSES = [case for case in TABLE if key_of(case)[1] in ("none", "first", "second", "ensemble", "child-tuning")]
#: Each objective and each mask once more: where slices or passes differ from the table's engines in one thing.
FEW = [
    *(case_of(o, m, 1) for o, m in zip(SHARED, ("ensemble", "ensemble", "first", "second", "ensemble"), strict=True)),
    *(case_of("task", m, 1) for m in MASKS if m != "ensemble"),
]
LAYERS = [case_of(o, "ensemble", checkpointing=True) for o in SHARED]
GROUPS = [case_of(o, m, two_groups=True) for o, m in (("r-drop", "ensemble"), ("freelb", "second-tensor"))]

#: A risk that is found fast, or over several steps. Batches that every rank can halve.
RISKS = [
    case_of("task", "ensemble", first_order="fast"),
    case_of("task", "ensemble", first_order="fast", sampled=True, batch=24),
    case_of("task", "first-tensor", 1, first_order="fast", sampled=True, batch=24),
    case_of("smart-proximal", "ensemble", first_order="fast", sampled=True, batch=24),
    case_of("freelb", "first", 1, first_order="fast", sampled=True, batch=24, risk_ema=0.7),
    case_of("task", "ensemble", risk_ema=0.7),
    case_of("task", "first-tensor", risk_ema=0.7, steps=5, risk_every=2),
    case_of("freelb", "ensemble", 1, steps=5, risk_every=2, mask_warmup_steps=1, two_groups=True),
    case_of("task", "ensemble", keep_first="auto", keep_second="knee"),
    case_of("task", "ensemble-tensor", 1, keep_first="knee", keep_second="auto"),
    case_of("task", "inverted", 1, keep_first="auto"),
    case_of("task", "ensemble", keep_largest=True, keep_first=0.55),
    case_of("task", "second-tensor", keep_largest=True),
    case_of("task", "random", 1, mask_seed=7),
]
#: Risk from the two halves of a step, of one micro-batch or more each; where gradients are reduced in between.
HALVES = [
    case_of("task", "ensemble", first_order="halves"),
    case_of("task", "first-tensor", 3, first_order="halves", batch=18),
    case_of("freelb", "ensemble", 4, first_order="halves", batch=24, risk_ema=0.7, two_groups=True),
    case_of("smart-proximal", "first", first_order="halves", steps=5, risk_every=2),
]
HALVES_NO_GROUPS = [replace(case, two_groups=False) for case in HALVES]
RISKS_NO_GROUPS = [replace(case, two_groups=False) for case in RISKS]
#: engine -> (number of ranks, cases)
RUNS: dict[str, list[tuple[int, list[Case]]]] = {
    "ddp": [(2, TABLE + FEW + LAYERS + RISKS + HALVES), (3, FEW + RISKS[:4] + HALVES[:2])],
    "ddp-find-unused": [(2, FEW[:5])],
    "fsdp1-FULL_SHARD-orig": [(2, TABLE + FEW + LAYERS + RISKS_NO_GROUPS + HALVES_NO_GROUPS), (3, FEW)],
    "fsdp1-FULL_SHARD-flat": [(2, FEW + HALVES[:2])],
    "fsdp2": [(2, TABLE + FEW + LAYERS + GROUPS + RISKS + HALVES), (3, FEW + RISKS[:4] + HALVES[:2])],
    "fsdp2-kept": [(2, FEW[:5])],
    "fsdp2-columns": [(2, [replace(case, hidden=20) for case in FEW])],
    "hsdp": [(4, FEW + [replace(HALVES[0], batch=16)])],
    "zero0": [(2, PASSES + FEW + RISKS), (1, FEW[:5])],
    "zero1": [(2, PASSES + FEW + RISKS), (3, FEW)],
    "zero2": [
        (2, TABLE + FEW + LAYERS + GROUPS + RISKS + HALVES),
        (3, FEW + RISKS[:4] + HALVES[:2]),
        (1, FEW[:5] + HALVES[:1]),
    ],
    "zero3": [
        (2, TABLE + FEW + LAYERS + GROUPS + RISKS + HALVES),
        (3, FEW + RISKS[:4] + HALVES[:2]),
        (1, FEW[:5] + HALVES[:1]),
    ],
    "zero2-offload": [(2, FEW + RISKS[1:2] + HALVES)],
    "zero3-offload": [(2, FEW + RISKS[1:2] + HALVES)],
    "zero3-persistent": [(2, FEW[:5])],
}
ZERO: dict[str, dict[str, Any]] = {
    "offload": {"offload_optimizer": {"device": "cpu"}},
    "persistent": {"stage3_param_persistence_threshold": 10**6},
}
#: Passes in 16 bits, weights in fp32: near the fp32 run, and the same on every rank.
HALF = [case_of(o, m) for o, m in itertools.product(SHARED, ("none", "first-tensor"))]
HALF_REDUCED = [case_of("task", "first-tensor", first_order="halves")]
HALF += [case_of("r-drop", "second-tensor")]  # the task gradient is the aggregate less a share of the KL's
STAGES = ("zero0", "zero1", "zero2", "zero3")
HALF_ENGINES = {"bf16": ("fsdp2-bf16", "fsdp1-bf16-orig", *STAGES, "zero2-offload", "zero3-offload"), "fp16": STAGES}
PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": fp16()}


def job_of(engine: str, case: Case, precision: str) -> Any:
    if not engine.startswith("zero"):
        return torch_jobs.Job(case, engine)
    _, _, how = engine.partition("-")
    return zero_jobs.Job(case, int(engine[4]), ZERO.get(how, {}), PRECISIONS[precision], f"{how}{precision}")


class Entry(tuple[str, int, Case, str]):
    """A run of the table: engine, ranks, case, precision; its name is the test's id."""

    def __str__(self) -> str:
        engine, world, case, precision = self
        extra = ["checkpointing"] * case.checkpointing + ["groups"] * case.two_groups
        extra += [precision] * (precision != "fp32")
        return "-".join([f"{engine}-x{world}", *key_of(case), f"ga{case.accumulation}", *extra, *case.ranking])


ENTRIES = [Entry((e, w, case, "fp32")) for e, runs in RUNS.items() for w, cases in runs for case in cases]
ENTRIES += [Entry((e, 2, case, precision)) for precision, es in HALF_ENGINES.items() for e in es for case in HALF]
ENTRIES += [
    Entry((e, 2, case, precision))
    for precision, es in HALF_ENGINES.items()
    for e in es
    if e not in ("zero0", "zero1")
    for case in HALF_REDUCED
]


def run_engine(rank: int, world: int, jobs: list[Any]) -> Any:
    warnings.filterwarnings("ignore")
    believe_in_fp16()
    module = zero_jobs if isinstance(jobs[0], zero_jobs.Job) else torch_jobs
    return module.run_all(rank, world, jobs)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, extensions: object) -> Any:
    """The results of an engine's jobs on a number of ranks: one spawn for all that were selected."""
    wanted: dict[tuple[str, int], dict[str, Any]] = {}
    for item in request.session.items:
        entry = getattr(getattr(item, "callspec", None), "params", {}).get("entry")
        if isinstance(entry, Entry):
            engine, world, case, precision = entry
            job = job_of(engine, case, precision)
            wanted.setdefault((engine, world), {})[str(job)] = job

    @once
    def run(key: Any) -> Any:
        jobs = list(wanted[key].values())
        return run_ranks(run_engine, key[1], jobs, timeout=60 + 10 * len(jobs), process_group="zero" not in key[0])

    return run


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_table(entry: Entry, results: Any, parity_log: list[str]) -> None:
    """Parameters, thresholds, counts, norms, losses and what is left of the random numbers."""
    engine, world, case, precision = entry
    runs = runs_of(results((engine, world)), job_of(engine, case, precision))
    if precision == "fp32":
        check_runs(runs, case, str(entry), parity_log)
        return
    check_ranks_agree(runs)
    twin = reference(case)
    for report, step in zip(runs[0].reports, twin.steps, strict=True):
        # weights after a step of Adam hardly tell by how much its gradient was scaled or clipped
        assert not report.skipped and math.isclose(report.grad_norm, step.grad_norm, rel_tol=0.05)
        assert {order for order in ("first", "second") if getattr(report, f"tau_{order}") is not None} == set(step.tau)
    got, want = (
        torch.cat([found[name].flatten() for name in twin.parameters])
        for found in (runs[0].parameters, twin.parameters)
    )
    assert 1e-6 < (got - want).norm() / want.norm() < 0.012


@pytest.mark.fast
@pytest.mark.parametrize(
    "case",
    [case_of(o, m, ga) for o, m, ga in itertools.product(OBJECTIVES, MASKS, (1, 2))] + LAYERS + GROUPS + RISKS + HALVES,
    ids=str,
)
def test_plain(case: Case, parity_log: list[str]) -> None:
    """The same in this process, for which the twin is the oracle too."""
    model, stepper = build(case)
    run: Run = train(stepper, model, case)
    check_runs([run], case, f"plain-{case}", parity_log)
