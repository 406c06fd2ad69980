"""Training from a checkpoint: the fresh head, the options of fine-tuning, and references of such an original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import invoke as lethe
from toys import few, tiny_vit

import engine
from engine.audit.record import recorded
from engine.audit.record_check import verify_record
from engine.config import read_yaml
from engine.data import Source, open_source
from engine.errors import UserError
from engine.jobs.opening import Opening
from engine.jobs.start import init_model
from engine.jobs.task import Task
from engine.jobs.train import train_job
from engine.jobs.verify import MadeFrom, check_origin, original_of
from engine.methods.common.mixing import mixed
from engine.models.checkpoint import load_checkpoint, save_checkpoint, weights_sha256
from engine.models.spec import describing, spec_of
from engine.run.train_engine import TrainEngine

FORGET = "random:0.1@0"
SHORT: dict[str, Any] = {"epochs": 1.0, "max_steps": 2, "batch_size": 32, "precision": "fp32"}
QUICK = [word for key, value in SHORT.items() if key != "epochs" for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source("digits")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_checkpoint(tiny_vit(seed=5, num_classes=7), tmp_path / "base")


def same_weights(model: torch.nn.Module, other: torch.nn.Module) -> set[str]:
    found = other.state_dict()
    return {key for key, value in model.state_dict().items() if torch.equal(value, found[key])}


def test_the_head_is_fresh_where_classes_differ_and_drawn_from_the_seed(base: Path, digits: Source) -> None:
    given = load_checkpoint(base)
    first, note = init_model(str(base), digits, None, seed=0)
    again, other = (init_model(str(base), digits, None, seed=seed)[0] for seed in (0, 1))
    assert first.num_classes == 10
    assert note["init"] == {
        "checkpoint": str(base),
        "weights_sha256": weights_sha256(given),
        "head": "fresh",
        "trained_on": None,
    }
    body = set(given.state_dict()) - {"head.weight", "head.bias"}
    assert all(torch.equal(first.state_dict()[key], given.state_dict()[key]) for key in body)
    assert weights_sha256(first) == weights_sha256(again)
    assert same_weights(first, other) == body | {"head.bias"}  # biases begin at zero


@pytest.mark.parametrize(("names", "head"), [([], "kept"), (list("0123456789"), "kept"), (list("abcdefghij"), "fresh")])
def test_the_head_is_kept_if_its_classes_are_those_of_the_data(
    names: list[str], head: str, tmp_path: Path, digits: Source
) -> None:
    named = Source("digits", digits.train.subset(range(200)), None, digits.test)
    named.train.class_names = list("0123456789")
    model = describing(tiny_vit(seed=5), names)
    place = save_checkpoint(model, tmp_path / "named")
    found, note = init_model(str(place), named, None, seed=0)
    assert note["init"]["head"] == head
    assert ("head.weight" in same_weights(found, model)) == (head == "kept")
    assert spec_of(found).label_names == list("0123456789")


def test_a_base_without_class_names_is_not_called_compared(tmp_path: Path, digits: Source) -> None:
    data = Source("digits", digits.train.subset(range(200)), None, digits.test)
    data.train.class_names = list("0123456789")
    place = save_checkpoint(describing(tiny_vit(seed=5), []), tmp_path / "base")
    lines: list[str] = []
    opening = Opening(checked=False, notify=lines.append)
    with opening.active():
        model, _ = init_model(str(place), data, None, seed=0)
        opening.prepare_training(data, None, model)
    assert lines[0] == "head: kept; the base gives no class names, so its labels are taken for those of digits"
    assert lines[-1].endswith("; in the data's order")
    assert not any("order is that of" in line for line in lines)


@pytest.mark.parametrize(("order", "head"), [("auto", "kept"), ("data", "fresh")])
def test_the_same_classes_in_another_order_keep_the_head_and_are_matched_by_name(
    order: Any, head: str, tmp_path: Path, digits: Source
) -> None:
    data = Source("digits", digits.train.subset(range(200)), digits.test.subset(range(20)), digits.test)
    for samples in (data.train, data.validation, data.test):
        assert samples is not None
        samples.class_names = [f"Digit {i}" for i in range(10)]
    task = Task.of_ids(data, data.train.ids[:5], spec="five")
    base = describing(tiny_vit(seed=5), [f"digit_{i}" for i in reversed(range(10))])
    place = save_checkpoint(base, tmp_path / "base")
    lines: list[str] = []
    opening = Opening(label_order=order, checked=False, notify=lines.append)
    with opening.active():
        model, note = init_model(str(place), data, task, seed=0)
        trained, left, _ = opening.prepare_training(data, task, model)
    assert note["init"]["head"] == head
    assert any(line.startswith(f"head: {head}") for line in lines)
    assert left is not None
    if head == "fresh":
        assert spec_of(model).label_names == data.train.class_names == trained.train.class_names
        assert (trained.train.labels == data.train.labels).all()
        return
    assert "head.weight" in same_weights(model, base)
    assert spec_of(model).label_names == [f"digit_{i}" for i in reversed(range(10))]
    assert (trained.train.labels == 9 - data.train.labels).all()
    assert (left.retain.labels == 9 - task.retain.labels).all()
    assert trained.test.class_names == spec_of(model).label_names


def test_a_training_starts_from_the_given_weights_and_records_them(base: Path, tmp_path: Path) -> None:
    words = ["train", "--init", base, "--data", "digits", "--forget", FORGET, *QUICK, "--epochs", 1]
    code, output = lethe(*words, "--set", "lr=1e-9", "--set", "weight_decay=0", "--out", tmp_path / "run")
    assert code == 0, output
    model, given = load_checkpoint(tmp_path / "run"), load_checkpoint(base)
    assert torch.allclose(model.blocks[0].mlp.fc1.weight, given.blocks[0].mlp.fc1.weight, atol=1e-6)
    for config in (read_yaml(tmp_path / "run" / "config.yaml"), recorded(tmp_path / "run", "config")):
        assert config is not None
        assert config["init"]["weights_sha256"] == weights_sha256(given)
        assert (config["base"], config["init"]["head"]) == ("given", "fresh")
    assert not verify_record(tmp_path / "run")


def test_a_file_is_a_base_too_and_needs_no_head(tmp_path: Path, digits: Source) -> None:
    weights = {f"module.{k}": v for k, v in tiny_vit(seed=6).state_dict().items() if "head" not in k}
    torch.save({"teacher": weights}, tmp_path / "dino.pth")
    sizes = [word for key in ("embed_dim=32", "depth=2", "num_heads=2") for word in ("--model-arg", key)]
    words = ["train", "--init", tmp_path / "dino.pth", "--arch", "vit_tiny_patch16_224", *sizes, "--data", "digits"]
    code, output = lethe(*words, *QUICK, "--epochs", 1, "--out", tmp_path / "run")
    assert code == 0, output
    config = read_yaml(tmp_path / "run" / "config.yaml")
    assert config["init"]["checkpoint_import"]["stripped"] == ["module."]
    assert "lethe_import" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_options_that_contradict_each_other(base: Path, tmp_path: Path) -> None:
    data = ["--data", "digits", "--out", tmp_path / "none"]
    for words, message in (
        ([], "give --arch NAME (fresh weights) or --init CHECKPOINT"),
        (["--init", base, "--set", "base=fresh"], "contradicts --init"),
        (["--arch", base, "--set", "base=given"], "give it by --init"),
        (["--arch", base, "--weights", "ema"], "for a file that is given by --init"),
        (["--init", base, "--arch", "vit_tiny_patch16_224"], "already defines the model"),
        (["--init", tmp_path / "nowhere.pth"], "is not a folder and not a file"),
        (["--init", base, "--set", "layer_decay=1.5"], "expected in (0, 1]"),
        (["--init", base, "--set", "layer_decay=0.5", "--set", "trainable=lora:2"], "layer_decay is for whole weights"),
        (["--init", base, "--set", "mixup=0.2", "--set", "retain_pruning=seta"], "leave mixup or retain_pruning out"),
        (["--init", base, "--set", "label_smoothing=1"], "expected in [0, 1)"),
    ):
        code, output = lethe("train", *words, *data)
        assert code == 2, words
        assert message in output, output
        assert not (tmp_path / "none").exists()


def test_a_retrain_never_starts_from_the_original(tmp_path: Path, digits: Source) -> None:
    with pytest.raises(UserError, match=r"base=given would start from the model trained on.*lethe train --init"):
        engine.unlearn(
            tiny_vit(), few(digits.train, 10), few(digits.train, 40), method="retrain", config={"base": "given"}
        )


def test_a_base_that_saw_the_samples_is_refused(tmp_path: Path, digits: Source) -> None:
    task, other = Task.open("digits", FORGET), Task.open("digits", "random:0.1@1")

    def trained(name: str, left_out: Task | None) -> str:
        train_job(digits, tiny_vit(), tmp_path / name, task=left_out, config=SHORT)
        return str(tmp_path / name)

    everything = trained("all", None)
    with pytest.raises(
        UserError, match=r"by its record.json it was trained on all samples.*base that was not trained on"
    ):
        init_model(everything, digits, task, 0)
    with pytest.raises(UserError, match="that are to be left out"):
        init_model(trained("other", other), digits, task, 0)
    with pytest.raises(UserError, match="trained on all samples"):
        init_model(f"{everything}/model.safetensors", digits, task, 0)
    assert init_model(trained("same", task), digits, task, 0)[1]["init"]["trained_on"] == task.retain.fingerprint()
    assert init_model(everything, digits, None, 0)[1]["init"]["trained_on"] == digits.train.fingerprint()


def test_references_by_init_are_taken_by_their_records(tmp_path: Path, digits: Source, base: Path) -> None:
    task = Task.open("digits", FORGET)

    def tuned(name: str, left_out: Task | None, start: Path = base, seed: int = 0) -> Path:
        model, notes = init_model(str(start), digits, left_out, seed)
        config = {**SHORT, "base": "given", "seed": seed}
        train_job(digits, model, tmp_path / name, task=left_out, notes=notes, config=config)
        return tmp_path / name

    original = tuned("original", None)
    made = original_of(str(original), load_checkpoint(original))
    assert made.init_sha256 == weights_sha256(load_checkpoint(base))
    reference = tuned("reference", task, seed=1)
    assert check_origin(reference, task, made)
    elsewhere = save_checkpoint(tiny_vit(seed=9, num_classes=7), tmp_path / "elsewhere")
    assert not check_origin(tuned("of another base", task, elsewhere), task, made), "as one without a record"
    assert not check_origin(reference, task, MadeFrom("0" * 64)), "nothing says what the original was made from"
    copy = save_checkpoint(load_checkpoint(original), tmp_path / "copy")  # without the record
    with pytest.raises(UserError, match=r"which saw the samples to forget.*lethe train --init BASE --forget FILE"):
        check_origin(tuned("of the original", task, copy), task, made)


def test_a_reference_that_was_fine_tuned_by_unlearn_is_no_worse_than_without_its_record(
    tmp_path: Path, digits: Source
) -> None:
    task, short = Task.open("digits", FORGET), {"max_steps": 1, "precision": "fp32"}
    original, base = tiny_vit(seed=1), save_checkpoint(tiny_vit(seed=2), tmp_path / "base")
    made = MadeFrom(weights_sha256(original))
    from engine.jobs.unlearn import run_job

    for name, start in (("base", base), ("original", save_checkpoint(original, tmp_path / "original"))):
        run_job(task, str(start), tmp_path / f"from {name}", method="finetune", config=short)
    assert not check_origin(tmp_path / "from base", task, made)
    with pytest.raises(UserError, match="it was made by finetune, not by a retrain"):
        check_origin(tmp_path / "from original", task, made)


def test_layer_decay_scales_the_steps_of_each_layer(digits: Source) -> None:
    samples, before = few(digits.train, 64), tiny_vit(seed=3)
    config = {**SHORT, "base": "given", "max_steps": 1, "weight_decay": 0.0, "grad_clip": 0.0, "augment": "none"}
    moved = {}
    for decay in (1.0, 0.1):
        model = engine.train(before, samples, config={**config, "layer_decay": decay}).model
        changes = {
            key: float((value - before.state_dict()[key]).abs().max()) for key, value in model.state_dict().items()
        }
        moved[decay] = [changes[key] for key in ("head.weight", "blocks.1.mlp.fc2.weight", "blocks.0.mlp.fc2.weight")]
    found = [now / full for now, full in zip(moved[0.1], moved[1.0], strict=True)]
    assert np.allclose(found, [1.0, 0.1, 0.01], rtol=1e-2)


def test_without_layer_decay_there_is_one_group_of_weights() -> None:
    from engine.config import RunConfig

    model = tiny_vit()
    assert [len(group["params"]) for group in TrainEngine(model, RunConfig(), {}).optimizer.param_groups] == [
        len(list(model.parameters()))
    ]


def test_frozen_blocks_end_as_the_bits_that_they_were(digits: Source) -> None:
    before = tiny_vit(seed=3)
    config = {**SHORT, "base": "given", "trainable": "last:1"}
    after = engine.train(before, few(digits.train, 64), config=config).model
    frozen = {key for key in before.state_dict() if not key.startswith(("blocks.1.", "norm.", "head."))}
    assert same_weights(before, after) >= frozen
    assert "head.weight" not in same_weights(before, after)


@pytest.mark.parametrize(
    "options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}, {"label_smoothing": 0.1}]
)
@pytest.mark.slow
def test_mixed_trainings_resume_with_the_same_bits(options: dict[str, float], tmp_path: Path, digits: Source) -> None:
    samples, config = few(digits.train, 96), {**SHORT, **options, "max_steps": 6, "epochs": 2.0}

    def stop(phase: str, step: int, *rest: Any) -> None:
        if step > 3:
            raise KeyboardInterrupt

    whole = engine.train(tiny_vit(), samples, config=config)
    with pytest.raises(KeyboardInterrupt):
        engine.train(tiny_vit(), samples, config=config, output_dir=tmp_path / "run", progress=stop)
    resumed = engine.train(tiny_vit(), samples, config=config, output_dir=tmp_path / "run", resume=True)
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
    plain = engine.train(tiny_vit(), samples, config={**config, **dict.fromkeys(options, 0.0)})
    assert weights_sha256(plain.model) != weights_sha256(whole.model)


def test_mixed_images_and_targets_are_shares_of_two() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(5, 1, 8, 8), torch.arange(5)
    eye = torch.eye(10)[:5]
    found, targets = mixed(images, labels, 10, mixup=1.0, cutmix=0.0, smoothing=0.0)
    share = float(targets[0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(targets, share * eye + (1 - share) * eye.flip(0))
    torch.testing.assert_close(found, share * images + (1 - share) * images.flip(0))
    for _ in range(20):
        found, targets = mixed(images, labels, 10, mixup=0.0, cutmix=1.0, smoothing=0.0)
        own = (found[0] == images[0]).float().mean()
        assert float(targets[0, 0]) == pytest.approx(float(own), abs=1e-6)
        assert bool(((found == images) | (found == images.flip(0))).all())
    same, targets = mixed(images, labels, 10, mixup=0.0, cutmix=0.0, smoothing=0.1)
    assert same is images
    torch.testing.assert_close(targets, 0.9 * eye + 0.01)


@pytest.mark.slow
def test_a_training_is_never_called_a_collapse(digits: Source, caplog: pytest.LogCaptureFixture) -> None:
    good = engine.train(tiny_vit(), few(digits.train, 300), config={**SHORT, "epochs": 12.0, "max_steps": None}).model
    for options in ({"base": "fresh"}, {"base": "given", "lr": 0.5}):
        result = engine.train(good, few(digits.train, 300), config={**SHORT, **options})
        assert result.watched["before"] - result.watched["after"] > 0.1
        assert (result.collapsed, result.events) == (False, [])
    forget, retain = digits.train.subset(range(30)), digits.train.subset(range(30, 300))
    assert not engine.unlearn(good, forget, retain, method="retrain", config=SHORT).collapsed
    assert "collapse" not in caplog.text


@pytest.mark.slow
def test_a_fine_tuned_model_is_unlearned_and_verified(tmp_path: Path) -> None:
    """The whole way: a base of other classes, original and two references from it, unlearn, verify."""
    base = save_checkpoint(tiny_vit(seed=5, num_classes=7), tmp_path / "base")
    data, forget = ["--data", "digits"], ["--forget", FORGET]
    train = ["train", "--init", base, *data, "--epochs", 12, "--set", "precision=fp32", "--set", "layer_decay=0.9"]
    for name, more in (
        ("original", ["--seed", 0]),
        ("reference1", [*forget, "--seed", 1]),
        ("reference2", [*forget, "--seed", 2]),
    ):
        code, output = lethe(*train, *more, "--out", tmp_path / name)
        assert code == 0, output
    references = [word for i in (1, 2) for word in ("--reference", tmp_path / f"reference{i}")]
    unlearn = ["unlearn", "--checkpoint", tmp_path / "original", *data, *forget, *references, "--out", tmp_path / "u"]
    code, output = lethe(*unlearn, "--method", "finetune", "--set", "retain_epochs=1")
    assert code == 0, output
    verify = ["verify", "--checkpoint", tmp_path / "u", "--original", tmp_path / "original", *data, *forget]
    code, output = lethe(*verify, *references, "--json", tmp_path / "verdict.json")
    assert code in (0, 1, 3), output
    assert json.loads((tmp_path / "verdict.json").read_text())["references"] == 2
