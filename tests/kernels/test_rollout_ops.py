"""The rollout as a torch.library op: what it declares is what it does, and torch.compile goes through unbroken."""

from typing import Any

import pytest
import torch
from layers import cast, make

from lethe_kernels import attention_rollout, rollout_topk_mask
from lethe_kernels.rollout import _rollout_op


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest, interpreter: None) -> str:
    return str(request.param)


@pytest.mark.parametrize("k", [None, 2])
def test_opcheck(backend: str, k: int | None) -> None:
    queries, keys = (cast(x, torch.float32) for x in make(9, 2, 8))
    torch.library.opcheck(_rollout_op, (queries, keys, k, 1, "rollout", "mean", 0.5, "token", 0.3, backend, [], None))


def test_compile_does_not_break_the_graph(backend: str) -> None:
    queries, keys = (cast(x, torch.bfloat16) for x in make(9, 2, 8))

    def masked_scores(queries: Any, keys: Any) -> Any:
        scores = attention_rollout(queries, keys, backend=backend)
        return scores * rollout_topk_mask(queries, keys, k=3, backend=backend)

    compiled = torch.compile(masked_scores, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries, keys), masked_scores(queries, keys))


def test_compiled_code_still_names_bad_values(backend: str) -> None:
    queries, keys = (cast(x, torch.float32) for x in make(9, 2, 8))
    keys[1][0, 0, 0, 0] = float("nan")
    compiled = torch.compile(lambda q, k: attention_rollout(q, k, backend=backend), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"attention_rollout: keys\[1\] holds NaN or infinity"):
        compiled(queries, keys)
