"""The relearning attack and the linear probe: what they train on, what they leave alone, and what they find."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from toys import few, tiny_vit

from engine.data import Batch, Loader, Samples, open_source
from engine.errors import RunStopped, UserError
from engine.evaluate import relearning
from engine.evaluate.linear_probe import linear_probe, probe
from engine.evaluate.options import MeasureOptions
from engine.evaluate.relearning import (
    RelearningCurve,
    advantage,
    calibrated_auc,
    of_classes,
    relearning_curve,
    split_forget,
    steps_of,
    steps_to,
)
from engine.evaluate.relearning_report import RelearningAttack, RelearningSets, relearning_report
from engine.models.checkpoint import weights_sha256
from engine.models.predict import Predictions, predict
from engine.models.preprocessing import preprocessing_of

STEPS = (0, 1, 3)


@pytest.fixture(scope="module")
def digits() -> Samples:
    return open_source("digits").train


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Positions and labels of the samples of each step that is trained."""
    steps: list[list[int]] = []

    def noted(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        steps.append([*batch.index.tolist(), *batch.labels.tolist()])
        return torch.nn.functional.cross_entropy(model(batch.images), batch.labels)

    monkeypatch.setattr(relearning, "cross_entropy", noted)
    return steps


def test_the_model_and_the_callers_generator_are_left_as_they_are(digits: Samples) -> None:
    model = tiny_vit(drop_rate=0.3).train()
    model.blocks[0].requires_grad_(False)
    before, state = weights_sha256(model), torch.get_rng_state()
    first = relearning_curve(model, few(digits, 20), digits.subset(range(50, 80)), steps=STEPS, device="cpu")
    assert weights_sha256(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(99)  # dropout does not follow the caller's generator
    again = relearning_curve(model, few(digits, 20), digits.subset(range(50, 80)), steps=STEPS, device="cpu")
    assert first == again
    for a, b in zip(first.predictions, again.predictions, strict=True):
        np.testing.assert_array_equal(a["test"].logits, b["test"].logits)
    assert first.losses["attacked"][0] != first.losses["attacked"][1]  # the copy did change
    other = relearning_curve(model, few(digits, 20), digits.subset(range(50, 80)), steps=STEPS, seed=1, device="cpu")
    assert other.losses != first.losses
    model.head_drop.p = 0.0
    without = relearning_curve(model, few(digits, 20), digits.subset(range(50, 80)), steps=STEPS, device="cpu")
    assert without.losses["test"][0] == first.losses["test"][0]
    assert without.losses["test"][-1] != first.losses["test"][-1]  # it is there while the copy trains


def test_every_model_sees_the_same_samples_in_the_same_order(digits: Samples, seen: list[list[int]]) -> None:
    forget, test = few(digits, 40), digits.subset(range(50, 80))
    relearning_curve(tiny_vit(), forget, test, steps=(0, 5), batch_size=8, seed=3, device="cpu")
    first = list(seen)
    seen.clear()
    relearning_curve(tiny_vit(7), forget, test, steps=(0, 5), batch_size=8, seed=3, device="cpu")
    assert seen == first
    assert [len(step) // 2 for step in first] == [8, 8, 4, 8, 8]  # 20 samples an epoch
    assert sorted(i for step in first[:3] for i in step[: len(step) // 2]) == list(range(20))
    attacked, _ = split_forget(forget, 0.5, seed=3)
    for step in first:
        index, labels = step[: len(step) // 2], step[len(step) // 2 :]
        assert labels == attacked.labels[index].tolist()


def test_the_split_is_random_whole_and_repeatable(digits: Samples) -> None:
    attacked, held = split_forget(few(digits, 50), 0.3, seed=1)
    assert (len(attacked), len(held)) == (15, 35)
    assert sorted([*attacked.ids, *held.ids]) == sorted(few(digits, 50).ids)
    assert list(attacked.ids) == list(split_forget(few(digits, 50), 0.3, seed=1)[0].ids)
    assert list(attacked.ids) != list(split_forget(few(digits, 50), 0.3, seed=2)[0].ids)
    assert [len(part) for part in split_forget(few(digits, 2), 0.01)] == [1, 1]
    assert [len(part) for part in split_forget(few(digits, 3), 0.99)] == [2, 1]


def test_the_curve_is_read_from_the_sets_that_it_names(digits: Samples) -> None:
    model, forget, test = tiny_vit(), few(digits, 40), digits.subset(range(50, 110))
    curve = relearning_curve(model, forget, test, steps=STEPS, share=0.25, device="cpu")
    assert curve.steps == [0, 1, 3]
    attacked, held = split_forget(forget, 0.25)
    for name, samples in (("attacked", attacked), ("held_back", held), ("test", test)):
        expected = predict(model, Loader(samples, preprocessing_of(model), batch_size=20))
        assert getattr(curve, name)[0] == expected.accuracy
        assert curve.losses[name][0] == pytest.approx(float(expected.losses.mean()), rel=1e-5)
        assert [len(each[name]) for each in curve.predictions] == [len(samples)] * 3
    assert curve.excess == [held - test for held, test in zip(curve.held_back, curve.test, strict=True)]


def test_training_on_some_samples_teaches_them(digits: Samples) -> None:
    curve = relearning_curve(
        tiny_vit(), few(digits, 100), digits.subset(range(200, 260)), steps=(0, 60), batch_size=20, device="cpu"
    )
    assert curve.attacked[-1] > curve.attacked[0] + 0.2
    assert curve.losses["attacked"][-1] < 0.8 * curve.losses["attacked"][0]


def test_unrelated_data_holds_all_forget_samples_back(digits: Samples, seen: list[list[int]]) -> None:
    forget, unrelated = few(digits, 20), digits.subset(range(300, 330))
    curve = relearning_curve(
        tiny_vit(), forget, digits.subset(range(50, 80)), unrelated=unrelated, steps=(0, 1), device="cpu"
    )
    assert seen[0][30:] == unrelated.labels[seen[0][:30]].tolist()
    assert curve.predictions[0]["held_back"].labels.tolist() == forget.labels.tolist()
    assert curve.predictions[0]["attacked"].labels.tolist() == unrelated.labels.tolist()


def test_the_test_is_cut_to_the_classes_of_the_forget_set(digits: Samples) -> None:
    threes = digits.subset(np.flatnonzero(digits.labels == 3)[:30])
    test = digits.subset(range(400, 500))
    assert set(of_classes(test, threes).labels) == {3}
    assert of_classes(test, few(digits, 200)) is test
    curve = relearning_curve(tiny_vit(), threes, test, steps=(0, 1), device="cpu")
    assert set(curve.predictions[0]["test"].labels) == {3}
    with pytest.raises(UserError, match="no samples of the classes that are forgotten"):
        of_classes(test.subset(np.flatnonzero(test.labels != 3)), threes)


def test_the_rate_is_the_fine_tunings(digits: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *arguments: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    relearning_curve(tiny_vit(), few(digits, 20), few(digits, 20), steps=(0, 20), device="cpu")
    assert max(rates) == pytest.approx(0.192 / 32, rel=0.02)  # width 32
    assert rates[0] < max(rates) / 10
    assert rates[-1] < max(rates) / 10  # one cycle
    assert len(rates) == 20


def test_steps_by_hand() -> None:
    curve = RelearningCurve([0, 1, 2, 4], attacked=[1, 1, 1, 1], held_back=[0.1, 0.5, 0.4, 0.8], test=[0.1, *[0.2] * 3])
    assert steps_to(curve, 0.5) == 1
    assert steps_to(curve, 0.6) == 4
    assert steps_to(curve, 0.05) == 0
    assert steps_to(curve, 0.9) is None
    assert curve.excess == pytest.approx([0.0, 0.3, 0.2, 0.6])
    assert steps_of(500, 5, batch_size=50) == (0, 1, 2, 4, 8, 16, 32, 50)
    assert steps_of(101, 4, batch_size=50) == (0, 1, 2, 4, 8, 12)
    assert steps_of(100, 4, batch_size=50) == (0, 1, 2, 4, 8)
    assert steps_of(10, 0.1) == (0, 1)


def planted(held_back: list[list[int]], test: list[list[int]]) -> RelearningCurve:
    """A curve of which 1 and 0 say whether a sample is read right, a row a number of steps."""

    def read(right: list[int]) -> Predictions:
        return Predictions(np.eye(2, dtype=np.float32)[right], np.ones(len(right), dtype=np.int64))

    looks = [{"held_back": read(h), "test": read(t)} for h, t in zip(held_back, test, strict=True)]
    return RelearningCurve(list(range(len(looks))), [], [], [], predictions=looks)


def test_advantage_by_hand() -> None:
    model = planted([[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1], [0, 1], [0, 1]])
    first = planted([[1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]], [[0, 0], [0, 1], [1, 1]])
    second = planted([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]], [[0, 0], [0, 0], [0, 0]])
    # held back 7/8, test 1/2; references: held back (3/8 + 0) / 2, test (3/4 + 0) / 2; the first look does not count
    found = advantage(model, [first, second])
    assert found.value == pytest.approx((7 / 8 - 1 / 2) - (3 / 16 - 3 / 8))
    assert found.low < found.value < found.high
    assert advantage(first, [first]) == (0, 0, 0)


def test_auc_takes_the_difficulty_out_step_by_step() -> None:
    def read(*losses: float) -> Predictions:
        p = np.exp(-np.array(losses))
        return Predictions(np.log(np.stack([p, 1 - p], 1)), np.zeros(len(losses), dtype=np.int64))

    def curve(*looks: tuple[Predictions, Predictions]) -> RelearningCurve:
        both = [{"held_back": held, "test": test} for held, test in looks]
        return RelearningCurve(list(range(len(both))), [], [], [], predictions=both)

    model = curve((read(5, 1), read(2, 3)), (read(1, 2), read(1, 2)))
    one = curve((read(7, 1), read(2, 2)), (read(4, 4), read(1, 2)))
    two = curve((read(7, 1), read(3, 3)), (read(4, 4), read(1, 2)))
    # known better than by the references by 2 and 0 nats, test by 0.5 and -0.5; then by 3 and 2, test by 0 and 0
    found = calibrated_auc(model, [one, two])
    assert [each.value for each in found] == [0.75, 1.0]
    assert found[0].low < 0.75 < found[0].high


def test_probe_finds_planted_knowledge() -> None:
    rng = np.random.default_rng(0)

    def planted_features(count: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 5, count)
        return strength * np.eye(5)[labels] + rng.normal(size=(count, 5)), labels

    retain, forget, test = planted_features(400, 6), planted_features(100, 6), planted_features(100, 0.5)
    found = probe(retain, forget, test)
    assert found["accuracy"]["forget"] > 0.95
    assert found["accuracy"]["test"] < 0.6
    assert found["excess"]["value"] == pytest.approx(found["accuracy"]["forget"] - found["accuracy"]["test"])
    assert found["excess"]["low"] > 0.3
    nothing = probe(retain, planted_features(200, 2), planted_features(200, 2))["excess"]
    assert nothing["low"] < 0 < nothing["high"]
    with pytest.raises(UserError, match="all of one class"):
        probe((retain[0], np.zeros(400)), forget, test)


def test_probe_reads_what_the_head_reads_and_ignores_the_head(digits: Samples) -> None:
    model, retain = tiny_vit(global_pool="avg"), digits.subset(range(100, 300))
    forget, test = few(digits, 60), digits.subset(range(400, 460))
    found = linear_probe(model, retain, forget, test, options=MeasureOptions(device="cpu"))
    reset = copy.deepcopy(model)
    with torch.no_grad():
        reset.head.weight.normal_()
    assert linear_probe(reset, retain, forget, test, options=MeasureOptions(device="cpu")) == found
    images = {
        name: Loader(samples, preprocessing_of(model), batch_size=500)
        for name, samples in (("retain", retain), ("forget", forget))
    }
    with torch.no_grad():
        batches = {name: next(iter(loader.ordered())) for name, loader in images.items()}
        x = {name: model.forward_head(model.forward_features(b.images), pre_logits=True) for name, b in batches.items()}
    mean, std = x["retain"].mean(0), x["retain"].std(0, unbiased=False)
    classifier = LogisticRegression(max_iter=2000).fit((x["retain"] - mean) / std, batches["retain"].labels)
    expected = classifier.score((x["forget"] - mean) / std, batches["forget"].labels)
    assert found["accuracy"]["forget"] == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
def test_report(digits: Samples) -> None:
    models = {"original": tiny_vit(), "model": tiny_vit(1), "retrained": tiny_vit(2), "retrained 2": tiny_vit(3)}
    before = {name: weights_sha256(model) for name, model in models.items()}
    report = relearning_report(
        models,
        RelearningSets(
            forget=few(digits, 40),
            test=digits.subset(range(500, 560)),
            retain=digits.subset(range(100, 200)),
            unrelated=digits.subset(range(300, 350)),
        ),
        references=["retrained", "retrained 2"],
        attack=RelearningAttack(steps=(0, 1, 2)),
        options=MeasureOptions(device="cpu"),
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert {name: weights_sha256(model) for name, model in models.items()} == before
    assert report["attack"]["lr"] == 0.192 / 32
    assert report["attack"]["samples"] == {
        "forget_share": {"attacked": 20, "held_back": 20, "test": 60},
        "unrelated": {"attacked": 50, "held_back": 40, "test": 60},
    }
    for attack in ("forget_share", "unrelated"):
        found = {name: report["models"][name][attack] for name in models}
        level = found["original"]["accuracy"]["held_back"][0]
        for name, each in found.items():
            held, test = each["accuracy"]["held_back"], each["accuracy"]["test"]
            excess = [h - t for h, t in zip(held, test, strict=True)]
            assert [e["value"] for e in each["excess"]] == pytest.approx(excess)
            assert all(e["low"] < e["value"] < e["high"] for e in each["excess"])
            reached = [step for step, h in zip((0, 1, 2), held, strict=True) if h >= level]
            assert each["steps_to_original"] == (reached[0] if reached else None), name
        assert found["original"]["steps_to_original"] == 0
        # excess less the references', mean over the steps after the first look; a reference is not its own
        after = {name: np.mean([e["value"] for e in each["excess"][1:]]) for name, each in found.items()}
        others = (after["retrained"] + after["retrained 2"]) / 2
        assert found["model"]["advantage"]["value"] == pytest.approx(after["model"] - others)
        assert found["retrained"]["advantage"]["value"] == pytest.approx(after["retrained"] - after["retrained 2"])
        assert [len(each["auc"]) for each in found.values()] == [3] * 4
        aucs = [each["value"] for each in found["retrained"]["auc"]]
        assert aucs == pytest.approx([1 - each["value"] for each in found["retrained 2"]["auc"]])
    assert {"accuracy", "excess"} == set(report["models"]["model"]["probe"])


def test_report_without_the_optional_parts(digits: Samples) -> None:
    report = relearning_report(
        {"original": tiny_vit(), "model": tiny_vit(1)},
        RelearningSets(forget=few(digits, 10), test=few(digits, 30)),
        attack=RelearningAttack(steps=(0, 1)),
        options=MeasureOptions(device="cpu"),
    )
    assert set(report["models"]["model"]) == {"forget_share"}
    assert report["models"]["model"]["forget_share"]["advantage"] is None
    assert report["models"]["model"]["forget_share"]["auc"] is None


def test_errors(digits: Samples) -> None:
    model, forget = tiny_vit(), few(digits, 10)
    for steps in ((1, 2), (0,), (0, 2, 2)):
        with pytest.raises(UserError, match=r"option steps=.*rise from 0"):
            relearning_curve(model, forget, forget, steps=steps)
    with pytest.raises(UserError, match=r"option share=1\.0: expected between 0 and 1"):
        relearning_curve(model, forget, forget, share=1.0)
    with pytest.raises(UserError, match="option lr=-1"):
        relearning_curve(model, forget, forget, lr=-1)
    with pytest.raises(UserError, match="1 forget samples cannot be split"):
        relearning_curve(model, few(digits, 1), forget)
    with pytest.raises(UserError, match="has no samples to train on"):
        relearning_curve(model, forget, forget, unrelated=few(digits, 0))
    with pytest.raises(UserError, match="no model 'original'"):
        relearning_report({"model": model}, RelearningSets(forget=forget, test=forget))
    broken = tiny_vit()
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    with pytest.raises(RunStopped, match="step 1: the loss is not finite"):
        relearning_curve(broken, forget, forget, steps=(0, 1), device="cpu")
