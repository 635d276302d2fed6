"""Which cells are one: by all that a run's result depends on, and by nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rose_ds.experiments.settings import RunSettings

Settings = Mapping[str, Any]

#: Files and folders that are known by their content, wherever they lie, where they are on this machine: a model may be
#: the hub's, an accelerator_config may be written out.
_FILES = ("train_file", "validation_file", "adversarial_file")
_MAYBE_FILES = ("model", "deepspeed", "fsdp_config", "accelerator_config")
#: What of a model's folder it consists of; other files come and go.
_OF_MODELS = ("config.json", "*.safetensors", "*.bin", "*.model", "vocab*", "merges.txt", "*token*.json")


def known_by_content(settings: Settings) -> dict[str, str]:
    """Those of the settings that name files or folders, of which ``digest_of`` the content counts; where each lies.

    Raises:
        ValueError: a file or folder is meant, and is not there.
    """
    found = {flag: str(settings[flag]) for flag in _FILES if flag in settings}
    for flag in _MAYBE_FILES:
        value = settings.get(flag)
        if not isinstance(value, str) or value.startswith("{"):
            continue
        place = value
        if flag == "model":
            if value == RunSettings.model:  # whatever else has this name here
                continue
            place = os.path.expanduser(value)  # noqa: PTH111  Path's raises for an unknown user
        if os.path.exists(place):  # noqa: PTH110  Path's raises where the name is too long
            found[flag] = place
        elif flag != "model" or value[:1] in (".", "/", "~"):
            raise ValueError(f"{flag}={value!r} is not there, and a cell is known by its content")
    return found


def digest_of(path: str) -> str:
    """Of a file's content, twelve hexadecimal digits; of a folder's files one after the other, without hidden ones, and
    without those of a model's folder that are no part of the model.
    """
    try:
        whole = Path(path)
        if (whole / "config.json").is_file():
            files = sorted({file for part in _OF_MODELS for file in whole.glob(part)})
        elif whole.is_dir():
            files = sorted(p for p in whole.rglob("*") if p.is_file() and not p.name.startswith("."))
        else:
            files = [whole]
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as content:
                for block in iter(lambda: content.read(1 << 20), b""):  # noqa: B023
                    digest.update(block)
    except OSError as error:
        raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error
    return digest.hexdigest()[:12]


def settings_key(settings: Settings) -> str:
    """A text that is the same for the same settings, as ``Cell.portable`` has them."""
    return json.dumps(canonical(settings), sort_keys=True)


def canonical(settings: Settings) -> dict[str, Any]:
    """Portable settings with files by their content alone, whatever they are called."""
    known = {name: with_leaves(value, _whole) for name, value in settings.items()}
    for name in (*_FILES, *_MAYBE_FILES):
        if isinstance(known.get(name), str) and _DIGESTED.search(known[name]):
            known[name] = known[name][-12:]
    return known


_DIGESTED = re.compile(r" [0-9a-f]{12}$")


def with_leaves(value: Any, of: Callable[[Any], Any]) -> Any:
    """A setting as it is, with ``of`` what stands in its mappings and lists, however deep."""
    if isinstance(value, Mapping):
        return {key: with_leaves(v, of) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_leaves(v, of) for v in value]
    return of(value)


def _whole(value: Any) -> Any:
    """100.0 and 100 are one setting."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
