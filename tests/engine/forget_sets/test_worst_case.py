"""The worst-case forget set: the projection, the weights, the unlearning inside, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from engine.data import Samples
from engine.errors import RunStopped, UserError
from engine.forget_sets import Pool, choose_forget_set
from engine.forget_sets.adversarial import (
    AdversarialConfig,
    _LastLayer,
    _WholeModel,
    optimise_weights,
    set_objective,
)
from engine.forget_sets.pool import reading
from engine.forget_sets.projection import project
from engine.models.checkpoint import weights_sha256


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-3, 3).map(lambda x: round(x, 3)), min_size=1, max_size=7),
    st.floats(0.05, 1),
)
def test_projection_is_the_nearest_feasible_point(point: list[float], share: float) -> None:
    p, total = np.array(point), share * len(point)
    w = project(p, total)
    assert w.min() >= 0
    assert w.max() <= 1
    assert w.sum() == pytest.approx(total, abs=1e-9)
    solved = minimize(
        lambda x: ((x - p) ** 2).sum(),
        np.full(len(p), share),
        jac=lambda x: 2 * (x - p),
        bounds=[(0, 1)] * len(p),
        constraints={"type": "eq", "fun": lambda x: x.sum() - total, "jac": lambda x: np.ones(len(p))},
        options={"ftol": 1e-14, "maxiter": 200},
    )
    assert ((w - p) ** 2).sum() <= solved.fun + 1e-7
    np.testing.assert_allclose(w, solved.x, atol=1e-4)
    np.testing.assert_allclose(project(w, total), w, atol=1e-9)  # a feasible point stays
    np.testing.assert_allclose(project(p + 1e6, total), w, atol=1e-8)  # so does what is common to all
    assert project(p + 1e9, total).sum() == pytest.approx(total, abs=1e-9)


def test_projection_by_hand_and_what_it_refuses() -> None:
    np.testing.assert_allclose(project(np.array([5.0, 0.2, 0.1, -4.0]), 1.5), [1, 0.3, 0.2, 0])
    np.testing.assert_allclose(project(np.array([1.0, 1.0, 1.0]), 1), np.full(3, 1 / 3))
    np.testing.assert_allclose(project(np.array([7.0, -2.0]), 2), [1, 1])
    for point, total in (([1.0, 2.0], 3), ([1.0, 2.0], 0), ([1.0, np.nan], 1)):
        with pytest.raises(ValueError, match="project: expected finite values and a total"):
            project(np.array(point), total)


def test_weights_are_feasible_at_each_step_and_find_the_lowest_losses() -> None:
    losses = np.random.default_rng(0).permutation(np.linspace(0, 4, 40))
    candidates = np.arange(1, 40)
    steps = 0
    config = AdversarialConfig(iterations=50, weight_lr=0.5)
    for weights, seen in optimise_weights(lambda w: losses, 40, candidates, 6, config):
        if steps == 0:
            before = np.where(np.arange(40) > 0, 6 / 39, 0)  # equal at first
            np.testing.assert_allclose(weights[1:], project((before - 0.5 * (losses + 2e-4 * before))[1:], 6))
        steps += 1
        assert weights.min() >= 0
        assert weights.max() <= 1
        assert weights.sum() == pytest.approx(6, abs=1e-9)
        assert weights[0] == 0  # no candidate
        assert seen is losses
    assert steps == 50
    best = candidates[np.argsort(losses[1:])[:6]]
    np.testing.assert_allclose(weights[best], 1, atol=1e-6)


def test_the_penalty_spreads_the_weights() -> None:
    # The minimum of sum w l + gamma ||w||^2 is the projection of -l / (2 gamma).
    losses = np.random.default_rng(0).uniform(0, 1, 12)
    config = AdversarialConfig(iterations=80, gamma=0.5, weight_lr=0.3)
    *_, (weights, _) = optimise_weights(lambda w: losses, 12, np.arange(12), 3, config)
    np.testing.assert_allclose(weights, project(-losses, 3), atol=1e-6)
    assert ((weights > 0.01) & (weights < 0.99)).sum() >= 3


@pytest.mark.parametrize("lower", [_LastLayer, _WholeModel])
@pytest.mark.slow
def test_unlearning_learns_what_is_retained_and_not_what_is_weighted(
    digits: Samples, fitted: torch.nn.Module, lower: Callable[..., Any]
) -> None:
    before = weights_sha256(fitted)
    pool = Pool(digits, 20, model=fitted)
    steps = 30 if lower is _LastLayer else 6
    unlearn = lower(pool, AdversarialConfig(unlearn_steps=steps, unlearn_lr=5e-3 if lower is _LastLayer else 5e-4))
    weights = np.zeros(200)
    half = np.arange(200) < 100
    weights[half] = 1
    first = unlearn(weights)
    second = unlearn(1 - weights)
    assert first[~half].mean() < 0.8 * second[~half].mean()  # trained on in the first, not in the second
    assert second[half].mean() < 0.8 * first[half].mean()
    assert (unlearn(weights) == first).all()  # from the original again, on the same batches
    assert set_objective(unlearn, np.flatnonzero(half), 200) == pytest.approx(first[half].mean())
    assert weights_sha256(fitted) == before


def test_a_step_of_unlearning_moves_every_weight_by_the_rate(digits: Samples, fitted: torch.nn.Module) -> None:
    unlearn = _LastLayer(Pool(digits, 20, model=fitted), AdversarialConfig(unlearn_steps=1, unlearn_lr=0.01))
    seen: list[torch.Tensor] = []
    plain = unlearn.losses_of_all
    unlearn.losses_of_all = lambda student: (seen.append(student.weight.detach().clone()), plain(student))[1]  # type: ignore[method-assign]
    unlearn(np.zeros(200))
    torch.testing.assert_close((seen[0] - fitted.head.weight).abs(), torch.full_like(seen[0], 0.01))  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("layers", ["last", "all"])
def test_the_worst_case_is_harder_than_a_random_set(digits: Samples, fitted: torch.nn.Module, layers: str) -> None:
    told: list[tuple[str, int, int]] = []
    result = choose_forget_set(
        digits,
        "adversarial",
        share=0.1,
        model=fitted,
        config={"layers": layers, "iterations": 4, "unlearn_steps": 5},
        progress=lambda stage, step, steps, numbers: told.append((stage, step, steps)),
    )
    facts = result.selection.facts
    assert facts["loss_after_unlearning"] < 0.5 * facts["loss_of_random_set_after_unlearning"]
    losses = Pool(digits, 20, model=fitted).measurements.losses
    drawn = np.random.default_rng([0, 1]).permutation(200)[:20]
    assert facts["loss_of_random_set_before"] == pytest.approx(losses[drawn].mean(), rel=1e-6)
    lowest = set(np.argsort(losses)[:20].tolist())
    assert facts["share_among_lowest_loss"] == len(lowest & set(result.selection.indices.tolist())) / 20
    assert len(facts["objective_by_iteration"]) == 4
    assert facts["objective_by_iteration"][-1] < facts["objective_by_iteration"][0]
    assert ("weights", 4, 4) in told
    assert (np.diff(result.selection.scores) <= 0).all()
    assert result.description["chosen"]["loss"] < result.description["random"]["loss"]


def test_unlearning_that_diverges_is_told(digits: Samples, fitted: torch.nn.Module) -> None:
    with pytest.raises(RunStopped, match="lower unlearn_lr"):
        choose_forget_set(
            digits,
            "adversarial",
            count=5,
            model=fitted,
            config={"iterations": 1, "unlearn_steps": 2, "unlearn_lr": 1e38},
        )


@pytest.mark.parametrize(
    "options",
    [{"iterations": 0}, {"unlearn_steps": 0}, {"unlearn_lr": 0.0}, {"weight_lr": 0.0}, {"gamma": -1.0}],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        AdversarialConfig(**options)


@pytest.mark.parametrize(("lower", "steps", "rate"), [(_LastLayer, 400, 0.04), (_WholeModel, 100, 8e-4)])
def test_rates_and_steps_that_are_not_given(
    digits: Samples, fitted: torch.nn.Module, lower: Any, steps: int, rate: float
) -> None:
    unlearn = lower(Pool(digits, 20, model=fitted), AdversarialConfig())  # width 32
    assert unlearn.steps == steps
    assert unlearn.rate == pytest.approx(rate)
    three = lower(Pool(digits, 20, model=fitted, run=reading({"batch_size": 90})), AdversarialConfig(unlearn_steps=7))
    sizes = [len(index) for *_, index in three.batches()]
    assert sizes == [90, 90, 20, 90, 90, 20, 90]  # whole passes, and no more than the steps
