"""Negatives from a process group: two processes against one that holds everything."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lethe_kernels import info_nce

RANKS, BATCH, FEATURES, NEGATIVES = 2, 3, 5, 4
FORMS = ["in-batch", "shared"]


def inputs_of_everyone(form: str) -> list[Tensor]:
    """[ranks x rows, D] each: anchors, positives, and negatives where the form has them."""
    generator = torch.Generator().manual_seed(0)
    rows = [BATCH, BATCH] + [NEGATIVES] * (form == "shared")
    return [torch.randn(RANKS * count, FEATURES, generator=generator, dtype=torch.float64) for count in rows]


def mine(everyone: list[Tensor], rank: int) -> list[Tensor]:
    return [x.chunk(RANKS)[rank].clone().requires_grad_() for x in everyone]


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    results: dict[str, Any] = {}
    for form in FORMS:
        for reduction in ("none", "mean"):
            leaves = mine(inputs_of_everyone(form), rank)
            temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
            loss = info_nce(*leaves, temperature=temperature, reduction=reduction, group=group)
            gradients = torch.autograd.grad(loss.sum(), [*leaves, temperature])
            results[f"{form} {reduction}"] = [loss.detach(), *gradients]
    one = torch.eye(2, dtype=torch.float64)[[rank]]
    results["one anchor a rank"] = info_nce(one, one, temperature=1.0, group=group)
    half = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    info_nce(half, half, group=group).backward()
    results["half"] = half.grad

    alone = [dist.new_group([each]) for each in range(RANKS)]
    results["outside"] = error_of(lambda: info_nce(one, one, group=alone[1 - rank]))
    results["alone"] = error_of(lambda: info_nce(one, one, group=alone[rank]))
    x = torch.ones(2, 5)
    results["paired"] = error_of(lambda: info_nce(x, x, x[:, None], group=group))
    uneven, dtypes = x[: 2 - rank], x.double() if rank else x
    results["rows"] = error_of(lambda: info_nce(uneven, uneven, group=group))
    results["negatives"] = error_of(lambda: info_nce(x, x, x[: 2 - rank], group=group))
    results["features"] = error_of(lambda: info_nce(x[:, rank:], x[:, rank:], group=group))
    results["dtype"] = error_of(lambda: info_nce(dtypes, dtypes, group=group))
    learned = x.clone().requires_grad_(rank == 0)
    results["gradient"] = error_of(lambda: info_nce(x, learned, group=group))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; the processes are started once, because starting them is what takes time."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_ranks_together_are_one_process_with_everything(
    results: list[dict[str, Any]], form: str, reduction: str
) -> None:
    leaves = [x.requires_grad_() for x in inputs_of_everyone(form)]
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    losses = info_nce(*leaves, temperature=temperature, reduction="none")
    # The gradient is that of the sum over ranks of each rank's loss.
    per_rank = losses if reduction == "none" else losses.view(RANKS, BATCH).mean(dim=1)
    *expected, temperature_expected = torch.autograd.grad(per_rank.sum(), [*leaves, temperature])
    found = [result[f"{form} {reduction}"] for result in results]
    torch.testing.assert_close(torch.cat([loss.view(-1) for loss, *_ in found]), per_rank.detach())
    for index, gradient in enumerate(expected):
        torch.testing.assert_close(torch.cat([each[1 + index] for each in found]), gradient)
    # The temperature hears from its own rank alone.
    torch.testing.assert_close(sum(each[-1] for each in found), temperature_expected)


def test_one_anchor_a_rank_has_the_other_ranks_for_negatives(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["one anchor a rank"].item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(-1.0)))


def test_half_precision_gradients_cross_ranks(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["half"].dtype == torch.bfloat16
        assert result["half"].isfinite().all()


MESSAGES = {
    "paired": "negatives has shape (2, 1, 5), expected (M, D) or None with a group, because negatives of one anchor"
    " are not shared",
    "alone": "anchors has shape (1, 2), expected 2 or more rows for in-batch negatives; with one the loss is always 0,"
    " so pass negatives or a larger batch",
    "rows": "positives has shape (1, 5), float32, requires_grad False on rank 1, expected shape (2, 5), float32,"
    " requires_grad False to match rank 0 of the group",
    "negatives": "negatives has shape (1, 5), float32, requires_grad False on rank 1, expected shape (2, 5), float32,"
    " requires_grad False to match rank 0 of the group",
    "features": "positives has shape (2, 4), float32, requires_grad False on rank 1, expected shape (2, 5), float32,"
    " requires_grad False to match rank 0 of the group",
    "dtype": "positives has shape (2, 5), float64, requires_grad False on rank 1, expected shape (2, 5), float32,"
    " requires_grad False to match rank 0 of the group",
    "gradient": "positives has shape (2, 5), float32, requires_grad False on rank 1, expected shape (2, 5), float32,"
    " requires_grad True to match rank 0 of the group",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_every_rank_gets_the_same_error(results: list[dict[str, Any]], case: str) -> None:
    assert [result[case] for result in results] == [f"info_nce: {MESSAGES[case]}"] * RANKS


def test_a_rank_outside_the_group_is_told(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert re.match(r"^info_nce: group is .*, expected a torch.distributed.ProcessGroup that", result["outside"])


def test_group_of_another_type() -> None:
    with pytest.raises(ValueError, match=r"^info_nce: group is 'world', expected a torch.distributed.ProcessGroup"):
        info_nce(torch.ones(2, 3), torch.ones(2, 3), group="world")  # type: ignore[arg-type]
