"""What a rank of the checkpoint tests does with checkpoints that are damaged, that do not fit, or at a wrong moment."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoint_jobs import (
    BF16,
    LAST,
    RESHARDED,
    SAVED,
    SCHEDULER,
    SOURCES,
    backward,
    build,
    differences,
    heard,
    model_of,
    state_of,
    steps,
    trained,
)
from tiny import DROPOUT_SEED, Case, micro_batch, parameter_groups, rows
from torch_jobs import message_of
from zero_jobs import Job, ds_config

# --- damaged files ---


def truncate(path: Path) -> Path:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    return path


def remove(path: Path) -> Path:
    path.unlink()
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


TAG = f"global_step{SAVED}"
#: (stage of the checkpoint, what happens to it, the tag asked for); the message must name the file returned
DAMAGES: dict[str, tuple[int, Callable[[Path], Path], str | None]] = {
    "optimizer-states-of-1-gone": (2, lambda d: remove(d / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt"), None),
    "optimizer-states-of-0-gone": (2, lambda d: remove(d / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt"), None),
    "optimizer-states-truncated": (2, lambda d: truncate(d / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt"), None),
    "model-gone": (2, lambda d: remove(d / TAG / "mp_rank_00_model_states.pt"), None),
    "model-truncated": (2, lambda d: truncate(d / TAG / "mp_rank_00_model_states.pt"), None),
    "model-empty": (2, lambda d: write(d / TAG / "mp_rank_00_model_states.pt", ""), None),
    "latest-empty": (2, lambda d: write(d / "latest", ""), None),
    "latest-names-nothing": (2, lambda d: write(d / "latest", "global_step77"), None),
    "tag-not-there": (2, lambda d: d / "nowhere", "nowhere"),
    "universal-truncated": (
        2,
        lambda d: truncate(d / f"{TAG}_universal" / "zero" / "head.weight" / "exp_avg.pt"),
        f"{TAG}_universal",
    ),
    "stage-3-optimizer-gone": (3, lambda d: remove(d / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt"), None),
    "stage-3-model-truncated": (3, lambda d: truncate(d / TAG / "zero_pp_rank_1_mp_rank_00_model_states.pt"), None),
    "stage-3-model-gone": (3, lambda d: remove(d / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt"), None),
}


@dataclass
class Refusal:
    """A load that must fail: on one rank."""

    error: str
    seconds: float
    changed: list[str]
    """What of the engine's state is not what it was."""
    file: str = ""
    """What was damaged."""


def refused(stepper: Any, engine: Any, folder: Path, **arguments: Any) -> Refusal:
    """Try to load from ``folder``."""
    before, begun = state_of(stepper, engine), time.monotonic()
    error = message_of(lambda: engine.load_checkpoint(str(folder), **arguments))
    seconds = time.monotonic() - begun
    return Refusal(error, seconds, differences(before, state_of(stepper, engine)))


def damaged(rank: int, world: int, folder: Path, good: dict[str, Path]) -> dict[str, Any]:
    """Each damage to a copy of a good checkpoint, and at last the good one, all into one engine of each stage."""
    found: dict[str, Any] = {}
    for stage in (2, 3):
        engine, stepper = build(SOURCES[str(stage)], world, other_weights=True)
        for name, (of_stage, damage, tag) in DAMAGES.items():
            if of_stage == stage:
                copy, named = folder / name, [""]
                if rank == 0:
                    shutil.copytree(good[str(stage)], copy)
                    named = [str(damage(copy))]
                dist.broadcast_object_list(named)
                found[name] = replace(refused(stepper, engine, copy, tag=tag), file=named[0])
        engine.load_checkpoint(str(good[str(stage)]))
        found[f"good {stage}"] = state_of(stepper, engine)
        engine.destroy()
    return found


