"""`engine.unlearn` and `engine.train`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import nn
from torch.utils.data import Dataset

from engine.config import DEFAULT_METHOD
from engine.core.result import AfterPhase, Progress, UnlearnResult
from engine.data import Samples, from_dataset, refuse_overlap
from engine.errors import UserError
from engine.models.checkpoint import load_checkpoint
from engine.models.huggingface import as_classifier, as_given
from engine.models.usable import usable
from engine.run import folder as runfolder
from engine.run.setup import Run, RunOptions, set_up
from engine.runtime.process_group import ProcessGroup, watching_ranks
from engine.runtime.progress import automatic_progress


def unlearn(
    model: nn.Module | str | os.PathLike[str],
    forget: Samples | Dataset[Any],
    retain: Samples | Dataset[Any],
    *,
    method: str = DEFAULT_METHOD,
    config: Mapping[str, Any] | None = None,
    validation: Samples | Dataset[Any] | None = None,
    original: nn.Module | str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    after_phase: AfterPhase | None = None,
    notes: Mapping[str, Any] | None = None,
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    finalize: Callable[[UnlearnResult], None] | None = None,
) -> UnlearnResult:
    """Make a trained classifier forget `forget` while it keeps what it learned from `retain`.

    Args:
        model: A classifier of timm or transformers, any module that returns logits [B, classes] and declares its input
            size, or a checkpoint (file, folder, `timm:NAME`, `hf-hub:ID`). `lethe` needs attention that can be read.
            Wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel` are taken off. The model is not
            changed unless `inplace`.
        forget: Forget set: `engine.data.Samples`, or a map-style dataset of (image, label), see
            `engine.data.from_dataset`.
        retain: Retain set, likewise.
        method: A name of `engine.list_methods()`.
        config: Options of the method and of `engine.RunConfig` by name. With `on_bad_image="skip"`, forget images that
            cannot be read are found before the first step and left out (an exact method needs their ids alone);
            `UnlearnResult.bad_images` names them.
        validation: Held-out set: samples that the original was not trained on. The collapse guard measures accuracy on
            it. Without one, it uses retain samples, which the model has memorised: a collapse is still found, a slow
            loss of accuracy is not.
        original: For a model that earlier requests have changed, the model before the first of them, for `lethe_plus`:
            a small request keeps its predictions for the retain samples, so that what each request costs these does not
            add up. `retain` must not have what the earlier requests forgot. None: `model`.
        output_dir: Run folder; None writes nothing.
        inplace: Change the given model.
        resume: Continue the run in the run folder.
        overwrite: Replace the run in the run folder.
        progress: Called with (phase, step, steps, numbers) as losses are read. None: a progress bar if standard error
            is a terminal or this is a notebook. True: a bar in any case. False: none.
        after_phase: Called with (phase, model) at the end of each phase, under the run's attention. It must not change
            the model; its time is not counted.
        notes: Further entries of config.yaml.
        deepspeed: DeepSpeed configuration, or its JSON file; required under a launcher with several ranks. Every rank
            calls `unlearn` with the same arguments and gets the unlearned model.
        finalize: Called with the result on every rank before the run counts as finished. If the run is killed in it,
            it is called again on resume.

    Returns:
        The unlearned model with its history, see `UnlearnResult`.

    Raises:
        UserError: Wrong use; nothing was changed.
        RunStopped: A loss or gradient is not finite (the last good weights are in output_dir/last_good), or no space is
            left on the device.

    Example:
        >>> result = engine.unlearn(model, forget, retain, validation=validation, output_dir="unlearned")
        >>> result.accuracy(test)
    """
    given = load_checkpoint(model) if isinstance(model, (str, os.PathLike)) else model
    before = load_checkpoint(original) if isinstance(original, (str, os.PathLike)) else original
    start = usable(given, inplace)
    refuse_overlap(forget, retain)
    forget, retain = from_dataset(forget, "forget"), from_dataset(retain, "retain")
    if not len(forget):
        raise UserError(f"{forget.name}: no samples; nothing to forget")
    options = RunOptions(
        method=method,
        config=config or {},
        validation=validation,
        original=None if before is None else usable(before, False),
        inplace=inplace,
        output_dir=output_dir,
        resume=resume,
        overwrite=overwrite,
        after_phase=after_phase,
        notes=notes,
        deepspeed=deepspeed,
    )
    result = _set_up_and_run(start, forget, retain, options, progress, finalize)
    if inplace and result.model is not start:
        start.load_state_dict(result.model.state_dict())
    result.model = given if inplace else as_given(result.model, given)
    return result


def train(
    model: nn.Module,
    samples: Samples | Dataset[Any],
    *,
    method: Literal["retrain", "s3t"] = "retrain",
    config: Mapping[str, Any] | None = None,
    validation: Samples | Dataset[Any] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    notes: Mapping[str, Any] | None = None,
    deepspeed: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    finalize: Callable[[UnlearnResult], None] | None = None,
) -> UnlearnResult:
    """Train the architecture of `model` from fresh weights; this makes originals and reference models.

    Args:
        model: Gives the architecture; with the option `base="given"` also the weights to start from.
        samples: Training samples, for a reference model the retain set.
        method: "retrain", or "s3t": training in slices, so that a later request can drop stages
            (engine/methods/s3t.py); it needs `output_dir`.
        config: `epochs`, `lr` and the other options of the method and of `engine.RunConfig`.
        validation, output_dir, resume, overwrite, progress, notes, deepspeed, finalize: As of `unlearn`.

    Returns:
        The trained model with its history.

    Raises:
        UserError, RunStopped: As of `unlearn`.
    """
    samples = from_dataset(samples, "train")
    if method == "s3t" and output_dir is None:
        raise UserError("train: a sliced training keeps its stages in its run folder; give output_dir")
    options = RunOptions(
        method=method,
        config=config or {},
        validation=validation,
        output_dir=output_dir,
        resume=resume,
        overwrite=overwrite,
        notes=notes,
        deepspeed=deepspeed,
    )
    nothing = samples.subset([], "forget")
    result = _set_up_and_run(as_classifier(model), nothing, samples, options, progress, finalize)
    result.model = as_given(result.model, model)
    return result


def _set_up_and_run(
    model: nn.Module,
    forget: Samples,
    retain: Samples,
    options: RunOptions,
    progress: Progress | bool | None,
    finalize: Callable[[UnlearnResult], None] | None,
) -> UnlearnResult:
    started = time.perf_counter()
    resumable = options.output_dir is not None
    with shown_progress(progress) as report, watching_ranks(resumable), runfolder.closing():
        run = set_up(model, forget, retain, dataclasses.replace(options, progress=report))
        return _run(run, started, finalize)


@contextlib.contextmanager
def shown_progress(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """Return the callback of a run: the given one, that of a progress bar, or None."""
    if callable(progress):
        yield progress
    elif progress is False or ProcessGroup.current().rank > 0:
        yield None
    else:
        with automatic_progress(wanted=bool(progress)) as report:
            yield report


def _run(run: Run, started: float, finalize: Callable[[UnlearnResult], None] | None) -> UnlearnResult:
    trainer, phases = run.trainer, run.phases
    with run.computing():
        trainer.begin(started)
        for number, phase in enumerate(phases):
            if number < trainer.phase_number:
                continue
            trainer.run_phase(
                number,
                phase,
                run.loader_of(number, phase),
                run.paired_loader(number, phase),
                any(run.method.needs_original(later, prepared=False) for later in phases[number + 1 :]),
            )

        def end(result: UnlearnResult) -> None:
            run.method.on_finish(result)
            if finalize:
                finalize(result)

        return trainer.finish(run.resolved, end)
