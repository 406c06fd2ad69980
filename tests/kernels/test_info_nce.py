"""info_nce against its float64 reference, gradcheck, hand-computed examples, invariants, memory, and each error."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lethe_kernels import _info_nce_eager, info_nce
from lethe_kernels.info_nce import EPS, info_nce_reference

FORMS = ["in-batch", "own", "shared"]
# For the checks of PyTorch's own, which take seconds for the form whose anchors are negatives of each other.
SLOWEST_APART = [pytest.param("in-batch", marks=pytest.mark.slow), "own", "shared"]
SIMILARITIES = ["cosine", "dot"]
REDUCTIONS = ["mean", "sum", "none"]
Inputs = tuple[Tensor, Tensor, Tensor | None]


def make(form: str, batch: int, features: int, negatives: int = 5, seed: int = 0) -> Inputs:
    """Float64, strided, and of a size at which dot products are of order one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator, dtype=torch.float64)
        return wide[..., ::2] * features**-0.25

    anchors, positives = draw(batch, features), draw(batch, features)
    if form == "in-batch":
        return anchors, positives, None
    return anchors, positives, draw(batch, negatives, features) if form == "own" else draw(negatives, features)


def loss_and_gradients(
    function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype, temperature: float, **options: Any
) -> list[Tensor]:
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    temperature_leaf = torch.tensor(temperature, dtype=dtype, requires_grad=True)
    loss = function(*leaves, temperature=temperature_leaf, **options)
    weights = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).reshape(loss.shape)
    wanted = [x for x in (*leaves, temperature_leaf) if x is not None]
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), wanted)]


def reordered(inputs: Inputs, order: Tensor, dtype: torch.dtype) -> Inputs:
    """The same vectors with their features in another order, and rounded."""
    anchors, positives, negatives = (None if x is None else x[..., order].to(dtype) for x in inputs)
    assert anchors is not None
    assert positives is not None
    return anchors, positives, negatives


def check_against_float64(
    assert_near: Any, inputs: Inputs, dtype: torch.dtype, backend: str = "eager", **options: Any
) -> None:
    # Everybody starts from numbers that the narrowest type can hold; 0.25 is one.
    rounded = reordered(inputs, torch.arange(inputs[0].shape[-1]), dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    actual = loss_and_gradients(info_nce, rounded, dtype, 0.25, backend=backend, **options)
    truth = loss_and_gradients(info_nce_reference, rounded, torch.float64, 0.25, **options)
    same_dtype = []
    for seed in range(4):
        order = torch.randperm(inputs[0].shape[-1], generator=torch.Generator().manual_seed(seed))
        run = loss_and_gradients(info_nce_reference, reordered(rounded, order, dtype), compute, 0.25, **options)
        same_dtype.append([run[0], *(x[..., order.argsort()] for x in run[1:-1]), run[-1]])
    assert [x.dtype for x in actual] == [compute] + [dtype] * (len(actual) - 1)
    for index, (got, true) in enumerate(zip(actual, truth, strict=True)):
        assert_near(got, [run[index] for run in same_dtype], true)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("batch", "features"), [(7, 7), (3, 100), (5, 197), (2, 577)])
def test_loss_and_gradients_match_float64_reference(
    assert_near: Any, form: str, similarity: str, reduction: str, batch: int, features: int
) -> None:
    inputs = make(form, batch, features)
    check_against_float64(assert_near, inputs, torch.float32, similarity=similarity, reduction=reduction)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(assert_near: Any, form: str, similarity: str, dtype: torch.dtype) -> None:
    check_against_float64(assert_near, make(form, 6, 33), dtype, similarity=similarity)


