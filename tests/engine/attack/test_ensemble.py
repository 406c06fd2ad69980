"""Ensembles: who is trained on what, and a cache that survives kills."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import TINY

from engine.attack import ensemble as module
from engine.attack.ensemble import (
    Ensemble,
    EnsembleSpec,
    draw_parts,
    ensemble_needs,
    holding,
    in_processes,
    memorisation,
    open_data,
    read_margins,
    train_ensemble,
)
from engine.data import Loader, open_source
from engine.errors import RunStopped, UserError
from engine.models.checkpoint import load_checkpoint, weights_sha256
from engine.models.predict import predict
from engine.models.preprocessing import preprocessing_of
from engine.models.spec import ModelSpec
from engine.run.unlearn import train

MODEL = ModelSpec(
    architecture="vit_tiny_patch16_224",
    num_classes=10,
    model_args={**TINY, "embed_dim": 16, "depth": 1},
    pretrained_cfg={},
)
RECIPE = {"max_steps": 2, "batch_size": 20, "precision": "fp32", "epochs": 1}
SPEC = EnsembleSpec(data="digits", targets="random:0.02@0", model=MODEL, recipe=RECIPE, pairs=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def small(cache: Path) -> Ensemble:
    return train_ensemble(SPEC, cache)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of `train` from here on, with the samples under "samples"."""
    calls: list[dict[str, Any]] = []

    def spy(model: Any, samples: Any, **options: Any) -> Any:
        calls.append({"samples": samples, **options})
        return train(model, samples, **options)

    monkeypatch.setattr(module, "train", spy)
    return calls


@pytest.mark.parametrize(("targets", "pairs"), [(30, 3), (31, 4), (3, 5), (100, 16)])
def test_each_target_is_in_k_of_2k_training_sets(targets: int, pairs: int) -> None:
    parts = draw_parts(targets, pairs, seed=5)
    assert (module._included(parts).sum(0) == pairs).all()
    for row in parts:
        assert np.ptp(np.bincount(row, minlength=3)) <= 1  # thirds


def test_cuts_are_random_and_more_pairs_change_none() -> None:
    parts = draw_parts(90, 9, seed=5)
    np.testing.assert_array_equal(parts[:4], draw_parts(90, 4, seed=5))
    # Of independent cuts a third agrees by chance, and no cut is another turned round.
    for other in (*parts[1:], draw_parts(90, 1, seed=6)[0]):
        for turn in range(3):
            assert 0.15 < (parts[0] == (other + turn) % 3).mean() < 0.55
    assert len(np.unique(np.diff(parts[0]))) > 2  # not in the order of the samples


def test_models_are_trained_on_what_the_design_says(small: Ensemble) -> None:
    source = open_source("digits")
    targets = {sample_id: i for i, sample_id in enumerate(small.targets.ids)}
    assert len(targets) == 29
    for row, folder in enumerate(small.folders):
        keep = [i for i, s in enumerate(source.train.ids) if s not in targets or small.included[row, targets[s]]]
        samples = source.train.subset(keep)
        member = json.loads((folder / "member.json").read_text())
        assert member["trained_on"] == len(samples)
        assert member["samples_sha256"] == samples.fingerprint()
        assert member["seed"] == row
    np.testing.assert_array_equal(small.included[0::2], small.parts != 2)
    np.testing.assert_array_equal(small.included[1::2], small.parts == 2)


