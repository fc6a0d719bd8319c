"""Experiments: rows that are trained alike over several seeds, and the tables that come of it."""
