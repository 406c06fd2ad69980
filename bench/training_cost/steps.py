"""Optimizer steps one at a time: those of `engine.unlearn`, and the plain loop for the same work.

Both have the same images (scikit-learn's digits at the model's size), batches of one size, flips in the retain stage,
AdamW with the run's decay and clipping. The plain forget step is the paper's: in every step the original processes the
image and its masked copy, with the masks of attention rollout over explicit maps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.harness.cases import StepCase
from engine.config import RunConfig
from engine.data import Batch, Samples, open_source
from engine.methods.lethe import LetheConfig
from engine.models.attention_masking import count_masked
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import attention_info
from engine.run.setup import RunOptions, set_up

PARTS = ("data", "teacher", "forward", "backward", "optimizer", "communication")
_DECAY, _CLIP, _RATE = RunConfig().weight_decay, RunConfig().grad_clip, 1e-4


def digits(case: StepCase, images: int | None) -> Samples:
    """Return whole batches of digits: the given number of images, 8 batches by default, at most all."""
    train = open_source("digits").train
    wanted = min(len(train), images or 8 * case.batch)
    return train.subset(range(wanted // case.batch * case.batch or wanted))


class EngineStep:
    """Optimizer steps exactly as `engine.unlearn` runs them, one at a time.

    prepare_seconds: of teacher passes and masks before the first step, for all of the images.
    parts: seconds by part (`PARTS`) within `timed`.
    """

    def __init__(self, case: StepCase, device: torch.device, images: int | None = None) -> None:
        samples = digits(case, images)
        self.batch, self.device = case.batch, device
        options = {
            "batch_size": case.batch,
            "precision": case.precision,
            "device": str(device),
            "gradient_checkpointing": case.checkpointing,
            "compile": case.compile,
            "augment": "flip",
            "workers": 0,
        }
        model = case.model.spec().build(seed=0).to(device)
        run = set_up(model, samples, samples, RunOptions(method="lethe", config=options))
        self._computing = contextlib.ExitStack()
        self._computing.enter_context(run.computing())
        self._number = next(i for i, phase in enumerate(run.phases) if phase.name == case.phase)
        self._phase = run.phases[self._number]
        self._run, self._loader, self._step = run, run.loader_of(self._number, self._phase), 0
        self.parts = dict.fromkeys(PARTS, 0.0)
        began = time.perf_counter()
        run.method.prepare(self._phase)
        self._synchronize()
        self.prepare_seconds = time.perf_counter() - began
        run.train_engine.begin_phase(_RATE)
        run.train_engine.model.train()
        # Constant rate: a benchmark takes more steps than any schedule has.
        self._schedule = torch.optim.lr_scheduler.ConstantLR(run.train_engine.optimizer, factor=1.0)
        self._batches = self._endless()

    def _endless(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from self._loader.epoch(epoch)
            epoch += 1

    def __call__(self) -> Tensor:
        row = self._run.trainer.step(self._phase, self._batches, 0, self._step, self._schedule)
        self._step += 1
        return sum(row.terms.values())  # type: ignore[return-value]

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Fill `parts` during the block; each step waits for the device, so the steps are slower."""
        batches, method, train_engine = self._batches, self._run.method, self._run.train_engine
        timed = {
            (method, "loss"): "forward",
            (method, "teacher"): "teacher",
            (train_engine, "backward"): "backward",
            (train_engine, "step"): "optimizer",
        }
        for (owner, attribute), part in timed.items():
            setattr(owner, attribute, self._timing(part, getattr(owner, attribute)))
        self._batches = iter(self._timing("data", lambda: next(batches)), None)
        try:
            yield
        finally:
            self._batches = batches
            for owner, attribute in timed:
                delattr(owner, attribute)

    def _timing(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            self._synchronize()
            before, began = sum(self.parts.values()), time.perf_counter()
            result = call(*arguments, **options)
            self._synchronize()
            inside = sum(self.parts.values()) - before  # of parts within this one, which count for themselves
            self.parts[part] += time.perf_counter() - began - inside
            return result

        return run

    def reset_parts(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self._computing.close()


class PlainStep:
    """The same mathematics in plain torch and timm, without code of the engine or its kernels."""

    def __init__(
        self, case: StepCase, device: torch.device, attention: str = "sdpa", images: int | None = None
    ) -> None:
        samples = digits(case, images)
        self.batch, self.device, self.case = case.batch, device, case
        self.model = case.model.spec().build(seed=0).to(device).train()
        if case.checkpointing:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self._set_attention(self.model, attention)
        self.original = case.model.spec().build(seed=0).to(device).eval() if case.phase == "forget" else None
        if self.original is not None:
            self._set_attention(self.original, "eager")  # its maps are read
            info = attention_info(self.original)
            self.patch, self.masked = info.patch_size, count_masked(info, LetheConfig().mask_share)
        if case.compile:
            self.model.compile()
        preprocessing = preprocessing_of(self.model)
        channels = len(preprocessing.mean)
        pixels = torch.stack([preprocessing.resize(samples.tensor(i, channels)) for i in range(len(samples))])
        self.black = preprocessing.normalise(torch.zeros(1, channels, 1, 1, dtype=torch.uint8)).to(device)
        data = TensorDataset(preprocessing.normalise(pixels), torch.from_numpy(samples.labels))
        self.loader = DataLoader(
            data, case.batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0)
        )
        self.batches = self._endless()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=_RATE, weight_decay=_DECAY)

    @staticmethod
    def _set_attention(model: nn.Module, attention: str) -> None:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = attention == "sdpa"  # type: ignore[assignment]

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    def __call__(self) -> Tensor:
        images, labels = (each.to(self.device, non_blocking=True) for each in next(self.batches))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16"):
            loss = self._contrast(images) if self.original is not None else self._cross_entropy(images, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _cross_entropy(self, images: Tensor, labels: Tensor) -> Tensor:
        flip = torch.rand(len(images), device=self.device) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return F.cross_entropy(self.model(images).float(), labels)

    def _contrast(self, images: Tensor) -> Tensor:
        assert self.original is not None
        with torch.no_grad():
            negatives, maps = self._with_maps(images)
            height, width = self.patch
            mask = _rollout(maps)[:, 0, 1:].topk(self.masked).indices
            shown = torch.zeros(len(images), maps[0].shape[-1] - 1, dtype=torch.bool, device=self.device)
            shown.scatter_(1, mask, True)
            rows, columns = images.shape[-2] // height, images.shape[-1] // width
            pixels = shown.view(-1, 1, rows, columns).repeat_interleave(height, 2).repeat_interleave(width, 3)
            positives = self.original(torch.where(pixels, self.black, images))
        logits = [F.normalize(each.float(), dim=-1) for each in (self.model(images), positives, negatives)]
        similarities = torch.stack([(logits[0] * other).sum(-1) for other in logits[1:]], dim=1)
        labels = torch.zeros(len(images), dtype=torch.long, device=self.device)
        return F.cross_entropy(similarities / LetheConfig().temperature, labels)

    def _with_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits, and the attention of every block [B, H, N, N], as hooks on explicit attention collect it."""
        assert self.original is not None
        maps: list[Tensor] = []
        hooks = [
            module.attn_drop.register_forward_hook(lambda _module, _inputs, output: maps.append(output))  # type: ignore[union-attr]
            for module in self.original.modules()
            if hasattr(module, "attn_drop")
        ]
        logits = self.original(images)
        for hook in hooks:
            hook.remove()
        return logits, maps

    def close(self) -> None:
        """Do nothing: there are no resources beyond the object."""


def _rollout(maps: list[Tensor]) -> Tensor:
    """Compute attention rollout [B, N, N] by full products (Abnar and Zuidema 2020), batched."""
    identity = torch.eye(maps[0].shape[-1], device=maps[0].device)
    result = identity
    for each in maps:
        mixed = (each.float().mean(1) + identity) / 2
        result = mixed / mixed.sum(-1, keepdim=True) @ result
    return result
