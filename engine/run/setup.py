"""Set up a run: resolve options, check data and ranks, make models, phases and trainer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from engine.config import RunConfig, split_options, to_dict
from engine.core.method import refuse_unfit
from engine.core.result import AfterPhase, Progress
from engine.data import Loader, Preprocessing, Samples, from_dataset
from engine.data.readable import bad_images, same_random_numbers, without
from engine.data.samples import evenly_spaced
from engine.errors import UserError
from engine.methods import Context, Method, Phase, get_method
from engine.models.attention import attention_backend
from engine.models.checkpoint import weights_sha256
from engine.models.info import num_classes_of
from engine.models.last_block import truncate_last_block
from engine.models.preprocessing import preprocessing_of
from engine.models.spec import spec_of
from engine.models.trainable import refuse_sharding, restrict
from engine.models.vit import checkpoint_blocks, describe
from engine.models.xformers_attention import resolve_attention
from engine.run import folder as runfolder
from engine.run.collapse_guard import watched_count
from engine.run.early_stopping import HeldOutStop, check_stop
from engine.run.retain_subset import choose_retained
from engine.run.seta import check_pruning, pruned_phases
from engine.run.train_engine import TrainEngine
from engine.run.trainer import Trainer
from engine.run.zero import (
    ZeroTrainEngine,
    half_weights,
    read_deepspeed,
    release_frozen,
    require_deepspeed,
    resolve_deepspeed,
    shard_frozen,
)
from engine.runtime.allocator import keeping_freed_memory
from engine.runtime.device import autocast, resolve_device, resolve_precision
from engine.runtime.process_group import ProcessGroup, init_process_group
from lethe_kernels import resolve_backend

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Arguments of `engine.unlearn` that set up a run; see there.

    Attributes:
        method: Name of the method.
        config: Options of `RunConfig` and of the method by name.
        validation: Held-out samples; None if there are none.
        original: The model before earlier requests; None: the one that is unlearned.
        inplace: Change the caller's model.
        output_dir: Run folder; None writes nothing.
        resume: Continue the run in the run folder.
        overwrite: Replace that run.
        progress: Called with (phase, step, steps, numbers) as losses are read.
        after_phase: Called with (phase, model) at the end of each phase.
        notes: Further entries of config.yaml.
        deepspeed: DeepSpeed configuration, or its JSON file.
    """

    method: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    validation: Samples | Dataset[Any] | None = None
    original: nn.Module | None = None
    inplace: bool = False
    output_dir: str | os.PathLike[str] | None = None
    resume: bool = False
    overwrite: bool = False
    progress: Progress | None = None
    after_phase: AfterPhase | None = None
    notes: Mapping[str, Any] | None = None
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and how a run computes.

    Attributes:
        run: Options of the run with device, precision and attention resolved.
        device: Device of this rank.
        world: Process group.
        zero: DeepSpeed configuration with the run's values in it; None for plain torch on one process.
        preprocessing: How images are resized and normalised for the model.
    """

    run: RunConfig
    device: torch.device
    world: ProcessGroup
    zero: dict[str, Any] | None
    preprocessing: Preprocessing

    @property
    def loading(self) -> dict[str, Any]:
        """Options of `Loader` for reading images."""
        run = self.run
        return {
            "workers": run.workers,
            "device": self.device,
            "world": self.world,
            "on_bad_image": run.on_bad_image,
            "max_bad_share": run.max_bad_share,
            "decode": run.decode,
        }

    def loader(self, samples: Samples, augment: str, **options: Any) -> Loader:
        """Return the batches of samples with the run's options.

        Args:
            samples: The samples.
            augment: Augmentation, see `RunConfig.augment`.
            options: Options of `Loader` in place of the run's.
        """
        shared = {"batch_size": self.run.batch_size, "seed": self.run.seed, **self.loading}
        return Loader(samples, self.preprocessing, augment=augment, **{**shared, **options})

    def autocast(self) -> Any:
        """Return the context manager in which the model computes."""
        half = self.zero is not None and half_weights(self.zero)
        return autocast(self.device, "fp32" if half else self.run.precision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is set up and has not begun.

    Attributes:
        resolved: Every option, and what was decided.
        method: The method.
        teacher: The original as the method reads it.
        train_engine: The model that is changed, and its optimizer.
        trainer: Runs the phases.
        phases: Phases in order.
        environment: Where and how the run computes.
    """

    resolved: dict[str, Any]
    method: Method
    teacher: nn.Module
    train_engine: TrainEngine
    trainer: Trainer
    phases: list[Phase]
    environment: Environment

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Set the attention backend of both models, and keep freed memory in the process, for the next step."""
        context = self.method.context
        with contextlib.ExitStack() as stack:
            stack.enter_context(keeping_freed_memory(context.device))
            for model in (self.teacher, self.train_engine.module):
                stack.enter_context(attention_backend(model, context.run.attention))
                stack.enter_context(truncate_last_block(model))
            yield

    def loader_of(self, number: int, phase: Phase) -> Loader:
        """Return the batches of a phase; `number` is its position in `phases`."""
        run, pruned = self.method.context.run, self.trainer.pruned.get(number)
        part: dict[str, Any] = {"counts": pruned.counts, "chosen": pruned.positions} if pruned else {}
        return self.environment.loader(
            self.method.samples_of(phase),
            run.augment if phase.augment else "none",
            seed=run.seed * 1009 + number,
            micro=run.accumulation_steps,
            batch_size=phase.size(run.batch_size),
            **part,
        )

    def paired_loader(self, number: int, phase: Phase) -> Loader | None:
        """Return the paired batches of a phase; None if it has none. `number` is its position in `phases`."""
        if phase.paired is None:
            return None
        context, pruned = self.method.context, self.trainer.pruned.get(number)
        run = context.run
        augmented = phase.augment if phase.augment_paired is None else phase.augment_paired
        return self.environment.loader(
            {"forget": context.forget, "retain": context.retain}[phase.paired],
            run.augment if augmented else "none",
            seed=run.seed * 1009 + 500 + number,
            micro=run.accumulation_steps,
            batch_size=phase.paired_size(run.batch_size, pruned.grown if pruned else 1.0),
        )


def set_up(original: nn.Module, forget: Samples, retain: Samples, options: RunOptions) -> Run:
    """Resolve options, check data and ranks, and make models, phases and trainer; errors as of `engine.unlearn`."""
    method = get_method(options.method)
    run, config = split_options(options.config, method.Config)
    run = _resolve(run)
    _check_model(method, original)
    before = _before(options, method, original)
    info = describe(original)
    watched = retain if options.validation is None else from_dataset(options.validation, "validation")
    _check_data(original, forget, retain, watched)
    why_one_process = method.why_one_process(config, len(forget), len(retain))
    environment = _environment(run, why_one_process, original, options, forget, retain)
    with same_random_numbers():
        environment.preprocessing.check(forget)
    out_of = len(forget) + len(retain)
    unreadable = bad_images(forget, environment.preprocessing, out_of=out_of, **environment.loading)
    if not method.exact:  # an exact method only needs the ids
        forget = without(forget, unreadable)
    resolved = _to_resolved(environment, config, options, forget, retain, len(unreadable))
    zero, world = environment.zero, environment.world
    ranks = zero if world.size > 1 else None
    teacher, release = _frozen(before, environment.device, run, ranks, options.inplace and before is original)
    run = dataclasses.replace(run, augment=_augmentation(run.augment, environment.loader, retain, forget))  # type: ignore[arg-type]
    resolved["augment"] = run.augment
    everything = retain
    retain = choose_retained(run, teacher, forget, retain, environment.loader, environment.autocast, world)
    if retain is not everything:
        resolved["samples"] |= {"retain_used": len(retain), "retain_used_sha256": retain.fingerprint()}
    context = Context(
        run=run,
        original=teacher,
        info=info,
        forget=forget,
        retain=retain,
        preprocessing=environment.preprocessing,
        device=environment.device,
        autocast=environment.autocast,
        loader=environment.loader,
        held_out=None if options.validation is None else watched,
        world=world,
    )
    unlearner = method(config, context)
    phases = unlearner.phases()
    stop = _early_stopping(run, unlearner, phases)
    pruned = pruned_phases(run, phases, len(forget), len(retain))
    check_pruning(run, options.method, pruned)
    # Forgetting a class without retain samples is not a collapse, so the watched samples leave it out.
    watched = watched.of_classes(everything.labels) or watched
    folder = spec = None
    if options.output_dir is not None:
        spec = spec_of(original)  # raises an error for a model that cannot be saved before the work, not after it
        folder = runfolder.RunFolder(
            options.output_dir, resolved, resume=options.resume, overwrite=options.overwrite, world=world
        )
    train_engine = _train_engine(unlearner, original if options.inplace else copy.deepcopy(original), run, environment)
    trainer = Trainer(
        train_engine=train_engine,
        method=unlearner,
        run=run,
        folder=folder,
        progress=options.progress,
        after_phase=options.after_phase,
        watched_samples=evenly_spaced(watched, watched_count(phases, len(forget), len(retain)), "watched"),
        loader=environment.loader,
        release=release,
        spec=spec,
        pruned=pruned,
        early_stopping=stop,
        later=before is not original,
    )
    trainer.bad_images.update(unreadable)
    return Run(
        resolved=resolved,
        method=unlearner,
        teacher=teacher,
        train_engine=train_engine,
        trainer=trainer,
        phases=phases,
        environment=environment,
    )


def _resolve(run: RunConfig) -> RunConfig:
    """Resolve device, precision, attention and kernels of a run."""
    device = resolve_device(run.device)
    precision = resolve_precision(run.precision, device)
    attention = resolve_attention(run.attention, device, precision)
    try:
        for op in ("attention_rollout", "mask_patches", "info_nce"):
            resolve_backend(op, run.kernels.backend, device)
    except RuntimeError as error:
        raise UserError(f"option kernels.backend={run.kernels.backend!r}: {error}") from None
    return dataclasses.replace(run, device=str(device), precision=precision, attention=attention)


def _check_model(method: type[Method], original: nn.Module) -> None:
    refuse_unfit(method, original)
    if method.initial_model is Method.initial_model and not any(p.requires_grad for p in original.parameters()):
        raise UserError(
            "every weight of the model is frozen (requires_grad=False), so nothing of it could be changed; call "
            "model.requires_grad_(True) first"
        )


def _before(options: RunOptions, method: type[Method], model: nn.Module) -> nn.Module:
    """Return the model before earlier requests, checked against the one that is unlearned; this one if it was first.

    A module that holds the same tensors as `model`, such as a wrapper of it, is that model.
    """
    before = options.original
    if before is None or {p.data_ptr() for p in before.parameters()} & {p.data_ptr() for p in model.parameters()}:
        return model
    if not method.takes_original:
        raise UserError(
            f"original: method {options.method} takes the model that it changes as the original; leave it out, or use "
            "lethe_plus"
        )
    refuse_unfit(method, before)
    mine, theirs = num_classes_of(model), num_classes_of(before)
    if mine != theirs or preprocessing_of(model) != preprocessing_of(before):
        what = f"it has {theirs} classes, the model {mine}" if mine != theirs else "it takes images of another kind"
        raise UserError(f"original: {what}; give the model that the earlier requests were forgotten from")
    return before


def _environment(
    run: RunConfig, why_one_process: str, original: nn.Module, options: RunOptions, forget: Samples, retain: Samples
) -> Environment:
    """Join the process group and check that it suits the run."""
    world = init_process_group(run.device, run.timeout)
    if options.deepspeed is not None and why_one_process:
        raise UserError(f"method {options.method}: {why_one_process}; run it on one process, without DeepSpeed")
    zero = _resolve_zero(options.deepspeed, run, world)
    _check_ranks(run, world, zero, forget, retain)
    return Environment(
        run=run, device=torch.device(run.device), world=world, zero=zero, preprocessing=preprocessing_of(original)
    )


def _to_resolved(
    environment: Environment, config: Any, options: RunOptions, forget: Samples, retain: Samples, unreadable: int
) -> dict[str, Any]:
    """Return the contents of config.yaml."""
    return {
        "method": options.method,
        **to_dict(environment.run),
        **to_dict(config),
        **dict(options.notes or {}),
        "ranks": environment.world.size,
        **({"deepspeed": environment.zero} if environment.zero else {}),
        **({"original_sha256": weights_sha256(options.original)} if options.original is not None else {}),
        "samples": {
            "forget": len(forget),
            "retain": len(retain),
            "forget_sha256": forget.fingerprint(),
            "retain_sha256": retain.fingerprint(),
            **({"forget_unreadable": unreadable} if unreadable else {}),
        },
    }


def _early_stopping(run: RunConfig, method: Method, phases: list[Phase]) -> HeldOutStop | None:
    if run.stop_when == "never":
        return None
    check_stop(method, phases)
    return HeldOutStop(method, phases)


def _train_engine(method: Method, start: nn.Module, run: RunConfig, environment: Environment) -> TrainEngine:
    """Return the model that is changed, and its optimizer; `start` is the original, or a copy of it."""
    zero = environment.zero
    student = method.initial_model(start).to(environment.device)
    restrict(student, run.trainable, run.seed)
    if zero:
        refuse_sharding(student, zero)
    if run.gradient_checkpointing:
        checkpoint_blocks(student)
    if run.compile:
        student.compile()
    scales = method.lr_scales(student)
    if zero and scales:
        raise UserError("option layer_decay: DeepSpeed has one rate for all weights; leave it out, or --deepspeed")
    return ZeroTrainEngine(student, run, zero) if zero else TrainEngine(student, run, scales)


def _augmentation(augment: str, loader: Callable[..., Loader], retain: Samples, forget: Samples) -> str:
    """Return what the run's option `augment` resolves to for its samples."""
    if augment != "auto":
        return augment
    found = loader(retain if len(retain) else forget, augment).augment
    _note_augmentation(retain.name, found, retain.natural)
    return found


