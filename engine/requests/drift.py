"""Drift of a version from the last full retrain: samples forgotten since, and changes on the test samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config import RunConfig, split_options
from engine.data import Loader, Samples
from engine.evaluate.agreement import mean_kl
from engine.jobs.opening import open_model as load_checkpoint
from engine.methods import get_method
from engine.models.predict import Predictions, predict
from engine.models.preprocessing import preprocessing_of
from engine.requests.entries import Run
from engine.requests.run_options import Options
from engine.requests.store import Store
from engine.runtime.device import resolve_device, resolve_precision


def measure_drift(store: Store, run: Run, test: Samples, forgotten: int, options: Options) -> dict[str, Any]:
    """Return the drift of the version of a run.

    Args:
        store: The store.
        run: The run, whose version is in its folder.
        test: Test samples.
        forgotten: Number of samples that the whole lineage has forgotten.
        options: Options of the run.

    Returns:
        `forgotten`, samples since the base, `share` [0, 1] of the base's training samples, and `drift_from`.
    """
    base = store.base_of(run.parent)
    before = len(store.forgotten(base))
    since = forgotten - before
    setup, _ = split_options(options.config, get_method(options.method).Config)
    first, second = (_predictions(store.place(number), test, setup) for number in (base, run.number))
    share = since / (store.settings["train"] - before)
    return {"forgotten": since, "share": share, **drift_from(first, second)}


def drift_from(base: Predictions, model: Predictions) -> dict[str, float]:
    """Compare a version with the last full retrain, `base`, on the test samples.

    Returns:
        test_accuracy: of the version, [0, 1]. test_accuracy_change: version less base, in percentage points. test_kl:
        mean KL(base || version) in nats; 0 for equal probabilities.
    """
    return {
        "test_accuracy": model.accuracy,
        "test_accuracy_change": 100 * (model.accuracy - base.accuracy),
        "test_kl": mean_kl(base, model),
    }


def _predictions(checkpoint: Path, samples: Samples, run: RunConfig) -> Predictions:
    device = resolve_device(run.device)
    model = load_checkpoint(checkpoint).to(device)
    loader = Loader(
        samples,
        preprocessing_of(model),
        batch_size=250,
        workers=run.workers,
        device=device,
        decode=run.decode,
        on_bad_image=run.on_bad_image,
        max_bad_share=run.max_bad_share,
    )
    return predict(model, loader, resolve_precision(run.precision, device))
