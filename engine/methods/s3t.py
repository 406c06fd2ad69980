"""S3T, sequence-aware sharded sliced training (Chowdhury et al., Towards Scalable Exact Machine Unlearning Using
Parameter-Efficient Fine-Tuning, ICLR 2025, arXiv 2406.16257): exact, for models that were trained for it.

Training (`lethe train --sliced`; here: an empty forget set). The samples are dealt into slices S_1 .. S_L and the
blocks into L groups, the top group first. Stage m = 1 .. L trains low-rank updates of group m and the head on S_1 to
S_m; all other weights are frozen. The updates and the head after each stage are kept (engine/models/slice_stages.py).

    model of stage m = base + updates of stages 1 .. m, with the head of stage m

That is one sequence of the slices. With `sequences=B` there are B such trainings from the same base, sequence s over
S_s .. S_L, S_1 .. S_(s-1): rotations, as in the paper's public code (`get_cyclic`). That costs B trainings; one model
is served.

Deletion of F. Let m be the first place in a sequence of a slice that holds a sample of F. Stages below m were not
trained on any of F, and nothing that they depend on was chosen by F. Stages m .. L are dropped, and the model of stage
m - 1 remains of the sequence. The sequence with the most remaining stages is served, the first of several. With
`retrain_dropped` all dropped stages are trained again on the retain set. If all sequences lose their first stage, no
stage remains, and `retrain_dropped` is necessary.

Without a pretrained base (`base=fresh`) stage 1 trains all weights on its slice, and the L - 1 groups are those of the
later stages: random blocks that stay frozen learn little (docs/methods.md), and if stage 1 is dropped, all are.

Why it is exact. Stage m is a function of the base, the recipe, the seed and the retain samples of its slices alone.
The slice of a sample is a hash of (seed, id), so it does not depend on the other samples. A stage takes its samples in
the order of those hashes. Rates, order and dropout are drawn from the seed, sequence and m. So the stages below m are
those that a training without F would have made, and with `retrain_dropped` so is the whole model: the same bits, on
the CPU. (Which of those stages are served depends on F: on the slices that hold its samples.)
Exactness is meant for the samples and relative to the base, which must not have been trained on them: pretrained on
other data, or random. It does not cover choices that a user makes by results (which seed, which options).

Departures from the paper and its public code:
- There, slices are cut by position, so that a deletion shifts other samples across the cuts; the best epoch is chosen
  on test data; and one head is trained in all stages, so that deactivating updates alone leaves that head. Here slices
  are hashed, epochs fixed, and each stage has its own head, initialised with that of the stage before.
- One shard: the paper trains several models on parts of the data, which vote; a checkpoint here is one model.
- At most L sequences: sequences other than the rotations, or for slices of unequal risk, are not supported.
- Low-rank updates of all linear layers of a block without scale and dropout (engine.models.trainable), not of q and v
  alone.
- `base=fresh`: the paper's base is always pretrained.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import RunConfig, positive_or_null, require, to_dict
from engine.core.method import Context, Method, register
from engine.core.phase import Phase
from engine.data import Batch, Samples
from engine.errors import UserError
from engine.methods.gs_lora import LORA_LR_PER_WIDTH
from engine.models.checkpoint import weights_sha256
from engine.models.losses import cross_entropy
from engine.models.slice_stages import Stages, classifier_weights, places_of, slices_of, stages_of, tokens_of, untouched
from engine.models.spec import set_folder, spec_of
from engine.models.trainable import LowRank, low_ranks, restrict

if TYPE_CHECKING:
    from engine.core.result import UnlearnResult

# Options that determine the bits of a stage: those of the method, and those of the run.
_OURS = ("slices", "sequences", "epochs", "lr", "rank", "base", "base_epochs", "base_lr")
_RUNS = (
    "seed",
    "batch_size",
    "accumulation_steps",
    "max_steps",
    "precision",
    "attention",
    "decode",
    "on_bad_image",
    "augment",
    "weight_decay",
    "grad_clip",
)
# Options of a run that do not change the result. All others would change the data or the weights of a stage, so they
# must keep their defaults.
_HOW = (
    "device",
    "workers",
    "timeout",
    "checkpoint_every",
    "gradient_checkpointing",
    "compile",
    "kernels",
    "collapse_drop",
    "max_bad_share",
    "evaluation_samples",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class S3TConfig:
    """Options of S3T. All except `retrain_dropped` describe the training; an unlearning run takes them from the
    checkpoint.

    Attributes:
        retrain_dropped: Train the dropped stages again, at that cost; else the model of the remaining stages is served.
        slices: L.
        sequences: B, at most L; each is a training of its own.
        epochs: Passes of each stage over its slices, so epochs (L + 1) / 2 over all samples.
        lr: Peak learning rate; null: 0.64 / width.
        rank: Rank of the updates.
        base: fresh (weights drawn from the seed) | given (those of the model passed to the training, including the
            head; it must not have been trained on the training samples).
        base_epochs: Passes of stage 1 if the base is fresh; null: epochs x slices, as many steps as over all samples.
        base_lr: Peak learning rate of stage 1 if the base is fresh.
    """

    retrain_dropped: bool = False
    slices: int = 4
    sequences: int = 1
    epochs: float = 30.0
    lr: float | None = None
    rank: int = 16
    base: Literal["fresh", "given"] = "fresh"
    base_epochs: float | None = None
    base_lr: float = 1e-3

    def __post_init__(self) -> None:
        require(self.slices >= 2, "slices", self.slices, "at least 2")
        require(1 <= self.sequences <= self.slices, "sequences", self.sequences, f"1 to {self.slices}, the slices")
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        positive_or_null(self, "lr")
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        positive_or_null(self, "base_epochs")
        require(self.base_lr > 0, "base_lr", self.base_lr, "above 0")


@register
class S3T(Method):
    name = "s3t"
    summary = "drops the stages of a sliced training that used a sample, or trains them again; exact"
    Config = S3TConfig
    one_process = "each stage freezes other weights than the one before, after DeepSpeed has partitioned them"
    exact = True
    needs_checkpoint = "`lethe train --sliced`"
    after_collapse = "Train the dropped stages again (--set retrain_dropped=true)"

    _remaining: Sequence[int] = ()  # stages of each sequence that remain after the deletion; empty: no deletion

    def __init__(self, config: S3TConfig, context: Context) -> None:
        super().__init__(config, context)
        run = context.run
        defaults = to_dict(RunConfig())
        for key, value in to_dict(run).items():
            if key not in (*_RUNS, *_HOW) and value != defaults[key]:
                raise UserError(
                    f"option {key}={value!r}: s3t sets which weights and samples a stage trains on; leave it out"
                )
        self._stages: Stages | None = None
        self._groups: list[list[LowRank]] = []
        self._base: dict[str, Tensor] = {}
        self._plain: dict[str, nn.Parameter] = {}
        self._initial: list[
            tuple[nn.Parameter, Tensor]
        ] = []  # trained weights with their values at the start of a sequence
        # The sequence that is in the model; 0: none yet.
        self._sequence = 0
        self._heads: dict[int, dict[str, Tensor]] = {}
        self._trained: dict[str, Tensor] = {}  # all weights except updates and head, after stage 1
        if self._training:
            self.recipe = {key: getattr(config, key) for key in _OURS} | {key: getattr(run, key) for key in _RUNS}
            self.recipe["lr"] = self.learning_rate(config.lr, LORA_LR_PER_WIDTH)
        else:
            self._stages = self._load_stages()
            self.recipe = self._stages.recipe
            self._refuse_other_recipe(self.recipe)
        self._tokens = tokens_of(context.retain, self.recipe["seed"])
        slices, sequences = self.recipe["slices"], self.recipe["sequences"]
        # Remaining stages of each sequence, except the sequence in the model.
        self._kept: list[list[dict[str, Tensor]]] = [[] for _ in range(sequences)]
        if self._stages is not None:
            self._remaining = untouched(self._stages, context.retain, context.forget)
            self._kept = [kept[:left] for kept, left in zip(self._stages.kept, self._remaining, strict=True)]
            if not any(self._remaining) and not config.retrain_dropped:
                begin = "slice 1" if sequences == 1 else f"each of the slices 1 to {sequences}"
                raise UserError(
                    f"s3t: some of the samples are in {begin}, which every stage was trained on, so no trained stage "
                    "remains; --set retrain_dropped=true trains all stages again"
                )
        empty = np.setdiff1d(np.arange(1, sequences + 1), slices_of(self._tokens, slices))
        if len(empty) and self._trains:
            raise UserError(
                f"{context.retain.name}: none of its {len(context.retain)} samples is in slice {empty[0]} of {slices}, "
                "so a stage 1 has no samples; train a new model with fewer slices"
            )

    @property
    def _training(self) -> bool:
        return not len(self.context.forget)

    @property
    def _trains(self) -> bool:
        return self._training or self.config.retrain_dropped

    @property
    def _served(self) -> int:
        """The sequence whose model is served: the first of those with the most remaining stages."""
        return 1 if self._trains or not self._remaining else 1 + self._remaining.index(max(self._remaining))

    def _load_stages(self) -> Stages:
        stages = stages_of(self.context.original)
        if stages is None:
            raise UserError(
                "s3t: the checkpoint was not trained in slices (its folder has no stages.safetensors), so there is no "
                "stage to drop; train one by `lethe train --sliced`, or use --method retrain"
            )
        if weights_sha256(self.context.original) != stages.served:
            raise UserError(
                "s3t: the checkpoint's weights differ from those of its stages: they were changed afterwards, and "
                "their training samples are not known; use the folder written by the sliced training or last deletion"
            )
        return stages

    def _refuse_other_recipe(self, recipe: dict[str, Any]) -> None:
        defaults = S3TConfig()
        for key in _OURS:
            value = getattr(self.config, key)
            if value not in (getattr(defaults, key), recipe[key]):
                raise UserError(
                    f"option {key}={value!r}: the checkpoint was trained with {recipe[key]!r}; leave it out"
                )
        other = [key for key in _RUNS if getattr(self.context.run, key) != recipe[key]]
        if other and self.config.retrain_dropped:
            remedy = " ".join(f"--set {key}={'null' if recipe[key] is None else recipe[key]}" for key in other)
            raise UserError(
                f"option {other[0]}={getattr(self.context.run, other[0])!r}: dropped stages are trained again by the "
                f"recipe of the others; give {remedy}"
            )

    def initial_model(self, model: nn.Module) -> nn.Module:
        recipe = self.recipe
        if self._stages is not None:
            model = spec_of(model).build()
            model.load_state_dict(self._stages.base)
        elif recipe["base"] == "fresh":
            model = spec_of(model).build(seed=recipe["seed"])
        self._base = {name: _copy(value) for name, value in model.state_dict().items()}
        self._head = classifier_weights(model)
        heads = {id(weight) for weight in self._head.values()}
        plain = {name: weight for name, weight in model.named_parameters() if id(weight) not in heads}
        restrict(model, f"lora:{recipe['rank']}", recipe["seed"])
        self._groups = self._updates_by_stage(low_ranks(model)[::-1])
        if recipe["base"] == "fresh":
            self._plain = plain
        for weight in (*self._head.values(), *self._plain.values()):
            weight.requires_grad_(True)  # here, so that the optimizer includes them
        weights = [weight for number in range(1, recipe["slices"] + 1) for weight in self._weights_of(number).values()]
        self._initial = [(weight, _copy(weight)) for weight in dict.fromkeys(weights)]
        return model

    def _updates_by_stage(self, blocks: list[list[LowRank]]) -> list[list[LowRank]]:
        """Return the updates of each stage.

        Args:
            blocks: Updates of each block, top block first.
        """
        slices = self.recipe["slices"]
        first: list[list[LowRank]] = [[]] if self.recipe["base"] == "fresh" else []
        count = slices - len(first)
        if count > len(blocks):
            raise UserError(
                f"option slices={slices}: a stage needs the updates of at least one block, and the model has "
                f"{len(blocks)}; give at most {len(blocks) + len(first)}"
            )
        cuts = np.linspace(0, len(blocks), count + 1).round().astype(int)
        return first + [
            [layer for block in blocks[start:stop] for layer in block] for start, stop in itertools.pairwise(cuts)
        ]

    def _weights_of(self, number: int) -> dict[str, nn.Parameter]:
        """Return the weights that a stage trains, by name in the file; the tensors are the model's."""
        updates = {
            f"{i}.{name}": weight
            for i, layer in enumerate(self._groups[number - 1])
            for name, weight in layer.named_parameters()
        }
        plain = {f"plain.{name}": weight for name, weight in self._plain.items()} if number == 1 else {}
        return updates | plain | {f"head.{name}": weight for name, weight in self._head.items()}

    def phases(self) -> list[Phase]:
        """Return one phase for each stage; the remaining stages take no step.

        So a stage has the same number, and with it the same seeds, in every training. The first sequence comes last, so
        that the model holds it at the end and it is served.
        """
        recipe = getattr(self, "recipe", vars(self.config))  # `lethe plan` has no checkpoint
        lr = self.learning_rate(recipe["lr"], LORA_LR_PER_WIDTH)
        phases = []
        sequences = range(recipe["sequences"], 0, -1) if self._trains else [self._served]
        for sequence, number in itertools.product(sequences, range(1, recipe["slices"] + 1)):
            all_weights = number == 1 and recipe["base"] == "fresh"
            epochs = (recipe["base_epochs"] or recipe["epochs"] * recipe["slices"]) if all_weights else recipe["epochs"]
            trains = self._trains and number > (self._remaining[sequence - 1] if self._remaining else 0)
            phases.append(
                Phase(
                    name=f"stage_{number}" if sequence == 1 else f"sequence_{sequence}_stage_{number}",
                    samples="retain",
                    epochs=epochs if trains else 0,
                    lr=recipe["base_lr"] if all_weights else lr,
                    schedule="one_cycle" if trains else "constant",
                    retain_part=number / recipe["slices"],
                )
            )
        return phases

    def samples_of(self, phase: Phase) -> Samples:
        sequence, number = _sequence_and_stage(phase)
        slices = self.recipe["slices"]
        chosen = np.flatnonzero(places_of(slices_of(self._tokens, slices), sequence, slices) <= number)
        if not len(chosen):  # a stage without steps; the training loop needs at least one sample
            chosen = np.arange(1)
        return self.context.retain.subset(
            chosen[np.argsort(self._tokens[chosen], kind="stable")], f"{self.context.retain.name} ({phase.name})"
        )

    def prepare(self, phase: Phase) -> None:
        """Set which weights the stage trains; also called if a run is resumed within the phase."""
        sequence, number = _sequence_and_stage(phase)
        if sequence != self._sequence:
            if self._sequence:
                self._kept[self._sequence - 1] = self._stages_of_model(self.recipe["slices"])
            self._sequence, self._heads, self._trained = sequence, {}, {}
        elif number > 1 and number - 1 not in self._heads:
            self._heads[number - 1] = _copies(self._head)
            self._keep_stage_1()
        for group in self._groups:
            for layer in group:
                layer.requires_grad_(False)
        for weight in self._plain.values():
            weight.requires_grad_(False)
        for weight in self._weights_of(number).values():
            weight.requires_grad_(True)

    @torch.no_grad()
    def edit(self, model: nn.Module, phase: Phase) -> None:
        """Load the initial weights and the remaining stages of a sequence into the model, at its first stage."""
        if _sequence_and_stage(phase)[1] > 1:
            return
        for weight, value in self._initial:
            weight.copy_(value)
        for number, stage in enumerate(self._kept[self._sequence - 1], 1):
            self._heads[number] = {name: stage[f"head.{name}"] for name in self._head}
            for name, weight in self._weights_of(number).items():
                weight.copy_(stage[name])
        self._keep_stage_1()

    def _keep_stage_1(self) -> None:
        """Copy the weights of stage 1 before the updates of later stages are merged into them."""
        if 1 in self._heads and not self._trained:
            self._trained = _copies(self._plain)

    def loss(self, model: nn.Module, batch: Batch, phase: Phase) -> dict[str, Tensor]:
        return {"retain_ce": cross_entropy(model, batch)}

    def state(self) -> dict[str, Any]:
        """Return the stages of finished sequences and the heads of the current one."""
        return {"sequence": self._sequence, "heads": self._heads, "kept": self._kept[self._sequence :]}

    def load_state(self, state: dict[str, Any]) -> None:
        self._sequence, self._heads = state["sequence"], state["heads"]
        self._kept[self._sequence :] = state["kept"]  # sequences that were trained earlier
        self._keep_stage_1()  # the model has its weights already

    def on_finish(self, result: UnlearnResult) -> None:
        """Write stages.safetensors next to the model, and the remaining and dropped stages into the record."""
        slices, served = self.recipe["slices"], self._served
        last = slices if self._trains else self._remaining[served - 1]
        before = [0] * len(self._kept) if self._stages is None else [len(kept) for kept in self._stages.kept]
        left = self._remaining or before
        result.config["stages"] = {
            "slices": slices,
            "sequence": served,
            "served": last,
            "kept": list(left),
            "dropped": [had - has for had, has in zip(before, left, strict=True)],
            "recipe": self.recipe,
        }
        set_folder(result.model, result.output_dir)
        if result.output_dir is None or not self.context.world.is_main:
            return
        self._kept[served - 1] = self._stages_of_model(last)
        Stages(
            recipe=self.recipe,
            served=weights_sha256(result.model),
            members=np.sort(self._tokens),
            base=self._base,
            kept=self._kept,
        ).write(result.output_dir)

    def _stages_of_model(self, last: int) -> list[dict[str, Tensor]]:
        """Return copies of the first `last` stages of the sequence in the model, undoing merged updates."""
        heads = {**self._heads, last: _copies(self._head)}
        kept = []
        for number in range(1, last + 1):
            before_merge = {
                **{f"plain.{name}": weight for name, weight in self._trained.items()},
                **{f"head.{name}": weight for name, weight in heads[number].items()},
            }
            kept.append(
                {
                    name: before_merge[name] if name in before_merge else _copy(weight)
                    for name, weight in self._weights_of(number).items()
                }
            )
        return kept


def _copies(weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: _copy(weight) for name, weight in weights.items()}


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().cpu().clone()


def _sequence_and_stage(phase: Phase) -> tuple[int, int]:
    """Return the sequence and the stage number of a phase, by its name."""
    sequence, number = phase.name.split("stage_")
    return int(sequence.removeprefix("sequence_").removesuffix("_") or 1), int(number)
