"""LetheViT+: distil what a model that never saw the forget samples would say of them. Our own method.

LetheViT pulls a forget image towards the original's answer on its masked copy, and repairs afterwards. Measured against
retrained models, that answer is further from theirs than the original's plain one is, and the repair undoes most of the
stage (docs/lab/2026-11-21.md). So here the target is another, and both stages are one. With f_o the frozen original:

    p(x) = mean over small shifts T of softmax f_o(T x)
    q(x) = p(x), the log-odds of its true class y set to the quantile of f_o's log-odds on held-out samples of class y
           at which x stands among the forget samples of class y when they are ordered by the log-odds of p
    L    = CE(f(x_r), y_r) + w KL(q_s(x_f) || f(x_f))       retained x_r and forget x_f in every step

q_s is q with s added to the log-odds of y, and s, 0 at first, follows what is left of the memory: after every step

    s <- s - c / (all steps) mean over its forget samples of l(f(x)) - l(q(x))
    l: log-odds of y, cut to [-5, 5]: how sure is sure does not matter, and would outweigh the rest where all is easy

A target is never quite reached, least where memory is strongest; so the aim goes lower until the forget samples are
answered as surely, in the mean, as held-out samples are. That begins after a tenth of the steps: what is left before is
what has not been learned yet, and to answer it would lower the aim too far.

p, because what a model has memorised of an image is tied to its pixels, and a shifted copy (1/16 and 1/8 of the side,
edges mirrored) shows what it would have said without. q, because a mean over views is unsure of everything, while a
model that never saw x answers with the confidence it has on held-out images. Where nothing of a class is retained, no
such model knows the class: q gives it nothing.

Retained images are not augmented: they are shown to keep what is known of them, which is of the image itself. Forget
images are, so that it is forgotten in all views that were trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, Method, register
from engine.core.phase import ExtraPasses, Phase, StepCounts, paired_phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch
from engine.models.losses import cross_entropy
from engine.models.vit import outputs

# Peak rate times the width of the model; see docs/lab/2026-11-21-lethe-plus.md.
LR_PER_WIDTH = 0.0768
# Share of the steps after which the aim is corrected.
_WARMUP_FRACTION = 0.1
# Log-odds beyond which an answer counts as sure: 99.3%.
_LOG_ODDS_CLIP = 5.0
# Of log-probabilities, so that a class that no view names can be raised by its log-odds.
_MIN_PROB = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class LethePlusConfig:
    """Options of LetheViT+.

    epochs: passes over the retained samples, at least. forget_passes: forget samples taken in the same steps, in passes
    over all of them; where they are so many that a step would hold more forget than retained samples, the steps are
    more instead. lr: peak rate; null: 0.0768 / width. forget_weight: w above.
    views: p is the mean over shifted images; false: the original's answer on the image itself.
    correction: c above; 0: s stays 0.
    calibrate: q has the log-odds of held-out samples; false: those of p.
    augment_retain: augment retained images as the run says.
    """

    epochs: float = tunable(2.25, Range(0.75, 6, step=0.75))
    forget_passes: float = tunable(11.0, Range(3, 18))
    lr: float | None = tunable(None, rate(LR_PER_WIDTH))
    forget_weight: float = tunable(1.0, Range(0.5, 8.0, log=True))
    correction: float = 8.5
    views: bool = True
    calibrate: bool = True
    augment_retain: bool = False

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        require(self.forget_passes > 0, "forget_passes", self.forget_passes, "above 0")
        positive_or_null(self, "lr")
        require(self.forget_weight > 0, "forget_weight", self.forget_weight, "above 0")
        require(self.correction >= 0, "correction", self.correction, "0 or more")


@register
class LethePlus(Method):
    name = "lethe_plus"
    summary = "distils what a model that never saw the forget samples would say, beside the retained ones"
    Config = LethePlusConfig

    def __init__(self, config: LethePlusConfig, context: Context) -> None:
        super().__init__(config, context)
        self.shift = torch.zeros((), dtype=torch.float64, device=context.device)  # s
        self._left = self.shift.new_zeros(2)  # of this step, on this rank: sum and number of the mean's terms

    def phases(self) -> list[Phase]:
        config = self.config
        ratio = config.forget_passes * len(self.context.forget) / len(self.context.retain)  # in retained passes
        epochs = max(config.epochs, ratio)
        return [
            paired_phase(
                epochs,
                self.learning_rate(config.lr, LR_PER_WIDTH),
                augment=config.augment_retain,
                paired_share=ratio / epochs,
                augment_paired=True,
            )
        ]

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        config = self.config
        views = len(offsets(*taken.image)) if config.views else 1
        targets = len(self.context.forget) * views + (taken.held_out if config.calibrate else 0)
        return [ExtraPasses(name="teacher outputs", images=targets)]

    def prepare(self, phase: Phase) -> None:
        context, config = self.context, self.config
        labels = torch.from_numpy(context.forget.labels)
        loader = context.loader(context.forget, "none")
        (logits,) = loader.rows(self._views_mean if config.views else self._answers)
        known = torch.zeros(context.num_classes, dtype=torch.bool)
        known[torch.from_numpy(context.retain.labels).unique()] = True
        if config.calibrate:
            held_out = self.held_out("to answer as it answers on those")
            answers, true = context.loader(held_out, "none").rows(lambda batch: (*self._answers(batch), batch.labels))
            logits = with_log_odds_of(logits, labels, log_odds(answers, true), true)
        self.targets = logits.masked_fill(~known, -torch.inf).softmax(1)

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        return {"targets": self.targets}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        self.targets = prepared["targets"]

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"retain_ce": cross_entropy(model, batch)}

    def paired_loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        logits = outputs(model, batch.images).float()
        target = self.targets[batch.index].to(logits.device)
        true = batch.labels[:, None]
        if batch.weight:
            known = target.gather(1, true)[:, 0] > 0  # something of the class is retained
            predicted, wanted = (
                log_odds(z, batch.labels).clamp(-_LOG_ODDS_CLIP, _LOG_ODDS_CLIP)
                for z in (logits.detach(), target.log())
            )
            self._left += torch.stack([((predicted - wanted) * known).sum(), known.sum()])
        aim = target.log().scatter_add(1, true, self.shift.to(target).expand_as(true)).softmax(1)
        divergence = F.kl_div(logits.log_softmax(1), aim, reduction="none").sum(1)
        return {"forget_kl": self.config.forget_weight * divergence.mean()}

    def after_step(self, model: nn.Module, phase: Phase) -> None:
        if self.step + 1 > _WARMUP_FRACTION * self.total_steps:
            left, count = self.context.world.sum(self._left)
            rate = self.config.correction / self.total_steps
            self.shift = self.shift - rate * left / count.clamp_min(1)
        self._left = torch.zeros_like(self._left)

    def state(self) -> dict[str, Any]:
        return {"shift": float(self.shift)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.shift = torch.full_like(self.shift, state["shift"])

    @torch.no_grad()
    def _answers(self, batch: Batch) -> tuple[Tensor]:
        """Logits [B, C] float32 of the original."""
        with self.context.autocast():
            return (outputs(self.context.original, batch.images).float(),)

    def _views_mean(self, batch: Batch) -> tuple[Tensor]:
        """Log of the mean probability [B, C] over shifted views."""
        predicted = [
            self._answers(dataclasses.replace(batch, images=shifted))[0].softmax(1) for shifted in shifts(batch.images)
        ]
        return (torch.stack(predicted).mean(0).clamp_min(_MIN_PROB).log(),)


def shifts(images: Tensor) -> Iterator[Tensor]:
    """Copies [B, C, H, W] moved by 1/16 and 1/8 of the side along an axis, or 3/32 along both; edges mirrored."""
    height, width = images.shape[-2:]
    down, across = _most(height), _most(width)
    padded = F.pad(images, (across, across, down, down), mode="reflect")
    for i, j in offsets(height, width):
        yield padded[..., down + i : down + i + height, across + j : across + j + width]


def offsets(height: int, width: int) -> list[tuple[int, int]]:
    """The shifts of images of a size in pixels; of small images several are the same."""
    steps = [(i * size, j * size) for size in (1 / 16, 1 / 8) for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    steps += [(i * 3 / 32, j * 3 / 32) for i in (1, -1) for j in (1, -1)]
    return list(dict.fromkeys((_pixels(i, height, _most(height)), _pixels(j, width, _most(width))) for i, j in steps))


def _most(side: int) -> int:
    """The largest shift along a side, in pixels."""
    return max(1, side // 8)


def _pixels(share: float, side: int, most: int) -> int:
    """A shift in whole pixels, at least one and at most `most`, where it is any."""
    count = min(most, max(1, round(abs(share) * side))) if share else 0
    return count if share > 0 else -count


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds [n] float64 of the class `labels` [n] by logits [n, C]: z_y - logsumexp of the others."""
    others = logits.double().scatter(1, labels[:, None], -torch.inf)
    return logits.double().gather(1, labels[:, None])[:, 0] - others.logsumexp(1)


def with_log_odds_of(logits: Tensor, labels: Tensor, odds: Tensor, classes: Tensor) -> Tensor:
    """Logits [n, C] whose true classes have the distribution of other log-odds, the order among samples kept.

    In each class, the sample of rank i of m gets the quantile (i + 1/2) / m of those `odds` [h] whose `classes` [h] are
    its own; of all of them where the class has none. Logits of other classes stay as they are.
    """
    mine = log_odds(logits, labels)
    changed = logits.clone()
    for label in labels.unique():
        members = torch.where(labels == label)[0]
        theirs = odds[classes == label] if (classes == label).any() else odds
        ranks = mine[members].argsort().argsort()
        wanted = torch.quantile(theirs, (ranks.double() + 0.5) / len(members))
        others = logits[members].double()
        others[:, label] = -torch.inf
        changed[members, label] = (others.logsumexp(1) + wanted).to(logits.dtype)
    return changed
