"""What an environment is checked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from rose_ds.experiments.methods import method_named


@dataclass
class Questions:
    """What the run is going to be, as far as it is known."""

    _argument_group_name: ClassVar[str] = "what to check"

    deepspeed: str | None = field(default=None, metadata={"help": "The run's DeepSpeed config."})
    model: str | None = field(
        default=None,
        metadata={"help": "minilm, a folder or a hub id: estimate memory and disk for it. Only its config is read."},
    )
    method: str = field(default="rose-ensemble", metadata={"help": "The run's method: decides what is held in memory."})
    include: list[str] | None = field(
        default=None, metadata={"help": "What may be masked, as the run's --include: @blocks where a model needs it."}
    )
    bf16: bool = field(
        default=False,
        metadata={
            "help": "The run has --bf16. A DeepSpeed config that enables it, and not by auto, says so by itself."
        },
    )
    fp16: bool = field(default=False, metadata={"help": "The run has --fp16, as above."})
    output_dir: str = field(default=".", metadata={"help": "Where the run is going to write. It is not created."})
    world_size: int | None = field(
        default=None,
        metadata={"help": "Estimate memory for so many ranks. Default: the launcher's."},
    )
    timeout: float = field(default=60.0, metadata={"help": "Seconds to wait for the other ranks."})
    build: bool = field(
        default=False,
        metadata={"help": "Build DeepSpeed's extension for CPU ranks now, rather than in the first step."},
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object in place of lines."})

    def __post_init__(self) -> None:
        if self.world_size is not None and self.world_size < 1:
            raise ValueError(f"world_size={self.world_size} must be at least 1")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout={self.timeout} must be a number of seconds above 0")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both given: a run has one of them")
        method_named(self.method)

    @property
    def precision(self) -> str | None:
        """bf16 or fp16, where the run has that flag."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else None
