"""Deletion requests through the engine itself: sequences, kills, failing verdicts, wrong use; models of digits."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from digit_requests import QUICK, Judge, die, die_at, ids_of, killed, record, run, states
from toys import tiny_vit

from engine.config import read_yaml
from engine.data import Source
from engine.errors import RunStopped, UserError
from engine.evaluate.gates import Verdict
from engine.jobs.task import Task
from engine.jobs.unlearn import run_job
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from engine.requests import intake, runner
from engine.requests.database import connect
from engine.requests.intake import add_request, init_store
from engine.requests.rebase import rebase
from engine.requests.runner import abandon_run, run_requests
from engine.requests.status import status
from engine.requests.store import Store
from engine.requests.times import RequestTimes, stamp, utc_now
from engine.requests.verdicts import judge_again


@pytest.mark.slow
def test_ten_requests_with_a_kill_in_one_and_a_verdict_that_fails_in_another(
    store: Path, digits: Source, tmp_path: Path
) -> None:
    judge, batches = Judge(), {}
    for number in range(1, 11):
        batches[number] = ids_of(digits, 10 * number)
        add_request(store, ids=batches[number], source=f"letter {number}")
        if number == 4:
            twin = shutil.copytree(store, tmp_path / "twin")
            killed(lambda: run(store, progress=die_at(2)))
            with Store.open(store) as opened:
                begun = opened.unfinished()
                assert begun is not None
                assert (begun.number, begun.requests) == (4, [4])
            assert (store / "versions" / "0004" / "resume" / "current.json").exists()  # a step is kept
        if number == 7:
            judge.statuses = ["FAIL"]
        finished = run(store, judge=judge)
        if number == 4:
            run(twin)
            resumed, whole = (load_checkpoint(folder / "versions" / "0004") for folder in (store, twin))
            assert weights_sha256(resumed) == weights_sha256(whole)
        if number == 7:
            assert (finished.state, finished.version, finished.parent) == ("open", 7, 6)
            assert status(store)["current"]["version"] == 6
            assert states(store)[7] == "open"
            assert (store / "versions" / "0007" / "model.safetensors").exists()
            (waiting,) = (each for each in status(store)["pending"] if each["state"] == "open")
            assert (waiting["attempts"], waiting["reason"]) == (1, "membership: planted")
        else:
            # After the first, too few for a verdict of their own.
            assert (finished.state, finished.version) == ("done" if number == 1 else "unproven", number)
    assert states(store) == {1: "done", **dict.fromkeys(range(2, 11), "unproven")}

    found = status(store)
    versions = {each["version"]: each for each in found["versions"]}
    parents = {number: each["parent"] for number, each in versions.items()}
    assert parents == {0: None, 1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 8: 6, 9: 8, 10: 9}
    assert [n for n, each in versions.items() if each["state"] != "accepted"] == [7]
    assert versions[8]["requests"] == [7, 8]
    with Store.open(store) as opened:
        assert opened.forgotten() == sorted(i for batch in batches.values() for i in batch)

    # Of every version, by its own files: it came from its parent, and never saw again what was forgotten before.
    forgotten: list[str] = []
    for number, version in versions.items():
        if number == 0:
            continue
        batch = [i for request in version["requests"] for i in batches[request]]
        config = read_yaml(store / "versions" / f"{number:04d}" / "config.yaml")
        left = [i for i, each in enumerate(digits.train.ids) if each not in {*forgotten, *batch}]
        assert config["samples"]["retain_sha256"] == digits.train.subset(left).fingerprint()
        assert config["samples"]["forget"] == len(batch)
        assert Path(config["checkpoint"]) == (store / "versions" / f"{version['parent']:04d}").resolve()
        (task,) = (task for task, name, *_ in judge.asked if name == f"{number:04d}")
        assert sorted(task.forget.ids) == sorted([*forgotten, *batch])
        assert task.retain.fingerprint() == config["samples"]["retain_sha256"]
        if version["state"] == "accepted":
            forgotten += batch
    assert {original for _, _, original, _ in judge.asked} == {"0000"}
    assert len({weights_sha256(load_checkpoint(store / "versions" / f"{n:04d}")) for n in range(11)}) == 11


# Where a process may be killed: before the folder is there, at a step, at the evidence, as the run clears up, at the
# verdict, at its record, before the version is noted.
KILLS = {
    "begin": "engine.requests.runner.run_job",
    "step": "",
    "evidence": "engine.jobs.unlearn._write_evidence",
    "clearing": "engine.run.folder.shutil.rmtree",
    "verdict": "verify",
    "record": "record",
    "finish": "engine.requests.store.stamp",  # in the middle of the transaction
}


@pytest.mark.slow
def test_a_kill_anywhere_loses_nothing(
    store: Path, digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_request(store, ids=ids_of(digits, 3))
    twin = shutil.copytree(store, tmp_path / "twin")
    # One after the other, all in the same run: what is done stays done.
    for where, target in KILLS.items():

        def action(where: str = where, target: str = target) -> None:
            if "." in target:
                monkeypatch.setattr(target, die)
            run_requests(
                store,
                verify=die if where == "verdict" else Judge(),
                record=die if where == "record" else record,
                progress=die_at(2) if where == "step" else None,
            )

        killed(action)
        assert states(store) == {1: "open"}, where
        assert status(store)["unfinished"]["version"] == 1, where
    steps = []
    finished = run(store, progress=lambda *row: steps.append(row))
    assert steps == []
    assert (finished.version, finished.state) == (1, "done")
    run(twin)
    first, second = (load_checkpoint(folder / "versions" / "0001") for folder in (store, twin))
    assert weights_sha256(first) == weights_sha256(second)
    assert status(store)["unfinished"] is None
    assert run_requests(store, verify=Judge(), record=record) is None


def test_a_second_process_is_refused_and_requests_may_come_meanwhile(store: Path, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    met = []

    def meanwhile(*row: Any) -> None:
        for other in (lambda: run(store), lambda: rebase(store, "x"), lambda: abandon_run(store)):
            with pytest.raises(UserError, match=f"another process \\({os.getpid()}\\) is running this store"):
                other()
        if not met:
            met.append(add_request(store, ids=ids_of(digits, 50))[0])

    assert run(store, progress=meanwhile).requests == [1]
    assert states(store) == {1: "done", 2: "open"}
    assert run(store).requests == [2]


def test_insufficient_evidence_is_unproven_until_a_later_verdict_passes(store: Path, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    first = run(store, "INSUFFICIENT EVIDENCE")
    assert (first.state, first.reason) == ("unproven", "membership: planted")
    assert states(store) == {1: "unproven"}
    assert status(store)["current"]["version"] == 1
    assert status(store)["pending"][0]["reason"] == "membership: planted"
    add_request(store, ids=ids_of(digits, 10))
    assert run(store, "INSUFFICIENT EVIDENCE", require_proof=True).state == "open"
    assert status(store)["current"]["version"] == 1
    assert states(store) == {1: "unproven", 2: "open"}
    assert run(store).state == "done"
    with Store.open(store) as opened:
        assert [(r.version, r.proven, r.reason) for r in opened.requests()] == [(1, 3, ""), (3, 3, "")]


def test_when_a_request_was_done_is_kept(store: Path, digits: Source) -> None:
    """Whether a deadline was met could not be shown afterwards."""
    add_request(store, ids=ids_of(digits, 0), times=RequestTimes(deadline="2026-01-01", received="2025-12-02"))
    add_request(store, ids=ids_of(digits, 10))
    assert run(store, "INSUFFICIENT EVIDENCE").state == "unproven"
    assert status(store)["done"] == []
    before = stamp(utc_now())
    judge_again(store, verify=Judge(), record=record)
    late, in_time = status(store)["done"]
    assert [late["request"], in_time["request"]] == [1, 2]
    assert before <= late["proven_at"] == in_time["proven_at"] <= stamp(utc_now())
    assert (late["late"], in_time["late"]) == (True, False)


def test_a_request_that_is_opened_again_is_not_done(store: Path, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    run(store)
    with Store.open(store) as opened:
        opened.judge_again(1, "FAIL", "planted")
    (again,) = status(store)["pending"]
    assert (again["state"], again["proven_at"], again["late"]) == ("open", None, False)
    run(store)
    assert status(store)["done"][0]["proven_at"]


def test_a_store_that_kept_no_such_times_is_read_and_goes_on(store: Path, digits: Source) -> None:
    for start in (0, 10):
        add_request(store, ids=ids_of(digits, start))
    run(store, limit=1)
    with contextlib.closing(connect(store)) as database:
        database.execute("DROP TABLE proofs")
    assert [each["proven_at"] for each in status(store)["done"]] == [None]
    run(store)
    with Store.open(store) as opened:
        opened.prove(2)
    assert [bool(each["proven_at"]) for each in status(store)["done"]] == [False, True]


@pytest.mark.parametrize("method", ["lethe_plus", "finetune"])
def test_later_runs_keep_the_predictions_of_version_0(
    store: Path, digits: Source, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Were each run to keep those of the version before it, what each costs the retained samples would add up."""
    given = []

    def spy(*arguments: Any, **options: Any) -> Any:
        given.append((Path(arguments[1]).name, options["original"] and Path(options["original"]).name))
        return run_job(*arguments, **options)

    monkeypatch.setattr(runner, "run_job", spy)
    options = {"max_steps": 2} if method == "finetune" else {"small_share": 0.1, "small_steps": 1, "retain_batch": 8}
    for number in range(3):
        add_request(store, ids=ids_of(digits, 10 * number))
        run(store, method=method, config=options)
    later = "0000" if method == "lethe_plus" else None
    assert given == [("0000", None), ("0001", later), ("0002", later)]
    recorded = [read_yaml(store / "versions" / f"000{i}" / "config.yaml").get("original_sha256") for i in (1, 2, 3)]
    expected = weights_sha256(load_checkpoint(store / "versions" / "0000")) if later else None
    assert recorded == [None, expected, expected]


