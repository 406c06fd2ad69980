"""Which training samples each model of a pool lacks: drawn from the id by a keyed hash.

Each sample has a permutation of the models, drawn from the hash of its id; the first of it lack the sample, the same
number for every sample. The draw depends on the id, the key and the number of models alone, so that samples which are
added or deleted later change nothing for the others. A model that joins later lacks each sample by a draw of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from engine.errors import UserError

FEWEST, MOST = 4, 64
# Models that lack a sample, at least: a single one does not show how far models that were not trained on it differ.
FEWEST_WITHOUT = 2


def lacking_count(models: int, share: float) -> int:
    """Return the number of models that lack each sample.

    Args:
        models: Number of models of the pool.
        share: Share (0, 1) of the training samples that each of them lacks.

    Raises:
        UserError: There are too few models, or the share does not give a whole number of two or more of them.
    """
    if not FEWEST <= models <= MOST:
        raise UserError(f"--models {models}: expected {FEWEST} to {MOST}")
    count = share * models
    if not 0 < share < 1 or abs(count - round(count)) > 1e-6 or not FEWEST_WITHOUT <= round(count) < models:
        shares = ", ".join(f"{k / models:g}" for k in range(FEWEST_WITHOUT, models // 2 + 1))
        raise UserError(
            f"--share {share:g}: with {models} models, give one of {shares}, so that the same number of models, "
            f"{FEWEST_WITHOUT} or more, lacks every sample"
        )
    return round(count)


# Bytes of a key of BLAKE2b, at most.
_LONGEST_KEY = 64


def check_key(key: str) -> None:
    """Raise UserError if a key cannot be used."""
    if not 1 <= len(key.encode()) <= _LONGEST_KEY:
        raise UserError(f"--key: has {len(key.encode())} bytes; expected 1 to {_LONGEST_KEY}")


def digests_of(ids: Iterable[str], key: str) -> np.ndarray:
    """Return the keyed hash of each id, uint64 [n] (BLAKE2b)."""
    found = [hashlib.blake2b(one.encode(), key=key.encode(), digest_size=8).digest() for one in ids]
    return np.frombuffer(b"".join(found), dtype="<u8")


def order_of(digests: np.ndarray, models: int) -> np.ndarray:
    """Return the permutation of the models of each sample, int64 [n, models]."""
    return np.argsort(_mixed(digests, models), axis=1, kind="stable")


def lacking(digests: np.ndarray, count: int, first: int, models: int) -> np.ndarray:
    """Return which models lack each sample, bool [n, models].

    Args:
        digests: As of `digests_of`, uint64 [n].
        count: Number of the first models that lack each sample.
        first: Number of models that the pool was begun with.
        models: Number of models now; those beyond `first` lack each sample with the probability count / first.
    """
    found = np.zeros((len(digests), models), dtype=bool)
    np.put_along_axis(found, order_of(digests, first)[:, :count], True, axis=1)
    found[:, first:] = _mixed(digests, models)[:, first:] < np.uint64(count / first * 2**64)
    return found


def _mixed(digests: np.ndarray, models: int) -> np.ndarray:
    """Return a random number of each pair of sample and model, uint64 [n, models] (splitmix64)."""
    with np.errstate(over="ignore"):
        z = digests.astype(np.uint64)[:, None] + np.uint64(0x9E3779B97F4A7C15) * np.arange(
            1, models + 1, dtype=np.uint64
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))
