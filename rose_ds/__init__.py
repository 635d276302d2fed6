"""Adversarially robust fine-tuning (ROSE, EMNLP 2022) for sharded training."""

from typing import TYPE_CHECKING, Any

from rose_ds.config import RoseConfig
from rose_ds.engines.passes import Sample
from rose_ds.errors import RefusedConfiguration
from rose_ds.exchange import kth_smallest
from rose_ds.objectives.divergence import symmetric_kl
from rose_ds.optimizer import RoseAdamW, register_with_deepspeed
from rose_ds.training.sampling import sample_rows
from rose_ds.training.step_report import StepReport, write_scalars
from rose_ds.training.stepper import Stepper, prepare

if TYPE_CHECKING:
    from rose_ds.training.trainer import RoseTrainer

__version__ = "0.1.0"
__all__ = [
    "RefusedConfiguration",
    "RoseAdamW",
    "RoseConfig",
    "RoseTrainer",
    "Sample",
    "StepReport",
    "Stepper",
    "kth_smallest",
    "prepare",
    "sample_rows",
    "symmetric_kl",
    "write_scalars",
]

register_with_deepspeed()


def __getattr__(name: str) -> Any:
    """RoseTrainer on first use: transformers' Trainer takes seconds to import, and loops of one's own do without."""
    if name == "RoseTrainer":
        from rose_ds.training.trainer import RoseTrainer

        return RoseTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
