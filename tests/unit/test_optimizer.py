"""RoseAdamW as a torch optimizer: AdamW's bits without masks (invariant 5), its states, groups and refusals."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rose_ds import RoseAdamW, RoseConfig
from rose_ds.core.layout import Block
from rose_ds.optimizer import Plan, Slice

pytestmark = pytest.mark.fast

GROUPS = [
    {"lr": 0.03, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.0},
]


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def groups_of(module: nn.Module, *, named: bool) -> list[dict[str, Any]]:
    pairs = list(module.named_parameters())
    return [
        {"params": part if named else [p for _, p in part], **group}
        for part, group in zip((pairs[:3], pairs[3:]), GROUPS, strict=True)
    ]


def set_grads(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def parameters_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


#: torch's: its default on this device, and each by name
KERNELS: list[dict[str, Any]] = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda opt: None,
    "linear": lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=6),
    "cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, [0.1, 0.2], total_steps=8, cycle_momentum=True),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_none_is_adamw(kernel: dict[str, Any], named: bool, scheduler: str) -> None:
    """Bit for bit at every step: weights and states, with two groups and a schedule of lr (and of beta1)."""
    ours, theirs = model(), model()
    rose = RoseAdamW(groups_of(ours, named=named), strategy="none", **kernel)
    adam = torch.optim.AdamW(groups_of(theirs, named=False), **kernel)
    schedules = [SCHEDULERS[scheduler](opt) for opt in (rose, adam)]
    for step in range(1, 8):
        set_grads(ours, step)
        set_grads(theirs, step)
        if step == 4:  # a step without a gradient for one parameter
            next(ours.parameters()).grad = next(theirs.parameters()).grad = None
        rose.step()
        adam.step()
        assert parameters_equal(ours, theirs)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert set(rose.state[p]) == {"step", "exp_avg", "exp_avg_sq"} == set(adam.state[q])
            assert all(torch.equal(rose.state[p][name], adam.state[q][name]) for name in adam.state[q])
        for schedule in schedules:
            if schedule is not None:
                schedule.step()
    assert rose.steps_taken() == 7


@pytest.mark.parametrize("theirs", KERNELS[1:], ids=str)
@pytest.mark.parametrize("ours", KERNELS, ids=str)
def test_none_is_within_an_ulp_of_any_adamw(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """A step from the same state, whichever of torch's three kernels either takes."""
    sizes, generator = (5, 64, 4099), torch.Generator().manual_seed(0)
    start = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(4)]
    found = []
    for make in (
        lambda pairs: RoseAdamW(pairs, strategy="none", **ours),
        lambda pairs: torch.optim.AdamW([p for _, p in pairs], **theirs),
    ):
        params = [nn.Parameter(p.clone()) for p in start[0]]
        opt: Any = make([(str(i), p) for i, p in enumerate(params)])
        for p, g, m, v in zip(params, *start[1:], strict=True):
            p.grad = g.clone()
            opt.state[p] = {"step": torch.tensor(6.0), "exp_avg": m.clone(), "exp_avg_sq": v.square()}
        opt.step()
        found.append(torch.cat([p.detach() for p in params]))
    ulp = torch.nextafter(found[1].abs(), torch.tensor(torch.inf)) - found[1].abs()
    assert ((found[0] - found[1]).abs() <= ulp).all()


def test_groups_keep_their_own_settings() -> None:
    """Also betas from JSON, and lr as a tensor."""
    module = model()
    pairs = list(module.named_parameters())
    rose = RoseAdamW(
        [{"params": pairs[:2], "betas": (0.5, 0.6)}, {"params": pairs[2:], "lr": 0.5, "eps": 1e-3}],
        lr=torch.tensor(0.25),
        betas=[0.8, 0.9],  # type: ignore[arg-type]
        weight_decay=0.3,
        strategy="none",
    )
    first, second = rose.param_groups
    assert first["betas"] == (0.5, 0.6) and second["betas"] == (0.8, 0.9)
    assert (float(first["lr"]), second["lr"]) == (0.25, 0.5)
    assert (first["eps"], second["eps"]) == (1e-8, 1e-3)
    assert first["weight_decay"] == second["weight_decay"] == 0.3
    assert first["param_names"] == [name for name, _ in pairs[:2]]


def test_rose_settings_are_flat_keywords() -> None:
    rose = RoseAdamW(model().parameters(), strategy="first", keep_first=0.3, include=["0.weight"], gamma=1)
    assert rose.config == RoseConfig(strategy="first", keep_first=0.3, include=("0.weight",), gamma=1)


