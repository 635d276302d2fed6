"""Scripts under accelerate, torchrun and deepspeed: every engine, and unchanged scripts through rose_ds.run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from launching import ROOT, accelerate, assert_saved_model_answers, deepspeed, rows_file, run, torchrun
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rose_ds.data import load_task
from rose_ds.experiments.models import resolve
from rose_ds.run import main

SCRIPTS = "tests/e2e/scripts"
PLAIN = [sys.executable]


def launcher(config: str, folder: Path) -> list[str]:
    """rose-ds train under a config. accelerate starts several CPU processes only through MPI: torchrun stands in."""
    if config == "ddp.yaml":
        assert load_config_from_file(str(ROOT / "ds_configs" / config)).num_processes == 2
        return [*torchrun(), "launch/train.py"]
    return [*accelerate(config, folder), "rose_ds", "train"]


@pytest.fixture(scope="module")
def reviews(snippets: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = load_task(snippets, splits=("train",)).train
    return rows_file(train, tmp_path_factory.mktemp("reviews") / "train.csv", 200)


@pytest.fixture(scope="module")
def roberta(two_layers: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another architecture than the packaged one, whose blocks have another class."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    tokenizer = AutoTokenizer.from_pretrained(two_layers)
    folder = tmp_path_factory.mktemp("roberta")
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=2, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_engines_lose_alike(minilm: str, snippets: str, tmp_path: Path, extensions: Path) -> None:
    """The same seed on one process, DDP, FSDP2 and ZeRO-2, dropout on: losses equal to 4 digits over 20 steps of two
    micro-batches, or of the one that ends an epoch of 19.
    """
    rows = rows_file(load_task(snippets, splits=("train",)).train, tmp_path / "rows.csv", 76)
    script, tail = f"{SCRIPTS}/same_losses.py", [resolve(minilm), str(rows), "20", "8", str(tmp_path / "out")]
    config = str(ROOT / "ds_configs" / "zero2.json")
    results = {}
    for engine, command in {
        "plain": [*PLAIN, script, *tail],
        "ddp": [*torchrun(), script, *tail],
        "fsdp2": [*accelerate("fsdp2.yaml", tmp_path), script, *tail],
        "zero2": [*deepspeed(), "--no_local_rank", script, *tail, config],
    }.items():
        done = run(command)
        assert done.returncode == 0, engine
        line = next(line for line in done.stdout.splitlines() if "RESULT " in line)
        results[engine] = json.loads(line[line.index("RESULT ") + 7 :])
    wrappers = {engine: result["wrapper"] for engine, result in results.items()}
    assert wrappers == {
        "plain": "BertForSequenceClassification",
        "ddp": "DistributedDataParallel",
        "fsdp2": "FSDPBertForSequenceClassification",
        "zero2": "DeepSpeedEngine",
    }
    assert [result["engine"] for result in results.values()] == list(results)
    for engine in ("ddp", "fsdp2", "zero2"):
        assert results[engine]["losses"] == pytest.approx(results["plain"]["losses"], abs=1e-4), engine
        assert results[engine]["taus"] == pytest.approx(results["plain"]["taus"], rel=1e-2), engine


def train_flags(task: str, model: str, **more: int) -> list[str]:
    """Of a short run."""
    short = {"max_steps": 2, "max_train_samples": 100, "report_to": "none", "disable_tqdm": "true"}
    given = {"task": task, "model": model, **short, **more}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp1.yaml", "fsdp2_hsdp.yaml"])  # fsdp2.yaml: test_job_faults.py
def test_rose_ds_train_under_accelerate(
    config: str, two_layers: str, roberta: str, snippets: str, tmp_path: Path
) -> None:
    """The same flags and metrics.json as under deepspeed, and a model that loads."""
    model = roberta if config == "fsdp1.yaml" else two_layers
    flags = train_flags(snippets, model, max_eval_samples=16, max_length=32, per_device_train_batch_size=2)
    flags += ["--engine", config.split(".")[0].split("_")[0]]
    done = run([*launcher(config, tmp_path), *flags, "--output_dir", str(tmp_path / "out")])
    assert done.returncode == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["world_size"] == (4 if "hsdp" in config else 2)
    assert 0.59 < metrics["kept_fraction"] < 0.85
    saved = load_file(tmp_path / "out" / "model.safetensors")
    want = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in want.parameters())
    assert_saved_model_answers(tmp_path / "out", "sentence", 1e-3)


def test_another_models_blocks(roberta: str, snippets: str, tmp_path: Path) -> None:
    """What the config file names is not there: the refusal says what is."""
    flags = train_flags(snippets, roberta, max_length=32)
    done = run([*accelerate("fsdp2.yaml", tmp_path), "rose_ds", "train", *flags, "--output_dir", str(tmp_path / "out")])
    assert done.returncode != 0
    assert "names BertLayer, and this model has no such layers: set it to RobertaLayer" in done.stderr


def test_accumulation_under_fsdp_needs_synchronisation(two_layers: str, snippets: str, tmp_path: Path) -> None:
    flags = train_flags(snippets, two_layers, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    command = [*accelerate("fsdp2.yaml", tmp_path), "rose_ds", "train", *flags, "--output_dir", str(tmp_path / "out")]
    done = run([*command, "--max_eval_samples", "8"])
    assert done.returncode != 0
    assert "sync_each_batch" in done.stderr
    assert not (tmp_path / "out" / "metrics.json").exists()
    together = '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}'
    done = run([*command, "--max_eval_samples", "8", "--accelerator_config", together])
    assert done.returncode == 0


@pytest.mark.parametrize("engine", ["plain", "fsdp2", "zero2"])
def test_the_accelerate_loop(engine: str, two_layers: str, reviews: Path, tmp_path: Path, extensions: Path) -> None:
    """docs/accelerate.md's example."""
    script = f"{SCRIPTS}/accelerate_loop.py"
    assert len((ROOT / script).read_text().splitlines()) < 60
    env: dict[str, str] = {}
    if engine == "zero2":  # what accelerate launch would say of a DeepSpeed config
        config = tmp_path / "zero2.json"
        batch = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
        config.write_text(json.dumps({**batch, "zero_optimization": {"stage": 2}}))
        env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
        head = [*deepspeed(), "--no_local_rank"]
    else:
        head = PLAIN if engine == "plain" else accelerate("fsdp2.yaml", tmp_path)
    done = run([*head, script, two_layers, str(reviews), "2"], **env)
    assert done.returncode == 0
    assert "step 2 tau" in done.stdout
    assert f"engine {engine} parameters 41" in done.stdout


