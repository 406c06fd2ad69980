"""The store of requests: what it takes, what it refuses, any order of events."""

from __future__ import annotations

import datetime
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from planted_requests import COUNT, SOURCE, Crash, make_store, plant, unlearned, verdict
from toys import tiny_vit

from engine.errors import RunStopped, UserError
from engine.evaluate.gates import Verdict
from engine.jobs.task import Task
from engine.jobs.unlearn import Outcome
from engine.requests import rebase as rebase_module
from engine.requests import runner
from engine.requests.intake import add_request
from engine.requests.rebase import rebase
from engine.requests.runner import run_requests
from engine.requests.status import status
from engine.requests.store import Store, place_of
from engine.requests.times import RequestTimes, moment, stamp
from engine.requests.verdicts import judge_again

NOW = datetime.datetime(2026, 5, 25, 12, tzinfo=datetime.timezone.utc)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose runs take no time."""
    plant(monkeypatch)
    return make_store(tmp_path / "store")


def add(store: Path, *numbers: int, **options: Any) -> tuple[int | None, dict[str, int]]:
    request, left_out = add_request(store, ids=[f"train/{n}" for n in numbers], **options)
    return request and request.number, left_out


def run(store: Path, said: str = "PASS", **options: Any) -> runner.Finished | None:
    return run_requests(store, verify=lambda *a, **k: verdict(said), record=lambda place, found: None, **options)


# --- adding -----------------------------------------------------------------------------------------------------------


def test_ids_that_the_data_does_not_hold_add_nothing(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--id: 1 of 2 ids are not in train, the first: 'train/77'; its ids look like"):
        add(store, 1, 77)
    (tmp_path / "ids.txt").write_text("train/1\nnobody\n")
    with pytest.raises(UserError, match=r"ids.txt: 1 of 2 ids are not in train, the first: 'nobody'"):
        add_request(store, file=tmp_path / "ids.txt")
    with Store.open(store) as opened:
        assert opened.requests() == []
        assert opened.ids_of([1]) == []


def test_an_id_of_another_request_is_refused_or_left_out(store: Path) -> None:
    add(store, 1, 2)
    run(store)
    assert add(store, 3) == (2, {"duplicates": 0, "skipped": 0})
    with pytest.raises(
        UserError, match=r"2 of 3 ids .*: 'train/1' \(request 1, forgotten in version 0001\), 'train/3' \(r"
    ):
        add(store, 1, 3, 4)
    with pytest.raises(UserError, match=r"'train/3' \(request 2, open\); leave them out, or give --skip-known"):
        add(store, 3)
    assert add(store, 1, 3, 4, 4, skip_known=True) == (3, {"duplicates": 1, "skipped": 2})
    assert add(store, 1, 3, skip_known=True) == (None, {"duplicates": 0, "skipped": 2})
    with Store.open(store) as opened:
        assert opened.ids_of([3]) == ["train/4"]
        assert [request.count for request in opened.requests()] == [2, 1, 1]


def test_a_file_of_ids_is_read_as_everywhere(store: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("id,why\ntrain/5,asked\ntrain/6,asked\ntrain/5,again\n")
    request, left_out = add_request(store, file=tmp_path / "ids.csv", source="post")
    assert request is not None
    assert (request.count, request.source, left_out["duplicates"]) == (2, "post", 1)


def test_received_and_deadline(store: Path) -> None:
    def times(n: int, **options: Any) -> tuple[str, str]:
        request, _ = add_request(store, ids=[f"train/{n}"], times=RequestTimes(now=NOW, **options))
        assert request is not None
        return request.received, request.deadline

    assert times(0) == ("2026-05-25T12:00:00Z", "2026-06-24T12:00:00Z")
    assert times(1, received="2026-05-01") == ("2026-05-01T00:00:00Z", "2026-05-31T00:00:00Z")
    assert times(2, received="2026-05-01T01:30:00+02:00", days=1.5) == ("2026-04-30T23:30:00Z", "2026-05-02T11:30:00Z")
    assert times(3, deadline="2026-05-25")[1] == "2026-05-25T23:59:59Z"
    assert times(4, deadline="2026-05-25T12:00:01Z")[1] == "2026-05-25T12:00:01Z"
    for message, options in (
        ("'soon' is not a time; expected ISO 8601", {"deadline": "soon"}),
        ("lies before the receipt", {"deadline": "2026-05-24"}),
        ("lies before the receipt", {"days": -1}),
        ("lies in the future", {"received": "2026-05-26"}),
        ("--deadline or --days, not both", {"deadline": "2026-05-26", "days": 3}),
    ):
        with pytest.raises(UserError, match=message):
            times(5, **options)
    for given in ({}, {"file": Path("x"), "ids": ["train/5"]}):
        with pytest.raises(UserError, match="--ids FILE or --id ID"):
            add_request(store, **given)
    found = {row["request"]: row for row in status(store, now=NOW + datetime.timedelta(hours=18))["pending"]}
    assert found[1]["days_left"] == pytest.approx(29.25)
    assert (found[4]["overdue"], found[4]["days_left"]) == (True, -0.25)
    assert [n for n in found if found[n]["overdue"]] == [3, 5, 4]
    assert status(store, now=NOW)["requests"] == {"open": 5, "unproven": 0, "done": 0, "overdue": 1}
    assert status(store, now=NOW)["warnings"] == ["overdue and open: requests 3; lethe request run"]


def test_the_ids_of_a_batch_may_not_be_all_that_there_is(store: Path) -> None:
    add(store, *range(39))
    add(store, 39)
    with pytest.raises(UserError, match=r"the open requests: .* left to retain"):
        run(store)
    assert status(store)["unfinished"] is None
    assert run(store, limit=1) is not None


# --- the database -----------------------------------------------------------------------------------------------------


def test_a_store_of_another_release_or_a_damaged_one(store: Path) -> None:
    database = sqlite3.connect(store / "requests.sqlite")
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(UserError, match=r"requests.sqlite has schema 9, this release reads 1"):
        status(store)
    (store / "requests.sqlite").write_bytes(b"not a database, whatever its name may say" * 9)
    with pytest.raises(UserError, match=r"requests.sqlite is damaged \(file is not a database\)"):
        status(store)


def test_a_store_that_another_process_writes_to(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(store / "requests.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path, **{**options, "timeout": 0.01}))
    with pytest.raises(RunStopped, match=r"requests.sqlite: database is locked; nothing was changed; try again"):
        add(store, 1)
    assert status(store)["requests"]["open"] == 0  # it can be read meanwhile
    other.execute("ROLLBACK")
    other.close()
    assert add(store, 1)[0] == 1


def test_a_version_is_durable_and_keys_are_foreign(store: Path) -> None:
    with Store.open(store) as opened:
        assert opened._all("PRAGMA synchronous")[0][0] == 3
        with pytest.raises(sqlite3.IntegrityError):
            opened.begin([7], {})  # no such request
        assert opened.unfinished() is None


class Sequences(RuleBasedStateMachine):
    """Any order of requests, verdicts, kills, retrains; what must hold after each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = make_store(Path(tempfile.mkdtemp()) / "store")
        self.batches: dict[int, list[str]] = {}
        self.state: dict[int, str] = {}
        self.version: dict[int, int] = {}
        self.forgotten: set[str] = set()
        self.left = [f"train/{n}" for n in range(COUNT)]
        self.chain = [0]
        self.rebased: set[int] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.folder.parent)

    @precondition(lambda self: len(self.left) > 5 and list(self.state.values()).count("open") < 3)
    @rule(count=st.integers(1, 4), days=st.integers(0, 60))
    def add(self, count: int, days: int) -> None:
        ids = [self.left.pop() for _ in range(count)]
        request, _ = add_request(self.folder, ids=ids, times=RequestTimes(days=days))
        assert request is not None
        self.batches[request.number], self.state[request.number] = ids, "open"

    def has(self, state: str) -> bool:
        return state in self.state.values()

    @precondition(lambda self: self.has("open"))
    @rule(
        said=st.sampled_from(["PASS", "FAIL", "INSUFFICIENT EVIDENCE"]),
        limit=st.sampled_from([None, 1, 2]),
        crash=st.sampled_from(["begun", "unlearning", "ended", "verdict", "record", "finish"]),
    )
    def run_and_crash(self, said: str, limit: int | None, crash: str) -> None:
        self.run(said, limit, crash)

    @precondition(lambda self: self.has("open"))
    @rule(
        said=st.sampled_from(["INSUFFICIENT EVIDENCE", "PASS", "FAIL"]),
        limit=st.sampled_from([None, 1, 2]),
    )
    def run_to_the_end(self, said: str, limit: int | None) -> None:
        self.run(said, limit)

    def run(self, said: str, limit: int | None, crash: str | None = None) -> None:
        def at(place: str) -> None:
            if crash == place:
                raise Crash

        def job(task: Task, checkpoint: str, place: Path, *, resume: bool, overwrite: bool, **options: Any) -> Outcome:
            at("begun")
            used = {*task.forget.ids, *task.retain.ids}
            assert not used & self.forgotten
            assert used | self.forgotten == set(SOURCE.train.ids)
            assert Path(checkpoint) == place_of(self.folder, self.chain[-1]).resolve()
            assert resume == (place / "config.yaml").exists()
            place.mkdir(parents=True, exist_ok=True)
            (place / "config.yaml").touch()
            at("unlearning")
            outcome = unlearned(task, checkpoint, place)
            at("ended")
            return outcome

        def verify(task: Task, *arguments: Any, **options: Any) -> Verdict:
            at("verdict")
            self.judged = set(task.forget.ids)
            return verdict(said)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "run_job", job)
            if crash == "finish":
                patch.setattr(Store, "finish", lambda *a, **k: at("finish"))
            try:
                finished = run_requests(
                    self.folder, limit=limit, verify=verify, record=lambda place, found: at("record")
                )
            except Crash:
                return
        assert finished is not None
        batch = {i for number in finished.requests for i in self.batches[number]}
        assert self.judged == self.forgotten | batch
        assert finished.parent == self.chain[-1]
        if said == "FAIL":
            assert finished.state == "open"
            return
        self.chain.append(finished.version)
        self.forgotten |= batch
        for number in finished.requests:
            self.state[number], self.version[number] = "unproven", finished.version
        if said == "PASS" and not self.has("done"):  # else the unproven ones are too few
            self.state = {n: "done" if state == "unproven" else state for n, state in self.state.items()}

    @precondition(lambda self: self.has("unproven"))
    @rule(
        said=st.sampled_from(["FAIL", "PASS", "INSUFFICIENT EVIDENCE"]),
        crash=st.sampled_from([None, "verdict", "record"]),
    )
    def judge_again(self, said: str, crash: str | None) -> None:
        with Store.open(self.folder) as opened:
            current, unfinished = opened.current(), opened.unfinished()

        def at(place: str) -> None:
            if crash == place:
                raise Crash

        def verify(task: Task, place: Path, *arguments: Any, **options: Any) -> Verdict:
            at("verdict")
            assert set(task.forget.ids) == self.forgotten  # so few samples are never judged apart
            assert place == place_of(self.folder, self.chain[-1])
            return verdict(said)

        try:
            found = judge_again(self.folder, verify=verify, record=lambda place, found: at("record"))
        except UserError:
            assert unfinished
            return
        except Crash:
            return
        unproven = {number for number, state in self.state.items() if state == "unproven"}
        assert found is not None
        if said == "PASS" and not self.has("done"):
            self.state |= dict.fromkeys(unproven, "done")
        elif said == "FAIL":
            self.chain.pop()
            opened_again = {n for n in unproven if self.version[n] == current.number}
            self.state |= dict.fromkeys(opened_again, "open")
            self.forgotten -= {i for number in opened_again for i in self.batches[number]}
        assert found.requests == {number: self.state[number] for number in unproven}

    @precondition(lambda self: self.chain[-1] not in self.rebased)  # else most events are this one
    @rule()
    def rebase(self) -> None:
        with Store.open(self.folder) as opened, pytest.MonkeyPatch.context() as patch:
            unfinished = opened.unfinished()
            patch.setattr(rebase_module, "load_fitting", lambda checkpoint, source: tiny_vit(9))
            if unfinished:
                with pytest.raises(UserError):
                    rebase(self.folder, "retrain")
            else:
                self.chain.append(rebase(self.folder, "retrain")[0])
                self.rebased.add(self.chain[-1])

    @invariant()
    def holds(self) -> None:
        with Store.open(self.folder) as opened:
            requests, versions, run = opened.requests(), opened.versions(), opened.unfinished()
            assert {r.number: r.state for r in requests} == self.state
            assert {r.number: sorted(opened.ids_of([r.number])) for r in requests} == {
                n: sorted(ids) for n, ids in self.batches.items()
            }
            assert set(opened.forgotten()) == self.forgotten
            accepted = [v for v in versions if v.state == "accepted"]
            assert [v.number for v in accepted] == self.chain
            assert [v.parent for v in accepted] == [None, *self.chain[:-1]]
            assert opened.current().number == self.chain[-1]
            numbers = [v.number for v in versions] + ([run.number] if run else [])
            assert sorted(numbers) == list(range(len(numbers)))
            assert all(self.state[n] == "open" for n in (run.requests if run else []))


def test_any_order_of_events_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    settings = hypothesis_settings(max_examples=6, stateful_step_count=25, deadline=None)
    run_state_machine_as_test(Sequences, settings=settings)


def test_times() -> None:
    assert stamp(moment("2026-05-25T12:00:00+02:00")) == "2026-05-25T10:00:00Z"
    assert stamp(moment(" 2026-05-25 ")) == "2026-05-25T00:00:00Z"
    assert stamp(moment("2026-05-25T10:00:00Z", end_of_day=True)) == "2026-05-25T10:00:00Z"


@pytest.mark.parametrize(
    "times",
    [
        {"received": "0999-01-01"},
        {"received": "0001-01-01T00:00:00+14:00"},
        {"deadline": "9999-12-31T23:59:59-12:00"},
        {"days": float("nan")},
        {"days": float("inf")},
        {"days": 1e10},
    ],
)
def test_times_that_cannot_be_meant_are_refused(times: dict[str, Any]) -> None:
    """A year below 1000 was stored in a form that no later command could read."""
    with pytest.raises(UserError, match=r"expected a (year|number of days)"):
        RequestTimes(**times).resolve()
