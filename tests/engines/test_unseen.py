"""What the plain engine does not see in a gradient or in logits unless it looks: one test each."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_jobs import build, one_step
from tiny import Case, micro_batch, rows
from torch import Tensor, nn

from rose_ds import RefusedConfiguration, RoseAdamW, prepare
from rose_ds.objectives import RDrop, Smart
from rose_ds.objectives.chunked import ChunkedSymmetricKl
from rose_ds.objectives.divergence import symmetric_kl
from rose_ds.training import stepper as stepper_module

pytestmark = pytest.mark.fast


# --- gradients and logits that are not finite ---


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_kept_apart_that_is_not_finite(value: float) -> None:
    """R-Drop's under a mask of the task's gradient, which is what is left of both: in fp16 it can overflow alone."""
    model, stepper = build(Case("second", objective=RDrop()))
    one_step(model, stepper, 1)
    before = [p.detach().clone() for p in model.parameters()]
    take = stepper.engine.take_risk_grads

    def taken() -> Any:
        grads = take()
        grads[0][0] = value
        return grads

    stepper.engine.take_risk_grads = taken
    assert one_step(model, stepper, 2).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    stepper.engine.take_risk_grads = take
    assert not one_step(model, stepper, 3).skipped


@pytest.mark.parametrize("chunked", [False, True])
def test_classes_that_both_passes_rule_out(chunked: bool) -> None:
    """Their logits are -inf; they have no part in the divergence, which was NaN, and get no gradient."""
    a, b = (torch.randn(4, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    a[:, 2], b[:, 2] = -torch.inf, -torch.inf
    kept = [0, 1, 3, 4]

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = ChunkedSymmetricKl.apply(x, y) if chunked else symmetric_kl(x, y, reduction="sum")
        value.backward()
        assert x.grad is not None
        return value.detach(), x.grad

    value, grad = both(a, b)
    without, its_grad = both(a[:, kept], b[:, kept])
    torch.testing.assert_close(value, without)
    torch.testing.assert_close(grad[:, kept], its_grad)
    assert not grad[:, 2].any()


def test_a_run_that_only_skips_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepper_module, "_SKIPPED_IN_A_ROW", 3)
    model, stepper = build(Case("second"))
    for t in (1, 2):
        assert one_step(model, stepper, t, loss=lambda z: z.sum() * torch.inf).skipped
    assert not one_step(model, stepper, 3).skipped
    for t in (4, 5):
        one_step(model, stepper, t, loss=lambda z: z.sum() * torch.inf)
    with pytest.raises(RuntimeError, match="3 steps in a row were skipped, since the gradient was not finite"):
        one_step(model, stepper, 6, loss=lambda z: z.sum() * torch.inf)


# --- kernels that write where autograd does not look ---


def test_a_loss_that_writes_gradients_over_the_logits() -> None:
    """As a kernel does that counts no version up: the divergence would be of gradients."""

    def loss(logits: Tensor) -> Tensor:
        value = logits.logsumexp(-1).mean()
        logits.detach().numpy()[:] = 0.5
        return value

    model, stepper = build(Case("first", objective=RDrop()))
    with pytest.raises(RuntimeError, match="changed the logits in place"):
        one_step(model, stepper, 1, loss=loss)
    model, stepper = build(Case("none"))
    one_step(model, stepper, 1, loss=loss)  # which compares nothing


@pytest.mark.parametrize("by", ["class", "method"])
def test_layers_that_overwrite_what_they_kept(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = types.ModuleType("liger_kernel.transformers.swiglu")
    monkeypatch.setitem(sys.modules, source.__name__, source)
    exec("def forward(self, x):\n    return x", vars(source))
    model, _ = build(Case("none"))
    if by == "class":
        gated = type(
            "LigerSwiGLUMLP", (nn.Module,), {"forward": vars(source)["forward"], "__module__": source.__name__}
        )
        model.gated = gated()
    else:
        model.layer[0].forward = types.MethodType(vars(source)["forward"], model.layer[0])
    for strategy, objective in (("first", "task"), ("none", "r-drop"), ("second", Smart())):
        with pytest.raises(RefusedConfiguration, match=r"liger_kernel\.transformers\.swiglu.*swiglu=False"):
            prepare(model, RoseAdamW(model.named_parameters(), strategy=strategy), objective=objective)
    prepare(model, RoseAdamW(model.named_parameters(), strategy="second"))


def test_a_replayed_pass_is_compared_beside_masked_classes() -> None:
    """The size of a class that is ruled out is no measure of how far others may be from what they were."""
    model, stepper = build(Case("first"))
    stepper.engine.retains_graphs = False  # as on FSDP1: the first pass runs again
    calls = [0]
    ids, labels = micro_batch(Case(), 1, 0)

    def forward() -> Tensor:
        calls[0] += 1
        mask = torch.zeros(3)
        mask[2] = -torch.inf
        logits: Tensor = model(ids) + mask + (calls[0] == 3)
        return logits

    with rows(len(ids), slice(0, len(ids))), pytest.raises(RuntimeError, match="a replayed forward pass gave other"):
        stepper.backward(forward, lambda z: F.cross_entropy(z, labels.clamp_max(1)))


# --- fp16 without a loss scale ---


class Adapted(nn.Module):
    """A frozen layer with a low-rank one beside it, as adapters are."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4).requires_grad_(False)
        self.a, self.b, self.drop = nn.Linear(4, 2), nn.Linear(2, 4), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.b(self.a(self.drop(x)))
        return out


