"""Access to a store for the commands that change its lineage: one process, one lock, the models' options active."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from engine.audit.record_check import verify_record
from engine.data import Source
from engine.errors import UserError
from engine.jobs.opening import Opening, current
from engine.jobs.opening import open_model as load_checkpoint
from engine.models.checkpoint import weights_sha256
from engine.requests.intake import open_data
from engine.requests.store import Store, locked, weights_key
from engine.runtime.process_group import launched


def refuse_launcher(command: str) -> None:
    """Raise UserError under a launcher: each of its ranks would change the lineage."""
    if launched():
        raise UserError(f"lethe request {command} is one process; start it without a launcher")


@contextlib.contextmanager
def open_lineage(folder: Path) -> Iterator[Store]:
    """Lock and open a store; inside, models are opened with the options that `init_store` was given.

    Raises:
        UserError: There is no store, version 0 is missing, or another process holds the lock.
    """
    with locked(folder), Store.open(folder) as store, Opening.of(store.settings.get("opening")).active():
        _place_of(store, 0)
        yield store


def _place_of(store: Store, number: int) -> Path:
    """Return the folder of a version.

    Raises:
        UserError: It is missing.
    """
    place = store.place(number)
    if not place.is_dir():
        raise UserError(f"{place}: the folder of version {number:04d} is missing; restore it from a backup")
    return place


def open_ordered_data(store: Store) -> Source:
    """Open the data of a store, with labels in the order of version 0's classes."""
    source = open_data(store)
    return current().in_order_of(source, load_checkpoint(store.place(0))) if source.train.class_names else source


def refuse_changed(store: Store, number: int) -> None:
    """Raise UserError if the files of a version are not as they were written; those of its base likewise."""
    for each in dict.fromkeys((number, store.base_of(number))):
        place = _place_of(store, each)
        remedy = "restore it from a backup; what was made from a changed version is no proof"
        kept = store.settings.get(weights_key(each))
        if kept is not None and weights_sha256(load_checkpoint(place)) != kept:
            command = "rebase" if each else "init"
            raise UserError(f"{place}: its weights are not those that lethe request {command} copied; {remedy}")
        if (place / "record.json").is_file() and (problems := verify_record(place)):
            raise UserError(f"{place}: changed since it was written ({problems[0]}); {remedy}")


def refuse_unfinished(store: Store) -> None:
    """Raise UserError if there is a run that has not ended."""
    run = store.unfinished()
    if run is not None:
        raise UserError(
            f"{store.folder}: the run of version {run.number:04d} has not ended; continue it by lethe request run, "
            "or drop it by lethe request run --abandon"
        )
