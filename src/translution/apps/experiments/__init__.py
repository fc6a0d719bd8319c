"""Experiments: models trained under the same conditions over several seeds, and their tables."""
