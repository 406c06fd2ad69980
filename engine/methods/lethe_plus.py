"""LetheViT+: distil an estimate of the predictions of a model that was not trained on the forget set. Our own method.

LetheViT pulls the output for a forget image towards the original's output for its masked copy, and repairs afterwards.
Measured against retrained models, that target is further from their outputs than the original's plain output is, and
the repair undoes most of the forget phase (docs/lab/2026-11-21.md). So the target here is another one, and there is one
phase. With f_o the frozen original:

    p(x) = mean over small shifts T of softmax f_o(T x)
    q(x) = p(x), with the log-odds of its true class y set to a quantile of f_o's log-odds on held-out samples of class
           y: the quantile of the rank that x has by the log-odds of p among the forget samples of class y
    L    = R(x_r) + w KL(q_s(x_f) || f(x_f))        retain x_r and forget x_f in every step; R = CE(f(x_r), y_r)

q_s is q with s added to the log-odds of y. s starts at 0 and follows the remaining memorisation. After every step

    s <- s - c / (all steps) (mean over its forget samples of l(f(x)) - l(q(x)) - d)
    d  = mean over held-out samples of l(f(x)) - l(f_o(x)), classes as frequent as in the forget set
    l: log-odds of y, clipped to [-5, 5]: differences between confident predictions do not matter, and would dominate
       if all samples are easy

A target is never reached exactly, least for the most memorised samples. s lowers the target until the mean log-odds on
the forget set are those of held-out samples, by the model as it is now: q has those of the original, and training moves
them (docs/lab/2026-12-01.md). s starts after a tenth of the steps: before that, the difference is due to targets that
are not yet learned, and following it would lower the target too far.

Why p: memorisation of an image depends on its exact pixels, so shifted copies (1/16 and 1/8 of the side, edges
mirrored) estimate the prediction without it. Why q: a mean over views is underconfident, while a model that was not
trained on x predicts with the confidence that it has on held-out images. If the retain set has no sample of a class, q
gives the class probability 0, as a model trained without it would.

Retain images are not augmented: they preserve the predictions for the images themselves. Forget images are augmented,
so that all views of the training are forgotten.

A small request takes natural gradient steps (`engine.methods.common.natural_gradient`), with the Fisher matrix of
`fisher_samples` retain samples, on

    KL(q(x_f) || f(x_f)) + KL(q_T(x_f) || f(T x_f)) + v KL(f_o(x_r) || f(x_r))

over all forget samples, and over `retain_batch` retain samples and one shift T that change in each step. The last term
is needed since the matrix leaves out what layers have in common. A pass over the retain set would cost what the passes
of a large request cost, and AdamW's steps on few retain samples do not keep the predictions for the others
(docs/lab/2026-11-30.md). s is updated after the first quarter of the steps, by c / 40. Ranks in q are those among 150
retain samples, which the model was trained on too, so that a request of a single sample has one; both distributions are
taken relative to the mean of the class, which all classes share. q_T(x) is softmax f_o(T x), with the log-odds of y
mapped from those of the 150 retain samples under such shifts to those of held-out samples under them. A model may have
memorised the pixels of an image and know nothing of a shifted copy. Without this term, the predictions for copies fall
below those for held-out images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import positive_or_null, require
from engine.core.method import Context, Method, register
from engine.core.phase import ExtraPasses, Phase, StepCounts, edit_phase, paired_phase
from engine.core.search_space import Range, rate, tunable
from engine.data import Batch, Loader, Samples
from engine.errors import UserError
from engine.methods.common.distillation import divergence
from engine.methods.common.gradients import mean_over
from engine.methods.common.held_out_change import HeldOutChange
from engine.methods.common.kronecker import KroneckerFisher
from engine.methods.common.log_odds import log_odds, quantiles_in_order, quantiles_of, with_log_odds
from engine.methods.common.natural_gradient import descend
from engine.methods.common.shifts import offsets, one_shift, shifts
from engine.models.capture import not_compiled
from engine.models.losses import cross_entropy
from engine.models.vit import outputs

# Peak learning rate times the width of the model; see docs/lab/2026-11-21-lethe-plus.md.
LR_PER_WIDTH = 0.0768
# Shifts, the smallest ones, that a small request trains on.
_TRAINED_SHIFTS = 4
# Share of the steps after which s is updated.
_WARMUP_FRACTION = 0.1
# The same of a small request, and the steps that it counts in the correction of s.
_SMALL_WARMUP_FRACTION, _CORRECTED_STEPS = 0.25, 40
# Lengths that the line search of a step tries, as a plan counts them; most steps try one.
_PLANNED_TRIALS = 2
# Smallest share of the weights in linear layers: less are not enough to forget by.
_LEAST_LINEAR = 0.5
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
            samples than retain samples.
        forget_passes: Passes over the forget set in the same steps.
        lr: Peak learning rate; null: 0.0768 / width.
        small_share: A request with at most this share of the number of retain samples is a small one; 0: none is. It
            takes the next five options, `views` and `calibrate`, and none of the others.
        small_steps: Natural gradient steps.
        retain_batch: Retain samples of such a step.
        retain_weight: v.
        fisher_samples: Retain samples, at most, of the Fisher matrix.
        damping: Added to its eigenvalues, relative to their mean.
        forget_weight: w.
        correction: c; 0: s stays 0.
        views: p is the mean over shifted images; false: the original's prediction for the image itself.
        calibrate: q has the log-odds of held-out samples; false: those of p.
        augment_retain: Augment retain images by the run's option `augment`.
    """

    epochs: float = tunable(2.25, Range(0.75, 6, step=0.75))
    forget_passes: float = tunable(11.0, Range(3, 18))
    lr: float | None = tunable(None, rate(LR_PER_WIDTH))
    small_share: float = 0.0115
    small_steps: int = 12
    retain_batch: int = 50
    retain_weight: float = 3.0
    fisher_samples: int = 250
    damping: float = 0.3
    forget_weight: float = tunable(1.0, Range(0.5, 8.0, log=True))
    correction: float = 8.5
    views: bool = True
    calibrate: bool = True
    augment_retain: bool = False

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        require(self.forget_passes > 0, "forget_passes", self.forget_passes, "above 0")
        require(0 <= self.small_share <= 1, "small_share", self.small_share, "between 0 and 1")
        require(self.small_steps >= 1, "small_steps", self.small_steps, "at least 1")
        require(self.retain_batch >= 1, "retain_batch", self.retain_batch, "at least 1")
        require(self.retain_weight >= 0, "retain_weight", self.retain_weight, "0 or more")
        require(self.fisher_samples >= 1, "fisher_samples", self.fisher_samples, "at least 1")
        require(self.damping > 0, "damping", self.damping, "above 0")
        positive_or_null(self, "lr")
        require(self.forget_weight > 0, "forget_weight", self.forget_weight, "above 0")
        require(self.correction >= 0, "correction", self.correction, "0 or more")


