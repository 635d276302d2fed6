"""Settings and optimizer blocks of every kind: accepted ones mean what they say, others are refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from fuzzing import FUZZ, JSON
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rose_ds import RoseAdamW, RoseConfig
from rose_ds.masks import policy_of

pytestmark = pytest.mark.fast

#: Text on which regular expressions stumble, beside any other.
PATTERNS = (
    st.sampled_from(
        ["layer.*weight", "la(yer", "[", "a{99999999999}", "(" * 3000, "*", "\\", "(?i)x", "(?P<a>x)(?P<a>y)"]
    )
    | st.text(max_size=6)
    | st.text(alphabet="()[]{}*+?|\\.^$0,9-", max_size=12)
)
FITTING: dict[str, SearchStrategy[Any]] = {
    "strategy": st.sampled_from(["none", "first", "second", "ensemble"]),
    "granularity": st.sampled_from(["element", "tensor"]),
    "keep_first": st.floats(0, 1) | st.integers(0, 1),
    "keep_second": st.floats(0, 1) | st.integers(0, 1),
    "gamma": st.floats(0, 1) | st.integers(0, 1),
    "include": PATTERNS | st.lists(PATTERNS, max_size=3),
    "exclude": PATTERNS | st.lists(PATTERNS, max_size=3),
    "mask_warmup_steps": st.integers(0),
    "first_order": st.sampled_from(["exact", "fast", "halves"]),
    "risk_rows": st.floats(0, 1) | st.integers(0, 1),
    "risk_ema": st.floats(0, 1) | st.integers(0, 1),
    "risk_every": st.integers(1),
}
NEAR_MISSES = st.sampled_from([True, False, -1e-9, 1.5, 2, -1, "1", "First", [None], ()])
SETTINGS = st.fixed_dictionaries({}, optional={name: fit | NEAR_MISSES | JSON for name, fit in FITTING.items()})
BLOCKS = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(0, 1) | JSON,
        "betas": st.lists(st.floats(0, 0.9999), min_size=2, max_size=2) | JSON,
        "eps": st.floats(1e-12, 1) | JSON,
        "weight_decay": st.floats(0, 1) | JSON,
        "foreach": st.booleans() | JSON,
        "strategy": st.just("none"),
        "keep_first": FITTING["keep_first"] | JSON,
        "amsgrad": JSON,
        "fused": st.booleans() | JSON,
        "adam_w_mode": JSON,
    },
)


def subject(error: Exception) -> str:
    """The setting that a message begins with."""
    words = re.match(r"\w+", str(error))
    assert words, error
    return words.group()


def is_number_in(value: object, low_open: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (value > 0 if low_open else value >= 0) and value <= 1


def check_valid(config: RoseConfig) -> None:
    """What every part of the package relies on."""
    assert config.strategy in ("none", "first", "second", "ensemble")
    assert config.granularity in ("element", "tensor")
    assert is_number_in(config.keep_first, low_open=True)
    assert is_number_in(config.keep_second, low_open=True)
    assert is_number_in(config.gamma, low_open=False)
    assert config.include
    for pattern in (*config.include, *config.exclude):
        assert isinstance(pattern, str)
        assert pattern
        re.compile(pattern)
    assert type(config.mask_warmup_steps) is int
    assert config.mask_warmup_steps >= 0
    policy = policy_of(config)
    assert (policy is None) == (config.strategy == "none")
    assert policy is None or all(0 <= value <= 1 for value in policy.values)
    assert RoseConfig.from_mapping(json.loads(json.dumps(asdict(config)))) == config
    assert hash(config) == hash(RoseConfig(**asdict(config)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@FUZZ
@given(SETTINGS)
def test_a_config_is_what_was_asked_for_or_names_the_setting(values: dict[str, Any]) -> None:
    """Every refusal names a setting that was given; without the named ones the rest is accepted as it is."""
    rest = dict(values)
    while True:
        try:
            config = RoseConfig.from_mapping(rest)
            break
        except (ValueError, TypeError) as error:
            del rest[subject(error)]
    check_valid(config)
    for name, value in rest.items():
        if value is None:  # the strategy's own default, where it has one
            assert name in ("keep_first", "include")
            continue
        if name in ("include", "exclude"):
            value = (value,) if isinstance(value, str) else tuple(value)
        assert getattr(config, name) == value
    for name in ("keep_first", "keep_second", "gamma"):
        assert name in rest or not is_number_in(values.get(name), low_open=name != "gamma")


@FUZZ
@given(st.dictionaries(st.text(max_size=6) | st.integers(), JSON, min_size=1, max_size=3))
def test_unknown_settings_are_all_named(values: dict[Any, Any]) -> None:
    with pytest.raises(ValueError, match="unknown ROSE setting") as refused:
        RoseConfig.from_mapping(values)
    assert all(repr(name) in str(refused.value) for name in values)


@FUZZ
@given(JSON.filter(lambda value: not isinstance(value, dict)))
def test_settings_are_an_object(value: Any) -> None:
    with pytest.raises(TypeError, match="must be an object of names and values"):
        RoseConfig.from_mapping(value)


FOUND: list[tuple[str, Any, str]] = [
    ("include", "a{99999999999}", "is not a regular expression: the repetition number is too large"),
    ("include", "(" * 3000 + ")" * 3000, "is not a regular expression: maximum recursion depth"),
    ("include", "", "include has an empty pattern, which matches every name"),
    ("exclude", ["bias", ""], "exclude has an empty pattern"),
]


@pytest.mark.parametrize(("name", "value", "words"), FOUND, ids=["overflow", "recursion", "empty", "empty in a list"])
def test_patterns_that_once_slipped_through(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RoseConfig(**{name: value})


# --- the optimizer block of a DeepSpeed config ---


def two_steps(make: Callable[[list[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer]) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    optimizer = make([("weight", weight)])
    for grad in ([0.1, -0.2, 0.3], [0.2, 0.1, -0.3]):
        weight.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    return weight.detach()


@FUZZ
@given(BLOCKS)
def test_an_optimizer_block_is_adamw_or_names_the_setting(block: dict[str, Any]) -> None:
    """Whatever strategy="none" accepts it trains with as torch.optim.AdamW does, and stays finite."""
    rest = {**block, "strategy": "none"}
    while True:
        try:
            moved = two_steps(lambda named: RoseAdamW(named, **rest))
            break
        except (ValueError, TypeError) as error:
            named = [name for name in rest if name in str(error).split("; known:")[0]]
            assert named, f"{error} names none of {rest}"
            del rest[named[0]]
    numbers = [v for k, v in rest.items() if k in ("lr", "eps", "weight_decay")] + list(rest.get("betas", ()))
    assert all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in numbers)
    torch_block = {k: float(v) for k, v in rest.items() if k in ("lr", "eps", "weight_decay")}
    torch_block |= {"betas": tuple(rest.get("betas", (0.9, 0.999)))}
    wanted = two_steps(lambda named: torch.optim.AdamW([p for _, p in named], **torch_block))
    if torch.isfinite(wanted).all():  # a learning rate of 1e300 is legal
        assert torch.allclose(moved, wanted)
