"""Rates of a method on this machine, from a few real steps of the engine on random images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from engine.config import RunConfig, split_options
from engine.data import from_dataset
from engine.methods import get_method
from engine.models.info import model_info
from engine.models.spec import ModelSpec
from engine.run.unlearn import unlearn
from engine.runtime.device import autocast, resolve_device, resolve_precision

# Steps of the two runs whose difference is timed, so that start and warm-up of a run do not count.
_STEPS = (1, 4)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measured rates.

    Attributes:
        rates: Images a second by kind (`engine.plan.work.Work.kind`).
        words: What was timed, and on which device.
    """

    rates: dict[str, float]
    words: str


def measure_rates(spec: ModelSpec, method: str, options: Mapping[str, Any], batch_size: int, device: str) -> Measured:
    """Time forget and retain steps, masks and teacher outputs of the method in this process.

    Weights and images are random: the time depends on their shapes alone. Decoding and communication are not included.

    Args:
        spec: The model.
        method, options: The method and its options.
        batch_size: Samples of a step.
        device: Device to measure.

    Raises:
        UserError: The device does not exist on this machine.
    """
    target = resolve_device(device)
    model = spec.build(seed=0)
    info = model_info(model)
    forget, retain = (
        from_dataset(_Random(count, (info.in_chans, *info.input_size), spec.num_classes), name)
        for name, count in (("forget", 2 * batch_size), ("retain", batch_size * max(_STEPS)))
    )
    run, config = split_options(options, get_method(method).Config)
    # Enough passes that no phase ends before its steps are done; a phase left out stays out.
    epochs = {
        field.name: float(2 * max(_STEPS)) if getattr(config, field.name) else 0.0
        for field in dataclasses.fields(config)
        if field.name.endswith("epochs")
    }
    seconds = []
    for steps in _STEPS:
        changed = {
            **options,
            **epochs,
            "batch_size": batch_size,
            "max_steps": steps,
            "device": str(target),
            "workers": 0,
            "augment": "none",
            "collapse_drop": 100.0,
            "accumulation_steps": 1,
        }
        result = unlearn(model, forget, retain, method=method, config=changed, validation=retain.subset([0]))
        seconds.append(result.seconds)
    rates = {}
    for phase in ("forget", "retain"):
        key = f"{phase}_phase"
        if key in seconds[0]:
            rates[phase] = batch_size * _steps_a_second(seconds[0][key], seconds[1][key])
    if method == "lethe" and seconds[1]["prepare"] > 0:
        rates["teacher"] = len(forget) / seconds[1]["prepare"]
    rates["forward"] = _forward_rate(model.to(target), batch_size, info.in_chans, info.input_size, run)
    rates["training"] = rates.get("retain", rates.get("forget", rates["forward"]))
    where = (
        torch.cuda.get_device_name(target) if target.type == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    )
    return Measured(
        rates,
        f"measured here on {where}: {_STEPS[1] - _STEPS[0]} steps a phase at batch {batch_size} by one process, random "
        "images already decoded; communication between ranks is not in it",
    )


def _steps_a_second(few: float, many: float) -> float:
    """Return the rate of the steps by which two runs of these seconds differ.

    If the longer one took less, the other was disturbed; its own steps then count with its start.
    """
    return (_STEPS[1] - _STEPS[0]) / (many - few) if many > few else _STEPS[1] / max(many, 1e-9)


class _Random(Dataset[Any]):
    def __init__(self, count: int, shape: tuple[int, ...], classes: int) -> None:
        self.shape, self.labels = shape, np.arange(count) % classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(int(index))
        return torch.randn(self.shape, generator=generator), int(self.labels[index])


@torch.inference_mode()
def _forward_rate(model: torch.nn.Module, batch: int, channels: int, size: tuple[int, int], run: RunConfig) -> float:
    device = next(model.parameters()).device
    precision = resolve_precision(run.precision, device)
    images = torch.randn(batch, channels, *size, device=device)

    def passes(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            with autocast(device, precision):
                output = model.eval()(images)
        float(output.flatten()[0])  # waits for the device
        return time.perf_counter() - began

    passes(1)
    return batch * 2 / max(passes(2), 1e-9)
