"""Every setting of ROSE, in one validated place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Strategy = Literal["none", "first", "second", "ensemble"]
Granularity = Literal["element", "tensor"]

#: The authors mask the encoder blocks' weight matrices and LayerNorm weights; embeddings, biases, pooler and head are
#: always updated. Rows of the embedding that a batch does not touch have exactly zero KL gradient and would otherwise
#: fill the kept quota.
DEFAULT_INCLUDE = (r"layer.*weight",)


@dataclass(frozen=True, kw_only=True)
class RoseConfig:
    """Settings of Robust Selective Fine-tuning (Jiang et al., EMNLP 2022); bad values raise ValueError or TypeError."""

    strategy: Strategy = "ensemble"
    """Which parameters a step updates: ``first`` (small KL gradient, Eq. 2), ``second`` (gradient agrees with momentum,
    Eq. 4), ``ensemble`` (both, softly, Eq. 5) or ``none`` (all of them: plain AdamW)."""
    granularity: Granularity = "element"
    """What "the i-th parameter" is: every scalar (``element``) or every weight tensor (``tensor``, as the authors'
    released code)."""
    keep_first: float = 0.6
    """Fraction of eligible parameters kept by first-order risk, in (0, 1]: the paper's upper threshold c_F."""
    keep_second: float = 0.6
    """Fraction of eligible parameters kept by second-order risk, in (0, 1]: the paper's upper threshold c_S."""
    gamma: float = 0.5
    """Weight of the first-order mask in the ensemble, in [0, 1] (Eq. 5)."""
    include: tuple[str, ...] = DEFAULT_INCLUDE
    """Regular expressions; a parameter is eligible for masking when one is found in its qualified name."""
    exclude: tuple[str, ...] = ()
    """Regular expressions that take names out again."""
    mask_warmup_steps: int = 0
    """Optimizer steps at the start that update everything, as AdamW (no second forward pass either)."""

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, get_args(Strategy))
        _one_of("granularity", self.granularity, get_args(Granularity))
        _in_range("keep_first", self.keep_first, low_open=True)
        _in_range("keep_second", self.keep_second, low_open=True)
        _in_range("gamma", self.gamma, low_open=False)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if not self.include:
            raise ValueError(
                'include=() leaves nothing to mask: use strategy="none" for plain AdamW, or include=(".*",) for all'
            )
        steps = self.mask_warmup_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"mask_warmup_steps={steps!r} must be an integer >= 0")

    @property
    def uses_first(self) -> bool:
        """Whether a step needs the KL gradient."""
        return self.strategy in ("first", "ensemble")

    @property
    def uses_second(self) -> bool:
        """Whether a step compares the gradient with the momentum."""
        return self.strategy in ("second", "ensemble")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The settings' names, in order."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RoseConfig:
        """Build from e.g. a JSON object; an unknown key raises ValueError and lists the known ones."""
        if not isinstance(values, Mapping):
            raise TypeError(f"ROSE's settings must be an object of names and values, found {type(values).__name__}")
        unknown = sorted(set(values) - set(cls.field_names()), key=str)
        if unknown:
            raise ValueError(f"unknown ROSE setting(s) {unknown}; known: {list(cls.field_names())}")
        return cls(**values)

    def eligible(self, names: Iterable[str]) -> list[str]:
        """Names that may be masked, in the order given.

        Raises:
            ValueError: a pattern matches none of ``names`` (most often a model with other naming), or nothing is left.
        """
        names = list(names)
        for setting in ("include", "exclude"):
            for pattern in getattr(self, setting):
                if not any(re.search(pattern, name) for name in names):
                    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                    raise ValueError(
                        f"{setting} pattern {pattern!r} matches none of the model's {len(names)} trainable parameters "
                        f"({shown}); set {setting}= to regular expressions for this model's names"
                    )
        kept = [n for n in names if self._matches("include", n) and not self._matches("exclude", n)]
        if not kept:
            raise ValueError(f"exclude={self.exclude!r} removes every parameter that include={self.include!r} selects")
        return kept

    def _matches(self, setting: str, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in getattr(self, setting))


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {list(known)}")


def _in_range(name: str, value: object, *, low_open: bool) -> None:
    interval = "(0, 1]" if low_open else "[0, 1]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number in {interval}")
    if not (value >= 0 and value <= 1) or (low_open and value == 0):
        raise ValueError(f"{name}={value!r} must be in {interval}")


def _patterns(name: str, value: object) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{name}={value!r} must be a regular expression or a list of them")
    for pattern in patterns:
        if not pattern:
            raise ValueError(f'{name} has an empty pattern, which matches every name: write ".*" if all are meant')
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{name} pattern {pattern!r} is not a regular expression: {error}") from error
    return tuple(patterns)
