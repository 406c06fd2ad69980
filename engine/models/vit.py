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
    """Geometry of a model's patches, for masks.

    Attributes:
        in_chans: Channels of an image.
        input_size: (height, width) in pixels.
        width: Number of features.
        patch_size: (height, width) in pixels of one maskable patch.
        grid: Patches down and across.
        num_prefix_tokens: Class, distillation and register tokens before the patch tokens.
        pool: "token": the head's input is the class token; "avg": the mean of the patch tokens; "map": attention
            pooling over all of them.
        windowed: Swin's rule applies (`engine.models.attention_masking`).
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
    """Return a `ViTInfo` of a model whose attention can be read, else a `ModelInfo`.

    Raises:
        UserError: The model does not declare its input size.
    """
    if (declared := declared_info(model)) is not None:
        return declared
    try:
        return attention_info(model)
    except UserError:
        return model_info(model)


def attention_info(model: nn.Module) -> ViTInfo:
    """Return patches, prefix tokens and pooling of a model whose attention can be read.

    Raises:
        UserError: It cannot be read; the message has the reason.
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
        raise UserError(f"{type(core).__name__} is not a Vision Transformer of timm: expected `patch_embed.patch_size`")
    if not blocks_of_core(model):
        raise UserError(f"{type(core).__name__} is no column of blocks over the same tokens: expected `blocks`")
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
    """Return the geometry of a Swin: a maskable patch is a token of the last stage, as in Swin's rule."""
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
    """Return whether all attention is timm's `Attention`, without rotary embeddings and attention pooling.

    Then q and k after `q_norm` and `k_norm` are final, and nothing is added to the logits.
    """
    modules = attention_modules(model)
    pooled = getattr(model, "attn_pool", None) is not None or getattr(model, "rope", None) is not None
    return bool(modules) and not pooled and all(type(module) is Attention for module in modules)


def _grid_of(embed: Any, image: tuple[int, int]) -> tuple[int, int]:
    """Return patches down and across of an image of the input size."""
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
    """Return (height, width) in pixels of a cell of the grid.

    Raises:
        UserError: The cells do not tile the image.
    """
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
    """Return whether it is SwinV2's attention: explicit, of normalised q and k, with a bias from a small network."""
    return all(hasattr(attention, name) for name in ("logit_scale", "cpb_mlp", "attn_drop"))


def outputs(model: nn.Module, images: Tensor, what: str = "logits") -> Tensor:
    """Return logits or features of images, in the precision of the pass.

    This is always one call of the model itself, never of its parts, and returns what that call returns: DeepSpeed
    gathers sharded weights at the call, and starts the backward pass at the returned tensor.

    Args:
        model: The model.
        images: Normalised images [B, C, H, W].
        what: `logits` [B, classes], or `features` [B, width], the input of the last linear layer.

    Raises:
        UserError: A norm over the batch got a batch of one image.
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
    """Check that a model's features can be read, as one vector of `model_info().width` for each image.

    Raises:
        UserError: They cannot.
    """
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
    """Turn gradient checkpointing on.

    Raises:
        UserError: The model does not support it.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError):
        raise UserError(
            f"{type(model).__name__} has no gradient checkpointing; leave out gradient_checkpointing "
            "(--gradient-checkpointing), and use a smaller batch with accumulation_steps"
        ) from None


@contextlib.contextmanager
def forwarding(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the forward function of a module within the context; its hooks still run."""
    before = vars(module).get("forward")  # another wrapper's, if there is one
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the attention of each block, first block first; empty if one of them cannot be captured."""
    modules = [getattr(block, "attn", None) for block in getattr(model, "blocks", [])]
    usable = [m for m in modules if m is not None and hasattr(m, "q_norm") and hasattr(m, "k_norm")]
    return usable if len(usable) == len(modules) else []
