"""rose-ds doctor on one machine: what each check finds, and what it says to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from transformers import GPT2Config

from rose_ds.cli import main
from rose_ds.config import RoseConfig
from rose_ds.doctor import disk, environment, examine, memory, ranks
from rose_ds.doctor.config import check_config
from rose_ds.doctor.finding import Finding, merged, record
from rose_ds.doctor.questions import Questions
from rose_ds.experiments.methods import method_named
from rose_ds.kernels import build

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]


# --- versions, compiler, locks ---


def wanted(**pins: str) -> dict[str, Requirement]:
    return {name: Requirement(name + pin) for name, pin in pins.items()}


def test_the_pins_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    found = environment.required()
    assert set(found) == set(environment.PACKAGES)
    assert f'"deepspeed{found["deepspeed"].specifier}"' in text


def test_versions_that_do_not_fit_are_named_with_what_to_install() -> None:
    pins = wanted(torch=">=2.11,<2.15", deepspeed="==0.19.8", accelerate=">=1.15,<1.16")
    (found,) = environment.check_versions(pins, {"torch": "2.13.0+cu126", "deepspeed": "0.18.0"})
    assert found.status == "failed"
    assert found.text == "deepspeed 0.18.0 is not ==0.19.8; accelerate is missing (<1.16,>=1.15)"
    assert "'deepspeed==0.19.8'" in found.mend
    (found,) = environment.check_versions(pins, {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "accelerate": "1.15.0"})
    assert (found.status, found.text) == ("ok", "torch 2.13.0+cpu, deepspeed 0.19.8, accelerate 1.15.0")


def test_a_compiler_is_missed_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (needed,), (other,) = (environment.check_compiler(needed) for needed in (True, False))
    assert (needed.status, other.status) == ("failed", "warning")
    assert "no C++ compiler (no-such-compiler)" in needed.text and "CXX" in needed.mend


@pytest.mark.parametrize(("age", "status"), [(5, "warning"), (3600, "failed")])
def test_a_lock_of_a_killed_build(tmp_path: Path, age: float, status: str) -> None:
    (tmp_path / "py311_cpu" / "deepspeed_shm_comm").mkdir(parents=True)
    assert environment.check_extension_locks(tmp_path)[0].status == "ok"
    ours = tmp_path / build.name()  # whose build waits for no dead one
    ours.mkdir()
    (ours / "lock").touch()
    assert environment.check_extension_locks(tmp_path)[0].status == "ok"
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.touch()
    (found,) = environment.check_extension_locks(tmp_path, now=lock.stat().st_mtime + age)
    assert found.status == status and str(lock) in found.text
    assert status == "warning" or found.mend == f"rm {lock}"


def test_hosts_with_other_packages_are_named() -> None:
    one, other = {"torch": "2.13.0", "deepspeed": "0.19.8"}, {"torch": "2.12.0", "deepspeed": "0.19.8"}
    assert environment.same_everywhere([one, one], ["a", "b"]).text == "on all 2 ranks, 2 host names"
    found = environment.same_everywhere([one, one, other], ["a", "a", "b"])
    assert found.status == "failed"
    assert found.text == "rank 0 on a and rank 2 on b differ: torch 2.13.0 and 2.12.0"


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without them, or a build of torch for CPUs, on a host that has some, is not a CPU rank."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment.shutil, "which", lambda _: None)
    for variables in ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"SLURM_GPUS_ON_NODE": "8"}, {"SLURM_JOB_GPUS": "0,1"}):
        for built, words in ((None, "a build for CPUs"), ("13.0", "torch (13.0) sees no GPU")):
            monkeypatch.setattr(torch.version, "cuda", built)
            (found,) = environment.check_device(0, variables)
            assert found.status == "failed" and words in found.text, found
    monkeypatch.setattr(environment.shutil, "which", lambda _: __file__)  # nvidia-smi is there
    none_wanted = {"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "0"}, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}
    for variables in (*none_wanted, {"DS_ACCELERATOR": "cpu"}, {"SLURM_GPUS_ON_NODE": "0"}):
        assert environment.check_device(0, variables)[0].status == "ok"
    for built, status in (("13.0", "failed"), (None, "warning")):  # the second may be meant
        monkeypatch.setattr(torch.version, "cuda", built)
        (found,) = environment.check_device(0, {})
        assert found.status == status and "there is a GPU driver" in found.text


def test_one_host_without_gpus() -> None:
    hosts = ["a", "b", "c"]
    assert environment.same_devices([True] * 3, hosts).status == "ok"
    assert environment.same_devices([False] * 3, hosts).status == "ok"
    found = environment.same_devices([True, True, False], hosts)
    assert (found.status, found.text) == ("failed", "rank 2 on c sees no GPU, rank 0 on a does")


def test_nccl_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is a finding like others, and is not tried where a rank has no GPU."""

    def broken(**_: Any) -> None:
        raise RuntimeError("NCCL error: unhandled system error\nmore")

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(examine.dist, "new_group", broken)
    monkeypatch.setattr(examine.dist, "get_rank", lambda: 3)
    good, bad = Finding("device", "ok", "8 x H100"), Finding("device", "failed", "local rank 8 has no GPU")
    (found,) = examine._nccl([good], 0, 5.0)
    assert found.status == "failed" and "rank 3 on" in found.text and "unhandled system error" in found.text
    assert "more" not in found.text and "NCCL_SOCKET_IFNAME" in found.mend
    (found,) = examine._nccl([good, bad], 0, 5.0)
    assert found.status == "failed" and "not tried" in found.text


