"""Cost of a pool, of a certificate, and of a request's proof."""

from __future__ import annotations

import pytest
from command_line import Lethe

from engine.errors import UserError
from engine.plan import plan

ARCH = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def _plan(**options: object) -> dict[str, object]:
    made = plan(
        "vit_tiny_patch16_224",
        images=10_000,
        forget_share=0.002,
        test_images=5_000,
        device="cpu",
        model_args=ARCH,
        num_classes=10,
        retrain_epochs=30.0,
        options={"batch_size": 10},
        **options,  # type: ignore[arg-type]
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
    found = work["certificate, 10 requests"]  # type: ignore[index]
    items = {item["name"]: item for item in found["items"]}
    unlearn = {item["name"]: item for item in work["unlearn"]["items"]}  # type: ignore[index]
    assert items["retain phase"]["images"] == 10 * unlearn["retain phase"]["images"]
    assert items["its verdict"]["images"] == 10 * 20 * 9 + 8 * 2_000 + 2 * 2_000
    assert "evaluation of the original and the result" not in items


def test_the_proof_of_a_request_is_below_a_hundredth_of_a_retrain() -> None:
    found = _plan(pool_models=8)
    proof = found["work"]["proof of a request"]["total"]  # type: ignore[index]
    assert proof["images"] == 20 * 3 + 2_000 + 2 * 500
    assert found["shares"]["proof of a request"]["flops"] < 0.01  # type: ignore[index]
    assert found["shares"]["unlearn"] == found["share"]  # type: ignore[index]


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
        *("plan", "--arch", "vit_tiny_patch16_224", *words, "--images", 10_000, "--forget-share", 0.002),
        *("--batch-size", 10, "--device", "cpu", "--precision", "fp32", "--pool-models", 8),
    )
    assert code == 0
    assert "pool of 8 models, once: 597% of a retrain" in out  # six trainings; a retrain is evaluated too
