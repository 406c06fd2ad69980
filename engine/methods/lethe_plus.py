"""LetheViT+: distil an estimate of the predictions of a model that was not trained on the forget set. Our own method.

LetheViT pulls the output for a forget image towards the original's output for its masked copy, and repairs afterwards.
Measured against retrained models, that target is further from their outputs than the original's plain output is, and
the repair undoes most of the forget phase (docs/lab/2026-11-21.md). So the target here is another one, and there is one
phase. With f_o the frozen original:

    p(x) = mean over small shifts T of softmax f_o(T x)
    q(x) = p(x), with the log-odds of its true class y set to a quantile of f_o's log-odds on held-out samples of class
           y: the quantile of the rank that x has by the log-odds of p among the forget samples of class y
    L    = R(x_r) + w KL(q_s(x_f) || f(x_f))        retain x_r and forget x_f in every step; R = CE(f(x_r), y_r)

A small request takes less than one pass over the retain set: `retain_ratio` retain samples for each forget sample, and
no forget sample twice in a step, so that its cost follows its size. It differs in two ways.

    q(x)   ranks are those among 150 retain samples, which the model was trained on too, so that a request of a single
           sample has one; both distributions are taken relative to the mean of the class, which all classes share
    R(x_r) KL(f_o(x_r) || f(x_r)): at the start its gradient is 0, so it adds no noise. The cross-entropy of the few
           samples that are taken costs the others two points of accuracy (docs/lab/2026-11-30.md)

q_s is q with s added to the log-odds of y. s starts at 0 and follows the remaining memorisation. After every step

    s <- s - c / (all steps) mean over its forget samples of l(f(x)) - l(q(x))
    l: log-odds of y, clipped to [-5, 5]: differences between confident predictions do not matter, and would dominate
       if all samples are easy

A target is never reached exactly, least for the most memorised samples. s lowers the target until the mean log-odds on
the forget set are those of held-out samples. It starts after a tenth of the steps: before that, the difference is due
to targets that are not yet learned, and following it would lower the target too far. For the same reason a small
request counts at least 160 steps in it.

Why p: memorisation of an image depends on its exact pixels, so shifted copies (1/16 and 1/8 of the side, edges
mirrored) estimate the prediction without it. Why q: a mean over views is underconfident, while a model that was not
trained on x predicts with the confidence that it has on held-out images. If the retain set has no sample of a class, q
gives the class probability 0, as a model trained without it would.

Retain images are not augmented: they preserve the predictions for the images themselves. Forget images are augmented,
so that all views of the training are forgotten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, Method, register
from engine.core.phase import ExtraPasses, Phase, StepCounts, paired_phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch, Samples
from engine.methods.common.distillation import divergence
from engine.models.losses import cross_entropy
from engine.models.vit import outputs

# Peak learning rate times the width of the model; see docs/lab/2026-11-21-lethe-plus.md, and for small requests
# docs/lab/2026-11-30.md.
LR_PER_WIDTH, SMALL_LR_PER_WIDTH = 0.0768, 0.01024
# Share of the steps after which s is updated.
_WARMUP_FRACTION = 0.1
# Steps that a small request counts at least in the correction of s.
_CORRECTED_STEPS = 160
# Log-odds beyond which a prediction counts as confident: 99.3%.
_LOG_ODDS_CLIP = 5.0
# Retain samples, and held-out samples, whose log-odds the targets of a small request are made from.
_RANKED, _HELD_OUT = 150, 500
# Weight of the mean over all classes in that of one class, in samples.
_SHRINKAGE = 10.0
# Smallest mean probability, so that the log-odds of a class with probability 0 in every view can be raised.
_MIN_PROB = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class LethePlusConfig:
    """Options of LetheViT+.

    Attributes:
        epochs: Passes over the retain set, at least. More steps are taken if a step would otherwise hold more forget
            samples than retain samples. A small request takes fewer, see `retain_ratio`.
        forget_passes: Passes over the forget set in the same steps.
        retain_ratio: Retain samples for each forget sample of the steps, if these are less than one pass over the
            retain set: the request is then a small one. null: no request is.
        lr: Peak learning rate; null: 0.0768 / width, and for a small request 0.01024 / width.
        forget_weight: w.
        correction: c; 0: s stays 0.
        views: p is the mean over shifted images; false: the original's prediction for the image itself.
        calibrate: q has the log-odds of held-out samples; false: those of p.
        augment_retain: Augment retain images by the run's option `augment`.
    """

    epochs: float = tunable(2.25, Range(0.75, 6, step=0.75))
    forget_passes: float = tunable(11.0, Range(3, 18))
    retain_ratio: float | None = 2.0
    lr: float | None = tunable(None, rate(LR_PER_WIDTH))
    forget_weight: float = tunable(1.0, Range(0.5, 8.0, log=True))
    correction: float = 8.5
    views: bool = True
    calibrate: bool = True
    augment_retain: bool = False

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        require(self.forget_passes > 0, "forget_passes", self.forget_passes, "above 0")
        require(
            self.retain_ratio is None or self.retain_ratio >= 1,
            "retain_ratio",
            self.retain_ratio,
            "1 or more, or null",
        )
        positive_or_null(self, "lr")
        require(self.forget_weight > 0, "forget_weight", self.forget_weight, "above 0")
        require(self.correction >= 0, "correction", self.correction, "0 or more")


@register
class LethePlus(Method):
    name = "lethe_plus"
    summary = "distils estimated predictions of a model not trained on the forget set; cross-entropy on the retain set"
    Config = LethePlusConfig

    def __init__(self, config: LethePlusConfig, context: Context) -> None:
        super().__init__(config, context)
        self.shift = torch.zeros((), dtype=torch.float64, device=context.device)  # s
        self._differences = self.shift.new_zeros(2)  # of this step, on this rank: sum and number of the differences

    def phases(self) -> list[Phase]:
        config, run, retain = self.config, self.context.run, len(self.context.retain)
        visits = config.forget_passes * len(self.context.forget)
        epochs, share = max(config.epochs, visits / retain), 1.0
        paired_share = visits / retain / epochs
        if self.small:
            batch = run.batch_size * run.accumulation_steps * self.context.world.size
            steps = max(config.retain_ratio * visits / batch, config.forget_passes)
            epochs, paired_share = config.retain_ratio * visits / retain, visits / (steps * batch)
            share = config.retain_ratio * paired_share
        return [
            paired_phase(
                epochs,
                self.learning_rate(config.lr, SMALL_LR_PER_WIDTH if self.small else LR_PER_WIDTH),
                augment=config.augment_retain,
                share=share,
                paired_share=paired_share,
                augment_paired=True,
            )
        ]

    @property
    def small(self) -> bool:
        """Whether the request is small: its steps take less than one pass over the retain set."""
        config = self.config
        if config.retain_ratio is None:
            return False
        retain_visits = config.retain_ratio * config.forget_passes * len(self.context.forget)
        return bool(retain_visits < min(1.0, config.epochs) * len(self.context.retain))

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        config = self.config
        views = len(offsets(*taken.image)) if config.views else 1
        images = len(self.context.forget) * views
        if config.calibrate and self.small:
            images += min(_RANKED, len(self.context.retain)) * views + min(_HELD_OUT, taken.held_out)
        elif config.calibrate:
            images += taken.held_out
        images += taken.images if self.small else 0
        return [ExtraPasses(name="teacher outputs", images=images)]

    def prepare(self, phase: Phase) -> None:
        context, config = self.context, self.config
        labels = torch.from_numpy(context.forget.labels)
        logits = self._estimated(context.forget)
        known = torch.zeros(context.num_classes, dtype=torch.bool)
        known[torch.from_numpy(context.retain.labels).unique()] = True
        if config.calibrate:
            held_out = self.held_out("whose log-odds the targets get")
            held_out = self._drawn(held_out, _HELD_OUT) if self.small else held_out
            after = context.loader(held_out, "none").rows(self._original_log_odds)
            if self.small:
                ranked = self._drawn(context.retain, _RANKED)
                before = self._estimated(ranked), torch.from_numpy(ranked.labels)
                wanted = quantiles_of((log_odds(logits, labels), labels), (log_odds(*before), before[1]), after)
            else:
                wanted = quantiles_in_order(log_odds(logits, labels), labels, *after)
            logits = with_log_odds(logits, labels, wanted)
        self.targets = logits.masked_fill(~known, -torch.inf).softmax(1)

    def _drawn(self, samples: Samples, most: int) -> Samples:
        """Return `most` of the samples, drawn by the run's seed; all if there are no more."""
        if len(samples) <= most:
            return samples
        chosen = np.random.default_rng([self.context.run.seed, len(samples)]).permutation(len(samples))[:most]
        return samples.subset(np.sort(chosen))

    def _estimated(self, samples: Samples) -> Tensor:
        """Return the log-probabilities of p, or the original's logits without `views`: [n, C], on the CPU."""
        views = self._views_mean if self.config.views else self._original_logits
        (logits,) = self.context.loader(samples, "none").rows(views)
        return logits

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        return {"targets": self.targets}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        self.targets = prepared["targets"]

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        if not self.small:
            return {"retain_ce": cross_entropy(model, batch)}
        (original,) = self._original_logits(batch)
        return {"retain_kl": divergence(outputs(model, batch.images), original).mean()}

    def needs_original(self, phase: Phase, prepared: bool) -> bool:
        return not prepared or self.small

    def paired_loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        logits = outputs(model, batch.images).float()
        target = self.targets[batch.index].to(logits.device)
        true = batch.labels[:, None]
        if batch.weight:
            known = target.gather(1, true)[:, 0] > 0  # the retain set has the class
            predicted, wanted = (
                log_odds(z, batch.labels).clamp(-_LOG_ODDS_CLIP, _LOG_ODDS_CLIP)
                for z in (logits.detach(), target.log())
            )
            self._differences += torch.stack([((predicted - wanted) * known).sum(), known.sum()])
        aim = target.log().scatter_add(1, true, self.shift.to(target).expand_as(true)).softmax(1)
        distances = F.kl_div(logits.log_softmax(1), aim, reduction="none").sum(1)
        return {"forget_kl": self.config.forget_weight * distances.mean()}

    def after_step(self, model: nn.Module, phase: Phase) -> None:
        if self.step + 1 > _WARMUP_FRACTION * self.total_steps:
            difference, count = self.context.world.sum(self._differences)
            steps = max(self.total_steps, _CORRECTED_STEPS) if self.small else self.total_steps
            rate = self.config.correction / steps
            self.shift = self.shift - rate * difference / count.clamp_min(1)
        self._differences = torch.zeros_like(self._differences)

    def state(self) -> dict[str, Any]:
        return {"shift": float(self.shift)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.shift = torch.full_like(self.shift, state["shift"])

    @torch.no_grad()
    def _original_logits(self, batch: Batch) -> tuple[Tensor]:
        """Return the original's logits [B, C], float32."""
        with self.context.autocast():
            return (outputs(self.context.original, batch.images).float(),)

    def _original_log_odds(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the original's log-odds [B], and the labels [B]."""
        return log_odds(self._original_logits(batch)[0], batch.labels), batch.labels

    def _views_mean(self, batch: Batch) -> tuple[Tensor]:
        """Return the log of the mean probability [B, C] over shifted views."""
        predicted = [
            self._original_logits(dataclasses.replace(batch, images=shifted))[0].softmax(1)
            for shifted in shifts(batch.images)
        ]
        return (torch.stack(predicted).mean(0).clamp_min(_MIN_PROB).log(),)


def shifts(images: Tensor) -> Iterator[Tensor]:
    """Yield copies [B, C, H, W] moved by 1/16 and 1/8 of the side along an axis, or 3/32 along both; edges mirrored."""
    height, width = images.shape[-2:]
    down, across = _max_shift(height), _max_shift(width)
    padded = F.pad(images, (across, across, down, down), mode="reflect")
    for i, j in offsets(height, width):
        yield padded[..., down + i : down + i + height, across + j : across + j + width]


def offsets(height: int, width: int) -> list[tuple[int, int]]:
    """Return the (vertical, horizontal) shifts in pixels for a size of image, without repeats of small images."""
    steps = [(i * size, j * size) for size in (1 / 16, 1 / 8) for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    steps += [(i * 3 / 32, j * 3 / 32) for i in (1, -1) for j in (1, -1)]
    return list(
        dict.fromkeys(
            (_shift_in_pixels(i, height, _max_shift(height)), _shift_in_pixels(j, width, _max_shift(width)))
            for i, j in steps
        )
    )


def _max_shift(side: int) -> int:
    """Return the largest shift along a side, in pixels."""
    return max(1, side // 8)


def _shift_in_pixels(share: float, side: int, most: int) -> int:
    """Return a shift in whole pixels: 0 for a share of 0, else at least one pixel and at most `most`."""
    count = min(most, max(1, round(abs(share) * side))) if share else 0
    return count if share > 0 else -count


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-odds [n], float64, of classes `labels` [n] by logits [n, C]: z_y - logsumexp of the others."""
    others = logits.double().scatter(1, labels[:, None], -torch.inf)
    return logits.double().gather(1, labels[:, None])[:, 0] - others.logsumexp(1)


def with_log_odds(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Return logits [n, C] whose true classes `labels` [n] have the log-odds `wanted` [n]; others stay as they are."""
    true = labels[:, None]
    others = logits.double().scatter(1, true, -torch.inf).logsumexp(1)
    return logits.scatter(1, true, (others + wanted)[:, None].to(logits.dtype))


def quantiles_in_order(odds: Tensor, labels: Tensor, others: Tensor, of_others: Tensor) -> Tensor:
    """Return the quantiles of other log-odds that samples have by their order within their class.

    In each class, the sample of rank i of m gets the quantile (i + 1/2) / m of the log-odds of that class, or of all if
    there are none of the class.

    Args:
        odds, labels: Log-odds [n], and classes [n].
        others, of_others: Log-odds [h] to take the quantiles of, and their classes [h].

    Returns:
        Log-odds [n], float64.
    """
    wanted, others = torch.empty(len(odds), dtype=torch.float64), others.double()
    for label in labels.unique():
        members = torch.where(labels == label)[0]
        target = others[of_others == label] if (of_others == label).any() else others
        ranks = odds[members].argsort().argsort()
        wanted[members] = torch.quantile(target, (ranks.double() + 0.5) / len(members))
    return wanted


def quantiles_of(samples: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], after: Sequence[Tensor]) -> Tensor:
    """Map log-odds from one distribution to another by their quantiles, relative to the mean of the class.

    With m the mean of a class, shrunk towards that of all as by `_SHRINKAGE` samples of it, a sample with log-odds u of
    class y has the rank r of u - m_before(y) among those of `before`, (number below + 1/2) / (number + 1), and gets
    m_after(y) + the quantile r of u' - m_after(y') of `after`.

    Args:
        samples: Log-odds [n] to map, and classes [n].
        before: Log-odds [a] and classes [a] of the distribution that the samples are from.
        after: Those [b] of the distribution that they get.

    Returns:
        Log-odds [n], float64.
    """
    (odds, labels), (old, new) = samples, (_Centred.of(*before), _Centred.of(*after))
    below = torch.searchsorted(old.residuals, odds.double() - old.means(labels))
    ranks = (below.double() + 0.5) / (len(old.residuals) + 1)
    return new.means(labels) + torch.quantile(new.residuals, ranks)


@dataclasses.dataclass(frozen=True)
class _Centred:
    """Log-odds less the means of their classes.

    Attributes:
        residuals: [n], float64, ascending.
        overall: Mean of all log-odds.
        by_class: Shrunk mean of each class that occurs.
    """

    residuals: Tensor
    overall: float
    by_class: dict[int, float]

    @classmethod
    def of(cls, odds: Tensor, labels: Tensor) -> _Centred:
        odds = odds.double()
        overall, by_class = float(odds.mean()), {}
        for label in labels.unique():
            mine = odds[labels == label]
            by_class[int(label)] = (float(mine.sum()) + _SHRINKAGE * overall) / (len(mine) + _SHRINKAGE)
        centres = torch.tensor([by_class[int(label)] for label in labels], dtype=torch.float64)
        return cls((odds - centres).sort().values, overall, by_class)

    def means(self, labels: Tensor) -> Tensor:
        """Return the mean of the class of each label [n]; that of all for a class that does not occur."""
        return torch.tensor([self.by_class.get(int(label), self.overall) for label in labels], dtype=torch.float64)
