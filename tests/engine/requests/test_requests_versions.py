"""Which version a store takes: collapse, no change, samples judged alone, an exact method; drift and rebase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digit_requests import Judge, die, die_at, ids_of, killed, record, run, states
from toys import tiny_vit

from engine.config import read_yaml
from engine.data import Source
from engine.errors import UserError
from engine.jobs.task import Task
from engine.jobs.unlearn import run_job
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from engine.models.predict import Predictions
from engine.models.slice_stages import Stages, slices_of, tokens_of
from engine.requests.drift import drift_from
from engine.requests.intake import add_request, init_store
from engine.requests.rebase import rebase
from engine.requests.runner import abandon_run, run_requests
from engine.requests.status import status
from engine.requests.store import Store
from engine.requests.times import RequestTimes
from engine.requests.verdicts import judge_again
from engine.run.unlearn import train
from engine.runtime.files import write_json


def test_a_collapsed_model_is_rejected_without_a_verdict(
    store: Path, digits: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.run.trainer._COLLAPSE_POINTS", -101.0)
    add_request(store, ids=ids_of(digits, 0))
    judge = Judge()
    finished = run(store, judge=judge)
    assert (finished.status, finished.state, finished.verdict, judge.asked) == ("FAIL", "open", None, [])
    assert "COLLAPSED" in status(store)["pending"][0]["reason"]


def test_a_run_that_changes_nothing_is_rejected_though_the_root_is_far(store: Path, digits: Source) -> None:
    for start, state in ((0, "done"), (10, "open")):
        add_request(store, ids=ids_of(digits, start))
        judge = Judge()
        finished = run(store, judge=judge, config={} if state == "done" else {"lr": 1e-30, "weight_decay": 0.0})
        assert finished.state == state
    assert judge.asked == []
    assert finished.reason == "UNCHANGED: every weight outside the head is that of version 0001"


def test_a_store_that_was_moved_continues_a_killed_run(store: Path, digits: Source, tmp_path: Path) -> None:
    """Red before: the run was refused, since the model had another path."""
    add_request(store, ids=ids_of(digits, 3))
    killed(lambda: run_requests(store, verify=Judge(), record=record, progress=die_at(2)))
    moved = store.rename(tmp_path / "elsewhere")
    config = read_yaml(moved / "versions" / "0001" / "config.yaml")
    assert config["checkpoint_sha256"] == weights_sha256(load_checkpoint(moved / "versions" / "0000"))
    finished = run(moved)
    assert (finished.version, finished.state) == (1, "done")


def test_a_run_does_not_continue_from_other_weights(tmp_path: Path, digits: Source) -> None:
    """Red before: the path of the model was compared, not its weights."""
    task = Task.of_ids(digits, list(digits.train.ids[:20]), spec="twenty")
    options = {"batch_size": 32, "max_steps": 2, "checkpoint_every": 1, "precision": "fp32"}
    place = save_checkpoint(tiny_vit(), tmp_path / "model")

    def job(**more: Any) -> None:
        run_job(task, str(place), tmp_path / "out", method="finetune", config=options, **more)

    killed(lambda: job(progress=die_at(2)))
    save_checkpoint(tiny_vit(seed=9), place)
    with pytest.raises(UserError, match=r"checkpoint_sha256: '[0-9a-f]{64}' before, '[0-9a-f]{64}' now"):
        job(resume=True)


def test_a_queue_of_an_exact_method_drops_stages_request_by_request(
    store: Path, digits: Source, tmp_path: Path
) -> None:
    """One model in slices of which each request takes what it must; a request for what is dropped already is fine."""
    options = {"batch_size": 32, "precision": "fp32", "max_steps": 2}
    recipe = {**options, "slices": 3, "epochs": 1, "rank": 2}
    train(tiny_vit(), digits.train, method="s3t", config=recipe, output_dir=tmp_path / "sliced")
    queue = tmp_path / "queue"
    init_store(queue, str(tmp_path / "sliced"), "digits", method="s3t", config=options)
    of = slices_of(tokens_of(digits.train, 0), 3)
    for number, position in enumerate([*np.flatnonzero(of == 3)[:2], np.flatnonzero(of == 2)[0]], 1):
        add_request(queue, ids=[digits.train.ids[position]], source="letter")
        finished = run(queue)
        assert (finished.version, finished.status) == (number, "PASS")
    served = [Stages.read(queue / "versions" / f"{number:04d}") for number in range(4)]
    assert [len(stages.kept[0]) for stages in served] == [3, 2, 2, 1]
    assert [len(stages.members) for stages in served] == [240, 239, 238, 237]
    assert served[1].served == served[2].served != served[3].served


@pytest.mark.slow
def test_drift_is_counted_from_the_last_full_retrain(
    store: Path, digits: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_request(store, ids=ids_of(digits, 0, 16))
    add_request(store, ids=ids_of(digits, 16, 8), times=RequestTimes(days=60))
    count = len(digits.train)
    first, second = run(store, limit=1), run(store)
    assert (first.drift["forgotten"], second.drift["forgotten"]) == (16, 24)
    assert second.drift["share"] == pytest.approx(24 / count)
    assert second.drift["test_kl"] > 0
    evaluator = Task.of_ids(digits, ids_of(digits, 0), spec="x").evaluator({"precision": "fp32"})
    root, version = (evaluator(load_checkpoint(store / "versions" / name)) for name in ("0000", "0002"))
    expected = drift_from(root.predictions["test"], version.predictions["test"])
    assert {key: second.drift[key] for key in expected} == pytest.approx(expected)
    assert status(store)["warnings"] == []
    (warning,) = status(store, max_share=0.09)["warnings"]
    assert warning.startswith("10.0% of the training samples were forgotten since the full retrain of version 0000")
    assert "rebase" in warning

    retrain = save_checkpoint(tiny_vit(5), tmp_path / "retrain")
    killed(lambda: (monkeypatch.setattr(Store, "add_rebase", die), rebase(store, str(retrain))))
    assert status(store)["current"]["version"] == 2
    add_request(store, ids=ids_of(digits, 30))
    killed(lambda: run(store, progress=die_at(1)))  # what the retrain left is in nobody's way
    abandon_run(store)
    with pytest.raises(UserError, match=r"by its record.json it was made by finetune, not by a full retrain"):
        rebase(store, str(store / "versions" / "0002"))
    said = {"method": "retrain", "samples": {"retain_sha256": digits.train.fingerprint()}}
    write_json(retrain / "config.yaml", said)
    with pytest.raises(UserError, match=r"trained on all samples, the 24 forgotten ones among them; retrain with"):
        rebase(store, str(retrain))
    left = digits.train.subset(range(24, count)).fingerprint()
    write_json(retrain / "config.yaml", {**said, "samples": {"retain_sha256": left}})
    assert rebase(store, str(retrain)) == (4, True)
    assert status(store, max_share=0.09)["warnings"] == []
    assert status(store)["current"] == {"version": 4, "folder": str(store / "versions" / "0004"), "base": 4}
    (retrain / "config.yaml").unlink()
    assert rebase(store, str(retrain)) == (5, False)

    judge = Judge()
    after_rebase = run(store, judge=judge)
    assert (after_rebase.parent, after_rebase.version, after_rebase.forgotten) == (5, 6, 30)
    assert after_rebase.drift["forgotten"] == 6
    assert after_rebase.drift["share"] == pytest.approx(6 / (count - 24))
    task, _, original, _ = judge.asked[0]
    assert (len(task.forget), original) == (30, "0000")
    assert read_yaml(store / "versions" / "0006" / "config.yaml")["samples"]["retain"] == count - 30


def test_drift_by_hand() -> None:
    labels = np.array([0, 0])
    base = Predictions(np.log(np.array([[0.5, 0.5 - 1e-9], [0.9, 0.1]])), labels)
    version = Predictions(np.log(np.array([[0.25, 0.75], [0.9, 0.1]])), labels)
    found = drift_from(base, version)
    assert found == pytest.approx(
        {
            "test_accuracy": 0.5,
            "test_accuracy_change": -50.0,
            "test_kl": (0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)) / 2,
        },
        abs=1e-6,
    )


@pytest.mark.slow
def test_samples_cannot_hide_among_those_that_are_proven(store: Path, digits: Source) -> None:
    def sizes(judge: Judge) -> list[int]:
        return [len(task.forget) for task, *_ in judge.asked]

    add_request(store, ids=ids_of(digits, 0, 20))
    first = Judge()
    assert run(store, judge=first).state == "done"
    assert sizes(first) == [20]  # the batch is all that was forgotten
    add_request(store, ids=ids_of(digits, 20, 60))
    small = Judge()
    assert run(store, judge=small).state == "unproven"  # too few to be judged alone
    assert sizes(small) == [80]
    add_request(store, ids=ids_of(digits, 80, 40))
    failing = Judge("FAIL")
    assert run(store, judge=failing).state == "open"
    assert sizes(failing) == [100]
    undecided = Judge("INSUFFICIENT EVIDENCE", "PASS")
    assert run(store, judge=undecided).state == "unproven"
    asked = [(len(task.forget), len(task.retain), checkpoint, root) for task, checkpoint, root, _ in undecided.asked]
    assert asked == [(100, 120, "0004", "0000"), (120, 120, "0004", "0000")]
    judged = Judge()
    judge_again(store, verify=judged, record=record)
    assert sizes(judged) == [100, 120]
    assert states(store) == {1: "done", 2: "done", 3: "done"}
