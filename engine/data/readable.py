"""Find the unreadable images of a set before the work that depends on them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

from engine.data.loading import Loader
from engine.data.preprocessing import Preprocessing
from engine.data.samples import BadImageError, Samples
from engine.errors import RunStopped, UserError


def bad_images(
    samples: Samples,
    preprocessing: Preprocessing,
    *,
    on_bad_image: str = "raise",
    max_bad_share: float = 0.01,
    out_of: int | None = None,
    **loading: Any,
) -> dict[str, str]:
    """Decode every image once, and return the ids of unreadable ones with the reason of each, on all ranks.

    Args:
        samples: A forget set.
        preprocessing: Preprocessing of the model.
        on_bad_image: raise (BadImageError at the first one) or skip.
        max_bad_share: With skip, share [0, 1] of `out_of` that may be bad.
        out_of: Size of the whole training set; None: that of the samples.
        **loading: Further options of `Loader` (workers, device, world, decode, ...).

    Raises:
        BadImageError: An image cannot be read, and on_bad_image is raise.
        RunStopped: More images are bad than allowed.
        UserError: No image can be read.
    """
    if not len(samples):
        return {}
    alone = on_bad_image == "raise" and ("world" not in loading or loading["world"].size == 1)
    # Several ranks raise together: if one raised alone, the others would wait for it in a collective.
    mode = "raise" if alone else "skip"
    loader = Loader(samples, preprocessing, **{"batch_size": 100, **loading}, on_bad_image=mode, max_bad_share=1.0)
    with same_random_numbers():
        for _ in loader.ordered():
            pass
    found: dict[str, str] = {}
    for each in loader.world.gather(loader.bad_ids):
        found.update(each)
    error: UserError | RunStopped | None = None
    if found and on_bad_image == "raise":
        error = BadImageError(next(iter(found.values())))
    elif found and len(found) == len(samples):
        error = UserError(
            f"{samples.name}: not one of the {len(samples)} images can be read, the first: {next(iter(found.values()))}"
        )
    elif len(found) > max_bad_share * (out_of or len(samples)):
        error = RunStopped(
            f"{samples.name}: {len(found)} of {len(samples)} images cannot be read, more than "
            f"max_bad_share={max_bad_share:g} of the {out_of or len(samples)} training samples, the last: "
            f"{next(reversed(found))!r}; repair them or raise the share"
        )
    if error is not None:
        error.shared = not loader.world.is_main
        raise error
    return found


def without(samples: Samples, ids: Collection[str]) -> Samples:
    """Return the samples whose id is not among `ids`; the same object if all are kept."""
    kept = [place for place, each in enumerate(samples.ids) if each not in ids] if ids else range(len(samples))
    return samples if len(kept) == len(samples) else samples.subset(kept)


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Restore the global random generators after the context.

    A user's dataset may draw random numbers when it is read. The run after this then draws the same numbers as without
    it.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
