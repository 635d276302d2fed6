"""A store's report against figures worked out by hand, and its tests against simulated truth."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rose_ds.cli import main
from rose_ds.experiments.cells import Cell
from rose_ds.experiments.comparison import render
from rose_ds.experiments.comparison.gather import gather, matched, models_in
from rose_ds.experiments.comparison.paper import table_1, table_2, table_3
from rose_ds.experiments.comparison.published import accuracy
from rose_ds.experiments.comparison.statistics import compare, mean_sd, one_tailed_t
from rose_ds.experiments.comparison.table import Table
from rose_ds.experiments.comparison.tables import tables
from rose_ds.experiments.evaluation import PREDICTIONS, TRAJECTORY, write_lines
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.store import Store

pytestmark = pytest.mark.fast


def add(
    store: Store, cell: Cell, clean: str, hostile: str | None, way: Any = (), model: str = "m", **more: Any
) -> None:
    """A finished cell whose answers are given as 1 (right) and 0."""
    run = store.run_folder(cell)
    run.mkdir(parents=True)
    sets = {"clean": clean, **({"adversarial": hostile} if hostile else {})}
    hits = {name: [int(c) for c in text] for name, text in sets.items()}
    means = {name: float(np.mean(h)) for name, h in hits.items()}
    Metrics(
        task=cell.task,
        model=model,
        method=cell.method,
        seed=cell.seed,
        steps=9,
        step_seconds=0.25,
        peak_memory_bytes=3 * 2**29,
        glue_accuracy=means["clean"],
        advglue_accuracy=means.get("adversarial"),
        perturbed_accuracy=0.5,
        **more,
    ).write(run)
    records = [{"set": n, "idx": list(range(len(h))), "label": [1] * len(h), "prediction": h} for n, h in hits.items()]
    write_lines(run / PREDICTIONS, records)
    write_lines(run / TRAJECTORY, list(way))
    store.record(cell, 1.0, keep_models=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.create()
    return store


def column(table: Table, name: str) -> list[str]:
    at = table.header.index(name)
    return [row[at] for row in table.rows]


def named(store: Store, key: str, **options: Any) -> Table:
    return next(table for table in tables(gather([store], **options)) if table.key == key and table.rows)


def test_a_collapsed_run_is_named(store: Store) -> None:
    """It is right on half of the items, and gives all of them one answer."""
    for seed in (0, 1):
        add(store, Cell("sst2", "vanilla", seed, {}), "1" * 30 + "0" * 20, "1000")
    lines = [
        {"set": "clean", "idx": list(range(50)), "label": [0, 1] * 25, "prediction": prediction}
        for prediction in ([1] * 49 + [0], [0, 1] * 24 + [0, 0])
    ]
    for run, line in zip(gather([store]).entries["sst2", "vanilla"].runs, lines, strict=True):
        write_lines(store.root / "predictions" / f"{run.key}.jsonl", [line])
    table = named(store, "collapsed")
    assert table.rows == [("sst2", "vanilla", "defaults", "0", "98.0", "60.00", "25.00", "50.00")]


def test_who_is_right_on_one_sided_data_has_not_collapsed(store: Store) -> None:
    """Nearly all items have one label; to give it to all of them is what learning nothing is."""
    for seed in (0, 1):
        add(store, Cell("sst2", "vanilla", seed, {}), "1" * 200, None)
    for run, right in zip(gather([store]).entries["sst2", "vanilla"].runs, (True, False), strict=True):
        label = [0] * 3 + [1] * 197
        line = {"set": "clean", "idx": list(range(200)), "label": label, "prediction": label if right else [1] * 200}
        write_lines(store.root / "predictions" / f"{run.key}.jsonl", [line])
    assert column(named(store, "collapsed"), "seed") == ["1"]


def test_means_deviations_average_and_delta(store: Store) -> None:
    """Avg is the mean of all cells of a row and Delta a difference of means, as in the paper's Table 1."""
    for seed, (clean, hostile) in enumerate((("1111", "10"), ("1110", "00"))):
        add(store, Cell("sst2", "vanilla", seed, {}), clean, hostile)
        add(store, Cell("rte", "vanilla", seed, {}), "1100", "10")
    table = accuracy(gather([store]))
    assert table.header == ("method", "sst2 clean", "sst2 AdvGLUE", "rte clean", "rte AdvGLUE", "Avg", "Delta", "seeds")
    sd = np.std([100, 75], ddof=1)
    average, delta = (87.5 + 25 + 50 + 50) / 4, (87.5 + 50) / 2 - (25 + 50) / 2
    expected = (
        "vanilla",
        f"87.50 ± {sd:.2f}",
        f"25.00 ± {np.std([50, 0], ddof=1):.2f}",
        "50.00 ± 0.00",
        "50.00 ± 0.00",
    )
    assert table.rows == [(*expected, f"{average:.2f}", f"{delta:.2f}", "2 2")]
    cost = named(store, "attacked")
    assert column(cost, "peak memory (GiB)") == ["1.50 ± 0.00"] * 2
    assert column(cost, "step (s)") == ["0.250 ± 0.000"] * 2
    assert column(cost, "Delta perturbed") == ["37.50", "0.00"]
    assert named(store, "seeds").header[4:8] == ("clean", "ECE clean", "AdvGLUE", "ECE AdvGLUE")
    assert [(row[0], row[3], row[4], row[6]) for row in named(store, "seeds").rows] == [
        ("sst2", "0", "100.00", "50.00"),
        ("sst2", "1", "75.00", "0.00"),
        ("rte", "0", "50.00", "50.00"),
        ("rte", "1", "50.00", "50.00"),
    ]