def test_a_version_of_another_request_is_no_result_of_a_run(store: Path, digits: Source, tmp_path: Path) -> None:
    """An older database beside newer versions: the stale version was accepted as the result, and its request done."""
    older = shutil.copy(store / "requests.sqlite", tmp_path)
    add_request(store, ids=ids_of(digits, 0))
    run(store)
    stale = weights_sha256(load_checkpoint(store / "versions" / "0001"))
    for path in store.glob("requests.sqlite*"):
        path.unlink()
    shutil.copy(older, store)
    add_request(store, ids=ids_of(digits, 30))
    assert run(store).state == "done"
    expected = Task.of_ids(digits, ids_of(digits, 30), spec="").retain.fingerprint()
    assert read_yaml(store / "versions" / "0001" / "config.yaml")["samples"]["retain_sha256"] == expected
    assert weights_sha256(load_checkpoint(store / "versions" / "0001")) != stale
    for path in store.glob("requests.sqlite*"):
        path.unlink()
    with pytest.raises(UserError, match=r"not a store's \(versions/0001\)"):
        init_store(store, checkpoint=str(store / "versions" / "0000"), data="digits")


@pytest.mark.parametrize("changed", ["0000", "0001"])
def test_a_version_with_other_weights_is_refused(store: Path, digits: Source, changed: str) -> None:
    add_request(store, ids=ids_of(digits, 0))
    run(store, "INSUFFICIENT EVIDENCE")
    add_request(store, ids=ids_of(digits, 10))
    save_checkpoint(tiny_vit(9), store / "versions" / changed)
    for command in (run, lambda folder: judge_again(folder, verify=Judge(), record=record)):
        with pytest.raises(UserError, match=rf"versions/{changed}: .*restore it from a backup"):
            command(store)
    assert states(store) == {1: "unproven", 2: "open"}


