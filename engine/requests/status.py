"""State of a store: open requests with their deadlines, the lineage, its drift, and remedies."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.requests.entries import Request, Version
from engine.requests.store import Store
from engine.requests.times import moment, utc_now


def status(folder: Path, *, max_share: float | None = None, now: datetime.datetime | None = None) -> dict[str, Any]:
    """Return the state of a store as plain values.

    Args:
        folder: Folder of the store.
        max_share: In place of the store's share [0, 1] of samples forgotten since the last full retrain, above which a
            warning is given.
        now: The current time; None: of the clock.

    Returns:
        pending: requests that are open or unproven. done: the others; late: done after the deadline. days_left: until
        the deadline, negative once it has passed. share: samples forgotten since the base over those that the base was
        trained on, [0, 1]. All values of the drift except test_accuracy are better if lower; units as of
        `engine.requests.drift.drift_from`.
    """
    now = now or utc_now()
    with Store.open(folder) as store:
        current, run, requests = store.current(), store.unfinished(), store.requests()
        limit = store.settings["max_share"] if max_share is None else max_share
        counts = {state: sum(r.state == state for r in requests) for state in ("open", "unproven", "done")}
        return {
            "store": str(folder),
            **{key: store.settings[key] for key in ("data", "train", "fingerprint", "checkpoint", "method", "config")},
            "current": {"version": current.number, "folder": str(store.place(current.number)), "base": current.base},
            "unfinished": None
            if run is None
            else {"version": run.number, "parent": run.parent, "started": run.started, "requests": run.requests},
            "requests": {**counts, "overdue": sum(_overdue(r, now) for r in requests)},
            "pending": [describe_request(r, now) for r in requests if r.state != "done"],
            "done": [describe_request(r, now) for r in requests if r.state == "done"],
            "forgotten": len(store.forgotten()),
            "versions": [_version(store, each, requests) for each in store.versions()],
            "max_share": limit,
            "warnings": [*_late(requests, now), *_drifted(store, current, limit)],
        }


def describe_request(request: Request, now: datetime.datetime) -> dict[str, Any]:
    return {
        "request": request.number,
        "state": request.state,
        "received": request.received,
        "deadline": request.deadline,
        "days_left": None if request.state == "done" else round(request.days_left(now), 2),
        "overdue": _overdue(request, now),
        "late": _late_done(request),
        "source": request.source,
        "samples": request.count,
        "attempts": request.attempts,
        "reason": request.reason,
        "version": request.version,
        "proven": request.proven,
        "proven_at": request.proven_at,
        "running": request.running,
    }


def _late_done(request: Request) -> bool:
    """Return whether a request was done after its deadline."""
    return request.proven_at is not None and moment(request.proven_at) > moment(request.deadline)


def _overdue(request: Request, now: datetime.datetime) -> bool:
    return request.state != "done" and request.days_left(now) < 0


def _version(store: Store, version: Version, requests: Sequence[Request]) -> dict[str, Any]:
    return {
        "version": version.number,
        "parent": version.parent,
        "base": version.base,
        "kind": version.kind,
        "state": version.state,
        "created": version.created,
        "requests": version.requests,
        "samples": sum(r.count for r in requests if r.number in version.requests),
        "verdict": version.verdict,
        "proof": _kind(store, version),
        "reason": version.reason,
        "drift": version.drift,
        "folder": str(store.place(version.number)),
    }


def _kind(store: Store, version: Version) -> str | None:
    """Return the kind of proof of a version's verdict, from its verdict.json; None without a verdict."""
    file = store.place(version.number) / "verdict.json"
    if version.verdict is None or not file.is_file():
        return None
    try:
        kind: str | None = json.loads(file.read_text(encoding="utf-8")).get("kind")
    except (ValueError, AttributeError):
        return "unreadable"
    return kind


def _late(requests: Sequence[Request], now: datetime.datetime) -> list[str]:
    found = []
    for state, remedy in (
        ("open", "lethe request run"),
        ("unproven", "lethe request judge with --reference, or a run with more forgotten samples, closes them"),
    ):
        late = [str(r.number) for r in requests if r.state == state and _overdue(r, now)]
        if late:
            found.append(f"overdue and {state}: requests {', '.join(late)}; {remedy}")
    return found


def _drifted(store: Store, current: Version, limit: float) -> list[str]:
    share = current.drift.get("share", 0.0)
    if share <= limit:
        return []
    return [
        f"{100 * share:.1f}% of the training samples were forgotten since the full retrain of version "
        f"{current.base:04d}, more than {100 * limit:g}% (--max-share): retrain with lethe train --forget FILE (lethe "
        f"request list --all --ids FILE writes it), then lethe request rebase --store {store.folder} --checkpoint DIR"
    ]
