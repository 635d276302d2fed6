"""Sentences on which a linguistic and a surface feature agree, and others on which they do not (Section 4.2).

From a folder in the layout of MSGS (Warstadt et al., EMNLP 2020), or made here, so that probing runs anywhere: control
or raising in the main clause, crossed with the presence of the word "the" or with the length. What is made here is
simpler than MSGS: fewer words and templates.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rose_ds.data.errors import DataError

#: By the surface feature: the folder's name in MSGS.
PARADIGMS = {"lexical": "control_raising_lexical_content_the", "length": "control_raising_length"}
#: Words from which on a sentence is long.
LONG = 16


@dataclass(frozen=True)
class Probe:
    """A sentence and its two labels: 1 is control, and the surface feature's presence."""

    sentence: str
    linguistic: int
    surface: int


def read_folder(folder: Path, paradigm: str) -> tuple[list[Probe], list[Probe]]:
    """Ambiguous items to train on, and disambiguating ones.

    Raises:
        DataError: a file or field is missing, or the items are not what they should be; names file and line.
    """
    parts = []
    for name, ambiguous in (("train", True), ("test", False)):
        path = folder / PARADIGMS[paradigm] / f"{name}.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; --msgs wants a folder in MSGS's layout") from error
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                item = json.loads(line)
                labels = item["linguistic_feature_label"], item["surface_feature_label"]
                probe = Probe(str(item["sentence"]), *(int(label) for label in labels))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path}:{number}: not an item of MSGS ({error})") from error
            if {probe.linguistic, probe.surface} - {0, 1} or (probe.linguistic == probe.surface) != ambiguous:
                raise DataError(
                    f"{path}:{number}: labels {labels}: in {name}.jsonl both features must "
                    f"{'agree' if ambiguous else 'differ'}"
                )
            found.append(probe)
        if not found:
            raise DataError(f"{path} has no items")
        parts.append(found)
    return parts[0], parts[1]


_PEOPLE = """teacher doctor waitress lawyer student actor guest dancer cashier senator customer patient driver pilot
tourist singer author banker nurse uncle cousin neighbour farmer sailor"""
_OBJECTS = "painting glass bicycle carriage sofa book ladder window garden museum report ticket guitar lamp"
_GIVEN = "Anna Brad Carla Derek Helen Irene James Karen Laura Mark Nina Omar Paula Robert Sara Tom"
_NOUNS, _THINGS, _NAMES = _PEOPLE.split(), _OBJECTS.split(), _GIVEN.split()
_DETERMINERS = ("a", "some", "this", "that", "every", "one")
_ADVERBS = ("yesterday", "often", "quietly", "again", "last week", "in spring")
_CONTROL = (
    "tried to", "wanted to", "intended to", "hoped to", "refused to", "managed to", "was eager to", "was unhappy to",
    "was reluctant to", "agreed to",
)  # fmt: skip
_RAISING = (
    "seemed to", "appeared to", "happened to", "was likely to", "was bound to", "was certain to", "turned out to",
    "proved to", "tended to", "was about to",
)  # fmt: skip
_DOES = ("repair", "sell", "admire", "describe", "notice", "examine", "find", "paint", "borrow", "clean")
_DID = (
    "repaired", "sold", "admired", "described", "noticed", "examined", "found", "painted", "borrowed", "cleaned",
)  # fmt: skip
_LINKS = ("whenever", "while", "although", "because", "even though", "after", "before")


def generate(paradigm: str, ambiguous: bool, count: int, seed: int) -> list[Probe]:
    """Different sentences, as many of each of the two kinds, in a random order."""
    rng = random.Random(f"{paradigm} {ambiguous} {seed}")
    made: dict[str, Probe] = {}
    for _ in range(100 * count):
        if len(made) == count:
            break
        linguistic = len(made) % 2
        surface = linguistic if ambiguous else 1 - linguistic
        sentence = _sentence(rng, paradigm, linguistic, surface)
        made.setdefault(sentence, Probe(sentence, linguistic, surface))
    probes = list(made.values())
    rng.shuffle(probes)
    return probes


def _sentence(rng: random.Random, paradigm: str, linguistic: int, surface: int) -> str:
    nouns = [f"{rng.choice(_DETERMINERS)} {noun}" for noun in rng.sample(_NOUNS, 3)]
    things = [f"{rng.choice(_DETERMINERS)} {thing}" for thing in rng.sample(_THINGS, 2)]
    verb = rng.choice(_CONTROL if linguistic else _RAISING)
    subject = rng.choice([nouns[0], rng.choice(_NAMES)])
    main = f"{subject} {verb} {rng.choice(_DOES)} {things[0]}"
    side = f"{rng.choice(_LINKS)} {nouns[1]} {rng.choice(_DID)} {things[1]} {rng.choice(_ADVERBS)}"
    if paradigm == "length":
        if surface:
            side += f" and {nouns[2]} {rng.choice(_DID)} {rng.choice(_NAMES)}'s {rng.choice(_THINGS)}"
        else:
            side = ""
    sentence = f"{main} {side}".strip() if rng.random() < 0.5 or not side else f"{side}, {main}"
    words = sentence.split()
    if paradigm == "lexical" and surface:
        at = rng.choice([i for i, word in enumerate(words) if word in _DETERMINERS])
        words[at] = "the"
    while paradigm == "length" and surface and len(words) < LONG:
        words.insert(len(words) if "," not in sentence else 0, rng.choice(_ADVERBS[:3]))
    text = " ".join(words)
    return text[0].upper() + text[1:] + "."


def probes(paradigm: str, folder: Path | None, counts: Sequence[int], seed: int) -> tuple[list[Probe], list[Probe]]:
    """Training and test items: those of a folder, evenly spaced, else generated ones; at most ``counts`` of each.

    Raises:
        DataError: as ``read_folder``.
    """
    if folder is None:
        return generate(paradigm, True, counts[0], seed), generate(paradigm, False, counts[1], seed)
    train, test = read_folder(folder, paradigm)
    return _spread(train, counts[0]), _spread(test, counts[1])


def _spread(items: list[Probe], count: int) -> list[Probe]:
    """At most so many items, evenly spaced among those of each label, whatever the order of the file."""
    if count >= len(items):
        return items
    by_label = sorted(items, key=lambda probe: probe.linguistic)
    return [by_label[i * len(items) // count] for i in range(count)]
