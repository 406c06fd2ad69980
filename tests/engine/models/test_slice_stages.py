"""Sliced training and S3T: what a stage saw and changed, and that a deletion leaves the bits of never having seen."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import few, tiny_vit
from typer.testing import CliRunner, Result

from engine.audit.record import recorded
from engine.audit.record_check import verify_record
from engine.cli.app import app
from engine.core.result import UnlearnResult
from engine.data import Samples, open_source
from engine.errors import UserError
from engine.jobs.start import pretrained
from engine.methods import list_methods
from engine.methods.s3t import S3T
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from engine.models.slice_stages import STAGES, Stages, slices_of, tokens_of, with_fresh_head
from engine.models.spec import spec_of
from engine.run.trainer import Trainer
from engine.run.unlearn import train, unlearn

RUN: dict[str, Any] = {"batch_size": 16, "precision": "fp32", "seed": 3, "max_steps": 2, "checkpoint_every": 1}
RECIPE: dict[str, Any] = {**RUN, "slices": 3, "epochs": 1, "rank": 2}


@pytest.fixture(scope="module")
def samples() -> Samples:
    return few(open_source("digits").train, 60)


def slice_by_hand(samples: Samples) -> np.ndarray:
    """From the definition: the first 64 bits of SHA-256 of seed and id, modulo the slices."""
    digests = [hashlib.sha256(f"3\0{each}".encode()).digest()[:8] for each in samples.ids]
    return np.array([int.from_bytes(digest, "little") % 3 + 1 for digest in digests])


def split(samples: Samples, *slices: int) -> tuple[Samples, Samples]:
    """(two samples of each of these slices, all others)."""
    of = slice_by_hand(samples)
    chosen = np.concatenate([np.flatnonzero(of == number)[:2] for number in slices])
    return samples.subset(chosen, "forget"), samples.subset(np.setdiff1d(np.arange(len(samples)), chosen), "retain")


def learn(samples: Samples, folder: Path, **options: Any) -> UnlearnResult:
    return train(tiny_vit(), samples, method="s3t", config={**RECIPE, **options}, output_dir=folder)


@pytest.fixture(scope="module", params=["fresh", "given"])
def base(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"base": request.param, "slices": 3 if request.param == "fresh" else 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, samples: Samples) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    learn(samples, folder)
    return folder


def stage_tensors(folder: Path, number: int, sequence: int = 1) -> dict[str, Tensor]:
    """By names without the sequence."""
    before = f"sequence.{sequence}." if sequence > 1 else ""
    held = load_file(folder / STAGES).items()
    return {key.removeprefix(before): value for key, value in held if key.startswith(f"{before}stage.{number}.")}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_a_slice_is_a_matter_of_the_sample_alone(samples: Samples) -> None:
    of = slices_of(tokens_of(samples, 3), 3)
    assert of.tolist() == slice_by_hand(samples).tolist()
    assert set(of) == {1, 2, 3}
    assert slices_of(tokens_of(samples.subset([40, 7]), 3), 3).tolist() == [of[40], of[7]]
    assert tokens_of(samples, 4).tolist() != tokens_of(samples, 3).tolist()


# --- the proof: the bits of a training that never saw the samples --------------


@pytest.mark.parametrize("least", [2, 3])
@pytest.mark.slow
def test_a_deletion_leaves_the_bits_of_a_training_without_the_samples(
    trained: Path, samples: Samples, tmp_path: Path, least: int
) -> None:
    forget, retain = split(samples, *range(least, 4))
    served = unlearn(str(trained), forget, retain, method="s3t", config=RUN, output_dir=tmp_path / "served")
    again = unlearn(
        str(trained),
        forget,
        retain,
        method="s3t",
        config={**RUN, "retrain_dropped": True},
        output_dir=tmp_path / "again",
    )
    mixed = np.random.default_rng(0).permutation(len(retain))  # nor does the order of the data set have a say
    without = learn(retain.subset(mixed), tmp_path / "without")
    for number in range(1, least):
        assert_same_bits(stage_tensors(tmp_path / "served", number), stage_tensors(tmp_path / "without", number))
        assert_same_bits(stage_tensors(tmp_path / "served", number), stage_tensors(trained, number))
    assert not stage_tensors(tmp_path / "served", least)
    assert_same_bits(dict(again.model.state_dict()), dict(without.model.state_dict()))
    assert_same_bits(load_file(tmp_path / "again" / STAGES), load_file(tmp_path / "without" / STAGES))
    for result in (again, without):
        assert weights_sha256(load_checkpoint(result.output_dir)) == weights_sha256(result.model)  # type: ignore[arg-type]
    assert weights_sha256(again.model) != weights_sha256(load_checkpoint(trained))  # the samples do matter
    assert served.config["stages"] | {"recipe": None} == {
        "slices": 3, "sequence": 1, "served": least - 1, "kept": [least - 1], "dropped": [4 - least], "recipe": None,
    }  # fmt: skip
    assert not sum(served.samples_seen.values())
    assert set(again.samples_seen) == {f"stage_{number}" for number in range(least, 4)}


def test_the_model_that_is_served_is_that_of_the_last_stage_that_is_left(
    trained: Path, samples: Samples, tmp_path: Path
) -> None:
    forget, retain = split(samples, 3)
    model = unlearn(str(trained), forget, retain, method="s3t", config=RUN).model
    assert_same_bits(two_stages_by_hand(trained), dict(model.state_dict()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def two_stages_by_hand(folder: Path, sequence: int = 1) -> dict[str, Tensor]:
    """Base and stages put together from the equation."""
    first, second = (stage_tensors(folder, number, sequence) for number in (1, 2))
    weights = {key.removeprefix("stage.1.plain."): value for key, value in first.items()}
    weights = {key: value for key, value in weights.items() if not key.startswith("stage.")}
    for i, layer in enumerate(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")):  # stage 2: the top block
        weights[f"blocks.1.{layer}.weight"] = weights[f"blocks.1.{layer}.weight"] + (
            second[f"stage.2.{i}.B"] @ second[f"stage.2.{i}.A"]
        )
    return weights | {"head.weight": second["stage.2.head.0.weight"], "head.bias": second["stage.2.head.0.bias"]}


def test_slice_1_takes_everything_with_it_and_all_is_trained_again_to_the_same_bits(
    samples: Samples, tmp_path: Path, base: dict[str, Any]
) -> None:
    model = with_fresh_head(tiny_vit(seed=8), 10)
    fit = functools.partial(train, method="s3t")
    fit(model, samples, config={**RECIPE, **base}, output_dir=tmp_path / "all")
    of = slices_of(tokens_of(samples, 3), base["slices"])
    forget = samples.subset(np.flatnonzero(of == 1)[:3])
    retain = samples.subset(np.setdiff1d(np.arange(len(samples)), np.flatnonzero(of == 1)[:3]))
    again = unlearn(str(tmp_path / "all"), forget, retain, method="s3t", config={**RUN, "retrain_dropped": True})
    without = fit(model, retain, config={**RECIPE, **base}, output_dir=tmp_path / "without")
    assert weights_sha256(again.model) == weights_sha256(without.model)


def test_two_deletions_one_after_the_other_are_one(trained: Path, samples: Samples, tmp_path: Path) -> None:
    both, retain = split(samples, 2, 3)
    second, first = both.subset([0, 1]), both.subset([2, 3])  # of slice 2, and before it of slice 3
    kept = np.setdiff1d(np.arange(len(samples)), samples.positions(list(first.ids), "test"))
    after_first = samples.subset(kept)
    unlearn(str(trained), first, after_first, method="s3t", config=RUN, output_dir=tmp_path / "one")
    with pytest.raises(UserError, match=r"2 samples to retain are not among those .* deleted before"):
        unlearn(str(tmp_path / "one"), second, samples.subset(
            np.setdiff1d(np.arange(len(samples)), samples.positions(list(second.ids), "test"))
        ), method="s3t", config=RUN)  # fmt: skip
    chain = unlearn(str(tmp_path / "one"), second, retain, method="s3t", config={**RUN, "retrain_dropped": True})
    whole = unlearn(  # names the earlier deletion too
        str(tmp_path / "one"), both, retain, method="s3t", config={**RUN, "retrain_dropped": True}
    )
    without = learn(retain, tmp_path / "without")
    assert weights_sha256(chain.model) == weights_sha256(whole.model) == weights_sha256(without.model)


# --- several sequences ---------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, samples: Samples) -> Path:
    """Trained in the sequences 123, 231 and 312."""
    folder = tmp_path_factory.mktemp("three") / "model"
    learn(samples, folder, sequences=3)
    return folder


def stages_left(folder: Path) -> list[int]:
    return [len(kept) for kept in Stages.read(folder).kept]


@pytest.mark.slow
def test_the_sequence_with_the_most_stages_left_is_served_and_the_others_are_kept(
    three: Path, samples: Samples, tmp_path: Path
) -> None:
    both, retain = split(samples, 1, 3)
    first, second = both.subset([0, 1]), both.subset([2, 3])  # of slice 1, then of slice 3
    after_first = samples.subset(np.setdiff1d(np.arange(len(samples)), samples.positions(list(first.ids), "test")))
    one = unlearn(str(three), first, after_first, method="s3t", config=RUN, output_dir=tmp_path / "one")
    assert stages_left(tmp_path / "one") == [0, 2, 1]
    assert_same_bits(two_stages_by_hand(three, sequence=2), dict(one.model.state_dict()))
    assert {key: one.config["stages"][key] for key in ("sequence", "served", "kept", "dropped")} == {
        "sequence": 2, "served": 2, "kept": [0, 2, 1], "dropped": [3, 1, 2],
    }  # fmt: skip
    two = unlearn(str(tmp_path / "one"), second, retain, method="s3t", config=RUN, output_dir=tmp_path / "two")
    assert stages_left(tmp_path / "two") == [0, 1, 0]
    assert two.config["stages"]["dropped"] == [0, 1, 1]
    without = learn(retain, tmp_path / "without", sequences=3)
    for folder, left in (("one", 2), ("two", 1)):
        for number in range(1, left + 1):
            kept = stage_tensors(tmp_path / folder, number, sequence=2)
            assert_same_bits(kept, stage_tensors(three, number, sequence=2))
    assert_same_bits(stage_tensors(tmp_path / "two", 1, sequence=2), stage_tensors(tmp_path / "without", 1, sequence=2))
    again = unlearn(
        str(tmp_path / "one"),
        second,
        retain,
        method="s3t",
        config={**RUN, "retrain_dropped": True},
        output_dir=tmp_path / "again",
    )
    assert_same_bits(dict(again.model.state_dict()), dict(without.model.state_dict()))
    assert_same_bits(load_file(tmp_path / "again" / STAGES), load_file(tmp_path / "without" / STAGES))
    assert set(again.samples_seen) == {
        *(f"stage_{number}" for number in (1, 2, 3)),
        *(f"sequence_2_stage_{number}" for number in (2, 3)),
        *(f"sequence_3_stage_{number}" for number in (1, 2, 3)),
    }
    with pytest.raises(UserError, match=r"each of the slices 1 to 3.* --set retrain_dropped=true"):
        unlearn(str(three), *split(samples, 1, 2, 3), method="s3t", config=RUN)


def test_a_sequence_begins_with_another_slice_and_goes_round(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = dict(zip(samples.ids, slice_by_hand(samples).tolist(), strict=True))
    seen: dict[str, set[int]] = {}
    deal = S3T.samples_of

    def deal_and_note(method: S3T, phase: Any) -> Samples:
        chosen = deal(method, phase)
        seen[phase.name] = {of[each] for each in chosen.ids}
        return chosen

    monkeypatch.setattr(S3T, "samples_of", deal_and_note)
    learn(samples, tmp_path / "run", sequences=2)
    assert seen == {
        "sequence_2_stage_1": {2}, "sequence_2_stage_2": {2, 3}, "sequence_2_stage_3": {1, 2, 3},
        "stage_1": {1}, "stage_2": {1, 2}, "stage_3": {1, 2, 3},
    }  # fmt: skip


def test_sequences_begin_with_the_same_weights(
    samples: Samples, tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the one before left in the model."""
    held: dict[str, dict[str, Tensor]] = {}
    edit = S3T.edit

    def edit_and_note(method: S3T, model: Any, phase: Any) -> None:
        edit(method, model, phase)
        held[phase.name] = {key: value.clone() for key, value in model.state_dict().items()}

    monkeypatch.setattr(S3T, "edit", edit_and_note)
    learn(samples, tmp_path / "run", **base, sequences=2)
    assert_same_bits(held["sequence_2_stage_1"], held["stage_1"])
    with pytest.raises(AssertionError):
        assert_same_bits(held["sequence_2_stage_2"], held["stage_2"])


