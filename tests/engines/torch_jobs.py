"""What a rank of a DDP or FSDP test runs: cases of ``tiny`` under one of torch's wrappers."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reference import Run, check_parity, near_tau, reference, train
from spawn import run_each
from tiny import Block, Case, Tiny, make_model, parameter_groups
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from zero_jobs import check_ranks_agree, runs_of

import rose_ds
from rose_ds.core.mask import keep_count
from rose_ds.training import masking

STRATEGIES = (
    *itertools.product(("first", "second", "ensemble"), ("element", "tensor"), (1, 2)),
    *itertools.product(("none",), ("element",), (1, 2)),
)
#: strategy x granularity x accumulation
MATRIX = [Case(*settings) for settings in STRATEGIES]
#: what else can change a step
EXTRAS = [
    Case(accumulation=2, two_groups=True),
    Case(checkpointing=True),
    Case("first", accumulation=2, checkpointing=True),
    Case(accumulation=2, frozen=True),
    Case(mask_warmup_steps=2),
    Case(clip=0.0, granularity="tensor"),
]
#: enough to tell whether a setting of the wrapper changes anything
FEW = [Case(accumulation=2), Case("first", "tensor"), Case("none")]


@dataclass(frozen=True)
class Job:
    """A case and the wrapper it runs under, by its key in WRAPPERS."""

    case: Case
    how: str

    def __str__(self) -> str:
        extra = [] if self.case.clip else ["no-clipping"]
        extra += [] if self.case.hidden == Case().hidden else [f"hidden{self.case.hidden}"]
        return "-".join([self.how, str(self.case), *extra])


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, bucket_cap_mb=0.001, **options)


def fsdp1(model: nn.Module, strategy: ShardingStrategy, use_orig_params: bool, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        sharding_strategy=strategy,
        use_orig_params=use_orig_params,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=tiny.DEVICE,
        **options,
    )


def hybrid1(model: nn.Module, strategy: ShardingStrategy, use_orig_params: bool) -> nn.Module:
    return fsdp1(model, strategy, use_orig_params, device_mesh=mesh_2d("replicate", "shard"))


def fsdp2(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.layer:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def hsdp(model: nn.Module) -> nn.Module:
    return fsdp2(model, mesh=mesh_2d("replicate", "shard"))


def mesh_2d(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=names)


def tensor_parallel(model: nn.Module) -> nn.Module:
    """Blocks' matrices split over tp and again over dp, the rest over dp alone. Activations between are whole, so that
    the dropout masks are the twin's."""
    mesh = mesh_2d("dp", "tp")
    for block in model.layer:
        plan = {
            "up": ColwiseParallel(output_layouts=Replicate()),
            "down": RowwiseParallel(input_layouts=Replicate()),
        }
        parallelize_module(block, mesh["tp"], plan)
    return fsdp2(model, mesh=mesh["dp"])


def checkpointed(model: nn.Module, **options: Any) -> nn.Module:
    """Blocks inside torch's checkpoint_wrapper, as accelerate does it, but with the random numbers kept."""
    for i in range(len(model.layer)):
        model.layer[i] = checkpoint_wrapper(model.layer[i], preserve_rng_state=True)
    return fsdp2(model, **options)


def columns(model: nn.Module) -> nn.Module:
    """Matrices split by columns, the rest by rows."""
    return fsdp2(model, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 and p.shape[1] % 2 == 0 else Shard(0))


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
ALL_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)


def fsdp1_bf16(model: nn.Module, reduce_dtype: torch.dtype, use_orig_params: bool) -> nn.Module:
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    return fsdp1(model, ShardingStrategy.FULL_SHARD, use_orig_params, mixed_precision=precision)


