"""Tar shards in WebDataset's layout, read in place."""
