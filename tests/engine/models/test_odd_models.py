"""Models, class names and processors that were taken for something else, or ended in a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from toys import TINY, few, tiny_vit

from engine.core.plausibility import is_near_chance
from engine.data import Samples, open_source
from engine.errors import UserError
from engine.models.attention_masking import scores_and_outputs
from engine.models.checkpoint import load_checkpoint, save_checkpoint
from engine.models.image_processor import preprocessing_keys
from engine.models.labels import label_names
from engine.models.spec import spec_of
from engine.models.vit import attention_info
from engine.run.unlearn import unlearn

QUICK = {"max_steps": 1, "batch_size": 4, "workers": 0, "precision": "fp32", "augment": "none", "collapse_drop": 100.0}


@pytest.fixture(scope="module")
def digits() -> tuple[Samples, Samples]:
    train = open_source("digits").train
    return few(train, 8), train.subset(range(8, 24))


class Answering(nn.Module):
    """A model that gives something else than a ViT's logits."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = tiny_vit(), change

    def forward(self, images: Tensor) -> Any:
        return self.change(self.net(images))


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(tiny_vit(), {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "probabilities": (lambda: Answering(lambda logits: logits.softmax(-1)), "give the model without its softmax"),
    "quantised": (quantised, "is quantised"),
    "meta": (lambda: tiny_vit().to("meta"), "on the meta device"),
    "four_channels": (lambda: tiny_vit(in_chans=4), "the model takes 4 channels"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_unlearned_right_is_refused(kind: str, digits: tuple[Samples, Samples]) -> None:
    make, expected = REFUSED[kind]
    with pytest.raises(UserError, match=expected):
        unlearn(make(), *digits, method="random_labels", config=QUICK, validation=digits[1])


def test_logarithms_of_probabilities_are_logits(digits: tuple[Samples, Samples]) -> None:
    unlearn(
        Answering(lambda logits: logits.log_softmax(-1)),
        *digits,
        method="random_labels",
        config=QUICK,
        validation=digits[1],
    )


def test_small_updates_of_bfloat16_weights_are_not_lost(digits: tuple[Samples, Samples]) -> None:
    model = tiny_vit().bfloat16()
    found = unlearn(model, *digits, method="finetune", config={**QUICK, "lr": 1e-5}, validation=digits[1]).model
    before, after = (each.state_dict()["blocks.0.mlp.fc1.weight"].float() for each in (model, found))
    assert (before != after).float().mean() > 0.9
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, "the caller's model is as it was"


# --- a ViT that is not timm's, of timm's blocks -----------------------------------------------------------------------


class OwnViT(nn.Module):
    """Declares neither its prefix tokens nor its pooling."""

    input_size, num_classes = (1, 8, 8), 10

    def __init__(self, class_token: bool, pool: str, registers: int = 0, kept: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = PatchEmbed(8, 2, 1, 32)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32)) if class_token else None
        self.registers = nn.Parameter(torch.randn(1, registers, 32))
        self.blocks = nn.Sequential(Block(32, 2), Block(32, 2))
        self.head, self.pool, self.kept = nn.Linear(32, 10), pool, kept

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images)
        first = [] if self.cls_token is None else [self.cls_token.expand(len(tokens), -1, -1)]
        tokens = torch.cat([*first, tokens, self.registers.expand(len(tokens), -1, -1)], 1)
        tokens = self.blocks[1](self.blocks[0](tokens)[:, : self.kept])
        if self.pool == "token":
            return self.head(tokens[:, 0])
        return self.head((tokens if self.pool == "all" else tokens[:, len(first) :]).mean(1))


@pytest.mark.parametrize(
    ("class_token", "pool", "expected"),
    [(True, "token", (1, "token")), (True, "avg", (1, "avg")), (False, "avg", (0, "avg"))],
)
def test_prefix_tokens_and_pooling_that_are_not_declared_are_found(
    class_token: bool, pool: str, expected: tuple[int, str]
) -> None:
    model = OwnViT(class_token, pool).eval()
    info = attention_info(model)
    assert (info.num_prefix_tokens, info.pool) == expected
    scores, _ = scores_and_outputs(model, torch.randn(2, 1, 8, 8), info)
    assert scores.shape == (2, 16)
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"pool": "token", "registers": 3}, "over 20 tokens"),
        ({"pool": "token", "kept": 9}, "over 9 tokens"),
        ({"pool": "all"}, "reads 17 of 17 tokens"),
    ],
)
def test_tokens_that_no_patch_could_be_told_of_are_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        attention_info(OwnViT(True, **given).eval())


