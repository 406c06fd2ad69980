"""A run is a dataclass: the options of the engine and of a method, in and out of YAML and `--set key=value`."""

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

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Which implementation of the hot path runs.

    backend: auto (Triton on CUDA, else eager) | triton | eager.
    """

    backend: Literal["auto", "triton", "eager"] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetaConfig:
    """Options of `retain_pruning=seta`, see engine/run/seta.py.

    keep: share (0, 1] of the retained samples that an epoch draws at random. groups: of about the same loss, easiest
    first, that k-means makes of those. window: share (0, 1] of the groups that an epoch takes; 1: all that are drawn.
    anneal: share [0, 1] of the epochs, the last ones, that draw at random alone.
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
    """What every method shares.

    seed: of the sample order, the augmentation, dropout and the method's own draws.
    batch_size: samples a micro-batch and process.
    accumulation_steps: micro-batches an optimizer step; a step takes batch_size x accumulation_steps x ranks samples.
    max_steps: optimizer steps a phase at most; for trials. None: as the epochs say.
    precision: fp32, bf16 (autocast), or auto: bf16 where the device multiplies it natively, else fp32.
    device: auto (CUDA if there is one) | cpu | cuda | cuda:N.
    attention: sdpa (fused) | eager (explicit), of timm's implementations; xformers (memory-efficient attention of that
        package, an extra). auto: sdpa on CUDA, eager on the CPU, where the backward pass of fused attention takes
        longer than the maps it saves (docs/lab/2026-11-21.md).
    gradient_checkpointing: keep the input of each block alone for the backward pass, and compute the block again.
    compile: torch.compile the model that is changed. Costs a compilation a phase (docs/lab has what it gains).
    teacher: where the original lies while it is needed, when there are several ranks: replicated (a copy a rank, in
        bf16 where DeepSpeed keeps weights so) or sharded (ZeRO-3).
    checkpoint_every: optimizer steps between checkpoints to resume from, beside those at the end of each epoch; null:
        those alone.
    timeout: seconds after which a rank that does not answer is given up.
    workers: processes that decode images. None: 0 where decoded images fit in memory, else up to 8.
    decode: draft (JPEGs at 1/2, 1/4 or 1/8 of their size, never below what the model's input is resized to; pixels of
        such images then differ by some 2 of 255 levels) | full. Images less than twice that size are the same bits.
    on_bad_image: raise (stop at the first image that does not decode, naming it and its file) | skip (leave it out).
    max_bad_share: with skip, the share of the samples [0, 1] that may be bad before the run is given up.
    augment: auto | none | flip | crop (random resized crop and flip). auto: none, unless a mirrored image is known
        to show the same thing (cifar10, cifar100): then crop if images are larger than the model's input, else flip.
    trainable: all | head | last:N (the last N blocks and what follows them: norms, head) | lora:R (updates of rank R of
        the linear layers of attention and MLP, merged at the end). The other weights stay as they are, bit for bit.
    retain_share: share (0, 1] of the retained samples that the run works with, chosen once before it.
    retain_choice: random (within each class) | hard (highest loss of the original) | near (to forget samples, in the
        original's features), see engine/run/retain_subset.py. The last two read all retained samples once.
    retain_pruning: none | seta: every epoch on the retained samples takes a part of them, by their last losses (SeTa).
        What a step takes beside them grows, so that an epoch has as much of it in fewer steps. seta: its options.
    stop_when: never | held_out: the run ends after an epoch of its last stage when the forget samples are known no
        better than held-out samples of their classes were to the original, see engine/run/early_stopping.py. Needs
        validation samples.
    stop_tolerance: accuracy [0, 1) by which it may be better, and held-out samples worse, than asked.
    weight_decay, grad_clip: AdamW's decoupled decay; the largest global gradient norm (0: no clipping).
    expect_accuracy: accuracy (0, 1] that the original is known to have on the watched samples; a run whose original is
        far below it (5 points, and more than the sample explains) stops before its first step. null: not checked; an
        accuracy near chance is a warning. `lethe unlearn` checks retained samples too (--expect-accuracy).
    collapse_drop: points of accuracy on the watched samples (validation, or retain where there is none) that a
        forget phase may lose before it is stopped and taken back to its last good weights. 100 switches it off.
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
    """Raises the one form of error that a wrong option gets."""
    if not condition:
        raise UserError(f"option {key}={value!r}: expected {expected}")


def positive_or_null(options: object, *keys: str) -> None:
    """The same for options that are above 0, or None."""
    for key in keys:
        value = getattr(options, key)
        require(value is None or value > 0, key, value, "above 0, or null")


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["lr=1e-4", "kernels.backend=eager"]` -> `{"lr": 0.0001, "kernels": {"backend": "eager"}}`."""
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
    """Deals flat options out to the run and to the method; a name that neither has is an error."""
    run_fields = {field.name for field in dataclasses.fields(RunConfig)}
    method_fields = {field.name for field in dataclasses.fields(method_config)}  # type: ignore[arg-type]
    for name in options:
        if name not in run_fields | method_fields:
            raise UserError(f"unknown option {name!r}{nearest(name, run_fields | method_fields)}")
    run = build(RunConfig, {k: v for k, v in options.items() if k in run_fields})
    return run, build(method_config, {k: v for k, v in options.items() if k in method_fields})


def build(cls: type[T], options: Mapping[str, Any], prefix: str = "") -> T:
    """A dataclass from plain values (YAML, the command line), each checked against its annotation."""
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
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"config file {path}: expected a mapping of option names to values")
    return values
