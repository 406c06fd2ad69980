"""Everything of a run but its steps: options resolved, data and ranks checked, models and phases made."""

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
from engine.data import Loader, Samples, from_dataset
from engine.data.readable import bad_images, same_random_numbers, without
from engine.data.samples import evenly_spaced
from engine.errors import UserError
from engine.methods import Context, Method, Phase, get_method
from engine.models.attention import attention_backend
from engine.models.info import num_classes_of
from engine.models.last_block import truncate_last_block
from engine.models.preprocessing import preprocessing_of
from engine.models.spec import spec_of
from engine.models.trainable import refuse_sharding, restrict
from engine.models.vit import checkpoint_blocks, describe
from engine.models.xformers_attention import resolve_attention
from engine.run import folder as runfolder
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

# Samples that each look at a model's accuracy takes.
WATCHED = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is set up and has not begun: what its steps are made of, `computing` around them.

    resolved: every option, and what was decided. teacher: the original as the method looks at it.
    loader_of: the batches of a phase, by the phase and its number. beside_of: those beside them, where it has any.
    """

    resolved: dict[str, Any]
    method: Method
    teacher: nn.Module
    train_engine: TrainEngine
    trainer: Trainer
    phases: list[Phase]
    loader_of: Callable[[int, Phase], Loader]
    paired_loader: Callable[[int, Phase], Loader | None]

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, both models compute as the run wants it, and the process keeps the memory that a step frees."""
        context = self.method.context
        with contextlib.ExitStack() as stack:
            stack.enter_context(keeping_freed_memory(context.device))
            for model in (self.teacher, self.train_engine.module):
                stack.enter_context(attention_backend(model, context.run.attention))
                stack.enter_context(truncate_last_block(model))
            yield


def _augmentation(asked: str, loader: Callable[..., Loader], retain: Samples, forget: Samples) -> str:
    """What the run's option `augment` comes to for its samples."""
    if asked != "auto":
        return asked
    found = loader(retain if len(retain) else forget, asked).augment
    _note_augmentation(retain.name, found, retain.natural)
    return found


@functools.cache  # once a process: searches set up many runs
def _note_augmentation(name: str, found: str, natural: bool) -> None:
    why = "" if natural else "; images of this source are not known to allow mirroring: --set augment=flip if they do"
    logger.info("augment=auto is augment=%s for %s%s", found, name, why)


