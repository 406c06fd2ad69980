"""Models: opening and saving checkpoints, geometry, attention, predictions, and which weights are trained."""
