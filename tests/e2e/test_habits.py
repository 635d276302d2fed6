"""What people really do with a Trainer: right, to the last digit, or refused in words that name the way out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from habits import DRY, FIRST, assert_same, bert, rows, train, trainer
from spawn import run_ranks
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

import rose_ds.training.stepper as stepper_module
from rose_ds import RefusedConfiguration, RoseAdamW, RoseConfig, prepare, symmetric_kl
from rose_ds.training.trainer import RoseTrainer

# --- what compute_loss returns ---


class Returns(RoseTrainer):
    """A compute_loss() of the user's, which returns something else beside the loss."""

    form = staticmethod(lambda out: out)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        out = model(**inputs)
        loss = F.cross_entropy(out.logits, labels)
        return (loss, self.form(out)) if return_outputs else loss


def features(out: Any) -> Tensor:
    return out.logits.new_ones(len(out.logits), 7)


FORMS: dict[str, Any] = {
    "logits": lambda out: out.logits,
    "logits and features": lambda out: (out.logits, features(out)),
    "features and logits": lambda out: (features(out), out.logits),
    "loss and logits": lambda out: (out.logits.sum(), out.logits),
    "mapping": lambda out: {"hidden": features(out), "logits": out.logits},
    "hidden states after": lambda out: (out.logits, (features(out), features(out))),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found(form: str, tmp_path: Path) -> None:
    """Wherever they are, masks and weights are those of the model's own output."""
    cls = type("Form", (Returns,), {"form": staticmethod(FORMS[form])})
    assert_same(train(trainer(tmp_path, cls=cls, rose=FIRST)), train(trainer(tmp_path, cls=Returns, rose=FIRST)))


def test_logits_of_a_tuple(tmp_path: Path) -> None:
    """return_dict=False with label smoothing, where the loss is not the first of the outputs."""
    more = {"label_smoothing_factor": 0.1}
    want = train(trainer(tmp_path, bert(), more=more, rose=FIRST))
    assert_same(train(trainer(tmp_path, bert(return_dict=False), more=more, rose=FIRST)), want)


UNFIT: dict[str, Any] = {
    "two that fit": lambda out: (out.logits, 2 * out.logits),
    "none": lambda out: out.logits.mean(),
    "no batch": lambda out: out.logits[:2],
    "other outputs": lambda out: {"scores": out.logits},
}


@pytest.mark.parametrize("form", UNFIT)
def test_logits_that_are_not_clear(form: str, tmp_path: Path) -> None:
    cls = type("Form", (Returns,), {"form": staticmethod(UNFIT[form])})
    with pytest.raises(RefusedConfiguration, match="understood are: a mapping"):
        train(trainer(tmp_path, cls=cls, rose=FIRST))


class LossAlone(RoseTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs).loss


@pytest.mark.parametrize("strategy", ["none", "second"])
def test_what_needs_no_logits(strategy: Any, tmp_path: Path) -> None:
    rose = RoseConfig(strategy=strategy)
    assert_same(train(trainer(tmp_path, cls=LossAlone, rose=rose)), train(trainer(tmp_path, rose=rose)))
    with pytest.raises(RefusedConfiguration, match="none of the outputs"):
        train(trainer(tmp_path, cls=LossAlone, rose=FIRST))


class Detached(Returns):
    form = staticmethod(lambda out: out.logits.detach())


def test_logits_without_a_graph(tmp_path: Path) -> None:
    with pytest.raises(RefusedConfiguration, match="logits that are cut off from the graph"):
        train(trainer(tmp_path, cls=Detached, rose=FIRST))
    train(trainer(tmp_path, cls=Detached, rose=RoseConfig(strategy="second")))


def test_question_answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two distributions over positions: their divergences add up."""
    seen = compared(monkeypatch)
    data = [{**row, "start_positions": 1, "end_positions": 3} for row in rows()]
    for row in data:
        del row["labels"]
    model = bert(transformers.BertForQuestionAnswering)
    train(trainer(tmp_path, model, data, more={"max_steps": 1}, rose=FIRST))
    ((a, b, value),) = seen
    assert a.shape == (4, 2, 12)
    assert value.item() == pytest.approx((symmetric_kl(a[:, 0], b[:, 0]) + symmetric_kl(a[:, 1], b[:, 1])).item() / 2)


# --- what is compared ---


def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Every pair of logits that is compared, and what came out."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    real = stepper_module.Comparison.symmetric_kl

    def spy(self: Any, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        value = real(self, a, b, **kwargs)
        seen.append((a.detach(), b.detach(), value.detach()))
        return value

    monkeypatch.setattr(stepper_module.Comparison, "symmetric_kl", spy)
    return seen


def multi_hot(width: int) -> list[dict[str, Any]]:
    return [{**row, "labels": (torch.arange(width) % (i % 3 + 1) == 0).float()} for i, row in enumerate(rows())]


def test_multi_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each label is true or not: the divergence of four Bernoulli distributions, not of one softmax."""
    seen = compared(monkeypatch)
    model = bert(num_labels=4, problem_type="multi_label_classification")
    train(trainer(tmp_path, model, multi_hot(4), more={"max_steps": 1}, rose=FIRST))
    ((a, b, value),) = seen
    p, q = a.double().sigmoid(), b.double().sigmoid()
    assert value.item() == pytest.approx(((p - q) * (a - b)).sum(-1).mean().item(), rel=1e-3)
    assert value.item() != pytest.approx(symmetric_kl(a, b).item(), rel=0.05)


@pytest.mark.parametrize("width", [1, 2])
def test_regression(width: int, tmp_path: Path) -> None:
    model, data = bert(num_labels=width, problem_type="regression"), multi_hot(width)
    with pytest.raises(RefusedConfiguration, match="the model is a regression"):
        train(trainer(tmp_path, model, data, rose=FIRST))
    train(trainer(tmp_path, model, data, rose=RoseConfig(strategy="second")))


def test_labels_that_may_be_two_things(tmp_path: Path) -> None:
    """A loss of the user's over a number for each class: several labels, or probabilities?"""
    own = {"compute_loss_func": lambda out, labels, num_items_in_batch=None: F.mse_loss(out.logits.sigmoid(), labels)}
    with pytest.raises(RefusedConfiguration, match="set config.problem_type"):
        train(trainer(tmp_path, bert(num_labels=4), multi_hot(4), rose=FIRST, **own))
    model = bert(num_labels=4, problem_type="single_label_classification")
    train(trainer(tmp_path, model, multi_hot(4), rose=FIRST, **own))


def tokens(width: int) -> list[dict[str, Any]]:
    """The same sentences of four or twelve labelled tokens, padded to a width."""
    found = []
    for i, row in enumerate(rows()):
        n, ids = 12 if i % 4 == 0 else 4, torch.zeros(width, dtype=torch.long)
        ids[:n] = row["input_ids"][:n]
        mask = (torch.arange(width) < n).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids % 2, -100)})
    return found


