from __future__ import annotations

import io
import multiprocessing
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from toys import tiny_vit

from engine.config import RunConfig
from engine.data import BadImageError, Loader, Preprocessing, Samples
from engine.errors import RunStopped, UserError
from engine.models.preprocessing import preprocessing_of
from engine.runtime.process_group import ProcessGroup


def loader(samples: Samples, **options: object) -> Loader:
    return Loader(samples, preprocessing_of(tiny_vit()), **{"batch_size": 8, **options})


# Bad images


def photographs(count: int, bad: dict[int, bytes] | None = None, size: tuple[int, int] = (8, 8)) -> Samples:
    """Uniform images whose brightness is their number."""

    def decode(i: int) -> Image.Image:
        if bad and i in bad:
            return Image.open(io.BytesIO(bad[i]))
        return Image.new("L", size, i)

    labels = np.arange(count) % 10
    return Samples("s", [f"i{i}" for i in range(count)], labels, decode, natural=True, where=lambda i: f"file {i}")


def jpeg(size: tuple[int, int], seed: int = 0) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_raises_its_id_and_file(workers: int) -> None:
    samples = photographs(12, {7: jpeg((64, 64))[:-200]})
    with pytest.raises(BadImageError) as error:
        list(loader(samples, workers=workers).epoch(0))
    assert "s: image 'i7' in file 7 does not decode (OSError: " in str(error.value)
    assert "on_bad_image=skip" in str(error.value)
    assert "\n" not in str(error.value)  # no traceback of a worker in it
    assert not multiprocessing.active_children()
    with pytest.raises(BadImageError, match="image 'i7'"):
        samples.image(7)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_lower_the_weight_and_are_counted_once(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    samples = photographs(20, {3: b"junk", 4: b"", 17: b"junk"})
    options = {"on_bad_image": "skip", "max_bad_share": 0.15, "batch_size": 4}
    skipping = loader(samples, workers=workers, **options)
    for _ in range(2):
        batches = list(skipping.epoch(0))
    whole = list(loader(photographs(20), batch_size=4).epoch(0))
    for ours, nominal in zip(batches, whole, strict=True):
        good = [i for i in nominal.index.tolist() if i not in (3, 4, 17)]
        assert ours.index.tolist() == good
        assert ours.labels.tolist() == [i % 10 for i in good]
        assert ours.weight == pytest.approx(len(good) / 4)
        assert ours.total == 4
        assert torch.equal(ours.images, nominal.images[[nominal.index.tolist().index(i) for i in good]])
    assert list(skipping.bad_ids) == [i for i in skipping.bad_ids if i in ("i3", "i4", "i17")]
    assert len(skipping.bad_ids) == 3
    assert sum("left out: s: image" in record.message for record in caplog.records) == 3
    ordered = list(skipping.ordered())
    assert [i for b in ordered for i in b.index.tolist()] == [i for i in range(20) if i not in (3, 4, 17)]


def test_ranks_that_skip_do_the_mathematics_of_one_process() -> None:
    samples = photographs(22, {3: b"", 9: b"", 10: b""})
    options = {"on_bad_image": "skip", "max_bad_share": 1.0}

    def sums(ranks: int, micro: int) -> list[float]:
        """For each step, the mean over slices of weight x mean brightness."""
        steps: dict[int, float] = {}
        for rank in range(ranks):
            part = loader(
                samples, batch_size=8 // ranks // micro, world=ProcessGroup(rank, ranks), micro=micro, **options
            )
            for number, batch in enumerate(part.epoch(0)):
                mean = batch.index.double().mean().item() * batch.weight / ranks / micro
                steps[number // micro] = steps.get(number // micro, 0.0) + mean
        return list(steps.values())

    assert sums(2, 1) == pytest.approx(sums(1, 1))
    assert sums(2, 2) == pytest.approx(sums(1, 1))


def test_a_batch_without_a_good_image_weighs_nothing() -> None:
    samples = photographs(6, {0: b"", 1: b"", 2: b""})
    skipping = loader(samples, on_bad_image="skip", max_bad_share=0.5, batch_size=3)
    first, second = skipping.ordered()
    assert (first.weight, len(first), tuple(first.images.shape)) == (0, 1, (1, 1, 8, 8))
    assert torch.isfinite(first.images).all()
    assert (second.weight, second.index.tolist()) == (1.0, [3, 4, 5])
    index, means, labels = skipping.rows(lambda b: (b.index, b.images.mean((1, 2, 3)), b.labels))
    assert index.tolist() == [-1, -1, -1, 3, 4, 5]
    assert labels.tolist() == [-1, -1, -1, 3, 4, 5]
    assert means[:3].tolist() == [0, 0, 0]
    assert means[3:].tolist() == second.images.mean((1, 2, 3)).tolist()


def test_too_many_bad_images_stop_the_run() -> None:
    bad = {3: b"", 11: b""}
    assert list(loader(photographs(100, {3: b""}), on_bad_image="skip").ordered())
    with pytest.raises(RunStopped, match=r"2 of 100 images are bad, more than max_bad_share=0\.01 allows"):
        list(loader(photographs(100, bad), on_bad_image="skip").ordered())
    with pytest.raises(UserError, match=r"max_bad_share=1\.5: expected in \[0, 1\]"):
        RunConfig(max_bad_share=1.5)


def test_wrong_use_is_not_a_bad_image() -> None:
    samples = Samples("s", ["a"], np.array([0]), lambda i: torch.zeros(3, 8, 8))
    with pytest.raises(UserError, match=r"shape \(3, 8, 8\), expected \(1, H, W\)"):
        list(loader(samples, on_bad_image="skip", max_bad_share=1.0).ordered())

    def exhausted(_: int) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        Samples("s", ["a"], np.array([0]), exhausted).image(0)


def test_augmentation_follows_the_first_good_image() -> None:
    samples = photographs(4, {0: b"", 1: b""}, size=(64, 64))
    assert loader(samples, augment="auto", on_bad_image="skip", max_bad_share=1.0).augment == "crop"
    with pytest.raises(BadImageError, match="image 'i0'"):
        loader(samples, augment="auto")


# Reduced decoding


def color(size: int, crop_pct: float = 0.875) -> Preprocessing:
    return Preprocessing((size, size), (0.5,) * 3, (0.5,) * 3, crop_pct, InterpolationMode.BICUBIC)


def of_jpeg(size: tuple[int, int], preprocessing: Preprocessing, **options: object) -> torch.Tensor:
    content = jpeg(size)
    samples = Samples("s", ["0"], np.array([0]), lambda i: Image.open(io.BytesIO(content)))
    augmented = options.get("augment") == "crop"
    loads = Loader(samples, preprocessing, batch_size=1, workers=0, **options)
    return torch.cat(
        [b.images for e in range(6 if augmented else 1) for b in (loads.epoch(e) if augmented else loads.ordered())]
    )


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_small_images_are_the_same_bits_with_draft(augment: str) -> None:
    for size in ((32, 32), (50, 70), (63, 120)):
        both = [of_jpeg(size, color(32), decode=decode, augment=augment) for decode in ("draft", "full")]
        assert torch.equal(*both), size


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_large_images_differ_a_little_with_draft(augment: str) -> None:
    both = [of_jpeg((640, 480), color(32), decode=decode, augment=augment) for decode in ("draft", "full")]
    difference = (both[0] - both[1]).abs()
    assert 0 < float(difference.mean()) < 0.05
    assert float(difference.max()) < 0.4


@pytest.mark.parametrize(
    ("size", "input_size", "decoded"),
    [
        ((500, 375), 224, (500, 375)),
        ((512, 512), 224, (256, 256)),
        ((511, 511), 224, (511, 511)),
        ((1024, 800), 224, (512, 400)),
        ((4000, 3000), 224, (500, 375)),
    ],
)
def test_draft_never_goes_below_what_is_resized(
    size: tuple[int, int], input_size: int, decoded: tuple[int, int]
) -> None:
    content = jpeg(size)
    samples = Samples("s", ["0"], np.array([0]), lambda i: Image.open(io.BytesIO(content)))
    assert samples.image(0, color(input_size).reduction).size == decoded


# The time that is waited


def test_waiting_for_data_is_counted() -> None:
    def slow(i: int) -> Image.Image:
        time.sleep(0.02)
        return Image.new("L", (8, 8), i)

    samples = Samples("s", [str(i) for i in range(10)], np.zeros(10), slow)
    loads = loader(samples, batch_size=5)
    assert loads.waited == 0
    list(loads.ordered())
    assert 0.2 <= loads.waited < 2
    before = loads.waited
    for _ in loads.ordered():  # now from memory
        time.sleep(0.05)
    assert loads.waited - before < 0.05  # the consumer's time is not counted
