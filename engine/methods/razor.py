"""RAZOR (Ranjan, Grover, Lin, Polyzou, "RAZOR: Ratio-Aware Layer Editing for Targeted Unlearning in Vision Transformers
and Diffusion Models", CVPR 2026 Findings, arXiv 2603.14819): a corrective step on the few layers and heads that matter
to the forget set and not to the retain set. With g_f, g_r the gradients of the cross-entropy on the forget set and on
the retain set, for a layer or head l:

    phi(l) = |g_f| / (|theta_l| + eps) (1 - cos(g_f, g_r))^alpha
    edit set = {l: phi(l) > tau}
    d theta_l = -eta_l (-lambda_f rho g_f + g_r + lambda_m grad L_mismatch)
    eta_l by binary search on a small held-out set; then again, with the best layer that is not in the set yet;
    6 rounds at most

Not published in the sources available to us, so options or choices of ours:
- tau, alpha, rho, the lambdas. tau at null is the mean of the scores and one standard deviation; if no score is above
  it, the layer with the highest score is edited.
- L_mismatch: cross-entropy of the forget samples to one random wrong label each.
- eta_l = eta |theta_l| / |bracket_l|: eta, one for the whole set, is the share of its norm by which each layer moves.
- The search: eta in [0, max_change], halved `search_steps` times. A step is allowed if held-out accuracy is at most
  `max_drop` points below the original's. It is sufficient if accuracy on the forget set is at most the original's on
  held-out samples, weighted by the classes of the forget set, where a class that is forgotten as a whole counts zero.
  The smallest sufficient step is taken, or else the largest allowed one; a sufficient step ends the rounds.
- A head is its rows of q, k and v and its columns of the projection. Other layers are the linear and convolutional
  ones. Norms, tokens, position embeddings and the projection's bias are never edited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import require
from engine.core.heldout import ACCURACY_PASSES
from engine.core.method import Context, register
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.core.search_space import Range, tunable
from engine.data import Batch, Samples
from engine.errors import UserError
from engine.methods.common.edits import Edit, EditConfig
from engine.methods.common.gradients import mean_gradient
from engine.methods.common.line_search import LineSearch, SearchConfig, search_passes
from engine.models.losses import cross_entropy

_EPS = 1e-8

# Parts of parameters, as (name, index), that are edited together.
Unit = list[tuple[str, Any]]
Named = dict[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RazorConfig(SearchConfig, EditConfig):
    """Options of RAZOR, and of the repair that may follow it.

    Attributes:
        rounds: Most rounds.
        tau: Score above which a layer is edited; null: mean and one standard deviation of all scores.
        alpha: Weight of the angle between the gradients.
        rho, lambda_f, lambda_m: Weights in d theta_l.
        max_change: Largest step, as a share of a layer's norm.
        max_drop: Percentage points of held-out accuracy that the search may lose.
        search_steps: Step sizes that a search evaluates.
        held_out_samples: Most samples of the held-out set, and of the forget set, that a search evaluates.
        gradient_samples: Most samples of each set for a round's gradients.
        retain_epochs: Passes over the retain set after the edit, to repair the model; 0: none, as published.
        lr: Peak learning rate of that repair; null: 0.192 / width.
    """

    rounds: int = 6
    tau: float | None = None
    alpha: float = 1.0
    rho: float = 1.0
    lambda_f: float = 1.0
    lambda_m: float = 0.1
    max_change: float = tunable(0.2, Range(0.02, 1, log=True))
    search_steps: int = 6
    gradient_samples: int = 1000
    held_out_samples: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        EditConfig.__post_init__(self)
        for key in ("rounds", "gradient_samples"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in ("alpha", "rho", "lambda_f", "lambda_m"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require(self.max_change > 0, "max_change", self.max_change, "above 0")


@register
class Razor(Edit):
    name = "razor"
    summary = "RAZOR: corrective steps on the layers and heads that matter to forget samples and not to retained ones"
    Config = RazorConfig

    def __init__(self, config: RazorConfig, context: Context) -> None:
        super().__init__(config, context)
        self.search = LineSearch(self, config, "to search the size of its steps on")
        if context.num_classes < 2:
            raise UserError("razor: a model with one class has no wrong labels")
        rng = np.random.default_rng([context.run.seed, len(context.forget), len(context.retain)])
        shift = rng.integers(1, context.num_classes, size=len(context.forget))
        # Samples for the gradients, and a wrong label for each forget sample.
        chosen = rng.permutation(len(context.forget))[: config.gradient_samples]
        self.on_forget = context.forget.subset(chosen)
        self.wrong = torch.from_numpy((context.forget.labels + shift) % context.num_classes)[chosen].to(context.device)
        self.on_retain = context.retain.subset(rng.permutation(len(context.retain))[: config.gradient_samples])

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        if phases[number].name != "edit":
            return []
        config, forget = self.config, len(self.context.forget)
        some = min(config.gradient_samples, forget)
        of_round = 2 * some + min(config.gradient_samples, len(self.context.retain))
        evaluated = config.rounds * min(config.held_out_samples, forget)  # before each round
        return [
            ExtraPasses(name="gradients", images=config.rounds * of_round, backward=1, kind="training"),
            ExtraPasses(name=ACCURACY_PASSES, images=evaluated),
            search_passes(config, config.rounds, taken.held_out, forget),
        ]

    def change(self, model: nn.Module) -> None:
        found, edited = units(model), set[str]()
        weights: Named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.search.begin(model)
        for _ in range(self.config.rounds):
            if self.search.reached(model):
                break
            g_f, g_r, g_m = self.gradients(model)
            scores = {
                name: score(part(weights, unit), part(g_f, unit), part(g_r, unit), self.config.alpha)
                for name, unit in found.items()
            }
            edited = grow(scores, edited, self.config.tau)
            steps = self.steps({name: found[name] for name in sorted(edited)}, weights, g_f, g_r, g_m)
            self.search.along(model, steps, self.config.max_change)

    def gradients(self, model: nn.Module) -> Iterator[Named]:
        """Yield the gradients, by name, of cross-entropy on forget set and retain set, and of L_mismatch."""
        context = self.context

        def mismatch(model: nn.Module, batch: Batch) -> Tensor:
            return cross_entropy(model, batch, self.wrong[batch.index.to(self.wrong.device)])

        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        of: Sequence[tuple[Samples, Any]] = (
            (self.on_forget, cross_entropy),
            (self.on_retain, cross_entropy),
            (self.on_forget, mismatch),
        )
        for samples, loss in of:
            found = mean_gradient(model, context.loader(samples, "none"), loss, context.autocast)
            yield dict(zip(names, found, strict=True))

    def steps(self, edited: dict[str, Unit], weights: Named, g_f: Named, g_r: Named, g_m: Named) -> Named:
        """Return the step of eta = 1 for each parameter that the edit set is a part of; zero outside the edit set.

        Args:
            edited: The edit set, by name.
            weights: The weights, by name.
            g_f, g_r, g_m: Gradients of the three losses, by name.
        """
        config = self.config
        found = {name: torch.zeros_like(weights[name]) for unit in edited.values() for name, _ in unit}
        for unit in edited.values():
            bracket = (
                -config.lambda_f * config.rho * part(g_f, unit) + part(g_r, unit) + config.lambda_m * part(g_m, unit)
            )
            length = part(weights, unit).norm() / bracket.norm().clamp_min(torch.finfo(torch.float32).tiny)
            start = 0
            for name, index in unit:
                place = found[name][index]
                place.copy_(-length * bracket[start : start + place.numel()].view_as(place))
                start += place.numel()
        return found


def units(model: nn.Module) -> dict[str, Unit]:
    """Return the heads and layers that may be edited, by name: parts of parameters that require a gradient."""
    found: dict[str, Unit] = {}
    by_heads: set[str] = set()
    for name, module in model.named_modules():
        qkv, proj, heads = (getattr(module, key, None) for key in ("qkv", "proj", "num_heads"))
        if isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and heads:
            by_heads |= {f"{name}.qkv", f"{name}.proj"}
            width = proj.in_features // heads
            for head in range(heads):
                rows = [slice(start, start + width) for start in range(head * width, 3 * heads * width, heads * width)]
                parts: Unit = [(f"{name}.qkv.{kind}", row) for kind in ("weight", "bias") for row in rows]
                columns = (slice(None), slice(head * width, (head + 1) * width))
                found[f"{name}.head{head}"] = [*parts, (f"{name}.proj.weight", columns)]
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and name not in by_heads:
            found[name] = [(f"{name}.{kind}", ...) for kind in ("weight", "bias")]
    there = {name for name, weight in model.named_parameters() if weight.requires_grad}
    able = {name: [each for each in unit if each[0] in there] for name, unit in found.items()}
    return {name: unit for name, unit in able.items() if unit}


def part(tensors: Named, unit: Unit) -> Tensor:
    """Return the entries [n] of a unit, concatenated."""
    return torch.cat([tensors[name].detach()[index].flatten() for name, index in unit])


def score(theta: Tensor, g_f: Tensor, g_r: Tensor, alpha: float) -> float:
    """Return phi.

    Args:
        theta: Weights [n] of a layer or head.
        g_f, g_r: Their gradients [n] on the forget set and on the retain set.
        alpha: Exponent of the angle term.
    """
    lengths = (g_f.norm() * g_r.norm()).clamp_min(torch.finfo(torch.float32).tiny)
    apart = (1 - g_f @ g_r / lengths).clamp_min(0)
    return float(g_f.norm() / (theta.norm() + _EPS) * apart**alpha)


def grow(scores: dict[str, float], edited: set[str], tau: float | None) -> set[str]:
    """Return the next edit set.

    The first set holds all layers with a score above tau, or the one with the highest score if there is none. A later
    set has one more layer: the one with the highest score outside the set.

    Args:
        scores: phi by name.
        edited: The edit set so far; empty at first.
        tau: Threshold; null: mean and one standard deviation of the scores.
    """
    new = [name for name in scores if name not in edited]
    if not edited:
        values = np.array(list(scores.values()))
        threshold = values.mean() + values.std() if tau is None else tau
        above = {name for name in new if scores[name] > threshold}
        if above:
            return above
    return edited | {max(new, key=scores.__getitem__)} if new else edited