def test_margins_are_the_log_odds_of_the_true_class(small: Ensemble) -> None:
    model = load_checkpoint(small.folders[3])
    p = predict(model, Loader(small.targets, preprocessing_of(model), batch_size=8)).confidence
    np.testing.assert_allclose(small.margins[3], np.log(p / (1 - p)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(small.confidence[3], p, rtol=1e-4)
    assert (small.train_seconds > 0).all()
    assert small.seconds > small.train_seconds.sum() * 0.9


def test_margins_are_clipped_and_a_broken_model_is_named(small: Ensemble) -> None:
    model = load_checkpoint(small.folders[0])
    model.head.weight.data.mul_(1e6)
    assert np.abs(read_margins(model, small.targets, SPEC.run())).max() == 100
    model.head.weight.data.fill_(float("nan"))
    with pytest.raises(RunStopped, match="is not finite"):
        read_margins(model, small.targets, SPEC.run())


def test_whole_models_are_found_again(
    small: Ensemble, cache: Path, trained: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = train_ensemble(SPEC, cache)
    assert trained == []
    np.testing.assert_array_equal(again.margins, small.margins)
    np.testing.assert_array_equal(again.train_seconds, small.train_seconds)
    more = dataclasses.replace(SPEC, pairs=4)
    assert ensemble_needs(more, cache).missing == 2
    assert ensemble_needs(more, cache).found == 6
    # Options that do not change the model, and defaults that are written out.
    same = {**RECIPE, "device": "cpu", "workers": 0, "lr": 1e-3}
    assert ensemble_needs(dataclasses.replace(SPEC, recipe=same), cache).missing == 0
    for changed in (
        {"recipe": {**RECIPE, "lr": 2e-3}},
        {"seed": 1000},
        {"targets": "random:0.02@1"},
        {"model": dataclasses.replace(MODEL, model_args={**MODEL.model_args, "num_heads": 1})},
    ):
        assert ensemble_needs(dataclasses.replace(SPEC, **changed), cache).found == 0  # type: ignore[arg-type]
    monkeypatch.setattr(module, "__version__", "9")
    assert ensemble_needs(SPEC, cache).found == 0


def test_images_count_where_ids_and_labels_are_alike(parquet_folder: Callable[..., Path]) -> None:
    def keys() -> list[str]:
        spec = dataclasses.replace(SPEC, data=f"parquet:{folder}", targets="random:0.5@0")
        return [job.key for job in module._trainings(spec, Path("cache"))[2]]

    folder = parquet_folder()
    before = keys()
    assert keys() == before
    assert len(set(before)) == 6
    other = open_data(f"parquet:{folder}", "random:0.5@0").source.train.image(39)
    stream = io.BytesIO()
    other.save(stream, "PNG")
    parquet_folder(spoil={0: stream.getvalue()})
    assert not set(keys()) & set(before)


def test_weights_that_were_exchanged_are_noticed(small: Ensemble, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(small.folders[0].parent, copy)
    shutil.copy(small.folders[1] / "model.safetensors", copy / small.folders[0].name / "model.safetensors")
    with pytest.raises(UserError, match="are not those that were trained; remove that folder"):
        train_ensemble(SPEC, copy)


class Killed(BaseException):
    pass


def killing(monkeypatch: pytest.MonkeyPatch, after: int, at_step: int) -> None:
    """Kills the training of model `after` (0, 1, ...) of a call when it gets to a step."""
    count = iter(range(1000))

    def wrapped(model: Any, samples: Any, **options: Any) -> Any:
        def progress(phase: str, step: int, total: int, numbers: dict[str, float]) -> None:
            if step >= at_step:
                raise Killed

        return train(model, samples, **{**options, "progress": progress if next(count) == after else False})

    monkeypatch.setattr(module, "train", wrapped)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    spec = dataclasses.replace(SPEC, recipe={"batch_size": 120, "precision": "fp32", "epochs": 2})
    killing(monkeypatch, after=1, at_step=20)  # of 24, 12 an epoch
    with pytest.raises(Killed):
        train_ensemble(spec, tmp_path)
    whole = [path for path in tmp_path.glob("model-*") if not path.name.endswith(".partial")]
    (partial,) = tmp_path.glob("*.partial")
    assert len(whole) == 1
    if damaged:
        next(partial.glob("resume/*/state.pt")).write_bytes(b"cut short")
    jobs = module._trainings(spec, tmp_path)[2]
    assert jobs[1].folder.name == partial.name.removesuffix(".partial")
    calls: list[dict[str, Any]] = []
    steps: list[int] = []

    def spy(model: Any, samples: Any, **options: Any) -> Any:
        calls.append(options)
        noting = {**options, "progress": lambda phase, step, total, numbers: steps.append(step)}
        return train(model, samples, **noting)

    monkeypatch.setattr(module, "train", spy)
    module._member(jobs[1])
    assert [call.get("resume", False) for call in calls] == ([True, False] if damaged else [True])
    assert min(steps) == (10 if damaged else 22)  # read every ten steps, and at an epoch's end
    assert not partial.exists()
    opened = open_data(spec.data, spec.targets)
    alone = train(
        MODEL.build(0),
        opened.without(~jobs[1].included, "alone"),
        config={**spec.recipe, "seed": 1},
        validation=opened.source.validation,
    )
    assert weights_sha256(load_checkpoint(jobs[1].folder)) == weights_sha256(alone.model)


def test_what_was_left_before_the_first_step_is_begun_again(
    tmp_path: Path, small: Ensemble, trained: list[dict[str, Any]]
) -> None:
    partial = tmp_path / f"{small.folders[0].name}.partial"
    partial.mkdir()
    (partial / "stray").touch()
    module._member(module._trainings(SPEC, tmp_path)[2][0])
    assert len(trained) == 1
    assert not partial.exists()


def test_one_run_at_a_time_holds_a_cache(tmp_path: Path) -> None:
    with holding(tmp_path), pytest.raises(UserError, match="in use by another run"), holding(tmp_path):
        pass
    with holding(tmp_path):  # given back
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), holding(tmp_path / "file"):
        pass


def test_needs_are_told_and_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ensemble_needs(SPEC, tmp_path / "new" / "cache", workers=2)
    assert (needs.missing, needs.found) == (6, 0)
    weights = sum(t.numel() * 4 for t in MODEL.build().state_dict().values())
    assert needs.weights == weights
    assert needs.disk == weights * (6 + 6 * 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needs.disk - 1))
    with pytest.raises(UserError, match="name a folder on another disk"):
        ensemble_needs(SPEC, tmp_path, workers=2)


def test_wrong_use_is_named() -> None:
    for changed, message in (
        ({"pairs": 2}, "too few"),
        ({"recipe": {"seed": 1}}, "give --seed"),
        ({"recipe": {"epoch": 1}}, "did you mean 'epochs'"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(SPEC, **changed)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 3"):
        open_data("digits", "random:0.001@0")
    with pytest.raises(UserError, match="0 workers"):
        in_processes(abs, [1], 0, "stage", None)


def planted(margins: np.ndarray, parts: np.ndarray) -> Ensemble:
    targets = open_source("digits").train.subset(range(parts.shape[1]))
    folders, seconds = [Path(str(i)) for i in range(len(margins))], np.zeros(len(margins))
    return Ensemble(SPEC, targets, parts, margins, ["" for _ in margins], folders, seconds, 0.0)


def test_memorisation_is_confidence_when_in_less_when_out() -> None:
    parts = (draw_parts(20, 1, seed=0) + np.arange(4)[:, None]).astype(np.int8) % 3  # each target in and out
    included = module._included(parts)
    known = np.linspace(0.1, 0.9, 20)
    learned = np.linspace(0.95, 0.5, 20)
    p = np.where(included, np.maximum(known, learned), known)
    found = memorisation(planted(np.log(p / (1 - p)), parts))
    np.testing.assert_allclose(found, np.maximum(learned - known, 0), atol=1e-12)
    # A target that all originals were trained on: what they say without it is not known.
    assert np.isnan(memorisation(planted(np.zeros((8, 1)), np.zeros((4, 1), dtype=np.int8)))[0])
    # Originals are surer of everything, as they have more to train on: that is no memory of a sample.
    p = np.where(np.arange(8)[:, None] % 2 == 0, 0.8, 0.6) * np.ones((1, 20))
    np.testing.assert_allclose(memorisation(planted(np.log(p / (1 - p)), parts)), 0, atol=1e-12)


def test_memorisation_is_the_mean_over_originals_and_retrained_models() -> None:
    parts = np.array([[0], [0], [0], [1], [2], [2]], dtype=np.int8)
    p = np.full((12, 1), 0.9)
    p[8], p[10] = 0.5, 0.3  # originals without the sample
    p[1::2][:4] = [[0.1], [0.2], [0.1], [0.2]]  # retrained models without it
    found = memorisation(planted(np.log(p / (1 - p)), parts))
    assert found[0] == pytest.approx(((0.9 - 0.4) + (0.9 - 0.15)) / 2)


def test_results_keep_the_order_of_the_jobs_and_are_told() -> None:
    told: list[tuple[str, int, int]] = []
    results = in_processes(abs, [-3, 1, -2], 1, "stage", lambda s, done, of, _: told.append((s, done, of)))
    assert results == [3, 1, 2]
    assert told == [("stage", i, 3) for i in range(4)]


@pytest.mark.slow
@pytest.mark.minutes
def test_worker_processes_train_the_same_models(small: Ensemble, tmp_path: Path) -> None:
    apart = train_ensemble(SPEC, tmp_path, workers=2)
    np.testing.assert_array_equal(apart.margins, small.margins)
    with pytest.raises(RunStopped, match="fewer --workers"):
        in_processes(os._exit, [1, 1], 2, "stage", None)
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        in_processes(math.sqrt, [1.0, -1.0, 4.0], 2, "stage", None)
