"""The runs of test_distributed.py in two processes: one start serves several cases.

`python -m torch.distributed.run --nproc_per_node 2 ranks.py FOLDER CASE...` writes a run folder and a line of JSON a
case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import engine
from engine.data import Samples, open_source
from engine.models.checkpoint import weights_sha256
from engine.run.trainer import Trainer
from engine.run.unlearn import unlearn
from engine.runtime.process_group import ProcessGroup, end_rank

sys.path.insert(0, str(Path(__file__).parent))
from toys import few, tiny_vit

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES: dict[str, Any] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    **{name: CONFIGS / f"{name}.json" for name in ("zero1", "zero2", "zero3", "zero3_offload")},
}
LETHE = {"forget_epochs": 2.0, "retain_epochs": 2.0}
# Name of a case: its stage, and the options that one process takes too (there with twice the batch size).
EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    **{stage: (stage, LETHE) for stage in STAGES},
    "in_batch": ("zero2", {**LETHE, "negatives": "in_batch", "mask_value": "mean", "contrast": "features"}),
    "sharded": ("zero3", {**LETHE, "augment_forget": True, "teacher": "sharded", "gradient_checkpointing": True}),
    "relabelled": ("zero1", {"method": "random_labels", "epochs": 2.0}),
    "beside": ("zero2", {"method": "neg_grad_plus", "retain_epochs": 2.0}),
    "distilled": ("zero3", {"method": "lethe_plus", "epochs": 2.0, "forget_passes": 2.0, "calibrate": False}),
    "teachers": ("zero1", {"method": "bad_teacher", "epochs": 4.0}),
    "low_rank": ("zero2", {"method": "gs_lora", "retain_epochs": 2.0, "warmup": 0, "bound": 3.0, "lr": 1e-3}),
    "collapsed": ("zero3", {**LETHE, "start": "trained", "forget_lr": 0.05, "collapse_drop": 1.0}),
}
CASES = (*EQUAL, "accumulated", "bf16", "resumed_zero2", "resumed_zero3_offload")


class Killed(BaseException):
    """The run is gone."""


def data() -> tuple[Samples, Samples]:
    """17 to forget and 65 to retain: in steps of 16 the last one has one sample, and a rank of two has none."""
    samples = open_source("digits").train
    return few(samples, 17), samples.subset(range(20, 85))


def run(folder: Path, stage: str | None, batch_size: int, **options: Any) -> engine.UnlearnResult:
    """A run by the options of a case; folder.parent/trained is the model of those that start from one."""
    method, start, resume = (options.pop(*pair) for pair in (("method", "lethe"), ("start", None), ("resume", False)))
    return unlearn(
        engine.load_checkpoint(folder.parent / start) if start else tiny_vit(),
        *data(),
        method=method,
        config={"batch_size": batch_size, "precision": "fp32", "seed": 3, "device": "cpu", **options},
        output_dir=folder,
        deepspeed=STAGES[stage] if stage else None,
        resume=resume,
    )


def main(folder: Path, names: list[str]) -> None:
    def case(name: str, stage: str, batch_size: int = 8, **options: Any) -> None:
        result = run(folder / name, stage, batch_size, **options)
        hashes = ProcessGroup.current().gather(weights_sha256(result.model))
        line = {"weights": hashes, "watched": result.watched, "samples_seen": result.samples_seen}
        if ProcessGroup.current().is_main:
            (folder / f"{name}.json").write_text(json.dumps(line))

    for name in EQUAL:
        if name in names:
            case(name, EQUAL[name][0], **EQUAL[name][1])
    if "accumulated" in names:
        case("accumulated", "zero2", 4, **LETHE, accumulation_steps=2)
    if "bf16" in names:
        case("bf16", "zero3_offload", **{**LETHE, "precision": "bf16", "teacher": "sharded"})
    for stage in STAGES:
        if f"resumed_{stage}" not in names:
            continue
        keep, kept = Trainer._keep, []

        def killed(self: Any, *args: Any, keep: Any = keep, kept: list[int] = kept, **kwargs: Any) -> None:
            keep(self, *args, **kwargs)
            kept.append(1)
            if len(kept) == 6:
                raise Killed

        Trainer._keep = killed  # type: ignore[method-assign]
        try:
            case(f"resumed_{stage}", stage, **LETHE, checkpoint_every=1)
            raise AssertionError("it was to be killed")
        except Killed:
            Trainer._keep = keep  # type: ignore[method-assign]
        case(f"resumed_{stage}", stage, **LETHE, checkpoint_every=1, resume=True)
    end_rank(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
