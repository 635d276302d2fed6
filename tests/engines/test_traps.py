"""What is silently wrong with passes, shifts and recomputation unless something is done about it: one test each.

Those that only more ranks or precisions show are rows of test_methods.py: the average under gathered copies
(smart-proximal on FSDP and ZeRO-3), the boundary of a micro-batch with several backward passes (freelb on ZeRO-2), the
sum in SMART's ascent (smart on 3 ranks), squares after the reduction (child-tuning), one graph at a time (FSDP1, bf16).
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_jobs
import zero_jobs
from plain_jobs import build, one_step
from reference import check_parity, reference
from spawn import run_ranks
from tiny import DROPOUT_SEED, GLOBAL_BATCH, Case, Tiny, micro_batch, rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from rose_ds import RefusedConfiguration, RoseAdamW, prepare
from rose_ds.objectives import FreeLB, Objective, RDrop, Smart, Task

ALL = slice(0, GLOBAL_BATCH)
SIZES: dict[str, int] = {
    **{"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "max_position_embeddings": 16,
}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("strategy", "objective"),
    [
        *(("none", o) for o in (Task(), RDrop(alpha=0.0), FreeLB(passes=1, init_mag=0.0))),
        *(("ensemble", o) for o in (Task(), RDrop(alpha=0.0))),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_loss_of_more_than_the_logits(strategy: str, objective: Objective) -> None:
    """A term made of hidden states keeps its gradient, though the objective works on logits that are cut off."""
    model, stepper = build(Case(strategy, clip=0.0, dropout=0.2, objective=objective))
    ids, labels = micro_batch(Case(), 1, 0)
    hidden: list[Tensor] = []
    model.layer[0].register_forward_hook(lambda module, args, out: hidden.append(out))

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + hidden[-1].square().mean()

    with rows(GLOBAL_BATCH, ALL):
        torch.manual_seed(0)
        stepper.backward(lambda: model(ids), loss)
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        torch.manual_seed(0)
        if objective.shifts:
            torch.randint(2**62, ())  # seeds the noise
        value = loss(model(ids))
        if objective.name == "r-drop":
            value = (value + loss(model(ids))) / 2
        value.backward()
    for name, mine, (_, p) in zip(range(len(got)), got, model.named_parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-5, atol=1e-7, msg=str(name))


@pytest.mark.fast
def test_dropout_is_the_same_in_all_of_freelbs_passes() -> None:
    """The start's noise is not drawn from the stream that a later pass replays."""
    model, stepper = build(Case("none", objective=FreeLB(passes=3, step_size=0.0, init_mag=0.0)))
    ids, labels = micro_batch(Case(), 1, 0)
    seen: list[Tensor] = []

    def forward() -> Tensor:
        seen.append(model(ids))
        return seen[-1]

    with rows(GLOBAL_BATCH, ALL):
        torch.manual_seed(0)
        stepper.backward(forward, lambda z: F.cross_entropy(z, labels))
        assert len(seen) == 3 and all(torch.equal(z, seen[0]) for z in seen)
        assert not torch.equal(model(ids), seen[0]), "dropout is on"


class Checkpointed(Tiny):
    """Recomputes everything, embeddings included."""

    reentrant = False

    def forward(self, ids: Tensor) -> Tensor:
        return checkpoint(super().forward, ids, use_reentrant=self.reentrant)


class Shared(Tiny):
    """Runs its embeddings for an encoder and for a decoder."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + super().forward(ids.flip(1))


class Turned(Tiny):
    """Embeds positions first, as XLNet."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.embeddings(ids.T).mean(0))
        for block in self.layer:
            x = block(x)
        return self.head(x)


class Nameless(Tiny):
    """Does not say which its embeddings are."""

    get_input_embeddings = None  # type: ignore[assignment]


@pytest.mark.fast
@pytest.mark.parametrize("objective", [Smart(), FreeLB()], ids=lambda o: o.name)
def test_shifts_that_would_be_lost(objective: Objective) -> None:
    """Embeddings that are recomputed without their shift, that run twice or turned, or that nobody can find."""
    for kind, words in (
        (Checkpointed, "run again inside the backward pass .activation checkpointing includes them"),
        (Shared, "ran the input embeddings 2 times"),
        (Turned, "as .length, batch. and not as .batch, length."),
        (Nameless, r"Nameless has no get_input_embeddings\(\)"),
    ):
        model = kind(Case())
        with pytest.raises(RefusedConfiguration, match=words):
            one_step(
                model, prepare(model, RoseAdamW(model.named_parameters(), strategy="none"), objective=objective), 1
            )
        one_step(model, prepare(model, RoseAdamW(model.named_parameters(), strategy="none")), 1)


@pytest.mark.fast
@pytest.mark.parametrize("strategy", ["first", "ensemble", "second", "none"])
@pytest.mark.parametrize("objective", ["task", "r-drop"])
def test_reentrant_checkpointing(strategy: str, objective: str) -> None:
    """It hides weights from a second gradient of the micro-batch: refused where there is one, by its name."""
    config = RobertaConfig(vocab_size=16, num_labels=3, **SIZES)
    refused = strategy in ("first", "ensemble") or objective == "r-drop"
    for reentrant in (True, False):
        model = RobertaForSequenceClassification(config).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = RoseAdamW(model.named_parameters(), strategy=strategy)
        if reentrant and refused:
            with pytest.raises(RefusedConfiguration, match=r'"use_reentrant": False'):
                prepare(model, optimizer, objective=objective)
        else:
            prepare(model, optimizer, objective=objective)


