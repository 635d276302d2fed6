"""Invariants 2, 3 and 4, and non-finite gradients, on every ZeRO stage with two ranks (three for thresholds)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from spawn import run_ranks
from tiny import Case
from torch import Tensor
from zero_jobs import Job, check_ranks_agree
from zero_probes import Probe, broken_step, communication, isolation, probe_all, thresholds

from rose_ds.core.mask import keep_count

STAGES = (0, 1, 2, 3)
METHODS = ("all_gather", "all_reduce")
GRANULARITIES = ("element", "tensor")
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

THRESHOLDS = list(itertools.product(STAGES, GRANULARITIES, METHODS))
SIZES = (19, 152)
KINDS = ("loss", "kl")

#: masks that keep everything: first must be AdamW
ALL_KEPT = {"keep_first": 1.0, "keep_second": 1.0, "accumulation": 2}
ISOLATION = [
    *(Job(Case("first", **ALL_KEPT), stage) for stage in STAGES),
    Job(Case("first", two_groups=True, **ALL_KEPT), 2),
    *(Job(Case("first", **ALL_KEPT), stage, OFFLOAD, name="offload") for stage in (2, 3)),
    *(Job(Case("first", **ALL_KEPT), stage, {}, BF16, "bf16") for stage in (1, 3)),
]


def threshold_case(granularity: str) -> Case:
    return Case("ensemble", granularity, 2, two_groups=True, steps=2)


def threshold_probes() -> list[Probe]:
    return [
        (f"{stage}-{granularity}-{method}", thresholds, (Job(threshold_case(granularity), stage), method))
        for stage, granularity, method in THRESHOLDS
    ]


@pytest.fixture(scope="session")
def three(extensions: object) -> list[dict[str, Any]]:
    """Thresholds on three ranks."""
    return run_ranks(probe_all, 3, threshold_probes())


@pytest.fixture(scope="session")
def two(extensions: object, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Communication, isolation and NaNs on two ranks."""
    folder = tmp_path_factory.mktemp("checkpoints")
    probes: list[Probe] = []
    for stage, granularity, hidden in itertools.product(STAGES, GRANULARITIES, SIZES):
        job = Job(Case("ensemble", granularity, hidden=hidden, steps=2), stage)
        probes.append((f"sent-{stage}-{granularity}-{hidden}", communication, (job,)))
    for job in ISOLATION:
        none = Job(Case(**{**vars(job.case), "strategy": "none"}), job.stage, job.zero, job.config, job.name)
        for which in (job, none):
            probes.append((f"isolation-{which}", isolation, (which, folder / str(which))))
    probes += [
        (f"broken-{stage}-{granularity}-{what}", broken_step, (Job(Case(granularity=granularity), stage), what))
        for stage, granularity, what in itertools.product(STAGES, GRANULARITIES, KINDS)
    ]
    return run_ranks(probe_all, 2, probes)


# --- invariant 2 ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_tau_is_kthvalue(three: Any, stage: int, method: str) -> None:
    """tau is the same bits on every rank and torch.kthvalue of the gathered risks; padding and absent slices do not
    count; kept counts are what lies at or below it, rank by rank."""
    runs, risks = zip(*(rank[f"{stage}-element-{method}"] for rank in three), strict=True)
    check_ranks_agree(list(runs))
    holders = risks[:1] if stage == 0 else risks  # stage 0 is replicated: every rank holds everything
    case = threshold_case("element")
    for t, report in enumerate(runs[0].reports):
        for order, fraction in (("first", case.keep_first), ("second", case.keep_second)):
            parts = [rank[t][order] for rank in holders]
            every = torch.cat(parts)
            assert every.numel() == report.eligible
            tau = every.kthvalue(keep_count(fraction, every.numel())).values
            assert getattr(report, f"tau_{order}") == tau.item()
            counts = [int((part <= tau).sum()) for part in parts]
            assert getattr(report, f"kept_{order}") == sum(counts)
            per_rank = getattr(report, f"kept_{order}_per_rank")
            assert per_rank is None if method == "all_reduce" and stage else per_rank == tuple(counts)


