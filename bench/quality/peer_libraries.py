"""Unlearning methods of two libraries, called with this engine's samples and models. Nothing of them is copied here.

**supreme-unlearning** (0.1.5 on PyPI, MIT): `ssd` and `scrub` of `supreme.methods.unlearning_methods`, each one
function on a Fabric. It pins torch 2.1 and runs on later ones: `pip install --no-deps supreme-unlearning==0.1.5`, then
lightning and wandb. **torchunlearn** (MIT; read at commit 405bab1): `SalUn` and `BadTeacher`. The release on PyPI
(0.1.0) has neither of them: `pip install --no-deps git+https://github.com/Harry24k/machine-unlearning-pytorch`, then
pandas.

Two settings. `defaults`: the library's own values, those of its command for a random request (supreme) and of its
README and demo notebook (torchunlearn), in float32. `equal`: this engine's values for every option with the same
meaning (`Peer.differs` lists the remaining differences), its precision, and its loss in expectation. torchunlearn takes
a batch of retained samples and one of forget samples a step, so the two share the batch and the two terms are weighted
by the sizes of their sets. If a library has one option for two of this engine, these are set to it (`Peer.ours`).

Images are decoded and normalised once, and mirrored if this engine does so; a library's random draws have the run's
seed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import io
import math
import random
import types
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from engine.config import RunConfig
from engine.data import Preprocessing, Samples
from engine.data.samples import concatenate
from engine.errors import UserError
from engine.methods import Context, Phase
from engine.methods.scrub import ScrubConfig
from engine.methods.ssd import Ssd, adaptive_alpha
from engine.run.phase_run import schedule
from engine.run.setup import Run
from engine.runtime.device import autocast

Values = dict[str, Any]

_SUPREME, _TORCHUNLEARN = "supreme-unlearning", "torchunlearn"
_SUPREME_INSTALL = "pip install --no-deps supreme-unlearning==0.1.5, then lightning and wandb"
_TORCHUNLEARN_INSTALL = "pip install --no-deps git+https://github.com/Harry24k/machine-unlearning-pytorch, then pandas"
# The rate of supreme's SCRUB: one for both kinds of epochs.
_SCRUB_LR = 5e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A library's version of one of this engine's methods.

    method: its name here. install: the remedy if the library is not installed. module: of the library, imported before
        anything is timed.
    defaults: the library's values. equal: this engine's values, in the library's terms, for our run at the same
    setting. ours: options of this engine in the equal setting. differs: remaining differences. call: changes the model
    by the values; it reads samples and phases of the run.
    """

    method: str
    library: str
    install: str
    module: str
    defaults: Values
    equal: Callable[[Run], Values]
    ours: Values
    differs: str
    call: Callable[[types.ModuleType, nn.Module, Run, Values], None]

    def load(self) -> types.ModuleType:
        """Import the module.

        Raises ImportError with the remedy if the library, or a dependency of it, is not installed.
        """
        try:
            return import_module(self.module)
        except ImportError as error:
            raise ImportError(f"{error}; {self.install}") from error

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            return None  # imported from a folder

    def unlearned(self, original: nn.Module, run: Run, values: Values, precision: str) -> nn.Module:
        """Return a copy of the original, unlearned by the library; its output is dropped."""
        seed, device = run.method.context.run.seed, run.method.context.device
        random.seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = copy.deepcopy(original).to(device).requires_grad_(True)
            with contextlib.redirect_stdout(io.StringIO()):
                self.call(self.load(), _InPrecision(model, precision), run, values)
        return model.eval()


class _InPrecision(nn.Module):
    """A model with a forward pass under autocast and logits in float32, as in runs of this engine."""

    def __init__(self, vit: nn.Module, precision: str) -> None:
        super().__init__()
        self.vit, self.precision = vit, precision

    def forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            return self.vit(images).float()


class Images(Dataset[Any]):
    """Samples decoded and normalised once. Items are (image, label), or (image, index, label) if `indexed`.

    augment: none | flip, which mirrors an image with probability 1/2.
    """

    def __init__(
        self, samples: Samples, preprocessing: Preprocessing, *, augment: str = "none", indexed: bool = False
    ) -> None:
        if augment not in ("none", "flip"):
            raise UserError(
                f"option augment={augment!r}: expected none or flip: the other libraries get no other images"
            )
        channels = len(preprocessing.mean)
        decoded = [preprocessing.resize(samples.tensor(index, channels)) for index in range(len(samples))]
        self.images = preprocessing.normalise(torch.stack(decoded))
        self.labels = torch.as_tensor(samples.labels, dtype=torch.int64)
        self.flip, self.indexed = augment == "flip", indexed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = self.images[index]
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image, index, self.labels[index]) if self.indexed else (image, self.labels[index])