def failing(rank: int, world: int, folder: Path, good: dict[str, Path]) -> dict[str, Any]:
    """Faults that no look at the files foresees: rank 0 cannot convert, or takes longer than the process group waits;
    and one rank cannot read while DeepSpeed loads."""
    from deepspeed.checkpoint import ds_to_universal

    engine, stepper = build(Job(RESHARDED, 2), world, other_weights=True)
    copy, convert = folder / "fails", ds_to_universal.main
    if rank == 0:
        shutil.copytree(good["3"], copy)
        shutil.rmtree(copy / f"{TAG}_universal")
    dist.barrier()
    there = {path.name for path in copy.iterdir()}

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("No space left on device")

    def slowly(options: Any) -> None:
        time.sleep(16)
        convert(options)

    ds_to_universal.main = fail
    found: dict[str, Any] = {"conversion": refused(stepper, engine, copy)}
    found["left"] = sorted({path.name for path in copy.iterdir()} - there)
    node_local, engine.use_node_local_storage = engine.use_node_local_storage, lambda: True
    found["node local"] = refused(stepper, engine, copy)
    engine.use_node_local_storage = node_local
    ds_to_universal.main = slowly
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=12))
    engine.load_checkpoint(str(copy))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=90))
    found["slow"] = state_of(stepper, engine)
    ds_to_universal.main = convert
    if rank == 1:
        engine.checkpoint_engine.load = fail
    found["load"] = message_of(lambda: engine.load_checkpoint(str(good["2"])))
    engine.destroy()
    return found


# --- what does not fit ---


def other_include(case: Case) -> dict[str, Any]:
    adam = {"lr": 1e-2, "include": ["up.weight"], **case.rose}
    return {"optimizer": {"type": "RoseAdamW", "params": adam}}


def settings_changed(rank: int, world: int, good: Path) -> dict[str, Any]:
    """The same run under other settings of ROSE: warnings, on rank 0; and under the same: none."""
    found = {}
    changed = replace(RESHARDED, strategy="first", granularity="tensor", keep_first=0.5)
    for name, job in {
        "same": Job(RESHARDED, 2),
        "changed": Job(changed, 2),
        "include": Job(RESHARDED, 2, {}, other_include(RESHARDED)),
        "clipping": Job(replace(RESHARDED, clip=0.9), 2),
    }.items():
        engine, stepper = build(job, world, other_weights=True)
        stepper.optimizer.param_groups[1]["lr"] = 0.77
        with heard() as messages:
            engine.load_checkpoint(str(good))
        found[name] = (messages, state_of(stepper, engine))
        engine.destroy()
    return found


_WEIGHTS = {"load_optimizer_states": False}
_ZERO_TO_FP32 = r"zero_to_fp32\.get_fp32_state_dict_from_zero_checkpoint"
#: (engine, checkpoint, arguments of load_checkpoint, words of the message)
MISFITS: dict[str, tuple[Job, str, dict[str, Any], str]] = {
    "wider": (
        Job(replace(RESHARDED, hidden=21), 2),
        "2",
        {},
        r"layer.0.up.weight is \(19, 13\) there and \(21, 13\) here.*and 3 more",
    ),
    "wider-0": (Job(replace(RESHARDED, hidden=21), 0), "0", {}, r"layer.0.up.weight is \(19, 13\) there"),
    "deeper": (Job(replace(RESHARDED, depth=3), 3), "3", {}, r"layer.2.up.weight is absent there"),
    "trainable": (Job(replace(RESHARDED, frozen=False), 2), "2", {}, r"embeddings.weight is absent there"),
    "groups": (
        Job(replace(RESHARDED, two_groups=False), 2),
        "2",
        {},
        r"other parameter groups \(7 \+ 9 tensors, here",
    ),
    "precision": (
        Job(RESHARDED, 2, {}, BF16),
        "2",
        {},
        r"in fp32, and this engine trains in bf16: resume in fp32",
    ),
    "to-stage-0": (Job(RESHARDED, 0), "2", {}, r"saved at stage 1 or 2, and this engine runs at stage 0"),
    "from-stage-0": (Job(RESHARDED, 3), "0", {}, r"saved at stage 0, and this engine runs at stage 3"),
    "scheduler": (Job(RESHARDED, 2, {}, SCHEDULER), "2", {}, r"load_lr_scheduler_states=False starts it afresh"),
    # DeepSpeed loads nothing, without a word
    "module-only-3": (Job(RESHARDED, 3), "3", {"load_module_only": True}, _ZERO_TO_FP32),
    # DeepSpeed loads the latest one's
    "weights-of-a-tag": (Job(RESHARDED, 3), "two tags", {"tag": "earlier", **_WEIGHTS}, _ZERO_TO_FP32),
    "weights-of-3-at-2": (Job(RESHARDED, 2), "3", _WEIGHTS, _ZERO_TO_FP32),
    "weights-of-universal": (Job(RESHARDED, 2), "2", {"tag": f"{TAG}_universal", **_WEIGHTS}, _ZERO_TO_FP32),
}


