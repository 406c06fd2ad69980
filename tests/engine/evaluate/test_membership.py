"""Each attack against planted cases: a model that memorised, and one that never saw the samples."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from drawn_predictions import drawn
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC

from engine.errors import UserError
from engine.evaluate import membership
from engine.evaluate.intervals import bootstrap
from engine.evaluate.membership import (
    attacks,
    auc,
    auc_interval,
    balanced_accuracy,
    calibrated_scores,
    loss_auc,
    mean_attacks,
    mia_efficacy,
    non_member_calls,
    scores,
    tpr_at_fpr,
    tpr_interval,
)
from engine.models.predict import Predictions

ATTACKS = ("loss", "entropy", "modified_entropy", "confidence")
RATES = ("tpr_at_fpr_0.001", "tpr_at_fpr_0.01")


def with_losses(losses: Any, labels: Any = None, classes: int = 2) -> Predictions:
    """Predictions whose cross-entropies are these; the other classes share the rest."""
    p = np.exp(-np.asarray(losses, dtype=np.float64))
    labels = np.zeros(len(p), dtype=np.int64) if labels is None else np.asarray(labels)
    probabilities = np.repeat(((1 - p) / (classes - 1))[:, None], classes, axis=1)
    probabilities[np.arange(len(p)), labels] = p
    return Predictions(np.log(probabilities), labels)


def test_every_attack_sees_a_model_that_memorised() -> None:
    retain, test, forget = drawn(600, 9.0, 0), drawn(1200, 0.5, 1), drawn(300, 9.0, 2)
    found = attacks(forget, retain, test, [{"forget": drawn_like(forget, 0.5, 3), "test": drawn_like(test, 0.5, 4)}])
    assert found["calibrated_loss"]["auc"]["low"] > 0.8  # the planted references add noise of their own
    for name in ATTACKS:
        assert found[name]["auc"]["value"] > 0.98, name
        assert found[name]["auc"]["low"] > 0.95, name
        assert found[name]["tpr_at_fpr_0.01"]["value"] > 0.8, name
        assert found[name]["tpr_at_fpr_0.01"]["low"] > 0.5, name
        assert found[name]["tpr_at_fpr_0.001"]["value"] > 0.3, name
        assert found[name]["balanced_accuracy"]["low"] > 0.9, name


def drawn_like(predictions: Predictions, sharpness: float, seed: int) -> Predictions:
    """Another model's predictions of the same samples."""
    logits = np.random.default_rng(seed).normal(size=predictions.logits.shape).astype(np.float32)
    logits[np.arange(len(predictions)), predictions.labels] += sharpness
    return Predictions(logits, predictions.labels)


def test_no_attack_sees_a_model_that_never_saw_the_samples() -> None:
    retain, test, forget = drawn(600, 9.0, 0), drawn(2000, 1.5, 1), drawn(300, 1.5, 2)
    found = attacks(forget, retain, test, [{"forget": drawn_like(forget, 1.5, 3), "test": drawn_like(test, 1.5, 4)}])
    for name in (*ATTACKS, "calibrated_loss"):
        numbers = found[name]
        assert numbers["auc"]["low"] <= 0.5 <= numbers["auc"]["high"], name
        assert numbers["auc"]["high"] - numbers["auc"]["low"] < 0.1, name
        for rate, expected in zip(RATES, (0.001, 0.01), strict=True):
            assert numbers[rate]["low"] <= expected <= numbers[rate]["high"] < 0.06, (name, rate)
    for name in ATTACKS:
        accuracy = found[name]["balanced_accuracy"]
        assert accuracy["low"] <= 0.5 <= accuracy["high"], name
        assert accuracy["high"] - accuracy["low"] < 0.1, name


def test_a_forget_set_that_is_known_less_than_unseen_samples_shows_below_a_half() -> None:
    found = attacks(drawn(200, -3.0, 0), drawn(300, 4.0, 1), drawn(300, 0.5, 2))
    assert found["loss"]["auc"]["high"] < 0.3


def test_auc_interval_holds_a_half_as_often_as_it_says() -> None:
    held = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = auc_interval(rng.normal(size=80), rng.normal(size=150))
        held.append(found.low <= 0.5 <= found.high)
    assert 0.90 <= np.mean(held) <= 0.99


def test_auc_interval_holds_the_truth_away_from_a_half_too() -> None:
    # Normal scores one standard deviation apart: AUC = Phi(1 / sqrt 2) = 0.7602.
    held = []
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        found = auc_interval(rng.normal(1, 1, 80), rng.normal(size=150))
        held.append(found.low <= 0.7602 <= found.high)
    assert 0.90 <= np.mean(held) <= 0.99


