"""What a rank of the checkpoint tests does: runs that are interrupted, resumed elsewhere, or given damaged files."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import DROPOUT_SEED, Case, Tiny, make_model, micro_batch, rows
from torch import Tensor
from zero_jobs import Job, ds_config, start

SAVED, LAST = 2, 4
"""Optimizer steps before the interruption, and in all."""

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}}
"""The scale doubles every two steps."""
FP32_SUMS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}}
SCHEDULER = {
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-3, "warmup_max_lr": 3e-2, "warmup_num_steps": 9}}
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

#: masked from the fourth step on: the first one after the interruption still is not
GROUPS = Case(two_groups=True, accumulation=2, mask_warmup_steps=3, steps=LAST)
TENSORS = Case("first", "tensor", steps=LAST)
SECOND = Case("second", two_groups=True, steps=LAST)
PLAIN = Case(granularity="tensor", two_groups=True, steps=LAST)
RESUMED = [
    *(Job(GROUPS, stage, {}, SCHEDULER, "scheduler") for stage in (0, 1, 2, 3)),
    *(Job(TENSORS, stage) for stage in (0, 1, 2, 3)),
    *(Job(SECOND, stage, {}, BF16, "bf16") for stage in (0, 2, 3)),
    Job(SECOND, 1, {}, BF16 | FP32_SUMS, "BF16_Optimizer"),
    *(Job(SECOND, stage, {}, FP16, "fp16") for stage in (0, 1, 3)),
    *(Job(PLAIN, stage, OFFLOAD, {}, "offload") for stage in (1, 2, 3)),
    Job(PLAIN, 3, {"sub_group_size": 150}, {}, "sub_groups"),
]

#: Saved on two ranks, loaded on others and at others. Embeddings do not train, and there is a buffer.
RESHARDED = Case(two_groups=True, frozen=True, steps=LAST)
SOURCES = {
    "1": Job(RESHARDED, 1),
    "2": Job(RESHARDED, 2),
    "3": Job(RESHARDED, 3, {"sub_group_size": 150}),
    "1-bf16": Job(RESHARDED, 1, {}, BF16 | FP32_SUMS | SCHEDULER),
    "2-bf16": Job(RESHARDED, 2, {}, BF16 | SCHEDULER),
    "3-bf16": Job(RESHARDED, 3, {}, BF16 | SCHEDULER),
    "2-fp16": Job(RESHARDED, 2, {}, FP16),
    "3-fp16": Job(RESHARDED, 3, {}, FP16),
}
#: (saved by, loaded by)
SAME_STAGE = [(name, name) for name in SOURCES]
OTHER_STAGE = [
    ("1", "3"),
    ("3", "2"),
    ("2", "1"),
    ("3", "1"),
    ("1-bf16", "2-bf16"),
    ("3-bf16", "1-bf16"),
    ("2-fp16", "3-fp16"),
    ("3-fp16", "2-fp16"),
]


# --- training, interrupted ---


@dataclass
class Trained:
    """What a run left, on one rank."""

    reports: list[Any]
    state: dict[str, Any]
    stream: Tensor
    """Random numbers drawn at the end."""


def build(job: Job, world: int, *, other_weights: bool = False) -> tuple[Any, Any]:
    """An engine with a buffer, and its stepper; with other weights, as in a process that is about to resume."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # not fast on a CPU, but right
    return start(job, world, model_of(job.case, other_weights=other_weights))


def model_of(case: Case, *, other_weights: bool = False) -> Tiny:
    model = make_model(case)
    model.register_buffer("seen", torch.arange(3.0) + 1)
    if other_weights:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(0.1)
    return model


def steps(stepper: Any, engine: Any, case: Case, first: int, last: int) -> list[Any]:
    """Optimizer steps ``first`` to ``last``, on this rank's rows; random numbers go on from where they are."""
    rank, world, reports = dist.get_rank(), dist.get_world_size(), []
    for t in range(first, last + 1):
        for micro in range(case.accumulation):
            reports.append(one_micro_batch(stepper, engine, case, t, micro, rank, world))
    return [report for report in reports if report is not None]


def one_micro_batch(stepper: Any, engine: Any, case: Case, t: int, micro: int, rank: int, world: int) -> Any:
    backward(stepper, engine, case, t, micro, rank, world)
    return stepper.step()


def backward(stepper: Any, engine: Any, case: Case, t: int, micro: int, rank: int, world: int) -> None:
    ids, labels = micro_batch(case, t, micro)
    share = len(ids) // world
    mine = slice(rank * share, (rank + 1) * share)
    with rows(len(ids), mine):
        stepper.backward(lambda: engine(ids[mine]), lambda logits: F.cross_entropy(logits.float(), labels[mine]))


