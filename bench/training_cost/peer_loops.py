"""The training loops of two unlearning repositories, written anew in plain torch for the same models and images.

**SalUn** (OPTML-Group/Unlearn-Saliency, MIT; arXiv 2310.12508), `Classification/unlearn/RL.py` and `impl.py` at commit
3152cfe. Kept: random labels of the forget batches drawn on the host; SGD with momentum 0.9, decay 5e-4, rate 0.01;
gradients multiplied by the saliency mask; masked weights set back and their momentum masked, with one
`torch.count_nonzero` read by the host for each weight; in the retain pass top-1 accuracy and loss read with `.item()`
each batch; normalisation inside the model; float32.

**supreme** (supreme-unlearning 0.1.5 on PyPI, MIT), `utils/training/training_utils.py` and
`methods/unlearning_methods/finetune.py` for the retain step: cross-entropy, the loss copied to the host before the
backward pass, SGD with momentum 0.9, decay 5e-4, rate 0.02. `methods/unlearning_methods/bad_teacher.py` for the
forget step: two teachers on every batch, KL divergence between softmaxes, Adam with rate 1e-4, the loss copied to the
host. On CUDA its `fabric_setup.py` allows TF32 (`set_float32_matmul_precision("high")`). Of its precisions, "32-true".

Of both: images are decoded, flipped and made floats one by one on the host, collated, and moved without pinning
(SalUn) or pinned (supreme). Left out of both: worker processes of the loader, because contenders that wait must not
compute; random crops, because these images have the model's size; printing and Lightning Fabric's wrappers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.harness.cases import StepCase
from bench.training_cost.steps import digits
from engine.data import Preprocessing, Samples
from engine.models.preprocessing import preprocessing_of

SALUN_NOTE = {
    "retain": "cross-entropy; SGD, saliency mask, no clipping",
    "forget": "other loss: cross-entropy on random labels; SGD, saliency mask",
}
SUPREME_NOTE = {
    "retain": "cross-entropy; SGD, no clipping",
    "forget": "other loss: KL to two teachers on the same image; Adam",
}
_SALIENT = 0.5  # share of the weights that SalUn's mask lets change


class _Pictures(Dataset[tuple[Tensor, int]]):
    """PIL images of the model's size, transformed one by one as torchvision's data sets do it."""

    def __init__(self, samples: Samples, preprocessing: Preprocessing, transform: transforms.Compose) -> None:
        channels = len(preprocessing.mean)
        pixels = (preprocessing.resize(samples.tensor(i, channels)) for i in range(len(samples)))
        self.images = [Image.fromarray(np.ascontiguousarray(each.permute(1, 2, 0).numpy())) for each in pixels]
        self.labels, self.transform = samples.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


class _Normalise(nn.Module):
    """Normalises by channel inside the model."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class _Loop:
    """A model with timm's own attention, and batches in an endless shuffled order."""

    def __init__(self, case: StepCase, device: torch.device, normalised: bool, pinned: bool) -> None:
        """normalised: the loader normalises, not the model."""
        self.case, self.batch, self.device = case, case.batch, device
        model = case.model.spec().build(seed=0)
        preprocessing = preprocessing_of(model)
        steps = [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        if normalised:
            steps.append(transforms.Normalize(preprocessing.mean, preprocessing.std))
            self.model = model.to(device)
        else:
            self.model = nn.Sequential(_Normalise(preprocessing.mean, preprocessing.std), model).to(device)
        pictures = _Pictures(digits(case, None), preprocessing, transforms.Compose(steps))
        pin = pinned and device.type == "cuda"
        self.loader = DataLoader(pictures, case.batch, shuffle=True, drop_last=True, pin_memory=pin)
        self.batches = self._endless()
        self.model.train()

    def _endless(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def close(self) -> None:
        """Do nothing: there are no resources beyond the object."""


class SalunStep(_Loop):
    """One batch of SalUn's random-label pass (forget) or of its retain pass. Returns the loss []."""

    def __init__(self, case: StepCase, device: torch.device) -> None:
        super().__init__(case, device, normalised=False, pinned=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        generator = torch.Generator().manual_seed(0)
        self.mask = {
            name: (torch.rand(weight.shape, generator=generator) < _SALIENT).float().to(device)
            for name, weight in self.model.named_parameters()
        }
        self.start = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def __call__(self) -> Tensor:
        images, labels = next(self.batches)
        images = images.to(self.device)
        if self.case.phase == "forget":
            labels = torch.randint(0, self.case.model.num_classes, labels.shape)
        labels = labels.to(self.device)
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        for name, weight in self.model.named_parameters():
            if weight.grad is not None:
                weight.grad.mul_(self.mask[name])
        self.optimizer.step()
        self._keep_the_others()
        if self.case.phase == "retain":
            right = logits.detach().float().argmax(dim=1).eq(labels).float().sum() * (100 / len(labels))
            self.losses.append(loss.item())
            self.accuracies.append(right.item())
        return loss.detach()

    @torch.no_grad()
    def _keep_the_others(self) -> None:
        """Restore the weights outside the mask: momentum and decay would change them."""
        for name, weight in self.model.named_parameters():
            mask = self.mask[name]
            others = 1 - mask
            if not torch.count_nonzero(others):
                continue
            weight.mul_(mask).add_(self.start[name] * others)
            self.optimizer.state[weight]["momentum_buffer"].mul_(mask)


class SupremeStep(_Loop):
    """One batch of supreme's fine-tuning (retain) or of its bad teacher (forget). Returns the loss []."""

    def __init__(self, case: StepCase, device: torch.device) -> None:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        super().__init__(case, device, normalised=True, pinned=True)
        self.losses: list[Tensor] = []
        weights = self.model.parameters()
        self.optimizer: torch.optim.Optimizer
        if case.phase == "retain":
            self.optimizer = torch.optim.SGD(weights, lr=0.02, momentum=0.9, weight_decay=5e-4)
        else:
            self.optimizer = torch.optim.Adam(weights, lr=1e-4)
            self.original = copy.deepcopy(self.model).eval()
            self.incompetent = case.model.spec().build(seed=1).to(device).eval()

    def __call__(self) -> Tensor:
        images, labels = (each.to(self.device, non_blocking=True) for each in next(self.batches))
        loss = self._teach(images) if self.case.phase == "forget" else self._fit(images, labels)
        return loss.detach()

    def _fit(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.detach().cpu())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _teach(self, images: Tensor) -> Tensor:
        forget = torch.ones(len(images), 1, device=self.device)  # 1: learn from the incompetent teacher
        with torch.no_grad():
            original, incompetent = self.original(images).softmax(1), self.incompetent(images).softmax(1)
        student = self.model(images).log_softmax(1)
        self.optimizer.zero_grad()
        loss = F.kl_div(student, forget * incompetent + (1 - forget) * original, reduction="none").mean()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach().cpu())
        return loss
