"""What comes into a store: the model that it begins with, and the requests."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from engine.config import split_options
from engine.data import Source, open_source, read_forget_request
from engine.errors import UserError
from engine.evaluate.verdict import Gates
from engine.jobs.opening import current
from engine.jobs.opening import open_model as load_checkpoint
from engine.jobs.task import Task
from engine.methods import get_method
from engine.models.checkpoint import save_checkpoint
from engine.models.checkpoint_source import CheckpointSource
from engine.models.info import model_info
from engine.models.slice_stages import copy_stages
from engine.requests.store import Request, Store, is_store, moment, place_of, utc_now

DAYS = 30  # from receipt to the deadline, where a request names neither
MAX_SHARE = 0.2
_GATES = "gates.yaml"


def init_store(
    folder: Path,
    checkpoint: str,
    data: str,
    *,
    method: str = "lethe",
    config: Mapping[str, Any] | None = None,
    references: Sequence[str] = (),
    gates: Path | None = None,
    max_share: float = MAX_SHARE,
) -> None:
    """Makes a store: version 0 is a copy of the checkpoint, so that the lineage is whole whatever becomes of it."""
    if is_store(folder):
        raise UserError(f"{folder} is a store of requests already; name another folder with --store")
    # What an init that was killed has left is written over; anything else is not ours.
    foreign = [
        path.name for path in folder.glob("*") if not path.name.startswith(("requests.sqlite", "versions", _GATES))
    ]
    if foreign:
        raise UserError(f"{folder} holds files that are not a store's ({foreign[0]}); name another folder with --store")
    if not 0 < max_share <= 1:
        raise UserError(f"--max-share {max_share}: expected a share in (0, 1]")
    split_options(config or {}, get_method(method).Config)
    source = open_source(data)
    model = load_fitting(checkpoint, source, config)
    if gates is not None:
        Gates.read(gates)
    for reference in references:
        current().compare(f"--reference {reference}", current().model(reference), model)
    save_checkpoint(model, place_of(folder, 0))
    copy_stages(model, place_of(folder, 0))
    if gates is not None:
        shutil.copyfile(gates, folder / _GATES)  # a later edit of the file must not change what requests are held to
    settings = {
        "data": data,
        "train": len(source.train),
        "fingerprint": source.train.fingerprint(),
        "checkpoint": checkpoint,
        "method": method,
        "config": dict(config or {}),
        "references": absolute(references),
        "gates": _GATES if gates else None,
        "max_share": max_share,
        "opening": current().to_dict(),
    }
    with Store.create(folder, settings):
        pass


def add_request(
    folder: Path,
    *,
    file: Path | None = None,
    ids: Sequence[str] = (),
    received: str | None = None,
    deadline: str | None = None,
    days: float | None = None,
    source: str = "",
    skip_known: bool = False,
    now: datetime.datetime | None = None,
) -> tuple[Request | None, dict[str, int]]:
    """(the new request, {"duplicates": merged, "skipped": known already}); None where all ids were known.

    Raises UserError, and adds nothing, for ids that the data does not hold and for those of another request.
    """
    if (file is None) == (not ids):
        raise UserError("give --ids FILE or --id ID, one of the two")
    if deadline is not None and days is not None:
        raise UserError("give --deadline or --days, not both")
    now = now or utc_now()
    came = moment(received) if received else now
    if came > now:
        raise UserError(f"--received {received}: lies in the future (UTC)")
    due = (
        moment(deadline, end_of_day=True)
        if deadline
        else came + datetime.timedelta(days=DAYS if days is None else days)
    )
    if due < came:
        raise UserError(f"the deadline {due:%Y-%m-%d %H:%M} lies before the receipt {came:%Y-%m-%d %H:%M} (UTC)")
    with Store.open(folder) as store:
        data = open_data(store)
        if file is not None:
            request = read_forget_request(str(file), data.train)
        else:
            request = Task.of_ids(data, ids, spec="--id").request
        wanted = list(data.train.ids.take(request.indices))
        number, known = store.add(wanted, received=came, deadline=due, source=source, skip_known=skip_known)
        added = next((request for request in store.requests() if request.number == number), None)
    return added, {"duplicates": request.duplicates, "skipped": len(known)}


def open_data(store: Store) -> Source:
    """The data of a store. Raises UserError where its training samples are no longer those of init."""
    source = open_source(store.settings["data"])
    if source.train.fingerprint() != store.settings["fingerprint"]:
        raise UserError(
            f"the training samples of {source.spec} have changed since the store {store.folder} was made "
            f"({store.settings['train']} then, {len(source.train)} now); bring them back, or make a new store from a "
            "model that was trained on what there is now"
        )
    return source


def load_fitting(checkpoint: str, source: Source, config: Mapping[str, Any] | None = None) -> nn.Module:
    """A checkpoint that can be unlearned on this data. config: options of the check, such as device."""
    model = load_checkpoint(checkpoint)
    model_info(model)
    current().check_samples(source.train, model, checkpoint, source.spec, config or {})
    return model


def absolute(checkpoints: Sequence[str]) -> list[str]:
    """Folders and files by their whole path: a run may go on from another directory. Names of timm and the hub as they
    are."""
    sources = [CheckpointSource.parse(name) for name in checkpoints]
    return [
        str(dataclasses.replace(source, place=str(Path(source.place).resolve())))
        if Path(source.place).exists()
        else name
        for source, name in zip(sources, checkpoints, strict=True)
    ]
