"""Options of a run, in dataclasses: those of the engine and of a method, from and to YAML and `--set key=value`."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from engine.errors import UserError, nearest

# The method of a command or function that is given none.
DEFAULT_METHOD = "lethe_plus"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Implementation of the hot path.

    Attributes:
        backend: auto (Triton on CUDA, else eager) | triton | eager.
    """

    backend: Literal["auto", "triton", "eager"] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetaConfig:
    """Options of `retain_pruning=seta`, see engine/run/seta.py.

    Attributes:
        keep: Share (0, 1] of the retain set that an epoch draws at random.
        groups: Number of groups of similar loss, easiest first, that k-means makes of the drawn samples.
        window: Share (0, 1] of the groups that an epoch takes; 1: all drawn samples.
        anneal: Share [0, 1] of the epochs, the last ones, that only draw at random.
    """

    keep: float = 0.9
    groups: int = 5
    window: float = 0.6
    anneal: float = 0.125

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, "seta.keep", self.keep, "in (0, 1]")
        require(self.groups >= 1, "seta.groups", self.groups, "at least 1")
        require(0 < self.window <= 1, "seta.window", self.window, "in (0, 1]")
        require(0 <= self.anneal <= 1, "seta.anneal", self.anneal, "in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options that all methods share.

    Attributes:
        seed: Seed of the sample order, the augmentation, dropout and the method's own draws.
        batch_size: Samples per micro-batch and process.
        accumulation_steps: Micro-batches per optimizer step. A step takes batch_size x accumulation_steps x ranks
            samples.
        max_steps: Largest number of optimizer steps per phase, for trials; null: the number that follows from the
            epochs.
        precision: fp32 | bf16 (autocast) | auto: bf16 if the device multiplies it natively, else fp32.
        device: auto (CUDA if there is one) | cpu | cuda | cuda:N.
        attention: sdpa (fused) | eager (explicit), both of timm | xformers (memory-efficient attention of that package,
            an extra) | auto: sdpa on CUDA, eager on the CPU. On the CPU, the backward pass of fused attention costs
            more time than it saves by not storing the maps (docs/lab/2026-11-21.md).
        gradient_checkpointing: Store only the input of each block for the backward pass, and compute the block again.
        compile: torch.compile the model that is changed. It costs one compilation per phase; docs/lab has the gains.
        teacher: Placement of the original while it is needed, with several ranks: replicated (one copy per rank, in
            bf16 if DeepSpeed keeps weights in bf16) | sharded (ZeRO-3).
        checkpoint_every: Optimizer steps between checkpoints for resume, in addition to those at the end of each
            epoch; null: only those.
        timeout: Seconds that a collective operation waits for another rank before the run fails.
        workers: Processes that decode images; null: 0 if decoded images fit in memory, else up to 8.
        decode: draft (JPEGs at 1/2, 1/4 or 1/8 of their size, never below the size to which the model's input is
            resized) | full. With draft, pixels differ by about 2 of 255 levels; images of less than twice that size
            are identical bit for bit.
        on_bad_image: raise (stop at the first image that does not decode; the error names it and its file) | skip
            (leave it out).
        max_bad_share: With skip, the largest share [0, 1] of the samples that may be bad; above it the run is stopped.
        augment: none | flip | crop (random resized crop and flip) | auto. auto: none, unless mirroring is known to
            keep the label (cifar10, cifar100); then crop if images are larger than the model's input, else flip.
        trainable: all | head | last:N (the last N blocks and all after them: norms, head) | lora:R (updates of rank R
            of the linear layers of attention and MLP, merged at the end). All other weights are unchanged, bit for bit.
        retain_share: Share (0, 1] of the retain set that the run uses, chosen once before it.
        retain_choice: random (within each class) | hard (highest loss of the original) | near (closest to forget
            samples in the original's features), see engine/run/retain_subset.py. hard and near read the whole retain
            set once.
        retain_pruning: none | seta: every epoch on the retain set takes a part of it, chosen by the last losses (SeTa).
            Paired batches grow, so that an epoch has as many paired samples in fewer steps.
        seta: Options of `retain_pruning=seta`.
        stop_when: Early stopping: never | held_out: the run ends after an epoch of its last stage once the accuracy on
            the forget set is no higher than the original's on held-out samples of the same classes, see
            engine/run/early_stopping.py. It needs validation samples.
        stop_tolerance: Accuracy [0, 1) by which the forget set may be above, and held-out samples below, the threshold
            of stop_when.
        weight_decay: Decoupled weight decay of AdamW.
        grad_clip: Largest global gradient norm; 0: no clipping.
        expect_accuracy: Known accuracy (0, 1] of the original on the watched samples. A run whose original is far below
            it (by 5 points, and by more than sampling error) stops before its first step. null: not checked; an
            accuracy near chance is a warning. `lethe unlearn` checks retain samples too (--expect-accuracy).
        collapse_drop: Points of accuracy on the watched samples (validation, or the retain set if there is none) that
            a forget phase may lose. Beyond that it is stopped and its last good weights are restored. 100: never.
        evaluation_samples: Retained samples, and test samples, that the evaluation of the original and of the result in
            metrics.json and report.html takes, at equal distances; null: 50,000 retained samples, and all test samples.
        kernels: Implementation of the hot path.
    """

    seed: int = 0
    batch_size: int = 100
    accumulation_steps: int = 1
    max_steps: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    attention: Literal["auto", "sdpa", "eager", "xformers"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    teacher: Literal["replicated", "sharded"] = "replicated"
    checkpoint_every: int | None = None
    timeout: float = 1800.0
    workers: int | None = None
    decode: Literal["draft", "full"] = "draft"
    on_bad_image: Literal["raise", "skip"] = "raise"
    max_bad_share: float = 0.01
    augment: Literal["auto", "none", "flip", "crop"] = "auto"
    trainable: str = "all"
    retain_share: float = 1.0
    retain_choice: Literal["random", "hard", "near"] = "random"
    retain_pruning: Literal["none", "seta"] = "none"
    seta: SetaConfig = dataclasses.field(default_factory=SetaConfig)
    stop_when: Literal["never", "held_out"] = "never"
    stop_tolerance: float = 0.0
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    expect_accuracy: float | None = None
    collapse_drop: float = 35.0
    evaluation_samples: int | None = None
    kernels: KernelConfig = KernelConfig()

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.accumulation_steps >= 1, "accumulation_steps", self.accumulation_steps, "at least 1")
        require(
            self.checkpoint_every is None or self.checkpoint_every >= 1,
            "checkpoint_every",
            self.checkpoint_every,
            "at least 1, or null",
        )
        require(
            self.evaluation_samples is None or self.evaluation_samples >= 10,
            "evaluation_samples",
            self.evaluation_samples,
            "at least 10, or null",
        )
        require(self.timeout > 0, "timeout", self.timeout, "above 0 seconds")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1, or null")
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more, or null")
        expected = self.expect_accuracy
        require(expected is None or 0 < expected <= 1, "expect_accuracy", expected, "in (0, 1], or null")
        require(0 <= self.max_bad_share <= 1, "max_bad_share", self.max_bad_share, "in [0, 1]")
        require(
            re.fullmatch(r"all|head|last:[1-9]\d*|lora:[1-9]\d*", self.trainable) is not None,
            "trainable",
            self.trainable,
            "all, head, last:N or lora:R, with N or R at least 1",
        )
        require(0 < self.retain_share <= 1, "retain_share", self.retain_share, "in (0, 1]")
        require(0 <= self.stop_tolerance < 1, "stop_tolerance", self.stop_tolerance, "in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(self.grad_clip >= 0, "grad_clip", self.grad_clip, "0 or more")
        require(0 < self.collapse_drop <= 100, "collapse_drop", self.collapse_drop, "in (0, 100] points")


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Check the value of an option.

    Args:
        condition: Whether the value is valid.
        key: Name of the option.
        value: Its value.
        expected: Description of the valid values, for the error.

    Raises:
        UserError: The value is not valid.
    """
    if not condition:
        raise UserError(f"option {key}={value!r}: expected {expected}")


def positive_or_null(options: object, *keys: str) -> None:
    """Check that options are above 0, or None.

    Args:
        options: Dataclass of the options.
        keys: Names of the options to check.

    Raises:
        UserError: A value is 0 or less.
    """
    for key in keys:
        value = getattr(options, key)
        require(value is None or value > 0, key, value, "above 0, or null")


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse assignments of `--set` into nested options.

    Returns:
        Values by name, read as YAML; text that is not YAML is kept as it is.

    Raises:
        UserError: An assignment has no `=` or no key, or names a part of an option that has a value of its own.

    Example:
        >>> parse_assignments(["batch_size=64", "kernels.backend=eager"])
        {'batch_size': 64, 'kernels': {'backend': 'eager'}}
    """
    options: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {assignment!r}: expected key=value, such as --set lr=1e-4")
        node = options
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {assignment!r}: {parent} was given a value of its own before")
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError:
            node[leaf] = text
    return options


def split_options(options: Mapping[str, Any], method_config: type[T]) -> tuple[RunConfig, T]:
    """Split flat options into those of the run and those of the method.

    Args:
        options: Values by name.
        method_config: Dataclass of the method's options.

    Returns:
        (options of the run, options of the method).

    Raises:
        UserError: A name belongs to neither, or a value does not fit.
    """
    run_fields = {field.name for field in dataclasses.fields(RunConfig)}
    method_fields = {field.name for field in dataclasses.fields(method_config)}  # type: ignore[arg-type]
    for name in options:
        if name not in run_fields | method_fields:
            raise UserError(f"unknown option {name!r}{nearest(name, run_fields | method_fields)}")
    run = build(RunConfig, {k: v for k, v in options.items() if k in run_fields})
    return run, build(method_config, {k: v for k, v in options.items() if k in method_fields})


def build(cls: type[T], options: Mapping[str, Any], prefix: str = "") -> T:
    """Build a dataclass from plain values of YAML or the command line, each checked against its annotation.

    Args:
        cls: The dataclass.
        options: Values by name.
        prefix: Text before the names in errors, such as "kernels.".

    Raises:
        UserError: A name is unknown, or a value does not fit.
    """
    hints = typing.get_type_hints(cls)
    unknown = [name for name in options if name not in hints]
    if unknown:
        raise UserError(f"unknown option {prefix + unknown[0]!r}{nearest(unknown[0], hints)}")
    return cls(**{name: _coerce(value, hints[name], prefix + name) for name, value in options.items()})


def _coerce(value: Any, hint: Any, key: str) -> Any:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"option {key}={value!r}: expected a group of options, such as {key}.NAME=VALUE")
        return build(hint, value, prefix=f"{key}.")  # type: ignore[arg-type]
    if origin is Literal:
        if value not in choices:
            raise UserError(f"option {key}={value!r}{nearest(str(value), map(str, choices))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        return _coerce(value, next(c for c in choices if c is not type(None)), key)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            raise UserError(f"option {key}={value!r}: expected a number") from None
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"option {key}={value!r}: expected {hint.__name__}")


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the options of a YAML file.

    Raises:
        UserError: The file does not exist, is not YAML, or holds no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"config file {path}: expected a mapping of option names to values")
    return values
