"""Targets of `python -m bench kernels`, and whether a case reached them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.harness.measure import Row, middle, ratios, size
from bench.kernel_speed.kernel_peers import INFO_NCE_PYTORCH, MEMEFF
from bench.kernel_speed.rollout_peers import FAST_VIT_ROLLOUT, HOOKED, PLAIN

MASKING = "images to masked images"
RANKING = "q and k to mask"
CONTRAST = "InfoNCE, forward and backward"
MASK = "mask_patches"

ROOFLINE_CASE = "ViT-B/16 224, batch 256"

# Whether this project's row, compared with another contender if any, reaches the target, and the numbers that show it.
Judge = Callable[[Row, Row], tuple[bool, str]]


def targets_of(case: dict[str, Any], largest_batch: int) -> list[dict[str, Any]]:
    """Return each target of the case: text, passed (None if another library was not measured), numbers.

    largest_batch: of InfoNCE, at which on the CPU no other library is expected to fit into memory.
    """
    work, on_cuda = case["work"], "triton" in case["ours"]

    def target(text: str, other: str, judge: Judge) -> dict[str, Any]:
        rows = {row["contender"]: row for row in case["rows"]}
        used = [rows.get(name, {"contender": name, "status": "not run"}) for name in (case["ours"], other)]
        unmeasured = [row for row in used if row["status"] != "measured"]
        if unmeasured:
            # Without this project's row the target is missed, without the other library's it is not measured.
            passed = False if unmeasured[0]["contender"] == case["ours"] else None
            numbers = "; ".join(f"{row['contender']}: {row['status']}" for row in unmeasured)
        else:
            passed, numbers = judge(*used)
        return {"target": f"{case['case']}: {text}", "passed": passed, "numbers": numbers}

    if work == MASKING and on_cuda:
        return [target("rollout and mask add at most 5% to the fused forward pass", PLAIN, _time_at_most(1.05))]
    if work == MASKING:
        return [
            target("no slower than the full matrix on hooked maps", HOOKED, _time_at_most(1.0)),
            target("at least 1.15 x as fast as fast-vit-rollout", FAST_VIT_ROLLOUT, _as_fast_as(1.15)),
            target("extra memory under 10% of all layers' maps", PLAIN, _little_extra_memory),
        ]
    if work == RANKING and case["case"] == ROOFLINE_CASE:
        return [target("at least 60% of roofline", case["ours"], _near_roofline)]
    if work == CONTRAST and "negatives" not in case["shape"]:
        if on_cuda:
            return [
                target("no slower than memeff", MEMEFF, _time_at_most(1.0)),
                target("no more memory than memeff", MEMEFF, _no_more_memory),
            ]
        if case["shape"]["batch"] == largest_batch:
            return [target("completes in under 2 GiB", case["ours"], _under_two_gib)]
        return [
            target("no slower than info-nce-pytorch", INFO_NCE_PYTORCH, _time_at_most(1.0)),
            target("under a quarter of info-nce-pytorch's peak memory", INFO_NCE_PYTORCH, _quarter_of_the_memory),
        ]
    return []


def spread(values: list[float]) -> str:
    """Format median and range of ratios."""
    return f"{middle(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _time_at_most(limit: float) -> Judge:
    def judge(mine: Row, other: Row) -> tuple[bool, str]:
        share = ratios(mine, other)
        return middle(share) <= limit, f"{spread(share)} x the time of {other['contender']}"

    return judge


def _as_fast_as(least: float) -> Judge:
    def judge(mine: Row, other: Row) -> tuple[bool, str]:
        times = ratios(other, mine)
        return middle(times) >= least, f"{spread(times)} x as fast as {other['contender']}"

    return judge


def _little_extra_memory(mine: Row, _plain: Row) -> tuple[bool, str]:
    return mine["extra_of_maps"] < 0.1, f"{size(mine['extra_bytes'])}, {100 * mine['extra_of_maps']:.1f}%"


def _near_roofline(mine: Row, _mine: Row) -> tuple[bool, str]:
    share = mine["of_roofline"]
    return (share or 0) >= 0.6, f"{100 * share:.0f}%" if share else "no peaks are known for this card"


def _under_two_gib(mine: Row, _mine: Row) -> tuple[bool, str]:
    return mine["peak_bytes"] < 2 * 2**30, f"{size(mine['peak_bytes'])}, {middle(mine['seconds']):.1f} s"


def _quarter_of_the_memory(mine: Row, other: Row) -> tuple[bool, str]:
    return 4 * mine["peak_bytes"] < other["peak_bytes"], _memories(mine, other)


def _no_more_memory(mine: Row, other: Row) -> tuple[bool, str]:
    return mine["peak_bytes"] <= other["peak_bytes"], _memories(mine, other)


def _memories(mine: Row, other: Row) -> str:
    share = mine["peak_bytes"] / other["peak_bytes"]
    return f"{size(mine['peak_bytes'])}, {100 * share:.1f}% of {size(other['peak_bytes'])}"
