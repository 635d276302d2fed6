"""A sweep's definition: what it comes to, what it refuses, and what a cell's name depends on."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rose_ds.cli import main
from rose_ds.cli.arguments import Parser, RunArguments
from rose_ds.cli.sweep import _cells, _grid, _parser, _sweep
from rose_ds.experiments import sweep
from rose_ds.experiments.cell_key import settings_key
from rose_ds.experiments.cells import Cell, Sweep, applies
from rose_ds.experiments.launchers import LAUNCHERS, places
from rose_ds.experiments.methods import METHODS, method_named
from rose_ds.experiments.settings import MethodSettings, RunSettings
from rose_ds.experiments.store import Store
from rose_ds.experiments.sweep import Runner

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"methods": ["vanilla", "rose-first"], "tasks": ["sst2"]}


def parsed(cell: Cell) -> tuple[RunSettings, MethodSettings, Any]:
    """What ``rose-ds train`` makes of a cell's flags."""
    flags = [*cell.flags(Path("out")), "--use_cpu", "true"]
    return Parser("train", "", RunSettings, MethodSettings, RunArguments).settings(flags)


def test_the_product_with_seeds_innermost() -> None:
    sweep = Sweep(**SMALL, seeds=(3, 4), grid={"learning_rate": [1e-4, 2e-4]})
    found = [(c.method, c.settings["learning_rate"], c.seed) for c in sweep.cells()]
    assert found == [(m, lr, s) for m in ("vanilla", "rose-first") for lr in (1e-4, 2e-4) for s in (3, 4)]


def test_a_cells_flags_are_the_runs_settings() -> None:
    own = {"rose-first": {"settings": {"keep_first": 0.3, "include": ["layer", "pooler"]}}}
    sweep = Sweep(methods=own, tasks={"sst2": {"max_steps": 7}}, settings={"bf16": True, "learning_rate": "2e-4"})
    (cell,) = sweep.cells()
    run, method, args = parsed(cell)
    assert (run.task, method.method, method.resume, args.output_dir) == ("sst2", "rose-first", "auto", "out")
    assert (args.learning_rate, args.max_steps, args.bf16, args.seed) == (2e-4, 7, True, 0)
    assert method.rose().include == ("layer", "pooler")
    assert method.rose().keep_first == 0.3
    assert (args.save_steps, args.eval_steps, args.save_total_limit) == (100, 100, 1)


def test_the_more_particular_setting_wins() -> None:
    sweep = Sweep(
        methods={"vanilla": {"settings": {"max_grad_norm": 3.0}}, "rose-first": None},
        tasks={"sst2": {"max_grad_norm": 2.0}, "rte": {}},
        settings={"max_grad_norm": 1.0},
    )
    found = {(c.task, c.method): c.settings["max_grad_norm"] for c in sweep.cells()}
    assert found == {
        ("sst2", "vanilla"): 3.0,
        ("sst2", "rose-first"): 2.0,
        ("rte", "vanilla"): 3.0,
        ("rte", "rose-first"): 1.0,
    }


@pytest.mark.parametrize(
    ("flag", "methods"),
    [
        ("learning_rate", set(METHODS)),
        ("gamma", {"rose-ensemble"}),
        ("keep_second", {"rose-second", "rose-ensemble"}),
        ("rdrop_alpha", {"r-drop"}),
        ("keep_first", set(METHODS) - {"vanilla", "r-drop", "smart", "freelb", "rose-second", "cautious"}),
        ("first_order", {"rose-first", "rose-ensemble", "inverted-mask"}),
        ("risk_ema", {"rose-first", "rose-ensemble", "inverted-mask"}),
        ("keep_largest", {"rose-first", "rose-second", "rose-ensemble", "inverted-mask"}),
    ],
)
def test_shared_settings_reach_the_methods_that_know_them(flag: str, methods: set[str]) -> None:
    assert {name for name in METHODS if applies(flag, METHODS[name])} == methods
    assert applies("gamma", method_named("freelb+rose-ensemble"))


def test_every_method_takes_the_shared_settings_that_reach_it() -> None:
    shared = {"first_order": "fast", "risk_rows": 0.5, "risk_ema": 0.5, "granularity": "tensor", "mask_warmup_steps": 2}
    sweep = Sweep(methods=list(METHODS), tasks=["sst2"], settings={**shared, "mask_seed": 3, "keep_second": 0.4})
    assert len(sweep.cells()) == len(METHODS)


