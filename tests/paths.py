"""The ways that the primitives are computed: each backend, and Triton's path for wide tables.

Tests use little channels, which Triton takes for small tables; the second path is then asked for by
name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from translution import backends

PATHS = [*backends.BACKENDS, "triton, wide tables"]


@contextmanager
def backend_of(path: str) -> Iterator[str]:
    """The name of the backend to ask for, which then takes this path."""
    from translution.backends.triton import blocks

    with blocks.small_as_wide() if path.endswith("wide tables") else nullcontext():
        yield path.split(",")[0]
