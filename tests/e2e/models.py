"""Which models ROSE trains, on which engines: tried, a row each.

    python tests/e2e/models.py               # writes docs/models.md, in ten minutes or so
    python tests/e2e/models.py bert gpt2     # these rows of it

Every run takes STEPS steps of four rows: one process in two micro-batches; two ranks with one of these each, and its
random numbers. So all of them must find the same losses and thresholds.
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from architectures import MODELS, Made
from habits import arguments, first_line
from models_page import CLOSING, INTRODUCTION
from torch import nn
from transformers.trainer_callback import PrinterCallback

from rose_ds import RefusedConfiguration, RoseAdamW, RoseConfig, Stepper, prepare
from rose_ds.config import BLOCKS
from rose_ds.eligible import block_patterns
from rose_ds.training.describe import find_dropout
from rose_ds.training.predictions import positions_of
from rose_ds.training.trainer import RoseTrainer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
ENGINES = ("FSDP2", "ZeRO-3", "RoseTrainer")
STEPS, LR = 2, 1e-3
#: Relative differences of losses and thresholds that rounding explains.
TOLERANCE = 1e-3


@dataclass
class Figures:
    """Of a run's steps: the mean loss of its micro-batches, and the thresholds."""

    losses: list[float] = field(default_factory=list)
    taus: list[float] = field(default_factory=list)

    def far_from(self, other: Figures) -> float:
        """The largest relative difference."""
        if not all(map(math.isfinite, (*self.losses, *self.taus))):
            return math.inf
        pairs = [*zip(self.losses, other.losses, strict=True), *zip(self.taus, other.taus, strict=True)]
        return max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)


@dataclass(frozen=True)
class Tried:
    """What one process says of a model: the first columns of its row."""

    default: str
    used: str
    noise: str
    settings: dict[str, Any]
    """RoseConfig's, with which it trains."""
    figures: Figures

    def cells(self) -> list[str]:
        return [self.default, self.used, self.noise]


def all_models() -> dict[str, Callable[[], Made]]:
    """By "section/name"."""
    return {f"{section}/{name}": make for section, entries in MODELS.items() for name, make in entries.items()}


# --- a run ---


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def seed(step: int, micro: int) -> None:
    torch.manual_seed(1000 + 10 * step + micro)


def steps(stepper: Stepper, model: Any, inputs: dict[str, Any], micros: Sequence[int]) -> Figures:
    """Train on these of the two micro-batches; the losses are those of all ranks."""
    figures = Figures()
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in micros:
            rows = {key: value[2 * micro : 2 * micro + 2] for key, value in inputs.items()}
            outputs: list[Any] = []

            def forward(rows: Any = rows, outputs: Any = outputs) -> Any:
                outputs[:] = [model(**rows)]
                return outputs[0].logits

            seed(step, micro)
            values = stepper.backward(
                forward,
                lambda logits, outputs=outputs: outputs[0].loss,  # type: ignore[misc]
                positions=positions_of(rows["labels"], stepper.engine.module),
            )
            report = stepper.step()
            total += values["loss"] / 2
        if len(micros) == 1:
            dist.all_reduce(total)
        assert report is not None and not report.skipped
        figures.losses.append(float(total))
        figures.taus += [tau for tau in (report.tau_first, report.tau_second) if tau is not None]
    return figures


def try_plain(make: Callable[[], Made]) -> Tried:
    """One process: what the default include masks, what else the error suggests, and whether it trains.

    Models without dropout are tried with strategy "second".
    """
    model, _ = make()
    shapes = {name: tuple(param.shape) for name, param in trained(model)}
    noise = ", ".join(sorted(find_dropout(model))) or "none: only `second`"
    settings: dict[str, Any] = {} if find_dropout(model) else {"strategy": "second"}
    default = "?"
    for include in (None, BLOCKS):
        model, inputs = make()
        model.train()
        given = {**settings, **({} if include is None else {"include": include})}
        try:
            optimizer = RoseAdamW(trained(model), lr=LR, weight_decay=0.0, **given)
            stepper = prepare(model, optimizer, accumulation_steps=2)
        except RefusedConfiguration as error:
            assert include is None and BLOCKS in str(error), error
            default = "refused, names do not fit"
            continue
        found = share(stepper, shapes)
        default = found if include is None else default
        used = "the default" if include is None else f'`"{BLOCKS}"` {found}: ' + code(block_patterns(shapes))
        return Tried(default, used, noise, given, steps(stepper, model, inputs, (0, 1)))
    raise AssertionError("the last include is refused or used")


def share(stepper: Stepper, shapes: dict[str, tuple[int, ...]]) -> str:
    whole = sum(stepper.engine.numel(param) for _, param in trained(stepper.engine.module))
    layout = stepper.engine.layout
    return f"{layout.tensor_count} of {len(shapes)} ({layout.element_count / whole:.0%})"