def test_the_weights_of_a_full_retrain_are_those_that_were_copied(store: Path, digits: Source, tmp_path: Path) -> None:
    """A retrain is copied without a record, so nothing detected that its files were replaced."""
    rebase(store, str(save_checkpoint(tiny_vit(9), tmp_path / "retrained")))
    add_request(store, ids=ids_of(digits, 0))
    save_checkpoint(tiny_vit(8), store / "versions" / "0001")
    with pytest.raises(UserError, match=r"versions/0001: .*lethe request rebase copied; restore it"):
        run(store)
    assert states(store) == {1: "open"}


def test_a_version_whose_folder_is_gone_is_named(store: Path, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    shutil.rmtree(store / "versions" / "0000")
    with pytest.raises(UserError, match=r"versions/0000: the folder of version 0000 is missing; restore it"):
        run(store)


def test_a_version_of_the_store_is_no_full_retrain(store: Path, digits: Source, tmp_path: Path) -> None:
    add_request(store, ids=ids_of(digits, 0))
    run(store)
    bare = save_checkpoint(load_checkpoint(store / "versions" / "0000"), tmp_path / "bare")
    for checkpoint in (store / "versions" / "0000", bare):
        with pytest.raises(UserError, match="its weights are those of version 0000, so it is no full retrain"):
            rebase(store, str(checkpoint))
    assert status(store)["current"]["version"] == 1


def test_deadlines_decide_the_order_and_limit_the_number(store: Path, digits: Source) -> None:
    for start, days in ((0, 30), (10, 5), (20, 10)):
        add_request(store, ids=ids_of(digits, start), times=RequestTimes(days=days))
    assert run(store, limit=2).requests == [2, 3]
    with pytest.raises(UserError, match="--limit 0: expected 1 or more"):
        run(store, limit=0)
    assert run(store).requests == [1]


def test_a_run_that_was_killed_keeps_its_options(store: Path, digits: Source, tmp_path: Path) -> None:
    add_request(store, ids=ids_of(digits, 0))
    killed(lambda: run(store, config={"seed": 3}, require_proof=True, progress=die_at(1)))
    for options in ({"config": {"seed": 4}}, {"method": "lethe"}):
        with pytest.raises(UserError, match="leave --method and --set out to continue it, or drop it by --abandon"):
            run(store, **options)
    reference = save_checkpoint(tiny_vit(1), tmp_path / "reference")
    judge = Judge("INSUFFICIENT EVIDENCE")
    assert run(store, judge=judge, references=[str(reference)]).state == "open"  # require_proof is kept
    assert judge.asked[0][3] == [str(reference)]  # the verdict's evidence may change
    assert read_yaml(store / "versions" / "0001" / "config.yaml")["seed"] == 3
    assert run(store, config={"seed": 4}).version == 2


def test_a_run_is_given_up(store: Path, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    with pytest.raises(UserError, match="there is no unfinished run"):
        abandon_run(store)
    killed(lambda: run(store, progress=die_at(1)))
    with pytest.raises(UserError, match=r"has not ended; continue it .* or drop it"):
        rebase(store, str(store / "versions" / "0000"))
    assert abandon_run(store).number == 1
    assert states(store) == {1: "open"}
    assert (store / "versions" / "0001" / "config.yaml").exists()
    assert run(store, config={"seed": 1}).version == 2
    assert [each["state"] for each in status(store)["versions"]] == ["accepted", "abandoned", "accepted"]


def test_wrong_use_is_in_the_way_of_nothing(store: Path, digits: Source) -> None:
    add_request(store, ids=ids_of(digits, 0))
    for options, message in (
        ({"config": {"leraning": 1}}, "unknown option 'leraning'"),
        ({"method": "lehte"}, "unknown method 'lehte'"),
        ({"references": ["nowhere"]}, "checkpoint nowhere is not a folder"),
        ({"gates": Path("nowhere.yaml")}, "nowhere.yaml does not exist"),
        ({"config": {"device": "cuda:7"}}, "cuda"),
    ):
        with pytest.raises(UserError, match=message):
            run(store, **options)
        assert status(store)["unfinished"] is None
    assert run(store).version == 1


def test_a_verdict_that_is_refused_waits_without_unlearning_again(store: Path, digits: Source) -> None:
    def refuse(*arguments: Any, **options: Any) -> Verdict:
        raise UserError("--reference x: it was trained with the forget samples")

    add_request(store, ids=ids_of(digits, 0))
    with pytest.raises(UserError, match="trained with the forget samples"):
        run_requests(store, verify=refuse, record=record)
    assert status(store)["unfinished"]["version"] == 1
    steps = []
    assert run(store, progress=lambda *row: steps.append(row), references=[]).state == "done"
    assert steps == []


def test_a_stopped_run_says_how_to_get_on(store: Path, digits: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    add_request(store, ids=ids_of(digits, 0))

    def stop(*row: Any) -> None:
        raise RunStopped("no space left")

    with pytest.raises(RunStopped, match=r"no space left; the requests stay open: .* --abandon"):
        run(store, progress=stop)
    assert run(store).state == "done"


def test_tasks_of_ids_leave_out_what_was_forgotten(digits: Source) -> None:
    task = Task.of_ids(digits, ["4", "1", "1"], spec="request 1", excluded=["9", "gone"])
    assert sorted(task.forget.ids) == ["1", "4"]
    assert set(task.retain.ids) == set(digits.train.ids) - {"1", "4", "9"}
    assert task.request.duplicates == 1
    of_ids = functools.partial(Task.of_ids, digits, spec="request 1")
    with pytest.raises(UserError, match=r"request 1: 1 of 2 ids are not in digits train, the first: 'x'; its ids look"):
        of_ids(["1", "x"])
    with pytest.raises(UserError, match="request 1: names no samples"):
        of_ids([])
    everything = list(digits.train.ids)
    for ids, excluded in ((everything, []), (everything[:9], everything[9:])):
        with pytest.raises(UserError, match="left to retain"):
            of_ids(ids, excluded=excluded)


def test_data_that_has_changed_is_refused(store: Path, digits: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    add_request(store, ids=ids_of(digits, 0))
    fewer = Source("digits", digits.train.subset(range(50)), digits.validation, digits.test)
    monkeypatch.setattr(intake, "open_source", lambda spec: fewer)
    for action in (lambda: run(store), lambda: add_request(store, ids=["1"])):
        with pytest.raises(UserError, match=f"digits have changed since .* \\({len(digits.train)} then, 50 now\\)"):
            action()


def test_init_copies_the_checkpoint_and_refuses_what_cannot_work(
    store: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights_sha256(load_checkpoint(checkpoint))
    shutil.rmtree(checkpoint)
    assert weights_sha256(load_checkpoint(store / "versions" / "0000")) == before
    copy = str(store / "versions" / "0000")
    gates = tmp_path / "gates.yaml"
    gates.write_text("membership_auc: 0.4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    small = save_checkpoint(tiny_vit(num_classes=2), tmp_path / "small")
    new = tmp_path / "new"
    for message, folder, model, options in (
        ("is a store of requests already", store, copy, {}),
        ("holds files that are not a store's \\(thesis.tex\\)", tmp_path / "full", copy, {}),
        ("its head has 2 classes, but digits has label 9", new, str(small), {}),
        ("unknown option 'x'", new, copy, {"config": {"x": 1}}),
        ("unknown method 'y'", new, copy, {"method": "y"}),
        ("is looser than the default", new, copy, {"gates": gates}),
        ("--max-share 2: expected a share", new, copy, {"max_share": 2}),
    ):
        with pytest.raises(UserError, match=message):
            init_store(folder, model, "digits", **options)
    with pytest.raises(UserError, match="holds no store of requests"):
        run(new)
    # One that is killed before its end is none, and is done again.
    killed(lambda: (monkeypatch.setattr("engine.requests.store.stamp", die), init_store(new, copy, "digits")))
    with pytest.raises(UserError, match="holds no store of requests"):
        status(new)
    gates.write_text("membership_auc: 0.05")
    reference = save_checkpoint(tiny_vit(1), tmp_path / "reference")
    init_store(new, copy, "digits", method="finetune", config=QUICK, gates=gates, references=[str(reference)])
    gates.unlink()
    add_request(new, ids=["1"])
    with Store.open(new) as opened:
        assert opened.settings["references"] == [str(reference.resolve())]
    seen = []

    def judge(*arguments: Any, gates: Path, config: Any) -> Verdict:
        seen.append((gates.read_text(), len(arguments[3]), config["precision"]))
        return Judge()(*arguments, gates=gates, config=config)

    assert run_requests(new, verify=judge, record=record) is not None
    assert seen == [("membership_auc: 0.05", 1, "fp32")]
