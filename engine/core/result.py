"""What a run gives back."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from engine.data import Samples

# Called with (phase, step, steps, numbers) while a run lasts.
Progress = Callable[[str, int, int, dict[str, float]], None]
# Called with (phase, model) at the end of a phase.
AfterPhase = Callable[[str, nn.Module], None]


@dataclasses.dataclass(repr=False)
class UnlearnResult:
    """What a run gives back.

    model: the unlearned model, eval mode, on the run's device. config: every option as resolved.
    seconds: unlearn (all of it), prepare (masks and teacher passes), one entry a phase, and data: the part of the
        phases that was spent waiting for images, on the main rank.
    samples_seen: training samples by phase. history: one row a step, and one an event.
    events: the rows that say something went wrong (collapse).
    watched: accuracy [0, 1] on the watched samples before and after. collapsed: it fell by more than 10 points, in
        an unlearning.
    output_dir: the run folder, or None. accuracy: top-1 [0, 1] of the model on any samples.
    bad_images: ids of training images that were left out, and why (on_bad_image=skip).
    writer: what `save` calls with the result, the folder and `overwrite`.
    stopped: where stop_when ended the run before its epochs did: phase, epoch and step (from 0), the accuracies [0, 1]
        that it compared, and what `ended` it; None where it did not.
    """

    model: nn.Module
    config: dict[str, Any]
    seconds: dict[str, float]
    samples_seen: dict[str, int]
    history: list[dict[str, Any]]
    watched: dict[str, float]
    collapsed: bool
    output_dir: Path | None
    accuracy: Callable[[Samples], float]
    bad_images: dict[str, str]
    writer: Callable[[UnlearnResult, str | os.PathLike[str], bool], Path]
    stopped: dict[str, Any] | None = None

    def __repr__(self) -> str:
        collapsed = "COLLAPSED, " if self.collapsed else ""
        return f"<UnlearnResult: {collapsed}{', '.join(f'{name} {value}' for name, value in self._summary().items())}>"

    def _repr_html_(self) -> str:
        """The summary as a table, for notebooks."""
        rows = {**({"COLLAPSED": "do not use this model"} if self.collapsed else {}), **self._summary()}
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in rows.items()
        )
        return f"<table>{cells}</table>"

    def _summary(self) -> dict[str, str]:
        samples = self.config.get("samples", {})
        before, after = (f"{100 * self.watched[key]:.1f}%" for key in ("before", "after"))
        return {
            "method": str(self.config.get("method")),
            **{name: f"{samples[name]} samples" for name in ("forget", "retain") if name in samples},
            "watched accuracy": f"{before} before, {after} after",
            "time": f"{self.seconds['unlearn']:.1f} s",
            **({"left out": f"{len(self.bad_images)} images that cannot be read"} if self.bad_images else {}),
            **({"folder": str(self.output_dir)} if self.output_dir else {}),
        }

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Writes the model and how it was made: config.json, model.safetensors, config.yaml, history.jsonl.

        A result of a run that had an `output_dir` lies there already, with its record.

        Args:
            folder: a new or empty folder, or with `overwrite` that of an earlier run.
            overwrite: replace that run.

        Returns:
            The folder, a checkpoint for every command and for `timm.create_model("local-dir:FOLDER")`.

        Raises:
            UserError: the folder holds something else, or the model has no timm architecture.
        """
        return self.writer(self, folder, overwrite)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [row for row in self.history if "event" in row]
