"""What the ranks of one command print beside each other."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from rose_ds import cli
from rose_ds.config import RoseConfig

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(level)
    transformers_logging.enable_progress_bar()


@pytest.mark.parametrize("rank", ["0", "5"])
def test_each_rank_says_what_went_wrong_on_it(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first at once; the others, which a launcher ends meanwhile if the first has failed too, with their place."""
    waited: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli.time, "sleep", waited.append)

    def bad(_: Any) -> None:
        RoseConfig(strategy="thirst")  # type: ignore[arg-type]

    monkeypatch.setattr(cli, "_function_of", lambda _: bad)
    with pytest.raises(SystemExit) as end:
        cli.main(["train"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    place = "" if rank == "0" else f" (rank 5 on {socket.gethostname()})"
    assert said.startswith(f"rose-ds train: error{place}: strategy='thirst'")
    assert waited == ([] if rank == "0" else [cli._PATIENCE])


@pytest.mark.parametrize("rank", ["0", "5"])
def test_bars_and_advice_of_the_first_rank_alone(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli, "_function_of", lambda _: lambda _: None)
    cli.main(["train"])
    assert transformers_logging.is_progress_bar_enabled() is (rank == "0")
    assert (transformers_logging.get_verbosity() == transformers_logging.ERROR) is (rank == "5")
