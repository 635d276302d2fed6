"""What stands in for an engine's save_checkpoint and load_checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from rose_ds.engines.zero.checkpoint.agree import everywhere, on_first_rank, warn
from rose_ds.engines.zero.checkpoint.compare import compare, compare_for_weights, fits, layout_of, record_of
from rose_ds.engines.zero.checkpoint.saved import RECORD, Saved, find
from rose_ds.engines.zero.checkpoint.universal import complete, convert, frozen_and_buffers, restore_hyperparameters
from rose_ds.errors import RefusedConfiguration
from rose_ds.optimizer import RoseAdamW

#: How long the other ranks wait while one converts: hours, for a model of hundreds of billions of parameters.
_CONVERSION = timedelta(days=1)


class StateFiles(Protocol):
    """Writes and reads files of its own in a checkpoint's folder; every rank calls both."""

    def save(self, folder: Path) -> None:
        """Write this rank's."""

    def load(self, folder: Path) -> None:
        """Read every rank's, of any number of ranks."""

    def refuse_own_folders(self, setting: str) -> None:
        """Refuse a setting that has each host keep its files to itself."""

    def require(self, folder: Path, *, converted: bool) -> None:
        """Refuse a folder that lacks them."""


class Checkpoints:
    """Stands in for one engine's ``save_checkpoint`` and ``load_checkpoint``: same arguments, same results."""

    def __init__(
        self, ds: Any, optimizer: RoseAdamW, accumulating: Callable[[], bool], after_load: Callable[[], None]
    ) -> None:
        self.engine, self.base = ds, optimizer
        self._accumulating, self._after_load = accumulating, after_load
        self.state: StateFiles | None = None
        self._save: Callable[..., Any] = self.engine.save_checkpoint
        self._load: Callable[..., Any] = self.engine.load_checkpoint
        earlier = getattr(self._load, "__self__", None)
        if isinstance(earlier, Checkpoints):  # prepare() was called before
            self._save, self._load = earlier._save, earlier._load
        elif self.engine.loaded_checkpoint_dp_world_size is not None:
            self._look_at_earlier_load()
        self.engine.save_checkpoint, self.engine.load_checkpoint = self.save, self.load

    def keep(self, state: StateFiles) -> None:
        """What a run's method keeps beside weights and moments is saved and loaded with them.

        Raises:
            RefusedConfiguration: not where it could be read again.
        """
        if self.engine.use_node_local_storage():
            state.refuse_own_folders("checkpoint.use_node_local_storage")
        self.state = state

    def _look_at_earlier_load(self) -> None:
        if self.engine.load_universal_checkpoint():
            raise RefusedConfiguration(
                "a universal checkpoint was loaded before rose_ds.prepare(engine). DeepSpeed's loader alone loses "
                "buffers, frozen parameters and, at stage 3, the settings of all parameter groups but the first: call "
                "rose_ds.prepare(engine) first, then engine.load_checkpoint()"
            )
        warn("a checkpoint was loaded before rose_ds.prepare(engine): its ROSE settings were not compared")

    # --- save ---

    def save(
        self,
        save_dir: Any,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """``DeepSpeedEngine.save_checkpoint``, with ROSE's record in the client state. Its arguments by name: Trainer
        looks whether frozen parameters can be left out.

        Raises:
            RefusedConfiguration: in the middle of an accumulation, whose gradients no checkpoint holds; a setting whose
                checkpoints could not be loaded again.
        """
        self._refuse_within_accumulation("save_checkpoint")
        if getattr(self.engine.optimizer, "elastic_checkpoint", False):
            raise RefusedConfiguration(
                "zero_optimization.elastic_checkpoint loses the step count: set it to false. Without it, too, a "
                "checkpoint can be resumed on another number of ranks"
            )
        state = {**(client_state or {}), RECORD: record_of(self.engine, self.base)}
        tag = f"global_step{self.engine.global_steps}" if tag is None else tag  # DeepSpeed's own default
        if self.state is not None:  # before DeepSpeed's "latest" names the checkpoint
            everywhere(lambda: self.state.save(Path(save_dir) / str(tag)))  # type: ignore[union-attr]
        return self._save(save_dir, tag, state, save_latest, exclude_frozen_parameters)

    def _refuse_within_accumulation(self, what: str) -> None:
        if self._accumulating():
            raise RefusedConfiguration(
                f"{what} in the middle of an accumulation loses the micro-batches since the last optimizer step, which "
                "no checkpoint holds: call it when stepper.step() has returned a report (Trainer, with a stream whose "
                'epochs end so: save_strategy="steps")'
            )

    # --- load ---

    def load(
        self,
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        """``DeepSpeedEngine.load_checkpoint``; also of another number of ranks, and from stage 1, 2 or 3 to another.

        Raises:
            RefusedConfiguration: on every rank, and nothing has changed. A file is missing or truncated, or the
                checkpoint is of another model, or cannot be resumed here.
            RuntimeError: in the middle of an accumulation; or loading failed half-way, on any rank.
        """
        self._refuse_within_accumulation("load_checkpoint")
        prefer_universal = self.engine.load_universal_checkpoint()
        found = on_first_rank(lambda: find(Path(load_dir), tag, prefer_universal))
        if found is None:  # no "latest": DeepSpeed warns and returns (None, None)
            return self._load(load_dir, tag)
        saved = self._checked(found)
        if load_optimizer_states and not load_module_only:
            on_first_rank(lambda: compare(self.engine, self.base, saved, load_lr_scheduler_states))
            sharded = saved.layout not in ("universal", "replicated")
            if sharded and (prefer_universal or not fits(self.engine, saved)):
                saved = self._converted(saved)
        else:
            on_first_rank(lambda: compare_for_weights(self.engine, saved, load_module_only))
        with_state = self.state is not None and load_optimizer_states and not load_module_only
        if with_state:
            converted = found.layout == "universal"
            on_first_rank(lambda: self.state.require(found.folder, converted=converted))  # type: ignore[union-attr]
        finish = self._prepare_universal(saved, load_module_strict) if saved.layout == "universal" else None
        # whatever the configuration says: it is now known what the checkpoint is
        self.engine._config.load_universal_checkpoint = finish is not None
        try:
            result = everywhere(
                lambda: self._load(
                    load_dir,
                    saved.tag,
                    load_module_strict=load_module_strict,
                    load_optimizer_states=load_optimizer_states,
                    load_lr_scheduler_states=load_lr_scheduler_states,
                    load_module_only=load_module_only,
                    custom_load_fn=custom_load_fn,
                ),
                "; it may be loaded in part: build the engine anew before going on",
            )
        finally:
            self.engine._config.load_universal_checkpoint = prefer_universal
        if finish is not None:
            finish()
        self._after_load()
        if with_state:
            # a converted checkpoint has its files beside the one that it was made of
            everywhere(lambda: self.state.load(Path(load_dir) / found.tag))  # type: ignore[union-attr]
        self._look_at_clipping()
        return result

    def _checked(self, saved: Saved) -> Saved:
        everywhere(lambda: saved.check(dist.get_rank(), dist.get_world_size()))
        return saved

    def _converted(self, saved: Saved) -> Saved:
        if self.engine.use_node_local_storage():
            raise RefusedConfiguration(
                "checkpoint.use_node_local_storage keeps the files of other ranks out of reach: a checkpoint of "
                "another number of ranks or another stage must lie where every rank can read it"
            )
        tag = _patiently_on_first_rank(lambda: convert(saved))
        converted = on_first_rank(lambda: find(saved.load_dir, tag, False))
        assert converted is not None, "a tag was given"
        return self._checked(converted)

    def _prepare_universal(self, saved: Saved, strict: bool) -> Callable[[], None]:
        """Make sure that DeepSpeed's loader will go through. The result does what that leaves undone."""
        _patiently_on_first_rank(lambda: complete(saved.folder, layout_of(self.engine)))

        def look() -> Callable[[], None]:
            z = self.engine.optimizer
            for group in getattr(z, "bit16_groups", None) or getattr(z, "bf16_groups", []):
                if all(getattr(param, "_hp_mapping", None) is None for param in group):
                    raise RefusedConfiguration(
                        "this rank holds nothing of a small parameter group, on which DeepSpeed's loader fails: use "
                        "fewer ranks, or stage 3"
                    )
            return frozen_and_buffers(self.engine, saved, strict)

        restore = everywhere(look)

        def finish() -> None:
            restore_hyperparameters(self.base, saved)
            restore()

        return finish

    def _look_at_clipping(self) -> None:
        """DeepSpeed takes it from the checkpoint at stages 1 and 2."""
        wanted, used = self.engine.gradient_clipping(), getattr(self.engine.optimizer, "clip_grad", None)
        if used is not None and used != wanted:
            warn(f"gradient_clipping={used} comes from the checkpoint; the configuration says {wanted}")


def _patiently_on_first_rank(run: Callable[[], Any]) -> Any:
    """As ``on_first_rank``, for what may read and write every state of the model: longer than a collective may take."""
    patient = dist.new_group(backend="gloo", timeout=_CONVERSION)
    try:
        return on_first_rank(run, patient)
    finally:
        dist.destroy_process_group(patient)
