"""What Trainer's own code, its searches and its subclasses do to a RoseTrainer."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import logging
import os
import signal
import sys
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from habits import Rounds, Seeing, arguments, assert_same, bert, numbered, rows, train, trainer
from spawn import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertForSequenceClassification, Trainer, TrainerCallback

from rose_ds import RefusedConfiguration, RoseAdamW, RoseConfig, prepare
from rose_ds import run as runner
from rose_ds.cli.arguments import RunArguments
from rose_ds.engines.batch import PassBatch
from rose_ds.engines.checkpointing import refuse_checkpointing
from rose_ds.engines.rng import RngState, replay
from rose_ds.objectives import FreeLB, RDrop, Smart
from rose_ds.training.predictions import labels_in, positions_of
from rose_ds.training.same_run import precision_of
from rose_ds.training.trainer import RoseTrainer

NONE, SECOND = RoseConfig(strategy="none"), RoseConfig(strategy="second")
CHILD = RoseConfig(strategy="child-tuning")


def equal_passes(logits: torch.Tensor, engine: Any) -> int:
    """Micro-batches of two equal passes until that is an error."""
    batch: Any = SimpleNamespace(engine=engine, wants_risk=True)
    for count in range(1, 300):
        try:
            PassBatch._require_dropout(batch, logits, SimpleNamespace(outputs=(logits,), logits=logits))  # type: ignore[arg-type]
        except RuntimeError as error:
            assert "identical logits" in str(error)
            return count
    raise AssertionError("no error")


@pytest.mark.fast
def test_two_passes_may_be_equal_by_chance() -> None:
    """accelerate hands out fp32 that was bf16, and a few rows may go through every layer of stochastic depth twice:
    eight micro-batches in a row mean "no dropout", or two hundred; in exact numbers without stochastic depth the first
    does, unless there was dropout before.
    """
    rounded, exact = torch.randn(1, 2).bfloat16().float(), torch.tensor([[0.1, 1 / 3]])
    still, deep = torch.nn.Linear(1, 1), torch.nn.Sequential(DropPath())

    def engine(module: torch.nn.Module, *, differ: bool = False) -> Any:
        return SimpleNamespace(equal_passes=0, passes_differ=differ, module=module)

    assert equal_passes(rounded, engine(still)) == 8
    assert equal_passes(exact, engine(still)) == 1
    assert equal_passes(exact, engine(deep)) == 200
    assert equal_passes(exact, engine(still, differ=True)) == 200
    assert equal_passes(exact, engine(still.eval(), differ=True)) == 1


class DropPath(torch.nn.Identity):
    """By its name."""


def test_a_second_training_with_another_optimizer(tmp_path: Path) -> None:
    """What Trainer's users do to begin anew on the same model: it is what a new trainer of that model does."""
    made = trainer(tmp_path, rose=RoseConfig(strategy="first"))
    made.train()
    again = trainer(tmp_path / "other", copy.deepcopy(made.model), more={"learning_rate": 1e-3}, rose=made.rose)
    made.optimizer = made.lr_scheduler = None
    made.args.learning_rate = 1e-3
    made.state.log_history.clear()
    assert_same(train(made), train(again))


class Bypassing(RoseTrainer):
    """Trains by itself."""

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("rose", [NONE, SECOND], ids=["none", "second"])
def test_a_training_step_that_leaves_rose_out(rose: RoseConfig, tmp_path: Path) -> None:
    """Without a mask too, where the objective would be left out."""
    made = trainer(tmp_path, cls=Bypassing, rose=rose, objective="r-drop")
    with pytest.raises(RuntimeError, match=r"training_step\(\) must call super\(\)'s"):
        made.train()


def test_a_checkpoint_of_before_a_setting_was_there(tmp_path: Path) -> None:
    """The default does what was done then, and another value would not."""
    more = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, more=more, rose=SECOND).train()
    path = next(tmp_path.glob("checkpoint-*")) / "rose_checkpoint.json"
    record = json.loads(path.read_text())
    del record["fixed"]["risk_every"]
    path.write_text(json.dumps(record))
    trainer(tmp_path, more=more, rose=SECOND)._check_resumable(path.parent)
    with pytest.raises(RefusedConfiguration, match="risk_every None -> 2"):
        trainer(tmp_path, more=more, rose=RoseConfig(strategy="first", risk_every=2))._check_resumable(path.parent)


