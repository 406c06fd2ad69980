"""Agreement with retrained models: each number against a case computed by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import entropy

from engine.errors import UserError
from engine.evaluate import Evaluation, agreement, compare
from engine.evaluate.agreement import (
    SETS,
    agreement_report,
    klom,
    klom_report,
    margins,
    mean_kl,
    rf_jsd,
    top1_agreement,
    tow,
)
from engine.evaluate.intervals import bootstrap
from engine.evaluate.membership import loss_auc, non_member_calls
from engine.models.predict import Predictions

COUNTS = {"forget": 60, "retain": 90, "test": 120}
COLUMNS = {"top1", "kl_from_reference", "kl_to_reference", "margin_gap"}


def model(seed: int, sharpness: float = 2.0, classes: int = 4) -> dict[str, Predictions]:
    """A model's predictions of all sets: the samples are the same for every seed, the answers differ."""
    labels, rng = np.random.default_rng(99), np.random.default_rng(seed)
    predictions = {}
    for name, count in COUNTS.items():
        true = labels.integers(0, classes, count)
        logits = rng.normal(size=(count, classes)).astype(np.float32)
        logits[np.arange(count), true] += sharpness
        predictions[name] = Predictions(logits, true)
    return predictions


def of(probabilities: Any, labels: Any) -> Predictions:
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(np.asarray(probabilities, dtype=np.float64)), -1e4)
    return Predictions(logits, np.asarray(labels))


def test_margins_by_hand() -> None:
    found = margins(Predictions(np.array([[2, 0, 0], [2, 0, 0]], dtype=np.float32), np.array([0, 1])))
    np.testing.assert_allclose(found, [2 - np.log(2), -np.log(np.exp(2) + 1)])
    p = model(0)["forget"]
    np.testing.assert_allclose(margins(p), np.log(p.confidence / (1 - p.confidence)), rtol=1e-6)
    sure = Predictions(np.array([[5000, -5000], [5000, -5000]], dtype=np.float32), np.array([0, 1]))
    np.testing.assert_allclose(margins(sure), [10000, -10000])
    np.testing.assert_array_equal(sure.logits[0], [5000, -5000])  # the predictions are as they were


def test_klom_by_hand() -> None:
    # Joint range 0 to 4, so that four bins have the edges 0, 1, 2, 3, 4; 4 itself belongs to the last.
    # unlearned 0 | 1, 1 | - | 4: shares p = 1/4, 1/2, 0, 1/4. retrained 0, 0 | - | 2 | 4: q = 1/2, 0, 1/4, 1/4, of
    # which the second is raised to eps = 1e-5 and all are divided by their sum, 1.00001.
    # KL(p || q) = 1/4 ln(0.25 / 0.5) + 1/2 ln(0.5 / 1e-5) + 1/4 ln(0.25 / 0.25) + ln(1.00001)
    #            = -0.173287 + 5.409889 + 0 + 0.00001 = 5.236612
    unlearned = np.array([[0.0], [1.0], [1.0], [4.0]])
    retrained = np.array([[0.0], [0.0], [2.0], [4.0]])
    np.testing.assert_allclose(klom(unlearned, retrained, bins=4), [5.236612], atol=2e-6)
    # The other way round: 1/2 ln 2 + 1/4 ln(0.25 / 1e-5) + 0 + 0.00001 = 0.346574 + 2.531658 + 0.00001 = 2.878241
    np.testing.assert_allclose(klom(retrained, unlearned, bins=4), [2.878241], atol=2e-6)
    # Samples do not mix: each column is a sample of its own, with edges of its own.
    two = klom(np.hstack([unlearned, 10 * retrained]), np.hstack([retrained, 10 * unlearned]), bins=4)
    np.testing.assert_allclose(two, [5.236612, 2.878241], atol=2e-6)


def test_klom_of_margins_that_are_all_equal() -> None:
    same = np.full((5, 2), 3.0)
    np.testing.assert_array_equal(klom(same, same), [0, 0])
    # All of p in the first bin where q has none, so eps: ln(1 / 1e-5) + ln(1 + 1e-5).
    np.testing.assert_allclose(klom(np.zeros((5, 1)), np.ones((5, 1))), [np.log(1e5) + 1e-5], rtol=1e-9)
    # Beyond the clip all margins are equal, infinite ones too.
    np.testing.assert_array_equal(klom(np.full((3, 1), 150.0), np.array([[101.0], [1e9], [np.inf]])), [0])
    assert klom(np.full((3, 1), 150.0), np.full((3, 1), 101.0), clip=200)[0] > 11


