"""Initial model of `lethe train`: a timm architecture, or a checkpoint (`--init`)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from engine.cli.options import checkpoint_sources
from engine.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from engine.data import Source
    from engine.jobs.task import Task


@dataclasses.dataclass(frozen=True)
class Start:
    """The options `--init`, `--arch`, `--model-arg`, `--weights` and `--sliced` as they were given."""

    init: str | None
    arch: str | None
    model_arg: list[str] | None
    weights: str | None
    sliced: bool

    def check(self, options: dict[str, Any]) -> None:
        """Raise UserError for options that contradict each other; with `--init`, set the option base to `given`."""
        base = options.get("base")
        if self.init is None:
            if self.arch is None:
                raise UserError("train: give --arch NAME (fresh weights) or --init CHECKPOINT (fine-tuning)")
            if base == "given" and not self.sliced:
                raise UserError("train: --set base=given needs the checkpoint to start from; give it by --init")
            if self.weights:
                raise UserError(f"train: --weights {self.weights} is for a file that is given by --init")
            return
        if base == "fresh":
            raise UserError(f"train: --set base=fresh contradicts --init {self.init}; leave one of them out")
        options["base"] = "given"

    def model(self, source: Source, task: Task | None, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """Return the model to train, and the notes on its origin for config.yaml and the record."""
        from engine.config import parse_assignments
        from engine.jobs.start import architecture, init_model, pretrained
        from engine.models.spec import describing, spec_of

        if self.init is not None:
            (place,) = checkpoint_sources([self.init], self.arch, self.model_arg, self.weights)
            if self.sliced:
                return pretrained(place or self.init, {}, source), {"arch": place}
            return init_model(place or self.init, source, task, options["seed"])
        build = pretrained if options.get("base") == "given" else architecture
        model = build(self.arch or "", parse_assignments(self.model_arg or []), source)
        # A run is resumed with the same model alone; `Opening` sets the names of the classes, those of the data.
        given = {"model_args": parse_assignments(self.model_arg)} if self.model_arg else {}
        return describing(model, spec_of(model).label_names), {"arch": self.arch, **given}
