"""Where a store stands: what is open and until when, the lineage, its drift, and what to do about it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.requests.store import Request, Store, Version, utc_now


def status(folder: Path, *, max_share: float | None = None, now: datetime.datetime | None = None) -> dict[str, Any]:
    """All of it as plain values. max_share: in place of the store's, of the forgotten since the last full retrain.

    pending: what is open or unproven. days_left: until the deadline, negative once it has passed. share: forgotten
    since the base over what the base was trained on, [0, 1]. Of the drift, lower is better but for test_accuracy; units
    as of `runner.drift_from`.
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
        "source": request.source,
        "samples": request.count,
        "attempts": request.attempts,
        "reason": request.reason,
        "version": request.version,
        "proven": request.proven,
        "running": request.running,
    }


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
        "reason": version.reason,
        "drift": version.drift,
        "folder": str(store.place(version.number)),
    }


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
