"""What tests/gpu runs, in this process or on ranks; every function is told the device, and runs on a CPU too."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import tiny
import torch
import torch.distributed as dist
import torch_jobs
import zero_jobs
from reference import Run, train
from spawn import run_ranks
from tiny import Case, GlobalDropout, Tiny, make_model, micro_batch, parameter_groups
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rose_ds import RoseAdamW, prepare

# --- ranks ---


def on_ranks(device: torch.device, world: int, worker: Callable[..., Any], *arguments: Any, **env: str) -> list[Any]:
    """``worker(rank, world, *arguments)`` on ``world`` processes with a device each: NCCL, or gloo in a rehearsal."""
    cuda = device.type == "cuda"
    if cuda:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        env |= {"CUDA_VISIBLE_DEVICES": visible, "DS_ACCELERATOR": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with mock.patch.dict(os.environ, env):  # as they read it before they are told
        return run_ranks(
            _on_rank, world, cuda, worker, arguments, timeout=400, env=env, process_group=False, fresh=True
        )


def _on_rank(rank: int, world: int, cuda: bool, worker: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    warnings.filterwarnings("ignore")
    if cuda:
        torch.cuda.set_device(rank)
        tiny.use(torch.device("cuda", rank))
    return worker(rank, world, *arguments)


def engines(rank: int, world: int, engine: str, cases: list[Case]) -> list[Run]:
    """Each case on one engine."""
    if engine == "plain":
        return [plain(case) for case in cases]
    if engine.startswith("zero"):
        zero: dict[str, Any] = {"overlap_comm": "overlap" in engine}
        if "offload" in engine:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        from rose_ds.engines.zero.stage3 import Stage3Adapter

        with mock.patch.object(Stage3Adapter, "risk_sums", pinned_like_the_gradients(Stage3Adapter.risk_sums)):
            return [zero_jobs.run(zero_jobs.Job(case, int(engine[4]), zero), rank, world) for case in cases]
    dist.init_process_group("nccl" if tiny.DEVICE.type == "cuda" else "gloo")
    return [torch_jobs.run(torch_jobs.Job(case, engine), rank, world) for case in cases]


def pinned_like_the_gradients(risk_sums: Any) -> Any:
    """The sums of stage 3's KL gradients, of which an offloaded one comes as DeepSpeed's task gradients do."""

    def checked(adapter: Any) -> list[Tensor]:
        sums: list[Tensor] = risk_sums(adapter)
        offloaded = bool(adapter.ds_optimizer.offload_optimizer)
        assert all(total.is_pinned() == (offloaded and tiny.DEVICE.type == "cuda") for total in sums)
        return sums

    return checked


def plain(case: Case) -> Run:
    """One process, no wrapper."""
    model = make_model(case).to(tiny.DEVICE)
    return train(stepper_of(model, case), model, case)


def taus(rank: int, world: int, case: Case) -> list[Any]:
    """The reports of a run whose kernels add in one order."""
    torch.use_deterministic_algorithms(True)
    return plain(case).reports


# --- this process ---


def ordinary(case: Case, device: torch.device) -> Tiny:
    """The case's model with torch's dropout, whose random numbers are the device's."""
    model = make_model(case)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GlobalDropout):
                setattr(module, name, nn.Dropout(child.p))
    return model.to(device)


def stepper_of(model: nn.Module, case: Case) -> Any:
    optimizer = RoseAdamW(parameter_groups(case, model, named=True), **case.rose)
    return prepare(model, optimizer, accumulation_steps=case.accumulation, max_grad_norm=case.clip)


def batch_of(case: Case, step: int, device: torch.device, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first ``count`` rows of a step's batch."""
    ids, labels = micro_batch(case, step, 0)
    return ids[:count].to(device), labels[:count].to(device)


def backward(stepper: Any, forward: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Any:
    ids, labels = batch
    return stepper.backward(lambda: forward(ids), lambda logits: cross_entropy(logits.float(), labels))


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def counting_waits(device: torch.device) -> Iterator[list[str]]:
    """Collects one message for each operation that has the host wait for the device."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            found += [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]


def peak_of(device: torch.device, work: Callable[[], Any]) -> int:
    """Bytes that ``work`` had allocated at its worst, over what there was before; 0 on CPUs, where nobody counts."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def seconds_of(device: torch.device, work: Callable[[], Any]) -> float:
    settle(device)
    start = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - start
