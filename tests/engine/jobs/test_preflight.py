"""The look before the leap: a model that is fed wrongly is refused before anything is written."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import Lethe
from fed_wrongly import NAMES, STATISTICS, trained, with_exchanged_head, with_noise, without_statistics, write_folder
from toys import tiny_vit

from engine import unlearn
from engine.audit.record import recorded
from engine.core.plausibility import (
    can_differ,
    chance_of,
    is_clearly_better,
    is_far_below,
    is_near_chance,
    permutation,
)
from engine.data import open_source
from engine.errors import UserError
from engine.jobs import preflight
from engine.jobs.opening import read_accuracy
from engine.models.checkpoint import load_checkpoint, save_checkpoint

SHAPE = ("img_size=8", "patch_size=4", "embed_dim=48", "depth=2")
QUICK = [
    "--method",
    "finetune",
    "--set",
    "max_steps=1",
    "--set",
    "batch_size=20",
    "--set",
    "precision=fp32",
    "--set",
    "lr=1e-6",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def good() -> torch.nn.Module:
    return trained()


def arguments(command: str, checkpoint: Path, data: Path, *more: object) -> list[object]:
    return [command, "--checkpoint", checkpoint, "--data", f"imagefolder:{data}", "--forget", "random:0.1@0", *more]


def refused(result: tuple[int, str, str]) -> str:
    """The one line of an error."""
    code, _, err = result
    lines = [line for line in err.strip().splitlines() if line.strip()]
    assert (code, len(lines)) == (2, 1), err
    return lines[0]


# --- each kind of wrong feeding is stopped ----------------------------------------------------------------------------


def test_wrong_mean_and_std_are_refused_and_the_right_ones_named(
    lethe: Lethe, good: torch.nn.Module, data: Path, tmp_path: Path
) -> None:
    wrong = without_statistics(save_checkpoint(good, tmp_path / "wrong"))
    line = refused(lethe(*arguments("unlearn", wrong, data, "--out", tmp_path / "run"), *QUICK))
    assert "--mean unit --std unit would give 100.0%" in line
    assert "now 8 x 8 pixels, mean 0.5, std 0.5" in line
    assert "--accept-accuracy" in line
    assert not (tmp_path / "run").exists()


def test_the_named_mean_and_std_are_taken_and_written_into_the_checkpoint(
    lethe: Lethe, good: torch.nn.Module, data: Path, tmp_path: Path
) -> None:
    wrong = without_statistics(save_checkpoint(good, tmp_path / "wrong"))
    statistics = ["--mean", "unit", "--std", "unit"]
    code, out, err = lethe(*arguments("unlearn", wrong, data, "--out", tmp_path / "run"), *QUICK, *statistics)
    assert code == 0, err
    assert (
        "preprocessing: 8 x 8 pixels, mean 0, std 1, crop 0.9 (not of images of 8 x 8; --crop-pct 0.9 crops them too), "
        in out
    )
    assert "bicubic (mean, std as given;" in out
    assert "accuracy of the untouched model: 100.0% of 400 retained samples (chance " in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["std"]) == ([0.0] * 3, [1.0] * 3)
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["preprocessing"]
    assert (kept["mean"], kept["std"], kept["input_size"]) == ([0.0] * 3, [1.0] * 3, [3, 8, 8])
    assert recorded(tmp_path / "run", "config")["preprocessing"] == kept
    assert recorded(tmp_path / "run", "request")["untouched_model"]["accuracy"] == 1.0
    code, out, _ = lethe(*arguments("evaluate", tmp_path / "run", data, "--set", "precision=fp32"))
    assert (code, "mean 0, std 1" in out) == (0, True)


def test_swapped_labels_are_refused_and_shown(lethe: Lethe, good: torch.nn.Module, data: Path, tmp_path: Path) -> None:
    order = [0, 1, 2, 7, 4, 5, 6, 3, 8, 9]
    swapped = save_checkpoint(with_exchanged_head(copy.deepcopy(good), order), tmp_path / "swapped")
    line = refused(lethe(*arguments("unlearn", swapped, data, "--out", tmp_path / "run"), *QUICK))
    assert (
        "labels are probably permuted: 'class d' is predicted as 'class h', 'class h' is predicted as 'class d'" in line
    )
    assert "with these labels exchanged it would be 100.0%" in line
    assert not (tmp_path / "run").exists()


def test_reversed_labels_are_near_chance(lethe: Lethe, good: torch.nn.Module, data: Path, tmp_path: Path) -> None:
    wrong = save_checkpoint(with_exchanged_head(copy.deepcopy(good), list(range(9, -1, -1))), tmp_path / "reversed")
    line = refused(lethe(*arguments("evaluate", wrong, data)))
    assert "is 0.0%, near chance (10." in line
    assert "'class a' is predicted as 'class j', 'class b' is predicted as 'class i'" in line
    assert "and 7 more" in line


def test_raw_instead_of_averaged_weights_are_far_below_what_is_expected(
    lethe: Lethe, good: torch.nn.Module, data: Path, tmp_path: Path
) -> None:
    raw = save_checkpoint(with_noise(copy.deepcopy(good)), tmp_path / "raw")
    line = refused(
        lethe(*arguments("unlearn", raw, data, "--out", tmp_path / "run"), *QUICK, "--expect-accuracy", "99%")
    )
    assert "far below the 99.0% of --expect-accuracy" in line
    assert "--weights" in line
    assert not (tmp_path / "run").exists()


def test_the_other_weights_of_the_checkpoint_are_named(
    lethe: Lethe, good: torch.nn.Module, data: Path, tmp_path: Path
) -> None:
    raw = with_noise(copy.deepcopy(good))
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": good.state_dict()}, tmp_path / "both.pth")
    built = ["--arch", "vit_tiny_patch16_224", "--mean", "unit", "--std", "unit"]
    built += [text for each in (*SHAPE, "num_heads=2") for text in ("--model-arg", each)]
    given = [*arguments("unlearn", tmp_path / "both.pth", data, "--out", tmp_path / "run"), *QUICK, *built]
    line = refused(lethe(*given, "--weights", "raw"))
    assert "--weights ema would give 100.0%" in line
    assert not (tmp_path / "run").exists()
    code, out, err = lethe(*given, "--weights", "ema")
    assert code == 0, err
    assert "accuracy of the untouched model: 100.0%" in out


def test_what_the_run_folder_says_is_expected_on_the_same_data_alone(
    lethe: Lethe, good: torch.nn.Module, data: Path, tmp_path: Path
) -> None:
    weak = save_checkpoint(with_noise(copy.deepcopy(good)), tmp_path / "weak")
    (weak / "metrics.json").write_text(json.dumps({"accuracy": {"retain": 0.999}}))
    (weak / "config.yaml").write_text(f"data: imagefolder:{data}\n")
    line = refused(lethe(*arguments("evaluate", weak, data)))
    assert "far below the 99.9% of" in line
    assert "metrics.json" in line
    (weak / "config.yaml").write_text("data: imagefolder:elsewhere\n")
    code, _, err = lethe(*arguments("evaluate", weak, data, "--set", "precision=fp32"))
    assert code == 0, err


@pytest.mark.parametrize("command", ["unlearn", "evaluate", "verify", "tune", "forget-set", "request"])
def test_every_command_that_opens_a_trained_model_refuses_an_untrained_one(
    lethe: Lethe, data: Path, tmp_path: Path, command: str
) -> None:
    untrained = save_checkpoint(tiny_vit(in_chans=3), tmp_path / "untrained")
    out = tmp_path / "out"
    given = {
        "unlearn": [*arguments("unlearn", untrained, data), "--out", out],
        "evaluate": arguments("evaluate", untrained, data, "--json", out),
        "verify": arguments("verify", untrained, data, "--original", untrained, "--json", out),
        "tune": [*arguments("tune", untrained, data), "--out", out],
        "forget-set": [
            "forget-set", "--strategy", "lowest-loss", "--share", "0.1", "--checkpoint", untrained, "--data",
            f"imagefolder:{data}", "--out", out / "set.csv",
        ],
        "request": [
            "request", "init", "--store", out, "--checkpoint", untrained, "--data", f"imagefolder:{data}",
        ],
    }[command]  # fmt: skip
    assert "near chance" in refused(lethe(*given))
    assert not out.exists()


def test_an_accepted_accuracy_is_said_and_recorded(lethe: Lethe, data: Path, tmp_path: Path) -> None:
    untrained = save_checkpoint(tiny_vit(in_chans=3), tmp_path / "untrained")
    code, out, err = lethe(
        *arguments("unlearn", untrained, data, "--out", tmp_path / "run"), *QUICK, "--accept-accuracy"
    )
    assert code == 0, err
    assert "warning: " in out
    assert "near chance" in out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["accept_accuracy"] is True


def test_a_resumed_run_has_the_same_configuration(lethe: Lethe, good: torch.nn.Module, data: Path, tmp_path: Path):
    model = save_checkpoint(good, tmp_path / "model")
    given = arguments("unlearn", model, data, "--out", tmp_path / "run")
    assert lethe(*given, *QUICK)[0] == 0
    code, _, err = lethe(*given, *QUICK, "--resume")
    assert (code, "nothing to resume" in err) == (2, True)  # not: another configuration


def test_a_reference_with_another_preprocessing_is_refused_unless_it_is_accepted(
    lethe: Lethe, good: torch.nn.Module, data: Path, tmp_path: Path
) -> None:
    model = save_checkpoint(good, tmp_path / "model")
    other = without_statistics(save_checkpoint(with_noise(copy.deepcopy(good), 0.01), tmp_path / "other"))
    given = arguments("evaluate", model, data, "--reference", other, "--set", "precision=fp32")
    line = refused(lethe(*given))
    assert f"--reference {other} has its own preprocessing (8 x 8 pixels, mean 0.5" in line
    assert "one of the two is probably wrong" in line
    code, out, err = lethe(*given, "--accept-accuracy")
    assert code == 0, err
    assert "warning: --reference" in out
    code, out, err = lethe(*given, "--mean", "unit", "--std", "unit")  # holds for all models
    assert code == 0, err


def test_unlearning_in_memory_warns_of_chance(
    good: torch.nn.Module, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(f"imagefolder:{data}")
    forget, retain = source.train.subset(range(50)), source.train.subset(range(50, 600))
    config = {"max_steps": 1, "batch_size": 20, "precision": "fp32", "device": "cpu"}
    unlearn(good, forget, retain, method="finetune", config=config)
    assert "near chance" not in caplog.text
    unlearn(tiny_vit(in_chans=3), forget, retain, method="finetune", config=config)
    assert "near chance" in caplog.text


def test_unlearning_in_memory_stops_far_below_the_expected_accuracy(good: torch.nn.Module, data: Path) -> None:
    source = open_source(f"imagefolder:{data}")
    forget, retain = source.train.subset(range(50)), source.train.subset(range(50, 600))
    config = {"max_steps": 1, "batch_size": 20, "precision": "fp32", "device": "cpu", "expect_accuracy": 0.9}
    assert unlearn(good, forget, retain, method="finetune", config=config).history
    wrong = copy.deepcopy(good)
    wrong.pretrained_cfg = {**wrong.pretrained_cfg, "mean": (0.9,) * 3, "std": (0.1,) * 3}
    with pytest.raises(UserError, match=r"watched samples is .*%, far below the 90.0% of option expect_accuracy"):
        unlearn(wrong, forget, retain, method="finetune", config=config)
    with pytest.raises(UserError, match=r"expect_accuracy"):
        unlearn(good, forget, retain, method="finetune", config={**config, "expect_accuracy": 90})


# --- the tests behind it ----------------------------------------------------------------------------------------------


def test_chance_and_what_so_few_samples_can_tell() -> None:
    labels = np.repeat(np.arange(10), 40)
    assert chance_of(labels) == 0.1
    assert is_near_chance(40, labels)
    assert is_near_chance(59, labels)  # one in a thousand by chance
    assert is_near_chance(75, labels)  # surely not by chance, but less than a tenth of the way to 1
    assert not is_near_chance(76, labels)
    two = np.repeat([0, 1], 200)
    assert is_near_chance(219, two)
    assert not is_near_chance(232, two)
    assert not can_differ(np.array([0, 1, 2]))
    assert not is_near_chance(0, np.array([0, 1, 2]))
    thousand = np.arange(400)
    assert is_near_chance(20, thousand)  # 5% of 1000 classes: far from chance, and misread all the same
    assert not is_near_chance(41, thousand)


def test_far_below_needs_five_points_and_more_than_the_sample_explains() -> None:
    assert is_far_below(np.arange(400) < 340, 0.92)
    assert not is_far_below(np.arange(400) < 352, 0.92)  # 4 points
    assert not is_far_below(np.arange(20) < 17, 0.92)  # 7 points, of 20 samples
    assert not is_far_below(np.arange(400) < 390, 0.92)


def test_clearly_better_is_paired() -> None:
    own = np.arange(400) < 300
    assert is_clearly_better(np.arange(400) < 320, own)
    assert not is_clearly_better(np.arange(400) < 319, own)
    assert not is_clearly_better(np.roll(np.arange(400) < 320, 200), own)  # as many more, but others
    assert not is_clearly_better(own, own)


def test_a_permutation_is_read_from_majorities_alone() -> None:
    labels = np.repeat(np.arange(4), 50)
    found = permutation(np.array([1, 0, 2, 3])[labels], labels, 4)
    assert found is not None
    assert (found.moved, found.correct.mean()) == ({0: 1, 1: 0}, 1.0)
    assert permutation(labels, labels, 4) is None
    rng = np.random.default_rng(0)
    assert permutation(rng.integers(0, 4, 200), labels, 4) is None
    assert permutation(np.zeros(200, dtype=np.int64), labels[::-1], 4) is None  # a constant answer
    few = np.repeat(np.arange(50), 3)
    assert permutation((few + 1) % 50, few, 50) is None  # three samples a class say too little


@pytest.mark.parametrize(("text", "share"), [("0.92", 0.92), ("92", 0.92), ("92%", 0.92), ("1", 1.0), ("0.5%", 0.005)])
def test_expected_accuracy_is_a_share_or_percent(text: str, share: float) -> None:
    assert read_accuracy(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "-1", "101", "high", "120%"])
def test_an_expected_accuracy_that_is_none(lethe: Lethe, tmp_path: Path, text: str) -> None:
    line = refused(lethe(*arguments("evaluate", tmp_path, tmp_path), f"--expect-accuracy={text}"))
    assert f"--expect-accuracy {text}" in line


def test_the_sample_keeps_the_shares_of_classes(data: Path) -> None:
    train = open_source(f"imagefolder:{data}").train
    chosen = preflight.stratified(train, 200)
    shares = [np.bincount(each.labels, minlength=10) / len(each) for each in (train, chosen)]
    assert np.abs(shares[0] - shares[1]).max() < 0.01
    assert list(preflight.stratified(train, 200).ids) == list(chosen.ids)
    assert preflight.stratified(train, 600) is train


def test_the_models_are_left_as_they_were(good: torch.nn.Module, data: Path, tmp_path: Path) -> None:
    model = load_checkpoint(save_checkpoint(good, tmp_path / "model"))
    before = copy.deepcopy(model.state_dict())
    looked = preflight.measure_accuracy(model, open_source(f"imagefolder:{data}").train, "model", {"precision": "fp32"})
    assert looked is not None
    assert (looked.correct.mean(), looked.others, looked.class_names) == (1.0, {}, NAMES)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not model.training
    assert tuple(model.pretrained_cfg["mean"]) == STATISTICS["mean"]