def test_a_task_without_a_set_leaves_the_average_open(store: Store) -> None:
    add(store, Cell("sst2", "vanilla", 0, {}), "11", "10")
    add(store, Cell("snippets", "vanilla", 0, {}), "11", None)
    table = accuracy(gather([store]))
    assert table.header == ("method", "sst2 clean", "sst2 AdvGLUE", "snippets clean", "Avg", "Delta", "seeds")
    assert table.rows == [("vanilla", "100.00", "50.00", "100.00", "-", "-", "1 1")]


def test_sets_are_called_what_they_are(store: Store) -> None:
    """A file of one's own is not AdvGLUE; without any, Delta is to the perturbed set, and says so."""
    add(store, Cell("reviews", "vanilla", 0, {}), "11", None)
    table = accuracy(gather([store]))
    assert table.header == ("method", "reviews clean", "reviews perturbed", "Avg", "Delta", "seeds")
    assert table.rows[0][-2] == "50.00" and "clean less perturbed accuracy" in table.note
    assert "AdvGLUE" not in render.page(tables(gather([store]))[:2], None)
    add(store, Cell("reviews", "vanilla", 1, {"adversarial_file": "a.csv 0"}), "11", "10")
    assert accuracy(gather([store])).header[2] == "reviews adversarial"
    config = {"adversarial_file": "worse.json"}
    one = Metrics(task="sst2", model="m", glue_accuracy=0.9, glue_ece=0.05, advglue_accuracy=0.4, config=config)
    assert one.summary() == "sst2 m: clean 90.00% (ECE 5.0), adversarial 40.00%"
    assert Metrics(task="sst2", model="m", advglue_accuracy=0.4).summary() == "sst2 m: AdvGLUE 40.00%"


def test_the_papers_figures_stand_beside_the_same_model_only(store: Store) -> None:
    for task in ("qnli", "qqp", "rte"):
        add(store, Cell(task, "vanilla", 0, {}), "11", "10", model="roberta-base")
    add(store, Cell("sst2", "vanilla", 0, {}), "11", "10", model="roberta-base")
    cells = ("92.97", "27.43", "91.58", "19.49", "77.91", "28.15", "94.29", "24.05")
    paper = ("vanilla (paper)", *cells, "56.98", "64.41", "-")
    assert accuracy(gather([store])).rows[1] == paper
    add(store, Cell("snippets", "vanilla", 0, {}), "11", "10", model="roberta-base")
    assert len(accuracy(gather([store])).rows) == 1  # whose adversarial set is another


