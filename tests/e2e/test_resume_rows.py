"""The rows that a resumed run trains on, on two ranks: those that the whole run went on with, whatever orders them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from habits import Rounds, Seeing, bert, numbered, rows, trainer
from spawn import run_ranks
from torch_jobs import message_of
from transformers import EarlyStoppingCallback

from rose_ds import RoseConfig

SECOND = RoseConfig(strategy="second", keep_second=0.5)
#: what orders the rows: Trainer's sampler, accelerate's settings
ORDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "random, not seedable": ("random", {"use_seedable_sampler": False}),
    "by length": ("group_by_length", {}),
    "balanced": ("batch_rebalance", {}),
    "split batches": ("group_by_length", {"split_batches": True}),
}


def seeing(folder: Path, order: str, **settings: Any) -> Seeing:
    sampling, accelerator = ORDERS.get(order, ("random", {"dispatch_batches": True}))
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": -1, "num_train_epochs": 3, "ddp_backend": "gloo"}
    more |= {"train_sampling_strategy": sampling, "accelerator_config": accelerator, **settings}
    made: Seeing = trainer(folder, bert(num_hidden_layers=1), data=numbered(32), more=more, rose=SECOND, cls=Seeing)
    return made


def seen(rank: int, world: int, folder: str) -> dict[str, tuple[list[list[int]], dict[int, list[list[int]]]]]:
    """By order: the rows of the whole run's steps on this rank, and of runs that went on, by the step they began at."""
    found = {}
    for order in ORDERS:
        whole = seeing(Path(folder) / order, order)
        whole.train()
        again = {}
        for step in (2, 7, 8, 9):  # of 4 (8 where batches are split) an epoch: within the first, the second, the third
            resumed = seeing(Path(folder) / order, order)
            resumed.train(resume_from_checkpoint=str(Path(folder) / order / f"checkpoint-{step}"))
            again[step] = resumed.seen
        found[order] = (whole.seen, again)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(seen, 2, str(tmp_path_factory.mktemp("rows")), process_group=False, timeout=400)


@pytest.mark.parametrize("order", ORDERS)
def test_a_resumed_run_goes_through_the_rows_of_the_whole_one(order: str, both: list[Any]) -> None:
    whole = [ranks[order][0] for ranks in both]
    epoch = len(whole[0]) // 3
    for start in range(0, 3 * epoch, epoch):
        rows_of_epoch = [row for steps in whole for step in steps[start : start + epoch] for row in step]
        assert sorted(rows_of_epoch) == list(range(32))
    assert whole[0][:epoch] != whole[0][epoch : 2 * epoch]
    for steps, ranks in zip(whole, both, strict=True):
        for step, again in ranks[order][1].items():
            assert again == steps[step:], f"from step {step} of {len(steps)}"


def dispatched(rank: int, world: int, folder: str) -> tuple[str, bool]:
    whole = seeing(Path(folder), "dispatched")
    whole.train()
    resumed = seeing(Path(folder), "dispatched")
    message = message_of(lambda: resumed.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-6")))
    way_out = seeing(Path(folder), "random")
    way_out.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-6"))
    return message, way_out.seen == whole.seen[6:]


def test_dispatched_rows_are_refused_and_the_way_out_has_them(tmp_path: Path) -> None:
    for message, same in run_ranks(dispatched, 2, str(tmp_path), process_group=False, timeout=200):
        assert "dispatch_batches=True on several ranks would go on with other rows" in message
        assert same


def stopped_early(rank: int, world: int, folder: str) -> tuple[int, str]:
    """On a stream whose rounds end within an accumulation."""
    deepspeed = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    deepspeed |= {"zero_optimization": {"stage": 2}}
    more = {"max_steps": 30, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    more |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "epoch", "learning_rate": 0.0}
    more |= {"load_best_model_at_end": False, "metric_for_best_model": "loss", "deepspeed": deepspeed}
    made = trainer(Path(folder), data=Rounds(12), more=more, rose=SECOND, eval_dataset=rows(8))
    made.args.load_best_model_at_end = True  # which wants evaluations where checkpoints are: a callback may make them
    made.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    made.train()
    return made.state.global_step, str(made.state.best_model_checkpoint)


def test_an_early_stop_within_an_accumulation_loads_the_best_model(extensions: Path, tmp_path: Path) -> None:
    for step, best in run_ranks(stopped_early, 1, str(tmp_path), process_group=False, timeout=200):
        assert 0 < step < 30, "it stopped early"
        assert Path(best).is_dir(), "there was one to load"
