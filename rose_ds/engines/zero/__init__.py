"""DeepSpeed, ZeRO stages 0 to 3."""

from rose_ds.engines.zero.engine import ZeroEngine

__all__ = ["ZeroEngine"]
