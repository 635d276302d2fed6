"""The compiled kernels against core's torch operations: the same bits, whatever the data and however they are cut."""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from step_data import (
    GROUP,
    KINDS,
    SIZES,
    alike,
    as_bits,
    batch_of,
    check_same_bits,
    codes_of,
    outcome,
    same,
    saying,
    step_inputs,
    tensors,
)
from thread_ranks import Group, at_once
from torch import Tensor

from rose_ds import kernels
from rose_ds.config import RoseConfig
from rose_ds.core import threshold
from rose_ds.core.layout import Block, Layout
from rose_ds.core.magnitudes import StepInputs
from rose_ds.core.mask import BitMask
from rose_ds.core.risk import squared_norms
from rose_ds.core.select import Selection, select
from rose_ds.core.threshold import local_only
from rose_ds.core.update import UpdateBatch, masked_adamw_
from rose_ds.engines.agreed import agreed_kernels
from rose_ds.kernels import build
from rose_ds.masks import policy_of

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def compiled(extensions: object) -> Any:
    """Built once, in the tests' own folder."""
    build.extension.cache_clear()
    found = build.extension()
    assert found is not None
    return found


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("many", [threshold.MANY, 1], ids=["all digits", "guided"])
def test_select(
    kind: str, sizes: list[int], dtype: torch.dtype, many: int, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, thresholds, counts, histograms."""
    monkeypatch.setattr(threshold, "MANY", many)
    inputs = step_inputs(kind, sizes, dtype)
    for keep, largest in ((0.6, False), (0.3, True), (1e-9, False), (1.0, False), ("auto", False), ("knee", True)):
        config = RoseConfig(keep_first=keep, keep_second=keep, keep_largest=largest)  # type: ignore[arg-type]
        policy = policy_of(config)
        assert policy is not None
        assert same(
            select(policy.selectors, "element", inputs), select(policy.selectors, "element", inputs, compiled)
        ), (keep, largest)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "infinite", "nan"])
@pytest.mark.parametrize("strategy", ["random", "gradient-mask", "cautious"])
@pytest.mark.parametrize("many", [threshold.MANY, 1], ids=["all digits", "guided"])
def test_other_scores(
    strategy: Any, kind: str, dtype: torch.dtype, many: int, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threshold, "MANY", many)
    for keep, scale, share in ((0.6, 0.7, 0.0), (0.3, 1.0, 0.0), (1e-9, 0.7, 0.3), (1.0, 1.0, 0.3)):
        inputs = step_inputs(kind, [1000, 0, 33, 70_001], dtype, scale, share)
        config = RoseConfig(strategy=strategy, keep_first=keep)
        for histograms in (False, True):
            found = outcome(config, inputs, compiled, histograms=histograms)
            assert alike(outcome(config, inputs, histograms=histograms), found), (keep, scale, share)
            assert isinstance(found, str) or all(isinstance(code, BitMask) for code in found.codes)


@needs_compiler
@pytest.mark.parametrize("many", [threshold.MANY, 1], ids=["all digits", "guided"])
def test_random_numbers_by_place(many: int, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of tensors: beyond 2**32 elements, rows, and columns, which the kernels leave to torch. Gradients of any
    type: nobody reads them.
    """
    monkeypatch.setattr(threshold, "MANY", many)
    far, rows = Block.flat(1 << 34, (1 << 32) - 500, 1200), Block((100, 8), (40, 0), (30, 8))
    for blocks, ours in (([far, rows], True), ([far, Block((100, 8), (0, 3), (100, 2))], False)):
        sizes = [block.numel for block in blocks]
        held = [torch.zeros(n, dtype=torch.float16) for n in sizes]
        layout = Layout([0, 1], [local_only] * 2, [local_only], 2, sum(sizes), ["a", "b"], blocks)
        inputs = StepInputs(layout, held, held, held, [0.9, 0.9], step=3, seed=7)
        config = RoseConfig(strategy="random", keep_first=0.4)
        found = outcome(config, inputs, compiled)
        assert same(outcome(config, inputs), found)
        assert all(isinstance(code, BitMask) == ours for code in found.codes)


@needs_compiler
@pytest.mark.parametrize("strategy", ["ensemble", "random", "gradient-mask", "cautious"])
@pytest.mark.parametrize("many", [threshold.MANY, 1], ids=["all digits", "guided"])
def test_ranks_may_differ_in_having_kernels(
    strategy: Any, many: int, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, each with a part of every tensor, and one with nothing."""
    monkeypatch.setattr(threshold, "MANY", many)
    whole, config = step_inputs("ties", [1000, 70_001, 33], torch.float32), RoseConfig(strategy=strategy)
    policy = policy_of(config)
    assert policy is not None

    def select_with(*of_rank: Any) -> list[Selection]:
        group = Group([0, 1, 2])

        def job(rank: int) -> Selection:
            exchange = group.exchange_of(rank)
            sizes = [g.numel() for g in whole.grads]
            ends = [((0, n // 3), (n // 3, n), (n, n))[rank] for n in sizes]
            mine = range(3) if rank < 2 else range(0)
            layout = Layout(
                list(mine), [exchange for _ in mine], [exchange], 3, sum(sizes), whole.layout.names,
                [Block.flat(sizes[i], ends[i][0], ends[i][1] - ends[i][0]) for i in mine],
            )  # fmt: skip

            def cut(columns: Any) -> list[Any]:
                return [columns[i][slice(*ends[i])].clone() for i in mine]

            inputs = replace(
                whole, layout=layout, grads=cut(whole.grads), exp_avgs=cut(whole.exp_avgs), weights=cut(whole.weights),
                risk_grads=cut(whole.risk_grads), beta1s=[whole.beta1s[i] for i in mine],
            )  # fmt: skip
            return select(policy.selectors, "element", inputs, of_rank[rank])

        return at_once(3, job)

    torchs = select_with(None, None, None)
    for of_rank in ((compiled, None, compiled), (None, compiled, None), (compiled, compiled, compiled)):
        assert all(map(same, torchs, select_with(*of_rank)))


@needs_compiler
@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("many", [threshold.MANY, 1], ids=["all digits", "guided"])
def test_masks_of_an_earlier_step(many: int, largest: bool, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is taken, and nothing of them is left."""
    monkeypatch.setattr(threshold, "MANY", many)
    inputs = step_inputs("normal", [33, 0, 70_001, 64], torch.float32)
    policy = policy_of(RoseConfig(keep_first=0.2, keep_second=0.9, keep_largest=largest))
    assert policy is not None
    used = [BitMask.empty(g.numel(), (1, 2)) for g in inputs.grads]
    for mask in used:
        mask.words.fill_(-1)
    found = select(policy.selectors, "element", inputs, compiled, used=used)
    assert same(select(policy.selectors, "element", inputs), found)
    assert all(code.words is mask.words for code, mask in zip(found.codes, used, strict=True))


@needs_compiler
@pytest.mark.parametrize("window", [(384000, 384192), (519680, 520320)], ids=str)
@pytest.mark.parametrize("largest", [False, True])
def test_a_window_that_misses(
    window: tuple[int, int], largest: bool, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a scan has marked in vain is marked anew."""
    monkeypatch.setattr(threshold, "MANY", 1)
    monkeypatch.setattr(threshold.Search, "window", lambda *_: saying(window))
    inputs = step_inputs("normal", [70_001, 3, 40_000], torch.float32)
    policy = policy_of(RoseConfig(keep_first=0.2, keep_second=0.9, keep_largest=largest))
    assert policy is not None
    assert same(select(policy.selectors, "element", inputs), select(policy.selectors, "element", inputs, compiled))


@needs_compiler
@pytest.mark.parametrize("many", [threshold.MANY, 1], ids=["all digits", "guided"])
@pytest.mark.parametrize("kind", ["infinite", "nan"])
@pytest.mark.parametrize("strategy", ["first", "second", "ensemble"])
def test_not_finite(kind: str, strategy: Any, many: int, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are skipped, and errors raised, alike."""
    monkeypatch.setattr(threshold, "MANY", many)
    inputs = step_inputs(kind, [1000, 33, 257, 1], torch.float32)
    config = RoseConfig(strategy=strategy)
    want = outcome(config, inputs)
    assert not isinstance(want, str) or "scores are NaN" in want, want
    assert alike(want, outcome(config, inputs, compiled))


@needs_compiler
def test_a_share(compiled: Any) -> None:
    """R-Drop's task gradient is a difference of two."""
    inputs = step_inputs("normal", [1000, 33], torch.float32, share=0.5)
    policy = policy_of(RoseConfig())
    assert policy is not None
    assert same(select(policy.selectors, "element", inputs), select(policy.selectors, "element", inputs, compiled))


# --- the update ---


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "infinite", "nan"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_update(kind: str, decay: float, dtype: torch.dtype, compiled: Any) -> None:
    """Parameters and moments of hard and soft masks, by element and by tensor, bit for bit."""
    sizes = [70_001, 3, 257, 0, 1]
    group = {**GROUP, "weight_decay": decay}
    for step, table in itertools.product((1, 1000), ((0.0, 1.0, 1.0, 1.0), (0.0, 0.3, 0.7, 1.0), (0.0, 0.5, 0.5, 1.0))):
        codes, runs = codes_of(sizes, step, table), []
        packed = [as_bits(code) if isinstance(code, Tensor) else code for code in codes]
        for found, masks in ((None, codes), (compiled, codes), (compiled, packed)):
            held = tensors(kind, sizes, dtype)
            batch = batch_of(held, masks, group, step, table, kernels=found)
            assert len(batch.compiled) == (len(sizes) if found else 0)
            batch.flush()
            runs.append(held)
        for run in runs[1:]:
            check_same_bits(runs[0], run, (step, table))


@pytest.fixture(scope="module")
def portable(extensions: object) -> Any:
    """The code of CPUs without AVX-512, on one that has it."""
    if shutil.which("c++") is None or "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("no AVX-512 (or no compiler): what the other tests compile is the portable code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_FLAGS", [*build._FLAGS, "-mno-avx512f"])
        build.extension.cache_clear()
        found = build.extension()
        build.extension.cache_clear()
    assert found is not None
    return found


def test_without_avx512(portable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and updates; the last elements of vectors, blocks and words too."""
    for kind, dtype in itertools.product(KINDS, (torch.float32, torch.bfloat16)):
        for many in (threshold.MANY, 1):
            test_select(kind, [1000, 33, 257, 1], dtype, many, portable, monkeypatch)
        test_update(kind, 0.01, dtype, portable)
        test_a_mask_of_the_step(kind, 0.01, dtype, portable)
    test_other_scores("cautious", "normal", torch.bfloat16, 1, portable, monkeypatch)


@needs_compiler
def test_a_mask_of_ones_is_torchs_fused_adamw(compiled: Any) -> None:
    """Also where there is no mask; a multiple of the vector's width, beyond which torch's kernel rounds otherwise."""
    sizes = [64_000]
    ours, theirs = tensors("normal", sizes, torch.float32), tensors("normal", sizes, torch.float32)
    batch = UpdateBatch(GROUP, 7, (0.0, 1.0, 1.0, 1.0), kernels=compiled)
    batch.add(3, tuple(column[0] for column in ours))
    batch.flush()
    scalars = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.01, "eps": 1e-8}
    torch._fused_adamw_(*theirs, [], [torch.tensor(7.0)], **scalars, amsgrad=False, maximize=False)  # type: ignore[call-arg]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a[0], b[0])


@needs_compiler
@pytest.mark.parametrize("theirs", ["foreach", "fused"])
def test_a_kernel_that_was_asked_for(theirs: str, compiled: Any) -> None:
    """Of torch's, for what no mask touches."""
    views = tuple(column[0] for column in tensors("normal", [300], torch.float32))
    batch = UpdateBatch({**GROUP, theirs: True}, 7, (0.0, 1.0, 1.0, 1.0), kernels=compiled)
    for code in (1, 2, 3):
        batch.add(code, views)
    assert (len(batch.free), len(batch.compiled)) == (3, 0)
    batch = UpdateBatch({**GROUP, theirs: True}, 7, (0.0, 0.5, 0.5, 1.0), kernels=compiled)
    batch.add(1, views)
    assert (len(batch.free), len(batch.compiled)) == (0, 1)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", [(0.0, 2.5, 1.0, 1.0), (0.0, 0.3, 0.7, 1.0)], ids=str)
@pytest.mark.parametrize("kind", ["bits", "one plane", "codes", "one code"])
def test_a_mask_of_the_gradient(kind: str, values: Any, dtype: torch.dtype, compiled: Any) -> None:
    """Bit for bit AdamW of the masked gradient; moments and weight decay go on where it is 0. Torch's loop is near."""
    n = 5000
    held = [column[0] for column in tensors("normal", [n], dtype)]
    codes = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    mask: Any = codes
    if kind == "one code":
        mask, codes = 1, torch.ones_like(codes)
    if kind == "bits":
        mask = as_bits(codes)
    if kind == "one plane":
        codes = codes & 2
        mask = as_bits(codes, (2,))
    factor = torch.tensor(values)[codes.int()]
    results = []
    for rule, code, gradient, kernels_ in (
        ("gradient", mask, held[1], compiled),
        ("robust", 3, held[1].float() * factor, compiled),
        ("gradient", codes, held[1], None),
    ):
        mine = [t.clone() for t in (held[0], gradient, held[2], held[3])]
        given = values if rule == "gradient" else (0.0, 1.0, 1.0, 1.0)
        batch = UpdateBatch(GROUP, 5, given, rule, kernels=kernels_)
        batch.add(code, tuple(mine))
        assert len(batch.compiled) == (kernels_ is not None)
        batch.flush()
        results.append([mine[0], mine[2], mine[3]])
    for ours, exact, torchs in zip(*results, strict=True):
        assert torch.equal(ours, exact)
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-7)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_a_mask_of_the_step(kind: str, decay: float, dtype: torch.dtype, compiled: Any) -> None:
    """Each tensor's times a factor of its own; bit for bit as core's, where the mask is 0 too."""
    sizes = [70_001, 3, 257, 0, 1]
    table, group = (0.0, 1.0, 0.3, 1.0), {**GROUP, "weight_decay": decay}
    codes, scales, runs = codes_of(sizes, 3, table), [1.7, 1.0, 0.9, 1.0, 2.0], []
    packed = [as_bits(code) if isinstance(code, Tensor) else code for code in codes]
    for found, masks in ((None, codes), (compiled, codes), (compiled, packed)):
        held = tensors(kind, sizes, dtype)
        before = [t.clone() for t in held[0]]
        batch = UpdateBatch(group, 5, table, "update", kernels=found)
        for i, code in enumerate(masks):
            batch.add(code, tuple(column[i] for column in held), scales[i])
        assert len(batch.compiled) == (len(sizes) if found else 0)
        batch.flush()
        runs.append(held)
        still = codes[0] == 0
        assert torch.equal(held[0][0][still], before[0][still] * (1 - 3e-3 * decay))
    for run in runs[1:]:
        check_same_bits(runs[0], run, kind)


@pytest.mark.fast
@pytest.mark.parametrize("bits", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_kept_of_bits(bits: tuple[int, ...], share: float) -> None:
    for n in (0, 1, 63, 64, 65, 1000):
        drawn = torch.rand(n, 2, generator=torch.Generator().manual_seed(n)) < share
        codes = sum((drawn[:, bit - 1].to(torch.uint8) * bit for bit in bits), torch.zeros(n, dtype=torch.uint8))
        assert as_bits(codes, bits).kept() == (codes != 0).sum()


@needs_compiler
def test_places_and_threads_change_nothing(compiled: Any) -> None:
    """Every element is computed alike wherever it lies, and whoever computes it."""
    whole = tensors("normal", [100_003], torch.float32)
    codes = torch.randint(0, 4, (100_003,), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    results = []
    before = torch.get_num_threads()
    try:
        for threads, cuts in ((1, [0, 100_003]), (3, [0, 1, 8, 40_005, 100_003])):
            torch.set_num_threads(threads)
            held = [column[0].clone() for column in whole]
            batch = UpdateBatch(GROUP, 5, (0.0, 0.3, 0.7, 1.0), kernels=compiled)
            for start, stop in itertools.pairwise(cuts):
                batch.add(codes[start:stop], tuple(t[start:stop] for t in held))
            batch.flush()
            results.append(held)
            marked = BitMask.empty(len(codes), (1, 2))
            marked.words.fill_(0)
            risks = compiled.Risks(grads=[held[1]], exp_avgs=[held[2]], alphas=[0.1], masks=[marked.words], plane=1)
            results[-1] += [risks.histogram(0, 20, 12), risks.sample(31), risks.zoom(8000, 8060)]
            results[-1] += [risks.scan(512000, 515000)]
            risks.mark(0.9)
            results[-1].append(marked.codes())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", ["strided", "fp64", "fp16 gradient"])
def test_what_does_not_fit_is_left_to_torch(what: str, packed: bool, compiled: Any) -> None:
    dtype = torch.float64 if what == "fp64" else torch.float32
    held = [torch.rand(50, dtype=dtype) for _ in range(4)]
    if what == "strided":
        held = [torch.rand(100)[::2] for _ in range(4)]
    if what == "fp16 gradient":
        held[1] = held[1].half()
    mine = [t.clone() for t in held]
    mask = torch.randint(0, 2, (50,), dtype=torch.uint8)
    batch = UpdateBatch(GROUP, 5, (0.0, 1.0, 1.0, 1.0), kernels=compiled)
    batch.add(as_bits(mask) if packed else mask, tuple(held))
    assert not batch.compiled
    batch.flush()
    beta1, beta2 = GROUP["betas"]  # type: ignore[misc]
    masked_adamw_(
        *([t] for t in mine[:1]), [mine[1].to(dtype)], [mine[2]], [mine[3]], [mask.to(dtype)],
        step=5, lr=3e-3, beta1=beta1, beta2=beta2, eps=1e-8, weight_decay=0.01,
    )  # fmt: skip
    assert torch.equal(mine[0], held[0])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(dtype: torch.dtype, compiled: Any) -> None:
    """As torch's, but for the order of fp64 sums; the same on any number of threads."""
    slices = [torch.randn(n).mul(1e3).to(dtype) for n in (1, 31, 33, 100_003, 0, 1 << 15)]
    slices[2][1] = 3e38
    index, scales = [2, 0, 1, 3, 1, 2], [0.5, 1.0, 1.0, 0.1, 1.0, 2.0]
    want = squared_norms(slices, index, 5, scales)
    found = squared_norms(slices, index, 5, scales, compiled)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(squared_norms(slices, index, 5, scales, compiled), found)
    finally:
        torch.set_num_threads(threads)
    assert squared_norms([torch.tensor([math.inf, 1.0])], [0], 1, None, compiled).isinf().all()
    assert squared_norms([torch.tensor([math.nan, 1.0])], [0], 1, None, compiled).isnan().all()


# --- choosing and building them ---


@pytest.mark.fast
def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "extension", lambda: "built")
    weights = [torch.zeros(3)]
    for choice, elements, wanted in (
        ("auto", kernels.LARGE, "built"), ("auto", kernels.LARGE - 1, None), ("torch", kernels.LARGE, None),
        ("cpp", 3, "built"),
    ):  # fmt: skip
        monkeypatch.setenv(kernels.VARIABLE, choice)
        assert kernels.kernels_for(elements, weights) == wanted
        assert kernels.kernels_for(elements, weights, masks=False) == wanted
    with pytest.raises(RuntimeError, match="fp32 weights on CPUs alone"):
        kernels.kernels_for(3, [torch.zeros(3, dtype=torch.bfloat16)])
    monkeypatch.setattr(build, "extension", lambda: None)
    with pytest.raises(RuntimeError, match="could not be built"):
        kernels.kernels_for(3, weights)
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    assert kernels.kernels_for(kernels.LARGE, weights) is None
    assert kernels.kernels_for(kernels.LARGE, [torch.zeros(3, dtype=torch.bfloat16)]) is None
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"ROSE_DS_KERNELS='fast' is not one of"):
        kernels.kernels_for(3, weights)


@pytest.mark.fast
@pytest.mark.parametrize("broken", ["no compiler", "a compiler that fails", "a folder that is a file"])
def test_a_build_that_fails(
    broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log, and the step runs without."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "no-such-compiler" if broken == "no compiler" else "false")
    if broken == "a folder that is a file":
        (tmp_path / "extensions").write_text("")
    build.extension.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="rose_ds"):
            assert build.extension() is None
            assert build.extension() is None
    finally:
        build.extension.cache_clear()
    assert len([r for r in caplog.records if "the optimizer step runs without" in r.getMessage()]) == 1


@needs_compiler
def test_what_is_built_needs_nothing(compiled: Any, tmp_path: Path) -> None:
    """No compiler, no ninja, no lock, and nothing is written where it lies."""
    there = set(build.folder().iterdir())
    code = "from rose_ds.kernels import build; assert build.extension() is not None"
    env = {**os.environ, "PATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=env)
    assert set(build.folder().iterdir()) == there


@pytest.mark.fast
def test_a_virtual_environments_ninja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Is found where a launcher through ssh passed no PATH on, and takes no other's place."""
    for where in ("venv", "system"):
        (tmp_path / where).mkdir()
        (tmp_path / where / "ninja").write_text("#!/bin/sh\n")
        (tmp_path / where / "ninja").chmod(0o755)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    for path, found in [("empty", "venv"), ("system", "system"), ("venv", "venv")]:
        monkeypatch.setenv("PATH", str(tmp_path / path))
        build.find_ninja()
        assert shutil.which("ninja") == str(tmp_path / found / "ninja")


@pytest.mark.fast
@pytest.mark.parametrize("fails", [False, True])
def test_a_build_is_there_whole_or_not_at_all(fails: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What killed builders left is in nobody's way."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", f"{sys.executable} c++")  # of two words, and there
    where = build.folder()
    for left, age in (("build-old", 2 * build.PATIENCE), ("build-live", 0.0)):
        (where / left).mkdir(parents=True)
        (where / left / "lock").touch()
        os.utime(where / left, (time.time() - age,) * 2)
    (where / "alone").touch()

    def load(name: str, sources: list[str], *, build_directory: str, **flags: Any) -> str:
        path = Path(build_directory, f"{name}.so")
        path.write_text("half")
        assert path.parent.parent == where and not (where / path.name).exists()
        if fails:
            raise RuntimeError("error: no space left")
        path.write_text("whole")
        return "module"

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    build.extension.cache_clear()
    try:
        assert build.extension() == (None if fails else "module")
    finally:
        build.extension.cache_clear()
    assert {path.name for path in where.iterdir()} == {"alone", "build-live", *[f"{where.name}.so"] * (not fails)}
    assert fails or (where / f"{where.name}.so").read_text() == "whole"


@pytest.mark.fast
def test_two_builders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second waits, says so, and takes what the first has built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    built = build.folder() / f"{build.folder().name}.so"
    built.parent.mkdir(parents=True)
    first = FileLock(built.parent / "alone")
    first.acquire()

    class Lock(FileLock):  # type: ignore[misc]
        def acquire(self, timeout: float | None = None, **how: Any) -> Any:
            if timeout == build.PATIENCE:
                built.write_text("by the first")
                first.release()
            return super().acquire(timeout=min(timeout or 0, 0.1), **how)

    monkeypatch.setattr(build, "FileLock", Lock)
    monkeypatch.setattr(build, "_import", lambda path: path.read_text())
    build.extension.cache_clear()
    with caplog.at_level(logging.INFO, logger="rose_ds"):
        assert build.extension() == "by the first"
    build.extension.cache_clear()
    assert "waiting for another process that builds the kernels" in caplog.text


@pytest.mark.fast
def test_kernels_are_agreed_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever keeps one rank from its answer, it votes; who has kernels and drops them says why."""
    model = torch.nn.Linear(2, 2)
    votes = []

    def agree(vote: bool, others: bool) -> bool:
        votes.append(vote)
        return vote and others

    for others in (True, False):
        engine = SimpleNamespace(
            layout=SimpleNamespace(element_count=4), module=model, slices=[],
            optimizer=SimpleNamespace(param_groups=[{"params": list(model.parameters())}]),
            agree=partial(agree, others=others),
        )  # fmt: skip
        monkeypatch.setattr("rose_ds.engines.agreed.kernels_for", lambda *_, **__: "kernels")
        with caplog.at_level(logging.WARNING, logger="rose_ds"):
            assert agreed_kernels(engine) == ("kernels" if others else None)  # type: ignore[arg-type]
        assert ("another rank has no kernels" in caplog.text) is not others
    monkeypatch.setattr("rose_ds.engines.agreed.kernels_for", lambda *_, **__: Path("no such file").read_text())
    with pytest.raises(FileNotFoundError):
        agreed_kernels(engine)  # type: ignore[arg-type]
    assert votes == [True, True, False]


@pytest.mark.fast
def test_a_rank_that_holds_nothing_goes_by_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_triton", lambda devices, slices, must: [str(d) for d in devices])
    monkeypatch.setattr(build, "extension", lambda: "built")
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    for device, wanted in (("cuda:1", ["cuda:1"]), ("cpu", "built")):
        assert kernels.kernels_for(kernels.LARGE, [], devices={torch.device(device)}) == wanted


@needs_compiler
def test_a_graph_of_the_weights_before_is_refused(compiled: Any) -> None:
    """What compiled kernels write counts as written, to autograd too."""
    weight = torch.randn(64, requires_grad=True)
    kept = (weight**3).sum()
    views = (weight.detach(), torch.ones(64), torch.zeros(64), torch.zeros(64))
    before = [v._version for v in views]
    batch = UpdateBatch(GROUP, 1, (0.0, 1.0, 1.0, 1.0), "robust", compiled)
    batch.add(3, views)
    assert batch.compiled
    batch.flush()
    assert [v._version > b for v, b in zip(views, before, strict=True)] == [True, False, True, True]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.fast
def test_the_name_follows_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = build.name()
    other = tmp_path / "kernels.cpp"
    other.write_text(build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(build, "SOURCE", other)
    assert build.name() != name
