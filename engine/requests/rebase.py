"""A full retrain as the current version of a lineage, and as the base that drift is measured from."""

from __future__ import annotations

from pathlib import Path

from engine.audit.run_record import origin
from engine.errors import UserError
from engine.jobs.opening import open_model as load_checkpoint
from engine.jobs.task import Task
from engine.models.checkpoint import save_checkpoint, weights_sha256
from engine.models.checkpoint_source import CheckpointSource
from engine.requests.intake import load_fitting
from engine.requests.lineage import open_lineage, open_ordered_data, refuse_launcher, refuse_unfinished


def rebase(folder: Path, checkpoint: str) -> tuple[int, bool]:
    """Make a full retrain the current version and the base of drift; return (number, whether its run folder proves it).

    Raises:
        UserError: By its run folder the model is no retrain, or was trained on samples that were forgotten.
    """
    refuse_launcher("rebase")
    with open_lineage(folder) as store:
        refuse_unfinished(store)
        source, forgotten = open_ordered_data(store), store.forgotten()
        model, found = load_fitting(checkpoint, source), origin(CheckpointSource.parse(checkpoint).folder)
        if found is not None and found.method != "retrain":
            raise UserError(
                f"--checkpoint {checkpoint}: by its {found.source} it was made by {found.method}, not by a full "
                "retrain; retrain with lethe train --forget"
            )
        if found is not None and forgotten and found.samples_sha256 == source.train.fingerprint():
            raise UserError(
                f"--checkpoint {checkpoint}: by its {found.source} it was trained on all samples, the "
                f"{len(forgotten)} forgotten ones among them; retrain with lethe train --forget and the list that "
                "lethe request list --all --ids FILE writes"
            )
        digest = weights_sha256(model)
        for version in store.versions():
            if version.kind != "rebase" and _digest(store.place(version.number)) == digest:
                raise UserError(
                    f"--checkpoint {checkpoint}: its weights are those of version {version.number:04d}, so it is no "
                    "full retrain; retrain with lethe train --forget"
                )
        retained = Task.of_ids(source, forgotten, spec="rebase").retain if forgotten else source.train
        # A model that was trained from another checkpoint is as clean as that one, which its record leaves open.
        proven = found is not None and not found.init and found.samples_sha256 == retained.fingerprint()
        number = store.next_number()
        save_checkpoint(model, store.place(number))
        store.add_rebase(number, f"full retrain, {'by its record' if proven else 'as stated'}: {checkpoint}", digest)
    return number, proven


def _digest(place: Path) -> str:
    """Return the SHA-256 of a version's weights; empty if they cannot be read."""
    try:
        return weights_sha256(load_checkpoint(place))
    except UserError:
        return ""