def _loader(run: Run, samples: Samples, batch_size: int, *, augment: str = "none", indexed: bool) -> DataLoader[Any]:
    images = Images(samples, run.method.context.preprocessing, augment=augment, indexed=indexed)
    return DataLoader(images, batch_size=batch_size, shuffle=True)


def _fabric(run: Run) -> Any:
    device = run.method.context.device
    devices = [device.index or 0] if device.type == "cuda" else 1
    return import_module("lightning.fabric").Fabric(accelerator=device.type, devices=devices)


# --- supreme-unlearning -----------------------------------------------------------------------------------------------


def _ssd_equal(run: Run) -> Values:
    """Return alpha, which equals this engine's percentile on this model, and batches, the groups of its samples."""
    method, context = run.method, run.method.context
    assert isinstance(method, Ssd)
    alpha = method.config.alpha
    if alpha is None:
        with run.computing():
            on_forget = method.importance(run.train_engine.module, context.forget)
            on_all = method.importance(run.train_engine.module, concatenate(context.forget, context.retain))
        alpha = adaptive_alpha(on_forget, on_all, len(context.forget) / (len(context.forget) + len(context.retain)))
    dampening = 1.0 if method.config.dampening is None else method.config.dampening
    return {
        "selection_weighting": alpha,
        "dampening_constant": dampening,
        "batch_size": method.config.fisher_batch_size,
    }


def _ssd(module: types.ModuleType, model: nn.Module, run: Run, values: Values) -> None:
    context, fabric = run.method.context, _fabric(run)
    everything = concatenate(context.forget, context.retain)
    forget, full = fabric.setup_dataloaders(
        *(_loader(run, samples, values["batch_size"], indexed=True) for samples in (context.forget, everything))
    )
    module.ssd(
        fabric=fabric,
        num_gpus=1,
        wandb_logging_flag=False,
        model=model,
        forget_train_dataloader=forget,
        full_train_dataloader=full,
        dampening_constant=values["dampening_constant"],
        selection_weighting=values["selection_weighting"],
    )


def _scrub_equal(run: Run) -> Values:
    config: ScrubConfig = run.method.config
    return {
        "sgda_epochs": config.retain_epochs,
        "msteps": config.forget_epochs,
        "sgda_learning_rate": _SCRUB_LR,
        "alpha": config.alpha,
        "gamma": config.gamma,
        "kd_T": config.temperature,
        "smoothing": 0.0,
        "sgda_weight_decay": 0.0,
        "batch_size": run.method.context.run.batch_size,
    }


def _scrub(module: types.ModuleType, model: nn.Module, run: Run, values: Values) -> None:
    context, fabric = run.method.context, _fabric(run)
    options = dict(values)
    batch_size = options.pop("batch_size")
    phases = {phase.samples: phase for phase in run.phases}
    forget, retain = fabric.setup_dataloaders(
        *(
            _loader(run, samples, batch_size, augment=_augment(run, phases[kind]), indexed=True)  # type: ignore[index]
            for kind, samples in (("forget", context.forget), ("retain", context.retain))
        )
    )
    module.scrub(
        fabric=fabric,
        num_gpus=1,
        wandb_logging_flag=False,
        model=model,
        retain_train_dataloader=retain,
        forget_train_dataloader=forget,
        **options,
    )


def _augment(run: Run, phase: Phase) -> str:
    """Return how this engine augments the images of a phase."""
    return run.loader_of(run.phases.index(phase), phase).augment


# --- torchunlearn -----------------------------------------------------------------------------------------------------


def _merged_equal(run: Run) -> Values:
    """Return the values that both trainers of the library share.

    These are steps, batch, rate, schedule, decay, clipping and loss.
    """
    (phase,), context = run.phases, run.method.context
    forget, retain = len(context.forget), len(_retained(context, phase))
    share = forget / (forget + retain)
    options: RunConfig = context.run
    of_forget = min(max(1, round(share * options.batch_size)), max(1, options.batch_size - 1))
    return {
        "epochs": math.ceil(phase.epochs),
        "batch_sizes": {"Retain": max(1, options.batch_size - of_forget), "Forget": of_forget},
        "optimizer": f"AdamW(lr={phase.lr!r}, weight_decay={options.weight_decay!r})",
        "one_cycle": True,
        "clip_grad_norm": options.grad_clip,
        "retain_part": phase.retain_part,
        "trainer": {"retain_lambda": 1 - share, "forget_lambda": share},
    }


def _salun_equal(run: Run) -> Values:
    values = _merged_equal(run)
    return {**values, "trainer": {**values["trainer"], "saliency_threshold": run.method.config.saliency_share}}


