"""Each number against a case whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn_predictions import drawn
from toys import few, tiny_vit

from engine.data import Loader, Samples, open_source
from engine.errors import UserError
from engine.evaluate import Evaluation, Evaluator, compare
from engine.evaluate.agreement import mean_kl, top1_agreement
from engine.evaluate.membership import loss_auc, mia_efficacy
from engine.models.predict import Predictions, predict
from engine.models.preprocessing import preprocessing_of


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


def test_predictions_equal_a_plain_loop_over_the_model(train: Samples) -> None:
    model = tiny_vit().train()
    predictions = predict(model, Loader(few(train, 25), preprocessing_of(model), batch_size=7))
    images = torch.stack([torch.from_numpy(np.array(train.image(i)))[None].float() / 255 for i in range(25)])
    preprocessing = preprocessing_of(model)
    with torch.no_grad():
        expected = model.eval()((images - preprocessing.mean[0]) / preprocessing.std[0])
    torch.testing.assert_close(torch.from_numpy(predictions.logits), expected, rtol=1e-4, atol=1e-5)
    labels = torch.from_numpy(predictions.labels)
    losses = F.cross_entropy(expected, labels, reduction="none")
    np.testing.assert_allclose(predictions.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(predictions.confidence, expected.softmax(1)[range(25), labels], rtol=1e-4)
    assert predictions.accuracy == pytest.approx(float((expected.argmax(1) == labels).float().mean()))


def test_attacks_tell_a_model_that_memorised() -> None:
    retain, test = drawn(600, 6.0, 0), drawn(600, 0.5, 1)
    memorised, forgotten = drawn(300, 6.0, 2), drawn(300, 0.5, 3)
    assert mia_efficacy(memorised, retain, test) < 0.1  # called members: not forgotten
    assert mia_efficacy(forgotten, retain, test) > 0.8  # called non-members: forgotten
    assert loss_auc(memorised, test) > 0.95
    assert loss_auc(forgotten, test) == pytest.approx(0.5, abs=0.06)


def test_auc_of_a_hand_computed_case() -> None:
    def with_losses(*losses: float) -> Predictions:
        p = np.exp(-np.array(losses))
        return Predictions(np.log(np.stack([p, 1 - p], 1)), np.zeros(len(losses), dtype=np.int64))

    # forget losses 1, 3 against test losses 2, 4: of four pairs, three have the lower loss on the forget side
    assert loss_auc(with_losses(1, 3), with_losses(2, 4)) == pytest.approx(0.75)


def test_efficacy_is_repeatable_and_uses_as_many_members_as_test_samples() -> None:
    retain, test, forget = drawn(900, 4.0, 0), drawn(200, 1.0, 1), drawn(100, 2.0, 2)
    assert mia_efficacy(forget, retain, test) == mia_efficacy(forget, retain, test)


def test_agreement_and_kl_by_hand() -> None:
    labels = np.array([0, 0])
    p = Predictions(np.log(np.array([[0.5, 0.5 - 1e-9], [0.9, 0.1]], dtype=np.float64)), labels)
    q = Predictions(np.log(np.array([[0.25, 0.75], [0.9, 0.1]], dtype=np.float64)), labels)
    assert top1_agreement(p, q) == 0.5
    assert mean_kl(p, q) == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)) / 2, abs=1e-6)
    assert mean_kl(p, p) == 0.0
    assert mean_kl(p, q) != pytest.approx(mean_kl(q, p))


def evaluation(forget: float, retain: float, test: float, mia: float, seed: int = 0) -> Evaluation:
    numbers = {"accuracy": {"forget": forget, "retain": retain, "test": test}, "mia": {"efficacy": mia, "auc": 0.5}}
    return Evaluation(numbers, {"forget": drawn(50, 1.0, seed)})


def test_gap_is_the_mean_of_four_absolute_differences_in_points() -> None:
    gap = evaluation(0.80, 0.90, 0.50, 0.20).gap_to(evaluation(0.60, 0.95, 0.51, 0.40))
    assert gap == pytest.approx({"forget": 20, "retain": 5, "test": 1, "mia": 20, "average": 11.5})


def test_metrics_have_the_keys_that_other_programs_read() -> None:
    first, second = evaluation(0.6, 0.9, 0.5, 0.4, 1), evaluation(0.5, 0.9, 0.5, 0.4, 2)
    metrics = compare(
        evaluation(0.7, 0.9, 0.5, 0.4, 3),
        [first, second],
        evaluation(0.8, 0.9, 0.5, 0.2, 4),
        {"unlearn": 1.0},
        {"forget": 5},
    )
    assert metrics["accuracy"] == {"forget": 0.7, "retain": 0.9, "test": 0.5}
    assert metrics["gap"]["forget"] == pytest.approx(15)  # mean of 10 and 20
    assert metrics["gap"]["average"] == pytest.approx(15 / 4)
    assert metrics["noise_floor"]["average"] == pytest.approx(10 / 4)
    assert metrics["reference"]["accuracy"]["forget"] == pytest.approx(0.55)
    assert metrics["reference"]["spread"]["accuracy"]["forget"] == pytest.approx(0.1)
    assert set(metrics["reference"]["agreement"]) == {"top1", "kl"}
    assert metrics["original"]["gap"]["average"] == pytest.approx((25 + 20) / 4)
    assert metrics["seconds"] == {"unlearn": 1.0}
    assert metrics["samples_seen"] == {"forget": 5}
    single = compare(evaluation(0.7, 0.9, 0.5, 0.4), [first])
    assert "noise_floor" not in single
    assert "spread" not in single["reference"]
    assert "reference" not in compare(first, [])


def test_evaluator_on_real_models(train: Samples) -> None:
    forget, retain, test = few(train, 30), train.subset(range(30, 130)), train.subset(range(200, 260))
    evaluator = Evaluator(forget, retain, test, precision="fp32")
    model = tiny_vit()
    result, again = evaluator(model), evaluator(tiny_vit())
    assert result.numbers == again.numbers
    assert result.gap_to(again)["average"] == 0
    assert result.agreement_with(again) == {"top1": 1.0, "kl": 0.0}
    assert len(result.predictions["retain"]) == 100
    assert "higher = better forgotten" in result.numbers["mia"]["direction"]["efficacy"]


def test_an_evaluation_takes_no_more_than_it_is_given(train: Samples) -> None:
    forget, retain, test = few(train, 5), train.subset(range(20, 60)), train.subset(range(60, 90))
    found = Evaluator(forget, retain, test, most=10, precision="fp32")
    assert {name: len(samples) for name, samples in found.sets.items()} == {"forget": 5, "retain": 10, "test": 10}
    assert list(found.sets["test"].ids)[::9] == [test.ids[0], test.ids[29]], "at equal distances"


def test_evaluator_errors(train: Samples) -> None:
    forget, retain = few(train, 10), train.subset(range(10, 30))
    with pytest.raises(UserError, match="the test set has no samples"):
        Evaluator(forget, retain, few(train, 0))
    evaluator = Evaluator(forget, retain, few(train, 10))
    with pytest.raises(UserError, match="head has 2 classes"):
        evaluator(tiny_vit(num_classes=2))
    broken = tiny_vit()
    with torch.no_grad():
        broken.head.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="is not finite; the checkpoint is broken"):
        evaluator(broken)
