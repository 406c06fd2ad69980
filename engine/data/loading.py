"""Loaders: from samples to normalised batches, the same for every number of worker processes.

Every random choice is a function of (seed, epoch, sample): a table drawn once an epoch and indexed by the sample's
position. So order and augmentation do not depend on workers, batch size or ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.data.preprocessing import Preprocessing
from engine.data.samples import BadImageError, Reduce, Samples
from engine.data.sampling import Epochs, Sampler, epoch_order
from engine.errors import RunStopped, UserError
from engine.runtime.process_group import ProcessGroup

logger = logging.getLogger(__name__)

_CACHE_BYTES = 1 << 30
_AHEAD_BYTES = 256 << 20  # decoded images that a worker prefetches, at least two batches


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of samples on the device.

    Attributes:
        images: Normalised float32 [B, C, H, W].
        labels: int64 [B].
        index: int64 [B], positions in the samples.
        weight: Weight of the mean over these samples in the mean over the step, see `engine.data.sampling`. 0 for a
            placeholder batch, which a rank needs for the collectives. An image left out as bad lowers it, as if its
            gradient were zero.
        total: Samples of the step, over all ranks.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    weight: float = 1.0
    total: int = 0

    def __len__(self) -> int:
        return len(self.labels)


class Loader:
    """Batches of samples, preprocessed for one model.

    Decoded images are kept in memory if all of them fit into 1 GiB, unless they are cropped at random.

    Args:
        samples: The samples.
        preprocessing: Preprocessing of the model.
        batch_size: Samples of a micro-batch on one rank.
        seed: Seed of order and augmentation.
        augment: none, flip, crop, or auto (by the samples).
        workers: Worker processes; None: none if the images are kept in memory, else up to 8.
        device: Device of the batches.
        world: Process group; each rank loads its share.
        micro: Micro-batches in a step.
        on_bad_image: raise BadImageError, or skip: an image that does not decode is left out of its batch, logged, and
            recorded in `bad_ids`.
        max_bad_share: With skip, share [0, 1] of the samples above which the run stops.
        decode: See RunConfig.
        counts: Samples of each epoch, if epochs use a part of the samples.
        chosen: Returns the positions of an epoch's samples, in that case.

    Attributes:
        bad_ids: Error message by id of each image that was left out.
        waited: Seconds that passes of this loader have waited for batches.
    """

    def __init__(
        self,
        samples: Samples,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        seed: int = 0,
        augment: str = "none",
        workers: int | None = None,
        device: torch.device | str = "cpu",
        world: ProcessGroup | None = None,
        micro: int = 1,
        on_bad_image: str = "raise",
        max_bad_share: float = 0.01,
        decode: str = "draft",
        counts: tuple[int, ...] | None = None,
        chosen: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self.world = world or ProcessGroup()
        self.sampler = Sampler(len(samples), batch_size, self.world.rank, self.world.size, micro)
        self.epochs, self._chosen = Epochs(counts or (len(samples),), self.sampler.per_step), chosen
        self.samples, self.preprocessing, self.seed = samples, preprocessing, seed
        self.device = torch.device(device)
        self.on_bad_image, self.max_bad_share = on_bad_image, max_bad_share
        self.bad_ids: dict[str, str] = {}
        self.waited = 0.0
        channels = len(preprocessing.mean)
        size = len(samples) * channels * preprocessing.size[0] * preprocessing.size[1]
        self.augment = self._resolve(augment, channels)
        fits = size <= _CACHE_BYTES and self.augment != "crop"
        self.workers = (0 if fits else min(8, os.cpu_count() or 1)) if workers is None else workers
        self._dataset = _Decoded(samples, preprocessing, self.augment, decode, cached=fits and self.workers == 0)

    def _resolve(self, augment: str, channels: int) -> str:
        if augment != "auto":
            return augment
        if not self.samples.natural or not len(self.samples):
            return "none"
        for index in range(len(self.samples)):
            try:
                first = self.samples.tensor(index, channels)
            except BadImageError as error:
                self._leave_out(index, error)
                continue
            fits = all(side <= wanted for side, wanted in zip(first.shape[-2:], self.preprocessing.size, strict=True))
            return "flip" if fits else "crop"
        return "none"  # only with max_bad_share=1: no image is readable

    def steps(self) -> int:
        """Return the number of optimizer steps in one pass; each has `micro` batches."""
        return self.sampler.steps()

    def ordered(self) -> Iterator[Batch]:
        """Yield this rank's share of all samples, each once, in order, without augmentation."""
        yield from self._batches(np.arange(len(self.samples)), None)

    def epoch(
        self, epoch: int, start: int = 0, stop: int | None = None, wanted: Callable[[int], bool] = lambda step: True
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch, in an order that depends on seed and epoch, augmented.

        Args:
            epoch: Number of the epoch.
            start, stop: Steps [start, stop) of the epoch.
            wanted: Returns whether a step's batches are needed; others are skipped.
        """
        order, table = epoch_order(self.seed, epoch, len(self.samples), 0 if self.augment == "none" else 5)
        if self._chosen is not None:
            order = order[np.isin(order, self._chosen(epoch))]
        yield from self._batches(order, table, start, stop, wanted)

    def steps_of(self, start: int, stop: int, wanted: Callable[[int], bool] = lambda step: True) -> Iterator[Batch]:
        """Yield the batches of the steps [start, stop), counted from epoch 0 over all epochs.

        Args:
            start, stop: The steps.
            wanted: Returns whether a step's batches are needed; others are skipped.
        """
        while start < stop:
            epoch, first, end = self.epochs.place(start)
            end = min(end, stop)
            yield from self.epoch(
                epoch,
                start - first,
                end - first,
                lambda step, first=first: wanted(first + step),  # type: ignore[misc]
            )
            start = end

    def rows(self, of: Callable[[Batch], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return the rows [n, ...] of a function for every sample, in order, on the CPU of every rank.

        Each rank computes its share. The row of a sample that was left out as bad is 0, or -1 for whole numbers.

        Args:
            of: Computes tensors [B, ...] for a batch.
        """
        kept: list[tuple[Tensor, ...]] = []
        for batch in self.ordered():
            results = (batch.index, *of(batch))
            kept.append(tuple(rows[: len(batch) if batch.weight else 0].cpu() for rows in results))
        index, *rows = (self.world.gather_rows(torch.cat(each)) for each in zip(*kept, strict=True))
        if len(index) == len(self.samples):
            order = index.argsort()
            return tuple(each[order] for each in rows)
        return tuple(_spread(each, index, len(self.samples)) for each in rows)

    def _batches(
        self,
        order: np.ndarray,
        table: np.ndarray | None,
        start: int = 0,
        stop: int | None = None,
        wanted: Callable[[int], bool] = lambda step: True,
    ) -> Iterator[Batch]:
        self._dataset.table = table
        slices = list(self.sampler.slices(order, start, stop, wanted))
        image_bytes = len(self.preprocessing.mean) * self.preprocessing.size[0] * self.preprocessing.size[1]
        ahead = _AHEAD_BYTES // max(1, image_bytes * self.sampler.batch_size)
        loader = DataLoader(
            self._dataset,
            batch_sampler=[each.index for each in slices],  # type: ignore[misc]
            collate_fn=_identity,
            num_workers=self.workers,
            prefetch_factor=min(8, max(2, ahead)) if self.workers else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # otherwise every pass would draw from the global generator
        )
        batches = iter(loader)
        try:
            for piece in slices:
                began = time.perf_counter()
                images, labels, index, bad = next(batches)
                self.waited += time.perf_counter() - began
                for position, error in bad:
                    self._leave_out(position, error)
                if images is None:  # no image is left: a black placeholder, for the collectives of this rank
                    index = torch.as_tensor(piece.index[:1])
                    labels = self._dataset.labels[index]
                    images = torch.zeros(1, len(self.preprocessing.mean), *self.preprocessing.size, dtype=torch.uint8)
                normalised = self.preprocessing.normalise(images.to(self.device, non_blocking=True))
                if self.augment != "none" and table is not None:
                    flip = torch.from_numpy(table[index.numpy(), 0] < 0.5).to(self.device)
                    normalised = torch.where(flip[:, None, None, None], normalised.flip(-1), normalised)
                weight = piece.weight * (1 - len(bad) / len(piece.index))
                yield Batch(normalised, labels.to(self.device, non_blocking=True), index, weight, piece.total)
        finally:
            # End the workers now. After an error, the garbage collector would wait for them until a timeout.
            del batches

    def _leave_out(self, index: int, error: UserError) -> None:
        """Record a bad image, or raise its error with on_bad_image=raise."""
        if self.on_bad_image == "raise" or not isinstance(error, BadImageError):
            raise error
        sample_id = self.samples.ids[index]
        if sample_id in self.bad_ids:
            return
        self.bad_ids[sample_id] = str(error)
        logger.warning("left out: %s", error)
        mine = math.ceil(len(self.samples) / self.world.size)  # samples of one rank, about
        if len(self.bad_ids) > self.max_bad_share * mine:
            raise RunStopped(
                f"{self.samples.name}: {len(self.bad_ids)} of {mine} images are bad, more than "
                f"max_bad_share={self.max_bad_share:g} allows, the last: {sample_id!r}; repair them or raise the share"
            )


def _spread(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Return rows at their positions among `count` rows."""
    full = torch.full((count, *rows.shape[1:]), 0 if rows.is_floating_point() else -1, dtype=rows.dtype)
    full[index] = rows
    return full


def _identity(batch: Any) -> Any:
    return batch


class _Decoded(Dataset[Any]):
    """A dataset that decodes and resizes whole batches (`__getitems__`), with an optional cache."""

    def __init__(self, samples: Samples, preprocessing: Preprocessing, augment: str, decode: str, cached: bool) -> None:
        self.samples, self.preprocessing, self.augment = samples, preprocessing, augment
        self.decode, self.cached = decode, cached
        self.labels = torch.tensor(samples.labels)
        self.table: np.ndarray | None = None
        self._known = np.zeros(len(samples) if cached else 0, dtype=bool)
        self._kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: np.ndarray) -> tuple[Tensor | None, Tensor, Tensor, list[tuple[int, UserError]]]:
        """Return images (None if none is readable), labels, positions, and errors of the images that are left out.

        Errors are returned, because a worker that raises would put its traceback into the message.
        """
        good: list[int] = []
        images: list[Tensor] = []
        bad: list[tuple[int, UserError]] = []
        for i in indices.tolist():
            try:
                if not self.cached:
                    images.append(self._load(i))
                elif not self._known[i]:
                    self._keep(i, self._load(i))
                good.append(i)
            except UserError as error:
                bad.append((i, type(error)(*error.args)))  # a copy: without the traceback and the cause
        index = torch.tensor(good, dtype=torch.int64)
        if not good:
            return None, self.labels[index], index, bad
        if not self.cached:
            return torch.stack(images), self.labels[index], index, bad
        assert self._kept is not None
        return self._kept[index], self.labels[index], index, bad

    def _keep(self, i: int, image: Tensor) -> None:
        if self._kept is None:
            self._kept = torch.empty((len(self.samples), *image.shape), dtype=image.dtype)
        self._kept[i] = image
        self._known[i] = True

    def _load(self, i: int) -> Tensor:
        draws = self.table[i, 1:] if self.augment == "crop" and self.table is not None else None
        reduce: Reduce | None = None
        if self.decode == "draft" and draws is not None:
            reduce = functools.partial(_crop_reduction, draws=draws, preprocessing=self.preprocessing)
        elif self.decode == "draft":
            reduce = self.preprocessing.reduction
        image = self.samples.tensor(i, len(self.preprocessing.mean), reduce)
        if draws is not None and image.dtype == torch.uint8:
            top, left, height, width = _crop_box(image.shape[-2], image.shape[-1], draws)
            return TF.resized_crop(
                image,
                top,
                left,
                height,
                width,
                list(self.preprocessing.size),
                self.preprocessing.interpolation,
                antialias=True,
            )
        return self.preprocessing.resize(image)


def _crop_reduction(height: int, width: int, draws: np.ndarray, preprocessing: Preprocessing) -> int:
    """Return by which factor an image may be decoded smaller, with its crop still as large as the model's input."""
    _, _, h, w = _crop_box(height, width, draws)
    return min(h // preprocessing.size[0], w // preprocessing.size[1])


def _crop_box(height: int, width: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the inception crop, from four uniform draws.

    Area share in [0.08, 1], aspect ratio in [3/4, 4/3], uniform position. An image that is decoded smaller is cropped
    at the same position, except for rounding.
    """
    area = height * width * (0.08 + 0.92 * float(draws[0]))
    ratio = float(np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * float(draws[1])))
    w, h = min(width, max(1, round((area * ratio) ** 0.5))), min(height, max(1, round((area / ratio) ** 0.5)))
    return int(float(draws[2]) * (height - h + 1)), int(float(draws[3]) * (width - w + 1)), h, w
