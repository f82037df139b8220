"""Benchmarks: every provider is checked first, then all are timed in turns. `python -m bench`."""
