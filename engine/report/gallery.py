"""Gallery of forget samples: the original's attention, the masked patches, and each model's true-class probability."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from engine.data import Loader, Preprocessing, Samples
from engine.models.attention_masking import (
    HeadFusion,
    MaskSource,
    count_masked,
    random_masks,
    scores_and_outputs,
    top_mask,
)
from engine.models.vit import ViTInfo, describe, outputs
from engine.report.data import GalleryItem


@torch.no_grad()
def build_gallery(
    models: Mapping[str, nn.Module],
    samples: Samples,
    preprocessing: Preprocessing,
    *,
    count: int = 8,
    share: float = 0.05,
    source: MaskSource = "rollout",
    head_fusion: HeadFusion = "mean",
    seed: int = 0,
) -> list[GalleryItem]:
    """Return at most `count` samples at equal distances over the forget set; the choice is deterministic.

    Args:
        models: "original", whose attention is shown, and others whose probability of the true class is shown. Each
            stays on its device, and is in eval mode afterwards.
        samples: The whole forget set, in the run's order.
        preprocessing: Preprocessing of the original.
        count: Maximum number of samples.
        share: Share (0, 1) of patches that the mask hides.
        source: Source of the mask.
        head_fusion: How attention heads are merged.
        seed: Seed of random masks. With the run's `share`, `source`, `head_fusion` and `seed`, the masks are those of
            the run.
    """
    original = models["original"].eval()
    info = describe(original)
    chosen = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(np.int64))
    device = next(original.parameters()).device
    loader = Loader(samples.subset(chosen), preprocessing, batch_size=len(chosen), workers=0, device=device)
    batch = next(iter(loader.ordered()))

    maps = mask = None
    if isinstance(info, ViTInfo):
        shown: MaskSource = "rollout" if source == "random" else source  # a random mask still has attention to show
        scores, logits = scores_and_outputs(original, batch.images, info, source=shown, head_fusion=head_fusion)
        k = count_masked(info, share)
        drawn = random_masks(chosen, info, k, seed) if source == "random" else top_mask(scores, k, source)
        maps, mask = (each.cpu().numpy().reshape(-1, *info.grid) for each in (scores.float(), drawn))
    else:
        logits = outputs(original, batch.images)
    probabilities = {
        name: _true_class(logits if name == "original" else _logits(model, batch.images), batch.labels)
        for name, model in models.items()
    }
    pixels = _pixels(batch.images, preprocessing)
    names = samples.class_names
    return [
        GalleryItem(
            id=samples.ids[index],
            label=str(names[label] if label < len(names) else label),
            image=pixels[row],
            scores=None if maps is None else maps[row],
            mask=None if mask is None else mask[row],
            probabilities={name: float(values[row]) for name, values in probabilities.items()},
        )
        for row, (index, label) in enumerate(zip(chosen.tolist(), batch.labels.tolist(), strict=True))
    ]


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images.to(next(model.parameters()).device))


def _true_class(logits: Tensor, labels: Tensor) -> np.ndarray:
    probabilities = logits.double().softmax(-1).cpu()
    return probabilities[torch.arange(len(labels)), labels.cpu()].numpy()


def _pixels(images: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """Convert inputs of the model [B, C, H, W] to uint8 [B, H, W, 3].

    Images whose number of channels is not 3 become grey: grey-scale ones, and those whose channels are no colours.
    """
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    values = images.float().cpu() * std + mean
    if values.shape[1] != 3:
        values = values.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return values.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
