"""Methods that read logits alone on classifiers that are no ViTs: timm's, and any module with logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from methods_kit import make
from torch import Tensor, nn
from toys import few, tiny_vit

from engine.core.method import refuse_unfit
from engine.data import Samples, open_source
from engine.errors import UserError
from engine.evaluate import Evaluator
from engine.methods import get_method, list_methods
from engine.models.info import ModelInfo, classifiers, input_size_of, model_info, num_classes_of
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import ViTInfo, attention_info, describe, outputs
from engine.run.unlearn import unlearn

QUICK = {"max_steps": 1, "batch_size": 4, "workers": 0, "precision": "fp32", "augment": "none", "collapse_drop": 100.0}


@pytest.fixture(scope="module")
def digits() -> tuple[Samples, Samples]:
    train = open_source("digits").train
    return few(train, 8), train.subset(range(8, 48))


def resnet(**args: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1, **args).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 64, 64)}
    return model


class Plain(nn.Module):
    """No attribute of timm's but those that are given."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 6, 3, stride=2), nn.Linear(6, 10)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stem(images).relu().mean((2, 3)))


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def run(model: nn.Module, digits: tuple[Samples, Samples], method: str = "random_labels", **options: Any) -> nn.Module:
    inplace = options.pop("inplace", False)
    forget, retain = digits
    result = unlearn(
        model,
        forget,
        retain,
        method=method,
        config={**QUICK, **options},
        validation=retain.subset(range(8)),
        inplace=inplace,
    )
    return result.model


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "test_nfnet", "test_byobnet"]
)
def test_a_cnn_is_described_by_its_declared_input(name: str) -> None:
    model = timm.create_model(name, num_classes=7)
    info = describe(model)
    assert type(info) is ModelInfo
    assert (info.in_chans, info.input_size) == (3, tuple(model.pretrained_cfg["input_size"][1:]))
    with torch.no_grad():
        features = outputs(model.eval(), torch.zeros(1, 3, *info.input_size), "features")
    assert features.shape == (1, info.width)


def test_pixels_that_are_folded_into_channels_are_no_channels() -> None:
    with torch.device("meta"):
        model = timm.create_model("tresnet_m")
    assert model_info(model).in_chans == 3
    with torch.device("meta"):
        assert model_info(timm.create_model("tresnet_m", in_chans=1)).in_chans == 1


@pytest.mark.parametrize(
    "attributes",
    [
        {"pretrained_cfg": {"input_size": (1, 8, 8)}},
        {"input_size": (1, 8, 8)},
        {"input_size": (8, 8)},
        {"img_size": 8},
        {"image_size": (8, 8)},
    ],
)
def test_a_module_declares_its_input_size(attributes: dict[str, Any]) -> None:
    model = Plain(**attributes)
    assert describe(model) == ModelInfo(in_chans=1, input_size=(8, 8), width=6)
    assert num_classes_of(model) == 10
    assert preprocessing_of(model).size == (8, 8)
    assert classifiers(model) == [model.head]


def test_a_module_without_an_input_size_is_told_how_to_declare_it(digits: tuple[Samples, Samples]) -> None:
    with pytest.raises(UserError, match=r"does not declare its input size: set model\.pretrained_cfg"):
        run(Plain(), digits)


def test_a_module_that_returns_no_logits_is_refused(digits: tuple[Samples, Samples]) -> None:
    class Two(Plain):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images), images

    with pytest.raises(UserError, match="returns tuple for one image, expected logits"):
        run(Two(input_size=(1, 8, 8)), digits)


