"""The cases of `pytest --benchmark`: each compares an operation of this project with the same work in plain torch.

References are what one writes without this repository (explicit maps, boolean masks, a B x B matrix, a loop over
tensors). They contain no code of this project, so that a change of it affects one side of the ratio alone. Images are
scikit-learn's digits, enlarged to the model's input.

Legend: L layers, B images, H heads, N tokens = prefix tokens + P patches, d head width, D features.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness.cases import TINY, YARDSTICK, Model, StepCase
from bench.harness.measure import Call
from engine.data import Loader, Preprocessing, Samples, open_source
from engine.models.attention_masking import count_masked, mask_and_outputs
from engine.models.predict import predict
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import ViTInfo, describe
from lethe_kernels import attention_rollout, info_nce, mask_patches, mask_tokens, rollout_topk_mask

TEMPERATURE = 0.1
SHARE = 0.05  # of the patches are masked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Two calls that do the same. tolerance: of their results, as a share of the largest value there.

    summary: the part of a result that is compared. close: releases the resources of the calls.
    """

    ours: Call
    reference: Call
    tolerance: float = 1e-3
    summary: Callable[[Any], Any] = lambda result: result
    close: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """threshold: largest ratio to the baseline's ratio; None is the default."""

    name: str
    build: Callable[[torch.device], Work]
    threshold: float | None = None


# --- kernels ----------------------------------------------------------------------------------------------------------


def _rollout(device: torch.device, top: int | None) -> Work:
    """Build a rollout case. top: how many patches are masked, with maps fused by their maximum.

    top of None: scores, fused by the mean.
    """
    model = timm.create_model("vit_small_patch16_224").eval().to(device)
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.q_norm.register_forward_hook(lambda _module, _inputs, output: queries.append(output))
        block.attn.k_norm.register_forward_hook(lambda _module, _inputs, output: keys.append(output))
    with torch.no_grad():
        model(_digits(4, 224).to(device))

    def ours() -> Tensor:
        if top is None:
            return attention_rollout(queries, keys, backend="eager")
        return rollout_topk_mask(queries, keys, k=top, head_fusion="max", backend="eager")

    @torch.no_grad()
    def reference() -> Tensor:
        fused = []
        for query_BHNd, key_BHNd in zip(queries, keys, strict=True):
            map_BHNN = (query_BHNd @ key_BHNd.mT * query_BHNd.shape[-1] ** -0.5).softmax(-1)
            fused.append(map_BHNN.mean(1) if top is None else map_BHNN.amax(1))
        scores_BP = _full_matrix(fused)
        return scores_BP if top is None else _mask_of(scores_BP, top)

    # Of a mask: scores that are equal except for rounding may change places.
    return Work(ours=ours, reference=reference, summary=_as_numbers, tolerance=1e-3 if top is None else 1.0)


def _full_matrix(fused: list[Tensor]) -> Tensor:
    """Compute scores [B, P] of attention rollout by products of whole matrices (Abnar and Zuidema), rows normalised."""
    eye_NN = torch.eye(fused[0].shape[-1], device=fused[0].device)
    product_BNN = eye_NN.expand_as(fused[0])
    for attention_BNN in fused:
        mixed_BNN = (attention_BNN / attention_BNN.sum(-1, keepdim=True) + eye_NN) / 2
        product_BNN = mixed_BNN @ product_BNN
    return product_BNN[:, 0, 1:]


def _mask_of(scores_BP: Tensor, top: int) -> Tensor:
    return torch.zeros_like(scores_BP, dtype=torch.bool).scatter_(1, scores_BP.topk(top).indices, True)


def _mask_patches(device: torch.device) -> Work:
    images, patch = _digits(32, 224).to(device), 16
    mask = _some_of(torch.empty(32, 14 * 14), device)
    value = torch.tensor([-1.0, -0.5, 0.5], device=device)

    def reference() -> Tensor:
        pixels = mask.view(-1, 1, 14, 14).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        return torch.where(pixels, value.view(1, -1, 1, 1), images)

    return Work(
        ours=lambda: mask_patches(images, mask, patch_size=patch, value=value, backend="eager"),
        reference=reference,
        tolerance=0.0,
    )


