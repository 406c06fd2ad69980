"""Queries and keys for the tests of the rollout."""

from collections.abc import Sequence

import torch
from torch import Tensor

Layers = list[Tensor]


def make(
    tokens: int, heads: int, width: int, *, layers: int = 3, batch: int = 2, seed: int = 0
) -> tuple[Layers, Layers]:
    """Float64 queries and keys as timm's hooks hand them over: strided views of one qkv output a layer."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = [], []
    for _ in range(layers):
        qkv = 1.5 * torch.randn(batch, tokens, 3, heads, width, generator=generator, dtype=torch.float64)
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        queries.append(query)
        keys.append(key)
    return queries, keys


def cast(layers: Sequence[Tensor], dtype: torch.dtype) -> Layers:
    return [x.to(dtype) for x in layers]  # `to` keeps the strides
