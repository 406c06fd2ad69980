"""Patch grid and prefix tokens of a Vision Transformer; logits and features of any classifier."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from engine.errors import UserError
from engine.models.capture import blocks_of_core, check_calls, pool_of_head
from engine.models.info import (
    ModelInfo,
    black_image,
    classifiers,
    configured_model,
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
    pool: "token" where the class token is read by the head, "avg" where patch tokens are averaged, "map" where
    attention pooling reads all of them.
    in_chans, input_size: channels; (height, width) in pixels. windowed: Swin's rule applies
    (`engine.models.attention_masking`).
    """

    patch_size: tuple[int, int]
    grid: tuple[int, int]
    num_prefix_tokens: int
    pool: Literal["token", "avg", "map"]
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
        if isinstance(declared, ViTInfo):
            return declared
        raise UserError(
            f"{type(model).__name__}: {getattr(model, 'attention_problem', 'its attention cannot be read')}"
        )
    if is_swin(model):
        return _swin_info(model)
    core: Any = configured_model(model) or model
    embed = getattr(core, "patch_embed", None) or getattr(core, "embeds", None)  # timm's NaFlexVit has the latter
    if not hasattr(embed, "patch_size"):
        raise UserError(
            f"{type(core).__name__} is not a Vision Transformer of timm: looked for `patch_embed.patch_size`"
        )
    if not blocks_of_core(model):
        raise UserError(f"{type(core).__name__} is no column of blocks over the same tokens: looked for `blocks`")
    general = model_info(model)
    grid = _grid_of(embed, general.input_size)
    patch = _patch_of(model, general.input_size, grid)
    prefix = int(getattr(core, "num_prefix_tokens", getattr(core, "cls_token", None) is not None))
    pool: Literal["token", "avg", "map"] = "token" if getattr(core, "global_pool", "token") == "token" else "avg"
    known = type(core).__module__.startswith("timm.") and plain_attention(model)  # its tokens are those it declares
    if not known and check_calls(model, prefix + grid[0] * grid[1], prefix):
        pool = "map"
    elif not hasattr(core, "global_pool"):
        pool = pool_of_head(model, prefix)
    elif getattr(core, "attn_pool", None) is not None or getattr(core, "global_pool", "") == "map":
        raise UserError(f"{type(core).__name__} pools by attention that could not be read")
    if pool == "token" and prefix == 0:
        raise UserError(f"{type(core).__name__} reads a class token (global_pool='token'), and has no prefix tokens")
    return ViTInfo(
        **dataclasses.asdict(general), patch_size=patch, grid=grid, num_prefix_tokens=prefix, pool=pool, windowed=False
    )


def _swin_info(model: Any) -> ViTInfo:
    """A maskable patch is a token of the last stage: its scores are what Swin's rule gives."""
    general = model_info(model)
    grid = pair(model.layers[-1].blocks[-1].input_resolution)
    return ViTInfo(
        **dataclasses.asdict(general),
        patch_size=_patch_of(model, general.input_size, grid),
        grid=grid,
        num_prefix_tokens=0,
        pool="avg",
        windowed=True,
    )


def plain_attention(model: nn.Module) -> bool:
    """Whether q and k of every block are the final ones behind `q_norm` and `k_norm`, with nothing added to the logits:
    timm's `Attention` alone, without rotary embeddings and without attention pooling."""
    modules = attention_modules(model)
    pooled = getattr(model, "attn_pool", None) is not None or getattr(model, "rope", None) is not None
    return bool(modules) and not pooled and all(type(module) is Attention for module in modules)


def _grid_of(embed: Any, image: tuple[int, int]) -> tuple[int, int]:
    """Patches down and across of an image of the input size."""
    patch = pair(embed.patch_size)
    built = getattr(embed, "img_size", None)
    if getattr(embed, "grid_size", None) is not None and (built is None or pair(built) == image):
        return pair(embed.grid_size)
    if image[0] % patch[0] or image[1] % patch[1]:
        raise UserError(
            f"an input of {image[0]} x {image[1]} pixels is no whole number of patches of {patch[0]} x {patch[1]}; use "
            "an input size that is a multiple"
        )
    return image[0] // patch[0], image[1] // patch[1]


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
    attention = getattr(block, "attn", None)
    bias = hasattr(attention, "relative_position_bias_table") or cosine_attention(attention)
    return bias and hasattr(block, "window_size") and hasattr(block, "input_resolution")


def cosine_attention(attention: Any) -> bool:
    """Whether it is SwinV2's: explicit attention of normalised q and k, with a bias from a small network."""
    return all(hasattr(attention, name) for name in ("logit_scale", "cpb_mlp", "attn_drop"))


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
