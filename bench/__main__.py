"""`python -m bench quality | ablation`: one command makes each table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.ablation import run_ablation
from bench.quality import run_quality
from engine.cli import run_app

app = typer.Typer(help="Tables that one command makes.", no_args_is_help=True, add_completion=False)

Checkpoint = Annotated[str, typer.Option(help="The model before unlearning.", show_default=False)]
Data = Annotated[str, typer.Option(help="Data source, as for `lethe unlearn`.", show_default=False)]
Forget = Annotated[str, typer.Option(help="Forget request, as for `lethe unlearn`.", show_default=False)]
Reference = Annotated[list[str], typer.Option(help="A retrained model; twice or more.", show_default=False)]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for every run.", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Results; an ablation goes on where the file ends.")]


@app.command()
def quality(
    checkpoint: Checkpoint,
    data: Data,
    forget: Forget,
    reference: Reference,
    method: Annotated[list[str] | None, typer.Option(help="Default: finetune and lethe.", show_default=False)] = None,
    retrain_epochs: Annotated[float, typer.Option(help="Recipe of the retrain that is timed; 0 leaves it out.")] = 30.0,
    settings: Settings = None,
    json: Json = None,
) -> None:
    """Methods at their defaults, the untouched model and the retrain's time, in one run."""
    run_quality(
        checkpoint, data, forget, reference, method or ["finetune", "lethe"], retrain_epochs, settings or [], json
    )


@app.command()
def ablation(
    checkpoint: Checkpoint,
    data: Data,
    forget: Forget,
    reference: Reference,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of every variant.")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at once; each then has its share of the threads.")] = 1,
    settings: Settings = None,
    json: Json = None,
) -> None:
    """Each choice of LetheViT against its alternative: mean and spread over seeds."""
    run_ablation(checkpoint, data, forget, reference, seeds, jobs, settings or [], json)


if __name__ == "__main__":
    run_app(app)