class SentenceNoise(nn.Module):
    """Noise that does not depend on the width of a batch, as dropout's does."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, ids: Tensor) -> Tensor:
        out = self.embeddings(ids)
        return out + 0.02 * torch.randn(out.shape[0], 1, out.shape[2]) if self.training else out


def test_padding_is_no_prediction(tmp_path: Path) -> None:
    """Labelled tokens alone are compared: masks do not depend on the width that a batch is padded to."""
    found = []
    for width in (12, 40):
        model = bert(transformers.BertForTokenClassification, **DRY)
        embeddings = model.bert.embeddings
        embeddings.word_embeddings = SentenceNoise(embeddings.word_embeddings)
        more = {"max_steps": 1, "per_device_train_batch_size": 8}
        entries, _ = train(trainer(tmp_path, model, tokens(width), more=more, rose=FIRST))
        found.append(entries[0]["rose/tau_first"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_causal_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's logits predict the next one, whose label says whether they count."""
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_dropout=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    data = tokens(16)
    for row in data:
        row["labels"] = torch.where(row["labels"] == -100, -100, row["input_ids"])
    seen = compared(monkeypatch)
    rose = RoseConfig(strategy="first")
    more = {"max_steps": 1, "gradient_accumulation_steps": 2}
    batches: list[Tensor] = []
    made = trainer(tmp_path, transformers.LlamaForCausalLM(config), data, more=more, rose=rose)
    step = made.training_step

    def watch(model: Any, inputs: Any, count: Any = None) -> Tensor:
        batches.append(inputs["labels"])
        return step(model, inputs, count)

    made.training_step = watch
    train(made)
    assert len(seen) == len(batches) == 2
    for (a, b, value), mask in zip(seen, batches, strict=True):
        keep = mask[:, 1:] != -100
        rows_kept = symmetric_kl(a[:, :-1][keep], b[:, :-1][keep], reduction="sum")
        total = sum(int((m[:, 1:] != -100).sum()) for m in batches)
        assert value.item() == pytest.approx(rows_kept.item() / (total / 2), rel=1e-4)


