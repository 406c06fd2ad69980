"""Contents of a report."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from engine.evaluate import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class GalleryItem:
    """A forget sample of the gallery.

    Attributes:
        id: Id of the sample.
        label: Class name, or the number of the class.
        image: uint8 [H, W, 3].
        scores, mask: Attention and masked patches on the patch grid, float and bool [rows, columns]; None for a model
            whose attention cannot be read.
        probabilities: Probability [0, 1] of the true class by model: "original", "unlearned", and "retrained" if there
            is one.
    """

    id: str
    label: str
    image: np.ndarray
    scores: np.ndarray | None
    mask: np.ndarray | None
    probabilities: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that report.html shows.

    Attributes:
        title: Title of the page.
        method, summary: Name of the method, and its summary in one line.
        request: spec, forget, retain, duplicates, unreadable (numbers of samples) and data (spec).
        config: Options of the run, resolved.
        metrics: Contents of metrics.json.
        history: Rows of history.jsonl.
        evaluations: Evaluations by model: "original", "unlearned", "retrained 1", ...
        gallery: Forget samples to show.
        retrain_seconds: Wall-clock time of a retrain, measured on this machine in the same run; None if no retrain was
            timed.
        environment: Versions.
        hashes: SHA-256 by name.
        proof: Verdict with its evidence, see `engine.report.proof.page`; None if it was not requested.
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
