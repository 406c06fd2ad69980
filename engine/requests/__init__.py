"""Deletion requests: a store of requests with their deadlines, and the lineage of model versions made of them."""
