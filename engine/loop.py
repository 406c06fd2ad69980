"""unlearn(): one function, read top to bottom."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from engine import runfolder
from engine.config import RunConfig, split_options, to_dict
from engine.data import Loader, Preprocessing, Samples, from_dataset
from engine.data.samples import concatenate, spread
from engine.device import autocast, resolve_attention, resolve_device, resolve_precision
from engine.distributed.updater import Updater
from engine.distributed.world import World, join, watching_ranks
from engine.distributed.zero import (
    ZeroUpdater,
    half_weights,
    read_deepspeed,
    release_frozen,
    require_deepspeed,
    resolve_deepspeed,
    shard_frozen,
)
from engine.errors import UserError
from engine.methods import Context, get_method
from engine.trainer import AfterPhase, Progress, Trainer, UnlearnResult
from engine.vit import attention_as, describe, load_checkpoint, spec_of
from kernels import resolve_backend

# Samples that each look at a model's accuracy takes.
WATCHED = 500


def unlearn(
    model: nn.Module | str | os.PathLike[str],
    forget: Samples | Dataset[Any],
    retain: Samples | Dataset[Any],
    *,
    method: str = "lethe",
    config: Mapping[str, Any] | None = None,
    validation: Samples | Dataset[Any] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    after_phase: AfterPhase | None = None,
    notes: Mapping[str, Any] | None = None,
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    finalize: Callable[[UnlearnResult], None] | None = None,
) -> UnlearnResult:
    """Makes a trained ViT forget `forget` while it keeps what it learned from `retain`.

    model: a timm ViT, DeiT or Swin, or a checkpoint (folder, `timm:NAME`, `hf-hub:ID`). It is left as it is unless
        `inplace`.
    forget, retain: `engine.data.Samples`, or map-style datasets of (image, label), see `engine.data.from_dataset`.
    method: a name of `engine.list_methods()`. config: its options and `engine.RunConfig`'s by name.
    validation: samples that the original never trained on; what stops a collapse looks at them. Without any, the
        watched samples are retained ones, which the model has memorised: a collapse is still seen, a slow loss is not.
    output_dir: run folder; None writes nothing. resume: go on with the run in it. overwrite: replace that run.
    progress: called with (phase, step, steps, numbers) as losses are read. notes: kept in config.yaml.
    after_phase: called with (phase, model) at the end of each phase, under the run's attention; must not change the
        model; its time is not counted.
    deepspeed: a DeepSpeed configuration, or its JSON file. Under a launcher with several ranks it is needed; every
        rank calls `unlearn` with the same arguments, and all of them get the unlearned model.
    finalize: called with the result on every rank before the run counts as finished: a run that is killed in it does
        it again when it is resumed.

    Raises UserError for wrong use, RunStopped where a loss or gradient is not finite (the last good weights are
    then in output_dir/last_good) or no space is left.
    """
    original = load_checkpoint(model) if isinstance(model, (str, os.PathLike)) else model
    forget, retain = from_dataset(forget, "forget"), from_dataset(retain, "retain")
    if not len(forget):
        raise UserError(f"{forget.name}: no samples; nothing to forget")
    with watching_ranks(resumable=output_dir is not None):
        result = _run(
            original,
            inplace,
            forget,
            retain,
            method,
            dict(config or {}),
            validation,
            output_dir,
            resume,
            overwrite,
            progress,
            after_phase,
            dict(notes or {}),
            deepspeed,
            finalize,
        )
    if inplace and result.model is not original:
        original.load_state_dict(result.model.state_dict())
        result.model = original
    return result


def train(
    model: nn.Module,
    samples: Samples | Dataset[Any],
    *,
    config: Mapping[str, Any] | None = None,
    validation: Samples | Dataset[Any] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    notes: Mapping[str, Any] | None = None,
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> UnlearnResult:
    """Trains the architecture of `model` from fresh weights: the `retrain` method with nothing to forget.

    Options and errors are those of `unlearn`; config holds `epochs`, `lr` and `engine.RunConfig`'s.
    """
    samples = from_dataset(samples, "train")
    with watching_ranks(resumable=output_dir is not None):
        return _run(
            model,
            False,
            samples.subset([], "forget"),
            samples,
            "retrain",
            dict(config or {}),
            validation,
            output_dir,
            resume,
            overwrite,
            progress,
            None,
            dict(notes or {}),
            deepspeed,
            None,
        )


def _run(
    original: nn.Module,
    inplace: bool,
    forget: Samples,
    retain: Samples,
    method: str,
    options: dict[str, Any],
    validation: Samples | Dataset[Any] | None,
    output_dir: str | os.PathLike[str] | None,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
    after_phase: AfterPhase | None,
    notes: dict[str, Any],
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None,
    finalize: Callable[[UnlearnResult], None] | None,
) -> UnlearnResult:
    started = time.perf_counter()
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
    info = describe(original)
    watched = retain if validation is None else from_dataset(validation, "validation")
    _check_data(original, forget, retain, watched)
    world = join(run.device, run.timeout)
    zero = _resolve_zero(deepspeed, run, world)
    _check_ranks(run, world, zero, forget, retain)
    resolved = {
        "method": method,
        **to_dict(run),
        **to_dict(method_config),
        **notes,
        "ranks": world.size,
        **({"deepspeed": zero} if zero else {}),
        "samples": {
            "forget": len(forget),
            "retain": len(retain),
            "forget_sha256": forget.fingerprint(),
            "retain_sha256": retain.fingerprint(),
        },
    }
    half = zero is not None and half_weights(zero)
    teacher, release = _frozen(original, device, run, zero if world.size > 1 else None, inplace)
    preprocessing = Preprocessing.of(original)

    def loader(samples: Samples, augment: str, seed: int = run.seed, micro: int = 1) -> Loader:
        return Loader(
            samples,
            preprocessing,
            batch_size=run.batch_size,
            seed=seed,
            augment=augment,
            workers=run.workers,
            device=device,
            world=world,
            micro=micro,
            on_bad_image=run.on_bad_image,
            max_bad_share=run.max_bad_share,
            decode=run.decode,
        )

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
            autocast=lambda: autocast(device, "fp32" if half else run.precision),
            loader=loader,
            world=world,
        ),
    )
    folder = spec = None
    if output_dir is not None:
        spec = spec_of(original)  # a model that cannot be saved is an error now, not after the work
        folder = runfolder.RunFolder(output_dir, resolved, resume=resume, overwrite=overwrite, world=world)

    student = unlearner.initial_model(original if inplace else copy.deepcopy(original)).to(device)
    if run.gradient_checkpointing:
        student.set_grad_checkpointing(True)  # type: ignore[operator]
    sets = {"forget": forget, "retain": retain}
    phases = unlearner.phases()
    updater = ZeroUpdater(student, run, zero) if zero else Updater(student, run)
    del student
    with attention_as(teacher, run.attention), attention_as(updater.model, run.attention):
        trainer = Trainer(
            updater,
            unlearner,
            run,
            folder,
            progress,
            after_phase,
            spread(watched, WATCHED, "watched"),
            loader,
            release,
            spec,
        )
        trainer.begin(started)
        for number, phase in enumerate(phases):
            if number < trainer.phase_number:
                continue
            if phase.samples == "all":
                sets["all"] = concatenate(forget, retain)
            augment = run.augment if phase.augment else "none"
            trainer.run_phase(
                number,
                phase,
                loader(sets[phase.samples], augment, run.seed * 1009 + number, run.accumulation_steps),
                any(unlearner.needs_original(later, prepared=False) for later in phases[number + 1 :]),
            )
        return trainer.finish(resolved, finalize)


def _resolve_zero(
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None, run: RunConfig, world: World
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


def _check_ranks(run: RunConfig, world: World, zero: dict[str, Any] | None, forget: Samples, retain: Samples) -> None:
    smallest = min((s for s in (forget, retain) if len(s)), key=len)
    if world.size > len(smallest):
        raise UserError(
            f"{world.size} ranks for the {len(smallest)} samples of {smallest.name}: some would never see one; start "
            f"at most {len(smallest)}"
        )
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
    for samples in (forget, retain, watched):
        if not len(samples):
            if samples is not forget:
                raise UserError(f"{samples.name}: no samples; the model needs some to retain and some to be watched on")
            continue
        if samples.labels.max() >= int(model.num_classes):  # type: ignore[arg-type]
            worst = int(samples.labels.argmax())
            raise UserError(
                f"{samples.name}: sample {samples.ids[worst]!r} has label {samples.labels[worst]}, but the "
                "model's head has "
                f"{model.num_classes} classes; use the checkpoint trained on these labels"
            )
