"""What a store of deletion requests holds: requests, versions of the model, and the run that has not ended."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any, Literal

from engine.requests.times import moment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A deletion request.

    Attributes:
        received, deadline: UTC, ISO 8601.
        source: Origin of the request, as given.
        count: Number of its ids.
        version: Version that forgot them; None: not forgotten yet.
        proven: Version whose verdict passed with them in it; None: there is none yet.
        proven_at: When it did; None: not yet, or by a release that did not keep it.
        attempts: Number of finished runs that it was in.
        reason: Reason of the last of these runs, if it was no PASS.
        running: Unfinished run that it is in.
    """

    number: int
    received: str
    deadline: str
    source: str
    count: int
    version: int | None = None
    proven: int | None = None
    proven_at: str | None = None
    attempts: int = 0
    reason: str = ""
    running: int | None = None

    @property
    def state(self) -> Literal["open", "unproven", "done"]:
        if self.version is None:
            return "open"
        return "unproven" if self.proven is None else "done"

    def days_left(self, now: datetime.datetime) -> float:
        """Return the days until the deadline; negative once it has passed."""
        return (moment(self.deadline) - now).total_seconds() / 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Version:
    """A model of the lineage.

    Attributes:
        parent: Version that it was made from; None for version 0.
        base: Version of the full retrain that it descends from; version 0 if there is none.
        verdict, reason: Status of its verdict, if there is one, and reason of a status other than PASS.
        drift: Share [0, 1] of samples forgotten since the base, and test figures against it, see
            `engine.requests.drift.drift_from`.
        requests: Requests of its run.
    """

    number: int
    parent: int | None
    base: int
    kind: Literal["root", "unlearned", "rebase"]
    state: Literal["accepted", "rejected", "abandoned"]
    created: str
    verdict: str | None
    reason: str
    drift: dict[str, Any]
    requests: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run that has begun and not ended.

    Attributes:
        number, parent: Number of the version that it makes, and of the one that is unlearned.
        options: See `engine.requests.run_options.Options`.
        started: UTC, ISO 8601.
        requests: Requests of the run.
    """

    number: int
    parent: int
    options: dict[str, Any]
    started: str
    requests: list[int]
