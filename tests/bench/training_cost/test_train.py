"""`python -m bench train`: contenders in their processes, ratios, counts, the loops of peers, the command."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from bench.__main__ import app
from bench.harness import workers
from bench.harness.cases import TINY, TRAIN_CPU, TRAIN_CUDA, TRAIN_QUICK, StepCase, TrainCase
from bench.harness.matmul import flops, matmul_peak
from bench.harness.measure import Row
from bench.harness.workers import Contender, ContenderError, Worker, race_workers
from bench.training_cost import train
from bench.training_cost.peer_loops import SalunStep, SupremeStep
from bench.training_cost.train import (
    BEST_ANY,
    BEST_BF16,
    BEST_FP32,
    flops_per_image,
    loops_of,
    targets_of,
    times_as_fast,
)
from engine.errors import UserError

pytestmark = pytest.mark.slow  # runs of the engine, in processes of their own

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 2**20


# --- contenders in processes of their own -----------------------------------------------------------------------------


class Steps:
    """Takes `seconds` a step, writes its name and process to `log`, and does what `fate` says at step `when`."""

    batch = 4

    def __init__(
        self, device: torch.device, log: Path, name: str, seconds: float = 0.0, fate: str = "", when: int = 0
    ) -> None:
        self.log, self.name, self.seconds, self.fate, self.when = log, name, seconds, fate, when
        self.prepare_seconds, self.number, self.parts = 0.5, 0, {"data": 0.0, "forward": 0.0}
        self.held = torch.zeros(64 * MIB, dtype=torch.uint8) if fate == "large" else None

    def __call__(self) -> None:
        self.number += 1
        with self.log.open("a", encoding="ascii") as handle:
            handle.write(
                f"{self.name} {os.getpid()} {torch.get_num_threads()} {self.number} {os.environ['TRITON_CACHE_DIR']}\n"
            )
        if self.number == self.when:
            if self.fate == "raise":
                raise RuntimeError("no such thing\nwith a trace")
            if self.fate == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if self.fate == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fate == "hang":
                time.sleep(60)
        if self.fate == "touch":
            del self.held
            self.held = torch.ones(64 * MIB, dtype=torch.uint8)  # fresh pages: 64 MiB / 4 KiB faults
        time.sleep(self.seconds)

    def timed(self) -> Any:
        import contextlib

        @contextlib.contextmanager
        def watch() -> Any:
            yield
            self.parts["forward"] += 4 * self.seconds

        return watch()

    def reset_parts(self) -> None:
        self.parts = {"data": 0.0, "forward": 0.0}

    def close(self) -> None:
        with self.log.open("a", encoding="ascii") as handle:
            handle.write(f"{self.name} closed\n")


def steps(log: Path, name: str, parts: bool = False, **options: Any) -> Contender:
    return Contender(name=name, build=functools.partial(Steps, log=log, name=name, **options), parts=parts)


def race(contenders: list[Contender], threads: int = 1) -> dict[str, Row]:
    rows = race_workers(contenders, device=CPU, threads=threads, rounds=3, seconds=60.0)
    assert [row["contender"] for row in rows] == [each.name for each in contenders]
    return {row["contender"]: row for row in rows}


def test_each_contender_has_a_process_and_turns_go_round(tmp_path: Path) -> None:
    log = tmp_path / "log"
    rows = race([steps(log, name, seconds=0.1, parts=name == "a") for name in "abc"], threads=2)
    lines = [line.split() for line in log.read_text(encoding="ascii").splitlines()]
    taken = [line for line in lines if line[1] != "closed"]
    processes = {name: {line[1] for line in taken if line[0] == name} for name in "abc"}
    assert len(set.union(*processes.values())) == 3
    assert str(os.getpid()) not in set.union(*processes.values())
    assert {line[2] for line in taken} == {"2"}
    assert len({line[4] for line in taken}) == 3  # compilers' caches
    assert not any(Path(line[4]).parent.exists() for line in taken)
    # Two steps each to begin with, then turns of three steps (0.25 s of the fastest), then the parts of one.
    order = "".join(line[0] for line in taken)
    assert order == "aabbcc" + "".join(3 * name for name in "abcbcacab") + "aaa"
    assert sorted(line[0] for line in lines if line[1] == "closed") == ["a", "b", "c"]
    for row in rows.values():
        assert row["status"] == "measured"
        assert [len(seconds) for seconds in row["steps"]] == [3, 3, 3]
        assert row["seconds"] == pytest.approx([sum(seconds) / 3 for seconds in row["steps"]])
        assert 0.1 <= min(row["seconds"]) < 0.2
        assert (row["batch"], row["prepare_seconds"]) == (4, 0.5)
    assert rows["a"]["parts"]["forward"] == pytest.approx(4 * 0.1 / 3)
    assert rows["a"]["parts"]["all"] >= 0.1
    assert "parts" not in rows["b"]


def test_what_becomes_of_a_contender_is_its_row(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fates = {"raising": ("raise", 1), "late": ("raise", 4), "full": ("memory", 2), "killed": ("kill", 5)}
    contenders = [steps(log, name, seconds=0.13, fate=fate, when=when) for name, (fate, when) in fates.items()]
    rows = race([steps(log, "good", seconds=0.13), *contenders])
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "measured", "raising": "failed", "late": "failed", "full": "not run", "killed": "failed",
    }  # fmt: skip
    assert len(rows["good"]["seconds"]) == 3
    assert rows["raising"]["reason"] == rows["late"]["reason"] == "RuntimeError: no such thing"
    assert rows["full"]["reason"] == "ran out of memory on cpu"
    assert rows["killed"]["reason"] == "its process was ended by SIGKILL, as the system does when memory runs out"
    for name in fates:
        assert not {"seconds", "steps", "first_seconds", "peak_bytes", "page_faults"} & set(rows[name])


def test_a_contender_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    worker = Worker(steps(tmp_path / "log", "hanging", fate="hang", when=3), CPU, threads=1)
    try:
        assert worker.ask("build")["batch"] == 4
        worker._patience = 0.5
        with pytest.raises(ContenderError, match=r"no answer to 'steps' in 0.5 s"):
            worker.ask("steps", 1)
    finally:
        began = time.perf_counter()
        worker.close()
    assert time.perf_counter() - began < 2.5  # not the time that a contender has for its end
    assert worker.process.exitcode == -signal.SIGKILL


def test_what_is_imported_before_the_fork_asks_no_device() -> None:
    code = (
        "import importlib, torch\n"
        "def probe(*args, **kwargs): raise SystemExit('a device was asked')\n"
        "for name in ('is_available', 'device_count', 'get_device_capability', 'init', '_lazy_init'):\n"
        "    setattr(torch.cuda, name, probe)\n"
        f"for name in {workers._PRELOADED!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_memory_and_page_faults_are_those_of_the_contender(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ballast = torch.ones(256 * MIB, dtype=torch.uint8)  # of this process, which must not count
    rows = race([steps(log, "lean", seconds=0.02), steps(log, "touching", seconds=0.02, fate="touch")])
    del ballast
    extra = rows["touching"]["peak_bytes"] - rows["lean"]["peak_bytes"]
    # 64 MiB, give or take the pages of libraries that one of the two happens to touch first; not the ballast's 256.
    assert 40 * MIB < extra < 160 * MIB
    assert rows["lean"]["page_faults"] < 100
    assert rows["touching"]["page_faults"] == pytest.approx(64 * MIB / 4096, rel=0.1)


def test_a_contender_that_would_not_fit_beside_the_others_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "free_bytes", lambda device: 2**30 + 10 * MIB)
    log = tmp_path / "log"
    rows = race([steps(log, name, seconds=0.3) for name in "ab"])
    assert [row["status"] for row in rows.values()] == ["measured", "not run"]
    assert rows["b"]["reason"].startswith("1.01 GiB of memory are free, and the largest contender before it took ")
    assert not any(line.startswith("b ") for line in log.read_text(encoding="ascii").splitlines())


def test_turns_have_many_steps_where_steps_are_short() -> None:
    assert workers._steps_a_turn([0.1, 0.05]) == 5
    assert workers._steps_a_turn([3.0]) == 1
    assert workers._steps_a_turn([1e-4]) == 20
    assert workers._steps_a_turn([]) == 1


# --- counts -----------------------------------------------------------------------------------------------------------


def test_flops_by_hand() -> None:
    # 64 patches of 48 pixels to width 64, then 65 tokens through 3 blocks of 12 width^2 a token and two products
    # tokens x tokens x width, then the class token to 10 logits.
    tokens, width = 65, 64
    block = 12 * width**2 * tokens + 2 * tokens**2 * width
    forward = 2 * (64 * 48 * width + 3 * block + width * 10)
    # Each product has two more in the backward pass, but for the patches, whose pixels have no gradient.
    assert flops_per_image(TINY) == (forward, 3 * forward - 2 * 64 * 48 * width)


def test_the_peak_is_the_best_rate_that_was_measured() -> None:
    assert flops(2, 3, 5) == 60
    row = matmul_peak("fp32", CPU, [(64, 64, 64), (256, 256, 256)], rounds=3, seconds=1.0)
    assert list(row["shapes"]) == ["64 x 64 x 64", "256 x 256 x 256"]
    assert all(len(rates) == 3 for rates in row["shapes"].values())
    assert row["peak"] == max(max(rates) for rates in row["shapes"].values())
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    assert row["peak"] == pytest.approx(20 * 2 * 256**3 / (time.perf_counter() - began), rel=0.9)
    torch.set_float32_matmul_precision("highest")
    matmul_peak("tf32", CPU, [(8, 8, 8)], rounds=1)
    assert torch.get_float32_matmul_precision() == "highest"


# --- ratios and targets -----------------------------------------------------------------------------------------------


def case(phase: Any = "retain", against: Any = "all", precision: Any = "bf16") -> TrainCase:
    return TrainCase(step=StepCase(model=TINY, phase=phase, precision=precision, batch=8), against=against)


def row(name: str, *seconds: float, prepare: float = 0.0) -> Row:
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "contender": name, "status": "measured", "seconds": list(seconds), "median": median, "prepare_a_step": prepare,
    }  # fmt: skip


def test_loops_of_a_case() -> None:
    names = [loop.contender.name for loop in loops_of(case(), CPU)]
    plain = [f"plain {each}" for each in ("fp32 sdpa", "fp32 eager", "bf16 sdpa", "bf16 eager")]
    compiled = [f"plain bf16 {each} compiled" for each in ("sdpa", "eager")]
    ours = ["ours", "ours, compiled", "ours, fp32"]
    assert names == [*ours, *plain, *compiled, "SalUn's loop", "supreme's loop"]
    by_name = {loop.contender.name: loop for loop in loops_of(case("forget"), CPU)}
    groups = {name: loop.groups for name, loop in by_name.items() if loop.groups}
    assert groups == {
        "plain fp32 sdpa": (BEST_FP32,), "plain fp32 eager": (BEST_FP32,),
        "plain bf16 sdpa": (BEST_BF16, BEST_ANY), "plain bf16 eager": (BEST_BF16, BEST_ANY),
        "plain bf16 sdpa compiled": (BEST_ANY,), "plain bf16 eager compiled": (BEST_ANY,),
    }  # fmt: skip
    assert {name for name, loop in by_name.items() if loop.teacher_passes} == {*groups, "supreme's loop"}
    assert {loop.teacher_passes for loop in by_name.values()} == {0, 2}
    assert [by_name[name].kind for name in ("ours", "ours, fp32", "plain fp32 sdpa", "SalUn's loop")] == [
        "bf16", "fp32", "fp32", "fp32",
    ]  # fmt: skip
    compiled_only = [loop.contender.name for loop in loops_of(case(against="compiled", precision="fp32"), CPU)]
    assert compiled_only == ["ours", "ours, compiled", *plain[:2], "plain fp32 sdpa compiled"]
    assert "plain bf16 eager compiled" not in [loop.contender.name for loop in loops_of(case(), CUDA)]
    assert [loop.contender.name for loop in loops_of(case(against="plain"), CPU)] == ["ours", *plain[2:]]
    checkpointing = dataclasses.replace(case().step, checkpointing=True)
    loops = loops_of(TrainCase(step=checkpointing, against="checkpointing"), CPU)
    built = {loop.contender.name: loop.contender.build.args[0].checkpointing for loop in loops}  # type: ignore[attr-defined]
    assert built == {
        "ours, checkpointing": True, "ours": False,
        "plain bf16 sdpa, checkpointing": True, "plain bf16 sdpa": False,
    }  # fmt: skip


def test_names_of_cases_are_different() -> None:
    for cases in (TRAIN_CPU, TRAIN_CUDA, TRAIN_QUICK):
        assert len({each.name for each in cases}) == len(cases)


def test_the_fastest_loop_of_a_group_is_the_one_to_beat() -> None:
    loops = loops_of(case(), CPU)
    rows: list[Row] = [row(loop.contender.name, 3.0, 3.0, 3.0) for loop in loops]
    by_name = {each["contender"]: each for each in rows}
    by_name["plain fp32 eager"].update(median=2.5)
    by_name["plain bf16 sdpa"].update(median=2.0)
    by_name["plain bf16 eager compiled"].update(median=1.0)
    by_name["plain bf16 sdpa compiled"].update(status="failed", median=0.1)

    def best(**changed: Any) -> dict[str, str]:
        return {group: each["contender"] for group, each in train._best(loops_of(case(**changed), CPU), rows).items()}

    assert best() == {
        BEST_FP32: "plain fp32 eager", BEST_BF16: "plain bf16 sdpa", BEST_ANY: "plain bf16 eager compiled",
    }  # fmt: skip
    loops = loops_of(case(against="plain"), CPU)
    found = train._best(loops, [by_name[loop.contender.name] for loop in loops])
    assert {group: each["contender"] for group, each in found.items()} == {BEST_BF16: "plain bf16 sdpa"}


def test_ratios_are_formed_within_rounds() -> None:
    ours, other = row("ours", 1.0, 2.0, 1.0, prepare=1.0), row("plain", 3.0, 6.0, 2.0)
    assert times_as_fast(ours, other, prepare=False) == [3.0, 3.0, 2.0]
    assert times_as_fast(ours, other) == [1.5, 2.0, 1.0]


def test_targets_count_prepare_in_the_forget_step() -> None:
    ours = row("ours", 1.0, 1.0, 1.0, prepare=0.5)
    best = {BEST_FP32: row("plain fp32 sdpa", 2.0, 2.0, 2.0), BEST_BF16: row("plain bf16 eager", 2.0, 1.8, 1.8)}
    fp32, bf16 = targets_of(case("forget", "uncompiled"), [ours], best)
    assert fp32 == {
        "target": "forget step, ViT 64x3/4 32, bf16, batch 8: 1.5 x best plain fp32",
        "passed": False,
        "numbers": "ours: 1.33 (1.33 to 1.33) x plain fp32 sdpa; without prepare 2.00 (2.00 to 2.00)",
    }
    assert bf16["passed"]
    ours["prepare_a_step"] = 0.0
    fp32, _ = targets_of(case("retain", "uncompiled"), [ours], best)
    assert fp32["passed"]
    assert fp32["numbers"] == "ours: 2.00 (2.00 to 2.00) x plain fp32 sdpa"
    best[BEST_FP32] = row("plain fp32 sdpa", 1.4, 1.4, 2.0)  # the median decides
    assert not targets_of(case("retain", "uncompiled"), [ours], best)[0]["passed"]


def test_targets_of_loops_that_did_not_run() -> None:
    best = {BEST_BF16: row("plain bf16 eager", 2.0), BEST_ANY: row("plain bf16 sdpa compiled", 1.1)}
    ours, compiled = row("ours", 1.0), row("ours, compiled", 0.9)
    assert [each["passed"] for each in targets_of(case(), [ours, compiled], best)] == [None, True, True]
    numbers = targets_of(case(), [ours, compiled], best)[2]["numbers"]
    assert numbers == "ours, compiled: 1.22 (1.22 to 1.22) x plain bf16 sdpa compiled"
    compiled = {"contender": "ours, compiled", "status": "failed"}
    assert [each["passed"] for each in targets_of(case(), [ours, compiled], best)] == [None, True, False]
    ours = {"contender": "ours", "status": "failed"}
    targets = targets_of(case(), [ours, compiled], best)
    assert [each["passed"] for each in targets] == [False] * 3
    assert targets[2]["numbers"] == "ours: failed; ours, compiled: failed"
    assert targets_of(case(against="plain"), [ours], best) == []
    assert targets_of(case(precision="fp32", against="compiled"), [ours], best) == []


# --- the loops of peers -----------------------------------------------------------------------------------------------


def seen(step: Any) -> list[Tensor]:
    """The images and labels that the step takes next."""
    batch = next(step.batches)
    step.batches = iter([batch])
    return batch


def copied(step: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in step.model.named_parameters()}


@pytest.mark.parametrize("phase", ["retain", "forget"])
def test_salun_changes_what_its_mask_lets_change(phase: Any) -> None:
    step = SalunStep(case(phase).step, CPU)
    images, labels = seen(step)
    assert images.min() >= 0 and images.max() <= 1  # noqa: PT018  # the model normalises
    before, logits = copied(step), step.model(images)
    torch.manual_seed(0)
    loss = step()
    torch.manual_seed(0)
    targets = labels if phase == "retain" else torch.randint(0, 10, labels.shape)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, targets))
    for name, weight in step.model.named_parameters():
        changed = weight != before[name]
        assert not changed[step.mask[name] == 0].any()
        assert weight.grad is not None
        assert not weight.grad[step.mask[name] == 0].any()
    assert 0.4 < torch.cat([mask.flatten() for mask in step.mask.values()]).mean() < 0.6
    head = step.model[1].head.weight
    assert (head != before["1.head.weight"]).any()
    assert not step.optimizer.state[head]["momentum_buffer"][step.mask["1.head.weight"] == 0].any()
    if phase == "forget":
        assert step.accuracies == step.losses == []
    else:
        assert step.losses == [pytest.approx(loss.item())]
        assert step.accuracies == [pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())]


def test_salun_normalises_as_the_model_wants_it() -> None:
    step = SalunStep(case().step, CPU)
    plain = TINY.spec().build(seed=0)
    images, _ = seen(step)
    torch.testing.assert_close(step.model(images), plain(images.sub(0.5).div(0.5)))


@pytest.mark.parametrize("phase", ["retain", "forget"])
def test_supreme_takes_its_loss_from_labels_or_from_an_incompetent_teacher(phase: Any) -> None:
    step = SupremeStep(case(phase).step, CPU)
    images, labels = seen(step)
    assert images.min() == -1
    before, logits = copied(step), step.model(images)
    if phase == "retain":
        expected = functional.cross_entropy(logits, labels)
    else:
        target = TINY.spec().build(seed=1)(images).softmax(1)
        expected = (target * (target.log() - logits.log_softmax(1))).mean()
    loss = step()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(step.losses[-1], expected.detach())
    assert (step.model.head.weight != before["head.weight"]).any()
    assert all(weight.grad is None or not weight.grad.any() for weight in step.model.parameters()) == (
        phase == "retain"
    )
    if phase == "forget":
        assert isinstance(step.optimizer, torch.optim.Adam)
        frozen = (*step.original.parameters(), *step.incompetent.parameters())
        assert all(weight.grad is None for weight in frozen)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_TURN_SECONDS", 0.04)
    file = tmp_path / "train.json"
    options = ["--quick", "--device", "cpu", "--threads", "1", "--only", "forget step", "--json", str(file)]
    result = CliRunner().invoke(app, ["train", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text(encoding="utf-8"))
    assert {"command", "commit", "environment", "load_average"} <= set(report)
    assert (report["settings"]["threads"], report["not_begun"]) == (1, [])
    (measured,) = report["cases"]
    rows = {each["contender"]: each for each in measured["rows"]}
    assert [each["status"] for each in rows.values()] == ["measured"] * len(rows), rows
    assert set(report["matmul"]) == {"fp32", "bf16"}
    ours, plain = rows["ours"], rows["plain bf16 eager"]
    assert ours["prepare_seconds"] > 0
    # 64 images in two epochs are 16 steps of 8.
    assert ours["prepare_a_step"] == pytest.approx(ours["prepare_seconds"] / 16)
    assert plain["prepare_a_step"] == 0
    forward, training = flops_per_image(TINY)
    assert (ours["flops"], plain["flops"]) == (8 * training, 8 * (training + 2 * forward))
    assert ours["mfu"] == pytest.approx(ours["flops"] / ours["median"] / report["matmul"]["bf16"]["peak"])
    assert ours["images_per_second"] == pytest.approx(8 / ours["median"])
    best = rows[measured["best"][BEST_FP32]]
    assert ours["times"][BEST_FP32] == pytest.approx(
        [theirs / mine for mine, theirs in zip(ours["seconds"], best["seconds"], strict=True)]
    )
    assert all(
        slow < fast for slow, fast in zip(ours["times_with_prepare"][BEST_FP32], ours["times"][BEST_FP32], strict=True)
    )
    parts = ours["parts"]
    named = sum(seconds for part, seconds in parts.items() if part != "all")
    assert 0.5 * parts["all"] < named <= parts["all"]
    assert len(report["targets"]) == 2
    for text in ("ours, with prepare", "by part: data", "x fp32: best plain fp32", "other loss", "targets"):
        assert text in result.output


def test_cases_that_are_not_there_and_those_that_did_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--only 'none such': in no case's name; there are: retain step, ViT 64x3/4"):
        train.run_train(quick=True, device="cpu", only="none such")
    monkeypatch.setattr(train, "_measured", lambda case, *_: {"case": case.name, "best": {}, "rows": [], "targets": []})
    monkeypatch.setattr(train, "_peaks", lambda *_: {})
    report = train.run_train(tmp_path / "train.json", quick=True, device="cpu", minutes=1e-9)
    assert report["cases"] == []
    assert report["not_begun"] == [case.name for case in TRAIN_QUICK]
    assert json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))["not_begun"] == report["not_begun"]
    report = train.run_train(quick=True, device="cpu", only="checkpointing", minutes=1.0)
    assert [case["case"] for case in report["cases"]] == [TRAIN_QUICK[-1].name]
    assert report["not_begun"] == []
