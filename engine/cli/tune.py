"""`lethe tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.opening import takes_models
from engine.cli.options import (
    Checkpoint,
    ConfigFile,
    Data,
    Forget,
    Json,
    MethodName,
    OnBadImage,
    Overwrite,
    Settings,
    WeightFileOptions,
    check_free,
    run_options,
    takes_data,
    takes_groups,
    write_json_file,
)
from engine.config import DEFAULT_METHOD

if TYPE_CHECKING:
    from engine.jobs.opening import Opening
    from engine.tuning import Trial, Tuned

_PARTS = ("forget", "membership", "validation", "retain")


@takes_groups
@takes_data
@takes_models()
def tune(
    checkpoint: Checkpoint,
    data: Data,
    forget: Forget,
    out: Annotated[Path, typer.Option(help="Folder of the study and of best.yaml.", show_default=False)],
    method: MethodName = DEFAULT_METHOD,
    trials: Annotated[
        int | None,
        typer.Option(help="How many sets of options to try, in all; 20 without --seconds.", show_default=False),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="How long the search may take, in all.", show_default=False)
    ] = None,
    *,
    files: WeightFileOptions,
    settings: Settings = None,
    config: ConfigFile = None,
    on_bad_image: OnBadImage = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the study in --out.")] = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
    opening: Opening,
) -> None:
    """Choose a method's options by trials on held-out samples, without a retrained model; write best.yaml.

    Options of --set and --config are fixed, the others that can be tuned are searched; the first trial has the
    defaults. No test sample is used. `lethe unlearn --config OUT/best.yaml` takes what was found.
    """
    check_free(out)
    from engine.cli.console import console
    from engine.config import read_yaml
    from engine.jobs.task import Task
    from engine.tuning import tune as search

    options = {**(read_yaml(config) if config else {}), **run_options(settings, on_bad_image)}
    (place,) = files.sources([checkpoint])
    place = place or checkpoint
    task, _ = opening.prepare(Task.open(data, forget), place, {}, options, method)

    def print_line(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    tuned = search(
        opening.model(place),
        task.forget,
        task.retain,
        validation=task.source.validation,
        method=method,
        trials=trials,
        seconds=seconds,
        config=options,
        output_dir=out,
        resume=resume,
        overwrite=overwrite,
        on_trial=lambda trial: print_line(_line(trial)),
        notes={"checkpoint": place or checkpoint, **task.notes()},
    )
    console.print(_table(tuned))
    for line in _lines(tuned):
        print_line(line)
    write_json_file(json_file, tuned.to_dict())


def _line(trial: Trial) -> str:
    found = f"score {trial.score:.2f}" if trial.score is not None else f"pruned ({trial.reason})"
    options = ", ".join(f"{key}={_short(value)}" for key, value in trial.options.items())
    return f"trial {trial.number}: {found}; {sum(trial.seconds.values()):.1f} s; {options}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(tuned: Tuned) -> Any:
    from rich.table import Table

    table = Table("model", "held-out half", "score", *_PARTS, header_style="bold")
    best = {"choosing": tuned.best.choosing or {}, "reporting": tuned.best.reporting or {}}
    for name, halves in (("untouched", tuned.original), (f"trial {tuned.best.number}", best)):
        for half, of in halves.items():
            table.add_row(name, half, *(f"{of[key]:.2f}" for key in ("score", *_PARTS)))
    return table


def _lines(tuned: Tuned) -> list[str]:
    pruned = sum(trial.score is None for trial in tuned.trials)
    first = tuned.trials[0]
    before = "was pruned" if first.score is None else f"{first.score:.2f}"
    chosen = ", ".join(f"{key}={_short(value)}" for key, value in tuned.best.options.items())
    count = int(tuned.original["choosing"]["numbers"]["held_out_samples"])
    return [
        "percentage points, 0 = the forget samples are like held-out ones and nothing else was lost. The choosing "
        "half picked the trial, so its score is optimistic; the reporting half did not.",
        f"the choosing half has {count} held-out samples, of which one moves an accuracy by {100 / count:.1f} points; "
        "scores that differ by less than that are not distinguished",
        f"best: trial {tuned.best.number} of {len(tuned.trials)} ({pruned} pruned), {chosen}; the defaults, trial 0: "
        f"{before}",
        f"the search took {tuned.seconds:.1f} s; the best trial's unlearning {tuned.best.seconds['unlearn']:.1f} s of "
        "them",
        f"next: lethe unlearn --method {tuned.method} --config {tuned.file} ...",
    ]