# --- configs ---


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_projects_own_configs_are_accepted(path: Path) -> None:
    findings, config = check_config(str(path), 8)
    assert config == json.loads(path.read_text())
    if "fp16" in path.stem:  # there is no GPU to run it on
        assert [f.text for f in findings] == [f"{path}: fp16 is not there on CPU ranks"]
    else:
        assert [f.status for f in findings] == ["ok"], findings


ROSE = {"type": "RoseAdamW", "params": {"lr": "auto", "strategy": "first", "keep_first": 0.7}}
#: a change to ds_configs/zero3.json, and words of the finding
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "zero++": ({"zero_optimization": {"zero_quantized_gradients": True}}, "ZeRO++", "leave these settings out"),
    "round_robin": (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        "round_robin",
        "set it to false",
    ),
    "alignment": ({"zero_optimization": {"parameter_alignment": True}}, "parameter_alignment", "remove it"),
    "rounded masters": (
        {"zero_optimization": {"stage": 2, "load_from_fp32_weights": False}, "bf16": {"enabled": True}},
        "load_from_fp32_weights=false",
        "leave it at true",
    ),
    "writer": ({"checkpoint": {"writer": {"type": "fast", "decoupled": True}}}, "checkpoint.writer", "leave them out"),
    "nvme": ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, '"nvme"', 'use "cpu"'),
    "ratio": (
        {
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
        },
        "ratio < 1",
        "set 1.0",
    ),
    "force": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "DeepSpeedCPUAdam",
        '"zero_force_ds_cpu_optimizer" to false',
    ),
    "force, by an old name": (
        {"zero_optimization": {"cpu_offload": True}},
        "DeepSpeedCPUAdam",
        '"zero_force_ds_cpu_optimizer" to false',
    ),
    "both names": (
        {
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"cpu_offload_param": True, "offload_param": {"device": "cpu"}},
        },
        "'cpu_offload_param' and replacing parameter 'offload_param' together",
        "correct or remove it",
    ),
    "no name": ({"zero_optimization": {"cpu_offload_params": True}}, "cpu_offload_params", "correct or remove it"),
    "deepcompile": ({"compile": {"deepcompile": True}}, "deepcompile", "set it to false"),
    "accumulation": ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation", "set it to true"),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast", '"bf16"'),
    "reduction": ({"communication_data_type": "fp16"}, "communication_data_type", "leave it out"),
    "norm": ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm", "set it to true"),
    "autotp": ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size", "use ZeRO-3"),
    "experts": ({"expert_parallel": {"enabled": True}}, "expert_parallel", "use a model without"),
    "sequences": ({"sequence_parallel_size": 2}, "sequence_parallel_size", "use data parallelism alone"),
    "masters": ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "master weights", "keep fp32"),
    "unsavable": (
        {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": False}},
        "cannot save the model whole",
        "set it to true",
    ),
    "adamw": ({"optimizer": {"type": "AdamW"}}, "'AdamW', not RoseAdamW", "leave the block out"),
    "keep": ({"optimizer": {**ROSE, "params": {"keep_first": 2}}}, "keep_first=2 must be in (0, 1]", "params"),
    "unknown": ({"optimizer": {**ROSE, "params": {"keep": 1}}}, "unknown ROSE setting(s) ['keep']", "params"),
    "schema": ({"zero_optimization": {"reduce_bucket": 5}}, "zero_optimization.reduce_bucket", "correct or remove it"),
    "bf16": ({"bf16": {"enabled": True, "typo": 1}}, "bf16.typo", "correct or remove it"),
    "removed": ({"elasticity": {}}, "elasticity", "remove it"),
    "stage": (
        {"zero_optimization": {"stage": 4}},
        '"stage" in "zero_optimization" must be 0, 1, 2 or 3',
        "ds_configs/",
    ),
    "batch": (
        {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
        "32 is not 4 rows x 2 micro-batches x 8 ranks = 64",
        '"auto"',
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_a_run_would_refuse(name: str, tmp_path: Path) -> None:
    change, words, mend = WRONG[name]
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    for key, value in change.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    findings, _ = check_config(str(path), 8)
    assert [f.status for f in findings] == ["failed"], findings
    assert words in findings[0].text and mend in findings[0].mend


def test_a_rose_block_and_misspelt_names(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"optimizer": ROSE, "zero_optimisation": {"stage": 2}}))
    (found,), _ = check_config(str(path), 1)
    assert found.status == "warning"
    assert '"zero_optimisation" is not a setting' in found.text and found.mend == 'write "zero_optimization"'
    path.write_text("{")
    (found,), config = check_config(str(path), 1)
    assert (found.status, config) == ("failed", {}) and "is not JSON" in found.text


def test_auto_follows_the_flags(tmp_path: Path) -> None:
    path = tmp_path / "config.json"

    def told(config: dict[str, Any], flag: str | None) -> str:
        path.write_text(json.dumps(config))
        (found,), _ = check_config(str(path), 1, here=False, flag=flag)
        return found.text.removeprefix(f"{path}: ZeRO-0, ").removesuffix(", nothing that is refused")

    auto, on, off = ({"enabled": enabled} for enabled in ("auto", True, False))
    both = {"bf16": auto, "fp16": auto}
    assert told(both, None) == 'fp32 ("auto" follows --bf16 and --fp16, which the doctor was not given)'
    assert told(both, "bf16") == 'bf16 ("auto" follows --bf16)'
    assert told({"bf16": auto}, "bf16") == 'bf16 ("auto" follows --bf16)'
    assert told({"bf16": on, "fp16": auto}, "bf16") == "bf16"
    assert told({}, "bf16") == "bf16", "accelerate adds the section"
    assert told({"bf16": off}, "bf16") == "fp32"
    path.write_text(json.dumps(both))
    (found,), _ = check_config(str(path), 1, flag="fp16")
    assert found.text == f"{path}: fp16 is not there on CPU ranks"


def test_the_flag_of_a_run_without_deepspeed_and_with(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"bf16": {"enabled": "auto"}}')

    def found(**asked: Any) -> dict[str, str]:
        return {f.check: f.text for f in examine._local(Questions(model="minilm", **asked), {}, None)}

    config = str(path)
    assert "bf16" in found(deepspeed=config, bf16=True)["config"]
    assert "weights 0.04," in found(deepspeed=config, bf16=True)["memory"]
    assert "weights 0.08," in found(deepspeed=config)["memory"]
    assert "weights 0.08," in found(bf16=True)["memory"], "autocast"
    size = "checkpoints of 0.42 GiB and the model: 0.93 GiB"  # of fp32 weights
    assert size in found(bf16=True)["disk"] and size not in found(deepspeed=config, bf16=True)["disk"]


def test_old_names_of_offload(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    old = {"cpu_offload": True, "cpu_offload_param": False}
    path.write_text(json.dumps({"zero_force_ds_cpu_optimizer": False, "zero_optimization": zero | old}))
    (found,), config = check_config(str(path), 1)
    assert found.status == "ok"
    assert config["zero_optimization"] == zero | {"offload_optimizer": {"device": "cpu"}}


# --- memory and disk ---


def measured(engine: str) -> list[dict[str, Any]]:
    runs = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())["runs"]
    return [run for run in runs.values() if run["engine"].startswith(engine)]


def estimated(run: dict[str, Any]) -> int:
    plan = memory.Plan(
        run["stage"],
        run["ranks"],
        half=run["precision"] == "bf16",
        deepspeed=run["engine"] == "zero",
        masks=run["strategy"] != "none",
        risks=int(run["strategy"] in ("first", "ensemble")),
    )
    return memory.estimate(run["parameters"], run["eligible"], plan).device_bytes


@pytest.mark.parametrize("run", measured("zero"), ids=lambda run: f"{run['strategy']}-x{run['ranks']}")
def test_the_estimate_is_near_what_was_measured(run: dict[str, Any]) -> None:
    """RoBERTa-large at ZeRO-3 in bf16: the highest rank's peak, which has activations of one sentence in it."""
    peak = max(phase["peak"] for phases in run["ranks_phases"] for phase in phases.values())
    assert estimated(run) == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("run", measured("fsdp"), ids=lambda run: f"{run['engine']}-{run['strategy']}")
def test_the_estimate_of_fsdp_is_near_what_was_measured(run: dict[str, Any]) -> None:
    """RoBERTa-base's step. Its backward pass takes more: a third of this model is the embedding, gathered in it."""
    assert estimated(run) == pytest.approx(max(phases["step"]["peak"] for phases in run["ranks_phases"]), rel=0.05)


def test_memory_falls_with_the_stage_and_the_ranks() -> None:
    def bytes_of(stage: int, ranks: int) -> int:
        return memory.estimate(1000, 800, memory.Plan(stage, ranks, half=True)).device_bytes

    assert bytes_of(0, 4) == bytes_of(0, 1) > bytes_of(1, 4) > bytes_of(2, 4) > bytes_of(3, 4) > bytes_of(3, 8)


def test_what_is_offloaded() -> None:
    """Gradients too, where a rank has only its part of them."""
    everything = {"offload_optimizer": True, "offload_parameters": True}
    for stage, changes, left in (
        (1, {"offload_optimizer": True}, {"weights": 2000, "gradients": 2000}),
        (2, {"offload_optimizer": True}, {"weights": 2000}),
        (3, {"offload_optimizer": True}, {"weights": 500}),
        (3, everything, {}),
    ):
        plan = memory.Plan(stage, 4, half=True)
        offloaded = memory.estimate(1000, 800, replace(plan, **changes))
        assert dict(offloaded.on_device) == left
        assert offloaded.device_bytes + offloaded.host_bytes == memory.estimate(1000, 800, plan).device_bytes
    seven = memory.Plan(3, 1, half=True, **everything)
    there = memory.Machine(1, 2**38, 12 * 2**30)
    assert memory.check_memory(7 * 10**9, 6 * 10**9, [seven], there)[0].status == "ok"


def test_what_torchs_own_wrappers_hold() -> None:
    """fp32 weights, gradients and two moments, whatever passes are made in; DDP also the buckets that it reduces."""
    for half in (False, True):
        for plan, each in (
            (memory.Plan(0, 1, half, deepspeed=False), 16),
            (memory.Plan(0, 4, half, deepspeed=False), 20),
            (memory.Plan(3, 4, half, deepspeed=False), 4),
        ):
            assert memory.estimate(1000, 0, plan).device_bytes == 1000 * each
    fp32 = [memory.estimate(1000, 0, memory.Plan(stage, 4, half=False)).device_bytes for stage in (0, 3)]
    assert fp32 == [16 * 1000, 24 * 1000 // 4], "DeepSpeed: at stage 3 masters and a step's gradient too"


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        ("r-drop", 0),
        ("rose-second", 0),
        ("rose-ensemble", 1),
        ("r-drop+rose-first", 1),
        ("r-drop+rose-ensemble", 1),
        ("r-drop+rose-second", 1),
        ("r-drop+gradient-mask", 1),
        ("r-drop+gallop", 1),
        ("r-drop+cautious", 0),
        ("smart+rose-second", 0),
    ],
)
def test_how_many_gradients_a_method_keeps_apart(method: str, kept: int) -> None:
    chosen = method_named(method)
    assert examine._risks(chosen, RoseConfig.from_mapping(chosen.rose)) == kept


