"""One training step, the same for every engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rose_ds.engines.average import WeightAverage
from rose_ds.engines.base import Engine
from rose_ds.engines.batch import PassBatch
from rose_ds.engines.checkpointing import (
    explaining_selective_checkpoints,
    refuse_checkpointing,
    refuse_overwriting,
)
from rose_ds.engines.passes import Forward, Loss, Sample
from rose_ds.engines.registry import engine_for
from rose_ds.engines.shift import EmbeddingShift
from rose_ds.engines.torch.plain import clip_factor
from rose_ds.errors import RefusedConfiguration
from rose_ds.exchange import explaining_lost_ranks
from rose_ds.masks import policy_of
from rose_ds.objectives import Objective, Task, resolve
from rose_ds.objectives.divergence import Comparison
from rose_ds.optimizer import RoseAdamW
from rose_ds.training.describe import describe
from rose_ds.training.fisher import mean_squared_gradient
from rose_ds.training.halves import halves_of
from rose_ds.training.loop_watch import LoopWatch
from rose_ds.training.masking import Masking
from rose_ds.training.method_state import MethodState
from rose_ds.training.predictions import distribution_of
from rose_ds.training.risk_average import RiskAverage, refuse_together
from rose_ds.training.step_report import StepReport, report_of

logger = logging.getLogger(__name__)

#: Steps in a row that may be skipped; fp16 with a high loss scale begins with some dozens.
_SKIPPED_IN_A_ROW = 100


class MicroBatchValues(TypedDict):
    """What ``Stepper.backward`` returns: detached values of this rank's micro-batch."""

    loss: Tensor
    kl: Tensor | None
    disagreement: Tensor | None
    """Fraction of the rows whose two dropout passes, where there were two, give two answers."""


def prepare(
    model: nn.Module,
    optimizer: RoseAdamW | None = None,
    *,
    objective: str | Mapping[str, Any] | Objective | None = None,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
) -> Stepper:
    """Make a training step out of a model and its RoseAdamW, whatever runs the model.

    Args:
        model: an nn.Module on this process; what DistributedDataParallel, FullyShardedDataParallel or fully_shard made
            of one (also through accelerate or torch.compile); or a DeepSpeedEngine (ZeRO 0 to 3).
        optimizer: the RoseAdamW over ``model.named_parameters()``, built after sharding; none for a DeepSpeedEngine,
            which has its own.
        objective: "task", "r-drop", "smart", "freelb", or one of ``rose_ds.objectives`` with its constants. None: the
            optimizer's (a DeepSpeed config can name it there), which is "task" unless it was told otherwise.
        accumulation_steps: micro-batches to an optimizer step; a DeepSpeedEngine has its own.
        max_grad_norm: clip the gradient's global L2 norm to this; None or 0: no clipping. A DeepSpeedEngine has its
            own.

    Raises:
        RefusedConfiguration: a setting under which a gradient would silently be wrong.
        TypeError/ValueError: arguments that do not fit together.
    """
    engine = engine_for(model, optimizer, accumulation_steps, max_grad_norm)
    return Stepper(engine, engine.optimizer.objective if objective is None else resolve(objective))


