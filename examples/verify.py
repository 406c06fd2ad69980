"""Ask for a verdict on a model that nobody unlearned, and on an unlearned one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import timm
import torch

import engine
from engine.data import open_source, read_forget_request

OPTIONS = {"batch_size": 50, "precision": "fp32"}
RECIPE = {**OPTIONS, "epochs": 20, "lr": 2e-3}
MODEL_ARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 2}


def train_all(out: Path) -> None:
    """Train the original on all samples and two references without the forget set, and unlearn the original."""
    data = open_source("digits")
    forget, retain = read_forget_request("random:0.3@0", data.train).split(data.train)
    fresh = timm.create_model("vit_tiny_patch16_224", num_classes=10, **MODEL_ARGS)
    original = engine.train(fresh, data.train, config=RECIPE, output_dir=out / "original", overwrite=True).model
    for seed in (1, 2):
        place = out / f"retrained_{seed}"
        engine.train(fresh, retain, config={**RECIPE, "seed": seed}, output_dir=place, overwrite=True)
    engine.unlearn(
        original,
        forget,
        retain,
        method="lethe",
        validation=data.validation,
        config=OPTIONS,
        output_dir=out / "unlearned",
        overwrite=True,
    )


def verdict_of(name: str, out: Path) -> dict[str, object]:
    """Run `lethe verify` on one of the models; give what it wrote."""
    # --8<-- [start:verify]
    command = ["verify", "--data", "digits", "--forget", "random:0.3@0"]
    command += ["--checkpoint", f"{out}/{name}", "--original", f"{out}/original"]
    command += ["--reference", f"{out}/retrained_1", "--reference", f"{out}/retrained_2"]
    command += ["--json", f"{out}/{name}.json"]
    done = subprocess.run([sys.executable, "-m", "engine", *command], check=False)
    if done.returncode not in (0, 1, 3):  # PASS, FAIL, INSUFFICIENT EVIDENCE
        sys.exit(done.returncode)
    verdict = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    # --8<-- [end:verify]
    return dict(verdict)


def main(out: Path) -> None:
    """Make the models and print both verdicts."""
    train_all(out)
    verdicts = {name: verdict_of(name, out) for name in ("original", "unlearned")}
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict['status']}, decided by {verdict['decided_by']}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/verify"))
