"""Mask policies: what is ranked, which end is kept, how often, and what a 0 means. One short file each."""

from __future__ import annotations

from rose_ds.config import RoseConfig
from rose_ds.masks.base import MaskPolicy
from rose_ds.masks.cautious import cautious
from rose_ds.masks.child_tuning import child_tuning
from rose_ds.masks.gallop import gallop
from rose_ds.masks.gradient_mask import gradient_mask
from rose_ds.masks.random_mask import random_mask
from rose_ds.masks.rose import rose

__all__ = ["MaskPolicy", "policy_of"]

_POLICIES = {
    "first": rose,
    "second": rose,
    "ensemble": rose,
    "child-tuning": child_tuning,
    "random": random_mask,
    "gradient-mask": gradient_mask,
    "gallop": gallop,
    "cautious": cautious,
}


def policy_of(config: RoseConfig) -> MaskPolicy | None:
    """The policy of ``config.strategy``; None for "none", which masks nothing."""
    return None if config.strategy == "none" else _POLICIES[config.strategy](config)
