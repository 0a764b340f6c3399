"""Memory that moves to huge pages keeps its contents."""

import sys

import pytest
import torch

from llama.model.weights.huge_pages import move_to_huge_pages


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has them")
def test_memory_on_huge_pages_is_the_same():
    values = torch.arange(1 << 21, dtype=torch.int64)
    address = values.data_ptr()
    move_to_huge_pages(seconds=0.2)
    assert values.data_ptr() == address
    assert torch.equal(values, torch.arange(1 << 21))
    with open("/proc/self/smaps") as lines:
        flags = [line for line in lines if line.startswith("VmFlags:")]
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as setting:
        switched_off = "[never]" in setting.read()
    assert switched_off or any(" hg" in line for line in flags)
