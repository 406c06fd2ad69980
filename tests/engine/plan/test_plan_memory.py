"""What `lethe plan` says a rank holds: DeepSpeed's states by stage, buckets, the teacher, freed blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from test_plan import COST, MIB, N, P, job, sizes_of

from engine.errors import UserError
from engine.plan.cost import Bytes
from engine.plan.memory import Zero, count_memory

STATES = ("weights", "master weights", "optimizer state", "gradients")


@pytest.mark.parametrize(
    ("stage", "bf16", "expected"),
    [
        (0, False, (4, 0, 8, 4)),
        (0, True, (4, 0, 8, 4)),  # autocast over float32 weights
        (1, False, (4, 4 / N, 8 / N, 4)),
        (1, True, (2, 4 / N, 8 / N, 2)),
        (2, False, (4, 4 / N, 8 / N, 4 / N)),
        (2, True, (2, 4 / N, 8 / N, 2 / N)),
        (3, False, (4 / N, 4 / N, 8 / N, 4 / N)),
        (3, True, (2 / N, 4 / N, 8 / N, 2 / N)),
    ],
)
def test_states_by_stage(stage: int, bf16: bool, expected: tuple[float, ...]) -> None:
    sizes = sizes_of(count_memory(COST, job(Zero(stage=stage, reduce_bucket_size=2 * P), bf16=bf16)))
    assert tuple(sizes.get(name, 0) for name in STATES) == tuple(P * each for each in expected)
    w = 2 if bf16 and stage else 4
    assert sizes["reduce bucket"] == w * (P if stage == 0 else 2 * P)  # allocated whole on a GPU
    assert sizes["activations"] == 1_000 + 8 * 500
    if stage == 3:
        assert sizes["gathered weights"] == w * P
        assert sizes["gradients of the optimizer"] == 4 * P / N


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parts_add_up_to_the_total(stage: int, device: str) -> None:
    zero = Zero(stage=stage, offload_optimizer=stage >= 2, offload_param=stage == 3)
    memory = count_memory(COST, job(zero, device=device), baseline=77 * MIB if device == "cpu" else None)
    parts = memory.parts
    assert memory.total("device") == sum(p.bytes for p in parts if p.place == "device")
    assert memory.total("device") == max(totals["device"] for totals in memory.moments.values())
    assert memory.total("host") == sum(p.bytes for p in parts if p.place == "host") <= memory.host_peak
    assert all(p.why and p.bytes > 0 for p in parts)
    assert len({p.name for p in parts}) == len(parts)
    if device == "cpu":
        assert memory.host_peak == 0  # one memory
        assert sizes_of(memory)["interpreter and libraries"] == 77 * MIB


def test_offload_moves_the_optimizer_and_the_weights_to_the_host() -> None:
    for stage in (2, 3):
        on_gpu = count_memory(COST, job(Zero(stage=stage)))
        zero = Zero(stage=stage, offload_optimizer=True, offload_param=stage == 3)
        moved = count_memory(COST, job(zero))
        host = {part.name for part in moved.parts if part.place == "host"}
        assert {"master weights", "optimizer state", "gradients"} <= host
        assert ("weights" in host) == (stage == 3)
        assert moved.total("device") < on_gpu.total("device")
        assert moved.total("host") >= on_gpu.total("host") + 12 * P / N


def test_buckets_of_a_deepspeed_file_are_counted() -> None:
    wide = dataclasses.replace(COST, activations=Bytes(20 * P, 0))  # the peak is backward
    small = count_memory(wide, job(Zero(stage=2, reduce_bucket_size=1_000)))
    assert sizes_of(small)["reduce bucket"] == sizes_of(small)["bucket in flight"] == 2 * 1_000
    doubled = count_memory(wide, job(Zero(stage=2, reduce_bucket_size=1_000, overlap_comm=True)))
    assert sizes_of(doubled)["reduce bucket"] == 2 * 2 * 1_000
    on_cpu = count_memory(wide, job(Zero(stage=2), device="cpu"))
    assert sizes_of(on_cpu)["reduce bucket"] == 2 * P  # pages that are never written are not there
    released = count_memory(wide, job(Zero(stage=3, max_live_parameters=10, prefetch_bucket_size=5)))
    assert sizes_of(released)["gathered weights"] == 2 * 10
    assert sizes_of(released)["weights in flight"] == 2 * 5
    summed = count_memory(wide, job(Zero(stage=2, grad_accum_fp32=True)))
    assert sizes_of(summed)["gradients"] == 4 * P / N


def test_blocks_that_were_freed_stay_with_a_process_on_the_cpu() -> None:
    def kept(stage: int, **changed: Any) -> int:
        run = job(Zero(stage=stage), **{"device": "cpu", "teacher": "none", "watched": False, **changed})
        return sizes_of(count_memory(dataclasses.replace(COST, guided=Bytes(0, 0)), run)).get("freed, not returned", 0)

    activations = 1_000 + 8 * 500
    assert [kept(stage) for stage in range(4)] == [0, 4 * P - activations - 2 * P, 4 * P - activations, 4 * P]
    assert kept(3, teacher="replicated") == 8 * P
    assert kept(3, teacher="sharded") == kept(3, teacher="replicated", augmented=True) == 4 * P
    assert kept(0, teacher="replicated") == 4 * P
    assert kept(0, teacher="replicated", watched=True) == 0  # the second copy of the last good weights takes it
    assert kept(2, device="cuda") == 0


def test_one_rank_without_deepspeed_reduces_nothing() -> None:
    sizes = sizes_of(count_memory(COST, job(ranks=1, deepspeed=False)))
    assert not {"reduce bucket", "bucket in flight", "master weights"} & set(sizes)


def test_the_teacher_is_a_copy_a_share_or_its_outputs() -> None:
    cached = count_memory(COST, job(Zero(stage=2)))
    assert sizes_of(cached)["teacher outputs"] == 30 * 2 * 10 * 4  # samples x (masked, plain) x logits x float32
    assert "teacher" not in sizes_of(cached)
    features = count_memory(COST, job(Zero(stage=2), contrast="features"))
    assert sizes_of(features)["teacher outputs"] == 30 * 2 * 32 * 4
    stays = count_memory(COST, job(Zero(stage=2), augmented=True))
    assert sizes_of(stays)["teacher"] == 2 * P
    assert "teacher outputs" not in sizes_of(stays)
    shared = count_memory(COST, job(Zero(stage=2), augmented=True, teacher="sharded"))
    assert sizes_of(shared)["teacher"] == 2 * P / N + 2 * 100_000
    assert cached.moments["teacher pass"]["device"] > shared.moments["teacher pass"]["device"]
    none = count_memory(COST, job(teacher="none", watched=False))
    assert "teacher pass" not in none.moments
    assert not {"teacher", "teacher outputs", "last good weights"} & set(sizes_of(none))


def test_the_peak_may_be_the_optimizers_step() -> None:
    """Small buckets and batches: then the float32 gradients of the step are more than what backward needs."""
    memory = count_memory(
        dataclasses.replace(COST, activations=Bytes(0, 1)), job(Zero(stage=2, reduce_bucket_size=100), ranks=1)
    )
    assert memory.moment == "optimizer step"
    assert sizes_of(memory)["float32 gradients"] == 4 * P


def test_stage_3_and_offload_have_the_gradients_of_the_step_already() -> None:
    third = count_memory(COST, job(Zero(stage=3)))
    assert third.moments["optimizer step"]["device"] == (2 + 4 + 8 + 2 + 4) * P / N
    moved = count_memory(COST, job(Zero(stage=2, offload_optimizer=True)))
    assert moved.moments["optimizer step"]["device"] == 2 * P


def test_the_peak_may_be_the_end_where_the_model_is_whole_again() -> None:
    memory = count_memory(
        COST, job(Zero(stage=3, reduce_bucket_size=100, max_live_parameters=1, prefetch_bucket_size=1))
    )
    assert memory.moment == "handing back"
    assert sizes_of(memory)["unlearned model"] == 4 * P


def test_deepspeed_files_are_read() -> None:
    auto = Zero.read({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": "auto"}})
    assert auto == Zero(stage=2)
    given = {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "none"},
            "reduce_bucket_size": 5e7,
            "stage3_prefetch_bucket_size": 10,
            "stage3_max_live_parameters": 20,
            "stage3_max_reuse_distance": 30,
            "sub_group_size": 40,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "torch_autocast": {"enabled": True},
    }
    assert Zero.read(given) == Zero(
        stage=3,
        offload_optimizer=True,
        reduce_bucket_size=50_000_000,
        overlap_comm=True,
        prefetch_bucket_size=10,
        max_live_parameters=20,
        max_reuse_distance=30,
        sub_group_size=40,
        grad_accum_fp32=True,
        autocast=True,
    )
    assert not Zero.read({"torch_autocast": {"enabled": "auto"}}).autocast
    assert sizes_of(count_memory(COST, job(Zero(stage=1, autocast=True))))["weights"] == 4 * P
    with pytest.raises(UserError, match="zero_optimization is not a group"):
        Zero.read({"zero_optimization": 2})
