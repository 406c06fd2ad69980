"""Ensembles: each target sample is in the training set of K models and outside that of K others.

The prediction of one model for a sample shows little of whether the model was trained on it: easy samples have a low
loss in models not trained on them. An ensemble has both cases of the same sample (Carlini et al. 2022, "Membership
Inference Attacks From First Principles", arXiv 2112.03570; Feldman & Zhang 2020, "What Neural Networks Memorize and
Why", 2008.03703).

**Training sets.** The 2K models come in pairs. For each pair the targets are cut at random into three parts of equal
size, A, B and C. The *original* is trained on A and B, the *retrained* model on C, and both on all training samples
that are not targets. So each target is in exactly one training set of each pair: in K of the 2K. When the original then
forgets A (or B), what remains of its training set is of the same size, and drawn in the same way, as that of the
retrained model: exact unlearning makes models of exactly the retrained ones' distribution, which halves against halves
(LiRA's own draw) would not give. Every pair has a cut of its own. Pairs that rotate the parts of one cut would count
evenly, but each would be the other's opposite, and an attack fitted to one would be wrong on the other.

**The cache** is a folder with a timm checkpoint for each model, named by the SHA-256 of all that the model depends on:
architecture, recipe, training samples, seed, version. A model is trained in a temporary folder and renamed when it is
complete. After an interruption, complete models are reused and the others are resumed after their last epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from engine._version import __version__
from engine.config import RunConfig, split_options, to_dict
from engine.core.result import Progress
from engine.data import Loader, Samples, Source, open_source, read_forget_request
from engine.data.samples import evenly_spaced, image_digest
from engine.errors import RunStopped, UserError
from engine.evaluate.agreement import margins
from engine.methods import get_method
from engine.models.checkpoint import load_checkpoint, weights_sha256
from engine.models.predict import predict
from engine.models.preprocessing import preprocessing_of
from engine.models.spec import ModelSpec
from engine.run.unlearn import train
from engine.runtime import lock
from engine.runtime.device import resolve_device, resolve_precision
from engine.runtime.files import sync, write_json

Job = TypeVar("Job")
Result = TypeVar("Result")

FORMAT = 1  # of the cache
FEWEST_PAIRS = 3  # two to fit variances to while one is attacked
OUT = 2  # the part that the retrained model is trained on, and the original is not
CLIP = 100.0  # limit of margins: a probability that rounds to 1 has an infinite one

# Options that do not change what a model learns.
_HOW_NOT_WHAT = ("seed", "device", "workers", "timeout", "checkpoint_every")
_IMAGES_HASHED = 16
_READ_AT_ONCE = 250


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleSpec:
    """Definition of an ensemble.

    Attributes:
        data: A data source.
        targets: A request (file, class:NAME, random:FRACTION@SEED) for the targets in its training set.
        model: The architecture.
        recipe: Options of `engine.train` by name, except the seed.
        pairs: K, at least 3.
        seed: Seed of the cuts; model i is trained with seed + i.
    """

    data: str
    targets: str
    model: ModelSpec
    recipe: Mapping[str, Any]
    pairs: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs < FEWEST_PAIRS:
            raise UserError(
                f"ensemble: {self.pairs} models with each target are too few to fit distributions; take at least "
                f"{FEWEST_PAIRS}, better 16"
            )
        if "seed" in self.recipe:
            raise UserError("ensemble: each model has a seed of its own; give --seed, the first of them")
        split_options(self.recipe, get_method("retrain").Config)  # an unknown option is an error now

    def run(self) -> RunConfig:
        return split_options(self.recipe, get_method("retrain").Config)[0]


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """2K trained models and their margins; rows 2p and 2p + 1 are the original and the retrained model of pair p.

    Attributes:
        parts: int8 [K, t], the part (0, 1, 2 for A, B, C) of each target in each pair's cut.
        margins: float64 [2K, t], log(p / (1 - p)) of the true class, clipped to +-100.
        keys, folders: Content key and folder of each model.
        train_seconds: float64 [2K], wall-clock time of each model's training, which may be an earlier one.
        seconds: Wall-clock time of this call.
    """

    spec: EnsembleSpec
    targets: Samples
    parts: np.ndarray
    margins: np.ndarray
    keys: list[str]
    folders: list[Path]
    train_seconds: np.ndarray
    seconds: float

    @property
    def included(self) -> np.ndarray:
        """Whether a model was trained on a target, bool [2K, t]; exactly K in each column."""
        return _included(self.parts)

    @property
    def confidence(self) -> np.ndarray:
        """Probability of the true class, float64 [2K, t]."""
        return 1 / (1 + np.exp(-self.margins))


@dataclasses.dataclass(frozen=True)
class Needs:
    """Resources for training an ensemble.

    Attributes:
        missing, found: Numbers of models to be trained and of models in the cache.
        weights: Bytes of one model's weights.
        disk: Most bytes on disk; a model in training keeps its last two checkpoints, of weights and Adam's two moments.
    """

    missing: int
    found: int
    weights: int
    disk: int


def memorisation(ensemble: Ensemble) -> np.ndarray:
    """Return the memorisation of each target, float64 [t] in [-1, 1] (Feldman & Zhang 2020, eq. 1).

    It is the mean probability of the true label over models trained on the sample, minus that over models that were
    not. Higher = more memorised; near 0 = predicted as well without it. Originals are compared with originals and
    retrained models with retrained ones, since an original has more targets in its training set; the two differences
    have the same weight, since they have as many models. NaN for a target that all originals, or none, were trained on.
    """
    differences = []
    for first in (0, 1):
        inside, confidence = ensemble.included[first::2], ensemble.confidence[first::2]
        with np.errstate(invalid="ignore"):
            known = (confidence * inside).sum(0) / inside.sum(0)
            differences.append(known - (confidence * ~inside).sum(0) / (~inside).sum(0))
    return np.mean(differences, axis=0)


def draw_parts(targets: int, pairs: int, seed: int) -> np.ndarray:
    """Return the part of each target in each pair's cut, int8 [pairs, targets]. More pairs add rows and change none."""
    parts = np.empty((pairs, targets), dtype=np.int8)
    for pair in range(pairs):
        parts[pair, np.random.default_rng([seed, pair]).permutation(targets)] = np.arange(targets) * 3 // targets
    return parts


