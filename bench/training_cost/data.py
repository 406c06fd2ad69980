"""Measure index, forget matching and first batch of a set of ImageNet's size, and decoding: `python -m bench data`.

The shards are made first: flat JPEGs of 256 x 256, and real ones in between if a folder of them is given. They
have just been written, so they are read from the page cache: the figures do not include the time of a slow disk.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode

from bench.harness.measure import Row, middle, race, ratios, size
from bench.harness.report import Report
from bench.kernel_speed.kernel_targets import spread
from engine.cli.console import console
from engine.data import Loader, Preprocessing, Samples, open_source, read_forget_request
from engine.errors import UserError

PER_SHARD = 1_000
FORGET_SHARE = 128_000 / 1_281_167
QUICK_IMAGES = 2_000
REAL_EVERY = 256  # one sample in so many is a real JPEG
BATCH = 256
PREPROCESSING = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, 0.9, InterpolationMode.BICUBIC)  # timm's ViT-L/16 224
OURS, OURS_FULL, PEER = "ours, draft", "ours, full", "torchvision ImageFolder, bicubic"


def run_data(
    images: int,
    real: Path | None = None,
    scratch: Path | None = None,
    rounds: int = 9,
    json_file: Path | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Print and return the steps on the synthetic set, the rows of the decoding comparison, and the targets."""
    if quick:
        images, rounds = QUICK_IMAGES, 3
    files = sorted(real.glob("*/*.[jJ][pP]*[gG]")) if real else []
    if real and not files:
        raise UserError(f"--real {real}: holds no CLASS/FILE.jpg")
    torch.set_num_threads(1)  # figures are for one core
    report = Report()
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        made = _make(Path(temporary), images, [file.read_bytes() for file in files])
        steps = [_apart(step, temporary) for step in _STEPS]
    results: dict[str, Any] = {
        "settings": {"images": images, "per_shard": PER_SHARD, "real_images": len(files), "real_every": REAL_EVERY}
        | {"batch": BATCH, "rounds": rounds, "quick": quick},
        "synthetic": {**made, "index": steps[0], "open_and_match": steps[1]},
        "decoding": _decoding(real, rounds) if real else [],
    }
    results["targets"] = _targets(steps[1])
    _print(results)
    return report.write(results, json_file)


# --- the synthetic set ------------------------------------------------------------------------------------------------


