"""The C library's heap, which keeps what was freed for the next one who asks: hundreds of megabytes of a large text."""

import ctypes

LARGE_TEXT = 2**20  # characters, or bytes: what takes long enough that this costs nothing beside it


def give_back() -> None:
    """Return what is free in the heap to the system: about 50 ms. Does nothing where the C library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
