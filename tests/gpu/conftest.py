"""What the GPU's tests share: the device, between processes (make test-gpu N=12)."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """What PyTorch keeps for the next test the other processes lack. A process that an illegal access has taken the
    device from ends: its later tests would all fail, as fast as it takes them from the other processes."""
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # another one takes its place
        pytest.exit(f"this process has lost its device: {error}", returncode=1)
    torch.cuda.empty_cache()
