"""The contrastive loss InfoNCE: pull each anchor to its positive, push it from its negatives.

    loss_b = -log( e^(s(a_b, p_b) / t) / (e^(s(a_b, p_b) / t) + sum_n e^(s(a_b, n) / t)) )
           = softplus( logsumexp_n(s(a_b, n) / t) - s(a_b, p_b) / t )

    dot:     s(x, y) = x . y
    cosine:  s(x, y) = x^ . y^,  x^ = x / max(|x|, eps),  eps = 1e-8

A zero vector thus has similarity 0 to everything, a finite loss, and a finite gradient, though a steep one
(1 / eps).

Legend: B anchors, D features, K negatives of each anchor, M negatives shared by all, J = K, M, or B in-batch.

Source: van den Oord et al., arXiv 1807.03748; the roles (anchor: the model being changed, positive: the
original on the masked image, negative: the original on the image) are LetheViT's, arXiv 2508.01569.

Cost, forward: flops 2 B J D + 2 B D; bytes itemsize D (2 B + negatives) to read, with B K, M or no negatives
beside the positives, and 4 B to write. The eager path adds a copy of every input in the compute type, another
normalised for cosine, and B J similarities. Backward costs twice the forward.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional

from kernels._backend import (
    Backend,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_number,
    check_shape,
    check_tensor,
    compute_dtype,
    resolve_backend,
    without_autocast,
)

Similarity = Literal["cosine", "dot"]
Reduction = Literal["mean", "sum", "none"]

EPS = 1e-8


def info_nce_reference(
    anchors_BD: Tensor,
    positives_BD: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    similarity: Similarity = "cosine",
    reduction: Reduction = "mean",
) -> Tensor:
    """Anchor by anchor, in the dtype of the inputs."""

    def similar(x_D: Tensor, y_D: Tensor) -> Tensor:
        if similarity == "cosine":
            x_D = x_D / vector_norm(x_D).clamp_min(EPS)
            y_D = y_D / vector_norm(y_D).clamp_min(EPS)
        return (x_D * y_D).sum()

    losses = []
    for row, anchor_D in enumerate(anchors_BD):
        if negatives is None:
            negatives_JD = torch.cat([positives_BD[:row], positives_BD[row + 1 :]])
        else:
            negatives_JD = negatives[row] if negatives.dim() == 3 else negatives
        candidates_D = [positives_BD[row], *negatives_JD]
        logits = torch.stack([similar(anchor_D, candidate_D) / temperature for candidate_D in candidates_D])
        losses.append(-torch.log_softmax(logits, dim=0)[0])
    losses_B = torch.stack(losses)
    if reduction == "none":
        return losses_B
    return losses_B.mean() if reduction == "mean" else losses_B.sum()


def _info_nce_eager(
    anchors_BD: Tensor,
    positives_BD: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    similarity: Similarity,
    reduction: Reduction,
) -> Tensor:
    def prepared(x: Tensor) -> Tensor:
        wide = x.to(compute_dtype(x.dtype))
        return functional.normalize(wide, dim=-1, eps=EPS) if similarity == "cosine" else wide

    # Dividing B x D numbers by the temperature, and not B x J.
    anchors_BD = prepared(anchors_BD) / temperature
    positives_BD = prepared(positives_BD)
    positive_B = (anchors_BD * positives_BD).sum(dim=-1)
    if negatives is None:
        negative_BJ = anchors_BD @ positives_BD.T
        itself_BJ = torch.eye(len(negative_BJ), dtype=torch.bool, device=negative_BJ.device)
        negative_BJ = negative_BJ.masked_fill(itself_BJ, -torch.inf)
    elif negatives.dim() == 2:
        negative_BJ = anchors_BD @ prepared(negatives).T
    else:
        negative_BJ = (prepared(negatives) @ anchors_BD.unsqueeze(-1)).squeeze(-1)

    # -logsigmoid is softplus without its threshold: a loss near zero keeps its digits, and none is negative.
    losses_B = -functional.logsigmoid(positive_B - negative_BJ.logsumexp(dim=-1))
    if reduction == "none":
        return losses_B
    return losses_B.mean() if reduction == "mean" else losses_B.sum()


def _temperature(op: str, temperature: float | Tensor, anchors_BD: Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        number = check_number(op, "temperature", temperature, "a finite number above 0")
        if number <= 0:
            raise ValueError(f"{op}: temperature is {temperature!r}, expected a finite number above 0")
        return number
    if temperature.dim() != 0:
        raise ValueError(f"{op}: temperature has shape {tuple(temperature.shape)}, expected () or a number")
    check_float(op, "temperature", temperature)
    if temperature.device.type == "cpu":
        value = float(temperature.detach())
        if not 0 < value < float("inf"):
            raise ValueError(f"{op}: temperature is {value!r}, expected a finite number above 0")
    else:
        check_device(op, "temperature", temperature, anchors_BD.device, "anchors")
        # Reading it would stall the device at every step; a NaN loss says instead that it is out of range.
        temperature = torch.where(temperature > 0, temperature, torch.nan)
    return temperature.to(compute_dtype(anchors_BD.dtype))


def _check_negatives(op: str, negatives: Tensor | None, anchors_BD: Tensor) -> None:
    batch, features = anchors_BD.shape
    if negatives is None:
        if batch == 1:
            raise ValueError(
                f"{op}: anchors has shape {tuple(anchors_BD.shape)}, expected 2 or more rows for in-batch"
                " negatives; with one the loss is always 0, so pass negatives or a larger batch"
            )
        return
    if isinstance(negatives, Tensor) and negatives.dim() not in (2, 3):
        raise ValueError(f"{op}: negatives has shape {tuple(negatives.shape)}, expected (B, K, D) or (M, D)")
    if not isinstance(negatives, Tensor) or negatives.dim() == 3:
        check_tensor(op, "negatives", negatives, "B, K, D")
        check_shape(op, "negatives", negatives, (batch, negatives.shape[1], features), "anchors")
    else:
        check_tensor(op, "negatives", negatives, "M, D")
        check_shape(op, "negatives", negatives, (negatives.shape[0], features), "anchors")
    check_dtype(op, "negatives", negatives, anchors_BD.dtype, "anchors")
    check_device(op, "negatives", negatives, anchors_BD.device, "anchors")


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    similarity: Similarity = "cosine",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """The loss, a scalar, or [B] with reduction="none"; never below zero.

    anchors, positives: [B, D].
    negatives: [B, K, D] of each anchor, [M, D] shared by all, or None for the positives of the other anchors.
    temperature: above 0, in units of the similarity; a 0-d tensor may be learned.
    Half-precision inputs are computed and returned in float32, float64 in float64. Differentiable in anchors,
    positives, negatives and temperature.

    Raises ValueError for shapes, dtypes, devices or values that do not fit. Two things give a NaN loss
    instead, because looking for them would stall an accelerator at every step: NaN in the inputs, and a
    temperature tensor on the accelerator that is not above 0.
    """
    op = "info_nce"
    check_tensor(op, "anchors", anchors, "B, D")
    check_float(op, "anchors", anchors)
    check_tensor(op, "positives", positives, "B, D")
    check_shape(op, "positives", positives, tuple(anchors.shape), "anchors")
    check_dtype(op, "positives", positives, anchors.dtype, "anchors")
    check_device(op, "positives", positives, anchors.device, "anchors")
    _check_negatives(op, negatives, anchors)
    checked_temperature = _temperature(op, temperature, anchors)
    check_choice(op, "similarity", similarity, get_args(Similarity))
    check_choice(op, "reduction", reduction, get_args(Reduction))
    resolve_backend(op, backend)
    with without_autocast(anchors.device):
        return _info_nce_eager(anchors, positives, negatives, checked_temperature, similarity, reduction)