@pytest.mark.fast
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_a_shift_of_zero_changes_nothing(kind: str, side: str) -> None:
    """Positions and the token that is classified do not depend on whether embeddings are shifted (as they do where a
    model is given inputs_embeds)."""
    torch.manual_seed(0)
    model: Any
    if kind == "roberta":
        roberta = RobertaConfig(vocab_size=32, num_labels=3, **SIZES)
        model = RobertaForSequenceClassification(roberta)
    else:
        llama = LlamaConfig(vocab_size=32, num_labels=3, pad_token_id=1, **SIZES)
        model = LlamaForSequenceClassification(llama)
    ids = torch.randint(2, 32, (4, 7))
    for row, padding in enumerate((0, 1, 3, 4)):
        if padding:
            ids[row, slice(0, padding) if side == "left" else slice(-padding, None)] = 1
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    want = model.eval()(**inputs).logits
    objective = FreeLB(passes=2, step_size=0.0, init_mag=0.0)
    stepper = prepare(model, RoseAdamW(model.named_parameters(), strategy="none"), objective=objective)
    seen = []

    def forward() -> Tensor:
        seen.append(model(**inputs).logits)
        return seen[-1]

    with rows(4, slice(0, 4)):
        stepper.backward(forward, lambda z: F.cross_entropy(z, torch.tensor([0, 1, 2, 0])))
    assert len(seen) == 2 and all(torch.equal(z, want) for z in seen)


# --- an ascent that is not finite, on one of two ranks ---

ENGINES = ("ddp", "fsdp1-FULL_SHARD-orig", "fsdp2", "zero0", "zero1", "zero2", "zero3")
BROKEN = Case("none", steps=1, objective=Smart(weight=2.0, init_std=1e-2, radius=0.3))


def broken_ascent(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    """A step of SMART whose probe is NaN on the last rank."""
    warnings.filterwarnings("ignore")
    found = {}
    for engine in ENGINES:
        if engine.startswith("zero"):
            model, stepper = zero_jobs.start(zero_jobs.Job(BROKEN, int(engine[4])), world)
        else:
            model, stepper = torch_jobs.start(torch_jobs.Job(BROKEN, engine))
        ids, labels = micro_batch(BROKEN, 1, 0)
        share = len(ids) // world
        mine = slice(rank * share, (rank + 1) * share)

        calls = [0]  # the first pass is the clean one, the second the probe

        def forward(model: nn.Module = model, ids: Tensor = ids[mine], calls: list[int] = calls) -> Tensor:
            calls[0] += 1
            logits = model(ids)
            return logits * float("nan") if calls[0] == 2 and rank == world - 1 else logits

        torch.manual_seed(DROPOUT_SEED)
        with rows(len(ids), mine):
            stepper.backward(forward, lambda z, y=labels[mine]: F.cross_entropy(z, y))
            report = stepper.step()
        assert calls[0] >= 2 and not report.skipped
        found[engine] = {name: p.detach().clone() for name, p in stepper.gather_parameters().items()}
        if engine.startswith("zero"):
            model.destroy()
    return found


@pytest.fixture(scope="module")
def broken(extensions: object) -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(broken_ascent, 2, timeout=300)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_ascent_that_is_not_finite(engine: str, broken: Any) -> None:
    """Both ranks leave the regulariser out of the step, which is then the task's."""
    for rank in broken:
        check_parity(rank[engine], reference(Case("none", steps=1)))


# --- what changes, or fails, half-way ---


def half_way(rank: int, world: int) -> dict[str, list[str]]:
    """What the next backward() says after a weight was frozen, and after a loss that failed."""
    warnings.filterwarnings("ignore")
    found: dict[str, list[str]] = {}
    for engine in ENGINES:
        case = Case("first", steps=1)
        if engine.startswith("zero"):
            model, stepper = zero_jobs.start(zero_jobs.Job(case, int(engine[4])), world)
        else:
            model, stepper = torch_jobs.start(torch_jobs.Job(case, engine))
        ids, labels = micro_batch(case, 1, 0)
        share = len(ids) // world
        mine = slice(rank * share, (rank + 1) * share)

        def attempt(
            fail: bool, stepper: Any = stepper, model: Any = model, ids: Any = ids, labels: Any = labels
        ) -> str:
            def loss(z: Tensor) -> Tensor:
                if fail:
                    raise MemoryError("no memory for the loss")
                return F.cross_entropy(z, labels[mine])  # noqa: B023

            try:
                with rows(len(ids), mine):  # noqa: B023
                    stepper.backward(lambda: model(ids[mine]), loss)  # noqa: B023
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return "trained"

        frozen = next(p for p in model.parameters() if p.requires_grad)  # the user's, not what stands for it
        frozen.requires_grad_(False)
        said = [attempt(fail=False)]
        frozen.requires_grad_(True)
        said += [attempt(fail=True), attempt(fail=False)]
        found[engine] = said
        if engine.startswith("zero"):
            model.destroy()
    return found


@pytest.fixture(scope="module")
def changed(extensions: object) -> list[dict[str, list[str]]]:
    return run_ranks(half_way, 2, timeout=300)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_changes_or_fails_half_way(engine: str, changed: Any) -> None:
    """Refused, and not gone on with: gradients and states are laid out once, and may be half reduced."""
    for frozen, failed, after in (rank[engine] for rank in changed):
        assert frozen.startswith(
            "RefusedConfiguration: parameters, requires_grad or the optimizer's groups changed after prepare()"
        )
        assert failed == "MemoryError: no memory for the loss"
        name = engine.split("-")[0]
        assert after.startswith(
            "RuntimeError: an earlier backward() or step() failed (MemoryError: no memory for the loss)"
        )
        assert f"while the {name} engine held its gradients half-way" in after
