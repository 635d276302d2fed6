"""The Triton kernels behind the dispatcher: one launch for all slices, and nothing that waits for the device."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rose_ds.kernels.build import report
from rose_ds.kernels.tensors import readable

_PROGRAMS = 4096  # wanted in a launch: some for each multiprocessor
_PIECE = 1 << 20  # elements of a row of a table, at most
_COPIES = 64  # of a histogram
_ROUNDS = ((20, 12), (10, 10), (0, 10))  # core's: first bit and number of bits of what is counted


@cache
def load(device: torch.device) -> TritonKernels | None:
    """Kernels for ``device``; None, and one line in the log, where triton is missing or cannot compile for it."""
    try:
        from rose_ds.kernels import triton_programs
    except Exception as error:  # whatever another version of it raises
        report(f"triton cannot be imported ({error}): the optimizer step runs with torch's operations")
        return None
    kernels = TritonKernels(device, triton_programs)
    try:
        _try_out(kernels)
    except Exception as error:
        # no C compiler for triton's launcher, a cache that cannot be written, no libcuda, a device that it does not
        # know: of each its own kind, AssertionError and KeyError among them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        report(f"triton's kernels do not run on {device} ({reason}): the optimizer step runs without")
        return None
    return kernels


def interpreted() -> bool:
    """Whether triton, where there is one, interprets its kernels with NumPy on CPUs (TRITON_INTERPRET=1)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


