"""Unlearn a checkpoint that your own training script saved as a .pth file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

import engine
from engine.data import open_source, read_forget_request

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}


def write_photos(folder: Path) -> None:
    """Write scikit-learn's digits as an image folder: train/CLASS/FILE and val/CLASS/FILE."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / ("val" if number % 5 == 0 else "train") / f"digit_{label}"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.uint8(pixels * 255 / 16)).convert("RGB")
        image.resize((16, 16), Image.Resampling.NEAREST).save(place / f"{number:04d}.png")


def train_plainly(photos: Path, weights: Path) -> None:
    """Train in plain PyTorch and save a state dict. Stands for the training script that you already have."""
    torch.manual_seed(0)
    files = sorted((photos / "train").glob("*/*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    images = images.float() / 127.5 - 1  # mean 0.5 and standard deviation 0.5, timm's default for this architecture
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    model = timm.create_model(ARCHITECTURE, num_classes=10, **MODEL_ARGS)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(25):
        for batch in torch.randperm(len(files)).split(50):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    torch.save(model.state_dict(), weights)


def main(out: Path) -> None:
    """Make the images and the .pth, then unlearn every seventh image of the training set."""
    out.mkdir(parents=True, exist_ok=True)
    write_photos(out / "photos")
    train_plainly(out / "photos", out / "x.pth")
    names = sorted(path.relative_to(out / "photos/train").as_posix() for path in out.glob("photos/train/*/*.png"))
    (out / "ids.txt").write_text("".join(f"{name}\n" for name in names[::7]), encoding="utf-8")

    # --8<-- [start:unlearn]
    model = engine.load_checkpoint(out / "x.pth", architecture=ARCHITECTURE, model_args=MODEL_ARGS)
    data = open_source(f"imagefolder:{out / 'photos'}")
    forget, retain = read_forget_request(str(out / "ids.txt"), data.train).split(data.train)

    result = engine.unlearn(model, forget, retain, validation=data.validation, config={"batch_size": 50})
    result.save(out / "unlearned", overwrite=True)

    metrics = engine.evaluate(result.model, forget, retain, data.test, original=model)
    for name in ("forget", "retain", "test"):
        before, after = metrics["original"]["accuracy"][name], metrics["accuracy"][name]
        print(f"{name:>6} accuracy: {100 * before:.1f}% before, {100 * after:.1f}% after")
    # --8<-- [end:unlearn]
    print(f"checkpoint in {out / 'unlearned'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/own_model"))
