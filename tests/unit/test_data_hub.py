"""The hub, mocked where `datasets.load_dataset` is called: no test here needs a network."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from rose_ds.data import DataError, load_task

pytestmark = pytest.mark.fast

QNLI = {
    "question": ["q?"],
    "sentence": ["s."],
    "label": [1],
    "idx": [0],
}
QNLI_FEATURES = Features(
    {
        "question": Value("string"),
        "sentence": Value("string"),
        "label": ClassLabel(names=["entailment", "not_entailment"]),
        "idx": Value("int32"),
    }
)


@pytest.fixture
def hub(monkeypatch):
    """Replaces load_dataset by one that serves `hub.dataset` and keeps a record of the calls."""

    class Hub:
        dataset = Dataset.from_dict(QNLI, features=QNLI_FEATURES)
        calls: list[tuple] = []

    def load_dataset(path, name, *, split):
        Hub.calls.append((path, name, split))
        if isinstance(Hub.dataset, Exception):
            raise Hub.dataset
        return Hub.dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return Hub


def test_repositories_configurations_and_splits(hub):
    data = load_task("QNLI")
    assert hub.calls == [
        ("nyu-mll/glue", "qnli", "train"),
        ("nyu-mll/glue", "qnli", "validation"),
        ("AI-Secure/adv_glue", "adv_qnli", "validation"),
    ]
    for dataset in (data.train, data.validation, data.adversarial):
        assert dataset.to_dict() == QNLI
        assert dataset.features == QNLI_FEATURES


def test_only_the_splits_asked_for_are_requested(hub):
    data = load_task("qnli", splits=("adversarial",))
    assert hub.calls == [("AI-Secure/adv_glue", "adv_qnli", "validation")]
    assert data.train is None
    assert data.validation is None


def test_extra_columns_and_other_widths_become_ours(hub):
    columns = {"idx": [3], "label": [1], "sentence": ["s."], "extra": [0], "question": ["q?"]}
    features = Features(
        {
            "idx": Value("int64"),
            "label": QNLI_FEATURES["label"],
            "sentence": Value("large_string"),
            "extra": Value("int8"),
            "question": Value("string"),
        }
    )
    hub.dataset = Dataset.from_dict(columns, features=features)
    dataset = load_task("qnli", splits=("train",)).train
    assert dataset.features == QNLI_FEATURES
    assert dataset.column_names == ["question", "sentence", "label", "idx"]
    assert dataset[0] == {"question": "q?", "sentence": "s.", "label": 1, "idx": 3}


def test_a_missing_column_is_named(hub):
    hub.dataset = hub.dataset.rename_column("question", "question1")
    with pytest.raises(DataError, match=r"nyu-mll/glue \(qnli\) on the hub has no column 'question'") as error:
        load_task("qnli")
    assert "found: question1, sentence, label, idx" in str(error.value)


@pytest.mark.parametrize("label", [ClassLabel(names=["not_entailment", "entailment"]), Value("int64")])
def test_other_label_names_are_refused(hub, label):
    hub.dataset = Dataset.from_dict(QNLI, features=Features({**QNLI_FEATURES, "label": label}))
    with pytest.raises(DataError, match=r"expected \['entailment', 'not_entailment'\]"):
        load_task("qnli")


def test_an_unreachable_hub_says_the_way_out(hub):
    hub.dataset = ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")
    with pytest.raises(DataError, match=r"cannot load nyu-mll/glue \(qnli\) from the Hugging Face hub") as error:
        load_task("qnli")
    assert error.value.__cause__ is hub.dataset
    for part in ("ConnectionError: Couldn't reach", "--data DIR", "QNLI/{train,dev}.tsv", "--task snippets"):
        assert part in str(error.value)
