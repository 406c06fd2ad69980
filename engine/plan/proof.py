"""Work of proving: a pool of reference models, a certificate, and the proof of one small request."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engine.core.proof_sizes import CONTROLS, retained_samples, simulated_requests
from engine.plan.cost import Cost
from engine.plan.work import Sizes, Work, forward_work


def proof_work(
    cost: Cost, sizes: Sizes, unlearn: Sequence[Work], retrain: Sequence[Work], models: int, share: float
) -> dict[str, list[Work]]:
    """Return the work of a pool, of a certificate for requests of this size, and of a request's proof.

    The pool is trained once for all requests. The certificate is made once for a size of requests, and again when it
    lapses. Of the pool's models, two answer for each forget sample and each test sample.

    Args:
        cost: Cost of a pass.
        sizes: Numbers of samples of a request.
        unlearn, retrain: Work of one unlearning and of a retrain.
        models: Number of models of the pool.
        share: Share of the training samples that each of them lacks.
    """
    trained = (1 - share) * models * (sizes.forget + sizes.retain) / sizes.retain
    requests, test = simulated_requests(sizes.forget), min(sizes.test, CONTROLS)
    retain = min(sizes.retain, CONTROLS)
    forgetting = [item for item in unlearn if "evaluation" not in item.name]
    # The models see each forget sample plain, again and moved; original and two models of the pool plain and moved.
    simulated = requests * sizes.forget * (3 + 2 + 2 * 2) + (2 + 2 + 2 * 2) * test + 2 * retain
    single = sizes.forget * (1 + 2) + test + 2 * min(sizes.retain, retained_samples(3 * retrain[0].images))
    return {
        f"pool of {models} models, once": [_times(item, trained) for item in retrain if "evaluation" not in item.name],
        f"certificate, {requests} requests": [
            *(_times(item, requests) for item in forgetting),
            forward_work("its verdict", cost, simulated),
        ],
        "proof of a request": [forward_work("by the certificate", cost, single)],
    }


def _times(item: Work, factor: float) -> Work:
    return dataclasses.replace(
        item, images=factor * item.images, steps=round(factor * item.steps), flops=factor * item.flops
    )
