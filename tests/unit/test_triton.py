"""Triton's kernels where there is no GPU: interpreted, compiled for one without running, and chosen or not."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rose_ds import kernels
from rose_ds.kernels import triton_backend

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent

#: A process of its own compiles, as this one may interpret; prints a kernel's PTX after its name.
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from rose_ds.kernels import triton_programs as programs

risks = {"table": "*i64", "scale_at": "*fp32", "share": "fp32"}
kinds = {"FIRST": 1, "SECOND": 2, "SHARE": True, "BLOCK": 1024}
count = {"prefixes": "*i64", "counts": "*i64"}, {"SHIFT": 10, "WIDTH": 10, "COPIES": 64, "SECOND": 1}
mark = {"taus": "*i32"}, {"FIRST_LARGEST": False, "SECOND_LARGEST": True}
numbers = "value0 value1 value2 value3 weight1 beta2 weight2 root2 eps minus_step less".split()
update = {"table": "*i64", **dict.fromkeys(numbers, "fp32")}, {"DECAYS": True, "BLOCK": 1024}
for kernel, (arguments, constants), form in (
    (programs.count_risks, (risks | count[0], kinds | count[1]), ""),
    (programs.mark_risks, (risks | mark[0], kinds | mark[1]), ""),
    *((programs.masked_adamw, (update[0], update[1] | {"RULE": rule}), "/" + rule)
      for rule in ("robust", "gradient", "update")),
):
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    print("KERNEL", kernel.fn.__name__ + form, made.asm["ptx"])
"""


def python(*arguments: str, **variables: str) -> str:
    environment = {**os.environ, **variables, "PYTEST_ADDOPTS": ""}
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    return ran.stdout


@needs_triton
def test_interpreted() -> None:
    """The variable must be set before triton is imported."""
    tail = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/unit/triton_checks.py",
                  TRITON_INTERPRET="1").splitlines()[-1]  # fmt: skip
    assert re.match(r"\d{2,} passed", tail), tail


@needs_triton
def test_compiled_for_a_gpu(tmp_path: Path) -> None:
    """All kernels compile, and their instructions round as core does: nothing approximate, nothing fused but what says
    so, no denormal flushed.
    """
    made = python("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).split("KERNEL ")[1:]
    ptx = dict(part.split(maxsplit=1) for part in made)
    rules = {f"masked_adamw/{rule}": lerps for rule, lerps in (("robust", 2), ("gradient", 1), ("update", 1))}
    assert set(ptx) == {"count_risks", "mark_risks", *rules}
    for name, text in ptx.items():
        assert not re.findall(r"\b\w+\.(?:approx|full|ftz)[.\w]*", text), name
        assert "div.rn.f32" in text, name
        fused = len(re.findall(r"\bfma\.rn\.f32", text))
        divided = len(re.findall(r"\bdiv\.rn\.f32", text))
        # of the update: a lerp or two and a second moment for an element, beside two divisions
        assert fused == ((rules[name] + 1) * divided // 2 if name in rules else 0), name
    for rule in rules:
        assert "sqrt.rn.f32" in ptx[rule]
        assert "cvt.rn.f32.f64" not in ptx[rule], "the interpreter's multiply-add"


class Weight:
    """What the choice looks at of a parameter on a GPU."""

    def __init__(self, device: str = "cuda:0", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.is_cpu = self.device.type == "cpu"

    def is_contiguous(self) -> bool:
        return True


@pytest.mark.fast
def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA tensors get Triton whatever their number, where they fit; CPU tensors never do by themselves."""
    monkeypatch.setattr(triton_backend, "load", lambda device: f"for {device}")
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    gpu: Any = [Weight(), Weight()]
    for choice, weights, wanted in (
        ("auto", gpu, "for cuda:0"), ("triton", gpu, "for cuda:0"), ("torch", gpu, None),
        ("auto", [*gpu, Weight("cuda:1")], None), ("auto", [*gpu, Weight(dtype=torch.bfloat16)], None),
        ("auto", [torch.zeros(3)], None), ("auto", [], None),
    ):  # fmt: skip
        monkeypatch.setenv(kernels.VARIABLE, choice)
        assert kernels.kernels_for(3, weights) == wanted, (choice, weights)
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    for weights in ([torch.zeros(3)], [*gpu, Weight("cuda:1")], [Weight(dtype=torch.bfloat16)]):
        with pytest.raises(RuntimeError, match="fp32 weights on one CUDA device"):
            kernels.kernels_for(3, weights)
    monkeypatch.setattr(triton_backend, "load", lambda device: None)
    with pytest.raises(RuntimeError, match="do not run"):
        kernels.kernels_for(3, gpu)
    monkeypatch.setattr(triton_backend, "interpreted", lambda: True)
    monkeypatch.setattr(triton_backend, "load", lambda device: f"for {device}")
    assert kernels.kernels_for(3, [torch.zeros(3)]) == "for cpu"
    monkeypatch.setenv(kernels.VARIABLE, "cpp")
    with pytest.raises(RuntimeError, match="on CPUs alone"):
        kernels.kernels_for(3, gpu)


@pytest.mark.fast
def test_launches_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one; with programs for all slices, and no more for a slice than it has blocks."""
    current: list[Any] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **constants: Any) -> None:
                launched.append((grid, current[-1], constants["enable_fp_fusion"]))

            return launch

    launched: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    there = triton_backend.TritonKernels(torch.device("cuda:1"), ModuleType("programs"))
    for sizes in ([5, 3000], [1 << 30], [1] * 10_000):
        there.launch(Kernel(), torch.empty(0), sizes)
    assert [grid for grid, *_ in launched] == [(2, 3), (1, 4096), (10_000, 1)]
    assert all((where, fusion) == (torch.device("cuda:1"), False) for _, where, fusion in launched)


@pytest.mark.fast
@pytest.mark.parametrize("what", ["no triton", pytest.param("no device", marks=needs_triton)])
def test_where_it_does_not_run(what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One line in the log, and the step runs without."""
    if what == "no triton":
        monkeypatch.setitem(sys.modules, "triton.errors", None)
    triton_backend.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="rose_ds"):
            # compiled for a CPU, if this process does not interpret
            device = torch.device("cpu" if what == "no device" else "cuda:0")
            assert triton_backend.load(device) is None
            assert triton_backend.load(device) is None
    finally:
        triton_backend.load.cache_clear()
    assert len([r for r in caplog.records if "the optimizer step runs" in r.getMessage()]) == 1
