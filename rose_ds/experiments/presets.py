"""What was published: each method's settings for a task and a size of model, filled in by --preset."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rose_ds.data.tasks import get_task
from rose_ds.experiments.methods import Method

logger = logging.getLogger(__name__)

#: The models of ROSE's paper, which compares all of these methods on them.
PRESETS = {"paper-base": "roberta-base", "paper-large": "roberta-large"}
_TASKS = ("qnli", "qqp", "rte", "sst2")


@dataclass(frozen=True)
class Published:
    """One method's settings for one task."""

    source: str
    training: Mapping[str, Any]
    """Flags of the run; ``batch`` is the number of rows of an optimizer step."""
    masks: Mapping[str, Any] = field(default_factory=dict)
    """Fields of RoseConfig."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Of the objective, by their flags."""
    note: str = ""


@dataclass(frozen=True)
class FilledIn:
    """What a preset added to a command line, by flag."""

    name: str
    settings: dict[str, Any]
    source: str
    note: str


def _rose() -> Iterator[tuple[str, str, str, Published]]:
    # Source: the commands in the runs/ folder of https://github.com/jiangllan/ROSE, and the settings that its authors
    # publish for each task: learning rate and kept percentage, for qnli, qqp, rte, sst2. Their thresholds are over
    # weight tensors, hence granularity; one "upper" serves both masks of the ensemble. fp16 there is left to the user.
    table = {
        ("paper-base", "rose-first"): ((2e-5, 70), (2e-5, 70), (4e-5, 80), (2e-5, 60)),
        ("paper-base", "rose-second"): ((1e-5, 40), (1e-4, 60), (4e-5, 60), (1e-4, 30)),
        ("paper-base", "rose-ensemble"): ((1e-5, 90), (5e-5, 75), (4e-5, 80), (5e-5, 40)),
        ("paper-large", "rose-first"): ((3e-5, 50), (2e-5, 70), (1e-5, 80), (4e-5, 70)),
        ("paper-large", "rose-second"): ((1e-5, 50), (1e-5, 60), (2e-5, 50), (1e-5, 50)),
        ("paper-large", "rose-ensemble"): ((1e-5, 30), (1e-5, 80), (1e-5, 85), (1e-5, 70)),
    }
    keeps = {
        "rose-first": ("keep_first",),
        "rose-second": ("keep_second",),
        "rose-ensemble": ("keep_first", "keep_second"),
    }
    common = {"adam_beta2": 0.98, "weight_decay": 0.01, "num_train_epochs": 10.0, "warmup_steps": 0, "max_length": 128}
    for (preset, method), rows in table.items():
        for task, (learning_rate, percent) in zip(_TASKS, rows, strict=True):
            training = {"learning_rate": learning_rate, **common, "batch": 16 if task == "rte" else 32}
            masks: dict[str, Any] = {"granularity": "tensor", **dict.fromkeys(keeps[method], percent / 100)}
            if method == "rose-ensemble":
                masks["gamma"] = 0.5
            yield preset, method, task, Published("https://github.com/jiangllan/ROSE", training, masks)


def _fairseq(task: str, **more: Any) -> dict[str, Any]:
    """What the recipes made of fairseq's for RoBERTa-large share: ten epochs, no clipping, linear decay."""
    common = {"learning_rate": 1e-5, "adam_epsilon": 1e-6, "max_grad_norm": 0.0, "num_train_epochs": 10.0}
    warmup = 0.25 if task == "qqp" else 0.06  # --warmup-updates as a part of --total-num-update
    return {**common, "warmup_steps": warmup, "max_length": 512, "batch": 16 if task == "rte" else 32, **more}


def _vanilla() -> Iterator[tuple[str, str, str, Published]]:
    # Source: fairseq's examples/roberta/README.glue.md, RoBERTa's authors; for RoBERTa-large.
    source = "https://github.com/facebookresearch/fairseq/blob/main/examples/roberta/README.glue.md"
    for task in _TASKS:
        training = _fairseq(task, adam_beta2=0.98, weight_decay=0.1)
        if task == "rte":
            training["learning_rate"] = 2e-5
        yield "paper-large", "vanilla", task, Published(source, training)


def _r_drop() -> Iterator[tuple[str, str, str, Published]]:
    # Source for roberta-base: huggingface_transformer_src/README.md and bert_rdrop/run.sh of dropreg/R-Drop; steps and
    # warm-up are given in updates, which are ten epochs (RTE, whose batch of 8 makes them six and a half) and 6%, 25%
    # of them. For RoBERTa-large: its fairseq_src/examples/roberta/run.sh, whose one task is QNLI.
    source = "https://github.com/dropreg/R-Drop"
    note = "alpha was chosen for each task among 0.1, 0.5 and 1.0, and which is not published: see --rdrop_alpha"
    common = {"adam_beta2": 0.98, "weight_decay": 0.01}
    for task in _TASKS:
        training = {**_fairseq(task), **common, "max_length": 128, "max_grad_norm": 1.0}
        if task == "rte":
            training |= {"batch": 8, "num_train_epochs": 2036 / 312}  # updates, and updates of an epoch
        yield "paper-base", "r-drop", task, Published(source, training, note=note)
    yield "paper-large", "r-drop", "qnli", Published(source, _fairseq("qnli", **common), note=note)


def _child_tuning() -> Iterator[tuple[str, str, str, Published]]:
    # Source: the run_glue.sh of ChildTuning_D, whose one task of ours is RTE, with bert-large-cased. Its --warmup_ratio
    # is ignored by its code.
    training = {"learning_rate": 4e-5, "weight_decay": 0.01, "num_train_epochs": 3.0, "warmup_steps": 0}
    yield (
        "paper-large",
        "child-tuning",
        "rte",
        Published(
            "https://github.com/PKUnlp-icler/ChildTuning",
            {**training, "max_length": 128, "batch": 16},
            {"keep_first": 0.3},
            note="published for bert-large-cased",
        ),
    )


