"""Fisher matrix of the linear layers of a model, in a Kronecker-factored eigenbasis: EK-FAC (George et al., NeurIPS
2018, arXiv 1806.03884; the factors are those of K-FAC, Martens & Grosse, ICML 2015, arXiv 1503.05671).

For a linear layer with inputs a_t (1 appended for the bias) and gradients g_t of its outputs, both at token t of a
sample whose label is drawn from the model's own prediction:

    A = mean a a^T      G = mean g g^T                       over samples and tokens; Q_A, Q_G: their eigenvectors
    S = mean over samples of (Q_G^T (sum_t g_t a_t^T) Q_A)^2
    F^-1 V = Q_G (Q_G^T V Q_A / (S + lambda)) Q_A^T          V: a matrix [outputs, inputs + 1] of the layer

The layers are taken as independent of each other. lambda is `damping` times the mean of S over all layers. The squared
length v^T F v of a small change v of the weights is twice the mean KL divergence between the predictions before and
after it, so F^-1 of a gradient is the direction that changes predictions least for what it gains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data import Batch
from engine.errors import UserError
from engine.methods.common.gradients import readable
from engine.models.vit import outputs

# Numbers of a block of per-sample gradients: 256 MiB.
_BLOCK = 1 << 26
# Called with the name of a layer, its inputs [n, T, in (+ 1)] and the gradients [n, T, out] of its outputs.
_Sink = Callable[[str, Tensor, Tensor], None]


@dataclasses.dataclass
class _Factors:
    """Sums over samples and tokens, then the eigenbasis of a layer.

    Attributes:
        inputs: A [i, i], then Q_A.
        outputs: G [o, o], then Q_G.
        values: S [o, i].
    """

    inputs: Tensor
    outputs: Tensor
    values: Tensor


def _layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers, by name, whose weights require a gradient."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad
    }


class KroneckerFisher:
    """F of the linear layers whose weights require a gradient and that a forward pass calls.

    Args:
        model: The model; set to eval mode.
        batches: Yields the same batches at every call.
        seed: Seed of the drawn labels.

    Attributes:
        names: Names of the parameters that it covers.
        count: Number of images of a pass; it takes two.
        mean: Mean of S over all layers.

    Raises:
        UserError: There is no such layer, or no image.
    """

    def __init__(self, model: nn.Module, batches: Callable[[], Iterable[Batch]], seed: int = 0) -> None:
        self._layers = _layers_of(model)
        self._factors: dict[str, _Factors] = {}
        model.eval()
        if self._layers:
            self._pass(model, batches(), seed, self._add_products)
        if not self._factors:
            raise UserError(
                f"{type(model).__name__} has no linear layer that can be changed; its Fisher matrix is not available"
            )
        for factors in self._factors.values():
            factors.inputs, factors.outputs = (torch.linalg.eigh(each)[1] for each in (factors.inputs, factors.outputs))
        self.count = self._pass(model, batches(), seed, self._add_squares)
        total = numbers = 0.0
        for factors in self._factors.values():
            factors.values /= self.count
            total, numbers = total + float(factors.values.sum()), numbers + factors.values.numel()
        self.mean = total / numbers
        self.names = [
            f"{name}.{kind}" for name in self._factors for kind in ("weight", "bias") if self._has(name, kind)
        ]

    @staticmethod
    def bytes_of(model: nn.Module) -> int:
        """Return the size of the matrix of a model: two eigenbases and the eigenvalues of each layer, in float32."""
        total = 0
        for layer in _layers_of(model).values():
            i, o = layer.in_features + (layer.bias is not None), layer.out_features
            total += 4 * (i * i + o * o + i * o)
        return total

    def _has(self, name: str, kind: str) -> bool:
        parameter = getattr(self._layers[name], kind)
        return parameter is not None and parameter.requires_grad

    def _pass(self, model: nn.Module, batches: Iterable[Batch], seed: int, sink: _Sink) -> int:
        """Run the model on batches with drawn labels; return the number of images."""
        generator, count = torch.Generator().manual_seed(seed), 0
        for batch in readable(batches):
            with torch.enable_grad(), self._watched(len(batch), sink):
                logits = outputs(model, batch.images).float()
                drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
                loss = F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
                torch.autograd.grad(loss, [layer.weight for layer in self._layers.values()], allow_unused=True)
            count += len(batch)
        return count

    @contextlib.contextmanager
    def _watched(self, count: int, sink: _Sink) -> Iterator[None]:
        """Give the sink what the layers compute for `count` images within the context."""

        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str) -> None:
            inputs = args[0].detach().float().reshape(count, -1, args[0].shape[-1])
            if self._has(name, "bias"):
                inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)
            if output.requires_grad:
                output.register_hook(lambda grad: sink(name, inputs, grad.float().reshape(count, -1, grad.shape[-1])))

        with contextlib.ExitStack() as hooks:
            for name, layer in self._layers.items():
                hooks.callback(layer.register_forward_hook(functools.partial(hook, name=name)).remove)
            yield

    @torch.no_grad()
    def _add_products(self, name: str, inputs: Tensor, grads: Tensor) -> None:
        a, g = inputs.flatten(0, 1), grads.flatten(0, 1)
        if name not in self._factors:
            i, o = a.shape[1], g.shape[1]
            self._factors[name] = _Factors(a.new_zeros(i, i), g.new_zeros(o, o), a.new_zeros(o, i))
        self._factors[name].inputs.addmm_(a.T, a)
        self._factors[name].outputs.addmm_(g.T, g)

    @torch.no_grad()
    def _add_squares(self, name: str, inputs: Tensor, grads: Tensor) -> None:
        factors = self._factors[name]
        a, g = inputs @ factors.inputs, grads @ factors.outputs
        block = max(1, _BLOCK // factors.values.numel())  # samples
        for each_a, each_g in zip(a.split(block), g.split(block), strict=True):
            factors.values += torch.einsum("nto,nti->noi", each_g, each_a).square_().sum(0)

    @torch.no_grad()
    def solve(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return F^-1 of a gradient.

        Args:
            gradients: Gradients by the name of a parameter, of all `names`.
            damping: lambda relative to the mean of S.
        """
        solved: dict[str, Tensor] = {}
        for name, factors in self._factors.items():
            whole = gradients[f"{name}.weight"].float()
            if with_bias := f"{name}.bias" in gradients:
                whole = torch.cat([whole, gradients[f"{name}.bias"].float()[:, None]], 1)
            rotated = factors.outputs.T @ whole @ factors.inputs
            rotated /= factors.values + damping * self.mean
            whole = factors.outputs @ rotated @ factors.inputs.T
            solved[f"{name}.weight"] = whole[:, :-1] if with_bias else whole
            if with_bias:
                solved[f"{name}.bias"] = whole[:, -1]
        return solved