def set_up(
    original: nn.Module,
    forget: Samples,
    retain: Samples,
    *,
    method: str,
    options: Mapping[str, Any],
    validation: Samples | Dataset[Any] | None = None,
    inplace: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    after_phase: AfterPhase | None = None,
    notes: Mapping[str, Any] | None = None,
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Run:
    """Everything of a run but its steps; arguments and errors as of `unlearn`."""
    method_class = get_method(method)
    run, method_config = split_options(options, method_class.Config)
    device = resolve_device(run.device)
    precision = resolve_precision(run.precision, device)
    attention = resolve_attention(run.attention, device, precision)
    run = dataclasses.replace(run, device=str(device), precision=precision, attention=attention)
    try:
        for op in ("attention_rollout", "mask_patches", "info_nce"):
            resolve_backend(op, run.kernels.backend, device)
    except RuntimeError as error:
        raise UserError(f"option kernels.backend={run.kernels.backend!r}: {error}") from None
    refuse_unfit(method_class, original)
    if method_class.initial_model is Method.initial_model and not any(p.requires_grad for p in original.parameters()):
        raise UserError(
            "every weight of the model is frozen (requires_grad=False), so nothing of it could be changed; call "
            "model.requires_grad_(True) first"
        )
    info = describe(original)
    watched = retain if validation is None else from_dataset(validation, "validation")
    _check_data(original, forget, retain, watched)
    world = init_process_group(run.device, run.timeout)
    if deepspeed is not None and method_class.one_process:
        raise UserError(f"method {method}: {method_class.one_process}; run it on one process, without DeepSpeed")
    zero = _resolve_zero(deepspeed, run, world)
    _check_ranks(run, world, zero, forget, retain)
    loading: dict[str, Any] = {
        "workers": run.workers,
        "device": device,
        "world": world,
        "on_bad_image": run.on_bad_image,
        "max_bad_share": run.max_bad_share,
        "decode": run.decode,
    }
    preprocessing = preprocessing_of(original)
    with same_random_numbers():
        preprocessing.check(forget)
    unreadable = bad_images(forget, preprocessing, out_of=len(forget) + len(retain), **loading)
    if not method_class.exact:  # an exact method needs the ids alone
        forget = without(forget, unreadable)
    resolved = {
        "method": method,
        **to_dict(run),
        **to_dict(method_config),
        **dict(notes or {}),
        "ranks": world.size,
        **({"deepspeed": zero} if zero else {}),
        "samples": {
            "forget": len(forget),
            "retain": len(retain),
            "forget_sha256": forget.fingerprint(),
            "retain_sha256": retain.fingerprint(),
            **({"forget_unreadable": len(unreadable)} if unreadable else {}),
        },
    }
    half = zero is not None and half_weights(zero)
    teacher, release = _frozen(original, device, run, zero if world.size > 1 else None, inplace)

    def loader(
        samples: Samples,
        augment: str,
        seed: int = run.seed,
        micro: int = 1,
        batch_size: int = run.batch_size,
        **part: Any,
    ) -> Loader:
        return Loader(
            samples,
            preprocessing,
            batch_size=batch_size,
            seed=seed,
            augment=augment,
            micro=micro,
            **loading,
            **part,
        )

    def computing() -> Any:
        return autocast(device, "fp32" if half else run.precision)

    run = dataclasses.replace(run, augment=_augmentation(run.augment, loader, retain, forget))  # type: ignore[arg-type]
    resolved["augment"] = run.augment
    everything, retain = retain, choose_retained(run, teacher, forget, retain, loader, computing, world)
    if retain is not everything:
        resolved["samples"] |= {"retain_used": len(retain), "retain_used_sha256": retain.fingerprint()}
    unlearner = method_class(
        method_config,
        Context(
            run=run,
            original=teacher,
            info=info,
            forget=forget,
            retain=retain,
            preprocessing=preprocessing,
            device=device,
            autocast=computing,
            loader=loader,
            held_out=None if validation is None else watched,
            world=world,
        ),
    )
    phases = unlearner.phases()
    stop = None
    if run.stop_when != "never":
        check_stop(unlearner, phases)
        stop = HeldOutStop(unlearner, phases)
    pruned = pruned_phases(run, phases, len(forget), len(retain))
    check_pruning(run, method, pruned)
    # That a model forgets a class of which nothing is retained is no collapse.
    watched = watched.of_classes(everything.labels) or watched
    folder = spec = None
    if output_dir is not None:
        spec = spec_of(original)  # a model that cannot be saved is an error now, not after the work
        folder = runfolder.RunFolder(output_dir, resolved, resume=resume, overwrite=overwrite, world=world)

    student = unlearner.initial_model(original if inplace else copy.deepcopy(original)).to(device)
    restrict(student, run.trainable, run.seed)
    if zero:
        refuse_sharding(student, zero)
    if run.gradient_checkpointing:
        checkpoint_blocks(student)
    if run.compile:
        student.compile()
    scales = unlearner.lr_scales(student)
    if zero and scales:
        raise UserError("option layer_decay: DeepSpeed has one rate for all weights; leave it out, or --deepspeed")
    train_engine = ZeroTrainEngine(student, run, zero) if zero else TrainEngine(student, run, scales)
    trainer = Trainer(
        train_engine,
        unlearner,
        run,
        folder,
        progress,
        after_phase,
        evenly_spaced(watched, WATCHED, "watched"),
        loader,
        release,
        spec,
        pruned,
        stop,
    )
    trainer.bad_images.update(unreadable)

    def loader_of(number: int, phase: Phase) -> Loader:
        samples = unlearner.samples_of(phase)
        augment = run.augment if phase.augment else "none"
        part: dict[str, Any] = (
            {"counts": pruned[number].counts, "chosen": pruned[number].positions} if number in pruned else {}
        )
        return loader(samples, augment, run.seed * 1009 + number, run.accumulation_steps, **part)

    def paired_loader(number: int, phase: Phase) -> Loader | None:
        if phase.paired is None:
            return None
        return loader(
            {"forget": forget, "retain": retain}[phase.paired],
            run.augment if (phase.augment if phase.augment_paired is None else phase.augment_paired) else "none",
            run.seed * 1009 + 500 + number,
            run.accumulation_steps,
            phase.paired_size(run.batch_size, pruned[number].grown if number in pruned else 1.0),
        )

    return Run(
        resolved=resolved,
        method=unlearner,
        teacher=teacher,
        train_engine=train_engine,
        trainer=trainer,
        phases=phases,
        loader_of=loader_of,
        paired_loader=paired_loader,
    )


def _resolve_zero(
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None, run: RunConfig, world: ProcessGroup
) -> dict[str, Any] | None:
    """The DeepSpeed configuration with the run's values in it; None for plain torch on one process."""
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
            f"{world.size} ranks for the {len(smallest)} samples of {smallest.name}: some would never see one; start "
            f"at most {len(smallest)}"
        )
    if run.compile and zero is not None:
        raise UserError("option compile=true: DeepSpeed runs are not compiled; leave out one of the two")
    if run.teacher == "sharded" and (zero is None or zero["zero_optimization"]["stage"] != 3):
        raise UserError("option teacher='sharded' shares out the original as ZeRO-3 does; it needs --deepspeed stage 3")


def _frozen(
    original: nn.Module, device: torch.device, run: RunConfig, zero: dict[str, Any] | None, changing: bool
) -> tuple[nn.Module, Callable[[], None]]:
    """(the original as methods look at it, what gives its memory back).

    On one process that computes where the caller's model lies, both have the same weights: nothing is copied, unless
    the caller's model is the one that is `changing`.
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
                raise UserError(f"{samples.name}: no samples; the model needs some to retain and some to be watched on")
            continue
        if samples.labels.max() >= classes:
            worst = int(samples.labels.argmax())
            raise UserError(
                f"{samples.name}: sample {samples.ids[worst]!r} has label {samples.labels[worst]}, but the "
                "model's head has "
                f"{classes} classes; use the checkpoint trained on these labels"
            )
