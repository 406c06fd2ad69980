"""Attention of models, and the original's predictions for images whose most attended patches are masked.

There are two questions. Has unlearning moved the attention on the forget images, and is it now that of a retrained
model? And does LetheViT's assumption hold (arXiv 2508.01569)? It pulls the model towards f_o(x_masked), the original's
output for the image without its most attended patches, in place of f_o(x). That is justified if f_o(x_masked) is closer
than f_o(x) to the outputs of a retrained model for x; and, if attention matters, closer than f_o with as many patches
masked at random. On test images, which neither model was trained on, masking removes the same evidence and no
memorisation: an effect that occurs there too is not forgetting.

Scores are those of `engine.models.attention_masking`: attention rollout, or Swin's rule. Masked pixels are black.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from engine.config import require
from engine.data import Batch, Loader, Preprocessing, Samples
from engine.data.samples import evenly_spaced
from engine.errors import UserError
from engine.evaluate.intervals import bootstrap_means, percentiles, proportion
from engine.evaluate.options import MeasureOptions
from engine.models.attention_masking import count_masked, random_masks, scores_and_outputs, top_mask
from engine.models.info import num_classes_of
from engine.models.predict import Predictions
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import ViTInfo, attention_info, outputs
from engine.runtime.device import autocast, resolve_device, resolve_precision
from lethe_kernels import mask_patches

# Inputs of the original: the image, the image without its most attended patches, without as many random ones.
READINGS = ("unmasked", "masked", "random")

DIRECTION = {
    "iou": "intersection over union of the k most attended patches, mean over images; 1 = the same, chance = unrelated",
    "spearman": "rank correlation of the attention scores of all patches, mean over images; 1 = the same order",
    "top1": "share of samples on which the original's output and the retrained models have the same class; higher = "
    "more like retrained",
    "kl": "KL(retrained || reading) in nats; lower = more like retrained",
    "masked_less_unmasked": "top1 above 0 and kl below 0 = masking makes the original more like a retrained model",
    "masked_less_random": "top1 above 0 and kl below 0 = and attention does so more than chance",
}


def attention_report(
    original: nn.Module,
    models: Mapping[str, nn.Module],
    references: Mapping[str, nn.Module],
    forget: Samples,
    test: Samples,
    *,
    share: float = 0.05,
    batch_size: int = 100,
    options: MeasureOptions | None = None,
) -> dict[str, Any]:
    """Compare attention maps of all models with the original's and the references', and evaluate it on masked images.

    Args:
        original: The model before unlearning.
        models, references: Models by name, none of them "original".
        forget, test: The sets; of each at most `options.max_samples` are used, at equal distances.
        share: Share of the patches that count as most attended, and are masked.
        batch_size: Samples of a forward pass.
        options: Options of the measurement; its seed is that of random masks and of intervals. None: the defaults.

    Returns:
        share, k, patches, samples, direction, `chance` (the IoU of random patches), `overlap`: by set, model and other
            model (the original and the references) iou and spearman; and `reading` (None without references): by set
            and reading (READINGS) top1 and kl compared with the references (mean over them) and accuracy,
            masked_less_unmasked and masked_less_random, and between_references (None for one reference). Intervals are
            95%, bootstrapped over samples.

    Raises:
        UserError: A set is empty, a name occurs twice, or a model has other patches or classes than the original.
    """
    options = options or MeasureOptions()
    require(0 < share < 1, "share", share, "between 0 and 1")
    everyone = _checked_models(original, models, references)
    info = attention_info(original)
    k = count_masked(info, share)
    passes = _Passes(everyone, tuple(references), k, batch_size, options)
    sets = {name: evenly_spaced(each, options.max_samples, name) for name, each in (("forget", forget), ("test", test))}
    overlap: dict[str, Any] = {}
    reading: dict[str, Any] = {}
    for set_name, samples in sets.items():
        if not len(samples):
            raise UserError(f"attention: the {set_name} set has no samples")
        overlap[set_name], compared = passes.compare(samples)
        if compared is not None:
            reading[set_name] = compared
    return {
        "share": share,
        "k": k,
        "patches": info.num_patches,
        "samples": {name: len(each) for name, each in sets.items()},
        "direction": DIRECTION,
        "chance": {"iou": chance_iou(info.num_patches, k)},
        "overlap": overlap,
        "reading": reading or None,
    }


def _checked_models(
    original: nn.Module, models: Mapping[str, nn.Module], references: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return all models by name, the original first.

    Raises:
        UserError: A name occurs twice, or a model has other patches or classes than the original.
    """
    wanted = attention_info(original).grid, num_classes_of(original)
    everyone = {"original": original, **models, **references}
    if len(everyone) != 1 + len(models) + len(references):
        raise UserError("attention: a name is given twice; name models and references apart, and none 'original'")
    for name, model in everyone.items():
        grid, classes = attention_info(model).grid, num_classes_of(model)
        if (grid, classes) != wanted:
            raise UserError(
                f"attention: {name} has a grid of {grid} patches and {classes} classes, the original {wanted[0]} and "
                f"{wanted[1]}; only models of the same can be compared"
            )
    return everyone


