"""Unlearn a Hugging Face image classifier, and save it so that transformers opens it again."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

import engine


def digits() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Give scikit-learn's digits as training and test rows, as a `datasets.Dataset` has them."""
    found = load_digits()
    rows: list[dict[str, object]] = [
        {"image": Image.fromarray(np.uint8(pixels * 255 / 16)).convert("RGB").resize((16, 16)), "label": int(label)}
        for pixels, label in zip(found.images, found.target, strict=True)
    ]
    return rows[300:], rows[:300]


def main(out: Path) -> None:
    """Train a small ViTForImageClassification, unlearn 150 of its images and open the result with transformers."""
    try:
        from transformers import (
            AutoModelForImageClassification,
            ViTConfig,
            ViTForImageClassification,
            ViTImageProcessor,
        )
    except ImportError:
        sys.exit("this example needs transformers: pip install 'lethe-unlearning[huggingface]'")
    torch.manual_seed(0)
    train, test = digits()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    config = ViTConfig(image_size=16, patch_size=4, num_labels=10, **sizes)
    ViTForImageClassification(config).save_pretrained(out / "base")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(out / "base")  # mean and std of the images
    fresh = AutoModelForImageClassification.from_pretrained(out / "base")
    options = {"batch_size": 50, "precision": "fp32"}
    model = engine.train(fresh, train, config={**options, "epochs": 15, "lr": 2e-3}).model

    # --8<-- [start:unlearn]
    forget, retain = train[:150], train[150:]
    result = engine.unlearn(model, forget, retain, validation=test[:100], config=options)
    result.save(out / "unlearned", overwrite=True)

    again = AutoModelForImageClassification.from_pretrained(out / "unlearned")
    metrics = engine.evaluate(again, forget, retain, test[100:], original=model)
    # --8<-- [end:unlearn]
    for name in ("forget", "retain", "test"):
        before, after = metrics["original"]["accuracy"][name], metrics["accuracy"][name]
        print(f"{name:>6} accuracy: {100 * before:.1f}% before, {100 * after:.1f}% after")
    print(f"{type(again).__name__} in {out / 'unlearned'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/huggingface"))
