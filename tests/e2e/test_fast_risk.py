"""first_order="fast" and "halves", risk_ema and risk_every as people use them: through RoseTrainer, and through
checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from habits import DRY, FIRST, bert, count_steps, rows, train, trainer

import rose_ds
from rose_ds import RefusedConfiguration, RoseConfig, Stepper
from rose_ds.training.trainer import RoseTrainer

FAST: dict[str, Any] = {"strategy": "first", "keep_first": 0.5, "first_order": "fast"}


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What RoseTrainer gave to each ``Stepper.backward``, with the logits of all rows and of the sample, undropped."""
    seen: list[Any] = []
    original = Stepper.backward

    def backward(self: Stepper, forward: Any, loss: Any, **more: Any) -> Any:
        sample = more.get("sample")
        self.engine.module.eval()
        with torch.no_grad():
            seen.append(None if sample is None else (sample.rows.tolist(), forward(), sample.forward()))
        self.engine.module.train()
        return original(self, forward, loss, **more)

    monkeypatch.setattr(Stepper, "backward", backward)
    return seen


@pytest.mark.parametrize(("batch", "fraction", "wanted"), [(8, 0.25, [0, 4]), (6, 0.5, [0, 2, 4]), (3, 0.25, [0])])
def test_trainer_samples_rows(
    batch: int, fraction: float, wanted: list[int], samples: list[Any], tmp_path: Path
) -> None:
    made = trainer(tmp_path, more={"per_device_train_batch_size": batch}, rose={**FAST, "risk_rows": fraction})
    entries, _ = train(made)
    assert len(samples) == 2
    for picked, whole, some in samples:
        assert picked == wanted
        torch.testing.assert_close(some, whole[picked])
    assert all(0.5 <= entry["rose/kept_first"] < 0.51 for entry in entries)


def test_trainer_runs_all_rows(samples: list[Any], tmp_path: Path) -> None:
    """Where a sample would be the batch, or risk is exact, or is not looked for in this step."""
    train(trainer(tmp_path, rose={**FAST, "risk_rows": 1.0}))
    train(trainer(tmp_path, rose=FIRST))
    assert samples == [None] * 4
    samples.clear()
    train(trainer(tmp_path, more={"max_steps": 4}, rose={**FAST, "risk_every": 2, "mask_warmup_steps": 1}))
    assert [sample is not None for sample in samples] == [False, True, False, True]


HALVES: dict[str, Any] = {**FAST, "first_order": "halves"}


def test_trainer_with_halves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a model without dropout, whose epochs end with steps of two micro-batches and of one; and resumed there."""
    more = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 1}
    for count, left in ((40, 2), (36, 1)):  # ten and nine micro-batches of four rows, four to a step
        settings = {**more, "gradient_accumulation_steps": 4}
        folder = tmp_path / str(count)
        made = trainer(folder, bert(**DRY), rows(count), more=settings, rose=HALVES)
        made.train()
        entries = [entry for entry in made.state.log_history if "loss" in entry]
        kept = [entry.get("rose/kept_first") for entry in entries]
        assert len(kept) == 6
        for step, fraction in enumerate(kept):
            assert fraction is None if left == 1 and step in (2, 5) else 0.5 <= fraction < 0.51, (step, fraction)
        assert all("rose/disagreement" not in entry for entry in entries)
        assert ("no halves to compare" in caplog.text) == (left == 1)
        for stop in (2, 3):
            resumed = trainer(folder, bert(**DRY), rows(count), more=settings, rose=HALVES)
            steps = count_steps(resumed)
            resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
            assert steps[0] == stop + 1
            for (name, a), b in zip(made.model.named_parameters(), resumed.model.parameters(), strict=True):
                assert torch.equal(a, b), (count, stop, name)


def test_halves_of_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Micro-batches whose loss is divided by the step's tokens weigh as many as they have."""
    import transformers

    weights: list[Any] = []
    original = Stepper.backward

    def backward(self: Stepper, *args: Any, **more: Any) -> Any:
        weights.append(more.get("weight"))
        return original(self, *args, **more)

    monkeypatch.setattr(Stepper, "backward", backward)
    data = [{**row, "labels": row["input_ids"].clone()} for row in rows(16)]
    for i, row in enumerate(data):
        row["labels"][i % 12 :] = -100
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=100, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    more = {"gradient_accumulation_steps": 2, "max_steps": 2, "per_device_train_batch_size": 4}
    entries, _ = train(trainer(tmp_path, model, data, more=more, rose={**HALVES, "include": ["@blocks"]}))
    assert sum(map(int, weights)) == sum(int(row["labels"].ne(-100).sum()) for row in data)
    assert len({int(weight) for weight in weights}) > 1
    assert all(0.5 <= entry["rose/kept_first"] < 0.51 for entry in entries)


def test_halves_need_accumulation(tmp_path: Path) -> None:
    with pytest.raises(RefusedConfiguration, match="set gradient_accumulation_steps to 2 or more"):
        trainer(tmp_path, rose=HALVES)


