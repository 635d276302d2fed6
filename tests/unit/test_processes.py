"""What only a process of its own can show; seconds each, so none of the fast tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

import rose_ds
from rose_ds.data import perturb

FIELDS = ("question1", "question2")
ROWS = Dataset.from_dict(
    {
        "question1": ["How was Tem\u00fcjin kept imprisoned?", "No.", "Is a sometimes tedious film worth it?"] * 6,
        "question2": ["Who kept him?", "unflinchingly bleak and desperate", "it 's a charming journey ."] * 6,
        "idx": list(range(18)),
    }
)


def test_the_public_names() -> None:
    """Ten names; importing the package loads neither transformers' Trainer nor DeepSpeed."""
    code = (
        "import sys, rose_ds; assert not {'transformers.trainer', 'deepspeed'} & set(sys.modules); "
        "print(*(n for n in rose_ds.__all__ if getattr(rose_ds, n)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert len(found.stdout.split()) == 12
    with pytest.raises(AttributeError, match="no attribute 'Rose'"):
        rose_ds.Rose  # noqa: B018


def test_perturbations_are_the_same_in_any_process() -> None:
    """Whatever the seed of its hashes."""
    script = (
        "import json, sys; from datasets import Dataset; from rose_ds.data import perturb; "
        "print(json.dumps(perturb(Dataset.from_dict(json.load(sys.stdin)), ['question1', 'question2'], seed=7)[:]))"
    )
    expected = perturb(ROWS, FIELDS, seed=7)[:]
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps(ROWS[:]),
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).resolve().parents[2],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        )
        assert json.loads(done.stdout.splitlines()[-1]) == expected