def test_one_anchor_one_feature_one_negative(assert_near: Any) -> None:
    check_against_float64(assert_near, make("own", 1, 1, negatives=1), torch.float32, similarity="dot")
    check_against_float64(assert_near, make("shared", 1, 1, negatives=1), torch.float32, similarity="dot")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(form: str, similarity: str, reduction: str) -> None:
    leaves = [x.detach().requires_grad_() for x in make(form, 3, 4, negatives=2) if x is not None]
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def loss(temperature: Tensor, *inputs: Tensor) -> Tensor:
        return info_nce(*inputs, temperature=temperature, similarity=similarity, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (temperature, *leaves))


E1, E2 = [1.0, 0.0], [0.0, 1.0]


def test_hand_computed_cosine() -> None:
    # s(a, p) = 1, s(a, n) = 0, t = 1: log(1 + 1/e)
    loss = info_nce(torch.tensor([[3.0, 0.0]]), torch.tensor([E1]), torch.tensor([[0.0, 2.0]]), temperature=1.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)


def test_default_temperature_is_a_tenth() -> None:
    loss = info_nce(torch.tensor([E1]), torch.tensor([E2]), torch.tensor([[-1.0, 0.0]]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-10)), rel=1e-5)


def test_hand_computed_dot() -> None:
    # s(a, p) = 1, s(a, n) = 2 and 0, t = 1/2: log(1 + e^2 + e^-2)
    negatives = torch.tensor([[[2.0, 5.0], [0.0, 7.0]]])
    loss = info_nce(torch.tensor([E1]), torch.tensor([E1]), negatives, temperature=0.5, similarity="dot")
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2) + math.exp(-2)), rel=1e-6)


def test_hand_computed_in_batch() -> None:
    anchors, positives = torch.tensor([E1, E2]), torch.tensor([E1, [1.0, 1.0]])
    # a_0: p_0 gives 1, p_1 gives 1. a_1: p_1 gives 1, p_0 gives 0.
    expected = [math.log(2), math.log1p(math.exp(-1))]
    options: dict[str, Any] = {"temperature": 1.0, "similarity": "dot"}
    each = info_nce(anchors, positives, reduction="none", **options)
    assert each.tolist() == pytest.approx(expected, rel=1e-6)
    assert info_nce(anchors, positives, reduction="sum", **options).item() == pytest.approx(sum(expected))
    assert info_nce(anchors, positives, **options).item() == pytest.approx(sum(expected) / 2)


def test_temperature_forms_agree() -> None:
    inputs = make("own", 4, 6)
    loss = info_nce(*inputs, temperature=0.5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(info_nce(*inputs, temperature=torch.tensor(0.5, dtype=dtype)), loss)
    assert torch.equal(info_nce(*inputs, temperature=torch.nn.Parameter(torch.tensor(0.5))), loss)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_extreme_similarities_stay_finite(similarity: str) -> None:
    inputs = tuple(None if x is None else x.float() * 100 for x in make("shared", 4, 8))
    for result in loss_and_gradients(info_nce, inputs, torch.float32, 1e-3, similarity=similarity):
        assert result.isfinite().all()


def test_loss_near_zero_keeps_its_digits() -> None:
    anchors, negatives = torch.tensor([[1.0]]), torch.tensor([[-29.0]])
    loss = info_nce(anchors, torch.tensor([[1.0]]), negatives, temperature=1.0, similarity="dot")
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-5, abs=0)


def test_loss_far_from_zero_keeps_its_digits_in_float64() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = info_nce(one, one, 26 * one, temperature=1.0, similarity="dot")
    assert loss.item() == pytest.approx(math.log1p(math.exp(25)), rel=1e-15)


@pytest.mark.parametrize(
    ("form", "zeroed"), [(form, i) for form in FORMS for i in range(3) if (form, i) != (FORMS[0], 2)]
)
def test_zero_vector_with_cosine_has_similarity_zero_and_finite_gradients(form: str, zeroed: int) -> None:
    inputs = [None if x is None else x.float() for x in make(form, 3, 4)]
    target = inputs[zeroed]
    assert target is not None
    target[0] = 0
    results = loss_and_gradients(info_nce, (inputs[0], inputs[1], inputs[2]), torch.float32, 0.2)
    assert all(result.isfinite().all() for result in results)
    truth = loss_and_gradients(info_nce_reference, (inputs[0], inputs[1], inputs[2]), torch.float64, 0.2)
    assert results[0].item() == pytest.approx(truth[0].item(), rel=1e-5)
    slope = results[1 + zeroed][0].abs().max().item()
    assert 0 < slope < 10 / EPS


