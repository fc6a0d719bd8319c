"""Offset parallelism: the tables of a model divided over the processes of a group.

Process `rank` of `ranks` has the rows rank, rank + ranks, ... of every table and computes the pairs
of these classes. Tokens and all other parameters are the same in all processes of the group, which
see the same batch. The group is therefore one axis of a device mesh, and data parallelism can be
another. Messages have the size of the tokens: no row of a table, and no gradient of one, is sent.
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