def _mask_tokens(device: torch.device) -> Work:
    embed = nn.Conv2d(3, 384, 16, 16).to(device)
    with torch.no_grad():
        tokens = embed(_digits(64, 224).to(device)).flatten(2).mT.contiguous()
    mask = _some_of(tokens[..., 0], device)
    token = tokens[0, 0].clone()
    return Work(
        ours=lambda: mask_tokens(tokens, mask, token, backend="eager"),
        reference=lambda: torch.where(mask.unsqueeze(-1), token, tokens),
        tolerance=0.0,
    )


def _some_of(like_BP: Tensor, device: torch.device) -> Tensor:
    """Return a mask [B, P] of about `SHARE` of the patches, at random places."""
    return (torch.rand(like_BP.shape, generator=torch.Generator().manual_seed(0)) < SHARE).to(device)


def _contrast(device: torch.device, batch: int, width: int, paired: bool) -> Work:
    """Build a case of forward and backward with cosine similarities; gradients of the anchors (in-batch: of both)."""
    anchors, positives, negatives = (each.to(device) for each in _embeddings(batch, width).unbind(1))
    inputs = (anchors.requires_grad_(),) if paired else (anchors.requires_grad_(), positives.requires_grad_())

    def ours() -> tuple[Tensor, ...]:
        others = negatives.unsqueeze(1) if paired else None
        loss = info_nce(anchors, positives, others, temperature=TEMPERATURE, backend="eager")
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    def reference() -> tuple[Tensor, ...]:
        anchors_BD, positives_BD = F.normalize(anchors, dim=1), F.normalize(positives, dim=1)
        if paired:
            negatives_BD = F.normalize(negatives, dim=1)
            logits = torch.stack([(anchors_BD * each).sum(1) for each in (positives_BD, negatives_BD)], dim=1)
            labels = torch.zeros(batch, dtype=torch.long, device=device)
        else:
            logits, labels = anchors_BD @ positives_BD.mT, torch.arange(batch, device=device)
        loss = F.cross_entropy(logits / TEMPERATURE, labels)
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    return Work(ours=ours, reference=reference)


# --- parts of a run ---------------------------------------------------------------------------------------------------


def _masks_of_a_model(device: torch.device) -> Work:
    """Build a case of images to masks and logits in one forward pass, compared with hooked maps and the full matrix."""
    model = _build(YARDSTICK, device)
    plain = copy.deepcopy(model)
    maps: list[Tensor] = []
    for block in plain.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    info = describe(model)
    assert isinstance(info, ViTInfo)
    images, top = _digits(16, 32).to(device), count_masked(info, SHARE)

    @torch.no_grad()
    def reference() -> tuple[Tensor, Tensor]:
        maps.clear()
        logits = plain(images)
        return logits, _mask_of(_full_matrix([each.mean(1) for each in maps]), top)

    def ours() -> tuple[Tensor, Tensor]:
        mask, logits = mask_and_outputs(model, images, info, top)
        return logits, mask

    return Work(ours=ours, reference=reference, summary=lambda result: result[0])


def _step(device: torch.device, phase: Literal["forget", "retain"], precision: Literal["fp32", "bf16"]) -> Work:
    from bench.training_cost.steps import EngineStep, PlainStep

    case = StepCase(model=TINY, phase=phase, precision=precision, batch=64)
    ours, plain = EngineStep(case, device), PlainStep(case, device, attention="eager")

    def close() -> None:
        plain.close()
        ours.close()

    # Their batches differ; that the mathematics is the same is tested in tests/bench/training_cost/test_steps.py.
    return Work(ours=ours, reference=plain, tolerance=0.5, close=close)


