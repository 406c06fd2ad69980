"""U-LiRA against planted answers, and end to end on small models."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from toys import TINY

from engine.attack import ulira as module
from engine.attack.ensemble import EnsembleSpec, draw_parts, memorisation, train_ensemble
from engine.attack.ulira import attack, attack_procedure, likelihood_ratios, over_pairs, unlearn_ensemble
from engine.cli import app as cli
from engine.data import open_source
from engine.errors import UserError
from engine.forget_sets.influence import read_scores
from engine.models.spec import ModelSpec
from engine.run.unlearn import unlearn

MODEL = ModelSpec(
    architecture="vit_tiny_patch16_224",
    num_classes=10,
    model_args={**TINY, "embed_dim": 16, "depth": 1},
    pretrained_cfg={},
)
QUICK = {"max_steps": 2, "batch_size": 20, "precision": "fp32"}
SPEC = EnsembleSpec(data="digits", targets="random:0.02@0", model=MODEL, recipe={**QUICK, "epochs": 1}, pairs=3)


def margins(pairs: int, targets: int, mean: float = 0.0, seed: int = 0, whole: float = 0.0) -> np.ndarray:
    """Normal margins, each target of its own level; `whole`: standard deviation of an error that a model has in all."""
    rng = np.random.default_rng([seed, 1])
    noise = rng.normal(size=(pairs, targets)) + whole * rng.normal(size=(pairs, 1))
    return np.linspace(-5, 9, targets) + mean + noise


def test_scores_by_hand_with_pooled_variance() -> None:
    unlearned = np.array([[3.0, np.nan], [1.0, 5.0], [2.0, 9.0], [np.nan, 4.0]])
    retrained = np.array([[0.0, np.nan], [-1.0, 6.0], [2.5, 3.0], [np.nan, 2.0]])
    scores_u, scores_r, pooled = likelihood_ratios(unlearned, retrained)
    assert pooled
    # Pair 0 is attacked by what pairs 1 to 3 say: target 0 has (1, 2) and (-1, 2.5), target 1 (5, 9, 4) and (6, 3, 2).
    var_u = (2 * 0.5**2 + 1 + 9 + 4) / (1 + 2)
    var_r = (2 * 1.75**2 + np.var([6, 3, 2]) * 3) / (1 + 2)

    def by_hand(margin: float) -> float:
        as_unlearned = scipy.stats.norm.logpdf(margin, 1.5, var_u**0.5)
        return float(as_unlearned - scipy.stats.norm.logpdf(margin, 0.75, var_r**0.5))

    assert scores_u[0, 0] == pytest.approx(by_hand(3.0))
    assert scores_r[0, 0] == pytest.approx(by_hand(0.0))
    assert np.isnan(scores_u[0, 1])
    assert np.isnan(scores_r[3, 0])


def test_variances_are_each_samples_own_from_32_models_on() -> None:
    unlearned, retrained = margins(32, 4, 1.0, 1), margins(32, 4, 0.0, 2)
    unlearned[:, 2] = 12 + 5 * (unlearned[:, 2] - 12)
    scores_u, scores_r, pooled = likelihood_ratios(unlearned, retrained)
    assert not pooled
    fits = [(m[1:, 2].mean(), m[1:, 2].std(ddof=1)) for m in (unlearned, retrained)]
    expected = [
        scipy.stats.norm.logpdf(m, *fits[0]) - scipy.stats.norm.logpdf(m, *fits[1])
        for m in (unlearned[0, 2], retrained[0, 2])
    ]
    assert [scores_u[0, 2], scores_r[0, 2]] == pytest.approx(expected)
    unlearned[5, 1] = retrained[5, 1] = np.nan  # one target with 31
    assert likelihood_ratios(unlearned, retrained)[2]


def test_a_variance_of_zero_is_no_division_by_zero() -> None:
    found = attack(np.full((4, 3), 2.0), np.full((4, 3), 1.0))
    assert found.auc.value == 1
    assert np.isfinite(found.unlearned).all()


@pytest.mark.parametrize("shift", [4.0, -4.0])
def test_what_is_known_too_well_and_what_is_known_too_little_is_found(shift: float) -> None:
    found = attack(margins(8, 40, shift, 1), margins(8, 40, 0.0, 2))
    assert found.auc.low > 0.97
    assert found.balanced_accuracy.value > 0.95
    assert (found.per_sample > 5).all()


def test_half_the_samples_left_learned_is_found_by_sample() -> None:
    unlearned = margins(12, 40, 0.0, 1)
    unlearned[:, ::2] += 4
    found = attack(unlearned, margins(12, 40, 0.0, 2))
    assert 0.8 < found.auc.value < 0.95
    assert found.per_sample[::2].min() > found.per_sample[1::2].max()


def test_models_that_cannot_be_told_apart_give_one_half_within_the_interval() -> None:
    # 12 targets: fewer than the 100 scores that a rate would be told of, which takes time. Models err as a whole, too.
    found = [attack(margins(8, 12, 0.0, 2 * seed, 0.7), margins(8, 12, 0.0, 2 * seed + 1, 0.7)) for seed in range(200)]
    for name in ("auc", "balanced_accuracy"):
        intervals = [getattr(each, name) for each in found]
        values = np.array([interval.value for interval in intervals])
        assert abs(values.mean() - 0.5) < 4 * values.std() / 200**0.5 < 0.03
        assert np.mean([interval.low <= 0.5 <= interval.high for interval in intervals]) > 0.9


def test_an_exact_method_gives_one_half_where_models_depend_on_what_else_they_saw() -> None:
    """A model's margin of x is a sum over the targets that it was trained on: what it knows depends on the cut."""
    aucs = []
    for seed in range(100):
        rng = np.random.default_rng([seed, 2])
        parts, influence = draw_parts(15, 6, seed), rng.normal(size=(15, 15))
        unlearned, retrained = np.full((2, 6, 15), np.nan)
        for pair, part in enumerate(parts):
            for forgotten in (0, 1):
                of = part == forgotten
                unlearned[pair, of] = (influence @ (part == 1 - forgotten))[of]
                retrained[pair, of] = (influence @ (part == 2))[of]
        aucs.append(attack(unlearned + rng.normal(size=(6, 15)), retrained + rng.normal(size=(6, 15))).auc.value)
    assert abs(np.mean(aucs) - 0.5) < 4 * np.std(aucs) / 10 < 0.06


