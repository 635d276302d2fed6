"""What the masks of a run kept, layer by layer, every so many steps: one JSON line each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from rose_ds.core.mask import FIRST, SECOND, BitMask
from rose_ds.core.select import Selection
from rose_ds.training.records import append_line, may_be_lost

if TYPE_CHECKING:
    from rose_ds.training.stepper import Stepper

FILE = "masks.jsonl"
_ORDERS = {"first": FIRST, "second": SECOND}


class MaskRecorder:
    """Writes FILE in a folder: the eligible tensors, then for every ``every``-th optimizer step

        step, tau: by order (first, second);
        kept: by order, the kept fraction of each tensor;
        both: of all elements, the fraction that both orders keep;
        same: by order, the fraction of elements whose mask is the one of the record before;
        risks: by order, [exponent, count] of the risks by power of two, zeros under null.

    A few small collectives in a recorded step, none in the others. A resumed run keeps the lines up to its checkpoint.
    Where parameters are unfrozen a new file begins, and the one before is kept as masks-to-step-N.jsonl.
    A line that cannot be written (a full disk) is lost, and training goes on.
    """

    def __init__(self, stepper: Stepper, folder: Path, every: int) -> None:
        self.stepper, self.every = stepper, every
        self.path = folder / FILE
        self._writes = not dist.is_initialized() or dist.get_rank() == 0
        self._begin(keeps=stepper.optimizer.steps_taken() > 0)

    def _begin(self, *, keeps: bool) -> None:
        """The file's head, and of the lines that are there those of steps that have been taken."""
        stepper = self.stepper
        self.layout = stepper.engine.layout
        self._before: list[Any] | None = None
        """The codes of the record before."""
        self._sizes = self.layout.sums([torch.tensor(block.numel) for block in self.layout.blocks])
        if self._writes:
            taken = stepper.optimizer.steps_taken()
            head = {
                "strategy": stepper.config.strategy,
                "granularity": stepper.config.granularity,
                "names": list(self.layout.names),
                "sizes": [int(size) for size in self._sizes],
            }
            kept = read_masks(self.path)[1] if keeps and self.path.is_file() else []
            lines = [head, *(line for line in kept if line["step"] <= taken)]
            with may_be_lost(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.unlink(missing_ok=True)  # what cannot be written whole is not to be added to
                partial = self.path.with_suffix(".partial")
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
                partial.replace(self.path)

    def due(self, step: int) -> bool:
        """Whether this optimizer step, from 1, is one of those."""
        return (step - 1) % self.every == 0

    def see(self, step: int, selection: Selection) -> None:
        """Record a step's masks, if it is one of those. Every rank calls it."""
        if not self.due(step):
            return
        if self.stepper.engine.layout is not self.layout:  # layers were unfrozen: other tensors are masked since
            if self._writes:
                with may_be_lost(self.path):
                    self.path.replace(self.path.with_stem(f"{self.path.stem}-to-step-{step - 1}"))
            self._begin(keeps=False)
        orders = {name: bit for name, bit in _ORDERS.items() if bit in selection.thresholds}
        codes = [self._code(i, code) for i, code in enumerate(selection.codes)]
        line: dict[str, Any] = {"step": step, "tau": {}, "kept": {}, "same": {}, "risks": {}}
        for name, bit in orders.items():
            threshold = selection.thresholds[bit]
            line["tau"][name] = threshold.value
            line["kept"][name] = [round(float(f), 4) for f in self._sums([(c & bit) != 0 for c in codes]) / self._sizes]
            line["risks"][name] = _octaves(threshold.histogram)
            if self._before is not None:
                before = (self._code(i, code) for i, code in enumerate(self._before))
                same = [((c ^ b.to(c.device)) & bit) == 0 for c, b in zip(codes, before, strict=True)]
                line["same"][name] = round(self._fraction(same), 4)
        if len(orders) == 2:
            line["both"] = round(self._fraction([c == FIRST | SECOND for c in codes]), 4)
        self._before = [_kept(code) for code in selection.codes]
        if self._writes:
            with may_be_lost(self.path):
                append_line(self.path, json.dumps(line))

    def _code(self, i: int, code: Any) -> Tensor:
        if isinstance(code, BitMask):
            return code.codes()
        if isinstance(code, Tensor):
            return code
        return torch.full((self.layout.blocks[i].numel,), code, dtype=torch.uint8)

    def _sums(self, marks: Sequence[Tensor]) -> Tensor:
        return self.layout.sums([mark.sum() for mark in marks])

    def _fraction(self, marks: Sequence[Tensor]) -> float:
        return float(self._sums(marks).sum() / self._sizes.sum())


def _kept(code: Any) -> Any:
    """A slice's code until the next record: on the host, and in bits where kernels made it, whose memory is theirs."""
    if isinstance(code, BitMask):
        return BitMask(code.words.clone(), code.numel, code.bits)
    return code.cpu() if isinstance(code, Tensor) else code


def _octaves(histogram: Tensor | None) -> list[list[int | None]]:
    """[exponent, count] of the powers of two that have any; what is below 2**-126, zeros too, under null."""
    if histogram is None:
        return []
    counts = histogram.view(-1, 8).sum(1).tolist()
    found: list[list[int | None]] = [[None, counts[0]]] if counts[0] else []
    return found + [[i - 127, count] for i, count in enumerate(counts) if i and count]


def read_masks(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The head and the records of FILE; a last line that a kill cut short is left out.

    Raises:
        ValueError: it cannot be read, or another line is damaged; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a record of masks ({error})") from error
    if not found or "names" not in found[0]:
        raise ValueError(f"{path} does not begin with the names of tensors")
    return found[0], found[1:]