@pytest.mark.parametrize("rose", [RoseConfig(strategy="first"), NONE], ids=["first", "none"])
def test_a_loss_that_writes_gradients_over_the_logits(rose: RoseConfig, tmp_path: Path) -> None:
    """In compute_loss(), before anybody else has seen them; to a method that compares nothing it is nothing."""

    def loss(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
        value = F.cross_entropy(outputs.logits, labels)
        outputs.logits.detach().numpy()[:] = 0.5
        return value

    made = trainer(tmp_path, rose=rose, compute_loss_func=loss)
    with pytest.raises(RuntimeError, match="changed the logits in place") if rose != NONE else nullcontext():
        made.train()


def test_a_search_sets_trainers_own_objective(tmp_path: Path) -> None:
    """hyperparameter_search() puts None, and then each trial's figure, where Trainer keeps its own."""
    made = trainer(tmp_path, more={"save_strategy": "steps", "save_steps": 2}, rose=SECOND, objective="r-drop")
    made.objective = None
    train(made)
    assert made.stepper.objective == RDrop()
    record = json.loads((tmp_path / "checkpoint-2" / "rose_checkpoint.json").read_text())
    assert record["fixed"]["objective"]["name"] == "r-drop"


@pytest.mark.parametrize("how", ["another batch size", "another trial"])
def test_what_ran_out_of_memory_is_let_go(tmp_path: Path, how: str) -> None:
    """The stepper, the hooks of its step under way, and with them a model that a search replaces."""
    made = trainer(tmp_path, rose=RoseConfig(strategy="first"))
    train(made)
    optimizer, stepper = made.optimizer.optimizer, weakref.ref(made.stepper)
    made.stepper.watch.after_backward()
    made.stepper.leave_step_to_optimizer(last=True)
    assert optimizer._optimizer_step_pre_hooks
    made.model_init = lambda: bert()
    if how == "another trial":
        made.call_model_init(None)
    else:
        made._update_auto_batch_size(2)
    assert made.stepper is None and made._stepper_model is None
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    gc.collect()
    assert stepper() is None


class NoOutputs(RoseTrainer):
    """As TRL's GRPOTrainer."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if return_outputs:
            raise ValueError("does not support returning outputs")
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


def test_outputs_are_not_asked_for_where_nobody_compares_them(tmp_path: Path) -> None:
    for rose in (NONE, SECOND):
        more = {"gradient_accumulation_steps": 2}
        plain = train(trainer(tmp_path, more=more, rose=rose))
        assert_same(train(trainer(tmp_path, more=more, rose=rose, cls=NoOutputs)), plain)
    with pytest.raises(ValueError, match="returning outputs"):
        train(trainer(tmp_path, rose=RoseConfig(strategy="first"), cls=NoOutputs))


class Silent(BertForSequenceClassification):
    """No loss in eval mode."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        return found if self.training else {"logits": found.logits}


def test_a_model_with_a_loss_in_training_alone(tmp_path: Path) -> None:
    """The first micro-batch's loss is looked at for two counts, if it must be with dropout, and draws nothing."""
    more = {"gradient_accumulation_steps": 2, "remove_unused_columns": False}
    plain = train(trainer(tmp_path, more=more, rose=RoseConfig(strategy="first")))
    assert_same(train(trainer(tmp_path, bert(Silent), more=more, rose=RoseConfig(strategy="first"))), plain)


def counted(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """Cannot do without the count; nearly all of it is a term that does not know it."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch + 1e3


@pytest.mark.parametrize("rose", [SECOND, CHILD], ids=["second", "child-tuning"])
def test_a_loss_that_needs_the_count_gets_it(tmp_path: Path, rose: RoseConfig) -> None:
    def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs.logits, labels) + 1e3

    more = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    one = train(trainer(tmp_path, more=more, rose=rose, compute_loss_func=counted))[1]
    other = train(trainer(tmp_path, more=more, rose=rose, compute_loss_func=mean))[1]
    for name, p in one.items():
        torch.testing.assert_close(p, other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_child_tuning_looks_at_as_much_as_it_trains_on(tmp_path: Path) -> None:
    seen: list[int] = []

    class Counts(RoseTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(len(inputs["labels"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    more = {"gradient_accumulation_steps": 3, "max_steps": 2}
    train(trainer(tmp_path, more=more, rose=CHILD, cls=Counts))
    assert len(seen) == 15  # six batches, twice, and the first for its counts
    stream: Any = type("Stream", (torch.utils.data.IterableDataset,), {"__iter__": lambda self: iter(rows(40))})()
    seen.clear()
    train(trainer(tmp_path, data=stream, more=more, rose=CHILD, cls=Counts))
    assert len(seen) == 15


def test_one_rank_may_log_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, rose=RoseConfig(strategy="first"))
    train(made)
    assert all("rose/disagreement" in e for e in made.state.log_history if "loss" in e)
    made.disagreements = [torch.tensor(0.5)]
    monkeypatch.setattr(made.accelerator, "gather", lambda *_: pytest.fail("the others are elsewhere"))
    made.log({"loss": 1.0})
    assert len(made.disagreements) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_of_a_batch_job(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal the bar has the numbers; in a file they are lines, as Trainer's."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    train(trainer(tmp_path, more={"disable_tqdm": False}, rose=SECOND))
    assert ("grad_norm" in capsys.readouterr().out) is not terminal


def test_the_devices_cache_is_emptied_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr("rose_ds.training.trainer.clear_device_cache", lambda: emptied.append(1))
    train(trainer(tmp_path, more={"max_steps": 4, "torch_empty_cache_steps": 2}, rose=SECOND))
    assert len(emptied) == 2


@pytest.mark.fast
def test_liger_is_refused_where_a_pass_is_looked_at_twice(tmp_path: Path) -> None:
    made = trainer(tmp_path, rose=RoseConfig(strategy="ensemble"))
    made.args.use_liger_kernel = True
    with pytest.raises(RefusedConfiguration, match="use_liger_kernel=True"):
        made._refuse()
    made.args.liger_kernel_config = {"swiglu": False, "geglu": False}
    made._refuse()
    made.args.liger_kernel_config["cross_entropy"] = True
    with pytest.raises(RefusedConfiguration, match="use_liger_kernel=True"):
        made._refuse()
    made.args.liger_kernel_config, made.rose = None, SECOND
    made._refuse()
    made.rose_objective = RDrop()
    with pytest.raises(RefusedConfiguration, match="use_liger_kernel=True"):
        made._refuse()


@pytest.mark.fast
def test_which_models_predict_the_next_token() -> None:
    """As transformers' losses do, whatever the model is called, and under an adapter."""
    labels = torch.tensor([[-100, 7, 8]])
    shifted, not_shifted = [[True, True, False]], [[False, True, True]]
    names = ("LlavaForConditionalGeneration", "GPT2LMHeadModel", "BertForTokenClassification")
    causal, gpt, tokens = (type(name, (nn.Module,), {})() for name in names)
    causal.loss_type, causal.config = "ForConditionalGeneration", SimpleNamespace(is_encoder_decoder=False)
    t5 = type("T5ForConditionalGeneration", (nn.Module,), {})()
    t5.loss_type, t5.config = "ForConditionalGeneration", SimpleNamespace(is_encoder_decoder=True)
    adapted = type("PeftModel", (nn.Module,), {"get_base_model": lambda self: gpt})()
    for module, wanted in (
        (causal, shifted),
        (gpt, shifted),
        (adapted, shifted),
        (t5, not_shifted),
        (tokens, not_shifted),
    ):
        found = positions_of(labels, module)
        assert found is not None and found.tolist() == wanted, type(module).__name__
    several = {"labels": labels, "sentence_labels": torch.tensor([1])}
    assert labels_in(several, ["labels", "sentence_labels"]) is labels
    assert labels_in({"start_positions": labels, "end_positions": labels}, ["start_positions", "end_positions"]) is None


@pytest.mark.fast
def test_checkpointing_is_reentrant_unless_told_otherwise() -> None:
    from functools import partial

    module = nn.Sequential(nn.Linear(2, 2))
    for keywords, refused in (({}, True), ({"use_reentrant": None}, True), ({"use_reentrant": False}, False)):
        module._gradient_checkpointing_func = partial(checkpoint, **keywords)  # type: ignore[assignment]
        if refused:
            with pytest.raises(RefusedConfiguration, match="use_reentrant"):
                refuse_checkpointing(module, twice=True)
        refuse_checkpointing(module, twice=not refused)

    def round_torchs(function: Any, *args: Any, **more: Any) -> Any:
        """As transformers' for offloaded activations."""

    round_torchs.__module__ = "transformers.modeling_utils"
    module._gradient_checkpointing_func = partial(round_torchs, preserve_rng_state=True)  # type: ignore[assignment]
    with pytest.raises(RefusedConfiguration, match="activation_checkpointing_kwargs"):
        refuse_checkpointing(module, twice=True)
    module._gradient_checkpointing_func = partial(round_torchs, use_reentrant=False)  # type: ignore[assignment]
    refuse_checkpointing(module, twice=True)


def test_a_stopped_run_that_saved_only_the_model_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"save_strategy": "steps", "save_only_model": True, "max_steps": 5}
    made = trainer(tmp_path, more=more, rose=SECOND)
    monkeypatch.setattr(made._stop, "_any_rank", lambda *_: True)
    with caplog.at_level(logging.WARNING, logger="rose_ds"), pytest.raises(SystemExit):
        made.train()
    assert "checkpoint saved at step 1, only the model, so nothing can resume" in caplog.text


class Policy(TrainerCallback):
    """Says by itself when to save, whatever others have said."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = False


def test_a_stop_saves_whatever_callbacks_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, more={"save_strategy": "steps", "max_steps": 5}, rose=SECOND)
    made.add_callback(Policy())  # behind RoseTrainer's own
    monkeypatch.setattr(made._stop, "_any_rank", lambda *_: True)
    with caplog.at_level(logging.WARNING, logger="rose_ds"), pytest.raises(SystemExit):
        made.train()
    assert "checkpoint saved at step 1, resume with" in caplog.text
    assert made.newest_checkpoint() == tmp_path / "checkpoint-1"


class Annotating(TrainerCallback):
    """Writes into each checkpoint, on every rank and slowly on all but the first."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "config.json"
        time.sleep(0.2 * args.process_index)
        path.write_text(json.dumps({**json.loads(path.read_text()), "mine": "x" * 100}))


def annotated(rank: int, world: int, folder: str) -> list[str]:
    """The newest whole checkpoint after each of two trainings, and a third that goes on from it."""
    more: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    more |= {"ddp_backend": "gloo"} if world > 1 else {}
    made = trainer(Path(folder), more=more, rose=SECOND, callbacks=[Annotating()])
    found = []
    for _ in range(2):
        made.train()
        found.append(made.newest_checkpoint().name)
    made.train(resume_from_checkpoint=True)
    return found


def test_what_callbacks_write_into_a_checkpoint_is_part_of_it(tmp_path: Path) -> None:
    assert annotated(0, 1, str(tmp_path / "alone")) == ["checkpoint-2"] * 2
    arguments = torch.load(tmp_path / "alone" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert arguments.save_total_limit == 2  # and not what it was set to while the checkpoint was written
    assert run_ranks(annotated, 2, str(tmp_path / "two"), process_group=False) == [["checkpoint-2"] * 2] * 2


def test_an_order_by_length_is_that_of_any_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one rank that makes four micro-batches, and of one of two that make two."""
    data = [{"input_ids": torch.arange(1 + (7 * i) % 30), "labels": i % 2} for i in range(2000)]
    more = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4}
    alone = trainer(tmp_path, data=data, more={**more, "gradient_accumulation_steps": 4}, rose=SECOND)
    wanted = list(alone._get_train_sampler())
    one_of_two = trainer(tmp_path, data=data, more={**more, "gradient_accumulation_steps": 2}, rose=SECOND)
    monkeypatch.setattr(one_of_two, "get_total_train_batch_size", lambda args: 16)
    assert list(one_of_two._get_train_sampler()) == wanted


def test_a_resume_that_would_be_a_shorter_run(tmp_path: Path) -> None:
    """What is dropped at an epoch's end depends on the micro-batches; where nothing else is, they may be others."""
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": -1, "num_train_epochs": 2}
    more |= {"dataloader_drop_last": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    other = {**more, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    for count, refused in ((60, True), (64, False)):
        folder = tmp_path / str(count)
        trainer(folder, data=rows(count), more=more, rose=SECOND).train()
        again = trainer(folder, data=rows(count), more=other, rose=SECOND)
        with pytest.raises(RefusedConfiguration, match="rows of an epoch") if refused else nullcontext():
            again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


@pytest.mark.parametrize("seedable", [True, False])
def test_a_resumed_run_goes_through_the_rows_of_the_whole_one(seedable: bool, tmp_path: Path) -> None:
    """From within an epoch and from its end; without accelerate's seedable sampler too, whose order was of the random
    state.
    """
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": -1, "num_train_epochs": 3}
    more |= {"per_device_train_batch_size": 8, "accelerator_config": {"use_seedable_sampler": seedable}}
    whole = trainer(tmp_path, data=numbered(40), more=more, rose=SECOND, cls=Seeing)
    whole.train()
    epochs = [sum(whole.seen[i : i + 5], []) for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs) and epochs[0] != epochs[1]
    for step in (5, 7):
        torch.manual_seed(99)
        again = trainer(tmp_path, data=numbered(40), more=more, rose=SECOND, cls=Seeing)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.seen == whole.seen[step:]


class Short(RoseTrainer):
    """Its compute_loss() has what Trainer's training needs, and no more."""

    def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:  # type: ignore[override]
        return model(**inputs).loss


def test_a_loss_that_returns_no_outputs(tmp_path: Path) -> None:
    trainer(tmp_path, cls=Short, rose=SECOND).train()
    with pytest.raises(RefusedConfiguration, match=r"Short\.compute_loss\(\) has no return_outputs"):
        trainer(tmp_path, cls=Short, rose=RoseConfig(strategy="first"))


@pytest.mark.parametrize(
    ("kind", "causal"), [("GPT2LMHeadModel", True), ("XLMWithLMHeadModel", False), ("XLNetLMHeadModel", False)]
)
def test_which_language_models_predict_the_next_token(kind: str, causal: bool) -> None:
    model = type(kind, (nn.Module,), {})()
    labels = torch.tensor([[-100, 5, -100]])
    found = positions_of(labels, model)
    assert found is not None and found.tolist() == ([[True, False, False]] if causal else [[False, True, False]])


def test_a_script_that_swallows_its_failure_has_not_trained(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(f"""
from pathlib import Path
from habits import arguments, bert, rows
from transformers import Trainer

class Broken(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        raise ValueError("broken")

try:
    Broken(model=bert(), args=arguments(Path({str(tmp_path)!r})), train_dataset=rows()).train()
except ValueError:
    pass
""")
    assert not runner.run(runner.parse(["--rose", "strategy=second", str(path)]))


def test_an_own_schedule_that_leaves_rose_out_of_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RoseTrainer(bert(), arguments(tmp_path), rose=SECOND)
    made.is_deepspeed_enabled = True
    record: Any = SimpleNamespace(optimizer_steps=2)
    with pytest.raises(RefusedConfiguration, match=r"create_scheduler\(\) of one's own must call super\(\)'s"):
        made._restore_counts(record)


@pytest.mark.fast
def test_scripts_may_look_at_the_signature() -> None:
    """Of the Trainer that they import, for what their version of transformers calls a thing."""
    found = inspect.signature(RoseTrainer.__init__).parameters
    assert {*inspect.signature(Trainer.__init__).parameters, "rose", "objective"} == set(found)
    assert "processing_class" in found and found["rose"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.fast
def test_a_script_that_starts_its_own_ranks_is_refused(tmp_path: Path) -> None:
    """They would train for hours without ROSE."""
    from rose_ds.run import Command, run

    before = torch.multiprocessing.spawn, torch.multiprocessing.start_processes
    looks = "assert 'processing_class' in inspect.signature(transformers.Trainer.__init__).parameters"
    for starts in (
        "from torch.multiprocessing import spawn; spawn(print, nprocs=2)",
        "from torch.multiprocessing.spawn import spawn; spawn(print, nprocs=2)",
        "import torch.multiprocessing as mp; mp.start_processes(print, nprocs=2, start_method='fork')",
    ):
        script = tmp_path / "script.py"
        script.write_text(f"import inspect, transformers\n{looks}\n{starts}\n")
        with pytest.raises(RefusedConfiguration, match="starts processes itself"):
            run(Command(None, None, script, []))
    assert (torch.multiprocessing.spawn, torch.multiprocessing.start_processes) == before


@pytest.mark.fast
def test_the_accelerators_random_numbers_are_replayed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is."""
    generator = torch.Generator().manual_seed(1)
    device = SimpleNamespace(get_rng_state=generator.get_state, set_rng_state=generator.set_state)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    now = RngState.now()
    first = torch.rand(3, generator=generator)
    with replay(now):
        assert torch.equal(torch.rand(3, generator=generator), first)
    assert not torch.equal(torch.rand(3, generator=generator), first)
    device.is_initialized = lambda: False
    assert RngState.now().accelerator is None


class SignalIn(TrainerCallback):
    """A scheduler that wants its machine back."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "it would end the tests"
            os.kill(os.getpid(), signal.SIGTERM)


class WorseAndWorse(RoseTrainer):
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"eval_loss": float(self.state.global_step)}


def test_what_sigterm_saves_stays(tmp_path: Path) -> None:
    """Where one checkpoint is kept, and the best is another one: the run goes on where it was, not from its best."""
    more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    more |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    stopped = trainer(
        tmp_path, cls=WorseAndWorse, more=more, rose=SECOND, eval_dataset=rows(8), callbacks=[SignalIn(5)]
    )
    with pytest.raises(SystemExit) as stop:
        stopped.train()
    assert stop.value.code == 128 + signal.SIGTERM
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-5"}
    assert (stopped.args.load_best_model_at_end, stopped.args.save_total_limit) == (True, 1)
    on = trainer(tmp_path, cls=WorseAndWorse, more=more, rose=SECOND, eval_dataset=rows(8))
    assert on.newest_checkpoint().name == "checkpoint-5"
    on.train(resume_from_checkpoint=True)
    assert on.state.global_step == 6 and on.state.best_model_checkpoint.endswith("checkpoint-2")


class Watching(TrainerCallback):
    """Writes down what it is told, and has enough after the first evaluation."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.seen.append("begin")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(f"evaluate {state.global_step}")
        control.should_training_stop = True


def test_an_evaluation_that_sigterm_has_cost_decides_as_it_would_have(tmp_path: Path) -> None:
    """After every callback has begun; where it stops the run no step follows, and its checkpoint is the best."""
    more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    more |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    stopped = trainer(tmp_path, more=more, rose=SECOND, eval_dataset=rows(8), callbacks=[SignalIn(2)])
    with pytest.raises(SystemExit):
        stopped.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    watching, on = Watching(), trainer(tmp_path, more=more, rose=SECOND, eval_dataset=rows(8))
    on.add_callback(watching)
    on.train(resume_from_checkpoint=True)
    assert watching.seen == ["begin", "evaluate 2"] and on.state.global_step == 2
    assert on.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_a_stream_that_went_round(tmp_path: Path) -> None:
    """Two batches, and it is over after one. Nobody knows where it was: not from the beginning, without a word."""
    more = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    train(trainer(tmp_path, data=Rounds(8), more=more, rose=SECOND))
    on = trainer(tmp_path, data=Rounds(8), more={**more, "max_steps": 8}, rose=SECOND)
    with pytest.raises(RefusedConfiguration, match="had begun its round 2"):
        on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    once = tmp_path / "once"  # at the end of a round it is known
    train(trainer(once, data=Rounds(8), more={**more, "max_steps": 2, "save_steps": 2}, rose=SECOND))
    on = trainer(once, data=Rounds(8), more=more, rose=SECOND)
    on.train(resume_from_checkpoint=str(once / "checkpoint-2"))
    assert on.state.global_step == 5


def test_another_order_of_rows_is_refused(tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "save_steps": 2}
    train(trainer(tmp_path, more=more, rose=SECOND))
    other = trainer(tmp_path, more={**more, "max_steps": 4, "train_sampling_strategy": "group_by_length"}, rose=SECOND)
    with pytest.raises(RefusedConfiguration, match="train_sampling_strategy random -> group_by_length"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.fast
def test_precision_that_accelerates_config_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate launch tells it in a variable, and no flag says so."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert precision_of(arguments(tmp_path)) == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert precision_of(arguments(tmp_path)) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert precision_of(arguments(tmp_path, bf16=True)) == "bf16"


@pytest.mark.fast
def test_one_gpu_of_several_without_a_launcher(tmp_path: Path) -> None:
    """transformers would split batches over all of them in one process, which is refused in a script of one's own."""
    ours, theirs = RunArguments(str(tmp_path), use_cpu=True), arguments(tmp_path)
    ours._n_gpu = theirs._n_gpu = 4
    assert (ours.n_gpu, ours.train_batch_size) == (1, ours.per_device_train_batch_size)
    assert theirs.n_gpu == 4


# --- what is minimised ---


@pytest.mark.parametrize(
    "objective",
    [
        FreeLB(passes=2, init_mag=0.0, step_size=5.0, max_norm=0.0),
        RDrop(alpha=1.0),
        Smart(init_std=1e-2, step_size=1.0),
    ],
    ids=lambda objective: objective.name,
)
def test_an_objective_is_that_of_a_loop_of_ones_own(objective: Any, tmp_path: Path) -> None:
    """The gradient of a step of RoseTrainer, and it is not the task's."""
    data = rows(8)
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in data[0]}
    labels = batch["labels"]

    def norm_of(minimised: Any) -> float:
        model = bert().train()
        optimizer = RoseAdamW(model.named_parameters(), lr=1e-3, strategy="none")
        stepper = prepare(model, optimizer, objective=minimised, max_grad_norm=1.0)
        torch.manual_seed(1)
        stepper.backward(lambda: model(**batch).logits, lambda logits: F.cross_entropy(logits, labels))
        report = stepper.step()
        assert report is not None
        return float(report.grad_norm)

    more = {"max_steps": 1, "per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    made = trainer(tmp_path, bert(), data, more=more, rose=NONE, objective=objective)
    torch.manual_seed(1)
    # the state of random numbers when the step begins is that of the loop
    step = made.training_step
    made.training_step = lambda *args, **kwargs: (torch.manual_seed(1), step(*args, **kwargs))[1]
    made.train()
    (entry,) = [entry for entry in made.state.log_history if "loss" in entry]
    assert entry["grad_norm"] == pytest.approx(norm_of(objective), rel=1e-4)
    assert abs(norm_of(objective) / norm_of("task") - 1) > 1e-3


def test_a_scripts_trainer_minimises_what_it_is_told(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport transformers\nfrom habits import trainer\n"
        "made = trainer(Path(sys.argv[1]), cls=transformers.Trainer)\nmade.train()\n"
        "assert made.stepper.objective.record() == {'name': 'r-drop', 'alpha': 0.5, 'kl_reduction': 'mean'}\n"
    )
    told = ["--rose", "objective=r-drop", "alpha=0.5", "strategy=none", str(script), str(tmp_path / "out")]
    assert runner.run(runner.parse(told))


def test_passes_are_freed_where_a_loss_keeps_its_logits(tmp_path: Path) -> None:
    """As binary cross-entropy does: hung on these, it would keep each pass's graph for ever."""
    logits: list[weakref.ref[Tensor]] = []

    class Watched(RoseTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            if isinstance(found, tuple):
                logits.append(weakref.ref(found[1]["logits"]))
            return found

    data = [{**row, "labels": torch.tensor([1.0, 0.0])} for row in rows()]
    model = bert(problem_type="multi_label_classification")
    made = trainer(tmp_path, model, data, cls=Watched, more={"max_steps": 3}, rose=RoseConfig(strategy="first"))
    train(made)
    gc.collect()
    assert len(logits) >= 6
    assert not any(ref() is not None for ref in logits)


def test_a_mask_found_once_stays_when_the_model_is_wrapped_again(tmp_path: Path) -> None:
    """As for a smaller batch after one ran out of memory, and for a second train() that looks for one."""
    more = {"auto_find_batch_size": True, "max_steps": 2}
    made = trainer(tmp_path, more=more, rose=RoseConfig(strategy="gallop"))
    made.train()
    mask = made.stepper.state.selection
    made.args.max_steps = 4
    made.train()
    assert mask is not None and made.stepper.state.selection is mask


# --- checkpoints on the hub ---


def test_a_checkpoint_is_pushed_whole_and_no_network_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole: list[bool] = []

    def push(self: Any, folder: str) -> None:
        whole.append((Path(folder) / "rose_checkpoint.json").is_file())
        if len(whole) == 1:
            raise OSError("no network")

    monkeypatch.setattr(RoseTrainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(RoseTrainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(RoseTrainer, "push_to_hub", lambda self, **kwargs: None)
    made = trainer(tmp_path, more={"save_strategy": "steps", "save_steps": 1}, rose=NONE)
    made.args.push_to_hub = True
    train(made)
    assert whole == [True, True] and "was not pushed (no network)" in caplog.text


class WritesPredictions(TrainerCallback):
    """Puts what an evaluation found where the step's checkpoint is going to be."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "predictions.txt").write_text("of this run")


def test_what_callbacks_put_into_a_checkpoints_folder_before_it_is_there(tmp_path: Path) -> None:
    """Stays, also where a step is trained again; files of the earlier run do not."""
    more = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    settings = {"more": more, "rose": SECOND, "eval_dataset": rows(8), "callbacks": [WritesPredictions()]}
    trainer(tmp_path, **settings).train()
    assert (tmp_path / "checkpoint-2" / "predictions.txt").read_text() == "of this run"
    (tmp_path / "checkpoint-4" / "global_step4").mkdir()
    (tmp_path / "checkpoint-4" / "global_step4" / "torn.pt").write_text("")
    (tmp_path / "checkpoint-4" / "predictions.txt").write_text("of the run before")
    made = trainer(tmp_path, **settings)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-4" / "predictions.txt").read_text() == "of this run"
    assert not (tmp_path / "checkpoint-4" / "global_step4" / "torn.pt").exists()
    assert made.newest_checkpoint() == tmp_path / "checkpoint-4"


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("step", [2, 4])
def test_a_run_stopped_in_a_step_of_an_evaluation_is_the_run_it_was(step: int, steady: bool, tmp_path: Path) -> None:
    """An evaluation draws random numbers; one that is made up for draws them where it would have."""
    more = {"save_strategy": "steps", "save_steps": 50, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}

    def make(name: str, *callbacks: Any) -> Any:
        made = trainer(tmp_path / name, more=more, rose=RoseConfig(), eval_dataset=rows(8), callbacks=list(callbacks))
        made.steady_evaluations = steady
        return made

    whole = train(make("whole"))
    stopped = make("stopped", SignalIn(step))
    with pytest.raises(SystemExit):
        train(stopped)
    again = make("stopped")
    torch.manual_seed(1)  # of which accelerate makes the order of rows
    torch.rand(3)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, whole[1][name]) for name, p in again.model.named_parameters())
