"""The record of a run, its signature, and what a record says of a model."""
