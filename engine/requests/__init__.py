"""Deletion requests: a store of who asked for what by when, and the lineage of model versions made of them."""
