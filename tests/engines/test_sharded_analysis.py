"""Landscapes and lines of a sharded model are those of one process, and leave it as it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import run_ranks
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D
from zero_jobs import quiet

from rose_ds.analysis.directions import weights_of
from rose_ds.analysis.interpolation import Line, walk
from rose_ds.analysis.landscape import Plane, gathered, surface
from rose_ds.analysis.movable import Movable, WholeModel
from rose_ds.analysis.sharded import SHARDINGS, sharded
from rose_ds.experiments.resumable import logs_of, records_of

WORLD, PLANE, LINE = 2, Plane(points=3, radius=0.5), Line(points=3, first=0.0, last=1.5)


def make_model(seed: int = 0) -> nn.Module:
    """Odd sizes: a rank's part of a parameter ends in the middle of a row. One matrix is stored as GPT-2 does."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 31, "hidden_size": 9, "intermediate_size": 13, "max_position_embeddings": 7}
    config = BertConfig(**sizes, num_attention_heads=3, num_hidden_layers=2, num_labels=3, initializer_range=0.4)
    model = BertForSequenceClassification(config)
    model.bert.encoder.layer[0].intermediate.dense = turned = Conv1D(13, 9)
    nn.init.normal_(turned.weight, std=0.4)
    return model.eval()


def batches() -> list[dict[str, Tensor]]:
    """Three, which two ranks cannot share evenly, of different sizes and lengths."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(31, (n, length), generator=generator),
            "attention_mask": torch.ones(n, length, dtype=torch.int64),
            "labels": torch.randint(3, (n,), generator=generator),
        }
        for n, length in ((5, 4), (4, 6), (2, 7))
    ]


@dataclass
class Found:
    """What was measured."""

    plane: dict[str, list[list[float]]]
    line: list[dict[str, float]]


def measure(model: Movable, last: dict[str, Tensor], folder: Path, rank: int = 0, world: int = 1) -> Found:
    logs, line_logs = (logs_of(folder, name, world) for name in ("plane", "line"))
    surface(model, batches(), PLANE, logs, {"name": "bert"})
    walk(model, last, {"set": batches()}, LINE, line_logs, {})
    line = sorted(records_of([line_logs[rank]]), key=lambda record: record["point"])
    return Found(gathered([logs[rank]], PLANE.points), line)


def job(rank: int, world: int, engine: str, folder: Path) -> tuple[Found, dict[str, Any]]:
    """What is measured under an engine, and whether the weights are then what they were, to the bit."""
    quiet()
    cpu = torch.device("cpu")
    with sharded(make_model(5), engine, cpu) as other:
        last = weights_of(other)
    with sharded(make_model(), engine, cpu) as model:
        loss, one = model.measure(batches()), model.direction(3)
        found = measure(model, last, folder, rank, world)
        after, again = model.engine.gather_parameters(), model.measure(batches())
        if rank == 1:  # as if it had been killed before its last point
            log = logs_of(folder, "plane", world)[rank]
            log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
        resumed = measure(model, last, folder, rank, world).plane
        return found, {
            "restored": loss == again and all(torch.equal(p, after[n]) for n, p in make_model().named_parameters()),
            "resumed": resumed == found.plane,
            "elements": sum(p.numel() for p in weights_of(model).values()),
            "direction": one,
        }


@pytest.mark.parametrize("engine", SHARDINGS)
def test_sharded_is_as_whole(engine: str, tmp_path: Path, extensions: Path) -> None:
    whole = WholeModel(make_model())
    want = measure(whole, weights_of(WholeModel(make_model(5))), tmp_path / "whole")
    assert max(map(max, want.plane["loss"])) > 1.2 * min(map(min, want.plane["loss"]))
    results = run_ranks(job, WORLD, engine, tmp_path)
    total = sum(p.numel() for p in whole.module.parameters())
    assert sum(checks["elements"] for _, checks in results) == total  # nothing lies whole on a rank
    for found, checks in results:
        assert checks["restored"] and checks["resumed"]
        assert found.plane == results[0][0].plane
        assert found.plane["accuracy"] == want.plane["accuracy"]
        for row, expected in zip(found.plane["loss"], want.plane["loss"], strict=True):
            assert row == pytest.approx(expected, rel=1e-5)
        for point, expected_point in zip(found.line, want.line, strict=True):
            assert point == pytest.approx(expected_point, rel=1e-5)
    for name, expected_whole in whole.direction(3).items():
        parts = [checks["direction"][name] for _, checks in results if name in checks["direction"]]
        torch.testing.assert_close(torch.cat(parts), expected_whole.flatten(), rtol=1e-5, atol=1e-7)
