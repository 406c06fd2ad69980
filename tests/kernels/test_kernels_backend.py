"""The package's marker, the choice of a backend, and what each public function says when it cannot run."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import kernels
from kernels._backend import resolve_backend

LAYERS = [torch.ones(1, 1, 3, 2)]
CALLS: dict[str, Callable[[str], object]] = {
    "attention_rollout": lambda backend: kernels.attention_rollout(LAYERS, LAYERS, backend=backend),
    "rollout_topk_mask": lambda backend: kernels.rollout_topk_mask(LAYERS, LAYERS, k=1, backend=backend),
    "mask_patches": lambda backend: kernels.mask_patches(
        torch.ones(1, 1, 2, 2), torch.ones(1, 4, dtype=torch.bool), patch_size=1, backend=backend
    ),
    "info_nce": lambda backend: kernels.info_nce(torch.ones(2, 3), torch.ones(2, 3), backend=backend),
}


def test_marker_tells_this_package_from_its_namesake() -> None:
    assert kernels.DISTRIBUTION == "lethe-unlearning"
    assert {*CALLS, "DISTRIBUTION"} <= set(kernels.__all__)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_auto_and_eager_resolve_to_eager(backend: str) -> None:
    assert resolve_backend("info_nce", backend) == "eager"


@pytest.mark.parametrize("op", CALLS)
def test_triton_raises_with_the_reason_and_the_remedy(op: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        CALLS[op]("triton")
    assert str(caught.value) == (
        f"{op}: backend 'triton' cannot run: this release holds no Triton kernel for {op}."
        " Use backend='auto' or 'eager'."
    )


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
