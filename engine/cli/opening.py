"""Options of every command that opens a trained model: its preprocessing, its labels, and the check before the work."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.cli.options import RANK
from engine.errors import UserError

_PREPROCESSING = {
    "mean": Annotated[
        str | None,
        typer.Option(
            help="Mean of the pixels, scaled to [0, 1], that the model was trained with: 0.5, three numbers with "
            "commas, or imagenet, inception, clip (openai), cifar10, unit (0). With --std.",
            show_default=False,
        ),
    ],
    "std": Annotated[str | None, typer.Option(help="Standard deviation, likewise.", show_default=False)],
    "crop_pct": Annotated[
        float | None,
        typer.Option(
            "--crop-pct", help="Share of the resized image that the centre crop keeps, in (0, 1].", show_default=False
        ),
    ],
    "interpolation": Annotated[
        str | None, typer.Option(help="bicubic, bilinear, nearest or nearest-exact.", show_default=False)
    ],
    "input_size": Annotated[
        str | None,
        typer.Option(
            "--input-size",
            help="Pixels of the model's input, such as 224 or 224x192; another size than the model's resamples its "
            "position embeddings.",
            show_default=False,
        ),
    ],
    "preprocessing": Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON file of all of these: timm's pretrained_cfg keys, or Hugging Face's "
            "preprocessor_config.json; single options go before it.",
            show_default=False,
        ),
    ],
}
_LABELS = {
    "label_order": Annotated[
        str | None,
        typer.Option(
            "--label-order",
            help="auto (the default): the data's class names are matched with the checkpoint's, if it has any; data: "
            "labels as the data numbers them.",
            show_default=False,
        ),
    ],
}
_ACCURACY = {
    "expect_accuracy": Annotated[
        str | None,
        typer.Option(
            "--expect-accuracy",
            help="Known accuracy of the untouched model on retained samples, such as 0.92 or 92%. Far "
            "below it nothing is run.",
            show_default=False,
        ),
    ],
    "accept_accuracy": Annotated[
        bool,
        typer.Option(
            "--accept-accuracy",
            help="Continue even if the accuracy of the untouched model suggests wrong inputs (near chance, far below "
            "its known accuracy, better with another mean and std, labels permuted).",
        ),
    ],
}


_GROUPS: dict[str, dict[str, Any]] = {"preprocessing": _PREPROCESSING, "labels": _LABELS, "accuracy": _ACCURACY}


def takes_models(*groups: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds these options to a command, as one argument `opening` (`engine.jobs.opening`).

    Inside the command, jobs open models with these options.

    Args:
        groups: Names of groups of options, by default all three.
    """
    options = {name: option for group in groups or _GROUPS for name, option in _GROUPS[group].items()}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command)
        command.__annotations__.pop("opening")  # its module is loaded when the command runs
        hints = typing.get_type_hints(command, include_extras=True)

        @functools.wraps(command)
        def run(**arguments: Any) -> Any:
            opening = _opening({name: arguments.pop(name) for name in options})
            with opening.active():
                return command(**arguments, opening=opening)

        own = [each.replace(annotation=hints[name]) for name, each in signature.parameters.items() if name != "opening"]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if name == "accept_accuracy" else None,
                annotation=annotation,
            )
            for name, annotation in options.items()
        ]
        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in (*own, *added)} | {"return": None}
        return run

    return decorate


def named_references(references: list[str] | None) -> dict[str, str]:
    """Return references by their names in errors and notes."""
    return {f"--reference {reference}": reference for reference in references or []}


def _opening(given: dict[str, Any]) -> Any:
    from engine.cli.console import console
    from engine.jobs.opening import LabelOrder, Opening, read_accuracy
    from engine.models.preprocessing import Changes

    order: LabelOrder = given.get("label_order") or "auto"
    if order not in ("auto", "data"):
        raise UserError(f"--label-order {order}: expected auto or data")
    changes = Changes.read(
        mean=given["mean"],
        std=given["std"],
        crop_pct=given["crop_pct"],
        interpolation=given["interpolation"],
        input_size=given["input_size"],
        file=given["preprocessing"],
    )

    def notify(line: str) -> None:
        if RANK == 0:
            console.print(line, soft_wrap=True, markup=False, highlight=False)

    return Opening(
        changes=changes,
        label_order=order,
        expect=read_accuracy(given.get("expect_accuracy")),
        accept=bool(given.get("accept_accuracy")),
        notify=notify,
    )