def test_a_wrong_declared_size_is_refused(digits: tuple[Samples, Samples]) -> None:
    class Flat(Plain):
        def __init__(self) -> None:
            super().__init__(input_size=(1, 9, 9))
            self.head = nn.Linear(64, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(images.flatten(1))

    with pytest.raises(UserError, match="does not take images of 1 x 9 x 9"):
        run(Flat(), digits)


def test_features_of_a_module_are_what_its_last_linear_layer_reads() -> None:
    model, images = Plain(input_size=(1, 8, 8)), torch.randn(3, 1, 8, 8)
    expected = model.stem(images).relu().mean((2, 3))
    torch.testing.assert_close(outputs(model, images, "features"), expected)
    torch.testing.assert_close(model.head(expected), outputs(model, images))


def test_a_wrapped_model_gives_its_configuration() -> None:
    inner = resnet()
    holder = Holder(inner)
    assert input_size_of(holder) == (64, 64)
    assert preprocessing_of(holder) == preprocessing_of(inner)
    assert num_classes_of(holder) == 10


@pytest.mark.parametrize("method", [
    pytest.param(name, marks=pytest.mark.slow if name == "influence" else ())
    for name in list_methods() if name not in ("lethe", "s3t", "retrain")
])  # fmt: skip
def test_every_method_runs_on_a_cnn_or_says_why_not(method: str, digits: tuple[Samples, Samples]) -> None:
    model = resnet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if method.startswith("gs_lora"):
        with pytest.raises(UserError, match="has no linear layers in `blocks"):
            run(model, digits, method)
        return
    changed = run(model, digits, method, **({"fisher_batch_size": 4} if method == "ssd" else {}))
    assert method == "razor" or any(not torch.equal(value, before[key]) for key, value in changed.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_lethe_names_the_methods_that_do_without_attention(digits: tuple[Samples, Samples]) -> None:
    with pytest.raises(UserError, match="method lethe needs the attention of the model") as error:
        run(resnet(), digits, "lethe")
    assert "methods that do without: " in str(error.value)
    others = str(error.value).split("do without: ")[1].split(", ")
    assert set(others) == set(list_methods()) - {"lethe"}


def test_methods_declare_what_they_need() -> None:
    needs = {name: set(method.needs) for name, method in list_methods().items()}
    assert needs["lethe"] == {"logits", "attention"}
    assert needs["laf"] == needs["gs_lora_pp"] == {"logits", "features"}
    assert all(each == {"logits"} for name, each in needs.items() if name not in ("lethe", "laf", "gs_lora_pp"))


def test_a_method_that_reads_features_refuses_a_model_without_them() -> None:
    class Headless(nn.Module):
        input_size = (1, 8, 8)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 10))

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) @ self.weight

    refuse_unfit(get_method("random_labels"), Headless())
    with pytest.raises(UserError, match="method laf needs the features of the model"):
        refuse_unfit(get_method("laf"), Headless())


def test_no_gradient_checkpointing_is_an_error_of_one_line(digits: tuple[Samples, Samples]) -> None:
    with pytest.raises(UserError, match="has no gradient checkpointing"):
        run(Plain(input_size=(1, 8, 8)), digits, gradient_checkpointing=True)


@pytest.mark.parametrize("spec", ["lora:2", "last:1"])
def test_parts_that_a_cnn_lacks_are_named(spec: str, digits: tuple[Samples, Samples]) -> None:
    with pytest.raises(UserError, match=f"option trainable='{spec}'"):
        run(Plain(input_size=(1, 8, 8)), digits, "finetune", trainable=spec)


def test_only_the_head_of_a_cnn_is_trained(digits: tuple[Samples, Samples]) -> None:
    model = Plain(input_size=(1, 8, 8))
    changed = run(model, digits, "finetune", trainable="head")
    assert torch.equal(changed.stem.weight, model.stem.weight)
    assert not torch.equal(changed.head.weight, model.head.weight)


def test_a_cnn_is_evaluated(digits: tuple[Samples, Samples]) -> None:
    forget, retain = digits
    found = Evaluator(forget, retain, retain.subset(range(8)), device="cpu", workers=0)(Plain(input_size=(1, 8, 8)))
    assert found is not None


def test_a_single_image_that_batch_norm_cannot_take_is_an_error_of_one_line() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10)).train()
    with pytest.raises(UserError, match="batch of one image"):
        outputs(model, torch.randn(1, 1, 8, 8))


