"""Simulated requests: how they are drawn, put together, and continued after a stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_pool import make_pool
from torch import nn
from toys import tiny_vit

from engine.data import Source
from engine.errors import UserError
from engine.jobs.task import Task
from engine.pool.answers import Answers
from engine.pool.references import PoolReferences
from engine.pool.simulation import Procedure, draw_requests, kind_of, simulate, takes_folder
from engine.pool.store import Pool

PROCEDURE = Procedure(method="finetune", config={"precision": "fp32"}, kind="random", size=6, count=3)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, digits: Source) -> Pool:
    return make_pool(tmp_path_factory.mktemp("pool") / "pool", digits)


@pytest.fixture
def references(pool: Pool, digits: Source) -> PoolReferences:
    return PoolReferences(pool, digits, tiny_vit(3), Answers({"precision": "fp32"}))


def unchanged(original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
    return original, 7


def test_requests_are_disjoint_and_repeatable(digits: Source) -> None:
    drawn = draw_requests(digits.train, "random", 6, 5, 0)
    assert [len(ids) for ids in drawn] == [6] * 5
    assert len({i for ids in drawn for i in ids}) == 30
    assert drawn == draw_requests(digits.train, "random", 6, 5, 0)
    assert drawn != draw_requests(digits.train, "random", 6, 5, 1)


def test_requests_of_a_class_have_one_class_each(digits: Source) -> None:
    drawn = draw_requests(digits.train, "class", 6, 8, 0)
    labels = [set(digits.train.labels[digits.train.ids.positions(ids)]) for ids in drawn]
    assert all(len(each) == 1 for each in labels)
    assert len({min(each) for each in labels}) > 3
    assert len({i for ids in drawn for i in ids}) == 48


def test_near_duplicates_are_closer_to_a_retained_sample_than_random_ones(digits: Source) -> None:
    model = tiny_vit(3)

    def nearest(ids: list[str]) -> float:
        pixels = np.stack([np.asarray(digits.train.image(i), dtype=float).ravel() for i in range(len(digits.train))])
        rows = digits.train.ids.positions(ids)
        others = np.setdiff1d(np.arange(len(pixels)), rows)
        return float(np.mean([np.linalg.norm(pixels[others] - pixels[r], axis=1).min() for r in rows]))

    near = [i for ids in draw_requests(digits.train, "near-duplicates", 5, 4, 0, model) for i in ids]
    assert len(set(near)) == 20
    assert nearest(near) < nearest([i for ids in draw_requests(digits.train, "random", 5, 4, 0) for i in ids])


@pytest.mark.parametrize(("kind", "size", "count"), [("random", 0, 3), ("random", 50, 3), ("class", 25, 4)])
def test_more_requests_than_samples_are_refused(digits: Source, kind: Any, size: int, count: int) -> None:
    with pytest.raises(UserError, match="certify: "):
        draw_requests(digits.train, kind, size, count, 0)


def test_kind_of_a_request() -> None:
    assert kind_of(np.array([3])) == "random"
    assert kind_of(np.array([3, 3, 3, 3])) == "random"
    assert kind_of(np.array([3, 3, 3, 3, 5])) == "class"
    assert kind_of(np.array([3, 3, 3, 4, 5])) == "random"


def test_samples_are_put_together_in_their_order(references: PoolReferences, tmp_path: Path) -> None:
    """Of a procedure that changes nothing, the outputs are the original's, sample by sample."""
    found, evidence = simulate(references, PROCEDURE, tmp_path, run=unchanged)
    assert [one.images for one in found] == [7, 7, 7]
    for sets in ("predictions", "shifted"):
        mine, theirs = getattr(evidence.model, sets), getattr(evidence.original, sets)
        assert set(mine) == set(theirs)
        for name in mine:
            np.testing.assert_array_equal(mine[name].labels, theirs[name].labels)
            np.testing.assert_allclose(mine[name].logits, theirs[name].logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(evidence.model.predictions["test"].labels, references.test.labels)
    assert len(evidence.model.predictions["forget"]) == 18
    assert len(evidence.model.predictions["retain"]) == 240 - 18
    assert evidence.changed == 0
    for one in evidence.references:
        np.testing.assert_array_equal(one.predictions["forget"].labels, evidence.model.predictions["forget"].labels)


def test_each_request_is_judged_on_the_model_that_forgot_it(references: PoolReferences, tmp_path: Path) -> None:
    models = {}

    def run(original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
        models[int(config["seed"])] = (tiny_vit(50 + int(config["seed"])), task)
        return models[int(config["seed"])][0], 0

    procedure = Procedure(method="finetune", config={}, kind="random", size=6, count=3, seed=4)
    _, evidence = simulate(references, procedure, tmp_path, run=run)
    assert sorted(models) == [4, 5, 6]
    answers = Answers({"precision": "fp32"})
    for place, seed in enumerate(sorted(models)):
        model, task = models[seed]
        mine = evidence.model.predictions["forget"].logits[6 * place : 6 * place + 6]
        np.testing.assert_allclose(mine, answers(model, task.forget).logits, rtol=1e-4, atol=1e-5)
        rows = np.arange(place, len(references.test), 3)
        of_test = answers(model, references.test.subset(rows)).logits
        np.testing.assert_allclose(evidence.model.predictions["test"].logits[rows], of_test, rtol=1e-4, atol=1e-5)


def test_a_stopped_call_is_continued(references: PoolReferences, tmp_path: Path) -> None:
    ran: list[int] = []

    def dies(original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(int(config["seed"]))
        return tiny_vit(60 + int(config["seed"])), 0

    with pytest.raises(KeyboardInterrupt):
        simulate(references, PROCEDURE, tmp_path, run=dies)
    again: list[int] = []

    def goes_on(original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
        again.append(int(config["seed"]))
        return tiny_vit(60 + int(config["seed"])), 0

    _, evidence = simulate(references, PROCEDURE, tmp_path, run=goes_on)
    assert (ran, again) == ([0, 1], [2])
    _, whole = simulate(references, PROCEDURE, tmp_path / "whole", run=goes_on)
    for name, p in evidence.model.predictions.items():
        np.testing.assert_allclose(p.logits, whole.model.predictions[name].logits, rtol=1e-4, atol=1e-5)


def test_outputs_of_other_samples_are_not_taken(pool: Pool, digits: Source, tmp_path: Path) -> None:
    """The data changed between two calls, so that the draw is another."""

    def unlike(original: nn.Module, task: Task, method: str, config: Mapping[str, Any]) -> tuple[nn.Module, int]:
        return tiny_vit(70), 0

    simulate(PoolReferences(pool, digits, tiny_vit(3), Answers({"precision": "fp32"})), PROCEDURE, tmp_path, run=unlike)
    fewer = dataclasses.replace(digits, train=digits.train.subset(np.arange(3, 240)))
    references = PoolReferences(pool, fewer, tiny_vit(3), Answers({"precision": "fp32"}))
    _, again = simulate(references, PROCEDURE, tmp_path, run=unlike)
    _, fresh = simulate(references, PROCEDURE, tmp_path / "fresh", run=unlike)
    for name, p in fresh.model.predictions.items():
        np.testing.assert_allclose(again.model.predictions[name].logits, p.logits, rtol=1e-4, atol=1e-5)


def test_a_folder_holds_one_procedure(tmp_path: Path) -> None:
    with takes_folder(tmp_path / "c", {"method": "lethe", "options": {"lr": 0.1}}):
        pass
    with takes_folder(tmp_path / "c", {"method": "lethe", "options": {"lr": 0.1}}):
        pass
    with (
        pytest.raises(UserError, match="that differ in options"),
        takes_folder(tmp_path / "c", {"method": "lethe", "options": {"lr": 0.2}}),
    ):
        pass
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt"), takes_folder(tmp_path / "d", {"method": "lethe"}):
        pass


def test_figures_of_a_run(references: PoolReferences, digits: Source) -> None:
    from engine.pool.simulation import figures_of

    task = Task.of_ids(digits, list(digits.train.ids[:6]), spec="x")
    forget = references.forget(task.forget, moved=False)
    before, model = tiny_vit(3), tiny_vit(3)
    answers = Answers({"precision": "fp32"})

    def change() -> float:
        return figures_of(model, before, root, answers(model, task.forget), forget)["weights"]

    root = tiny_vit(3)
    assert change() == -9
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert change() == pytest.approx(-2, abs=1e-3)


def test_the_unit_of_a_change_is_the_root_of_the_lineage(references: PoolReferences, digits: Source) -> None:
    """Red before: weights that had grown made the change a smaller part of them, and a request failed."""
    from engine.pool.simulation import figures_of

    task = Task.of_ids(digits, list(digits.train.ids[:6]), spec="x")
    forget, answers = references.forget(task.forget, moved=False), Answers({"precision": "fp32"})
    root, before, model = tiny_vit(3), tiny_vit(3), tiny_vit(3)
    with torch.no_grad():
        for first, second, third in zip(root.parameters(), before.parameters(), model.parameters(), strict=True):
            second.mul_(4.0)
            third.copy_(second + 0.01 * first)
    found = figures_of(model, before, root, answers(model, task.forget), forget)
    assert found["weights"] == pytest.approx(-2, abs=1e-3)
