"""The store of deletion requests: samples, deadlines, and the model versions made of them.

A folder with requests.sqlite and versions/0000, 0001, ..., each a checkpoint or the run folder of an unlearning. Every
fact is stored once and the rest is derived from it, so that two of them cannot contradict each other:

    an id            is in one request alone (primary key), and the ids themselves are in the store alone
    current version  the newest accepted one
    unfinished run   the run whose number no version has; there is at most one
    request          open until a version forgot it, unproven until a verdict that covers it passed, then done
    attempts         the finished runs that a request was in

Every change is one transaction, committed before the command continues (synchronous=EXTRA): a killed process leaves
either all of a change or nothing of it. Times are UTC, ISO 8601 in whole seconds, so that they sort as text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from engine.errors import UserError
from engine.requests.database import PROOFS, SCHEMA, TABLES, connect, is_store, transaction, translated
from engine.requests.entries import Request, Run, Version
from engine.requests.times import stamp, utc_now
from engine.runtime import lock

_REQUESTS = """SELECT number, received, deadline, source, version, proven,
    (SELECT COUNT(*) FROM samples WHERE request = r.number) AS count,
    (SELECT COUNT(*) FROM batches b JOIN versions v ON v.number = b.run WHERE b.request = r.number) AS attempts,
    (SELECT v.reason FROM batches b JOIN versions v ON v.number = b.run
        WHERE b.request = r.number ORDER BY b.run DESC LIMIT 1) AS reason,
    (SELECT b.run FROM batches b
        WHERE b.request = r.number AND b.run NOT IN (SELECT number FROM versions)) AS running
    FROM requests r ORDER BY deadline, number"""


class Store:
    """An open store of deletion requests, to be used in a `with` block. `settings`: what it was created with."""

    def __init__(self, folder: Path, database: sqlite3.Connection) -> None:
        self.folder, self._database = folder, database
        self.settings = {key: json.loads(value) for key, value in self._all("SELECT key, value FROM settings")}

    @classmethod
    def create(cls, folder: Path, settings: Mapping[str, Any]) -> Store:
        """Create the database next to versions/0000, which exists already. Until it ends there is no store."""
        database = connect(folder)
        with transaction(database):
            for table in TABLES:
                database.execute(table)
            database.executemany(
                "INSERT INTO settings VALUES (?, ?)", [(key, json.dumps(value)) for key, value in settings.items()]
            )
            database.execute(
                "INSERT INTO versions VALUES (0, NULL, 0, 'root', 'accepted', ?, NULL, '', '{}')", (stamp(utc_now()),)
            )
            database.execute(f"PRAGMA user_version = {SCHEMA}")
        return cls(folder, database)

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open the store in a folder.

        Raises:
            UserError: There is none.
        """
        if not is_store(folder):
            raise UserError(f"{folder} holds no store of requests; make one with lethe request init --store {folder}")
        return cls(folder, connect(folder))

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self._database.close()

    def place(self, number: int) -> Path:
        """Return the folder of a version."""
        return place_of(self.folder, number)

    # --- reading ------------------------------------------------------------------------------------------------------

    def requests(self) -> list[Request]:
        """Return all requests, the nearest deadline first."""
        rows, known = self._all(_REQUESTS), self._all("SELECT 1 FROM sqlite_master WHERE name = 'proofs'")
        times = self._all("SELECT request, at FROM proofs") if known else []
        proofs = {row["request"]: row["at"] for row in times}
        return [
            Request(
                **{**row, "reason": "" if row["proven"] else row["reason"] or ""}, proven_at=proofs.get(row["number"])
            )
            for row in map(dict, rows)
        ]

    def versions(self) -> list[Version]:
        rows = self._all("SELECT * FROM versions ORDER BY number")
        return [
            Version(**{**row, "drift": json.loads(row["drift"]), "requests": self.requests_of(row["number"])})
            for row in map(dict, rows)
        ]

    def current(self) -> Version:
        return [version for version in self.versions() if version.state == "accepted"][-1]

    def base_of(self, number: int) -> int:
        """Return the version of the full retrain that a version descends from; 0 if there is none."""
        return int(self._all("SELECT base FROM versions WHERE number = ?", (number,))[0]["base"])

    def unfinished(self) -> Run | None:
        """Return the run that has begun and not ended, if there is one."""
        rows = self._all("SELECT * FROM runs WHERE number NOT IN (SELECT number FROM versions)")
        if not rows:
            return None
        row = dict(rows[0])
        return Run(**{**row, "options": json.loads(row["options"]), "requests": self.requests_of(row["number"])})

    def run_of(self, version: Version) -> Run:
        """Return the run that made a version."""
        (row,) = self._all("SELECT * FROM runs WHERE number = ?", (version.number,))
        return Run(**{**dict(row), "options": json.loads(row["options"]), "requests": version.requests})

    def forgotten(self, version: int | None = None) -> list[str]:
        """Return the ids that were forgotten, by all versions or by those up to `version`; sorted."""
        newest = version if version is not None else self.next_number()
        rows = self._all(
            "SELECT id FROM samples JOIN requests r ON r.number = request WHERE r.version <= ? ORDER BY id", (newest,)
        )
        return [row["id"] for row in rows]

    def ids_of(self, requests: Sequence[int]) -> list[str]:
        """Return the ids of some requests; sorted."""
        query = "SELECT id FROM samples WHERE request IN (SELECT value FROM json_each(?)) ORDER BY id"
        return [row["id"] for row in self._all(query, (json.dumps(list(requests)),))]

    def next_number(self) -> int:
        rows = self._all("SELECT MAX(number) FROM (SELECT number FROM versions UNION ALL SELECT number FROM runs)")
        return int(rows[0][0]) + 1

    # --- writing ------------------------------------------------------------------------------------------------------

    def add(
        self,
        ids: Sequence[str],
        *,
        received: datetime.datetime,
        deadline: datetime.datetime,
        source: str = "",
        skip_known: bool = False,
    ) -> tuple[int | None, list[str]]:
        """Add a request.

        Args:
            ids: Its ids.
            received, deadline: Times with a time zone.
            source: Origin of the request.
            skip_known: Leave out ids of other requests in place of an error.

        Returns:
            (number of the new request, ids left out as known). The number is None if all ids are known.

        Raises:
            UserError: An id is in another request, and `skip_known` is off; nothing is added.
        """
        with transaction(self._database):
            rows = self._all("SELECT id, request, version FROM samples JOIN requests r ON r.number = request")
            requests_of = {row["id"]: (row["request"], row["version"]) for row in rows}
            known = [i for i in ids if i in requests_of]
            if known and not skip_known:
                shown = [
                    f"{i!r} (request {requests_of[i][0]}, "
                    + ("open)" if requests_of[i][1] is None else f"forgotten in version {requests_of[i][1]:04d})")
                    for i in known[:3]
                ]
                raise UserError(
                    f"{len(known)} of {len(ids)} ids stand in a request already: {', '.join(shown)}; leave them out, "
                    "or give --skip-known"
                )
            new = [i for i in ids if i not in requests_of]
            if not new:
                return None, known
            cursor = self._database.execute(
                "INSERT INTO requests (received, deadline, source) VALUES (?, ?, ?)",
                (stamp(received), stamp(deadline), source),
            )
            self._database.executemany("INSERT INTO samples VALUES (?, ?)", [(i, cursor.lastrowid) for i in new])
            return cursor.lastrowid, known

    def begin(self, requests: Sequence[int], options: Mapping[str, Any]) -> Run:
        """Store a run on the current version that begins with these requests."""
        with transaction(self._database):
            assert self.unfinished() is None  # the caller holds the lock, and has checked it
            number = self.next_number()
            self._database.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?)",
                (number, self.current().number, json.dumps(dict(options)), stamp(utc_now())),
            )
            self._database.executemany("INSERT INTO batches VALUES (?, ?)", [(number, each) for each in requests])
        run = self.unfinished()
        assert run is not None
        return run

    def change_options(self, run: Run, options: Mapping[str, Any]) -> Run:
        with transaction(self._database):
            self._database.execute(
                "UPDATE runs SET options = ? WHERE number = ?", (json.dumps(dict(options)), run.number)
            )
        return dataclasses.replace(run, options=dict(options))

    def withdraw(self, run: Run) -> None:
        """Delete a run before it has had any effect."""
        with transaction(self._database):
            self._database.execute("DELETE FROM runs WHERE number = ?", (run.number,))

    def finish(
        self,
        run: Run,
        state: Literal["accepted", "rejected", "abandoned"],
        *,
        verdict: str | None = None,
        reason: str = "",
        drift: Mapping[str, Any] | None = None,
        batch_alone: bool = False,
    ) -> None:
        """End a run with a version.

        Only an accepted version closes requests, and only with the verdict PASS as done. A PASS on all samples that
        were ever forgotten also proves the requests that were unproven until then.

        Args:
            run: The run.
            state: State of the version.
            verdict: Status of the verdict; None if there is none.
            reason: Reason of a status other than PASS.
            drift: Drift of the version.
            batch_alone: Whether the verdict is on the batch of the run alone (a certificate).
        """
        with transaction(self._database):
            base = self.base_of(run.parent)
            self._database.execute(
                "INSERT INTO versions VALUES (?, ?, ?, 'unlearned', ?, ?, ?, ?, ?)",
                (run.number, run.parent, base, state, stamp(utc_now()), verdict, reason, json.dumps(dict(drift or {}))),
            )
            if state != "accepted":
                return
            self._database.execute(
                "UPDATE requests SET version = ? WHERE number IN (SELECT request FROM batches WHERE run = ?)",
                (run.number, run.number),
            )
            if verdict == "PASS":
                self._prove(run.number, batch_alone)

    def judge_again(self, number: int, verdict: str, reason: str, batch_alone: bool = False) -> None:
        """Store a later verdict on the current version.

        PASS proves all that is unproven. FAIL rejects the version, so that the version before it is the current one
        again, and opens its requests, those that a certificate proved among them. `batch_alone` as of `finish`.
        """
        with transaction(self._database):
            self._database.execute(
                "UPDATE versions SET verdict = ?, reason = ?, state = ? WHERE number = ?",
                (verdict, reason, "rejected" if verdict == "FAIL" else "accepted", number),
            )
            if verdict == "FAIL":
                self._database.execute(PROOFS)
                self._database.execute(
                    "DELETE FROM proofs WHERE request IN (SELECT number FROM requests WHERE version = ?)", (number,)
                )
                self._database.execute("UPDATE requests SET version = NULL, proven = NULL WHERE version = ?", (number,))
            elif verdict == "PASS":
                self._prove(number, batch_alone)

    def prove(self, number: int) -> None:
        """Store that a certificate proves the requests of a version."""
        with transaction(self._database):
            self._prove(number, batch_alone=True)

    def _prove(self, number: int, batch_alone: bool) -> None:
        which = "version = ?" if batch_alone else "version IS NOT NULL"
        values = (number,) if batch_alone else ()
        self._database.execute(PROOFS)
        self._database.execute(
            f"INSERT INTO proofs SELECT number, ? FROM requests WHERE {which} AND proven IS NULL",
            (stamp(utc_now()), *values),
        )
        self._database.execute(f"UPDATE requests SET proven = ? WHERE {which} AND proven IS NULL", (number, *values))

    def add_rebase(self, number: int, reason: str, digest: str) -> None:
        """Add a full retrain as the current version, and as the base of later versions; `digest`: of its weights."""
        with transaction(self._database):
            self._database.execute(
                "INSERT INTO versions VALUES (?, ?, ?, 'rebase', 'accepted', ?, NULL, ?, '{}')",
                (number, self.current().number, number, stamp(utc_now()), reason),
            )
            self._database.execute("INSERT INTO settings VALUES (?, ?)", (weights_key(number), json.dumps(digest)))

    def requests_of(self, run: int) -> list[int]:
        """Return the numbers of the requests of a run, which is that of the version with its number."""
        return [
            row["request"] for row in self._all("SELECT request FROM batches WHERE run = ? ORDER BY request", (run,))
        ]

    def _all(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with translated():
            return self._database.execute(query, tuple(values)).fetchall()


def weights_key(number: int) -> str:
    """Return the setting with the SHA-256 of the weights of a version that was copied, without a record."""
    return "weights_sha256" if number == 0 else f"weights_sha256 {number:04d}"


def place_of(folder: Path, number: int) -> Path:
    return folder / "versions" / f"{number:04d}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the lineage against changes by other processes. Requests may still be added; the next run processes them.

    Raises:
        UserError: There is no store, or another process holds the lock.
    """
    if not is_store(folder):
        raise UserError(f"{folder} holds no store of requests; make one with lethe request init --store {folder}")
    with lock.held(folder, _in_use):
        yield


def _in_use(folder: Path, owner: lock.Owner) -> str:
    return (
        f"{folder}: another process ({owner.pid}) is running this store (on host {owner.host}, since {owner.since}); "
        "wait for it"
    )