def test_autocast_does_not_round_the_similarities() -> None:
    inputs = tuple(None if x is None else x.float() for x in make("shared", 5, 64))
    plain = info_nce(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(*inputs), plain)


def test_in_batch_and_shared_are_own_negatives_written_shorter() -> None:
    anchors, positives, shared = make("shared", 4, 6)
    assert shared is not None
    own = shared.expand(4, -1, -1)
    torch.testing.assert_close(info_nce(anchors, positives, shared), info_nce(anchors, positives, own))
    others = torch.stack([positives[[j for j in range(4) if j != i]] for i in range(4)])
    torch.testing.assert_close(info_nce(anchors, positives), info_nce(anchors, positives, others))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_info_nce_eager, "CPU_CHUNK", 4)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("batch", "negatives"), [(4, 4), (5, 8), (11, 3), (3, 11)])
def test_chunks_of_any_size_add_up(assert_near: Any, form: str, similarity: str, batch: int, negatives: int) -> None:
    inputs = make(form, batch, 5, negatives=negatives)
    check_against_float64(assert_near, inputs, torch.float32, similarity=similarity, reduction="none")


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns, outside and inside of custom ops."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return result


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("form", ["in-batch", "shared"])
def test_similarities_are_never_stored_whole(form: str) -> None:
    leaves = [x.float().requires_grad_() for x in make(form, 40, 3, negatives=30) if x is not None]
    with LargestTensor() as largest:
        info_nce(*leaves).backward()
    # The op's body runs below the mode's eyes, so run that too.
    inputs = [x.detach() for x in leaves] + [None] * (3 - len(leaves))
    skip, temperature = 0 if form == "in-batch" else -1, torch.tensor(0.1)
    with largest:
        losses, *statistics = _info_nce_eager.shared_forward(*inputs, temperature, True, skip)
        _info_nce_eager.shared_backward(losses, *inputs, temperature, statistics, True, skip, [True] * 4)
    assert 40 * 3 <= largest.elements < 40 * 30 / 4