def encoder() -> nn.Module:
    """Its first linear layer is run by the attention, without being called."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1, enable_nested_tensor=False)


@pytest.mark.parametrize("make", [Adapted, encoder])
def test_fp16_in_any_layer(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("layer", nn.ModuleList([make()]))
    head = nn.Linear(4, 3)

    def forward() -> Tensor:
        logits: Tensor = head(model.layer[0](x))
        return logits.float()

    whole = nn.ModuleList([model, head])
    named = [(name, p) for name, p in whole.named_parameters() if p.requires_grad]
    x, y = torch.randn(8, 2, 4), torch.randint(3, (8, 2))

    def step(stepper: Any) -> Any:
        stepper.backward(forward, lambda z: F.cross_entropy(z.flatten(0, 1), y.flatten()))
        return stepper.step()

    stepper = prepare(whole, RoseAdamW(named, strategy="second"))
    with torch.autocast("cpu", torch.float16), pytest.raises(RefusedConfiguration, match="runs in fp16"):
        step(stepper)
    stepper = prepare(whole, RoseAdamW(named, strategy="second"))
    assert not step(stepper).skipped
    assert not any(m._forward_hooks for m in whole.modules())  # nothing is left on a model that has been looked at


# --- stochastic depth ---


class DropPath(nn.Module):
    """Leaves its branch out of some rows."""

    def forward(self, x: Tensor) -> Tensor:
        kept = (torch.rand(len(x), 1) >= 0.05) if self.training else torch.ones(len(x), 1)
        return x * kept / 0.95


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), DropPath()) for _ in range(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layer:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


def test_stochastic_depth_alone_with_few_rows() -> None:
    """Of two rows, two thirds of all passes are equal to the next; the run goes on."""
    torch.manual_seed(0)
    model = Deep()
    stepper = prepare(model, RoseAdamW(model.named_parameters(), lr=1e-4, strategy="first"))
    equal = 0
    for _ in range(300):
        x, y = torch.randn(2, 4), torch.randint(3, (2,))
        stepper.backward(lambda: model(x), lambda z: F.cross_entropy(z, y))  # noqa: B023
        equal += stepper.step().zeros_first == stepper.engine.layout.element_count
    assert 50 < equal < 300
    model.eval()
    with pytest.raises(RuntimeError, match="identical logits"):
        stepper.backward(lambda: model(x), lambda z: F.cross_entropy(z, y))


# --- steps that nobody planned ---


def test_an_objective_of_one_stepper_is_not_the_next_ones() -> None:
    model, first = build(Case("none", objective=RDrop()))
    assert first.optimizer.trained_objective == RDrop()
    assert prepare(model, first.optimizer).objective.name == "task"


def test_a_loop_that_leaves_out_the_objective() -> None:
    """With masks that is an error already; without, it would train on the loss alone."""
    model, stepper = build(Case("none", objective=RDrop()))
    one_step(model, stepper, 1)
    sum(p.sum() for p in model.parameters()).backward()
    with pytest.raises(RuntimeError, match="not the objective of this step"):
        stepper.optimizer.step()
