"""The attempts at certificates with one pool, counted, since each is a further chance to grant one in error.

`certificates/` in the folder of the pool has a file for every attempt, from the moment that it begins. An attempt
counts once: repeated after a stop, or with the same inputs in another folder, it cannot end in another way. The files
are not secured: whoever owns the pool can remove them.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.pool.simulation import Procedure
from engine.pool.store import Pool
from engine.runtime.files import make_folder, write_json

FOLDER = "certificates"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt at a certificate.

    Attributes:
        key: SHA-256 of all that its result depends on.
        began: UTC time.
        original, kind, size: The model, and the kind and size of requests.
        method: Method.
        result: granted, the reason of a refusal, or empty where it has not ended.
    """

    key: str
    began: str
    original: str
    kind: str
    size: int
    method: str
    result: str = ""

    def competes(self, other: Attempt) -> bool:
        """Return whether a certificate of either could prove the same request (sizes from half to twice)."""
        near = max(self.size, other.size) <= 4 * min(self.size, other.size)
        return near and (self.original, self.kind) == (other.original, other.kind)


def begin_attempt(pool: Pool, procedure: Procedure, bound: Mapping[str, Any]) -> Attempt:
    """Note that an attempt begins, and return it, or the one of the same inputs that began before.

    Args:
        pool: The pool.
        procedure: What is to be certified.
        bound: What the certificate is bound to (`engine.pool.certificate.bound`).

    Raises:
        UserError: A file cannot be read or written.
    """
    # Of the options `bound` has those that count.
    facts = {"bound": bound, **{name: getattr(procedure, name) for name in ("kind", "size", "count", "seed")}}
    made = Attempt(
        hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest(),
        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        bound["original"],
        procedure.kind,
        procedure.size,
        procedure.method,
    )
    path = _place(pool, made)
    if path.is_file():
        return _read(path)
    _write(pool, made)
    return made


def end_attempt(pool: Pool, attempt: Attempt, result: str) -> None:
    """Add the result to an attempt."""
    _write(pool, dataclasses.replace(attempt, result=result))


def competing(pool: Pool, attempt: Attempt) -> list[Attempt]:
    """Return the other attempts for requests of this kind and about this size on this model, the oldest first."""
    others = [_read(path) for path in (pool.folder / FOLDER).glob("*.json")]
    return sorted(
        (each for each in others if each.key != attempt.key and attempt.competes(each)), key=lambda a: a.began
    )


def _place(pool: Pool, attempt: Attempt) -> Path:
    return pool.folder / FOLDER / f"{attempt.key[:16]}.json"


def _write(pool: Pool, attempt: Attempt) -> None:
    path = _place(pool, attempt)
    make_folder(path.parent)
    write_json(path, dataclasses.asdict(attempt))


def _read(path: Path) -> Attempt:
    try:
        return Attempt(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it: attempts at certificates are counted") from None
