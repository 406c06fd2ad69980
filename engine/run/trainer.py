"""Run phases of optimizer steps, with the collapse guard, early stopping, history, checkpoints and resume."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import operator
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import RunConfig
from engine.core.plausibility import chance_of, is_far_below, is_near_chance
from engine.core.result import AfterPhase, Progress, UnlearnResult
from engine.data import Batch, Loader, Samples
from engine.errors import RunStopped, UserError
from engine.methods import Method, Phase
from engine.models.attention import attention_backend
from engine.models.checkpoint import save_checkpoint
from engine.models.predict import predict
from engine.models.spec import ModelSpec
from engine.models.trainable import merge
from engine.run.collapse_guard import CollapseGuard, accuracy_before
from engine.run.early_stopping import HeldOutStop
from engine.run.folder import RunFolder, save_result
from engine.run.last_good import save_last_good
from engine.run.phase_run import PhaseRun, Row, schedule
from engine.run.seta import PrunedPhase, load_state, state_of
from engine.run.train_engine import TrainEngine

logger = logging.getLogger(__name__)

# Steps between reads of the losses: a read waits for the device.
_LOG_EVERY = 10
# Points of watched accuracy lost at the end of a run that are reported as a collapse.
_COLLAPSE_POINTS = 10.0

# Attributes of the trainer that a checkpoint contains.
_CHECKPOINT_FIELDS = ("samples_seen", "watched", "seconds", "bad_images")


@dataclasses.dataclass(kw_only=True)
class Trainer:
    """Runs phases of optimizer steps with their guards, and saves their history and the state for a resume.

    Attributes:
        train_engine: The model that is changed, and its optimizer.
        method: The method, whose losses and hooks are called.
        run: Options of the run, resolved.
        folder: Run folder; None writes nothing.
        progress: Called with (phase, step, steps, numbers) as losses are read.
        after_phase: Called with (phase, model) at the end of each phase.
        watched_samples: Samples whose accuracy is measured during guarded phases, and before and after the run.
        loader: Makes the batches of samples with an augmentation.
        release: Frees the memory of the original.
        spec: How the model is built; None if nothing is written.
        pruned: Phases under `retain_pruning`, by their position.
        early_stopping: The rule of `stop_when`; None if there is none.
        later: The original is the model before earlier requests, not the one that is changed.
    """

    train_engine: TrainEngine
    method: Method
    run: RunConfig
    folder: RunFolder | None
    progress: Progress | None
    after_phase: AfterPhase | None
    watched_samples: Samples
    loader: Callable[[Samples, str], Loader]
    release: Callable[[], None]
    spec: ModelSpec | None
    pruned: dict[int, PrunedPhase] = dataclasses.field(default_factory=dict)
    early_stopping: HeldOutStop | None = None
    later: bool = False

    def __post_init__(self) -> None:
        self.world = self.method.context.world
        self.watch_loader = self.loader(self.watched_samples, "none")
        self.history: list[dict[str, Any]] = []
        self.state: dict[str, Any] | None = None
        self.phase_number = 0
        self.seconds: dict[str, float] = {"prepare": 0.0, "data": 0.0}
        self.samples_seen: dict[str, int] = {}
        self.bad_images: dict[str, str] = {}
        self.watched: dict[str, float] = {}

    @property
    def model(self) -> nn.Module:
        return self.train_engine.model

    def begin(self, started: float) -> None:
        """Resume from the checkpoint of the run folder; without one, measure and check the original.

        Args:
            started: Start of the run, `time.perf_counter()`.

        Raises:
            UserError: The original's accuracy is far below the option `expect_accuracy`.
        """
        self.started = started
        loaded = self.folder.load_state() if self.folder else None
        if loaded is None:
            self.watched["before"] = self.watch(self.method.context.original)
            self._check_accuracy()
            if self.later:
                labels, now = self.watch_loader.samples.labels, self.watch(self.model)
                self.watched["before"] = accuracy_before(labels, self.watched["before"], now)
            if self.early_stopping:
                began = time.perf_counter()
                self.early_stopping.prepare()
                self.seconds["prepare"] += time.perf_counter() - began
            return
        self.state, place = loaded
        self.history = self.folder.history() if self.folder else []
        self.train_engine.load(place)
        self.phase_number = self.state["phase"]
        for key in _CHECKPOINT_FIELDS:
            setattr(self, key, self.state[key])
        self.method.load_state(self.state["method"])
        load_state(self.pruned, self.state["pruned"])
        if self.early_stopping:
            self.early_stopping.load_state(self.state["early_stop"])
        self.started -= self.seconds["unlearn"]
        logger.info("resumed at phase %d, step %d", self.phase_number, self.state["step"])

    def watch(self, model: nn.Module) -> float:
        """Return the accuracy [0, 1] of a model on the watched samples."""
        return predict(model, self.watch_loader, self.run.precision).accuracy

    def _check_accuracy(self) -> None:
        """Check that a model to be unlearned is the trained one, with the inputs of its training; see `begin`."""
        if not len(self.method.context.forget):
            return
        labels, share = self.watch_loader.samples.labels, self.watched["before"]
        correct, expected = round(share * len(labels)), self.run.expect_accuracy
        found = f"accuracy of the original on {len(labels)} watched samples is {100 * share:.1f}%"
        remedy = "check the order of labels, mean and std (model.pretrained_cfg), the input size and the weights"
        if expected is not None and is_far_below(np.arange(len(labels)) < correct, expected):
            raise UserError(f"{found}, far below the {100 * expected:.1f}% of option expect_accuracy: {remedy}")
        if is_near_chance(correct, labels):
            logger.warning("%s, near chance (%.1f%%): %s", found, 100 * chance_of(labels), remedy)

    def run_phase(
        self, number: int, phase: Phase, loader: Loader, paired: Loader | None, original_needed: bool
    ) -> None:
        """Run a phase, or the rest of it after a resume.

        Args:
            number: Position of the phase in the run.
            phase: The phase.
            loader: Batches of `Phase.samples`.
            paired: Batches of `Phase.paired`; None if the phase has none.
            original_needed: Whether a later phase runs the original.
        """
        if self.early_stopping and self.early_stopping.stopped and number in self.early_stopping.stage:
            return
        began = time.perf_counter()
        self._prepare(number, phase)
        if not original_needed and not self.method.needs_original(phase, prepared=True):
            self.release()
        self.seconds["prepare"] += time.perf_counter() - began
        part, step, stopped = self._begin_phase(number, phase, loader, paired)
        while step < part.total and not stopped:
            stop = self._next_checkpoint(step, part.total, loader)
            stopped = self._run_steps(part, step, stop)
            step = stop
            epoch, _, end = loader.epochs.place(step - 1)
            if not stopped and step in (end, part.total):
                stopped = self._ended(number, phase, epoch, step, part.total)
            self._collect(part)
            self._keep(
                phase,
                self._phase_state(part, step),
                done=stopped or step == part.total,
                seconds=time.perf_counter() - began,
            )
            began = time.perf_counter()
        if part.total == 0:  # an edit alone
            self._keep(phase, {"phase": number}, done=True, seconds=time.perf_counter() - began)
            began = time.perf_counter()
        if self.after_phase:
            self.after_phase(phase.name, self.model.eval())
            self.started += time.perf_counter() - began

    def _begin_phase(
        self, number: int, phase: Phase, loader: Loader, paired: Loader | None
    ) -> tuple[PhaseRun, int, bool]:
        """Return the phase, the step to continue at, and whether `Method.edit` ended it."""
        total = loader.epochs.steps(phase.epochs)
        total = min(total, self.run.max_steps) if self.run.max_steps else total
        self.method.total_steps = total
        step, stopped = self._step_of(number), False
        guard = self._guard(phase, total) if phase.guarded else None
        if step == 0:
            self.train_engine.begin_phase(phase.lr)
            stopped = self._edit(phase, guard, total)
        scheduler = schedule(phase, self.train_engine.optimizer, total)
        if step and self.state is not None:
            scheduler.load_state_dict(self.state["scheduler"])
            self.train_engine.set_groups(self.state["groups"])
            if guard:
                guard.load_state(self.state["guard"])
        self.state = None
        part = PhaseRun(
            number=number, phase=phase, loader=loader, paired=paired, total=total, scheduler=scheduler, guard=guard
        )
        return part, step, stopped

    def _collect(self, part: PhaseRun) -> None:
        """Add up the time spent waiting for images, and gather the ids of those that cannot be read."""
        for each in filter(None, (part.loader, part.paired)):
            self.seconds["data"] += each.waited
            each.waited = 0.0
            if self.run.on_bad_image == "skip":
                for found in self.world.gather(each.bad_ids):
                    self.bad_images.update(found)

    def _phase_state(self, part: PhaseRun, step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps of a phase."""
        return {
            "phase": part.number,
            "step": step,
            "scheduler": part.scheduler.state_dict(),
            "groups": self.train_engine.groups(),
            **({"guard": part.guard.state()} if part.guard else {}),
        }

    def _guard(self, phase: Phase, total: int) -> CollapseGuard:
        return CollapseGuard(
            phase.name,
            total,
            train_engine=self.train_engine,
            watch=self.watch,
            before=self.watched["before"],
            limit=self.run.collapse_drop,
            record=self.event,
            is_main=self.world.is_main,
        )

    def _edit(self, phase: Phase, guard: CollapseGuard | None, total: int) -> bool:
        """Call `Method.edit` before the first step; return whether the edit ended the phase."""

        def report(step: int, steps: int, numbers: dict[str, float]) -> None:
            self._record([{"phase": phase.name, "step": step, **numbers}])
            if self.progress and self.world.is_main:
                self.progress(phase.name, step + 1, steps, numbers)

        self.method.report, self.method.edited = report, 0
        self.method.edit(self.train_engine.module, phase)
        if self.method.edited:
            self.samples_seen[phase.name] = self.samples_seen.get(phase.name, 0) + self.method.edited
        return bool(guard and total == 0 and guard.collapsed(0))

    def _ended(self, number: int, phase: Phase, epoch: int, step: int, total: int) -> bool:
        """Return whether the method, or `stop_when`, ends the phase after an epoch."""
        reason = self.method.should_stop(self.model, phase, epoch) if step < total else None
        if reason is not None:
            self._record([{"phase": phase.name, "step": step - 1, "ended": reason}])
        stop = self.early_stopping
        # After the last step of the last phase there is nothing left to stop.
        if stop is None or number not in stop.stage or (step == total and number == max(stop.stage)):
            return reason is not None
        self._record([stop.evaluate(self.model, phase, number, epoch, step - 1)])
        if stop.stopped:
            logger.info("stopped after epoch %d of phase %s: %s", epoch, phase.name, stop.stopped["ended"])
        return reason is not None or stop.stopped is not None

    def _step_of(self, number: int) -> int:
        """Return the first step of a phase: 0, or the step of the checkpoint in a resumed run."""
        return self.state["step"] if self.state is not None and self.state["phase"] == number else 0

    def _prepare(self, number: int, phase: Phase) -> None:
        name = f"prepared-{number}"
        kept = self.folder.kept(name) if self.folder and self.state is not None else None
        if kept is not None:
            self.method.load_cache_state(phase, kept)
            return
        self.method.prepare(phase)
        if self.folder:
            self.folder.keep(name, self.method.cache_state(phase))

    def _next_checkpoint(self, step: int, total: int, loader: Loader) -> int:
        """Return the step of the next checkpoint: the end of the epoch or phase, or after `checkpoint_every` steps."""
        ends = [total, loader.epochs.place(step)[2]]
        return min(*ends, step + self.run.checkpoint_every if self.run.checkpoint_every else total)

    def _run_steps(self, part: PhaseRun, step: int, stop: int) -> bool:
        """Run steps [step, stop) of a phase, all of one epoch; return whether the guard ended the phase."""
        pending: list[Row] = []
        phase, guard, loader = part.phase, part.guard, part.loader
        epoch, first, _ = loader.epochs.place(step)
        pruned = self.pruned.get(part.number)
        self.model.train()
        batches = loader.epoch(epoch, step - first, stop - first, lambda step: phase.takes(first + step)[0])
        others = part.paired.steps_of(step, stop, lambda step: phase.takes(step)[1]) if part.paired else None
        while step < stop:
            pending.append(self.step(phase, batches, loader.seed, step, part.scheduler, others, pruned))
            step += 1
            if len(pending) == _LOG_EVERY or step == stop or (guard and step in guard.steps):
                self._flush(phase, epoch, part.total, pending)
                if guard and step in guard.steps and guard.collapsed(step):
                    return True
                self.model.train()
        if pruned:
            pruned.settle(self.world)
        return False

    def step(
        self,
        phase: Phase,
        batches: Iterator[Batch],
        seed: int,
        step: int,
        scheduler: Any,
        others: Iterator[Batch] | None = None,
        pruned: PrunedPhase | None = None,
    ) -> Row:
        """Take one optimizer step over its micro-batches; the model is in training mode.

        Args:
            phase: The phase.
            batches: Batches of the phase's samples, for the steps that take one.
            seed: Seed of the loader.
            step: Step of the phase.
            scheduler: Learning-rate schedule.
            others: Batches of `phase.paired`, for the steps that take one.
            pruned: Records the losses of the batches.

        Returns:
            Numbers of the step, not read from the device yet.
        """
        device, self.method.step = self.method.context.device, step
        # Dropout is a function of seed, step and rank, so that a run can be resumed from any step.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((seed * 1_000_003 + step) * 8_191 + self.world.rank)
            return self._step(phase, batches, step, scheduler, others, pruned)

    def _step(
        self,
        phase: Phase,
        batches: Iterator[Batch],
        step: int,
        scheduler: Any,
        others: Iterator[Batch] | None,
        pruned: PrunedPhase | None,
    ) -> Row:
        method = self.method
        sums: dict[str, Tensor] = {}
        seen = 0
        takes_main, takes_paired = phase.takes(step)
        for _ in range(self.run.accumulation_steps):
            losses, seen = [], 0
            if takes_main:
                batch = next(batches)
                watching = pruned.watching(self.train_engine.module, batch) if pruned else contextlib.nullcontext()
                with watching:
                    losses.append(self._weighted(method.loss, batch, phase, sums))
                seen += batch.total
            if takes_paired and others is not None:
                other = next(others)
                losses.append(self._weighted(method.paired_loss, other, phase, sums))
                seen += other.total
            if phase.combined:
                self.train_engine.keep_gradients(*losses)
            else:
                self.train_engine.backward(functools.reduce(operator.add, losses))
        if phase.combined:
            self.train_engine.set_gradients(lambda main, paired: method.combine(self.model, main, paired, phase))
        lr = scheduler.get_last_lr()[0]
        method.before_step(self.model, phase)
        norm = self.train_engine.step()
        method.after_step(self.model, phase)
        scheduler.step()
        self.samples_seen[phase.name] = self.samples_seen.get(phase.name, 0) + seen
        return Row(step, lr, sums, norm)

    def _weighted(
        self,
        loss: Callable[[nn.Module, Batch, Phase], dict[str, Tensor]],
        batch: Batch,
        phase: Phase,
        sums: dict[str, Tensor],
    ) -> Tensor:
        """Return the loss of a batch with its weight in the mean over the step; add its terms to `sums`."""
        with self.method.context.autocast():
            terms = loss(self.model, batch, phase)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() * (batch.weight / self.run.accumulation_steps)
        total: Tensor = sum(terms.values())  # type: ignore[assignment]
        return total * batch.weight if batch.weight != 1 else total

    def _flush(self, phase: Phase, epoch: int, total: int, pending: list[Row]) -> None:
        """Read the losses of the last steps into the history; stop the run if one is not finite."""
        rows: list[dict[str, Any]] = []
        names = list(dict.fromkeys(name for row in pending for name in row.terms))  # steps may differ in their terms
        # The mean over ranks of the weighted terms is the mean over the samples of the step.
        none = next(iter(pending[0].terms.values())).new_zeros(())
        values = torch.stack([torch.stack([row.terms.get(name, none) for name in names]).float() for row in pending])
        values = (self.world.sum(values) / self.world.size).cpu()
        for row, terms in zip(pending, values.tolist(), strict=True):
            numbers = dict(zip(names, terms, strict=True))
            numbers = {name: numbers[name] for name in row.terms} | {"grad_norm": float(row.norm)}
            bad = [name for name, value in numbers.items() if not math.isfinite(value)]
            if bad:
                self._record(rows)
                self._stop(phase, row.step, "gradient norm" if bad[0] == "grad_norm" else bad[0])
            rows.append({"phase": phase.name, "epoch": epoch, "step": row.step, **numbers, "lr": row.lr})
        self._record(rows)
        if rows and self.progress and self.world.is_main:
            self.progress(
                phase.name, rows[-1]["step"] + 1, total, {k: v for k, v in rows[-1].items() if isinstance(v, float)}
            )
        pending.clear()

    def _record(self, rows: list[dict[str, Any]]) -> None:
        self.history.extend(rows)
        if self.folder and rows:
            self.folder.append(rows)

    def event(self, row: dict[str, Any]) -> None:
        self._record([row])

    def _stop(self, phase: Phase, step: int, term: str) -> None:
        kept = save_last_good(self.folder, self.spec, self.train_engine, self.world) if self.folder else None
        where = f"the last good weights are in {kept}; lower the rate" if kept else "start again with a lower rate"
        raise RunStopped(
            f"phase {phase.name}, step {step}: {term} is not finite; {where} (--set lr=... or forget_lr=...) "
            "or the precision (--set precision=fp32)"
        )

    def _keep(self, phase: Phase, state: dict[str, Any], done: bool, seconds: float) -> None:
        key = f"{phase.name}_phase"
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds
        self.seconds["unlearn"] = time.perf_counter() - self.started
        if self.folder is None:
            return
        if done:
            state = {"phase": state["phase"] + 1, "step": 0}
        kept = {key: dict(getattr(self, key)) for key in _CHECKPOINT_FIELDS}
        kept |= {"method": self.method.state(), "pruned": state_of(self.pruned)}
        if self.early_stopping:
            kept["early_stop"] = self.early_stopping.state()
        self.folder.save({**state, **kept}, self.train_engine.save)

    def finish(self, resolved: dict[str, Any], finalize: Callable[[UnlearnResult], None] | None) -> UnlearnResult:
        """Save the changed model, call `finalize` with the result, and finish the run folder; every rank calls it."""
        model = merge(self.train_engine.finish()).eval()
        model._compiled_call_impl = None  # torch cannot undo Module.compile; the caller gets a plain model
        if self.run.gradient_checkpointing:
            model.set_grad_checkpointing(False)  # type: ignore[operator]
        with attention_backend(model, self.run.attention):  # with DeepSpeed, not the object that was trained
            return self._finish(model, resolved, finalize)

    def _finish(
        self, model: nn.Module, resolved: dict[str, Any], finalize: Callable[[UnlearnResult], None] | None
    ) -> UnlearnResult:
        self.watched["after"] = self.watch(model)
        lost = 100 * (self.watched["before"] - self.watched["after"])
        training = self.method.is_training or not len(self.method.context.forget)
        collapsed = lost > _COLLAPSE_POINTS and not training
        if collapsed:
            self.event({"event": "collapse", "at": "end", "points_lost": round(lost, 2)})
            logger.warning(
                "collapse: accuracy on the watched samples fell by %.1f points, from %.1f%% to %.1f%%",
                lost,
                100 * self.watched["before"],
                100 * self.watched["after"],
            )
        if self.folder:
            path = self.folder.path
            self.world.on_main(lambda: save_checkpoint(model, path) and None)
        self.seconds["unlearn"] = time.perf_counter() - self.started
        result = UnlearnResult(
            model,
            resolved,
            self.seconds,
            self.samples_seen,
            self.history,
            self.watched,
            collapsed,
            self.folder.path if self.folder else None,
            lambda samples: predict(model, self.loader(samples, "none"), self.run.precision).accuracy,
            self.bad_images,
            save_result,
            self.early_stopping.stopped if self.early_stopping else None,
        )
        if finalize:
            finalize(result)
        if self.folder:
            self.folder.finished()
        return result