class _Passes:
    """Forward passes of all models over a set, and the comparisons of what they return.

    Args:
        models: Models by name, the original first.
        references: Names of the references.
        k: Number of most attended patches.
        batch_size: Samples of a forward pass.
        options: Options of the measurement.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        references: Sequence[str],
        k: int,
        batch_size: int,
        options: MeasureOptions,
    ) -> None:
        self._models, self._references, self._k = models, references, k
        self._batch_size, self._options = batch_size, options
        self._device = resolve_device(options.device)
        self._precision = resolve_precision(options.precision, self._device)

    def compare(self, samples: Samples) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return (overlap of attention maps, readings of masked images; None without references) for one set."""
        scores: dict[str, np.ndarray] = {}
        predictions: dict[str, Predictions] = {}
        readings: dict[str, Predictions] = {}
        loaders: dict[Preprocessing, Loader] = {}
        for name, model in self._models.items():
            model.to(self._device).eval()
            preprocessing = preprocessing_of(model)
            if preprocessing not in loaders:  # decoded images are kept between models
                loaders[preprocessing] = self._loader(samples, preprocessing)
            loader = loaders[preprocessing]
            scores[name], predictions[name] = _scores_and_predictions(model, loader, self._precision)
            if name == "original" and self._references:
                readings = read_masked(model, loader, self._k, precision=self._precision, seed=self._options.seed)
        overlap = {name: self._overlaps(name, scores) for name in self._models}
        if not self._references:
            return overlap, None
        of_references = [predictions[name] for name in self._references]
        return overlap, _compare_readings(readings, of_references, self._options.seed)

    def _loader(self, samples: Samples, preprocessing: Preprocessing) -> Loader:
        return Loader(samples, preprocessing, batch_size=self._batch_size, device=self._device, **self._options.loading)

    def _overlaps(self, name: str, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
        others = (other for other in ("original", *self._references) if other != name)
        return {other: _overlap(scores[name], scores[other], self._k, self._options.seed) for other in others}


# --- maps -------------------------------------------------------------------------------------------------------------


def _scores_and_predictions(model: nn.Module, loader: Loader, precision: str) -> tuple[np.ndarray, Predictions]:
    """Return attention scores [n, P] of each sample, and predictions, from one pass."""
    info = attention_info(model)

    def of(batch: Batch) -> tuple[Tensor, ...]:
        with autocast(loader.device, precision):
            scores, logits = scores_and_outputs(model, batch.images, info)
        return scores.float(), logits.float(), batch.labels

    scores, logits, labels = loader.rows(of)
    found = labels >= 0
    return scores[found].numpy(), Predictions(logits[found].numpy(), labels[found].numpy())


def _overlap(first: np.ndarray, second: np.ndarray, k: int, seed: int) -> dict[str, Any]:
    return {
        "iou": _interval(top_iou(first, second, k), seed),
        "spearman": _interval(spearman(first, second), seed),
    }


def top_iou(first: np.ndarray, second: np.ndarray, k: int) -> np.ndarray:
    """Return the IoU [n] of the k patches with the highest scores [n, P]; ties go to the lowest index."""
    a, b = (top_mask(torch.from_numpy(scores), k, "rollout").numpy() for scores in (first, second))
    return (a & b).sum(1) / (a | b).sum(1)


def chance_iou(patches: int, k: int) -> float:
    """Return the expected IoU of k patches with k others that are drawn at random (hypergeometric)."""
    ways = math.comb(patches, k)
    return sum(
        math.comb(k, both) * math.comb(patches - k, k - both) / ways * both / (2 * k - both) for both in range(k + 1)
    )


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the rank correlation [n] of scores [n, P], ties at their mean rank; 0 if one of them is constant."""
    a, b = (rankdata(scores, axis=1) - (scores.shape[1] + 1) / 2 for scores in (first, second))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), size, out=np.zeros(len(a)), where=size > 0)


# --- masked images ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_masked(
    original: nn.Module, loader: Loader, k: int, *, precision: str = "fp32", seed: int = 0
) -> dict[str, Predictions]:
    """Return the original's predictions for each sample by kind of input.

    Args:
        original: The model before unlearning.
        loader: Loader of the samples.
        k: Number of masked patches.
        precision: Precision of the forward passes.
        seed: Seed of the random masks.

    Returns:
        Predictions for unmasked images, for images without the k most attended patches (masked), and for images without
            k patches that are drawn from the seed and the sample's position (random).
    """
    original.eval()
    info = attention_info(original)

    def of(batch: Batch) -> tuple[Tensor, ...]:
        with autocast(loader.device, precision):
            scores, unmasked = scores_and_outputs(original, batch.images, info)
            masks = top_mask(scores, k, "rollout"), random_masks(batch.index.tolist(), info, k, seed)
            masked = [outputs(original, _blacked(batch, mask, info, loader.preprocessing)) for mask in masks]
        return (*(logits.float() for logits in (unmasked, *masked)), batch.labels)

    *rows, labels = loader.rows(of)
    found = labels >= 0
    return {
        name: Predictions(logits[found].numpy(), labels[found].numpy())
        for name, logits in zip(READINGS, rows, strict=True)
    }


def _blacked(batch: Batch, mask: Tensor, info: ViTInfo, preprocessing: Preprocessing) -> Tensor:
    black = -torch.tensor(preprocessing.mean) / torch.tensor(preprocessing.std)  # zero before normalisation
    images = batch.images
    return mask_patches(images, mask.to(images.device), patch_size=info.patch_size, value=black.to(images))


def _compare_readings(
    readings: Mapping[str, Predictions], references: Sequence[Predictions], seed: int
) -> dict[str, Any]:
    like = {name: _likeness(reading, references) for name, reading in readings.items()}
    found: dict[str, Any] = {
        name: {
            **_intervals(like[name], seed),
            "accuracy": proportion(round(reading.accuracy * len(reading)), len(reading)).to_dict(),
        }
        for name, reading in readings.items()
    }
    for other in ("unmasked", "random"):
        difference = {key: like["masked"][key] - like[other][key] for key in ("top1", "kl")}
        found[f"masked_less_{other}"] = _intervals(difference, seed)
    found["between_references"] = None
    if len(references) > 1:
        each = [_likeness(one, [*references[:i], *references[i + 1 :]]) for i, one in enumerate(references)]
        floor = {key: np.mean([like[key] for like in each], axis=0) for key in ("top1", "kl")}
        found["between_references"] = _intervals(floor, seed)
    return found


def _likeness(reading: Predictions, references: Sequence[Predictions]) -> dict[str, np.ndarray]:
    """Return top1 and kl [n] of predictions compared with the references, mean over them."""
    top1 = [reading.logits.argmax(1) == reference.logits.argmax(1) for reference in references]
    q = reading.log_probabilities
    kl = [(np.exp(p) * (p - q)).sum(1) for p in (reference.log_probabilities for reference in references)]
    return {"top1": np.mean(top1, axis=0), "kl": np.mean(kl, axis=0)}


def _intervals(values: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    return {key: _interval(each, seed) for key, each in values.items()}


def _interval(values: np.ndarray, seed: int) -> dict[str, float]:
    """Return the mean of values [n] with its bootstrap interval."""
    drawn = bootstrap_means(values[:, None], seed=seed)[:, 0]
    return percentiles(float(values.mean()), drawn).to_dict()
