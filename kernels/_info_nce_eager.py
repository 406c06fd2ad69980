"""Eager path of `lethe_kernels.info_nce`, whose docstring has the formulas, the legend and the cost."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import logsigmoid

from ._backend import compute_dtype

EPS = 1e-8
LONG_INVERSE = (1 - 1e-6) / EPS  # a row with a smaller inverse norm is longer than eps, whatever the rounding

# Side of the squares in which similarities are computed. 4 MB of float32 stay in a CPU's cache between the product and
# the exponential; on an accelerator fewer, larger launches are faster.
CPU_CHUNK = 1024
ACCELERATOR_CHUNK = 8192


def _inverse_norms(x: Tensor, cosine: bool) -> Tensor:
    """Compute 1 / max(|x|, eps) of each row, in the compute type; ones for dot."""
    dtype = compute_dtype(x.dtype)
    if not cosine:
        return x.new_ones(x.shape[:-1], dtype=dtype)
    return vector_norm(x, dim=-1, dtype=dtype).clamp_min_(EPS).reciprocal_()


def _normalised(x: Tensor, inverse: Tensor, cosine: bool) -> Tensor:
    wide = x.to(inverse.dtype)
    return wide * inverse.unsqueeze(-1) if cosine else wide


def _unnormalised(grad: Tensor, normalised: Tensor, inverse: Tensor, dtype: torch.dtype, cosine: bool) -> Tensor:
    """Compute dx from dx^; overwrites `grad`."""
    if cosine:
        radial = (grad * normalised).sum(dim=-1).where(inverse < LONG_INVERSE, 0)
        grad.addcmul_(normalised, radial.unsqueeze(-1), value=-1).mul_(inverse.unsqueeze(-1))
    return grad.to(dtype).contiguous()


def _losses(lse_B: Tensor, positive_B: Tensor) -> Tensor:
    # -logsigmoid is softplus without its threshold: a loss near zero keeps its digits, and none is negative.
    return -logsigmoid(positive_B - lse_B)


def _chunk(device: torch.device) -> int:
    return CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _paired_slices(negatives_BKD: Tensor) -> Iterator[slice]:
    """Yield slices of rows whose float32 copies fit in one chunk."""
    batch, count, features = negatives_BKD.shape
    return _slices(batch, max(1, _chunk(negatives_BKD.device) ** 2 // (count * features)))


def paired_forward(
    anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: Tensor, cosine: bool
) -> tuple[Tensor, ...]:
    chunks = []
    for rows in _paired_slices(negatives):
        inputs = anchors[rows], positives[rows], negatives[rows]
        a_inverse_B, p_inverse_B, n_inverse_BK = (_inverse_norms(x, cosine) for x in inputs)
        a_BD, p_BD, n_BKD = (x.to(a_inverse_B.dtype) for x in inputs)
        scale_B = a_inverse_B / temperature
        positive_B = (a_BD * p_BD).sum(dim=-1) * p_inverse_B * scale_B
        logits_BK = torch.bmm(n_BKD, a_BD.unsqueeze(-1)).squeeze(-1) * n_inverse_BK * scale_B.unsqueeze(-1)
        lse_B = logits_BK.logsumexp(dim=-1)
        losses_B = _losses(lse_B, positive_B)
        chunks.append((losses_B, lse_B, positive_B, logits_BK, a_inverse_B, p_inverse_B, n_inverse_BK))
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def paired_backward(
    grad_B: Tensor,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: Tensor,
    statistics: list[Tensor],
    cosine: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Compute the gradients as weighted sums of input rows: forward has stored every coefficient."""

    def inward(inverse: Tensor) -> Tensor:
        return inverse.square().where(inverse < LONG_INVERSE, 0) if cosine else torch.zeros_like(inverse)

    grads = empty_gradients((anchors, positives, negatives), temperature, needs)
    radials = []
    for rows in _paired_slices(negatives):
        lse_B, positive_B, logits_BK, a_inverse_B, p_inverse_B, n_inverse_BK = (x[rows] for x in statistics)
        a_BD, p_BD, n_BKD = (x[rows].to(lse_B.dtype) for x in (anchors, positives, negatives))
        weight_B = grad_B[rows] * torch.sigmoid(lse_B - positive_B)
        share_BK = weight_B.unsqueeze(-1) * (logits_BK - lse_B.unsqueeze(-1)).exp_()
        radial_B = (share_BK * logits_BK).sum(dim=-1) - weight_B * positive_B
        radials.append(radial_B)
        scale_B = a_inverse_B / temperature
        pull_B1 = (weight_B * p_inverse_B * scale_B).unsqueeze(-1)
        push_BK = share_BK * n_inverse_BK * scale_B.unsqueeze(-1)
        if needs[0]:
            grad_BD = torch.bmm(push_BK.unsqueeze(-2), n_BKD).squeeze(-2).addcmul_(p_BD, pull_B1, value=-1)
            grads[0][rows] = grad_BD.addcmul_(a_BD, (radial_B * inward(a_inverse_B)).unsqueeze(-1), value=-1)
        if needs[1]:
            inward_B = weight_B * positive_B * inward(p_inverse_B)
            grads[1][rows] = (p_BD * inward_B.unsqueeze(-1)).addcmul_(a_BD, pull_B1, value=-1)
        if needs[2]:
            inward_BK = share_BK * logits_BK * inward(n_inverse_BK)
            grad_BKD = a_BD.unsqueeze(-2) * push_BK.unsqueeze(-1)
            grads[2][rows] = grad_BKD.addcmul_(n_BKD, inward_BK.unsqueeze(-1), value=-1)
    if needs[3]:
        grads[3].copy_(-torch.cat(radials).sum() / temperature)
    return grads


