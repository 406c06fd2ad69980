"""OFMU (Asif and Amiri, ICLR 2026, "OFMU: Optimization-Driven Framework for Machine Unlearning", arXiv 2509.22483):
forgetting as the inner problem of a bi-level one, retaining as the outer.

    inner, T steps    climb   P = L_f - b cos(grad L_f, grad L_r)
    outer, one step   descend L_r + rho |grad P|^2,  whose gradient is grad L_r + 2 rho (Hessian of P) grad P

and so on in turns. L_f, L_r: cross-entropy on a forget batch and on a retain batch. The cosine keeps forgetting out of
the direction in which the retain loss changes; the penalty keeps the outer step near solutions of the inner problem.

P contains gradients, so its gradient is a Hessian-vector product, and the outer step needs another product of that. All
are exact, by differentiating the backward pass. Fused attention cannot be differentiated twice, and torch's layer norm
not three times (in 2.15 the third derivative is wrong, without a warning). So this method's passes use explicit
attention and layer norms written out, whatever the run's options; attention maps of N x N for each head are then kept
in memory. torch.compile, xformers and gradient checkpointing are refused.

Departures: AdamW takes all steps and both kinds share its moments, where the paper has two rates for plain gradient
steps; their ratio is `ascent` here, a factor on the inner objective. With accumulation, cos and |grad P|^2 are those of
each micro-batch. The penalty's weight is constant. Our choices: all defaults, since the paper's are for language models
and no public code is known to us.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, Method, register
from engine.core.phase import ExtraPasses, Phase, StepCounts, paired_phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.errors import UserError
from engine.methods.common.gradients import dot, norm, trainable
from engine.models.attention import attention_backend
from engine.models.losses import cross_entropy
from engine.models.vit import forwarding

LR_PER_WIDTH = 0.032


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfmuConfig:
    """Options of OFMU.

    Attributes:
        epochs: Steps of both kinds, in passes over the retain set; every step also takes a forget batch.
        lr: Peak learning rate; null: 0.032 / width.
        ascent_steps: T.
        ascent: Weight of the inner objective.
        similarity: b.
        stationarity: rho; 0: the outer step is plain descent, without second derivatives.
        forget_share: Size of the forget batch relative to the retain batch.
    """

    epochs: float = 1.0
    lr: float | None = tunable(None, rate(LR_PER_WIDTH))
    ascent_steps: int = 1
    ascent: float = tunable(0.1, Range(0.01, 1.0, log=True))
    similarity: float = 0.1
    stationarity: float = 1e-3
    forget_share: float = 0.5

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        positive_or_null(self, "lr")
        require(self.ascent_steps >= 1, "ascent_steps", self.ascent_steps, "at least 1")
        require(self.ascent > 0, "ascent", self.ascent, "above 0")
        require(self.similarity >= 0, "similarity", self.similarity, "0 or more")
        require(self.stationarity >= 0, "stationarity", self.stationarity, "0 or more")
        require(self.forget_share > 0, "forget_share", self.forget_share, "above 0")


@register
class Ofmu(Method):
    name = "ofmu"
    summary = "OFMU: ascent with decorrelated gradients inside, retained loss outside, Hessian-vector products"
    Config = OfmuConfig
    one_process = "it differentiates gradients, and DeepSpeed takes a backward pass only once"

    def __init__(self, config: OfmuConfig, context: Context) -> None:
        super().__init__(config, context)
        run = context.run
        for given, option, remedy in (
            (run.compile, "compile=true", "compile=false"),
            (run.attention == "xformers", "attention='xformers'", "attention=auto"),
            (run.gradient_checkpointing, "gradient_checkpointing=true", "a smaller batch_size"),
        ):
            if given:
                raise UserError(
                    f"option {option}: ofmu differentiates the backward pass, which that option rules out; use {remedy}"
                )
        self._retain: Tensor | None = None  # loss of the retain batch, kept for `paired_loss`

    def phases(self) -> list[Phase]:
        lr = self.learning_rate(self.config.lr, LR_PER_WIDTH)
        return [paired_phase(self.config.epochs, lr, paired_share=self.config.forget_share)]

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        config = self.config
        cycle = config.ascent_steps + 1
        inner = sum(step % cycle < config.ascent_steps for step in range(taken.steps)) / max(1, taken.steps)
        # Forward and backward cost 3 forward passes; differentiated once, three times that; twice, nine times.
        both, again = taken.images + taken.paired, "gradients of gradients"
        if config.stationarity:
            outer = ExtraPasses(name=again, images=(1 - inner) * both, forward=0, backward=12)
        else:
            outer = ExtraPasses(name=again, images=(1 - inner) * taken.images, forward=0, backward=1)
        return [ExtraPasses(name=again, images=inner * both, forward=0, backward=3), outer]

    @property
    def inner(self) -> bool:
        """Whether the current step is an inner one."""
        return self.step % (self.config.ascent_steps + 1) < self.config.ascent_steps

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        with _differentiable(model):
            self._retain = cross_entropy(model, batch)
        return {"retain_ce": self._retain.detach() if self.inner else self._retain}

    def paired_loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        config = self.config
        retain, self._retain = self._retain, None
        assert retain is not None
        with _differentiable(model):
            forget = cross_entropy(model, batch)
        with self._full_precision():
            weights = trainable(model)
            objective = forget - config.similarity * self._cosine(forget, retain, weights)
            if self.inner:
                return {"inner": -config.ascent * objective, "stationarity": torch.zeros_like(forget)}
            if config.stationarity == 0:
                return {"inner": torch.zeros_like(forget), "stationarity": torch.zeros_like(forget)}
            slope = torch.autograd.grad(
                objective, weights, create_graph=True, allow_unused=True, materialize_grads=True
            )
            return {"inner": torch.zeros_like(forget), "stationarity": config.stationarity * dot(slope, slope)}

    def _cosine(self, forget: Tensor, retain: Tensor, weights: list[Tensor]) -> Tensor:
        """Return the differentiable cosine of the gradients of two losses."""
        g_f, g_r = (
            torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True, materialize_grads=True)
            for loss in (forget, retain)
        )
        return dot(g_f, g_r) / (norm(g_f) * norm(g_r)).clamp_min(torch.finfo(torch.float32).tiny)

    @contextlib.contextmanager
    def _full_precision(self) -> Iterator[None]:
        """Disable autocast: backward passes must not run under it."""
        with torch.autocast(self.context.device.type, enabled=False):
            yield


@contextlib.contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Make the model's forward passes differentiable any number of times within the context."""
    with attention_backend(model, "eager"), contextlib.ExitStack() as replaced:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                replaced.enter_context(forwarding(module, functools.partial(_layer_norm, module)))
        yield


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Compute a layer norm from elementary operations."""
    x = x.float() if x.itemsize < 4 else x  # as under autocast
    dims = tuple(range(-len(norm.normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    x = centred * (centred.square().mean(dims, keepdim=True) + norm.eps).rsqrt()
    x = x if norm.weight is None else x * norm.weight
    return x if norm.bias is None else x + norm.bias
