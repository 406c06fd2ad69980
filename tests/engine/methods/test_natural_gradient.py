"""The Fisher matrix in a Kronecker-factored eigenbasis, and the natural gradient steps that use it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import tiny_vit

from engine.data import Batch, Loader, Samples, open_source
from engine.errors import RunStopped, UserError
from engine.methods.common.kronecker import KroneckerFisher
from engine.methods.common.natural_gradient import descend
from engine.models.preprocessing import preprocessing_of


@pytest.fixture(scope="module")
def train() -> Samples:
    return open_source("digits").train


class OneLayer(torch.nn.Module):
    """Images of 1 x 2 x 2 pixels to 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


def batches(*images: torch.Tensor) -> Any:
    return lambda: [Batch(x, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x))) for x in images]


def drawn_gradients(model: torch.nn.Module, images: torch.Tensor, seed: int) -> torch.Tensor:
    """The gradient [n, weights] of each image's cross-entropy, for a label drawn from the model's own prediction."""
    generator, rows = torch.Generator().manual_seed(seed), []
    labels = torch.multinomial(model(images).detach().softmax(1), 1, generator=generator)[:, 0]
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([each.flatten() for each in found]))
    return torch.stack(rows)


def test_it_inverts_the_dense_matrix_of_a_single_sample() -> None:
    """g g^T has the eigenvectors of its factors, so nothing is approximated."""
    model, image = OneLayer(), torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    fisher = KroneckerFisher(model, batches(image), seed=5)
    assert (fisher.names, fisher.count) == (["head.weight", "head.bias"], 1)
    (g,) = drawn_gradients(model, image, 5)
    v = torch.randn(len(g), generator=torch.Generator().manual_seed(1))
    damping = 0.3 * float(g @ g) / len(g)  # relative to the mean eigenvalue
    expected = torch.linalg.solve(torch.outer(g, g) + damping * torch.eye(len(g)), v)
    found = fisher.solve({"head.weight": v[:12].view(3, 4), "head.bias": v[12:]}, 0.3)
    torch.testing.assert_close(
        torch.cat([found["head.weight"].flatten(), found["head.bias"]]), expected, rtol=1e-4, atol=1e-4
    )


def test_its_eigenvalues_have_the_sum_of_the_squared_gradients_of_all_layers(train: Samples) -> None:
    """The trace is the same in every basis; it also sets the damping. Batches may have any size."""
    model = tiny_vit(seed=5)
    samples = train.subset(range(6))
    whole, parts = (Loader(samples, preprocessing_of(model), batch_size=size) for size in (6, 4))
    fisher = KroneckerFisher(model, whole.ordered, seed=2)
    (batch,) = whole.ordered()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert fisher.names == [f"{n}.{kind}" for n in fisher_order(fisher) for kind in ("weight", "bias")]
    assert sorted(fisher_order(fisher)) == sorted(linear)
    for name in model.state_dict():
        model.get_parameter(name).requires_grad_(name in fisher.names)
    rows = []
    generator = torch.Generator().manual_seed(2)
    labels = torch.multinomial(model(batch.images).detach().softmax(1), 1, generator=generator)[:, 0]
    weights = [w for w in model.parameters() if w.requires_grad]
    for image, label in zip(batch.images, labels, strict=True):
        found = torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]), weights)
        rows.append(sum(float(each.square().sum()) for each in found))
    numbers = sum(w.numel() for w in weights)
    assert fisher.mean * numbers == pytest.approx(sum(rows) / len(rows), rel=1e-4)
    assert KroneckerFisher(model, parts.ordered, seed=2).mean == pytest.approx(fisher.mean, rel=1e-4)


def fisher_order(fisher: KroneckerFisher) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in fisher.names))