def test_auc_and_balanced_accuracy_of_a_pair_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    scores_u = np.array([[1.0, 2.0, -1.0], [0.0, np.nan, 3.0]])
    scores_r = np.array([[0.5, -2.0, 1.0], [-1.0, np.nan, 3.0]])
    monkeypatch.setattr(module, "likelihood_ratios", lambda u, r: (scores_u, scores_r, True))
    found = attack(scores_u, scores_r)
    # Pair 0: 1 beats 0.5, -2 and ties 1; 2 beats all; -1 beats -2: (2.5 + 3 + 1) / 9. Pair 1: 1 of 2, and 1.5 of 2.
    assert found.pair_aucs == pytest.approx([6.5 / 9, 2.5 / 4])
    # Pair 0: 2 of 3 and 1 of 3 right. Pair 1: 0 is half right, 3 is right; -1 is right, 3 wrong.
    expected = np.array([(2 / 3 + 1 / 3) / 2, (1.5 / 2 + 1 / 2) / 2])
    assert found.balanced_accuracy == pytest.approx(over_pairs(expected))
    assert found.auc.value == pytest.approx(np.mean([6.5 / 9, 2.5 / 4]))


def test_intervals_over_pairs_allow_for_shared_fits() -> None:
    values = np.array([0.6, 0.7, 0.65, 0.72])
    error = values.std(ddof=1) * (1 / 4 + 1 / 3) ** 0.5
    low, high = scipy.stats.t.interval(0.95, 3, values.mean(), error)
    assert over_pairs(values) == pytest.approx((values.mean(), low, high))
    assert over_pairs(np.array([0.2, 0.9, 1.0])).high == 1
    assert over_pairs(np.array([0.0, 0.1, 0.8])).low == 0


def test_a_rate_is_told_where_there_are_scores_enough() -> None:
    found = attack(margins(10, 20, 6.0, 1), margins(10, 20, 0.0, 2))
    rate = found.tpr[0.01]
    assert not isinstance(rate, str)
    assert rate.value > 0.9
    assert rate.low > 0.7
    assert found.tpr[0.001] == "200 scores of retrained models; a rate of 0.001 needs 1000"
    written = found.to_dict()
    assert written["tpr_at_fpr"]["0.01"]["value"] == rate.value
    assert written["tpr_at_fpr"]["0.001"]["value"] is None
    assert "0.5 = indistinguishable" in written["auc"]["direction"]
    json.dumps(written, allow_nan=False)


