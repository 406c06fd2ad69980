"""requests.sqlite: its tables, transactions, and errors."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from engine.errors import RunStopped, UserError

FILE = "requests.sqlite"
SCHEMA = 1

# When a request became done. Stores of earlier releases have no such table until their next request is.
PROOFS = "CREATE TABLE IF NOT EXISTS proofs (request INTEGER PRIMARY KEY REFERENCES requests, at TEXT NOT NULL)"
TABLES = (
    "CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE versions (
        number INTEGER PRIMARY KEY,
        parent INTEGER REFERENCES versions,
        base INTEGER NOT NULL REFERENCES versions,
        kind TEXT NOT NULL CHECK (kind IN ('root', 'unlearned', 'rebase')),
        state TEXT NOT NULL CHECK (state IN ('accepted', 'rejected', 'abandoned')),
        created TEXT NOT NULL,
        verdict TEXT,
        reason TEXT NOT NULL,
        drift TEXT NOT NULL)""",
    """CREATE TABLE runs (
        number INTEGER PRIMARY KEY,
        parent INTEGER NOT NULL REFERENCES versions,
        options TEXT NOT NULL,
        started TEXT NOT NULL)""",
    """CREATE TABLE requests (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        received TEXT NOT NULL,
        deadline TEXT NOT NULL,
        source TEXT NOT NULL,
        version INTEGER REFERENCES versions,
        proven INTEGER REFERENCES versions CHECK (proven IS NULL OR version IS NOT NULL))""",
    """CREATE TABLE samples (
        id TEXT PRIMARY KEY,
        request INTEGER NOT NULL REFERENCES requests) WITHOUT ROWID""",
    "CREATE INDEX samples_of_request ON samples (request)",
    """CREATE TABLE batches (
        run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE,
        request INTEGER NOT NULL REFERENCES requests,
        PRIMARY KEY (run, request)) WITHOUT ROWID""",
    PROOFS,
)


def is_store(folder: Path) -> bool:
    """Return whether a folder holds a store whose creation was completed.

    Raises:
        UserError: This release cannot read it.
    """
    if not (folder / FILE).is_file():
        return False
    with translated(), contextlib.closing(connect(folder)) as database:
        schema = database.execute("PRAGMA user_version").fetchone()[0]
    if schema not in (0, SCHEMA):
        raise UserError(
            f"{folder / FILE} has schema {schema}, this release reads {SCHEMA}; use the release that made it"
        )
    return bool(schema == SCHEMA)


def connect(folder: Path) -> sqlite3.Connection:
    """Open the database in a folder, which is created if there is none."""
    # isolation_level=None: `transaction` alone begins and ends transactions.
    with translated():
        database = sqlite3.connect(folder / FILE, timeout=30, isolation_level=None)
        database.row_factory = sqlite3.Row
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("PRAGMA synchronous = EXTRA")
    return database


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Apply all of a change or nothing of it. IMMEDIATE: what was read inside still holds when it is written."""
    with translated():
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise errors of SQLite as RunStopped (nothing was changed) or UserError (the file is damaged)."""
    try:
        yield
    except sqlite3.OperationalError as error:  # locked for longer than the timeout, or no space left
        raise RunStopped(f"{FILE}: {error}; nothing was changed; try again") from error
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError):
            raise
        raise UserError(f"{FILE} is damaged ({error}); take it from a backup") from error
