"""Contenders of `python -m bench kernels` that rank patches: this project's, the plain formula, and other packages.

Legend: L layers, B images, S sampled images, H heads, N tokens = prefix tokens + P patches, d head width.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.harness.measure import Contender, WrongResultError
from bench.kernel_speed.kernel_peers import EXTRA, TOLERANCE, close, compiled
from engine.models.attention import capture_queries_keys
from engine.models.attention_masking import scores_and_outputs, top_mask
from engine.models.vit import ViTInfo, attention_modules
from engine.models.xformers_attention import resolve_attention
from lethe_kernels import mask_patches, rollout_topk_mask
from lethe_kernels.mask import mask_patches_reference
from lethe_kernels.rollout import attention_rollout_reference

PLAIN = "forward, fused attention"
HOOKED = "full matrix on hooked maps"
FAST_VIT_ROLLOUT = "fast-vit-rollout"
SHIPPED_DISCARD = 0.9  # share of the attention that is set to zero in each layer by default


class Masked(NamedTuple):
    """scores [B, P], and the images [B, C, H, W] whose k highest patches are zero."""

    scores: Tensor
    images: Tensor


@dataclasses.dataclass(frozen=True)
class RolloutCase:
    """A model, images [B, C, H, W], and the float64 results for S of them (`sample`): scores [S, P], logits."""

    model: nn.Module
    info: ViTInfo
    images: Tensor
    k: int
    tolerance: float
    sample: list[int]
    scores: Tensor
    logits: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, info: ViTInfo, images: Tensor, k: int) -> RolloutCase:
        sample = sorted({round(step * (len(images) - 1) / 3) for step in range(4)})
        exact = copy.deepcopy(model).double()
        with capture_queries_keys(exact) as (queries, keys):
            logits = exact(images[sample].double())
        scores = attention_rollout_reference(queries, keys, num_prefix_tokens=info.num_prefix_tokens)
        return cls(model, info, images, k, TOLERANCE[images.device.type, images.dtype], sample, scores, logits)

    def check(self, result: Masked) -> float:
        error = close("scores", result.scores[self.sample], self.scores, self.tolerance)
        mask = top_mask(result.scores[self.sample], self.k, "rollout")
        images = mask_patches_reference(self.images[self.sample], mask, patch_size=self.info.patch_size)
        if not torch.equal(result.images[self.sample], images):
            raise WrongResultError("masked images are not the images with the patches of the highest scores at zero")
        return error

    @torch.no_grad()
    def check_discarded(self, result: Masked) -> float:
        """Compare with the rollout of maps whose lowest entries are zero.

        An entry that rounding moves across the threshold of its map changes a score by less than a hundredth, which is
        allowed in addition.
        """
        exact = copy.deepcopy(self.model).double()
        with capture_queries_keys(exact) as (queries, keys):
            exact(self.images[self.sample].double())
        tokens = queries[0].shape[2]
        eye_NN = torch.eye(tokens, dtype=torch.float64, device=self.images.device)
        row_SN = eye_NN[0].expand(len(self.sample), -1)
        for query, key in zip(reversed(queries), reversed(keys), strict=True):
            attention_SNN = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1).mean(dim=1)
            mixed_SNN = (attention_SNN + eye_NN) / 2
            least_S = torch.stack([torch.quantile(mixed.flatten(), SHIPPED_DISCARD) for mixed in mixed_SNN])
            mixed_SNN = mixed_SNN.where(mixed_SNN >= least_S.view(-1, 1, 1), 0)
            row_SN = (row_SN.unsqueeze(1) @ (mixed_SNN / mixed_SNN.sum(dim=-1, keepdim=True))).squeeze(1)
        expected = row_SN[:, self.info.num_prefix_tokens :]
        return close("scores", result.scores[self.sample], expected, max(self.tolerance, 0.01))

    def check_logits(self, logits: Tensor) -> float:
        return close("logits", logits[self.sample], self.logits, self.tolerance)

    def check_maps(self, maps: Sequence[Tensor]) -> float:
        rows = torch.stack([attention[self.sample].double().sum(dim=-1) for attention in maps])
        if len(maps) != len(attention_modules(self.model)):
            raise WrongResultError(f"{len(maps)} attention maps, expected one a layer")
        return close("sums of attention rows", rows, torch.ones_like(rows), self.tolerance)

    def maps_bytes(self) -> int:
        """Return the bytes of the attention maps of all layers, L B H N^2 in the model's dtype.

        A rollout on hooked maps stores that much.
        """
        modules = attention_modules(self.model)
        tokens = self.info.num_prefix_tokens + self.info.num_patches
        heads = int(modules[0].num_heads)  # type: ignore[arg-type]
        return len(modules) * len(self.images) * heads * tokens**2 * self.images.element_size()

    def own_model(self, fused: bool) -> nn.Module:
        """Return a copy of the model with the same weights, for hooks and the kind of attention."""
        shared = {id(tensor): tensor for tensor in [*self.model.parameters(), *self.model.buffers()]}
        model = copy.deepcopy(self.model, shared)
        for module in attention_modules(model):
            module.fused_attn = fused  # type: ignore[assignment]
        return model

    def masked(self, scores: Tensor) -> Masked:
        """Mask the images; this part is the same for every contender."""
        mask = top_mask(scores, self.k, "rollout")
        return Masked(scores, mask_patches(self.images, mask, patch_size=self.info.patch_size))


def rollout_contenders(case: RolloutCase, backends: dict[str, str]) -> list[Contender]:
    """Return plain forward passes, this project's rollout, and those of other packages.

    backends: name to backend of this project's rollout.
    """
    on_host = case.maps_bytes() if case.images.device.type == "cuda" else 0
    return [
        Contender(name=PLAIN, build=lambda: _forward(case, True), check=case.check_logits, note="no masks"),
        Contender(
            name="forward, explicit attention",
            build=lambda: _forward(case, False),
            check=case.check_logits,
            note="no masks",
        ),
        *(
            Contender(name=name, build=functools.partial(_ours, case, backend), check=case.check)
            for name, backend in backends.items()
        ),
        Contender(
            name=HOOKED,
            build=lambda: _full_matrix(case),
            check=case.check,
            note="vit-explain's algorithm, batched, rows normalised",
        ),
        Contender(
            name=FAST_VIT_ROLLOUT,
            build=lambda: _fast_vit_rollout(case, SHIPPED_DISCARD),
            check=case.check_discarded,
            install=EXTRA,
            note=f"as it ships: the lowest {SHIPPED_DISCARD:.0%} of each map set to zero",
            host_bytes=on_host,
        ),
        Contender(
            name=f"{FAST_VIT_ROLLOUT}, all kept",
            build=lambda: _fast_vit_rollout(case, 0.0),
            check=case.check,
            install=EXTRA,
            note="discard ratio 0: the same scores as ours",
            host_bytes=on_host,
        ),
        Contender(
            name="timm AttentionExtract",
            build=lambda: _attention_extract(case),
            check=case.check_maps,
            note="maps only, no rollout and no masks",
        ),
    ]


def _forward(case: RolloutCase, fused: bool) -> Callable[[], Tensor]:
    model = case.own_model(fused)
    return torch.no_grad()(lambda: model(case.images))


def _ours(case: RolloutCase, backend: Any) -> Callable[[], Masked]:
    # The attention that the engine itself picks for this device.
    model = case.own_model(resolve_attention("auto", case.images.device) == "sdpa")
    return lambda: case.masked(scores_and_outputs(model, case.images, case.info, backend=backend)[0])


def _full_matrix(case: RolloutCase) -> Callable[[], Masked]:
    model = case.own_model(fused=False)
    maps: list[Tensor] = []
    for module in attention_modules(model):
        module.attn_drop.register_forward_hook(lambda _m, _i, attention_BHNN: maps.append(attention_BHNN))  # type: ignore[union-attr]

    @torch.no_grad()
    def call() -> Masked:
        model(case.images)
        eye_NN = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
        product_BNN = eye_NN.expand(len(case.images), -1, -1)
        for attention_BHNN in maps:
            mixed_BNN = 0.5 * attention_BHNN.mean(dim=1) + 0.5 * eye_NN
            product_BNN = (mixed_BNN / mixed_BNN.sum(dim=-1, keepdim=True)) @ product_BNN
        maps.clear()  # not counted as memory between calls
        return case.masked(product_BNN[:, 0, case.info.num_prefix_tokens :])

    return call


def _fast_vit_rollout(case: RolloutCase, discard: float) -> Callable[[], Masked]:
    rollout = import_module("fast_vit_rollout").ViTAttentionRollout(
        case.own_model(fused=False), head_fusion="mean", discard_ratio=discard
    )

    def call() -> Masked:
        matrix_BNN = rollout(case.images)
        rollout.attentions = []
        scores = matrix_BNN[:, 0, case.info.num_prefix_tokens :]
        return case.masked(scores.to(case.images.device))  # it works in main memory

    return call


def _attention_extract(case: RolloutCase) -> Callable[[], list[Tensor]]:
    extract = import_module("timm.utils").AttentionExtract(case.own_model(fused=False), method="hook")
    return torch.no_grad()(lambda: list(extract(case.images).values()))


# --- q and k to mask --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """q and k [B, H, N, d] of every layer as in timm's attention, and float64 scores [S, P] of some images."""

    queries: list[Tensor]
    keys: list[Tensor]
    prefix: int
    k: int
    tolerance: float
    sample: list[int]
    scores: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, case: RolloutCase) -> KernelCase:
        with capture_queries_keys(case.model) as (queries, keys):
            case.model(case.images)
        prefix = case.info.num_prefix_tokens
        scores = attention_rollout_reference(
            [query[case.sample].double() for query in queries],
            [key[case.sample].double() for key in keys],
            num_prefix_tokens=prefix,
        )
        return cls(queries, keys, prefix, case.k, case.tolerance, case.sample, scores)

    def check(self, mask_BP: Tensor) -> float:
        """Return how far below the k-th highest score the worst masked patch is, as a share of the highest."""
        chosen = mask_BP[self.sample]
        if chosen.shape != self.scores.shape or not bool((chosen.sum(dim=1) == self.k).all()):
            raise WrongResultError(f"the mask does not hold {self.k} patches of every image")
        least = self.scores.topk(self.k, dim=1).values[:, -1]
        worst = self.scores.masked_fill(~chosen, torch.inf).amin(dim=1)
        error = float(((least - worst) / self.scores.amax(dim=1)).max())
        if not error <= 2 * self.tolerance:
            raise WrongResultError(f"the mask holds a patch {error:.1e} of the highest score below the {self.k}-th")
        return error