def test_klom_is_the_public_definition_with_the_last_bin_closed() -> None:
    rng = np.random.default_rng(0)
    unlearned, retrained = rng.normal(1, 1, (40, 30)), rng.normal(0, 1.5, (40, 30))
    expected = []
    for p, q in zip(unlearned.T, retrained.T, strict=True):
        limits = min(p.min(), q.min()), max(p.max(), q.max())
        p, q = (np.histogram(values, 20, limits)[0] / len(values) for values in (p, q))
        expected.append(entropy(p, np.where(p > 0, np.maximum(q, 1e-5), q)))
    np.testing.assert_allclose(klom(unlearned, retrained), expected, rtol=1e-9)
    # With bins open on the right the sample's largest margin would be lost: here all mass of p.
    assert klom(np.full((4, 1), 2.0), np.array([[0.0], [1.0], [2.0], [2.0]]))[0] == pytest.approx(np.log(2))


def test_klom_refuses_other_shapes() -> None:
    for first, second in (((3, 2), (3, 4)), ((3,), (3, 1)), ((3, 1), (3,))):
        with pytest.raises(UserError, match="klom: margins have shapes"):
            klom(np.zeros(first), np.zeros(second))
    with pytest.raises(UserError, match="no margins"):
        klom(np.zeros((0, 2)), np.zeros((3, 2)))
    with pytest.raises(UserError, match="not a number"):
        klom(np.zeros((3, 1)), np.full((3, 1), np.nan))


def test_klom_is_told_beside_its_noise_floor() -> None:
    rng = np.random.default_rng(0)
    retrained = rng.normal(0, 1, (32, 60))
    alike = klom_report(rng.normal(0, 1, (32, 60)), retrained, draws=200)
    floor = alike["noise_floor"]["klom_mean"]
    assert floor["value"] > 1  # few models: far from 0 though nothing differs
    assert floor["value"] == pytest.approx(klom(retrained[:16], retrained[16:]).mean())
    assert alike["model"]["klom_mean"]["low"] < floor["high"]
    assert alike["model"]["klom_mean"]["value"] < 1.3 * floor["value"]
    shifted = klom_report(rng.normal(3, 1, (32, 60)), retrained, draws=200)
    for name in ("klom_mean", "klom_95th"):
        assert shifted["model"][name]["low"] > shifted["noise_floor"][name]["high"]
        assert "lower = better" in shifted["model"][name]["direction"]
    # As many models on each side as in the noise floor, whose value depends on how many they are.
    few = klom_report(retrained[:3], retrained, draws=20)
    assert few["model"]["klom_mean"]["value"] == pytest.approx(klom(retrained[:3], retrained[3:6]).mean())
    assert few["model"]["klom_95th"]["value"] == pytest.approx(np.quantile(klom(retrained[:3], retrained[3:6]), 0.95))
    with pytest.raises(UserError, match="1 unlearned and 32 retrained models are too few"):
        klom_report(retrained[:1], retrained)


def test_tow_by_hand() -> None:
    # (1 - 0.2) (1 - 0.05) (1 - 0.01)
    assert tow(np.array([0.8, 0.9, 0.5]), np.array([0.6, 0.95, 0.51])) == pytest.approx(0.8 * 0.95 * 0.99)
    assert tow(np.ones(3), np.ones(3)) == 1


def test_rf_jsd_by_hand() -> None:
    # Class 0: forget (1, 0) and (0, 1) have the mean (1/2, 1/2), as the test sample: 0. Class 1: (1, 0) against (0, 1):
    # ln 2. Class 2 is not among the test samples. Mean over the two classes.
    forget = of([[1, 0], [0, 1], [1, 0], [0, 1]], [0, 0, 1, 2])
    test = of([[0.5, 0.5], [0, 1], [0, 1]], [0, 1, 1])
    assert rf_jsd(forget, test, draws=20).value == pytest.approx(np.log(2) / 2)
    # JSD((0.8, 0.2) || (0.4, 0.6)), mean (0.6, 0.4):
    # (0.8 ln(8/6) + 0.2 ln(1/2) + 0.4 ln(4/6) + 0.6 ln(6/4)) / 2 = (0.230146 - 0.138629 - 0.162186 + 0.243279) / 2
    found = rf_jsd(of([[0.8, 0.2]] * 3, [0] * 3), of([[0.4, 0.6]] * 4, [0] * 4), draws=20)
    assert found == pytest.approx((0.086305,) * 3, abs=2e-6)  # no spread within the class, no width
    with pytest.raises(UserError, match="no class in common"):
        rf_jsd(forget.take(np.array([3])), test)


