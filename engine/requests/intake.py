"""Creating a store of deletion requests, and adding requests to it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from engine.config import DEFAULT_METHOD, split_options
from engine.core.method import refuse_unfit
from engine.data import Source, open_source, read_forget_request
from engine.errors import UserError
from engine.evaluate.gates import Gates
from engine.jobs.opening import current
from engine.jobs.opening import open_model as load_checkpoint
from engine.jobs.task import Task
from engine.methods import get_method
from engine.models.checkpoint import save_checkpoint, weights_sha256
from engine.models.checkpoint_source import absolute_checkpoint
from engine.models.info import model_info
from engine.models.slice_stages import copy_stages
from engine.pool.certificate import check_given
from engine.pool.store import Pool
from engine.requests.database import is_store
from engine.requests.entries import Request
from engine.requests.store import Store, place_of
from engine.requests.times import RequestTimes

MAX_SHARE = 0.2
_GATES = "gates.yaml"
_KEY = "public_key.pem"


def init_store(
    folder: Path,
    checkpoint: str,
    data: str,
    *,
    method: str = DEFAULT_METHOD,
    config: Mapping[str, Any] | None = None,
    references: Sequence[str] = (),
    gates: Path | None = None,
    max_share: float = MAX_SHARE,
    pool: Path | None = None,
    certificates: Sequence[Path] = (),
    public_key: Path | None = None,
) -> None:
    """Create a store of deletion requests. Version 0 is a copy of the checkpoint.

    With the copy the lineage stays complete if the checkpoint is changed or deleted.

    Args:
        folder: Folder of the store.
        checkpoint: The model that the lineage starts from.
        data: Spec of its training data.
        method, config: As of `engine.unlearn`, for the runs of the store.
        references: Reference models for the verdicts.
        gates: File of limits, copied into the store; None: the defaults.
        max_share: Share (0, 1] of the training samples, forgotten since the last full retrain, above which `status`
            warns.
        pool, certificates: As of `engine.requests.run_options.Overrides`.
        public_key: The same; copied into the store.

    Raises:
        UserError: The folder is a store already or holds other files, an option is out of range, or the checkpoint fits
            neither the data nor the method.
    """
    if is_store(folder):
        raise UserError(f"{folder} is a store of requests already; name another folder with --store")
    # Files that a killed init left are overwritten; any other file is refused.
    foreign = [
        path.name
        for path in folder.glob("*")
        if not path.name.startswith(("requests.sqlite", "versions", _GATES, _KEY))
    ]
    foreign += [f"versions/{path.name}" for path in (folder / "versions").glob("*") if path.name != "0000"]
    if foreign:
        raise UserError(f"{folder} holds files that are not a store's ({foreign[0]}); name another folder with --store")
    if not 0 < max_share <= 1:
        raise UserError(f"--max-share {max_share}: expected a share in (0, 1]")
    split_options(config or {}, get_method(method).Config)
    source = open_source(data)
    model = load_fitting(checkpoint, source, config)
    refuse_unfit(get_method(method), model)
    if gates is not None:
        Gates.read(gates)
    if pool is not None and references:
        raise UserError("--pool and --reference are both given; the verdict takes one of them")
    check_given(pool, certificates, public_key)
    if pool is not None:
        opened = Pool.open(pool)
        opened.check(opened.in_order(source))
        opened.check_recipe(checkpoint)
    for reference in references:
        current().compare(f"--reference {reference}", current().model(reference), model)
    save_checkpoint(model, place_of(folder, 0))
    copy_stages(model, place_of(folder, 0))
    # A later edit of the files must not change the limits, or who has to sign.
    for given, name in ((gates, _GATES), (public_key, _KEY)):
        if given is not None:
            shutil.copyfile(given, folder / name)
    settings = {
        "data": data,
        "train": len(source.train),
        "fingerprint": source.train.fingerprint(),
        "weights_sha256": weights_sha256(load_checkpoint(place_of(folder, 0))),  # as later commands read it
        "checkpoint": checkpoint,
        "method": method,
        "config": dict(config or {}),
        "references": absolute(references),
        "gates": _GATES if gates else None,
        "max_share": max_share,
        "pool": str(pool.resolve()) if pool else None,
        "certificates": [str(each.resolve()) for each in certificates],
        "public_key": _KEY if public_key else None,
        "opening": current().to_dict(),
    }
    with Store.create(folder, settings):
        pass


def add_request(
    folder: Path,
    *,
    file: Path | None = None,
    ids: Sequence[str] = (),
    times: RequestTimes | None = None,
    source: str = "",
    skip_known: bool = False,
) -> tuple[Request | None, dict[str, int]]:
    """Add a request to a store.

    Args:
        folder: Folder of the store.
        file: File of ids to forget; either this or `ids`.
        ids: Ids to forget.
        times: Receipt and deadline; None: now, and in 30 days (`engine.requests.times.DAYS`).
        source: Origin of the request, kept as given.
        skip_known: Leave out ids of other requests in place of an error.

    Returns:
        (the new request, {"duplicates": number of merged ids, "skipped": number of ids left out as known}). The request
        is None if all ids were known.

    Raises:
        UserError: The data does not hold an id, or an id is in another request; nothing is added. Also for times that
            contradict each other.
    """
    if (file is None) == (not ids):
        raise UserError("give --ids FILE or --id ID, one of the two")
    received, deadline = (times or RequestTimes()).resolve()
    with Store.open(folder) as store:
        data = open_data(store)
        if file is not None:
            request = read_forget_request(str(file), data.train)
        else:
            request = Task.of_ids(data, ids, spec="--id").request
        wanted = list(data.train.ids.take(request.indices))
        number, known = store.add(wanted, received=received, deadline=deadline, source=source, skip_known=skip_known)
        added = next((request for request in store.requests() if request.number == number), None)
    return added, {"duplicates": request.duplicates, "skipped": len(known)}


def open_data(store: Store) -> Source:
    """Open the data of a store.

    Raises:
        UserError: Its training samples are no longer those that the store was created with.
    """
    source = open_source(store.settings["data"])
    if source.train.fingerprint() != store.settings["fingerprint"]:
        raise UserError(
            f"the training samples of {source.spec} have changed since the store {store.folder} was made "
            f"({store.settings['train']} then, {len(source.train)} now); bring them back, or make a new store from a "
            "model that was trained on what there is now"
        )
    return source


def load_fitting(checkpoint: str, source: Source, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Load a checkpoint, and check that it can be unlearned on this data.

    Args:
        checkpoint: The checkpoint.
        source: The data.
        config: Options of the check, such as device, by name.

    Raises:
        UserError: It cannot.
    """
    model = load_checkpoint(checkpoint)
    model_info(model)
    current().check_samples(source.train, model, checkpoint, source.spec, config or {})
    return model


def absolute(checkpoints: Sequence[str]) -> list[str]:
    """Return checkpoints with absolute paths, since a run may be resumed from another directory."""
    return [absolute_checkpoint(name) for name in checkpoints]