def _batches(device: torch.device) -> Work:
    """Build a case of one epoch of shuffled, mirrored, normalised batches."""
    samples = open_source("digits").train.subset(range(1_000))
    preprocessing = preprocessing_of(_build(TINY, torch.device("cpu")))
    loader = Loader(samples, preprocessing, batch_size=100, augment="flip", workers=0, device=device)
    pixels, labels = _decoded(samples, preprocessing), torch.from_numpy(samples.labels)
    epochs = iter(range(1_000_000))

    def reference() -> list[Tensor]:
        generator = torch.Generator().manual_seed(next(epochs))
        images = []
        for index in torch.randperm(len(pixels), generator=generator).split(100):
            batch = _normalise(pixels[index].to(device), preprocessing)
            flip = (torch.rand(len(index), generator=generator) < 0.5).to(device)
            images.append(torch.where(flip[:, None, None, None], batch.flip(-1), batch))
            labels[index].to(device)
        return images

    def mass(images: list[Tensor]) -> Tensor:
        """Sum each image, which neither order nor mirroring changes."""
        return torch.cat(images).double().mean((1, 2, 3)).sort().values

    return Work(ours=lambda: [batch.images for batch in loader.epoch(next(epochs))], reference=reference, summary=mass)


def _predict(device: torch.device) -> Work:
    """Build a case of logits and accuracy of a model on some samples."""
    samples = open_source("digits").test.subset(range(250))
    model = _build(TINY, device)
    preprocessing = preprocessing_of(model)
    loader = Loader(samples, preprocessing, batch_size=50, workers=0, device=device)
    pixels, labels = _decoded(samples, preprocessing), torch.from_numpy(samples.labels)

    @torch.no_grad()
    def reference() -> Tensor:
        logits = [model(_normalise(each.to(device), preprocessing)).cpu() for each in pixels.split(50)]
        (torch.cat(logits).argmax(1) == labels).double().mean().item()
        return torch.cat(logits)

    def ours() -> Tensor:
        predictions = predict(model, loader)
        _ = predictions.accuracy
        return torch.from_numpy(predictions.logits)

    return Work(ours=ours, reference=reference)


# --- inputs -----------------------------------------------------------------------------------------------------------


@functools.cache
def _all_digits() -> Tensor:
    """Return all digits, uint8 [1797, 8, 8]."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images * (255 / 16)).round().to(torch.uint8)


def _digits(count: int, size: int) -> Tensor:
    """Return digits, float32 [count, 3, size, size] in [-1, 1]."""
    enlarged = F.interpolate(_all_digits()[:count, None].float(), (size, size), mode="bilinear")
    return enlarged.expand(-1, 3, -1, -1).contiguous().div_(127.5).sub_(1)


def _decoded(samples: Samples, preprocessing: Preprocessing) -> Tensor:
    """Decode the whole set to uint8 [n, 3, H, W], for a loop over tensors; not timed."""
    return torch.stack([preprocessing.resize(samples.tensor(i, 3)) for i in range(len(samples))])


def _normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    return pixels.float().div_(255).sub_(mean.to(pixels.device)).div_(std.to(pixels.device))


def _embeddings(count: int, width: int) -> Tensor:
    """Return float32 [count, 3, width]: a fixed random projection of three views of each digit.

    The views are the digit itself, shifted by a pixel, and mirrored.
    """
    digits = _all_digits()[:count].float() / 255
    views = torch.stack([digits, digits.roll(1, 2), digits.flip(2)], dim=1).flatten(2)
    return views @ torch.randn(views.shape[-1], width, generator=torch.Generator().manual_seed(0))


def _build(model: Model, device: torch.device) -> Any:
    return model.spec().build(seed=0).eval().to(device)


def _as_numbers(result: Tensor) -> Tensor:
    return result.float()


def _steps() -> Iterator[Case]:
    for phase in ("forget", "retain"):
        for precision in ("fp32", "bf16"):
            build = functools.partial(_step, phase=phase, precision=precision)
            yield Case(name=f"{phase} step, {precision}", build=build)


CASES = [
    Case(name="attention_rollout, eager", build=functools.partial(_rollout, top=None)),
    Case(name="rollout_topk_mask, eager", build=functools.partial(_rollout, top=10)),
    Case(name="mask_patches, eager", build=_mask_patches),
    Case(name="mask_tokens, eager", build=_mask_tokens),
    Case(name="info_nce paired, eager", build=functools.partial(_contrast, batch=256, width=1_000, paired=True)),
    Case(name="info_nce in-batch, eager", build=functools.partial(_contrast, batch=1_024, width=128, paired=False)),
    Case(name="masks of a model", build=_masks_of_a_model),
    *_steps(),
    Case(name="batches of an epoch", build=_batches),
    Case(name="predict", build=_predict),
]