# --- what a stage changes, and what it sees ------------------------------------


def test_a_stage_changes_its_own_group_and_the_head_alone(
    samples: Samples, tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[dict[str, Tensor]] = []
    seen: list[set[str]] = []
    deal, finish = S3T.samples_of, Trainer.finish

    def look(trainer: Trainer, *_: Any) -> bool:
        held.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
        return False

    def deal_and_note(method: S3T, phase: Any) -> Samples:
        chosen = deal(method, phase)
        seen.append(set(chosen.ids))
        return chosen

    def look_and_finish(trainer: Trainer, *arguments: Any) -> UnlearnResult:
        look(trainer)
        return finish(trainer, *arguments)

    monkeypatch.setattr(S3T, "samples_of", deal_and_note)
    monkeypatch.setattr(Trainer, "_edit", look)  # before the first step of each stage
    monkeypatch.setattr(Trainer, "finish", look_and_finish)  # before the updates are merged
    train(tiny_vit(seed=8), samples, method="s3t", config={**RECIPE, **base}, output_dir=tmp_path / "run")
    groups = [["blocks.1."], ["blocks.0."]]
    if base["base"] == "fresh":
        groups.insert(0, [])
    assert len(held) == len(groups) + 1
    for group, (before, after) in zip(groups, itertools.pairwise(held), strict=True):
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert {"head.weight", "head.bias"} <= changed
        others = changed - {"head.weight", "head.bias"}
        updates = {key for key in others if key.endswith((".A", ".B"))}
        if group:
            assert others == updates
            assert updates == {key for key in before if key.endswith((".A", ".B")) and key.startswith(tuple(group))}
        else:  # all weights, and no update
            assert not updates
            assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight"} < others
    of = dict(zip(samples.ids, slices_of(tokens_of(samples, 3), base["slices"]).tolist(), strict=True))
    assert [{of[each] for each in ids} for ids in seen] == [set(range(1, n + 1)) for n in range(1, base["slices"] + 1)]
    assert seen[-1] == set(samples.ids)


# --- killed and resumed --------------------------------------------------------


def killed_at(at: tuple[str, int], fit: Callable[..., UnlearnResult]) -> None:
    """Breaks a run off when a phase has taken so many steps."""

    class Killed(Exception):
        pass

    def die(phase: str, step: int, *_: Any) -> None:
        if (phase, step) == at:
            raise Killed

    with pytest.raises(Killed):
        fit(progress=die)


def test_a_killed_retraining_of_stages_goes_on_to_the_same_bits(
    trained: Path, samples: Samples, tmp_path: Path
) -> None:
    """Killed within stage 3: the heads of stages 1 and 2 are no longer the model's."""
    forget, retain = split(samples, 2)
    begin = functools.partial(
        unlearn, str(trained), forget, retain, method="s3t", config={**RUN, "retrain_dropped": True}
    )
    expected = begin(output_dir=tmp_path / "whole").model
    killed_at(("stage_3", 2), functools.partial(begin, output_dir=tmp_path / "run"))
    assert weights_sha256(begin(output_dir=tmp_path / "run", resume=True).model) == weights_sha256(expected)
    assert_same_bits(load_file(tmp_path / "run" / STAGES), load_file(tmp_path / "whole" / STAGES))


@pytest.mark.parametrize("at", [
    pytest.param(("sequence_2_stage_1", 2), marks=pytest.mark.slow),
    ("sequence_2_stage_3", 2),
    ("stage_1", 1),
    pytest.param(("stage_2", 2), marks=pytest.mark.slow),
])  # fmt: skip
def test_a_training_in_sequences_that_is_killed_goes_on_to_the_same_bits(
    three: Path, samples: Samples, tmp_path: Path, at: tuple[str, int]
) -> None:
    fit = functools.partial(
        train, tiny_vit(), samples, method="s3t", config={**RECIPE, "sequences": 3}, output_dir=tmp_path / "run"
    )
    killed_at(at, fit)
    assert weights_sha256(fit(resume=True).model) == weights_sha256(load_checkpoint(three))
    assert_same_bits(load_file(tmp_path / "run" / STAGES), load_file(three / STAGES))


def test_a_killed_training_goes_on_to_the_same_bits(
    trained: Path, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after all steps: what stage 1 left must not be read from weights that later stages were merged into."""
    fit = functools.partial(train, tiny_vit(), samples, method="s3t", config=RECIPE, output_dir=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(S3T, "on_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit()
    fit(resume=True)
    assert_same_bits(load_file(tmp_path / "run" / STAGES), load_file(trained / STAGES))


# --- refusals ------------------------------------------------------------------


def test_what_cannot_be_exact_is_refused(trained: Path, samples: Samples, tmp_path: Path) -> None:
    forget, retain = split(samples, 3)
    delete = functools.partial(unlearn, str(trained), forget, retain, method="s3t")
    plain = save_checkpoint(tiny_vit(), tmp_path / "plain")
    with pytest.raises(UserError, match=r"not trained in slices .*`lethe train --sliced`"):
        unlearn(str(plain), forget, retain, method="s3t", config=RUN)
    with pytest.raises(UserError, match=r"in slice 1.* --set retrain_dropped=true"):
        unlearn(str(trained), *split(samples, 1, 3), method="s3t", config=RUN)
    with pytest.raises(UserError, match=r"option slices=2: the checkpoint was trained with 3"):
        delete(config={**RUN, "slices": 2})
    with pytest.raises(UserError, match=r"seed=0: .* give --set seed=3 --set batch_size=16 --set max_steps=2"):
        delete(config={"precision": "fp32", "retrain_dropped": True})
    with pytest.raises(UserError, match=r"option trainable='head': s3t sets which weights"):
        delete(config={**RUN, "trainable": "head"})
    with pytest.raises(UserError, match=r"4 samples that the stages were trained on are neither"):
        unlearn(str(trained), forget, retain.subset(range(4, len(retain))), method="s3t", config=RUN)
    with pytest.raises(UserError, match="2 samples to retain are to be forgotten too"):
        unlearn(str(trained), forget, samples, method="s3t", config=RUN)
    changed = load_checkpoint(trained)
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    with pytest.raises(UserError, match=r"weights differ from those of its stages"):
        unlearn(changed, forget, retain, method="s3t", config=RUN)


def test_a_training_that_cannot_be_sliced_is_refused(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sequences=4: expected 1 to 3, the slices"):
        learn(samples, tmp_path / "a", sequences=4)
    with pytest.raises(UserError, match="give output_dir"):
        train(tiny_vit(), samples, method="s3t", config=RECIPE)
    with pytest.raises(UserError, match=r"slices=4: .* the model has 2; give at most 3"):
        learn(samples, tmp_path / "a", slices=4)
    of = slice_by_hand(samples)
    with pytest.raises(UserError, match=r"none of its .* samples is in slice 1 of 3"):
        learn(samples.subset(np.flatnonzero(of != 1)), tmp_path / "b")
    with pytest.raises(UserError, match=r"none of its .* samples is in slice 2 of 3"):
        learn(samples.subset(np.flatnonzero(of != 2)), tmp_path / "b", sequences=2)


def test_a_damaged_file_of_stages_is_one_line(trained: Path, tmp_path: Path) -> None:
    whole = (trained / STAGES).read_bytes()
    for number, content in enumerate((b"", whole[: len(whole) // 2], b"x" * 100)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / STAGES).write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged .* take a whole copy"):
            Stages.read(folder)


def test_the_registry_says_that_it_is_exact_and_of_one_process() -> None:
    assert list_methods()["s3t"].exact
    assert "freezes" in list_methods()["s3t"].one_process


# --- the command ---------------------------------------------------------------


def lethe(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_the_command_trains_in_slices(tmp_path: Path) -> None:
    digits = open_source("digits").train
    architecture = save_checkpoint(tiny_vit(), tmp_path / "architecture")
    run = [text for key in ("batch_size=100", "precision=fp32", "max_steps=1") for text in ("--set", key)]
    learn = ["train", "--data", "digits", "--arch", architecture, "--out", tmp_path / "model", "--epochs", 1, *run]
    done = lethe(*learn, "--sliced", "--set", "slices=3", "--set", "rank=2")
    assert done.exit_code == 0, done.exception
    assert not verify_record(tmp_path / "model")
    assert STAGES in json.loads((tmp_path / "model" / "record.json").read_text())["files"]
    assert recorded(tmp_path / "model", "config")["stages"]["served"] == 3  # type: ignore[index]
    of = slices_of(tokens_of(digits, 0), 3)
    (tmp_path / "ids.txt").write_text(digits.ids[int(np.flatnonzero(of == 1)[0])])
    delete = [
        "unlearn",
        "--method",
        "s3t",
        "--checkpoint",
        tmp_path / "model",
        "--data",
        "digits",
        *run,
        "--accept-accuracy",
    ]
    refused = lethe(*delete, "--forget", tmp_path / "ids.txt", "--out", tmp_path / "none")
    assert "--set retrain_dropped=true" in str(refused.exception)
    assert not (tmp_path / "none").exists()
    again = ["train", "--data", "digits", "--arch", tmp_path / "model", "--out", tmp_path / "none", "--sliced"]
    refused = lethe(*again, "--set", "base=given")
    assert "trained on digits; a base must not be trained on" in str(refused.exception)
    done = lethe(*learn, "--overwrite")  # not in slices: the stages are of another model
    assert done.exit_code == 0, done.exception
    assert not (tmp_path / "model" / STAGES).exists()


def test_a_pretrained_base_keeps_all_but_its_head(tmp_path: Path) -> None:
    given = save_checkpoint(tiny_vit(seed=5, num_classes=7), tmp_path / "given")
    model = pretrained(str(given), {}, open_source("digits"))
    before = load_checkpoint(given).state_dict()
    assert model.num_classes == spec_of(model).num_classes == 10
    same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    assert same == set(before) - {"head.weight", "head.bias"}