@register
class LethePlus(Method):
    name = "lethe_plus"
    summary = "distils estimated predictions of a model not trained on the forget set; cross-entropy on the retain set"
    Config = LethePlusConfig
    takes_original = True
    after_collapse = "Lower the rate (--set lr=...); for a small request, raise the damping (--set damping=...)"

    def __init__(self, config: LethePlusConfig, context: Context) -> None:
        super().__init__(config, context)
        self.shift = torch.zeros((), dtype=torch.float64, device=context.device)  # s
        self._differences = self.shift.new_zeros(2)  # of this step, on this rank: sum and number of the differences
        self.held_out_odds = torch.zeros(0)  # log-odds of f_o on the held-out samples, for a large request
        self._resumed_change: float | None = None  # d of the checkpoint that the run is continued from
        if self.small:
            self._check_small()

    def _check_small(self) -> None:
        """Check that natural gradient steps can be taken, see `KroneckerFisher`."""
        trainable, original = self.context.run.trainable, self.context.original
        what = f"lethe_plus edits the weights of linear layers for {len(self.context.forget)} samples"
        if trainable.startswith("lora"):
            raise UserError(
                f"option trainable={trainable!r}: {what}; use trainable=all, head or last:N, or small_share=0"
            )
        linear = sum(each.weight.numel() for each in original.modules() if isinstance(each, nn.Linear))
        share = linear / sum(each.numel() for each in original.parameters())
        if share < _LEAST_LINEAR:
            raise UserError(
                f"{what}, and {type(original).__name__} has {share:.0%} of its weights there; use small_share=0"
            )

    @classmethod
    def regime(cls, config: LethePlusConfig, forget: int, retain: int) -> str:
        return "small" if forget <= config.small_share * retain else "large"

    @property
    def small(self) -> bool:
        """Whether the request is small."""
        return self.regime(self.config, len(self.context.forget), len(self.context.retain)) == "small"

    @classmethod
    def why_one_process(cls, config: LethePlusConfig, forget: int, retain: int) -> str:
        if cls.regime(config, forget, retain) == "large":
            return ""
        return f"it edits whole weights for {forget} samples of {forget + retain} (small_share=0 trains instead)"

    @classmethod
    def held_bytes(cls, config: LethePlusConfig, model: nn.Module, forget: int, retain: int) -> dict[str, int]:
        small = cls.regime(config, forget, retain) == "small"
        return {"Fisher matrix": KroneckerFisher.bytes_of(model)} if small else {}

    def phases(self) -> list[Phase]:
        config = self.config
        if self.small:
            return [edit_phase("forget")]
        retain = len(self.context.retain)
        visits = config.forget_passes * len(self.context.forget)
        epochs = max(config.epochs, visits / retain)
        return [
            paired_phase(
                epochs,
                self.learning_rate(config.lr, LR_PER_WIDTH),
                augment=config.augment_retain,
                paired_share=visits / retain / epochs,
                augment_paired=True,
            )
        ]

    def passes(self, phases: list[Phase], number: int, taken: StepCounts) -> list[ExtraPasses]:
        config, forget = self.config, len(self.context.forget)
        views = len(offsets(*taken.image)) if config.views else 1
        if not self.small:
            if not config.calibrate:
                return [ExtraPasses(name="teacher outputs", images=forget * views)]
            found = [ExtraPasses(name="teacher outputs", images=forget * views + taken.held_out)]
            if config.correction:
                images = HeldOutChange.images(taken.steps, taken.held_out)
                found.append(ExtraPasses(name="change of held-out predictions", images=images))
            return found
        images = forget * views
        if config.calibrate:
            images += min(_RANKED, len(self.context.retain)) * views
            images += min(_HELD_OUT, taken.held_out) * (1 + config.views)
        fisher = 2 * min(config.fisher_samples, len(self.context.retain))
        retained = config.small_steps * min(config.retain_batch, len(self.context.retain))
        steps = config.small_steps * forget * (1 + config.views) + retained
        images += retained
        return [
            ExtraPasses(name="teacher outputs", images=images),
            ExtraPasses(name="Fisher matrix", images=fisher, backward=1, kind="training"),
            ExtraPasses(name="natural gradient steps", images=steps, backward=1, kind="training"),
            ExtraPasses(name="line search", images=_PLANNED_TRIALS * steps),
        ]

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
                self.held_out_odds = after[0]
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
        return {"targets": self.targets, "shifted targets": self.shifted_targets, "held-out odds": self.held_out_odds}

    def load_cache_state(self, phase: Phase, prepared: dict[str, Tensor]) -> None:
        self.targets, self.shifted_targets = prepared["targets"], prepared["shifted targets"]
        self.held_out_odds = prepared["held-out odds"]

    @functools.cached_property
    def _change(self) -> HeldOutChange | None:
        """Measures d; None for a run that does not need it."""
        if not (len(self.held_out_odds) and self.config.correction):
            return None
        held_out = self.held_out("whose log-odds the targets get")
        change = HeldOutChange(self.context, held_out, _clipped(self.held_out_odds))
        change.value = self._resumed_change
        return change

    def edit(self, model: nn.Module, phase: Phase) -> None:
        if self.small:
            with not_compiled(model):  # hooks are not called within a compiled model
                self._descend(model.eval(), phase)

    def _descend(self, model: nn.Module, phase: Phase) -> None:
        """Take the natural gradient steps of a small request."""
        context, config = self.context, self.config
        order = np.random.default_rng([context.run.seed, len(context.retain)]).permutation(len(context.retain))

        def retained(start: int, count: int) -> Loader:
            """Return a loader of `count` retain samples in the drawn order, from `start` on; the order starts again."""
            chosen = np.take(order, np.arange(start, start + min(count, len(order))), mode="wrap")
            return context.loader(context.retain.subset(np.sort(chosen)), "none")

        @functools.lru_cache(maxsize=1)
        def kept(step: int) -> tuple[Loader, Tensor]:
            """Return the retain samples of a step, and the original's logits [m, C] for them."""
            loader = retained(config.fisher_samples + step * config.retain_batch, config.retain_batch)
            return loader, loader.rows(self._original_logits)[0].to(context.device)

        fisher = KroneckerFisher(model, retained(0, config.fisher_samples).ordered, context.run.seed)
        self.edited += 2 * fisher.count
        forget = context.loader(context.forget, context.run.augment)
        named = dict(model.named_parameters())
        weights = [named[name] for name in fisher.names]
        self.total_steps = config.small_steps

        def forget_loss(batch: Batch) -> Tensor:
            return torch.stack(list(self.paired_loss(model, batch, phase).values())).sum()

        def retain_loss(batch: Batch) -> Tensor:
            wanted = kept(self.step)[1][batch.index]
            return config.retain_weight * divergence(outputs(model, batch.images).float(), wanted).mean()

        def loss(step: int, weights: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
            self.step = step
            value, total, count = mean_over(forget.epoch(step), forget_loss, weights)
            self.edited += count * (2 if config.views else 1)
            if config.retain_weight:
                also, found, count = mean_over(kept(step)[0].ordered(), retain_loss, weights)
                total = [a + b for a, b in zip(total, found, strict=True)]
                value, self.edited = value + also, self.edited + count
            return float(value), total

        def gradients(step: int) -> tuple[float, dict[str, Tensor]]:
            value, total = loss(step, weights)
            return value, dict(zip(fisher.names, total, strict=True))

        def report(step: int, steps: int, numbers: dict[str, float]) -> None:
            self.after_step(model, phase)
            self.report(step, steps, {**numbers, "shift": float(self.shift)})

        descend(model, fisher, gradients, lambda step: loss(step, [])[0], config.small_steps, config.damping, report)

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"retain_ce": cross_entropy(model, batch)}

    def needs_original(self, phase: Phase, prepared: bool) -> bool:
        return not prepared or self.small

    def paired_loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        logits = outputs(model, batch.images).float()
        target = self.targets[batch.index].to(logits.device)
        true = batch.labels[:, None]
        if batch.weight:
            known = target.gather(1, true)[:, 0] > 0  # the retain set has the class
            predicted, wanted = (_clipped(log_odds(z, batch.labels)) for z in (logits.detach(), target.log()))
            self._differences += torch.stack([((predicted - wanted) * known).sum(), known.sum()])
        aim = target.log().scatter_add(1, true, self.shift.to(target).expand_as(true)).softmax(1)
        weight = 1.0 if self.small else self.config.forget_weight
        terms = {"forget_kl": weight * _divergence(logits, aim)}
        views = self.shifted_targets.shape[1]
        if views:
            view = self.step % views
            logits = outputs(model, one_shift(batch.images, view)).float()
            aim = self.shifted_targets[batch.index, view].to(logits.device)
            terms["shifted_kl"] = weight * _divergence(logits, aim)
        return terms

    def after_step(self, model: nn.Module, phase: Phase) -> None:
        warmup, steps = _WARMUP_FRACTION, self.total_steps
        if self.small:
            warmup, steps = _SMALL_WARMUP_FRACTION, _CORRECTED_STEPS
        if self._change:
            self._change.after_step(self.step, self.total_steps, functools.partial(self._odds_now, model))
        if self.step + 1 > warmup * self.total_steps:
            difference, count = self.context.world.sum(self._differences)
            rate = self.config.correction / steps
            expected = self._change.value or 0.0 if self._change else 0.0
            self.shift = self.shift - rate * (difference / count.clamp_min(1) - expected)
        self._differences = torch.zeros_like(self._differences)

    def state(self) -> dict[str, Any]:
        return {"shift": float(self.shift), "change": self._change.value if self._change else None}

    def load_state(self, state: dict[str, Any]) -> None:
        self.shift = torch.full_like(self.shift, state["shift"])
        self._resumed_change = state["change"]

    @torch.no_grad()
    def _logits_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits [B, C] of a model, float32."""
        with self.context.autocast():
            return outputs(model, batch.images).float()

    def _original_logits(self, batch: Batch) -> tuple[Tensor]:
        """Return the original's logits [B, C], float32."""
        return (self._logits_of(self.context.original, batch),)

    def _original_log_odds(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the original's log-odds [B], and the labels [B]."""
        return self._log_odds_of(self.context.original, batch)

    def _odds_now(self, model: nn.Module, samples: Samples) -> Tensor:
        """Return clipped log-odds [m] of the model that is being trained, without dropout."""
        training = model.training
        found, _ = self.context.loader(samples, "none").rows(functools.partial(self._log_odds_of, model.eval()))
        model.train(training)
        return _clipped(found)

    def _log_odds_of(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return log-odds [B] of a model, and the labels [B]."""
        return log_odds(self._logits_of(model, batch), batch.labels), batch.labels

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


def _clipped(odds: Tensor) -> Tensor:
    return odds.clamp(-_LOG_ODDS_CLIP, _LOG_ODDS_CLIP)


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean KL divergence from probabilities [B, C], which may be 0, to those of logits [B, C]."""
    return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1).mean()