@functools.cache  # once a process: searches set up many runs
def _note_augmentation(name: str, found: str, natural: bool) -> None:
    why = "" if natural else "; images of this source are not known to allow mirroring: --set augment=flip if they do"
    logger.info("augment=auto is augment=%s for %s%s", found, name, why)


def _resolve_zero(
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None, run: RunConfig, world: ProcessGroup
) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration with the run's values in it; None for plain torch on one process."""
    if deepspeed is None:
        if world.size > 1:
            raise UserError(
                f"{world.size} ranks were started without a DeepSpeed configuration, so each would make a model of "
                "its own; give --deepspeed configs/zero2.json (stage 0 is plain data parallel), or start one process"
            )
        return None
    require_deepspeed()
    return resolve_deepspeed(read_deepspeed(deepspeed), run, world.size)


def _check_ranks(
    run: RunConfig, world: ProcessGroup, zero: dict[str, Any] | None, forget: Samples, retain: Samples
) -> None:
    smallest = min((s for s in (forget, retain) if len(s)), key=len)
    if world.size > len(smallest):
        raise UserError(
            f"{world.size} ranks for the {len(smallest)} samples of {smallest.name}: some would have none; start "
            f"at most {len(smallest)}"
        )
    if run.compile and zero is not None:
        raise UserError("option compile=true: DeepSpeed runs are not compiled; leave out one of the two")
    if run.teacher == "sharded" and (zero is None or zero["zero_optimization"]["stage"] != 3):
        raise UserError("option teacher='sharded' shares out the original as ZeRO-3 does; it needs --deepspeed stage 3")


