"""`lethe attack`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli.opening import takes_models
from engine.cli.options import Data, Json, MethodName, ModelArgs, Settings, takes_data, write_json_file
from engine.config import DEFAULT_METHOD

if TYPE_CHECKING:
    from engine.attack.ensemble import EnsembleSpec
    from engine.jobs.opening import Opening


@takes_data
@takes_models("preprocessing")
def attack(
    data: Data,
    arch: Annotated[
        str,
        typer.Option(
            help="timm architecture, or a checkpoint folder: its architecture. Every model is trained from fresh "
            "weights.",
            show_default=False,
        ),
    ],
    targets: Annotated[
        str,
        typer.Option(
            help="Samples whose forgetting is attacked: a file of ids, class:NAME or random:FRACTION@SEED. Each run of "
            "the method forgets a random third of them.",
            show_default=False,
        ),
    ],
    method: MethodName = DEFAULT_METHOD,
    models: Annotated[int, typer.Option(help="K: models with each target, and as many without it.")] = 16,
    cache: Annotated[
        Path, typer.Option(help="Folder of the trained models; models in it are not trained again.")
    ] = Path("runs/ensemble"),
    workers: Annotated[int, typer.Option(help="Models trained at once; each then has its share of the threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draws; models and runs have seeds above it.")] = 0,
    model_arg: ModelArgs = None,
    settings: Settings = None,
    train_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--train-set",
            metavar="KEY=VALUE",
            help="An option of the training recipe, such as epochs=30, lr=1e-3, batch_size=100; repeat for more.",
            show_default=False,
        ),
    ] = None,
    memorisation: Annotated[
        Path | None,
        typer.Option(
            help="CSV file (id, score) to write each target's memorisation to; `lethe forget-set --strategy memorised` "
            "reads it.",
            show_default=False,
        ),
    ] = None,
    json_file: Json = None,
    *,
    opening: Opening,
) -> None:
    """Run U-LiRA: can models that unlearned a sample be distinguished from models that were never trained on it?

    It is the procedure that is attacked, not one checkpoint: 2 K models are trained, half of them without each target,
    and the method runs on those with it.
    """
    from engine.attack.ensemble import EnsembleSpec
    from engine.attack.ulira import attack_procedure, check_method
    from engine.cli.console import console, progress_bars
    from engine.config import parse_assignments
    from engine.data import open_source
    from engine.jobs.start import architecture
    from engine.models.spec import spec_of

    model = architecture(arch, parse_assignments(model_arg or []), open_source(data))
    opening.changes.apply(model)
    opening.print_preprocessing(model)
    options, recipe = parse_assignments(settings or []), parse_assignments(train_settings or [])
    spec = EnsembleSpec(
        data=data,
        targets=targets,
        model=spec_of(model),
        recipe=recipe,
        pairs=models,
        seed=seed,
    )
    check_method(method, options)
    state_needs(spec, method, options, cache, workers)
    with progress_bars() as progress:
        found = attack_procedure(spec, method, options, cache, workers=workers, progress=progress)
    print_attack(found)
    console.print(f"models in {cache}")
    if memorisation is not None:
        write_scores(memorisation, found["per_sample"]["ids"], found["per_sample"]["memorisation"])
    write_json_file(json_file, found)


def write_scores(path: Path, ids: list[str], scores: list[float | None]) -> None:
    """Write a CSV file with the columns id and score, highest first; samples without a score are left out."""
    import csv

    from engine.runtime.files import make_folder, replacing

    known = [(i, score) for i, score in zip(ids, scores, strict=True) if score is not None]
    ranked = sorted(known, key=lambda row: row[1], reverse=True)
    make_folder(path.parent)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(("id", "score"))
        rows.writerows(ranked)


def state_needs(spec: EnsembleSpec, method: str, options: Mapping[str, Any], cache: Path, workers: int) -> None:
    """Print the models, memory and disk that the ensemble needs, before it is trained."""
    import torch

    from engine.attack.ensemble import ensemble_needs, open_data
    from engine.cli.console import console
    from engine.config import split_options
    from engine.methods import get_method
    from engine.plan import plan
    from engine.runtime.device import resolve_device

    needs = ensemble_needs(spec, cache, workers)
    opened = open_data(spec.data, spec.targets)
    device = resolve_device(spec.run().device)
    memory = 0
    for name, chosen in (("retrain", spec.recipe), (method, options)):
        run, _ = split_options(chosen, get_method(name).Config)
        step = run.batch_size * run.accumulation_steps
        forget = max(len(opened.targets) // 3, step)  # a plan needs a whole step of both sets
        images = max(len(opened.source.train), forget + step)
        planned = plan(
            spec.model.architecture,
            images=images,
            forget_share=forget / images,
            device="cuda" if device.type == "cuda" else "cpu",
            method=name,
            options=chosen,
            num_classes=spec.model.num_classes,
            model_args=spec.model.model_args,
        )
        memory = max(memory, planned.memory.total())
    console.print(
        f"{2 * spec.pairs} models: {needs.found} found in {cache}, {needs.missing} to train, {workers} at a time with "
        f"{max(1, torch.get_num_threads() // workers)} threads each; then {2 * spec.pairs} runs of {method}\n"
        f"each process takes about {memory / 2**20:,.0f} MiB of {'GPU' if device.type == 'cuda' else 'main'} memory, "
        f"as `lethe plan` counts it, and its images; the cache at most {needs.disk / 2**20:,.0f} MiB more of disk",
        soft_wrap=True,
    )


def print_attack(found: Mapping[str, Any]) -> None:
    """Print the method compared with the originals, which unlearned nothing, and the direction of each number."""
    from rich.table import Table

    from engine.attack.ulira import DIRECTION
    from engine.cli.console import console

    table = Table("models", header_style="bold")
    rates = list(found["ulira"]["tpr_at_fpr"])
    for column in ("AUC", "balanced accuracy", *(f"TPR at FPR {100 * float(rate):g}%" for rate in rates)):
        table.add_column(column, justify="right")
    for name, key in ((f"unlearned by {found['method']}", "ulira"), ("untouched", "untouched")):
        numbers = found[key]
        shown = [numbers["auc"], numbers["balanced_accuracy"], *(numbers["tpr_at_fpr"][rate] for rate in rates)]
        table.add_row(name, *map(_cell, shown))
    console.print(table)
    for name in ("auc", "balanced_accuracy", "tpr_at_fpr", "untouched"):
        console.print(f"[dim]{name.replace('_', ' ')}: {DIRECTION[name]}.[/dim]", soft_wrap=True)
    models, seconds = found["models"], found["seconds"]
    each = models["of_each_kind_a_target"]
    many = each["fewest"] if each["fewest"] == each["most"] else f"{each['fewest']} to {each['most']}"
    console.print(
        f"[dim]In brackets: 95% intervals over the models. Each of {found['targets']['count']} samples has {many} "
        f"unlearned models and as many retrained ones; variances {found['ulira']['variance']}.[/dim]",
        soft_wrap=True,
    )
    if models["collapsed"]:
        console.print(f"[bold]{models['collapsed']} of {models['unlearned']} runs of the method collapsed[/bold]")
    console.print(
        f"time: train {seconds['train']:.1f} s, unlearn {seconds['unlearn']:.1f} s, attack {seconds['attack']:.1f} s; "
        f"all models, whenever trained: {seconds['train_models']:.1f} s, all runs: {seconds['unlearn_models']:.1f} s",
        soft_wrap=True,
    )


def _cell(number: Mapping[str, Any]) -> str:
    if number["value"] is None:
        return "too few"
    return f"{number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}]".replace("[", r"\[")
