"""IAU, influence approximation unlearning (Liu et al., Efficient Machine Unlearning via Influence Approximation, 2025,
arXiv 2507.23257): one step on the whole retain set and the whole forget set.

    g = grad CE(D_r; theta_o) - grad CE(D_f; theta_o)        theta = theta_o - lr * g / (|g| + 1e-8)

CE is the mean over a set. The size of the step is not published for other models than the paper's, so by default it is
searched (`line_search`): until the accuracy on the forget set is that of held-out samples, or held-out accuracy has
fallen by `max_drop` points. The minus is the paper's incremental approximation (learning a sample with the opposite
gradient approximates removing it), grad CE(D_r) its gradient correction. The step is the first one of a fresh Adam, as
in the paper's public code, which moves every weight by about lr.

Left out: gradient restriction, an added a * sum ||grad CE|| (a = 0.005) in the loss of the *original* training, which
limits the influence of single samples. It prepares a model for later unlearning, so it does not apply to a method that
starts from a trained model.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from engine.config import positive_or_null
from engine.core.method import Context, Method, register
from engine.core.phase import ExtraPasses, Phase, StepCounts
from engine.methods.common.gradients import mean_gradient
from engine.methods.common.line_search import LineSearch, SearchConfig, apply_step, search_passes
from engine.models.losses import cross_entropy

# The largest step that is evaluated, times the width of the model.
MOST_PER_WIDTH = 0.256


@dataclasses.dataclass(frozen=True, kw_only=True)
class IAUConfig(SearchConfig):
    """Options of IAU. Those of the search have no effect if lr is given.

    Attributes:
        lr: Distance by which a weight moves; null: searched in [0, 0.256 / width].
        max_drop: Percentage points of held-out accuracy that may be lost.
        search_steps: Step sizes that are evaluated.
        held_out_samples: Most samples of the held-out set, and of the forget set, that are evaluated.
    """

    lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_or_null(self, "lr")


@register
class IAU(Method):
    name = "iau"
    summary = "influence approximation: one Adam step, down on the retain set and up on the forget set"
    Config = IAUConfig
    one_process = "its one step is taken between phases, on whole weights"

    def __init__(self, config: IAUConfig, context: Context) -> None:
        super().__init__(config, context)
        why = "to search the size of its step on (or set lr)"
        self.search = None if config.lr else LineSearch(self, config, why)

    def phases(self) -> list[Phase]:
        lr = self.learning_rate(self.config.lr, MOST_PER_WIDTH)
        return [Phase(name="forget", samples="forget", epochs=0, lr=lr, schedule="constant", guarded=True)]

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        both = len(self.context.forget) + len(self.context.retain)
        search = [] if self.config.lr else [search_passes(self.config, 1, taken.held_out, len(self.context.forget))]
        return [ExtraPasses(name="gradients", images=both, backward=1, kind="training"), *search]

    def edit(self, model: nn.Module, phase: Phase) -> None:
        context = self.context
        retain, forget = (
            mean_gradient(model, context.loader(samples, "none"), cross_entropy, context.autocast)
            for samples in (context.retain, context.forget)
        )
        up = [f - r for f, r in zip(forget, retain, strict=True)]
        apply_step(model, [g / (g.abs() + 1e-8) for g in up], phase.lr, self.search)
