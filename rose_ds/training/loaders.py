"""A transformers.Trainer whose rows come in one order, whenever and on however many ranks it is asked for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from rose_ds.training.callbacks import outlive_sigterm


@contextmanager
def with_settings(args: TrainingArguments, **values: Any) -> Iterator[None]:
    """Other values for a while, where Trainer's own code looks at them."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell all that chooses rows which epoch comes, also behind what shares them out among ranks: where a resumed run
    skips some, Trainer's call and accelerate's reach no further than that.
    """
    part: Any = loader
    while part is not None:
        for chooser in (part, getattr(part, "sampler", None)):
            choose = getattr(chooser, "set_epoch", None)
            if choose is not None:
                choose(epoch)
        part = getattr(part, "batch_sampler", None)


class _OfEpoch:
    """An order that seed and epoch give, and not the global random state, which differs in a resumed run and may differ
    between ranks. accelerate calls ``set_epoch`` at the start of each epoch.
    """

    _seed, _epoch = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._epoch = epoch

    def _epochs_generator(self) -> torch.Generator:
        key = np.random.SeedSequence((self._seed, self._epoch)).generate_state(1)[0]
        return torch.Generator().manual_seed(int(key))


class _SeededLengthSampler(_OfEpoch, LengthGroupedSampler):
    """transformers', of an epoch."""

    def __init__(self, batch_size: int, *, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed

    def __iter__(self) -> Any:
        self.generator = self._epochs_generator()
        return super().__iter__()


class _SeededRandomSampler(_OfEpoch, Sampler[int]):
    """All rows, as accelerate's seedable sampler draws them in an order of its own."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed = rows, seed

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self._rows, generator=self._epochs_generator()).tolist()


class SteadyLoaders(Trainer):
    """What RoseTrainer does about loaders."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; in an order that seed and epoch give, and not the random state."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        seedable = self.args.accelerator_config.use_seedable_sampler  # accelerate's own then takes its place
        if type(sampler) is RandomSampler and sampler.generator is None and not seedable:
            return _SeededRandomSampler(len(sampler), seed)
        if isinstance(sampler, LengthGroupedSampler):
            # Trainer's is made for one rank's batch, and its order would depend on how many there are
            rows = self.get_total_train_batch_size(self.args)
            return _SeededLengthSampler(rows, lengths=sampler.lengths, seed=seed)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """None: in the rows' order, on any number of ranks. Trainer's would shuffle what it evaluates, and so what
        ``predict`` returns, where training goes by length.
        """
        return None

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; --dataloader_drop_last is for training, and Trainer's would leave rows out of evaluations too. Its
        workers outlive a launcher's SIGTERM, which reaches them too, as a step that lacks its batch saves nothing.
        """
        drops = self.args.dataloader_drop_last
        # without even_batches ranks would have unequally many, and wait for each other
        drops = drops and bool(kwargs.get("is_training") or not self.accelerator.even_batches)
        with with_settings(self.args, dataloader_drop_last=drops):
            loader = super()._get_dataloader(*args, **kwargs)
        made = getattr(loader, "base_dataloader", loader)  # in accelerate's, which starts the workers of that one
        if made.num_workers:
            made.worker_init_fn = partial(outlive_sigterm, made.worker_init_fn)
        return loader
