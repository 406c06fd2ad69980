"""`lethe forget-set`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.opening import takes_models
from engine.cli.options import (
    Data,
    Json,
    WeightFileOptions,
    takes_data,
    takes_groups,
    write_json_file,
)

if TYPE_CHECKING:
    from rich.table import Table

    from engine.forget_sets import ForgetSet
    from engine.jobs.opening import Opening


@takes_groups
@takes_data
@takes_models()
def forget_set(
    strategy: Annotated[
        str,
        typer.Option(
            help="random; class (--set name=CLASS); lowest-loss, highest-loss; influence (gradient norm at the last "
            "layer); memorised (--set scores=FILE); near-duplicates; adversarial (worst case).",
            show_default=False,
        ),
    ],
    data: Data,
    out: Annotated[
        Path, typer.Option(help="CSV file to write: id, score, rank. `--forget FILE` reads it.", show_default=False)
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="The model to be unlearned, for strategies that need it and for the description.",
            show_default=False,
        ),
    ] = None,
    *,
    files: WeightFileOptions,
    share: Annotated[
        float | None, typer.Option(help="Share of the training samples, such as 0.1.", show_default=False)
    ] = None,
    count: Annotated[int | None, typer.Option(help="Number of samples, instead.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the strategy, or batch_size, precision, device, workers, decode, on_bad_image, "
            "max_bad_share; repeat for more. An unknown option is an error that lists them.",
            show_default=False,
        ),
    ] = None,
    json_file: Json = None,
    opening: Opening,
) -> None:
    """Write a list of training samples to forget, chosen at random or to be hard to forget, and describe it.

    Test data is not used. The same arguments give the same list.
    """
    from engine.cli.console import console, progress_bars
    from engine.config import parse_assignments
    from engine.data import open_source
    from engine.forget_sets import choose_forget_set, require_csv

    require_csv(out)  # before the work
    samples, model = open_source(data).train, None
    options = parse_assignments(settings or [])
    (place,) = files.sources([checkpoint])
    if place:
        model = opening.model(place)
        samples = opening.check_samples(samples, model, place, data, options)
    with progress_bars() as progress:
        chosen = choose_forget_set(
            samples,
            strategy,
            share=share,
            count=count,
            model=model,
            seed=seed,
            config=options,
            progress=progress,
        )
    chosen.write(out)
    console.print(_table(chosen))
    for line in _lines(chosen.to_dict()):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"{len(chosen.selection.indices)} ids in {out}", soft_wrap=True, markup=False, highlight=False)
    write_json_file(json_file, chosen.to_dict())


def _table(chosen: ForgetSet) -> Table:
    from rich.table import Table

    table = Table(header_style="bold")
    for column in ("set", "samples", "accuracy", "mean loss", "classes", "largest class", "imbalance"):
        table.add_column(column, justify="left" if column == "set" else "right", no_wrap=True)
    names = {"chosen": chosen.strategy, "random": "a random set", "all": "all of the training data"}
    for key, name in names.items():
        of = chosen.description[key]
        accuracy, loss = of.get("accuracy"), of.get("loss")
        table.add_row(
            name,
            str(of["samples"]),
            "-" if accuracy is None else f"{100 * accuracy:.1f}%",
            "-" if loss is None else f"{loss:.4g}",
            str(len(of["classes"])),
            f"{of['largest_class']['name']} {100 * of['largest_class']['share']:.1f}%",
            f"{of['imbalance']:.3f}",
        )
    return table


def _lines(of: dict[str, Any]) -> list[str]:
    """Return what the table does not show: units, scores and times."""
    facts = [
        f"{key.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')}: {value}"
        for key, value in of["facts"].items()
        if not isinstance(value, list)
    ]
    unread = of["description"]["all"].get("unreadable", 0)
    return [
        "accuracy and mean loss (nats): of the checkpoint. imbalance: share of the set that would have to change class "
        "to have the classes of the training data; 0 = balanced like it.",
        f"score: {of['score']['meaning']}; from {of['score']['first']:.4g} to {of['score']['last']:.4g}",
        *([", ".join(facts)] if facts else []),
        *([f"{unread} images could not be read and were left out"] if unread else []),
        "time: " + ", ".join(f"{key} {value:.1f} s" for key, value in of["seconds"].items()),
    ]
