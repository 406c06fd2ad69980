"""Phases of optimizer steps: run, watched, kept, resumed."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import RunConfig
from engine.data import Loader, Samples
from engine.errors import RunStopped
from engine.evaluate.predict import predict
from engine.methods import Method, Phase
from engine.runfolder import RunFolder
from engine.vit import save_checkpoint

logger = logging.getLogger(__name__)

# Steps between reads of the losses: a read waits for the device.
_FLUSH = 10
# Checks of a guarded phase, spread over its steps.
_CHECKS = 8
# Points of watched accuracy lost at the end of a run that are reported as a collapse.
_LOST = 10.0

Progress = Callable[[str, int, int, dict[str, float]], None]
AfterPhase = Callable[[str, nn.Module], None]


@dataclasses.dataclass
class UnlearnResult:
    """What a run gives back.

    model: the unlearned model, eval mode, on the run's device. config: every option as resolved.
    seconds: unlearn (all of it), prepare (masks and teacher passes), and one entry a phase.
    samples_seen: training samples by phase. history: one row a step, and one an event.
    events: the rows that say something went wrong (collapse).
    watched: accuracy [0, 1] on the watched samples before and after. collapsed: it fell by more than 10 points.
    output_dir: the run folder, or None. accuracy: top-1 [0, 1] of the model on any samples.
    """

    model: nn.Module
    config: dict[str, Any]
    seconds: dict[str, float]
    samples_seen: dict[str, int]
    history: list[dict[str, Any]]
    watched: dict[str, float]
    collapsed: bool
    output_dir: Path | None
    accuracy: Callable[[Samples], float]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [row for row in self.history if "event" in row]


class Trainer:
    """Runs phases of optimizer steps, watches them, keeps their history and what is needed to resume."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        run: RunConfig,
        folder: RunFolder | None,
        progress: Progress | None,
        after_phase: AfterPhase | None,
        watched: Samples,
        loader: Callable[[Samples, str], Loader],
    ) -> None:
        self.model, self.method, self.run, self.folder, self.progress = model, method, run, folder, progress
        self.after_phase, self.loader = after_phase, loader
        self.watch_loader = loader(watched, "none")
        self.history: list[dict[str, Any]] = []
        self.state: dict[str, Any] | None = None
        self.phase_number, self.seconds, self.samples_seen = 0, {"prepare": 0.0}, {}  # type: ignore[var-annotated]
        self.watched: dict[str, float] = {}

    def begin(self, started: float) -> None:
        self.started = started
        self.state = self.folder.load_state() if self.folder else None
        if self.state is None:
            self.watched["before"] = self.watch(self.method.context.original)
            return
        self.history = self.folder.history() if self.folder else []
        self.model.load_state_dict(self.state["model"])
        self.phase_number, self.samples_seen, self.watched = (
            self.state[k] for k in ("phase", "samples_seen", "watched")
        )
        self.seconds = self.state["seconds"]
        self.started -= self.seconds["unlearn"]
        logger.info("resumed at phase %d, epoch %d", self.phase_number, self.state["epoch"])

    def watch(self, model: nn.Module) -> float:
        """Accuracy [0, 1] on the watched samples."""
        return predict(model, self.watch_loader, self.run.precision).accuracy

    def run_phase(self, number: int, phase: Phase, loader: Loader) -> None:
        began = time.perf_counter()
        self.method.prepare(phase)
        self.seconds["prepare"] += time.perf_counter() - began
        total = math.ceil(round(phase.epochs * loader.steps(), 6))
        total = min(total, self.run.max_steps) if self.run.max_steps else total
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=phase.lr, weight_decay=self.run.weight_decay, fused=True
        )
        scheduler = _schedule(phase, optimizer, total)
        epoch = 0
        if self.state is not None and self.state["epoch"] > 0:  # resumed inside this phase
            optimizer.load_state_dict(self.state["optimizer"])
            scheduler.load_state_dict(self.state["scheduler"])
            epoch = self.state["epoch"]
        self.state = None
        guard = _Guard(self, phase, total) if phase.guarded else None
        stopped = False
        while epoch * loader.steps() < total and not stopped:
            with torch.random.fork_rng(devices=[loader.device] if loader.device.type == "cuda" else []):
                torch.manual_seed(loader.seed * 10_007 + epoch)  # dropout
                stopped = self._run_epoch(phase, loader, epoch, total, optimizer, scheduler, guard)
            epoch += 1
            self._keep(
                number,
                epoch,
                optimizer,
                scheduler,
                done=stopped or epoch * loader.steps() >= total,
                seconds=time.perf_counter() - began,
                phase=phase,
            )
            began = time.perf_counter()
        if self.after_phase:
            self.after_phase(phase.name, self.model.eval())
            self.started += time.perf_counter() - began

    def _run_epoch(
        self,
        phase: Phase,
        loader: Loader,
        epoch: int,
        total: int,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        guard: _Guard | None,
    ) -> bool:
        """One pass; True where the guard ended the phase."""
        pending: list[tuple[int, float, dict[str, Tensor], Tensor]] = []
        step = epoch * loader.steps()
        self.model.train()
        for batch in loader.epoch(epoch, steps=min(loader.steps(), total - step)):
            with self.method.context.autocast():
                terms = self.method.loss(self.model, batch, phase)
            optimizer.zero_grad(set_to_none=True)
            sum(terms.values()).backward()  # type: ignore[union-attr]
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.grad_clip or math.inf)
            pending.append((step, scheduler.get_last_lr()[0], {k: v.detach() for k, v in terms.items()}, norm.detach()))
            optimizer.step()
            scheduler.step()
            step += 1
            self.samples_seen[phase.name] = self.samples_seen.get(phase.name, 0) + len(batch)
            if len(pending) == _FLUSH or step == total or (guard and step in guard.steps):
                self._flush(phase, epoch, total, pending)
                if guard and step in guard.steps and guard.collapsed(step):
                    return True
                self.model.train()
        self._flush(phase, epoch, total, pending)
        return False

    def _flush(
        self, phase: Phase, epoch: int, total: int, pending: list[tuple[int, float, dict[str, Tensor], Tensor]]
    ) -> None:
        """Reads the losses of the last steps: into the history, and stops the run where one is not finite."""
        rows: list[dict[str, Any]] = []
        for step, lr, terms, norm in pending:
            numbers = {name: float(value) for name, value in terms.items()}
            bad = [
                name for name, value in {**numbers, "gradient norm": float(norm)}.items() if not math.isfinite(value)
            ]
            if bad:
                self._record(rows)
                self._stop(phase, step, bad[0])
            rows.append(
                {"phase": phase.name, "epoch": epoch, "step": step, **numbers, "grad_norm": float(norm), "lr": lr}
            )
        self._record(rows)
        if rows and self.progress:
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
        where = "start again with a lower rate"
        if self.folder:
            state = self.folder.load_state()
            if state is not None:
                self.model.load_state_dict(state["model"])
                save_checkpoint(self.model, self.folder.path / "last_good")
                where = f"the last good weights are in {self.folder.path / 'last_good'}; lower the rate"
        raise RunStopped(
            f"phase {phase.name}, step {step}: {term} is not finite; {where} (--set lr=... or forget_lr=...) "
            "or the precision (--set precision=fp32)"
        )

    def _keep(
        self,
        number: int,
        epoch: int,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        done: bool,
        seconds: float,
        phase: Phase,
    ) -> None:
        key = f"{phase.name}_phase"
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds
        self.seconds["unlearn"] = time.perf_counter() - self.started
        if self.folder is None:
            return
        self.folder.save_state(
            {
                "phase": number + 1 if done else number,
                "epoch": 0 if done else epoch,
                "model": self.model.state_dict(),
                "optimizer": optimizer.state_dict() if not done else {},
                "scheduler": scheduler.state_dict() if not done else {},
                "samples_seen": dict(self.samples_seen),
                "watched": dict(self.watched),
                "seconds": dict(self.seconds),
            }
        )

    def finish(self, resolved: dict[str, Any]) -> UnlearnResult:
        self.model.eval()
        self.watched["after"] = self.watch(self.model)
        lost = 100 * (self.watched["before"] - self.watched["after"])
        collapsed = lost > _LOST
        if collapsed:
            self.event({"event": "collapse", "at": "end", "points_lost": round(lost, 2)})
            logger.warning(
                "collapse: accuracy on the watched samples fell by %.1f points, from %.1f%% to %.1f%%",
                lost,
                100 * self.watched["before"],
                100 * self.watched["after"],
            )
        if self.folder:
            save_checkpoint(self.model, self.folder.path)
            self.folder.clear_state()
        self.seconds["unlearn"] = time.perf_counter() - self.started
        return UnlearnResult(
            self.model,
            resolved,
            self.seconds,
            self.samples_seen,
            self.history,
            self.watched,
            collapsed,
            self.folder.path if self.folder else None,
            lambda samples: predict(self.model, self.loader(samples, "none"), self.run.precision).accuracy,
        )


