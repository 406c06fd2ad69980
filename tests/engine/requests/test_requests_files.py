"""`lethe request init` takes files of weights, for the model and its references, and checks them before the work."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from command_line import ARCH, saved
from command_line import invoke as lethe
from toys import tiny_vit

from engine.jobs.preflight import recorded_accuracy
from engine.models.checkpoint import load_checkpoint, weights_sha256
from engine.requests.store import Store, place_of

BUILT = [
    "--arch",
    ARCH,
    *(word for each in ("embed_dim=32", "depth=2", "num_heads=2") for word in ("--model-arg", each)),
]


def init(store: Path, checkpoint: Path, reference: Path, *words: object) -> tuple[int, str]:
    given = ["--checkpoint", checkpoint, "--reference", reference, "--data", "digits", *BUILT, *words]
    return lethe("request", "init", "--store", store, "--method", "finetune", *given)


def test_files_with_arch_are_the_model_and_its_references(tmp_path: Path) -> None:
    weights = {f"module.{key}": value for key, value in tiny_vit(seed=1).state_dict().items()}
    checkpoint, reference = saved(tmp_path, weights, "x.pth"), saved(tmp_path, tiny_vit(seed=2).state_dict(), "r.pth")
    code, output = init(tmp_path / "store", checkpoint, reference, "--accept-accuracy")
    assert code == 0, output
    assert "accuracy of the untouched model" in output
    assert weights_sha256(load_checkpoint(place_of(tmp_path / "store", 0))) == weights_sha256(tiny_vit(seed=1))
    with Store.open(tmp_path / "store") as store:
        (kept,) = store.settings["references"]
        assert weights_sha256(load_checkpoint(kept)) == weights_sha256(tiny_vit(seed=2))
        assert load_checkpoint(store.settings["checkpoint"]).num_classes == 10


def test_a_file_near_chance_or_a_reference_that_does_not_open_makes_no_store(tmp_path: Path) -> None:
    checkpoint, bad = saved(tmp_path, tiny_vit(seed=1).state_dict()), saved(tmp_path, {"a": torch.ones(2)}, "bad.pth")
    code, output = init(tmp_path / "store", checkpoint, checkpoint)
    assert (code, "near chance" in output) == (2, True), output
    code, output = init(tmp_path / "store", checkpoint, bad, "--accept-accuracy")
    assert (code, "bad.pth" in output) == (2, True), output
    assert not (tmp_path / "store").exists()


def test_the_accuracy_of_the_record_is_found_beside_a_file(checkpoint: Path, tmp_path: Path) -> None:
    run = shutil.copytree(checkpoint, tmp_path / "run")
    (run / "config.yaml").write_text("data: digits\n")
    (run / "metrics.json").write_text('{"accuracy": {"retain": 0.9}}')
    for named in (f"{run}", f"{run / 'model.safetensors'}", f"{run / 'model.safetensors'}?weights=raw"):
        found = recorded_accuracy(named, "digits")
        assert found is not None, named
        assert found.accuracy == 0.9
