"""Perturbations: what changes, what must not, and that nothing but the seed and the rows decides."""

import random
from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from rose_ds.data import DataError, assign_families, perturb
from rose_ds.data.perturb import FAMILIES

pytestmark = pytest.mark.fast

SENTENCES = [
    "it 's a charming and often affecting journey .",
    "unflinchingly bleak and desperate",
    "allows us to hope that nolan is poised to embark a major career as a commercial yet inventive filmmaker .",
    "The Rock is destined to be the 21st Century's new ''Conan''!",
    "No.",
    "How was Tem\u00fcjin kept imprisoned by the Tayichi'ud?",
    "a sometimes tedious film .",
]
PAIRS = Dataset.from_dict(
    {
        "question1": [*SENTENCES, "?", "8 + 8"],
        "question2": [f"Second: {sentence}" for sentence in SENTENCES] + ["What is it?", "sixteen"],
        "label": [1, 0, 1, 0, 0, 1, 0, 1, 1],
        "idx": [5, 3, 8, 1, 0, 2, 9, 7, 6],
    },
    features=Features(
        {
            "question1": Value("string"),
            "question2": Value("string"),
            "label": ClassLabel(names=["not_duplicate", "duplicate"]),
            "idx": Value("int32"),
        }
    ),
)
FIELDS = ("question1", "question2")


def words_changed(before: str, after: str) -> int:
    return sum(a != b for a, b in zip(before.split(" "), after.split(" "), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_changes_every_text_with_a_long_word(family):
    for seed in range(50):
        for text in SENTENCES:
            if text != "No.":
                assert FAMILIES[family](text, random.Random(seed)).casefold() != text.casefold()


@pytest.mark.parametrize("family", ["keyboard", "swap", "drop", "homoglyph"])
def test_misspelling_is_bounded_and_leaves_the_rest_alone(family):
    for seed in range(50):
        for text in SENTENCES:
            after = FAMILIES[family](text, random.Random(seed))
            expected = {"keyboard": 0, "swap": 0, "homoglyph": 0, "drop": 1}[family]
            changed = words_changed(text, after)
            assert len(text) - len(after) == expected * changed
            assert 0 <= changed <= 3
            for a, b in zip(text.split(" "), after.split(" "), strict=True):
                assert a == b or sum(letter.isalpha() for letter in a) >= 3


@pytest.mark.parametrize(("words", "changed"), [(1, 1), (15, 1), (16, 2), (24, 3), (400, 3)])
def test_longer_texts_get_more_misspellings_up_to_three(words, changed):
    text = " ".join(["journey", "charming"][i % 2] for i in range(words))
    assert words_changed(text, FAMILIES["keyboard"](text, random.Random(0))) == changed


def test_single_edits():
    def results(family, text):
        return {FAMILIES[family](text, random.Random(seed)) for seed in range(200)}

    assert results("swap", "abcd") == {"acbd", "abdc"}
    assert results("drop", "abcd") == {"acd", "abd", "abc"}
    assert results("keyboard", "Cam") == {"Cqm", "Csm", "Czm", "Can", "Caj", "Cak"}
    assert results("keyboard", "CAP") == {"CQP", "CSP", "CZP", "CAO", "CAL"}
    assert results("homoglyph", "tap") == {"t\u0430p", "ta\u0440"}
    assert results("distractor", "What is it ?") == {
        "What is it and true is true ?",
        "What is it and false is not true ?",
        f"What is it {' '.join(['and true is true'] * 5)} ?",
    }
    assert results("swap", "too 42 is") == {"too 42 is"}  # no two letters whose swap shows: left as it was
    assert all("A film." in result and len(result.split()) == 3 for result in results("token", "A film."))
    assert {result.split()[0][:5] for result in results("token", "A film.")} >= {"https", "A"}


@given(text=st.text(), seed=st.integers())
@settings(max_examples=300, deadline=None)
def test_no_text_raises(text, seed):
    for name, family in FAMILIES.items():
        after = family(text, random.Random(seed))
        assert isinstance(after, str)
        after.encode("utf-8")
        if name in ("distractor", "token"):
            assert len(after) > len(text)


def test_labels_order_and_columns_stay_and_one_field_changes():
    after = perturb(PAIRS, FIELDS, seed=0)
    assert after.features == PAIRS.features
    assert after["label"] == PAIRS["label"]
    assert after["idx"] == PAIRS["idx"]
    assert PAIRS["question1"][:7] == SENTENCES  # the input is untouched
    for before, row in zip(PAIRS, after, strict=True):
        assert sum(before[field] != row[field] for field in FIELDS) == 1


def test_the_second_field_is_used_only_where_the_first_has_nothing_to_change():
    after = perturb(PAIRS, FIELDS, seed=0, families=["drop"])
    changed = [
        next(field for field in FIELDS if before[field] != row[field]) for before, row in zip(PAIRS, after, strict=True)
    ]
    nothing_in_first = {"No.", "?", "8 + 8"}
    assert changed == ["question2" if text in nothing_in_first else "question1" for text in PAIRS["question1"]]


def test_same_seed_same_text_other_seed_other_text():
    first = perturb(PAIRS, FIELDS, seed=3).to_dict()
    assert perturb(PAIRS, FIELDS, seed=3).to_dict() == first
    assert perturb(PAIRS, FIELDS, seed=4).to_dict() != first


def test_a_row_does_not_depend_on_the_rows_around_it():
    whole = perturb(PAIRS, FIELDS, seed=1)
    assert perturb(PAIRS.select(range(5)), FIELDS, seed=1).to_list() == whole.to_list()[:5]


def test_families_are_used_evenly_and_say_what_was_done():
    assigned = assign_families(1000, seed=0)
    counts = Counter(assigned)
    assert set(counts) == set(FAMILIES)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert assign_families(1000, seed=0) == assigned
    assert assign_families(1000, seed=1) != assigned
    assert assign_families(37, seed=0) == assigned[:37]
    assert assign_families(0, seed=0) == []

    dataset = Dataset.from_dict({"sentence": ["a sometimes tedious film"] * 60})
    after = perturb(dataset, ["sentence"], seed=5)["sentence"]
    for family, text in zip(assign_families(60, seed=5), after, strict=True):
        assert (" true" in text) == (family == "distractor")
        assert ("@" in text or "https://" in text) == (family == "token")
        assert (not text.isascii()) == (family == "homoglyph")


def test_a_subset_of_families():
    assert Counter(assign_families(10, 0, ["swap", "token"])) == {"swap": 5, "token": 5}
    after = perturb(PAIRS, FIELDS, seed=0, families=["distractor"])
    assert all(" true" in text for text in after["question1"])


@pytest.mark.parametrize("families", [[], ["typo"], ["swap", "swap"]])
def test_wrong_families_are_refused(families):
    with pytest.raises(DataError, match="different names out of keyboard, swap, drop, homoglyph, distractor, token"):
        perturb(PAIRS, FIELDS, seed=0, families=families)


def test_a_wrong_field_is_refused():
    with pytest.raises(DataError, match=r"no column 'sentence' to perturb; found: \['question1', "):
        perturb(PAIRS, ["sentence"], seed=0)
