"""unlearn(): one function, read top to bottom."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from engine import runfolder
from engine.config import split_options, to_dict
from engine.data import Loader, Preprocessing, Samples, from_dataset
from engine.data.samples import concatenate
from engine.device import autocast, resolve_attention, resolve_device, resolve_precision
from engine.errors import UserError
from engine.methods import Context, get_method
from engine.trainer import AfterPhase, Progress, Trainer, UnlearnResult
from engine.vit import attention_as, describe, load_checkpoint, spec_of
from kernels import resolve_backend

# Samples that each look at a model's accuracy takes.
_WATCHED = 500


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

    Raises UserError for wrong use, RunStopped where a loss or gradient is not finite (the last good weights are
    then in output_dir/last_good) or no space is left.
    """
    original = load_checkpoint(model) if isinstance(model, (str, os.PathLike)) else model
    forget, retain = from_dataset(forget, "forget"), from_dataset(retain, "retain")
    if not len(forget):
        raise UserError(f"{forget.name}: no samples; nothing to forget")
    result = _run(
        original if inplace else copy.deepcopy(original),
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
) -> UnlearnResult:
    """Trains the architecture of `model` from fresh weights: the `retrain` method with nothing to forget.

    Options and errors are those of `unlearn`; config holds `epochs`, `lr` and `engine.RunConfig`'s.
    """
    samples = from_dataset(samples, "train")
    return _run(
        copy.deepcopy(model),
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
    )


def _run(
    model: nn.Module,
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
) -> UnlearnResult:
    started = time.perf_counter()
    method_class = get_method(method)
    run, method_config = split_options(options, method_class.Config)
    device = resolve_device(run.device)
    run = dataclasses.replace(
        run,
        device=str(device),
        precision=resolve_precision(run.precision, device),
        attention=resolve_attention(run.attention, device),
    )
    try:
        for op in ("attention_rollout", "mask_patches", "info_nce"):
            resolve_backend(op, run.kernels.backend, device)
    except RuntimeError as error:
        raise UserError(f"option kernels.backend={run.kernels.backend!r}: {error}") from None
    info = describe(model)
    watched = retain if validation is None else from_dataset(validation, "validation")
    _check_data(model, forget, retain, watched)
    resolved = {
        "method": method,
        **to_dict(run),
        **to_dict(method_config),
        **notes,
        "samples": {
            "forget": len(forget),
            "retain": len(retain),
            "forget_sha256": forget.fingerprint(),
            "retain_sha256": retain.fingerprint(),
        },
    }
    folder = None
    if output_dir is not None:
        spec_of(model)  # a model that cannot be saved is an error now, not after the work
        folder = runfolder.RunFolder(output_dir, resolved, resume=resume, overwrite=overwrite)

    model.to(device).eval()
    teacher = copy.deepcopy(model).requires_grad_(False)
    preprocessing = Preprocessing.of(model)

    def loader(samples: Samples, augment: str, seed: int = run.seed) -> Loader:
        return Loader(
            samples,
            preprocessing,
            batch_size=run.batch_size,
            seed=seed,
            augment=augment,
            workers=run.workers,
            device=device,
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
            autocast=lambda: autocast(device, run.precision),
            loader=loader,
        ),
    )
    student = unlearner.initial_model(model).to(device)
    sets = {"forget": forget, "retain": retain}
    with attention_as(teacher, run.attention), attention_as(student, run.attention):
        trainer = Trainer(student, unlearner, run, folder, progress, after_phase, _spread(watched, _WATCHED), loader)
        trainer.begin(started)
        for number, phase in enumerate(unlearner.phases()):
            if number < trainer.phase_number:
                continue
            if phase.samples == "all":
                sets["all"] = concatenate(forget, retain)
            augment = run.augment if phase.augment else "none"
            trainer.run_phase(number, phase, loader(sets[phase.samples], augment, run.seed * 1009 + number))
        return trainer.finish(resolved)


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


def _spread(samples: Samples, count: int) -> Samples:
    """At most `count` samples at equal distances, so that sorted classes are all there."""
    step = max(1, len(samples) // count)
    return samples.subset(range(0, len(samples), step)[:count], f"{samples.name} (watched)")
