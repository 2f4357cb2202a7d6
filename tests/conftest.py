"""One thread a process, since tensors are small and threads that wait for a busy core waste it; one seed a test."""

import os

# Read by torch when it is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test draws the same numbers whichever came before it."""
    torch.manual_seed(1_000_003)  # of no generator that a test makes itself