def _similarities(
    buffer: Tensor, anchors_BD: Tensor, negatives_MD: Tensor, rows: slice, columns: slice, skip: int
) -> Tensor:
    """Compute one chunk of the similarities in `buffer`; -inf if the negative is the anchor's own positive."""
    anchors, negatives = anchors_BD[rows], negatives_MD[columns]
    logits = buffer[: len(anchors) * len(negatives)].view(len(anchors), len(negatives))
    torch.mm(anchors, negatives.T, out=logits)
    if skip >= 0:
        logits.diagonal(skip + rows.start - columns.start).fill_(-torch.inf)
    return logits


def _similarity_buffer(anchors_BD: Tensor, negatives_MD: Tensor) -> tuple[Tensor, int]:
    """Allocate one chunk and return it with its side. Done once: a large allocation costs as much as the product."""
    side = _chunk(anchors_BD.device)
    return anchors_BD.new_empty(min(len(anchors_BD), side) * min(len(negatives_MD), side)), side


def shared_forward(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None, temperature: Tensor, cosine: bool, skip: int
) -> tuple[Tensor, ...]:
    a_inverse_B, p_inverse_B = _inverse_norms(anchors, cosine), _inverse_norms(positives, cosine)
    # Dividing B x D numbers by the temperature, and not B x M.
    anchors_BD = _normalised(anchors, a_inverse_B, cosine) / temperature
    negatives_MD = positives_BD = _normalised(positives, p_inverse_B, cosine)
    n_inverse_M = a_inverse_B.new_empty(0)
    if negatives is not None:
        n_inverse_M = _inverse_norms(negatives, cosine)
        negatives_MD = _normalised(negatives, n_inverse_M, cosine)
    positive_B = (anchors_BD * positives_BD).sum(dim=-1)
    lse_B = torch.full_like(positive_B, -torch.inf)
    buffer, side = _similarity_buffer(anchors_BD, negatives_MD)
    for rows in _slices(len(anchors_BD), side):
        for columns in _slices(len(negatives_MD), side):
            logits = _similarities(buffer, anchors_BD, negatives_MD, rows, columns, skip)
            # Finite even where every column is skipped, because -inf - -inf is NaN.
            largest = logits.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
            total = logits.sub_(largest).exp_().sum(dim=-1).log_().add_(largest.squeeze(-1))
            lse_B[rows] = torch.logaddexp(lse_B[rows], total)
    return _losses(lse_B, positive_B), lse_B, positive_B, a_inverse_B, p_inverse_B, n_inverse_M


def shared_backward(
    grad_B: Tensor,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    statistics: list[Tensor],
    cosine: bool,
    skip: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    lse_B, positive_B, a_inverse_B, p_inverse_B, n_inverse_M = statistics
    weight_B1 = (grad_B * torch.sigmoid(lse_B - positive_B) / temperature).unsqueeze(-1)
    anchors_BD = _normalised(anchors, a_inverse_B, cosine)
    negatives_MD = positives_BD = _normalised(positives, p_inverse_B, cosine)
    if negatives is not None:
        negatives_MD = _normalised(negatives, n_inverse_M, cosine)

    pushes_anchors, pushes_negatives = needs[0] or needs[3], needs[1 if negatives is None else 2]
    anchors_push_BD = lse_B.new_zeros(anchors.shape if pushes_anchors else 0)
    negatives_push_MD = lse_B.new_zeros(negatives_MD.shape if pushes_negatives else 0)
    if pushes_anchors or pushes_negatives:
        scaled_BD = anchors_BD / temperature
        buffer, side = _similarity_buffer(anchors_BD, negatives_MD)
        for rows in _slices(len(anchors_BD), side):
            weighted = anchors_BD[rows] * weight_B1[rows]
            for columns in _slices(len(negatives_MD), side):
                logits = _similarities(buffer, scaled_BD, negatives_MD, rows, columns, skip)
                share = logits.sub_(lse_B[rows].unsqueeze(-1)).exp_()
                if pushes_anchors:
                    anchors_push_BD[rows].addmm_(share, negatives_MD[columns])
                if pushes_negatives:
                    negatives_push_MD[columns].addmm_(share.T, weighted)

    grads = list(empty_gradients((anchors, positives, negatives), temperature, [False] * 4))
    if needs[1]:
        grad_BD = anchors_BD * -weight_B1
        if negatives is None:
            grad_BD += negatives_push_MD
        grads[1] = _unnormalised(grad_BD, positives_BD, p_inverse_B, positives.dtype, cosine)
    if negatives is not None and needs[2]:
        grads[2] = _unnormalised(negatives_push_MD, negatives_MD, n_inverse_M, negatives.dtype, cosine)
    if pushes_anchors:
        anchors_push_BD.sub_(positives_BD).mul_(weight_B1)
    if needs[3]:
        grads[3] = -(anchors_push_BD * anchors_BD).sum() / temperature
    if needs[0]:
        grads[0] = _unnormalised(anchors_push_BD, anchors_BD, a_inverse_B, anchors.dtype, cosine)
    return tuple(grads)


def empty_gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None], temperature: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Allocate each gradient that is needed; of size 0 for the others."""
    grads = []
    for x, needed in zip((*inputs, temperature), needs, strict=True):
        like = temperature if x is None else x
        grads.append(like.new_empty(like.shape if needed and x is not None else (0,)))
    return tuple(grads)
