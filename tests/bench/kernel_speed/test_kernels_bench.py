"""`python -m bench kernels`: wrong contenders are refused, memory and costs are counted right, the command runs."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from toys import tiny_vit
from typer.testing import CliRunner

from bench.__main__ import app
from bench.harness import roofline
from bench.harness.measure import Contender, WrongResultError, measure, peak_bytes, race, size
from bench.kernel_speed import kernels as command
from bench.kernel_speed.kernel_peers import (
    INFO_NCE_PYTORCH,
    InfoNCECase,
    Loss,
    info_nce_contenders,
    mask_contenders,
    paired_contenders,
)
from bench.kernel_speed.kernel_targets import CONTRAST, MASK, MASKING, targets_of
from bench.kernel_speed.rollout_peers import (
    HOOKED,
    PLAIN,
    KernelCase,
    RolloutCase,
    kernel_contenders,
    rollout_contenders,
)
from engine.models.attention_masking import top_mask
from engine.models.vit import describe

CPU = torch.device("cpu")
MIB = 2**20


def contender(name: str, call: Callable[[], Any], check: Callable[[Any], float] = lambda _: 0.0) -> Contender:
    return Contender(name=name, build=lambda: call, check=check)


def named(contenders: list[Contender], name: str) -> Contender:
    return next(each for each in contenders if each.name == name)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_peak_counts_what_lives_at_once_and_not_what_was_there_before() -> None:
    before = torch.ones(MIB)

    def call() -> Tensor:
        first = before * 2  # 4 MiB
        second = first + 1  # 8 MiB
        del first
        return second * 3  # 8 MiB, the first is free again

    assert peak_bytes(call, CPU) == pytest.approx(8 * MIB, rel=1e-3)


def test_peak_sees_inside_custom_operations() -> None:
    @torch.library.custom_op("lethe_test::wasteful", mutates_args=())
    def wasteful(x: Tensor) -> Tensor:
        return (x.expand(16, *x.shape) * 2).sum(dim=0)

    x = torch.ones(MIB // 4)
    assert peak_bytes(lambda: wasteful(x), CPU) == pytest.approx(17 * MIB, rel=1e-3)


def test_peak_counts_the_backward_pass() -> None:
    x = torch.ones(MIB // 4, requires_grad=True)
    # Two saved MiB-sized results, and a gradient while both are there.
    assert peak_bytes(lambda: torch.autograd.grad(x.exp().exp().sum(), x), CPU) >= 3 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.slow
def test_peak_agrees_with_what_the_kernel_of_the_system_counts() -> None:
    queries = torch.randn(32, 12, 197, 64)

    def call() -> list[Tensor]:  # blocks above 32 MiB, which go back to the system at once
        return [(queries @ queries.transpose(-2, -1)).softmax(dim=-1) for _ in range(3)]

    call()
    tracked = peak_bytes(call, CPU)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is kept for later would serve the call unseen

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    before = resident("VmRSS")
    call()
    assert tracked == pytest.approx(4 * 32 * 12 * 197**2 * 4, rel=0.1)  # three results, and one on the way
    assert resident("VmHWM") - before == pytest.approx(tracked, rel=0.25)


# --- refusing what is wrong -------------------------------------------------------------------------------------------


def test_wrong_missing_and_crashing_contenders_are_not_timed() -> None:
    calls = []

    def wrong() -> float:
        calls.append("wrong")
        return 2.0

    def check(found: float) -> float:
        if found != 1.0:
            raise WrongResultError(f"found {found}")
        return 0.0

    def absent() -> Callable[[], Any]:
        raise ImportError("No module named 'absent'")

    def crash() -> None:
        raise RuntimeError("no such device\nwith a trace")

    contenders = [
        contender("right", lambda: 1.0, check),
        contender("wrong", wrong, check),
        Contender(name="absent", build=absent, check=check, install="pip install absent"),
        contender("crashing", crash),
        Contender(name="huge", build=lambda: wrong, check=check, host_bytes=2**60),
    ]
    right, *others = measure(contenders, device=CPU, rounds=4)
    assert right["status"] == "measured"
    assert len(right["seconds"]) == 4
    assert [row["status"] for row in others] == ["failed", "missing", "failed", "not run"]
    assert all("seconds" not in row and "peak_bytes" not in row for row in others)
    assert others[0]["reason"] == "WrongResultError: found 2.0"
    assert others[1]["reason"] == "No module named 'absent'; pip install absent"
    assert others[2]["reason"] == "RuntimeError: no such device"
    assert others[3]["reason"].startswith("copies 1073741824.00 GiB to main memory (computed from the shape), ")
    assert calls == ["wrong"]


def test_a_wrong_result_of_a_single_call_is_not_reported_either() -> None:
    def check(_: Any) -> float:
        raise WrongResultError("wrong")

    (row,) = measure([contender("wrong", lambda: torch.ones(9), check)], device=CPU, rounds=3, once=True)
    assert row["status"] == "failed"
    assert "seconds" not in row and "peak_bytes" not in row  # noqa: PT018
    (row,) = measure([contender("right", lambda: torch.ones(MIB))], device=CPU, rounds=3, once=True)
    assert len(row["seconds"]) == 1
    assert row["peak_bytes"] == 4 * MIB


def test_a_contender_that_is_right_at_first_only_is_found_out() -> None:
    results = iter([1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0])

    def check(found: float) -> float:
        if found != 1.0:
            raise WrongResultError(f"found {found}")
        return 0.0

    (row,) = measure([contender("stale", lambda: next(results), check)], device=CPU, rounds=3)
    assert row["status"] == "failed"
    assert row["reason"] == "WrongResultError: found 2.0"
    assert "seconds" not in row


def test_contenders_alternate_and_the_first_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = race(calls, device=CPU, rounds=3, seconds=60)
    assert "".join(order) == "abcbcacab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert len(race(calls, device=CPU, rounds=50, seconds=0)["a"]) == 3
    assert race({}, device=CPU, rounds=3, seconds=60) == {}


# --- the contenders themselves ----------------------------------------------------------------------------------------


def rollout_case(batch: int = 5) -> RolloutCase:
    model = command._attentive(tiny_vit(depth=3))
    images = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return RolloutCase.of(model, describe(model), images, k=3)


def test_rollout_contenders_agree_with_float64_and_leave_the_model_alone() -> None:
    case = rollout_case()
    hooks = [len(module._forward_hooks) for module in case.model.modules()]
    rows = measure(rollout_contenders(case, {"ours": "eager"}), device=CPU, rounds=1)
    theirs = [row for row in rows if row["contender"].startswith("fast-vit-rollout")]
    assert [row["status"] for row in rows if row not in theirs] == ["measured"] * 5
    assert {row["status"] for row in theirs} in ({"measured"}, {"missing"})
    assert [len(module._forward_hooks) for module in case.model.modules()] == hooks
    # The hooked maps are held, so they are seen: all of them on top of the forward pass.
    command._add_extra_memory(rows, case.maps_bytes())
    hooked, plain = (next(row for row in rows if row["contender"] == name) for name in (HOOKED, PLAIN))
    assert plain["extra_bytes"] == 0
    assert len(theirs) == 2
    assert hooked["extra_of_maps"] > 0.5
    assert case.maps_bytes() == 3 * 5 * 2 * 17**2 * 4


def test_broken_rollouts_are_refused() -> None:
    case = rollout_case()
    good = named(rollout_contenders(case, {"ours": "eager"}), "ours").build()()
    assert case.check(good) < 1e-5
    for broken in (
        good._replace(scores=good.scores * 1.01),
        good._replace(scores=good.scores.roll(1, dims=0)),
        good._replace(scores=good.scores[:, 1:]),
        good._replace(scores=good.scores * torch.nan),
        good._replace(images=good.images.roll(1, dims=0)),
        good._replace(images=case.images),
        case.masked(-good.scores)._replace(scores=good.scores),
    ):
        with pytest.raises(WrongResultError):
            case.check(broken)
    with pytest.raises(WrongResultError, match="logits are off"):
        case.check_logits(case.model(case.images) * 1.01)
    maps = named(rollout_contenders(case, {}), "timm AttentionExtract").build()()
    with pytest.raises(WrongResultError, match="2 attention maps"):
        case.check_maps(maps[:2])
    with pytest.raises(WrongResultError, match="sums of attention rows"):
        case.check_maps([2 * attention for attention in maps])


def test_kernel_contenders_and_broken_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = KernelCase.of(rollout_case())
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: call)  # its compiler is not what is tested here
    rows = {row["contender"]: row for row in measure(kernel_contenders(case), device=CPU, rounds=1)}
    assert rows.pop("ours, triton")["status"] == "failed"  # on the CPU
    assert [row["status"] for row in rows.values()] == ["measured"] * 3
    mask = named(kernel_contenders(case), "ours, eager").build()()
    assert case.check(mask) == 0
    with pytest.raises(WrongResultError, match="does not hold 3 patches"):
        case.check(mask.roll(1, dims=1) | mask)
    with pytest.raises(WrongResultError, match="below the 3-th"):
        case.check(mask.roll(1, dims=0))
    lowest = torch.zeros_like(mask)
    lowest[case.sample] = top_mask(-case.scores, 3, "rollout")
    with pytest.raises(WrongResultError, match="below the 3-th"):
        case.check(lowest)


def info_nce_case() -> InfoNCECase:
    return InfoNCECase.in_batch(*command._pairs(20, 6, CPU, torch.float32), 0.1)


def test_the_closed_form_is_what_autograd_gives() -> None:
    anchors, positives = (tensor.double().requires_grad_() for tensor in command._pairs(20, 6, CPU, torch.float32))
    logits = functional.normalize(anchors, dim=1) @ functional.normalize(positives, dim=1).T / 0.1
    labels = torch.arange(20)
    case = info_nce_case()
    there, back = functional.cross_entropy(logits, labels), functional.cross_entropy(logits.T, labels)
    for loss, expected in ((there, case.expected), ((there + back) / 2, case.expected_symmetric)):
        gradients = torch.autograd.grad(loss, (anchors, positives), retain_graph=True)
        torch.testing.assert_close(expected.value, loss.detach())
        for gradient, rows in zip(gradients, expected.gradients, strict=True):
            torch.testing.assert_close(rows, gradient[case.sample])


def test_info_nce_contenders_agree_with_float64() -> None:
    rows = measure(info_nce_contenders(info_nce_case(), {"ours": "eager"}, slow_peers=True), device=CPU, rounds=1)
    assert rows[-1]["contender"] == "lightly NTXentLoss"
    assert all(row["status"] in ("measured", "missing") for row in rows)
    assert [row["status"] for row in rows[:2]] == ["measured"] * 2
    missing = [row for row in rows if row["status"] == "missing"]
    assert all("; pip install " in row["reason"] for row in missing)


def test_broken_losses_are_refused() -> None:
    case = info_nce_case()
    good = named(info_nce_contenders(case, {"ours": "eager"}, False), "ours").build()()
    assert case.check(good) < 1e-5
    anchors, positives = good.gradients
    for broken in (
        Loss(good.value + 0.01, good.gradients),
        Loss(good.value, (anchors * 1.01, positives)),
        Loss(good.value, (anchors, positives.roll(1, dims=0))),
        Loss(good.value, (anchors,)),
        Loss(good.value * torch.nan, good.gradients),
    ):
        with pytest.raises(WrongResultError):
            case.check(broken)
    with pytest.raises(WrongResultError):  # one direction is not two
        case.check_symmetric(good)


def test_paired_and_mask_contenders() -> None:
    anchors, positives = command._pairs(6, 10, CPU, torch.float32)
    case = InfoNCECase.paired(anchors, positives, torch.randn(6, 2, 10), 0.1)
    rows = measure(paired_contenders(case, {"ours": "eager"}), device=CPU, rounds=1)
    assert [row["status"] for row in rows[:2]] == ["measured"] * 2
    assert rows[2]["status"] in ("measured", "missing")
    good = named(paired_contenders(case, {"ours": "eager"}), "ours").build()()
    assert len(good.gradients) == 1
    with pytest.raises(WrongResultError):
        case.check(Loss(good.value, (good.gradients[0].flip(1),)))
    images, mask = torch.randn(5, 3, 8, 8), torch.rand(5, 16) < 0.3
    contenders = mask_contenders(images, mask, 2, {"ours": "eager"})
    assert [row["status"] for row in measure(contenders, device=CPU, rounds=1)] == ["measured"] * 2
    with pytest.raises(WrongResultError):
        contenders[0].check(images)


# --- roofline ---------------------------------------------------------------------------------------------------------


def test_costs_by_hand() -> None:
    # 2 layers, 1 image, 1 head, 3 tokens of width 2, 2 bytes: K 12 + 12, Q 12 + 4 (one row), scores 12 bytes;
    # 3 x 3 products of the first layer and 1 x 3 of the last, 2 x 2 flops each.
    assert roofline.rollout_cost(2, 1, 1, 3, 2, 2) == roofline.Cost(bytes=52, flops=48, exponentials=12)
    # Heads and images multiply all of it.
    assert roofline.rollout_cost(2, 5, 3, 3, 2, 2) == roofline.Cost(bytes=660, flops=720, exponentials=180)
    # 2 anchors, 3 candidates of 4 features, 4 bytes: 80 bytes of inputs, 8 of log-sums; 6 similarities of 8 flops.
    forward = roofline.info_nce_cost(2, 3, 4, 4, backward=False)
    assert forward == roofline.Cost(bytes=88, flops=48, exponentials=6)
    # Backward: inputs and log-sums again, 80 bytes of gradients; 3 more products.
    assert roofline.info_nce_cost(2, 3, 4, 4) == roofline.Cost(bytes=256, flops=192, exponentials=12)


def test_the_bound_is_the_slowest_of_three() -> None:
    peaks = roofline.Peaks(bandwidth=10, flops={"float32": 100, "tf32": 400}, exponentials=5)

    def bound(dtype: str | torch.dtype, **changed: int) -> tuple[float, str]:
        cost = roofline.Cost(**{"bytes": 10, "flops": 100, "exponentials": 5, **changed})
        return dataclasses.astuple(roofline.predict(cost, peaks, dtype))

    assert bound(torch.float32, bytes=30) == (3, "bytes")
    assert bound(torch.float32, flops=800) == (8, "flops")
    assert bound("tf32", flops=800) == (2, "flops")
    assert bound(torch.float32, exponentials=20) == (4, "exponentials")
    with pytest.raises(ValueError, match="predict: dtype is 'bfloat16', expected one of 'float32', 'tf32'"):
        bound(torch.bfloat16)


def test_an_unknown_card_has_no_share() -> None:
    cost = roofline.Cost(bytes=48 * 10**11, flops=1, exponentials=1)
    assert roofline.share(cost, "NVIDIA H200", torch.bfloat16, 2.0) == pytest.approx(0.5)
    for stranger in ("NVIDIA H200 NVL", "NVIDIA B200", "h200", ""):
        assert roofline.share(cost, stranger, torch.bfloat16, 2.0) is None


def test_peaks_are_consistent_with_each_other() -> None:
    for name, peaks in roofline.PEAKS.items():
        # float32: 64 lanes a multiprocessor on A100, 128 on H100; 2 flops a lane and clock, 16 exponentials.
        lanes = 64 if "A100" in name else 128
        assert peaks.flops["float32"] == pytest.approx(peaks.exponentials / 16 * lanes * 2, rel=0.01)
        assert peaks.flops["bfloat16"] == pytest.approx(2 * peaks.flops["tf32"], rel=0.001)


# --- targets and the command ------------------------------------------------------------------------------------------


def row(name: str, seconds: float | None = None, peak: int = 0, **more: Any) -> dict[str, Any]:
    if seconds is None:
        return {"contender": name, "note": "", "status": "failed", "reason": "broken"}
    return {
        "contender": name,
        "note": "",
        "status": "measured",
        "seconds": [seconds, 3 * seconds, seconds],
        "peak_bytes": peak,
        **more,
    }


def verdicts(*rows: dict[str, Any], work: str, **shape: Any) -> list[bool | None]:
    case = command._case(work, "a case", list(rows), rows[0]["contender"], **shape)
    return [target["passed"] for target in targets_of(case, 65_536)]


def test_targets_of_the_rollout() -> None:
    def reached(ours: float | None, hooked: float | None, fast: float | None, of_maps: float) -> list[bool | None]:
        mine = row("ours", ours, extra_bytes=1, extra_of_maps=of_maps)
        rows = (mine, row(PLAIN, 0.5), row(HOOKED, hooked), row("fast-vit-rollout", fast))
        return verdicts(*rows, work=MASKING)

    assert reached(1.0, 1.0, 1.15, 0.09) == [True, True, True]
    assert reached(1.0, 0.99, 1.14, 0.1) == [False, False, False]
    assert reached(1.0, None, None, 0.0) == [None, None, True]
    assert reached(None, 1.0, 2.0, 0.0) == [False, False, False]
    mine = row("ours, triton", 1.05)
    assert verdicts(mine, row(PLAIN, 1.0), work=MASKING) == [True]
    assert verdicts(mine, row(PLAIN, 0.99), work=MASKING) == [False]


def test_targets_of_info_nce() -> None:
    def reached(ours: dict[str, Any], *others: dict[str, Any], batch: int = 8192) -> list[bool | None]:
        return verdicts(ours, *others, work=CONTRAST, batch=batch)

    assert reached(row("ours", 1.0, 24), row(INFO_NCE_PYTORCH, 1.0, 100)) == [True, True]
    assert reached(row("ours", 1.1, 25), row(INFO_NCE_PYTORCH, 1.0, 100)) == [False, False]
    assert reached(row("ours", 1.0, 2**31 - 1), batch=65_536) == [True]
    assert reached(row("ours", 1.0, 2**31), batch=65_536) == [False]
    assert reached(row("ours"), batch=65_536) == [False]
    assert reached(row("ours, triton", 1.0, 100), row("memeff, one direction", 1.0, 100)) == [True, True]
    assert reached(row("ours, triton", 1.1, 101), row("memeff, one direction", 1.0, 100)) == [False, False]


def test_quadratic_memory_that_would_not_fit_is_computed_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "free_bytes", lambda device: 15 * 2**30)
    peaks = {"quadratic": 2**28, "quadratic, small": 2**27, "linear": 2**26 - 1}
    before, batch = 2**12, 2**15
    reasons = command._too_large(peaks, before, batch, torch.float32, CPU)
    assert list(reasons) == ["quadratic"]
    assert reasons["quadratic"] == (
        "needs 4.00 GiB for one matrix of similarities (computed: B x B x 4 bytes); its peak at B=4,096 was 256.0 MiB,"
        " 15.00 GiB are free"
    )
    monkeypatch.setattr(command, "free_bytes", lambda device: 2**30)
    assert list(command._too_large(peaks, before, batch, torch.float32, CPU)) == ["quadratic", "quadratic, small"]


def test_sizes_for_people() -> None:
    assert [size(count) for count in (0, 2**10, 3 * 2**19, 5 * 2**29)] == ["0 B", "1.0 KiB", "1.5 MiB", "2.50 GiB"]


def test_quick_runs_end_to_end_and_its_json_holds_every_round(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    result = CliRunner().invoke(app, ["kernels", "--quick", "--device", "cpu", "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert {"environment", "commit", "settings", "load_average", "cases", "targets"} <= set(report)
    assert str(Path.cwd()) not in file.read_text()
    works = [case["work"] for case in report["cases"]]
    assert works == [MASKING, *[CONTRAST] * 3, MASK]
    for case in report["cases"]:
        for each in case["rows"]:
            assert each["status"] in ("measured", "missing"), each
            if each["status"] == "measured":
                assert len(each["seconds"]) == len(each["times_ours"]) >= 3
                assert each["median"] == statistics.median(each["seconds"])
    assert len(report["targets"]) == 6
    assert "MISSED" in result.output or "PASS" in result.output
    assert "--quick is a smoke test" in result.output
    if any(each["status"] == "missing" for case in report["cases"] for each in case["rows"]):
        assert "[bench]" in result.output


def test_only_runs_one_part() -> None:
    report = command.run_kernels(device="cpu", quick=True, only="mask")
    assert [case["work"] for case in report["cases"]] == [MASK]
    assert report["targets"] == []
