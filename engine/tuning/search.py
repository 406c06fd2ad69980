"""tune(): tries options of a method and keeps the best, measured on held-out samples without a retrained model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.utils.data import Dataset

from engine.config import DEFAULT_METHOD, require, split_options, to_dict
from engine.core.result import Progress, UnlearnResult
from engine.core.search_space import defaults, spaces
from engine.data import Samples, from_dataset
from engine.data.readable import bad_images, without
from engine.errors import RunStopped, UserError
from engine.methods import Method, get_method
from engine.models.checkpoint import load_checkpoint, weights_sha256
from engine.models.huggingface import as_classifier
from engine.models.info import model_info
from engine.models.preprocessing import preprocessing_of
from engine.run.unlearn import unlearn
from engine.runtime import lock
from engine.runtime.files import replacing
from engine.runtime.process_group import ProcessGroup, launched
from engine.tuning.objective import Objective
from engine.tuning.study import BEST, Study, Trial, check_folder, require_optuna

TRIALS = 20
# Seconds between writes of the time that the search has taken so far, for a search that is killed.
_NOTED = 5.0


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Result of a search.

    Attributes:
        method: Name of the method.
        options: Options of the best trial and those that were fixed, for `engine.unlearn(config=...)`.
        best: The best trial.
        trials: Finished trials in order.
        original: Scores of the original on the halves "choosing" and "reporting".
        seconds: Time of the whole search, summed over all processes that worked at it.
        file: Path of best.yaml; None without an output folder.
    """

    method: str
    options: dict[str, Any]
    best: Trial
    trials: list[Trial]
    original: dict[str, dict[str, Any]]
    seconds: float
    file: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON; of the trials, only the best has its score on the reporting half."""
        trials = [
            {key: value for key, value in to_dict(trial).items() if key != "reporting"}  # reported for the best alone
            for trial in self.trials
        ]
        return {
            "method": self.method,
            "options": self.options,
            "best": to_dict(self.best),
            "original": self.original,
            "trials": trials,
            "pruned": sum(trial.score is None for trial in self.trials),
            "seconds": self.seconds,
        }


def tune(
    model: nn.Module | str | os.PathLike[str],
    forget: Samples | Dataset[Any],
    retain: Samples | Dataset[Any],
    *,
    validation: Samples | Dataset[Any],
    method: str = DEFAULT_METHOD,
    trials: int | None = None,
    seconds: float | None = None,
    config: Mapping[str, Any] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Tuned:
    """Choose the options of a method, its numbers of epochs included, by trials on the given model and data.

    A trial that collapses, or whose losses are not finite, is pruned.

    Args:
        model, forget, retain, method: As of `engine.unlearn`.
        validation: Held-out set: samples that the original was not trained on, not test samples. One half chooses the
            trial, the other half measures the choice (`engine.tuning.objective`).
        trials: Number of trials, those of a resumed search included; 20 if neither `trials` nor `seconds` is given. The
            first trial uses the defaults.
        seconds: Time limit of the whole search. A trial that is not likely to end in time is not started; a trial that
            exceeds the limit is stopped within ten steps.
        config: Options that are fixed. The method's other options that have a space (`engine.core.search_space`) are
            searched. Its `seed` is the seed of every trial and of the search.
        output_dir: Folder of the study and of best.yaml; None: the study is kept in memory.
        resume: Continue the study in the folder.
        overwrite: Replace the study in the folder.
        progress: As of `engine.unlearn`.
        on_trial: Called with each finished trial.
        notes: Further settings that must be equal for a search to be resumed.

    Returns:
        The best options and all finished trials.

    Raises:
        UserError: Wrong use, or the time limit was reached before the first trial ended.
        RunStopped: All trials were pruned.

    Example:
        >>> tuned = tune(model, forget, retain, validation=validation, seconds=3600)
        >>> result = engine.unlearn(model, forget, retain, method=tuned.method, config=tuned.options)
    """
    require(trials is None or trials >= 1, "trials", trials, "at least 1")
    require(seconds is None or seconds > 0, "seconds", seconds, "above 0")
    if trials is None and seconds is None:
        trials = TRIALS
    began = time.perf_counter()
    require_optuna()
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        lock.check(folder)
        check_folder(folder, resume, overwrite)
    method_class = get_method(method)
    _check_tunable(method, method_class)
    original = load_checkpoint(model) if isinstance(model, (str, os.PathLike)) else as_classifier(model)
    forget, retain = from_dataset(forget, "forget"), from_dataset(retain, "retain")
    validation, fixed = from_dataset(validation, "validation"), dict(config or {})
    run, _ = split_options(fixed, method_class.Config)
    width = model_info(original).width
    space = {name: each for name, each in spaces(method_class.Config, width).items() if name not in fixed}
    if not space:
        raise UserError(f"method {method}: every option that can be tuned is fixed; leave one of them free")
    forget = without(
        forget,
        bad_images(
            forget,
            preprocessing_of(original),
            on_bad_image=run.on_bad_image,
            max_bad_share=run.max_bad_share,
            out_of=len(forget) + len(retain),
            workers=run.workers,
            decode=run.decode,
        ),
    )
    objective = Objective(original, forget, retain, validation, run)
    settings = {
        **dict(notes or {}),
        "method": method,
        "fixed": fixed,
        "space": {name: to_dict(each) for name, each in space.items()},
        "original": weights_sha256(original),
        "forget": forget.fingerprint(),
        "retain": retain.fingerprint(),
        "validation": validation.fingerprint(),
    }
    first = {name: value for name, value in defaults(method_class.Config, width).items() if name in space}
    with contextlib.nullcontext() if folder is None else lock.held(folder):
        if folder is not None:
            check_folder(folder, resume, overwrite)
        study = Study(folder, settings, space, first, run.seed, overwrite=overwrite)
        clock = _Clock(study, began, math.inf if seconds is None else seconds)

        def run_trial(options: dict[str, Any]) -> UnlearnResult:
            return unlearn(
                original,
                forget,
                retain,
                method=method,
                config={**fixed, **options},
                validation=objective.choosing,
                progress=clock.over(progress),
            )

        while _goes_on(study.finished(), trials, clock):
            pending, number, options = study.ask()
            try:
                trial = _attempt(number, options, run_trial, objective)
            except _OutOfTime:
                study.finish(pending, None)
                break
            study.finish(pending, trial)
            clock.note()
            if on_trial:
                on_trial(trial)
        best = _best(study.finished(), seconds)
        clock.note()
        tuned = Tuned(
            method=method,
            options={**fixed, **best.options},
            best=best,
            trials=study.finished(),
            original=dict(zip(("choosing", "reporting"), (each.to_dict() for each in objective.before), strict=True)),
            seconds=study.spent,
            file=None if folder is None else folder / BEST,
        )
        if tuned.file is not None:
            _write_best(tuned.file, tuned)
        return tuned


class _OutOfTime(Exception):
    """The time limit of the search was reached during a trial."""


class _Clock:
    """Time of a search in seconds, that of earlier processes included."""

    def __init__(self, study: Study, began: float, limit: float) -> None:
        self.study, self.limit = study, limit
        self.began = began - study.spent
        self.note()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.began

    def note(self) -> None:
        self.noted = self.spent
        self.study.spend(self.noted)

    def over(self, progress: Progress | None) -> Progress:
        """Return a progress callback that calls `progress`, and ends the run when the time limit is reached."""

        def report(phase: str, step: int, steps: int, numbers: dict[str, float]) -> None:
            if progress:
                progress(phase, step, steps, numbers)
            if self.spent - self.noted > _NOTED or self.spent > self.limit:
                self.note()
            if self.spent > self.limit:
                raise _OutOfTime

        return report


def _check_tunable(method: str, method_class: type[Method]) -> None:
    if method_class.exact:
        raise UserError(
            f"method {method} is exact: it does not use the forget samples, so there is no score to choose by; "
            "tune another, or run it by the recipe of the original"
        )
    if not spaces(method_class.Config, 1):
        raise UserError(f"method {method}: none of its options has a space to search; set them by hand")
    if ProcessGroup.current().size > 1 or launched():
        raise UserError("tune runs in one process; start it without a launcher")


def _goes_on(finished: list[Trial], trials: int | None, clock: _Clock) -> bool:
    """Return whether to start another trial: the number is not reached, and the trial is likely to end in time."""
    if trials is not None and len(finished) >= trials:
        return False
    each = [sum(trial.seconds.values()) for trial in finished]
    return clock.spent + (sum(each) / len(each) if each else 0.0) < clock.limit


def _attempt(
    number: int, options: dict[str, Any], run: Callable[[dict[str, Any]], UnlearnResult], objective: Objective
) -> Trial:
    """Run a trial and score it.

    Args:
        number: Number of the trial.
        options: Options of the trial.
        run: Unlearns with these options.
        objective: Scores the unlearned model.
    """
    began = time.perf_counter()
    scores, reason = None, ""
    try:
        result = run(options)
    except RunStopped as stopped:
        reason = str(stopped)
    unlearned = time.perf_counter()
    if not reason:
        collapses = [row for row in result.events if row["event"] == "collapse"]
        if collapses:
            where = collapses[0].get("phase", "the end")
            reason = f"collapsed: accuracy on held-out samples was lost (seen in {where})"
        else:
            scores = objective(result.model)
            reason = "" if scores else "the model's outputs are not finite"
    choosing, reporting = (each.to_dict() for each in scores) if scores else (None, None)
    return Trial(
        number=number,
        options=options,
        score=scores[0].total if scores else None,
        choosing=choosing,
        reporting=reporting,
        seconds={"unlearn": unlearned - began, "measure": time.perf_counter() - unlearned},
        reason=reason,
    )


def _best(finished: list[Trial], seconds: float | None) -> Trial:
    """Return the trial with the lowest score; the first of equal ones.

    Raises:
        RunStopped: All trials were pruned.
        UserError: No trial ended within `seconds`.
    """
    complete = [trial for trial in finished if trial.score is not None]
    if complete:
        return min(complete, key=lambda trial: trial.score)  # type: ignore[arg-type, return-value]
    if finished:
        raise RunStopped(f"tune: all {len(finished)} trials were pruned, the last: {finished[-1].reason}")
    raise UserError(f"tune: no trial ended within {seconds:g} seconds; give more")


def _write_best(path: Path, tuned: Tuned) -> None:
    lines = [
        f"# lethe tune: the best of {len(tuned.trials)} trials (number {tuned.best.number}), {tuned.seconds:.0f} s",
        f"# lethe unlearn --method {tuned.method} --config {path.name} ...",
    ]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(tuned.options, sort_keys=False)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
