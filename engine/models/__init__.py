"""Models: checkpoints, geometry, logits and features, attention."""
