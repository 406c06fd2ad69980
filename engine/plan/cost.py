"""Cost of one pass of an architecture: bytes and flops, counted on tensors that have shapes but no storage.

The model runs forward and backward on fake tensors. Every storage that an operation makes is counted while it exists,
so the result is the peak of the real pass, including temporaries of the backward pass and recomputed blocks, but not
the allocator's rounding. Weights, buffers and gradients are left out: `engine.plan.memory` counts those by stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from engine.models.attention import attention_backend, capture_queries_keys
from engine.models.capture import attention_calls
from engine.models.info import ModelInfo, black_image
from engine.models.spec import ModelSpec
from engine.models.trainable import restrict
from engine.models.vit import ViTInfo, attention_modules, checkpoint_blocks, describe, plain_attention

# Batch sizes at which a pass is counted; bytes are a line through both.
_BATCHES = (2, 4)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes of a pass by batch size: fixed + per_image x batch.

    Attributes:
        fixed: Bytes for any batch size.
        per_image: Bytes of one image.
    """

    fixed: float
    per_image: float

    def at(self, batch: int) -> int:
        """Return the bytes at a batch size."""
        return max(0, round(self.fixed + self.per_image * batch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one architecture under one precision, attention and checkpointing.

    Attributes:
        parameters: Number of weights.
        largest_layer: Number of weights of the largest layer.
        outputs: Width of the logits.
        features: Width of the head's input.
        activations: Peak of a training pass above weights and gradients.
        guided: Peak of a pass without gradients, in which q and k of all blocks are kept for attention rollout.
        forward_flops, backward_flops: For one image; backward includes what checkpointing computes again.
        rollout_flops: For one image, the class row through all blocks.
        updating_flops: Backward flops if not all weights are trained; None: as backward_flops.
        image: (height, width) of the input in pixels.
    """

    parameters: int
    largest_layer: int
    outputs: int
    features: int
    activations: Bytes
    guided: Bytes
    forward_flops: int
    backward_flops: int
    rollout_flops: int
    updating_flops: int | None = None
    image: tuple[int, int] = (224, 224)

    @property
    def updating(self) -> int:
        """Flops of the backward pass of a step."""
        return self.backward_flops if self.updating_flops is None else self.updating_flops


def count_cost(
    spec: ModelSpec, *, precision: str, autocast: bool, checkpointing: bool, attention: str, trainable: str = "all"
) -> Cost:
    """Count the cost of a model; takes a few seconds for ViT-L, no data, no weights and no GPU.

    Args:
        spec: The model.
        precision: fp32 or bf16.
        autocast: bf16 is autocast over float32 weights (one process) rather than bf16 weights (DeepSpeed).
        checkpointing: Gradient checkpointing.
        attention: Implementation of attention.
        trainable: Option of the run; affects the flops alone.

    Raises:
        UserError: The architecture is unknown, or does not support checkpointing.
    """
    info = describe(on_meta(spec))
    measured = {batch: _bytes(spec, info, batch, precision, autocast, checkpointing, attention) for batch in _BATCHES}
    lines = []
    for one, other in zip(*measured.values(), strict=True):
        slope = (other - one) / (_BATCHES[1] - _BATCHES[0])
        lines.append(Bytes(one - slope * _BATCHES[0], slope))
    forward, backward = _flops(spec, info, checkpointing)
    model = on_meta(spec)
    parameters, largest_layer = count_parameters(spec)
    return Cost(
        parameters=parameters,
        largest_layer=largest_layer,
        outputs=spec.num_classes,
        features=info.width,
        activations=lines[0],
        guided=lines[1],
        forward_flops=forward,
        backward_flops=backward,
        rollout_flops=_rollout_flops(model, info),
        image=info.input_size,
        updating_flops=None if trainable == "all" else _flops(spec, info, checkpointing, trainable)[1],
    )


def _rollout_flops(model: nn.Module, info: ModelInfo) -> int:
    """Return 2 H N^2 d for each block: the logits of all heads, read once (kernels/rollout.py)."""
    if not isinstance(info, ViTInfo):
        return 0
    tokens = info.num_patches + info.num_prefix_tokens
    heads: list[Any] = attention_modules(model)
    if heads:
        return sum(2 * attention.num_heads * tokens**2 * attention.head_dim for attention in heads)
    if info.windowed:
        return 0
    with torch.no_grad(), attention_calls(model) as calls:
        model(black_image(model))
    maps = [call.query.shape for call in calls if call.query.shape[-2] == call.key.shape[-2] == tokens]
    return sum(2 * shape[1] * tokens**2 * shape[3] for shape in maps)


def count_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Return the number of weights, and that of the largest layer.

    Raises:
        UserError: The architecture is unknown.
    """
    model = on_meta(spec)
    layers = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return sum(layers), max(layers)


def on_meta(spec: ModelSpec) -> nn.Module:
    """Return a model of `spec` without storage, in eval mode."""
    with torch.device("meta"):
        return spec.build().eval()


def _bytes(
    spec: ModelSpec,
    info: ModelInfo,
    batch: int,
    precision: str,
    autocast: bool,
    checkpointing: bool,
    attention: str,
) -> tuple[int, int]:
    """Return the peaks of a training pass and of a teacher pass."""
    dtype = torch.bfloat16 if precision == "bf16" and not autocast else torch.float32
    casts = precision == "bf16" and autocast
    peaks = []
    model = on_meta(spec)  # building reads values of tensors, which fake tensors do not have
    with FakeTensorMode():
        _as_fake(model, dtype)
        if checkpointing:
            checkpoint_blocks(model)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with attention_backend(model, attention):
            for one_pass in (
                _train,
                functools.partial(_teacher_pass, keep=isinstance(info, ViTInfo) and not info.windowed),
            ):
                with _Tracker(model) as tracker:
                    images = torch.empty(batch, info.in_chans, *info.input_size, dtype=dtype)
                    one_pass(model, images, torch.autocast("cpu", torch.bfloat16, enabled=casts))
                peaks.append(tracker.peak)
    return peaks[0], peaks[1]


def _train(model: nn.Module, images: Tensor, autocast: Any) -> None:
    with autocast:
        loss = F.cross_entropy(model.train()(images).float(), torch.empty(len(images), dtype=torch.long))
    loss.backward()


@torch.no_grad()
def _teacher_pass(model: nn.Module, images: Tensor, autocast: Any, keep: bool) -> None:
    capture: Any = capture_queries_keys if plain_attention(model) else attention_calls
    with autocast, capture(model) if keep else contextlib.nullcontext():
        model.eval()(images)


def _flops(spec: ModelSpec, info: ModelInfo, checkpointing: bool, trainable: str = "all") -> tuple[int, int]:
    """Return forward and backward flops of one image, with explicit attention, whose products any implementation
    computes.

    W + B A of `lora:R` is computed once a step, not once an image, and is left out: its gradient is that of W.
    """
    model = on_meta(spec)
    if not trainable.startswith("lora"):
        restrict(model, trainable, 0)
    if checkpointing:
        checkpoint_blocks(model)
    images = torch.empty(2, info.in_chans, *info.input_size, device="meta")  # BatchNorm needs more than one image
    counts = []
    with attention_backend(model.train(), "eager"):
        with FlopCounterMode(display=False) as counter:
            output = model(images)
        counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        counts.append(counter.get_total_flops())
    return counts[0] // 2, counts[1] // 2


def _as_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace a model's meta tensors by fake tensors of the CPU; call it within FakeTensorMode.

    The CPU's fused attention saves q, k, v, its output and a row sum, as that of a GPU does; on the meta device it
    would be decomposed into explicit attention.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = torch.empty(buffer.shape, dtype=kind)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Tracker(TorchDispatchMode):
    """Counts the bytes of all existing storages that operations made, and their maximum."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = WeakIdKeyDictionary()
        for tensor in _tensors(model):
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
