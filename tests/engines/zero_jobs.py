"""What a rank of a ZeRO test runs: cases of ``tiny`` under DeepSpeed."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
from reference import Run, train
from spawn import run_each
from tiny import HYPER, Case, Tiny, make_model, parameter_groups


@dataclass(frozen=True)
class Job:
    """A case and the DeepSpeed settings it runs under."""

    case: Case
    stage: int
    zero: dict[str, Any] = field(default_factory=dict)
    """More keys of zero_optimization."""
    config: dict[str, Any] = field(default_factory=dict)
    """More keys of the DeepSpeed config."""
    name: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (f"zero{self.stage}", str(self.case), self.name)))


def ds_config(job: Job, world: int, **rose: Any) -> dict[str, Any]:
    """A DeepSpeed config whose buckets are far smaller than the model, and that keeps no parameter whole."""
    case, hyper = job.case, HYPER[0]
    adam = {"lr": hyper.lr, "betas": list(hyper.betas), "eps": hyper.eps, "weight_decay": hyper.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": case.batch // world // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "optimizer": {"type": "RoseAdamW", "params": {**adam, **case.rose, **rose}},
        "zero_optimization": {
            "stage": job.stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 300,
            "stage3_prefetch_bucket_size": 300,
            **job.zero,
        },
        **job.config,
    }


def fp16(**options: Any) -> dict[str, Any]:
    """A DeepSpeed config with a dynamic loss scale that an overflow halves at once."""
    return {"fp16": {"enabled": True, "initial_scale_power": 12, "hysteresis": 1, **options}}


def believe_in_fp16() -> None:
    """DeepSpeed asks whether the CPU has fast fp16; torch computes in it anyhow."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def start(job: Job, world: int, model: Tiny | None = None, **rose: Any) -> tuple[Any, Any]:
    """The DeepSpeed engine and its Stepper; ``rose`` are settings over the case's."""
    import deepspeed

    import rose_ds

    quiet()
    model = (model or make_model(job.case)).to(tiny.DEVICE)
    groups: Any = parameter_groups(job.case, model, named=False) if job.case.two_groups else model.parameters()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config(job, world, **rose))
    return engine, rose_ds.prepare(engine, objective=job.case.objective)


def quiet() -> None:
    """Only errors from DeepSpeed."""
    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def run(job: Job, rank: int, world: int) -> Run:
    """One job on one rank."""
    engine, stepper = start(job, world)
    try:
        return train(stepper, engine, job.case, rank, world)
    finally:
        engine.destroy()


def run_all(rank: int, world: int, jobs: list[Job]) -> dict[str, Run | str]:
    """Every job: see ``run_each``."""
    return run_each(rank, jobs, lambda job: run(job, rank, world))


def runs_of(results: list[dict[str, Run | str]], job: Job) -> list[Run]:
    """Each rank's run of a job; fails where one raised, or an earlier job did."""
    found = [result.get(str(job)) for result in results]
    errors = [run for run in found if isinstance(run, str)]
    if errors or None in found:
        earlier = [run for result in results for run in result.values() if isinstance(run, str)]
        raise AssertionError("\n".join(errors) or "not run: an earlier job failed\n" + "\n".join(earlier))
    return [run for run in found if isinstance(run, Run)]


def check_ranks_agree(runs: list[Run]) -> None:
    """Everything that is global is the same bits on every rank."""
    for other in runs[1:]:
        assert other.reports == runs[0].reports
        assert all(torch.equal(p, other.parameters[name]) for name, p in runs[0].parameters.items())
        assert torch.equal(other.stream, runs[0].stream)
