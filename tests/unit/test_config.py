"""RoseConfig: every setting validated with a message that names it, and which names are eligible."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from rose_ds import RefusedConfiguration, RoseConfig
from rose_ds.config import DEFAULT_INCLUDE
from rose_ds.eligible import eligible_names

pytestmark = pytest.mark.fast

#: (settings, exception, words of its message)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"strategy": "third"},
        ValueError,
        r"strategy='third' is not one of \['none', 'first', 'second', 'ensemble', 'child-tuning', "
        r"'random', 'gradient-mask', 'gallop', 'cautious'\]",
    ),
    ({"strategy": None}, ValueError, "strategy=None"),
    ({"granularity": "row"}, ValueError, r"granularity='row' is not one of \['element', 'tensor'\]"),
    *(
        ({name: value}, ValueError, rf"{name}=.* must be in \(0, 1\]")
        for name in ("keep_first", "keep_second")
        for value in (0, 0.0, -0.1, 1.0001, math.nan, math.inf)
    ),
    *(({"gamma": value}, ValueError, r"gamma=.* must be in \[0, 1\]") for value in (-0.1, 1.5, math.nan)),
    *(
        ({name: value}, TypeError, f"{name}=.* must be a number")
        for name in ("keep_first", "keep_second", "gamma")
        for value in ("0.5", None, True, [0.5])
        if not (name == "keep_first" and value is None)  # the strategy's own default
    ),
    ({"include": ()}, ValueError, r'include=\(\) .*strategy="none"'),
    ({"include": []}, ValueError, "include"),
    *(
        ({name: value}, TypeError, f"{name}=.* must be a regular expression")
        for name in ("include", "exclude")
        for value in (3, None, ("a", 3), {"a": 1})
        if not (name == "include" and value is None)
    ),
    ({"include": "layer("}, ValueError, r"include pattern 'layer\(' is not a regular expression"),
    ({"exclude": ("ok", "[")}, ValueError, r"exclude pattern '\[' is not a regular expression"),
    *(
        ({"mask_warmup_steps": value}, ValueError, "mask_warmup_steps=.* must be an integer >= 0")
        for value in (-1, 1.0, True, "3", None)
    ),
]


@pytest.mark.parametrize(("settings", "error", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        RoseConfig(**settings)
    with pytest.raises(error, match=words):
        RoseConfig.from_mapping(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_first": 1, "keep_second": 1.0, "gamma": 0},
        {"gamma": 1},
        {"keep_first": 1e-12},
        {"strategy": "none", "granularity": "tensor", "mask_warmup_steps": 10**9},
    ],
    ids=str,
)
def test_ends_of_ranges_are_accepted(settings: dict[str, Any]) -> None:
    config = RoseConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_defaults_are_the_papers() -> None:
    config = RoseConfig()
    assert (config.strategy, config.granularity, config.keep_first, config.keep_second) == (
        "ensemble",
        "element",
        0.6,
        0.6,
    )
    assert (config.gamma, config.include, config.exclude, config.mask_warmup_steps) == (0.5, DEFAULT_INCLUDE, (), 0)


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RoseConfig().gamma = 0.1  # type: ignore[misc]
    with pytest.raises(TypeError):
        RoseConfig("first")  # type: ignore[misc]
    assert hash(RoseConfig(include=["a"])) == hash(RoseConfig(include=("a",)))  # type: ignore[arg-type]


def test_patterns_from_json() -> None:
    """JSON has lists and single strings; both become tuples."""
    config = RoseConfig.from_mapping({"include": "layer", "exclude": ["bias", "norm"]})
    assert (config.include, config.exclude) == (("layer",), ("bias", "norm"))


def test_unknown_setting_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown ROSE setting\(s\) \['keep', 'lr_scale'\]; known: .*keep_first"):
        RoseConfig.from_mapping({"lr_scale": 1, "keep": 0.5})


@pytest.mark.parametrize(
    ("strategy", "first", "second"),
    [("none", False, False), ("first", True, False), ("second", False, True), ("ensemble", True, True)],
)
def test_what_a_strategy_uses(strategy: Any, first: bool, second: bool) -> None:
    config = RoseConfig(strategy=strategy)
    assert (config.uses_first, config.uses_second) == (first, second)


NAMES = [
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.0.attention.query.weight",
    "bert.encoder.layer.0.attention.query.bias",
    "bert.encoder.layer.0.LayerNorm.weight",
    "bert.encoder.layer.1.output.dense.weight",
    "bert.pooler.dense.weight",
    "classifier.weight",
]

ELIGIBLE: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [1, 3, 4]),
    ({"exclude": ("LayerNorm",)}, [1, 4]),
    ({"include": (r"\.weight$",), "exclude": ("embeddings", "pooler", "classifier")}, [1, 3, 4]),
    ({"include": ("classifier", r"layer\.1\.")}, [4, 6]),
    ({"include": (".",)}, list(range(7))),
]


@pytest.mark.parametrize(("settings", "kept"), ELIGIBLE, ids=str)
def test_eligible(settings: dict[str, Any], kept: list[int]) -> None:
    """Patterns are searched in the qualified name; the model's order is kept."""
    assert RoseConfig(**settings).eligible(iter(NAMES)) == [NAMES[i] for i in kept]