def test_risks_that_outlive_a_step() -> None:
    chosen = method_named("rose-first")
    assert examine._risks(chosen, RoseConfig.from_mapping({**chosen.rose, "risk_ema": 0.9})) == 2


def test_the_plans_of_a_config() -> None:
    alone = memory.Plan(0, 4, half=True, deepspeed=False)
    assert [memory._name(plan) for plan in examine._plans(alone, None)] == [
        *("DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP")
    ]
    assert examine._plans(replace(alone, ranks=1), None) == [replace(alone, ranks=1)]
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    found = []
    for stage in range(4):
        (plan,) = examine._plans(alone, {"zero_optimization": {"stage": stage, **offload}})
        found.append((plan.deepspeed, plan.stage, plan.offload_optimizer, plan.offload_parameters))
    assert found == [(True, 0, False, False), (True, 1, True, False), (True, 2, True, False), (True, 3, True, True)]


def test_what_is_on_already_is_no_advice() -> None:
    gpu, cpu = memory.Machine(1, 2**60, 1), memory.Machine(1, 1, None)
    first = memory.Plan(1, 2, half=False)
    zero2, zero3 = memory.Plan(2, 2, half=True, offload_optimizer=True), memory.Plan(3, 2, half=True)
    whole = replace(zero3, offload_optimizer=True, offload_parameters=True)
    optimizer, parameters = (
        "offload_optimizer (ds_configs/zero2_offload.json)",
        "offload_param (ds_configs/zero3_offload.json)",
    )
    for plan, there, ways in (
        (first, gpu, ["a higher ZeRO stage", "more ranks", "bf16", optimizer, parameters]),
        (zero2, gpu, ["a higher ZeRO stage", "more ranks", parameters]),
        (zero3, gpu, ["more ranks", optimizer, parameters]),
        (replace(zero3, offload_parameters=True), gpu, ["more ranks", optimizer]),
        (zero3, cpu, ["more ranks"]),
        (whole, memory.Machine(1, 1, 2**60), ["more ranks"]),
    ):
        (found,) = memory.check_memory(10**6, 10**6, [plan], there)
        assert (found.status, found.mend) == ("failed", f"{', '.join(ways)}, or a smaller model")


