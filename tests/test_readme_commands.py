"""The README's first screen: its commands run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from engine.cli.app import app

README = Path(__file__).parent.parent / "README.md"
ARCHITECTURE = "vit_tiny_patch16_224"
# The same architecture at a size that a test has time for.
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2}
COLOURS = {"blue": (20, 40, 200), "red": (200, 40, 20)}
# Exit codes that say that a command came to its end; `verify` has a verdict, whatever it is.
ENDS = {"unlearn": {0}, "train": {0}, "verify": {0, 1, 3}}


def first_commands() -> list[str]:
    section = README.read_text(encoding="utf-8").split("## From your x.pth to an unlearned model", 1)[1]
    block = re.search(r"```\n(.*?)```", section, flags=re.S)
    assert block is not None
    return block[1].strip().splitlines()


def write_photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(-20, 20, (32, 32, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number:04d}.png")


def write_trained_weights(path: Path, photos: Path) -> None:
    """A .pth as a training script leaves it: a state dict alone, of a model that tells the colours apart."""
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=2, **SMALL)
    files = sorted(photos.glob("train/*/*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in files]) / 127.5 - 1
    labels = torch.tensor([sorted(COLOURS).index(f.parent.name) for f in files])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torch.save(model.state_dict(), path)


@pytest.mark.slow
def test_first_screen_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = first_commands()
    assert len(commands) <= 8
    assert commands[0] == "pip install ."
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"))
    write_trained_weights(Path("x.pth"), Path("photos"))
    Path("ids.txt").write_text("blue/0001.png\nred/0003.png\n")
    small = " ".join(f"--model-arg {key}={value}" for key, value in SMALL.items())
    for command in commands[1:]:
        program, *words = shlex.split(command.replace(ARCHITECTURE, f"{ARCHITECTURE} {small}"))
        assert program == "lethe"
        result = CliRunner().invoke(app, words)
        assert result.exit_code in ENDS[words[0]], f"{command}\n{result.output}\n{result.exception!r}"
    model = timm.create_model("local-dir:unlearned", pretrained=True)
    assert model.num_classes == 2
