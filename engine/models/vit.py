"""Patch grid and prefix tokens of a Vision Transformer; logits and features of any classifier."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.models.info import (
    ModelInfo,
    black_image,
    classifiers,
    declared_info,
    evaluating,
    model_info,
    one_line,
    pair,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTInfo(ModelInfo):
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
    windowed: bool

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


def describe(model: nn.Module) -> ModelInfo:
    """A `ViTInfo` of a model whose attention can be read, else a `ModelInfo`.

    Raises UserError only where the model does not declare its input size.
    """
    if (declared := declared_info(model)) is not None:
        return declared
    try:
        return attention_info(model)
    except UserError:
        return model_info(model)


def attention_info(model: nn.Module) -> ViTInfo:
    """Patches, prefix tokens and pooling of a model whose attention can be read.

    Raises UserError, with what was found in place of it, for every other model.
    """
    if (declared := declared_info(model)) is not None:
        return declared
    embed = getattr(model, "patch_embed", None)
    if embed is None or not hasattr(embed, "patch_size"):
        raise UserError(
            f"{type(model).__name__} is not a Vision Transformer of timm: looked for `patch_embed.patch_size`"
        )
    windowed = is_swin(model)
    if not windowed:
        _check_attention(model)
    general = model_info(model)
    grid = pair(model.layers[-1].blocks[-1].input_resolution if windowed else embed.grid_size)  # type: ignore[index, union-attr]
    pool = getattr(model, "global_pool", "token")
    return ViTInfo(
        **dataclasses.asdict(general),
        patch_size=_patch_of(model, general.input_size, grid),
        grid=grid,
        num_prefix_tokens=0 if windowed else int(getattr(model, "num_prefix_tokens", 1)),
        pool="token" if pool == "token" and not windowed else "avg",
        windowed=windowed,
    )


def _check_attention(model: nn.Module) -> None:
    if not attention_modules(model):
        raise UserError(
            f"{type(model).__name__} offers no usable attention: looked for `blocks[i].attn` with `q_norm` and `k_norm`"
        )
    if getattr(model, "rope", None) is not None:
        raise UserError(
            f"{type(model).__name__} rotates q and k after `q_norm` and `k_norm` (rotary position embedding), so its "
            "attention cannot be captured there; models with learned position embeddings can be used"
        )


def _patch_of(model: nn.Module, image: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of a cell of the grid. Raises UserError where the cells do not tile the image."""
    if image[0] % grid[0] or image[1] % grid[1]:
        raise UserError(
            f"{type(model).__name__}: its {grid[0]} x {grid[1]} tokens do not tile its input of {image[0]} x "
            f"{image[1]} pixels, so no patch of the image belongs to a token; use an input size that is a multiple"
        )
    return image[0] // grid[0], image[1] // grid[1]


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
    try:
        return _outputs(model, images, what)
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"{type(model).__name__} normalises over the batch, and a batch of one image leaves one value a channel: "
            "choose a batch_size that does not leave a single image over"
        ) from None


def _outputs(model: nn.Module, images: Tensor, what: str) -> Tensor:
    if what == "logits":
        return model(images)
    with contextlib.ExitStack() as replaced:
        for head in classifiers(model):  # DeiT has two, and takes the mean
            replaced.enter_context(forwarding(head, lambda features: features))
        return model(images)


def check_features(model: nn.Module) -> None:
    """Raises UserError where a model's features cannot be read, or are not one vector of `model_info().width` an
    image."""
    expected = (1, model_info(model).width)
    try:
        with evaluating(model), torch.no_grad():
            found = tuple(outputs(model, black_image(model), "features").shape)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{type(model).__name__}: its pass does not run with the classifier left out ({one_line(error)})"
        ) from None
    if found != expected:
        raise UserError(f"{type(model).__name__}: its classifier reads {found} for one image, expected {expected}")


def checkpoint_blocks(model: nn.Module) -> None:
    """Turns gradient checkpointing on. Raises UserError where the model has none."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError):
        raise UserError(
            f"{type(model).__name__} has no gradient checkpointing; leave out gradient_checkpointing "
            "(--gradient-checkpointing), and use a smaller batch with accumulation_steps"
        ) from None


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
