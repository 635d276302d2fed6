"""Damaged records and states: a clear error, or a record and a step that are right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import FUZZ, JSON
from hypothesis import given
from hypothesis import strategies as st

from rose_ds import RoseAdamW, cli
from rose_ds.experiments import report
from rose_ds.experiments.metrics import FILE, VERSION, Metrics
from rose_ds.experiments.models import ModelError, load_tokenizer, resolve

pytestmark = pytest.mark.fast

FULL: dict[str, Any] = {
    "task": "snippets",
    "model": "minilm",
    "method": "rose-first",
    "seed": 0,
    "engine": "zero2",
    "world_size": 2,
    "precision": "fp32",
    "steps": 3,
    "train_seconds": 1.5,
    "step_seconds": 0.5,
    "kept_fraction": 0.6,
    "skipped_steps": 0,
    "peak_memory_bytes": 2**31,
    "glue_accuracy": 0.75,
    "advglue_accuracy": None,
    "perturbed_accuracy": 1,
    "perturbed_by_family": {"swap": 1.0},
    "config": {"task": "snippets"},
    "version": VERSION,
    "status": "done",
    "commit": "0123abc-dirty",
    "packages": {"torch": "2.13.0"},
}
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("seed", "world_size", "steps", "skipped_steps", "peak_memory_bytes"), (int, type(None))),
    **dict.fromkeys(("method", "engine", "precision", "commit"), (str, type(None))),
    **dict.fromkeys((name for name in FULL if "seconds" in name), (int, float, type(None))),
    **dict.fromkeys((name for name in FULL if "accuracy" in name or "fraction" in name), (int, float, type(None))),
    **dict.fromkeys(("task", "model", "status"), (str,)),
    **dict.fromkeys(("perturbed_by_family", "config", "packages"), (dict,)),
    "version": (int,),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, whose metrics.json every example writes anew."""
    return tmp_path_factory.mktemp("run")


def use(metrics: Metrics, folder: Path) -> None:
    """What ``rose-ds report`` and ``evaluate`` do with a record, short of the chart."""
    assert metrics.task in report.table([metrics, metrics])
    assert metrics.task in metrics.summary()
    metrics.write(folder)
    assert repr(Metrics.read(folder)) == repr(metrics)  # config may hold a NaN, which is not itself


@FUZZ
@given(st.sampled_from(list(FULL)), JSON)
def test_a_record_with_a_value_of_anything(run: Path, name: str, value: Any) -> None:
    (run / FILE).write_text(json.dumps({**FULL, name: value}))
    fits = isinstance(value, TYPES[name]) and not isinstance(value, bool)
    if fits and isinstance(value, (int, float)) and float in TYPES[name]:
        fits = abs(value) < 1e400 and value != 10**400
    if fits and isinstance(value, (int, float)) and ("accuracy" in name or "fraction" in name):
        fits = 0 <= value <= 1
    if fits and name == "perturbed_by_family":
        fits = all(type(v) in (int, float) and 0 <= v <= 1 for v in value.values())
    if fits and name == "packages":
        fits = all(isinstance(v, str) for v in value.values())
    if fits and name == "version":
        fits = value in (1, VERSION)
    if fits:
        metrics = Metrics.read(run)
        assert repr(getattr(metrics, name)) == repr(value)
        use(metrics, run)
    else:
        with pytest.raises(ValueError, match=f"{FILE} is not a metrics file: {name}"):
            Metrics.read(run)


@FUZZ
@given(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()) | st.integers(0, 500))
def test_a_record_of_anything(run: Path, content: bytes | int) -> None:
    """Any bytes, any JSON, or a record cut short."""
    if isinstance(content, int):
        whole = json.dumps(FULL).encode()
        content = whole[: content % len(whole)]
    (run / FILE).write_bytes(content)
    with pytest.raises(ValueError, match="is not a metrics file") as refused:
        Metrics.read(run)
    assert str(run / FILE) in str(refused.value)


