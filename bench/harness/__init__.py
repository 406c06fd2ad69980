"""Shared parts of the benchmarks: timing, processes, reports, plots."""
