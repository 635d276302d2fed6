"""Eq. 1: the symmetric KL between two passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rose_ds import symmetric_kl
from rose_ds.objectives import chunked, divergence

pytestmark = pytest.mark.fast

#: for gradients; the value is always computed in fp32
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-6, torch.bfloat16: 1e-2}


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_symmetric_kl_by_hand() -> None:
    """Eq. 1 for two distributions one can compute on paper."""
    a, b = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    want = 0.8 * math.log(1.6) + 0.2 * math.log(0.4) + 0.5 * math.log(0.625) + 0.5 * math.log(2.5)
    assert symmetric_kl(a, b).item() == pytest.approx(want, rel=1e-6)
    assert symmetric_kl(b, a).item() == pytest.approx(want, rel=1e-6)
    assert symmetric_kl(a + 3, a - 5).item() == pytest.approx(0.0, abs=1e-6), "softmax ignores a shift"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_symmetric_kl_is_a_mean_with_both_gradients(dtype: torch.dtype) -> None:
    a, b = (randn(6, 4, seed=s, dtype=dtype).requires_grad_() for s in (1, 2))
    value = symmetric_kl(a, b)
    assert value.dtype == torch.float32
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    want = ((p - q) * (p.log() - q.log())).sum(-1).mean()
    assert value.item() == pytest.approx(want.item(), rel=2e-6)
    value.backward()
    for ours, theirs in zip((a.grad, b.grad), torch.autograd.grad(want, (a, b)), strict=True):
        assert ours is not None and ours.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    leading = symmetric_kl(a.detach().view(2, 3, 4), b.detach().view(2, 3, 4))
    assert leading.item() == pytest.approx(value.item(), rel=1e-6)


def test_fixed_targets() -> None:
    """The same value; each prediction is moved towards the other, which is taken as it is."""
    a, b = (randn(6, 4, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    value = symmetric_kl(a, b, fixed_targets=True)
    assert torch.equal(value, symmetric_kl(a, b))
    found = torch.autograd.grad(value, (a, b))
    p, q = a.detach().softmax(-1), b.detach().softmax(-1)
    torch.testing.assert_close(found, ((p - q) / 6, (q - p) / 6))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("constant", ["neither", "a", "b"])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_large_logits_in_chunks(rows: int, constant: str, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients of the composed form, whatever the chunks; a second backward pass too."""
    whole = [4 * randn(rows, 3, 50, seed=s, dtype=torch.float32) for s in (1, 2)]
    results = []
    for large in (10**9, 1):
        monkeypatch.setattr(divergence, "LARGE", large)
        monkeypatch.setattr(chunked, "_CHUNK", 170)
        pair = [z.clone().requires_grad_(name != constant) for z, name in zip(whole, "ab", strict=True)]
        value = symmetric_kl(*pair, fixed_targets=fixed)
        leaves = [z for z in pair if z.requires_grad]
        twice = [torch.autograd.grad(2 * value, leaves, retain_graph=True) for _ in range(2)]
        assert all(torch.equal(x, y) for x, y in zip(*twice, strict=True))
        results.append([value.detach(), *twice[0]])
    for composed, in_chunks in zip(*results, strict=True):
        torch.testing.assert_close(in_chunks, composed, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 3), (2, 4)), "one shape"),
        (((3,), (1, 3)), "one shape"),
        (((), ()), "one shape"),
        (((5, 1),) * 2, "regress"),
    ],
)
def test_symmetric_kl_refuses(shapes: tuple[tuple[int, ...], tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        symmetric_kl(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
