"""Offset parallelism: the tables of a model divided over the processes of a group.

Process `rank` of `ranks` holds the rows rank, rank + ranks, ... of every table, and computes the
pairs of these classes. Tokens and everything else are the same in all processes, which see the same
batch; so the group is one axis of a device mesh, and data parallelism another. What is sent is of
the size of the tokens: no row of a table, nor its gradient, ever leaves its process.
"""

from .checkpoint import load, save
from .division import Division, build, clip_grad_norm, divide, division_of, same_random, synchronize

__all__ = [
    "Division",
    "build",
    "clip_grad_norm",
    "divide",
    "division_of",
    "load",
    "same_random",
    "save",
    "synchronize",
]
