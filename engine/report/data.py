"""What a report is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from engine.evaluate import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class GalleryItem:
    """A forget sample. image: uint8 [H, W, 3]. scores, mask: [rows, columns] of the patch grid, float and bool; None
    for a model without attention that can be read.

    probabilities: of the true class, by model ("original", "unlearned", and "retrained" where there is one).
    """

    id: str
    label: str
    image: np.ndarray
    scores: np.ndarray | None
    mask: np.ndarray | None
    probabilities: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that report.html shows.

    request: spec, forget, retain, duplicates (counts), data (spec). metrics: as in metrics.json. history: rows of
    history.jsonl. evaluations: by model, "original", "unlearned", "retrained 1", ... retrain_seconds: measured on
    this machine in the same run, None where no retrain was timed. environment: versions. hashes: SHA-256 by name.
    proof: the verdict with its evidence, see `engine.report.proof.page`; None where it was not asked for.
    """

    title: str
    method: str
    summary: str
    request: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    evaluations: dict[str, Evaluation]
    gallery: list[GalleryItem]
    retrain_seconds: float | None
    environment: dict[str, Any]
    hashes: dict[str, str]
    proof: dict[str, Any] | None = None
