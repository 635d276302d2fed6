"""Command lines and DeepSpeed files of every kind: parsed as written, or one line that says what is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fuzzing import FUZZ, JSON
from hypothesis import given
from hypothesis import strategies as st

from rose_ds import RefusedConfiguration, RoseConfig, cli, run
from rose_ds.cli.arguments import precision_flags
from rose_ds.objectives import OBJECTIVES, FreeLB, RDrop, Smart, Task

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
FITTING = {
    "strategy": st.sampled_from(["none", "first", "second", "ensemble", "random", "gallop"]),
    "granularity": st.sampled_from(["element", "tensor"]),
    "keep_first": st.floats(0, 1) | st.integers(0, 1),
    "gamma": st.floats(0, 1) | st.integers(0, 1),
    "mask_warmup_steps": st.integers(0),
}


# --- --rose of python -m rose_ds.run ---


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text("")
    return path


@pytest.mark.filterwarnings("ignore::FutureWarning")
@FUZZ
@given(
    st.lists(
        st.text(max_size=8)
        | st.sampled_from(["--rose", "gamma=0.5", "=", "-", "--", "strategy=", "objective=r-drop", "alpha=2"]),
        max_size=5,
    )
)
def test_any_command_line_is_parsed_or_explained(script: Path, words: list[str]) -> None:
    """Nothing but a message comes out of a wrong one, and the script's own arguments are never touched."""
    try:
        rose, objective, found, rest = run.parse([*words, str(script), "--flag", "key=value"])
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert found == script
    assert rest[-2:] == ["--flag", "key=value"]
    assert (rose is None) == ("--rose" not in words)
    assert (objective is None) == ("objective=r-drop" not in words)


@FUZZ
@given(st.fixed_dictionaries({}, optional=FITTING))
def test_rose_settings_arrive_as_given(script: Path, values: dict[str, Any]) -> None:
    pairs = [f"{name}={value}" for name, value in values.items()]
    command = ["--rose", *pairs, str(script)] if pairs else [str(script)]
    try:
        wanted = RoseConfig(**values) if values else None
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            run.parse(command)
        return
    assert run.parse(command)[0] == wanted
    assert run.parse(command).objective is None


PAIRS: list[tuple[str, Any]] = [
    ('include=["layer", "a=b"]', ("layer", "a=b")),
    (r"include=layer\.\d+=?", (r"layer\.\d+=?",)),
    ("include=[0-9]+", ("[0-9]+",)),
    ("keep_first=.5", 0.5),
    ("keep_first=1", 1),
]


@pytest.mark.parametrize(("pair", "value"), PAIRS, ids=[pair for pair, _ in PAIRS])
def test_rose_values(pair: str, value: Any, script: Path) -> None:
    rose = run.parse(["--rose", pair, str(script)]).rose
    assert getattr(rose, pair.partition("=")[0]) == value


OBJECTIVE_WORDS: list[tuple[list[str], Any]] = [
    (["objective=task"], Task()),
    (["objective=r-drop"], RDrop()),
    (["alpha=0.5", "objective=r-drop"], RDrop(alpha=0.5)),
    (["objective=r-drop", "kl_reduction=sum", "strategy=first"], RDrop(kl_reduction="sum")),
    (["objective=smart", "step_size=.5"], Smart(step_size=0.5)),
    (["objective=freelb", "passes=2", "step_size=.5"], FreeLB(passes=2, step_size=0.5)),
    (['objective={"name": "r-drop", "alpha": 2}', "kl_reduction=sum"], RDrop(alpha=2, kl_reduction="sum")),
    (["strategy=first"], None),
]


@pytest.mark.parametrize(("words", "objective"), OBJECTIVE_WORDS, ids=[" ".join(words) for words, _ in OBJECTIVE_WORDS])
def test_rose_objectives(words: list[str], objective: Any, script: Path) -> None:
    found = run.parse(["--rose", *words, str(script)])
    assert found.objective == objective
    assert found.rose == (RoseConfig(strategy="first") if "strategy=first" in words else RoseConfig())