@pytest.mark.parametrize(
    ("key", "average", "delta"),
    [
        (("roberta-base", "r-drop"), 60.74, 58.70),
        (("roberta-base", "child-tuning"), 55.49, 65.88),
        (("roberta-base", "smart"), 62.27, 53.91),
        (("roberta-base", "freelb"), 63.34, 52.56),
        (("roberta-base", "rose-first"), 64.59, 48.29),
        (("roberta-base", "rose-second"), 63.77, 49.88),
        (("roberta-base", "rose-ensemble"), 65.02, 47.84),
        (("roberta-large", "vanilla"), 73.81, 36.72),
        (("roberta-large", "r-drop"), 73.79, 37.18),
        (("roberta-large", "child-tuning"), 72.87, 38.35),
        (("roberta-large", "smart"), 76.11, 32.14),
        (("roberta-large", "freelb"), 75.95, 33.53),
        (("roberta-large", "rose-first"), 77.27, 28.20),
        (("roberta-large", "rose-second"), 76.93, 30.03),
        (("roberta-large", "rose-ensemble"), 78.10, 27.67),
    ],
)
def test_the_papers_cells_add_up_to_its_averages(key: tuple[str, str], average: float, delta: float) -> None:
    """Which it prints, beside them."""
    clean, hostile = zip(*table_1(*key).values(), strict=True)
    assert np.mean(clean + hostile) == pytest.approx(average, abs=0.011)
    assert np.mean(clean) - np.mean(hostile) == pytest.approx(delta, abs=0.011)


@pytest.mark.parametrize("model", ["roberta-base", "roberta-large"])
def test_the_papers_tables_agree_where_they_share_a_row(model: str) -> None:
    """Table 2's R-Drop and Table 3's gamma of 0.5 are rows of Table 1."""
    by_method = {method: np.mean(list(table_1(model, method).values())) for method in ("r-drop", "rose-ensemble")}
    assert table_2(model, "r-drop") == (
        pytest.approx(by_method["r-drop"], abs=0.011),
        pytest.approx(np.subtract(*np.mean(list(table_1(model, "r-drop").values()), axis=0)), abs=0.011),
    )
    assert table_3(f"FacebookAI/{model}", 0.5) == pytest.approx(by_method["rose-ensemble"], abs=0.011)
    assert table_2("minilm", "r-drop") is table_2(model, "smart") is table_3(model, 0.2) is None


def test_an_objective_and_a_mask_together(store: Store) -> None:
    """Over the seeds that all rows have: another seed of one of them would be compared with nothing."""
    for task in ("sst2", "rte", "qnli", "qqp"):
        for seed, clean in ((0, "1100"), (1, "1110"), (2, "0000")):
            add(store, Cell(task, "r-drop", seed, {}), clean, "1000", model="roberta-base")
        for seed in (0, 1, 3):
            add(store, Cell(task, "r-drop+rose-first", seed, {}), "1110", "10", model="roberta-base")
    add(store, Cell("snippets", "r-drop", 0, {}), "11", None, model="roberta-base")  # nothing stands beside it
    add(store, Cell("sst2", "smart", 0, {}), "11", "10", model="roberta-base")  # nor beside this
    table = named(store, "combined")
    assert [row[0] for row in table.rows] == [
        "r-drop",
        "r-drop (paper)",
        "r-drop+rose-first",
        "r-drop+rose-first (paper)",
    ]
    assert column(table, "sst2 clean") == [f"62.50 ± {np.std([50, 75], ddof=1):.2f}", "-", "75.00 ± 0.00", "-"]
    assert column(table, "Avg") == ["43.75", "60.74", "62.50", "63.41"]
    assert column(table, "Delta") == ["37.50", "58.70", "25.00", "51.51"]
    assert "snippets clean" not in table.header


def test_each_objective_is_compared_on_its_own_tasks(store: Store) -> None:
    for task in ("sst2", "rte", "qnli", "qqp"):
        for method in ("r-drop", "smart", "smart+rose-first"):
            add(store, Cell(task, method, 0, {}), "1110", "10", model="roberta-base")
    add(store, Cell("sst2", "r-drop+rose-first", 0, {}), "1111", "10", model="roberta-base")
    table = named(store, "combined")
    assert [row[0] for row in table.rows] == ["smart", "smart+rose-first", "r-drop", "r-drop+rose-first"]
    assert column(table, "rte clean") == ["75.00", "75.00", "-", "-"]
    assert column(table, "Avg") == ["62.50", "62.50", "-", "-"]


