"""What the GPU's tests share: the device, between processes (make test-gpu N=12)."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """What PyTorch keeps for the next test the other processes lack."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
