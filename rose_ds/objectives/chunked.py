"""The symmetric divergence of large logits: token predictions, of thousands of rows and a vocabulary each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

#: Elements of logits from which it is worth it, and how many are looked at together.
LARGE, _CHUNK = 1 << 22, 1 << 20
#: In place of the -inf of a probability of 0.
LOWEST = torch.finfo(torch.float32).min


class ChunkedSymmetricKl(torch.autograd.Function):
    """``sum (p - q) (log p - log q)``, which is KL(p || q) + KL(q || p), over rows of logits: (rows, classes), fp32.
    With ``fixed_targets`` each divergence's gradient is that of its second argument.

    Some rows at a time, and their gradients at once: beside the logits there are their gradients and nothing else of
    that size, where the composed form holds both log-probabilities and what autograd keeps of them.
    """

    @staticmethod
    def forward(ctx: Any, logits_a: Tensor, logits_b: Tensor, fixed_targets: bool = False) -> Tensor:
        total = torch.zeros((), device=logits_a.device, dtype=torch.float64)
        inputs = (logits_a, logits_b)
        grads = [torch.empty_like(z) if n else None for z, n in zip(inputs, ctx.needs_input_grad[:2], strict=True)]
        rows = max(1, _CHUNK // logits_a.shape[-1])
        for at in range(0, len(logits_a), rows):
            part = slice(at, at + rows)
            log_p, log_q = log_softmax(logits_a[part], -1), log_softmax(logits_b[part], -1)
            log_p, log_q = log_p.clamp_min_(LOWEST), log_q.clamp_min_(LOWEST)
            p, q = log_p.exp(), log_q.exp()
            ratio, difference = log_p.sub_(log_q), p - q
            total += (difference * ratio).sum(dtype=torch.float64)
            for grad, probability, sign in zip(grads, (p, q), (1.0, -1.0), strict=True):
                if grad is not None and fixed_targets:
                    grad[part] = difference * sign
                elif grad is not None:
                    centred = ratio - (probability * ratio).sum(-1, keepdim=True)
                    grad[part] = centred.mul_(probability).add_(difference).mul_(sign)
        ctx.grads = grads
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (*(None if g is None else g * grad for g in ctx.grads), None)