def misfits(rank: int, world: int, good: dict[str, Path], folder: Path) -> dict[str, Refusal]:
    """Engines that a checkpoint is not for."""
    if rank == 0:
        shutil.copytree(good["3"], folder)
        shutil.copytree(folder / TAG, folder / "earlier")
    dist.barrier()
    found = {}
    for name, (job, source, arguments, _) in MISFITS.items():
        engine, stepper = build(job, world, other_weights=True)
        found[name] = refused(stepper, engine, {**good, "two tags": folder}[source], **arguments)
        engine.destroy()
    return found


def weights_alone(rank: int, world: int, good: dict[str, Path]) -> dict[str, Any]:
    """What DeepSpeed can load without the optimizer's states."""
    found = {}
    for name, arguments in {"2": {"load_module_only": True}, "3": {"load_optimizer_states": False}}.items():
        engine, stepper = build(Job(RESHARDED, int(name)), world, other_weights=True)
        engine.load_checkpoint(str(good[name]), **arguments)
        found[name] = state_of(stepper, engine)
        engine.destroy()
    return found


def without_record(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Checkpoints that DeepSpeed wrote alone: of torch's AdamW, and of one that keeps its step elsewhere."""
    import deepspeed

    found: dict[str, Any] = {}
    for stage in (0, 2, 3):
        there, job = folder / str(stage), Job(RESHARDED, stage)
        adamw = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
        model = model_of(RESHARDED)
        config = ds_config(replace(job, config=adamw), world)
        groups: Any = parameter_groups(RESHARDED, model, named=False)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
        ids, labels = micro_batch(RESHARDED, 1, 0)
        with rows(len(ids), slice(0, len(ids))):
            engine.backward(F.cross_entropy(engine(ids), labels))
        engine.step()
        engine.save_checkpoint(str(there))
        base = engine.optimizer if stage == 0 else engine.optimizer.optimizer
        moments = [state["exp_avg"].clone() for state in base.state.values()]
        engine.destroy()
        engine, stepper = build(job, world, other_weights=True)
        with heard() as messages:
            engine.load_checkpoint(str(there))
        mine = [state["exp_avg"] for state in stepper.optimizer.state.values()]
        same = all(torch.equal(a, b) for a, b in zip(moments, mine, strict=True))
        reports = steps(stepper, engine, RESHARDED, 2, 2)
        found[str(stage)] = (messages, same, [report.step for report in reports])
        engine.destroy()
    there = folder / "2"
    if rank == 0:
        for path in there.glob("*/*optim_states.pt"):
            saved = torch.load(path, weights_only=False)
            for state in saved["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
                del state["step"]
            torch.save(saved, path)
    dist.barrier()
    engine, stepper = build(Job(RESHARDED, 2), world)
    found["no step"] = refused(stepper, engine, there)
    engine.destroy()
    return found


# --- when ---


def within_accumulation(rank: int, world: int, folder: Path, good: Path) -> dict[str, Any]:
    """Saving and loading between micro-batches, and training on as if nobody had tried."""
    job = Job(replace(RESHARDED, accumulation=2), 2)
    engine, stepper = build(job, world)
    torch.manual_seed(DROPOUT_SEED)
    errors = []
    for t in (1, 2):
        for micro in (0, 1):
            backward(stepper, engine, job.case, t, micro, rank, world)
            errors.append(message_of(lambda: engine.save_checkpoint(str(folder))))
            report = stepper.step()
            if report is None:
                errors.append(message_of(lambda: engine.save_checkpoint(str(folder))))
                errors.append(message_of(lambda: engine.load_checkpoint(str(good))))
    disturbed, there = state_of(stepper, engine), folder.exists()
    errors.append(message_of(lambda: engine.save_checkpoint(str(folder))))
    engine.destroy()
    engine, stepper = build(job, world)
    torch.manual_seed(DROPOUT_SEED)
    steps(stepper, engine, job.case, 1, 2)
    changed = differences(state_of(stepper, engine), disturbed)
    engine.destroy()
    return {"errors": errors[:-1], "at the boundary": errors[-1], "changed": changed, "there": there}


def load_first(rank: int, world: int, jobs: dict[str, Job], good: dict[str, Path]) -> dict[str, Any]:
    """load_checkpoint before prepare(), as transformers.Trainer does; and prepare() twice."""
    import rose_ds

    found = {}
    for name, job in jobs.items():
        raw = engine_alone(job, world)
        _, client = raw.load_checkpoint(str(good[name]))
        with heard() as messages:
            stepper = rose_ds.prepare(raw)
        loaded = state_of(stepper, raw)
        torch.set_rng_state(client["rng"])
        end = trained(stepper, raw, steps(stepper, raw, job.case, client["next"], LAST))
        raw.destroy()
        found[name] = (loaded, end, messages)
    job, folder = jobs["2"], good["2"]
    raw = engine_alone(replace(job, config={"checkpoint": {"load_universal": True}}), world)
    raw.load_checkpoint(str(folder), tag=f"{TAG}_universal")
    found["universal"] = message_of(lambda: rose_ds.prepare(raw))
    raw.destroy()
    engine, _ = build(job, world, other_weights=True)
    stepper = rose_ds.prepare(engine)
    with heard() as messages:
        engine.load_checkpoint(str(folder))
    found["twice"] = (state_of(stepper, engine), messages)
    found["nothing there"] = engine.load_checkpoint(str(folder / TAG))
    engine.optimizer.elastic_checkpoint = True
    found["elastic"] = message_of(lambda: engine.save_checkpoint(str(folder / "elastic")))
    engine.destroy()
    return found


def engine_alone(job: Job, world: int) -> Any:
    """A DeepSpeed engine that nobody has prepared."""
    import deepspeed

    import rose_ds  # noqa: F401  # registers the optimizer's type

    model = model_of(job.case, other_weights=True)
    groups: Any = parameter_groups(job.case, model, named=False)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config(job, world))
    return engine


def small_group(rank: int, world: int, folder: Path) -> str:
    """A parameter group of which rank 1 holds nothing, and a universal checkpoint."""
    import deepspeed

    import rose_ds

    job = Job(Case(), 2, {}, {"checkpoint": {"load_universal": True}})
    model = model_of(job.case)
    gate = model.layer[0].gate.weight
    rest = [param for param in model.parameters() if param is not gate]
    groups = [{"params": rest}, {"params": [gate]}]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config(job, world))
    stepper = rose_ds.prepare(engine)
    steps(stepper, engine, job.case, 1, 1)
    engine.save_checkpoint(str(folder))
    error = message_of(lambda: engine.load_checkpoint(str(folder)))
    engine.destroy()
    return error
