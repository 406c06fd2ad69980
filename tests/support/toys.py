"""A tiny ViT for scikit-learn's digits, and a few samples of a set."""

from __future__ import annotations

import torch

from engine.data import Samples
from engine.models.spec import ModelSpec

TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny_vit(seed: int = 0, num_classes: int = 10, **changed: object) -> torch.nn.Module:
    spec = ModelSpec(
        architecture="vit_tiny_patch16_224", num_classes=num_classes, model_args={**TINY, **changed}, pretrained_cfg={}
    )
    return spec.build(seed=seed).eval()


def few(samples: Samples, count: int) -> Samples:
    return samples.subset(range(count))
