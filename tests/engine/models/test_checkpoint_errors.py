"""Errors of checkpoint files name what was found and the argument that helps; `lethe import` and the options."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ARCH, saved
from command_line import invoke as lethe
from safetensors.torch import load_file
from toys import tiny_vit

from engine.cli.options import checkpoint_sources
from engine.errors import UserError
from engine.models.checkpoint import imported, load_checkpoint, save_checkpoint, weights_sha256
from engine.models.preprocessing import preprocessing_of
from engine.models.spec import ModelSpec, spec_of

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 2}
DIGITS = ["--data", "digits", "--forget", "random:0.1@0"]
UNTRAINED = ["--accept-accuracy"]  # weights at random are near chance


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        ({}, {"img_size": 16}, r"--model-arg img_size=8"),
        ({"img_size": (4, 12), "in_chans": 3}, {}, r"13 positions.*--model-arg img_size=\[HEIGHT,WIDTH\]"),
        ({"depth": 3}, {}, r"--model-arg depth=3"),
        ({"embed_dim": 48}, {}, r"--model-arg embed_dim=48 --model-arg num_heads=N"),
        ({"class_token": False, "global_pool": "avg"}, {}, r"--model-arg class_token=False"),
        ({"global_pool": "avg"}, {}, r"--model-arg global_pool=avg"),
        ({"reg_tokens": 4}, {}, r"--model-arg reg_tokens=4"),
        ({"qk_norm": True}, {}, r"--model-arg qk_norm=True"),
        ({"init_values": 0.1}, {}, r"--model-arg init_values="),
    ],
)
def test_weights_that_do_not_fit_name_the_model_arg(
    made: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, tiny_vit(**made).state_dict())
    with pytest.raises(UserError, match=rf"does not fit {ARCH}.*{message}") as error:
        load_checkpoint(path, architecture=ARCH, model_args={**SIZES, **given})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["student.backbone.", "net.0.", "towers.image."])
def test_weights_below_a_prefix_that_is_not_known_name_it(prefix: str, tmp_path: Path) -> None:
    weights = {prefix + key: value for key, value in tiny_vit().state_dict().items() if not key.startswith("head.")}
    path = saved(tmp_path, {**weights, "student.projector.weight": torch.ones(4, 32), "queue": torch.ones(9)})
    with pytest.raises(UserError, match=rf"are below '{re.escape(prefix)}': save the state_dict\(\) of that module"):
        load_checkpoint(path, architecture=ARCH, model_args=SIZES)


def test_weights_of_another_architecture_are_called_so(tmp_path: Path) -> None:
    resnet = ModelSpec(architecture="resnet10t", num_classes=10, model_args={}, pretrained_cfg={}).build(seed=0)
    path = saved(tmp_path, resnet.state_dict())
    with pytest.raises(UserError, match=r"no weight in it has a name of this architecture; give .* \(--arch\)"):
        load_checkpoint(path, architecture=ARCH, model_args=SIZES)


def test_an_architecture_is_asked_for_by_the_command_that_helps(tmp_path: Path) -> None:
    weights = tiny_vit().state_dict()
    path = saved(tmp_path, {"state_dict": weights})
    with pytest.raises(UserError, match=rf"no config\.json.*--arch .*lethe import {path} --arch NAME --out"):
        load_checkpoint(path)
    with pytest.raises(UserError, match=r"no config\.json"):
        load_checkpoint(tmp_path)
    path = saved(tmp_path, {"state_dict": weights, "arch": "my_own_vit"})
    with pytest.raises(UserError, match="arch = 'my_own_vit', which timm does not have"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="did you mean 'vit_tiny_patch16_224'"):
        load_checkpoint(path, architecture="vit_tinny_patch16_224")
    names = ("class_token", "conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight", "heads.head.bias")
    path = saved(tmp_path, {name: torch.zeros(8) for name in names})
    with pytest.raises(UserError, match="torchvision"):
        load_checkpoint(path, architecture=ARCH)


def test_what_is_not_of_the_model_is_named(tmp_path: Path) -> None:
    weights = tiny_vit().state_dict()
    without = {key: value for key, value in weights.items() if not key.startswith("head.")}
    with pytest.raises(UserError, match=r"extra\.weight is not in the model"):
        load_checkpoint(
            saved(tmp_path, {**weights, "extra.weight": torch.zeros(2)}), architecture=ARCH, model_args=SIZES
        )
    with pytest.raises(UserError, match=r"no classifier.*lethe train --init"):
        load_checkpoint(saved(tmp_path, without), architecture=ARCH, model_args=SIZES)
    assert (
        spec_of(load_checkpoint(tmp_path / "x.pth", architecture=ARCH, model_args=SIZES, headless=True)).num_classes
        == 0
    )
    deep_head = {f"backbone.{key}": value for key, value in without.items()}
    deep_head |= {"fc.0.weight": torch.zeros(8, 32), "fc.2.weight": torch.zeros(10, 8)}
    with pytest.raises(UserError, match=r"fc\.0\.weight"):
        load_checkpoint(saved(tmp_path, deep_head), architecture=ARCH, model_args=SIZES)
    own_head_too = {f"backbone.{key}": value for key, value in weights.items()} | {
        "head.weight": torch.zeros(3, 32),
        "head.bias": torch.zeros(3),
    }
    with pytest.raises(UserError, match="does not fit"):
        load_checkpoint(saved(tmp_path, own_head_too), architecture=ARCH, model_args=SIZES)
    poisoned = {**weights, "head.bias": torch.full((10,), float("inf"))}
    with pytest.raises(UserError, match=r"head\.bias holds values that are not finite"):
        load_checkpoint(saved(tmp_path, {"model": poisoned}), architecture=ARCH, model_args=SIZES)


def test_a_folder_that_says_how_it_is_built_takes_no_arguments(checkpoint: Path) -> None:
    for given in ({"architecture": ARCH}, {"model_args": {"img_size": 8}}):
        with pytest.raises(UserError, match="already defines the model"):
            load_checkpoint(checkpoint, **given)
    with pytest.raises(UserError, match="has no ema weights"):
        load_checkpoint(checkpoint, weights="ema")
    with pytest.raises(UserError, match="one kind of weights"):
        load_checkpoint("timm:resnet18?weights=raw")


@pytest.mark.parametrize(
    "names",
    [
        {"class_to_idx": {"one": 1, "zero": 0, "two": 2}},
        {"classes": ["zero", "one", "two"]},
        {"hyper_parameters": {"id2label": {0: "zero", 1: "one", 2: "two"}}},
        {"args": {"class_names": ["zero", "one", "two"]}},
    ],
)
def test_class_names_in_a_file_are_kept(names: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": tiny_vit(num_classes=3).state_dict(), **names})
    model = load_checkpoint(path, architecture=ARCH, model_args=SIZES)
    assert spec_of(model).label_names == ["zero", "one", "two"]
    save_checkpoint(model, tmp_path / "written")
    assert spec_of(load_checkpoint(tmp_path / "written")).label_names == ["zero", "one", "two"]


def test_class_names_of_another_number_are_not_taken(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": tiny_vit(num_classes=3).state_dict(), "classes": ["a", "b"]})
    model = load_checkpoint(path, architecture=ARCH, model_args=SIZES)
    assert spec_of(model).label_names == []
    assert imported(model)["label_names"] == "2 names for 3 classes, ignored"


def test_what_a_user_wrote_into_config_json_survives(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"label_names": list("abcdefghij"), "label_descriptions": {"a": "first"}, "my_note": {"x": [1, None]}}
    config["pretrained_cfg"] |= {"mean": [0.2], "fixed_input_size": True, "site": {"name": "lab"}, "crop_pct": 0.9}
    (checkpoint / "config.json").write_text(json.dumps(config))
    save_checkpoint(load_checkpoint(checkpoint), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config


def test_import_writes_a_folder_of_equal_logits(tmp_path: Path) -> None:
    model, raw = tiny_vit(seed=4, num_classes=3), tiny_vit(seed=5, num_classes=3)
    path = saved(tmp_path, {"state_dict": raw.state_dict(), "state_dict_ema": model.state_dict()}, "best.pth.tar")
    (tmp_path / "names.json").write_text(json.dumps({"cat": 0, "dog": 2, "cow": 1}))
    args = [word for key, value in SIZES.items() for word in ("--model-arg", f"{key}={value}")]
    words = ["import", path, "--arch", ARCH, *args, "--label-names", tmp_path / "names.json", "--json", tmp_path / "j"]
    code, output = lethe(*words, "--out", tmp_path / "c")
    assert code == 0, output
    images = torch.randn(4, 1, 8, 8)
    opened = load_checkpoint(tmp_path / "c")
    assert torch.equal(opened(images), model(images))
    assert spec_of(opened).label_names == ["cat", "cow", "dog"]
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["lethe_import"]["weights"] == "ema"
    assert config["lethe_import"]["container"] == "state_dict_ema"
    assert json.loads((tmp_path / "j").read_text())["import"] == config["lethe_import"]
    assert lethe(*words, "--out", tmp_path / "raw", "--weights", "raw")[0] == 0
    assert weights_sha256(load_checkpoint(tmp_path / "raw")) == weights_sha256(raw)


def test_import_keeps_the_preprocessing_that_it_is_given(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny_vit().state_dict())
    args = [word for key, value in SIZES.items() for word in ("--model-arg", f"{key}={value}")]
    words = ["--mean", "0.25", "--std", "0.5", "--crop-pct", "1"]
    code, output = lethe("import", path, "--arch", ARCH, *args, *words, "--out", tmp_path / "c")
    assert code == 0, output
    preprocessing = preprocessing_of(load_checkpoint(tmp_path / "c"))
    assert (preprocessing.mean, preprocessing.std, preprocessing.crop_pct) == ((0.25,), (0.5,), 1.0)


def test_import_refuses_before_it_writes(tmp_path: Path, checkpoint: Path) -> None:
    path = saved(tmp_path, tiny_vit().state_dict())
    args = [word for key, value in SIZES.items() for word in ("--model-arg", f"{key}={value}")]
    (tmp_path / "two").write_text("a\nb\n")
    (tmp_path / "same").write_text("a\n" * 10)
    for words, message in (
        ([path], "there is no config.json"),
        ([path, "--arch", ARCH, *args, "--weights", "ema"], "has no ema weights"),
        ([path, "--arch", ARCH, *args, "--weights", "best"], "expected raw or ema"),
        ([path, "--arch", ARCH, *args, "--label-names", tmp_path / "two"], "2 names for the 10 classes"),
        ([path, "--arch", ARCH, *args, "--label-names", tmp_path / "same"], "the same name twice"),
        ([path, "--arch", ARCH, *args, "--label-names", tmp_path / "none"], "does not exist"),
        ([tmp_path / "nowhere.pth"], "is not a folder and not a file"),
        ([checkpoint, "--arch", ARCH], "already defines the model"),
    ):
        code, output = lethe("import", *words, "--out", tmp_path / "c")
        assert code == 2, output
        assert message in output
        assert not (tmp_path / "c").exists()
    code, output = lethe("import", path, "--arch", ARCH, *args, "--out", checkpoint)
    assert (code, "exists already" in output) == (2, True)


def test_unlearning_a_file_keeps_its_names_and_how_it_was_read(tmp_path: Path) -> None:
    model = tiny_vit(seed=4)
    path = saved(
        tmp_path, {"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "classes": list("abcdefghij")}
    )
    args = [word for key, value in SIZES.items() for word in ("--model-arg", f"{key}={value}")]
    short = ["--method", "finetune", "--set", "max_steps=1", "--set", "device=cpu", "--label-order", "data"]
    code, output = lethe(
        "unlearn", "--checkpoint", path, "--arch", ARCH, *args, *DIGITS, *short, *UNTRAINED, "--out", tmp_path / "u"
    )
    assert code == 0, output
    config = json.loads((tmp_path / "u" / "config.json").read_text())
    assert config["label_names"] == list("abcdefghij")
    assert config["lethe_import"]["stripped"] == ["module."]
    entries = json.loads((tmp_path / "u" / "record.json").read_text())
    assert '"stripped": ["module."]' in json.dumps(entries)
    assert str(path) in json.dumps(entries)
    assert "module." in (tmp_path / "u" / "config.yaml").read_text()
    assert load_file(tmp_path / "u" / "model.safetensors").keys() == model.state_dict().keys()


def test_deit_with_two_heads_opens(tmp_path: Path) -> None:
    args = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
    spec = ModelSpec(architecture="deit_tiny_distilled_patch16_224", num_classes=7, model_args=args, pretrained_cfg={})
    model = spec.build(seed=0)
    path = saved(tmp_path, {"model": {f"module.{key}": value for key, value in model.state_dict().items()}})
    found = load_checkpoint(
        path, architecture=spec.architecture, model_args={"embed_dim": 32, "depth": 1, "num_heads": 2}
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(images), model.eval()(images))


@pytest.mark.slow
def test_every_command_with_a_checkpoint_takes_a_file(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": tiny_vit(seed=4).state_dict()})
    given = ["--checkpoint", path, "--arch", ARCH]
    given += [word for key, value in SIZES.items() for word in ("--model-arg", f"{key}={value}")]
    for words in (
        ["evaluate", *given, *DIGITS, *UNTRAINED, "--json", tmp_path / "m.json"],
        [
            "forget-set",
            *given,
            *UNTRAINED,
            "--data",
            "digits",
            "--strategy",
            "random",
            "--count",
            9,
            "--out",
            tmp_path / "f.csv",
        ],
        ["request", "init", "--store", tmp_path / "store", *given, *UNTRAINED, "--data", "digits"],
    ):
        code, output = lethe(*words)
        assert code == 0, output
        code, output = lethe(*words[: words.index("--arch")], *words[words.index("--model-arg") :], "--weights", "ema")
        assert code == 2, output
    original = load_checkpoint(f"{path}?arch={ARCH}&embed_dim=32&depth=2&num_heads=2")
    assert weights_sha256(load_checkpoint(tmp_path / "store" / "versions" / "0000")) == weights_sha256(original)


def test_arguments_go_to_the_checkpoints_that_need_them(tmp_path: Path, checkpoint: Path) -> None:
    path = saved(tmp_path, tiny_vit().state_dict())
    found = checkpoint_sources([str(checkpoint), str(path), None, "timm:resnet18"], ARCH, ["depth=2"], "raw")
    assert found == [str(checkpoint), f"{path}?arch={ARCH}&weights=raw&depth=2", None, "timm:resnet18"]
    assert checkpoint_sources([str(checkpoint)], ARCH, None, None) == [f"{checkpoint}?arch={ARCH}"]
