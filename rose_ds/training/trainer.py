"""RoseTrainer: a transformers.Trainer whose steps are ROSE's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from tqdm import tqdm
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from rose_ds.config import RoseConfig
from rose_ds.engines.passes import Sample
from rose_ds.engines.registry import rose_optimizer
from rose_ds.engines.rng import RngState, replay
from rose_ds.exchange import limit_waiting
from rose_ds.objectives import Objective
from rose_ds.optimizer import RoseAdamW
from rose_ds.training.callbacks import RoseProgressCallback, RoseTensorBoardCallback
from rose_ds.training.mask_record import MaskRecorder
from rose_ds.training.method_state import MethodState
from rose_ds.training.micro_batch import MicroBatchTrainer
from rose_ds.training.predictions import labels_in
from rose_ds.training.resuming import with_trainers_arguments
from rose_ds.training.risk_average import refuse_together
from rose_ds.training.sampling import sample_rows
from rose_ds.training.step_report import StepReport
from rose_ds.training.stepper import Stepper, prepare


class RoseTrainer(MicroBatchTrainer):
    """A Trainer that updates only robust parameters.

    Args:
        rose: which parameters a step updates; default RoseConfig(). strategy="none" trains exactly as Trainer with
            AdamW does. With an ``optimizer`` block of type RoseAdamW in the DeepSpeed config, the block's settings are
            used and must agree.
        objective: what is minimised, as for ``rose_ds.prepare``; default: the block's, else "task".
        Everything else: as transformers.Trainer. The optimizer is RoseAdamW with the learning rate, betas, epsilon and
            weight decay of TrainingArguments.

    Checkpoints: ``train(resume_from_checkpoint=True)`` goes on from the newest that was written to its end, and refuses
    to go on with settings that make another run. On SIGTERM every rank finishes its step, a checkpoint is saved, and
    the process ends with exit code 143 (see StopOnSigterm).

    Raises:
        RefusedConfiguration: before training, where a gradient would silently be wrong, or a run would not go on as
            the run it was.
        CheckpointError: a checkpoint could not be written, e.g. the disk is full.
    """

    optimizer: Any

    def __init__(
        self,
        *args: Any,
        rose: RoseConfig | Mapping[str, Any] | None = None,
        objective: str | Mapping[str, Any] | Objective | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if rose is not None and not isinstance(rose, (RoseConfig, Mapping)):
            raise TypeError(f"rose= must be a RoseConfig or a mapping of its settings, got {type(rose).__name__}")
        self.rose = RoseConfig.from_mapping(rose or {}) if not isinstance(rose, RoseConfig) else rose
        self.rose_objective = self._objective(objective)  # Trainer has an ``objective`` of its own, a search's
        refuse_together(self._settings_of_masks(), self.rose_objective)
        self.stepper: Stepper | None = None
        self._stepper_model: nn.Module | None = None
        self._kept: MethodState | None = None
        """Of a stepper that is gone, for the next one of the same optimizer."""
        self.steady_evaluations = False
        """Whether an evaluation leaves training's random numbers as they are, of which Trainer's takes one. A run is
        then the same however often it is evaluated, and not Trainer's.
        """
        self._grad_norm: float | None = None
        self._disagreement: float | None = None
        self.record_masks: tuple[Path, int] | None = None
        """A folder, and every how many optimizer steps what the masks kept is written there."""
        self._refuse()
        self._refuse_without_dropout()
        for callback in list(self.callback_handler.callbacks):  # not those of the user's own classes
            if type(callback) is ProgressCallback:
                self.remove_callback(callback)
                self.add_callback(RoseProgressCallback(self))
            elif type(callback) is TensorBoardCallback:
                self.remove_callback(callback)
                self.add_callback(RoseTensorBoardCallback(callback.tb_writer))

    @property
    def last_report(self) -> StepReport | None:
        """The last optimizer step's; None before the first."""
        return None if self.stepper is None else self.stepper.last_report

    @property
    def engine_name(self) -> str:
        """The engine that training runs on; before training, the one it is going to run on."""
        if self.stepper is not None:
            return self.stepper.engine.name
        if self.is_deepspeed_enabled:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        if self.is_fsdp_enabled:
            return f"fsdp{self.accelerator.state.fsdp_plugin.fsdp_version}"
        return "plain" if self.args.world_size == 1 else "ddp"

    # --- optimizer ---

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """RoseAdamW over named parameters, with Trainer's own split into decayed and not decayed."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [x for x in named if x[0] in decayed], "weight_decay": self.args.weight_decay},
                {"params": [x for x in named if x[0] not in decayed], "weight_decay": 0.0},
            ]
            self.optimizer = RoseAdamW(
                [group for group in groups if group["params"]],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                # the kernel that Trainer's own AdamW would be: its numbers are the same to the last bit
                fused="fused" in self.args.optim or None,
                foreach=False if "fused" in self.args.optim else self.args.device.type == "cuda",
                **{name: getattr(self.rose, name) for name in RoseConfig.field_names()},
            )
        return self.optimizer

    def _rose_optimizer(self) -> RoseAdamW | None:
        if self.is_deepspeed_enabled:
            return None if self.stepper is None else self.stepper.optimizer
        return None if self.optimizer is None else rose_optimizer(self.optimizer)

    def method_settings(self) -> dict[str, Any]:
        """RoseConfig's fields, the strategy alone where it masks nothing, and the objective with its constants."""
        rose = self._settings_of_masks()
        masks = asdict(rose) if rose.strategy != "none" else {"strategy": "none"}
        return {**masks, "objective": self.rose_objective.record()}

    def save_method_state(self, folder: Path) -> None:
        """Of the stepper; a DeepSpeedEngine has written it by now."""
        if self.stepper is not None and not self.is_deepspeed_enabled:
            self.stepper.save_state(folder)

    def optimizer_steps(self) -> int:
        """Optimizer steps taken, by the state that lies on this rank."""
        optimizer = self._rose_optimizer()
        return 0 if optimizer is None else optimizer.steps_taken()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's; a DeepSpeedEngine exists by now and has not loaded a checkpoint: ROSE attaches to it."""
        if type(self).create_optimizer is not RoseTrainer.create_optimizer:
            self._check_own_optimizer()
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        wrapped = self.accelerator.deepspeed_engine_wrapped if self.is_deepspeed_enabled else None
        if wrapped is not None:
            self._stepper_for(wrapped.engine)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's; for FSDP1, which reads into the state that the optimizer has: with none, it would read nothing."""
        optimizer = self._rose_optimizer()
        if checkpoint is not None and self.engine_name == "fsdp1" and optimizer is not None:
            for param in (p for group in optimizer.param_groups for p in group["params"] if p.numel()):
                optimizer.init_state(param)
        super()._load_optimizer_and_scheduler(checkpoint)

    # --- the step ---

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The gradients of one micro-batch; under DeepSpeed also the engine's step, as in Trainer."""
        model.train()
        stepper = self._stepper_for(model)
        accumulation = self.current_gradient_accumulation_steps
        stepper.engine.accumulation_steps = accumulation
        inputs = self._prepare_inputs(inputs)
        whole = self._loss_is_whole(model, inputs, num_items_in_batch)
        said = self.loss_is_scaled_for_ga is not None
        count = num_items_in_batch if whole or said else None  # with it Trainer multiplies the loss by the ranks
        # a loss that is already a mean over the whole accumulated batch must not be divided again
        passes = partial(self._passes, model, count=count, compares=stepper.compares)
        forward, loss_of = passes(inputs, times=accumulation if whole else 1)
        compare = self._positions(inputs, count) if stepper.compares else {}
        if stepper.halves is not None and whole:
            labels = labels_in(inputs, self.label_names)
            if labels is not None:  # as Trainer counts
                shifted = labels[..., 1:] if getattr(self, "_loss_shifts_labels", False) else labels
                compare["weight"] = inputs.get("shift_labels", shifted).ne(-100).sum()
        if stepper.samples_now:
            some, rows = sample_rows(inputs, stepper.config.risk_rows)
            compare["sample"] = Sample(passes(some, times=1)[0], rows)
        if self.is_deepspeed_enabled:
            model.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
            micro = stepper.backward(forward, loss_of, **compare)
            stepper.step()
        else:
            micro = stepper.backward(forward, loss_of, **compare)
            self._grad_norm = None
            stepper.leave_step_to_optimizer(
                last=self.accelerator.sync_gradients,
                grad_norm=lambda: self._grad_norm,
                max_grad_norm=self.args.max_grad_norm,
            )
        if micro["disagreement"] is not None and self.args.logging_strategy != "no":  # which empties the list
            self.disagreements.append(micro["disagreement"])
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return micro["loss"] / accumulation

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; an epoch of a stream may end within an accumulation, and an early stop with it."""
        if self.stepper is not None:
            self.stepper.engine.forget_micro_batches()
        return super()._finalize_training(*args, **kwargs)

    def before_first_epoch(self, model: nn.Module) -> None:
        """What a method does before training: Child-Tuning_D's pass over the training data."""
        earlier = self.stepper
        stepper = self._stepper_for(model)
        if stepper is earlier and self.resumed_folder is not None and not self.is_deepspeed_enabled:
            stepper.load_state(self.resumed_folder)  # an earlier train() of this process has gone further
        # now that it is known what the checkpoint holds
        if self.record_masks is not None and stepper.policy is not None:
            stepper.masking.recorder = MaskRecorder(stepper, *self.record_masks)
        if not stepper.needs_fisher_pass:
            return
        loader = self.get_train_dataloader()
        # a run shorter than an epoch looks at as many batches as it trains on
        count = self.state.max_steps * self.args.gradient_accumulation_steps
        if has_length(loader):
            count = min(count, len(loader))
        model.train()
        bar = tqdm(
            itertools.islice(loader, count),
            total=count,
            desc="Fisher information",
            unit="batch",
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        try:
            with replay(RngState.now()):  # training draws the random numbers that it would have drawn without
                passes = partial(self._passes, model, times=1, compares=stepper.compares)
                prepared = (self._prepare_inputs(batch) for batch in bar)
                stepper.fisher_pass(
                    (passes(inputs, count=self._own_count(inputs)) for inputs in prepared), self.args.max_grad_norm
                )
        finally:
            bar.close()
            if hasattr(loader, "end"):  # accelerate counts a loader that was left early as still running
                loader.end()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's; see ``steady_evaluations``."""
        with replay(RngState.now()) if self.steady_evaluations else nullcontext():
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        return found

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's, remembered: the step is skipped on every rank where the norm is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._grad_norm = None if norm is None else float(norm)
        return norm

    def _forget_stepper(self) -> None:
        """Of a model that is about to go, which it would keep in memory."""
        if getattr(self, "stepper", None) is not None:  # Trainer makes its first model before there is one
            self.stepper.detach()  # type: ignore[union-attr]
        self.stepper = self._stepper_model = None

    def _update_auto_batch_size(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, also after a step that ran out of memory half-way: the model goes, and its optimizer stays."""
        kept = None if self.stepper is None else self.stepper.state
        self._forget_stepper()
        super()._update_auto_batch_size(*args, **kwargs)
        self._kept = kept

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Trainer's, for each trial of a search."""
        self._forget_stepper()
        return super().call_model_init(*args, **kwargs)

    def _stepper_for(self, model: nn.Module) -> Stepper:
        optimizer = None if self.is_deepspeed_enabled else self._rose_optimizer()
        # a second train() wraps the model anew, or has another optimizer
        other = self.stepper is not None and optimizer is not None and self.stepper.optimizer is not optimizer
        if self.stepper is None or self._stepper_model is not model or other:
            if self.stepper is not None:
                self.stepper.detach()
            kept = self._kept if self.stepper is None else self.stepper.state
            self.stepper = prepare(model, optimizer, objective=self.rose_objective)
            self._stepper_model = model
            if self.is_deepspeed_enabled:
                limit_waiting(self.args.ddp_timeout_delta)
            self._check_agreement(self.stepper.config)
            if self.args.save_on_each_node:
                self.stepper.state.refuse_own_folders("save_on_each_node=True")
            if optimizer is not None and self.resumed_folder is not None:  # DeepSpeed's engine loads it by itself
                self.stepper.load_state(self.resumed_folder)
            elif kept is not None and kept.engine.optimizer is optimizer:
                self.stepper.state.take_over(kept)
            self._kept = None
        return self.stepper

    # --- reports ---

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the last step's thresholds and kept fractions beside the training loss, and how often the two
        dropout passes gave two answers since the log before.
        """
        report = self.last_report
        if report is not None and "loss" in logs:
            logs = {**logs, **{tag: value for tag, value in report.scalars().items() if tag.startswith("rose/")}}
            if self._disagreement is not None:
                logs["rose/disagreement"] = self._disagreement
        super().log(logs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's. What the log needs of other ranks is fetched here, where all come by: one may log by itself."""
        due = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        if due and self.disagreements:
            mean = self.accelerator.gather(torch.stack(self.disagreements).mean().reshape(1))
            self._disagreement = float(mean.mean())
            self.disagreements = []
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._disagreement = None


RoseTrainer.__init__.__signature__ = with_trainers_arguments(  # type: ignore[attr-defined]
    RoseTrainer.__init__, "rose", "objective"
)
