"""ROSE's step in Triton: counts of risks, masks, and masked AdamW, of many slices in one launch each.

A program (axis 0: the slice, a row of a table of addresses; axis 1: which part of it) walks over a part of a slice.
Rows are int64; a number in fp32 stands in them as its bits.

Exact. Risks are what core computes on any device, to the last bit: each operation is rounded once (``div_rn``, as "/"
is an approximation; ``enable_fp_fusion=False``, as a product and a difference would become one operation), so
thresholds and masks are core's. Weights and moments are what the C++ kernels compute: a fused multiply-add where
torch's operations on CPUs have one, and nowhere else, division and square root correctly rounded, denormals kept.
Torch's own operations on a GPU may differ from that in the last bit of weights and moments, since its compiler chooses
what to fuse in each.

Triton's interpreter (TRITON_INTERPRET=1), which runs this with NumPy, has no fused multiply-add; there it is made of
fp64 operations, to the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
#: Columns of the tables: addresses, then numbers.
RISK_COLUMNS = tl.constexpr(7)  # risk gradient, gradient, exp_avg, codes, elements, 1 - beta1 (fp32), gradient is bf16
# parameter, gradient, exp_avg, exp_avg_sq, codes (0: one), code, elements, gradient is bf16, the masks' factor (fp32)
UPDATE_COLUMNS = tl.constexpr(9)


@triton.jit
def _fp32(address, at, live):
    return tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=live, other=0.0)


@triton.jit
def _gradient(address, at, live, half):
    """In fp32; bf16 by its bits, which keeps denormals."""
    if half != 0:
        high = tl.load(address.to(tl.pointer_type(tl.uint16)) + at, mask=live, other=0).to(tl.uint32)
        values = (high << 16).to(tl.float32, bitcast=True)
    else:
        values = _fp32(address, at, live)
    return values


@triton.jit
def _first(row, at, live):
    """Bits of Eq. 2, which sort as the risks do."""
    return _fp32(tl.load(row), at, live).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _second(row, at, live, scale, share, SHARE: tl.constexpr):
    """Bits of Eq. 4; 0 where exp_avg is 0."""
    grad = _gradient(tl.load(row + 1), at, live, tl.load(row + 6)) * scale
    if SHARE:
        grad = grad - _fp32(tl.load(row), at, live) * share
    magnitude = tl.abs(_fp32(tl.load(row + 2), at, live))
    alpha = tl.load(row + 5).to(tl.int32).to(tl.float32, bitcast=True)
    nothing = magnitude == 0.0
    risk = tl.div_rn(tl.abs(grad) * alpha, tl.where(nothing, 1.0, magnitude)) - 1.0
    return tl.where(nothing, 0, risk.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def _count(bits, live, prefix, counts, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    if SHIFT + WIDTH < 32:
        live = live & ((bits >> (SHIFT + WIDTH)) == prefix)
    tl.atomic_add(counts + ((bits >> SHIFT) & ((1 << WIDTH) - 1)), 1, mask=live, sem="relaxed")


@triton.jit
def count_risks(
    table, prefixes, scale_at, share, counts,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, SHARE: tl.constexpr,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to ``counts``, int64 (COPIES, FIRST + SECOND, 2**WIDTH), whose copies' sum is the histogram: many risks
    share a bin, and additions to one address wait for each other.
    """
    row = table + tl.program_id(0) * RISK_COLUMNS
    n, scale = tl.load(row + 4), tl.load(scale_at)
    copy = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) % COPIES
    out = counts + ((copy * (FIRST + SECOND)) << WIDTH)
    for start in range(tl.program_id(1).to(tl.int64) * BLOCK, n, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < n
        if FIRST:
            _count(_first(row, at, live), live, tl.load(prefixes), out, SHIFT, WIDTH)
        if SECOND:
            bits = _second(row, at, live, scale, share, SHARE)
            _count(bits, live, tl.load(prefixes + FIRST), out + (FIRST << WIDTH), SHIFT, WIDTH)


@triton.jit
def _kept(bits, tau, BIT: tl.constexpr, LARGEST: tl.constexpr):
    kept = bits >= tau if LARGEST else bits <= tau
    return tl.where(kept, BIT, 0).to(tl.uint8)


@triton.jit
def mark_risks(
    table, taus, scale_at, share, FIRST: tl.constexpr, SECOND: tl.constexpr, SHARE: tl.constexpr,
    FIRST_LARGEST: tl.constexpr, SECOND_LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sets FIRST and SECOND, bits of the codes or 0, where the risk is kept. ``taus``: int32, the thresholds' bits, of
    those that are not 0.
    """
    row = table + tl.program_id(0) * RISK_COLUMNS
    n, scale = tl.load(row + 4), tl.load(scale_at)
    codes = tl.load(row + 3).to(tl.pointer_type(tl.uint8))
    for start in range(tl.program_id(1).to(tl.int64) * BLOCK, n, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < n
        code = tl.load(codes + at, mask=live, other=0)
        if FIRST:
            code = code | _kept(_first(row, at, live), tl.load(taus), FIRST, FIRST_LARGEST)
        if SECOND:
            tau = tl.load(taus + (1 if FIRST else 0))
            code = code | _kept(_second(row, at, live, scale, share, SHARE), tau, SECOND, SECOND_LARGEST)
        tl.store(codes + at, code, mask=live)


@triton.jit
def _fma_of_fp64(a, b, c):
    """The product is exact; the sum is rounded to odd, so that rounding it once more is as one rounding of both."""
    product, addend = a.to(tl.float64) * b.to(tl.float64), c.to(tl.float64)
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    bits = total.to(tl.int64, bitcast=True)
    inexact = (lost > 0.0) | (lost < 0.0)
    odd = tl.where((lost > 0.0) == (total > 0.0), bits + 1, bits - 1)
    bits = tl.where(inexact & ((bits & 1) == 0), odd, bits)
    return bits.to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _fma(a, b, c):
    return _fma_of_fp64(a, b, c) if INTERPRETED else tl.fma(a, b, c)


@triton.jit
def _lerp(a, b, weight):
    """torch.lerp's two branches."""
    near_a = tl.abs(weight) < 0.5
    return _fma(tl.where(near_a, weight, weight - 1.0), b - a, tl.where(near_a, a, b))


@triton.jit
def masked_adamw(
    table, value0, value1, value2, value3, weight1, beta2, weight2, root2, eps, minus_step, less,
    DECAYS: tl.constexpr, RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rose_ds.core.update.masked_adamw_``, operation by operation; under the rule "update", ``adamw_masked_update_``.
    The mask is the value that belongs to a code, times the slice's factor.
    """
    row = table + tl.program_id(0) * UPDATE_COLUMNS
    param = tl.load(row).to(tl.pointer_type(tl.float32))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    codes, n, half = tl.load(row + 4), tl.load(row + 6), tl.load(row + 7)
    factor = tl.load(row + 8).to(tl.int32).to(tl.float32, bitcast=True)
    for start in range(tl.program_id(1).to(tl.int64) * BLOCK, n, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < n
        code = tl.zeros((BLOCK,), tl.int32) + tl.load(row + 5).to(tl.int32)
        if codes != 0:
            code = tl.load(codes.to(tl.pointer_type(tl.uint8)) + at, mask=live, other=0).to(tl.int32)
        low = tl.where((code & 1) != 0, value1, value0)
        mask = tl.where((code & 2) != 0, tl.where((code & 1) != 0, value3, value2), low) * factor
        ones = tl.zeros((BLOCK,), tl.float32) + 1.0
        g = _gradient(tl.load(row + 1), at, live, half)
        p = tl.load(param + at, mask=live, other=0.0)
        m = tl.load(exp_avg + at, mask=live, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=live, other=0.0)
        if RULE == "robust":
            frozen, on_step, on_decay = mask == 0.0, mask, mask
            used = tl.where(frozen, m, tl.where(mask == 1.0, g, _lerp(m, g, mask)))
        elif RULE == "gradient":
            frozen, on_step, on_decay = ones == 0.0, ones, ones
            used = g * mask
        else:
            frozen, on_step, on_decay = ones == 0.0, mask, ones
            used = g
        moved = tl.where(frozen, m, _lerp(m, used, tl.zeros((BLOCK,), tl.float32) + weight1))
        second = _fma(weight2 * used, used, v * beta2)
        root = tl.div_rn(tl.sqrt_rn(second), tl.zeros((BLOCK,), tl.float32) + root2)
        step = tl.div_rn(on_step * minus_step * moved, root + eps)
        updated = step + (p * (on_decay * less + 1.0) if DECAYS else p)
        tl.store(param + at, tl.where(frozen, p, updated), mask=live)
        tl.store(exp_avg + at, moved, mask=live)
        tl.store(exp_avg_sq + at, second, mask=live)
