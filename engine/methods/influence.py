"""Influence unlearning, IU (Koh & Liang, ICML 2017, arXiv 1703.04730; Izzo et al., "Approximate Data Deletion from
Machine Learning Models", AISTATS 2021, arXiv 2002.10077), with WoodFisher's inverse (Singh & Alistarh, NeurIPS 2020,
arXiv 2004.14340), as in l1-sparse (Jia et al., NeurIPS 2023, arXiv 2304.04934) and SalUn's comparisons.

    v = n_f / n (mean of grad CE over the forget set - mean over the retain set)        n: all training samples
    F = damping I + mean over N retain samples of g_i g_i^T,    g_i: gradient of one sample's CE
    theta <- theta + alpha F^-1 v

v is the gradient of the training loss after the weight 1 / n of each forget sample is distributed over the retain set.
alpha = 1 is the Newton step; in the literature alpha is tuned. Here it is searched by default (`line_search`): until
the accuracy on the forget set is that of held-out samples, or held-out accuracy has fallen by `max_drop` points.

WoodFisher computes F^-1 v by the recursion of Sherman and Morrison, one sample at a time; the exact form keeps N
vectors of the model's size. Here the same F^-1 v is found by conjugate gradients: a product F u is one pass of
directional derivatives (g_i . u, forward mode) and one backward pass over the N samples, and only a few vectors are
kept. The public code of l1-sparse and SalUn keeps one vector that it shrinks along each gradient, in place of
F_i^-1 g_i. That is not an inverse of F, so their alphas do not carry over. N = 1000 is theirs; damping was 1 in effect
(they start from the identity). Our choices: damping and alpha below, and the solver's tolerance.

All passes use float32 and explicit attention, whatever the run's options: fused attention has no directional
derivatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, register
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.data import Loader
from engine.errors import UserError
from engine.methods.common.edits import Edit, EditConfig
from engine.methods.common.gradients import dot, gradient, mean_gradient, norm, readable, trainable
from engine.methods.common.line_search import LineSearch, SearchConfig, apply_step, search_passes
from engine.models.attention import attention_backend
from engine.models.losses import cross_entropy

# The largest alpha that is evaluated.
MOST = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceConfig(SearchConfig, EditConfig):
    """Options of influence unlearning, and of the repair that may follow it.

    Attributes:
        alpha: Factor on the step; null: searched in [0, 4].
        max_drop: Percentage points of held-out accuracy that the search may lose.
        search_steps: Step sizes that the search evaluates.
        held_out_samples: Most samples of the held-out set, and of the forget set, that the search evaluates.
        fisher_samples: N, drawn from the retain set.
        damping: Multiple of the identity in F. If it is small, the step is long in directions in which the loss on the
            retain set hardly changes.
        tolerance: Tolerance of the solver: norm of the residual relative to that of v.
        solver_steps: Most products F u.
        retain_epochs: Passes over the retain set after the edit, to repair the model; 0: none, as published.
        lr: Peak learning rate of that repair; null: 0.192 / width.
    """

    alpha: float | None = None
    fisher_samples: int = 1000
    damping: float = 1e-3
    tolerance: float = 0.01
    solver_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        EditConfig.__post_init__(self)
        positive_or_null(self, "alpha")
        require(self.fisher_samples >= 1, "fisher_samples", self.fisher_samples, "at least 1")
        require(self.damping > 0, "damping", self.damping, "above 0")
        require(self.tolerance > 0, "tolerance", self.tolerance, "above 0")
        require(self.solver_steps >= 1, "solver_steps", self.solver_steps, "at least 1")


@register
class Influence(Edit):
    name = "influence"
    summary = "influence unlearning: one Newton step that takes the forget samples out, with WoodFisher's inverse"
    Config = InfluenceConfig

    def __init__(self, config: InfluenceConfig, context: Context) -> None:
        super().__init__(config, context)
        self.search = (
            None if config.alpha else LineSearch(self, config, "to search the size of its step on (or set alpha)")
        )
        for given, option, remedy in (
            (context.run.compile, "compile=true", "compile=false"),
            (context.run.gradient_checkpointing, "gradient_checkpointing=true", "a smaller batch_size"),
        ):
            if given:
                raise UserError(
                    f"option {option}: influence needs directional derivatives, which it rules out; use {remedy}"
                )

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        if phases[number].name != "edit":
            return []
        forget, retain = len(self.context.forget), len(self.context.retain)
        products = self.config.solver_steps * min(self.config.fisher_samples, retain)
        # A product is a forward pass with a directional derivative, about two passes, and one with a backward pass.
        curvature = ExtraPasses(name="products of the Fisher matrix", images=products, forward=3, backward=1)
        search = [] if self.config.alpha else [search_passes(self.config, 1, taken.held_out, forget)]
        return [ExtraPasses(name="gradients", images=forget + retain, backward=1, kind="training"), curvature, *search]

    def change(self, model: nn.Module) -> None:
        context, config = self.context, self.config
        n_f, n_r = len(context.forget), len(context.retain)
        rng = np.random.default_rng([context.run.seed, n_f, n_r])
        chosen = rng.permutation(n_r)[: config.fisher_samples]
        with attention_backend(model, "eager"):
            forget, retain = (
                mean_gradient(model, context.loader(samples, "none"), cross_entropy)
                for samples in (context.forget, context.retain)
            )
            v = [(f - r) * (n_f / (n_f + n_r)) for f, r in zip(forget, retain, strict=True)]
            loader = context.loader(context.retain.subset(np.sort(chosen), "retain (Fisher)"), "none")
            step = solve(
                lambda u: fisher_product(model, loader, u, config.damping), v, config.tolerance, config.solver_steps
            )
        apply_step(model, step, config.alpha or MOST, self.search)


def fisher_product(model: nn.Module, loader: Loader, u: Sequence[Tensor], damping: float) -> list[Tensor]:
    """Return (damping I + mean over samples of g g^T) u, with g the gradient of a sample's cross-entropy.

    Args:
        model: The model; set to eval mode, with explicit attention.
        loader: Loader of the samples.
        u: One tensor for each parameter that requires a gradient.
        damping: Multiple of the identity.
    """
    model.eval()
    named = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    direction = dict(zip(named, u, strict=True))
    total, count = [torch.zeros_like(each) for each in u], 0
    for batch in readable(loader.ordered()):

        def losses(weights: dict[str, Tensor], batch=batch) -> Tensor:  # type: ignore[no-untyped-def]
            logits = torch.func.functional_call(model, weights, (batch.images.to(u[0].dtype),))
            return F.cross_entropy(logits.float(), batch.labels, reduction="none")

        slopes = torch.func.jvp(losses, (named,), (direction,))[1]
        value = (losses(dict(zip(named, trainable(model), strict=True))) * slopes.detach()).sum()
        torch._foreach_add_(total, gradient(model, value))
        count += len(batch)
    return [each / max(1, count) + damping * x for each, x in zip(total, u, strict=True)]


@torch.no_grad()
def solve(
    product: Callable[[Sequence[Tensor]], list[Tensor]], v: Sequence[Tensor], tolerance: float, steps: int
) -> list[Tensor]:
    """Return x with product(x) = v, by conjugate gradients.

    Args:
        product: A positive definite linear map of lists of tensors.
        v: Right-hand side.
        tolerance: End when |v - product(x)| <= tolerance |v|.
        steps: Most products.
    """
    x = [torch.zeros_like(each) for each in v]
    residual = [each.clone() for each in v]
    direction = [each.clone() for each in v]
    squared, goal = dot(residual, residual), tolerance * norm(v)
    for _ in range(steps):
        if squared.sqrt() <= goal:
            break
        with torch.enable_grad():
            image = product(direction)
        length = squared / dot(direction, image)
        torch._foreach_add_(x, torch._foreach_mul(direction, length))
        torch._foreach_sub_(residual, torch._foreach_mul(image, length))
        squared, before = dot(residual, residual), squared
        torch._foreach_mul_(direction, squared / before)
        torch._foreach_add_(direction, residual)
    return x
