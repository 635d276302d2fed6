"""Invariant 6: what would silently be wrong is refused, by name; and misuse of a ZeRO stepper raises."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import Run, check_parity, reference, train
from spawn import run_ranks
from tiny import HYPER, Case, make_model, micro_batch, rows
from zero_jobs import Job, ds_config, quiet, run, start

#: DeepSpeed configs that reach prepare() on a CPU: (stage, zero_optimization, the rest, words of the message)
CONFIGS: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "round_robin-1": (1, {"round_robin_gradients": True}, {}, r"round_robin_gradients.*set it to false"),
    "round_robin-2": (2, {"round_robin_gradients": True}, {}, r"round_robin_gradients.*set it to false"),
    "alignment-1": (1, {"parameter_alignment": True}, {}, r"parameter_alignment.*remove it"),
    "alignment-2": (2, {"parameter_alignment": True}, {}, r"parameter_alignment.*remove it"),
    "zero++": (3, {"zero_quantized_gradients": True}, {}, r"zero_quantized_gradients.*leave these settings out"),
    "deepcompile": (2, {}, {"compile": {"deepcompile": True}}, r"deepcompile.*set it to false"),
    "accumulation": (2, {}, {"managed_gradient_accumulation": False}, r"managed_gradient_accumulation.*set it to true"),
    "autocast": (2, {}, {"torch_autocast": {"enabled": True, "dtype": "float16"}}, r'torch_autocast.*"bf16"'),
    "autocast-0": (0, {}, {"torch_autocast": {"enabled": True}}, r'"dtype" to "bfloat16"'),
    "reduction-0": (0, {}, {"communication_data_type": "fp16"}, r'communication_data_type.*"bf16" or "fp32"'),
    "reduction-2": (2, {}, {"communication_data_type": "fp16"}, r'communication_data_type.*"bf16" or "fp32"'),
    "norm": (2, {"compute_grad_norm": False}, {"gradient_clipping": 0.0}, r"compute_grad_norm.*set it to true"),
    "masters": (
        2,
        {"load_from_fp32_weights": False},
        {"bf16": {"enabled": True}},
        r"load_from_fp32_weights.*leave it at true",
    ),
    "adamw-0": (0, {}, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, r"AdamW, not RoseAdamW"),
    "adamw-2": (2, {}, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, r"AdamW, not RoseAdamW"),
    "adamw-3": (3, {}, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, r'"type": "RoseAdamW"'),
}


def _offload(device: str, ratio: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(device=device, ratio=ratio)


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(engine: Any) -> None:
        *parents, last = path.split(".")
        for name in parents:
            engine = getattr(engine, name)
        object.__setattr__(engine, last, value)

    return change


def _halve_masters(engine: Any) -> None:
    z = engine.optimizer
    z.single_partition_of_fp32_groups = [flat.bfloat16() for flat in z.single_partition_of_fp32_groups]


#: What DeepSpeed itself cannot start on a CPU, put into an engine that it could: (change, words of the message)
STAND_INS: dict[str, tuple[Callable[[Any], None], str]] = {
    # needs libaio's async_io extension
    "nvme-optimizer": (_set("_config.zero_config.offload_optimizer", _offload("nvme")), r'"nvme".*use "cpu"'),
    "nvme-parameters": (_set("_config.zero_config.offload_param", _offload("nvme")), r'"nvme".*use "cpu"'),
    # needs DeepSpeedCPUAdam
    "ratio": (_set("_config.zero_config.offload_optimizer", _offload("cpu", 0.5)), r"offload_optimizer\.ratio.*1\.0"),
    "half-masters": (_halve_masters, r"bf16_master_weights_and_grads.*keep fp32 masters"),
    # needs a CUDA device
    "super_offload": (_set("super_offload", lambda: True), r"super_offload.*remove it"),
    # builds its own AdamW from the optimizer's parameters, which it then does not know
    "zenflow": (_set("zenflow", True), r"zenflow.*remove it"),
    # needs a process of its own that writes
    "writer": (_set("checkpoint_engine.is_decoupled", lambda: True), r"checkpoint\.writer.*leave them out"),
    # needs other model classes
    "pipeline": (_set("pipeline_parallelism", True), r"pipeline parallelism.*use ZeRO"),
    "experts": (_set("has_moe_layers", True), r"mixture-of-experts"),
    "mesh": (_set("mesh_device", object()), r"sequence parallelism.*data parallelism alone"),
    "sequences": (_set("sequence_parallel_size", 2), r"sequence parallelism.*data parallelism alone"),
}


class Mpu:
    """A model-parallel unit of one rank, as deepspeed.initialize wants it."""

    def __getattr__(self, name: str) -> Callable[[], Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name.endswith("_group"):
            return lambda: torch.distributed.group.WORLD
        return lambda: int(name.endswith("world_size"))


Outcome = tuple[str, str]


@contextlib.contextmanager
def caught(into: dict[str, Outcome], name: str) -> Iterator[None]:
    """The name and message of what the block raises."""
    try:
        yield
    except Exception as error:
        into[name] = (type(error).__name__, str(error))
    else:
        into[name] = ("nothing", "")


def refusals(rank: int, world: int) -> dict[str, Outcome]:
    import deepspeed

    import rose_ds

    quiet()
    found: dict[str, Outcome] = {}

    def engine_for(job: Job, **more: Any) -> Any:
        model = make_model(job.case)
        config = ds_config(job, world)
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, **more)[0]

    for name, (stage, zero, config, _) in CONFIGS.items():
        engine = engine_for(Job(Case(), stage, zero, config))
        with caught(found, name):
            rose_ds.prepare(engine)
    for name, (change, _) in STAND_INS.items():
        engine = engine_for(Job(Case(), 2))
        change(engine)
        with caught(found, name):
            rose_ds.prepare(engine)
    half = make_model(Case()).bfloat16()
    config = ds_config(Job(Case(), 0), world)
    engine = deepspeed.initialize(model=half, model_parameters=half.parameters(), config=config)[0]
    with caught(found, "half-weights"):
        rose_ds.prepare(engine)
    for stage in (0, 1, 2, 3):
        model = make_model(Case())
        some = [p for name, p in model.named_parameters() if "layer.1" not in name]
        engine = deepspeed.initialize(model=model, model_parameters=some, config=ds_config(Job(Case(), stage), world))[
            0
        ]
        with caught(found, f"missing-{stage}"):
            rose_ds.prepare(engine)
    for stage in (0, 2, 3):
        with caught(found, f"timers-{stage}"):
            run(Job(Case(accumulation=2, steps=2), stage, {}, {"wall_clock_breakdown": True}), rank, world)
    engine = engine_for(Job(Case(), 2), mpu=Mpu())
    with caught(found, "mpu"):
        rose_ds.prepare(engine)
    engine = engine_for(Job(Case(), 2))
    for name, arguments in (
        ("own-optimizer", {"optimizer": engine.optimizer.optimizer}),
        ("own-accumulation", {"accumulation_steps": 2}),
        ("own-clipping", {"max_grad_norm": 1.0}),
    ):
        with caught(found, name):
            rose_ds.prepare(engine, **arguments)
    actual, deepspeed.__version__ = deepspeed.__version__, "0.20.0"
    with caught(found, "version"):
        rose_ds.prepare(engine)
    deepspeed.__version__ = actual
    with caught(found, "accepted"):
        rose_ds.prepare(engine)
    os.environ["ROSE_DS_EXCHANGE"] = "carrier-pigeon"
    with caught(found, "exchange"):
        rose_ds.prepare(engine_for(Job(Case(), 2)))
    del os.environ["ROSE_DS_EXCHANGE"]
    return found


def misuse(rank: int, world: int) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    logging.disable(logging.WARNING)
    ids, labels = micro_batch(Case(), 1, 0)

    def loss(logits: Any) -> Any:
        return F.cross_entropy(logits, labels)

    with rows(len(ids), slice(0, len(ids))):
        for stage in (0, 2, 3):
            engine, stepper = start(Job(Case(dropout=0.0), stage), world)
            with caught(found, f"no-dropout-{stage}"):
                stepper.backward(lambda engine=engine: engine(ids), loss)
            engine, stepper = start(Job(Case(), stage), world)
            with caught(found, f"model-output-{stage}"):
                stepper.backward(lambda engine=engine: SimpleNamespace(logits=engine(ids)), loss)
            engine, stepper = start(Job(Case(), stage), world)
            with caught(found, f"step-first-{stage}"):
                stepper.step()
            stepper.backward(lambda engine=engine: engine(ids), loss)
            with caught(found, f"backward-twice-{stage}"):
                stepper.backward(lambda engine=engine: engine(ids), loss)
            stepper.step()
            with caught(found, f"step-twice-{stage}"):
                stepper.step()
            if stage == 0:
                with caught(found, "no-sync-0"), engine.no_sync():
                    stepper.backward(lambda engine=engine: engine(ids), loss)
            with caught(found, f"bare-step-{stage}"):  # around the stepper
                engine.backward(loss(engine(ids)))
                engine.step()
        random.seed(1)
        engine, stepper = start(Job(Case(), 3), world)
        with caught(found, "irreproducible-3"):
            stepper.backward(lambda: engine(ids) * random.random(), loss)
        random.seed(1)
        engine, stepper = start(Job(Case(), 2), world)
        with caught(found, "irreproducible-2"):  # one graph: nothing is run again
            stepper.backward(lambda: engine(ids) * random.random(), loss)
        engine, stepper = start(Job(Case("second", dropout=0.0), 3), world)
        with caught(found, "second-without-dropout"):
            stepper.backward(lambda: engine(ids), loss)
    return found


#: Trained with two micro-batches to a step.
REGROUPED = Case("ensemble", accumulation=2, steps=2)

UNREACHED = [
    (f"zero{stage}{how}", stage, zero)
    for how, zero in (("", {}), ("-offload", {"offload_optimizer": {"device": "cpu"}}))
    for stage in (1, 2, 3)
]


def unreached(rank: int, world: int) -> dict[str, float]:
    """A parameter that the first step reaches and the second does not: its moment's change in the second."""
    found = {}
    for name, stage, zero in UNREACHED:
        model, used = make_model(Case("none")), [True]
        model.extra = torch.nn.Parameter(torch.ones(8))
        whole = model.forward
        model.forward = lambda ids, m=model, f=whole, u=used: f(ids) + (m.extra.sum() if u[0] else 0)
        case = Case("none", steps=2)
        engine, stepper = start(Job(case, stage, zero), world, model)
        (piece,) = (s for s in stepper.engine.trainable_slices() if s.name == "extra")
        moments = []
        for t, use in ((1, True), (2, False)):
            used[0] = use
            ids, labels = micro_batch(case, t, 0)
            with rows(len(ids), slice(0, len(ids))):
                stepper.backward(
                    lambda engine=engine, ids=ids: engine(ids),
                    lambda z, y=labels: F.cross_entropy(torch.cat([z, z.mean(1, True).square()], 1), y),
                )
                stepper.step()
            moments.append(piece.view(stepper.optimizer.init_state(piece.param)["exp_avg"]).clone())
        found[name] = float((moments[1] / moments[0]).mean())
    return found


