"""metrics.json: what a run measured, in one record that every command reads and writes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rose_ds.data.tasks import TASKS

FILE = "metrics.json"
#: Of the format. 1 had no version, status, commit, packages and peak memory; 2 no calibration errors and hardware; 3 no
#: automatic attacks.
VERSION = 4

#: What an adversarial set is called that is not AdvGLUE.
ADVERSARIAL = "adversarial"
_TYPES = {"str": str, "int": int, "dict": dict}


def write_whole(path: Path, text: str) -> Path:
    """Write a file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


class NewerVersion(ValueError):
    """A record that a newer rose_ds has written, which may say what this one does not know."""


@dataclass
class Metrics:
    """One run. Accuracies are fractions in [0, 1]; None where there is no such set or the run did not train. A file of
    an older version is read with the defaults for what it lacks.
    """

    task: str
    model: str
    method: str | None = None
    seed: int | None = None
    engine: str | None = None
    world_size: int | None = None
    precision: str | None = None
    steps: int | None = None
    train_seconds: float | None = None
    step_seconds: float | None = None
    """Median wall-clock seconds of an optimizer step, the first two left out."""
    kept_fraction: float | None = None
    """Mean over steps of the fraction of eligible parameters kept; None without masks."""
    skipped_steps: int | None = None
    peak_memory_bytes: int | None = None
    """Most that one rank held during training: allocated on its CUDA device, else resident on the host."""
    glue_accuracy: float | None = None
    """Accuracy on the task's clean dev set."""
    advglue_accuracy: float | None = None
    perturbed_accuracy: float | None = None
    """Accuracy on the perturbed copy of the clean dev set."""
    glue_ece: float | None = None
    """Expected calibration error on the clean dev set, a fraction; so the next two on theirs."""
    advglue_ece: float | None = None
    perturbed_ece: float | None = None
    perturbed_by_family: dict[str, float] = field(default_factory=dict)
    under_attack: dict[str, float] = field(default_factory=dict)
    """Accuracy under each automatic attack that was made, by its search, limits and items."""
    config: dict[str, Any] = field(default_factory=dict)
    """The settings used."""
    version: int = VERSION
    status: str = "done"
    """A record is written once its run has come to its end; a run that was stopped or failed leaves none."""
    commit: str | None = None
    """Of rose_ds, with "-dirty" where files were changed; None where it is not a git checkout."""
    packages: dict[str, str] = field(default_factory=dict)
    """Versions of what computed it, by name."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """Where it ran: processor, cores, memory, accelerators."""

    def write(self, folder: Path) -> Path:
        """Write folder/metrics.json whole or not at all."""
        return write_whole(folder / FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Metrics:
        """Read folder/metrics.json. Raises ValueError naming the file when it is missing, unreadable or not one."""
        path = folder / FILE
        try:
            metrics = cls.of(json.loads(path.read_text(encoding="utf-8")))
            metrics._check()
        except NewerVersion as error:
            raise NewerVersion(f"{path}: {error}") from error
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a metrics file: {error}") from error
        return metrics

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Metrics:
        """Of what was written, now or by an older version.

        Raises:
            NewerVersion: a newer one has written it.
            TypeError, ValueError: it is no such record.
        """
        version = {"version": 1, **record}["version"]
        if type(version) is int and version > VERSION:
            raise NewerVersion(f"version={version} is of a newer rose_ds, 1 to {VERSION} are known here: upgrade")
        if version not in range(1, VERSION + 1):
            raise ValueError(f"version={version!r} is not known, only 1 to {VERSION} are")
        return cls(**{**record, "version": version})

    def _check(self) -> None:
        """Every value has its field's type; numbers are finite, accuracies fractions. Raises ValueError."""
        for f in fields(self):
            value, kind = getattr(self, f.name), str(f.type)
            if value is None and kind.endswith("| None"):
                continue
            if f.name in ("perturbed_by_family", "under_attack") and isinstance(value, dict):
                for family, accuracy in value.items():
                    _check_number(f"{f.name}[{family!r}]", accuracy, fraction=True)
            elif kind.startswith("float"):
                _check_number(f.name, value, fraction=f.name.endswith(("accuracy", "fraction", "ece")))
            elif not isinstance(value, _TYPES[kind.partition(" ")[0].partition("[")[0]]) or isinstance(value, bool):
                raise ValueError(f"{f.name}={value!r} is not a {kind}")
        if not all(isinstance(version, str) for version in self.packages.values()):
            raise ValueError(f"packages={self.packages!r} are not versions by name")

    @property
    def adversarial_name(self) -> str:
        """Of the adversarial set: AdvGLUE's own is GLUE's tasks' where no file takes its place."""
        task = TASKS.get(self.task)
        own = any(self.config.get(name) for name in ("adversarial_file", "train_file", "validation_file", "dataset"))
        return ADVERSARIAL if own or task is None or task.adv_key is None else "AdvGLUE"

    def summary(self) -> str:
        """The accuracies on one line, each with its calibration error (ECE) in points."""
        named = {
            "clean": (self.glue_accuracy, self.glue_ece),
            self.adversarial_name: (self.advglue_accuracy, self.advglue_ece),
            "perturbed": (self.perturbed_accuracy, self.perturbed_ece),
        }
        shown = [
            f"{name} {value:.2%}" + ("" if ece is None else f" (ECE {100 * ece:.1f})")
            for name, (value, ece) in named.items()
            if value is not None
        ]
        return f"{self.task} {self.method or self.model}: " + ", ".join(shown)


def _check_number(name: str, value: Any, *, fraction: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} is not a number")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}={value!r} is not finite")
    if fraction and not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is not in [0, 1]")
