"""Train or evaluate one model on one task."""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import set_seed

from rose_ds.data import TaskData, assign_families, load_task, padding_collator, perturb, tokenize
from rose_ds.data.loading import SPLITS
from rose_ds.engines.base import RefusedConfiguration
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.models import load_model, load_tokenizer
from rose_ds.experiments.settings import METHODS, MethodSettings, RunSettings
from rose_ds.resuming import precision_of, schedule_of
from rose_ds.trainer import RoseTrainer

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def train(run: RunSettings, method: MethodSettings, args: TrainingArguments) -> Metrics:
    """Train, evaluate, save the model and metrics.json in ``args.output_dir``. Every rank calls it.

    Raises:
        DataError, ModelError, RefusedConfiguration: before any training.
        CheckpointError: a checkpoint could not be written.
        SystemExit: SIGTERM came; a checkpoint was saved, and nothing else was written.
    """
    _refuse_mixing(method, args)
    _refuse_unsavable(args)
    set_seed(args.seed)
    data = _load(run)
    assert data.train is not None
    tokenizer = load_tokenizer(run.model)
    if args.deepspeed:
        # on CPUs transformers starts torch.distributed alone, and ZeRO-3 would load the model for a world of one
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo" if args.use_cpu else None)
    model = load_model(run.model, data.spec)
    rose = method.rose()
    if rose.strategy != "none":
        rose.eligible(name for name, p in model.named_parameters() if p.requires_grad)
    trainer = RoseTrainer(
        model=model,
        args=args,
        train_dataset=tokenize(data.train, data.spec, tokenizer, run.max_length),
        eval_dataset=None
        if data.validation is None
        else tokenize(data.validation, data.spec, tokenizer, run.max_length),
        data_collator=padding_collator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=_accuracy_of,
        rose=rose,
    )
    _check_engine(run.engine, trainer)
    trainer.fixed_settings = _fixed(run, trainer)
    meter = trainer.measure()
    result = trainer.train(resume_from_checkpoint=_checkpoint(method, trainer))
    metrics = Metrics(
        task=data.spec.name,
        model=run.model,
        method=method.method,
        seed=args.seed,
        engine=trainer.engine_name,
        world_size=args.world_size,
        precision=precision_of(args),
        steps=trainer.state.global_step,
        train_seconds=meter.earlier_seconds + result.metrics["train_runtime"],
        step_seconds=statistics.median(meter.step_seconds[2:] or meter.step_seconds) if meter.step_seconds else None,
        kept_fraction=meter.kept_fraction,
        skipped_steps=meter.skipped,
        config=_config(run, method, args),
        **accuracies(trainer, data, tokenizer, run),
    )
    if trainer.is_fsdp_enabled:  # checkpoints stay sharded if the config says so; the result is one whole model
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        metrics.write(Path(args.output_dir))
    return metrics


def evaluate(run: RunSettings, args: TrainingArguments) -> Metrics:
    """Evaluate a trained classifier, and write metrics.json in ``args.output_dir``.

    Raises:
        DataError, ModelError: the data or model cannot be loaded or do not fit each other.
    """
    data = _load(run, splits=("validation", "adversarial"))
    tokenizer = load_tokenizer(run.model)
    trainer = RoseTrainer(
        model=load_model(run.model, data.spec, trained=True),
        args=args,
        data_collator=padding_collator(tokenizer),
        processing_class=tokenizer,
        rose=MethodSettings(method="vanilla").rose(),
    )
    metrics = Metrics(
        task=data.spec.name,
        model=run.model,
        engine="plain" if args.world_size == 1 else None,
        world_size=args.world_size,
        precision=precision_of(args),
        config=asdict(run),
        **accuracies(trainer, data, tokenizer, run),
    )
    if (Path(run.model) / "metrics.json").is_file():  # what it was trained with
        trained = Metrics.read(Path(run.model))
        for name in (
            "method",
            "seed",
            "engine",
            "world_size",
            "steps",
            "train_seconds",
            "step_seconds",
            "kept_fraction",
        ):
            setattr(metrics, name, getattr(trained, name))
    if trainer.is_world_process_zero():
        metrics.write(Path(args.output_dir))
    return metrics