def test_tpr_interval_holds_the_rate_as_often_as_it_says() -> None:
    held = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = tpr_interval(rng.normal(size=300), rng.normal(size=1000), 0.05, draws=400, seed=seed)
        held.append(found.low <= 0.05 <= found.high)
    assert 0.90 <= np.mean(held) <= 0.99


def test_balanced_accuracy_is_not_measured_where_the_thresholds_were_learned() -> None:
    # Few known samples a class: thresholds fit their noise, which would show as power on those same samples.
    held, values = [], []
    for seed in range(200):
        forget, retain, test = (drawn(count, 1.0, 3 * seed + i, classes=10) for i, count in enumerate((100, 200, 120)))
        found = balanced_accuracy("loss", forget, retain, test, draws=200, seed=seed)
        held.append(found.low <= 0.5 <= found.high)
        values.append(found.value)
    assert 0.90 <= np.mean(held) <= 0.99
    assert np.mean(values) == pytest.approx(0.5, abs=0.02)


def test_auc_by_hand_and_against_scikit_learn() -> None:
    assert auc(np.array([3.0, 1.0]), np.array([2.0, 0.0])) == 0.75  # of four pairs, three are the right way round
    assert auc(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5  # ties count half
    assert auc(np.array([1.0, 2.0]), np.array([1.0, 1.0])) == 0.75
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 20, 70).astype(float), rng.integers(0, 15, 90).astype(float)
    expected = roc_auc_score(np.repeat([1, 0], [70, 90]), np.concatenate([members, others]))
    assert auc(members, others) == pytest.approx(expected, abs=1e-12)
    assert auc(others, members) == pytest.approx(1 - expected, abs=1e-12)
    assert loss_auc(with_losses([1, 3]), with_losses([2, 4])) == pytest.approx(0.75)


def test_auc_interval_is_that_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 60), rng.normal(0, 2, 250)
    exact, drawn_again = auc_interval(members, others), bootstrap(auc, members, others)
    assert exact.value == auc(members, others)
    assert exact.low == pytest.approx(drawn_again.low, abs=0.02)
    assert exact.high == pytest.approx(drawn_again.high, abs=0.02)
    wider = auc_interval(members, others, level=0.99)
    assert wider.high - wider.low == pytest.approx((exact.high - exact.low) * 2.576 / 1.960, rel=1e-3)


def test_auc_interval_does_not_claim_certainty_from_few_samples() -> None:
    assert auc_interval(np.array([1.0]), np.arange(100.0)) == pytest.approx((0.015, 0, 1))  # above 1, level with 1
    apart = auc_interval(np.array([5.0, 6.0, 7.0]), np.arange(4.0))
    assert apart == pytest.approx((1, 0.025 ** (1 / 3), 1))
    other_way = auc_interval(np.arange(4.0), np.array([5.0, 6.0, 7.0]))
    assert other_way == pytest.approx((0, 0, 1 - 0.025 ** (1 / 3)))


def test_attacks_refuse_scores_without_a_meaning() -> None:
    for members, others in ((np.zeros(0), np.ones(2)), (np.ones(2), np.zeros(0)), (np.ones((2, 2)), np.ones(2))):
        with pytest.raises(UserError, match="expected the scores"):
            auc(members, others)
    with pytest.raises(UserError, match="not a number"):
        auc(np.array([1.0, np.nan]), np.ones(2))


def test_tpr_at_fpr_by_hand() -> None:
    others = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    members = np.array([50.0, 99.0, 99.5, 101.0])
    # 1% of 100 is one false positive, 100: all above 99 are called members, 99 itself is not.
    assert tpr_at_fpr(members, others, 0.01) == 0.5
    assert tpr_at_fpr(members, others, 0.02) == 0.75  # above 98
    # 100 * 0.29 is a little less than 29 in floating point: 29 false positives, 72 to 100.
    assert tpr_at_fpr(np.array([71.0, 71.5, 72.0]), others, 0.29) == pytest.approx(2 / 3)
    # Tied scores are not called members, so the rate is never above what was asked for.
    assert tpr_at_fpr(np.ones(3), np.ones(100), 0.5) == 0.0


