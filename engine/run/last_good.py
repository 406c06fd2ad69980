"""The weights of the last checkpoint of a run that has to stop."""

from __future__ import annotations

from pathlib import Path

from engine.models.checkpoint import save_checkpoint
from engine.models.spec import ModelSpec
from engine.models.trainable import merge_state
from engine.run.folder import RunFolder
from engine.run.train_engine import TrainEngine
from engine.runtime.process_group import ProcessGroup


def save_last_good(
    folder: RunFolder, spec: ModelSpec | None, train_engine: TrainEngine, world: ProcessGroup
) -> Path | None:
    """Save the weights of the last checkpoint as a model; every rank calls it.

    Args:
        folder: The run folder.
        spec: How the model is built; given if there is a folder.
        train_engine: Reads the weights of a checkpoint.
        world: Process group.

    Returns:
        The folder of the model; None if there is no checkpoint.
    """
    place, path = folder.checkpoint(), folder.path / "last_good"
    if place is None:
        return None

    def save() -> None:
        assert spec is not None  # there is a folder
        model = spec.build()
        model.load_state_dict(merge_state(train_engine.read_weights(place)))
        save_checkpoint(model, path)

    world.on_main(save)
    return path
