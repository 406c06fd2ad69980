"""Project hours on ImageNet from measured steps and stated recipes; this gives no figure of quality.

Steps of LetheViT's two stages, the teacher's passes and plain passes are timed here by the engine itself, on images
already in memory. `engine.plan.work` has the number of images of each kind in a job, evaluation and watching included.
Not included: decoding, communication between devices, checkpoints.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from rich.table import Table

from bench.harness.cases import Model, StepCase
from bench.harness.measure import EnergyMeter, middle, stopwatch
from bench.training_cost.steps import EngineStep, digits
from engine.cli.console import console
from engine.config import RunConfig
from engine.data import Loader
from engine.methods import get_method
from engine.models.predict import predict
from engine.models.preprocessing import preprocessing_of
from engine.models.xformers_attention import resolve_attention
from engine.plan.cost import count_cost
from engine.plan.work import RECIPES as PLANNED
from engine.plan.work import Sizes, phases_of, retraining_work, seconds_of, unlearning_work

# The projected request: a tenth of the training images, and the methods to compare with the retrain.
FORGET_SHARE = 0.1
TEST_IMAGES = 50_000
METHODS = ("lethe", "finetune")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained on ImageNet-1k. batch: images a step; resolution in pixels; source: who published it.

    published_for: the models that the source trained so; for others it is an assumption.
    """

    name: str
    epochs: float
    images: int = 1_281_167
    batch: int
    resolution: int = 224
    source: str
    published_for: tuple[str, ...]


def _recipe(key: str, name: str, published_for: tuple[str, ...]) -> Recipe:
    """Return a recipe of `lethe plan`; both were published at batch 1024 and 224 pixels."""
    epochs, source = PLANNED[key]
    return Recipe(name=name, epochs=epochs, batch=1024, source=source, published_for=published_for)