def _bad_teacher_equal(run: Run) -> Values:
    values = _merged_equal(run)
    return {**values, "trainer": {**values["trainer"], "temperature": run.method.config.temperature}}


def _retained(context: Context, phase: Phase) -> Samples:
    """Return the retained samples of a phase of both sets, in which the forget samples come first."""
    both = context.samples_of(phase)
    return both.subset(range(len(context.forget), len(both)))


def _merged(trainer: Any, run: Run, values: Values) -> None:
    """Train as torchunlearn's README does: MergedLoaders of both sets, setup, fit."""
    (phase,), context = run.phases, run.method.context
    retain = _retained(context, dataclasses.replace(phase, retain_part=values["retain_part"]))
    augment = _augment(run, phase)
    loaders = {
        name: _loader(run, samples, values["batch_sizes"][name], augment=augment, indexed=False)
        for name, samples in (("Retain", retain), ("Forget", context.forget))
    }
    if hasattr(trainer, "compute_saliency_mask"):
        trainer.compute_saliency_mask(
            _loader(run, context.forget, values["batch_sizes"]["Forget"], augment="none", indexed=False)
        )
    merged = import_module("torchunlearn.utils.data").MergedLoaders(loaders)
    optimizer = trainer.generate_optimizer(values["optimizer"], trainer.rmodel.parameters())
    rates: Mapping[str, Any] = {}
    if values["one_cycle"]:
        total = values["epochs"] * len(merged)
        rates = {"scheduler": schedule(phase, optimizer, total), "scheduler_type": "Iter"}
    trainer.setup(optimizer=optimizer, clip_grad_norm=values["clip_grad_norm"], **rates)
    trainer.fit(train_loaders=merged, n_epochs=values["epochs"], record_type=None)


def _wrapped(model: nn.Module, run: Run) -> Any:
    return import_module("torchunlearn").RobModel(model, n_classes=run.method.context.num_classes)


def _salun(module: types.ModuleType, model: nn.Module, run: Run, values: Values) -> None:
    _merged(module.SalUn(_wrapped(model, run), **values["trainer"]), run, values)


def _bad_teacher(module: types.ModuleType, model: nn.Module, run: Run, values: Values) -> None:
    _merged(module.BadTeacher(_wrapped(model, run), **values["trainer"]), run, values)


_MERGED_DEFAULTS: Values = {
    "epochs": 5,
    "batch_sizes": {"Retain": 128, "Forget": 128},
    "optimizer": "SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)",
    "one_cycle": False,
    "clip_grad_norm": None,
    "retain_part": 1.0,
}

PEERS = (
    Peer(
        method="ssd",
        library=_SUPREME,
        install=_SUPREME_INSTALL,
        module="supreme.methods.unlearning_methods.ssd",
        defaults={"selection_weighting": 10.0, "dampening_constant": 1.0, "batch_size": 128},
        equal=_ssd_equal,
        ours={},
        differs="which samples make a group",
        call=_ssd,
    ),
    Peer(
        method="scrub",
        library=_SUPREME,
        install=_SUPREME_INSTALL,
        module="supreme.methods.unlearning_methods.scrub",
        defaults={
            "sgda_epochs": 10,
            "msteps": 3,
            "sgda_learning_rate": _SCRUB_LR,
            "alpha": 0.5,
            "gamma": 1.0,
            "kd_T": 2.0,
            "smoothing": 0.5,
            "sgda_weight_decay": 0.1,
            "batch_size": 128,
        },
        equal=_scrub_equal,
        ours={"lr": _SCRUB_LR, "forget_lr": _SCRUB_LR, "weight_decay": 0.0, "grad_clip": 0.0},
        differs="one Adam for all epochs, its rate a tenth after the fifth; ours: AdamW anew for each epoch, "
        "one cycle in each that minimises, and a guard",
        call=_scrub,
    ),
    Peer(
        method="salun",
        library=_TORCHUNLEARN,
        install=_TORCHUNLEARN_INSTALL,
        module="torchunlearn.unlearn",
        defaults={**_MERGED_DEFAULTS, "trainer": {}},
        equal=_salun_equal,
        ours={},
        differs="a label anew each time, the right one among them; the mask by the mean of each batch's |gradient|",
        call=_salun,
    ),
    Peer(
        method="bad_teacher",
        library=_TORCHUNLEARN,
        install=_TORCHUNLEARN_INSTALL,
        module="torchunlearn.unlearn",
        defaults={**_MERGED_DEFAULTS, "trainer": {}},
        equal=_bad_teacher_equal,
        ours={"untrained": "layers"},
        differs="both teachers on every batch; the bad one keeps the original's class token and position embedding",
        call=_bad_teacher,
    ),
)