def _frozen(
    original: nn.Module, device: torch.device, run: RunConfig, zero: dict[str, Any] | None, changing: bool
) -> tuple[nn.Module, Callable[[], None]]:
    """Return (the original as methods read it, a function that frees its memory).

    On one process whose device is that of the caller's model, the original shares the weights of that model and nothing
    is copied, unless the caller's model is the one that is changed.

    Args:
        original: The caller's model, or that before earlier requests.
        device: Device of the run.
        run: Options of the run.
        zero: DeepSpeed configuration if there are several ranks, else None.
        changing: The caller's model is changed (`inplace`).
    """
    shares = zero is None and not changing and next(original.parameters()).device == device
    memo = {id(t): t for t in (*original.parameters(), *original.buffers())} if shares else {}
    teacher = copy.deepcopy(original, memo).eval()
    if shares:
        return teacher, lambda: None
    teacher.requires_grad_(False)
    if zero is not None and half_weights(zero):
        teacher.bfloat16()
    if zero is not None and run.teacher == "sharded":
        teacher = shard_frozen(teacher, zero)
    else:
        teacher.to(device)

    return teacher, lambda: release_frozen(teacher)


def _check_data(model: nn.Module, forget: Samples, retain: Samples, watched: Samples) -> None:
    classes = num_classes_of(model)
    for samples in (forget, retain, watched):
        if not len(samples):
            if samples is not forget:
                raise UserError(f"{samples.name}: no samples; the run needs samples to retain and to check accuracy on")
            continue
        if samples.labels.max() >= classes:
            worst = int(samples.labels.argmax())
            raise UserError(
                f"{samples.name}: sample {samples.ids[worst]!r} has label {samples.labels[worst]}, but the "
                "model's head has "
                f"{classes} classes; use the checkpoint trained on these labels"
            )