#: how a model is wrapped, the type that prepare() then gets, and the name of the engine that it must choose
WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], type, str]] = {
    "ddp": (ddp, DistributedDataParallel, "ddp"),
    "ddp-bucket-views": (partial(ddp, gradient_as_bucket_view=True), DistributedDataParallel, "ddp"),
    "ddp-find-unused": (partial(ddp, find_unused_parameters=True), DistributedDataParallel, "ddp"),
    "fsdp2": (fsdp2, FSDPModule, "fsdp2"),
    "fsdp2-kept": (partial(fsdp2, reshard_after_forward=False), FSDPModule, "fsdp2"),
    "fsdp2-columns": (columns, FSDPModule, "fsdp2"),
    "fsdp2-bf16": (partial(fsdp2, mp_policy=BF16), FSDPModule, "fsdp2"),
    "fsdp2-all-bf16": (partial(fsdp2, mp_policy=ALL_BF16), FSDPModule, "fsdp2"),
    "fsdp2-checkpoint-wrapper": (checkpointed, FSDPModule, "fsdp2"),
    "fsdp2-offload": (partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False)), FSDPModule, "fsdp2"),
    **{
        f"fsdp1-{name}-{'orig' if orig else 'flat'}": (
            partial(fsdp1_bf16, reduce_dtype=reduce_dtype, use_orig_params=orig),
            FullyShardedDataParallel,
            "fsdp1",
        )
        for name, reduce_dtype in (("bf16", torch.float32), ("all-bf16", torch.bfloat16))
        for orig in (True, False)
    },
    "hsdp": (hsdp, FSDPModule, "fsdp2"),
    "tp": (tensor_parallel, FSDPModule, "fsdp2"),
    **{
        f"fsdp1-{strategy.name}-{'orig' if orig else 'flat'}": (
            partial(hybrid1 if "HYBRID" in strategy.name else fsdp1, strategy=strategy, use_orig_params=orig),
            FullyShardedDataParallel,
            "fsdp1",
        )
        for strategy in ShardingStrategy
        for orig in (True, False)
    },
}


def start(job: Job, model: Tiny | None = None, **rose: Any) -> tuple[nn.Module, Any]:
    """The wrapped model and its Stepper; ``rose`` are settings over the case's."""
    warnings.filterwarnings("ignore")
    wrap, kind, engine = WRAPPERS[job.how]
    wrapped = wrap((model or make_model(job.case)).to(tiny.DEVICE))
    optimizer = rose_ds.RoseAdamW(parameter_groups(job.case, wrapped, named=True), **{**job.case.rose, **rose})
    stepper = rose_ds.prepare(
        wrapped,
        optimizer,
        objective=job.case.objective,
        accumulation_steps=job.case.accumulation,
        max_grad_norm=job.case.clip or None,
    )
    assert isinstance(wrapped, kind) and stepper.engine.name == engine
    return wrapped, stepper


