"""Cost of a pool, of a certificate, and of a request's proof."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Lethe
from toys import tiny_vit

from engine.core.proof_sizes import retained_samples
from engine.errors import UserError
from engine.models.checkpoint import save_checkpoint
from engine.plan import plan

ARCH = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def _plan(**options: object) -> dict[str, object]:
    given = {"method": "lethe", "forget_share": 0.002, "options": {"batch_size": 10}, **options}
    made = plan(
        "vit_tiny_patch16_224",
        images=10_000,
        test_images=5_000,
        device="cpu",
        model_args=ARCH,
        num_classes=10,
        retrain_epochs=30.0,
        **given,  # type: ignore[arg-type]
    )
    return made.to_dict()


def test_a_pool_costs_its_share_of_retrains() -> None:
    found = _plan(pool_models=8, pool_share=0.25)
    work = found["work"]
    training = work["retrain"]["items"][0]["flops"]  # type: ignore[index]
    pool = work["pool of 8 models, once"]["total"]["flops"]  # type: ignore[index]
    assert pool / training == pytest.approx(6 * 10_000 / 9_980)


def test_a_certificate_costs_its_requests_and_their_verdict() -> None:
    work = _plan(pool_models=8)["work"]
    found = work["certificate, 20 requests"]  # type: ignore[index]
    items = {item["name"]: item for item in found["items"]}
    unlearn = {item["name"]: item for item in work["unlearn"]["items"]}  # type: ignore[index]
    assert items["retain phase"]["images"] == 20 * unlearn["retain phase"]["images"]
    assert items["its verdict"]["images"] == 20 * 20 * 9 + 8 * 2_000 + 2 * 2_000
    assert "evaluation of the original and the result" not in items


def test_the_proof_of_a_request_is_below_a_hundredth_of_a_retrain() -> None:
    found = _plan(pool_models=8)
    proof = found["work"]["proof of a request"]["total"]  # type: ignore[index]
    assert proof["images"] == 20 * 3 + 2_000 + 2 * 1_796, "0.2% of the passes of 30 epochs over 9,980 samples"
    assert found["shares"]["proof of a request"]["flops"] < 0.01  # type: ignore[index]
    assert found["shares"]["unlearn"] == found["share"]  # type: ignore[index]


@pytest.mark.parametrize(("passes", "expected"), [(1e3, 500), (4e5, 800), (1e9, 2_000)])
def test_the_retained_samples_of_a_proof_follow_the_cost_of_a_retrain(passes: float, expected: int) -> None:
    assert retained_samples(passes) == expected


def test_without_a_pool_nothing_is_added() -> None:
    assert set(_plan()["work"]) == {"unlearn", "retrain"}  # type: ignore[call-overload]


@pytest.mark.parametrize("wrong", [{"pool_models": 0}, {"pool_models": 8, "pool_share": 1.0}])
def test_wrong_sizes_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="pool_"):
        _plan(**wrong)


def test_the_share_of_a_retrain_is_printed_in_digits(lethe: Lethe) -> None:
    """Red before: 6e+02%."""
    words = [word for key, value in ARCH.items() for word in ("--model-arg", f"{key}={value}")]
    code, out, _ = lethe(
        *(
            "plan",
            "--arch",
            "vit_tiny_patch16_224",
            *words,
            "--images",
            10_000,
            "--forget-share",
            0.002,
            "--test-images",
            50_000,
        ),
        *("--batch-size", 10, "--device", "cpu", "--precision", "fp32", "--pool-models", 8),
    )
    assert code == 0
    assert "pool of 8 models, once: 597% of a retrain" in out  # six trainings; a retrain is evaluated too


def test_a_checkpoint_gives_its_architecture(lethe: Lethe, tmp_path: Path) -> None:
    """Red before: a folder was refused as an unknown architecture."""
    save_checkpoint(tiny_vit(), tmp_path / "model")
    words = ("--images", 2_000, "--device", "cpu", "--precision", "fp32", "--json", tmp_path / "plan.json")
    code, _, err = lethe("plan", "--arch", tmp_path / "model", *words)
    assert code == 0, err
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["setup"]["architecture"] == "vit_tiny_patch16_224"
    assert found["cost"]["parameters"] == sum(p.numel() for p in tiny_vit().parameters())
    for more in (("--num-classes", 7), ("--model-arg", "depth=3")):
        code, _, err = lethe("plan", "--arch", tmp_path / "model", *words, *more)
        assert code == 2
        assert "defines the model; leave them out" in err


def test_a_step_may_hold_more_images_than_are_forgotten(lethe: Lethe) -> None:
    """As in a run. Red before: refused, so that a request of ten needed a smaller batch."""
    unlearn = _plan(forget_share=0.001, options={"batch_size": 64})["work"]["unlearn"]  # type: ignore[index]
    items = {item["name"]: item for item in unlearn["items"]}
    assert (items["forget phase"]["steps"], items["forget phase"]["images"]) == (2, 20)  # two passes over ten


def test_a_model_of_lethe_train_is_compared_with_its_own_epochs(lethe: Lethe, tmp_path: Path) -> None:
    """Before, with the 300 epochs of an ImageNet recipe, so that every share was too small."""
    model = save_checkpoint(tiny_vit(), tmp_path / "model")
    (model / "config.yaml").write_text("method: retrain\nepochs: 40.0\n")
    words = ("--images", 2_000, "--device", "cpu", "--precision", "fp32", "--json", tmp_path / "plan.json")

    def epochs(*more: object) -> float:
        code, _, err = lethe("plan", "--arch", model, *words, *more)
        assert code == 0, err
        return float(json.loads((tmp_path / "plan.json").read_text())["setup"]["retrain"]["epochs"])

    assert (epochs(), epochs("--retrain-epochs", 7), epochs("--retrain-recipe", "plain-vit")) == (40, 7, 90)
