"""What a stepper calls its parameters, and what it and prepare() refuse, on the plain engine."""

from __future__ import annotations

import importlib.metadata
import math
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_jobs import build, one_step
from reference import reference
from tiny import GLOBAL_BATCH, Case, make_model, micro_batch, rows
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import rose_ds
from rose_ds import RefusedConfiguration, RoseAdamW, RoseConfig, prepare
from rose_ds.core.mask import keep_count
from rose_ds.objectives import RDrop

pytestmark = pytest.mark.fast


def test_names() -> None:
    """eligible, describe() and gather_parameters() know every parameter by its name, in the model's order."""
    model, stepper = build(Case())
    names = [name for name, _ in model.named_parameters()]
    assert list(stepper.gather_parameters()) == names
    assert stepper.eligible == [name for name in names if "layer" in name and "weight" in name]
    head, batch, *lines = stepper.describe().splitlines()
    eligible = [p.numel() for name, p in model.named_parameters() if name in stepper.eligible]
    assert head.startswith("task, ensemble (element) on plain: ")
    assert f"{len(eligible)} tensors, {sum(eligible):,} elements" in head
    assert batch == "  an optimizer step is 1 micro-batch of each rank"
    kinds: dict[tuple[str, str], list[int]] = {}
    for name, p in model.named_parameters():
        kind = "masked" if name in stepper.eligible else "always"
        kinds.setdefault((kind, re.sub(r"\.\d\.", ".*.", name)), []).append(p.numel())
    whole = sum(p.numel() for p in model.parameters())
    said = [line.split() for line in lines[: len(kinds)]]
    assert said == [
        [kind, f"{sum(sizes):,}", f"{100 * sum(sizes) / whole:.1f}%", name, *[f"(x{len(sizes)})"] * (len(sizes) > 1)]
        for (kind, name), sizes in kinds.items()
    ]
    totals, dropout, memory, step = lines[len(kinds) :]
    share = f"{sum(eligible):,} of {whole:,} ({sum(eligible) / whole:.1%})"
    assert totals == f"  masked in all {share}; weights are kept in float32"
    assert dropout == "  dropout: GlobalDropout 0.2"
    states, ranked = 8 * whole / 2**20, 4 * sum(eligible) / 2**20
    assert f"AdamW's states {states:.1f} MiB" in memory and f"first-order risk {ranked:.1f} MiB" in memory
    assert step == "  the optimizer step is made of torch's operations"
    gathered = stepper.gather_parameters()
    gathered["head.bias"].add_(1)
    assert not torch.equal(gathered["head.bias"], dict(model.named_parameters())["head.bias"]), "copies"


def test_a_layer_without_gradient_is_kept() -> None:
    """An eligible parameter that the forward pass does not use counts with risk 0, and is left alone as by AdamW."""
    model = make_model(Case())
    model.layer.append(nn.Linear(2, 2))
    spare = model.layer[-1].weight
    value = spare.detach().clone()
    model.layer[-1].forward = lambda x: x  # type: ignore[method-assign]
    stepper = prepare(model, RoseAdamW(model.named_parameters(), strategy="first", keep_first=0.5))
    torch.manual_seed(0)
    report = one_step(model, stepper, 1)
    twin = reference(Case()).steps[0].scores["first"]
    assert report.eligible == sum(risk.numel() for risk in twin.values()) + spare.numel()
    assert report.kept_first == keep_count(0.5, report.eligible)
    assert torch.equal(spare, value)


def test_weights_in_another_order_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.1), nn.Flatten(), nn.Linear(4, 2))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with pytest.raises(RefusedConfiguration, match=r"'0.weight' lies in memory .*torch.contiguous_format"):
        prepare(model, RoseAdamW(model.named_parameters(), strategy="second", include=".*weight"))
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    prepare(model, RoseAdamW(model.named_parameters(), strategy="second", include=".*weight"))


def test_misuse() -> None:
    """The order of calls, and what forward() returns."""
    model, stepper = build(Case())
    ids, labels = micro_batch(Case(), 1, 0)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    with rows(GLOBAL_BATCH, slice(0, GLOBAL_BATCH)):
        with pytest.raises(RuntimeError, match=r"step\(\) must follow a backward\(\)"):
            stepper.step()
        with pytest.raises(TypeError, match=r"got SimpleNamespace; .*model\(\*\*inputs\)\.logits"):
            stepper.backward(lambda: SimpleNamespace(logits=model(ids)), loss)
        stepper.backward(lambda: model(ids), loss)
        with pytest.raises(RuntimeError, match=r"call step\(\) after every backward\(\)"):
            stepper.backward(lambda: model(ids), loss)
        stepper.step()


@pytest.mark.parametrize("strategy", ["first", "ensemble"])
def test_no_dropout(strategy: str) -> None:
    """Two equal passes have no KL gradient: raised, not trained on; the eval mode that was forgotten, too."""
    for case, mode in ((Case(strategy, dropout=0.0), True), (Case(strategy), False)):
        model, stepper = build(case)
        model.train(mode)
        with pytest.raises(RuntimeError, match=r'identical logits.*model\.train\(\).*strategy="second"'):
            one_step(model, stepper, 1)
    model, stepper = build(Case("second", dropout=0.0))
    assert one_step(model, stepper, 1).kept_second > 0