def _smart() -> Iterator[tuple[str, str, str, Published]]:
    # Source: the defaults of train.py in namisan/mt-dnn, one recipe for every task and size, with the paper's step of
    # 1e-3 (train.py's own default for it, 1e-5, is not that of its perturbation's code). The radius is the one that its
    # code results in, not the 1e-5 that it advertises.
    constants = {"weight": 1.0, "steps": 1, "step_size": 1e-3, "init_std": 1e-5, "radius": 1.0}
    flags = {f"smart_{name}": value for name, value in constants.items()}
    training = {"learning_rate": 5e-5, "adam_epsilon": 1e-6, "weight_decay": 0.0, "max_grad_norm": 1.0}
    training |= {"num_train_epochs": 5.0, "warmup_steps": 0.1, "max_length": 512, "batch": 8}
    note = "one recipe for every task and size of model; published with Adamax, AdamW here"
    for preset in PRESETS:
        for task in _TASKS:
            yield (
                preset,
                "smart",
                task,
                Published("https://github.com/namisan/mt-dnn", training, constants=flags, note=note),
            )


def _freelb() -> Iterator[tuple[str, str, str, Published]]:
    # Source: fairseq-RoBERTa/launch/FreeLB of zhuchen03/FreeLB, for RoBERTa-large: qnli-fp16, qqp-fp32, sst-fp32, and
    # the commented lines of rte-fp32. Its --adv-steps K makes K + 1 passes. Step, passes, init_mag, max_norm:
    table = {
        "qnli": (1e-1, 3, 2e-1, 2e-1),
        "qqp": (2e-1, 3, 3.2e-1, 7e-1),
        "rte": (6e-2, 4, 1.6e-1, 1.4e-1),
        "sst2": (1e-1, 3, 1.0, 6e-1),
    }
    for task, row in table.items():
        flags = ("freelb_step_size", "freelb_passes", "freelb_init_mag", "freelb_max_norm")
        constants = dict(zip(flags, row, strict=True))
        training = _fairseq(task, adam_beta2=0.999, weight_decay=0.1)
        yield (
            "paper-large",
            "freelb",
            task,
            Published("https://github.com/zhuchen03/FreeLB", training, constants=constants),
        )


#: By preset, method and task.
PUBLISHED: dict[tuple[str, str, str], Published] = {
    (preset, method, task): found
    for block in (_rose, _vanilla, _r_drop, _child_tuning, _smart, _freelb)
    for preset, method, task, found in block()
}


def published(preset: str, method: Method, task: str) -> Published:
    """What was published for ``method``; for OBJECTIVE+MASK the mask's settings with the objective's constants.

    Raises:
        ValueError: no such preset, or it has nothing for this method or task; lists what there is.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not one of {list(PRESETS)}")
    first, plus, second = method.name.partition("+")
    found = PUBLISHED.get((preset, first, task))
    if found is not None and not plus:
        return found
    mask = PUBLISHED.get((preset, second, task))
    if found is None or mask is None:
        raise ValueError(
            f"preset {preset} has no published settings for {method.name} on {task}; there are: {_listed()}; and "
            "OBJECTIVE+MASK where one preset has both for the task. Leave --preset out, and give the settings as flags"
        )
    return Published(
        f"{mask.source}; constants: {found.source}",
        mask.training,
        mask.masks,
        found.constants,
        "; ".join(note for note in (mask.note, found.note) if note),
    )


def _listed() -> str:
    tasks_of: dict[tuple[str, str], list[str]] = {}
    for preset, method, task in PUBLISHED:
        tasks_of.setdefault((preset, method), []).append(task)
    lines = []
    for preset in PRESETS:
        methods: dict[str, list[str]] = {}
        for (of, method), tasks in tasks_of.items():
            if of == preset:
                methods.setdefault(", ".join(tasks), []).append(method)
        lines.append(f"{preset}: " + ", ".join(f"{', '.join(names)} ({tasks})" for tasks, names in methods.items()))
    return "; ".join(lines)


def fill_in(preset: str, method: Method, given: Mapping[str, Any], world_size: int) -> FilledIn:
    """The published settings that a command line leaves open.

    Args:
        given: the flags that it has, by name.
        world_size: ranks; the published batch is that of all of them together.

    Raises:
        ValueError: as ``published``; or the batch cannot be split over the ranks.
    """
    task = get_task(given.get("task", "snippets")).name
    found = published(preset, method, task)
    settings = {"model": PRESETS[preset], **found.training, **found.masks, **found.constants}
    batch = settings.pop("batch")
    if not {"per_device_train_batch_size", "global_batch_size"} & set(given):
        parts = world_size * int(given.get("gradient_accumulation_steps", 1))
        if batch % parts:
            raise ValueError(
                f"preset {preset} has batches of {batch} rows, which {world_size} rank(s) and the accumulation steps "
                f"cannot share ({parts} parts): give --per_device_train_batch_size, or run on fewer ranks"
            )
        settings["per_device_train_batch_size"] = batch // parts
    if "max_steps" in given:  # which is instead of epochs
        del settings["num_train_epochs"]
    settings = {name: value for name, value in settings.items() if name not in given}
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    note = f"; {found.note}" if found.note else ""
    logger.info("preset %s for %s on %s fills in %s (%s%s)", preset, method.name, task, shown, found.source, note)
    return FilledIn(preset, settings, found.source, found.note)
