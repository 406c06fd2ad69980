"""The package's marker, the choice of a backend, and what each public function says when it cannot run."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import lethe_kernels
import lethe_kernels._triton
from lethe_kernels._backend import resolve_backend

LAYERS = [torch.ones(1, 1, 3, 2)]
CALLS: dict[str, Callable[[str], object]] = {
    "attention_rollout": lambda backend: lethe_kernels.attention_rollout(LAYERS, LAYERS, backend=backend),
    "rollout_topk_mask": lambda backend: lethe_kernels.rollout_topk_mask(LAYERS, LAYERS, k=1, backend=backend),
    "mask_patches": lambda backend: lethe_kernels.mask_patches(
        torch.ones(1, 1, 2, 2), torch.ones(1, 4, dtype=torch.bool), patch_size=1, backend=backend
    ),
    "info_nce": lambda backend: lethe_kernels.info_nce(torch.ones(2, 3), torch.ones(2, 3), backend=backend),
}


def test_marker_tells_this_package_from_its_namesake() -> None:
    assert lethe_kernels.DISTRIBUTION == "lethe-unlearning"
    assert {*CALLS, "DISTRIBUTION"} <= set(lethe_kernels.__all__)


ON_THE_CPU = (
    "the tensors are on the CPU, which Triton serves only as an interpreter (TRITON_INTERPRET=1, set before Python"
    " starts; for tests, it is slow)"
)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_auto_and_eager_resolve_to_eager_on_the_cpu(backend: str) -> None:
    assert resolve_backend("info_nce", backend, "cpu") == "eager"


@pytest.mark.parametrize("op", CALLS)
def test_triton_raises_with_the_reason_and_the_remedy(op: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        CALLS[op]("triton")
    assert str(caught.value) == (f"{op}: backend 'triton' cannot run: {ON_THE_CPU}. Use backend='auto' or 'eager'.")


@pytest.mark.usefixtures("interpreter")
def test_auto_is_triton_in_the_interpreter() -> None:
    assert resolve_backend("info_nce", "auto", "cpu") == "triton"
    assert resolve_backend("info_nce", "eager", "cpu") == "eager"


def test_auto_is_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lethe_kernels._triton, "INTERPRETED", False)
    assert resolve_backend("info_nce", "auto", "cuda") == "triton"


def test_every_reason_is_named() -> None:
    for device, reason in (
        ("cpu", ON_THE_CPU),
        ("cuda", "TRITON_INTERPRET was changed after the kernels had been loaded"),
        ("mps", "the tensors are on mps, expected cuda"),
    ):
        assert resolve_backend("info_nce", "auto", device) == "eager"
        with pytest.raises(RuntimeError) as caught:
            resolve_backend("info_nce", "triton", device, ["float64 is not supported"])
        assert str(caught.value) == (
            f"info_nce: backend 'triton' cannot run: {reason}; float64 is not supported. Use backend='auto' or 'eager'."
        )


def test_without_triton_the_reason_is_that_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lethe_kernels._backend.importlib.util.find_spec", lambda name: None)
    assert resolve_backend("info_nce", "auto", "cuda") == "eager"
    with pytest.raises(RuntimeError, match="cannot run: the package triton is not installed"):
        resolve_backend("info_nce", "triton", "cuda")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("version", "fits"), [("3.4.0", False), ("3.5.0", True), ("3.10.1+git1", True), ("4.0.0", True)]
)
def test_float64_products_need_a_newer_triton(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lethe_kernels._backend.importlib.metadata.version", lambda name: version)
    inputs = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    if fits:
        lethe_kernels.info_nce(*inputs, backend="triton")
        return
    with pytest.raises(RuntimeError, match=r"cannot run: float64 with shared negatives needs triton 3\.5 or newer\."):
        lethe_kernels.info_nce(*inputs, backend="triton")
    lethe_kernels.info_nce(*inputs)  # auto takes eager
    lethe_kernels.info_nce(
        *inputs, torch.ones(3, 1, 3, dtype=torch.float64), backend="triton"
    )  # has no products of tiles


@pytest.mark.parametrize("op", CALLS)
def test_unknown_backend_names_the_nearest(op: str) -> None:
    with pytest.raises(ValueError, match=f"^{op}: ") as caught:
        CALLS[op]("Tritn")
    assert str(caught.value) == (
        f"{op}: backend is 'Tritn', expected 'auto', 'eager' or 'triton' (did you mean 'triton'?)"
    )


def test_unknown_backend_that_resembles_none_gets_no_hint() -> None:
    with pytest.raises(ValueError, match=r"^info_nce: backend is 'xyz', expected 'auto', 'eager' or 'triton'$"):
        resolve_backend("info_nce", "xyz")


@pytest.mark.slow
def test_import_asks_no_device() -> None:
    code = (
        "import torch\n"
        "def probe(*args, **kwargs): raise SystemExit('a device was asked')\n"
        "for name in ('is_available', 'device_count', 'get_device_capability', 'init', '_lazy_init'):\n"
        "    setattr(torch.cuda, name, probe)\n"
        "import kernels\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