def kernel_contenders(case: KernelCase) -> list[Contender]:
    def ours(backend: Any) -> Contender:
        def call() -> Tensor:
            return rollout_topk_mask(case.queries, case.keys, k=case.k, num_prefix_tokens=case.prefix, backend=backend)

        return Contender(name=f"ours, {backend}", build=lambda: call, check=case.check)

    def formula(class_row: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: top_mask(class_row(case.queries, case.keys)[:, case.prefix :], case.k, "rollout")

    return [
        ours("triton"),
        ours("eager"),
        Contender(name="PyTorch, class row", build=lambda: formula(_class_row), check=case.check),
        Contender(name="torch.compile of it", build=lambda: formula(compiled(_class_row)), check=case.check),
    ]


@torch.no_grad()
def _class_row(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """Compute the class row [B, N] of the rollout in float32 in plain PyTorch."""
    row_BN = functional.one_hot(torch.zeros(len(queries[0]), dtype=torch.long), queries[0].shape[2])
    row_BN = row_BN.to(queries[0].device, torch.float32)
    for query_BHNd, key_BHNd in zip(reversed(queries), reversed(keys), strict=True):
        logits_BHNN = query_BHNd @ key_BHNd.transpose(-2, -1) * query_BHNd.shape[-1] ** -0.5
        attention_BNN = logits_BHNN.softmax(dim=-1, dtype=torch.float32).mean(dim=1)
        row_BN = 0.5 * row_BN + 0.5 * (row_BN.unsqueeze(1) @ attention_BNN).squeeze(1)
    return row_BN