def test_what_does_not_fit_is_said_with_what_does() -> None:
    plans = [memory.Plan(stage, 4, half=False) for stage in range(4)]
    needs = [memory.estimate(10**6, 10**6, plan).device_bytes for plan in plans]
    one = memory.Machine(1, int(needs[3] / 0.7), None)
    (found,) = memory.check_memory(10**6, 10**6, plans, one)
    assert (found.status, found.mend) == ("warning", "what fits with room for activations: ZeRO-3")
    (found,) = memory.check_memory(10**6, 10**6, plans[3:], memory.Machine(1, int(needs[3] / 0.9), None))
    assert found.status == "warning" and "activations may not fit" in found.text
    (found,) = memory.check_memory(10**6, 10**6, plans, memory.Machine(4, needs[3], None))
    assert found.status == "failed" and "4.0 times what is free" in found.text
    gpu = memory.Machine(4, 2**40, needs[3] * 2)  # each rank has its own
    assert memory.check_memory(10**6, 10**6, plans[3:], gpu)[0].status == "ok"


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    own = tmp_path / "own"
    root = tmp_path / "cgroup"

    def group(path: str, **files: object) -> None:
        (root / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / path / name.replace("__", ".")).write_text(f"{text}\n")

    assert memory._container_limit(root, own) > 2**50
    stat = "anon 40\ninactive_file 30"
    group("", memory__max="max", memory__current=100, memory__stat=stat)
    assert memory._container_limit(root, own) > 2**50
    group("", memory__max=1000)  # of a container, which sees its own as the root
    assert memory._container_limit(root, own) == 930  # the page cache is given back
    own.write_text("0::/slurm/job_7/step_0\n")
    group("slurm/job_7", memory__max=600, memory__current=100, memory__stat="inactive_file 0")
    assert memory._container_limit(root, own) == 500
    own.write_text("9:cpu:/\n4:memory:/slurm/job_7\n0::/\n")
    group("memory/slurm/job_7", memory__limit_in_bytes=300, memory__usage_in_bytes=100,
          memory__stat="total_inactive_file 50")  # fmt: skip
    assert memory._container_limit(root, own) == 250


