"""Interventions: what may be changed at a point of the network, as values. `llama.model.taps` carries them out.

Each is frozen and compared by its `digest`, which tells the prefix cache what was computed under which change. Those of
one sequence are applied in the order given; what is captured at a point is read after them.
"""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import blake2b
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self
from uuid import uuid4

import torch
from torch import Tensor

from llama.api.errors import ParameterError
from llama.kernels.types import wide_dtype

Positions = str | Sequence[int]  # "all", "prompt", "generated", "last" (the prompt's last token) or a list
Rows = range | tuple[int, ...]  # positions as numbers
ENDLESS = 1 << 60


def rows_of(positions: Positions, prompt_len: int) -> Rows:
    """Positions as numbers: a range, or those that were listed, in their order."""
    named = {
        "all": range(ENDLESS),
        "prompt": range(prompt_len),
        "generated": range(prompt_len, ENDLESS),
        "last": range(prompt_len - 1, prompt_len),
    }
    if isinstance(positions, str) and positions in named:
        return named[positions]
    if isinstance(positions, str) or not isinstance(positions, Sequence):
        legal = f"{', '.join(named)} or a list of integers"
        raise ParameterError(f"positions must be {legal}, got {positions!r}", "positions")
    if any(isinstance(p, bool) or not isinstance(p, Integral) for p in positions):
        raise ParameterError(f"positions must be integers, got {list(positions)!r}", "positions")
    numbers = [int(p) for p in positions]
    wrong = next((p for p in numbers if not -prompt_len <= p < prompt_len), None)
    if wrong is not None:
        raise ParameterError(f"positions has {wrong}, and the prompt has {prompt_len} tokens", "positions")
    return tuple(p % prompt_len for p in numbers)


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change at `point` (a name or a pattern of `llama.model.taps.resolve_points`) of the tokens at `positions`."""

    point: str
    tensor: ClassVar[str] = ""  # the field that holds a tensor

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def positions(self) -> Positions:
        raise NotImplementedError

    def of(self, value: Tensor, places: list[int]) -> Tensor:
        """The new value for `value` [rows, ...], whose rows are the `places` of the positions that are listed."""
        raise NotImplementedError

    def shaped(self, shape: tuple[int, ...], positions: Rows) -> bool:
        """Whether the tensor fits a point whose token has this shape."""
        raise NotImplementedError

    @property
    def number(self) -> tuple[str, Any]:
        """Name and value of the field that holds a number; 0 where there is none."""
        return "", 0

    def snapshot(self) -> Self:
        """The same as it is now: its tensors and lists may be changed by their owner, and it may not be."""
        changes: dict[str, Any] = {}
        for key in fields(self):
            value = getattr(self, key.name)
            if isinstance(value, Tensor):
                changes[key.name] = value.detach().clone()
            elif isinstance(value, list):
                changes[key.name] = tuple(value)
        return replace(self, **changes)

    @cached_property
    def digest(self) -> bytes:
        """Of everything that decides what it does, as it was when this was first asked for."""
        told = blake2b(digest_size=16)
        told.update(self.name.encode())
        for key in fields(self):
            value = getattr(self, key.name)
            if isinstance(value, Tensor):
                whole = value.detach().cpu().contiguous()
                told.update(f";{key.name}:{whole.dtype}{tuple(whole.shape)}".encode())
                told.update(whole.view(-1).view(torch.uint8).numpy().tobytes())
            elif not callable(value):
                told.update(f";{key.name}={value!r}".encode())
        return told.digest()


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """x + scale * vector; with `norm_match` brought back to the norm of x. vector [*point]."""

    vector: Tensor
    scale: float = 1.0
    positions: Positions = "all"
    norm_match: bool = False
    tensor = "vector"

    def delta(self) -> Tensor:
        return self.vector * self.scale

    def of(self, value: Tensor, places: list[int]) -> Tensor:
        moved = value + self.delta()
        if not self.norm_match:
            return moved
        norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (value, moved)]
        return moved * (norms[0] / norms[1].clamp_min(torch.finfo(value.dtype).tiny))

    def shaped(self, shape: tuple[int, ...], positions: Rows) -> bool:
        return tuple(self.vector.shape) in (shape, shape[-1:])

    @property
    def number(self) -> tuple[str, Any]:
        return "scale", self.scale


@dataclass(frozen=True, eq=False)
class Replace(Intervention):
    """values [*point] for every position, or [positions, *point], one for each that is listed."""

    values: Tensor
    positions: Positions = "prompt"
    tensor = "values"

    def of(self, value: Tensor, places: list[int]) -> Tensor:
        whole = self.values.dim() == value.dim() - 1
        return self.values.expand_as(value) if whole else self.values[places]

    def shaped(self, shape: tuple[int, ...], positions: Rows) -> bool:
        return tuple(self.values.shape) in (shape, (len(positions), *shape))


@dataclass(frozen=True, eq=False)
class Scale(Intervention):
    """factor * x, of all or of the listed heads (points q, k, v, z and their like)."""

    factor: float
    heads: Sequence[int] | None = None
    positions: Positions = "all"

    def of(self, value: Tensor, places: list[int]) -> Tensor:
        if self.heads is None:
            return value * self.factor
        factors = torch.ones(value.shape[1], 1, dtype=value.dtype, device=value.device)
        factors[list(self.heads)] = self.factor
        return value * factors

    def shaped(self, shape: tuple[int, ...], positions: Rows) -> bool:
        if self.heads is None:
            return True
        heads = self.heads if isinstance(self.heads, Sequence) else (None,)
        whole = all(isinstance(head, Integral) and not isinstance(head, bool) for head in heads)
        return whole and len(shape) == 2 and all(-shape[0] <= head < shape[0] for head in self.heads)

    @property
    def number(self) -> tuple[str, Any]:
        return "factor", self.factor


@dataclass(frozen=True, eq=False)
class Project(Intervention):
    """x without ("remove"), or only ("keep"), what lies in the span of `directions` [n, size] (or [size])."""

    directions: Tensor
    mode: Literal["remove", "keep"] = "remove"
    positions: Positions = "all"
    tensor = "directions"

    def of(self, value: Tensor, places: list[int]) -> Tensor:
        inside = (value.to(self._basis.dtype) @ self._basis @ self._basis.T).to(value.dtype)
        return value - inside if self.mode == "remove" else inside

    @cached_property
    def _basis(self) -> Tensor:
        """[size, rank], orthonormal, in at least float32: a direction that is 0, or follows from others, adds none."""
        given = self.directions.reshape(-1, self.directions.shape[-1]).to(wide_dtype(self.directions.dtype))
        largest = given.abs().amax(1, keepdim=True)
        lines = given[largest[:, 0] > 0] / largest[largest > 0][:, None]
        mixtures, sizes, _ = torch.linalg.svd(lines.detach(), full_matrices=False)
        least = max(lines.shape) * torch.finfo(lines.dtype).eps * sizes[:1]
        return torch.linalg.qr((mixtures[:, sizes > least].T @ lines).T)[0]

    def shaped(self, shape: tuple[int, ...], positions: Rows) -> bool:
        return self.directions.dim() in (1, 2) and self.directions.shape[-1] == shape[-1]


@dataclass(frozen=True, eq=False)
class Apply(Intervention):
    """function(x [rows, *point]) -> the same shape. It sees the rows of its own sequence that one step computes, a
    number that depends on the engine: it must treat rows alike. Keys and values computed under it are not shared."""

    function: Callable[[Tensor], Tensor]
    positions: Positions = "all"
    identity: str = field(default_factory=lambda: uuid4().hex, repr=False)

    def of(self, value: Tensor, places: list[int]) -> Tensor:
        return self.function(value)

    def shaped(self, shape: tuple[int, ...], positions: Rows) -> bool:
        return callable(self.function)


def checked(given: Intervention, shape: tuple[int, ...], positions: Rows, like: Tensor) -> Intervention:
    """The intervention with its tensor on the device and in the dtype of `like`. ParameterError for what does not fit
    a point of this shape."""
    changes: dict[str, Any] = {}
    where = f"{given.name} at {given.point}"
    if given.tensor:
        changes[given.tensor] = _brought(where, given.tensor, getattr(given, given.tensor), like)
    _check_number(given, wide_dtype(like.dtype))
    name, number = given.number
    if isinstance(number, int) and name:
        changes[name] = float(number)  # PyTorch takes no larger integers than 64 bits have
    for name, legal in (("norm_match", (True, False)), ("mode", ("remove", "keep"))):
        value = getattr(given, name, legal[0])
        if not isinstance(value, type(legal[0])) or value not in legal:
            told = f"{given.name}: {name} must be {legal[0]!r} or {legal[1]!r}, got {reprlib.repr(value)}"
            raise ParameterError(told, "interventions")
    if not given.shaped(shape, positions):
        got = list(getattr(given, given.tensor).shape) if given.tensor else repr(given)
        what = f"{given.name} does not fit {given.point}, whose value for one token is {list(shape)}"
        raise ParameterError(f"{what}: got {got}", "interventions")
    own = replace(given, **changes)
    if isinstance(own, Add) and not bool(own.delta().isfinite().all()):
        raise ParameterError(f"{where}: {number!r} times the vector is too large for {like.dtype}", "interventions")
    return own


def _brought(where: str, name: str, tensor: Any, like: Tensor) -> Tensor:
    is_dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    if not is_dense or tensor.is_complex() or tensor.is_quantized:
        found = (
            f"{tensor.dtype} {tensor.layout} on {tensor.device}"
            if isinstance(tensor, Tensor)
            else type(tensor).__name__
        )
        raise ParameterError(f"{where}: {name} must be a tensor of real numbers, got {found}", "interventions")
    if not bool(tensor.isfinite().all()):
        raise ParameterError(f"{where}: {name} holds NaN or infinities", "interventions")
    brought = tensor.to(like.device, like.dtype)
    if not bool(brought.isfinite().all()):
        raise ParameterError(f"{where}: {name} holds numbers that are too large for {like.dtype}", "interventions")
    return brought


def _check_number(given: Intervention, dtype: torch.dtype) -> None:
    name, number = given.number
    if not isinstance(number, Real) and not (isinstance(number, Tensor) and number.dim() == 0):
        raise ParameterError(f"{given.name}: {name} must be a number, got {number!r}", "interventions")
    largest = torch.finfo(dtype).max
    value: Any = number.detach() if isinstance(number, Tensor) else number
    if not -largest <= value <= largest:  # NaN compares false
        raise ParameterError(f"{given.name}: {name} must be finite in {dtype}, got {number!r}", "interventions")
