"""Tasks, their data, perturbed copies of it, and batches."""

from rose_ds.data.batching import padding_collator, tokenize
from rose_ds.data.errors import DataError
from rose_ds.data.loading import TaskData, load_task
from rose_ds.data.perturb import assign_families, perturb
from rose_ds.data.tasks import TASKS, TaskSpec, get_task

__all__ = [
    "TASKS",
    "DataError",
    "TaskData",
    "TaskSpec",
    "assign_families",
    "get_task",
    "load_task",
    "padding_collator",
    "perturb",
    "tokenize",
]
