"""What is recorded of the masks is what they were, on one process and over ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_jobs import build
from reference import train
from spawn import run_ranks
from tiny import Case
from torch_jobs import Job, start

from rose_ds import kernels
from rose_ds.training.mask_record import FILE, MaskRecorder, read_masks

CASES = {
    "ensemble": Case(steps=5),
    "first by tensor": Case("first", "tensor", steps=5),
    "warm-up": Case("second", mask_warmup_steps=2, steps=5),
}
HOWS = ("ddp", "fsdp1-FULL_SHARD-orig", "fsdp2", "hsdp")


def on_ranks(rank: int, world: int, folder: str) -> None:
    for how in HOWS:
        for name, case in CASES.items():
            model, stepper = start(Job(case, how))
            stepper.masking.recorder = MaskRecorder(stepper, Path(folder) / how / name, every=2)
            train(stepper, model, case, rank, world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of every engine on 4 ranks."""
    folder = tmp_path_factory.mktemp("records")
    run_ranks(on_ranks, 4, str(folder))
    return folder


def alone(case: Case, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    """The same on this process, and its reports."""
    model, stepper = build(case)
    stepper.masking.recorder = MaskRecorder(stepper, folder, every=2)
    run = train(stepper, model, case)
    return *read_masks(folder / FILE), run


@pytest.mark.fast
@pytest.mark.parametrize("name", CASES)
def test_plain(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    head, lines, run = alone(case, tmp_path)
    assert (head["strategy"], head["granularity"]) == (case.strategy, case.granularity)
    sizes = torch.tensor(head["sizes"])
    assert [line["step"] for line in lines] == ([3, 5] if name == "warm-up" else [1, 3, 5])
    for line in lines:
        report = run.reports[line["step"] - 1]
        for order, kept in line["kept"].items():
            assert line["tau"][order] == getattr(report, f"tau_{order}")
            count = sum(torch.tensor(kept) * (sizes if case.granularity == "element" else 1))
            assert float(count) == pytest.approx(getattr(report, f"kept_{order}"), abs=1e-4 * float(sizes.sum()))
            assert sum(n for _, n in line["risks"][order]) == report.eligible
            zeros = {exponent: n for exponent, n in line["risks"][order]}.get(None, 0)
            assert zeros == getattr(report, f"zeros_{order}")
            below = sum(n for e, n in line["risks"][order] if e is None or 2.0 ** (e + 1) <= line["tau"][order])
            assert below <= getattr(report, f"kept_{order}")
        assert ("both" in line) == (case.strategy == "ensemble")
        assert bool(line["same"]) == (line is not lines[0])
        assert all(0 < same < 1 or case.granularity == "tensor" for same in line["same"].values())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", HOWS)
def test_over_ranks(how: str, name: str, folder: Path, tmp_path: Path) -> None:
    """The same record, but for risks within rounding of a threshold or a power of two."""
    head, lines, _ = alone(CASES[name], tmp_path)
    got_head, got = read_masks(folder / how / name / FILE)
    assert got_head == head
    assert [line["step"] for line in got] == [line["step"] for line in lines]
    total = sum(head["sizes"])
    for mine, want in zip(got, lines, strict=True):
        assert mine["tau"] == pytest.approx(want["tau"], rel=1e-3, abs=1e-6)
        assert mine.get("both", 0.0) == pytest.approx(want.get("both", 0.0), abs=3 / total)
        assert mine["same"] == pytest.approx(want["same"], abs=5 / total)
        for order, kept in want["kept"].items():
            assert mine["kept"][order] == pytest.approx(kept, abs=0.06)  # a LayerNorm's weight has 20 elements
            risks = [dict(map(tuple, line["risks"][order])) for line in (mine, want)]
            moved = sum(abs(risks[0].get(e, 0) - risks[1].get(e, 0)) for e in {**risks[0], **risks[1]})
            assert moved <= 0.01 * sum(risks[1].values()) + 2


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", CASES)
def test_kernels_record_the_same(name: str, tmp_path: Path, extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their masks are bits, whose memory the next step takes."""
    found = {}
    for choice in ("torch", "cpp"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        found[choice] = alone(CASES[name], tmp_path / choice)[:2]
    (head, wanted), (other, lines) = found["torch"], found["cpp"]
    assert other == head
    total = sum(head["sizes"])
    for mine, want in zip(lines, wanted, strict=True):
        assert mine["same"] == pytest.approx(want["same"], abs=5 / total)
        assert mine.get("both", 0.0) == pytest.approx(want.get("both", 0.0), abs=3 / total)
        assert all(mine["kept"][order] == pytest.approx(kept, abs=0.06) for order, kept in want["kept"].items())


@pytest.mark.fast
def test_a_resumed_run_keeps_what_came_before(tmp_path: Path) -> None:
    case = CASES["ensemble"]
    model, stepper = build(case)
    stepper.masking.recorder = MaskRecorder(stepper, tmp_path, every=1)
    train(stepper, model, case)
    whole = (tmp_path / FILE).read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 6
    (tmp_path / FILE).write_text(whole + '{"step": 6, "tau": {')  # killed while it wrote
    MaskRecorder(stepper, tmp_path, every=1)
    assert (tmp_path / FILE).read_text() == whole
    stepper.optimizer.steps_taken = lambda: 3  # a checkpoint of step 3
    MaskRecorder(stepper, tmp_path, every=1)
    assert (tmp_path / FILE).read_text() == "".join(lines[:4])
    stepper.optimizer.steps_taken = lambda: 0  # a new run
    MaskRecorder(stepper, tmp_path, every=1)
    assert (tmp_path / FILE).read_text() == lines[0]


@pytest.mark.fast
def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with pytest.raises(ValueError, match=r"cannot read .*masks\.jsonl"):
        read_masks(path)
    path.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(ValueError, match="does not begin with the names"):
        read_masks(path)
    path.write_text(json.dumps({"names": []}) + "\n{\n{}\n")
    with pytest.raises(ValueError, match=r"masks\.jsonl:2: not a record"):
        read_masks(path)