def run(job: Job, rank: int, world: int) -> Run:
    """One job on one rank; the ranks of a tensor parallel group get the same rows."""
    model, stepper = start(job)
    return train(stepper, model, job.case, *((rank // 2, world // 2) if job.how == "tp" else (rank, world)))


def run_all(rank: int, world: int, jobs: Sequence[Job]) -> dict[str, Run | str]:
    """Every job: see ``run_each``."""
    return run_each(rank, jobs, lambda job: run(job, rank, world))


def check(results: list[dict[str, Run | str]], job: Job, log: list[str]) -> None:
    """See ``check_runs``."""
    check_runs(runs_of(results, job), job.case, str(job), log)


def check_runs(runs: list[Run], case: Case, name: str, log: list[str]) -> None:
    """The ranks agree, and with the twin: reports, losses, parameters, and what is left of the random numbers."""
    twin = reference(case)
    check_ranks_agree(runs)
    close = near_tau(twin)[0]
    for report, want in zip(runs[0].reports, twin.steps, strict=True):
        assert math.isclose(report.grad_norm, want.grad_norm, rel_tol=1e-4) and not report.skipped
        for order in ("first", "second"):
            tau, kept = getattr(report, f"tau_{order}"), getattr(report, f"kept_{order}")
            assert (tau is None) == (kept is None) == (order not in want.tau)
            if tau is not None:
                assert math.isclose(tau, want.tau[order], rel_tol=1e-3, abs_tol=1e-6)
                assert abs(kept - want.kept[order]) <= close
                if order in want.scores:  # not where the mask is an earlier step's
                    assert report.eligible == sum(score.numel() for score in want.scores[order].values())
    mean = sum(sum(run.losses) for run in runs) / len(runs) / case.accumulation
    assert math.isclose(mean, sum(step.loss for step in twin.steps), rel_tol=1e-4)
    found = check_parity(runs[0].parameters, twin)
    log.append(f"{name} x{len(runs)}: {found}")
    assert torch.equal(runs[0].stream, twin.stream), "the RNG stream after the last step"


def once(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``make``, run once for each argument; a failure is remembered too, or every test would wait for it again."""
    outcomes: dict[Any, Any] = {}

    def of(world: Any) -> Any:
        if world not in outcomes:
            try:
                outcomes[world] = make(world)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # pytest-timeout's too
                outcomes[world] = error
        if isinstance(outcomes[world], BaseException):
            raise outcomes[world].with_traceback(None)  # or every test would add its frames to the first one's
        return outcomes[world]

    return of


# --- thresholds against risks brought together ---


def risks_of(rank: int, world: int, how: str) -> tuple[list[Any], list[dict[str, list[Tensor]]]]:
    """A run's reports and, for each step, the risks that this rank adds to those of the others."""
    seen: list[dict[str, list[Tensor]]] = []
    job = Job(Case(steps=3), how)
    model, stepper = start(job)
    mine = [i for i, piece in enumerate(stepper.engine.slices) if counts_here(how, piece.param, rank)]
    select = masking.select

    def spy(selectors: Any, granularity: str, inputs: Any, *kernels: Any, **how: Any) -> Any:
        ratios = [
            torch.where(m == 0, 0.0, ((1 - beta1) * g.abs() / m.abs() - 1).abs())
            for g, m, beta1 in zip(inputs.grads, inputs.exp_avgs, inputs.beta1s, strict=True)
        ]
        seen.append({"first": [inputs.risk_grads[i].abs() for i in mine], "second": [ratios[i] for i in mine]})
        return select(selectors, granularity, inputs, *kernels, **how)

    masking.select = spy
    try:
        reports = train(stepper, model, job.case, *((rank // 2, world // 2) if how == "tp" else (rank, world))).reports
    finally:
        masking.select = select
    return reports, seen


def risks_of_all(rank: int, world: int, hows: Sequence[str]) -> dict[str, Any]:
    return {how: risks_of(rank, world, how) for how in hows}


def counts_here(how: str, param: Tensor, rank: int) -> bool:
    """Whether this rank's part of a parameter is one of a kind: among replicas, the first rank's is taken."""
    if how.startswith("ddp") or "NO_SHARD" in how:
        return rank == 0
    if "HYBRID" in how:
        return rank < 2
    if not isinstance(param, DTensor):
        return True
    mesh, coordinate = param.device_mesh, param.device_mesh.get_coordinate()
    replicated = [c for c, p in zip(coordinate, param.placements, strict=True) if p.is_replicate()]
    if how == "tp" and mesh.ndim == 1:  # the ranks of a tensor parallel group all hold it
        replicated.append(rank % 2)
    return not any(replicated)


def check_taus(results: list[dict[str, Any]], how: str) -> None:
    """Invariant 2: the same bits on every rank, and torch.kthvalue's over all risks."""
    reports = results[0][how][0]
    assert all(result[how][0] == reports for result in results[1:])
    for i, report in enumerate(reports):
        for order, fraction in (("first", 0.6), ("second", 0.45)):
            every = torch.cat([risk for result in results for risk in result[how][1][i][order]])
            assert every.numel() == report.eligible, "each eligible element once: no padding, no replicas"
            tau = every.kthvalue(keep_count(fraction, every.numel())).values.item()
            assert getattr(report, f"tau_{order}") == tau
            assert getattr(report, f"kept_{order}") == int((every <= tau).sum())


# --- the KL gradient leaks nowhere ---


def leak(rank: int, world: int, how: str) -> bool:
    """Whether keeping everything by KL gradient is bit for bit AdamW: parameters and moments."""
    states = []
    for strategy in ("first", "none"):
        case = Case(strategy, "tensor", 2, keep_first=1.0, steps=3)
        model, stepper = start(Job(case, how))

        def forward(ids: Tensor, model: nn.Module = model, burn: bool = strategy == "none") -> Tensor:
            logits = model(ids)
            if burn:  # the random numbers of the other strategy's second pass
                with torch.no_grad():
                    model(ids)
            return logits

        parameters = train(stepper, forward, case, rank, world).parameters
        moments = [state[name] for state in stepper.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        states.append((parameters, [m.to_local() if isinstance(m, DTensor) else m for m in moments]))
    (kept, moments), (plain, plain_moments) = states
    return all(torch.equal(kept[name], plain[name]) for name in plain) and all(
        torch.equal(a, b) for a, b in zip(moments, plain_moments, strict=True)
    )


# --- refusals ---


def message_of(make: Callable[[], Any]) -> str:
    """Type and text of what ``make`` raises; empty if it does not."""
    try:
        make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def prepare(model: nn.Module, named: Any = None, **options: Any) -> Any:
    """prepare() with a RoseAdamW over the model's parameters."""
    return rose_ds.prepare(model, rose_ds.RoseAdamW(named or model.named_parameters()), **options)


def one_step(stepper: Any, model: nn.Module, case: Case) -> None:
    """Train one step on the whole batch."""
    train(stepper, model, case)


# --- checkpoints ---

#: every rank trains on the whole batch, so that a run does not depend on the world size by a single rounding
BEFORE = Case(accumulation=2, steps=3)


def continuation(stepper: Any, model: nn.Module, case: Case) -> list[Any]:
    """Losses and thresholds of the steps after the checkpoint."""
    run = train(stepper, model, case, first_step=BEFORE.steps + 1)
    return [run.losses, [(r.step, r.tau_first, r.tau_second, r.kept_first, r.kept_second) for r in run.reports]]


def save(rank: int, world: int, how: str, case: Case, folder: str) -> list[Any]:
    """Train, write a checkpoint, go on."""
    model, stepper = start(Job(case, how))
    train(stepper, model, case)
    state = _state(model, stepper, how)
    assert {key.rsplit(".", 1)[-1] for key in _leaves(state["optimizer"]["state"])} == {"step", "exp_avg", "exp_avg_sq"}
    if how.startswith("fsdp1"):
        if rank == 0:
            torch.save(state, f"{folder}/full.pt")
    else:
        dcp.save(state, checkpoint_id=folder)
    return continuation(stepper, model, case)


def load(rank: int, world: int, how: str, case: Case, folder: str) -> list[Any]:
    """Read it into another model on however many ranks, and go on."""
    other = make_model(case)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    model, stepper = start(Job(case, how), other)
    if how.startswith("fsdp1"):
        state = torch.load(f"{folder}/full.pt", weights_only=False)
    else:
        state = _state(model, stepper, how)
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        stepper.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_options(how),
    )
    return continuation(stepper, model, case)


def _state(model: nn.Module, stepper: Any, how: str) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, stepper.optimizer, options=_options(how))
    return {"model": model_state, "optimizer": optimizer_state}


def _options(how: str) -> StateDictOptions:
    # torch's own distributed format does not load with FSDP1 on several ranks, whatever the optimizer
    return StateDictOptions(full_state_dict=how.startswith("fsdp1"))


def _leaves(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}")]