def test_tokens(samples: list[Any], tmp_path: Path) -> None:
    """Labelled tokens of the sampled rows only, and a sample of which none is labelled."""
    import transformers

    data = [{**row, "labels": row["input_ids"].clone()} for row in rows()]
    for i, row in enumerate(data):
        row["labels"][: 11 if i % 3 else 12] = -100
    model = bert(transformers.BertForMaskedLM)
    entries, _ = train(
        trainer(tmp_path, model, data, more={"max_steps": 6, "gradient_accumulation_steps": 2}, rose=FAST)
    )
    assert len(samples) == 12
    for entry in entries:
        assert 0.5 <= entry["rose/kept_first"] <= 1
        assert 0 <= entry["rose/disagreement"] <= 1


def test_packed_inputs_are_refused(tmp_path: Path) -> None:
    class Packing(RoseTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            found = super()._prepare_inputs(inputs)
            return {**found, "position_ids": torch.arange(found["input_ids"].shape[1])[None]}

    more = {"per_device_train_batch_size": 4}
    with pytest.raises(RefusedConfiguration, match=r"position_ids: 1\): set risk_rows=1"):
        train(trainer(tmp_path, cls=Packing, more=more, rose=FAST))
    train(trainer(tmp_path, cls=Packing, more=more, rose={**FAST, "risk_rows": 1.0}))


@pytest.mark.parametrize("settings", [{"first_order": "fast"}, {"risk_ema": 0.5}, {"risk_every": 3}])
def test_not_with_r_drop(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RefusedConfiguration, match="'r-drop' trains on the divergence whose gradient"):
        trainer(tmp_path, rose={"strategy": "ensemble", **settings}, objective="r-drop")
    trainer(tmp_path, rose={"strategy": "none"}, objective="r-drop")


def test_resumes(tmp_path: Path) -> None:
    """Stopped in the warm-up and between two steps that find risk, a run goes on as the run that was not stopped."""
    rose = RoseConfig(strategy="ensemble", first_order="fast", risk_ema=0.5, risk_every=3, mask_warmup_steps=1)
    more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    straight = trainer(tmp_path / "whole", more=more, rose=rose)
    straight.train()
    for step in (1, 3):
        resumed = trainer(tmp_path / "whole", more=more, rose=rose)
        steps = count_steps(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert steps[0] == step + 1
        for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b), (step, name)
    other = RoseConfig(strategy="ensemble", first_order="fast", risk_every=3, mask_warmup_steps=1)
    with pytest.raises(RefusedConfiguration, match=r"risk_ema 0\.5 -> 0\.0"):
        trainer(tmp_path / "whole", more=more, rose=other).train(resume_from_checkpoint=True)


def test_a_risk_that_is_not_finite_leaves_no_trace(tmp_path: Path) -> None:
    """The average is that of before, and the next step looks again."""
    model = bert()
    optimizer = rose_ds.RoseAdamW(model.named_parameters(), strategy="first", risk_ema=0.9, risk_every=2)
    stepper = rose_ds.prepare(model, optimizer)
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows(4)]) for name in rows(1)[0]}
    labels = batch.pop("labels")

    def step(scale: float = 1.0) -> Any:
        calls = iter((1.0, scale))  # of the second pass alone
        stepper.backward(
            lambda: model(**batch).logits * next(calls), lambda z: torch.nn.functional.cross_entropy(z, labels)
        )
        return stepper.step()

    step()
    kept = [value.clone() for value in stepper.state.risk.values]
    calls = 0

    def forward() -> Any:
        nonlocal calls
        calls += 1
        return model(**batch).logits

    stepper.backward(forward, lambda z: torch.nn.functional.cross_entropy(z, labels))
    assert calls == 1, "one pass: the step ranks the last risk"
    assert stepper.step().kept_first
    assert all(torch.equal(a, b) for a, b in zip(kept, stepper.state.risk.values, strict=True))
    assert step(float("inf")).skipped
    assert all(torch.equal(a, b) for a, b in zip(kept, stepper.state.risk.values, strict=True))
    assert not step().skipped
    assert not torch.equal(kept[0], stepper.state.risk.values[0])


def test_sample_rows() -> None:
    """A sample keeps what is no tensor, and tensors without rows."""
    batch = {"input_ids": torch.arange(12).view(6, 2), "flag": True, "scale": torch.tensor(2.0), "nothing": None}
    some, picked = rose_ds.sample_rows(batch, 0.4)
    assert picked.tolist() == [0, 2, 4]
    assert some["input_ids"].tolist() == [[0, 1], [4, 5], [8, 9]]
    assert (some["flag"], some["scale"], some["nothing"]) == (True, torch.tensor(2.0), None)
    for bad in ({"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": 1}, {"a": torch.zeros(2), "b": [torch.zeros(2)]}):
        with pytest.raises(RefusedConfiguration, match="do not all begin with its rows"):
            rose_ds.sample_rows(bad)