def test_plain_names_are_not_ambiguous() -> None:
    """A constant that were also a field of RoseConfig could not be meant."""
    for objective in OBJECTIVES.values():
        assert not {f.name for f in fields(objective)} & {*RoseConfig.field_names(), "objective", "name"}


USAGE: list[tuple[list[str], str]] = [
    (["--rose", "gamma=1", "gamma=0.5"], "--rose gamma is given twice"),
    (["--rose", "gamma=1", "--rose", "gamma=1"], "--rose gamma is given twice"),
    (["--rose"], "--rose needs settings"),
    (["--rose", "include=" + "[" * 100_000], "is not a regular expression"),
    (["--rose", "gamma={[]:1}"], "gamma='{[]:1}' must be a number"),
    (["--rose", "keep_frist=0.5"], "unknown setting 'keep_frist' after --rose; known: ['strategy', "),
    (["--rose", "alpha=0.5"], "--rose alpha is a constant of objective r-drop, not of task: add objective=r-drop"),
    (["--rose", "objective=r-drop", "passes=2"], "a constant of objective freelb, not of r-drop"),
    (["--rose", "step_size=1"], "a constant of objective smart and freelb, not of task"),
    (["--rose", "objective=rdrop"], "objective='rdrop' is not one of ['task', 'r-drop', 'smart', 'freelb']"),
    (["--rose", "objective=3"], "objective=3 must be a name"),
    (["--rose", "objective=r-drop", "alpha=-1"], "alpha=-1 must be finite and >= 0"),
    (["x" * 5000], "does not exist, or is not a file"),
    (["."], "does not exist, or is not a file"),
    (["--Rose", "gamma=1"], "unknown option --Rose"),
]


