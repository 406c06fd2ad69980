"""unlearn(): one function, read top to bottom."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import nn
from torch.utils.data import Dataset

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
    method: str = "lethe",
    config: Mapping[str, Any] | None = None,
    validation: Samples | Dataset[Any] | None = None,
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
    """Makes a trained ViT forget `forget` while it keeps what it learned from `retain`.

    model: a classifier, or a checkpoint (folder, `timm:NAME`, `hf-hub:ID`): any of timm's, or any module that returns
        logits and declares its input size; `lethe` needs attention that can be read. What `torch.compile`,
        `DataParallel` or `DistributedDataParallel` wraps is taken out. It is left as it is unless `inplace`.
    forget, retain: `engine.data.Samples`, or map-style datasets of (image, label), see `engine.data.from_dataset`.
    method: a name of `engine.list_methods()`. config: its options and `engine.RunConfig`'s by name.
    validation: samples that the original never trained on; what stops a collapse looks at them. Without any, the
        watched samples are retained ones, which the model has memorised: a collapse is still seen, a slow loss is not.
    output_dir: run folder; None writes nothing. resume: go on with the run in it. overwrite: replace that run.
    progress: called with (phase, step, steps, numbers) as losses are read. None: a bar, if standard error is a terminal
        or this is a notebook; False: none. notes: kept in config.yaml.
    after_phase: called with (phase, model) at the end of each phase, under the run's attention; must not change the
        model; its time is not counted.
    deepspeed: a DeepSpeed configuration, or its JSON file. Under a launcher with several ranks it is needed; every
        rank calls `unlearn` with the same arguments, and all of them get the unlearned model.
    config's on_bad_image=skip: forget images that cannot be read are found before the first step and left out of the
        run (a method that is exact needs their ids alone); `UnlearnResult.bad_images` names them.
    finalize: called with the result on every rank before the run counts as finished: a run that is killed in it does
        it again when it is resumed.

    Raises UserError for wrong use, RunStopped where a loss or gradient is not finite (the last good weights are
    then in output_dir/last_good) or no space is left.
    """
    given = load_checkpoint(model) if isinstance(model, (str, os.PathLike)) else model
    original = usable(given, inplace)
    refuse_overlap(forget, retain)
    forget, retain = from_dataset(forget, "forget"), from_dataset(retain, "retain")
    if not len(forget):
        raise UserError(f"{forget.name}: no samples; nothing to forget")
    started = time.perf_counter()
    resumable = output_dir is not None
    with shown_progress(progress) as progress, watching_ranks(resumable), runfolder.closing():
        options = RunOptions(
            method=method,
            config=config or {},
            validation=validation,
            inplace=inplace,
            output_dir=output_dir,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            after_phase=after_phase,
            notes=notes,
            deepspeed=deepspeed,
        )
        run = set_up(original, forget, retain, options)
        result = _run(run, started, finalize)
    if inplace and result.model is not original:
        original.load_state_dict(result.model.state_dict())
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
    """Trains the architecture of `model`: the `retrain` method with nothing to forget.

    From fresh weights, or with the option `base=given` from those of `model`.

    method: s3t trains in slices, so that a later deletion can drop stages (engine/methods/s3t.py); needs `output_dir`.
    Options and errors are those of `unlearn`; config holds `epochs`, `lr` and `engine.RunConfig`'s.
    """
    samples = from_dataset(samples, "train")
    if method == "s3t" and output_dir is None:
        raise UserError("train: a sliced training keeps its stages in its run folder; give output_dir")
    started = time.perf_counter()
    resumable = output_dir is not None
    with shown_progress(progress) as progress, watching_ranks(resumable), runfolder.closing():
        options = RunOptions(
            method=method,
            config=config or {},
            validation=validation,
            output_dir=output_dir,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            notes=notes,
            deepspeed=deepspeed,
        )
        run = set_up(as_classifier(model), samples.subset([], "forget"), samples, options)
        result = _run(run, started, finalize)
    result.model = as_given(result.model, model)
    return result


@contextlib.contextmanager
def shown_progress(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """The callback of a run: the given one, or that of a bar where somebody can see it, or none."""
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
