"""Train or evaluate one model on one task."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from rose_ds.analysis.disagreement import DisagreementCallback
from rose_ds.config import RoseConfig
from rose_ds.data import padding_collator, tokenize
from rose_ds.eligible import eligible_names
from rose_ds.errors import RefusedConfiguration
from rose_ds.experiments import provenance
from rose_ds.experiments.card import write_card
from rose_ds.experiments.evaluation import Evaluator, TrajectoryCallback, write_predictions
from rose_ds.experiments.loading import load_data
from rose_ds.experiments.losses import weighted_loss, weights_of
from rose_ds.experiments.methods import method_with
from rose_ds.experiments.metrics import FILE as METRICS
from rose_ds.experiments.metrics import Metrics
from rose_ds.experiments.models import check_length, label_names, label_order, load_model, load_tokenizer
from rose_ds.experiments.rehearsal import first_step, shorten
from rose_ds.experiments.saving import refuse_unsavable, save_result
from rose_ds.experiments.settings import MethodSettings, RunSettings, recorded
from rose_ds.objectives import Objective, resolve
from rose_ds.training import checkpoints
from rose_ds.training.same_run import precision_of, schedule_of
from rose_ds.training.sole_use import sole_use_of
from rose_ds.training.trainer import RoseTrainer

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def train(run: RunSettings, method: MethodSettings, args: TrainingArguments) -> Metrics:
    """Train, evaluate, save the model and metrics.json in ``args.output_dir``. Every rank calls it.

    Raises:
        DataError, ModelError, RefusedConfiguration: before any training; also where another job uses the folder.
        CheckpointError: a checkpoint or the model could not be written.
        SystemExit: SIGTERM came; a checkpoint was saved, and nothing else was written.
    """
    with sole_use_of(Path(args.output_dir)):
        return _train(run, method, args)


def _train(run: RunSettings, method: MethodSettings, args: TrainingArguments) -> Metrics:
    trainer, evaluator = _build(run, method, args)
    name, rose, objective = _method_used(method, trainer)
    weights = trainer.fixed_settings["class weights"]
    meter = trainer.measure()
    trainer.add_callback(TrajectoryCallback(trainer, evaluator, Path(args.output_dir)))
    if run.record_masks:
        trainer.record_masks = Path(args.output_dir), run.record_masks
    if run.disagreement_steps:
        rows = evaluator.rows["clean"]
        trainer.add_callback(DisagreementCallback(trainer, rows, run.disagreement_steps, Path(args.output_dir)))
    result = trainer.train(resume_from_checkpoint=_checkpoint(method, trainer))
    found = evaluator.final(trainer)
    metrics = Metrics(
        task=evaluator.task,
        model=run.model,
        method=name,
        seed=args.seed,
        engine=trainer.engine_name,
        world_size=args.world_size,
        precision=precision_of(args),
        steps=trainer.state.global_step,
        train_seconds=meter.earlier_seconds + result.metrics["train_runtime"],
        step_seconds=meter.median_step_seconds,
        kept_fraction=meter.kept_fraction,
        skipped_steps=meter.skipped,
        peak_memory_bytes=trainer.peak_memory_bytes(),
        config={**_config(run, args), **recorded(rose, objective), "preset": _preset(method), "class_weights": weights},
        commit=provenance.commit(),
        packages=provenance.packages(),
        hardware=provenance.hardware(),
        **evaluator.figures(found),
    )
    if trainer.took_no_step:
        _take_over(metrics, Path(args.output_dir))
    if trainer.is_fsdp_enabled:  # checkpoints stay sharded if the config says so; the result is one whole model
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")

    def others(folder: Path) -> None:
        write_predictions(folder, found)
        names = trainer.model.config.id2label  # a head of another order keeps it
        write_card(folder, metrics, [names[i] for i in sorted(names)])
        metrics.write(folder)

    save_result(trainer, Path(args.output_dir), others)
    return metrics


def rehearse(run: RunSettings, method: MethodSettings, args: TrainingArguments) -> str:
    """Take a run's first step without writing anything, and say what the run is going to be. Every rank calls it.

    Raises:
        As ``train``.
    """
    planned = shorten(args)
    return first_step(_build(run, method, args)[0], planned)


def _build(run: RunSettings, method: MethodSettings, args: TrainingArguments) -> tuple[RoseTrainer, Evaluator]:
    """Everything that training needs; what can be refused before, is."""
    _refuse_mixing(method, args)
    refuse_unsavable(args)
    _refuse_unmeasured(args)
    set_seed(args.seed)
    tokenizer = load_tokenizer(run.model)
    check_length(run.model, tokenizer, run.max_length)
    data = load_data(run)
    if data.train is None:
        raise RefusedConfiguration(
            "nothing to train on: --validation_file alone is for rose-ds evaluate; add --train_file"
        )
    weights = None
    if method.class_weights is not None:
        weights = weights_of(method.class_weights, data.train["label"], data.spec.labels)
    if args.deepspeed:
        # on CPUs transformers starts torch.distributed alone, and ZeRO-3 would load the model for a world of one
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo" if args.use_cpu else None)
    model = load_model(run.model, data.spec)
    rose = method.rose(args.seed)
    if rose.strategy != "none":
        eligible_names(rose, {n: getattr(p, "ds_shape", p.shape) for n, p in model.named_parameters()})
    order = label_order(model.config, data.spec)
    evaluator = Evaluator(data, tokenizer, run, order)
    trainer = RoseTrainer(
        model=model,
        args=args,
        train_dataset=tokenize(data.train, data.spec, tokenizer, run.max_length, order),
        eval_dataset=evaluator.rows.get("clean"),
        data_collator=padding_collator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=evaluator.compute_metrics,
        compute_loss_func=None if weights is None else weighted_loss(weights, order, args.label_smoothing_factor),
        rose=rose,
        objective=method.objective() if method.chosen else None,  # None: a DeepSpeed config may have one
    )
    trainer.steady_evaluations = True
    _check_engine(run.engine, trainer)
    _method_used(method, trainer)
    trainer.fixed_settings = {**_fixed(run, trainer), "class weights": weights}
    return trainer, evaluator


def evaluate(run: RunSettings, args: TrainingArguments) -> Metrics:
    """Evaluate a trained classifier, and write metrics.json in ``args.output_dir``.

    Raises:
        DataError, ModelError: the data or model cannot be loaded or do not fit each other.
    """
    output = Path(args.output_dir)
    of_models = [path for part in ("*.safetensors", "*.bin", METRICS) for path in output.glob(part)]
    if (output / "config.json").is_file() and of_models:
        raise ValueError(f"--output_dir {args.output_dir} is a model's own folder, whose record of its training stays")
    _refuse_unmeasured(args)
    labels = label_names(run.model) if run.own_files else None
    data = load_data(run, ("validation", "adversarial"), labels)
    tokenizer = load_tokenizer(run.model)
    check_length(run.model, tokenizer, run.max_length)
    model = load_model(run.model, data.spec, trained=True)
    evaluator = Evaluator(data, tokenizer, run, label_order(model.config, data.spec))
    trainer = RoseTrainer(
        model=model,
        args=args,
        data_collator=padding_collator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=evaluator.compute_metrics,
        rose=RoseConfig(strategy="none"),
    )
    found = evaluator.measure(trainer)
    metrics = Metrics(
        task=data.spec.name,
        model=run.model,
        engine="plain" if args.world_size == 1 else None,
        world_size=args.world_size,
        precision=precision_of(args),
        config=asdict(run),
        commit=provenance.commit(),
        packages=provenance.packages(),
        hardware=provenance.hardware(),
        **evaluator.figures(found),
    )
    if (Path(run.model) / "metrics.json").is_file():  # what it was trained with
        trained = Metrics.read(Path(run.model))
        for name in _OF_TRAINING:
            setattr(metrics, name, getattr(trained, name))
    if trainer.is_world_process_zero():
        write_predictions(Path(args.output_dir), found)
        metrics.write(Path(args.output_dir))
    return metrics


def _take_over(metrics: Metrics, folder: Path) -> None:
    """The command was given again when the run was done: what only the run itself could measure, and attacks since."""
    try:
        before = Metrics.read(folder)
    except ValueError:  # none, or damaged
        return
    if before.steps == metrics.steps:
        for name in ("under_attack", "step_seconds", "peak_memory_bytes"):
            setattr(metrics, name, getattr(before, name))


def _check_engine(wanted: str, trainer: RoseTrainer) -> None:
    actual = trainer.engine_name
    if wanted not in ("auto", actual):
        how = {"ze": f"deepspeed launch/train.py --deepspeed ds_configs/{wanted}.json", "fs": "accelerate launch"}
        raise RefusedConfiguration(
            f"--engine {wanted} was asked for, but this run is on {actual}: start it with "
            f"{how.get(wanted[:2], 'one process' if wanted == 'plain' else 'torchrun')}, or use --engine auto"
        )


def _refuse_unmeasured(args: TrainingArguments) -> None:
    """What would leave a finished run without its answers."""
    for name, bad in (("prediction_loss_only", True), ("eval_do_concat_batches", False)):
        if getattr(args, name) is bad:
            raise RefusedConfiguration(f"--{name} {str(bad).lower()} leaves no answers to count: leave it out")


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
    if given and method.resume != "auto" and Path(given).resolve().parent == Path(args.output_dir).resolve():
        whole, _ = checkpoints.whole_in(Path(args.output_dir))
        step = next((step for step, folder in whole.items() if folder.name == Path(given).name), None)
        later = [folder.name for other, folder in sorted(whole.items()) if step is not None and other > step]
        if later:
            raise RefusedConfiguration(
                f"{args.output_dir} holds later checkpoints than {Path(given).name} ({', '.join(later)}), which "
                "--resume auto would take the next time: move them away, or choose another --output_dir"
            )


def _checkpoint(method: MethodSettings, trainer: RoseTrainer) -> Path | None:
    given = trainer.args.resume_from_checkpoint
    folder = None if given is None else Path(given)
    if method.resume != "auto":
        return folder
    # the run's own goes before the one that it began with, which a job that is put back into a queue names again
    folder = trainer.newest_checkpoint() or folder
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


#: Fields of metrics.json that an evaluation takes from the model's own.
_OF_TRAINING = (
    "method",
    "seed",
    "engine",
    "world_size",
    "steps",
    "train_seconds",
    "step_seconds",
    "kept_fraction",
    "skipped_steps",
    "peak_memory_bytes",
)

#: TrainingArguments that metrics.json records.
_RECORDED = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "warmup_steps",
    "train_sampling_strategy",
)


def _config(run: RunSettings, args: TrainingArguments) -> dict[str, Any]:
    training = {name: getattr(args, name) for name in _RECORDED}
    return {**asdict(run), **training, "lr_scheduler_type": schedule_of(args), "deepspeed": args.deepspeed}


def _preset(method: MethodSettings) -> dict[str, Any] | None:
    return None if method.filled_in is None else asdict(method.filled_in)


def _method_used(method: MethodSettings, trainer: RoseTrainer) -> tuple[str, RoseConfig, Objective]:
    """The method's name and settings: the flags', or those of the DeepSpeed config's RoseAdamW block."""
    settings = trainer.method_settings()
    objective = resolve(settings.pop("objective"))
    rose = RoseConfig.from_mapping(settings)
    asked = method.rose(trainer.args.seed)
    if (asked.strategy == rose.strategy == "none" or asked == rose) and objective == method.objective():
        return method.method, rose, objective
    if method.chosen or any(getattr(method, name) is not None for name in RoseConfig.field_names()):
        flags = {"objective": method.objective().name, **asdict(method.objective()), **asdict(asked)}
        block = {"objective": objective.name, **asdict(objective), **asdict(rose)}
        raise RefusedConfiguration(
            "the flags and the DeepSpeed config's RoseAdamW block say different things (flags -> block): "
            f"{', '.join(checkpoints.changed(flags, block))}. Leave one of them out"
        )
    return method_with(objective.name, rose).name, rose, objective