@pytest.mark.parametrize("form", FORMS)
def test_only_the_gradients_asked_for(form: str) -> None:
    inputs = make(form, 3, 4)
    every = loss_and_gradients(info_nce, inputs, torch.float32, 0.25)[1:]
    count = sum(x is not None for x in inputs)
    for wanted in range(count + 1):
        leaves = [None if x is None else x.float().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
        temperature = torch.tensor(0.25, requires_grad=wanted == count)
        loss = info_nce(*leaves, temperature=temperature)
        (gradient,) = torch.autograd.grad(loss, [temperature if wanted == count else leaves[wanted]])
        torch.testing.assert_close(gradient, every[wanted])


@pytest.mark.parametrize("form", FORMS)
def test_zero_upstream_gradient_gives_exactly_zero(form: str) -> None:
    leaves = [x.float().requires_grad_() for x in make(form, 3, 4) if x is not None]
    leaves.append(torch.tensor(0.2, requires_grad=True))
    loss = info_nce(*leaves[:-1], temperature=leaves[-1], reduction="none")
    for gradient in torch.autograd.grad(loss, leaves, torch.zeros_like(loss)):
        assert gradient.eq(0).all()


def op_calls(form: str, backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each op of this form, with arguments for `torch.library.opcheck`."""
    leaves = [None if x is None else x.float().requires_grad_() for x in make(form, 3, 10)]
    leaves.append(torch.tensor(0.2, requires_grad=True))
    name, options = (
        ("info_nce_paired", [True]) if form == "own" else ("info_nce_shared", [True, 1 - 2 * (form != FORMS[0])])
    )
    forward, backward = (getattr(torch.ops.lethe, each).default for each in (name, f"{name}_backward"))
    constants = [None if x is None else x.detach() for x in leaves]
    losses, *statistics = forward(*constants, *options, backend)
    calls = [(forward, (*leaves, *options, backend))]
    for needs in ([True, True, leaves[2] is not None, True], [False, True, False, False]):
        calls.append((backward, (losses, *constants, statistics, *options, needs, backend)))
    return calls


@pytest.mark.parametrize("form", SLOWEST_APART)
def test_opcheck(form: str) -> None:
    for op, arguments in op_calls(form, "eager"):
        torch.library.opcheck(op, arguments)


def check_compiled(form: str, **options: Any) -> None:
    inputs = make(form, 3, 10)
    torch._dynamo.reset()  # the recompilations of other tests count against the limit
    compiled = torch.compile(info_nce, fullgraph=True, backend="aot_eager")
    expected, actual = (loss_and_gradients(f, inputs, torch.float32, 0.25, **options) for f in (info_nce, compiled))
    for each, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(each, wanted)
    for temperature in (0.25, 0.5):  # a number that changes becomes symbolic
        both = [f(*inputs, temperature=temperature, **options) for f in (info_nce, compiled)]
        torch.testing.assert_close(*both)


@pytest.mark.parametrize("form", SLOWEST_APART)
def test_compiles_into_one_graph(form: str) -> None:
    check_compiled(form)


FORM, SIMILARITY = st.sampled_from(FORMS), st.sampled_from(SIMILARITIES)
SEED = st.integers(0, 2**32)
FEW = settings(max_examples=30, deadline=None)


@FEW
@given(FORM, SIMILARITY, st.integers(2, 6), st.integers(1, 9), st.floats(1e-3, 10), st.floats(1e-3, 1e3), SEED)
def test_loss_is_finite_and_never_negative(
    form: str, similarity: str, batch: int, features: int, temperature: float, size: float, seed: int
) -> None:
    inputs = tuple(None if x is None else x.float() * size for x in make(form, batch, features, seed=seed))
    losses = info_nce(*inputs, temperature=temperature, similarity=similarity, reduction="none")
    assert losses.isfinite().all()
    assert (losses >= 0).all()


@FEW
@given(FORM, st.floats(-20, 20), SEED)
def test_dot_ignores_a_constant_added_to_every_similarity(form: str, constant: float, seed: int) -> None:
    anchors, *others = make(form, 3, 4, seed=seed)

    def extended(x: Tensor | None, last: float) -> Tensor | None:
        return None if x is None else torch.cat([x, torch.full_like(x[..., :1], last)], dim=-1)

    anchors_1 = extended(anchors, 1.0)
    assert anchors_1 is not None
    shifted = info_nce(anchors_1, *(extended(x, constant) for x in others), similarity="dot")
    torch.testing.assert_close(shifted, info_nce(anchors, *others, similarity="dot"))


@FEW
@given(FORM, st.floats(1e-3, 1e3), SEED)
def test_cosine_ignores_length_and_dot_does_not(form: str, length: float, seed: int) -> None:
    anchors, *others = make(form, 3, 4, seed=seed)
    torch.testing.assert_close(info_nce(anchors * length, *others), info_nce(anchors, *others))
    as_temperature = info_nce(anchors, *others, similarity="dot", temperature=1 / length)
    longer = info_nce(anchors * length, *others, similarity="dot", temperature=1.0)
    torch.testing.assert_close(longer, as_temperature)


@FEW
@given(st.sampled_from(["own", "shared"]), SIMILARITY, SEED)
def test_order_of_negatives_is_free_and_each_one_adds(form: str, similarity: str, seed: int) -> None:
    anchors, positives, negatives = make(form, 3, 4, seed=seed)
    assert negatives is not None
    options: dict[str, Any] = {"similarity": similarity, "reduction": "none"}
    losses = info_nce(anchors, positives, negatives, **options)
    torch.testing.assert_close(info_nce(anchors, positives, negatives.flip(-2), **options), losses)
    assert (info_nce(anchors, positives, negatives[..., :-1, :], **options) <= losses).all()


X = torch.ones(8, 10)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"anchors": [1.0]}, "anchors is a list, expected a tensor of shape (B, D)"),
    ({"anchors": X[0]}, "anchors has shape (10,), expected (B, D)"),
    ({"anchors": X[:0]}, "anchors has shape (0, 10), expected (B, D) with every size 1 or more"),
    ({"anchors": X[:, :0]}, "anchors has shape (8, 0), expected (B, D) with every size 1 or more"),
    ({"anchors": X.int()}, "anchors has dtype int32, expected float16, bfloat16, float32 or float64"),
    ({"positives": X[:7]}, "positives has shape (7, 10), expected (8, 10) to match anchors"),
    ({"positives": X.double()}, "positives has dtype float64, expected float32 to match anchors"),
    ({"positives": X.to("meta")}, "positives is on meta, expected cpu to match anchors"),
    ({"negatives": 3}, "negatives is a int, expected a tensor of shape (B, K, D)"),
    ({"negatives": X[0]}, "negatives has shape (10,), expected (B, K, D) or (M, D)"),
    ({"negatives": X[:0]}, "negatives has shape (0, 10), expected (M, D) with every size 1 or more"),
    (
        {"negatives": torch.ones(8, 0, 10)},
        "negatives has shape (8, 0, 10), expected (B, K, D) with every size 1 or more",
    ),
    ({"negatives": X[:5, :9]}, "negatives has shape (5, 9), expected (5, 10) to match anchors"),
    ({"negatives": torch.ones(7, 2, 10)}, "negatives has shape (7, 2, 10), expected (8, 2, 10) to match anchors"),
    ({"negatives": X.half()}, "negatives has dtype float16, expected float32 to match anchors"),
    ({"negatives": X.to("meta")}, "negatives is on meta, expected cpu to match anchors"),
    (
        {"anchors": X[:1], "positives": X[:1]},
        "anchors has shape (1, 10), expected 2 or more rows for in-batch negatives; with one the loss is always 0,"
        " so pass negatives or a larger batch",
    ),
    ({"temperature": 0}, "temperature is 0, expected a finite number above 0"),
    ({"temperature": -0.1}, "temperature is -0.1, expected a finite number above 0"),
    ({"temperature": math.inf}, "temperature is inf, expected a finite number above 0"),
    ({"temperature": "0.1"}, "temperature is '0.1', expected a finite number above 0"),
    ({"temperature": torch.tensor(-0.5)}, "temperature is -0.5, expected a finite number above 0"),
    ({"temperature": torch.tensor(math.nan)}, "temperature is nan, expected a finite number above 0"),
    ({"temperature": torch.tensor([0.1])}, "temperature has shape (1,), expected () or a number"),
    (
        {"temperature": torch.tensor(1)},
        "temperature has dtype int64, expected float16, bfloat16, float32 or float64",
    ),
    (
        {"temperature": torch.tensor(0.1, device="meta")},
        "temperature is on meta, expected cpu to match anchors",
    ),
    (
        {"similarity": "cos"},
        "similarity is 'cos', expected 'cosine' or 'dot' (did you mean 'cosine'?)",
    ),
    ({"reduction": "means"}, "reduction is 'means', expected 'mean', 'sum' or 'none' (did you mean 'mean'?)"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"anchors": X, "positives": X, **changes}
    with pytest.raises(ValueError, match=f"^{re.escape(f'info_nce: {message}')}$"):
        info_nce(arguments.pop("anchors"), arguments.pop("positives"), **arguments)
