"""What RoseTrainer runs for a micro-batch: its passes, its loss, and which of its predictions are compared."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rose_ds.engines.passes import Output, last_outputs, still_statistics
from rose_ds.engines.rng import RngState, replay
from rose_ds.errors import RefusedConfiguration
from rose_ds.training import checkpoints
from rose_ds.training.checked import CheckedTrainer
from rose_ds.training.predictions import find_logits, labels_in, positions_of, refuse_unclear_labels

_LOSS = "_rose_loss"


def _with_loss(logits: Tensor, loss: Tensor) -> Tensor:
    """A pass's logits with its loss on them, so that the one's graph does not outlive the other's. On a view of them:
    a loss that keeps its logits (binary cross-entropy) would have them keep it, and nothing would ever be freed.
    """
    logits = logits.view_as(logits)
    setattr(logits, _LOSS, loss)
    return logits


class MicroBatchTrainer(CheckedTrainer):
    """Trainer's ``compute_loss``, as a stepper needs it."""

    loss_is_scaled_for_ga: bool | None = None  # Trainer's, from transformers 5.19 on
    _loss_uses_count: bool | None = None
    stepper: Any
    """What trains; made by ``RoseTrainer``."""

    def _passes(
        self, model: nn.Module, inputs: dict[str, Any], count: Tensor | int | None, *, times: int, compares: bool
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """What a stepper runs for a batch: a forward pass, and ``times`` the loss that ``compute_loss`` found in it."""
        labels = labels_in(inputs, self.label_names)
        first = (
            next((x for x in inputs.values() if isinstance(x, Tensor) and x.dim()), None) if labels is None else labels
        )

        def forward() -> Tensor:
            engine = self.stepper.engine
            looks = compares and engine.loss_overwrites is None and not engine.compiled
            watching: AbstractContextManager[Iterable[Output]] = (
                last_outputs(engine.module) if looks else nullcontext(())
            )
            with self.compute_loss_context_manager(), watching as seen:
                # outputs that nobody looks at may cost a pass more, or be refused
                wanted = {"return_outputs": True} if compares else {}
                found = self.compute_loss(model, dict(inputs), **wanted, num_items_in_batch=count)
            if looks:
                engine.loss_overwrites = any(output.was_overwritten() for output in seen)
            loss, outputs = found if isinstance(found, tuple) else (found, None)
            if not compares:
                return _with_loss(loss.reshape(1), loss)  # a pass ends somewhere, and nobody looks at logits
            core = self.accelerator.unwrap_model(model)
            classes = getattr(getattr(core, "config", None), "num_labels", None)
            logits = find_logits(outputs, labels, None if first is None else first.shape[0], classes)
            refuse_unclear_labels(logits, labels, core)
            if loss.requires_grad and not logits.requires_grad:
                raise RefusedConfiguration(
                    f"{type(self).__name__}.compute_loss() returns logits that are cut off from the graph, so their "
                    'divergence has no gradient: return those that the loss was made of, or use strategy="second"'
                )
            return _with_loss(logits, loss)

        return forward, lambda logits: vars(logits).pop(_LOSS) * times

    def _positions(self, inputs: dict[str, Any], count: Tensor | int | None) -> dict[str, Any]:
        """Of a micro-batch of labelled tokens, what the divergence is taken of; it is divided as the loss is, also by a
        count of rows.
        """
        core, labels = self.accelerator.unwrap_model(self.model), labels_in(inputs, self.label_names)
        positions = positions_of(labels, core)
        of_rows = positions is None and labels is not None and labels.dim() == 1
        if count is None or (positions is None and not of_rows):
            return {"positions": positions}
        ranks = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        return {"positions": positions, "count": count / (self.current_gradient_accumulation_steps * ranks)}

    def _loss_is_whole(self, model: nn.Module, inputs: dict[str, Any], count: Tensor | int | None) -> bool:
        """Whether the loss is a mean over all micro-batches and ranks: divided by ``num_items_in_batch``.

        Trainer goes by signatures: a forward() with **kwargs, or any compute_loss_func, is believed to divide its loss
        by the count of all micro-batches and ranks. Most encoders and adapters do not, and their gradient would be as
        many times too large. So the first micro-batch's loss is computed for two counts, without dropout.
        """
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        if count is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return False
        if self.args.gradient_accumulation_steps * self.args.world_size == 1:
            return True  # one count for both
        if self._loss_uses_count is None:
            one, again, two = self._losses_of_counts(model, inputs, count)
            noise = 10 * abs(again - one) + 1e-6 * abs(one)  # of kernels that add up in any order
            told = checkpoints.gather((bool(one) and math.isfinite(one), abs(two - one) > noise))
            if not any(known for known, _ in told):
                return True  # of a loss of zero nothing can be said
            self._loss_uses_count = any(depends for known, depends in told if known)
        return self._loss_uses_count

    def _losses_of_counts(self, model: nn.Module, inputs: dict[str, Any], count: Tensor | int) -> list[float]:
        losses, now, core = [], RngState.now(), self.accelerator.unwrap_model(model)
        with self._without_metrics():
            for times in (1, 1, 2):
                with torch.no_grad(), replay(now), still_statistics(core), self.compute_loss_context_manager():
                    try:
                        model.eval()
                        found = self.compute_loss(model, dict(inputs), num_items_in_batch=count * times)
                    except Exception:  # a model that has a loss in training alone; what is wrong there too is raised
                        model.train()
                        now.restore()
                        found = self.compute_loss(model, dict(inputs), num_items_in_batch=count * times)
                    finally:
                        model.train()
                losses.append(float(found[0] if isinstance(found, tuple) else found))
        return losses

    @contextmanager
    def _without_metrics(self) -> Iterator[None]:
        """Put aside what TRL's trainers collect in compute_loss(), by mode, and report as their metrics."""
        kept, tokens = getattr(self, "_metrics", None), getattr(self, "_total_train_tokens", None)
        theirs = isinstance(kept, dict) and kept.keys() == {"train", "eval"}
        if theirs:
            self._metrics: Any = {mode: defaultdict(list) for mode in ("train", "eval")}
        try:
            yield
        finally:
            if theirs:
                self._metrics, self._total_train_tokens = kept, tokens

    def _own_count(self, inputs: dict[str, Any]) -> Tensor | int | None:
        """A micro-batch's own ``num_items_in_batch``, for a compute_loss_func that needs one. A collective."""
        return self._get_num_items_in_batch([inputs], self.args.device) if self.compute_loss_func is not None else None
