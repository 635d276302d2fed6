"""What a run needs to know beside transformers' TrainingArguments. Each field is a command-line flag."""

from __future__ import annotations

from dataclasses import dataclass, field

from rose_ds.config import RoseConfig

#: Method -> ROSE strategy. "vanilla" is AdamW.
METHODS = {"vanilla": "none", "rose-first": "first", "rose-second": "second", "rose-ensemble": "ensemble"}
ENGINES = ("auto", "plain", "ddp", "fsdp1", "fsdp2", "zero0", "zero1", "zero2", "zero3")


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class RunSettings:
    """Task, data and model."""

    task: str = field(default="snippets", metadata=_help("sst2, rte, qnli, qqp (GLUE and AdvGLUE) or snippets."))
    data: str | None = field(
        default=None,
        metadata=_help("Folder in GLUE's TSV layout, with AdvGLUE/dev.json. Default: the Hugging Face hub."),
    )
    model: str = field(
        default="minilm",
        metadata=_help("minilm (the packaged 22.7M-parameter BERT), a folder, or a hub id such as roberta-base."),
    )
    max_length: int = field(default=128, metadata=_help("Longer inputs are cut to this many tokens."))
    engine: str = field(
        default="auto",
        metadata=_help(
            "Refuse to run on any other engine than this: " + ", ".join(ENGINES) + ". The launcher and "
            "--deepspeed decide which engine it is."
        ),
    )
    max_train_samples: int | None = field(default=None, metadata=_help("Train on so many rows only, evenly spaced."))
    max_eval_samples: int | None = field(default=None, metadata=_help("Measure on so many rows only, evenly spaced."))
    perturb_seed: int = field(default=0, metadata=_help("Seed of the perturbed dev set."))

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is not one of {list(ENGINES)}")
        if self.max_length < 8:
            raise ValueError(f"max_length={self.max_length} must be at least 8")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclass
class MethodSettings:
    """How it is trained. keep_*, gamma, granularity and the patterns only matter to ROSE."""

    method: str = field(default="", metadata=_help("One of: " + ", ".join(METHODS) + ". Default: rose-ensemble."))
    strategy: str | None = field(
        default=None, metadata=_help("The same by RoseConfig's names: none, first, second or ensemble.")
    )
    granularity: str = field(default="element", metadata=_help("What is kept or frozen: element or tensor."))
    keep_first: float = field(default=0.6, metadata=_help("Fraction kept by first-order risk, in (0, 1]."))
    keep_second: float = field(default=0.6, metadata=_help("Fraction kept by second-order risk, in (0, 1]."))
    gamma: float = field(default=0.5, metadata=_help("Weight of the first-order mask in the ensemble, in [0, 1]."))
    include: list[str] = field(
        default_factory=lambda: list(RoseConfig().include),
        metadata=_help("Regular expressions over parameter names; only these may be frozen."),
    )
    exclude: list[str] = field(default_factory=list, metadata=_help("Regular expressions that take names out again."))
    mask_warmup_steps: int = field(default=0, metadata=_help("First steps that update everything."))
    resume: str | None = field(
        default=None,
        metadata=_help("auto: go on from the newest whole checkpoint in --output_dir; start afresh if there is none."),
    )

    def __post_init__(self) -> None:
        by_strategy = {strategy: method for method, strategy in METHODS.items()}
        if self.strategy is not None and self.strategy not in by_strategy:
            raise ValueError(f"strategy={self.strategy!r} is not one of {list(by_strategy)}")
        self.method = self.method or by_strategy[self.strategy or "ensemble"]
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not one of {list(METHODS)}")
        if self.strategy not in (None, METHODS[self.method]):
            raise ValueError(f"method={self.method!r} has another strategy than {self.strategy!r}: give one of the two")
        if self.resume not in (None, "auto"):
            raise ValueError(f"resume={self.resume!r} must be auto; for a certain checkpoint: --resume_from_checkpoint")
        self.rose()

    def rose(self) -> RoseConfig:
        """The settings of ROSE that the flags ask for."""
        return RoseConfig.from_mapping(
            {
                "strategy": METHODS[self.method],
                "granularity": self.granularity,
                "keep_first": self.keep_first,
                "keep_second": self.keep_second,
                "gamma": self.gamma,
                "include": tuple(self.include),
                "exclude": tuple(self.exclude),
                "mask_warmup_steps": self.mask_warmup_steps,
            }
        )
