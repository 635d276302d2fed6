"""Which attack is made, how far it goes, and what it is called in files and figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import ClassVar

from rose_ds.attack.searches import SEARCHES
from rose_ds.experiments.resumable import digest

#: Of the searches: accuracies under one stand beside none under another. 1 had no name; its pruthi added one letter in
#: each place, and its deepwordbug misspelled words that the model does not read.
VERSION = 2


@dataclass
class AttackSettings:
    """Which attack, and how far it goes."""

    _argument_group_name: ClassVar[str] = "attack"

    search: str = field(
        default="deepwordbug",
        metadata={
            "help": "deepwordbug (Gao et al. 2018: important words first, four random edits each) or pruthi (Pruthi et "
            "al. 2019: the strongest of all internal edits)."
        },
    )
    max_words: int | None = field(
        default=None,
        metadata={"help": "Misspell at most so many words of an item. Default: deepwordbug no limit, pruthi 1."},
    )
    query_budget: int | None = field(
        default=None, metadata={"help": "Ask the model at most so often about an item: of more edits, about the first."}
    )
    attack_seed: int = field(default=0, metadata={"help": "Seed of the random letters."})

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise ValueError(f"search={self.search!r} is not one of {list(SEARCHES)}")
        for name in ("max_words", "query_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def key(self, rows: str) -> str:
        """Of files: the search with a digest of its limits and of the rows."""
        return f"{self.search}-{digest([[rows, *asdict(self).values(), VERSION]])}"

    @property
    def name(self) -> str:
        """The search and what limits it, as labels begin."""
        told = {"max_words": self.max_words, "query_budget": self.query_budget, "seed": self.attack_seed or None}
        return f"{self.search} {VERSION}" + "".join(f", {name} {v}" for name, v in told.items() if v is not None)

    def label(self, items: int, rows: str) -> str:
        """What accuracies are comparable under, the key in ``Metrics.under_attack``: the name, and the rows, by their
        digest.
        """
        return f"{self.name}, {items} items {rows}"


@dataclass(frozen=True)
class PlannedAttack:
    """An attack that another command leaves to ``rose-ds attack``, for each of its models.

    Raises:
        ValueError: less than one item.
    """

    settings: AttackSettings
    items: int = 200
    """So many of the dev set, evenly spaced; all where there are no more."""

    def __post_init__(self) -> None:
        if self.items < 1:
            raise ValueError(f"attack_items={self.items} must be at least 1")

    def words(self, rows: int) -> list[str]:
        """Flags of ``rose-ds attack`` for a dev set of so many rows; those that are at their defaults are left out, but
        for the search.
        """
        found = ["--search", self.settings.search]
        for f in fields(self.settings):
            value = getattr(self.settings, f.name)
            if f.name != "search" and value != f.default:
                found += [f"--{f.name}", str(value)]
        return [*found, "--max_eval_samples", str(min(self.items, rows))]

    def made(self, labels: Iterable[str], rows: int) -> bool:
        """Whether one of the labels is of this attack, on as many items as a dev set of so many rows has for it."""
        wanted = f"{self.settings.name}, {min(self.items, rows)} items "
        return any(label.startswith(wanted) for label in labels)
