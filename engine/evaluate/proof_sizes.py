"""Numbers of samples and requests that proofs by a pool take; `engine.plan` counts their cost."""

# Test samples, and retain samples, that a model is evaluated on at most: accuracies to half a point.
CONTROLS = 2_000
# Retain samples of a small request's proof, at most.
RETAINED = 500
# Forget samples of all simulated requests of a certificate together, at least, and requests. By 200 samples of a model
# that is right in 58% of the test samples, a retrained model would have PASS in 72% of cases for forget accuracy alone:
# its standard error is 3.3 points where at most 9 are allowed. By 400 it is 97%.
SIMULATED_SAMPLES, SIMULATED_REQUESTS = 400, 8


def simulated_requests(size: int) -> int:
    """Return the number of simulated requests of a certificate for requests of `size` samples."""
    return max(SIMULATED_REQUESTS, -(-SIMULATED_SAMPLES // max(1, size)))
