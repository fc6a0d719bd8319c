"""Benchmarks of the operators: speed and memory, as ratios measured within one process."""