class _Guard:
    """Watches a phase that may destroy the model; takes it back to its last good weights and ends the phase."""

    def __init__(self, trainer: Trainer, phase: Phase, total: int) -> None:
        self.trainer, self.phase = trainer, phase
        self.steps = {math.ceil(total * (i + 1) / _CHECKS) for i in range(_CHECKS)}
        self.good_step, self.good = 0, self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in self.trainer.model.state_dict().items()}

    def collapsed(self, step: int) -> bool:
        trainer = self.trainer
        before, now = trainer.watched["before"], trainer.watch(trainer.model)
        trainer.event({"phase": self.phase.name, "step": step - 1, "watched_accuracy": now})
        if 100 * (before - now) <= trainer.run.collapse_drop:
            self.good_step, self.good = step, self._copy()
            return False
        trainer.model.load_state_dict(self.good)
        trainer.event(
            {
                "event": "collapse",
                "phase": self.phase.name,
                "step": step - 1,
                "watched_accuracy": now,
                "back_to_step": self.good_step,
            }
        )
        logger.warning(
            "collapse in phase %s at step %d: accuracy on the watched samples %.1f%%, before the run %.1f%%; "
            "taken back to step %d and the phase ended (raise collapse_drop to go on, or lower the rate)",
            self.phase.name,
            step - 1,
            100 * now,
            100 * before,
            self.good_step,
        )
        return True


def _schedule(phase: Phase, optimizer: torch.optim.Optimizer, total: int) -> Any:
    if phase.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    # One step more than is taken: the scheduler refuses to be asked past its end.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, phase.lr, total_steps=total + 1, pct_start=0.15)