@pytest.mark.parametrize("stage", STAGES)
def test_tau_of_tensors(three: Any, stage: int) -> None:
    """The norm of a sharded tensor is that of the whole tensor: first-order tau from the gathered pieces."""
    runs, risks = zip(*(rank[f"{stage}-tensor-all_gather"] for rank in three), strict=True)
    check_ranks_agree(list(runs))
    holders = risks[:1] if stage == 0 else risks
    for t, report in enumerate(runs[0].reports):
        squares = torch.zeros(report.eligible, dtype=torch.float64)
        for rank in holders:
            squares.index_add_(0, rank[t]["index"], rank[t]["first"].double().square())
        norms = squares.sqrt().float()
        tau = norms.kthvalue(keep_count(threshold_case("tensor").keep_first, report.eligible)).values.item()
        assert math.isclose(report.tau_first, tau, rel_tol=2e-7)
        assert report.kept_first_per_rank is None


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("stage", STAGES)
def test_exchange_methods_agree(three: Any, stage: int, granularity: str) -> None:
    """all_gather and all_reduce of the histograms give the same bits: thresholds and parameters."""
    gathered, reduced = (three[0][f"{stage}-{granularity}-{method}"][0] for method in METHODS)
    for a, b in zip(gathered.reports, reduced.reports, strict=True):
        assert (a.tau_first, a.tau_second, a.kept_first, a.kept_second) == (
            b.tau_first,
            b.tau_second,
            b.kept_first,
            b.kept_second,
        )
    assert all(torch.equal(p, reduced.parameters[name]) for name, p in gathered.parameters.items())


# --- invariant 3 ---


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("stage", STAGES)
def test_communication_does_not_grow(two: Any, stage: int, granularity: str) -> None:
    """A threshold's collectives and bytes are the same for a model eight times as wide, and bounded."""
    for rank in two:
        small, large = (rank[f"sent-{stage}-{granularity}-{hidden}"] for hidden in SIZES)
        assert small == large
        assert bool(small) == (stage > 0), "stage 0 is replicated and needs no exchange"
        steps, orders = 2, 2
        assert len(small) <= 3 * steps * orders
        assert sum(count for _, count in small) <= steps * orders * 8 * (2**12 + 2 * 2**10)


# --- invariant 4 ---


def assert_same(a: dict[str, Any], b: dict[str, Any], exact: str | None, rtol: float) -> None:
    """Two flattened checkpoints: same entries, same values. ``exact``: paths with this in them to the last bit."""
    assert set(a) == set(b)
    for path, value in a.items():
        other = b[path]
        if isinstance(value, Tensor) and value.is_floating_point():
            if exact is not None and exact in path:
                assert torch.equal(value, other), path
            assert torch.allclose(value.float(), other.float(), rtol=rtol, atol=rtol), path
        elif isinstance(value, Tensor):
            assert torch.equal(value, other), path
        else:
            assert value == pytest.approx(other, rel=1e-5), path


@pytest.mark.parametrize("job", ISOLATION, ids=str)
def test_kl_gradient_stays_apart(two: Any, job: Job) -> None:
    """With a mask of ones, "first" is "none" on the same data: the KL gradient reaches no moment, weight, clip norm or
    checkpoint. The first step's moments are the same bits; later ones follow the weights' rounding."""
    none = Job(Case(**{**vars(job.case), "strategy": "none"}), job.stage, job.zero, job.config, job.name)
    a, b = two[0][f"isolation-{job}"], two[0][f"isolation-{none}"]
    half = bool(job.config)
    assert_same(a["one"], b["one"], exact="exp_avg", rtol=1e-2 if half else 1e-6)
    assert_same(a["three"], b["three"], exact=None, rtol=2e-2 if half else 2e-6)
    assert a["reports"][0].grad_norm == b["reports"][0].grad_norm
    for ours, plain in zip(a["reports"], b["reports"], strict=True):
        assert ours.kept_first == ours.eligible
        assert ours.grad_norm == pytest.approx(plain.grad_norm, rel=2e-2 if half else 1e-5)


@pytest.mark.parametrize("job", ISOLATION, ids=str)
def test_state_names(two: Any, job: Job) -> None:
    """A checkpoint holds AdamW's three states and nothing of ROSE's."""
    checkpoint = two[0][f"isolation-{job}"]["three"]
    parents = {path.rpartition("/")[0] for path in checkpoint if path.endswith("/exp_avg")}
    assert parents, "the checkpoint has optimizer states"
    for parent in parents:
        names = {path[len(parent) + 1 :] for path in checkpoint if path.startswith(parent + "/")}
        assert names == {"exp_avg", "exp_avg_sq", "step"}


# --- gradients that are not finite ---


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("stage", STAGES)
def test_nan_on_one_rank(two: Any, stage: int, granularity: str, what: str) -> None:
    """Both ranks skip the step, nothing changes, and training goes on."""
    results = [rank[f"broken-{stage}-{granularity}-{what}"] for rank in two]
    for result in results:
        assert [report.skipped for report in result["reports"]] == [False, True, False]
        assert [report.step for report in result["reports"]] == [1, 1, 2]
        one, broken, after = result["states"]
        for name, value in one.items():
            assert torch.equal(value, broken[name]), name
        assert all(torch.isfinite(value).all() for value in after.values())
        assert any(not torch.equal(after[name], broken[name]) for name in after)
        last = result["reports"][-1]
        assert last.tau_first is not None and math.isfinite(last.grad_norm)