DAMAGED: list[tuple[Callable[[Path], object], str]] = [
    (lambda run: (run / FILE).write_text("[]"), "is not a metrics file"),
    (lambda run: (run / FILE).write_bytes(b'{"task": "\xff"}'), "is not a metrics file: 'utf-8' codec"),
    (lambda run: (run / FILE).write_text("[" * 10**5), "is not a metrics file: maximum recursion depth"),
    (lambda run: (run / FILE).write_text('{"task": "a", "model": "b", "glue_accuracy": "c"}'), "glue_accuracy='c'"),
    (lambda run: (run / FILE).write_text('{"task": "a", "model": "b", "glue_accuracy": NaN}'), "is not finite"),
    (lambda run: (run / FILE).write_text('{"task": "a"}'), "missing 1 required positional argument: 'model'"),
    (lambda run: (run / FILE).mkdir(), "Is a directory"),
    (lambda run: None, "No such file or directory"),
    (lambda run: (run.rmdir(), run.write_text("")), "Not a directory"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGED, ids=range(len(DAMAGED)))
def test_report_names_the_damaged_run(
    damage: Callable[[Path], object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    Metrics(**FULL).write(good)
    bad.mkdir()
    damage(bad)
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(good), str(bad), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("rose-ds report: error: ")
    assert str(bad / FILE) in printed
    assert words in printed
    assert not (tmp_path / "out").exists()


def test_report_says_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Metrics(**FULL).write(tmp_path / "run")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert f"cannot write {tmp_path / 'out' / 'comparison.json'}" in capsys.readouterr().err


def test_report_draws_names_as_they_are(tmp_path: Path) -> None:
    """Two dollar signs are no formula, and a run without accuracies is no error."""
    pytest.importorskip("matplotlib")
    Metrics(**{**FULL, "method": r"$\frac$"}).write(tmp_path / "one")
    Metrics(task="snippets", model="minilm").write(tmp_path / "two")
    cli.main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 0
    cli.main(["report", str(tmp_path / "two"), "--output_dir", str(tmp_path / "out")])


# --- model folders ---


@FUZZ
@given(st.text(max_size=20) | st.sampled_from(["", "~nobody-of-that-name/x", "x" * 5000, "a\0b", "./", "..."]))
def test_any_model_name_resolves_or_is_refused(name: str) -> None:
    try:
        where = resolve(name)
    except ModelError as error:
        assert "model folder" in str(error)
        return
    assert where == name or Path(where).is_dir()


def write_tokenizer(folder: Path, **files: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return str(folder)


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes up a vocabulary of special tokens, and every text would be the same."""
    with pytest.raises(ModelError, match="has no tokenizer beside the model"):
        load_tokenizer(write_tokenizer(tmp_path / "none"))
    for number, content in enumerate(("[]", "{", '{"model": 3}')):
        with pytest.raises(ModelError, match="cannot load model"):
            load_tokenizer(write_tokenizer(tmp_path / str(number), tokenizer=content))


# --- the optimizer's state ---

SHAPES = [(2, 3), (3,), (4,)]


def optimizer_at(step: int, groups: int = 2) -> tuple[RoseAdamW, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel()).reshape(s)) for s in SHAPES]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    parts = [{"params": named[i::groups], "weight_decay": 0.1 * i} for i in range(groups)]
    optimizer = RoseAdamW(parts, lr=0.1, strategy="none")
    for number in range(step):
        move(optimizer, params, number)
    return optimizer, params


def move(optimizer: RoseAdamW, params: list[torch.nn.Parameter], number: int) -> None:
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, 0.1 * (i + 1) * (-1) ** number)
    optimizer.step()


STATE = ("step", "exp_avg", "exp_avg_sq")
OTHER = st.none() | st.sampled_from([torch.zeros(s) for s in [(), (1,), (3,), (2, 3), (3, 2), (4,), (6,), (12,)]])


@FUZZ
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(STATE), OTHER | st.just("gone")), max_size=2),
    st.sampled_from([2, 2, 2, 1, 3]),
)
def test_a_state_that_fits_steps_right_and_another_is_refused(edits: list[tuple[int, str, Any]], groups: int) -> None:
    """A refused state leaves the optimizer as it was; an accepted one is the one that was saved."""
    saved = copy.deepcopy(optimizer_at(2, groups)[0].state_dict())
    for index, name, value in edits:
        if isinstance(value, str):
            saved["state"][index].pop(name, None)
        else:
            saved["state"][index][name] = value
    order = [0, 2, 1]  # the parameters' numbers in the saved state: two groups, every second parameter
    whole = groups == 2 and all(
        set(saved["state"][i]) == set(STATE)
        and all(isinstance(saved["state"][i][name], torch.Tensor) for name in STATE)
        and saved["state"][i]["step"].numel() == 1
        and all(saved["state"][i][name].shape == SHAPES[order[i]] for name in STATE[1:])
        for i in range(3)
    )
    optimizer, params = optimizer_at(1)
    before = copy.deepcopy(optimizer.state_dict())
    if not whole:
        with pytest.raises(ValueError, match=r"saved|group"):
            optimizer.load_state_dict(saved)
        assert str(optimizer.state_dict()) == str(before)
        return
    optimizer.load_state_dict(saved)
    for i, param in enumerate(order):
        for name in STATE:
            assert torch.equal(optimizer.state[params[param]][name], saved["state"][i][name])
    move(optimizer, params, 2)
    assert all(torch.isfinite(p).all() for p in params)
