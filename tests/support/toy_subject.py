"""A subject of the leaderboard with an original and two references, none of them trained."""

from __future__ import annotations

from pathlib import Path

from toys import tiny_vit

from bench.quality.retrain_cost import Subject
from engine.models.checkpoint import save_checkpoint


def toy_subject(folder: Path) -> Subject:
    """Return the subject; its models are written below a folder."""
    names = [str(save_checkpoint(tiny_vit(seed=seed), folder / str(seed))) for seed in range(3)]
    return Subject(
        name="toy",
        data="digits",
        forget="random:0.01@0",
        checkpoint=names[0],
        references=tuple(names[1:]),
        recipe={"epochs": 1.0},
    )
