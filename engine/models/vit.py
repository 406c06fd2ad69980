"""What the engine needs to know of a Vision Transformer: patch grid, prefix tokens, logits and features."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor, nn

from engine.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTInfo:
    """Geometry of a model's patches, as the mask sees them.

    patch_size: (height, width) in pixels of one maskable patch. grid: patches down and across.
    num_prefix_tokens: class, distillation and register tokens before the patch tokens.
    pool: "token" where the class token is read by the head, "avg" where patch tokens are averaged.
    in_chans, input_size: channels; (height, width) in pixels. windowed: Swin's rule applies (`engine.swin`).
    """

    patch_size: tuple[int, int]
    grid: tuple[int, int]
    num_prefix_tokens: int
    pool: Literal["token", "avg"]
    in_chans: int
    input_size: tuple[int, int]
    windowed: bool
    width: int

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


def describe(model: nn.Module) -> ViTInfo:
    """Geometry of a timm ViT, DeiT or Swin. Raises UserError, saying what was looked for, for anything else."""
    embed = getattr(model, "patch_embed", None)
    if embed is None or not hasattr(embed, "patch_size"):
        raise UserError(
            f"{type(model).__name__} is not a Vision Transformer of timm: looked for `patch_embed.patch_size`"
        )
    patch, grid = _pair(embed.patch_size), _pair(embed.grid_size)
    projection = next(m for m in embed.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    in_chans = (
        projection.in_channels if isinstance(projection, nn.Conv2d) else projection.in_features // (patch[0] * patch[1])
    )
    input_size = (patch[0] * grid[0], patch[1] * grid[1])
    windowed = is_swin(model)
    if windowed:
        # A maskable patch is a token of the last stage: its scores are what Swin's rule gives.
        last_grid = _pair(model.layers[-1].blocks[-1].input_resolution)  # type: ignore[index, union-attr]
        patch, grid = (input_size[0] // last_grid[0], input_size[1] // last_grid[1]), last_grid
    elif not attention_modules(model):
        raise UserError(
            f"{type(model).__name__} offers no usable attention: looked for `blocks[i].attn` with `q_norm` and `k_norm`"
        )
    elif getattr(model, "rope", None) is not None:
        raise UserError(
            f"{type(model).__name__} rotates q and k after `q_norm` and `k_norm` (rotary position embedding), so its "
            "attention cannot be captured there; models with learned position embeddings can be used"
        )
    pool = getattr(model, "global_pool", "token")
    return ViTInfo(
        patch_size=patch,
        grid=grid,
        num_prefix_tokens=0 if windowed else int(getattr(model, "num_prefix_tokens", 1)),
        pool="token" if pool == "token" and not windowed else "avg",
        in_chans=in_chans,
        input_size=input_size,
        windowed=windowed,
        width=int(model.num_features),  # type: ignore[arg-type]
    )


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def is_swin(model: nn.Module) -> bool:
    layers = getattr(model, "layers", None)
    block = getattr(layers[-1], "blocks", [None])[-1] if isinstance(layers, nn.Sequential) and len(layers) else None
    return hasattr(block, "window_size") and hasattr(getattr(block, "attn", None), "relative_position_bias_table")


def outputs(model: nn.Module, images: Tensor, what: str = "logits") -> Tensor:
    """`logits` [B, classes], or `features` [B, width]: what the last linear layer reads. In the precision of the pass.

    Always one call of the model itself, never of its parts, and what that call returns: DeepSpeed gathers sharded
    weights at the call, and begins the backward pass at what was returned.
    """
    images = images.to(next(model.parameters()).dtype)
    if what == "logits":
        return model(images)
    classifier = model.get_classifier()  # type: ignore[operator]
    with contextlib.ExitStack() as replaced:
        for head in classifier if isinstance(classifier, tuple) else (classifier,):  # DeiT has two, and takes the mean
            replaced.enter_context(forwarding(head, lambda features: features))
        return model(images)


@contextlib.contextmanager
def forwarding(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, a module computes something else; its hooks still run."""
    before = vars(module).get("forward")  # another wrapper's, if there is one
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention of each block, first block first; empty where a block has none that can be captured."""
    modules = [getattr(block, "attn", None) for block in getattr(model, "blocks", [])]
    usable = [m for m in modules if m is not None and hasattr(m, "q_norm") and hasattr(m, "k_norm")]
    return usable if len(usable) == len(modules) else []