def test_values_reach_the_command_line_as_they_were_written() -> None:
    settings = {
        "label_column": "1",
        "save_strategy": False,  # a bare "no" in YAML
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "learning_rate": "2e-4",
        "lr_scheduler_type": "cosine_with_restarts",
    }
    (cell,) = Sweep(methods=["rose-first"], tasks=["sst2"], settings=settings).cells()
    run, _, args = parsed(cell)
    assert (run.label_column, args.save_strategy, args.lr_scheduler_kwargs) == ("1", "no", {"num_cycles": 2})
    assert args.learning_rate == 2e-4
    grid = Sweep(**SMALL, grid=_grid(["keep_largest=true,false"]), budget="full").cells()
    assert [cell.settings["keep_largest"] for cell in grid if cell.method == "rose-first"] == [True, False]


def test_the_budget_is_equal_or_said_not_to_be() -> None:
    grid = {"learning_rate": [1e-5, 2e-5, 3e-5], "keep_first": [0.2, 0.4, 0.6]}
    with pytest.raises(ValueError, match=r"equally many settings \(vanilla 3, rose-first 9\)"):
        Sweep(**SMALL, grid=grid).cells()
    with pytest.raises(ValueError, match=r"\(vanilla 3, rose-first 5\)"):
        Sweep(**SMALL, grid=grid, budget=5).cells()
    equal = Sweep(**SMALL, grid=grid, budget=2)
    assert Counter(c.method for c in equal.cells()) == {"vanilla": 2, "rose-first": 2}
    assert equal.cells() == equal.cells()
    assert Counter(c.method for c in Sweep(**SMALL, grid=grid, budget="full").cells())["rose-first"] == 9


def test_a_preset_knows_a_task_in_any_spelling() -> None:
    (cell,) = Sweep(methods=["rose-first"], tasks=["SST-2"], settings={"preset": "paper-base"}, seeds=range(1)).cells()
    assert cell.seed == 0


def test_published_ranges() -> None:
    cells = Sweep(**SMALL, grid="published", budget="full").cells()
    assert Counter(c.method for c in cells) == {"vanilla": 10, "rose-first": 90}  # as ROSE's paper
    assert {c.settings["learning_rate"] for c in cells} == {float(f"{i}e-5") for i in range(1, 11)}


def test_what_a_key_depends_on() -> None:
    one = Cell("sst2", "vanilla", 0, {"learning_rate": 1e-4, "max_steps": 100})
    assert one.key == Cell("sst2", "vanilla", 0, {"max_steps": 100.0, "learning_rate": 1e-4, "data": "there"}).key
    others = [
        Cell("rte", "vanilla", 0, one.settings),
        Cell("sst2", "r-drop", 0, one.settings),
        Cell("sst2", "vanilla", 1, one.settings),
        Cell("sst2", "vanilla", 0, {**one.settings, "max_steps": 101}),
        Cell("sst2", "vanilla", 0, {**one.settings, "bf16": True}),
    ]
    assert len({one.key, *(other.key for other in others)}) == 6


def test_keys_stay_what_they_are() -> None:
    """Or every store would be trained again."""
    assert Cell("sst2", "vanilla", 0, {"max_steps": 200}).key == "551e8eac47d9"
    assert Cell("sst2", "vanilla", 0, {"model": "minilm", "eval_steps": 50}).key == "191269d1e8dd"