def classify(two_layers: str, reviews: Path, out: Path) -> list[str]:
    """An unchanged Trainer script and its arguments."""
    flags = ["--model", two_layers, "--train_file", str(reviews), "--validation_file", str(reviews)]
    flags += ["--max_steps", "2", "--logging_steps", "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    return [f"{SCRIPTS}/classify.py", *flags, "--output_dir", str(out), "--save_strategy", "no"]


def test_an_unchanged_script(two_layers: str, reviews: Path, tmp_path: Path) -> None:
    rose = ["-m", "rose_ds.run", "--rose", "strategy=first", "keep_first=0.5"]
    done = run([*PLAIN, *rose, *classify(two_layers, reviews, tmp_path)])
    assert done.returncode == 0
    assert "'rose/kept_first': 0.5" in done.stdout
    assert "rose/tau_second" not in done.stdout


@pytest.mark.usefixtures("cold")
def test_an_unchanged_script_with_a_json_block(
    two_layers: str, reviews: Path, tmp_path: Path, extensions: Path
) -> None:
    config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    automatic = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    config["optimizer"] = {"type": "RoseAdamW", "params": {**automatic, "strategy": "second", "keep_second": 0.7}}
    path = tmp_path / "block.json"
    path.write_text(json.dumps(config))
    command = [
        *deepspeed(),
        "--no_local_rank",
        "--module",
        "rose_ds.run",
        *classify(two_layers, reviews, tmp_path / "out"),
    ]
    done = run([*command, "--deepspeed", str(path)])
    assert done.returncode == 0
    assert "'rose/kept_second': " in done.stdout
    assert "rose/tau_first" not in done.stdout


def test_a_script_without_trainer_is_not_passed_off_as_rose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "own_loop.py"
    script.write_text("print('no trainer here')\n")
    done = run([*PLAIN, "-m", "rose_ds.run", str(script)])
    assert done.returncode == 1
    assert "ROSE did nothing" in done.stderr
    for arguments, message in (
        (["--rose", "strategy=third", str(script)], "strategy='third' is not one of"),
        (["--rose", "keep=0.5", str(script)], "unknown setting 'keep' after --rose; known: ['strategy'"),
        (["nowhere.py"], "nowhere.py does not exist"),
        (["--rose", "gamma=0.5"], "no script given"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