def test_too_few_samples_for_the_rate_are_refused() -> None:
    with pytest.raises(UserError, match=r"999 non-members are too few .* 0\.001; give 1,000 or more"):
        tpr_at_fpr(np.ones(5), np.zeros(999), 0.001)
    assert tpr_at_fpr(np.ones(5), np.zeros(1000), 0.001) == 1.0
    with pytest.raises(UserError, match="too few"):
        tpr_interval(np.ones(5), np.zeros(99), 0.01)
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="between 0 and 1"):
            tpr_at_fpr(np.ones(5), np.zeros(99), rate)


def test_tpr_interval_is_that_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 400), rng.normal(size=500)
    direct = tpr_interval(members, others, 0.05)
    drawn_again = bootstrap(lambda m, o: tpr_at_fpr(m, o, 0.05), members, others)
    assert direct.value == drawn_again.value == tpr_at_fpr(members, others, 0.05)
    assert direct.low == pytest.approx(drawn_again.low, abs=0.02)
    assert direct.high == pytest.approx(drawn_again.high, abs=0.02)
    assert tpr_interval(members, others, 0.05) == direct


def test_no_member_found_is_not_certainty_that_there_is_none() -> None:
    found = tpr_interval(np.zeros(100), np.arange(1.0, 201.0), 0.01)
    assert found.value == found.low == 0
    assert 0.01 < found.high < 0.05  # the rule of three says 0.03


def test_scores_by_hand() -> None:
    p = np.log(np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]]))
    found = scores(Predictions(p, np.array([0, 1])))
    np.testing.assert_allclose(found["loss"], np.log([0.7, 0.2]))
    np.testing.assert_allclose(found["confidence"], [0.7, 0.2])
    np.testing.assert_allclose(found["entropy"], [-0.801819, -0.801819], atol=1e-6)
    # right: 0.3 ln 0.7 + 0.2 ln 0.8 + 0.1 ln 0.9; wrong: 0.8 ln 0.2 + 0.7 ln 0.3 + 0.1 ln 0.9
    np.testing.assert_allclose(found["modified_entropy"], [-0.162167, -2.140867], atol=1e-6)


def test_scores_of_a_model_that_is_quite_sure_are_finite() -> None:
    logits = np.array([[2000.0, -2000.0, 0.0]] * 2, dtype=np.float32)
    found = scores(Predictions(logits, np.array([0, 1])))
    assert all(np.isfinite(values).all() for values in found.values())
    assert found["entropy"][0] == found["entropy"][1]  # sure, right or wrong
    assert found["modified_entropy"][0] > found["modified_entropy"][1] + 60


def test_scores_do_not_depend_on_how_many_rows_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = drawn(25, 1.0, 0)
    whole = scores(predictions)
    monkeypatch.setattr(membership, "_BLOCK", 7)
    for name, values in scores(predictions).items():
        np.testing.assert_array_equal(values, whole[name])


def test_thresholds_are_those_of_each_class() -> None:
    """Members have lower losses within each class, but those of class 1 higher ones than strangers of class 0."""

    def part(first: float, second: float, count: int = 40) -> Predictions:
        return with_losses(np.repeat([first, second], count), np.repeat([0, 1], count), classes=3)

    members, strangers = part(0.1, 0.3), part(0.2, 0.4)
    assert balanced_accuracy("loss", members, members, strangers).value == 1.0
    assert balanced_accuracy("loss", strangers, members, strangers).value == 0.5
    # No retained sample of class 1: the threshold of all classes together, 0.1, calls none of its samples a member.
    only_first = with_losses(np.full(40, 0.1), np.zeros(40, dtype=np.int64), classes=3)
    only_second = with_losses(np.full(40, 0.3), np.ones(40, dtype=np.int64), classes=3)
    assert balanced_accuracy("loss", only_second, only_first, strangers).value == 0.5
    # Class 2 is in the forget set alone.
    unknown = with_losses(np.full(40, 0.05), np.full(40, 2), classes=3)
    assert balanced_accuracy("loss", unknown, only_first, strangers).value == 1.0
    # Tied scores get the same call: from 1 on, all of both sides; from 2 on, a quarter of the members and no other.
    assert membership._threshold(np.array([2.0, 1, 1, 1]), np.ones(4)) == 2
    with pytest.raises(UserError, match="1 sample"):
        balanced_accuracy("loss", members, members, strangers.take(np.array([0])))