@pytest.mark.parametrize(("words", "message"), USAGE, ids=range(len(USAGE)))
def test_wrong_command_lines(words: list[str], message: str, script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main([*words, str(script)])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("rose_ds.run: error: ")
    assert message in printed


def exit_code(path: Path, script: str) -> Any:
    """Of rose_ds.run, for a script."""
    path.write_text(script)
    with pytest.raises(SystemExit) as stop:
        run.main([str(path)])
    return stop.value.code


@pytest.mark.parametrize("ending", ["", "import sys; sys.exit(0)", "raise SystemExit"])
def test_a_script_that_exits_without_training_is_an_error(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "idle.py"
    assert exit_code(path, ending) == 1
    assert "ROSE did nothing" in capsys.readouterr().err
    run.main([str(path), "--help"])  # whoever asks a script for help does not want to train


def test_a_script_that_fails_keeps_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(tmp_path / "failing.py", "import sys; sys.exit(7)") == 7
    assert "ROSE did nothing" not in capsys.readouterr().err


def test_a_refusal_within_the_script_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "import rose_ds; raise rose_ds.RefusedConfiguration('keep one of them')"
    assert exit_code(tmp_path / "refused.py", script) == 2
    assert capsys.readouterr().err == "rose_ds.run: error: keep one of them\n"


# --- rose-ds train --deepspeed ---

CONFIGS = {path.name: path.read_bytes() for path in sorted((ROOT / "ds_configs").glob("*.json"))}
SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")


def flags(path: Path, content: bytes) -> list[str] | None:
    """The precision flags for a config file; None where it is refused, after checking how."""
    path.write_bytes(content)
    try:
        return precision_flags(["--deepspeed", str(path)])
    except RefusedConfiguration as error:
        assert str(error).startswith(f"--deepspeed {path}")
        return None


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed") / "config.json"


@FUZZ
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_deepspeed_file_of_anything(config_path: Path, content: bytes) -> None:
    accepted = flags(config_path, content)
    try:
        parsed = json.loads(content.decode("utf-8"))
    except ValueError:
        parsed = None
    assert accepted == ([] if isinstance(parsed, dict) else None)


@FUZZ
@given(st.sampled_from(list(CONFIGS)), st.integers(0, 10_000))
def test_a_truncated_deepspeed_config(config_path: Path, name: str, end: int) -> None:
    content = CONFIGS[name].rstrip()
    assert flags(config_path, content[: end % len(content)]) is None


@FUZZ
@given(st.sampled_from(SECTIONS), JSON, st.sampled_from(["stage", "enabled", "type", "params", None]))
def test_a_deepspeed_section_of_anything(config_path: Path, section: str, value: Any, key: str | None) -> None:
    content = json.loads(CONFIGS["zero2.json"])
    content[section] = value if key is None else {key: value}
    accepted = flags(config_path, json.dumps(content).encode())
    fits = {
        "stage": type(value) is int and value in range(4),
        "enabled": isinstance(value, bool) or value == "auto",
        "type": isinstance(value, str),
        "params": isinstance(value, dict),
        None: isinstance(value, dict),
    }[key]
    if not fits:
        assert accepted is None
    elif key is not None:
        wanted = section in ("bf16", "fp16") and key == "enabled" and value is True
        assert accepted == ([f"--{section}"] if wanted else [])


@pytest.mark.parametrize("name", CONFIGS)
def test_our_own_configs_are_accepted(config_path: Path, name: str) -> None:
    enabled = [precision for precision in ("bf16", "fp16") if f'"{precision}"'.encode() in CONFIGS[name]]
    assert flags(config_path, CONFIGS[name]) == [f"--{precision}" for precision in enabled]


BROKEN: list[tuple[bytes | None, str]] = [
    (b"[]", "a DeepSpeed config is a JSON object, found []"),
    (b'{"bf16": {"enabled": true}', "is not JSON: Expecting"),
    (b'{"zero_optimization": \xff}', "is not JSON: 'utf-8' codec can't decode"),
    (b"[" * 100_000, "is not JSON: maximum recursion depth"),
    (b'{"zero_optimization": 2}', '"zero_optimization" must be an object, found 2'),
    (b'{"zero_optimization": {"stage": 4}}', '"stage" in "zero_optimization" must be 0, 1, 2 or 3, found 4'),
    (b'{"bf16": {"enabled": "yes"}}', '"enabled" in "bf16" must be true, false or "auto"'),
    (b'{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', "are both enabled"),
    (None, "no such file"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN, ids=range(len(BROKEN)))
def test_train_refuses_a_broken_deepspeed_config(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, before anything is loaded or written."""
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--deepspeed", str(path), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"rose-ds train: error: --deepspeed {path}")
    assert message in printed
    assert not (tmp_path / "out").exists()


def test_json_text_in_place_of_a_path_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps({"zero_optimization": {"stage": 2}, "comment": "x" * 300})  # longer than a file's name may be
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--deepspeed", text, "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "file name too long" in capsys.readouterr().err


# --- rose-ds ---


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"\n  rose-ds {command} " in printed  # as it was written, not filled into a paragraph
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert cli.COMMANDS[command].split(",")[0] in " ".join(capsys.readouterr().out.split())


def test_train_help_lists_methods_and_every_setting_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    for flag in (*RoseConfig.field_names(), "objective", "preset", "rdrop_alpha", "smart_radius", "freelb_passes"):
        assert len(re.findall(rf"^  --{flag} ", printed, re.MULTILINE)) == 1, flag
    assert "  gallop          largest" in printed
    assert "--max-steps" not in printed  # the second spelling of every flag doubles the text
    assert "(default: None)" not in printed
    assert "Weight of R-Drop's divergence between the two passes." in " ".join(printed.split())


def test_an_unknown_flag_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "evaluate"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--model", "minilm", "--output_dir", str(tmp_path / "out"), "--keep_frist", "0.5"])
        assert stop.value.code == 2
        usage, *lines = capsys.readouterr().err.splitlines()
        assert usage == f"usage: rose-ds {command} [--flag value ...]"
        assert lines == [f"rose-ds {command}: error: unrecognized arguments: --keep_frist 0.5"]