def test_configs_and_models_are_known_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on another machine, where they lie elsewhere; a model's folder by what the model consists of."""

    def cell(where: str) -> Cell:
        settings = {"deepspeed": str(tmp_path / where / "z2.json"), "model": str(tmp_path / where / "base")}
        (one,) = Sweep(methods=["vanilla"], tasks=["sst2"], settings=settings).cells()
        return one

    for where in ("here", "there"):
        (tmp_path / where / "base").mkdir(parents=True)
        (tmp_path / where / "z2.json").write_text("{}")
        (tmp_path / where / "base" / "config.json").write_text("{}")
        (tmp_path / where / "base" / "model.safetensors").write_bytes(b"weights")
    before = cell("here")
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    (packaged,) = Sweep(methods=["vanilla"], tasks=["sst2"], settings={"model": "minilm"}).cells()
    assert not packaged.digests  # not the folder here
    monkeypatch.setenv("HOME", str(tmp_path))
    (at_home,) = Sweep(methods=["vanilla"], tasks=["sst2"], settings={"model": "~/here/base"}).cells()
    assert at_home.digests == {"model": before.digests["model"]}
    for gone in ({"model": "~/gone"}, {"model": "~nobody-here/x"}, {"deepspeed": "gone.json"}):
        with pytest.raises(ValueError, match="is not there, and a cell is known by its content"):
            Sweep(methods=["vanilla"], tasks=["sst2"], settings=gone).cells()
    for other in ({"model": "x" * 300}, {"accelerator_config": '{"split_batches": true}'}):
        assert not Sweep(methods=["vanilla"], tasks=["sst2"], settings=other).cells()[0].digests
    assert before.key == cell("there").key and str(tmp_path) not in json.dumps(before.portable)
    (tmp_path / "there" / "base" / "metrics.json").write_text("{}")  # of the run that trained it
    (tmp_path / "there" / "base" / ".DS_Store").write_text("")
    assert before.key == cell("there").key
    (tmp_path / "there" / "z2.json").write_text('{"bf16": {"enabled": true}}')
    changed = cell("there").key
    (tmp_path / "there" / "base" / "model.safetensors").write_bytes(b"others!")
    assert len({before.key, changed, cell("there").key}) == 3


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    """Corrected labels are other cells; the same file elsewhere is none, and no setting to choose."""
    here, there = tmp_path / "reviews.csv", tmp_path / "moved" / "reviews.csv"
    there.parent.mkdir()
    for path in (here, there):
        path.write_text("text,label\ngood,1\nbad,0\n")

    def cell(path: Path) -> Cell:
        (one,) = Sweep(methods=["vanilla"], tasks={"reviews": {"train_file": str(path)}}).cells()
        return one

    before = cell(here)
    assert before.key == cell(there).key and before.portable == cell(there).portable
    renamed = there.rename(there.with_name("reviews-v1.csv"))
    assert before.key == cell(renamed).key and settings_key(before.portable) == settings_key(cell(renamed).portable)
    renamed.rename(there)
    assert str(tmp_path) not in json.dumps(before.portable)
    assert str(there) in cell(there).flags(Path("out"))
    here.write_text("text,label\ngood,1\nbad,1\n")
    assert before.key != cell(here).key
    store = Store(tmp_path / "store")
    store.create()
    for _ in range(2):  # a sweep that is started again asks for nothing new
        store.add_to_plan([before])
    assert [planned.key for planned in store.plan()] == [before.key]
    assert cell(there).source() == ["--task", "reviews", "--train_file", str(there)]
    hard = Cell("sst2", "vanilla", 0, {"data": "glue", "adversarial_file": "a.json"}, {}, {"adversarial_file": "0"})
    assert hard.source() == ["--data", "glue"]  # the rest is the run's own
    hub = Cell("reviews", "vanilla", 0, {"dataset": "me/x", "adversarial_file": "a.csv"}, {}, {"adversarial_file": "0"})
    assert hub.source() == []
    here.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*reviews\.csv: No such file"):
        cell(here)


def test_a_folder_that_is_not_there_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "--store", str(tmp_path), "--methods", "vanilla", "--tasks", "sst2", "--data", "nowhere"]
    with pytest.raises(SystemExit):
        main(words)
    assert "data='nowhere' is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--attack_max_words", "2"])
    assert "give --attack" in capsys.readouterr().err
    main([*words, "--status"])
    assert "1 not started" in capsys.readouterr().out


