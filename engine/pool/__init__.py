"""A pool of reference models for all requests to come, and certificates of the unlearning procedure."""
