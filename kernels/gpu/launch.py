"""Launches of jitted kernels, and sizes of grids, at little cost for the host.

At each launch Triton looks for the compiled form by all that a kernel may be specialised for, and binds arguments by
name: a few times what the launch itself costs. An eager step has five launches per layer, so the host would be what a
step waits for. A Launcher keeps the compiled form by what it was compiled for.
"""

from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import KernelInterface


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own function of this name costs the host as much as a launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Launcher:
    """A kernel whose positional parameters are tensors, numbers, and tuples of them that begin with a tensor; constants
    and options come by name.

    Compiled forms are kept by the device, the tensors' dtypes, the constants, and the numbers but those that the kernel
    is not specialised for. They are used for tensors on a CUDA device whose addresses are multiples of 16, where
    alignment matters to the kernel; all other launches go through Triton.
    """

    def __init__(self, kernel: KernelInterface[Any]) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}
        # Under the interpreter a kernel has no such lists; it is launched as it is.
        names: list[str] = kernel.arg_names
        self._varies = [name in getattr(kernel, "do_not_specialize", ()) for name in names]
        self._is_aligned = [name not in getattr(kernel, "do_not_specialize_on_alignment", ()) for name in names]

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
        key = self._key(first.get_device(), arguments, constants) if first.is_cuda else None
        known = None if key is None else self._compiled.get(key)
        if known is not None:
            compiled, others = known
            compiled[*grid, 1, 1](*arguments, *others)
            return
        launched = self._kernel[grid](*arguments, **constants)
        if key is not None and isinstance(launched, CompiledKernel):
            others = tuple(constants[name] for name in self._kernel.arg_names[len(arguments) :])
            self._compiled[key] = launched, others

    def _key(self, device: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...] | None:
        """None where a tensor is not aligned."""
        parts: list[Any] = [device]
        addresses = 0
        for argument, varies, is_aligned in zip(arguments, self._varies, self._is_aligned, strict=False):
            for value in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(value, Tensor):
                    parts.append(value.dtype)
                    if is_aligned:
                        addresses |= value.data_ptr()
                else:
                    parts.append(value >> 31 if varies else value)  # how many bits it takes is a part of the form
        return None if addresses & 15 else (*parts, *constants.values())
