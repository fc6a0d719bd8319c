"""The ways in which the primitives are computed: each backend, both paths of Triton, and the path
for layouts in which a token meets many tokens of one class.

Tests use few channels, for which Triton takes its path for small tables. The name "triton, wide
tables" makes it take the other path. The name "torch, per token" projects each token once per class
in every layout, and the others never do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

from translution import backends

PATHS = [*backends.BACKENDS, "triton, wide tables", "torch, per token"]


@contextmanager
def backend_of(path: str) -> Iterator[str]:
    """Yield the backend of a path. Inside this context it takes that path."""
    from translution.backends.torch import per_token
    from translution.backends.triton import blocks

    with (
        blocks.small_as_wide() if path.endswith("wide tables") else nullcontext(),
        mock.patch.object(per_token, "pays", return_value=path.endswith("per token")),
        mock.patch.dict(per_token.BLOCK, {"cpu": 2}),
    ):
        yield path.split(",")[0]