def test_difficulty_hides_members_from_the_loss_but_not_from_the_calibrated_attack() -> None:
    rng = np.random.default_rng(0)
    hard_forget, hard_test = rng.uniform(0.5, 6, 300), rng.uniform(0.5, 6, 400)
    references = [with_losses(hard_forget), with_losses(hard_forget + 0.2)]
    model = with_losses(hard_forget - 0.4)
    found = attacks(
        model,
        drawn(300, 3.0, 0, classes=2),
        with_losses(hard_test),
        [
            {"forget": reference, "test": with_losses(hard_test + shift)}
            for reference, shift in zip(references, (0, 0.2), strict=True)
        ],
    )
    assert found["loss"]["auc"]["value"] < 0.65
    assert found["calibrated_loss"]["auc"]["value"] == 1.0
    assert "balanced_accuracy" not in found["calibrated_loss"]
    np.testing.assert_allclose(calibrated_scores(model, references), 0.5)  # (0.4 + 0.6) / 2


def test_calibration_refuses_other_samples() -> None:
    model = drawn(10, 1.0, 0)
    with pytest.raises(UserError, match="no references"):
        calibrated_scores(model, [])
    with pytest.raises(UserError, match=r"reference 2 .*\(9, the model 10"):
        calibrated_scores(model, [model, model.take(np.arange(9))])
    with pytest.raises(UserError, match="reference 1"):
        calibrated_scores(model, [Predictions(model.logits, (model.labels + 1) % 5)])


def test_attacks_are_json_with_an_interval_and_a_direction_beside_every_number() -> None:
    forget, retain, test = drawn(50, 1.0, 0), drawn(100, 2.0, 1), drawn(300, 1.0, 2)
    found = json.loads(json.dumps(attacks(forget, retain, test)))
    assert set(found) == set(ATTACKS)
    for numbers in found.values():
        assert set(numbers) == {"auc", *RATES, "balanced_accuracy"}
        assert "too few" in numbers["tpr_at_fpr_0.001"]["reason"]
        assert "1,000 or more" in numbers["tpr_at_fpr_0.001"]["reason"]
        assert numbers["tpr_at_fpr_0.001"]["value"] is None
        for name, number in numbers.items():
            assert "target" in number["direction"]
            if name != "tpr_at_fpr_0.001":
                assert 0 <= number["low"] <= number["value"] <= number["high"] <= 1
    assert "below" in found["loss"]["auc"]["direction"]
    assert "equal to the rate" in found["loss"]["tpr_at_fpr_0.01"]["direction"]
    single = attacks(forget, retain, test.take(np.array([0])))
    assert single["loss"]["balanced_accuracy"]["value"] is None
    assert "2 or more" in single["loss"]["balanced_accuracy"]["reason"]
    assert (single["loss"]["auc"]["low"], single["loss"]["auc"]["high"]) == (0, 1)
    assert attacks(forget, retain, test) == attacks(forget, retain, test)


def test_attacks_on_several_models_are_averaged_number_by_number() -> None:
    retain, test = drawn(100, 2.0, 1), drawn(300, 1.0, 2)
    each = [attacks(drawn(50, sharpness, 0), retain, test) for sharpness in (0.5, 2.0)]
    mean = mean_attacks(each)
    first, second = (result["entropy"]["auc"] for result in each)
    assert mean["entropy"]["auc"]["value"] == pytest.approx((first["value"] + second["value"]) / 2)
    assert mean["entropy"]["auc"]["low"] == pytest.approx((first["low"] + second["low"]) / 2)
    assert mean["entropy"]["auc"]["high"] == pytest.approx((first["high"] + second["high"]) / 2)
    assert mean["entropy"]["auc"]["spread"] == pytest.approx(abs(first["value"] - second["value"]))
    assert mean["entropy"]["auc"]["direction"] == first["direction"]
    assert mean["loss"]["tpr_at_fpr_0.001"]["value"] is None
    assert "spread" not in mean_attacks(each[:1])["entropy"]["auc"]
    assert "spread" not in first  # the results that were averaged are as they were


def test_efficacy_is_still_that_of_the_public_code() -> None:
    forget, retain, test = drawn(60, 2.0, 0), drawn(300, 4.0, 1), drawn(100, 1.0, 2)
    rng = np.random.default_rng(0)
    members, others = retain.confidence[rng.permutation(300)[:100]], test.confidence[rng.permutation(100)]
    attack = SVC(C=3, kernel="rbf", gamma="auto").fit(np.concatenate([members, others])[:, None], [1] * 100 + [0] * 100)
    calls = attack.predict(forget.confidence[:, None])
    assert mia_efficacy(forget, retain, test) == pytest.approx(1 - calls.mean(), abs=1e-12)
    np.testing.assert_array_equal(non_member_calls(forget, retain, test), calls == 0)