RECIPES = (
    _recipe("deit", "DeiT, 300 epochs", ("ViT-S/16 224", "ViT-B/16 224")),
    _recipe("plain-vit", "plain ViT, 90 epochs", ("ViT-S/16 224",)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """Sizes of a measurement: images a step, steps that are timed of each stage, and steps before them."""

    batch: int
    steps: int
    warmup: int


def project(
    models: Sequence[Model],
    device: torch.device,
    precision: Literal["fp32", "bf16"],
    timed: Timed,
    price: float | None,
) -> list[dict[str, Any]]:
    """Return an entry a model, as `projection` of `bench.quality.retrain_cost`. price: of one device-hour."""
    return [_project(model, device, precision, timed, price) for model in models]


def _project(
    model: Model, device: torch.device, precision: Literal["fp32", "bf16"], timed: Timed, price: float | None
) -> dict[str, Any]:
    measured = measure(model, device, precision, timed)
    attention = resolve_attention("auto", device, precision)
    cost = count_cost(model.spec(), precision=precision, autocast=True, checkpointing=False, attention=attention)
    rates = {
        **{phase: found["images_per_second"] for phase, found in measured["phases"].items()},
        "teacher": measured["teacher_images_per_second"],
        "forward": measured["forward_images_per_second"],
    }

    def entry(work: str, recipe: Recipe | None, epochs: dict[str, float], sizes: Sizes) -> dict[str, Any]:
        if recipe:
            items = retraining_work(cost, sizes, recipe.epochs)
        else:
            items = unlearning_work(cost, sizes, work, get_method(work).Config(), RunConfig())
        seconds = seconds_of(items, cost, 1, rates)
        hours = sum(seconds.values()) / 3600
        return {
            "work": work,
            "recipe": recipe.name if recipe else None,
            "published_for_model": model.name in recipe.published_for if recipe else None,
            "source": recipe.source if recipe else "defaults of this release",
            "epochs": epochs,
            "parts": {name: value / 3600 for name, value in seconds.items()},
            "device_hours": hours,
            "kwh": None if measured["watts"] is None else measured["watts"] * hours / 1000,
            "money": None if price is None else price * hours,
        }

    hours = [entry("retrain", recipe, {"retain": recipe.epochs}, sizes_of(recipe)) for recipe in RECIPES]
    retrains = {found["recipe"]: found["device_hours"] for found in hours}
    for method in METHODS:
        epochs = {phase.name: phase.epochs for phase in phases_of(method, get_method(method).Config())}
        found = entry(method, None, epochs, sizes_of(RECIPES[0]))
        hours.append(found | {"share": {name: found["device_hours"] / each for name, each in retrains.items()}})
    return {**measured, "hours": hours}


def sizes_of(recipe: Recipe) -> Sizes:
    """Return the sizes of the request on the recipe's images, on one device."""
    forget = round(recipe.images * FORGET_SHARE)
    return Sizes(forget=forget, retain=recipe.images - forget, test=TEST_IMAGES, ranks=1, batch=recipe.batch)


def measure(model: Model, device: torch.device, precision: Literal["fp32", "bf16"], timed: Timed) -> dict[str, Any]:
    """Measure every timed step of both stages in seconds, and images a second of all kinds of passes (medians).

    watts: mean over the timed steps if the device reports energy.
    """
    images = 4 * timed.batch
    meter = EnergyMeter(device)
    phases: dict[str, Any] = {}
    teacher, joules = 0.0, 0.0
    for phase in ("forget", "retain"):
        case = StepCase(model=model, phase=phase, precision=precision, batch=timed.batch)
        samples = digits(case, images)
        step = EngineStep(case, device, images)
        try:
            for _ in range(timed.warmup):
                step()
            used = meter.start()
            seconds = [stopwatch(step, device)[0] for _ in range(timed.steps)]
            joules += used() or 0.0
        finally:
            step.close()
        if phase == "forget":
            teacher = len(samples) / step.prepare_seconds
        phases[phase] = {"seconds": seconds, "images_per_second": step.batch / middle(seconds)}
    total = sum(sum(found["seconds"]) for found in phases.values())
    return {
        "model": model.name,
        "precision": precision,
        "device": str(device),
        "batch": timed.batch,
        "steps": timed.steps,
        "phases": phases,
        "teacher_images_per_second": teacher,
        "forward_images_per_second": _forward_rate(case, device, images),
        "watts": joules / total if meter.source else None,
        "words": f"projected from {timed.steps} measured steps of each stage at batch {timed.batch}, {precision}, "
        f"on one {'card' if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}, images already in "
        "memory",
    }


def _forward_rate(case: StepCase, device: torch.device, images: int) -> float:
    """Return the images a second of an evaluation, the second time, when all images are decoded."""
    samples, model = digits(case, images), case.model.spec().build(seed=0).to(device)
    loader = Loader(samples, preprocessing_of(model), batch_size=case.batch, device=device, workers=0)
    predict(model, loader, case.precision)
    began = time.perf_counter()
    predict(model, loader, case.precision)  # its numbers come to the host: nothing is left running on the device
    return len(samples) / (time.perf_counter() - began)


def print_projection(projection: Sequence[dict[str, Any]]) -> None:
    """Print a table a model."""
    for found in projection:
        table = Table("ImageNet-1k", "epochs", header_style="bold", title=f"{found['model']}, {found['words']}")
        recipes = [each["recipe"] for each in found["hours"] if each["recipe"]]
        for column in ("device-hours", *(f"of {recipe}" for recipe in recipes), "kWh", "money"):
            table.add_column(column, justify="right")
        for each in found["hours"]:
            shares = each.get("share", {})
            table.add_row(
                _work(each),
                " + ".join(f"{epochs:g} {phase}" for phase, epochs in each["epochs"].items()),
                f"{each['device_hours']:,.1f}",
                *(f"{100 * shares[recipe]:.1f}%" if recipe in shares else "-" for recipe in recipes),
                *("-" if each[key] is None else f"{each[key]:,.1f}" for key in ("kwh", "money")),
            )
        console.print(table)
    console.print("[dim]time alone: the quality of these runs is not measured; * published for another model[/dim]")


def _work(entry: dict[str, Any]) -> str:
    if not entry["recipe"]:
        return str(entry["work"])
    return f"{entry['work']}: {entry['recipe']}{'' if entry['published_for_model'] else ' *'}"