# --- class names ------------------------------------------------------------------------------------------------------

NAMES = [f"class {label}" for label in range(10)]
TURNED = list(reversed(range(10)))
TABLES: dict[str, dict[str, Any]] = {
    "name_to_label": {"label_names": {NAMES[label]: label for label in TURNED}},
    "label_to_name": {"label_names": {str(label): NAMES[label] for label in TURNED}},
    "id2label": {"id2label": {str(label): NAMES[label] for label in TURNED}},
    "class_to_idx": {"class_to_idx": {NAMES[label]: label for label in TURNED}},
    "of_pretrained_cfg": {"pretrained_cfg": {"label_names": {NAMES[label]: label for label in TURNED}}},
    "list": {"label_names": NAMES},
}


def configured(folder: Path, **keys: Any) -> Path:
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": TINY, **keys}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tiny_vit().state_dict(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", TABLES)
def test_class_names_of_a_config_are_read_in_the_order_of_labels(kind: str, tmp_path: Path) -> None:
    model = load_checkpoint(configured(tmp_path, **TABLES[kind]))
    assert spec_of(model).label_names == NAMES
    assert spec_of(load_checkpoint(save_checkpoint(model, tmp_path / "again"))).label_names == NAMES


@pytest.mark.parametrize("names", ["abcdefghij", {"a": 0, "b": 2}, [{"name": "a"}]])
def test_class_names_of_another_form_are_refused(names: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="label_names is"):
        load_checkpoint(configured(tmp_path, label_names=names))


def test_labels_of_id2label_with_gaps_do_not_move_up(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from hf_models import saved, tiny

    folder = saved(tiny("vit"), tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = len(config["id2label"])
    config["id2label"] = {str(label + (label > 1)): f"class {label}" for label in range(classes)}
    config["label2id"] = {name: int(label) for label, name in config["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="id2label has the labels"):
        label_names(load_checkpoint(folder))


# --- processors -------------------------------------------------------------------------------------------------------


def test_a_size_of_one_number_is_the_shorter_side_for_clip() -> None:
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "do_center_crop": True}
    assert preprocessing_keys(old, "file")["crop_mode"] == "center"
    assert preprocessing_keys({**old, "feature_extractor_type": "ViTFeatureExtractor"}, "file")["crop_mode"] == "squash"


def test_convnext_crops_nothing_from_384_pixels() -> None:
    values = {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875}
    small = preprocessing_keys({**values, "size": {"shortest_edge": 224}}, "file")
    large = preprocessing_keys({**values, "size": {"shortest_edge": 384}}, "file")
    assert (small["crop_pct"], small["crop_mode"]) == (0.875, "center")
    assert (large["crop_pct"], large["crop_mode"]) == (1.0, "squash")


@pytest.mark.parametrize(
    "changed",
    [
        {"rescale_factor": "x"},
        {"size": {"longest_edge": 8}},
        {"size": {"shortest_edge": 0}, "crop_size": 8, "do_center_crop": True},
        {"size": {"height": 8}},
        {"size": "8"},
        {"size": {"shortest_edge": 8, "longest_edge": 16}},
    ],
)
def test_a_size_or_scale_that_cannot_be_read_is_not_left_out(changed: dict[str, Any]) -> None:
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **changed}
    with pytest.raises(UserError, match=r"not supported|expected a number|is larger than size"):
        preprocessing_keys(values, "file")
    assert preprocessing_keys({**values, "size": 8, "rescale_factor": None}, "file")["input_size"] == (8, 8)


# --- accuracy of samples of one class ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("correct", "expected"), [(0, True), (39, True), (60, False), (400, False)])
def test_samples_of_one_class_that_are_answered_wrongly_are_noticed(correct: int, expected: bool) -> None:
    assert is_near_chance(correct, np.full(400, 3)) is expected
    assert not is_near_chance(0, np.full(5, 3))
