"""The ways in which the primitives are computed: each backend, and both paths of Triton.

Tests use few channels, for which Triton takes its path for small tables. The name "triton, wide
tables" makes it take the other path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from translution import backends

PATHS = [*backends.BACKENDS, "triton, wide tables"]


@contextmanager
def backend_of(path: str) -> Iterator[str]:
    """Yield the backend of a path. Inside this context it takes that path."""
    from translution.backends.triton import blocks

    with blocks.small_as_wide() if path.endswith("wide tables") else nullcontext():
        yield path.split(",")[0]