def test_the_ensemble_by_gamma(store: Store) -> None:
    """Each value at its best learning rate; the paper's average, which is over four tasks, beside four tasks alone."""
    for task in ("sst2", "rte", "qnli", "qqp"):
        for gamma, rate, clean in ((None, 1e-4, "1100"), (0.9, 1e-4, "0000"), (0.9, 2e-4, "1110")):
            settings = {"learning_rate": rate, **({} if gamma is None else {"gamma": gamma})}
            add(store, Cell(task, "rose-ensemble", 0, settings), clean, "10", model="me/roberta-large")
    table = named(store, "gamma")
    assert column(table, "gamma") == ["0.5", "0.5 (paper)", "0.9", "0.9 (paper)"]
    assert column(table, "qqp clean") == ["50.00", "-", "75.00", "-"]
    assert column(table, "Avg") == ["50.00", "78.10", "62.50", "73.22"]
    assert column(table, "Delta") == ["0.00", "-", "25.00", "-"]
    add(store, Cell("snippets", "rose-ensemble", 0, {}), "11", "10", model="me/roberta-large")
    add(store, Cell("snippets", "rose-ensemble", 0, {"gamma": 0.9}), "11", "10", model="me/roberta-large")
    assert column(named(store, "gamma"), "gamma") == ["0.5", "0.9"]


