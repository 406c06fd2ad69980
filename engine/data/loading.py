"""From samples to normalised batches, the same for every number of worker processes.

Every random choice is a pure function of (seed, epoch, sample): a table drawn once an epoch and indexed by the
sample's position. So the order and the augmentation do not depend on workers, on batch size or on ranks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode

from engine.data.samples import Samples, as_tensor
from engine.data.sampling import Sampler, epoch_order
from engine.distributed.world import World
from engine.errors import UserError
from engine.vit import describe

_CACHE_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Batch:
    """images: normalised float32 [B, C, H, W]. labels: int64 [B]. index: int64 [B], positions in the samples.

    weight: what the mean over these samples counts in the mean over the step, see `engine.data.sampling`; 0 for
    a batch that is there only to keep this rank in step. total: samples of the step, over all ranks.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    weight: float = 1.0
    total: int = 0

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images, from its pretrained_cfg (timm's keys)."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: InterpolationMode

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing:
        info = describe(model)
        config: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
        mean, std = tuple(config.get("mean", (0.5,))), tuple(config.get("std", (0.5,)))
        if len(mean) != info.in_chans:  # a grey-scale model made from a colour configuration
            mean, std = (float(np.mean(mean)),) * info.in_chans, (float(np.mean(std)),) * info.in_chans
        mode = {"bilinear": InterpolationMode.BILINEAR, "nearest": InterpolationMode.NEAREST}.get(
            config.get("interpolation", "bicubic"), InterpolationMode.BICUBIC
        )
        return cls(info.input_size, mean, std, float(config.get("crop_pct") or 1.0), mode)

    def resize(self, image: Tensor) -> Tensor:
        """timm's evaluation transform: shorter side to size / crop_pct, then the centre. An image that fits is left."""
        if tuple(image.shape[-2:]) == self.size:
            return image
        height, width = (int(s / self.crop_pct) for s in self.size)
        ratio = max(height / image.shape[-2], width / image.shape[-1])
        target = [max(height, round(image.shape[-2] * ratio)), max(width, round(image.shape[-1] * ratio))]
        return TF.center_crop(TF.resize(image, target, self.interpolation, antialias=True), list(self.size))

    def normalise(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images.float()
        mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)


class Loader:
    """Batches of some samples as one model wants them.

    Decoded images are kept in memory where all of them fit into 1 GiB, unless they are cropped at random.
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
        world: World | None = None,
        micro: int = 1,
    ) -> None:
        self.world = world or World()
        self.sampler = Sampler(len(samples), batch_size, self.world.rank, self.world.size, micro)
        self.samples, self.preprocessing, self.seed = samples, preprocessing, seed
        self.device = torch.device(device)
        channels = len(preprocessing.mean)
        size = len(samples) * channels * preprocessing.size[0] * preprocessing.size[1]
        self.augment = self._resolve(augment, channels)
        fits = size <= _CACHE_BYTES and self.augment != "crop"
        self.workers = (0 if fits else min(8, os.cpu_count() or 1)) if workers is None else workers
        self._dataset = _Decoded(samples, preprocessing, self.augment, cached=fits and self.workers == 0)

    def _resolve(self, augment: str, channels: int) -> str:
        if augment != "auto":
            return augment
        if not self.samples.natural or not len(self.samples):
            return "none"
        first = as_tensor(self.samples.image(0), channels)
        fits = all(side <= wanted for side, wanted in zip(first.shape[-2:], self.preprocessing.size, strict=True))
        return "flip" if fits else "crop"

    def steps(self) -> int:
        """Optimizer steps of one pass; `micro` batches each."""
        return self.sampler.steps()

    def ordered(self) -> Iterator[Batch]:
        """Every sample once, in order, never augmented; this rank's share of them."""
        yield from self._batches(np.arange(len(self.samples)), None)

    def epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Every sample once, in the order of (seed, epoch), augmented; of the steps [start, stop) if given."""
        order, table = epoch_order(self.seed, epoch, len(self.samples), 0 if self.augment == "none" else 5)
        yield from self._batches(order, table, start, stop)

    def rows(self, of: Callable[[Batch], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `of` gives for every sample [n, ...], in order, on the CPU of every rank; each rank computes its share."""
        kept: list[tuple[Tensor, ...]] = []
        for batch in self.ordered():
            results = (batch.index, *of(batch))
            kept.append(tuple(rows[: len(batch) if batch.weight else 0].cpu() for rows in results))
        index, *rows = (self.world.gather_rows(torch.cat(each)) for each in zip(*kept, strict=True))
        order = index.argsort()
        return tuple(each[order] for each in rows)

    def _batches(
        self, order: np.ndarray, table: np.ndarray | None, start: int = 0, stop: int | None = None
    ) -> Iterator[Batch]:
        self._dataset.table = table
        slices = list(self.sampler.slices(order, start, stop))
        loader = DataLoader(
            self._dataset,
            batch_sampler=[each.index.tolist() for each in slices],
            collate_fn=_identity,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else every pass draws from the caller's global one
        )
        for piece, (images, labels, index) in zip(slices, loader, strict=True):
            moved = images.to(self.device, non_blocking=True)
            normalised = self.preprocessing.normalise(moved)
            if images.dtype != torch.uint8 and not torch.isfinite(normalised).all():
                bad = int(torch.isfinite(normalised).flatten(1).all(1).logical_not().nonzero()[0])
                raise UserError(
                    f"{self.samples.name}: image {self.samples.ids[int(index[bad])]!r} holds values that are not finite"
                )
            if self.augment != "none" and table is not None:
                flip = torch.from_numpy(table[index.numpy(), 0] < 0.5).to(self.device)
                normalised = torch.where(flip[:, None, None, None], normalised.flip(-1), normalised)
            yield Batch(normalised, labels.to(self.device, non_blocking=True), index, piece.weight, piece.total)


def _identity(batch: Any) -> Any:
    return batch


class _Decoded(Dataset[Any]):
    """Decodes and resizes whole batches (`__getitems__`); keeps what it decoded where told to."""

    def __init__(self, samples: Samples, preprocessing: Preprocessing, augment: str, cached: bool) -> None:
        self.samples, self.preprocessing, self.augment, self.cached = samples, preprocessing, augment, cached
        self.labels = torch.tensor(samples.labels)
        self.table: np.ndarray | None = None
        self._known = np.zeros(len(samples) if cached else 0, dtype=bool)
        self._kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.as_tensor(indices)
        if not self.cached:
            return torch.stack([self._load(i) for i in indices]), self.labels[index], index
        for i in indices:
            if not self._known[i]:
                image = self._load(i)
                if self._kept is None:
                    self._kept = torch.empty((len(self.samples), *image.shape), dtype=image.dtype)
                self._kept[i] = image
                self._known[i] = True
        assert self._kept is not None
        return self._kept[index], self.labels[index], index

    def _load(self, i: int) -> Tensor:
        image = as_tensor(self.samples.image(i), len(self.preprocessing.mean))
        if self.augment == "crop" and self.table is not None and image.dtype == torch.uint8:
            return _random_resized_crop(image, self.table[i, 1:], self.preprocessing)
        return self.preprocessing.resize(image)


def _random_resized_crop(image: Tensor, draws: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    """Inception crop: area share in [0.08, 1], aspect ratio in [3/4, 4/3], uniform place; from four uniform draws."""
    height, width = image.shape[-2:]
    area = height * width * (0.08 + 0.92 * float(draws[0]))
    ratio = float(np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * float(draws[1])))
    w, h = min(width, max(1, round((area * ratio) ** 0.5))), min(height, max(1, round((area / ratio) ** 0.5)))
    top, left = int(float(draws[2]) * (height - h + 1)), int(float(draws[3]) * (width - w + 1))
    return TF.resized_crop(
        image, top, left, h, w, list(preprocessing.size), preprocessing.interpolation, antialias=True
    )
