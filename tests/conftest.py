from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # before triton is imported: its kernels run on the CPU then
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("here", deadline=None, max_examples=20, print_blob=True)
settings.load_profile("here")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The suite runs in parallel processes: one thread each keeps them out of each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    # a test may have asked for more threads, and a fork of a process with some waits for ever
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    # likewise a group of processes that a test joined: a fork would wait for its threads
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _poison():
    """Fresh memory is NaN, so that an output that was not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


os.environ.setdefault("HF_HUB_OFFLINE", "1")
