"""A small model trained on digits as photographs of low contrast, so that mean and std matter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from engine.models.preprocessing import preprocessing_of
from engine.models.spec import ModelSpec, set_spec, spec_of

NAMES = [f"class {word}" for word in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]]
STATISTICS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # not timm's default, which is 0.5


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 8, 8, 3] between 40 and 200, and labels."""
    digits = load_digits()
    return np.repeat((40 + 10 * digits.images)[..., None], 3, axis=-1).astype(np.uint8), digits.target


def write_folder(folder: Path, train: int = 600, test: int = 100) -> Path:
    """An imagefolder; label = position of the class folder's name."""
    images, labels = pixels()
    for index in range(train + test):
        place = folder / ("train" if index < train else "test") / NAMES[labels[index]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(place / f"{index:04d}.png")
    return folder


def trained(train: int = 600, steps: int = 250) -> torch.nn.Module:
    """About 95% on the training samples, with the mean and std above in its pretrained_cfg."""
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 2}
    model = ModelSpec(
        architecture="vit_tiny_patch16_224", num_classes=10, model_args=arguments, pretrained_cfg=STATISTICS
    ).build(seed=0)
    images, labels = pixels()
    ready = preprocessing_of(model).normalise(torch.from_numpy(images[:train]).permute(0, 3, 1, 2).contiguous())
    targets = torch.from_numpy(labels[:train])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(train, (100,), generator=generator)
        loss = torch.nn.functional.cross_entropy(model(ready[chosen]), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def with_names(model: torch.nn.Module, names: list[str]) -> torch.nn.Module:
    """The model, with class names by label in its checkpoints."""
    spec = spec_of(model)
    set_spec(model, dataclasses.replace(spec, extra={**spec.extra, "label_names": names}))
    return model


def without_statistics(folder: Path) -> Path:
    """The checkpoint as another program writes it: config.json without mean and std."""
    config = json.loads((folder / "config.json").read_text())
    for key in STATISTICS:
        config["pretrained_cfg"].pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_exchanged_head(model: torch.nn.Module, order: list[int]) -> torch.nn.Module:
    """The model with output i in place of output order[i]: as if it had been trained with another order of classes."""
    weight, bias = model.head.weight.data.clone(), model.head.bias.data.clone()
    model.head.weight.data[order], model.head.bias.data[order] = weight, bias
    return model


def with_noise(model: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    """The model as before its weights were averaged: noise on all of them; 88% in place of 100%."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data += scale * torch.randn(weight.shape, generator=generator) * weight.data.abs().mean()
    return model