INELIGIBLE: list[tuple[dict[str, Any], str]] = [
    ({"include": ("blocks",)}, r"include pattern 'blocks' matches none of the model's 7 trainable parameters"),
    ({"include": ("layer", "blocks")}, r"include pattern 'blocks' .*bert\.embeddings.*set include="),
    ({"exclude": ("blocks",)}, r"exclude pattern 'blocks' matches none"),
    ({"exclude": ("weight",)}, r"exclude=\('weight',\) removes every parameter that include="),
]


@pytest.mark.parametrize(("settings", "words"), INELIGIBLE, ids=str)
def test_a_pattern_without_effect_is_an_error(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RoseConfig(**settings).eligible(NAMES)


def test_a_strategys_own_defaults() -> None:
    """None, and JSON's null, are the default of the strategy; what is given stays."""
    child = RoseConfig(strategy="child-tuning")
    assert (child.keep_first, child.include) == (0.3, ("layer",))
    assert RoseConfig(strategy="cautious").include == (".*",)
    given = RoseConfig.from_mapping({"strategy": "child-tuning", "keep_first": 0.7, "include": None})
    assert (given.keep_first, given.include) == (0.7, ("layer",))
    assert dataclasses.replace(child, keep_second=0.5).keep_first == 0.3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "gallop", "mask_warmup_steps": 5}, "ranks by the pretrained weights"),
        ({"strategy": "random", "keep_largest": True}, "keep_largest=True inverts a risk of ROSE"),
        ({"strategy": "child-tuning", "granularity": "tensor"}, 'use granularity="element"'),
        ({"strategy": "cautious", "granularity": "tensor"}, 'use granularity="element"'),
        ({"strategy": "random", "mask_seed": -1}, "mask_seed=-1 must be an integer >= 0"),
        ({"first_order": "slow"}, "first_order='slow' is not one of ['exact', 'fast', 'halves']"),
        ({"first_order": "fast", "risk_rows": 0}, "risk_rows=0 must be in (0, 1]"),
        ({"risk_rows": 0.5}, 'risk_rows=0.5 is of first_order="fast"'),
        ({"risk_ema": 1.0}, "risk_ema=1 would never take in a risk"),
        ({"risk_every": 0}, "risk_every=0 must be an integer >= 1"),
        ({"risk_every": True}, "risk_every=True must be an integer >= 1"),
        ({"strategy": "second", "risk_ema": 0.5}, "risk_ema is of first-order risk"),
        ({"strategy": "random", "first_order": "fast"}, "first_order is of first-order risk"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        RoseConfig(**settings)


def test_the_docs_list_every_setting() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    section = text.split("## Settings")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == set(RoseConfig.field_names())


def test_the_default_masks_no_embeddings_that_are_named_like_blocks() -> None:
    """Rows that a batch does not touch have no risk at all, and would fill what is kept."""
    shapes: dict[str, tuple[int, ...]] = {
        "bert_layer.embeddings.word_embeddings.weight": (100, 8),
        "bert_layer.embeddings.LayerNorm.weight": (8,),
        "bert_layer.encoder.layer.0.dense.weight": (8, 8),
        "bert_layer.encoder.layer.0.dense.bias": (8,),
        "bert_layer.pooler.dense.weight": (8, 8),
    }
    for strategy in ("first", "child-tuning"):
        with pytest.raises(RefusedConfiguration, match=r'word_embeddings\.weight.*include="@blocks".*or exclude= to'):
            eligible_names(RoseConfig(strategy=strategy), shapes)
        assert eligible_names(RoseConfig(strategy=strategy, exclude=("embed",)), shapes)[-1].startswith(
            "bert_layer.pooler"
        )
    assert eligible_names(RoseConfig(include=("@blocks",)), shapes) == ["bert_layer.encoder.layer.0.dense.weight"]
    assert len(eligible_names(RoseConfig(include=("layer.*weight$",)), shapes)) == 4  # who says so gets it
    with pytest.raises(RefusedConfiguration, match=r"bert_layer\.wte\.weight"):
        eligible_names(RoseConfig(), {"bert_layer.wte.weight": (100, 8), "bert_layer.h.layer.0.weight": (8, 8)})
    ours = {"layers.0.weight": (8, 8), "output_layer.weight": (2, 8)}  # a head is nobody's embedding
    assert eligible_names(RoseConfig(), ours) == list(ours)


def test_the_default_is_measured_against_a_models_names_with_exclude_too() -> None:
    """BLOOM's blocks have layer norms whose names it finds, and matrices whose names it does not."""
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings_layernorm.weight": (8,)}
    for n in range(2):
        shapes[f"transformer.h.{n}.input_layernorm.weight"] = (8,)
        shapes[f"transformer.h.{n}.mlp.dense_h_to_4h.weight"] = (32, 8)
    for exclude in ((), ("word_embeddings",)):
        with pytest.raises(RefusedConfiguration, match='set include="@blocks"'):
            eligible_names(RoseConfig(exclude=exclude), shapes)
    assert len(eligible_names(RoseConfig(exclude=("word_embeddings",), include=("@blocks",)), shapes)) == 4
    bert = {"bert.encoder.layer.0.dense.weight": (8, 8), "bert.encoder.layer.0.LayerNorm.weight": (8,)}
    assert eligible_names(RoseConfig(exclude=("LayerNorm",)), bert) == ["bert.encoder.layer.0.dense.weight"]