def test_rf_jsd_interval_draws_samples_within_their_class() -> None:
    unlearned, original = model(0)["forget"], model(1)["test"]
    found = rf_jsd(unlearned, original, draws=400)
    assert found == rf_jsd(unlearned, original, draws=400)
    assert found.low <= found.value < found.high < np.log(2)

    def slow(first: np.ndarray, second: np.ndarray) -> float:
        return rf_jsd(unlearned.take(first), original.take(second), draws=1).value

    expected = bootstrap(slow, np.arange(60), np.arange(120), draws=200)
    assert found.low == pytest.approx(expected.low, rel=0.1)
    assert found.high == pytest.approx(expected.high, rel=0.2)
    assert found.value == pytest.approx(expected.value)


def test_report_of_a_model_that_is_the_reference() -> None:
    first = model(0)
    report = agreement_report(first, None, [first], draws=50)
    assert set(report) == {"model"}
    assert report["model"]["tow"]["value"] == report["model"]["tow_mia"]["value"] == 1
    for name in SETS:
        values = {key: number["value"] for key, number in report["model"][name].items()}
        assert values == {"top1": 1, "kl_from_reference": 0, "kl_to_reference": 0, "margin_gap": 0}
    assert 0.9 < report["model"]["forget"]["top1"]["low"] < 0.99  # 60 of 60 is not certainty


def test_report_numbers_are_means_over_references_and_over_pairs_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, original, references = model(0), model(1, 6.0), [model(2), model(3), model(4)]
    report = agreement_report(mine, original, references, draws=50)
    monkeypatch.setattr(agreement, "_BLOCK", 7)
    assert flat(agreement_report(mine, original, references, draws=50)) == pytest.approx(flat(report))
    assert set(report) == {"model", "original", "noise_floor", "rf_jsd"}
    comparisons = {
        "model": [(mine, r) for r in references],
        "original": [(original, r) for r in references],
        "noise_floor": list(itertools.permutations(references, 2)),
    }
    for comparison, pairs in comparisons.items():
        found = report[comparison]
        for name in SETS:
            expected: dict[str, Callable[[Predictions, Predictions], float]] = {
                "top1": top1_agreement,
                "kl_from_reference": lambda m, r: mean_kl(r, m),
                "kl_to_reference": mean_kl,
                "margin_gap": lambda m, r: float(np.abs(margins(m) - margins(r)).mean()),
            }
            assert set(found[name]) == set(expected) == COLUMNS
            for key, number in found[name].items():
                value = np.mean([expected[key](m[name], r[name]) for m, r in pairs])
                assert number["value"] == pytest.approx(value), (comparison, name, key)
                assert number["low"] < number["value"] < number["high"]
                assert "noise floor" in number["direction"]

        def shares(each: dict[str, Predictions], mia: bool) -> np.ndarray:
            first = non_member_calls(*(each[name] for name in SETS)).mean() if mia else each["forget"].accuracy
            return np.array([first, each["retain"].accuracy, each["test"].accuracy])

        for key in ("tow", "tow_mia"):
            value = np.mean([tow(shares(m, key == "tow_mia"), shares(r, key == "tow_mia")) for m, r in pairs])
            assert found[key]["value"] == pytest.approx(value)
            assert found[key]["low"] <= found[key]["value"] <= found[key]["high"]
    jsd = report["rf_jsd"]
    assert jsd["model"]["value"] == pytest.approx(rf_jsd(mine["forget"], original["test"], draws=1).value)
    assert jsd["original"]["value"] == pytest.approx(rf_jsd(original["forget"], original["test"], draws=1).value)
    expected_jsd = np.mean([rf_jsd(r["forget"], original["test"], draws=1).value for r in references])
    assert jsd["reference"]["value"] == pytest.approx(expected_jsd)
    json.dumps(report)


def flat(report: Any) -> list[float]:
    if isinstance(report, dict):
        return [value for key in sorted(report) for value in flat(report[key])]
    return [] if isinstance(report, str) else [report]


def test_report_draws_all_models_by_the_same_rows() -> None:
    mine, reference = model(0), model(2)
    report = agreement_report(mine, None, [reference], draws=1000)

    def product(*hits: np.ndarray) -> float:
        return float(np.prod([1 - abs(np.diff(each.mean(0))[0]) for each in hits]))

    hits = [np.stack([m[name].logits.argmax(1) == m[name].labels for m in (mine, reference)], 1) for name in SETS]
    expected = bootstrap(product, *hits)
    found = report["model"]["tow"]
    assert found["low"] == pytest.approx(expected.low, abs=0.02)
    assert found["high"] == pytest.approx(expected.high, abs=0.01)


