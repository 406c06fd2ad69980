"""A method on a tiny model and a few digits, without the loop around it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from toys import few, tiny_vit

from engine.config import split_options
from engine.data import Batch, Loader, Samples
from engine.methods import Context, Method, get_method
from engine.models.preprocessing import preprocessing_of
from engine.models.vit import describe


def make(name: str, train: Samples, model: torch.nn.Module | None = None, **options: Any) -> Method:
    model = model or tiny_vit()
    run, config = split_options({"batch_size": 8, "precision": "fp32", **options}, get_method(name).Config)
    preprocessing = preprocessing_of(model)
    context = Context(
        run=run,
        original=copy.deepcopy(model).requires_grad_(False),
        info=describe(model),
        forget=few(train, 20),
        retain=train.subset(range(20, 60)),
        preprocessing=preprocessing,
        device=torch.device("cpu"),
        autocast=lambda: torch.autocast("cpu", enabled=False),
        loader=lambda samples, augment: Loader(samples, preprocessing, batch_size=run.batch_size, augment=augment),
    )
    return get_method(name)(config, context)


def batch_of(method: Method, which: str = "forget") -> Batch:
    samples = method.context.forget if which == "forget" else method.context.retain
    return next(iter(method.context.loader(samples, "none").epoch(0)))
