"""Launches of jitted kernels, and sizes of grids, at little cost for the host.

At each launch Triton looks for the compiled form by all that a kernel may be specialised for, and binds arguments by
name: a few times what the launch itself costs. An eager step has six launches per layer, so the host would be what a
step waits for. A Launcher keeps the compiled form by what it was compiled for. Where a wrapper knows that a call is of
a kind that it has seen, a Launch leaves out the search too, and all that goes before it: checks, sizes, the grid.
"""

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import KernelInterface

T = TypeVar("T")

_MOST_KINDS = 4096


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own function of this name costs the host as much as a launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Kinds(dict[Hashable, T], Generic[T]):
    """What is settled for all calls of a kind: `types.kind_of` all tensors, and numbers. Not without end, for each
    number of tokens is a kind of its own."""

    def keep(self, kind: Hashable, settled: T) -> T:
        if len(self) >= _MOST_KINDS:
            self.clear()
        self[kind] = settled
        return settled


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
        known = self.form(arguments, constants)
        if known is not None:
            compiled, others = known
            compiled[*grid, 1, 1](*arguments, *others)
            return
        launched = self._kernel[grid](*arguments, **constants)
        key = self._key(arguments, constants)
        if key is not None and isinstance(launched, CompiledKernel):
            others = tuple(constants[name] for name in self._kernel.arg_names[len(arguments) :])
            self._compiled[key] = launched, others

    def form(
        self, arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> tuple[CompiledKernel, tuple[Any, ...]] | None:
        """What was compiled for such arguments, and the constants that it takes behind them."""
        key = self._key(arguments, constants)
        return None if key is None else self._compiled.get(key)

    @staticmethod
    def _is_native(tensor: Tensor) -> bool:
        return tensor.is_cuda

    def _key(self, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...] | None:
        """None where a tensor is not aligned, or the first is not on a CUDA device."""
        first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
        if not self._is_native(first):
            return None
        parts: list[Any] = [first.get_device()]
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


class Launch:
    """A launch whose grid, numbers and constants are settled. It is called with the kernel's tensors, which are its
    first parameters: all calls have tensors of one kind, or new ones, which begin at multiples of 16."""

    def __init__(
        self, launcher: Launcher, grid: tuple[int, ...], numbers: tuple[int | float, ...], **constants: Any
    ) -> None:
        self._launcher, self._grid, self._numbers, self._constants = launcher, grid, numbers, constants
        self._run: Callable[..., None] | None = None
        self._others: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor | tuple[Tensor, ...]) -> None:
        if self._run is not None:
            self._run(*tensors, *self._others)
            return
        arguments = *tensors, *self._numbers
        self._launcher(self._grid, *arguments, **self._constants)
        known = self._launcher.form(arguments, self._constants)
        if known is not None:
            compiled, others = known
            self._run, self._others = compiled[*self._grid, 1, 1], (*self._numbers, *others)
