"""How flat a minimum is, in numbers: of the loss over given batches, dropout off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F

from rose_ds.analysis.directions import restored
from rose_ds.analysis.load import Batch, logits_of, loss_and_accuracy


class NotConverged(RuntimeError):
    """Eigenvalues that were not found."""


def low_area(losses: Sequence[Sequence[float]], delta: float) -> float:
    """Fraction of a landscape's points whose loss is below its minimum + ``delta``."""
    surface = np.asarray(losses)
    return float((surface < surface.min() + delta).mean())


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _mean_loss(module: nn.Module, batch: Batch, rows: int) -> Tensor:
    """This batch's share of the mean cross entropy over ``rows``."""
    logits = logits_of(module, batch).float()
    return F.cross_entropy(logits, batch["labels"], reduction="sum") / rows


def _gradient(module: nn.Module, batch: Batch, rows: int, *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Of that share, zeros for a parameter that it does not reach (a pooler that nobody asks)."""
    loss, params = _mean_loss(module, batch, rows), _trainable(module)
    return torch.autograd.grad(loss, params, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def largest_eigenvalues(
    module: nn.Module, batches: Sequence[Batch], count: int = 1, *, tolerance: float = 1e-2, seed: int = 0
) -> list[float]:
    """The largest eigenvalues (in magnitude) of the Hessian of the mean loss, descending, by Lanczos iteration.

    Exact Hessian-vector products by differentiating twice, which needs attn_implementation="eager".

    Args:
        tolerance: relative accuracy of an eigenvalue.

    Raises:
        NotConverged: the iteration did not converge in 200 restarts.
    """
    params = _trainable(module)
    rows = sum(len(batch["labels"]) for batch in batches)
    size = sum(p.numel() for p in params)

    def product(vector: np.ndarray) -> np.ndarray:
        flat = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32).ravel()).to(params[0].device)
        pieces = [v.view_as(p) for v, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]
        total = torch.zeros(size, device=flat.device)
        for batch in batches:
            grads = _gradient(module, batch, rows, create_graph=True)
            along = sum((g * v).sum() for g, v in zip(grads, pieces, strict=True))
            assert isinstance(along, Tensor)
            second = torch.autograd.grad(along, params, allow_unused=True)
            total += torch.cat(
                [(torch.zeros_like(p) if h is None else h).flatten() for h, p in zip(second, params, strict=True)]
            )
        return total.cpu().numpy().astype(np.float64)

    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    try:
        values = eigsh(
            operator,
            k=count,
            which="LM",
            return_eigenvectors=False,
            tol=tolerance,
            v0=start,
            ncv=2 * count + 8,
            maxiter=200,
        )
    except ArpackNoConvergence as error:
        raise NotConverged(
            f"the Hessian's largest {count} eigenvalues were not found to {tolerance}: take fewer"
        ) from error
    return sorted(map(float, values), reverse=True)


def sharpness(module: nn.Module, batches: Sequence[Batch], rho: float = 0.05) -> float:
    """``L(theta + rho g/||g||) - L(theta)``: how much the loss rises on SAM's step (Foret et al., ICLR 2021, Eq. 2)."""
    params = _trainable(module)
    rows = sum(len(batch["labels"]) for batch in batches)
    grads = [torch.zeros_like(p) for p in params]
    for batch in batches:
        for total, part in zip(grads, _gradient(module, batch, rows), strict=True):
            total += part
    norm = torch.stack([g.double().norm() for g in grads]).norm().item()
    before = loss_and_accuracy(module, batches)[0]
    with restored(module), torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p.add_(g, alpha=rho / max(norm, 1e-12))
        return loss_and_accuracy(module, batches)[0] - before
