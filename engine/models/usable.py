"""Prepare a user's model for a run."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from engine.errors import UserError
from engine.models.huggingface import as_classifier
from engine.models.info import unwrapped

logger = logging.getLogger(__name__)

_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def usable(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Return the module to work on: `unwrapped`, with 16-bit weights converted to float32.

    Small updates are lost in 16 bits. A classifier of transformers is wrapped, see `as_classifier`.

    Args:
        model: The user's model.
        inplace: Convert the weights in place; by default a converted model is a copy.

    Raises:
        UserError: It is not a module, or its weights are quantised or on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}, expected a torch.nn.Module or a checkpoint's path")
    model = as_classifier(unwrapped(model))
    _refuse_untrainable(model)
    half = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    if half:
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        logger.warning("the model's %s weights are converted to float32, in which it is trained and returned", kinds)
        model = (model if inplace else copy.deepcopy(model)).float()
    return model


def _refuse_untrainable(model: nn.Module) -> None:
    """Check that every weight of a model can be trained.

    Raises:
        UserError: Weights are quantised or on the meta device.
    """
    name = type(model).__name__
    for path, module in model.named_modules():
        integers = any(not (p.is_floating_point() or p.is_complex()) for p in module.parameters(recurse=False))
        if integers or type(module).__module__.startswith(_QUANTISED):
            raise UserError(
                f"{name}: {path or 'it'} ({type(module).__name__}) is quantised, and its weights cannot be changed; "
                "give the model before its quantisation, and quantise the result"
            )
    if any(p.is_meta for p in model.parameters()):
        raise UserError(f"{name}: its weights are on the meta device, without values; load them first")
