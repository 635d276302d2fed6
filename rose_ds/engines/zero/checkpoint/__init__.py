"""Checkpoints of DeepSpeed engines that train with ROSE.

DeepSpeed writes and reads the files. Here is what it leaves to chance: files are checked and settings compared before
anything is loaded, an error on one rank is the same error on all, and a checkpoint of another number of ranks, or of
another stage, is converted on the way.
"""

from rose_ds.engines.zero.checkpoint.wrapper import Checkpoints

__all__ = ["Checkpoints"]
