"""`pytest --benchmark`: performance regression tests."""
