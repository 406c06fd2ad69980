"""Forget sets by the effect of a sample on the model: self-influence, and memorisation.

Self-influence (TracIn: Pruthi et al. 2020, arXiv 2002.08484) of a sample is, at one checkpoint, the squared norm of the
gradient of its own loss: how much a step on the sample alone would lower that loss. For the last layer, z = W h + b,
the gradient of cross-entropy is (p - y) h^T for W and p - y for b, so its norm is exactly

    ||p - y|| * sqrt(||h||^2 + 1)

and costs one forward pass. ||p - y|| alone is EL2N (Paul et al. 2021, arXiv 2107.07075), and the whole norm their
GraNd, of the last layer.

Deviations: one checkpoint, the final one, where TracIn sums over several of the training run; the last layer alone;
the norm rather than its square, which has the same order; EL2N and GraNd are means over several models early in
training, and here they are of the one model that is to be unlearned. At the end of training a memorised sample has a
small gradient again: `memorised` finds those, at the price of an ensemble.

Memorisation (Feldman and Zhang 2020, arXiv 2008.03703): P(f(x) = y) over models f that trained on the sample, minus
that over models that did not.
"""

from __future__ import annotations

import csv
import dataclasses
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np

from engine.data import Samples
from engine.errors import UserError
from engine.forget_sets.base import Selection, Strategy, highest, register
from engine.forget_sets.pool import Pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfluenceConfig:
    """Options of influence.

    Attributes:
        measure: gradient (norm of the last layer's gradient) | el2n (norm of the error, ||p - y||).
    """

    measure: Literal["gradient", "el2n"] = "gradient"


@register
class Influence(Strategy):
    name = "influence"
    summary = "the samples with the largest self-influence: gradient norm at the last layer"
    score = "length of the gradient of the sample's loss (measure=el2n: ||p - y||); highest first"
    Config = InfluenceConfig
    needs_model = True

    def select(self, pool: Pool) -> Selection:
        measurements = pool.measurements
        scores = measurements.error_norms
        if self.config.measure == "gradient":
            scores = scores * np.sqrt(measurements.input_norms**2 + pool.bias_weight)
        return highest(scores, pool.candidates, pool.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorisedConfig:
    """Options of memorised.

    Attributes:
        scores: File with one score for each sample; CSV with the columns `id` and `score`, or NPZ with the arrays `ids`
            and `scores`. Highest first, for any kind of score. Samples without a finite score are not chosen.
    """

    scores: str | None = None


@register
class Memorised(Strategy):
    name = "memorised"
    summary = "the samples with the highest memorisation, or any other score, of a file"
    score = "the file's; for memorisation, by how much training on the sample raises the chance of its label"
    Config = MemorisedConfig

    def select(self, pool: Pool) -> Selection:
        if not self.config.scores:
            raise UserError(
                "strategy memorised needs the scores of the samples: give --set scores=FILE, a CSV with the columns id "
                "and score, or an NPZ with the arrays ids and scores"
            )
        scores = read_scores(Path(self.config.scores), pool.samples)
        scored = np.flatnonzero(np.isfinite(scores))
        chosen = highest(scores, scored, pool.count)
        return dataclasses.replace(chosen, facts={"without_score": len(scores) - len(scored)})


def read_scores(path: Path, samples: Samples) -> np.ndarray:
    """Return the score of each sample, float64 [n], NaN for samples that the file does not have.

    Raises:
        UserError: The file has another format, an unknown id, or an id twice.
    """
    ids, scores = _npz(path) if path.suffix.lower() == ".npz" else _csv(path)
    positions = samples.positions(ids, f"scores {path}")
    if len(np.unique(positions)) < len(positions):
        twice = next(i for i, p in zip(ids, positions, strict=True) if (positions == p).sum() > 1)
        raise UserError(f"scores {path}: the id {twice!r} occurs twice; keep one score a sample")
    full = np.full(len(samples), np.nan)
    full[positions] = scores
    return full


def _csv(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            missing = {"id", "score"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"scores {path}: no column `{min(missing)}`; a CSV of scores has id and score")
            rows = [(row["id"], row["score"]) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"scores {path}: cannot be read ({_reason(error)}); give a CSV or NPZ file") from None
    try:
        return [i for i, _ in rows], np.array([float(score) for _, score in rows])
    except (TypeError, ValueError):
        raise UserError(f"scores {path}: a score is not a number; leave out the rows of samples without one") from None


def _npz(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, scores = [str(i) for i in arrays["ids"]], arrays["scores"].astype(np.float64)
    except KeyError as error:
        raise UserError(f"scores {path}: {error.args[0]}; an NPZ of scores has the arrays ids and scores") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"scores {path}: cannot be read ({_reason(error)}); give a CSV or NPZ file") from None
    if scores.shape != (len(ids),):
        raise UserError(f"scores {path}: {len(ids)} ids for scores of shape {scores.shape}; give one a sample")
    return ids, scores


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