BAD: list[tuple[dict[str, Any], str]] = [
    ({"methods": [], "tasks": ["rte"]}, "methods=.*give names"),
    ({"methods": ["rose-third"], "tasks": ["rte"]}, "method='rose-third' is not one of"),
    ({**SMALL, "seeds": [-1]}, "seeds=.* must be a list of integers >= 0"),
    ({**SMALL, "seeds": ["a"]}, "seeds=.* must be a list of integers >= 0"),
    ({**SMALL, "seeds": 5}, "seeds=5 must be a list of integers >= 0"),
    ({**SMALL, "tasks": ["sst3"]}, "unknown task 'sst3'; choose one of: sst2"),
    ({**SMALL, "methods": ["random-mask"], "settings": {"preset": "paper-large"}}, "no published settings"),
    ({**SMALL, "budget": 0}, "budget=0 must be"),
    ({**SMALL, "grid": "all"}, 'or "published"'),
    ({**SMALL, "grid": {"learning_rate": 1e-4}}, "learning_rate: expected a list"),
    ({**SMALL, "settings": {"keep_frist": 1}}, "no flag --keep_frist; near it: keep_first"),
    ({**SMALL, "settings": {"output_dir": "x"}}, "output_dir is the sweep's to set"),
    ({**SMALL, "tasks": {"sst2": {"seed": 1}}}, "tasks: sst2: seed is the sweep's to set"),
    ({**SMALL, "tasks": {"sst2": 3}}, "tasks: sst2: expected settings by name, found 3"),
    ({**SMALL, "settings": {"keep_first": 2}}, "keep_first=2 must be in"),
    ({"methods": {"vanilla": {"setting": {}}}, "tasks": ["rte"]}, "a method may have settings and grid"),
    ({"methods": {"vanilla": {"settings": {"rdrop_alpha": 1}}}, "tasks": ["rte"]}, "constant of objective r-drop"),
    ({**SMALL, "settings": {"max_length": 2}}, "max_length=2 must be at least 8"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=range(len(BAD)))
def test_refused_before_anything_starts(content: dict[str, Any], message: str) -> None:
    parser = Parser("train", "", RunSettings, MethodSettings, RunArguments)
    known = {name for s in parser.dataclass_types for name in s.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        sweep = Sweep(**content)
        sweep.check_names(known)
        sweep.cells()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [a", "is not YAML"),
        ("[1, 2]", "has the keys methods, tasks"),
        ("method: [a]", r"found \['method'\]"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_no_sweep(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Sweep.read(path)


def test_flags_overrule_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    own = {"vanilla": {"settings": {"weight_decay": 0.1}}, "r-drop": None}
    path.write_text(yaml.safe_dump({"methods": own, "tasks": {"sst2": {"max_steps": 9}, "rte": None}}, sort_keys=False))
    words = ["--store", "s", "--config", str(path), "--methods", "vanilla"]
    words += ["--seeds", "5", "--grid", "adam_beta2=0.9,0.98"]
    sweep = _sweep(_parser().parse_args(words), {"max_steps": 4})
    found = [(c.task, c.seed, c.settings) for c in sweep.cells()]
    settings = {"max_steps": 4, "weight_decay": 0.1}
    assert found == [(t, 5, {"adam_beta2": b, **settings}) for t in ("sst2", "rte") for b in (0.9, 0.98)]
    sweep = _sweep(_parser().parse_args(words), {"weight_decay": 0.3})
    assert {c.settings["weight_decay"] for c in sweep.cells()} == {0.3}
    flags = {"adam_beta2": 0.95}
    with pytest.raises(ValueError, match="--adam_beta2 is one value, and vanilla's grid has its own"):
        _cells(_sweep(_parser().parse_args(words), flags), flags)


def test_a_flag_and_the_grid_of_a_method(tmp_path: Path) -> None:
    path, flags = tmp_path / "sweep.yaml", {"smart_weight": 3.0}
    words = ["--store", "s", "--config", str(path), "--budget", "full"]
    path.write_text(yaml.safe_dump({"methods": ["smart"], "tasks": ["sst2"], "grid": "published"}))
    with pytest.raises(ValueError, match="--smart_weight is one value, and smart's grid has its own"):
        _cells(_sweep(_parser().parse_args(words), flags), flags)
    own = {"smart": {"grid": {"learning_rate": [1e-5, 2e-5]}}}  # in the place of the published one
    path.write_text(yaml.safe_dump({"methods": own, "tasks": ["sst2"], "grid": "published"}))
    found = _cells(_sweep(_parser().parse_args(words), flags), flags)
    assert [(c.settings["smart_weight"], c.settings["learning_rate"]) for c in found] == [(3.0, 1e-5), (3.0, 2e-5)]


def test_the_grid_on_a_command_line() -> None:
    assert _grid(["published"]) == "published"
    assert _grid(["keep_first=0.4,0.6", "warmup_steps=10"]) == {"keep_first": ["0.4", "0.6"], "warmup_steps": [10]}
    with pytest.raises(ValueError, match="expected FLAG=VALUE"):
        _grid(["keep_first"])


def test_launchers_carry_the_flags_and_the_users_words() -> None:
    flags = ["train", "--task", "sst2"]
    for name, launcher in LAUNCHERS.items():
        command = launcher.command(flags, ["--some", "word"])
        assert command[-4:] == ["rose_ds", *flags], name
        at = command.index("--some")
        assert command[at : at + 2] == ["--some", "word"]
    assert LAUNCHERS["slurm"].command(flags, [])[0] == "srun"


def test_a_preset_has_one_batch_on_any_number_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for settings, fits in (({"preset": "paper-base"}, True), ({"global_batch_size": 32}, True), ({}, False)):
        cell = Cell("rte", "rose-first", 0, settings)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="--num_gpus N"):
            Runner(Store(tmp_path), [cell], launcher="deepspeed")


def test_gpus_and_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def shared(name: str, jobs: int, *words: str) -> list[Any]:
        found = places(name, jobs, words)
        return [(p.words, p.chosen.get("CUDA_VISIBLE_DEVICES"), p.defaults.get("OMP_NUM_THREADS")) for p in found]

    assert shared("local", 1) == [((), "0", "16")]
    assert shared("local", 6)[4:] == [((), "0", "2"), ((), "1", "2")]
    assert shared("deepspeed", 1) == [((), None, "4")]
    assert shared("deepspeed", 1, "--num_gpus", "2") == [(("--num_gpus", "2"), None, "8")]
    two = [(("--include", f"localhost:{ids}", "--bind_cores_to_rank"), None, "4") for ids in ("0,1", "2,3")]
    assert shared("deepspeed", 2, "--num_gpus", "2", "--bind_cores_to_rank") == two
    assert shared("deepspeed", 2, "--bind_cores_to_rank") == two
    for jobs, words in ((3, ["--num_gpus", "2"]), (5, [])):
        with pytest.raises(ValueError, match="is more than the 4 here"):
            places("deepspeed", jobs, words)
    with pytest.raises(ValueError, match="--num_gpus N"):
        places("deepspeed", 1, [], fixed_batch=False)
    assert len(places("deepspeed", 1, ["--num_gpus=4"], fixed_batch=False)) == 1
    with pytest.raises(ValueError, match="leave --include"):
        places("deepspeed", 2, ["--include=localhost:0"])
    assert shared("slurm", 2, "--gres=gpu:1") == [(("--gres=gpu:1",), None, None)] * 2  # its steps have their own
    assert shared("deepspeed", 2, "--num_accelerators", "1")[1][0] == ("--include", "localhost:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # a scheduler's
    assert [device for _, device, _ in shared("local", 2)] == ["5", "7"]
    assert shared("deepspeed", 2)[1][0] == ("--include", "localhost:7")
    assert shared("deepspeed", 1)[0][0] == ()  # which deepspeed sees to
    assert shared("deepspeed", 1, "--num_gpus", "1")[0][0] == ("--include", "localhost:5")
    assert shared("deepspeed", 1, "--include=localhost:5")[0][0] == ("--include=localhost:5",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8a1f,GPU-77b0")
    with pytest.raises(ValueError, match="give their numbers"):
        places("deepspeed", 2, [])
    assert [device for _, device, _ in shared("local", 2)] == ["GPU-8a1f", "GPU-77b0"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert shared("deepspeed", 2, "--num_gpus=2") == [(("--num_gpus=2",), None, "4")] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert shared("local", 2) == [((), None, "8")] * 2
    assert shared("deepspeed", 2, "--num_gpus=2") == [(("--num_gpus=2",), None, "4")] * 2


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/sweep.yaml")), ids=lambda p: p.parent.name)
def test_our_own_sweeps_are_whole(path: Path) -> None:
    sweep = Sweep(**Sweep.read(path))
    cells = sweep.cells()
    assert len(cells) == len({c.key for c in cells}) == len(sweep.methods) * len(sweep.tasks) * len(sweep.seeds)
    for cell in cells[:: len(sweep.seeds)]:
        parsed(cell)


def test_every_flag_reaches_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Recorded:
        def __init__(self, store: Any, cells: Any, **more: Any) -> None:
            given.update(more, cells=cells)

        def run(self) -> None:
            store = Store(tmp_path)
            store.create()

    monkeypatch.setattr(sweep, "Runner", Recorded)
    flags = ["--methods", "vanilla", "--tasks", "snippets", "--jobs", "3", "--launcher", "deepspeed", "--keep_models"]
    flags += ["--launcher_args=--num_gpus 2", "--retry_failed", "--halving", "4", "--attack", "pruthi"]
    flags += ["--attack_items", "7", "--attack_max_words", "2", "--attack_query_budget", "50", "--attack_seed", "9"]
    with pytest.raises(SystemExit):  # nothing was done
        main(["sweep", "--store", str(tmp_path), *flags])
    attack = given.pop("attack")
    assert len(given.pop("cells")) == 1
    assert given == {
        **{"jobs": 3, "launcher": "deepspeed", "launcher_args": ["--num_gpus", "2"], "halving": 4},
        **{"keep_models": True, "retry_failed": True},
    }
    assert attack.items == 7
    settings = attack.settings
    assert (settings.search, settings.max_words, settings.query_budget, settings.attack_seed) == ("pruthi", 2, 50, 9)