def test_stores_are_read_as_one(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings in two stores are settings to choose among; a cell in both is one."""
    other = Store(tmp_path / "other")
    other.create()
    lower = {"learning_rate": 1e-5}
    for seed in (0, 1):
        add(store, Cell("sst2", "vanilla", seed, {}), "1000", "10")
        add(other, Cell("sst2", "vanilla", seed, lower), "1110", "10")
        add(other, Cell("sst2", "smart", seed, lower), "1111", "11")
    add(other, Cell("sst2", "vanilla", 0, {}), "1000", "10")
    both = gather([store, other])
    assert [(c.label, len(c.runs)) for c in both.entries["sst2", "vanilla"].candidates] == [
        ("learning_rate=default", 2),
        ("learning_rate=1e-05", 2),
    ]
    found = both.difference("sst2", "smart", "clean")
    assert found is not None and found.points == pytest.approx(25.0)
    main(["report", "--store", str(store.root), str(other.root), "--output_dir", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "| vanilla | 75.00 ± 0.00  |" in shown and "1 cells are in several of the stores" in shown
    with pytest.raises(SystemExit):
        main(["report", "--store", str(store.root), str(other.root)])
    assert "--output_dir" in capsys.readouterr().err


def test_two_models_are_no_two_settings(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A method that has more seeds on one would be compared with another method on the other."""
    for model, seeds, hits in (("minilm", (0, 1), "1100"), ("me/large", (0,), "1111")):
        for seed in seeds:
            add(store, Cell("sst2", "vanilla", seed, {"model": model}), hits, None, model=model)
    add(store, Cell("sst2", "rose-first", 0, {"model": "me/large"}), "1110", None, model="me/large")
    main(["report", "--store", str(store.root)])
    printed = capsys.readouterr().out
    assert printed.count("## Table 1") == 2 and "me/large. Accuracy in percent" in printed
    small, large = (
        list(csv.DictReader((store.root / "report" / model / "accuracy.csv").open()))
        for model in ("1-minilm", "2-me-large")
    )
    assert [(row["method"], row["sst2 clean"]) for row in small] == [("vanilla", "50.00 ± 0.00")]
    assert [(row["method"], row["sst2 clean"]) for row in large] == [("vanilla", "100.00"), ("rose-first", "75.00")]
    difference = gather([store], model="me/large").difference("sst2", "rose-first", "clean")
    assert difference is not None and difference.points == -25.0
    main(["report", "--store", str(store.root), "--baseline", "rose-first"])  # which one of the models has not got
    assert gather([store], "rose-first", "minilm").baseline is None
    preset = {"preset": "paper-large"}  # which names a model by itself
    add(store, Cell("sst2", "vanilla", 0, preset), "11", None, model="roberta-large")
    assert models_in([store]) == ["minilm", "me/large", "roberta-large"]


def test_attacks_stand_beside_their_like_alone(store: Store) -> None:
    add(
        store,
        Cell("sst2", "vanilla", 0, {}),
        "11",
        None,
        under_attack={"pruthi, 8 items a": 0.5, "deepwordbug, 8 items a": 0.25},
    )
    add(store, Cell("sst2", "vanilla", 1, {}), "11", None, under_attack={"pruthi, 8 items a": 0.25})
    add(store, Cell("sst2", "smart", 0, {}), "11", None, under_attack={"pruthi, 9 items b": 0.125})
    assert named(store, "under_attack").rows == [
        ("sst2", "pruthi, 8 items a", "vanilla", "37.50 ± 17.68", "2"),
        ("sst2", "deepwordbug, 8 items a", "vanilla", "25.00", "1"),
        ("sst2", "pruthi, 9 items b", "smart", "12.50", "1"),
    ]


def test_settings_are_chosen_by_the_clean_set_and_the_oracle_stands_apart(store: Store) -> None:
    for seed in (0, 1):
        for rate, clean, hostile in ((1e-4, "1110", "0000"), (2e-4, "1100", "1111")):
            varied = {"learning_rate": rate}
            add(store, Cell("sst2", "vanilla", seed, varied, varied), clean, hostile)
    lone = {"learning_rate": 3e-4}
    add(store, Cell("sst2", "vanilla", 0, lone, lone), "1111", "1111")  # the best, by the luck of one seed
    choices = named(store, "choices")
    assert (column(choices, "chosen"), column(choices, "clean")) == (["learning_rate=0.0001"], ["75.00"])
    assert column(choices, "settings tried") == ["3"]
    assert column(accuracy(gather([store])), "sst2 AdvGLUE") == ["0.00 ± 0.00"]
    oracle = named(store, "oracle")
    assert oracle.rows == [("sst2", "vanilla", "learning_rate=0.0002", "50.00", "100.00", "+100.00")]
    assert len(named(store, "settings").rows) == 3


def test_runs_of_other_settings_are_another_candidate(store: Store) -> None:
    """Whether or not a grid varied them: a longer run is no second run of a shorter one's seed."""
    for steps, hits in ((200, "1100"), (2000, "1110")):
        for seed in (0, 1):
            add(store, Cell("sst2", "vanilla", seed, {"max_steps": steps, "warmup_steps": 9}), "1100", None)
            add(store, Cell("sst2", "smart", seed, {"max_steps": steps, "warmup_steps": 9}), hits, None)
    choices = named(store, "choices")
    assert column(choices, "settings tried") == ["2", "2"]
    assert column(choices, "chosen") == ["max_steps=200", "max_steps=2000"]
    found = gather([store]).difference("sst2", "smart", "clean")
    assert found is not None and (found.seeds, found.points) == (2, 25.0)


def test_unequal_numbers_of_settings_are_said(store: Store) -> None:
    for rate in (1e-4, 2e-4):
        varied = {"learning_rate": rate}
        add(store, Cell("sst2", "rose-first", 0, varied, varied), "11", "11")
    add(store, Cell("sst2", "vanilla", 0, {}), "11", "11")
    assert "did not try equally many" in named(store, "choices").note


def test_unfinished_runs_are_shown(store: Store) -> None:
    cells = [Cell("sst2", method, seed, {}) for method in ("vanilla", "smart") for seed in range(3)]
    store.add_to_plan(cells)
    store.add_to_plan(cells)  # a second process with the same plan
    assert store.plan() == cells
    add(store, cells[0], "10", "10")
    claim = store.claim(cells[1])
    assert claim is not None
    store.log(cells[1]).write_text("a\nout of memory\n")
    store.fail(cells[1], 1)
    claim.release()
    table = named(store, "unfinished")
    assert [row[:2] for row in table.rows] == [
        ("sst2 vanilla seed 1", "failed"),
        ("sst2 vanilla seed 2", "not started"),
        *((f"sst2 smart seed {seed}", "not started") for seed in range(3)),
    ]
    assert table.rows[0][2] == "out of memory"
    assert accuracy(gather([store])).rows == [
        ("vanilla", "50.00", "50.00", "50.00", "0.00", "1 of 3"),
        ("smart", "-", "-", "-", "-", "0"),
    ]


def test_matched_at_a_clean_accuracy_that_all_reach(store: Store) -> None:
    """The slow method's best is the level; the fast one is compared where it was no better."""
    fast = [{"step": s, "clean": c, "adversarial": a} for s, c, a in ((1, 0.6, 0.5), (2, 0.8, 0.4), (3, 0.9, 0.1))]
    slow = [{"step": s, "clean": c, "adversarial": a} for s, c, a in ((1, 0.5, 0.5), (2, 0.7, 0.4), (3, 0.81, 0.3))]
    add(store, Cell("sst2", "vanilla", 0, {}), "1", "1", fast)
    add(store, Cell("sst2", "rose-first", 0, {}), "1", "1", slow)
    found = matched(gather([store]), "sst2")
    assert found is not None
    assert found[0] == pytest.approx(0.81)
    assert {m: [p.point["step"] for p in points] for m, points in found[1].items()} == {
        "vanilla": [2],
        "rose-first": [3],
    }
    assert column(named(store, "matched"), "AdvGLUE") == ["40.00", "30.00"]
    run = Cell("sst2", "freelb", 0, {})
    add(store, run, "1", "1", [{"step": 3, "clean": 0.5, "adversarial": 0.5}])
    path = store.root / "predictions" / f"{run.key}.jsonl"  # one answer to both labels: it has learned nothing
    path.write_text('{"set":"clean","idx":[0,1],"label":[0,1],"prediction":[1,1]}\n')
    again = matched(gather([store]), "sst2")
    assert again is not None and again[0] == found[0]


# --- tests of significance ---


def test_t_is_scipys() -> None:
    ours, base = [0.52, 0.55, 0.51, 0.58, 0.54], [0.50, 0.51, 0.49, 0.53, 0.50]
    t = (np.mean(ours) - np.mean(base)) / np.sqrt((np.var(ours, ddof=1) + np.var(base, ddof=1)) / 5)
    assert one_tailed_t(ours, base) == pytest.approx(stats.t.sf(t, 8))
    assert one_tailed_t(base, ours) == pytest.approx(stats.t.cdf(t, 8))
    assert one_tailed_t([0.5], [0.4, 0.3]) is None
    assert one_tailed_t([0.5, 0.5], [0.4, 0.4]) is None
    assert mean_sd([0.5]) == (0.5, None)


def test_the_bootstrap_of_one_seed_is_scipys() -> None:
    random = np.random.default_rng(3)
    ours, base = random.random((1, 150)) < 0.6, random.random((1, 150)) < 0.5
    found = compare(ours, base)
    gain = ours[0].astype(float) - base[0]
    theirs = stats.bootstrap((gain,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert found.points == pytest.approx(100 * gain.mean())
    assert (found.low, found.high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1.0)
    assert found.p_t is None


def test_the_bootstrap_keeps_its_level_and_sees_a_gain() -> None:
    """Items differ in difficulty and five seeds share them; with no gain, p < 0.05 in about a twentieth of cases."""
    random = np.random.default_rng(0)
    ps = []
    for _ in range(150):
        difficulty = random.beta(0.7, 0.7, 148)
        ours, base = (random.random((5, 148)) < difficulty for _ in range(2))
        ps.append(compare(ours, base, resamples=400).p_bootstrap)
    assert np.mean(np.array(ps) < 0.05) < 0.1
    difficulty = random.beta(0.7, 0.7, 148)
    better = compare(random.random((5, 148)) < np.minimum(1, difficulty + 0.2), random.random((5, 148)) < difficulty)
    assert better.p_bootstrap == 0.5**5  # the least that five seeds can say
    assert better.low > 0
    same = random.random((5, 148)) < difficulty
    assert compare(same, same).p_bootstrap == 1.0


def test_the_bootstrap_knows_that_seeds_are_few() -> None:
    """With many items what varies is the seeds, of which a resample holds none but those that are there."""
    random = np.random.default_rng(0)
    ps = []
    for _ in range(80):
        ours, base = (random.random((3, 400)) < random.normal(0.8, 0.05, (3, 1)) for _ in range(2))
        ps.append(compare(ours, base, resamples=400).p_bootstrap)
    assert np.mean(np.array(ps) < 0.05) == 0.0  # 2^-3 is more
    assert np.mean(np.array(ps) < 0.13) < 0.2
    ours, base = np.array([[1] * 5 + [0] * 5, [1] * 9 + [0]]) > 0, np.zeros((2, 10), bool)
    spread = compare(ours, base)
    assert spread.high - spread.low > 100 * 0.4  # no narrower than the seeds are apart


def test_what_was_measured_on_other_items_is_left_out_and_named(store: Store) -> None:
    """And no setting wins because its dev set is easier."""
    add(store, Cell("sst2", "vanilla", 0, {}), "1100", None)
    add(store, Cell("sst2", "smart", 0, {}), "111", None)
    add(store, Cell("sst2", "r-drop", 0, {}), "1110", None)
    add(store, Cell("sst2", "r-drop", 0, {"max_eval_samples": 2}), "11", None)
    table = named(store, "significance")
    assert {(row[1], row[2]) for row in table.rows} == {("r-drop", "clean")}
    assert "Left out: sst2: run" in table.note and "(vanilla, seed 0) was measured on other clean items" in table.note
    assert gather([store]).entries["sst2", "r-drop"].chosen.label == "max_eval_samples=default"


def test_runs_on_other_data_stand_apart(store: Store) -> None:
    """The labels of a file were corrected in the middle of a sweep."""
    before, after = {"train_file": "r.csv 000000000000"}, {"train_file": "r.csv 111111111111"}
    for method, settings, hits in (
        ("vanilla", before, "1111"),
        ("vanilla", after, "1100"),
        ("smart", after, "1110"),
        ("r-drop", before, "1111"),
    ):
        for seed in range(2 if settings is after else 1):
            add(store, Cell("mine", method, seed, settings), hits, None)
    table = accuracy(gather([store]))
    rows = {row[0]: row[1] for row in table.rows}
    assert rows == {"vanilla": "50.00 ± 0.00", "smart": "75.00 ± 0.00", "r-drop": "-"}
    apart = named(store, "other_data")
    assert [(row[1], row[3]) for row in apart.rows] == [("vanilla", "100.00"), ("r-drop", "100.00")]
    assert len(named(store, "seeds").rows) == 6
    assert [row[2] for row in named(store, "choices").rows] == ["1", "1"]
    held_out = {"validation_file": "d.csv 222222222222"}  # another training file is then a setting like others
    for seed in range(3):
        add(store, Cell("mine", "vanilla", seed, {**held_out, **before}), "1111", None)
        add(store, Cell("mine", "vanilla", seed, {**held_out, **after}), "1110", None)
    add(store, Cell("mine", "smart", 5, {**held_out, **after, "perturb_seed": 0}), "1110", None)  # the default
    chosen = gather([store]).entries["mine", "vanilla"].chosen
    assert "train_file=r.csv 000000000000" in chosen.label and len(named(store, "other_data").rows) == 4


def test_many_items_take_little_time_and_no_other_interval() -> None:
    """What items are is nothing to the bootstrap: alike ones are counted."""
    random = np.random.default_rng(0)
    ours, base = random.random((5, 200)) < 0.8, random.random((5, 200)) < 0.75
    few, many = compare(ours, base), compare(np.tile(ours, 2000), np.tile(base, 2000), resamples=1000)
    assert many.points == pytest.approx(few.points)
    gain = 100 * (ours.mean(axis=1) - base.mean(axis=1))
    draws = random.integers(5, size=(20_000, 4))  # with so many items what is left is the seeds
    low, high = np.quantile(gain[draws].mean(axis=1), (0.025, 0.975))
    assert (many.low, many.high) == (pytest.approx(low, abs=0.3), pytest.approx(high, abs=0.3))


def test_accuracy_under_attack_is_compared_item_by_item(store: Store) -> None:
    label = "pruthi, 4 items 0123"
    for method, right in (("vanilla", [True, False, False, False]), ("smart", [True, True, False, True])):
        for seed in (0, 1):
            cell = Cell("sst2", method, seed, {})
            add(store, cell, "1110", None, under_attack={label: sum(right) / 4})
            path = store.root / "predictions" / f"{cell.key}.jsonl"
            line = {"set": label, "idx": [0, 1, 2, 3], "label": [0, 1, 0, 1], "right": right}
            path.write_text(path.read_text() + json.dumps(line) + "\n")
    gains = {row[2]: row[3] for row in named(store, "significance").rows}
    assert gains == {"clean": "+0.00", label: "+50.00"}
    assert column(named(store, "seeds"), "under attack")[0] == f"25.00 ({label})"


def test_seeds_are_paired_and_items_must_agree(store: Store) -> None:
    for seed, hits in enumerate(("1100", "1000", "0000")):
        add(store, Cell("sst2", "vanilla", seed, {}), hits, None)
    for seed, hits in ((2, "0001"), (1, "1110")):
        add(store, Cell("sst2", "smart", seed, {}), hits, None)
    found = gather([store]).difference("sst2", "smart", "clean")
    assert found is not None
    assert (found.seeds, found.points) == (2, pytest.approx(100 * (2 + 1) / 8))
    assert gather([store]).difference("sst2", "vanilla", "clean") is None
    assert gather([store]).difference("sst2", "smart", "AdvGLUE") is None
    other = Cell("sst2", "smart", 0, {})
    add(store, other, "11", None)
    with pytest.raises(ValueError, match=f"was measured on other clean items than run {other.key}"):
        gather([store]).difference("sst2", "smart", "clean")
    with pytest.raises(ValueError, match="cannot pair answers"):
        compare(np.ones((2, 3), bool), np.ones((2, 4), bool))


# --- files ---


def test_no_table_of_an_earlier_report_stays(store: Store, tmp_path: Path) -> None:
    first, second = Cell("sst2", "vanilla", 0, {}), Cell("sst2", "vanilla", 1, {})
    store.add_to_plan([first, second])
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.csv").write_text("a user's own")
    for cell, there in ((first, True), (second, False)):
        add(store, cell, "10", None)
        main(["report", "--store", str(store.root), "--output_dir", str(out)])
        assert (out / "unfinished.csv").exists() == there
    add(store, Cell("sst2", "smart", 0, {"model": "other"}), "10", None)
    main(["report", "--store", str(store.root), "--output_dir", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["1-minilm", "2-other", "notes.csv"]


class Page(HTMLParser):
    """Counts tables, and collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tables, self.sources = 0, list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tables += tag == "table"
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_command_writes_every_file(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    way = [{"step": 1, "clean": 0.5, "adversarial": 0.25}, {"step": 2, "clean": 0.75, "adversarial": 0.5}]
    for seed in (0, 1):
        under = {"under_attack": {"pruthi, 4 items 0123": 0.125}}
        add(store, Cell("sst2", "vanilla", seed, {}), "1110", "10", way, **under)
        add(store, Cell("sst2", "r-drop+rose-first", seed, {}), "1111", "11", way)
    main(["report", "--store", str(store.root)])
    printed = capsys.readouterr().out
    assert "| r-drop+rose-first | 100.00 ± 0.00 | 100.00 ± 0.00 |" in printed
    out = store.root / "report"
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    page = Page()
    page.feed((out / "report.html").read_text())
    assert page.tables == len(list(out.glob("*.csv"))) == (out / "report.md").read_text().count("\n## ") + 1
    assert [source[:15] for source in page.sources] == ["data:image/png;"]
    rows = list(csv.DictReader((out / "under_attack.csv").open()))
    assert [(row["method"], row["accuracy"]) for row in rows] == [("vanilla", "12.50 ± 0.00")]
    gains = {(r["method"], r["set"]): r["gain (points)"] for r in csv.DictReader((out / "significance.csv").open())}
    assert gains == {("r-drop+rose-first", "clean"): "+25.00", ("r-drop+rose-first", "AdvGLUE"): "+50.00"}


def test_names_cannot_break_the_page_or_the_tables() -> None:
    table = Table("k", "t<i>", "n & m", ("a", "b"), [("<script>", "x|y")])
    assert "<script>" not in render.page([table], None)
    assert "x\\|y" in render.markdown(table)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give folders of runs, or --store"),
        (["a", "--store", "b"], "give folders of runs, or --store"),
        (["a"], "--output_dir"),
        (["--store", "{store}"], "holds no cells"),
        (["--store", "{filled}", "--baseline", "smart"], "baseline='smart' is not one of"),
    ],
)
def test_wrong_command_lines(
    words: list[str], message: str, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = Store(tmp_path / "filled")
    filled.create()
    add(filled, Cell("sst2", "vanilla", 0, {}), "1", "1")
    with pytest.raises(SystemExit) as stop:
        main(["report", *(word.format(store=store.root, filled=filled.root) for word in words)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
