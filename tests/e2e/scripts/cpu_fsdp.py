"""Lets accelerate enter FSDP on a CPU, for tests: ``python cpu_fsdp.py MODULE_OR_SCRIPT args``.

accelerate turns several GPU processes into FSDP ones, but not several CPU processes, and numbers the CPU device, which
FSDP1 does not take. transformers resets the shared state, so the constructor itself is wrapped.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

os.environ["ACCELERATE_USE_CPU"] = "true"

from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from torch.distributed.fsdp import FullStateDictConfig  # noqa: E402

_original = PartialState.__init__


def _init(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
    fresh = not PartialState._shared_state
    _original(self, True, **kwargs)
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fresh and wanted and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
        self.device = torch.device("cpu")


PartialState.__init__ = _init

_config = FullStateDictConfig.__init__


def _config_init(self: FullStateDictConfig, *args: Any, **kwargs: Any) -> None:
    # FSDP1 frees what it "moved" to the CPU, which on a CPU is what it has just gathered: a crash
    _config(self, *args, **{**kwargs, "offload_to_cpu": False})


FullStateDictConfig.__init__ = _config_init

if __name__ == "__main__":
    from rose_ds.cli.ending import ending_process_group

    target, sys.argv = sys.argv[1], sys.argv[1:]
    with ending_process_group():
        if target.endswith(".py"):
            sys.path.insert(0, str(Path(target).resolve().parent))
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
