"""What a run needs to know beside transformers' TrainingArguments. Each field is a command-line flag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from rose_ds.config import Keep, RoseConfig
from rose_ds.engines.registry import ENGINES
from rose_ds.experiments.methods import COMBINABLE_MASKS, COMBINABLE_OBJECTIVES, METHODS, method_named, method_with
from rose_ds.experiments.presets import PRESETS, FilledIn, fill_in
from rose_ds.objectives import OBJECTIVES, Objective, resolve

_ENGINE_CHOICES = ("auto", *ENGINES)

_Class = TypeVar("_Class", bound=type)


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass
class RunSettings:
    """Task, data and model."""

    _argument_group_name: ClassVar[str] = "task, data and model"

    task: str = field(
        default="snippets",
        metadata=_help("sst2, rte, qnli, qqp (GLUE and AdvGLUE) or snippets; with files of your own, a name."),
    )
    data: str | None = field(
        default=None,
        metadata=_help("Folder in GLUE's TSV layout, with AdvGLUE/dev.json. Default: the Hugging Face hub."),
    )
    train_file: str | None = field(
        default=None,
        metadata=_help(
            "Training rows of your own: .csv, .tsv, .json, .jsonl or .parquet; --task is then only their name."
        ),
    )
    validation_file: str | None = field(
        default=None,
        metadata=_help("Its clean dev set. Default: a tenth of the training file, by a hash of the text."),
    )
    adversarial_file: str | None = field(
        default=None,
        metadata=_help(
            "An adversarial set of the same layout; for GLUE's tasks also AdvGLUE's or AdvGLUE++'s JSON, a "
            "file or a folder of them."
        ),
    )
    dataset: str | None = field(
        default=None,
        metadata=_help("In place of files: NAME or NAME:CONFIG of any classification data set on the hub."),
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata=_help(
            "The one or two columns with the texts. Default: usual names, such as text or premise and hypothesis."
        ),
    )
    label_column: str = field(default="label", metadata=_help("The column with the labels, names or whole numbers."))
    drop_unlabelled: bool = field(
        default=False,
        metadata=_help("Leave out rows of your own whose label is empty or -1, as data sets of the hub mark them."),
    )
    file_encoding: str = field(default="utf-8", metadata=_help("Of your own text files, e.g. latin-1."))
    model: str = field(
        default="minilm",
        metadata=_help("minilm (the packaged 22.7M-parameter BERT), a folder, or a hub id such as roberta-base."),
    )
    max_length: int = field(default=128, metadata=_help("Longer inputs are cut to this many tokens."))
    engine: str = field(
        default="auto",
        metadata=_help(
            "Refuse to run on any other engine than this: " + ", ".join(_ENGINE_CHOICES) + ". The launcher and "
            "--deepspeed decide which engine it is."
        ),
    )
    max_train_samples: int | None = field(default=None, metadata=_help("Train on so many rows only, evenly spaced."))
    max_eval_samples: int | None = field(default=None, metadata=_help("Measure on so many rows only, evenly spaced."))
    record_masks: int = field(
        default=50,
        metadata=_help("Every so many optimizer steps record what the masks kept, for rose-ds inspect; 0: never."),
    )
    disagreement_steps: list[int] | None = field(
        default=None,
        metadata=_help(
            "After these optimizer steps measure how often two dropout passes give an item of the dev set two answers "
            "(Table 4: 200 600 2000 4000)."
        ),
    )
    perturb_seed: int = field(default=0, metadata=_help("Seed of the perturbed dev set."))

    @property
    def own_files(self) -> bool:
        """Whether the rows come from the user's own files or data set."""
        return any(name is not None for name in (self.train_file, self.validation_file, self.dataset))

    @property
    def task_name(self) -> str | None:
        """What own files are called: --task, unless it was left at its default."""
        return None if self.own_files and self.task == "snippets" else self.task

    def __post_init__(self) -> None:
        if self.engine not in _ENGINE_CHOICES:
            raise ValueError(f"engine={self.engine!r} is not one of {list(_ENGINE_CHOICES)}")
        if self.max_length < 8:
            raise ValueError(f"max_length={self.max_length} must be at least 8")
        if self.record_masks < 0:
            raise ValueError(f"record_masks={self.record_masks} must be at least 0")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def constant_flag(objective: str, constant: str) -> str:
    """The flag of an objective's constant: rdrop_alpha for alpha of r-drop."""
    return f"{objective.replace('-', '')}_{constant}"


class NumberOrName:
    """What argparse reads a word with: a float where it is one, else the word."""

    def __new__(cls, word: str) -> Any:
        """The value; never of this class."""
        try:
            return float(word)
        except ValueError:
            return word


def _generated() -> Iterator[tuple[str, Any, str]]:
    """Name, type and help of the flags for RoseConfig's fields and the objectives' constants."""
    for prefix, settings in (("", RoseConfig), *OBJECTIVES.items()):
        kinds = get_type_hints(settings)
        for f in fields(settings):
            text = f.metadata["help"]
            if f.name == "mask_seed":
                text += " Default: --seed."
            elif any(f.name in method.rose for method in METHODS.values()):
                text += " Default: the method's."
            elif f.default not in (None, (), MISSING):
                text += f" Default: {f.default}."
            yield constant_flag(prefix, f.name) if prefix else f.name, _flag_type(kinds[f.name]), text


