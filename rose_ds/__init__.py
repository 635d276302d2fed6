"""Adversarially robust fine-tuning (ROSE, EMNLP 2022) for sharded training."""

from rose_ds.config import RoseConfig
from rose_ds.engines.base import RefusedConfiguration
from rose_ds.exchange import kth_smallest
from rose_ds.objectives.divergence import symmetric_kl
from rose_ds.optimizer import RoseAdamW, register_with_deepspeed
from rose_ds.report import StepReport, write_scalars
from rose_ds.stepper import Stepper, prepare

__version__ = "0.1.0"
__all__ = [
    "RefusedConfiguration",
    "RoseAdamW",
    "RoseConfig",
    "StepReport",
    "Stepper",
    "kth_smallest",
    "prepare",
    "symmetric_kl",
    "write_scalars",
]

register_with_deepspeed()