# --- kinds of modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
@pytest.mark.parametrize("inplace", [False, True])
def test_wrapped_models_are_taken_out(wrap: Any, inplace: bool, digits: tuple[Samples, Samples]) -> None:
    model = tiny_vit()
    before = model.head.weight.clone()
    given = wrap(model)
    found = run(given, digits, inplace=inplace)
    assert torch.equal(model.head.weight, before) is not inplace
    assert (found is given) is inplace
    if not inplace:
        assert type(found) is type(model)
        assert not torch.equal(found.head.weight, before)


def test_a_model_in_half_precision_is_trained_in_float32(
    digits: tuple[Samples, Samples], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_vit().half()
    found = run(model, digits)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert "float16 weights are converted to float32" in caplog.text


def test_a_frozen_model_is_refused(digits: tuple[Samples, Samples]) -> None:
    with pytest.raises(UserError, match=r"every weight of the model is frozen.*requires_grad_\(True\)"):
        run(tiny_vit().requires_grad_(False), digits)


def test_a_model_without_a_head_is_refused(digits: tuple[Samples, Samples]) -> None:
    with pytest.raises(UserError, match="has no classifier"):
        run(tiny_vit(num_classes=0), digits)


# --- images of the right size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "size", "patch"),
    [
        ("vit_tiny_r_s16_p8_224", {"embed_dim": 48, "depth": 1, "num_heads": 3}, (224, 224), (32, 32)),
        ("vit_tiny_r_s16_p8_224", {"img_size": 64, "embed_dim": 48, "depth": 1, "num_heads": 3}, (64, 64), (32, 32)),
        ("vitamin_small_224", {"depth": 1}, (224, 224), (16, 16)),
        ("vit_base_mci_224", {"depth": 1}, (224, 224), (16, 16)),
        ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}, (32, 32), (16, 16)),
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "dynamic_img_size": True, "embed_dim": 48, "depth": 1, "num_heads": 3},
            (32, 32),
            (16, 16),
        ),
    ],
)
def test_the_input_is_the_image_not_the_feature_grid(
    name: str, args: dict[str, Any], size: tuple[int, int], patch: tuple[int, int]
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5, **args)
    info = attention_info(model)
    assert isinstance(info, ViTInfo)
    assert (info.input_size, info.patch_size) == (size, patch)
    assert (info.grid[0] * patch[0], info.grid[1] * patch[1]) == size
    assert preprocessing_of(model).size == size


def test_a_changed_configuration_sets_the_size_of_a_model_that_takes_any() -> None:
    model = tiny_vit(dynamic_img_size=True)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 16, 16)}
    assert model_info(model).input_size == (16, 16)
    fixed = tiny_vit()
    fixed.pretrained_cfg = {**fixed.pretrained_cfg, "input_size": (1, 16, 16)}
    assert model_info(fixed).input_size == (8, 8)


def test_tokens_that_do_not_tile_the_image_are_refused_for_attention(digits: tuple[Samples, Samples]) -> None:
    model = tiny_vit(img_size=9, dynamic_img_pad=True)
    assert model_info(model).input_size == (9, 9)
    with pytest.raises(UserError, match=r"4 x 4 tokens do not tile its input of 9 x 9 pixels"):
        run(model, digits, "lethe")


def test_the_learning_rate_of_a_cnn_goes_by_what_its_head_reads() -> None:
    method = make("random_labels", open_source("digits").train, Plain(input_size=(1, 8, 8)))
    assert method.learning_rate(None, 0.6) == pytest.approx(0.1)


def test_a_cnn_is_saved_and_opened(tmp_path: Path, digits: tuple[Samples, Samples]) -> None:
    from engine.models.checkpoint import load_checkpoint, save_checkpoint

    model = resnet()
    opened = load_checkpoint(save_checkpoint(run(model, digits), tmp_path / "c"))
    assert input_size_of(opened) == (64, 64)
