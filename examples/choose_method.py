"""Compare unlearning methods with a model that was retrained without the forget set."""

from __future__ import annotations

import time

import timm
import torch

import engine
from engine.data import open_source, read_forget_request

METHODS = ("finetune", "neg_grad_plus", "lethe", "lethe_plus")
OPTIONS = {"batch_size": 50, "precision": "fp32"}
RECIPE = {**OPTIONS, "epochs": 20, "lr": 2e-3}
MODEL_ARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 2}


def main() -> None:
    """Print one row a method: accuracies, membership inference, average gap to the retrained model, seconds."""
    # --8<-- [start:compare]
    data = open_source("digits")
    forget, retain = read_forget_request("random:0.3@0", data.train).split(data.train)
    fresh = timm.create_model("vit_tiny_patch16_224", num_classes=10, **MODEL_ARGS)
    original = engine.train(fresh, data.train, config=RECIPE).model
    retrained = engine.train(fresh, retain, config={**RECIPE, "seed": 1}).model

    print(f"{'method':>14}  forget  retain    test     MIA     gap  seconds")
    for method in (None, *METHODS):
        began = time.perf_counter()
        model = original
        if method is not None:
            result = engine.unlearn(original, forget, retain, method=method, validation=data.validation, config=OPTIONS)
            model = result.model
        seconds = time.perf_counter() - began
        metrics = engine.evaluate(model, forget, retain, data.test, references=[retrained])
        accuracy = [100 * metrics["accuracy"][name] for name in ("forget", "retain", "test")]
        figures = [*accuracy, 100 * metrics["mia"]["efficacy"], metrics["gap"]["average"]]
        print(f"{method or 'untouched':>14}" + "".join(f"{figure:8.1f}" for figure in figures) + f"{seconds:9.1f}")
    # --8<-- [end:compare]
    reference = [100 * metrics["reference"]["accuracy"][name] for name in ("forget", "retain", "test")]
    efficacy = 100 * metrics["reference"]["mia"]["efficacy"]
    print(f"{'retrained':>14}" + "".join(f"{figure:8.1f}" for figure in [*reference, efficacy, 0.0]) + f"{'-':>9}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
