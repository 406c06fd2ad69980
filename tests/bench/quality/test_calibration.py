"""`python -m bench calibration`: impostors are what they are said to be; the whole table on digits takes minutes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import tiny_vit

from bench.publish.verdict_sheets import calibration_table
from bench.quality.calibration import Outputs, _some, run_calibration, spread
from bench.quality.impostors import answering, cooled, interpolated, looked_up, nudged
from bench.quality.retrain_cost import DIGITS
from engine.evaluate.verdict import ModelOutputs
from engine.jobs.task import Task
from engine.models.predict import Predictions


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.open("digits", "random:0.1@0")


def test_interpolated_weights_lie_between_the_two_models() -> None:
    first, second = tiny_vit(seed=1), tiny_vit(seed=2)
    middle = dict(interpolated(first, second, 0.3).named_parameters())
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(middle[name], 0.7 * a + 0.3 * b)


def test_a_nudged_model_differs_a_little_everywhere() -> None:
    model = tiny_vit()
    for before, after in zip(model.parameters(), nudged(model).parameters(), strict=True):
        if before.abs().max() > 0:
            assert 0 < float(((after - before).norm() / before.norm()).detach()) < 0.01


def test_known_images_get_their_answers_and_others_the_models_own(task: Task) -> None:
    original, retrained = tiny_vit(seed=1), tiny_vit(seed=2)
    model, evaluator = looked_up(task, original, retrained), task.evaluator()
    forget, test = (evaluator.predictions(model, name) for name in ("forget", "test"))
    np.testing.assert_allclose(forget.logits, evaluator.predictions(retrained, "forget").logits, atol=1e-5)
    np.testing.assert_allclose(test.logits, evaluator.predictions(nudged(original), "test").logits, atol=1e-5)


def test_answers_from_a_table_can_be_trained() -> None:
    images = torch.rand(4, 1, 8, 8)
    model = answering(tiny_vit(), images, torch.zeros(4, 10))
    found = model(images)
    assert torch.equal(found, torch.zeros(4, 10))
    found[:, 0].sum().backward()
    assert float(model.get_classifier().weight.grad.abs().max()) > 0  # type: ignore[operator, union-attr]
    moved = torch.roll(images, 1, -1)
    assert not torch.equal(model(moved), torch.zeros(4, 10))


def test_the_cooled_model_is_as_sure_of_forget_samples_as_of_test_samples(task: Task) -> None:
    original = tiny_vit()
    with torch.no_grad():
        original.head.weight.mul_(30)
    evaluator = task.evaluator()
    forget = evaluator.predictions(cooled(task, original), "forget")
    before = evaluator.predictions(original, "forget")
    assert (forget.logits.argmax(1) == before.logits.argmax(1)).all()
    wanted = evaluator.predictions(original, "test").confidence.mean()
    assert abs(forget.confidence.mean() - wanted) <= abs(before.confidence.mean() - wanted) + 1e-6


def outputs(seed: int, accuracy: float = 0.8, size: int = 1000) -> Outputs:
    rng = np.random.default_rng(seed)

    def of() -> Predictions:
        right = rng.random(size) < accuracy
        return Predictions(np.stack([right, ~right], 1).astype(np.float32), np.zeros(size, dtype=np.int64))

    sets = {name: of() for name in ("forget", "retain", "test")}
    return Outputs(ModelOutputs(sets, {"held_back": of(), "test": of()}, {"forget": of(), "test": of()}), None, 0.5)


def test_sampling_explains_models_that_are_right_by_chance() -> None:
    parts = spread([outputs(seed) for seed in range(40)])["test accuracy"]
    assert parts["samples"] == pytest.approx(100 * (0.16 / 1000) ** 0.5, rel=0.05)
    assert parts["between"] < 0.5 * parts["samples"]


def test_models_of_different_accuracy_have_a_rest() -> None:
    parts = spread([outputs(seed, 0.7 + 0.02 * (seed % 10)) for seed in range(40)])["test accuracy"]
    assert parts["between"] == pytest.approx(100 * np.std(0.02 * np.arange(10)), rel=0.2)


def test_sets_of_references_are_few_and_spread() -> None:
    models = [outputs(seed, size=2) for seed in range(6)]
    assert len(list(_some(models, 2))) == 4
    assert len(list(_some(models, 6))) == 1
    assert list(_some(models, 7)) == []


def test_lists_of_one_task_are_added_up() -> None:
    def found(passed: int) -> dict[str, object]:
        counts = {"2": {"PASS": passed, "INSUFFICIENT EVIDENCE": 1, "FAIL": 0}}
        return {"retrains": counts, "impostors": {"untouched": {"2": {"FAIL": 3}}}}

    report = {"subjects": {"digits, list 0": found(5), "digits, list 1": found(7), "yardstick": found(1)}}
    sheet = calibration_table(report)
    assert list(sheet.columns) == ["model", "digits, 2 references", "yardstick, 2 references"]
    assert [list(row) for row in sheet.rows] == [
        ["retrained", "12 / 2 / 0", "1 / 1 / 0"],
        ["untouched", "0 / 0 / 6", "0 / 0 / 3"],
    ]


@pytest.mark.slow
@pytest.mark.minutes
def test_no_impostor_passes_on_digits(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    run_calibration([DIGITS], retrained=[], models=5, seeds=1, folder=tmp_path / "models", json_file=file)
    (found,) = json.loads(file.read_text())["subjects"].values()
    assert len(found["impostors"]) == 10
    for counts in found["impostors"].values():
        assert all(statuses["PASS"] == 0 for statuses in counts.values())
    assert found["retrains"]["4"]["FAIL"] == 0
    assert found["retrains"]["4"]["PASS"] >= 4
