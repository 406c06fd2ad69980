"""`lethe pool`: reference models for all requests to come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.opening import takes_models
from engine.cli.options import (
    Data,
    DeepSpeed,
    Json,
    ModelArgs,
    OnBadImage,
    Settings,
    Sign,
    Weights,
    join_ranks,
    run_options,
    takes_data,
    takes_groups,
    write_ids,
    write_json_file,
)
from engine.cli.train_start import Start, Training, set_own
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.jobs.opening import Opening

pool_app = typer.Typer(
    help="A pool of reference models, trained once for all requests to come: each lacks a share of the training "
    "samples, so that some of them were never trained on the samples of any request.",
    no_args_is_help=True,
)


@pool_app.command("train")
@takes_groups
@takes_data
@takes_models("preprocessing")
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the pool.", show_default=False)],
    arch: Annotated[
        str | None,
        typer.Option(help="As of `lethe train`: an architecture, or the original, whose architecture is taken."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option("--init", metavar="CHECKPOINT", help="The base that the original was fine-tuned from."),
    ] = None,
    models: Annotated[int, typer.Option(help="Number of models. More than before: the new ones join.")] = 8,
    share: Annotated[
        float, typer.Option(help="Share of the samples that each model lacks; more = fewer models, which know less.")
    ] = 0.25,
    member: Annotated[
        int | None,
        typer.Option(help="Train this model alone, 1 to --models: for an array of jobs.", show_default=False),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the samples of each model, as of the original.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Model K is trained with SEED + K.")] = 0,
    key: Annotated[
        str | None,
        typer.Option(help="Key of the draw of what each model lacks, to repeat a pool.", show_default="random"),
    ] = None,
    model_arg: ModelArgs = None,
    weights: Weights = None,
    settings: Settings = None,
    *,
    deepspeed: DeepSpeed = None,
    sign: Sign = None,
    on_bad_image: OnBadImage = None,
    json_file: Json = None,
    opening: Opening,
) -> None:
    """Train the models of a pool by the original's recipe, which the options give. Finished ones are kept.

    A model that was stopped is continued. Options that differ from those in the run folder of --arch are an error.
    The same command in several shells shares the work; --member K trains one model, for a SLURM array, Ray or a loop.
    """
    from engine.attack.ensemble import what_counts
    from engine.cli.console import console
    from engine.config import parse_assignments, require
    from engine.data import open_source
    from engine.jobs.references import ReferenceRun, train_references
    from engine.models.checkpoint_source import absolute_checkpoint
    from engine.pool.store import Pool, check_planned_recipe
    from engine.runtime.process_group import ProcessGroup

    options = run_options(settings, on_bad_image)
    require(seed >= 0, "seed", seed, "0 or more")
    set_own("pool train", options, seed=seed, epochs=epochs)
    join_ranks(options)
    start = Start(init, arch, model_arg, weights, sliced=False)
    start.check(options)
    source = open_source(data)
    model, _ = start.model(source, None, options)
    planned = what_counts(options, "retrain")
    if arch:
        check_planned_recipe(arch, planned)
    ordered, _, _ = opening.prepare_training(source, None, model)
    facts = {
        "start": {
            "arch": arch and absolute_checkpoint(arch),
            "init": init and absolute_checkpoint(init),
            "model_args": parse_assignments(model_arg or []),
        },
        "recipe": {**planned, "seed": seed},
    }
    ProcessGroup.current().on_main(
        lambda: Pool.create(out, ordered, models=models, share=share, training=facts, key=key)
    )
    pool = Pool.open(out)
    if member is not None and not 1 <= member <= pool.models:
        raise UserError(f"--member {member}: the pool has models 1 to {pool.models}")
    numbers = range(1, pool.models + 1) if member is None else [member]
    runs = [ReferenceRun(pool.place(number), pool.seed(number)) for number in numbers]
    number_of = dict(zip((run.folder for run in runs), numbers, strict=True))
    training = Training(start, source, options, opening, deepspeed=deepspeed, sign=sign)
    found: dict[Path, dict[str, Any]] = {}

    def train_one(each: ReferenceRun) -> None:
        found[each.folder] = training.run(each, pool.task(source, number_of[each.folder]))

    statuses = train_references(runs, train_one, lambda line: console.print(line, soft_wrap=True), "models")
    rows = [
        {"model": number_of[run.folder], "folder": str(run.folder), "status": status, **found.get(run.folder, {})}
        for run, status in zip(runs, statuses, strict=True)
    ]
    missing = pool.unfinished()
    if not missing:
        console.print(f"pool in {out}: complete; certify a procedure by lethe certify --pool {out}", soft_wrap=True)
    write_json_file(json_file, {"models": rows, "unfinished": missing})


@pool_app.command("status")
@takes_groups
@takes_data
def status(
    data: Data,
    pool: Annotated[Path, typer.Option(help="Folder of the pool.", show_default=False)],
    ids: Annotated[
        Path | None,
        typer.Option(help="Write the ids of samples that it does not cover to this file.", show_default=False),
    ] = None,
    json_file: Json = None,
) -> None:
    """Show what of the data a pool covers: new samples, deleted ones, and those that too few models lack."""
    import dataclasses

    from engine.cli.console import console
    from engine.data import open_source
    from engine.pool.store import Pool

    opened, source = Pool.open(pool), open_source(data)
    missing = opened.unfinished()
    if missing:
        console.print(f"{len(missing)} of {opened.models} models are not finished: {', '.join(map(str, missing))}")
        write_json_file(json_file, {"models": opened.models, "unfinished": missing})
        raise UserError(f"pool {pool}: not complete; repeat lethe pool train")
    source = opened.in_order(source)
    found = opened.check(source)
    console.print(
        f"{opened.models} models, each without {100 * opened.facts['share']:g}% of the samples; covered: "
        f"{found.samples - found.short} of {found.samples} samples; {found.short} are lacked by fewer than two models",
        soft_wrap=True,
    )
    console.print(
        f"since it was trained {found.new} samples are new (no model was trained on them), and {found.gone} are gone "
        "(models were trained on them)",
        soft_wrap=True,
    )
    if ids is not None:
        write_ids(ids, [source.train.ids[int(i)] for i in opened.short(source.train.ids)])
    if found.out_of_date:
        console.print(
            "[bold red]out of date:[/] add models by lethe pool train "
            f"--models {opened.models + 2}, or make a new pool",
            soft_wrap=True,
        )
    facts = {"models": opened.models, "unfinished": [], **dataclasses.asdict(found), "out_of_date": found.out_of_date}
    write_json_file(json_file, facts)
