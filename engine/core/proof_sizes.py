"""Numbers of samples and requests that proofs by a pool take; `engine.plan` counts their cost."""

# Test samples, and retain samples, that a model is evaluated on at most: accuracies to half a point.
CONTROLS = 2_000
# Retain samples of a small request's proof: as many as this share of a retrain's forward passes, from 500 to CONTROLS.
# Where one prediction in ten changes, a version that has lost a point passes in 60% of cases by 500 samples and in 85%
# by 2,000, one that has lost four points in 3% and in 0.1% (computed from the limits, not run).
_FEWEST_RETAINED, _RETAINED_SHARE = 500, 0.002
# Forget samples of all simulated requests of a certificate together, at least, and requests. By 200 samples of a model
# that is right in 58% of the test samples, a retrained model would have PASS in 72% of cases for forget accuracy alone:
# its standard error is 3.3 points where at most 9 are allowed. By 400 it is 97%.
SIMULATED_SAMPLES, SIMULATED_REQUESTS = 400, 8


def retained_samples(retrain: float) -> int:
    """Return the number of retain samples, at most, of a small request's proof.

    Args:
        retrain: Forward passes of a retrain.
    """
    return int(min(CONTROLS, max(_FEWEST_RETAINED, _RETAINED_SHARE * retrain)))


def simulated_requests(size: int) -> int:
    """Return the number of simulated requests of a certificate for requests of `size` samples."""
    return max(SIMULATED_REQUESTS, -(-SIMULATED_SAMPLES // max(1, size)))
