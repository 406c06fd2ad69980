"""References that are put together from the models of a pool."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from digit_pool import make_pool
from toys import tiny_vit

from engine.data import Source
from engine.errors import UserError
from engine.evaluate.gates import Gates
from engine.evaluate.verdict import accuracy_gates
from engine.jobs.task import Task
from engine.models.preprocessing import preprocessing_of
from engine.pool.answers import Answers
from engine.pool.references import PoolReferences, check_knowledge, evidence_by_pool, judge_by_pool, judge_task
from engine.pool.store import Pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, digits: Source) -> Pool:
    return make_pool(tmp_path_factory.mktemp("pool") / "pool", digits)


def _references(pool: Pool, digits: Source) -> PoolReferences:
    return PoolReferences(pool, digits, tiny_vit(3), Answers({"precision": "fp32"}))


def test_each_sample_is_answered_by_models_that_lack_it(pool: Pool, digits: Source) -> None:
    references, answers = _references(pool, digits), Answers({"precision": "fp32"})
    samples = digits.train.subset(np.arange(30))
    found, unseen = references.forget(samples), pool.unseen(samples.ids)
    logits = np.stack([answers(references.model(n), samples).logits for n in range(1, 5)])
    assert len(found) == 2
    for row in range(30):
        models = [int(np.abs(logits[:, row] - each["plain"].logits[row]).sum(1).argmin()) for each in found]
        assert set(models) == set(np.flatnonzero(unseen[row]))
        for model, each in zip(models, found, strict=True):
            np.testing.assert_allclose(each["plain"].logits[row], logits[model, row], rtol=1e-4, atol=1e-5)


def test_test_samples_are_divided_among_all_models_and_kept(pool: Pool, digits: Source) -> None:
    references = _references(pool, digits)
    first = references.controls()
    seen = references.answers.images
    again = references.controls()
    assert references.answers.images == seen  # read from the folder
    for a, b in zip(first, again, strict=True):
        for kind in ("plain", "moved"):
            np.testing.assert_array_equal(a[kind].logits, b[kind].logits)
    assert (first[0]["plain"].logits != first[1]["plain"].logits).any(1).all()
    logits = [Answers({"precision": "fp32"})(references.model(n), digits.test).logits for n in range(1, 5)]
    used = {
        int(np.argmin([np.abs(each[row] - first[0]["plain"].logits[row]).sum() for each in logits]))
        for row in range(len(digits.test))
    }
    assert used == {0, 1, 2, 3}


def test_moved_images_are_other_answers(pool: Pool, digits: Source) -> None:
    found = _references(pool, digits).forget(digits.train.subset(np.arange(5)))[0]
    assert (found["plain"].logits != found["moved"].logits).any()
    assert set(_references(pool, digits).forget(digits.train.subset(np.arange(5)), moved=False)[0]) == {"plain"}


def test_a_damaged_file_of_outputs_is_computed_again(pool: Pool, digits: Source) -> None:
    references = _references(pool, digits)
    before = references.controls()[0]["plain"].logits
    (path,) = (pool.folder / "outputs").glob("test-*.npz")
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(_references(pool, digits).controls()[0]["plain"].logits, before)


def test_an_original_of_another_size_is_refused(pool: Pool, digits: Source) -> None:
    with pytest.raises(UserError, match="a pool has the architecture of the original"):
        PoolReferences(pool, digits, tiny_vit(depth=3), Answers())


def test_a_pool_that_is_out_of_date_is_refused(pool: Pool, digits: Source) -> None:
    old = dataclasses.replace(digits, train=digits.train.subset(np.arange(60, 240)))
    with pytest.raises(UserError, match=r"out of date: .* 0 samples are new and 60 are gone, of 180"):
        PoolReferences(pool, old, tiny_vit(), Answers())


def test_a_model_that_was_trained_on_what_it_should_lack_is_refused() -> None:
    """By its outputs: its record may be forged."""
    honest = [(0.62, 0.02), (0.60, 0.02), (0.61, 0.02)]
    check_knowledge(Path("p"), [*honest, (0.56, 0.02)])
    with pytest.raises(UserError, match="model 4 was trained on samples that it should lack"):
        check_knowledge(Path("p"), [*honest, (0.5, 0.02)])


def test_outputs_that_are_kept_are_those_of_the_same_preprocessing(
    pool: Pool, digits: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong --mean, once, spoiled all later verdicts by the pool."""
    _references(pool, digits).expected_test()
    own = preprocessing_of(tiny_vit())
    other = dataclasses.replace(own, mean=tuple(0.1 for _ in own.mean))
    monkeypatch.setattr("engine.pool.references.preprocessing_of", lambda model: other)
    references = _references(pool, digits)
    seen = references.answers.images
    references.expected_test()
    references.controls()
    assert references.answers.images >= seen + 2 * len(digits.test), "computed again"


