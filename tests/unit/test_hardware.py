"""Which device a rank takes, and what it can do."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from rose_ds import RefusedConfiguration
from rose_ds.doctor.environment import check_device
from rose_ds.engines import registry
from rose_ds.exchange import communication_device
from rose_ds.hardware import default_device, has_bf16, peak_memory_bytes, slow_bf16
from rose_ds.training.trainer import RoseTrainer

CPU = torch.device("cpu")


def _cpu(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


def test_a_ranks_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == CPU
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert default_device() == torch.device("cuda", 1)


NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def test_bf16_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ({"avx512_f": True, "avx512_bf16": True}, {"amx_bf16": True}, {"neon": True, "bf16": True}):
        _cpu(monkeypatch, **found)
        assert has_bf16(CPU) and slow_bf16(CPU) == "" and check_device(0, NO_GPU)[0].text.endswith("; bf16")
    _cpu(monkeypatch, avx2=True, avx512_bf16=False)
    assert not has_bf16(CPU) and "leave bf16 out" in slow_bf16(CPU)
    assert "no bf16 instructions" in check_device(0, NO_GPU)[0].text
    assert slow_bf16(torch.device("cuda")) == ""


def test_a_gpu_that_emulates_bf16_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_bf16("cuda")


@pytest.mark.parametrize("bf16", [True, False])
def test_the_trainer_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bf16: bool
) -> None:
    _cpu(monkeypatch, avx2=True)
    config = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    args = TrainingArguments(output_dir=str(tmp_path), bf16=bf16, use_cpu=True, report_to="none")
    with caplog.at_level(logging.WARNING, logger="rose_ds"):
        RoseTrainer(BertForSequenceClassification(config), args)
    assert ("many times slower" in caplog.text) is bf16


@pytest.mark.parametrize(
    ("backend", "types", "device"),
    [
        ("gloo", ["cpu"], "cpu"),
        ("gloo", ["cpu", "cuda"], "cpu"),
        ("nccl", ["cuda"], "cuda:1"),
        ("cpu:gloo,cuda:nccl", ["cpu", "cuda"], "cuda:1"),
        ("undefined", ["cuda"], "cuda:1"),  # init_process_group() without a name
        ("xccl", ["xpu"], "xpu:1"),
    ],
)
def test_where_a_group_communicates(
    backend: str, types: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group: Any = SimpleNamespace(_device_types=[torch.device(kind) for kind in types])
    monkeypatch.setattr(torch.distributed, "get_backend", lambda _: backend)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert communication_device(group) == torch.device(device)


def test_a_group_of_cpus_communicates_there(tmp_path: Path) -> None:
    """Torch's own object, with and without a backend's name."""
    for backend in ("gloo", "cpu:gloo"):
        torch.distributed.init_process_group(
            backend, rank=0, world_size=1, init_method=f"file://{tmp_path / backend[:3]}"
        )
        assert communication_device(None) == CPU
        torch.distributed.destroy_process_group()


def test_a_model_on_another_device_than_the_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers would be replayed, and votes taken, on the current one."""

    class Elsewhere(torch.nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([SimpleNamespace(device=CPU), SimpleNamespace(device=torch.device("cuda", 1))])

    model = Elsewhere()
    registry._refuse_another_device(model)  # no accelerator here
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    registry._refuse_another_device(model)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    with pytest.raises(RefusedConfiguration, match=r"set_device_index\(1\) first"):
        registry._refuse_another_device(model)


def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (  # in a process of its own: a worker's peak may be gigabytes, over which there would have to be another
        "import torch; from rose_ds.hardware import peak_memory_bytes as peak; "
        "cpu = torch.device('cpu'); before = peak(cpu); held = torch.ones(before // 4 + 2**22); "
        "print(before, peak(cpu))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, done.stdout.split())
    assert before > 50 * 2**20  # torch alone is more; in KiB it would be less
    assert after > before
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    assert peak_memory_bytes(torch.device("cuda", 0)) == 123
    assert peak_memory_bytes(torch.device("meta")) is None
