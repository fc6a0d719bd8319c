from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if (
    not torch.cuda.is_available()
):  # set before triton is imported, so that its kernels are interpreted on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("here", deadline=None, max_examples=20, print_blob=True)
settings.load_profile("here")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The suite runs in parallel processes. With one thread each they do not share cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    # A test may have started more threads, and a fork of a process with several can hang.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    # A process group that a test joined has threads, too.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _poison():
    """Fill new memory with NaN, so that a test notices numbers that were not written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


os.environ.setdefault("HF_HUB_OFFLINE", "1")
