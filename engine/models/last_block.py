"""The last block of a ViT, computed only for the tokens that the head depends on.

If the head's input is the class token, the outputs of the last block's MLP for patch tokens are not used. Leaving them
out changes neither outputs nor gradients. The attention stays whole: class tokens attend to all patches, and hooks get
every row of its maps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from engine.models.vit import forwarding


@contextlib.contextmanager
def truncate_last_block(model: nn.Module) -> Iterator[None]:
    """Return only the class tokens from the last block within the context, for models known to use only these.

    Other models are unchanged: averaged patch tokens, attention pooling, Swin, blocks that are not timm's plain one.
    """
    count = prefix_tokens_read(model)
    if not count:
        yield
        return
    block = _last(model)
    with forwarding(block, functools.partial(_forward, block, count)):
        yield


def prefix_tokens_read(model: nn.Module) -> int:
    """Return the number of leading tokens that the last block must return; 0: all, or not known."""
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return 0
    token = model.global_pool == "token" and getattr(model, "attn_pool", None) is None
    return int(model.num_prefix_tokens) if token and type(_last(model)) is Block else 0  # type: ignore[arg-type]


def _last(model: nn.Module) -> nn.Module:
    return model.blocks[-1]  # type: ignore[index, return-value]


def _forward(block: Any, count: int, x_BND: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Compute timm's Block.forward with the class tokens [B, count, D] alone after the attention."""
    attended = block.attn(block.norm1(x_BND), *arguments, **options)[:, :count]
    x = x_BND[:, :count] + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