def _included(parts: np.ndarray) -> np.ndarray:
    included = np.empty((2 * len(parts), parts.shape[1]), dtype=bool)
    included[0::2], included[1::2] = parts != OUT, parts == OUT
    return included


@dataclasses.dataclass(frozen=True)
class Opened:
    """The data of an ensemble.

    Attributes:
        source: The data source.
        positions: Positions of the targets in the training set, int64 [t], ascending.
        targets: The targets.
    """

    source: Source
    positions: np.ndarray
    targets: Samples

    def without(self, leave_out: np.ndarray, name: str) -> Samples:
        """Return the training samples except some targets (bool [t]), in their order."""
        keep = np.ones(len(self.source.train), dtype=bool)
        keep[self.positions[leave_out]] = False
        return self.source.train.subset(np.flatnonzero(keep), name)


# One entry: a worker process opens the same data for each of its models.
@functools.lru_cache(maxsize=1)
def open_data(data: str, targets: str) -> Opened:
    """Return the data of an ensemble; the last one is cached."""
    source = open_source(data)
    request = read_forget_request(targets, source.train)
    if len(request.indices) < 3:
        raise UserError(f"ensemble: {targets} names {len(request.indices)} targets; cuts need at least 3")
    return Opened(source, request.indices, source.train.subset(request.indices, f"{source.train.name} (targets)"))


