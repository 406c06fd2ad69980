"""Attempts at certificates are counted, and make a further one harder to get."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from digit_pool import make_pool

from engine.data import Source
from engine.errors import UserError
from engine.pool.attempts import FOLDER, begin_attempt, competing, end_attempt
from engine.pool.certificate import attempts_of
from engine.pool.simulation import Procedure
from engine.pool.store import Pool

BOUND = {"method": "lethe", "options": {"lr": 0.1}, "code": "c", "original": "o", "pool": "p"}
REQUESTS = Procedure(method="lethe", config={"lr": 0.1}, kind="random", size=20, count=20, seed=0)


@pytest.fixture
def pool(tmp_path: Path, digits: Source) -> Pool:
    return make_pool(tmp_path / "pool", digits)


def test_another_seed_or_other_options_are_another_attempt(pool: Pool) -> None:
    begin_attempt(pool, REQUESTS, BOUND)
    end_attempt(pool, begin_attempt(pool, dataclasses.replace(REQUESTS, seed=1), BOUND), "membership")
    third = begin_attempt(pool, REQUESTS, {**BOUND, "options": {"lr": 0.2}})
    assert [each.result for each in competing(pool, third)] == ["", "membership"]


def test_a_repeated_one_is_the_same(pool: Pool) -> None:
    """It would count twice after a stop otherwise, and could not end in another way."""
    first = begin_attempt(pool, REQUESTS, BOUND)
    end_attempt(pool, first, "membership")
    again = begin_attempt(pool, REQUESTS, BOUND)
    assert (again.key, again.began, again.result) == (first.key, first.began, "membership")
    assert competing(pool, again) == []
    workers = dataclasses.replace(REQUESTS, config={"lr": 0.1, "workers": 4})  # changes nothing of the result
    assert begin_attempt(pool, workers, BOUND).key == first.key


@pytest.mark.parametrize(
    ("change", "bound", "counts"),
    [
        ({"size": 5}, {}, True),  # the first covers 10 to 40, this one 3 to 10
        ({"size": 4}, {}, False),
        ({"kind": "class"}, {}, False),
        ({}, {"original": "another"}, False),
        ({"method": "finetune"}, {"method": "finetune"}, True),
    ],
)
def test_only_attempts_for_such_requests_count(
    pool: Pool, change: dict[str, object], bound: dict[str, str], counts: bool
) -> None:
    begin_attempt(pool, dataclasses.replace(REQUESTS, **change), {**BOUND, **bound})
    now = begin_attempt(pool, dataclasses.replace(REQUESTS, seed=7), BOUND)
    assert len(competing(pool, now)) == counts


def test_a_file_that_was_spoiled_is_named(pool: Pool) -> None:
    begin_attempt(pool, REQUESTS, BOUND)
    (spoiled,) = (pool.folder / FOLDER).iterdir()
    spoiled.write_text("{")
    now = begin_attempt(pool, dataclasses.replace(REQUESTS, seed=1), BOUND)
    with pytest.raises(UserError, match=spoiled.name):
        competing(pool, now)


def test_certificates_of_before_the_count_have_no_words_on_it() -> None:
    assert attempts_of({}) == attempts_of({"attempt": 1}) == ""
    assert "attempt 3 " in attempts_of({"attempt": 3})
