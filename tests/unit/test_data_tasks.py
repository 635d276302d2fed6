"""The task registry, and load_task's own argument checks."""

import pytest

from rose_ds.data import TASKS, DataError, get_task, load_task

pytestmark = pytest.mark.fast

# Written out here rather than read from the registry: these are the hub's ids, and must not drift.
LABELS = {
    "sst2": ("negative", "positive"),
    "rte": ("entailment", "not_entailment"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
    "snippets": ("negative", "positive"),
}


def test_label_ids_are_the_hubs():
    assert {name: spec.labels for name, spec in TASKS.items()} == LABELS
    assert all(name == spec.name for name, spec in TASKS.items())


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("SST-2", "sst2"),
        ("sst-2", "sst2"),
        ("sst_2", "sst2"),
        ("sst2", "sst2"),
        ("QQP", "qqp"),
        ("Snippets", "snippets"),
    ],
)
def test_aliases(alias, name):
    assert get_task(alias) is TASKS[name]


def test_unknown_task_lists_the_names():
    with pytest.raises(DataError, match=r"unknown task 'mnli'; choose one of: sst2, rte, qnli, qqp, snippets"):
        get_task("mnli")


def test_unknown_split_lists_the_names(tmp_path):
    with pytest.raises(DataError, match=r"unknown split 'dev'; choose from: train, validation, adversarial"):
        load_task("sst2", tmp_path, splits=("dev",))