def test_closure() -> None:
    """Runs with gradients enabled and its value is returned."""
    module = model()
    rose = RoseAdamW(module.named_parameters(), strategy="none")

    def closure() -> Tensor:
        rose.zero_grad()
        loss = module(torch.ones(2, 7)).square().sum()
        loss.backward()
        return loss

    before = copy.deepcopy(module)
    assert rose.step(closure) > 0
    assert not parameters_equal(module, before)


REFUSED = [
    ({"amsgrad": True}, ValueError, "does not support amsgrad: .*Algorithm 1"),
    ({"maximize": True}, ValueError, "does not support maximize: negate the loss"),
    ({"capturable": True}, ValueError, "does not support capturable"),
    ({"differentiable": True}, ValueError, "does not support differentiable"),
    ({"fused": True, "foreach": True}, ValueError, "foreach and fused are two kernels"),
    ({"fused": 1}, TypeError, "fused=1 must be true, false or null"),
    ({"keep": 0.5}, ValueError, r"unknown ROSE setting\(s\) \['keep'\]; known: \['strategy'.*'risk_every'\]"),
    ({"keep_first": 2}, ValueError, "keep_first=2"),
    ({"lr": -1.0}, ValueError, r"lr=-1\.0 must be >= 0"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas=\(0\.9, 1\.0\) must be two numbers in \[0, 1\)"),
    ({"betas": (0.9,)}, ValueError, "betas="),
    ({"betas": (-0.1, 0.9)}, ValueError, "betas="),
    ({"eps": -1e-8}, ValueError, "eps="),
    ({"weight_decay": -0.1}, ValueError, "weight_decay="),
]


@pytest.mark.parametrize(("options", "error", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RoseAdamW(model().parameters(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
        {"eps": -1.0},
        {"weight_decay": -1.0},
        {"keep_first": 0.3},
        {"amsgrad": True},
    ],
    ids=str,
)
def test_refused_in_a_group(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RoseAdamW([{"params": list(model().parameters()), **options}])
    optimizer = RoseAdamW(model().parameters())
    with pytest.raises(ValueError, match=next(iter(options))):
        optimizer.add_param_group({"params": list(model().parameters()), **options})
    assert len(optimizer.param_groups) == 1


def test_a_state_of_another_rule_is_refused() -> None:
    module = model()
    theirs = torch.optim.AdamW(module.parameters(), maximize=True)
    ours = RoseAdamW(module.parameters())
    with pytest.raises(ValueError, match="does not support maximize"):
        ours.load_state_dict(theirs.state_dict())


def test_settings_that_mean_nothing_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    RoseAdamW(model().parameters(), strategy="second", keep_first=0.3, keep_second=0.3, gamma=0.5)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "keep_first=0.3 means nothing to strategy='second'"
    ]
    caplog.clear()
    RoseAdamW(model().parameters(), strategy="child-tuning")
    RoseAdamW(model().parameters(), strategy="none", keep_first=0.3)  # tried beside another
    assert not caplog.records


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "differentiable", "fused"])
def test_an_option_at_its_default_is_fine(option: str) -> None:
    """What Hugging Face passes along: fused=False and the like."""
    RoseAdamW(model().parameters(), **{option: False})


def test_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    rose = RoseAdamW(embedding.named_parameters(), strategy="none")
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients: use Embedding\(sparse=False\)"):
        rose.step()


# --- steps without a plan ---


@pytest.mark.parametrize("strategy", ["first", "second", "ensemble"])
def test_a_step_without_masks_raises(strategy: str) -> None:
    """Training around the stepper would silently be AdamW."""
    module = model()
    rose = RoseAdamW(module.named_parameters(), strategy=strategy, include=["weight"])
    set_grads(module, 1)
    before = copy.deepcopy(module)
    with pytest.raises(RuntimeError, match=r"no masks for this step: train through.*rose_ds\.prepare"):
        rose.step()
    assert parameters_equal(module, before) and rose.steps_taken() == 0


def test_a_step_with_lr_0_creates_state() -> None:
    """Checkpoint libraries take one, with zero gradients, to create the state before they load it."""
    module = model()
    rose = RoseAdamW(module.named_parameters(), lr=0.0)
    before = copy.deepcopy(module)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    rose.step()
    assert parameters_equal(module, before)
    assert all(set(rose.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in module.parameters())
    assert all(not rose.state[p]["exp_avg"].any() for p in module.parameters())


def test_a_plan_to_skip_changes_nothing() -> None:
    module = model()
    rose = RoseAdamW(module.named_parameters(), strategy="none")
    set_grads(module, 1)
    rose.plan = Plan(skip=True)
    before = copy.deepcopy(module)
    rose.step()
    assert parameters_equal(module, before) and not rose.state


# --- plans over slices ---


def test_masks_reach_their_slices_only() -> None:
    """A flat partition with three named pieces: masked, tensor-masked and unmasked elements in between keep apart."""
    flat, twin = (nn.Parameter(torch.arange(1.0, 13.0)) for _ in range(2))
    rose = RoseAdamW([flat], lr=0.1, strategy="ensemble", gamma=0.25)
    adam = torch.optim.AdamW([twin], lr=0.1)
    rose.attach(
        [Slice("b", 1, flat, 8, 2, Block.flat(2, 0, 2)), Slice("a", 0, flat, 2, 3, Block.flat(3, 0, 3))]
    )  # not in the order they lie in
    codes = [torch.tensor([0, 3], dtype=torch.uint8), torch.tensor([0, 3, 1], dtype=torch.uint8)]
    flat.grad, twin.grad = torch.ones(12), torch.ones(12)
    rose.plan = Plan(codes, values=(0.0, 0.25, 0.75, 1.0))
    rose.step()
    adam.step()
    mask = torch.ones(12)
    mask[2], mask[4], mask[8] = 0.0, 0.25, 0.0
    assert torch.equal(flat.detach() == torch.arange(1.0, 13.0), mask == 0)
    assert torch.equal(rose.state[flat]["exp_avg"] == 0, mask == 0)
    torch.testing.assert_close(flat[mask == 1], twin[mask == 1], rtol=1e-6, atol=0)
    torch.testing.assert_close(rose.state[flat]["exp_avg"][4].item(), 0.25 * adam.state[twin]["exp_avg"][4].item())


@pytest.mark.parametrize("rule", ["robust", "gradient", "update"])
@pytest.mark.parametrize("batch", [1, 3, 4, 1000])
def test_the_size_of_a_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch, batch: int, rule: Any) -> None:
    """Masked elements are updated a bounded number at a time."""
    results = []
    for size in (batch, 1 << 24):
        monkeypatch.setattr("rose_ds.core.update._BATCH", size)
        p = nn.Parameter(torch.linspace(-1, 1, 10))
        rose = RoseAdamW([p], lr=0.1, strategy="ensemble")
        rose.attach([Slice("p", 0, p, 0, 10, Block.flat(10, 0, 10))])
        for step in range(3):
            p.grad = torch.linspace(1, 2, 10) * (step + 1)
            codes = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 0, 3], dtype=torch.uint8)
            rose.plan = Plan([codes], values=(0.0, 0.5, 0.5, 1.0), rule=rule)
            rose.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)


