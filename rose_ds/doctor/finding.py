"""What a check found, and the findings of many ranks put together."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "failed"]

_SHOWN = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    """Its name, one word or two."""
    status: Status
    text: str
    """What was found."""
    mend: str = ""
    """What to do about it; empty where there is nothing to do."""
    ranks: tuple[int, ...] = ()
    """The ranks that found it; empty: all of them."""

    def line(self) -> str:
        """The finding as one line, and a second one with the way out."""
        where = f" (rank {', '.join(map(str, self.ranks))})" if self.ranks else ""
        told = f"{_SHOWN[self.status]}  {self.check}: {self.text}{where}"
        return told + (textwrap.indent(f"\n-> {self.mend}", " " * 9) if self.mend else "")


def merged(by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """The findings of all ranks: what all found alike once, the rest with the ranks that found it.

    Where all ranks say ok, the first one's words stand for all: free memory, say, differs from rank to rank.

    Args:
        by_rank: each rank's findings.
    """
    order = list(dict.fromkeys(finding.check for findings in by_rank for finding in findings))
    found: list[Finding] = []
    for check in order:
        alike: dict[Finding, list[int]] = {}
        for rank, findings in enumerate(by_rank):
            for finding in findings:
                if finding.check == check:
                    alike.setdefault(finding, []).append(rank)
        everywhere = {rank for ranks in alike.values() for rank in ranks} == set(range(len(by_rank)))
        if everywhere and all(finding.status == "ok" for finding in alike):
            found.append(next(iter(alike)))
            continue
        for finding, ranks in alike.items():
            everyone = len(ranks) == len(by_rank)
            found.append(finding if everyone else Finding(**{**asdict(finding), "ranks": tuple(ranks)}))
    return found


def record(findings: Sequence[Finding], world_size: int) -> dict[str, Any]:
    """The findings for a program: ``ok`` (nothing failed), ``world_size`` and ``checks``."""
    return {"ok": not any_failed(findings), "world_size": world_size, "checks": [asdict(f) for f in findings]}


def any_failed(findings: Sequence[Finding]) -> bool:
    """Whether a check failed; warnings do not count."""
    return any(finding.status == "failed" for finding in findings)
