"""Methods by name, and the flags that choose and change them."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from rose_ds import RefusedConfiguration, RoseConfig
from rose_ds.cli.arguments import Parser, RunArguments
from rose_ds.config import Strategy
from rose_ds.experiments.methods import METHODS, method_named, method_with
from rose_ds.experiments.settings import MethodSettings, constant_flag
from rose_ds.experiments.train import _method_used
from rose_ds.objectives import OBJECTIVES, FreeLB, RDrop, Smart, Task

pytestmark = pytest.mark.fast

#: Name -> objective, RoseConfig's strategy, keep_largest.
SINGLE: dict[str, tuple[str, str, bool]] = {
    "vanilla": ("task", "none", False),
    "r-drop": ("r-drop", "none", False),
    "child-tuning": ("task", "child-tuning", False),
    "smart": ("smart", "none", False),
    "freelb": ("freelb", "none", False),
    "rose-first": ("task", "first", False),
    "rose-second": ("task", "second", False),
    "rose-ensemble": ("task", "ensemble", False),
    "random-mask": ("task", "random", False),
    "inverted-mask": ("task", "first", True),
    "gradient-mask": ("task", "gradient-mask", False),
    "gallop": ("task", "gallop", False),
    "cautious": ("task", "cautious", False),
}
MASKS = [name for name, (objective, strategy, _) in SINGLE.items() if objective == "task" and strategy != "none"]
COMBINED = {
    f"{objective}+{mask}": (objective, *SINGLE[mask][1:])
    for objective in ("r-drop", "smart", "freelb")
    for mask in MASKS
}
ALL = {**SINGLE, **COMBINED}


def test_the_registry_is_complete() -> None:
    assert set(METHODS) == set(SINGLE)
    assert len(COMBINED) == 27
    strategies = {strategy for _, strategy, _ in SINGLE.values()}
    assert strategies == set(get_args(Strategy))
    assert {objective for objective, *_ in SINGLE.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("name", ALL)
def test_a_method_is_what_its_name_says(name: str) -> None:
    objective, strategy, keep_largest = ALL[name]
    settings = MethodSettings(method=name)
    rose = settings.rose()
    assert (settings.objective().name, rose.strategy, rose.keep_largest) == (objective, strategy, keep_largest)
    assert settings.objective() == OBJECTIVES[objective]()
    assert rose == RoseConfig(strategy=strategy, keep_largest=keep_largest)  # type: ignore[arg-type]
    assert settings.method == name
    assert method_with(objective, rose).name == name


@pytest.mark.parametrize("name", ALL)
def test_a_search_is_made_of_flags_and_of_settings_that_differ(name: str) -> None:
    """Every point of the grid can be given on the command line, and no two points are the same method."""
    seen = set()
    known = {f.name for f in fields(MethodSettings)}
    for point in itertools.product(*method_named(name).search):
        flags = {flag: value for part in point for flag, value in part.items()}
        assert len(flags) == sum(map(len, point))  # no axis twice
        rate = flags.pop("learning_rate")
        assert set(flags) <= known
        settings = MethodSettings(method=name, **flags)
        seen.add((rate, settings.rose(), settings.objective()))
    counts = {"vanilla": 10, "rose-first": 90, "rose-ensemble": 90, "r-drop": 30, "r-drop+rose-first": 270}
    assert len(seen) == counts.get(name, len(seen))
    assert len(seen) == len(list(itertools.product(*method_named(name).search)))


def test_the_ensembles_search_keeps_one_fraction_for_both_masks() -> None:
    assert {"keep_first": 0.3, "keep_second": 0.3} in method_named("rose-ensemble").search[1]


WRONG = ["", "rose", "rose-third", "rdrop", "rose-first+r-drop", "r-drop+", "+rose-first", "r-drop+vanilla", "task"]


@pytest.mark.parametrize("name", [*WRONG, "r-drop+smart", "vanilla+rose-first", "r-drop+rose-first+gallop"])
def test_a_wrong_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"method={name!r} is not one of ['vanilla', ")) as refused:
        method_named(name)
    said = str(refused.value)
    assert "\n" not in said
    assert all(repr(known) in said for known in SINGLE)
    assert "OBJECTIVE+MASK with OBJECTIVE of ['r-drop', 'smart', 'freelb'] and MASK of [" in said


CHOSEN: list[tuple[dict[str, Any], str]] = [
    ({}, "rose-ensemble"),
    ({"strategy": "none"}, "vanilla"),
    ({"strategy": "second"}, "rose-second"),
    ({"strategy": "first", "keep_largest": True}, "inverted-mask"),
    ({"strategy": "second", "keep_largest": True}, "rose-second"),
    ({"objective_name": "r-drop", "strategy": "first"}, "r-drop+rose-first"),
    ({"objective_name": "r-drop", "strategy": "none"}, "r-drop"),
    ({"objective_name": "smart"}, "smart+rose-ensemble"),
    ({"objective_name": "task"}, "rose-ensemble"),
    ({"method": "rose-first", "strategy": "first", "objective_name": "task"}, "rose-first"),
]


@pytest.mark.parametrize(("flags", "method"), CHOSEN, ids=[str(flags) for flags, _ in CHOSEN])
def test_methods_by_the_librarys_names(flags: dict[str, Any], method: str) -> None:
    settings = MethodSettings(**flags)
    assert settings.method == method
    assert settings.chosen == bool(flags)


def test_settings_arrive() -> None:
    settings = MethodSettings(
        method="r-drop+rose-first", keep_first=0.7, granularity="tensor", include=["layer"], rdrop_alpha=0.5
    )
    assert settings.rose() == RoseConfig(strategy="first", keep_first=0.7, granularity="tensor", include=("layer",))
    assert settings.objective() == RDrop(alpha=0.5)
    assert MethodSettings(method="smart", smart_steps=2, smart_radius=0.5).objective() == Smart(steps=2, radius=0.5)
    assert MethodSettings(method="freelb", freelb_passes=2).objective() == FreeLB(passes=2)
    assert MethodSettings().objective() == Task()
    assert not MethodSettings(keep_first=0.7).chosen


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "rose-second", "strategy": "first"}, "method='rose-second' has strategy='second', not 'first'"),
    ({"method": "r-drop", "strategy": "first"}, "method='r-drop' has strategy='none', not 'first'"),
    ({"method": "smart", "objective_name": "freelb"}, "method='smart' has objective='smart', not 'freelb'"),
    ({"method": "inverted-mask", "keep_largest": False}, "has keep_largest=True, not False: give one of the two"),
    ({"strategy": "third"}, "strategy='third' is not one of ['none', 'first'"),
    ({"objective_name": "rdrop"}, "objective='rdrop' is not one of ['task', 'r-drop'"),
    ({"rdrop_alpha": 0.5}, "--rdrop_alpha is a constant of objective r-drop, but method rose-ensemble has objective"),
    ({"method": "smart", "freelb_passes": 2}, "choose --method freelb or freelb+MASK"),
    ({"method": "r-drop", "rdrop_alpha": -1.0}, "--rdrop_alpha=-1.0 must be finite and >= 0"),
    ({"method": "freelb", "freelb_passes": 0}, "--freelb_passes=0 must be an integer >= 1"),
    ({"keep_first": 0.0}, "keep_first=0.0 must be in (0, 1]"),
    ({"method": "vanilla", "keep_largest": True}, "keep_largest=True inverts a risk of ROSE"),
    ({"method": "child-tuning", "granularity": "tensor"}, "is defined for scalars only"),
    ({"resume": "always"}, "resume='always' must be auto"),
    ({"preset": "paper"}, "preset='paper' is not one of ['paper-base', 'paper-large']"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[str(flags) for flags, _ in REFUSED])
def test_contradictions_and_bad_values(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MethodSettings(**flags)


def test_a_random_mask_follows_the_seed_unless_it_has_its_own() -> None:
    assert MethodSettings(method="random-mask").rose(seed=7).mask_seed == 7
    assert MethodSettings(method="r-drop+random-mask").rose(seed=8).mask_seed == 8
    assert MethodSettings(method="random-mask", mask_seed=3).rose(seed=7).mask_seed == 3
    assert MethodSettings(method="random-mask", mask_seed=0).rose(seed=7).mask_seed == 0
    assert MethodSettings(method="rose-first").rose(seed=7) == RoseConfig(strategy="first")


# --- the flags themselves ---


def parsed(*arguments: str) -> MethodSettings:
    return Parser("train", "", MethodSettings, RunArguments).settings([*arguments, "--use_cpu", "true"])[0]


def test_there_is_a_flag_for_every_setting_with_its_help() -> None:
    flags = {f.name: f for f in fields(MethodSettings)}
    for f in fields(RoseConfig):
        assert flags[f.name].metadata["help"].startswith(f.metadata["help"])
        assert flags[f.name].default is None
    for objective, constants in OBJECTIVES.items():
        for f in fields(constants):
            flag = flags[constant_flag(objective, f.name)]
            assert flag.metadata["help"] == f"{f.metadata['help']} Default: {f.default}."
    assert "rdrop_kl_reduction" in flags


def test_flags_are_read_with_their_types() -> None:
    settings = parsed(
        *("--method", "freelb+rose-ensemble", "--keep_first", "0.5", "--mask_warmup_steps", "3"),
        *("--include", "layer", "pooler", "--exclude", "bias", "--freelb_passes", "2", "--freelb-step-size", "0.05"),
    )
    assert settings.rose() == RoseConfig(
        keep_first=0.5, mask_warmup_steps=3, include=("layer", "pooler"), exclude=("bias",)
    )
    assert settings.objective() == FreeLB(passes=2, step_size=0.05)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [([], None), (["--keep_largest"], True), (["--keep_largest", "true"], True), (["--keep_largest", "false"], False)],
    ids=str,
)
def test_keep_largest_is_a_flag(arguments: list[str], value: bool | None) -> None:
    settings: Any = parsed("--strategy", "first", *arguments)
    assert settings.keep_largest is value
    assert settings.rose().keep_largest is bool(value)
    assert settings.method == ("inverted-mask" if value else "rose-first")


def test_objective_is_a_flag() -> None:
    assert parsed("--objective", "r-drop", "--strategy", "first").method == "r-drop+rose-first"


def test_given_is_what_was_given() -> None:
    parser = Parser("train", "", MethodSettings, RunArguments)
    given = parser.given(["--method", "gallop", "--learning_rate=1e-4", "--keep-first", "0.5", "--bf16"])
    assert given == {"method": "gallop", "learning_rate": 1e-4, "keep_first": 0.5, "bf16": True}


# --- beside a RoseAdamW block in a DeepSpeed config ---


def trainer_with(**block: Any) -> Any:
    """Of a RoseTrainer, what says which settings are in force."""
    settings = {"strategy": "ensemble", "objective": {"name": "task"}, **block}
    return SimpleNamespace(args=SimpleNamespace(seed=5), method_settings=lambda: dict(settings))


def test_the_block_is_the_method_where_no_flag_names_one() -> None:
    block = {"strategy": "second", "keep_second": 0.7, "objective": {"name": "r-drop", "alpha": 0.5}}
    name, rose, objective = _method_used(MethodSettings(), trainer_with(**block))
    assert (name, rose, objective) == (
        "r-drop+rose-second",
        RoseConfig(strategy="second", keep_second=0.7),
        RDrop(alpha=0.5),
    )
    same = MethodSettings(method="r-drop+rose-second", keep_second=0.7, rdrop_alpha=0.5)
    assert _method_used(same, trainer_with(**block))[0] == "r-drop+rose-second"
    assert _method_used(MethodSettings(method="vanilla"), trainer_with(strategy="none"))[0] == "vanilla"
    random = MethodSettings(method="random-mask")
    assert _method_used(random, trainer_with(strategy="random", mask_seed=5))[1].mask_seed == 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"method": "rose-ensemble"}, "strategy ensemble -> second"),
        ({"keep_first": 0.5}, "keep_first 0.5 -> 0.6"),
        ({"method": "r-drop"}, "objective r-drop -> task"),
    ],
    ids=str,
)
def test_flags_that_the_block_contradicts_are_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedConfiguration, match="Leave one of them out") as refused:
        _method_used(MethodSettings(**flags), trainer_with(strategy="second"))
    assert words in str(refused.value)
    assert "gamma" not in str(refused.value)  # only what differs
