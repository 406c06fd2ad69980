"""Kernels compiled for GPUs that are not here, in a process of their own, because in this one they are interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.kernel_speed.compile import TARGETS, compiling_for
from engine.errors import UserError

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, "COLUMNS": "250"})


MATCHES = [
    "mask_patches B=256 224 planar bf16",
    "info_nce paired B=256 K=1 D=1000 bf16",
    "rollout B=256 N=197 H=12 d=64 mean rollout bf16",
    "rollout B=1 N=577 H=12 d=64 mean rollout bf16",
    "rollout B=256 N=257 H=16 d=80 max rollout fp16",
    "rollout B=256 N=197 H=12 d=64 mean rollout fp32",
    "info_nce in-batch B=8192 D=128 bf16",
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_all(MATCHES, tmp_path_factory.mktemp("compiled"))


def compile_all(matches: list[str], folder: Path) -> Path:
    """Write a JSON file for each of the matches, by one process; return the folder."""
    code = f"""
        from pathlib import Path
        from bench.kernel_speed.compile import run_compile
        for number, match in enumerate({matches}):
            print(run_compile([], [], match, Path({str(folder)!r}) / f"{{number}}.json"), "problems:", match)
    """
    done = run("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if "problems:" in line] == [f"0 problems: {m}" for m in matches]
    return folder


def check_kernels(file: Path, match: str) -> None:
    kernels = json.loads(file.read_text())["kernels"]
    assert {kernel["target"] for kernel in kernels} == set(TARGETS)
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0
        assert 16 <= kernel["registers"] <= 255 or kernel["target"] == "gfx942"
        assert kernel["shared_bytes"] <= TARGETS[kernel["target"]].shared
        assert 0 < kernel["occupancy"] <= 1
    if "rollout" in match or "in-batch" in match:
        assert sum(kernel["matrix_instructions"] for kernel in kernels) > 0 or "fp32" in match


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MATCHES)), ids=MATCHES)
def test_production_launches_compile_without_problems(compiled: Path, number: int) -> None:
    check_kernels(compiled / f"{number}.json", MATCHES[number])


@pytest.mark.slow
@pytest.mark.minutes
def test_all_production_launches_compile_without_problems() -> None:
    done = run("-m", "bench", "compile")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_spills_shared_memory_and_missing_matrix_instructions_are_problems() -> None:
    code = textwrap.dedent("""
        import dataclasses
        from bench.kernel_speed import compile
        from lethe_kernels._triton import rollout

        plan = rollout.plan(256, 12, 197, 64, 4, "mean", 132)
        big = dataclasses.replace(plan, block_i=64, block_j=256, whole=True)
        rollout.plan = lambda *shape: big
        name = "rollout B=256 N=197 H=12 d=64 mean rollout"
        case = next(case for case in compile.rollout_cases() if (case.name, case.dtype) == (name, "fp32"))
        small = dataclasses.replace(compile.TARGETS["sm_80"], shared=1000)
        compile.TARGETS["sm_80"] = small
        half = dataclasses.replace(case, dtype="bf16")
        print([result.problems for result in compile.compile_case(half, "sm_80")])
    """)
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "spills" in done.stdout
    assert "bytes of shared memory, 1000 at most" in done.stdout
    assert "uses no matrix instruction" in done.stdout


@pytest.mark.slow
def test_unit_strides_are_compiled_in() -> None:
    code = textwrap.dedent("""
        from bench.kernel_speed import compile

        case = next(compile.rollout_cases())
        with compile.compiling_for(compile.TARGETS["sm_90"].gpu) as kernels:
            case.launch()
        (kernel,) = kernels
        names = kernel.src.fn.arg_names
        print(sorted(names[index] for (index, *_), value in kernel.src.constants.items() if value == 1))
    """)
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "'stride_kd', 'stride_qd'" in done.stdout


def test_wrong_use_is_named() -> None:
    for arguments, words in (
        (("--target", "sm_91"), "--target 'sm_91'; did you mean 'sm_90'"),
        (("--only", "rolout"), "--only 'rolout'; did you mean 'rollout'?"),
        (("--match", "N=3"), "--match 'N=3': no case has that in its name"),
    ):
        error = CliRunner().invoke(app, ["compile", *arguments]).exception
        assert isinstance(error, UserError)
        assert words in str(error)


def test_interpreted_kernels_cannot_be_compiled() -> None:
    with (
        pytest.raises(UserError, match="TRITON_INTERPRET is set, so kernels are interpreted; unset it"),
        compiling_for(TARGETS["sm_90"].gpu),
    ):
        pass
