"""``rose-ds attack`` on a real classifier: one process and two ranks agree, and the report has the accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import run, torchrun

from rose_ds.attack import Classifier
from rose_ds.cli import main
from rose_ds.data import get_task, load_task
from rose_ds.experiments.evaluation import expected_calibration_error
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.resumable import read_log

FLAGS = ["--max_eval_samples", "12", "--max_length", "48", "--max_words", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, minilm: str, snippets: str) -> Path:
    """A sentiment classifier that is right more often than not."""
    out = tmp_path_factory.mktemp("attacked")
    flags = ["train", "--task", snippets, "--model", minilm, "--method", "vanilla", "--max_steps", "40"]
    flags += ["--per_device_train_batch_size", "16", "--max_length", "48", "--learning_rate", "2e-4"]
    flags += ["--max_eval_samples", "32", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no"]
    main([*flags, "--output_dir", str(out)])
    return out


def items(*logs: Path) -> dict[int, dict[str, Any]]:
    return {r["idx"]: r for log in logs for r in read_log(log) if "idx" in r}


def test_accuracy_under_attack(model: Path, snippets: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["attack", "--task", snippets, "--model", str(model), *FLAGS]
    main(command)
    (path,) = (model / "attack").glob("deepwordbug-*.json")
    found = json.loads(path.read_text())
    assert found["items"] == 12
    assert found["clean_accuracy"] > 0.5
    assert found["accuracy_under_attack"] < found["clean_accuracy"]
    printed = capsys.readouterr().out
    assert f"clean {found['clean_accuracy']:.2%} (ECE {100 * found['clean_ece']:.1f}), under attack" in printed
    assert f"under attack {found['accuracy_under_attack']:.2%}" in printed
    assert "ROSE's paper makes no automatic attacks" in printed

    classifier = Classifier(str(model))  # of the run's task and length
    (log,) = (model / "attack").glob("deepwordbug-*-0-of-1.jsonl")
    dev = load_task("snippets", splits=("validation",)).validation
    assert dev is not None
    originals = {row["idx"]: row for row in dev}
    records = items(log).values()
    logits = classifier.predict([originals[record["idx"]]["sentence"] for record in records])
    np.testing.assert_allclose([record["logits"] for record in records], logits, atol=1e-3)
    labels = np.array([record["label"] for record in records])
    assert found["clean_ece"] == pytest.approx(expected_calibration_error(logits, labels), abs=1e-3)
    for idx, record in items(log).items():
        logits = classifier.predict([record["texts"][0], originals[idx]["sentence"]])
        assert (logits.argmax(axis=1)[0] != record["label"]) == (record["outcome"] in ("broken", "wrong before"))
        assert (logits.argmax(axis=1)[1] != record["label"]) == (record["outcome"] == "wrong before")

    before = log.read_text()
    main(command)  # again: nothing to do
    assert log.read_text() == before

    main(["report", str(model), "--output_dir", str(tmp_path)])
    assert f"{found['accuracy_under_attack']:.2%}" in capsys.readouterr().out
    assert Metrics.read(model).under_attack == {
        f"deepwordbug 2, max_words 3, 12 items {found['rows']}": found["accuracy_under_attack"]
    }
    with pytest.raises(SystemExit):
        main([*command, "--adversarial_file", "hard.csv"])
    assert "--adversarial_file: an attack reads the clean dev set" in capsys.readouterr().err

    job = run([*torchrun(2), "-m", "rose_ds", *command, "--output_dir", str(tmp_path / "two")])
    assert job.returncode == 0, job.stderr[-2000:]
    two = [tmp_path / "two" / f"{path.stem}-{rank}-of-2.jsonl" for rank in range(2)]
    assert [len(items(path)) for path in two] == [6, 6]
    same, other = items(log), items(*two)
    for idx in same:  # a batch's other rows change the last digits
        np.testing.assert_allclose(other[idx].pop("logits"), same[idx].pop("logits"), atol=1e-3)
    assert other == same
    of_two = json.loads((tmp_path / "two" / path.name).read_text())
    assert of_two.pop("clean_ece") == pytest.approx(found.pop("clean_ece"), abs=1e-3)
    assert of_two == found


def test_predict_takes_strings_and_pairs(model: Path) -> None:
    """In any batch an answer is the same to a few roundings, and comes back in its place."""
    classifier = Classifier(str(model), get_task("snippets"), max_length=48, batch_size=3)
    texts = ["a fine film", "dull", "a very long and quite unusual story about nothing at all", "good", "bad " * 30]
    together = classifier.predict(texts)
    alone = np.concatenate([classifier.predict([(text,)]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert together.shape == (5, 2)
