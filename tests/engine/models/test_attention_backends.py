"""attention=sdpa | eager | xformers: the same numbers, and a refusal with reasons where xformers does not run."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import timm
import torch
from torch.nn.functional import scaled_dot_product_attention
from toys import tiny_vit

from engine.config import RunConfig, build
from engine.errors import UserError
from engine.models.attention import attention_backend, capture_queries_keys, stream_attention
from engine.models.vit import attention_modules
from engine.models.xformers_attention import resolve_attention

CPU = torch.device("cpu")


class Operators(types.ModuleType):
    """Stands in for xformers.ops: softmax(q k^T scale) v in float64, on [B, N, H, d]; notes its calls."""

    def __init__(self) -> None:
        super().__init__("xformers.ops")
        self.calls: list[dict[str, Any]] = []

    def memory_efficient_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_bias: None = None,
        p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        assert attn_bias is None
        assert query.dtype == key.dtype == value.dtype
        self.calls.append({"shape": tuple(query.shape), "dtype": query.dtype, "p": p, "scale": scale})
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = (tensor.double() for tensor in (query, key, value))
        probabilities = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", probabilities, v).to(value.dtype)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Operators:
    package, ops = types.ModuleType("xformers"), Operators()
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.delitem(sys.modules, "xformers._cpp_lib", raising=False)
    return ops


@pytest.mark.parametrize("changed", [{}, {"qk_norm": True}, {"reg_tokens": 3}])
def test_xformers_gives_the_logits_and_gradients_of_sdpa(operators: Operators, changed: dict[str, object]) -> None:
    model, images = tiny_vit(**changed), torch.randn(3, 1, 8, 8)
    results = []
    for implementation in ("sdpa", "xformers"):
        model.zero_grad()
        with attention_backend(model, implementation):
            logits = model(images)
            logits.square().sum().backward()
        results.append((logits.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)
    tokens = 16 + 1 + int(changed.get("reg_tokens", 0))  # type: ignore[call-overload]
    assert [call["shape"] for call in operators.calls] == [(3, tokens, 2, 16)] * 2  # [B, N, H, d], once a block


def test_queries_and_keys_are_captured_under_xformers(operators: Operators) -> None:
    model, images = tiny_vit(qk_norm=True), torch.randn(2, 1, 8, 8)
    captured = []
    for implementation in ("sdpa", "xformers"):
        with torch.no_grad(), attention_backend(model, implementation), capture_queries_keys(model) as (queries, keys):
            model(images)
        captured.append([*queries, *keys])
    torch.testing.assert_close(captured[0], captured[1])
    assert len(operators.calls) == 2


def test_the_model_is_as_it_was_afterwards(operators: Operators) -> None:
    model, images = tiny_vit(), torch.randn(2, 1, 8, 8)
    with attention_backend(model, "eager"), pytest.raises(KeyError), attention_backend(model, "xformers"):
        raise KeyError
    assert all(block.attn.fused_attn for block in model.blocks)  # as timm sets it
    assert not any("forward" in vars(module) for module in model.modules())
    with attention_backend(model, "xformers"), attention_backend(model, "xformers"):
        pass
    model(images)
    assert operators.calls == []


def test_an_inner_wrapper_gives_back_the_outer_one(operators: Operators) -> None:
    model, images = tiny_vit(), torch.randn(2, 1, 8, 8)
    with torch.no_grad(), attention_backend(model, "xformers"):
        with attention_backend(model, "xformers"):
            pass
        with attention_backend(model, "eager"):
            model(images)
        maps: list[torch.Tensor] = []
        with stream_attention(model, maps.append):
            model(images)
        assert (len(operators.calls), len(maps)) == (0, 2)  # explicit attention, inside
        model(images)
    assert len(operators.calls) == 2


def test_dropout_of_the_attention_is_passed_on_in_training_alone(operators: Operators) -> None:
    model, images = tiny_vit(attn_drop_rate=0.25), torch.randn(2, 1, 8, 8)
    with torch.no_grad(), attention_backend(model, "xformers"):
        model.train()(images)
        model.eval()(images)
    assert [call["p"] for call in operators.calls] == [0.25, 0.25, 0.0, 0.0]


def test_under_autocast_the_three_have_one_type(operators: Operators) -> None:
    """A LayerNorm on q and k may give float32 beside a half-precision v."""
    model, images = tiny_vit(), torch.randn(2, 1, 8, 8)
    model.blocks[0].attn.q_norm.register_forward_hook(lambda module, inputs, output: output.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with attention_backend(model, "sdpa"):
            expected = model(images)
        with attention_backend(model, "xformers"):
            actual = model(images)
    assert [call["dtype"] for call in operators.calls] == [torch.bfloat16] * 2
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_gradient_checkpointing_recomputes_with_xformers(operators: Operators) -> None:
    model, images = tiny_vit(), torch.randn(2, 1, 8, 8)
    model.set_grad_checkpointing(True)
    with attention_backend(model.train(), "xformers"):
        model(images).sum().backward()
    assert len(operators.calls) == 4


def test_windowed_and_other_attention_is_refused(operators: Operators) -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2)
    )
    with pytest.raises(UserError, match=r"SwinTransformer adds a relative position bias.*attention=sdpa"):
        attention_backend(swin, "xformers").__enter__()
    bare = tiny_vit()
    del bare.blocks[1].attn.q_norm
    with pytest.raises(UserError, match=r"expected `blocks\[i\]\.attn`"):
        attention_backend(bare, "xformers").__enter__()
    assert all(block.attn.fused_attn for block in bare.blocks)


def test_a_masked_attention_is_refused_not_ignored(operators: Operators) -> None:
    model = tiny_vit()
    attention, tokens = attention_modules(model)[0], torch.randn(1, 17, 32)
    with attention_backend(model, "xformers"):
        for masked in ({"attn_mask": torch.zeros(17, 17)}, {"is_causal": True}):
            with pytest.raises(UserError, match="masks its attention"):
                attention(tokens, **masked)


def test_shapes_that_no_operator_takes_are_a_users_error(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            "No operator found for `memory_efficient_attention_forward` with inputs:\n     query : shape=(2, 17)\n"
            "`first` is not supported because:\n    head too wide\n    operator wasn't built\n"
            "`second` is not supported because:\n    device=cpu (supported: {'cuda'})\n"
        )

    monkeypatch.setattr(operators, "memory_efficient_attention", refuse)
    model = tiny_vit()
    reasons = r"first \(head too wide, operator wasn't built\); second \(device=cpu \(supported: {'cuda'}\)\)"
    with (
        attention_backend(model, "xformers"),
        pytest.raises(UserError, match=f"heads of 16 features on cpu: {reasons}"),
    ):
        model(torch.randn(2, 1, 8, 8))
    with pytest.raises(UserError, match=f"no operator of xformers takes cpu in bf16: {reasons}"):
        resolve_attention("xformers", CPU, "bf16")


def test_the_option_is_resolved(operators: Operators) -> None:
    assert build(RunConfig, {"attention": "xformers"}).attention == "xformers"
    assert resolve_attention("auto", CPU) == "eager"
    assert resolve_attention("auto", torch.device("cuda")) == "sdpa"
    assert resolve_attention("sdpa", CPU) == "sdpa"
    assert operators.calls == []
    assert resolve_attention("xformers", CPU, "bf16") == "xformers"
    assert [call["dtype"] for call in operators.calls] == [torch.bfloat16]  # tried, in the run's precision


def test_without_xformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match=r"xformers cannot be imported.*pip install 'lethe-unlearning\[xformers\]'"):
        resolve_attention("xformers", CPU)


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="the extra xformers is not installed")
def test_xformers_as_installed_gives_its_reasons_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    """None of its operators takes tensors of the CPU, whatever version it is."""
    with pytest.raises(UserError, match=r"no operator of xformers takes cpu in fp32: .*device=cpu") as error:
        resolve_attention("xformers", CPU)
    assert "\n" not in str(error.value)
    from xformers import _cpp_lib

    assert ("xFormers can't load" in str(error.value)) == (_cpp_lib._cpp_library_load_exception is not None)
    assert "XFORMERS" not in caplog.text  # said once, in the error


def test_the_stand_in_is_attention() -> None:
    """What the other tests compare with, against torch's own."""
    q, k, v = torch.randn(3, 2, 5, 3, 4).unbind(0)
    expected = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(Operators().memory_efficient_attention(q, k, v), expected)