def state_of(stepper: Any, engine: Any) -> dict[str, Any]:
    """Everything that a checkpoint must hold, whole, through DeepSpeed's own links to it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found: dict[str, Any] = {f"{name}/fp32": p for name, p in stepper.gather_parameters().items()}
    base, z = stepper.optimizer, engine.optimizer
    masters = {}
    for low, high in zip(getattr(z, "fp16_groups", []), getattr(z, "fp32_groups", []), strict=False):
        masters.update(zip(low, high, strict=True))
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            if engine.zero_optimization():
                found[f"{name}/{key}"] = safe_get_full_optimizer_state(param, key)
            else:
                found[f"{name}/{key}"] = base.init_state(masters.get(param, param))[key]
    found |= {f"buffers/{name}": buffer for name, buffer in engine.module.named_buffers()}
    for i, group in enumerate(base.param_groups):
        found |= {f"group{i}/{key}": group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    if engine.fp16_enabled():
        scaler = vars(getattr(z, "loss_scaler", None) or z.loss_scale_config)
        found["loss scale"] = {key: value for key, value in scaler.items() if isinstance(value, (int, float))}
    found["step"] = {int(state["step"]) for state in base.state.values()}
    found["engine"] = (engine.global_steps, engine.global_samples, engine.skipped_steps)
    found["scheduler"] = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in found.items()}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Entries that are not the same bits."""
    assert set(a) == set(b)
    same = {key: torch.equal(v, b[key]) if isinstance(v, Tensor) else v == b[key] for key, v in a.items()}
    return [key for key, equal in same.items() if not equal]


def trained(stepper: Any, engine: Any, reports: list[Any]) -> Trained:
    stream = torch.rand(4)
    return Trained(reports, state_of(stepper, engine), stream)


def interrupt(job: Job, world: int, folder: Path) -> tuple[dict[str, Any], Any, Any]:
    """Train to SAVED and save, with the place in the data and the random numbers in the client state."""
    engine, stepper = build(job, world)
    torch.manual_seed(DROPOUT_SEED)
    steps(stepper, engine, job.case, 1, SAVED)
    engine.save_checkpoint(str(folder), client_state={"next": SAVED + 1, "rng": torch.get_rng_state()})
    return state_of(stepper, engine), engine, stepper


def resume(stepper: Any, engine: Any, job: Job, folder: Path) -> tuple[dict[str, Any], Trained]:
    """Load, and train to LAST: the state right after the load, and the end."""
    path, client = engine.load_checkpoint(str(folder))
    assert path is not None
    loaded = state_of(stepper, engine)
    torch.set_rng_state(client["rng"])
    reports = steps(stepper, engine, job.case, client["next"], LAST)
    return loaded, trained(stepper, engine, reports)


# --- the ranks' work, one function for each spawn ---

Probe = tuple[str, Callable[..., Any], tuple[Any, ...]]


def in_turn(rank: int, world: int, probes: list[Probe]) -> dict[str, Any]:
    """Results by name, up to the first probe that raises: its traceback, and the ranks cannot go on together."""
    results: dict[str, Any] = {}
    for name, probe, args in probes:
        begun = time.monotonic()
        try:
            results[name] = probe(rank, world, *args)
        except Exception:
            results[name] = f"rank {rank}, {name}:\n{traceback.format_exc()}"
            break
        results[f"{name} seconds"] = time.monotonic() - begun
    return results


def interrupted(rank: int, world: int, job: Job, folder: Path) -> dict[str, Any]:
    """The run up to the checkpoint, what zero_to_fp32 makes of that, how the run goes on if nothing happens, and how it
    goes on once more after the same engine went back to the checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    saved, engine, stepper = interrupt(job, world, folder)
    whole: dict[str, Tensor] | str = {}
    if rank == 0 and engine.zero_optimization():
        try:
            whole = {name: t.clone() for name, t in get_fp32_state_dict_from_zero_checkpoint(str(folder)).items()}
        except ValueError as error:
            whole = str(error)
    dist.barrier()
    on = trained(stepper, engine, steps(stepper, engine, job.case, SAVED + 1, LAST))
    back = resume(stepper, engine, job, folder)
    engine.destroy()
    return {"saved": saved, "on": on, "back": back, "zero_to_fp32": whole}


def straight(rank: int, world: int, job: Job) -> Trained:
    """The same run, never saved."""
    engine, stepper = build(job, world)
    torch.manual_seed(DROPOUT_SEED)
    reports = steps(stepper, engine, job.case, 1, LAST)
    result = trained(stepper, engine, reports[SAVED:])
    engine.destroy()
    return result


def resumed(rank: int, world: int, job: Job, folder: Path) -> tuple[dict[str, Any], Trained]:
    engine, stepper = build(job, world, other_weights=True)
    result = resume(stepper, engine, job, folder)
    check_links(stepper, engine)
    engine.destroy()
    return result


def check_links(stepper: Any, engine: Any) -> None:
    """What the masks are cut from, what the optimizer updates and what DeepSpeed shows are the same memory."""
    base, adapter = stepper.optimizer, stepper.engine.adapter
    for piece, param in zip(adapter.slices, adapter.params, strict=True):
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is not None:
            for key in ("exp_avg", "exp_avg_sq"):
                mine = piece.view(base.state[piece.param][key])
                assert mine.data_ptr() == mapping.optim_fragment[key].data_ptr(), (piece.name, key)
            assert piece.view(piece.param).data_ptr() == mapping.hp_fragment.data_ptr(), piece.name


def elsewhere(rank: int, world: int, job: Job, folder: Path) -> tuple[dict[str, Any], Trained, list[str]]:
    """Resumed on another number of ranks or at another stage; and what the load says."""
    engine, stepper = build(job, world, other_weights=True)
    with heard() as messages:
        loaded, end = resume(stepper, engine, job, folder)
    check_links(stepper, engine)
    engine.destroy()
    return loaded, end, messages


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """This rank's warnings of rose_ds."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    listener, log = Listener(logging.WARNING), logging.getLogger("rose_ds")
    log.addHandler(listener)
    try:
        yield messages
    finally:
        log.removeHandler(listener)