def passes(rank: int, world: int) -> dict[str, tuple[int, bool]]:
    """Forward passes a step takes, and whether the RNG stream is the twin's afterwards."""
    counts = {}
    for stage in (2, 3):
        for strategy in ("none", "first", "second", "ensemble"):
            case = Case(strategy, steps=2)
            engine, stepper = start(Job(case, stage), world)
            calls = 0

            def model(ids: Any, engine: Any = engine) -> Any:
                nonlocal calls
                calls += 1
                return engine(ids)

            run = train(stepper, model, case, rank, world)
            counts[f"{stage}-{strategy}"] = (calls // case.steps, torch.equal(run.stream, reference(case).stream))
    return counts


def regrouped(rank: int, world: int) -> dict[int, Run]:
    """Steps of as many micro-batches as set_train_batch_size() has made them after prepare()."""
    found = {}
    for stage in (0, 2, 3):
        engine, stepper = start(Job(REGROUPED, stage, {}, {"gradient_accumulation_steps": 1}), world)
        engine.set_train_batch_size(REGROUPED.batch)
        found[stage] = train(stepper, engine, REGROUPED, rank, world)
    return found


def descriptions(rank: int, world: int) -> dict[str, str]:
    return {f"zero{stage}": start(Job(Case(), stage), world)[1].describe() for stage in (0, 1, 2, 3)}


def everything(rank: int, world: int) -> dict[str, Any]:
    return {
        "regrouped": regrouped(rank, world),  # before an mpu, which DeepSpeed remembers
        "refusals": refusals(rank, world),
        "misuse": misuse(rank, world),
        "passes": passes(rank, world),
        "unreached": unreached(rank, world),
        "described": descriptions(rank, world),
    }


@pytest.fixture(scope="session")
def outcomes(extensions: object) -> dict[str, Any]:
    """What one rank met."""
    return run_ranks(everything, 1)[0]


@pytest.mark.parametrize("name", [*CONFIGS, *STAND_INS])
def test_refused(outcomes: Any, name: str) -> None:
    """The message names the setting and the way out."""
    words = CONFIGS[name][-1] if name in CONFIGS else STAND_INS[name][-1]
    kind, message = outcomes["refusals"][name]
    assert kind == "RefusedConfiguration"
    assert re.search(words, message, re.DOTALL), message


OTHERS = {
    "mpu": ("RefusedConfiguration", r"mpu.*use ZeRO-3"),
    "half-weights": ("RefusedConfiguration", r"low precision.*load the model in fp32"),
    **{f"timers-{stage}": ("nothing", "^$") for stage in (0, 2, 3)},
    **{f"missing-{stage}": ("RefusedConfiguration", "missing from the optimizer") for stage in (0, 1, 2, 3)},
    "version": ("RefusedConfiguration", r"deepspeed 0\.20\.0 .*pip install deepspeed=="),
    "own-optimizer": ("ValueError", "optimizer, gradient_accumulation_steps, gradient_clipping"),
    "own-accumulation": ("ValueError", "gradient_accumulation_steps"),
    "own-clipping": ("ValueError", "gradient_clipping"),
    "exchange": ("ValueError", r"carrier-pigeon.*ROSE_DS_EXCHANGE"),
    "accepted": ("nothing", "^$"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_prepare(outcomes: Any, name: str) -> None:
    """What prepare(engine) refuses besides settings; and that it accepts an engine without any of it."""
    kind, message = outcomes["refusals"][name]
    assert kind == OTHERS[name][0], message
    assert re.search(OTHERS[name][1], message, re.DOTALL), message


MISUSE = {
    "no-dropout": ("RuntimeError", r"identical logits.*model\.train\(\).*strategy=\"second\""),
    "model-output": ("TypeError", r"SimpleNamespace.*model\(\*\*inputs\)\.logits"),
    "step-first": ("RuntimeError", r"step\(\) must follow a backward\(\)"),
    "step-twice": ("RuntimeError", r"step\(\) must follow a backward\(\)"),
    "backward-twice": ("RuntimeError", r"call step\(\) after every backward\(\)"),
    "bare-step": ("RuntimeError", r"has no masks for this step: train through"),
}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", MISUSE)
def test_misuse(outcomes: Any, name: str, stage: int) -> None:
    """A stepper used wrongly says how to use it."""
    kind, message = outcomes["misuse"][f"{name}-{stage}"]
    assert kind == MISUSE[name][0], message
    assert re.search(MISUSE[name][1], message, re.DOTALL), message


def test_irreproducible_forward(outcomes: Any) -> None:
    """Only stage 3 runs the first pass again, and notices when it came out differently."""
    kind, message = outcomes["misuse"]["irreproducible-3"]
    assert kind == "RuntimeError" and "replayed forward pass gave other logits" in message
    assert outcomes["misuse"]["irreproducible-2"] == ("nothing", "")
    assert outcomes["misuse"]["second-without-dropout"] == ("nothing", "")


def test_no_sync_is_refused(outcomes: Any) -> None:
    kind, message = outcomes["misuse"]["no-sync-0"]
    assert kind == "RefusedConfiguration" and "inside no_sync()" in message


@pytest.mark.parametrize("name", [name for name, *_ in UNREACHED])
def test_a_parameter_that_a_step_does_not_reach(outcomes: Any, name: str) -> None:
    """Has no gradient in it, and not the last step's: its moment decays by beta1."""
    assert outcomes["unreached"][name] == pytest.approx(HYPER[0].betas[0])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_another_batch_size(outcomes: Any, stage: int) -> None:
    """Micro-batches that DeepSpeed was told of later count as those of its config."""
    check_parity(outcomes["regrouped"][stage].parameters, reference(REGROUPED))


@pytest.mark.parametrize("strategy", ["none", "first", "second", "ensemble"])
@pytest.mark.parametrize("stage", [2, 3])
def test_passes(outcomes: Any, stage: int, strategy: str) -> None:
    """One pass without KL, two with, three at stage 3; random numbers continue as after two everywhere."""
    with_kl = 3 if stage == 3 else 2
    calls, stream_continues = outcomes["passes"][f"{stage}-{strategy}"]
    assert calls == (with_kl if strategy in ("first", "ensemble") else 1)
    assert stream_continues


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_described(outcomes: Any, stage: int) -> None:
    """describe() counts whole parameters, sharded or not."""
    head, *lines = outcomes["described"][f"zero{stage}"].splitlines()
    model = make_model(Case())
    assert head.startswith(f"task, ensemble (element) on zero{stage}: 8 tensors, 1,016 elements eligible")
    whole = sum(p.numel() for p in model.parameters())
    assert f"  masked in all 1,016 of {whole:,} ({1016 / whole:.1%}); weights are kept in float32" in lines
    counts = [int(line.split()[1].replace(",", "")) for line in lines if re.match(r"  (masked|always) +\d", line)]
    assert sum(counts) == whole
