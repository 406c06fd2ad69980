"""What the benchmarks share: timing, processes, reports, plots."""
