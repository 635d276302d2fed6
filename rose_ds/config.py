"""Every setting of ROSE, in one validated place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from rose_ds.errors import RefusedConfiguration

Strategy = Literal[
    "none", "first", "second", "ensemble", "child-tuning", "random", "gradient-mask", "gallop", "cautious"
]
Granularity = Literal["element", "tensor"]
FirstOrder = Literal["exact", "fast", "halves"]
#: How a fraction to keep is chosen in each step.
Criterion = Literal["auto", "otsu", "knee"]
Keep = float | Criterion

#: The authors mask the encoder blocks' weight matrices and LayerNorm weights; embeddings, biases, pooler and head are
#: always updated. Rows of the embedding that a batch does not touch have exactly zero KL gradient and would otherwise
#: fill the kept quota.
DEFAULT_INCLUDE = (r"layer.*weight",)

#: In ``include``: every weight in the model's numbered blocks, whatever their names (``rose_ds.eligible``).
BLOCKS = "@blocks"

#: Where a strategy's own defaults are not ROSE's.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "child-tuning": {"keep_first": 0.3, "include": ("layer",)},  # biases too, as its authors
    "cautious": {"include": (".*",)},
}
_ROSE = ("first", "second", "ensemble")
#: Fields that say how first-order risk is found, which other strategies do not look at.
_RISK = ("first_order", "risk_rows", "risk_ema", "risk_every")
_ELEMENT_ONLY = ("child-tuning", "cautious")
_SCORED = ("random", "gradient-mask", "gallop")
#: Settings that only these strategies look at; every other one, all but "none" do.
LOOKED_AT_BY: dict[str, tuple[str, ...]] = {
    "keep_first": ("first", "ensemble", "child-tuning", *_SCORED),
    "keep_second": ("second", "ensemble"),
    "gamma": ("ensemble",),
    "mask_seed": ("random",),
    "keep_largest": _ROSE,
    "granularity": (*_ROSE, *_SCORED),
    "mask_warmup_steps": (*_ROSE, *_ELEMENT_ONLY, "random", "gradient-mask"),
    **dict.fromkeys(_RISK, ("first", "ensemble")),
}


def _defaults_of(strategy: str) -> dict[str, Any]:
    """Of the settings whose default a strategy chooses."""
    return {"keep_first": 0.6, "include": DEFAULT_INCLUDE, **_DEFAULTS.get(strategy, {})}


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class RoseConfig:
    """Which parameters a step updates. Every field is a keyword of RoseAdamW, a key of a DeepSpeed JSON's optimizer
    block, and a flag of ``rose-ds train``; bad values raise ValueError or TypeError.
    """

    strategy: Strategy = _setting(
        "ensemble",
        "Which parameters a step updates: first (small KL gradient between two dropout passes, Eq. 2), second "
        "(gradient agrees with momentum, Eq. 4), ensemble (both, softly, Eq. 5), none (all of them: plain AdamW), "
        "child-tuning (largest Fisher information, found once), random, gradient-mask (largest gradient), gallop "
        "(largest |gradient / weight|, found once) or cautious (gradient and update have one sign).",
    )
    granularity: Granularity = _setting(
        "element",
        'What "the i-th parameter" is: every scalar (element), or every weight tensor (tensor, as the authors\' '
        "released code).",
    )
    keep_first: Keep = _setting(
        None,
        "Fraction of eligible parameters kept, in (0, 1], by first-order risk (the paper's upper threshold c_F) or by "
        "the score of a strategy that is not ROSE's. Default 0.6; child-tuning 0.3. For first and ensemble also chosen "
        "in each step from the risks of the whole model: auto or otsu (Otsu's threshold of the logarithm of the risk; "
        'accelerate wants no "auto" in a DeepSpeed config) or knee (those below the mean).',
    )
    keep_second: Keep = _setting(
        0.6,
        "Fraction of eligible parameters kept by second-order risk, in (0, 1]: the paper's upper threshold c_S; or "
        "auto, otsu or knee.",
    )
    gamma: float = _setting(0.5, "Weight of the first-order mask in the ensemble, in [0, 1] (Eq. 5).")
    include: tuple[str, ...] = _setting(
        None,
        "Regular expressions; a parameter is eligible for masking when one is found in its qualified name. Default "
        r"layer.*weight; child-tuning layer; cautious .* (all). @blocks: all weights in the model's numbered blocks, "
        "for models with other names.",
    )
    exclude: tuple[str, ...] = _setting((), "Regular expressions that take names out again.")
    mask_warmup_steps: int = _setting(
        0, "Optimizer steps at the start that update everything, as AdamW (no second forward pass either)."
    )
    keep_largest: bool = _setting(
        False, "A control for first, second and ensemble: keep the highest risks instead of the lowest."
    )
    mask_seed: int = _setting(0, "Seed of the random strategy's masks, an integer >= 0.")
    first_order: FirstOrder = _setting(
        "exact",
        "How the gradient behind first-order risk is found: exact (through both passes, over all rows: a step costs "
        "2.7 of AdamW's), fast (through the second pass alone, over risk_rows of the rows: 1.25 of AdamW's) or halves "
        "(no second pass: the difference between the task gradients of a step's two halves of micro-batches, which "
        "needs gradient accumulation: 1.0 of AdamW's). An element-wise mask of a fast risk, or of halves, agrees with "
        "an exact one as well as two exact ones do with each other.",
    )
    risk_rows: float = _setting(0.25, "Fraction of a micro-batch's rows that a fast risk is found from, in (0, 1].")
    risk_ema: float = _setting(
        0.0,
        "Decay of a moving average of first-order risk over steps, in [0, 1); 0: each step's own. Makes masks less of "
        "a draw of dropout; 4 bytes for each eligible parameter.",
    )
    risk_every: int = _setting(
        1, "Find first-order risk anew every so many steps, and rank the last one found in between (no second pass)."
    )

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, get_args(Strategy))
        _one_of("granularity", self.granularity, get_args(Granularity))
        for name, default in _defaults_of(self.strategy).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("keep_first", "keep_second"):
            value = getattr(self, name)
            if not isinstance(value, str):
                _in_range(name, value, low_open=True)
            elif value not in get_args(Criterion):
                raise TypeError(f"{name}={value!r} must be a number in (0, 1], or one of {list(get_args(Criterion))}")
        if isinstance(self.keep_first, str) and self.strategy not in (*_ROSE, "none"):
            raise ValueError(
                f"keep_first={self.keep_first!r} divides risks into low and high ones, and strategy={self.strategy!r} "
                "ranks no risk: give a fraction"
            )
        _in_range("gamma", self.gamma, low_open=False)
        self._check_risk()
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if not self.include:
            raise ValueError(
                'include=() leaves nothing to mask: use strategy="none" for plain AdamW, or include=(".*",) for all'
            )
        for name in ("mask_warmup_steps", "mask_seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r} must be an integer >= 0")
        if self.strategy == "gallop" and self.mask_warmup_steps:
            raise ValueError(
                'strategy="gallop" ranks by the pretrained weights, which '
                f"mask_warmup_steps={self.mask_warmup_steps} would train first: leave it at 0"
            )
        if not isinstance(self.keep_largest, bool):
            raise TypeError(f"keep_largest={self.keep_largest!r} must be true or false")
        if self.keep_largest and self.strategy not in _ROSE:
            raise ValueError(f"keep_largest=True inverts a risk of ROSE; strategy={self.strategy!r} has none")
        if self.granularity == "tensor" and self.strategy in _ELEMENT_ONLY:
            raise ValueError(f'strategy={self.strategy!r} is defined for scalars only: use granularity="element"')

    def _check_risk(self) -> None:
        _one_of("first_order", self.first_order, get_args(FirstOrder))
        _in_range("risk_rows", self.risk_rows, low_open=True)
        _in_range("risk_ema", self.risk_ema, low_open=False)
        if self.risk_ema == 1:
            raise ValueError("risk_ema=1 would never take in a risk: it must be in [0, 1)")
        if isinstance(self.risk_every, bool) or not isinstance(self.risk_every, int) or self.risk_every < 1:
            raise ValueError(f"risk_every={self.risk_every!r} must be an integer >= 1")
        given = [f.name for f in fields(self) if f.name in _RISK and getattr(self, f.name) != f.default]
        if given and not self.uses_first and self.strategy != "none":
            raise ValueError(f"{given[0]} is of first-order risk, which strategy={self.strategy!r} does not rank")
        if self.risk_rows != type(self).risk_rows and self.first_order != "fast":
            raise ValueError(
                f'risk_rows={self.risk_rows} is of first_order="fast"; first_order={self.first_order!r} takes all rows'
            )

    def ignored(self) -> list[str]:
        """Settings that were given another value than their default and that the strategy does not look at."""
        if self.strategy == "none":  # which is tried beside others
            return []
        defaults = {f.name: f.default for f in fields(self)} | _defaults_of(self.strategy)
        unused = [name for name, by in LOOKED_AT_BY.items() if self.strategy not in by]
        return [name for name in unused if getattr(self, name) != defaults[name]]

    @property
    def keeps_risk(self) -> bool:
        """Whether first-order risk outlives its step."""
        return self.uses_first and (self.risk_ema > 0 or self.risk_every > 1)

    @property
    def uses_first(self) -> bool:
        """Whether a step ranks first-order risk."""
        return self.strategy in ("first", "ensemble")

    @property
    def compares_passes(self) -> bool:
        """Whether first-order risk is the gradient of a divergence between two dropout passes."""
        return self.uses_first and self.first_order != "halves"

    @property
    def uses_second(self) -> bool:
        """Whether a step compares the gradient with the momentum."""
        return self.strategy in ("second", "ensemble")

    @property
    def keeps_all(self) -> bool:
        """Whether the fractions to keep are all 1."""
        return (self.keep_first == 1 or self.strategy == "second") and (self.keep_second == 1 or not self.uses_second)

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
            raise RefusedConfiguration(f"unknown ROSE setting(s) {unknown}; known: {list(cls.field_names())}")
        return cls(**values)

    def eligible(self, names: Iterable[str], *, include: tuple[str, ...] | None = None) -> list[str]:
        """Names that may be masked, in the order given; by other patterns than ``include`` where they are given.

        Raises:
            ValueError: a pattern matches none of ``names`` (most often a model with other naming), or nothing is left.
        """
        names = list(names)
        patterns = {"include": self.include if include is None else include, "exclude": self.exclude}
        for setting, wanted in patterns.items():
            for pattern in wanted:
                if not any(re.search(pattern, name) for name in names):
                    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                    raise ValueError(
                        f"{setting} pattern {pattern!r} matches none of the model's {len(names)} trainable parameters "
                        f"({shown}); set {setting}= to regular expressions for this model's names"
                    )
        kept = [n for n in names if _matches(patterns["include"], n) and not _matches(self.exclude, n)]
        if not kept:
            raise ValueError(f"exclude={self.exclude!r} removes every parameter that include={self.include!r} selects")
        return kept


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


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
