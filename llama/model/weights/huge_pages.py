"""Weights on huge pages: with pages of 4 KB a matmul of few rows spends a sixth of its time in looking up addresses."""

import ctypes
import sys
import time

_HUGE = 1 << 21
_STEP = 32 * _HUGE  # moved between two looks at the clock
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # <linux/mman.h>


def move_to_huge_pages(seconds: float) -> None:
    """Ask Linux to keep this process's anonymous memory on pages of 2 MB, and move it there for at most `seconds`.

    The kernel moves the rest later. Nothing happens on other systems, or where huge pages are switched off.
    """
    if sys.platform != "linux":
        return
    give_back()  # first what packing left over
    libc = ctypes.CDLL(None)
    madvise = libc.madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    deadline = time.monotonic() + seconds
    for start, end in _large_mappings():
        madvise(start, end - start, _MADV_HUGEPAGE)
        for part in range(start, end, _STEP):
            if time.monotonic() > deadline:
                break
            madvise(part, min(_STEP, end - part), _MADV_COLLAPSE)


def give_back() -> None:
    """Freed memory, of which glibc keeps pieces of up to 32 MB, to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _large_mappings() -> list[tuple[int, int]]:
    """Start and end of the huge pages that lie within private, writable memory without a file behind it."""
    mappings = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            addresses, rights, _, _, inode = line.split(maxsplit=5)[:5]
            start, end = (int(address, 16) for address in addresses.split("-"))
            start, end = -(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE
            if rights == "rw-p" and inode == "0" and start < end:
                mappings.append((start, end))
    return mappings
