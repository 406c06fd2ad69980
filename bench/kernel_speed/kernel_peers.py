"""Contenders of `python -m bench kernels` in contrasting and masking, and what all contenders share.

Legend: B anchors, D features, K negatives of each anchor, J candidates, S sampled rows, E = 2 B views.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.harness.measure import Contender, WrongResultError
from lethe_kernels import info_nce, mask_patches
from lethe_kernels.mask import mask_patches_reference

EXTRA = "pip install 'lethe-unlearning[bench]'"
GPU_EXTRA = "pip install 'lethe-unlearning[bench-gpu]'"

# Largest error against the float64 reference, as a share of the largest value there. Half precision is wide because
# other libraries round similarities and attention to it; float32 on CUDA because some multiply in tf32.
TOLERANCE = {("cpu", torch.float32): 1e-3, ("cuda", torch.float32): 1e-2, ("cuda", torch.bfloat16): 1e-1}


def close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """Return the largest error as a share of the largest expected value; raise WrongResultError above the tolerance."""
    if found.shape != expected.shape:
        raise WrongResultError(f"{what} have shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    error = float((found.detach().double() - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:  # NaN is not small
        raise WrongResultError(f"{what} are off by {error:.1e} of the largest, more than {tolerance:.0e}")
    return error


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # a function compiled for too many shapes is no longer compiled, without a message
    return torch.compile(call, dynamic=False)


# --- InfoNCE, in-batch negatives --------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """The loss, and the gradients [B, D] of the inputs that require one."""

    value: Tensor
    gradients: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class InfoNCECase:
    """anchors, positives [B, D]; negatives None (in-batch) or [B, K, D]. expected: by float64."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor | None
    temperature: float
    tolerance: float
    sample: Tensor
    expected: Loss

    @classmethod
    def in_batch(cls, anchors: Tensor, positives: Tensor, temperature: float) -> InfoNCECase:
        """Create a case with gradients of anchors and positives; expected ones are those of sampled rows."""
        sample = torch.linspace(0, len(anchors) - 1, min(16, len(anchors)), device=anchors.device).long()
        expected = _in_batch_reference(anchors.double(), positives.double(), temperature, sample)
        tolerance = TOLERANCE[anchors.device.type, anchors.dtype]
        inputs = anchors.requires_grad_(), positives.requires_grad_()
        return cls(*inputs, None, temperature, tolerance, sample, expected)

    @classmethod
    def paired(cls, anchors: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> InfoNCECase:
        """Create a case of LetheViT's form: one model is trained, so only the anchors need a gradient."""
        exact = cls(
            anchors=anchors.double().requires_grad_(),
            positives=positives.double(),
            negatives=negatives.double(),
            temperature=temperature,
            tolerance=TOLERANCE[anchors.device.type, anchors.dtype],
            sample=torch.arange(len(anchors), device=anchors.device),
            expected=Loss(anchors, ()),  # replaced below
        )
        return dataclasses.replace(
            exact,
            anchors=anchors.requires_grad_(),
            positives=positives,
            negatives=negatives,
            expected=_paired_formula(exact)(),
        )

    @functools.cached_property
    def expected_symmetric(self) -> Loss:
        """Return the mean of the losses from anchors to positives and back; in-batch only."""
        anchors, positives = self.anchors.detach().double(), self.positives.detach().double()
        back = _in_batch_reference(positives, anchors, self.temperature, self.sample)
        pairs = zip(self.expected.gradients, reversed(back.gradients), strict=True)
        return Loss((self.expected.value + back.value) / 2, tuple((there + here) / 2 for there, here in pairs))

    def check(self, found: Loss) -> float:
        return self._check(found, self.expected)

    def check_symmetric(self, found: Loss) -> float:
        return self._check(found, self.expected_symmetric)

    def _check(self, found: Loss, expected: Loss) -> float:
        errors = [close("loss", found.value, expected.value, self.tolerance)]
        if len(found.gradients) != len(expected.gradients):
            raise WrongResultError(f"{len(found.gradients)} gradients, expected {len(expected.gradients)}")
        for mine, exact in zip(found.gradients, expected.gradients, strict=True):
            errors.append(close("gradients", mine[self.sample], exact, self.tolerance))
        return max(errors)

    def backward(self, loss: Tensor) -> Loss:
        inputs = [tensor for tensor in (self.anchors, self.positives) if tensor.requires_grad]
        return Loss(loss.detach(), torch.autograd.grad(loss, inputs))


@torch.no_grad()
def _in_batch_reference(anchors_BD: Tensor, positives_BD: Tensor, temperature: float, sample_S: Tensor) -> Loss:
    """Compute loss and gradients of sampled rows in closed form, in O(B) memory: autograd does not fit.

    With P = softmax(a^ p^T / t) and G = (P - I) / (t B): dL/da^ = G p^, dL/dp^ = G^T a^.
    """

    def through_norm(gradient_SD: Tensor, raw_BD: Tensor, unit_BD: Tensor) -> Tensor:
        unit_SD = unit_BD[sample_S]
        along_SD = (gradient_SD * unit_SD).sum(dim=1, keepdim=True) * unit_SD
        return (gradient_SD - along_SD) / raw_BD[sample_S].norm(dim=1, keepdim=True)

    a_BD, p_BD = functional.normalize(anchors_BD, dim=1), functional.normalize(positives_BD, dim=1)
    batch = len(a_BD)
    rows = max(1, 2**21 // batch)  # 16 MiB of similarities at a time, which the allocator keeps for the next
    log_sum_B = torch.cat([(chunk @ p_BD.T / temperature).logsumexp(dim=1) for chunk in a_BD.split(rows)])
    loss = (log_sum_B - (a_BD * p_BD).sum(dim=1) / temperature).mean()
    order_S = torch.arange(len(sample_S), device=sample_S.device)
    from_anchor_SB = (a_BD[sample_S] @ p_BD.T / temperature - log_sum_B[sample_S, None]).exp()
    to_positive_BS = (a_BD @ p_BD[sample_S].T / temperature - log_sum_B[:, None]).exp()
    from_anchor_SB[order_S, sample_S] -= 1
    to_positive_BS[sample_S, order_S] -= 1
    factor = 1 / (temperature * batch)
    return Loss(
        loss,
        (
            through_norm(factor * from_anchor_SB @ p_BD, anchors_BD, a_BD),
            through_norm(factor * to_positive_BS.T @ a_BD, positives_BD, p_BD),
        ),
    )


INFO_NCE_PYTORCH = "info-nce-pytorch"
MEMEFF = "memeff, one direction"
TWO_DIRECTIONS = "two directions: anchors to positives and back"


def info_nce_contenders(case: InfoNCECase, backends: dict[str, str], slow_peers: bool) -> list[Contender]:
    """Return contenders with in-batch negatives: forward and backward, gradients of anchors and positives."""
    cuda = case.anchors.device.type == "cuda"
    through_compiler = Contender(
        name="torch.compile of it",
        build=lambda: _in_batch_formula(case, compiled(_in_batch_loss)),
        check=case.check,
    )
    contenders = [
        *(
            Contender(name=name, build=functools.partial(_our_loss, case, backend), check=case.check)
            for name, backend in backends.items()
        ),
        Contender(name="PyTorch, full matrix", build=lambda: _in_batch_formula(case, _in_batch_loss), check=case.check),
        *([through_compiler] if cuda else []),
        Contender(
            name=INFO_NCE_PYTORCH, build=lambda: _info_nce_pytorch(case, "unpaired"), check=case.check, install=EXTRA
        ),
        Contender(
            name="open_clip ClipLoss",
            build=lambda: _clip_loss(case),
            check=case.check_symmetric,
            install=EXTRA,
            note=TWO_DIRECTIONS,
        ),
    ]
    if cuda:
        contenders += [
            Contender(name=MEMEFF, build=lambda: _memeff(case, False), check=case.check, install=GPU_EXTRA),
            Contender(
                name="memeff, CLIP",
                build=lambda: _memeff(case, True),
                check=case.check_symmetric,
                install=GPU_EXTRA,
                note=TWO_DIRECTIONS,
            ),
            Contender(name="inf-cl", build=lambda: _inf_cl(case), check=case.check, install=GPU_EXTRA),
        ]
    if slow_peers:
        contenders.append(
            Contender(
                name="lightly NTXentLoss",
                build=lambda: _nt_xent(case),
                check=functools.partial(_check_nt_xent, case),
                install="pip install lightly",
                note="SimCLR's loss: both directions, and anchors among themselves",
            )
        )
    return contenders


def paired_contenders(case: InfoNCECase, backends: dict[str, str]) -> list[Contender]:
    """Return contenders with negatives of each anchor: forward and backward, a gradient of the anchors."""
    return [
        *(
            Contender(name=name, build=functools.partial(_our_loss, case, backend), check=case.check)
            for name, backend in backends.items()
        ),
        Contender(name="PyTorch", build=lambda: _paired_formula(case), check=case.check),
        Contender(
            name=INFO_NCE_PYTORCH, build=lambda: _info_nce_pytorch(case, "paired"), check=case.check, install=EXTRA
        ),
    ]


def _our_loss(case: InfoNCECase, backend: Any) -> Callable[[], Loss]:
    def call() -> Loss:
        loss = info_nce(case.anchors, case.positives, case.negatives, temperature=case.temperature, backend=backend)
        return case.backward(loss)

    return call


def _in_batch_loss(anchors_BD: Tensor, positives_BD: Tensor, temperature: float) -> Tensor:
    """Compute InfoNCE from the whole matrix of similarities in plain PyTorch."""
    logits_BB = functional.normalize(anchors_BD, dim=1) @ functional.normalize(positives_BD, dim=1).T / temperature
    return functional.cross_entropy(logits_BB.float(), torch.arange(len(logits_BB), device=logits_BB.device))


def _in_batch_formula(case: InfoNCECase, loss: Callable[..., Tensor]) -> Callable[[], Loss]:
    return lambda: case.backward(loss(case.anchors, case.positives, case.temperature))


def _paired_formula(case: InfoNCECase) -> Callable[[], Loss]:
    def call() -> Loss:
        assert case.negatives is not None
        candidates_BJD = torch.cat([case.positives.unsqueeze(1), case.negatives], dim=1)
        logits_BJ = functional.cosine_similarity(case.anchors.unsqueeze(1), candidates_BJD, dim=-1) / case.temperature
        return case.backward(-logits_BJ.log_softmax(dim=1)[:, 0].mean())

    return call


def _info_nce_pytorch(case: InfoNCECase, negative_mode: str) -> Callable[[], Loss]:
    loss = import_module("info_nce").InfoNCE(temperature=case.temperature, negative_mode=negative_mode)
    return lambda: case.backward(loss(case.anchors, case.positives, case.negatives))


def _clip_loss(case: InfoNCECase) -> Callable[[], Loss]:
    loss = import_module("open_clip.loss").ClipLoss(local_loss=True)

    def call() -> Loss:
        units = (functional.normalize(x, dim=1) for x in (case.anchors, case.positives))
        return case.backward(loss(*units, 1 / case.temperature))

    return call


def _memeff(case: InfoNCECase, symmetric: bool) -> Callable[[], Loss]:
    memeff = import_module("memeff")
    # stable=True would scale the gradients; a margin of 2 drops no negative.
    loss = (
        memeff.MemoryEfficientCLIPLoss(temperature=case.temperature, stable=False)
        if symmetric
        else memeff.MemoryEfficientQwen3Loss(temperature=case.temperature, margin=2.0, stable=False)
    )
    return lambda: case.backward(loss(case.anchors, case.positives))


def _inf_cl(case: InfoNCECase) -> Callable[[], Loss]:
    cal_flash_loss = import_module("inf_cl").cal_flash_loss
    head = next(width for width in (256, 128, 64, 32, 16) if case.anchors.shape[1] % width == 0)

    def call() -> Loss:
        units = (functional.normalize(x, dim=1) for x in (case.anchors, case.positives))
        return case.backward(cal_flash_loss(*units, scale=1 / case.temperature, head_dim=head).mean())

    return call


def _nt_xent(case: InfoNCECase) -> Callable[[], Loss]:
    loss = import_module("lightly.loss").NTXentLoss(temperature=case.temperature)
    return lambda: case.backward(loss(case.anchors, case.positives))


def _check_nt_xent(case: InfoNCECase, found: Loss) -> float:
    """Check the loss alone, in float64: the mean over both views of -log softmax without the diagonal."""
    views_ED = functional.normalize(torch.cat([case.anchors, case.positives]).detach().double(), dim=1)
    partner_E = torch.arange(len(views_ED), device=views_ED.device).roll(len(case.anchors))
    losses = []
    for rows_R in torch.arange(len(views_ED), device=views_ED.device).split(max(1, 2**21 // len(views_ED))):
        logits_RE = views_ED[rows_R] @ views_ED.T / case.temperature
        logits_RE[torch.arange(len(rows_R)), rows_R] = -torch.inf
        losses.append(functional.cross_entropy(logits_RE, partner_E[rows_R], reduction="none"))
    return close("loss", found.value, torch.cat(losses).mean(), case.tolerance)


# --- masking images ---------------------------------------------------------------------------------------------------


def mask_contenders(images: Tensor, mask: Tensor, patch: int, backends: dict[str, str]) -> list[Contender]:
    sample = images[:4], mask[:4]
    expected = mask_patches_reference(*sample, patch_size=(patch, patch))

    def check(found: Tensor) -> float:
        if not torch.equal(found[:4], expected):
            raise WrongResultError("masked images differ from the reference")
        return 0.0

    def naive() -> Tensor:
        side = images.shape[-1] // patch
        pixels = mask.view(-1, 1, side, side).repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
        return images.masked_fill(pixels, 0.0)

    def ours(backend: Any) -> Callable[[], Callable[[], Tensor]]:
        return lambda: lambda: mask_patches(images, mask, patch_size=patch, backend=backend)

    return [
        *(Contender(name=name, build=ours(backend), check=check) for name, backend in backends.items()),
        Contender(name="repeat_interleave, masked_fill", build=lambda: naive, check=check),
    ]
