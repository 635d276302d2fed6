"""Scripts that know nothing of rose_ds, through rose_ds.run: our own small one, and Hugging Face's run_glue.py.

run_glue.py is not ours to ship. Set ROSE_DS_RUN_GLUE to a copy of it, as transformers' repository has it under
examples/pytorch/text-classification, and install ``evaluate``; without them its tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import BIN, ROOT, deepspeed, rows_file, run, torchrun
from spawn import free_port

from rose_ds.data import load_task
from rose_ds.experiments.models import resolve

ACCELERATE = [str(BIN / "accelerate"), "launch", "--num_processes", "1", "--num_machines", "1", "--cpu"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
ROSE = ["--rose", "strategy=ensemble", "keep_first=0.5"]

#: What ``evaluate.load("accuracy")`` finds in the working directory, before it asks the hub.
ACCURACY = """
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({name: datasets.Value("int32") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(references)}
"""


@pytest.fixture(scope="module")
def files(snippets: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """train.csv and validation.csv with the columns sentence and label."""
    folder = tmp_path_factory.mktemp("csv")
    data = load_task(snippets, splits=("train", "validation"))
    sizes = {"train": 200, "validation": 40}
    return {split: rows_file(getattr(data, split), folder / f"{split}.csv", sizes[split]) for split in sizes}


def arguments(files: dict[str, Path], out: Path) -> list[str]:
    """What both scripts take."""
    flags = ["--train_file", str(files["train"]), "--validation_file", str(files["validation"]), "--max_steps", "3"]
    flags += ["--logging_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu", "--report_to", "none"]
    return [*flags, "--disable_tqdm", "true", "--save_strategy", "no", "--output_dir", str(out)]


@pytest.mark.parametrize("by", ["accelerate", "launch/cluster"])
def test_a_script_by_a_launcher(by: str, minilm: str, files: dict[str, Path], tmp_path: Path) -> None:
    script = str(ROOT / "tests/e2e/scripts/classify.py")
    flags = ["--model", resolve(minilm), *arguments(files, tmp_path)]
    if by == "accelerate":
        done = run([*ACCELERATE, "-m", "rose_ds.run", *ROSE, script, *flags])
    else:  # docs/cluster.md, "A script of your own"
        program = {"PROGRAM": " ".join(["-m rose_ds.run", *ROSE]), "COMMAND": script}
        hosts = {"NODES": "1", "RANKS_PER_NODE": "2", "RENDEZVOUS": f"localhost:{free_port()}", "JOB": "script"}
        done = run(["bash", str(ROOT / "launch/cluster/torchrun_node.sh"), *flags], **program, **hosts)
    assert done.returncode == 0
    assert "'rose/kept_first': 0.5" in done.stdout  # the script prints its first log entry
    assert "'rose/kept_second': 1.0" in done.stdout


@pytest.fixture(scope="module")
def run_glue() -> str:
    """The unmodified run_glue.py."""
    path = os.environ.get("ROSE_DS_RUN_GLUE", "")
    if not Path(path).is_file():
        pytest.skip(f"ROSE_DS_RUN_GLUE={path!r} is no copy of transformers' run_glue.py")
    if importlib.util.find_spec("evaluate") is None:
        pytest.skip("run_glue.py needs evaluate: pip install evaluate")
    return str(Path(path).resolve())


def launcher(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """The command before the script, and what the script gets beside its arguments."""
    if name == "python":
        return [sys.executable, "-m", "rose_ds.run", *ROSE], []
    if name == "accelerate":
        return [*ACCELERATE, "-m", "rose_ds.run", *ROSE], []
    if name == "torchrun":
        return [*torchrun(), "-m", "rose_ds.run", *ROSE], []
    config: dict[str, Any] = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    automatic = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    config["optimizer"] = {"type": "RoseAdamW", "params": {**automatic, "strategy": "ensemble", "keep_first": 0.5}}
    (folder / "block.json").write_text(json.dumps(config))
    return [*deepspeed(), "--module", "rose_ds.run"], ["--deepspeed", str(folder / "block.json")]


@pytest.mark.parametrize("name", ["python", "accelerate", "torchrun", "deepspeed"])
def test_run_glue(
    name: str, run_glue: str, minilm: str, files: dict[str, Path], tmp_path: Path, extensions: Path
) -> None:
    """Every step's masks are in the script's own log, and its own evaluation and model come out."""
    head, tail = launcher(name, tmp_path)
    (tmp_path / "accuracy").mkdir()
    (tmp_path / "accuracy" / "accuracy.py").write_text(ACCURACY)
    script = [run_glue, "--model_name_or_path", resolve(minilm), "--do_train", "--do_eval", "--max_seq_length", "32"]
    command = [*head, *script, *arguments(files, tmp_path / "out"), *tail]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = run(["env", "--chdir", str(tmp_path), *command], PYTHONPATH=paths)
    assert done.returncode == 0
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["rose/kept_first"] for entry in steps] == pytest.approx([0.5] * 3, abs=1e-3)
    assert [entry["rose/kept_second"] for entry in steps] == pytest.approx([1.0, 0.6, 0.6], abs=0.05)
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 80_000_000
    ranks = 2 if name in ("torchrun", "deepspeed") else 1
    assert (done.stdout + done.stderr).count("Process rank: ") == ranks
