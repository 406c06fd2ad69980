"""StreamedRollout against attention_rollout, layer by layer; and that it keeps no map."""

import itertools
import weakref
from typing import Any

import pytest
import torch
from layers import Layers, make
from torch import Tensor

from lethe_kernels import StreamedRollout, attention_rollout

MODES, FUSIONS, POOLS = ["rollout", "last", "mean"], ["mean", "max", "min"], ["token", "avg"]
WAYS = list(itertools.product(MODES, FUSIONS, POOLS))


def maps_of(queries: Layers, keys: Layers) -> Layers:
    return [torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) for q, k in zip(queries, keys, strict=True)]


def streamed(maps: Layers, **options: Any) -> Tensor:
    stream = StreamedRollout(**options)
    for attention in maps:
        stream.add(attention)
    return stream.scores()


@pytest.mark.parametrize(("mode", "head_fusion", "pool"), WAYS)
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_equals_attention_rollout(layers: int, mode: str, head_fusion: str, pool: str) -> None:
    queries, keys = make(19, 3, 8, layers=layers)
    options = {"mode": mode, "head_fusion": head_fusion, "pool": pool, "num_prefix_tokens": 2, "residual": 0.3}
    expected = attention_rollout(queries, keys, **options)
    before = [x.clone() for x in maps_of(queries, keys)]
    maps = [x.clone() for x in before]
    torch.testing.assert_close(streamed(maps, **options), expected, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(x, y) for x, y in zip(maps, before, strict=True))  # the model still needs them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_are_float32_for_narrow_maps(dtype: torch.dtype) -> None:
    maps = [x.to(dtype) for x in maps_of(*make(19, 3, 8))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = streamed(maps)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, streamed([x.double() for x in maps]), rtol=1e-5, atol=1e-8)


def test_scores_may_be_asked_for_in_between() -> None:
    queries, keys = make(9, 2, 4, layers=3)
    stream = StreamedRollout()
    for layer, attention in enumerate(maps_of(queries, keys), start=1):
        stream.add(attention)
        expected = attention_rollout(queries[:layer], keys[:layer])
        torch.testing.assert_close(stream.scores(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_no_map_outlives_its_layer(mode: Any) -> None:
    stream = StreamedRollout(mode=mode)
    for attention in maps_of(*make(9, 2, 4)):
        copy = attention.clone()
        kept = weakref.ref(copy.untyped_storage())
        stream.add(copy)
        del copy
        assert kept() is None


def test_a_row_of_zeros_under_min_fusion_is_uniform() -> None:
    attention = torch.eye(3).expand(1, 1, 3, 3)
    both = torch.cat([attention, attention.roll(1, -1)], dim=1)
    assert streamed([both], mode="last", head_fusion="min")[0].tolist() == pytest.approx([1 / 3, 1 / 3])


@pytest.mark.parametrize("head_fusion", FUSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_nan_is_an_error(mode: Any, head_fusion: Any) -> None:
    maps = maps_of(*make(5, 2, 4))
    maps[-1][0, 1, 0, 2] = float("nan")
    with pytest.raises(ValueError, match=r"^StreamedRollout\.scores: attention holds NaN or infinity"):
        streamed(maps, mode=mode, head_fusion=head_fusion)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"^StreamedRollout: mode is 'rolout', .* \(did you mean 'rollout'\?\)$"):
        StreamedRollout(mode="rolout")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^StreamedRollout: residual is 1.5, expected a number from 0 to 1$"):
        StreamedRollout(residual=1.5)
    with pytest.raises(ValueError, match=r"^StreamedRollout: num_prefix_tokens is 0, expected a whole number from 1"):
        StreamedRollout(num_prefix_tokens=0)
    stream = StreamedRollout(num_prefix_tokens=2)
    with pytest.raises(ValueError, match=r"^StreamedRollout\.scores: no layer was added, expected at least one$"):
        stream.scores()
    for shape, words in (
        ((2, 3, 4), r"expected \(B, H, N, N\)$"),
        ((2, 3, 4, 5), r"expected \(B, H, N, N\) with N above num_prefix_tokens=2$"),
        ((2, 3, 2, 2), r"expected \(B, H, N, N\) with N above num_prefix_tokens=2$"),
        ((0, 3, 4, 4), r"expected \(B, H, N, N\) with every size 1 or more$"),
    ):
        with pytest.raises(ValueError, match=rf"^StreamedRollout\.add: attention has shape .*, {words}"):
            stream.add(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"^StreamedRollout\.add: attention has dtype int64, expected float16"):
        stream.add(torch.zeros(1, 1, 4, 4, dtype=torch.long))
    stream.add(torch.full((2, 3, 4, 4), 0.25))
    with pytest.raises(ValueError, match=r"expected B and N to be \(2, 4\) as in the layers before it$"):
        stream.add(torch.full((2, 3, 5, 5), 0.2))
