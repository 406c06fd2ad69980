"""The lethe command on a `save_pretrained` folder and a folder of photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import Lethe
from hf_models import NAMES, images, logits, saved, tiny
from PIL import Image

transformers = pytest.importorskip("transformers")


@pytest.fixture
def photographs(tmp_path: Path) -> str:
    """PNGs of 4 classes: 6 to train and 2 to validate on, each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in NAMES:
            folder = tmp_path / "photographs" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 255, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return f"imagefolder:{tmp_path / 'photographs'}"


@pytest.mark.parametrize(("name", "method"), [
    ("vit", "random_labels"),
    pytest.param("swinv2", "lethe_plus", marks=pytest.mark.slow),
    pytest.param("dinov2", "lethe", marks=pytest.mark.slow),
])  # fmt: skip
def test_unlearn_and_evaluate(name: str, method: str, lethe: Lethe, photographs: str, tmp_path: Path) -> None:
    original = saved(tiny(name), tmp_path / "original", image_mean=[0.1, 0.2, 0.3])
    words = ["--data", photographs, "--forget", "random:0.25@0", "--accept-accuracy"]  # weights at random
    code, _, err = lethe(
        *("unlearn", "--checkpoint", original, *words, "--method", method, "--out", tmp_path / "out"),
        *("--set", "max_steps=2", "--set", "batch_size=8"),
    )
    assert code == 0, err
    back = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert list(back.config.id2label.values()) == NAMES
    assert list(transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean) == [0.1, 0.2, 0.3]
    assert logits(back, images()).shape == (24, 4)
    covered = json.loads((tmp_path / "out" / "record.json").read_text())["files"]
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(covered)
    code, _, err = lethe("evaluate", "--checkpoint", tmp_path / "out", *words, "--json", tmp_path / "metrics.json")
    assert code == 0, err
    assert 0 <= json.loads((tmp_path / "metrics.json").read_text())["accuracy"]["retain"] <= 1


def test_without_a_processor_nothing_is_written(lethe: Lethe, photographs: str, tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path / "original")
    code, _, err = lethe(
        *("unlearn", "--checkpoint", tmp_path / "original", "--data", photographs, "--forget", "random:0.25@0"),
        *("--method", "finetune", "--out", tmp_path / "out"),
    )
    assert code == 2
    assert "preprocessor_config.json" in err
    assert "--mean" in err
    assert not (tmp_path / "out").exists()


def test_a_text_model_is_one_line(lethe: Lethe, photographs: str, tmp_path: Path) -> None:
    folder = saved(tiny("vit"), tmp_path / "original")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    code, _, err = lethe("evaluate", "--checkpoint", folder, "--data", photographs, "--forget", "random:0.25@0")
    assert code == 2
    assert "BertForMaskedLM is no image classifier" in err
    assert "Traceback" not in err
