"""Initial model and run of `lethe train` and `lethe pool train`: a timm architecture, or a checkpoint (`--init`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.cli.options import checkpoint_sources
from engine.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from engine.data import Source
    from engine.jobs.opening import Opening
    from engine.jobs.references import ReferenceRun
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


def set_own(command: str, options: dict[str, Any], **own: Any) -> None:
    """Add options that the command has options of its own for; raise UserError if --set gives one of them."""
    for name, value in own.items():
        if name in options:
            raise UserError(f"{command}: --set {name}={options[name]}: give it by --{name} {options[name]}")
        options[name] = value


@dataclasses.dataclass(frozen=True)
class Training:
    """Trains models from one start.

    Attributes:
        start: Initial model.
        source: The data.
        options: Options of every run, except its seed.
        opening: Changes of the command.
        method: retrain or s3t.
        overwrite, deepspeed, sign: As of the command.
    """

    start: Start
    source: Source
    options: dict[str, Any]
    opening: Opening
    method: str = "retrain"
    overwrite: bool = False
    deepspeed: Path | None = None
    sign: Path | None = None

    def run(self, each: ReferenceRun, request: Task | None) -> dict[str, Any]:
        """Train a model on the retain set of a request, or on all samples; print and return its numbers."""
        from engine.audit.run_record import RecordOptions
        from engine.cli.console import console, print_seconds, progress_bars
        from engine.jobs.train import train_job

        config = {**self.options, "seed": each.seed}
        model, notes = self.start.model(self.source, request, config)
        source, task, facts = self.opening.prepare_training(self.source, request, model)
        with progress_bars() as progress:
            result = train_job(
                source,
                model,
                each.folder,
                task=task,
                method=self.method,
                config=config,
                resume=each.resume,
                overwrite=self.overwrite,
                progress=progress,
                deepspeed=self.deepspeed,
                notes={**notes, **facts},
                record=RecordOptions(key=self.sign),
            )
        samples = task.retain if task else source.train
        accuracy = {"train": result.accuracy(samples), "test": result.accuracy(source.test)}
        shown = ", ".join(f"{name} {100 * value:.1f}%" for name, value in accuracy.items())
        console.print(f"accuracy: {shown}; checkpoint in {each.folder}")
        print_seconds(result.seconds)
        return {"accuracy": accuracy, "seconds": result.seconds, "samples_seen": result.samples_seen}
