"""The model that a run changes, with its optimizer: backward, clipping, step, and the state for a resume.

`TrainEngine` is plain torch on one process; `engine.run.zero.ZeroTrainEngine` has the same interface with DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import RunConfig
from engine.models.attention import zero_key_bias_grads

# Values of the optimizer's groups that a phase may have changed: schedules set rates and momenta.
_FRESH = {"betas": (0.9, 0.999), "eps": 1e-8}


class TrainEngine:
    """The model that a run changes and its optimizer, in plain torch on one process.

    Args:
        model: The model.
        run: Options of the run.
        scales: Factors on the learning rate by the `id` of a parameter, see `Method.lr_scales`.

    Attributes:
        model: The model that losses are computed with.
        module: The classifier itself, if `model` is a wrapper of it.
        trainable: Parameters that require a gradient, in the model's order.
        optimizer: AdamW over all of them; its first group holds the rate of the step.
    """

    def __init__(self, model: nn.Module, run: RunConfig, scales: Mapping[int, float] | None = None) -> None:
        self.model = self.module = model
        self.run = run
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        groups = _scaled(self.trainable, scales) if scales else self.trainable
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=run.weight_decay, fused=True)
        self.hooks = zero_key_bias_grads(model)
        self._apart: list[list[Tensor]] | None = None

    def begin_phase(self, lr: float) -> None:
        """Reset the optimizer: zero moments, zero steps, the given learning rate."""
        for state in self.optimizer.state.values():
            for moment in state.values():
                moment.zero_()
        for group in self.optimizer.param_groups:
            group.pop("initial_lr", None)
            group.update(_FRESH, lr=lr * group.get("lr_scale", 1.0), weight_decay=self.run.weight_decay)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; `loss` has the weight 1 / accumulation_steps."""
        (loss / self.run.accumulation_steps if self.run.accumulation_steps > 1 else loss).backward()

    def keep_gradients(self, main: Tensor, paired: Tensor) -> None:
        """Add the gradients of two losses of one micro-batch each, separately; `set_gradients` combines them."""
        parameters = self.trainable
        found = [
            torch.autograd.grad(
                loss / self.run.accumulation_steps, parameters, allow_unused=True, materialize_grads=True
            )
            for loss in (main, paired)
        ]
        if self._apart is None:
            self._apart = [list(each) for each in found]
        else:
            for kept, each in zip(self._apart, found, strict=True):
                torch._foreach_add_(kept, each)

    def set_gradients(self, combine: Callable[[list[Tensor], list[Tensor]], list[Tensor]]) -> None:
        """Set the gradient of the next step to `combine` of the two gradients that `keep_gradients` stored."""
        assert self._apart is not None
        combined, self._apart = combine(*self._apart), None
        for parameter, gradient in zip(self.trainable, combined, strict=True):
            parameter.grad = gradient

    def step(self) -> Tensor | float:
        """Clip the gradients, take a step, and drop the gradients; return their global norm before clipping."""
        for parameter in self.trainable:
            # A parameter without a gradient of the loss still decays, as under DeepSpeed; a frozen one does not.
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def weights(self) -> dict[str, Tensor] | None:
        """Return a copy of all weights and buffers by name, in host memory of the main rank; None on other ranks."""
        return {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor] | None) -> None:
        """Load what `weights` returned; every rank calls it."""
        assert weights is not None
        self.model.load_state_dict(weights)

    def save(self, folder: Path) -> None:
        """Save weights and optimizer into an existing folder, for `load`; every rank calls it."""
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / "model.pt")

    def load(self, folder: Path) -> None:
        """Load what `save` wrote; every rank calls it."""
        state = _read(folder)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    @staticmethod
    def read_weights(folder: Path) -> dict[str, Tensor]:
        """Return the weights of what `save` wrote, on the CPU."""
        return _read(folder)["model"]

    def groups(self) -> list[dict[str, Any]]:
        """Return rates and momenta of the optimizer's groups, as plain values."""
        return [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]

    def set_groups(self, groups: list[dict[str, Any]]) -> None:
        """Set what `groups` returned."""
        for group, values in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(values)

    def finish(self) -> nn.Module:
        """Return the changed model, with whole weights on every rank; the engine cannot be used afterwards."""
        for hook in self.hooks:
            hook.remove()
        return self.model


def _scaled(parameters: Sequence[nn.Parameter], scales: Mapping[int, float]) -> list[dict[str, Any]]:
    """Return groups of parameters with one factor each, the largest factor first."""
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": found[scale], "lr_scale": scale} for scale in sorted(found, reverse=True)]


def _read(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