@dataclasses.dataclass(frozen=True)
class _Training:
    """A model to be trained.

    Attributes:
        included: bool [t], targets in its training set.
    """

    spec: EnsembleSpec
    seed: int
    included: np.ndarray
    key: str
    folder: Path


def _trainings(spec: EnsembleSpec, cache: Path) -> tuple[Opened, np.ndarray, list[_Training]]:
    open_data.cache_clear()  # files may have changed since the last ensemble of this process
    opened = open_data(spec.data, spec.targets)
    parts = draw_parts(len(opened.targets), spec.pairs, spec.seed)
    common = content_key(
        {
            "model": dataclasses.asdict(spec.model),
            "recipe": what_counts(spec.recipe, "retrain"),
            "images": image_digest(evenly_spaced(opened.source.train, _IMAGES_HASHED)),
        }
    )
    jobs = []
    for number, included in enumerate(_included(parts)):
        samples = opened.without(~included, "members")
        key = content_key({"common": common, "samples": samples.fingerprint(), "seed": spec.seed + number})
        jobs.append(_Training(spec, spec.seed + number, included, key, cache / f"model-{key}"))
    return opened, parts, jobs


def content_key(facts: Mapping[str, Any]) -> str:
    """Return 32 hex digits of the SHA-256 over plain values, this version and the cache's format."""
    text = json.dumps({**facts, "version": __version__, "format": FORMAT}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def what_counts(options: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return every option, resolved with defaults, except those that do not change what a model learns."""
    run, config = split_options(options, get_method(method).Config)
    run = dataclasses.replace(run, precision=resolve_precision(run.precision, resolve_device(run.device)))
    resolved = {"method": method, **to_dict(run), **to_dict(config)}
    return {key: value for key, value in resolved.items() if key not in _HOW_NOT_WHAT}


def ensemble_needs(spec: EnsembleSpec, cache: Path, workers: int = 1) -> Needs:
    """Return the resources that `train_ensemble` will need.

    Raises:
        UserError: The disk of the cache has less free space.
    """
    jobs = _trainings(spec, cache)[2]
    found = sum(_is_whole(job.folder) for job in jobs)
    missing = len(jobs) - found
    with torch.device("meta"):
        weights = sum(t.numel() * t.element_size() for t in spec.model.build().state_dict().values())
    needs = Needs(missing, found, weights, weights * (missing + 6 * min(workers, missing)))
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needs.disk:
        raise UserError(
            f"cache {cache}: {missing} models take up to {needs.disk / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
            "free; name a folder on another disk"
        )
    return needs


def train_ensemble(spec: EnsembleSpec, cache: Path, *, workers: int = 1, progress: Progress | None = None) -> Ensemble:
    """Train the models that are not in the cache, and compute the margins of all models for the targets.

    Args:
        spec: The ensemble.
        cache: Folder of the cache.
        workers: Processes that train at once; this process's threads are divided among them. 1: this process itself.
        progress: Called with ("train", models done, models, numbers).

    Raises:
        UserError: An option is wrong, or another run uses the cache.
        RunStopped: A training or a worker ended; models that were complete by then are kept.
    """
    began = time.perf_counter()
    with holding(cache):
        opened, parts, jobs = _trainings(spec, cache)
        results = in_processes(_member, jobs, workers, "train", progress)
    return Ensemble(
        spec,
        opened.targets,
        parts,
        np.stack([result[0] for result in results]),
        [job.key for job in jobs],
        [job.folder for job in jobs],
        np.array([result[1] for result in results]),
        time.perf_counter() - began,
    )


def _is_whole(folder: Path) -> bool:
    return (folder / "member.json").is_file()


def _member(job: _Training) -> tuple[np.ndarray, float]:
    """Return the margins [t] of a model, which is trained if necessary, and the seconds of its training."""
    if not _is_whole(job.folder):
        _train(job)
    model = load_checkpoint(job.folder)
    member = json.loads((job.folder / "member.json").read_text(encoding="utf-8"))
    if weights_sha256(model) != member["weights_sha256"]:
        raise UserError(f"cache: the weights in {job.folder} are not those that were trained; remove that folder")
    opened = open_data(job.spec.data, job.spec.targets)
    return read_margins(model, opened.targets, job.spec.run()), member["seconds"]


def _train(job: _Training) -> None:
    opened = open_data(job.spec.data, job.spec.targets)
    samples = opened.without(~job.included, "members")
    partial = job.folder.with_name(f"{job.folder.name}.partial")
    begin = functools.partial(
        train,
        job.spec.model.build(job.seed),
        samples,
        config={**job.spec.recipe, "seed": job.seed},
        validation=opened.source.validation,
        output_dir=partial,
        progress=False,
    )
    resume = (partial / "config.yaml").is_file()
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed before training began
    try:
        result = begin(resume=resume)
    except UserError:
        if not resume:
            raise
        shutil.rmtree(partial)  # the remains cannot be resumed
        result = begin()
    facts = {
        "trained_on": len(samples),
        "samples_sha256": samples.fingerprint(),
        "seed": job.seed,
        "recipe": what_counts(job.spec.recipe, "retrain"),
        "version": __version__,
        "seconds": result.seconds["unlearn"],
        "weights_sha256": weights_sha256(result.model),
    }
    write_json(partial / "member.json", facts)
    os.replace(partial, job.folder)
    sync(job.folder.parent)


def read_margins(model: nn.Module, samples: Samples, run: RunConfig) -> np.ndarray:
    """Return log(p / (1 - p)) of the true class in float32, clipped, as float64 [n]; an unreadable image is an error.

    Raises:
        RunStopped: An output of the model is not finite.
    """
    device = resolve_device(run.device)
    loader = Loader(
        samples,
        preprocessing_of(model),
        batch_size=_READ_AT_ONCE,
        workers=run.workers,
        device=device,
        decode=run.decode,
    )
    values = margins(predict(model.to(device), loader))
    if np.isnan(values).any():
        raise RunStopped(
            f"the model's output for {samples.ids[int(np.isnan(values).argmax())]!r} is not finite; lower the rate "
            "that it was trained or unlearned with"
        )
    return np.clip(values, -CLIP, CLIP)


@contextlib.contextmanager
def holding(cache: Path) -> Iterator[None]:
    """Lock the cache folder for this process within the context; it is created if there is none."""
    with lock.held(cache, _in_use):
        yield


def _in_use(cache: Path, owner: lock.Owner) -> str:
    return f"cache {cache} is in use by another run ({owner}); wait for it, or name another folder"


def in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, stage: str, progress: Progress | None
) -> list[Result]:
    """Return function(job) of every job, in order.

    Args:
        function: The function.
        jobs: Its arguments.
        workers: New processes that run it; 1: this process.
        stage: Name of the work, for progress and errors.
        progress: Called with (stage, jobs done, jobs, numbers).

    Raises:
        RunStopped: A worker process died.
    """
    if workers < 1:
        raise UserError(f"{workers} workers: expected at least 1")
    report = progress or (lambda *_: None)
    began = time.perf_counter()
    report(stage, 0, len(jobs), {})
    results: dict[int, Result] = {}

    def keep(number: int, result: Result) -> None:
        results[number] = result
        report(stage, len(results), len(jobs), {"seconds": time.perf_counter() - began})

    if workers == 1:
        for number, job in enumerate(jobs):
            keep(number, function(job))
        return list(results.values())
    threads = max(1, torch.get_num_threads() // workers)
    # spawn: a fork would copy this process's thread pools in whatever state they are
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = {pool.submit(function, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                keep(futures[future], future.result())
        except BrokenProcessPool:
            raise RunStopped(
                f"{stage}: a worker process died, perhaps for lack of memory; start again with fewer --workers; "
                "finished models are kept"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [results[number] for number in range(len(jobs))]