def micro(model: Any, stepper: Any, case: Case, t: int, i: int) -> None:
    """Gradients of a micro-batch, with its own random numbers."""
    ids, labels = micro_batch(case, t, i)
    torch.manual_seed(100 * t + i)
    with rows(len(ids), slice(0, len(ids))):
        stepper.backward(lambda: model(ids), lambda logits: F.cross_entropy(logits, labels))


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("how", ["zero_grad", "zeros", "model.zero_grad", "a step that fails"])
def test_what_a_dropped_step_leaves(how: str) -> None:
    """Nothing: neither its gradient, nor its risk, nor its place in the accumulation."""
    case = Case("ensemble", accumulation=2)
    (model, stepper), (twin, undisturbed) = build(case), build(case)
    micro(model, stepper, case, 1, 0)
    stepper.step()
    if how == "model.zero_grad":
        model.zero_grad()
    elif how != "a step that fails":
        stepper.optimizer.zero_grad(set_to_none=how == "zero_grad")
    else:
        micro(model, stepper, case, 1, 1)
        decide = stepper.masking.decide

        def fail(*_: Any, **__: Any) -> None:
            raise MemoryError("no memory for masks")

        stepper.masking.decide = fail
        with pytest.raises(MemoryError):
            stepper.step()
        stepper.masking.decide = decide
    for t in (2, 3):
        for i in (0, 1):
            for m, s in ((model, stepper), (twin, undisturbed)):
                micro(m, s, case, t, i)
                report = s.step()
        assert report is not None and equal_weights(model, twin)
    assert not equal_weights(model, make_model(case))


def test_clipping_behind_the_steppers_back() -> None:
    """Where the task's gradient is told from R-Drop's by its share, which clipping changes."""
    case = Case("ensemble", clip=0.0, objective=RDrop())
    model, stepper = build(case)
    micro(model, stepper, case, 1, 0)
    with pytest.raises(TypeError, match="'r-drop' trains on more than the task's gradient.*give grad_norm="):
        stepper.leave_step_to_optimizer(last=True)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match=r"gradients were changed between backward\(\) and step\(\)"):
        stepper.step()
    model, stepper = build(case)
    micro(model, stepper, case, 1, 0)
    model.embeddings.weight.grad.zero_()  # never ranked
    assert stepper.step() is not None
    model, stepper = build(Case("second", clip=0.0))
    micro(model, stepper, Case("second"), 1, 0)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert stepper.step() is not None


def test_zero_grad_in_every_iteration() -> None:
    """With accumulation no step would ever be made."""
    case = Case("second", accumulation=2, clip=0.0)
    model, stepper = build(case)
    for t in range(20):  # now and then it is a step that is given up
        micro(model, stepper, case, t, 0)
        stepper.step()
        if t % 3 == 0:
            stepper.optimizer.zero_grad()
    assert stepper.optimizer.steps_taken() > 5
    with pytest.raises(RuntimeError, match="leave zero_grad"):
        for t in range(20):
            micro(model, stepper, case, t, 0)
            stepper.step()
            stepper.optimizer.zero_grad()
    taken = stepper.optimizer.steps_taken()
    for t in range(4):  # the loop is mended
        micro(model, stepper, case, t, 0)
        stepper.step()
    assert stepper.optimizer.steps_taken() == taken + 2


@pytest.mark.parametrize("strategy", ["none", "second", "random"])
def test_a_gradient_that_is_not_finite_where_nobody_says_a_norm(strategy: str) -> None:
    """A loop that does not clip."""
    case = Case(strategy, clip=0.0)
    model, stepper = build(case)
    for factor in (1.0, math.nan, 1.0):
        ids, labels = micro_batch(case, 1, 0)
        before = [p.detach().clone() for p in model.parameters()]
        with rows(len(ids), slice(None)):
            stepper.backward(lambda ids=ids: model(ids), lambda z, y=labels, f=factor: f * F.cross_entropy(z, y))
        stepper.leave_step_to_optimizer(last=True)
        stepper.optimizer.step()
        stepper.optimizer.zero_grad()
        assert stepper.last_report.skipped == math.isnan(factor)
        same = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert same == math.isnan(factor)


def test_two_that_clip() -> None:
    model, stepper = build(Case(clip=1.0))
    micro(model, stepper, Case(), 1, 0)
    with pytest.raises(TypeError, match="clip in the loop"):
        stepper.leave_step_to_optimizer(last=True)


def test_a_prepared_model_is_pickled_and_prepared_again() -> None:
    case = Case()
    model, _ = build(case)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    prepare(model, RoseAdamW(model.named_parameters()))
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    copy = pickle.loads(pickle.dumps(model))
    assert equal_weights(model, copy)


def test_a_complex_weight_is_refused() -> None:
    net = Net()
    net.layer.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))
    with pytest.raises(RefusedConfiguration, match=r"'layer\.weight' is complex"):
        prepare(net, rose(net))
    net.layer.spectrum, net.layer.weight = net.layer.weight, nn.Parameter(torch.zeros(2, 3))
    assert prepare(net, rose(net)).eligible == ["layer.weight"]