@pytest.mark.parametrize(("kept", "decided"), [(0, True), (2, True), (15, False)])
def test_a_class_that_is_gone_is_not_judged_by_models_that_know_it(
    pool: Pool, digits: Source, kept: int, decided: bool
) -> None:
    """It was a FAIL, for a retrained model too."""
    members = np.flatnonzero(digits.train.labels == 3)
    ids = [digits.train.ids[int(i)] for i in members[kept:]]
    found = judge_task(_references(pool, digits), Task.of_ids(digits, ids, spec="class 3"), tiny_vit(4), Gates.read())
    assert (found.decided_by == ["classes"]) is decided
    if decided:
        assert found.status == "INSUFFICIENT EVIDENCE"
        assert f"of class 3 {kept} of {len(members)} samples are retained" in found.gates[0].reason
        assert "give --reference in place of --pool" in found.gates[0].reason


def test_evidence_has_the_outputs_of_each_set(pool: Pool, digits: Source) -> None:
    references = _references(pool, digits)
    task = Task.of_ids(digits, list(digits.train.ids[:20]), spec="x")
    model = tiny_vit(4)
    found = evidence_by_pool(references, task, model)
    assert found.partial
    assert found.changed == pytest.approx(1.0, abs=0.1)
    assert {name: len(p) for name, p in found.model.predictions.items()} == {"forget": 20, "test": 80, "retain": 220}
    assert {name: len(p) for name, p in found.references[0].predictions.items()} == {"forget": 20, "test": 80}
    np.testing.assert_array_equal(found.model.predictions["forget"].logits, found.repeated.logits)
    expected = Answers({"precision": "fp32"})(model, task.forget).logits
    np.testing.assert_allclose(found.model.predictions["forget"].logits, expected, rtol=1e-5)


def test_accuracy_on_test_samples_is_expected_from_all_models(pool: Pool, digits: Source) -> None:
    references, answers = _references(pool, digits), Answers({"precision": "fp32"})
    right = np.stack([answers(references.model(n), digits.test).correct for n in range(1, 5)])
    np.testing.assert_allclose(references.expected_test(), right.mean(0))
    seen = references.answers.images
    np.testing.assert_allclose(references.expected_test(), right.mean(0))
    assert references.answers.images == seen
    # A model that is right where they are, on average, and as often as they are on the forget samples: no difference.
    task = Task.of_ids(digits, list(digits.train.ids[:120]), spec="x")
    evidence = evidence_by_pool(references, task, tiny_vit(4))
    (gate,) = [gate for gate in accuracy_gates(evidence, Gates.read()) if gate.name == "forget accuracy"]
    forget = evidence.model.predictions["forget"].correct
    theirs = np.mean([each.predictions["forget"].correct for each in evidence.references], axis=0)
    apart = evidence.model.predictions["test"].correct.mean() - right.mean()
    assert gate.value is not None
    assert gate.value.value == pytest.approx(100 * ((forget - theirs).mean() - apart))


def test_the_cost_of_a_verdict_is_counted(pool: Pool, digits: Source, tmp_path: Path) -> None:
    from engine.models.checkpoint import save_checkpoint

    original = save_checkpoint(tiny_vit(3), tmp_path / "original")
    task = Task.of_ids(digits, list(digits.train.ids[:20]), spec="x")
    judge_by_pool(pool.folder, task, original, original, config={"precision": "fp32"})
    found = judge_by_pool(pool.folder, task, original, original, config={"precision": "fp32"})
    assert found.status == "FAIL"  # untouched
    assert found.kind == "pool"
    assert found.proof is not None
    # Model and original on 20 forget (plain, moved), 80 test (plain, moved) and 220 retain samples; forget again; each
    # of the 20 by two models of the pool, plain and moved.
    assert found.proof.images == 2 * (2 * 20 + 2 * 80 + 220) + 20 + 2 * 2 * 20
    assert found.proof.retrain == 3 * 1.0 * 240