def _load(run: RunSettings, splits: Sequence[str] = SPLITS) -> TaskData:
    """The task's splits, thinned out where a run asks for fewer rows; files may be sorted by label."""
    data = load_task(run.task, run.data, splits=splits)

    def thinned(dataset: Any, count: int | None) -> Any:
        if dataset is None or count is None or count >= len(dataset):
            return dataset
        return dataset.select([i * len(dataset) // count for i in range(count)])

    return replace(
        data,
        train=thinned(data.train, run.max_train_samples),
        validation=thinned(data.validation, run.max_eval_samples),
        adversarial=thinned(data.adversarial, run.max_eval_samples),
    )


def accuracies(trainer: RoseTrainer, data: TaskData, tokenizer: Any, run: RunSettings) -> dict[str, Any]:
    """Accuracy on the clean, adversarial and perturbed dev sets, by metrics.json's names."""
    spec = data.spec
    found: dict[str, Any] = {}

    def correct(dataset: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
        prediction = trainer.predict(tokenize(dataset, spec, tokenizer, run.max_length))
        return _correct(prediction.predictions, prediction.label_ids)

    if data.validation is not None:
        found["glue_accuracy"] = float(correct(data.validation).mean())
        hit = correct(perturb(data.validation, spec.fields, seed=run.perturb_seed))
        found["perturbed_accuracy"] = float(hit.mean())
        families = np.array(assign_families(len(hit), run.perturb_seed))
        found["perturbed_by_family"] = {str(f): float(hit[families == f].mean()) for f in np.unique(families)}
    if data.adversarial is not None:
        found["advglue_accuracy"] = float(correct(data.adversarial).mean())
    return found


def _check_engine(wanted: str, trainer: RoseTrainer) -> None:
    actual = trainer.engine_name
    if wanted not in ("auto", actual):
        how = {"ze": f"deepspeed launch/train.py --deepspeed ds_configs/{wanted}.json", "fs": "accelerate launch"}
        raise RefusedConfiguration(
            f"--engine {wanted} was asked for, but this run is on {actual}: start it with "
            f"{how.get(wanted[:2], 'one process' if wanted == 'plain' else 'torchrun')}, or use --engine auto"
        )


def _refuse_mixing(method: MethodSettings, args: TrainingArguments) -> None:
    given = args.resume_from_checkpoint
    if given and not Path(given).is_dir():
        raise RefusedConfiguration(f"--resume_from_checkpoint {given} is not a folder")
    earlier = [path.name for path in Path(args.output_dir).glob("checkpoint-*")]
    if earlier and not given and method.resume != "auto":
        raise RefusedConfiguration(
            f"{args.output_dir} holds an earlier run's checkpoints ({', '.join(sorted(earlier))}): go on with --resume "
            "auto, or choose another --output_dir"
        )


def _checkpoint(method: MethodSettings, trainer: RoseTrainer) -> Path | None:
    if trainer.args.resume_from_checkpoint:
        return Path(trainer.args.resume_from_checkpoint)
    if method.resume != "auto":
        return None
    folder = trainer.newest_checkpoint()
    logger.info("resuming from %s", folder or "nothing: no whole checkpoint yet")
    return folder


def _fixed(run: RunSettings, trainer: RoseTrainer) -> dict[str, Any]:
    """What a resumed run must share, beside what RoseTrainer knows."""
    rows: Any = trainer.train_dataset
    sample = hashlib.sha256()
    for i in range(0, len(rows), max(1, len(rows) // 100)):
        sample.update(repr(sorted(rows[i].items())).encode())
    return {
        "task": run.task,
        "model": Path(run.model).name,  # a folder may have moved
        "max_length": run.max_length,
        "max_train_samples": run.max_train_samples,
        "training data": sample.hexdigest()[:12],
    }


def _refuse_unsavable(args: TrainingArguments) -> None:
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if deepspeed is not None and deepspeed.is_zero3() and not deepspeed.is_true(key):
        raise RefusedConfiguration(f"at ZeRO-3 the trained model cannot be saved whole without {key}: set it to true")


#: TrainingArguments that metrics.json records.
_RECORDED = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "warmup_steps",
)


def _config(run: RunSettings, method: MethodSettings, args: TrainingArguments) -> dict[str, Any]:
    training = {name: getattr(args, name) for name in _RECORDED}
    training["lr_scheduler_type"] = schedule_of(args)
    rose = {} if METHODS[method.method] == "none" else asdict(method.rose())
    return {**asdict(run), **training, "rose": rose, "deepspeed": args.deepspeed}


def _correct(predictions: Any, labels: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return np.asarray(np.argmax(logits, axis=-1) == labels)


def _accuracy_of(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(_correct(prediction.predictions, prediction.label_ids).mean())}