class Stepper:
    """``backward()`` then ``step()`` for every micro-batch; made by ``prepare``."""

    def __init__(self, engine: Engine, objective: Objective | None = None) -> None:
        self.engine, self.optimizer, self.config = engine, engine.optimizer, engine.optimizer.config
        self.objective = objective or Task()
        refuse_together(self.config, self.objective)
        self.policy = policy_of(self.config)
        self.last_report: StepReport | None = None
        """The last optimizer step's report."""
        self._skipped = 0
        """Steps in a row that changed nothing."""
        self._left_to_optimizer: list[RemovableHandle] = []
        several = self.config.compares_passes or not isinstance(self.objective, Task)
        self.optimizer.trained_objective = self.objective
        refuse_checkpointing(engine.module, twice=several)
        if several:
            refuse_overwriting(engine.module)
        EmbeddingShift.remove(engine.module)
        self._shifter = EmbeddingShift(engine.module) if self.objective.shifts else None
        self.state = MethodState(
            engine,
            keeps_mask=self.policy is not None and self.policy.refresh == "once",
            keeps_average=self.objective.average_decay(1) is not None,
            risk=RiskAverage(self.config) if self.config.keeps_risk else None,
        )
        """What the method keeps over the run, which a checkpoint must hold."""
        if hasattr(engine, "checkpoints"):
            engine.checkpoints.keep(self.state)
        self.halves = halves_of(self.config, engine)
        self.watch = LoopWatch(engine, self._needs_clip())
        self.masking = Masking(engine, self.policy, self.state, self.watch.tell, self.halves)

    @property
    def eligible(self) -> list[str]:
        """Names of the parameters that may be masked, in the model's order."""
        return self.engine.eligible

    def describe(self) -> str:
        """In words: engine, batch, what is masked and how much of the model it is, dropout, and memory."""
        return describe(self.engine, self.config, self.objective.name)

    @property
    def compares(self) -> bool:
        """Whether forward() must return logits: a mask or the objective compares predictions."""
        return self.objective.compares or self.config.compares_passes

    @property
    def samples_now(self) -> bool:
        """Whether the next ``backward()`` looks at ``sample``."""
        self.engine.agree_on_steps()
        fast = self.config.first_order == "fast" and self.config.risk_rows < 1
        return fast and self.masking.ranks_now() and self.masking.finds_risk_now()

    def backward(
        self,
        forward: Forward,
        loss: Loss,
        *,
        positions: Tensor | None = None,
        count: Tensor | float | None = None,
        sample: Sample | None = None,
        weight: Tensor | float = 1.0,
    ) -> MicroBatchValues:
        """Gradients of one micro-batch on this rank.

        Args:
            forward: runs the model on this rank's micro-batch and returns the logits, (batch, ..., classes). Called as
                often as the objective and the mask need passes; where an engine has to run a pass again, with that
                pass's random numbers.
            loss: scalar mean loss of a pass's logits, asked for right after that pass.
            positions: bool, (batch, ...): which of the logits' rows are predictions, for models that predict tokens;
                None: all. Padding would count in the divergence otherwise.
            count: this micro-batch's share of the positions of the whole step, where the loss is divided by such a
                count too; None: its own positions.
            weight: what the micro-batch counts in the step's loss beside the others, looked at by first_order="halves":
                where losses are divided by a count of the whole step (tokens), this rank's part of it, as a tensor.
            sample: the rows that first_order="fast" finds risk from, and how to run the model on them alone
                (``rose_ds.sample_rows`` chooses them); None: all of them. Not looked at otherwise.

        A model whose config.problem_type is multi_label_classification is compared label by label.

        Returns:
            The value that was minimised (the task loss; for other objectives all of it) and, where two passes were
            compared, their divergence and how often they disagreed; see MicroBatchValues.

        Raises:
            RuntimeError: ``step()`` was not called after the last ``backward()``, or two passes gave identical logits
                under a first-order strategy (no dropout).
            RankLost: another rank died, or made fewer calls.
        """
        self.watch.before_backward()
        if self.watch.dropped():
            self.engine.begin_step()
            self._forget_step()
            self.watch.check_progress()
        self.engine.agree_on_steps()
        state = self.state
        state.check()
        self.engine.follow_trainable(movable=state.selection is None and not state.keeps_average and state.risk is None)
        ranking = self.policy if self.masking.ranks_now() else None
        finds_risk = ranking is not None and ranking.ranks_risk and self.masking.finds_risk_now()
        if self.halves is not None:
            self.halves.count(weight, finds_risk=finds_risk)
        if self.state.keeps_average and self.state.average is None:
            self.state.average = WeightAverage(self.engine)
        with explaining_lost_ranks(self._next_step), self.engine.micro_batch():
            batch = PassBatch(
                self.engine,
                forward,
                loss,
                shifter=self._shifter,
                average=self.state.average,
                compare=Comparison(lambda: distribution_of(self.engine.module), positions, count),
                ranks_risk=finds_risk and self.halves is None,
                ranks_task=ranking is not None and ranking.ranks_task,
                one_sided=self.config.first_order == "fast",
                sample=sample,
            )
            try:
                with explaining_selective_checkpoints():
                    value = self.objective(batch)
            except BaseException as error:
                self._abandon_step(error)
                raise
            if not batch.trained:
                raise RuntimeError(f"objective {self.objective.name!r} ended without its last backward()")
        self.engine.first_passes_made()
        self.watch.after_backward()
        return {"loss": value, "kl": batch.divergence, "disagreement": batch.disagreed}

    def step(self) -> StepReport | None:
        """Count the micro-batch; at the accumulation boundary update the weights and zero the gradients.

        Returns None off the boundary. A step with a gradient that is not finite, on any rank, changes nothing and is
        reported as skipped.
        """
        self.watch.begin_step("step")
        self.masking.selection = None
        try:
            self.watch.check_untouched()
            with explaining_lost_ranks(self._next_step):
                outcome = self.engine.step(self.masking.decide)
        except BaseException as error:
            self._abandon_step(error)
            raise
        finally:
            self.optimizer.plan = None
        self.watch.stepped(whole=outcome is not None)
        if outcome is None:
            return None
        return self._finish(outcome.grad_norm, outcome.skipped)

    def leave_step_to_optimizer(
        self,
        *,
        last: bool,
        grad_norm: Callable[[], float | None] | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        """Instead of ``step()``, in loops that clip and call ``optimizer.step()`` themselves (transformers.Trainer).

        Call after every ``backward()``. After the ``last`` micro-batch, the masks are made when the optimizer steps,
        from the gradients it then holds; ``last_report`` tells of it. ``grad_norm`` gives the norm that the loop found
        before it clipped to ``max_grad_norm``: where it is not finite the step changes nothing. It may be left out
        where the loop does not clip, and must not with first_order="halves", or with R-Drop under a mask that ranks the
        task's gradient: both need to know what clipping did.

        Raises:
            TypeError: it was; or ``prepare`` was told to clip, which ``step()`` would do; or the engine is DeepSpeed's,
                which makes its steps itself.
            RefusedConfiguration: DDP has not reduced the last micro-batch's gradients.
        """
        if getattr(self.engine, "max_grad_norm", None):
            raise TypeError(
                "prepare(max_grad_norm=...) clips in step(), which leave_step_to_optimizer() is called in place of: "
                "leave it out, clip in the loop, and give max_grad_norm= and grad_norm= here"
            )
        if grad_norm is None and self.watch.needs_clip:
            raise TypeError(
                f"{self.watch.needs_clip}: give grad_norm= and max_grad_norm= (grad_norm=lambda: None where the loop "
                "does not clip)"
            )
        norm_of = grad_norm or (lambda: None)
        if not self.engine.gradients_may_be_dropped:
            raise TypeError(f"the {self.engine.name} engine makes its steps itself: call step() after every backward()")
        self.watch.begin_step("leave_step_to_optimizer")
        try:
            self.engine.count(last=last)
        except RefusedConfiguration as error:
            self._abandon_step(error)
            raise
        self.watch.left_to_optimizer(last=last)
        if last and not self._left_to_optimizer:  # a loop may give one step several last micro-batches

            def begin(*_: object) -> None:
                norm = norm_of()
                if norm is None and not self.engine.agree(self.watch.gradients_are_finite()):
                    norm = math.nan
                self.masking.decide(self.engine.slice_grads(), norm, clip=clip_factor(norm, max_grad_norm))

            def finish(*_: object) -> None:
                skipped = self.optimizer.skips
                self.watch.stepped(whole=True)
                self.detach()
                self._finish(norm_of(), skipped)

            self._left_to_optimizer = [
                self.optimizer.register_step_pre_hook(begin),
                self.optimizer.register_step_post_hook(finish),
            ]

    def detach(self) -> None:
        """Let the optimizer go: whatever is left of a step under way is not waited for."""
        for handle in self._left_to_optimizer:
            handle.remove()
        self._left_to_optimizer, self.optimizer.plan = [], None

    # --- methods that look at the data first, or keep something over the run ---

    @property
    def needs_fisher_pass(self) -> bool:
        """Whether ``fisher_pass`` is still to be called: before the first step, and not after ``load_state``."""
        return self.masking.needs_fisher_pass

    def fisher_pass(self, batches: Iterable[tuple[Forward, Loss]], max_grad_norm: float | None = None) -> None:
        """Child-Tuning_D's mask, from the mean squared gradient of the task loss over ``batches``.

        Nothing is trained. Every rank must give the same number of batches; the gradient of a batch is that of all
        ranks together.

        Args:
            batches: (forward, loss) as for ``backward``, usually one for each batch of an epoch.
            max_grad_norm: clip each parameter's gradient of a batch alone, as the method's authors do.
        """
        if self.policy is None or not self.policy.fisher:
            raise ValueError(f"strategy={self.config.strategy!r} needs no fisher_pass()")
        self.state.check()
        with explaining_lost_ranks(lambda: "the Fisher pass"):
            fisher = mean_squared_gradient(self.engine, batches, max_grad_norm)
            self.masking.find_once(fisher)

    def save_state(self, folder: str | Path) -> None:
        """Write what the method keeps over a run (a mask found once, averaged weights or risks) beside a checkpoint.

        A collective; a DeepSpeedEngine's save_checkpoint() and RoseTrainer do it themselves.
        """
        self.state.save(Path(folder))

    def load_state(self, folder: str | Path) -> None:
        """Read what ``save_state`` wrote, on any number of ranks. Call it when weights and optimizer are loaded."""
        self.state.load(Path(folder))

    def gather_parameters(self) -> dict[str, Tensor]:
        """Full fp32 parameters by their unwrapped names, on every rank: a collective, for models that fit."""
        return self.engine.gather_parameters()

    # --- inside a step ---

    def _needs_clip(self) -> str:
        """Why the factor must be known by which the gradient is clipped; empty where it does not matter."""
        if self.halves is not None:
            return 'first_order="halves" compares a step\'s gradient before clipping with that of its first half'
        if self.objective.trains_on_risk and self.policy is not None and self.policy.ranks_task:
            return f"objective {self.objective.name!r} trains on more than the task's gradient, which alone is ranked"
        return ""

    def _next_step(self) -> str:
        return f"optimizer step {self.optimizer.steps_taken() + 1}"

    def _abandon_step(self, error: BaseException) -> None:
        """The step under way has failed."""
        self.engine.abandon(error)
        self._forget_step()
        if self._shifter is not None:
            self._shifter.set(None)

    def _forget_step(self) -> None:
        """What was kept apart for the step under way, or is left of it."""
        self.engine.forget_risk_grads()
        if self.halves is not None:
            self.halves.forget()

    def _finish(self, grad_norm: float | None, skipped: bool) -> StepReport:
        """After an optimizer step: the average moves, and a report is made."""
        self.engine.stepped()
        self._forget_step()
        decay = self.objective.average_decay(self.optimizer.steps_taken())
        if decay is not None and self.state.average is not None and not skipped:
            self.state.average.update(decay)
        # or its masks would be there during the next backward pass
        found, self.masking.selection = self.masking.selection, None
        report = self.last_report = report_of(
            self.optimizer.steps_taken(), self.engine.layout, self.config.granularity, found, grad_norm, skipped=skipped
        )
        if report.step > 1 and report.kept_fraction == 1 and not self.config.keeps_all:
            self.watch.tell(
                "all", f"strategy {self.config.strategy!r} kept every parameter, since so many risks are equal"
            )
        self._skipped = self._skipped + 1 if skipped else 0
        if skipped:
            logger.warning("a gradient was not finite: nothing was updated (after %d steps)", report.step)
        if self._skipped >= _SKIPPED_IN_A_ROW:
            ranked = "ranked " if found is not None and not found.finite else ""
            raise RuntimeError(
                f"{self._skipped} steps in a row were skipped, since the {ranked}gradient was not "
                "finite: nothing is trained any more. Resume from a checkpoint before it began with a lower "
                "learning rate, or in another precision; or look for logits that are infinite or NaN"
            )
        return report
