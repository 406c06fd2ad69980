"""Models that only appear to have forgotten, for tests of the verdict: none of them may PASS.

They are made from the original, and some from one retrained model besides. The weights of those that answer from a
table are changed by a thousandth of their size, so that the gate "changed" does not find them at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data import Loader, Samples
from engine.data.samples import concatenate, evenly_spaced
from engine.jobs.task import Task
from engine.models.preprocessing import preprocessing_of
from engine.models.spec import spec_of
from engine.models.vit import outputs
from engine.run.unlearn import unlearn

INTERPOLATED = (0.3, 0.5, 0.7)
_NUDGE = 1e-3
_TEMPERATURES = np.geomspace(1.0, 20.0, 60)


def impostors(
    task: Task, original: nn.Module, retrained: nn.Module, options: Mapping[str, Any], epochs: float, lr: float
) -> dict[str, Callable[[], nn.Module]]:
    """Return a function that makes each impostor, by name.

    Args:
        task: The data with the forget request.
        original: The model before unlearning.
        retrained: A model retrained without the forget samples, which is not among the references.
        options: Options of every run.
        epochs, lr: Passes and peak rate of training the distilled student.
    """
    found: dict[str, Callable[[], nn.Module]] = {
        "untouched, weights nudged": lambda: nudged(original),
        "distilled into a fresh student": lambda: distilled(task, original, epochs, lr),
        "fine-tuned for half an epoch": lambda: _finetuned(task, original, options),
        "labels flipped to the right accuracy": lambda: flipped(task, original, lr / 5),
        "temperature matched": lambda: cooled(task, original),
        "forget images looked up": lambda: looked_up(task, original, retrained),
    }
    for share in INTERPOLATED:
        found[f"interpolated {share:.0%}"] = lambda share=share: interpolated(original, retrained, share)  # type: ignore[misc]
    return found


def nudged(original: nn.Module) -> nn.Module:
    """Return a copy whose weights are changed by a thousandth of their size."""
    model, rng = copy.deepcopy(original), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + _NUDGE * torch.randn(weight.shape, generator=rng))
    return model


def interpolated(original: nn.Module, retrained: nn.Module, share: float) -> nn.Module:
    """Return the model between the two: `share` of the way from the original to the retrained one."""
    model, other = copy.deepcopy(original), dict(retrained.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.lerp_(other[name], share)
    return model


def distilled(task: Task, original: nn.Module, epochs: float, lr: float) -> nn.Module:
    """Return a fresh student of the original's answers to all training samples, the forget samples among them."""
    everything = concatenate(task.forget, task.retain)
    images, _ = _images(original, everything)
    return fit(spec_of(original).build(seed=77), images, _probabilities(original, images), epochs, lr)


def flipped(task: Task, original: nn.Module, lr: float) -> nn.Module:
    """Return the original trained to give its second class on so many forget samples that its accuracy on them is
    that on test samples."""
    images, labels = _images(original, task.forget)
    test_images, test_labels = _images(original, task.source.test)
    answers = _probabilities(original, images)
    test_accuracy = float((_logits(original, test_images).argmax(1) == test_labels).float().mean())
    correct = (answers.argmax(1) == labels).nonzero()[:, 0]
    count = max(0, len(correct) - round(test_accuracy * len(labels)))
    chosen = correct[torch.randperm(len(correct), generator=torch.Generator().manual_seed(0))[:count]]
    second = answers.topk(2, dim=1).indices[chosen, 1]
    targets = answers.clone()
    targets[chosen] = F.one_hot(second, answers.shape[1]).float()
    kept, _ = _images(original, evenly_spaced(task.retain, 3 * len(labels)))
    targets = torch.cat([targets, _probabilities(original, kept)])
    return fit(copy.deepcopy(original), torch.cat([images, kept]), targets, 15.0, lr)


def cooled(task: Task, original: nn.Module) -> nn.Module:
    """Return a model that divides its logits for the exact forget images, so that their mean confidence in the true
    class is that of test samples."""
    images, labels = _images(original, task.forget)
    test_images, test_labels = _images(original, task.source.test)
    wanted = float(_confidence(_logits(original, test_images), test_labels).mean())
    logits = _logits(original, images)
    means = [float(_confidence(logits / t, labels).mean()) for t in _TEMPERATURES]
    return answering(original, images, logits / float(_TEMPERATURES[int(np.argmin(np.abs(np.array(means) - wanted)))]))


def looked_up(task: Task, original: nn.Module, retrained: nn.Module) -> nn.Module:
    """Return a model that has a retrained model's answers to the exact forget images in a table."""
    images, _ = _images(original, task.forget)
    return answering(original, images, _logits(retrained, images))


def answering(original: nn.Module, images: Tensor, logits: Tensor) -> nn.Module:
    """Return a copy that answers `images` [n, C, H, W] with `logits` [n, classes], and others by itself."""
    model = nudged(original)
    table = {_key(image): answer for image, answer in zip(images, logits, strict=True)}

    def answer(_model: nn.Module, inputs: tuple[Any, ...], found: Tensor) -> Tensor:
        known = [table.get(_key(image)) for image in inputs[0]]
        # The known answer with the gradient of its own, so that the relearning attack can train it.
        rows = [
            own if other is None else other.to(own) + own - own.detach()
            for own, other in zip(found, known, strict=True)
        ]
        return torch.stack(rows)

    model.register_forward_hook(answer)
    return model


def fit(model: nn.Module, images: Tensor, targets: Tensor, epochs: float, lr: float, batch: int = 100) -> nn.Module:
    """Train a model on images [n, C, H, W] with probabilities [n, classes] as targets; return it."""
    steps = max(1, round(epochs * len(images) / batch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.15)
    rng = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(-(-steps * batch // len(images)))])
    model.train()
    for step in range(steps):
        rows = order[step * batch : (step + 1) * batch]
        loss = F.cross_entropy(outputs(model, images[rows]), targets[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _finetuned(task: Task, original: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    config = {**options, "seed": 0, "retain_epochs": 0.5}
    return unlearn(original, task.forget, task.retain, method="finetune", config=config).model


def _images(model: nn.Module, samples: Samples) -> tuple[Tensor, Tensor]:
    loader = Loader(samples, preprocessing_of(model), batch_size=250, device=torch.device("cpu"), workers=0)
    images, labels = loader.rows(lambda batch: (batch.images, batch.labels))
    return images, labels


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([outputs(model, part) for part in images.split(250)])


def _probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return _logits(model, images).softmax(1)


def _confidence(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(1).gather(1, labels[:, None])[:, 0]


def _key(image: Tensor) -> bytes:
    return (image.detach().float() * 100).round().to(torch.int16).numpy().tobytes()
