"""Tiny image classifiers of transformers with random weights, and images for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

NAMES = ["ant", "bee", "cow", "dog"]
_COMMON = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
# By name: class, configuration, and its options.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", _COMMON),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _COMMON),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", _COMMON),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", _COMMON),
    "dinov2-registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", _COMMON),
    "beit": ("BeitForImageClassification", "BeitConfig", {**_COMMON, "use_relative_position_bias": True}),
    "swin": ("SwinForImageClassification", "SwinConfig", _SWIN),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", _SWIN),
    "clip": ("CLIPForImageClassification", "CLIPConfig", {"vision_config": _COMMON, "text_config": _TEXT}),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", {"vision_config": _COMMON, "text_config": _TEXT}),
    "timm-wrapper": (
        "TimmWrapperForImageClassification",
        "TimmWrapperConfig",
        {
            "architecture": "vit_tiny_patch16_224",
            "model_args": _TIMM,
            "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32]},
        },
    ),
}


def tiny(name: str, seed: int = 0, **options: Any) -> Any:
    """One of MODELS, in eval mode; options: of its configuration."""
    transformers = pytest.importorskip("transformers")
    class_name, config_name, known = MODELS[name]
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {label: i for i, label in enumerate(NAMES)}}
    config = getattr(transformers, config_name)(**{**known, **labels, **options})
    torch.manual_seed(seed)
    return getattr(transformers, class_name)(config).eval()


def processor(**options: Any) -> Any:
    """A ViTImageProcessor for 32 x 32 pixels."""
    transformers = pytest.importorskip("transformers")
    return transformers.ViTImageProcessor(**{"size": {"height": 32, "width": 32}, **options})


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """A `save_pretrained` folder of a model, with an image processor."""
    model.save_pretrained(folder)
    processor(**options).save_pretrained(folder)
    return folder


def images(count: int = 24, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def sets(size: int = 32) -> tuple[Subset[Any], Subset[Any]]:
    """A forget set of 8 normalised images and a retain set of 16."""
    data = TensorDataset(images(size=size), torch.arange(24) % 4)
    return Subset(data, range(8)), Subset(data, range(8, 24))


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    return model.eval()(pixel_values=inputs).logits
