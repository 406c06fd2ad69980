"""The record of a run, its signature, and the origin of a model by its record."""
