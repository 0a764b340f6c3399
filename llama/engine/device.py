"""Between host and device without waiting: each of these puts one copy into the device's queue and returns.

A copy runs beside the host only from and to pinned memory. PyTorch's allocator of such memory reuses a block only
when the copies that use it have ended, so nothing here keeps track of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arrays = list[NDArray[Any]]
# Fields of a mirror begin at multiples of it, as tensors of their own would: kernels load and copy in wide pieces.
ALIGNMENT = 256


def to_device(array: NDArray[Any], device: torch.device, dtype: type | None = None) -> Tensor:
    """A copy: later changes of `array` do not reach it."""
    copied = torch.from_numpy(array.astype(array.dtype if dtype is None else dtype))
    return copied if device.type == "cpu" else copied.pin_memory().to(device, non_blocking=True)


def pack(tensors: Sequence[Tensor]) -> Tensor | None:
    """The bytes of several tensors behind one another in one, which one copy brings to the host; None where they are
    there."""
    if tensors[0].device.type == "cpu":
        return None
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def fetch(packed: Tensor | None, tensors: Sequence[Tensor]) -> Callable[[], Arrays]:
    """Start the copy of what `pack` made of `tensors` -> what waits for it and gives the arrays."""
    if packed is None:
        return lambda: [tensor.numpy() for tensor in tensors]
    wait = fetch_tensor(packed)

    def arrays() -> Arrays:
        parts = wait().split([tensor.nbytes for tensor in tensors])
        # Viewed by NumPy, which takes any address: a tensor's view must begin at a multiple of its dtype's size.
        like = [torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype for tensor in tensors]
        return [p.numpy().view(d).reshape(t.shape) for p, d, t in zip(parts, like, tensors, strict=True)]

    return arrays


def fetch_tensor(tensor: Tensor) -> Callable[[], Tensor]:
    """Start the copy of a contiguous tensor -> what waits for it and gives it on the host."""
    if tensor.device.type == "cpu":
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


class Mirror:
    """Named arrays of fixed sizes: `host` is written by the host, `send` brings all of them to `device` in one copy.

    The device's tensors never move. They change in `send` alone, in the order of the queue: what was launched before
    still finds the old values.
    """

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], type]], device: torch.device) -> None:
        starts, size = {}, 0
        for name, (shape, dtype) in fields.items():
            starts[name] = size
            size += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        self._bytes = np.zeros(size, np.uint8)
        self._data = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host: dict[str, NDArray[Any]] = {}
        self.device: dict[str, Tensor] = {}
        for name, (shape, dtype) in fields.items():
            places = slice(starts[name], starts[name] + int(np.prod(shape)) * np.dtype(dtype).itemsize)
            self.host[name] = self._bytes[places].view(dtype).reshape(shape)
            self.device[name] = self._data[places].view(torch.from_numpy(self.host[name]).dtype).view(shape)

    def send(self) -> None:
        staged = torch.from_numpy(self._bytes)
        if self._data.device.type != "cpu":
            staged = staged.pin_memory()  # a copy, in a place that no copy under way reads
        self._data.copy_(staged, non_blocking=True)