def test_margins_that_do_not_belong_together_are_refused() -> None:
    unlearned, retrained = margins(4, 5), margins(4, 5)
    with pytest.raises(UserError, match="not of the same targets"):
        attack(unlearned, retrained[:3])
    retrained[0, 0] = np.nan
    with pytest.raises(UserError, match="not of the same targets"):
        attack(unlearned, retrained)
    with pytest.raises(UserError, match="2 pairs of models are too few to fit distributions"):
        attack(margins(2, 5), margins(2, 5))


def test_a_sample_with_one_pair_alone_is_left_out() -> None:
    unlearned, retrained = margins(5, 4, 6.0, 1), margins(5, 4, 0.0, 2)
    unlearned[:4, 0] = retrained[:4, 0] = np.nan
    found = attack(unlearned, retrained)
    assert np.isnan(found.unlearned[:, 0]).all()
    assert np.isnan(found.per_sample[0])
    assert np.isfinite(found.per_sample[1:]).all()
    apart = attack(unlearned[:, 1:], retrained[:, 1:])
    assert found.auc == apart.auc
    np.testing.assert_allclose(found.unlearned[:, 1:], apart.unlearned)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of `unlearn` from here on."""
    calls: list[dict[str, Any]] = []

    def spy(model: Any, forget: Any, retain: Any, **options: Any) -> Any:
        calls.append({"forget": forget, "retain": retain, **options})
        return unlearn(model, forget, retain, **options)

    monkeypatch.setattr(module, "unlearn", spy)
    return calls


@pytest.mark.slow
def test_every_original_forgets_both_its_parts_and_retains_the_other(cache: Path, runs: list[dict[str, Any]]) -> None:
    ensemble = train_ensemble(SPEC, cache)
    result = unlearn_ensemble(ensemble, "finetune", QUICK, cache)
    assert len(runs) == 6
    ids = np.array(list(ensemble.targets.ids))
    for number, run in enumerate(runs):
        parts, part = ensemble.parts[number // 2], number % 2
        assert list(run["forget"].ids) == list(ids[parts == part])
        retained = set(run["retain"].ids)
        assert retained & set(ids) == set(ids[parts == 1 - part])
        assert len(retained) == 1438 - 29 + (parts == 1 - part).sum()
        assert run["method"] == "finetune"
    seeds = [run["config"]["seed"] for run in runs]
    assert len(set(seeds)) == 6
    assert min(seeds) > 1000  # none of a model's
    np.testing.assert_array_equal(np.isnan(result.margins), ensemble.parts == 2)
    assert result.collapsed == 0
    assert (result.unlearn_seconds > 0).all()
    runs.clear()
    again = unlearn_ensemble(ensemble, "finetune", {**QUICK, "device": "cpu"}, cache)
    assert runs == []  # kept
    np.testing.assert_array_equal(again.margins, result.margins)
    # The untouched original is another model: what is kept is of the unlearned one.
    forgotten = ensemble.parts != 2
    assert (result.margins[forgotten] != ensemble.margins[0::2][forgotten]).mean() > 0.9
    unlearn_ensemble(ensemble, "finetune", {**QUICK, "lr": 0.01}, cache)
    assert len(runs) == 6  # another procedure
    with pytest.raises(UserError, match="give --seed"):
        unlearn_ensemble(ensemble, "finetune", {"seed": 3}, cache)


@pytest.mark.slow
@pytest.mark.minutes
def test_an_exact_method_is_told_from_no_method(parquet_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Noise with labels: what a model knows of it, it has by heart."""
    folder = parquet_folder(train=60, test=20)
    recipe = {"batch_size": 6, "precision": "fp32", "epochs": 8, "lr": 1e-2, "augment": "none"}
    spec = dataclasses.replace(SPEC, data=f"parquet:{folder}", targets="random:0.5@0", recipe=recipe, pairs=6)
    found = attack_procedure(spec, "retrain", recipe, tmp_path)
    assert found["untouched"]["auc"]["low"] > 0.55
    assert found["ulira"]["auc"]["low"] <= 0.5 <= found["ulira"]["auc"]["high"]
    margins = {key: np.array(found["per_sample"][key]) for key in ("unlearned_margin", "retrained_margin")}
    assert len(found["per_sample"]["ids"]) == len(margins["retrained_margin"]) == 30
    assert abs(margins["unlearned_margin"].mean() - margins["retrained_margin"].mean()) < 2
    score = [value for value in found["per_sample"]["untouched_score"] if value is not None]
    assert np.mean(score) > 0.5


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["lethe", "attack", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        cli.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.slow
def test_the_command_tells_needs_table_and_directions(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Planned:
        class memory:  # noqa: N801
            @staticmethod
            def total() -> int:
                return 300 << 20

    asked: list[dict[str, Any]] = []

    def plan(architecture: str, **options: Any) -> type[Planned]:
        asked.append(options)
        return Planned  # a process of its own would be measured

    monkeypatch.setattr("engine.plan.plan", plan)
    arguments = ["--data", "digits", "--arch", "vit_tiny_patch16_224", "--targets", "random:0.02@0", "--models", "3"]
    arguments += [text for key, value in MODEL.model_args.items() for text in ("--model-arg", f"{key}={value}")]
    arguments += [text for key, value in {**QUICK, "epochs": 1}.items() for text in ("--train-set", f"{key}={value}")]
    arguments += [text for key, value in QUICK.items() for text in ("--set", f"{key}={value}")]
    arguments += ["--method", "finetune", "--cache", str(cache), "--json", str(tmp_path / "attack.json")]
    arguments += ["--memorisation", str(tmp_path / "scores.csv")]
    assert command(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert "6 models:" in out
    assert "about 300 MiB of main memory" in out
    assert [options["method"] for options in asked] == ["retrain", "finetune"]
    assert "0.5 = indistinguishable" in out
    assert "unlearned by finetune" in out
    assert "it has no power on these data" in out
    written = json.loads((tmp_path / "attack.json").read_text())
    value = written["ulira"]["auc"]
    assert f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in out
    assert written["options"]["max_steps"] == 2
    assert set(written["seconds"]) == {"train", "unlearn", "attack", "train_models", "unlearn_models"}
    assert str(tmp_path) not in json.dumps(written)
    assert str(cache) not in json.dumps(written)
    train = open_source("digits").train
    scores = read_scores(tmp_path / "scores.csv", train)[train.ids.positions(written["per_sample"]["ids"])]
    ensemble = train_ensemble(SPEC, cache)
    np.testing.assert_array_equal(scores, memorisation(ensemble))
    originals, retrained = (np.where(ensemble.parts != 2, ensemble.margins[row::2], np.nan) for row in (0, 1))
    unlearned = unlearn_ensemble(ensemble, "finetune", QUICK, cache).margins
    for key, margins_of in (("untouched", originals), ("ulira", unlearned)):
        found = attack(margins_of, retrained)
        assert written[key]["pair_aucs"] == found.pair_aucs.tolist()
        assert written[key]["balanced_accuracy"]["value"] == found.balanced_accuracy.value


@pytest.mark.slow
def test_the_command_names_wrong_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "train_ensemble", None)  # nothing may be trained
    monkeypatch.setattr("engine.plan.plan", None)  # nor measured
    with pytest.raises(UserError, match="give --seed"):
        attack_procedure(SPEC, "finetune", {"seed": 1}, tmp_path)
    arguments = ["--data", "digits", "--arch", "vit_tiny_patch16_224", "--targets", "random:0.02@0"]
    arguments += ["--model-arg", "img_size=8", "--model-arg", "patch_size=2", "--model-arg", "in_chans=1"]
    arguments += ["--cache", str(tmp_path)]
    for wrong, message in (
        (["--models", "2"], "too few"),
        (["--method", "lehte"], "did you mean 'lethe'"),
        (["--set", "nonsense=1"], "unknown option 'nonsense'"),
        (["--train-set", "seed=1"], "give --seed"),
        (["--set", "seed=1"], "give --seed"),
    ):
        assert command(monkeypatch, *arguments, *wrong) == 2
        assert message in capsys.readouterr().err
