"""Result of a run."""

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
    """Result of a run.

    Attributes:
        model: The unlearned model, in eval mode, on the run's device.
        config: Every option, resolved.
        seconds: Wall-clock time: unlearn (all of it), prepare (masks and teacher passes), one entry for each phase, and
            data (part of the phases that was spent waiting for images, on the main rank).
        samples_seen: Training samples by phase.
        history: One row for each step, and one for each event.
        watched: Accuracy [0, 1] on the watched samples before and after.
        collapsed: That accuracy fell by more than 10 points in an unlearning run.
        output_dir: The run folder, or None.
        accuracy: Computes the model's top-1 accuracy [0, 1] on any samples.
        bad_images: Ids of training images that were left out, with the reason (on_bad_image=skip).
        writer: Called by `save` with the result, the folder and `overwrite`.
        stopped: If stop_when ended the run early: phase, epoch and step (from 0), the accuracies [0, 1] that were
            compared, and the criterion that ended it; else None.
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
        """Return the summary as an HTML table, for notebooks."""
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
        """Write the model and how it was made: config.json, model.safetensors, config.yaml, history.jsonl.

        The result of a run with an `output_dir` is in that folder already, with its record.

        Args:
            folder: A new or empty folder, or with `overwrite` the folder of an earlier run.
            overwrite: Replace that run.

        Returns:
            The folder, a checkpoint for every command and for `timm.create_model("local-dir:FOLDER")`.

        Raises:
            UserError: The folder holds something else, or the model has no timm architecture.
        """
        return self.writer(self, folder, overwrite)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [row for row in self.history if "event" in row]
