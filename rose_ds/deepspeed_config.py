"""A DeepSpeed config as a file: read, and its shape checked before transformers or DeepSpeed take it for granted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rose_ds.errors import RefusedConfiguration


def read(path: str, named: str) -> dict[str, Any]:
    """The JSON object in a file. ``named``: the flag that errors begin with.

    Raises:
        RefusedConfiguration: not there, no JSON, or a section that is not what DeepSpeed expects.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusedConfiguration(f"{named} {path}: {str(error.strerror).lower()}") from error
    except (ValueError, RecursionError) as error:  # also: not UTF-8, a NUL in the path
        raise RefusedConfiguration(f"{named} {path} is not JSON: {error}") from error
    wrong = _misshapen(config)
    if wrong:
        raise RefusedConfiguration(f"{named} {path}: {wrong}")
    return dict(config)


def _misshapen(config: Any) -> str | None:
    """What is wrong with the parts of a DeepSpeed config that transformers takes for granted."""
    if not isinstance(config, dict):
        return f"a DeepSpeed config is a JSON object, found {config!r:.80}"
    for name in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler"):
        section = config.get(name, {})
        if not isinstance(section, dict):
            return f'"{name}" must be an object, found {section!r:.80}'
        for key, wanted, fits in (
            ("stage", "0, 1, 2 or 3", lambda v: type(v) is int and 0 <= v <= 3),
            ("enabled", 'true, false or "auto"', lambda v: isinstance(v, bool) or v == "auto"),
            ("type", "a name", lambda v: isinstance(v, str)),
            ("params", "an object", lambda v: isinstance(v, dict)),
        ):
            if key in section and not fits(section[key]):
                return f'"{key}" in "{name}" must be {wanted}, found {section[key]!r:.80}'
    if all(config.get(section, {}).get("enabled") is True for section in ("bf16", "fp16")):
        return '"bf16" and "fp16" are both enabled: enable one'
    return None
