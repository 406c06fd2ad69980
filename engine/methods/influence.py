"""Influence unlearning, IU (Koh & Liang, ICML 2017, arXiv 1703.04730; Izzo et al., "Approximate Data Deletion from
Machine Learning Models", AISTATS 2021, arXiv 2002.10077), with WoodFisher's inverse (Singh & Alistarh, NeurIPS 2020,
arXiv 2004.14340), as in l1-sparse (Jia et al., NeurIPS 2023, arXiv 2304.04934) and SalUn's comparisons.

    v = n_f / n (mean of grad CE over forget samples - mean over retained ones)         n: all training samples
    F = damping I + mean over N retained samples of g_i g_i^T,    g_i: gradient of one sample's CE
    theta <- theta + alpha F^-1 v

v is what leaves the gradient of the training loss when the weight 1 / n of the forget samples is dealt out to the
retained ones; alpha = 1 is the Newton step, and the field tunes alpha. Here it is searched by default (`line_search`):
until the forget samples are answered as held-out ones are, or held-out accuracy has fallen by `max_drop` points.

WoodFisher reaches F^-1 v by the recursion of Sherman and Morrison, one sample at a time; exact, it holds N vectors as
long as the model. Here the same F^-1 v is solved for by conjugate gradients: a product F u is one pass of directional
derivatives (g_i . u, forward mode) and one backward pass over the N samples, and nothing is held but a few vectors. The
public code of l1-sparse and SalUn holds a single vector that it shrinks along each gradient, in place of F_i^-1 g_i,
which gives no inverse of F; so their alphas do not carry over. N = 1000 is theirs; damping was 1 in effect (they start
from the identity). Ours: damping and alpha below, and the solver's tolerance.

Everything is in float32 and explicit attention, whatever the run's: fused attention has no directional derivatives.
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
from engine.methods.common.gradients import dot, gradient, mean_gradient, norm, trainable
from engine.methods.common.line_search import LineSearch, SearchConfig, go, looks
from engine.models.attention import attention_backend
from engine.models.losses import cross_entropy

# The largest alpha that is looked at.
MOST = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceConfig(SearchConfig, EditConfig):
    """Options of influence unlearning, and of the repair that may follow it.

    alpha: what the step is multiplied with; null: searched in [0, 4]. max_drop, search_steps, held_out_samples: of the
    search. fisher_samples: N above, drawn among the retained samples.
    damping: see above; small: the step goes far where the retained samples do not care.
    tolerance: of the solver, the length of what is left of v relative to v. solver_steps: products F u at most.
    retain_epochs: passes over the retained samples after the edit, to repair it; 0: none, as published.
    lr: peak rate of that repair; null: 0.192 / width.
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
                    f"option {option}: influence takes directional derivatives, and it cannot; use {remedy}"
                )

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        if phases[number].name != "edit":
            return []
        forget, retain = len(self.context.forget), len(self.context.retain)
        products = self.config.solver_steps * min(self.config.fisher_samples, retain)
        # A product is a forward pass that carries a derivative along, about two, and one that is gone back through.
        curvature = ExtraPasses(name="products of the Fisher matrix", images=products, forward=3, backward=1)
        looked = [] if self.config.alpha else [looks(self.config, 1, taken.held_out, forget)]
        return [ExtraPasses(name="gradients", images=forget + retain, backward=1, kind="training"), curvature, *looked]

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
        go(model, step, config.alpha or MOST, self.search)


def fisher_product(model: nn.Module, loader: Loader, u: Sequence[Tensor], damping: float) -> list[Tensor]:
    """(damping I + mean over samples of g g^T) u, g the gradient of a sample's cross-entropy; in eval mode."""
    model.eval()
    named = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    direction = dict(zip(named, u, strict=True))
    total, count = [torch.zeros_like(each) for each in u], 0
    for batch in loader.ordered():
        if not batch.weight:  # no image of it can be read
            continue

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
    """x with product(x) = v for a positive definite product, by conjugate gradients.

    Ends when |v - product(x)| <= tolerance |v|, or after `steps` products.
    """
    x = [torch.zeros_like(each) for each in v]
    left = [each.clone() for each in v]
    towards = [each.clone() for each in v]
    squared, goal = dot(left, left), tolerance * norm(v)
    for _ in range(steps):
        if squared.sqrt() <= goal:
            break
        with torch.enable_grad():
            image = product(towards)
        length = squared / dot(towards, image)
        torch._foreach_add_(x, torch._foreach_mul(towards, length))
        torch._foreach_sub_(left, torch._foreach_mul(image, length))
        squared, before = dot(left, left), squared
        torch._foreach_mul_(towards, squared / before)
        torch._foreach_add_(towards, left)
    return x
