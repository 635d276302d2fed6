"""``rose-ds`` with faults put in: ``faulty.py train ...``, and FAULTS, a JSON object, in the environment.

A fault names the optimizer step, from 0, and the rank it happens on; each is left out by default.
    {"nan": [step, rank]}         the model's logits and loss are not a number
    {"kill": [step, rank]}        SIGKILL in the middle of the step, between its two forward passes
    {"full": [step, rank]}        from this step on no file grows past 1 MB, as on a full disk
    {"pause": step}               every rank writes OUT/pausing-RANK and waits for OUT/go; OUT/told-RANK: it got SIGTERM
    {"out": folder}               where each rank reports:
        OUT/fault                   written when a rank is killed or its disk full
        OUT/rows-RANK.json          the rows of each step
        OUT/weights-RANK            a checksum of the weights after the last step
        OUT/begin.pt, OUT/end.pt    with {"state": true}: full weights and moments as loaded, and after the last step
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from rose_ds.optimizer import RoseAdamW
from rose_ds.training import trainer as module

FAULTS: dict[str, Any] = json.loads(os.environ["FAULTS"])
OUT = Path(FAULTS["out"])
RANK = int(os.environ.get("RANK", "0"))


class FaultyTrainer(module.RoseTrainer):
    rows: dict[int, list[int]]
    passes = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows = {}
        self.add_callback(Reporter(self))

    def here(self, fault: str) -> bool:
        return FAULTS.get(fault) == [self.state.global_step, RANK]

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Tensor:
        self.passes = 0
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            row = zlib.crc32(bytes(str(ids[mask.bool()].tolist()), "ascii"))
            self.rows.setdefault(self.state.global_step, []).append(row)
        if self.here("full"):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
            (OUT / "fault").touch()
        if FAULTS.get("pause") == self.state.global_step:
            (OUT / f"pausing-{RANK}").touch()
            while not (OUT / "go").exists():
                if self._stop.requested:
                    (OUT / f"told-{RANK}").touch()
                time.sleep(0.05)
        return super().training_step(model, inputs, *args)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        if not isinstance(found, tuple):  # the first batch's, looked at for several counts
            return found
        loss, outputs = found
        self.passes += 1
        if self.here("kill") and self.passes == 1:
            (OUT / "fault").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.here("nan"):
            outputs["logits"] = outputs["logits"] * float("nan")
            loss = loss * float("nan")
        return loss, outputs

    def everything(self) -> dict[str, Tensor]:
        """Full weights and moments by name, on every rank."""
        stepper = self._stepper_for(self.model_wrapped)
        found = dict(stepper.gather_parameters())
        for name, param in stepper.engine.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {key}"] = self.moment(stepper.optimizer, param, key)
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def moment(self, optimizer: RoseAdamW, param: Any, key: str) -> Tensor:
        if self.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_optimizer_state

            return safe_get_full_optimizer_state(param, key)
        value = optimizer.state[param][key]
        return value.full_tensor() if isinstance(value, DTensor) else value


class Reporter(TrainerCallback):
    def __init__(self, trainer: FaultyTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            self.save("begin.pt")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.save("end.pt")
        (OUT / f"rows-{RANK}.json").write_text(json.dumps(self.trainer.rows))
        checksum = 0
        for param in self.trainer.model.parameters():
            value = param.full_tensor() if isinstance(param, DTensor) else param
            checksum = zlib.crc32(value.detach().numpy().tobytes(), checksum)
        (OUT / f"weights-{RANK}").write_text(str(checksum))

    def save(self, name: str) -> None:
        if FAULTS.get("state"):
            everything = self.trainer.everything()
            if RANK == 0:
                torch.save(everything, OUT / name)


if __name__ == "__main__":
    import rose_ds.experiments.train as run

    run.RoseTrainer = FaultyTrainer  # type: ignore[misc]
    from rose_ds.cli import program

    program(sys.argv[1:])