class TritonKernels:
    """What ``rose_ds.kernels.kernels_for`` gives for one device.

    Args:
        device: where all tensors lie.
        programs: the module ``triton_programs``, which imports triton.
    """

    def __init__(self, device: torch.device, programs: ModuleType) -> None:
        self.device, self.programs = device, programs
        # the interpreter takes as long for a block of one element as for one of many
        self.block = 1 << 15 if interpreted() else 1024

    def fits(self, tensor: Tensor, *, half: bool = False) -> bool:
        """Whether the kernels read this tensor: fp32 (or bf16, where it is a gradient), contiguous, on the device."""
        return tensor.device == self.device and readable(tensor, half=half)

    def risks_on_device(self, **what: Any) -> RisksOnDevice:
        """See RisksOnDevice."""
        return RisksOnDevice(self, **what)

    def adamw(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        codes: Sequence[Tensor],
        code: Sequence[int],
        scales: Sequence[float],
        values: Sequence[float],
        step: float,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        rule: str,
    ) -> None:
        """Masked AdamW in place, on slices; a slice's mask is ``values[code]``, times its scale: by its uint8
        ``codes``, or its one ``code`` where these are empty. ``step`` counts from 1; ``rule`` is core's.
        """
        rows = [
            [*addresses, one, size, int(g.dtype == torch.bfloat16), _fp32_bits(scale)]
            for p, g, m, v, c, one, scale in zip(params, grads, exp_avgs, exp_avg_sqs, codes, code, scales, strict=True)
            for addresses, size in _pieces(p.numel(), (p, g, m, v, c if c.numel() else None))
        ]
        if not rows:
            return
        less = _as_fp32(1 - lr * weight_decay) - 1.0
        numbers = (
            1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**step), eps, -(lr / (1 - beta1**step)), less,
        )  # fmt: skip
        kernel, sizes = self.programs.masked_adamw, [row[6] for row in rows]
        self.launch(
            kernel, self.table(rows), sizes, *map(float, (*values, *numbers)), DECAYS=weight_decay != 0, RULE=rule
        )

    def launch(self, kernel: Any, table: Tensor, sizes: Sequence[int], *arguments: Any, **constants: Any) -> None:
        """One launch for all rows of a table, of slices of these sizes."""
        parts = max(1, min(-(-max(sizes) // self.block), -(-_PROGRAMS // len(sizes))))
        # triton launches on the current device, which need not be the tensors'
        current: AbstractContextManager[Any] = (
            torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        )
        with current:
            kernel[(len(sizes), parts)](table, *arguments, **constants, BLOCK=self.block, enable_fp_fusion=False)

    def table(self, rows: list[list[int]]) -> Tensor:
        """int64 on the device, by way of pinned memory: an ordinary copy would have the host wait."""
        host = torch.tensor(rows, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)


class RisksOnDevice:
    """The risks of this rank's slices, counted and marked where they lie: ``rose_ds.core.device.OnDevice``.

    Args:
        kernels: of the slices' device.
        grads, exp_avgs, risk_grads: 1-D, aligned; the lists of what no risk is made of are empty.
        alphas: 1 - beta1 of each slice.
        scale: what ``grads`` are to be multiplied with; may lie on the device.
        share: what of ``risk_grads`` is then to be subtracted.
        codes: uint8, which ``mark`` changes.
        first, second: the risks' bits of the codes; 0: not ranked.
        largest: whether the highest are kept, of the first and of the second.
    """

    def __init__(
        self,
        kernels: TritonKernels,
        *,
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        risk_grads: Sequence[Tensor],
        alphas: Sequence[float],
        scale: Tensor | float,
        share: float,
        codes: Sequence[Tensor],
        first: int,
        second: int,
        largest: tuple[bool, bool],
    ) -> None:
        self.kernels, self.kinds = kernels, {"FIRST": first, "SECOND": second}
        self.share, self.largest = share, largest
        self.held = (grads, exp_avgs, risk_grads, codes)  # alive as long as their addresses are used
        none: list[Tensor | None] = [None] * len(codes)
        columns = [held or none for held in (risk_grads, grads, exp_avgs, codes)]
        halves = [int(g.dtype == torch.bfloat16) for g in grads] or [0] * len(codes)
        rows = [
            [*addresses, size, _fp32_bits(alpha), half]
            for *tensors, alpha, half in zip(*columns, alphas, halves, strict=True)
            for addresses, size in _pieces(tensors[3].numel(), tensors)  # of the codes
        ]
        self.sizes = [row[4] for row in rows]
        self.table = kernels.table(rows) if rows else None
        if isinstance(scale, Tensor) and scale.device == kernels.device:
            self.scale = scale.detach().float()
        else:
            self.scale = torch.full((), float(scale), dtype=torch.float32, device=kernels.device)

    def histogram(self, prefixes: Tensor, shift: int, width: int) -> Tensor:
        kinds = {name: int(bit > 0) for name, bit in self.kinds.items()}
        counts = torch.zeros(_COPIES, sum(kinds.values()), 1 << width, dtype=torch.int64, device=self.kernels.device)
        if self.table is not None:
            self.kernels.launch(
                self.kernels.programs.count_risks, self.table, self.sizes, prefixes, self.scale, self.share, counts,
                SHIFT=shift, WIDTH=width, **kinds, SHARE=self.share != 0, COPIES=_COPIES,
            )  # fmt: skip
        return counts.sum(0)

    def mark(self, taus: Tensor) -> None:
        if self.table is not None:
            self.kernels.launch(
                self.kernels.programs.mark_risks, self.table, self.sizes, taus.view(torch.int32), self.scale,
                self.share, **self.kinds, SHARE=self.share != 0,
                FIRST_LARGEST=self.largest[0], SECOND_LARGEST=self.largest[1],
            )  # fmt: skip


def _pieces(numel: int, tensors: Sequence[Tensor | None]) -> Iterator[tuple[list[int], int]]:
    """Addresses (0: no tensor) and size of each piece of a slice: all rows of a table get as many programs, so that one
    of an embedding's length would be walked through long after the others.
    """
    for start in range(0, numel, _PIECE):
        addresses = [0 if t is None else t.data_ptr() + start * t.element_size() for t in tensors]
        yield addresses, min(_PIECE, numel - start)


def _try_out(kernels: TritonKernels) -> None:
    """Compile each kernel and run it once, on numbers that a device may flush to zero."""
    p, g, m, v = [torch.ones(2, device=kernels.device) for _ in range(4)]
    g[1], m[1], v[1] = 0.0, 1e-40, 1e-40
    codes = torch.zeros(2, dtype=torch.uint8, device=kernels.device)
    for share in (0.5, 0.0):
        risks = kernels.risks_on_device(
            grads=[g], exp_avgs=[m], risk_grads=[p * (1 - share)], alphas=[0.1], scale=1.0, share=share,
            codes=[codes], first=1, second=2, largest=(False, False),
        )  # fmt: skip
        for shift, width in _ROUNDS:
            risks.histogram(torch.zeros(2, dtype=torch.int64, device=kernels.device), shift, width)
        codes.zero_()
        risks.mark(torch.ones(2, device=kernels.device))  # the last time |0 * 0.1 / 1e-40 - 1|, which is 1, too
    for rule, decay in (("robust", 0.01), ("gradient", 0.0), ("update", 0.01)):
        kernels.adamw(
            [p], [g], [m], [v], [codes], [0], [1.0], [0.0, 1.0, 1.0, 1.0], 1, 1e-3, 0.9, 0.999, 0.0, decay, rule
        )
    # which waits for an error of the device too
    if codes.tolist() != [3, 3] or not all(map(math.isfinite, p.tolist())):
        raise RuntimeError("it divides by denormal numbers as if they were zeros: triton 3.6 and later do not")


def _fp32_bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _as_fp32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