def _make(folder: Path, images: int, real: list[bytes]) -> dict[str, Any]:
    began = time.perf_counter()
    stream = io.BytesIO()
    Image.new("RGB", (256, 256), (90, 120, 150)).save(stream, "JPEG", quality=30)
    contents = itertools.cycle(real or [stream.getvalue()])
    written = 0
    for shard in range(-(-images // PER_SHARD)):
        parts = []
        for number in range(shard * PER_SHARD, min(images, (shard + 1) * PER_SHARD)):
            label = str(number % 1_000)
            key = f"n{int(label):08d}_{number}"
            parts.append(_member(f"{key}.cls", label.encode()))
            parts.append(_member(f"{key}.jpg", stream.getvalue() if number % REAL_EVERY else next(contents)))
        content = b"".join(parts) + bytes(1024)
        (folder / f"imagenet-train-{shard:06d}.tar").write_bytes(content)
        written += len(content)
    (folder / "imagenet-val-000000.tar").write_bytes((folder / "imagenet-train-000000.tar").read_bytes())
    chosen = np.random.default_rng(0).permutation(images)[: round(FORGET_SHARE * images)]
    (folder / "forget.txt").write_text("".join(f"n{i % 1_000:08d}_{i}\n" for i in chosen.tolist()))
    seconds = time.perf_counter() - began
    return {"images": images, "shards": shard + 1, "bytes": written, "forget": len(chosen), "seconds_to_make": seconds}


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def _apart(step: str, folder: str) -> dict[str, Any]:
    """Run a step in a process of its own, to measure its memory alone."""
    command = [sys.executable, "-m", "bench.training_cost.data", step, folder]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def _index(folder: str) -> dict[str, Any]:
    with _watched() as facts:
        open_source(f"webdataset:{folder}")
    return facts


def _open_and_match(folder: str) -> dict[str, Any]:
    with _watched() as opened:
        source = open_source(f"webdataset:{folder}")
    with _watched() as matched:
        request = read_forget_request(f"{folder}/forget.txt", source.train)
        forget, retain = request.split(source.train)
    with _watched() as hashed:
        forget.fingerprint(), retain.fingerprint()
    batches = {"first_batch": retain, "first_batch_of_real_images": _real(source.train)}
    facts = {name: _first_batch(samples) for name, samples in batches.items()}
    return {"open": opened, "match_and_split": matched, "fingerprints": hashed, **facts}


_STEPS = {"index": _index, "open_and_match": _open_and_match}


def _real(train: Samples) -> Samples:
    """Return the real images, at most a batch; all of them flat if none were given."""
    return train.subset(np.arange(0, len(train), REAL_EVERY)[:BATCH])


def _first_batch(samples: Samples) -> dict[str, Any]:
    with _watched() as facts:
        loader = Loader(samples, PREPROCESSING, batch_size=BATCH, augment="crop")
        batch = next(loader.epoch(0))
    return {**facts, "batch": list(batch.images.shape), "augment": loader.augment, "workers": loader.workers}


@contextlib.contextmanager
def _watched() -> Iterator[dict[str, Any]]:
    """Measure the seconds of the block, the peak memory of this process during it, and its rise from before."""
    facts: dict[str, Any] = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    began = time.perf_counter()
    yield facts
    facts["seconds"] = time.perf_counter() - began
    peak = _resident("VmHWM")
    facts.update(peak_bytes=peak, extra_bytes=max(0, peak - before))


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# --- decoding ---------------------------------------------------------------------------------------------------------


def _decoding(real: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure images a second and core, in rounds in which every contender takes all images once."""
    with tempfile.TemporaryDirectory() as temporary:
        for split in ("train", "val"):
            os.symlink(real.resolve(), f"{temporary}/{split}")
        samples = open_source(f"imagefolder:{temporary}").train
        contents = [torch.from_numpy(np.fromfile(f"{temporary}/train/{i}", dtype=np.uint8)) for i in samples.ids]
        pixels = {
            "Pillow": lambda: [np.asarray(Image.open(io.BytesIO(bytes(c.numpy()))).convert("RGB")) for c in contents],
            "torchvision.io.decode_jpeg": lambda: [decode_jpeg(content, ImageReadMode.RGB) for content in contents],
        }
        cases = {
            "training batches: decode, random resized crop, flip, normalise": _training(samples, real),
            "evaluation batches: decode, resize, centre crop, normalise": _evaluation(samples, real),
            "pixels alone, full size": pixels,
        }
        return [_raced(name, calls, len(samples), rounds) for name, calls in cases.items()]


def _raced(name: str, calls: dict[str, Callable[[], Any]], count: int, rounds: int) -> dict[str, Any]:
    for call in calls.values():
        call()
    times = race(calls, device=torch.device("cpu"), rounds=rounds, seconds=float("inf"))
    rows: list[Row] = [{"contender": contender, "seconds": each} for contender, each in times.items()]
    for row in rows:
        row["images_per_second"] = count / middle(row["seconds"])
        row["times_as_fast"] = ratios(rows[-1], row)  # as the last contender, round by round
    return {"work": name, "images": count, "rows": rows}


def _training(samples: Samples, real: Path) -> dict[str, Callable[[], Any]]:
    def peer(interpolation: InterpolationMode) -> Callable[[], Any]:
        crop = transforms.RandomResizedCrop(224, interpolation=interpolation)
        return _peer(real, [crop, transforms.RandomHorizontalFlip()])

    calls = {name: _ours(samples, name, "crop") for name in (OURS, OURS_FULL)}
    calls["torchvision ImageFolder, bilinear"] = peer(InterpolationMode.BILINEAR)
    return {**calls, PEER: peer(InterpolationMode.BICUBIC)}


def _evaluation(samples: Samples, real: Path) -> dict[str, Callable[[], Any]]:
    resize = transforms.Resize(int(224 / PREPROCESSING.crop_pct), interpolation=InterpolationMode.BICUBIC)
    calls = {name: _ours(samples, name, "none") for name in (OURS, OURS_FULL)}
    return {**calls, PEER: _peer(real, [resize, transforms.CenterCrop(224)])}


def _ours(samples: Samples, name: str, augment: str) -> Callable[[], Any]:
    def once() -> int:
        # A new loader each time: it would keep such a small set decoded.
        loader = Loader(
            samples, PREPROCESSING, batch_size=32, augment=augment, workers=0, decode=name.removeprefix("ours, ")
        )
        return sum(len(batch) for batch in (loader.epoch(0) if augment == "crop" else loader.ordered()))

    return once


def _peer(real: Path, steps: list[Any]) -> Callable[[], Any]:
    normalise = transforms.Normalize(PREPROCESSING.mean, PREPROCESSING.std)
    loader = DataLoader(
        ImageFolder(str(real), transforms.Compose([*steps, transforms.ToTensor(), normalise])), batch_size=32
    )
    return lambda: sum(len(labels) for _, labels in loader)


# --- what is printed --------------------------------------------------------------------------------------------------


def _targets(steps: dict[str, Any]) -> list[dict[str, Any]]:
    match, opened, first = steps["match_and_split"], steps["open"], steps["first_batch"]
    peak = max(opened["peak_bytes"], match["peak_bytes"])
    before = opened["peak_bytes"] - opened["extra_bytes"]
    whole = sum(step["seconds"] for step in (opened, match, first))
    return [
        {
            "target": "forget matching in at most 5 s",
            "passed": match["seconds"] <= 5,
            "numbers": f"{match['seconds']:.2f} s",
        },
        {
            "target": "index and forget matching in at most 1 GiB above what the process held before",
            "passed": peak - before <= 2**30,
            "numbers": f"{size(peak - before)}; the whole process {size(peak)}, {size(before)} of it before",
        },
        {
            "target": "first batch in at most 10 s, from opening the data",
            "passed": whole <= 10,
            "numbers": f"{whole:.2f} s, {first['seconds']:.2f} s of it by the loader",
        },
    ]


def _print(report: dict[str, Any]) -> None:
    synthetic = report["synthetic"]
    counts = f"{synthetic['images']:,} images in {synthetic['shards']:,} shards, {size(synthetic['bytes'])}"
    table = Table(title=counts, title_justify="left")
    for column in ("step", "seconds", "memory above the start", "peak of the process"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, facts in {"index, built": synthetic["index"], **synthetic["open_and_match"]}.items():
        table.add_row(
            name.replace("_", " "), f"{facts['seconds']:.2f}", size(facts["extra_bytes"]), size(facts["peak_bytes"])
        )
    console.print(table)
    for case in report["decoding"]:
        table = Table(title=escape(f"{case['work']}, {case['images']} images"), title_justify="left")
        for column in ("contender", "images / s and core", f"times as fast as {case['rows'][-1]['contender']}"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for row in case["rows"]:
            table.add_row(row["contender"], f"{row['images_per_second']:.0f}", spread(row["times_as_fast"]))
        console.print(table)
    for target in report["targets"]:
        console.print(f"{'PASS' if target['passed'] else 'MISSED'}  {target['target']}: {target['numbers']}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_STEPS[sys.argv[1]](sys.argv[2])))