def test_large_damping_leaves_the_gradient_as_it_is_and_the_map_is_symmetric(train: Samples) -> None:
    model = tiny_vit(seed=5)
    loader = Loader(train.subset(range(8)), preprocessing_of(model), batch_size=8)
    fisher = KroneckerFisher(model, loader.ordered)
    torch.manual_seed(0)
    u, v = ({name: torch.randn_like(model.get_parameter(name)) for name in fisher.names} for _ in range(2))

    def inner(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(sum((a[name] * b[name]).sum() for name in fisher.names))

    assert inner(u, fisher.solve(v, 0.1)) == pytest.approx(inner(fisher.solve(u, 0.1), v), rel=1e-3)
    assert inner(u, fisher.solve(u, 0.1)) > 0
    far = fisher.solve(v, 1e8)
    for name in fisher.names:
        torch.testing.assert_close(far[name] * 1e8 * fisher.mean, v[name], rtol=1e-3, atol=1e-3)


def test_frozen_layers_are_left_out_and_a_model_without_any_is_refused(train: Samples) -> None:
    model = tiny_vit(seed=5).requires_grad_(False)
    model.head.weight.requires_grad_(True)
    loader = Loader(train.subset(range(8)), preprocessing_of(model), batch_size=8)
    assert KroneckerFisher(model, loader.ordered).names == ["head.weight"]
    model.head.weight.requires_grad_(False)
    with pytest.raises(UserError, match="has no linear layer that can be changed"):
        KroneckerFisher(model, loader.ordered)


class Plain:
    """F = identity on one vector."""

    names = ("x",)

    def solve(self, gradients: dict[str, torch.Tensor], damping: float) -> dict[str, torch.Tensor]:
        return {"x": gradients["x"] / damping}


class Vector(torch.nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor(values))


def quadratic(model: Vector, curvatures: torch.Tensor) -> Any:
    """Gradients and value of the loss; like those of a model they do not depend on the step."""

    def value(step: int) -> float:
        return float((curvatures * model.x.detach() ** 2).sum() / 2)

    return lambda step: (value(step), {"x": curvatures * model.x.detach()}), value


def run(model: Vector, objective: Any, steps: int) -> list[Any]:
    rows: list[Any] = []
    descend(model, Plain(), *objective, steps, 1.0, lambda *row: rows.append(row))  # type: ignore[arg-type]
    return rows


def exact(g: torch.Tensor, curvatures: torch.Tensor) -> float:
    return 0.7 * float(g @ g) / float(g @ (curvatures * g))


def test_steps_take_seven_tenths_of_the_way() -> None:
    """On a quadratic the parabola is exact, whatever length is tried."""
    model, curvatures = Vector(0.03, -0.02), torch.tensor([2.0, 8.0])
    x = model.x.detach().clone()
    wanted = []
    for _ in range(3):
        g = curvatures * x
        wanted.append(exact(g, curvatures))
        x = x - wanted[-1] * g
    rows = run(model, quadratic(model, curvatures), 3)
    torch.testing.assert_close(model.x.detach(), x, rtol=1e-3, atol=1e-6)
    assert [(step, steps) for step, steps, _ in rows] == [(0, 3), (1, 3), (2, 3)]
    for (_, _, numbers), length in zip(rows, wanted, strict=True):
        assert numbers["length"] == pytest.approx(length, rel=1e-3)


def test_a_length_at_which_the_loss_does_not_fall_is_shortened() -> None:
    """Red before: the bound by the Fisher matrix was off by orders of magnitude on digits, and the model collapsed."""
    model, curvatures = Vector(1e-6), torch.tensor([1e7])
    ((_, _, numbers),) = run(model, quadratic(model, curvatures), 1)
    assert numbers["trials"] > 1
    assert abs(model.x.item()) == pytest.approx(0.3e-6, rel=1e-2)


@pytest.mark.parametrize("curvature", [1e-3, -1.0])
def test_where_the_loss_is_flat_or_bends_down_a_step_is_at_most_four_times_what_was_tried(curvature: float) -> None:
    model = Vector(500.0)
    before = model.x.item()
    run(model, quadratic(model, torch.tensor([curvature])), 1)
    assert abs(model.x.item() - before) == pytest.approx(4 * math.sqrt(2 * 1e-5), rel=2e-2)


def test_a_model_that_no_length_improves_stays() -> None:
    """Here the gradient points the wrong way."""
    model = Vector(1.0)
    gradients, value = quadratic(model, torch.ones(1))
    rows = run(model, (lambda step: (gradients(step)[0], {"x": -gradients(step)[1]["x"]}), value), 1)
    assert model.x.item() == 1.0
    assert rows[0][2]["length"] == 0
    infinite = (gradients, lambda step: float("inf"))
    assert run(model, infinite, 1)[0][2]["length"] == 0


def test_at_the_minimum_it_stays_and_it_stops_for_what_is_not_finite() -> None:
    model = Vector(0.0, 0.0)
    run(model, quadratic(model, torch.ones(2)), 3)
    assert model.x.tolist() == [0.0, 0.0]
    model.x.data.fill_(float("nan"))
    with pytest.raises(RunStopped, match="step 0: the loss or its gradient is not finite; raise the damping"):
        run(model, quadratic(model, torch.ones(2)), 3)