def test_report_takes_the_calls_that_are_known() -> None:
    models = [model(0), model(1), model(2)]
    calls = [non_member_calls(*(each[name] for name in SETS)) for each in models]
    report = agreement_report(models[0], models[1], models[2:], draws=20)
    assert agreement_report(models[0], models[1], models[2:], non_members=calls, draws=20) == report
    swapped = agreement_report(models[0], models[1], models[2:], non_members=[~calls[0], *calls[1:]], draws=20)
    assert swapped["model"]["tow_mia"] != report["model"]["tow_mia"]
    assert swapped["original"]["tow_mia"] == report["original"]["tow_mia"]
    assert swapped["model"]["tow"] == report["model"]["tow"]


def test_report_without_references_is_the_retrain_free_divergence() -> None:
    report = agreement_report(model(0), model(1), [], draws=20)
    assert set(report) == {"rf_jsd"}
    assert set(report["rf_jsd"]) == {"model", "original"}
    apart = {**model(0), "forget": of([[0.5, 0.5, 0, 0]] * 60, [7] * 60)}
    found = agreement_report(apart, {**model(1), "forget": apart["forget"]}, [], draws=20)
    assert found["rf_jsd"]["model"]["value"] is None
    assert "no class in common" in found["rf_jsd"]["model"]["reason"]


def test_report_refuses_models_of_other_samples() -> None:
    mine = model(0)
    with pytest.raises(UserError, match="model 2 has no predictions of the test set"):
        agreement_report(mine, None, [{name: mine[name] for name in ("forget", "retain")}])
    with pytest.raises(UserError, match="retain set are of other samples or classes"):
        agreement_report(mine, None, [{**mine, "retain": mine["forget"]}])
    with pytest.raises(UserError, match="of other samples or classes"):
        agreement_report(
            mine, None, [{n: Predictions(np.pad(p.logits, [(0, 0), (0, 1)]), p.labels) for n, p in mine.items()}]
        )


def evaluation(seed: int, sharpness: float = 2.0) -> Evaluation:
    predictions = model(seed, sharpness)
    calls = non_member_calls(*(predictions[name] for name in SETS))
    numbers = {
        "accuracy": {name: p.accuracy for name, p in predictions.items()},
        "mia": {"efficacy": float(calls.mean()), "auc": loss_auc(predictions["forget"], predictions["test"])},
    }
    return Evaluation(numbers, predictions, calls)


def test_metrics_gain_attacks_and_agreement_and_keep_what_they_had() -> None:
    mine, original, references = evaluation(0), evaluation(1, 5.0), [evaluation(2), evaluation(3)]
    metrics = compare(mine, references, original)
    old = compare(*(_without_sets(e) for e in (mine,)), [_without_sets(e) for e in references], _without_sets(original))
    assert contains(metrics, old)
    assert set(metrics) - set(old) == {"attacks", "agreement", "gap_to_mean"}
    assert metrics["attacks"]["loss"]["auc"]["value"] == pytest.approx(mine.numbers["mia"]["auc"])
    assert metrics["original"]["attacks"]["loss"]["auc"]["value"] == pytest.approx(original.numbers["mia"]["auc"])
    expected = np.mean([e.numbers["mia"]["auc"] for e in references])
    assert metrics["reference"]["attacks"]["loss"]["auc"]["value"] == pytest.approx(expected)
    assert metrics["agreement"]["model"]["forget"]["kl_from_reference"]["value"] == pytest.approx(
        metrics["reference"]["agreement"]["kl"]
    )
    assert metrics["agreement"]["noise_floor"]["forget"]["top1"]["value"] == pytest.approx(
        metrics["noise_floor"]["agreement"]["top1"]
    )
    # A reference is calibrated by the others: with one alone there is none.
    for part in (metrics, metrics["original"], metrics["reference"]):
        assert "calibrated_loss" in part["attacks"]
    assert "calibrated_loss" not in compare(mine, references[:1], original)["reference"]["attacks"]
    assert "agreement" not in compare(mine, [])
    json.dumps(metrics)


def _without_sets(whole: Evaluation) -> Evaluation:
    return Evaluation(whole.numbers, {"forget": whole.predictions["forget"]})


def contains(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return bool(whole == part)
