"""Fixtures: a tiny ViT on scikit-learn's digits, and small data folders made on the spot."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

# Before numpy and torch are imported; the processes that tests start inherit it. The models are too small for more than
# one thread, and threads that wait spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

# Triton decides at import whether a kernel is compiled or interpreted, its own (tl.sum, tl.max) included. The variable
# is taken back at once, so that backend="auto" is eager but for the tests that set it (tests/kernels/conftest.py).
os.environ["TRITON_INTERPRET"] = "1"
import lethe_kernels._triton.info_nce_shared
import lethe_kernels._triton.mask
import lethe_kernels._triton.rollout  # noqa: F401

del os.environ["TRITON_INTERPRET"]

import fast_interpreter
from toys import tiny_vit

from engine.models.checkpoint import save_checkpoint

fast_interpreter.install()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_vit()


@pytest.fixture
def checkpoint(tmp_path: Path, model: torch.nn.Module) -> Path:
    return save_checkpoint(model, tmp_path / "original")


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a Hugging Face image folder: 8 x 8 PNGs; `spoil` maps row numbers to other bytes."""

    def make(train: int = 40, test: int = 20, ids: bool = True, spoil: dict[int, bytes] | None = None) -> Path:
        folder = tmp_path / "parquet"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for split, count in (("train", train), ("test", test)):
            images = []
            for row in range(count):
                stream = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(stream, "PNG")
                data = (spoil or {}).get(row, stream.getvalue()) if split == "train" else stream.getvalue()
                images.append({"bytes": data, "path": f"{row}.png"})
            columns = {"image": images, "label": [row % 10 for row in range(count)]}
            if ids:
                columns["id"] = [f"{split}/{row:04d}.png" for row in range(count)]
            pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
        return folder

    return make
