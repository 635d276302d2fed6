"""The repository keeps its own rules: lint, types, import contracts, and no traces of where it was written."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "lint-imports": ["lint-imports"],
}

#: In parts, so that this file does not contain them: folders of the machine it was written on, registries' hosts.
FORBIDDEN = [
    "/".join(parts)
    for parts in (
        ("", "work", "main"),
        ("", "work", "shared"),
        ("", "work", ".library"),
        ("", "tmp", "env.sh"),
        ("", "tmp", "rose_ext"),
    )
] + [
    ".".join(parts)
    for parts in (
        ("files", "pythonhosted", "org"),
        ("pypi", "org"),
        ("registry", "npmjs", "org"),
        ("proxy", "golang", "org"),
    )
]


@pytest.mark.parametrize("name", COMMANDS)
def test_tools(name: str) -> None:
    """Each of the house's tools is content, with the settings in pyproject.toml."""
    program, *arguments = COMMANDS[name]
    found = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    assert found is not None, f"{program} is not installed: pip install -e .[test]"
    result = subprocess.run([found, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, f"{name}:\n{result.stdout[-4000:]}{result.stderr[-2000:]}"


def tracked(*options: str) -> set[str]:
    """Files that git knows."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, check=True).stdout
    return {name for name in listed.decode().split("\0") if name}


def test_no_ignored_file_is_tracked() -> None:
    found = sorted(tracked("--cached", "--ignored", "--exclude-standard"))
    assert not found, f"{len(found)} files, {found[0]} first: git rm -r --cached them"


def test_no_traces() -> None:
    """No tracked file mentions the machine, or a package registry's host."""
    found = []
    for path in sorted(ROOT / name for name in tracked() - tracked("--cached", "--ignored", "--exclude-standard")):
        if path.is_file():
            text = path.read_bytes().decode(errors="ignore")
            found += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text]
    assert not found, "\n".join(found)


def test_the_forbidden_list_is_not_empty_words() -> None:
    """The search above would find what it looks for, and this file hides it."""
    assert all(len(word) > 7 for word in FORBIDDEN)
    own = Path(__file__).read_text()
    assert not [word for word in FORBIDDEN if word in own]


def imported(path: Path) -> set[str]:
    """Every dotted name that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_core_knows_no_ranks() -> None:
    """import-linter sees packages as a whole; torch.distributed is a part of one."""
    for path in (ROOT / "rose_ds" / "core").glob("*.py"):
        assert not {name for name in imported(path) if name.startswith("torch.distributed")}, path


def test_only_the_front_ends_know_the_trainer() -> None:
    package = ROOT / "rose_ds"
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if imported(path) & {"transformers.Trainer", "transformers.TrainingArguments", "transformers.trainer.Trainer"}
    }
    # those of experiments only name the type of their arguments
    experiments = {"experiments/train.py", "experiments/rehearsal.py", "experiments/saving.py"}
    trainer = {"training/loaders.py", "training/resuming.py", "training/same_run.py"}
    assert found == {"cli/arguments.py"} | trainer | experiments


def test_no_large_file_is_tracked() -> None:
    """A model that a run has left in the folder it was started from, say."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]
    assert files and not [str(path) for path in files if path.stat().st_size > 1 << 20]
