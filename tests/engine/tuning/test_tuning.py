"""`lethe tune`: the score without a retrained model on planted answers, and the search around it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score
from toys import few, tiny_vit

import engine
from engine.cli import app as cli
from engine.config import RunConfig, build, read_yaml, split_options
from engine.core.result import UnlearnResult
from engine.core.search_space import Choice, Range, defaults, rate, spaces, tunable
from engine.data import Loader, Samples, open_source
from engine.errors import RunStopped, UserError
from engine.evaluate.indistinguishable import (
    Score,
    Views,
    indistinguishability,
    kolmogorov_smirnov,
    loss_auc,
    same_classes,
)
from engine.evaluate.membership import non_member_calls
from engine.methods import list_methods
from engine.models.checkpoint import save_checkpoint
from engine.models.predict import Predictions, predict
from engine.models.preprocessing import preprocessing_of
from engine.run.folder import save_result
from engine.tuning import Tuned, tune
from engine.tuning.objective import Objective, halves
from engine.tuning.study import FILE

QUICK = {"batch_size": 32, "precision": "fp32", "device": "cpu", "max_steps": 2}


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


# --- the score ---------------------------------------------------------------


def planted(labels: list[int], margins: list[float], classes: int = 3) -> Predictions:
    """Logits whose true class is `margin` above the others: below 0 the answer is wrong."""
    logits = np.zeros((len(labels), classes), dtype=np.float32)
    logits[np.arange(len(labels)), labels] = margins
    return Predictions(logits, np.array(labels))


def noisy(rng: np.random.Generator, labels: np.ndarray, level: float) -> Predictions:
    return planted(labels.tolist(), rng.normal(level, 1.5, len(labels)).tolist())


def test_a_model_that_sees_all_sets_alike_scores_nothing_but_chance() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 1500)
    views = Views(*(noisy(rng, labels, 1.0) for _ in range(3)))
    score = indistinguishability(views, views, np.arange(3))
    assert score.validation == score.retain == 0
    assert score.forget < 6
    assert score.membership < 6
    assert score.total < 3


def test_every_part_is_what_was_planted() -> None:
    """Ten of each set, one class: forget 9 right, held out 6 right (the original 7), retain 8 (the original 10)."""

    def of(right: int) -> Predictions:
        return planted([0] * 10, [2.0 + 0.01 * i if i < right else -1.0 - 0.01 * i for i in range(10)])

    original, model = Views(of(10), of(10), of(7)), Views(of(9), of(8), of(6))
    score = indistinguishability(model, original, np.array([0]))
    assert score.forget == pytest.approx(20)  # 90% against the original's 70% on what it never saw
    assert score.validation == pytest.approx(10)
    assert score.retain == pytest.approx(20)
    assert score.ks == pytest.approx(30)  # three samples on the other side of any threshold between right and wrong
    members = np.concatenate([np.ones(10), np.zeros(10)])
    losses = np.concatenate([model.forget.losses, model.held_out.losses])
    assert score.auc == pytest.approx(200 * abs(roc_auc_score(members, -losses) - 0.5))
    calls = [non_member_calls(which, model.retain, model.held_out).mean() for which in (model.forget, model.held_out)]
    assert score.mia == pytest.approx(100 * abs(calls[0] - calls[1]))
    assert score.mia > 0
    assert score.membership == pytest.approx((score.ks + score.auc + score.mia) / 3)
    assert score.total == pytest.approx((20 + score.membership + 10 + 20) / 4)
    told = score.to_dict()
    assert told["score"] == score.total
    assert told["numbers"]["forget_target"] == pytest.approx(0.7)
    assert told["numbers"]["held_out_accuracy"] == pytest.approx(0.6)


def test_gains_are_not_punished() -> None:
    low, high = planted([0] * 4, [1, -1, -1, -1]), planted([0] * 4, [1, 1, 1, -1])
    score = indistinguishability(Views(low, high, high), Views(low, low, low), np.array([0]))
    assert score.validation == score.retain == 0


def test_held_out_samples_count_by_the_classes_of_the_forget_set() -> None:
    """Forget: 3 of class 0, 1 of class 1. Held out: 1 right of class 0, 4 of class 1 of which 1 right."""
    forget = planted([0, 0, 0, 1], [1, 1, 1, 1])
    held_out = planted([0, 1, 1, 1, 1], [1, 1, -1, -1, -1])
    views = Views(forget, forget, held_out)
    covered, weights, share = same_classes(forget, held_out.labels)
    assert weights.tolist() == pytest.approx([3 / 4] + [1 / 16] * 4)
    assert (len(covered), share) == (4, 1.0)
    score = indistinguishability(views, views, np.arange(3))
    assert score.numbers["forget_target"] == pytest.approx(3 / 4 + 1 / 16)


def test_forget_samples_of_a_class_without_held_out_ones_are_left_out() -> None:
    forget = planted([0, 0, 2, 2], [1, 1, -1, -1])
    held_out = planted([0, 1], [1, 1])
    score = indistinguishability(Views(forget, forget, held_out), Views(forget, forget, held_out), np.arange(3))
    assert score.numbers["covered"] == 0.5
    assert score.numbers["forget_accuracy"] == 1.0
    with pytest.raises(UserError, match="none of the 2 held-out samples has a class of the forget set"):
        same_classes(planted([2], [1]), held_out.labels)


def test_a_class_of_which_nothing_is_retained_is_to_be_unknown() -> None:
    known, unknown = planted([1] * 6, [2.0] * 6), planted([1] * 6, [-2.0] * 6)
    retain = planted([0] * 6, [2.0] * 6)

    def held_out(of_one: Predictions) -> Predictions:
        logits = np.concatenate([of_one.logits, retain.logits])
        return Predictions(logits, np.concatenate([of_one.labels, retain.labels]))

    original = Views(known, retain, held_out(known))
    forgotten = indistinguishability(Views(unknown, retain, held_out(unknown)), original, np.array([0]))
    assert forgotten.forget == 0
    assert forgotten.validation == 0, "the forgotten class is no part of what is to be kept"
    assert indistinguishability(original, original, np.array([0])).forget == pytest.approx(100)
    assert indistinguishability(original, original, np.array([0, 1])).forget == 0


def test_weighted_distances_are_those_of_repeated_samples() -> None:
    rng = np.random.default_rng(1)
    forget, held_out = rng.normal(size=50).round(1), rng.normal(0.4, 1, 30).round(1)  # with ties
    times = rng.integers(1, 5, 30)
    weights, repeated = times / times.sum(), np.repeat(held_out, times)
    assert kolmogorov_smirnov(forget, held_out, weights) == pytest.approx(ks_2samp(forget, repeated).statistic)
    members = np.concatenate([np.ones(50), np.zeros(len(repeated))])
    expected = roc_auc_score(members, -np.concatenate([forget, repeated]))
    assert loss_auc(forget, held_out, weights) == pytest.approx(expected)


# --- halves ------------------------------------------------------------------


def test_halves_share_out_every_class_and_depend_on_ids_alone(train: Samples) -> None:
    samples = few(train, 101)
    first, second = halves(samples)
    assert sorted([*first.ids, *second.ids]) == sorted(samples.ids)
    assert abs(len(first) - len(second)) <= 1
    counts = [np.bincount(half.labels, minlength=10) for half in (first, second)]
    assert abs(counts[0] - counts[1]).max() <= 1
    shuffled = samples.subset(np.random.default_rng(0).permutation(101))
    assert set(halves(shuffled)[0].ids) == set(first.ids)
    by_source = [int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") for i in first.ids]
    others = [int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") for i in second.ids]
    assert min(by_source) < np.median(others) < max(by_source), "not the order that made the validation set"
    with pytest.raises(UserError, match="has 3 samples"):
        halves(few(train, 3))


def test_the_objective_looks_at_each_set_and_each_half(train: Samples) -> None:
    forget, retain, validation = few(train, 30), train.subset(range(30, 130)), open_source("digits").validation
    original, model = tiny_vit(), tiny_vit(seed=3)
    objective = Objective(original, forget, retain, validation, build(RunConfig, {"precision": "fp32"}))
    found = objective(model)
    assert found is not None

    def accuracy(of: torch.nn.Module, samples: Samples) -> float:
        loader = Loader(samples, preprocessing_of(of), batch_size=50)
        return predict(of, loader).accuracy

    halves_of = halves(validation)
    assert [objective.choosing.ids, objective.reporting.ids] == [half.ids for half in halves_of]
    for score, half in zip(found, halves_of, strict=True):
        numbers = score.numbers
        assert numbers["forget_accuracy"] == accuracy(model, forget)
        assert numbers["retain_accuracy"] == accuracy(model, retain)
        assert numbers["retain_accuracy_before"] == accuracy(original, retain)
        assert numbers["held_out_samples"] == len(half)
        assert numbers["validation_accuracy"] == pytest.approx(accuracy(model, half))
        assert numbers["validation_accuracy_before"] == pytest.approx(accuracy(original, half))
    assert found[0].total != found[1].total
    assert [each.validation for each in objective.before] == [0, 0]
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    assert objective(model) is None


# --- spaces ------------------------------------------------------------------


@pytest.mark.parametrize("name", list_methods())
def test_the_defaults_of_every_method_lie_in_its_spaces(name: str) -> None:
    config = list_methods()[name].Config
    for option, value in defaults(config, 64).items():
        space = spaces(config, 64)[option]
        if isinstance(space, Choice):
            assert value in space.values
            continue
        assert space.low <= value <= space.high
        if space.step:
            assert (value - space.low) / space.step == pytest.approx(round((value - space.low) / space.step))
        for end in (space.low, space.high):
            build(config, {option: end})


def test_the_methods_of_the_core_have_spaces() -> None:
    methods = list_methods()
    for name in ("lethe", "finetune", "random_labels", "gradient_ascent"):
        assert spaces(methods[name].Config, 64), name
    assert not spaces(methods["retrain"].Config, 64)


def test_rates_scale_with_the_width_and_null_stands_for_the_middle() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        lr: float | None = tunable(None, rate(0.5, times=4))
        kind: str = tunable("a", Choice(("a", "b")))
        share: float = tunable(0.2, Range(0.1, 0.4))
        fixed: float = 1.0

    assert spaces(Config, 10)["lr"] == Range(0.0125, 0.2, log=True, auto=0.05)
    assert defaults(Config, 10) == {"lr": 0.05, "kind": "a", "share": 0.2}


# --- the search --------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """A search whose runs, scores and clock are replaced: the score is a function of the options.

    seconds: what a run takes by the clock, which stands still between runs. spoil: called in each run.
    """

    forget: Samples
    retain: Samples
    validation: Samples
    ran: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    now: float = 0.0
    spoil: Any = None

    def __call__(self, **changed: Any) -> Tuned:
        arguments = {"validation": self.validation, "method": "finetune", "config": QUICK, **changed}
        return tune(tiny_vit(), self.forget, self.retain, **arguments)

    def unlearn(self, model: torch.nn.Module, *args: Any, config: dict[str, Any], progress: Any, **kw: Any) -> Any:
        assert kw["validation"].ids == halves(self.validation)[0].ids, "a run watches the choosing half alone"
        self.ran.append(config)
        for step in range(10):
            self.now += self.seconds / 10
            progress("retain", step + 1, 10, {})
        if self.spoil:
            self.spoil(self, config)
        events = [{"event": "collapse", "phase": "retain"}] if config["lr"] < 0 else []
        return UnlearnResult(model, config, {}, {}, events, {}, False, None, lambda s: 0.0, {}, save_result)


@pytest.fixture
def bench(train: Samples, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(few(train, 20), train.subset(range(20, 60)), open_source("digits").validation)
    monkeypatch.setattr("engine.tuning.search.unlearn", made.unlearn)

    def scored(self: Objective, model: torch.nn.Module) -> tuple[Score, ...]:
        """A valley at lr = 0.02 and 4 epochs; the reporting half is told by 1000 more."""
        config = made.ran[-1]
        depth = abs(np.log(config["lr"] / 0.02)) * 8 + abs(config["retain_epochs"] - 4) * 4
        return tuple(Score(4 * (depth + add), 0, 0, 0, 0, 0, {}) for add in (0, 1000))

    def before(self: Objective, views: Any) -> tuple[Score, ...]:
        return (Score(0, 0, 0, 0, 0, 0, {}),) * 2

    monkeypatch.setattr(Objective, "_views", lambda self, model: ())
    monkeypatch.setattr(Objective, "_scores", before)
    monkeypatch.setattr("engine.tuning.search.time", types.SimpleNamespace(perf_counter=lambda: made.now))
    monkeypatch.setattr(Objective, "__call__", scored)
    return made


def strip(tuned: Tuned) -> list[tuple[int, dict[str, Any], float | None]]:
    return [(trial.number, trial.options, trial.score) for trial in tuned.trials]


def test_the_first_trial_has_the_defaults_and_the_best_is_the_lowest_score(bench: Bench) -> None:
    tuned = bench(trials=14)
    assert len(tuned.trials) == len(bench.ran) == 14
    assert bench.ran[0] == {**QUICK, "retain_epochs": 10.0, "lr": 0.192 / 32}
    assert tuned.best.score == min(trial.score for trial in tuned.trials if trial.score is not None)
    assert tuned.best.score < tuned.trials[0].score  # type: ignore[operator]
    assert tuned.options == {**QUICK, **tuned.best.options}
    assert tuned.best.reporting["score"] == pytest.approx(tuned.best.score + 1000)  # type: ignore[index, operator]
    told = tuned.to_dict()
    assert told["best"]["reporting"]["score"] > 900
    assert all("reporting" not in trial for trial in told["trials"]), "looked at, not told: nobody can choose by it"
    assert set(tuned.original) == {"choosing", "reporting"}
    assert len({json.dumps(run, sort_keys=True) for run in bench.ran}) > 8
    for trial in tuned.trials:
        assert 1 <= trial.options["retain_epochs"] <= 10
        assert 0.192 / 32 / 8.01 <= trial.options["lr"] <= 0.192 / 32 * 8.01


def test_the_same_seed_gives_the_same_search(bench: Bench) -> None:
    one = strip(bench(trials=12))
    assert strip(bench(trials=12)) == one
    assert strip(bench(trials=3, config={**QUICK, "seed": 1}))[1:] != one[1:3]


@pytest.mark.slow
def test_a_killed_search_goes_on_as_if_it_had_not_been(bench: Bench, tmp_path: Path) -> None:
    whole = bench(trials=12, output_dir=tmp_path / "whole")

    def kill(self: Bench, config: dict[str, Any]) -> None:
        if len(self.ran) == last["run"]:
            raise KeyboardInterrupt

    bench.spoil = kill
    for resume, number in ((False, 1), (True, 11)):  # in the first trial, and where TPE's model proposes
        bench.ran.clear()
        last = {"run": number}
        with pytest.raises(KeyboardInterrupt):
            bench(trials=12, output_dir=tmp_path / "cut", resume=resume)
    bench.spoil = None
    bench.ran.clear()
    resumed = bench(trials=12, output_dir=tmp_path / "cut", resume=True)
    assert strip(resumed) == strip(whole)
    assert len(bench.ran) == 2, "the one that was cut, and the one that was left"
    assert read_yaml(tmp_path / "cut" / "best.yaml") == read_yaml(tmp_path / "whole" / "best.yaml")
    bench.ran.clear()
    more = bench(trials=13, output_dir=tmp_path / "whole", resume=True)
    assert strip(more)[:12] == strip(whole)
    assert len(bench.ran) == 1


def test_each_trial_is_in_the_file_with_its_numbers(bench: Bench, tmp_path: Path) -> None:
    import optuna

    tuned = bench(trials=2, output_dir=tmp_path / "study")
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study' / FILE}")
    kept = study.trials[1].user_attrs["trial"]
    assert kept["options"] == tuned.trials[1].options == study.trials[1].params
    assert kept["choosing"]["score"] == study.trials[1].value
    assert set(kept["seconds"]) == {"unlearn", "measure"}


def test_the_budget_in_seconds_is_kept(bench: Bench) -> None:
    bench.seconds = 2.0
    tuned = bench(seconds=10.5)
    assert len(bench.ran) == len(tuned.trials) == 5
    assert bench.now == tuned.seconds == pytest.approx(10.0), "the sixth would end after 12 seconds: not begun"
    assert len(bench(seconds=10.5, trials=3).trials) == 3


def test_a_trial_that_passes_the_end_is_cut_and_run_again(bench: Bench, tmp_path: Path) -> None:
    bench.seconds = 60.0
    with pytest.raises(UserError, match=r"no trial ended within 15 seconds"):
        bench(seconds=15, output_dir=tmp_path / "study")
    assert bench.now == 18.0, "at the first look at the clock after the end"
    cut = bench.ran[-1]
    tuned = bench(trials=1, output_dir=tmp_path / "study", resume=True)
    assert bench.ran[-1] == cut
    assert tuned.trials[0].number == 0
    assert tuned.seconds == pytest.approx(78.0), "the time of the trial that was cut counts"


def test_the_time_of_a_killed_process_counts(bench: Bench, tmp_path: Path) -> None:
    def kill(self: Bench, config: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    bench.seconds, bench.spoil = 60.0, kill
    with pytest.raises(KeyboardInterrupt):
        bench(output_dir=tmp_path / "study")
    bench.spoil = None
    assert bench(trials=1, output_dir=tmp_path / "study", resume=True).seconds == pytest.approx(120, abs=10)


def test_collapsed_and_stopped_trials_are_pruned_and_never_chosen(bench: Bench) -> None:
    def spoil(self: Bench, config: dict[str, Any]) -> None:
        if len(self.ran) == 1:
            config["lr"] = -1  # collapses
        if len(self.ran) == 2:
            raise RunStopped("loss is not finite")

    bench.spoil = spoil
    tuned = bench(trials=4)
    assert [trial.score is None for trial in tuned.trials] == [True, True, False, False]
    assert "collapsed" in tuned.trials[0].reason
    assert "not finite" in tuned.trials[1].reason
    assert tuned.best.number in (2, 3)
    assert tuned.to_dict()["pruned"] == 2

    def all_of_them(self: Bench, config: dict[str, Any]) -> None:
        raise RunStopped("loss is not finite")

    bench.spoil = all_of_them
    with pytest.raises(RunStopped, match="all 2 trials were pruned, the last: loss is not finite"):
        bench(trials=2)


def test_fixed_options_are_not_searched(bench: Bench) -> None:
    tuned = bench(trials=3, config={**QUICK, "lr": 0.003})
    assert all(run["lr"] == 0.003 for run in bench.ran)
    assert all(set(trial.options) == {"retain_epochs"} for trial in tuned.trials)
    with pytest.raises(UserError, match="every option that can be tuned is fixed"):
        bench(trials=3, config={**QUICK, "lr": 0.003, "retain_epochs": 2})


def test_wrong_use(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="method retrain is exact"):
        bench(method="retrain", trials=1)
    for wrong in ({"trials": 0}, {"seconds": 0}):
        with pytest.raises(UserError, match=r"option (trials|seconds)"):
            bench(**wrong)
    bench(trials=1, output_dir=tmp_path / "study")
    with pytest.raises(UserError, match="--resume"):
        bench(trials=1, output_dir=tmp_path / "study")
    with pytest.raises(UserError, match="has other settings"):
        bench(trials=2, output_dir=tmp_path / "study", resume=True, config={**QUICK, "seed": 5})
    with pytest.raises(UserError, match="no study to resume"):
        bench(trials=1, output_dir=tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="files that are not a study's"):
        bench(trials=1, output_dir=tmp_path / "mine")
    assert len(bench(trials=1, output_dir=tmp_path / "study", overwrite=True).trials) == 1
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="runs in one process"):
            bench(trials=1)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'lethe-unlearning\[tune\]'"):
        bench(trials=1)


# --- as a user runs it -------------------------------------------------------


@pytest.mark.slow
def test_the_command_tunes_on_held_out_samples_and_writes_options_that_unlearn_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lethe(*arguments: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["lethe", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0

    looked: list[str] = []
    real = Samples.tensor
    monkeypatch.setattr(Samples, "tensor", lambda self, *a: looked.append(self.name) or real(self, *a))
    original = save_checkpoint(tiny_vit(), tmp_path / "original")
    task = ["--checkpoint", original, "--data", "digits", "--forget", "random:0.02@0", "--accept-accuracy"]
    fixed = [text for key, value in QUICK.items() for text in ("--set", f"{key}={value}")]
    study = ["tune", "--method", "lethe", *task, "--out", tmp_path / "study", *fixed, "--json", tmp_path / "tuned.json"]
    assert lethe(*study, "--trials", 2) == 0
    assert any("validation" in name for name in looked)
    assert not any("test" in name for name in looked)
    out = capsys.readouterr().out
    for word in ("36 held-out samples", "trial 0", "trial 1", "reporting", "the search took", "best.yaml"):
        assert word in out
    told = json.loads((tmp_path / "tuned.json").read_text())
    assert len(told["trials"]) == 2
    assert read_yaml(tmp_path / "study" / "best.yaml") == told["options"]
    assert lethe(*study, "--trials", 3, "--resume") == 0
    assert "trial 1" not in capsys.readouterr().out.split("best:")[0].split("trial 2")[0]
    _, config = split_options(read_yaml(tmp_path / "study" / "best.yaml"), list_methods()["lethe"].Config)
    assert config.temperature == told["best"]["options"]["temperature"]


def test_tune_is_a_public_name() -> None:
    assert engine.tune is tune
