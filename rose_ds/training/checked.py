"""What RoseTrainer refuses or warns of, and in which words."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from rose_ds.config import RoseConfig
from rose_ds.engines.dropout import find_dropout
from rose_ds.errors import RefusedConfiguration
from rose_ds.hardware import slow_bf16
from rose_ds.objectives import Objective, resolve
from rose_ds.optimizer import RoseAdamW
from rose_ds.training.resuming import ResumableTrainer
from rose_ds.training.same_run import precision_of

logger = logging.getLogger(__name__)

#: Trainer's spellings of the AdamW that RoseAdamW is.
_ADAMW = ("adamw_torch", "adamw_torch_fused")
#: Layers whose dropout can be seen in their attributes.
_KNOWN = ("torch.", "transformers.", "peft.")


class CheckedTrainer(ResumableTrainer):
    """Settings under which RoseTrainer would not do what it says, by name and with the way out."""

    rose: RoseConfig
    rose_objective: Objective
    optimizer: Any

    def _refuse(self) -> None:
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise RefusedConfiguration(
                "RoseTrainer makes its own RoseAdamW: remove optimizers= and optimizer_cls_and_kwargs=, and pass "
                "rose=RoseConfig(...)"
            )
        self._refuse_other_optimizers()
        if (self.args.fp16 or getattr(self.accelerator, "scaler", None) is not None) and not self.is_deepspeed_enabled:
            raise RefusedConfiguration(
                "fp16=True (or accelerate's mixed_precision) without DeepSpeed scales the loss outside the "
                'engine: use bf16=True, or a DeepSpeed config with "fp16"'
            )
        if self.args.n_gpu > 1:
            raise RefusedConfiguration(
                "several GPUs in one process (nn.DataParallel) are not supported: start one process for each GPU with "
                "deepspeed, torchrun or accelerate launch, or show one process one of them (CUDA_VISIBLE_DEVICES=0)"
            )
        split = getattr(self.accelerator, "parallelism_config", None)
        if split is not None and split.cp_size > 1:
            raise RefusedConfiguration(
                f"parallelism_config.cp_size={split.cp_size} splits sequences over ranks, which RoseTrainer does not "
                "do, and its losses would be divided for a split that is not there: use cp_size=1"
            )
        if self.is_fsdp_enabled:
            self._refuse_other_blocks()
        rose = self._settings_of_masks()
        if rose.uses_first and rose.first_order == "halves" and self.args.gradient_accumulation_steps == 1:
            raise RefusedConfiguration(
                'first_order="halves" compares the two halves of a step\'s micro-batches: set '
                "gradient_accumulation_steps to 2 or more (and per_device_train_batch_size to as much less), or use "
                'first_order="fast"'
            )
        if (rose.compares_passes or self.rose_objective.compares) and not _takes_return_outputs(self.compute_loss):
            raise RefusedConfiguration(
                f"{type(self).__name__}.compute_loss() has no return_outputs, and this method compares the logits of "
                "two passes: take return_outputs=False, and return (loss, outputs) where it is True"
            )
        if self.args.use_liger_kernel and (rose.compares_passes or self.rose_objective.compares):
            wanted = self.args.liger_kernel_config or {}
            if any(wanted.get(kernel, kernel != "cross_entropy") for kernel in ("swiglu", "geglu", "cross_entropy")):
                raise RefusedConfiguration(
                    "use_liger_kernel=True writes gradients over what a forward pass kept, and a micro-batch of "
                    "several passes looks at it twice, so gradients would be wrong: set liger_kernel_config="
                    '{"swiglu": False, "geglu": False}, or leave use_liger_kernel out'
                )
        reason = slow_bf16(self.args.device) if precision_of(self.args) == "bf16" else None
        if reason and self.args.process_index == 0:
            logger.warning(reason)
        block = self._deepspeed_optimizer_block()
        if block is not None and block.get("type") != "RoseAdamW":
            raise RefusedConfiguration(
                f"the DeepSpeed config's optimizer is {block.get('type')!r}: remove the block (RoseTrainer brings "
                'RoseAdamW), or set its "type" to "RoseAdamW"'
            )

    def _refuse_other_blocks(self) -> None:
        """A class that accelerate would look for in vain when it shards."""
        classes = {type(module).__name__ for module in self.model.modules()}
        wanted = self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap or []
        if set(wanted) - classes:
            own = [name for name in getattr(self.model, "_no_split_modules", None) or [] if "Embedding" not in name]
            raise RefusedConfiguration(
                f"the accelerate config's fsdp_transformer_layer_cls_to_wrap names {', '.join(wanted)}, and this model "
                f"has no such layers: set it to {', '.join(own) or 'the class of its blocks'}"
            )

    def _refuse_other_optimizers(self) -> None:
        args, own = (
            self.args,
            type(self).get_optimizer_cls_and_kwargs is not ResumableTrainer.get_optimizer_cls_and_kwargs,
        )
        asked = {
            f"optim={str(getattr(args.optim, 'value', args.optim))!r}": args.optim not in _ADAMW,
            f"optim_args={args.optim_args!r}": args.optim_args,
            f"optim_target_modules={args.optim_target_modules!r}": args.optim_target_modules,
            f"{type(self).__name__}.get_optimizer_cls_and_kwargs()": own,
        }
        for what, there in asked.items():
            if there:
                raise RefusedConfiguration(
                    f"{what} asks for another optimizer, or other groups, and ROSE's masks are those of RoseAdamW, "
                    "AdamW with the learning rate, betas, epsilon and weight decay of TrainingArguments: leave it out, "
                    "or use transformers.Trainer"
                )

    def _settings_of_masks(self) -> RoseConfig:
        """Those of the DeepSpeed config where it has an optimizer block, which then must not differ from ``rose=``."""
        block = self._deepspeed_optimizer_block()
        if block is None or block.get("type") != "RoseAdamW":
            return self.rose
        names = RoseConfig.field_names()
        return RoseConfig.from_mapping({k: v for k, v in block.get("params", {}).items() if k in names})

    def _deepspeed_optimizer_block(self) -> dict[str, Any] | None:
        if not self.is_deepspeed_enabled:
            return None
        block: dict[str, Any] | None = self.accelerator.state.deepspeed_plugin.hf_ds_config.config.get("optimizer")
        return block

    def _refuse_without_dropout(self) -> None:
        rose = self._settings_of_masks()
        if not rose.compares_passes or self.args.neftune_noise_alpha or find_dropout(self.model):
            return
        if not all(type(m).__module__.startswith(_KNOWN) for m in self.model.modules()):
            return  # somebody's own layers may be random; the first step finds out
        config = getattr(self.model, "config", None)
        keys = [key for key in (config.to_dict() if config is not None else {}) if "drop" in key]
        raise RefusedConfiguration(
            f'strategy="{rose.strategy}" compares two dropout passes, but every dropout probability of this model '
            f"is 0: set {' or '.join(keys[:4]) + ' in its config' if keys else 'one'} above 0, or choose "
            'strategy="second"'
        )

    def _objective(self, given: str | Mapping[str, Any] | Objective | None) -> Objective:
        named = (self._deepspeed_optimizer_block() or {}).get("params", {}).get("objective")
        if given is not None and named is not None and resolve(given) != resolve(named):
            raise RefusedConfiguration(
                f"the DeepSpeed config's RoseAdamW block says objective={named!r}, objective= says {given!r}: keep one"
            )
        return resolve(named if given is None and named is not None else given or "task")

    def _check_own_optimizer(self) -> None:
        """Of a subclass whose create_optimizer() is its own."""
        made = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate has wrapped it by now
        if not self.is_deepspeed_enabled and not isinstance(made, RoseAdamW):
            raise RefusedConfiguration(
                f"{type(self).__name__}.create_optimizer() makes {type(made).__name__}, which knows no masks: let it "
                "make rose_ds.RoseAdamW from the same groups, with (name, parameter) pairs as their params and the "
                "settings of ROSE as keywords"
            )

    def _check_agreement(self, used: RoseConfig) -> None:
        if used != self.rose:
            if self.rose != RoseConfig():
                raise RefusedConfiguration(
                    f"the DeepSpeed config's RoseAdamW block says {used}, rose= says {self.rose}: keep one of them"
                )
            self.rose = used


def _takes_return_outputs(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters
    except (TypeError, ValueError):  # of compiled ones nobody knows
        return True
    return "return_outputs" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