@pytest.mark.parametrize("shifted", [True, False])
def test_positions(shifted: bool) -> None:
    from rose_ds.training.predictions import positions_of

    labels = torch.tensor([[-100, 5, 6, -100], [1, -100, -100, -100]])
    model = nn.Module()
    model.loss_type = "ForCausalLM" if shifted else "ForTokenClassification"  # type: ignore[assignment]
    want = [[1, 1, 0, 0], [0, 0, 0, 0]] if shifted else [[0, 1, 1, 0], [1, 0, 0, 0]]
    found = positions_of(labels, model)
    assert found is not None and found.long().tolist() == want
    assert positions_of(torch.tensor([0, 1]), model) is None


# --- accumulation ---


class MyBert(BertForSequenceClassification):
    """A subclass, whose name nobody knows."""


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    model = bert(**DRY)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"]))


def choices() -> list[dict[str, Any]]:
    return [{k: v if k == "labels" else torch.stack([v, v.flip(0)]) for k, v in row.items()} for row in rows()]


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits, labels)


def divided_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def whole_tokens() -> list[dict[str, Any]]:
    return [{**row, "labels": row["input_ids"] % 2} for row in rows()]


BIG: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "classifier": (lambda: bert(**DRY), rows, {}),
    "subclass": (lambda: bert(MyBert, **DRY), rows, {}),
    "LoRA": (lora, rows, {}),
    "tokens": (lambda: bert(transformers.BertForTokenClassification, **DRY), whole_tokens, {}),
    "multiple choice": (lambda: bert(transformers.BertForMultipleChoice, **DRY), choices, {}),
    "a loss that ignores the count": (lambda: bert(**DRY), rows, {"compute_loss_func": mean_loss}),
    "a loss that divides by it": (lambda: bert(**DRY), rows, {"compute_loss_func": divided_loss}),
    "label smoothing": (lambda: bert(**DRY), rows, {"more": {"label_smoothing_factor": 0.1}}),
}


