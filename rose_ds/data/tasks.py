"""The tasks: what their text columns and labels are, and where each source keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from rose_ds.data.errors import DataError


@dataclass(frozen=True)
class TaskSpec:
    """One classification task, the same whichever source its rows come from.

    Label ids are positions in `labels`, and are those of the hub's nyu-mll/glue and AI-Secure/adv_glue.
    """

    name: str
    fields: tuple[str, ...]
    """The one or two text columns, in the order the model reads them."""
    labels: tuple[str, ...]
    """Label names; a label's id is its position."""
    folder: str | None = None
    """Folder name in GLUE's own TSV layout; None where the task is not part of GLUE."""
    tsv_label: str = "label"
    """Name of the label column in the TSV files (the hub calls it `label` for every task)."""
    tsv_values: tuple[str, ...] = ("0", "1")
    """How the TSV files write each label, in the order of `labels`."""
    hub_config: str | None = None
    """Configuration of nyu-mll/glue on the hub; None where the task is not part of GLUE."""
    adv_key: str | None = None
    """Key in AdvGLUE's dev.json; the hub's configuration is `adv_` and this. None where AdvGLUE has no such task."""


_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            name="sst2",
            fields=("sentence",),
            labels=("negative", "positive"),
            folder="SST-2",
            hub_config="sst2",
            adv_key="sst2",
        ),
        TaskSpec(
            name="rte",
            fields=("sentence1", "sentence2"),
            labels=_ENTAILMENT,
            folder="RTE",
            tsv_values=_ENTAILMENT,
            hub_config="rte",
            adv_key="rte",
        ),
        TaskSpec(
            name="qnli",
            fields=("question", "sentence"),
            labels=_ENTAILMENT,
            folder="QNLI",
            tsv_values=_ENTAILMENT,
            hub_config="qnli",
            adv_key="qnli",
        ),
        TaskSpec(
            name="qqp",
            fields=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            folder="QQP",
            tsv_label="is_duplicate",
            hub_config="qqp",
            adv_key="qqp",
        ),
        TaskSpec(name="snippets", fields=("sentence",), labels=("negative", "positive")),
    )
}


def find_task(name: str) -> TaskSpec | None:
    """The task called `name`, or None; case, hyphens and underscores do not matter: "SST-2" and "sst_2" are "sst2"."""
    return TASKS.get(name.lower().replace("-", "").replace("_", ""))


def get_task(name: str) -> TaskSpec:
    """As `find_task`.

    Raises:
        DataError: there is no such task; the message lists those there are.
    """
    spec = find_task(name)
    if spec is None:
        raise DataError(f"unknown task {name!r}; choose one of: {', '.join(TASKS)}")
    return spec


def loosely_spelled(label: str) -> str:
    """The same for one label however it is written: makers of models write POSITIVE or Not-Entailment."""
    return label.strip().lower().replace("-", "_").replace(" ", "_")
