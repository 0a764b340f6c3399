"""The form of a quantised weight: small codes stay what is kept in memory, whatever wrote them.

`int4`, `int8` and `fp8` say how a dense weight becomes codes. Products with codes spend their time on widening them, so
on a CPU `prepare` makes further forms of a weight, by the layout that is asked for:

    compact    none: a product widens the codes strip by strip
    balanced   one for few tokens in models of 16 bits (int8, int4). Codes that have none lie in 16-bit floats instead,
               which hold them: fp8, and int8 of a small weight on a processor without VNNI
    fast       and one for many tokens, as fast as the dense model: int8 codes with a scale per row lie
               in 16-bit floats too, others have a dense copy beside them
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels import ops
from llama.kernels.cpu.matmul import codes_of, nibble_block, pack_nibbles, widen
from llama.kernels.types import QuantizedWeight
from llama.model.parallel import Cut
from llama.model.weights import fp8, int4, int8, wide_codes
from llama.model.weights.coded import CodedWeight
from llama.model.weights.form import WeightForm
from llama.model.weights.packed import pack

_STRIP = 1 << 20  # weights widened at once for dense()
SCHEMES = ("int8", "int4", "fp8")
LAYOUTS = ("compact", "balanced", "fast")
_NAMES = {torch.int16: "int4 codes", torch.int8: "int8 codes", torch.float8_e4m3fn: "fp8 codes"}


class FewTokens(Protocol):
    """A second form for up to `most_tokens` rows of x; `most_beside_dense` are those that a dense copy loses to it."""

    library: str
    most_tokens: int
    most_beside_dense: int
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor: ...


class Quantised:
    """x W^T = x[:, order] W'^T, W' the codes' own order of columns (None = as they are): act-order sorts by group."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, order: Tensor | None = None) -> None:
        self._weight: QuantizedWeight | None = weight
        self.dtype = dtype
        self.device = weight.codes.device
        self.order = order
        self.few_tokens: FewTokens | None = None
        self._most_few = 0
        self.copy: WeightForm | None = None  # dense, columns in the order of x
        self._wide: wide_codes.WideCodes | None = None  # in place of the weight
        self.is_prepared = False
        self._layout = "balanced"

    def __reduce__(self) -> tuple[Callable[..., "Quantised"], tuple[Any, ...]]:
        """What is beside the codes follows from them, and is neither copied nor pickled."""
        layout = self._layout if self.is_prepared else None
        return _again, (self.weight, self.dtype, self.order, layout, self._most_few)

    @property
    def weight(self) -> QuantizedWeight:
        if self._weight is None:
            assert self._wide is not None
            return self._wide.weight()
        return self._weight

    @property
    def bare(self) -> QuantizedWeight | None:
        """The weight, where it serves every product as it is; None where another form does, or another order."""
        return self._weight if self.order is None and self.few_tokens is None and self.copy is None else None

    def __call__(self, x: Tensor) -> Tensor:
        is_few = 0 < x.shape[0] <= self._most_few
        if self.copy is not None and not is_few:
            return self.copy(x)
        if self.order is not None:
            x = x.index_select(1, self.order)
        if self.few_tokens is not None and is_few:
            return self.few_tokens(x)
        return ops.quantized_matmul(x, self.weight) if self._wide is None else self._wide(x)

    def dense(self) -> Tensor:
        weight = self.weight
        rows, columns = weight.shape
        target = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        step = max(1, _STRIP // columns)
        for start in range(0, rows, step):
            part = slice(start, min(rows, start + step))
            w = widen(weight, part)
            target[part] = w if self.order is None else w[:, self.order.argsort()]
        return target

    @property
    def nbytes(self) -> int:
        own = 0 if self._weight is None else sum(tensor.nbytes for tensor in self._weight.tensors)
        beside = (self.few_tokens, self.copy, self._wide, self.order)
        return own + sum(form.nbytes for form in beside if form is not None)

    def prepare(self, layout: str = "balanced", rows: int | None = None) -> None:
        """Add the forms that this machine multiplies fast. `rows`: of the weight that this one is a sample of."""
        if self.is_prepared:
            return
        self.is_prepared, self._layout = True, layout
        weight = self.weight
        if layout == "compact" or self.device.type != "cpu":
            return
        numbers = (rows or weight.shape[0]) * weight.shape[1]
        self.few_tokens = int8.few_tokens(weight, self.dtype, numbers) or int4.few_tokens(weight, self.dtype)
        few, has_eight_bits = self.few_tokens, weight.codes.dtype != torch.int16
        if (layout == "fast" or (few is None and has_eight_bits)) and wide_codes.fits(weight, self.dtype):
            self._weight, self._wide = None, wide_codes.WideCodes(weight, self.dtype)
        elif layout == "fast":
            dense = self.dense()
            self.copy = pack(dense) or Dense(dense)
        if few is not None:
            self._most_few = few.most_beside_dense if layout == "fast" else few.most_tokens

    def serve_few(self) -> None:
        """All tokens that the form for few can take go through it, whatever else there is: in one form they have the
        same bits."""
        if self.few_tokens is not None:
            self._most_few = self.few_tokens.most_tokens

    @property
    def told(self) -> str:
        """Its forms, for a user."""
        many = _NAMES[self.weight.codes.dtype] if self._wide is None else self._wide.told
        many = many if self.copy is None else "a dense copy"
        few = self.few_tokens
        if few is not None and self._most_few == sys.maxsize:
            return f"{few.library} for any number of tokens"
        return many if few is None else f"{few.library} for up to {self._most_few} tokens, {many} for more"

    def to(self, device: torch.device, dtype: torch.dtype) -> "Quantised":
        """For another device or dtype of the model; codes and scales are neither rounded nor widened."""
        weight = self.weight
        moved = {name: value.to(device) for name, value in _fields(weight).items()}
        order = None if self.order is None else self.order.to(device)
        return Quantised(_with(weight, moved), dtype, order)

    def rows(self, start: int, count: int) -> "Quantised":
        """Some of the rows, views where they can be."""
        weight = self.weight
        fields = {name: value[:, start : start + count] for name, value in _fields(weight).items()}
        fields["codes"] = weight.codes[start : start + count]
        return Quantised(_with(weight, fields), self.dtype, self.order)

    def columns(self, columns: slice) -> "Quantised":
        """Some of the columns, as whole groups. ValueError where that cannot be."""
        weight, size = self.weight, self.weight.group_size
        start, stop, _ = columns.indices(weight.shape[1])
        if self.order is not None:
            raise ValueError("columns that lie in an order of their own (act-order) are not cut for tensor parallelism")
        groups = slice(None)
        if size < weight.shape[1]:
            if start % size or (stop % size and stop != weight.shape[1]):
                raise ValueError(f"columns {start} to {stop} are not whole groups of {size}")
            groups = slice(start // size, -(-stop // size))
        fields = {name: value[groups].contiguous() for name, value in _fields(weight).items() if name != "codes"}
        size = min(size, stop - start)
        codes = codes_of(weight)[:, start:stop].contiguous()
        block = nibble_block(stop - start, size) if weight.codes.dtype == torch.int16 else None
        fields["codes"] = codes if block is None else pack_nibbles(codes, block)
        return Quantised(replace(weight, group_size=size, **fields), self.dtype)

    def cut(self, cut: Cut) -> "Quantised":
        """The part of a tensor that a rank has."""
        rows, columns = self.weight.shape
        if cut.is_whole((rows, columns)):
            return self
        start, stop, _ = cut.rows.indices(rows)
        part = self if stop - start == rows else self.rows(start, stop - start)
        return part if cut.shape((rows, columns))[1] == columns else part.columns(cut.columns)

    def taking(self, source: Tensor) -> "Quantised":
        """One of the same kind with the columns `source` of the codes, all in the scales of the first group."""
        q = codes_of(self.weight).view(torch.uint8)[:, source].view(codes_of(self.weight, slice(1)).dtype)
        fields = {name: value[:1].expand_as(value).contiguous() for name, value in _fields(self.weight).items()}
        block = nibble_block(q.shape[1], self.weight.group_size)
        is_packed = self.weight.codes.dtype == torch.int16 and block is not None
        fields["codes"] = pack_nibbles(q, block) if is_packed and block is not None else q
        taken = Quantised(_with(self.weight, fields), self.dtype)
        if self.is_prepared:
            taken.prepare(self._layout)
            taken._most_few = self._most_few
        return taken

    def codes(self) -> Tensor:
        """q [N, K], columns in the order of x."""
        q = codes_of(self.weight)
        return q if self.order is None else q[:, self.order.argsort()]


def _again(
    weight: QuantizedWeight, dtype: torch.dtype, order: Tensor | None, layout: str | None, most_few: int
) -> Quantised:
    form = Quantised(weight, dtype, order)
    if layout is not None:
        form.prepare(layout)
        form._most_few = most_few
    return form


class Dense:
    """A part that was left dense in a module whose other parts are quantised."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.dtype = weight.dtype
        self.device = weight.device

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def dense(self) -> Tensor:
        return self.weight.clone()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def prepare(self, layout: str = "balanced") -> None:
        """Stays as it is: few modules have such a part."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "Dense":
        return Dense(self.weight.to(device, dtype))

    def taking(self, source: Tensor) -> "Dense":
        return Dense(self.weight[:, source])

    def rows(self, start: int, count: int) -> "Dense":
        return Dense(self.weight[start : start + count])


class Joined:
    """Parts of a fused module that no one matmul serves: their results lie side by side."""

    def __init__(self, parts: "Sequence[Quantised | Dense]") -> None:
        self.parts = list(parts)
        self.dtype = parts[0].dtype
        self.device = parts[0].device
        self.is_prepared = False

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=1)

    def dense(self) -> Tensor:
        return torch.cat([part.dense() for part in self.parts])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def prepare(self, layout: str = "balanced") -> None:
        for part in self.parts:
            part.prepare(layout)
        self.is_prepared = True

    def to(self, device: torch.device, dtype: torch.dtype) -> "Joined":
        return Joined([part.to(device, dtype) for part in self.parts])

    def rows(self, start: int, count: int) -> "Quantised | Dense":
        first = 0
        for part in self.parts:
            size = part.weight.shape[0]
            if first <= start and start + count <= first + size:
                return part.rows(start - first, count)
            first += size
        raise AssertionError("rows that no one part has")


CodedForm = Quantised | Joined


def quantise(weight: Tensor, scheme: str) -> Quantised:
    """A dense weight as "int8", "int4" or "fp8"; each module says by which formula."""
    make = {"int8": int8.quantise, "int4": int4.quantise, "fp8": fp8.quantise}[scheme]
    return Quantised(make(weight.detach()), weight.dtype)


def join(parts: "Sequence[Quantised | Dense]") -> CodedForm:
    """One form of the parts of a fused module, which keep their own scales."""
    coded = [part for part in parts if isinstance(part, Quantised)]
    if len(coded) < len(parts) or not all(_fit(coded[0], part) for part in coded[1:]):
        return Joined(parts)
    if len(coded) == 1:
        return coded[0]
    first = coded[0]
    fields = [_fields(part.weight) for part in coded]
    stacked = {name: torch.cat([each[name] for each in fields], dim=1) for name in fields[0] if name != "codes"}
    stacked["codes"] = torch.cat([each["codes"].view(torch.uint8) for each in fields]).view(first.weight.codes.dtype)
    return Quantised(_with(first.weight, stacked), first.dtype, first.order)


def of_coded(coded: CodedWeight, dtype: torch.dtype) -> Quantised | None:
    """What a checkpoint's format tells of a weight, on the CPU; None for what has no such form: a table of values, or
    groups of unequal sizes."""
    grouped = _regular_groups(coded.groups, coded.codes.shape[1])
    if coded.table is not None or grouped is None:
        return None
    size, order = grouped
    q, zeros = coded.codes, coded.zeros
    rows, columns = q.shape
    groups = -(-columns // size)
    middle = 1 << (coded.bits - 1)
    if q.dtype == torch.uint8:  # unsigned: the middle moves to 0
        q = (q - middle).view(torch.int8)
        zeros = torch.full((1, groups), -middle, device="cpu") if zeros is None else zeros.to(torch.int16) - middle
        if coded.minima is None and not bool(zeros.any()):
            zeros = None
    if order is not None:
        q = q.view(torch.uint8)[:, order].view(q.dtype)
    block = nibble_block(columns, size) if coded.bits == 4 else None
    weight = QuantizedWeight(
        codes=q.contiguous() if block is None else pack_nibbles(q.contiguous(), block),
        scales=_across(coded.scales, rows, groups),
        group_size=size,
        zeros=None if zeros is None else _across(zeros, rows, groups).to(torch.int8),
        minima=None if coded.minima is None else _across(coded.minima, rows, groups),
    )
    return Quantised(weight, dtype, order)


def _regular_groups(groups: int | Tensor, columns: int) -> tuple[int, Tensor | None] | None:
    """(size, order of columns): groups of one size, of which the last may be smaller. None if they are not such."""
    if isinstance(groups, int):
        return groups or columns, None
    order = groups.argsort(stable=True)
    in_order = groups[order]
    size = int((in_order == in_order[0]).sum())
    if not torch.equal(in_order, torch.arange(columns, device="cpu") // size):
        return None
    return size, None if torch.equal(order, torch.arange(columns, device="cpu")) else order


def _across(values: Tensor, rows: int, groups: int) -> Tensor:
    """[rows or 1, groups] -> [groups, rows]."""
    return values.expand(rows, groups).t().contiguous()


def _fit(first: Quantised, other: Quantised) -> bool:
    """Whether one matmul serves both."""
    a, b = _fields(first.weight), _fields(other.weight)
    if (first.order is None) != (other.order is None) or first.weight.group_size != other.weight.group_size:
        return False
    if first.order is not None and other.order is not None and not torch.equal(first.order, other.order):
        return False
    return {name: value.dtype for name, value in a.items()} == {name: value.dtype for name, value in b.items()}


def _fields(weight: QuantizedWeight) -> dict[str, Tensor]:
    names = ("codes", "scales", "zeros", "minima")
    return {name: getattr(weight, name) for name in names if getattr(weight, name) is not None}


def _with(weight: QuantizedWeight, fields: dict[str, Tensor]) -> QuantizedWeight:
    """Of the same groups, with other tensors."""
    return QuantizedWeight(
        fields["codes"], fields["scales"], weight.group_size, fields.get("zeros"), fields.get("minima")
    )
