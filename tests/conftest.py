from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before triton is imported: its kernels run on the CPU then
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the suite runs in parallel processes; one thread each keeps them out of each other's way
torch.set_num_threads(1)
settings.register_profile("here", deadline=None, max_examples=20, print_blob=True)
settings.load_profile("here")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison():
    """Fresh memory is NaN, so that an output that was not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


os.environ.setdefault("HF_HUB_OFFLINE", "1")