def code(patterns: Iterable[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns).replace("|", "\\|")


# --- two ranks ---


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of numbered lists: what is sharded one by one."""
    if model.config.model_type == "squeezebert":
        return []  # calls its blocks' forward() directly, past the hooks by which FSDP2 gathers their weights
    found: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if isinstance(part, nn.ModuleList) and not inside:
            found.update({f"{name}.{i}": block for i, block in enumerate(part)})
    return list(found.values())


def on_fsdp2(make: Callable[[], Made], settings: dict[str, Any], rank: int) -> Figures:
    from torch.distributed.fsdp import fully_shard

    model, inputs = make()
    model.train()
    for block in blocks_of(model):
        fully_shard(block)
    fully_shard(model)
    stepper = prepare(model, RoseAdamW(trained(model), lr=LR, weight_decay=0.0, **settings))
    assert stepper.engine.name == "fsdp2"
    return steps(stepper, model, inputs, (rank,))


def on_zero3(make: Callable[[], Made], settings: dict[str, Any], rank: int) -> Figures:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "optimizer": {"type": "RoseAdamW", "params": {"lr": LR, "weight_decay": 0.0, **settings}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 5000},
    }
    model, inputs = make()
    parameters = [param for _, param in trained(model)]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    try:
        engine.train()
        return steps(prepare(engine), engine, inputs, (rank,))
    finally:
        engine.destroy()


def rank_of_two(rank: int, world: int, jobs: Sequence[tuple[str, str, dict[str, Any]]]) -> list[Figures | str]:
    """(engine, model, settings) each, up to the first that fails: a message, since ranks cannot go on together."""
    warnings.filterwarnings("ignore")
    found: list[Figures | str] = []
    for engine, name, settings in jobs:
        run = {"FSDP2": on_fsdp2, "ZeRO-3": on_zero3}[engine]
        try:
            found.append(run(all_models()[name], settings, rank))
        except RefusedConfiguration as error:  # on every rank, before any collective of a step
            found.append(f"refused: {first_line(error)}")
        except Exception as error:
            print(f"rank {rank}, {name} on {engine}:\n{traceback.format_exc()}", file=sys.stderr)
            found.append(f"fails: {type(error).__name__}: {first_line(error)}")
            break
    return found


# --- transformers' loop ---


class InOrder(RoseTrainer):
    """The rows in their order, with the random numbers of the other runs."""

    micro = 0

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        seed(self.state.global_step, self.micro % 2)
        self.micro += 1
        return super().training_step(*args, **kwargs)


def on_trainer(make: Callable[[], Made], settings: dict[str, Any]) -> Figures:
    model, inputs = make()
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(4)] * STEPS
    with tempfile.TemporaryDirectory() as folder:
        more = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": STEPS}
        more |= {"learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        args = arguments(Path(folder), **more, remove_unused_columns=False)
        trainer = InOrder(
            model=model,
            args=args,
            train_dataset=rows,
            rose=RoseConfig(**settings),
            data_collator=lambda some: {key: torch.stack([row[key] for row in some]) for key in some[0]},
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("rose/tau_first", "rose/tau_second")
    return Figures([e["loss"] for e in logged], [e[name] for e in logged for name in names if name in e])


# --- the page ---

HEAD = "| | default | include | dropout | FSDP2 x2 | ZeRO-3 x2 | RoseTrainer |\n" + "| --- " * 7 + "|"


def line_of(name: str, tried: Tried, engines: Sequence[str]) -> str:
    return f"| {' | '.join([name.partition('/')[2], *tried.cells(), *engines])} |"


def page(lines: dict[str, str]) -> str:
    sections = []
    for section in MODELS:
        listed = [line for name, line in lines.items() if name.startswith(f"{section}/")]
        sections.append("\n".join([f"## {section}\n\n{HEAD}", *listed, ""]))
    return "\n".join([INTRODUCTION, *sections, CLOSING])


def compare(other: Figures | str, plain: Figures) -> str:
    if isinstance(other, str):
        return other
    far = other.far_from(plain)
    return f"{far:.0e}" if far else "equal"


def on_two_ranks(jobs: Sequence[tuple[str, str, dict[str, Any]]]) -> dict[tuple[str, str], Figures | str]:
    """By (engine, model). After one that fails the ranks are started anew."""
    from spawn import run_ranks

    found: dict[tuple[str, str], Figures | str] = {}
    left = list(jobs)
    while left:
        one, other = run_ranks(rank_of_two, 2, left, timeout=120 + 20 * len(left))
        for (engine, name, _), a, b in zip(left, one, other, strict=False):
            assert isinstance(a, str) or a == b, f"{name} on {engine}: {a} and {b}"
            found[engine, name] = a
        left = left[len(one) :]
    return found


def try_trainer(make: Callable[[], Made], settings: dict[str, Any]) -> Figures | str:
    try:
        return on_trainer(make, settings)
    except RefusedConfiguration as error:
        return f"refused: {first_line(error)}"


def lines_of(text: str) -> dict[str, str]:
    """The page's rows by "section/name"."""
    lines, section = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif section in MODELS and line.startswith("| ") and not line.startswith(("| |", "| ---")):
            lines[f"{section}/{line.removeprefix('| ').partition(' | ')[0]}"] = line
    return lines


def main(wanted: Sequence[str]) -> None:
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    models = all_models()
    lines = {name: line for name, line in lines_of(PAGE.read_text()).items() if name in models} if PAGE.exists() else {}
    chosen = [name for name in models if not wanted or name.partition("/")[2] in wanted]
    for some in (chosen[i : i + _AT_ONCE] for i in range(0, len(chosen), _AT_ONCE)):
        tried = {name: try_plain(models[name]) for name in some}
        found = on_two_ranks([(engine, name, tried[name].settings) for engine in ENGINES[:2] for name in some])
        for name in some:
            runs = [*(found[engine, name] for engine in ENGINES[:2]), try_trainer(models[name], tried[name].settings)]
            lines[name] = line_of(name, tried[name], [compare(run, tried[name].figures) for run in runs])
            print(lines[name], flush=True)
        PAGE.write_text(page({name: lines[name] for name in models if name in lines}))


_AT_ONCE = 12  # models to a start of two ranks

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests" / "engines"))
    main(sys.argv[1:])