@pytest.mark.parametrize("kind", BIG)
def test_accumulation_is_one_big_batch(kind: str, tmp_path: Path) -> None:
    """Whatever the model or the loss does with the number of items that Trainer counts."""
    make, data, extra = BIG[kind]
    norms = []
    for size, accumulation in ((8, 1), (2, 4)):
        more = {
            **extra.get("more", {}),
            **{"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation},
        }
        kwargs = {k: v for k, v in extra.items() if k != "more"}
        made = trainer(tmp_path, make(), data(), more=more, rose=RoseConfig(strategy="none"), **kwargs)
        norms.append([train(made)[0][0][key] for key in ("loss", "grad_norm")])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def on_two_ranks(rank: int, world: int, folder: str) -> list[tuple[str, float, float]]:
    """Loss and gradient norm of a step on all rows, by DDP."""
    found = []
    for kind in ("LoRA", "a loss that divides by it"):
        make, data, extra = BIG[kind]
        more = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        entry = train(trainer(Path(folder), make(), data(), more=more, rose=RoseConfig(strategy="none"), **extra))[0][0]
        found.append((kind, entry["loss"], entry["grad_norm"]))
    return found


def test_ranks_are_one_big_batch(tmp_path: Path) -> None:
    """Two ranks with two micro-batches of two rows: the count is of all of them."""
    for kind, loss, norm in run_ranks(on_two_ranks, 2, str(tmp_path), process_group=False, timeout=200)[0]:
        make, data, extra = BIG[kind]
        more = {"max_steps": 1, "per_device_train_batch_size": 8}
        made = trainer(tmp_path, make(), data(), more=more, rose=RoseConfig(strategy="none"), **extra)
        want = train(made)[0][0]
        assert (loss, norm) == pytest.approx((want["loss"], want["grad_norm"]), rel=1e-4), kind


# --- other optimizers ---


class Sgd:
    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Any:
        return torch.optim.SGD, {"lr": 0.5}


OTHERS: dict[str, tuple[dict[str, Any], tuple[type, ...], str]] = {
    "adafactor": ({"optim": "adafactor"}, (), "optim='adafactor' asks for another optimizer, or"),
    "optim_args": ({"optim_args": "a=1"}, (), "optim_args='a=1'"),
    "get_optimizer_cls_and_kwargs": ({}, (Sgd,), r"get_optimizer_cls_and_kwargs\(\) asks for another"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("strategy", ["none", "ensemble"])
def test_another_optimizer(kind: str, strategy: Any, tmp_path: Path) -> None:
    more, bases, message = OTHERS[kind]
    cls = type("Mine", (*bases, RoseTrainer), {})
    with pytest.raises(RefusedConfiguration, match=message):
        trainer(tmp_path, cls=cls, more=more, rose=RoseConfig(strategy=strategy))


def test_create_optimizer(tmp_path: Path) -> None:
    """Overridden: refused with what to make instead, and that works."""

    class Layerwise(RoseTrainer):
        made: Any = staticmethod(lambda named: torch.optim.AdamW([{"params": [p]} for _, p in named]))

        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = self.made(list(self.model.named_parameters()))
            return self.optimizer

    with pytest.raises(RefusedConfiguration, match=r"Layerwise.create_optimizer\(\) makes AdamW, which knows no masks"):
        train(trainer(tmp_path, cls=Layerwise, rose=FIRST))
    Layerwise.made = staticmethod(
        lambda named: RoseAdamW([{"params": [x], "lr": 1e-3} for x in named], strategy="first", keep_first=0.5)
    )
    entries, _ = train(trainer(tmp_path, cls=Layerwise, rose=FIRST))
    assert all(0.5 <= e["rose/kept_first"] < 0.51 for e in entries)


def test_a_wrapper_of_the_optimizer() -> None:
    class Lookahead:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    model = bert()
    with pytest.raises(RefusedConfiguration, match="Lookahead wraps RoseAdamW"):
        prepare(model, Lookahead(RoseAdamW(model.named_parameters())))  # type: ignore[arg-type]


# --- what is trained ---


class Frozen(TrainerCallback):
    """A layer that is trained from step 2 on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for p in model.bert.encoder.layer[0].parameters():
            p.requires_grad = state.global_step >= 2


def test_gradual_unfreezing(tmp_path: Path) -> None:
    """A layer that is unfrozen later is masked from then on."""
    made = trainer(tmp_path, more={"max_steps": 4}, rose=RoseConfig(strategy="first", keep_first=0.3))
    counts: list[int] = []
    moved: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.before = made.model.bert.encoder.layer[0].output.dense.weight.detach().clone()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            counts.append(made.last_report.eligible)
            after = made.model.bert.encoder.layer[0].output.dense.weight
            moved.append((after != self.before).float().mean().item())

    made.add_callback(Frozen())
    made.add_callback(Watch())
    made.train()
    assert counts[:2] == [counts[3] // 2] * 2 and counts[2] == counts[3]
    assert moved[:2] == [0.0, 0.0]
    assert all(0 < share < 0.4 for share in moved[2:])


@pytest.mark.parametrize("objective", [{"name": "smart", "proximal": 1.0}])
def test_unfreezing_what_an_average_is_kept_of(objective: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, more={"max_steps": 4}, rose=FIRST, objective=objective, callbacks=[Frozen()])
    with pytest.raises(RefusedConfiguration, match="requires_grad or the optimizer's groups changed"):
        made.train()


def test_a_parameter_group_added_later() -> None:
    model = bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    optimizer = RoseAdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], strategy="first")
    stepper = prepare(model, optimizer)
    one = copy.deepcopy(stepper.eligible)
    batch = {k: v[None] if isinstance(v, Tensor) else torch.tensor([v]) for k, v in rows()[0].items()}

    def step() -> Any:
        stepper.backward(lambda: model(**batch).logits, lambda z: F.cross_entropy(z, batch["labels"]))
        return stepper.step()

    step()
    layer = model.bert.encoder.layer[0].requires_grad_(True)
    named = [(f"bert.encoder.layer.0.{name}", p) for name, p in layer.named_parameters()]
    optimizer.add_param_group({"params": named})
    report = step()
    assert len(stepper.eligible) == 2 * len(one) and set(one) < set(stepper.eligible)
    assert report.eligible == sum(p.numel() for n, p in model.named_parameters() if n in stepper.eligible)


# --- failures ---


def test_a_failed_micro_batch_leaves_nothing() -> None:
    """Out of memory in a loss, caught: the next step's threshold is that of a run without that batch."""

    def run(fails: bool) -> list[float]:
        model = bert()
        model.train()
        stepper = prepare(model, RoseAdamW(model.named_parameters(), lr=1e-3, strategy="first"), accumulation_steps=2)
        data, found = rows(20), []
        for j in range(5):
            batch = {k: torch.stack([torch.as_tensor(r[k]) for r in data[4 * j : 4 * j + 4]]) for k in data[0]}
            labels = batch.pop("labels")
            torch.manual_seed(j)
            if j == 1 and not fails:
                continue

            def forward(batch: Any = batch) -> Tensor:
                return model(**batch).logits

            def loss(z: Tensor, labels: Tensor = labels, j: int = j) -> Tensor:
                value = F.cross_entropy(z, labels)
                if j == 1:
                    z.register_hook(fail)
                return value

            try:
                stepper.backward(forward, loss)
            except torch.OutOfMemoryError:
                assert all(p.grad is None for p in model.parameters())
                continue
            report = stepper.step()
            if report is not None:
                found.append(report.tau_first)
        return found

    def fail(grad: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    # the step that fails starts over: micro-batches 2 and 3 make it, where 0 and 2 do without the failure
    with_failure, without = run(fails=True), run(fails=False)
    assert len(with_failure) == 1 and len(without) == 2
    assert with_failure[0] == pytest.approx(run_alone(), rel=1e-6)


def run_alone() -> float:
    """Micro-batches 2 and 3 on a model that nothing has failed on."""
    model = bert()
    model.train()
    stepper = prepare(model, RoseAdamW(model.named_parameters(), lr=1e-3, strategy="first"), accumulation_steps=2)
    data, report = rows(20), None
    for j in (2, 3):
        batch = {k: torch.stack([torch.as_tensor(r[k]) for r in data[4 * j : 4 * j + 4]]) for k in data[0]}
        labels = batch.pop("labels")
        torch.manual_seed(j)
        stepper.backward(lambda b=batch: model(**b).logits, lambda z, y=labels: F.cross_entropy(z, y))  # type: ignore[misc]
        report = stepper.step()
    assert report is not None and report.tau_first is not None
    return report.tau_first


def test_resumes_with_the_batch_size_it_found(tmp_path: Path) -> None:
    """auto_find_batch_size: the checkpoint of a smaller batch than was asked for is gone on with."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        if len(labels) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return F.cross_entropy(outputs.logits, labels)

    more = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2}
    first, second = (
        trainer(tmp_path, more={**more, "max_steps": steps}, rose=RoseConfig(), compute_loss_func=loss)
        for steps in (2, 4)
    )
    train(first)
    second.train(resume_from_checkpoint=True)
    assert (second.state.global_step, second.state.train_batch_size) == (4, 6)
    assert [e["step"] for e in second.state.log_history if "loss" in e] == [1, 2, 3, 4]


def test_two_last_micro_batches(tmp_path: Path) -> None:
    """A training_step() that trains on its batch twice: one mask, of both gradients."""

    class Twice(RoseTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            super().training_step(*args, **kwargs)
            return super().training_step(*args, **kwargs)

    made = trainer(tmp_path, cls=Twice, rose=FIRST)
    entries, _ = train(made)
    assert [e["rose/kept_first"] for e in entries] == pytest.approx([0.5, 0.5], abs=0.01)
    assert made.last_report.step == 2


# --- zeros that should not be ---


class Hidden(nn.Module):
    """Its blocks' gradient does not reach the logits' graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        with torch.no_grad():
            state = self.model.bert(input_ids, attention_mask).pooler_output
        logits = self.model.classifier(self.model.dropout(state))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_risk_that_is_zero_everywhere(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="zero for every eligible parameter"):
        train(trainer(tmp_path, Hidden(bert()), rose=FIRST))


def test_zeros_are_counted(tmp_path: Path) -> None:
    """An unused layer's risks are exactly zero; the log says how many there are."""
    model = bert()
    model.bert.encoder.layer.append(copy.deepcopy(model.bert.encoder.layer[0]))
    spare = model.bert.encoder.layer[2]
    spare.forward = lambda hidden, *args, **kwargs: hidden
    entries, _ = train(trainer(tmp_path, model, rose=FIRST))
    assert entries[0]["rose/zeros_first"] == pytest.approx(1 / 3, abs=1e-3)


def test_nothing_is_masked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """More equal risks than were to be kept: said once."""
    model = bert()
    for layer in model.bert.encoder.layer:
        layer.forward = lambda hidden, *args, **kwargs: hidden  # no eligible weight has a gradient
    train(trainer(tmp_path, model, more={"max_steps": 3}, rose=RoseConfig(strategy="second")))
    assert [r.message for r in caplog.records if "kept every parameter" in r.message] != []
    assert sum("kept every parameter" in r.message for r in caplog.records) == 1


# --- noise of other kinds ---


def test_stochastic_depth_and_neftune(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=2
    )
    swin = transformers.SwinForImageClassification(config)
    images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
    entries, _ = train(trainer(tmp_path, swin, images, rose=FIRST))
    assert all(0.5 <= e["rose/kept_first"] < 0.51 for e in entries)
    entries, _ = train(trainer(tmp_path, bert(**DRY), more={"neftune_noise_alpha": 5.0}, rose=FIRST))
    assert all(0.5 <= e["rose/kept_first"] < 0.51 for e in entries)


def test_no_dropout_names_the_models_own_settings(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(
        vocab_size=100, dim=32, n_layers=2, n_heads=2, hidden_dim=64, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0, qa_dropout=0.0,
    )  # fmt: skip
    model = transformers.DistilBertForSequenceClassification(config)
    with pytest.raises(RefusedConfiguration, match="set .*seq_classif_dropout.* in its config above 0"):
        trainer(tmp_path, model, rose=FIRST)


class Normed(nn.Module):
    """A classifier of vectors with BatchNorm and dropout."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 3)])
        self.norm = nn.BatchNorm1d(8, momentum=momentum)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer[1](self.dropout(self.norm(self.layer[0](x)).relu()))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("strategy", ["none", "first"])
@pytest.mark.parametrize("objective", ["task", "r-drop"])
def test_batchnorm_moves_once(momentum: float | None, strategy: Any, objective: str) -> None:
    """Running statistics are those of one pass a micro-batch, as without ROSE."""
    model, plain = Normed(momentum), Normed(momentum)
    optimizer = RoseAdamW(model.named_parameters(), strategy=strategy, include=(r"layer\.",))
    stepper = prepare(model, optimizer, objective=objective)
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    stepper.backward(lambda: model(x), lambda z: F.cross_entropy(z, y))
    plain(x)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(plain.named_buffers())[name]), name
    stepper.step()


# --- the rest ---


def test_the_users_own_bar_stays(tmp_path: Path) -> None:
    class Mine(ProgressCallback):
        pass

    made = trainer(tmp_path, more={"disable_tqdm": False}, callbacks=[Mine], rose=FIRST)
    kinds = [type(c).__name__ for c in made.callback_handler.callbacks]
    assert "Mine" in kinds and "RoseProgressCallback" in kinds and "ProgressCallback" not in kinds


def test_settings_as_a_mapping(tmp_path: Path) -> None:
    assert trainer(tmp_path, rose={}).rose == RoseConfig()
    assert trainer(tmp_path, rose={"strategy": "first"}).rose == RoseConfig(strategy="first")
    with pytest.raises(TypeError, match="rose= must be a RoseConfig or a mapping"):
        trainer(tmp_path, rose="first")


def test_fp16_autocast_without_a_scaled_loss() -> None:
    model = bert()
    stepper = prepare(model, RoseAdamW(model.named_parameters(), strategy="first"))
    batch = {k: v[None] for k, v in rows()[0].items() if isinstance(v, Tensor)}

    def forward(dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(**batch).logits

    with pytest.raises(RefusedConfiguration, match="fp16 .* without a scaled loss"):
        stepper.backward(lambda: forward(torch.float16), lambda z: z.sum())
    stepper.backward(lambda: forward(torch.bfloat16), lambda z: F.cross_entropy(z.float(), torch.tensor([0])))


def test_several_devices() -> None:
    model = bert()
    model.bert.encoder.layer[1].to("meta")
    with pytest.raises(RefusedConfiguration, match=r"several devices of one process \(cpu, meta"):
        prepare(model, RoseAdamW(model.named_parameters(), strategy="second"))


def test_compiled_with_a_warm_up(tmp_path: Path) -> None:
    """Steps without a second gradient come first, so what is compiled must not count on one backward pass."""
    model = nn.Sequential()
    model.layer = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 3)])  # type: ignore[assignment]
    model.dropout = nn.Dropout(0.3)  # type: ignore[assignment]
    model.forward = lambda x: model.layer[1](model.dropout(model.layer[0](x).relu()))  # type: ignore[method-assign]
    compiled: Any = torch.compile(model)
    optimizer = RoseAdamW(model.named_parameters(), strategy="first", mask_warmup_steps=1)
    stepper = prepare(compiled, optimizer)
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    for step in range(2):
        stepper.backward(lambda: compiled(x), lambda z: F.cross_entropy(z, y))
        report = stepper.step()
        assert report is not None and (report.tau_first is not None) == (step == 1)


def test_plain_trainer_scales_some_losses_twice(tmp_path: Path) -> None:
    """What the rows of accumulation mend: transformers' own loop gives LoRA four times the gradient."""
    norms = []
    for size, accumulation in ((8, 1), (2, 4)):
        more = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        norms.append(train(trainer(tmp_path, lora(), cls=Trainer, more=more))[0][0]["grad_norm"])
    assert norms[1] == pytest.approx(4 * norms[0], rel=1e-3)