# --- conversions ---


def conversions(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """A conversion is made once, replaced when its source was, and leaves nothing behind. On one rank."""
    job = Job(RESHARDED, 2)
    saved, engine, stepper = interrupt(job, world, folder)
    tag = (folder / "latest").read_text()

    def load() -> dict[str, Any]:
        other, other_stepper = build(replace(job, stage=3), world, other_weights=True)
        other.load_checkpoint(str(folder))
        found = state_of(other_stepper, other)
        other.destroy()
        return found

    first = load()
    inodes = [(folder / f"{tag}_universal").stat().st_ino]
    again = load()
    inodes.append((folder / f"{tag}_universal").stat().st_ino)
    steps(stepper, engine, job.case, SAVED + 1, SAVED + 1)
    engine.save_checkpoint(str(folder), tag=tag)
    later = state_of(stepper, engine)
    engine.destroy()
    return {
        "first": differences(saved, first),
        "again": differences(saved, again),
        "same folder": inodes[0] == inodes[1],
        "after another save": differences(later, load()),
        "there": sorted(path.name for path in folder.iterdir()),
    }


def explicit(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """checkpoint.load_universal: true, with what DeepSpeed's own command made, and with nothing made yet."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    found = {}
    for stage in (2, 3):
        there = folder / str(stage)
        job = Job(RESHARDED, stage, {}, {"checkpoint": {"load_universal": True}})
        saved, engine, _ = interrupt(job, world, there)
        engine.destroy()
        for made in (False, True):
            if made:
                shutil.rmtree(there / f"global_step{SAVED}_universal")
                ds_to_universal.main(
                    Namespace(
                        input_folder=str(there / f"global_step{SAVED}"),
                        output_folder=str(there / "by-command"),
                        num_extract_workers=1,
                        num_merge_workers=1,
                        keep_temp_folder=False,
                        strict=True,
                        inject_missing_state=True,
                    )
                )
            for to in (2, 3):
                engine, stepper = build(replace(job, stage=to), world, other_weights=True)
                path, _ = engine.load_checkpoint(str(there))
                key = f"{stage} to {to}, {'made by command' if made else 'not made'}"
                found[key] = (Path(path).parent.name, differences(saved, state_of(stepper, engine)))
                engine.destroy()
    job = Job(RESHARDED, 0, {}, {"checkpoint": {"load_universal": True}})
    saved, engine, _ = interrupt(job, world, folder / "0")
    engine.destroy()
    engine, stepper = build(job, world, other_weights=True)
    path, _ = engine.load_checkpoint(str(folder / "0"))
    found["0"] = (Path(path).parent.name, differences(saved, state_of(stepper, engine)))
    engine.destroy()
    return found


def pretrained(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """A Hugging Face model from a ZeRO-3 checkpoint: what save_pretrained writes, beside what training held."""
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import BertConfig, BertForSequenceClassification

    import rose_ds

    shape = BertConfig(vocab_size=31, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=17)
    model = BertForSequenceClassification(shape)
    config = ds_config(Job(Case(), 3), world)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    stepper = rose_ds.prepare(engine)
    ids, labels = micro_batch(Case(), 1, 0)
    stepper.backward(lambda: engine(ids).logits, lambda logits: F.cross_entropy(logits, labels % 2))
    stepper.step()
    engine.save_checkpoint(str(folder / "ckpt"))
    held = stepper.gather_parameters()
    engine.destroy()
    state = get_fp32_state_dict_from_zero_checkpoint(str(folder / "ckpt"))
    BertForSequenceClassification(shape).save_pretrained(folder / "out", state_dict=state)
    again = dict(BertForSequenceClassification.from_pretrained(folder / "out").named_parameters())
    return {"same": [torch.equal(value, again[name]) for name, value in held.items()], "names": set(held) == set(again)}
