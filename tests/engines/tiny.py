"""A tiny model, its batches and settings, for engine tests: the same numbers at every world size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rose_ds.objectives import Objective, Task, base
from rose_ds.reference import Hyper

GLOBAL_BATCH, VOCABULARY, LENGTH, CLASSES = 12, 31, 5, 3
DIM, HIDDEN = 13, 19  # odd, so that no parameter divides by 2 or 3 ranks
DATA_SEED, DROPOUT_SEED = 11, 1234
FISHER_STEPS, FISHER_CLIP = (101, 102, 103), 0.5  # batches that Child-Tuning_D looks at first


RISK = ("risk_ema", "risk_every", "mask_seed")


@dataclass(frozen=True)
class Case:
    """One training run: ROSE's settings, the optimizer's, and the model's."""

    strategy: str = "ensemble"
    granularity: str = "element"
    accumulation: int = 1
    keep_first: float | str = 0.6
    keep_second: float | str = 0.45
    gamma: float = 0.3
    mask_warmup_steps: int = 0
    steps: int = 5
    clip: float = 0.7
    two_groups: bool = False
    checkpointing: bool = False
    depth: int = 2
    hidden: int = HIDDEN
    dropout: float = 0.2
    frozen: bool = False
    """Embeddings do not train."""
    batch: int = GLOBAL_BATCH
    """Rows of a step, over all ranks and micro-batches."""
    objective: Objective = Task()
    keep_largest: bool = False
    first_order: str = "exact"
    sampled: bool = False
    """A fast risk is found from every other row; the number of rows of every rank must be even."""
    risk_ema: float = 0.0
    risk_every: int = 1
    mask_seed: int = 0

    @property
    def rose(self) -> dict[str, Any]:
        """The settings that RoseAdamW takes."""
        names = ["strategy", "granularity", "keep_first", "keep_second", "gamma", "mask_warmup_steps", "keep_largest"]
        names += ["first_order", *RISK]
        return {name: getattr(self, name) for name in names}

    @property
    def ranking(self) -> list[str]:
        """For a test's id: how the fractions kept are chosen, and how first-order risk is found, where not as usual."""
        keeps = [(name, getattr(self, name)) for name in ("keep_first", "keep_second")]
        labels = [f"{name}-{value}" for name, value in keeps if isinstance(value, str)]
        labels += [self.first_order + "-sampled" * self.sampled] if self.first_order != "exact" else []
        return labels + [f"{n}{getattr(self, n)}" for n in RISK if getattr(self, n) != getattr(type(self), n)]

    def __str__(self) -> str:
        extra = [name for name in ("two_groups", "checkpointing", "frozen", "mask_warmup_steps") if getattr(self, name)]
        extra += [f"batch{self.batch}"] if self.batch != GLOBAL_BATCH else []
        extra += ["inverted"] if self.keep_largest else []
        extra += self.ranking
        settings = [f"{name}{value}" for name, value in vars(self.objective).items() if value != _default(self, name)]
        extra += [] if self.objective == Task() else [self.objective.name, *settings]
        return "-".join([self.strategy, self.granularity, f"ga{self.accumulation}", *extra])


def _default(case: Case, name: str) -> Any:
    return getattr(type(case.objective)(), name)


# --- the model ---

DEVICE = torch.device("cpu")  # where an engine's model and batches lie; the twin's are on the CPU
_rows: tuple[int, slice] | None = None


def use(device: torch.device) -> None:
    """Have this process's engines run on ``device``; random numbers stay those of the CPU."""
    global DEVICE
    DEVICE = device


@contextmanager
def rows(total: int, mine: slice) -> Iterator[None]:
    """Say which rows of a batch of ``total`` this rank runs; GlobalDropout asks."""
    global _rows
    before, _rows = _rows, (total, mine)
    try:
        yield
    finally:
        _rows = before


def _global(draw: Any) -> Any:
    def mine(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if _rows is None:  # another test's model, in the same process
            return draw(shape, generator)
        return draw((_rows[0], *shape[1:]), generator)[_rows[1]]

    return mine


# noise of the global batch, as GlobalDropout's masks: an objective on a rank gets that of its rows
base.normal_noise, base.uniform_noise = _global(base.normal_noise), _global(base.uniform_noise)


class GlobalDropout(nn.Dropout):
    """nn.Dropout whose mask is that of the global batch: the same numbers, and RNG stream, at any world size."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        assert _rows is not None, "run the model inside rows()"
        total, mine = _rows
        mask = F.dropout(torch.ones(total, *x.shape[1:]), self.p)
        return x * mask[mine].to(x)


class Gate(nn.Module):
    """A weight of one element: most ranks hold nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    """Residual feed-forward block with a LayerNorm, named as in BERT."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, hidden), nn.Linear(hidden, DIM)
        self.gate, self.dropout, self.LayerNorm = Gate(), GlobalDropout(dropout), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.gate(self.down(self.dropout(torch.tanh(self.up(x))))))


class Tiny(nn.Module):
    """Embeddings, ``layer.N`` blocks and a head: some names eligible under the default patterns and some not."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embeddings, self.dropout = nn.Embedding(VOCABULARY, DIM), GlobalDropout(case.dropout)
        self.layer = nn.ModuleList([Block(case.hidden, case.dropout) for _ in range(case.depth)])
        self.head = nn.Linear(DIM, CLASSES)
        self.checkpointing = case.checkpointing

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.embeddings(ids).mean(1))
        for block in self.layer:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return 0.7 * self.head(x)  # gradient norms on both sides of Case.clip


def make_model(case: Case) -> Tiny:
    """The same weights for the same case, wherever it is called."""
    torch.manual_seed(7)
    model = Tiny(case)
    model.embeddings.requires_grad_(not case.frozen)
    return model


def micro_batch(case: Case, step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Ids and labels of one global micro-batch; the task can be learned."""
    generator = torch.Generator().manual_seed(1000 * DATA_SEED + step)
    ids = torch.randint(0, VOCABULARY, (case.batch, LENGTH), generator=generator)
    noise = torch.randint(0, 2, (case.batch,), generator=generator)
    size = case.batch // case.accumulation
    part = slice(micro * size, (micro + 1) * size)
    return ids[part], ((ids.sum(1) + noise) % CLASSES)[part]


HYPER = (
    Hyper(lr=3e-2, betas=(0.9, 0.98), weight_decay=0.05),
    Hyper(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0),
)


def group_of(case: Case, name: str) -> int:
    """Index into HYPER; with two groups, both hold eligible and always-updated names."""
    return int(case.two_groups and ("layer.1" in name or "head" in name))


def parameter_groups(case: Case, model: nn.Module, *, named: bool) -> list[dict[str, Any]]:
    """Groups for RoseAdamW (named) or for deepspeed.initialize (unnamed)."""
    groups = []
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for i, hyper in enumerate(HYPER[: 2 if case.two_groups else 1]):
        pairs = [(n, p) for n, p in trainable if group_of(case, n) == i]
        groups.append({"params": pairs if named else [p for _, p in pairs], **vars(hyper)})
    return groups