def test_checkpoints_that_draw_dropout_anew() -> None:
    """Wrong gradients under any strategy; without dropout there is nothing to draw."""
    for dropout, strategy in ((0.1, "second"), (0.1, "none"), (0.0, "second")):
        model = make_model(Case(strategy, dropout=dropout))
        model.layer[0] = checkpoint_wrapper(model.layer[0], preserve_rng_state=False)
        model.dropout.p = 0.1  # outside of what is checkpointed
        optimizer = RoseAdamW(model.named_parameters(), strategy=strategy)
        if dropout:
            with pytest.raises(RefusedConfiguration, match="preserve_rng_state=False"):
                prepare(model, optimizer)
        else:
            prepare(model, optimizer)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)


def rose(model: nn.Module, **options: Any) -> RoseAdamW:
    return RoseAdamW(model.named_parameters(), **options)


def test_prepare_refuses() -> None:
    """Arguments that do not fit together, by name."""
    net = Net()
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((net,), {}, TypeError, r"needs RoseAdamW\(model\.named_parameters\(\), \.\.\.\), got NoneType"),
        ((net, torch.optim.AdamW(net.parameters())), {}, TypeError, "got AdamW"),
        (("net", rose(net)), {}, TypeError, "model must be an nn.Module or a DeepSpeedEngine, got str"),
        ((nn.DataParallel(net), rose(net)), {}, TypeError, "DataParallel is not supported"),
        *(
            ((net, rose(net)), {"accumulation_steps": n}, ValueError, "accumulation_steps=.* must be an integer >= 1")
            for n in (0, -1, 1.0, True, None)
        ),
        *(((net, rose(net)), {"max_grad_norm": x}, ValueError, "max_grad_norm=.* >= 0") for x in (-1.0, math.nan)),
        ((net, rose(net, include=["blocks"])), {}, ValueError, "include pattern 'blocks' matches none"),
        ((net, rose(net, exclude=["weight"])), {}, ValueError, "removes every parameter"),
    ]
    for arguments, options, error, words in cases:
        with pytest.raises(error, match=words):
            prepare(*arguments, **options)


def test_a_parameter_missing_from_the_optimizer() -> None:
    """Its elements would be missing from the ranking: refused; frozen parameters do not count."""
    model = make_model(Case())
    some = [(name, p) for name, p in model.named_parameters() if "layer.1" not in name]
    with pytest.raises(RefusedConfiguration, match="hold 508 eligible elements but the model has 1016"):
        prepare(model, RoseAdamW(some))
    model.layer[1].requires_grad_(False)
    assert len(prepare(model, RoseAdamW(some)).eligible) == 4


def test_the_version_and_the_names_a_user_imports() -> None:
    assert rose_ds.__version__ == importlib.metadata.version("rose_ds")
    assert all(getattr(rose_ds, name) is not None for name in rose_ds.__all__)
    assert RoseConfig(**{name: getattr(RoseConfig(), name) for name in RoseConfig.field_names()}) == RoseConfig()


@pytest.mark.parametrize("stepped", [True, False])
def test_an_optimizer_that_nobody_steps_is_told_of(stepped: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A loop that leaves the step to the optimizer, and steps another one."""
    case = Case(clip=0.0)
    model, stepper = build(case)
    other = torch.optim.SGD(model.parameters(), lr=0.0)
    ids, labels = micro_batch(case, 1, 0)
    for _ in range(70):
        with rows(len(ids), slice(None)):
            stepper.backward(lambda: model(ids), lambda logits: F.cross_entropy(logits, labels))
        stepper.leave_step_to_optimizer(last=True)
        (stepper.optimizer if stepped else other).step()
        stepper.optimizer.zero_grad()
    told = [record.message for record in caplog.records if "not one optimizer.step()" in record.message]
    assert len(told) == (0 if stepped else 1)
    if told:
        assert told[0].startswith("65 last micro-batches")


@pytest.mark.parametrize("strategy", ["ensemble", "second", "random"])
def test_a_scalar_is_a_tensor(strategy: str) -> None:
    """A parameter without dimensions, masked as a whole."""

    class Scaled(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.full(shape, 1.5))
            self.dropout = nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.layer(self.dropout(x))

    settings: dict[str, Any] = {"strategy": strategy, "granularity": "tensor", "include": (".*",)}
    runs = []
    for shape in ((), (1,)):
        model = Scaled(*shape)
        stepper = prepare(model, RoseAdamW(model.named_parameters(), lr=0.1, **settings))
        for t in range(4):
            torch.manual_seed(t)
            x = torch.randn(8, 4)
            stepper.backward(lambda x=x, model=model: model(x), lambda z: F.cross_entropy(z, torch.arange(8) % 3))
            assert stepper.step().eligible == 3
        runs.append(stepper.gather_parameters())
    assert all(torch.equal(p.view(-1), runs[1][name].view(-1)) for name, p in runs[0].items())