def _flag_type(kind: Any) -> Any:
    """What HfArgumentParser turns into a flag that may be left out (None)."""
    if kind is bool:
        return bool  # "bool | None" would demand a value after the flag
    if get_origin(kind) is Literal:
        return str | None  # RoseConfig says what is wrong with a value, argparse would say it differently
    if kind == Keep:
        return NumberOrName | None
    if get_origin(kind) is tuple:
        return list[get_args(kind)[0]] | None  # type: ignore[misc]
    return kind | None


def _with_generated_flags(cls: _Class) -> _Class:
    """Class decorator, before dataclass(): those fields, None where a flag is not given."""
    for name, kind, text in _generated():
        cls.__annotations__[name] = kind
        setattr(cls, name, field(default=None, metadata=_help(text)))
    return cls


@dataclass
@_with_generated_flags
class MethodSettings:
    """How it is trained. What is None is the method's own; ``rose()`` and ``objective()`` say what that comes to."""

    _argument_group_name: ClassVar[str] = "method"

    method: str = field(
        default="",
        metadata=_help(
            f"One of: {', '.join(METHODS)}; or OBJECTIVE+MASK, e.g. r-drop+rose-first, with OBJECTIVE of "
            f"{', '.join(COMBINABLE_OBJECTIVES)} and MASK of {', '.join(COMBINABLE_MASKS)}. Default: rose-ensemble. "
            "--objective and --strategy say the same by the library's names."
        ),
    )
    objective_name: str | None = field(
        default=None,
        metadata=_help(
            f"What is minimised, in place of --method: {', '.join(OBJECTIVES)}. Default: task. With --strategy it "
            "makes a method: r-drop and first are r-drop+rose-first, r-drop and none are r-drop.",
            aliases=["--objective"],
        ),
    )
    preset: str | None = field(
        default=None,
        metadata=_help(
            f"Fill in what was published for the method and task on this size of model: {', '.join(PRESETS)}. It sets "
            "the model, batch, epochs, length and, for ROSE, --granularity too; whatever is given as a flag stays."
        ),
    )
    resume: str | None = field(
        default=None,
        metadata=_help(
            "auto: go on from the newest whole checkpoint in --output_dir; if there is none, from "
            "--resume_from_checkpoint, or else afresh."
        ),
    )
    class_weights: list[str] | None = field(
        default=None,
        metadata=_help(
            "Weights of the classes in the loss, in the order of the labels; or balanced: inverse to their "
            "numbers in the training set."
        ),
    )
    filled_in: FilledIn | None = field(default=None, init=False)
    """What the preset added."""
    chosen: bool = field(default=False, init=False)
    """Whether the method was said, by any of its flags, or is the default."""

    def __post_init__(self) -> None:
        if self.resume not in (None, "auto"):
            raise ValueError(f"resume={self.resume!r} must be auto; for a certain checkpoint: --resume_from_checkpoint")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is not one of {list(PRESETS)}")
        given = self._rose_flags()
        self.chosen = bool(self.method or self.objective_name or "strategy" in given)
        if not self.method:
            self.method = method_with(self.objective_name or "task", RoseConfig(**given)).name
        method = method_named(self.method)
        said = {"objective": self.objective_name, **given}
        for name, value in {"objective": method.objective, **method.rose}.items():
            if said.get(name) not in (None, value):
                raise ValueError(
                    f"method={self.method!r} has {name}={value!r}, not {said[name]!r}: give one of the two"
                )
        self._refuse_foreign_constants(method.objective)
        self.rose()
        self.objective()

    def rose(self, seed: int | None = None) -> RoseConfig:
        """Which parameters a step updates. ``seed``: the run's, which random masks follow unless they have their own.

        Raises:
            ValueError/TypeError: a setting has a bad value.
        """
        values = {**method_named(self.method).rose, **self._rose_flags()}
        if values["strategy"] == "random" and seed is not None:
            values.setdefault("mask_seed", seed)
        return RoseConfig.from_mapping(values)

    def objective(self) -> Objective:
        """What is minimised.

        Raises:
            ValueError/TypeError: a constant has a bad value.
        """
        name = method_named(self.method).objective
        constants = {f.name: getattr(self, constant_flag(name, f.name)) for f in fields(OBJECTIVES[name])}
        try:
            return resolve({"name": name, **{key: value for key, value in constants.items() if value is not None}})
        except (ValueError, TypeError) as error:  # the message begins with the constant
            raise type(error)(f"--{constant_flag(name, str(error))}") from error

    def _rose_flags(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in RoseConfig.field_names()}
        return {name: value for name, value in given.items() if value is not None}

    def _refuse_foreign_constants(self, objective: str) -> None:
        for other, constants in OBJECTIVES.items():
            for f in fields(constants):
                flag = constant_flag(other, f.name)
                if other != objective and getattr(self, flag) is not None:
                    raise ValueError(
                        f"--{flag} is a constant of objective {other}, but method {self.method} has objective "
                        f"{objective}: leave it out, or choose --method {other} or {other}+MASK"
                    )


def recorded(rose: RoseConfig, objective: Objective) -> dict[str, Any]:
    """A method's settings as metrics.json has them."""
    return {
        "rose": {} if rose.strategy == "none" else asdict(rose),
        "objective": objective.record(),
    }


def from_preset(given: Mapping[str, Any], world_size: int) -> FilledIn | None:
    """What --preset adds to the flags ``given``, by name; None where there is no --preset.

    Raises:
        ValueError: see ``rose_ds.experiments.presets.fill_in``; or a flag of the method has a bad value.
    """
    if given.get("preset") is None:
        return None
    names = {f.name for f in fields(MethodSettings)}
    method = MethodSettings(**{name: value for name, value in given.items() if name in names})
    return fill_in(given["preset"], method_named(method.method), given, world_size)
