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
no forget sample twice in a step, so that its cost follows its size. It differs in three ways.

    q(x)   ranks are those among 150 retain samples, which the model was trained on too, so that a request of a single
           sample has one; both distributions are taken relative to the mean of the class, which all classes share
    R(x_r) KL(f_o(x_r) || f(x_r)): at the start its gradient is 0, so it adds no noise. The cross-entropy of the few
           samples that are taken costs the others two points of accuracy (docs/lab/2026-11-30.md)
    L      R(x_r) + 2 w (KL(q_s(x_f) || f(x_f)) + KL(q_T(x_f) || f(T x_f))), with one small shift T in each step

q_T(x) is softmax f_o(T x), with the log-odds of y mapped from those of the 150 retain samples under such shifts to
those of held-out samples under them. A model may have memorised the pixels of an image and know nothing of a shifted
copy. Without this term few steps on x lower the predictions for copies as well, below those for held-out images.

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
import itertools
from collections.abc import Iterator
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
from engine.methods.common.log_odds import log_odds, quantiles_in_order, quantiles_of, with_log_odds
from engine.models.losses import cross_entropy
from engine.models.vit import outputs

# Peak learning rate times the width of the model; see docs/lab/2026-11-21-lethe-plus.md, and for small requests
# docs/lab/2026-11-30.md: that for one forget sample, and the power of their number that it grows with.
LR_PER_WIDTH, SMALL_LR_PER_WIDTH, _LR_POWER = 0.0768, 0.0019, 0.45
# Factor on the weights of the forget losses of a small request, and the shifts, the smallest ones, that it trains on.
_SMALL_WEIGHT, _TRAINED_SHIFTS = 2.0, 4
# Share of the steps after which s is updated.
_WARMUP_FRACTION = 0.1
# Steps that a small request counts at least in the correction of s.
_CORRECTED_STEPS = 160
# Log-odds beyond which a prediction counts as confident: 99.3%.
_LOG_ODDS_CLIP = 5.0
# Retain samples, and held-out samples, whose log-odds the targets of a small request are made from.
_RANKED, _HELD_OUT = 150, 500
# Smallest mean probability, so that the log-odds of a class with probability 0 in every view can be raised.
_MIN_PROB = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class LethePlusConfig:
    """Options of LetheViT+.

    Attributes:
        epochs: Passes over the retain set, at least. More steps are taken if a step would otherwise hold more forget
            samples than retain samples. A small request takes fewer, see `retain_ratio`.
        forget_passes: Passes over the forget set in the same steps.
        small_forget_passes: The same of a small request.
        retain_ratio: Retain samples for each forget sample of the steps, if these are less than one pass over the
            retain set: the request is then a small one. null: no request is.
        lr: Peak learning rate; null: 0.0768 / width, and for a small request of n samples 0.0019 n^0.45 / width, up to
            the former.
        forget_weight: w.
        correction: c; 0: s stays 0.
        views: p is the mean over shifted images; false: the original's prediction for the image itself.
        calibrate: q has the log-odds of held-out samples; false: those of p.
        augment_retain: Augment retain images by the run's option `augment`.
    """

    epochs: float = tunable(2.25, Range(0.75, 6, step=0.75))
    forget_passes: float = tunable(11.0, Range(3, 18))
    small_forget_passes: float = 22.0
    retain_ratio: float | None = 4.0
    lr: float | None = tunable(None, rate(LR_PER_WIDTH))
    forget_weight: float = tunable(1.0, Range(0.5, 8.0, log=True))
    correction: float = 8.5
    views: bool = True
    calibrate: bool = True
    augment_retain: bool = False

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        require(self.forget_passes > 0, "forget_passes", self.forget_passes, "above 0")
        require(self.small_forget_passes > 0, "small_forget_passes", self.small_forget_passes, "above 0")
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
    takes_original = True

    def __init__(self, config: LethePlusConfig, context: Context) -> None:
        super().__init__(config, context)
        self.shift = torch.zeros((), dtype=torch.float64, device=context.device)  # s
        self._differences = self.shift.new_zeros(2)  # of this step, on this rank: sum and number of the differences

    def phases(self) -> list[Phase]:
        config, run = self.config, self.context.run
        forget, retain = len(self.context.forget), len(self.context.retain)
        if self.small:
            passes, ratio = config.small_forget_passes, config.retain_ratio
            batch = run.batch_size * run.accumulation_steps * self.context.world.size
            steps = max(ratio * passes * forget / batch, passes)
            epochs, paired_share = ratio * passes * forget / retain, passes * forget / (steps * batch)
            share, lr = ratio * paired_share, min(LR_PER_WIDTH, SMALL_LR_PER_WIDTH * forget**_LR_POWER)
        else:
            visits = config.forget_passes * forget
            epochs, share, lr = max(config.epochs, visits / retain), 1.0, LR_PER_WIDTH
            paired_share = visits / retain / epochs
        return [
            paired_phase(
                epochs,
                self.learning_rate(config.lr, lr),
                augment=config.augment_retain,
                share=share,
                paired_share=paired_share,
                augment_paired=True,
            )
        ]

    @property
    def small(self) -> bool:
        """Whether the request is small: its steps take less than one pass over the retain set."""
        return self.regime(self.config, len(self.context.forget), len(self.context.retain)) == "small"

    @classmethod
    def regime(cls, config: LethePlusConfig, forget: int, retain: int) -> str:
        if config.retain_ratio is None:
            return "large"
        visits = config.retain_ratio * config.small_forget_passes * forget
        return "small" if visits < min(1.0, config.epochs) * retain else "large"

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        config = self.config
        views = len(offsets(*taken.image)) if config.views else 1
        images = len(self.context.forget) * views
        if config.calibrate and self.small:
            held_out = min(_HELD_OUT, taken.held_out) * (1 + config.views)
            images += min(_RANKED, len(self.context.retain)) * views + held_out
        elif config.calibrate:
            images += taken.held_out
        images += taken.images if self.small else 0
        found = [ExtraPasses(name="teacher outputs", images=images)]
        if self.small and config.views:
            found.append(ExtraPasses(name="shifted images", images=taken.paired, backward=1, kind="training"))
        return found

    def prepare(self, phase: Phase) -> None:
        context, config = self.context, self.config
        labels = torch.from_numpy(context.forget.labels)
        logits, shifted = self._estimated(context.forget)
        known = torch.zeros(context.num_classes, dtype=torch.bool)
        known[torch.from_numpy(context.retain.labels).unique()] = True
        if config.calibrate:
            held_out = self.held_out("whose log-odds the targets get")
            held_out = self._drawn(held_out, _HELD_OUT) if self.small else held_out
            after = context.loader(held_out, "none").rows(self._original_log_odds)
            if self.small:
                ranked = self._drawn(context.retain, _RANKED)
                before, shifted_before = self._estimated(ranked)
                of_before = torch.from_numpy(ranked.labels)
                odds = log_odds(before, of_before)
                wanted = quantiles_of((log_odds(logits, labels), labels), (odds, of_before), after)
                shifted = self._as_held_out(shifted, labels, shifted_before, of_before, held_out)
            else:
                wanted = quantiles_in_order(log_odds(logits, labels), labels, *after)
            logits = with_log_odds(logits, labels, wanted)
        self.targets = logits.masked_fill(~known, -torch.inf).softmax(1)
        self.shifted_targets = shifted.masked_fill(~known, -torch.inf).softmax(2)

    def _as_held_out(
        self, shifted: Tensor, labels: Tensor, before: Tensor, of_before: Tensor, held_out: Samples
    ) -> Tensor:
        """Return the logits [n, V, C] of V shifted views with the log-odds that held-out samples have under them.

        Args:
            shifted, labels: Logits [n, V, C] to map, and classes [n].
            before, of_before: Those [a, V, C] and [a] of samples that the model was trained on too.
            held_out: Samples that it was not trained on; each is shifted in one of the V ways.
        """
        views = shifted.shape[1]
        if not views:
            return shifted
        after = []
        for view in range(min(views, len(held_out))):
            part = held_out.subset(np.arange(view, len(held_out), views))

            def rows(batch: Batch, view: int = view) -> tuple[Tensor, Tensor]:
                return self._original_log_odds(dataclasses.replace(batch, images=one_shift(batch.images, view)))

            after.append(self.context.loader(part, "none").rows(rows))
        flat, classes = shifted.flatten(0, 1), labels.repeat_interleave(views)
        old, of_old = before.flatten(0, 1), of_before.repeat_interleave(views)
        wanted = quantiles_of(
            (log_odds(flat, classes), classes),
            (log_odds(old, of_old), of_old),
            [torch.cat(each) for each in zip(*after, strict=True)],
        )
        return with_log_odds(flat, classes, wanted).view_as(shifted)

    def _drawn(self, samples: Samples, most: int) -> Samples:
        """Return `most` of the samples, drawn by the run's seed; all if there are no more."""
        if len(samples) <= most:
            return samples
        chosen = np.random.default_rng([self.context.run.seed, len(samples)]).permutation(len(samples))[:most]
        return samples.subset(np.sort(chosen))

    def _estimated(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of p [n, C], or the original's logits without `views`, and those of the shifted
        images [n, V, C] that a small request trains on, V = 0 for others. On the CPU."""
        mean, shifted = self.context.loader(samples, "none").rows(self._views)
        return mean, shifted

    def cache_state(self, phase: Phase) -> dict[str, Tensor]:
        return {"targets": self.targets, "shifted targets": self.shifted_targets}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        self.targets, self.shifted_targets = prepared["targets"], prepared["shifted targets"]

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
        weight = self.config.forget_weight * (_SMALL_WEIGHT if self.small else 1.0)
        terms = {"forget_kl": weight * _divergence(logits, aim)}
        views = self.shifted_targets.shape[1]
        if views:
            view = self.step % views
            logits = outputs(model, one_shift(batch.images, view)).float()
            aim = self.shifted_targets[batch.index, view].to(logits.device)
            terms["shifted_kl"] = weight * _divergence(logits, aim)
        return terms

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

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the log of the mean probability [B, C] over shifted views, and the logits of the first [B, V, C]."""
        if not self.config.views:
            (logits,) = self._original_logits(batch)
            return logits, logits[:, None][:, :0]
        views = [
            self._original_logits(dataclasses.replace(batch, images=shifted))[0] for shifted in shifts(batch.images)
        ]
        logits = torch.stack(views, 1)
        kept = _TRAINED_SHIFTS if self.small else 0
        return logits.softmax(2).mean(1).clamp_min(_MIN_PROB).log(), logits[:, :kept]


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean KL divergence from probabilities [B, C], which may be 0, to those of logits [B, C]."""
    return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1).mean()


def one_shift(images: Tensor, view: int) -> Tensor:
    """Return the copies of images [B, C, H, W] that `shifts` yields as number `view`."""
    return next(itertools.islice(shifts(images), view, None))


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
