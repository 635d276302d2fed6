"""Every method in one process, written as its paper writes it: whole tensors, fp32, nothing fast. Read this first.

Each engine, objective and mask of rose_ds is tested against this file, which uses none of them: the same weights,
batches and random numbers must give the same parameters. Equation and line numbers are those of ROSE (Jiang et al.,
EMNLP 2022); what the other methods do is in docs/methods.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[], Tensor]
Loss = Callable[[Tensor], Tensor]
Named = dict[str, Tensor]
#: Some rows of a micro-batch, and a forward pass of these alone.
Some = tuple[Tensor, Forward]


@dataclass(frozen=True)
class Hyper:
    """AdamW's settings of a parameter group."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass
class Step:
    """What one step saw: the value minimised, and thresholds, kept counts and scores by "first" and "second"."""

    loss: float
    grad_norm: float
    kl: float | None = None
    tau: dict[str, float] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    scores: dict[str, Named] = field(default_factory=dict)


class Reference:
    """AdamW with an objective and a mask.

    Args:
        config: RoseConfig, as a record of settings.
        objective: one of rose_ds.objectives, as a record of its name and constants.
        hyper: a parameter's settings, by its name.
        clip: largest global L2 norm of the gradient; 0: no clipping.
    """

    def __init__(
        self, model: nn.Module, config: Any, objective: Any, hyper: Callable[[str], Hyper], clip: float = 0.0
    ) -> None:
        self.model, self.config, self.objective, self.hyper, self.clip = model, config, objective, hyper, clip
        self.named: Named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.eligible = [n for n in self.named if _found(config.include, n) and not _found(config.exclude, n)]
        self.m = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self.t = 0
        self.static: tuple[Step, dict[str, Named]] | None = None
        """Scores and masks that were found once, for the whole run."""
        self.average = {name: p.detach().clone() for name, p in self.named.items()}
        self.risk: Named = {}
        """First-order risk, averaged over steps."""
        self.some: Some | None = None

    # --- one step ---

    def step(self, micro_batches: Sequence[tuple[Forward, Loss]], some: Sequence[Some] = ()) -> Step:
        """Algorithm 1, with any objective in the place of the task loss. ``some``: of each micro-batch, the rows that a
        fast first-order risk is found from; all of them where there is none.
        """
        self.t += 1
        strategy = self.config.strategy
        masking = strategy != "none" and self.t > self.config.mask_warmup_steps
        first = masking and strategy in ("first", "ensemble")
        first = first and (self.t - self.config.mask_warmup_steps - 1) % self.config.risk_every == 0
        halves, half = first and self.config.first_order == "halves", len(micro_batches) // 2
        g, g_half = {name: torch.zeros_like(p) for name, p in self.named.items()}, {}
        g_risk, share, losses, divergences = {n: torch.zeros_like(self.named[n]) for n in self.eligible}, 0.0, [], []
        for i, (forward, loss) in enumerate(micro_batches):
            self.some = some[i] if some else None
            value, divergence, share = METHODS[self.objective.name](self, forward, loss, first and not halves)
            losses.append(value.item())
            if divergence is not None:
                self._add(g_risk, divergence / len(micro_batches), retain_graph=True)
                divergences.append(divergence.item())
            self._add(g, value / len(micro_batches))
            if i + 1 == half:
                g_half = dict(g)
        if halves:  # in the place of Eq. 2's gradient: of the mean gradients of both halves, the difference
            g_risk = {n: len(micro_batches) / half * g_half[n] - g[n] for n in self.eligible}
        norm = torch.stack([x.norm() for x in g.values()]).norm().item()
        clip = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        g = {name: x * clip for name, x in g.items()}
        # what the masks look at is the task's gradient: without the part that R-Drop has added, clipped alike
        g_task = {name: g[name] - clip * share * g_risk[name] for name in self.eligible}
        seen = Step(sum(losses) / len(losses), norm, sum(divergences) / len(divergences) if divergences else None)
        if first:
            for n, x in g_risk.items():
                decay = self.config.risk_ema
                self.risk[n] = decay * self.risk.get(n, torch.zeros_like(x)) + (1 - decay) * x.abs()
        masks = self._masks(g, g_task, seen) if masking else {}
        self._update(g, masks)
        decay = self.objective.average_decay(self.t)
        if decay is not None:
            for name, p in self.named.items():
                self.average[name].mul_(decay).add_(p.detach(), alpha=1 - decay)
        return seen

    def _add(self, sums: Named, value: Tensor, retain_graph: bool = False) -> None:
        grads = torch.autograd.grad(value, [self.named[n] for n in sums], retain_graph=retain_graph, allow_unused=True)
        for name, grad in zip(list(sums), grads, strict=True):
            if grad is not None:
                sums[name] = sums[name] + grad

    # --- masks: a score, which end of it is kept, and what a 0 means ---

    def _masks(self, whole: Named, g: Named, seen: Step) -> dict[str, Named]:
        config = self.config
        if self.static is not None:
            found, masks = self.static
            seen.tau, seen.kept, seen.scores = dict(found.tau), dict(found.kept), {}
            return masks
        masks = {}
        if config.strategy in ("first", "ensemble"):  # Eq. 2
            scores = {n: self._magnitude(self.risk[n]) for n in self.eligible}
            masks["first"] = self._keep("first", scores, config.keep_first, config.keep_largest, seen)
        if config.strategy in ("second", "ensemble"):  # Eq. 4; no history: kept
            scores = {}
            for n in self.eligible:
                ratio = (1 - self.hyper(n).betas[0]) * self._magnitude(g[n]) / self._magnitude(self.m[n])
                history = self._magnitude(self.m[n]) != 0
                scores[n] = torch.where(history, (ratio - 1).abs(), torch.zeros_like(ratio))
            masks["second"] = self._keep("second", scores, config.keep_second, config.keep_largest, seen)
        if config.strategy == "random":
            scores = {n: self._uniform(n) for n in self.eligible}
            masks["first"] = self._keep("first", scores, config.keep_first, False, seen)
        if config.strategy == "gradient-mask":
            scores = {n: self._magnitude(g[n]) for n in self.eligible}
            masks["first"] = self._keep("first", scores, config.keep_first, True, seen)
        if config.strategy == "gallop":
            scores = {n: self._magnitude(g[n]) / self._magnitude(self.named[n].detach()) for n in self.eligible}
            masks["first"] = self._keep("first", scores, config.keep_first, True, seen)
            self.static = seen, masks
        if config.strategy == "cautious":  # of the step itself, whatever it minimises
            masks["first"] = {}
            kept = 0
            for n in self.eligible:
                beta1 = self.hyper(n).betas[0]
                agrees = ((beta1 * self.m[n] + (1 - beta1) * whole[n]) * whole[n] > 0).float()
                kept += int(agrees.sum())
                masks["first"][n] = agrees * agrees.numel() / (agrees.sum() + 1)
            seen.tau["first"], seen.kept["first"] = 1.0, kept
        return masks

    def _magnitude(self, x: Tensor) -> Tensor:
        """||.||_F of "the i-th parameter": a scalar's absolute value, or a tensor's norm."""
        return x.abs() if self.config.granularity == "element" else x.double().norm().float().reshape(1)

    def _keep(self, which: str, scores: Named, fraction: float | str, largest: bool, seen: Step) -> Named:
        """Eq. 3 over all eligible parameters of the model together."""
        every = torch.cat([s.flatten() for s in scores.values()])
        if isinstance(fraction, str):
            keep = int((every <= _divide(every, fraction)).sum())
        else:
            keep = max(1, int(fraction * every.numel() + 1e-9))
        tau = every.kthvalue(every.numel() - keep + 1 if largest else keep).values
        masks = {name: (s >= tau if largest else s <= tau).float() for name, s in scores.items()}
        seen.tau[which], seen.kept[which] = tau.item(), int(sum(mask.sum().item() for mask in masks.values()))
        seen.scores[which] = scores
        return masks

    def _uniform(self, name: str) -> Tensor:
        """Random numbers in [0, 1) that depend on seed, step, name and position, and on nothing else."""
        count = self.named[name].numel() if self.config.granularity == "element" else 1
        digest = hashlib.blake2b(f"{self.config.mask_seed}/{self.t}/{name}".encode(), digest_size=8).digest()
        low, high = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
        values = [_mix(_mix(i ^ low) ^ high) >> 8 for i in range(count)]
        return torch.tensor(values, dtype=torch.float32).div(1 << 24).view(self.named[name].shape if count > 1 else 1)

    def fisher_pass(self, batches: Iterable[tuple[Forward, Loss]], max_grad_norm: float = 0.0) -> None:
        """Child-Tuning_D: the mean over batches of the squared gradient, each parameter's gradient clipped alone."""
        fisher, count = {n: torch.zeros_like(self.named[n]) for n in self.eligible}, 0
        for forward, loss in batches:
            g = {n: torch.zeros_like(self.named[n]) for n in self.eligible}
            self._add(g, loss(forward()))
            for n in self.eligible:
                clip = min(1.0, max_grad_norm / (g[n].norm().item() + 1e-6)) if max_grad_norm else 1.0
                fisher[n] += (g[n] * clip) ** 2
            count += 1
        seen = Step(0.0, 0.0)
        scores = {n: f / count for n, f in fisher.items()}
        self.static = seen, {"first": self._keep("first", scores, self.config.keep_first, True, seen)}

    # --- the update ---

    @torch.no_grad()
    def _update(self, g: Named, masks: dict[str, Named]) -> None:
        strategy, t = self.config.strategy, self.t
        for name, p in self.named.items():
            h = self.hyper(name)
            beta1, beta2 = h.betas
            found = [mask[name] for mask in masks.values() if name in mask]
            M = found[0] if found else torch.ones_like(p)
            if len(found) == 2:  # Eq. 5
                M = self.config.gamma * found[0] + (1 - self.config.gamma) * found[1]
            used, on_step, on_decay = M * g[name] + (1 - M) * self.m[name], M, M  # line 8
            if strategy in ("child-tuning", "gradient-mask", "gallop"):  # the mask multiplies the gradient alone
                used, on_step, on_decay = M * g[name], torch.ones_like(p), torch.ones_like(p)
            if strategy == "cautious":  # the mask multiplies the step alone
                used, on_step, on_decay = g[name], M, torch.ones_like(p)
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * used  # line 9
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * used**2  # line 10
            m_hat, v_hat = self.m[name] / (1 - beta1**t), self.v[name] / (1 - beta2**t)  # line 11
            p -= h.lr * (m_hat / (v_hat.sqrt() + h.eps) * on_step + h.weight_decay * p * on_decay)  # lines 12 and 13

    # --- forward passes with other dropout, with shifted input embeddings, and with averaged weights ---

    def divergence(self, forward: Forward, a: Tensor | None = None) -> Tensor:
        """What first-order risk is the gradient of: of two dropout passes, the first one given or not (Eq. 1).

        A fast one goes through the second pass alone, and over some rows alone.
        """
        if self.config.first_order == "exact":
            return kl_both_ways(forward() if a is None else a, forward()).mean()
        picked, forward = self.some or (slice(None), forward)
        known = forward() if a is None else a[picked]
        return kl_both_ways(known.detach(), forward()).mean()

    def shifted(self, forward: Forward, shift: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Logits with ``shift`` added to the input embeddings, and the shift; a function is called with their shape."""
        used = []

        def add(embeddings: nn.Module, args: Any, out: Tensor) -> Tensor:
            used.append((shift(out.shape, generator) if callable(shift) else shift).detach().requires_grad_())
            return out + used[0]

        hook = self.model.get_input_embeddings().register_forward_hook(add)  # type: ignore[operator]
        try:
            logits = forward()
        finally:
            hook.remove()
        return logits, used[0]

    @contextmanager
    def averaged(self) -> Any:
        """The model with its averaged weights."""
        kept = {name: p.detach().clone() for name, p in self.named.items()}
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(self.average[name])
        yield
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(kept[name])


# --- objectives: the value to minimise, what first-order risk is the gradient of, and its share in the value ---

Minimised = tuple[Tensor, Tensor | None, float]


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(P_a || P_b), for each row of logits."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_both_ways(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 1, written out, for each row."""
    return kl(a, b) + kl(b, a)


def task(run: Reference, forward: Forward, loss: Loss, first: bool) -> Minimised:
    """The task loss of a pass; ROSE compares this pass with another one."""
    a = forward()
    return loss(a), run.divergence(forward, a) if first else None, 0.0


def r_drop(run: Reference, forward: Forward, loss: Loss, first: bool) -> Minimised:
    """(CE_a + CE_b) / 2 + alpha / 2 * symmetric KL."""
    a, b, alpha = forward(), forward(), run.objective.alpha
    kl = kl_both_ways(a, b)
    kl = kl.mean() if run.objective.kl_reduction == "mean" else kl.sum()
    return (loss(a) + loss(b)) / 2 + alpha / 2 * kl, kl, alpha / 2


def smart(run: Reference, forward: Forward, loss: Loss, first: bool) -> Minimised:
    """CE + weight * KL(clean, adversarial) + proximal * KL(clean, averaged weights), both symmetric; in the first, what
    stands first in either direction is a target that stands still.
    """
    o = run.objective
    if o.proximal:
        with run.averaged(), torch.no_grad():
            under_average = forward()
    clean = forward()
    divergence = run.divergence(forward, clean) if first else None
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    shift: Any = lambda shape, g: o.init_std * torch.randn(shape, generator=g)  # noqa: E731
    for _ in range(o.steps):
        logits, start = run.shifted(forward, shift, generator)
        uphill = torch.autograd.grad(kl(logits, clean.detach()).sum(), start)[0]
        shift = start.detach() + o.step_size * uphill
        shift = o.radius * shift / (shift.abs().amax(-1, keepdim=True) + 1e-6)
    adversarial, _ = run.shifted(forward, shift)
    smoothness = kl(adversarial.detach(), clean) + kl(clean.detach(), adversarial)
    value = loss(clean) + o.weight * smoothness.mean()
    if o.proximal:
        value = value + o.proximal * kl_both_ways(clean, under_average).mean()
    return value, divergence, 0.0


def freelb(run: Reference, forward: Forward, loss: Loss, first: bool) -> Minimised:
    """The mean of CE at K points of an ascent in the embeddings, all with one dropout mask."""
    o = run.objective
    divergence = run.divergence(forward) if first else None
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def uniform(shape: Any, g: torch.Generator) -> Tensor:  # no padding here
        return (torch.rand(shape, generator=g) * 2 - 1) * o.init_mag / (shape[1] * shape[2]) ** 0.5

    shift: Any = uniform
    total, dropout = torch.zeros(()), torch.get_rng_state()
    for k in range(o.passes):
        after = torch.get_rng_state()
        torch.set_rng_state(dropout)
        logits, used = run.shifted(forward, shift, generator)
        if k > 0:
            torch.set_rng_state(after)
        value = loss(logits) / o.passes
        total = total + value
        if k < o.passes - 1:
            uphill = torch.autograd.grad(value, used, retain_graph=True)[0]
            shift = used.detach() + o.step_size * uphill / uphill.flatten(1).norm(dim=1).view(-1, 1, 1)
            if o.max_norm:
                length = shift.flatten(1).norm(dim=1).view(-1, 1, 1)
                shift = shift * (o.max_norm / length).clamp_max(1.0)
    return total, divergence, 0.0


METHODS: dict[str, Callable[[Reference, Forward, Loss, bool], Minimised]] = {
    "task": task,
    "r-drop": r_drop,
    "smart": smart,
    "freelb": freelb,
}


def _divide(every: Tensor, criterion: str) -> float:
    """The largest risk of the low ones: Otsu's threshold on the logarithm (auto, otsu), or the mean (knee). An eighth
    of an octave is one value to both.
    """
    exponent = torch.frexp(every).exponent.double() - 1  # every = mantissa * 2**exponent, mantissa in [1, 2)
    eighth = ((every.double() / 2**exponent - 1) * 8).floor()
    there = every > 0
    if not there.any():
        return 0.0
    if criterion == "knee":
        middle = (1 + (eighth + 0.5) / 8) * 2**exponent
        return float(every[~there | (middle <= middle[there].mean())].max())
    place = (8 * exponent + eighth)[there]
    best, tau = -1.0, float(every.max())
    for at in place.unique()[:-1]:
        low, high = place[place <= at], place[place > at]
        between = low.numel() * high.numel() * float(low.mean() - high.mean()) ** 2
        if between > best * (1 + 1e-12):
            best, tau = between, float(every[there][place <= at].max())
    return tau


def _found(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _mix(x: int) -> int:
    """MurmurHash3's finalizer, on 32 bits."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