# --- copies ---


def through_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)  # weights_only: nothing but tensors and numbers inside


def test_state_dict_continues_bitwise() -> None:
    straight = model()
    rose = RoseAdamW(groups_of(straight, named=True), strategy="none")
    for step in range(1, 4):
        set_grads(straight, step)
        rose.step()
    resumed = model(seed=9)
    resumed.load_state_dict(through_file(straight.state_dict()))
    again = RoseAdamW(groups_of(resumed, named=True), strategy="none", lr=7.0)
    again.load_state_dict(through_file(rose.state_dict()))
    assert again.steps_taken() == 3
    for step in range(4, 7):
        for module, opt in ((straight, rose), (resumed, again)):
            set_grads(module, step)
            opt.step()
    assert parameters_equal(straight, resumed)
    assert rose.state_dict()["param_groups"] == again.state_dict()["param_groups"]


def test_a_state_dict_is_interchangeable_with_adamw() -> None:
    """Fine-tuning may start from AdamW's state, and go back to it."""
    ours, theirs = model(), model()
    adam = torch.optim.AdamW(groups_of(theirs, named=False))
    set_grads(theirs, 1)
    adam.step()
    rose = RoseAdamW(groups_of(ours, named=False), strategy="none")
    ours.load_state_dict(theirs.state_dict())
    rose.load_state_dict(through_file(adam.state_dict()))
    for module, opt in ((ours, rose), (theirs, adam)):
        set_grads(module, 2)
        opt.step()
    assert parameters_equal(ours, theirs)
    torch.optim.AdamW(groups_of(model(), named=False)).load_state_dict(rose.state_dict())


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_independent_and_equal(copy_of: Callable[[Any], Any]) -> None:
    module = model()
    rose = RoseAdamW(module.named_parameters(), strategy="none", keep_first=0.25)
    set_grads(module, 1)
    rose.step()
    twin, twin_rose = copy_of((module, rose))
    assert twin_rose.config == rose.config
    for m, opt in ((module, rose), (twin, twin_rose)):
        set_grads(m, 2)
        opt.step()
    assert parameters_equal(module, twin)