def test_the_output_folder(tmp_path: Path) -> None:
    (found,) = disk.check_disk(tmp_path / "not" / "yet", 100, 100)
    assert found.status == "ok" and str(tmp_path) in found.text
    assert not (tmp_path / "not").exists() and not list(tmp_path.iterdir())
    (found,) = disk.check_disk(tmp_path, 2**60, 100)
    assert found.status == "failed" and "--save_total_limit" in found.mend
    (tmp_path / "file").touch()
    assert disk.check_disk(tmp_path / "file", None, 0)[0].text.endswith("is a file")
    assert "cannot be written" in disk.check_disk(Path("/proc/runs"), None, 0)[0].text


# --- launchers and findings ---

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_what_a_launcher_set() -> None:
    launch, (found,) = ranks.launch_from(TORCHRUN)
    assert launch == ranks.Launch(1, 4, "node1", 29500, agent_store=False) and found.status == "ok"
    assert ranks.launch_from({})[0] is None
    for change, words in (({"MASTER_ADDR": ""}, "MASTER_ADDR is missing"), ({"RANK": "one"}, "RANK='one'")):
        launch, (found,) = ranks.launch_from({**TORCHRUN, **change})
        assert launch is None and found.status == "failed" and words in found.text
    launch, (found,) = ranks.launch_from({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert launch is None and found.status == "failed" and "Slurm sets no RANK" in found.text


def test_findings_of_ranks_are_put_together() -> None:
    good, bad = Finding("disk", "ok", "1 GiB"), Finding("disk", "failed", "0 GiB", "free some")
    launcher = Finding("launcher", "ok", "3 ranks")
    found = merged([[good, launcher], [bad, launcher], [good, launcher]])
    assert [(f.check, f.status, f.ranks) for f in found] == [
        ("disk", "ok", (0, 2)),
        ("disk", "failed", (1,)),
        ("launcher", "ok", ()),
    ]
    assert merged([[good], [Finding("disk", "ok", "2 GiB")]]) == [good]
    assert [f.ranks for f in merged([[good], []])] == [(0,)]
    assert found[1].line() == "FAILED   disk: 0 GiB (rank 1)\n         -> free some"
    assert record(found, 3)["ok"] is False and record([good], 1)["ok"] is True


# --- the command ---


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*TORCHRUN, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_NTASKS"]:
        monkeypatch.delenv(name, raising=False)


def test_a_sound_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.chdir(ROOT)
    config = "ds_configs/zero2.json"
    main(["doctor", "--model", "minilm", "--deepspeed", config, "--output_dir", str(tmp_path / "run"), "--json"])
    found = json.loads(capsys.readouterr().out)
    checks = {check["check"]: check for check in found["checks"]}
    assert found["ok"] is True and found["world_size"] == 1
    assert {c["status"] for c in found["checks"]} == {"ok"}, found
    # the packaged BERT with a classifier of two labels
    assert checks["memory"]["text"].startswith("22,713,986 parameters, 10,621,440 eligible")
    assert not list(tmp_path.iterdir())


def test_a_machine_to_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"optimizer": {"type": "Adam"}}')
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--deepspeed", str(config), "--model", "./no/such"])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "FAILED   config:" in printed and "'Adam', not RoseAdamW" in printed
    assert "FAILED   model: model folder ./no/such does not exist" in printed
    assert printed.splitlines()[-1].endswith("2 to mend")


def test_a_model_whose_blocks_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["doctor", "--model", str(tmp_path)])
    assert "the doctor and rose-ds train take --include" in capsys.readouterr().out
    main(["doctor", "--model", str(tmp_path), "--include", "@blocks"])
    assert "24,704 eligible" in capsys.readouterr().out, "weights and norms of two blocks"


def test_bad_flags_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (["--timeout", "0"], "timeout=0.0 must be"),
        (["--world_size", "0"], "world_size=0 must be at least 1"),
        (["--method", "roze"], "method='roze' is not one of"),
        (["--bf16", "--fp16"], "bf16 and fp16 are both given"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["doctor", *flags])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
