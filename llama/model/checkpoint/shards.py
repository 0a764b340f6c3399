"""The safetensors format: headers checked before a byte of data is touched, data read straight into its destination.

A file is 8 bytes of header length, a JSON header of names to dtype, shape and byte range, and the data. Reading is
plain `readinto`: no mapping whose pages would count twice, and a file that shrinks under us is an error, not a signal.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.api.errors import CheckpointError
from llama.files import open_regular, unique_keys
from llama.model.parallel import Cut

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# What quantised weights and what describes them are stored in; unsigned words are read as the same bits.
_CODE_DTYPES = DTYPES | {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "U32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}
_CODES = {dtype: code for code, dtype in _CODE_DTYPES.items() if code != "U32"}
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_TENSORS = 100_000
_STAGE_BYTES = 16 << 20

_FOREIGN = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"<!DOCTYPE", "is an HTML page, not a safetensors file; was the download redirected to a login page?"),
    (b"<!doctype", "is an HTML page, not a safetensors file; was the download redirected to a login page?"),
    (b"<html", "is an HTML page, not a safetensors file; was the download redirected to a login page?"),
    (b"GGUF", "is a GGUF file; convert it with `llama convert`"),
    (b"PK\x03\x04", "is a PyTorch pickle, which can run code; convert it with `llama convert`"),
    *((b"\x80" + bytes([n]), "is a pickle, which can run code; convert it with `llama convert`") for n in range(2, 6)),
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `offset` and `nbytes` in the file."""

    path: Path
    name: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Raises CheckpointError for what is not a float that we compute with."""
        if self.code not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {self.name} is stored as {self.code}; weights must be one of {', '.join(DTYPES)}"
            )
        return DTYPES[self.code]

    @property
    def place(self) -> tuple[Path, int]:
        return self.path, self.offset


def read_header(path: Path) -> list[StoredTensor]:
    """Every tensor of a safetensors file, in file order. Raises CheckpointError for anything malformed or truncated."""
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= _MAX_HEADER or start[8:9] != b"{":
                # Only now: the length of a sound header may begin with the same bytes as another format.
                what = next((what for magic, what in _FOREIGN if start.startswith(magic)), "is not a safetensors file")
                raise CheckpointError(f"{path}: {what}")
            if 8 + length > size:
                raise CheckpointError(f"{path}: is truncated: {size} bytes, the header alone needs {8 + length}")
            file.seek(8)
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if text.count(b"data_offsets") > _MAX_TENSORS:  # reading a million takes half a minute
        raise CheckpointError(f"{path}: its safetensors header lists more than {_MAX_TENSORS} tensors")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise CheckpointError(f"{path}: its safetensors header is not JSON") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: in its safetensors header, {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header is not a JSON object")
    tensors = [_stored(path, 8 + length, name, e) for name, e in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(f"{path}: {tensor.name} overlaps another tensor or leaves a hole before it")
        end += tensor.nbytes
    if end != size:
        what = "is truncated" if end > size else "has bytes after its last tensor"
        raise CheckpointError(f"{path}: {what}: {size} bytes, its header describes {end}")
    return tensors


_ITEM_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_ITEM_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


def _stored(path: Path, data_start: int, name: str, entry: Any) -> StoredTensor:
    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63

    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(code, str) and isinstance(shape, list) and all(map(is_count, (*shape, begin, end)))):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: the header's entry of {name} is malformed") from None
    expected = math.prod(shape) * _ITEM_SIZES.get(code, 0)
    if code in _ITEM_SIZES and end - begin != expected:
        raise CheckpointError(f"{path}: {name} {code} {shape} needs {expected} bytes, its range has {end - begin}")
    return StoredTensor(path, name, code, tuple(shape), data_start + begin, end - begin)


def read_into(stored: StoredTensor, target: Tensor) -> None:
    """Fill a contiguous `target` of the stored shape, on any device and in any float dtype."""
    flat = target.view(-1)
    with open_regular(stored.path) as file:
        file.seek(stored.offset)
        if target.device.type == "cpu" and target.dtype == stored.dtype:
            _read_exactly(file, stored, flat)
            return
        step = _STAGE_BYTES // stored.dtype.itemsize
        stage = torch.empty(min(step, flat.numel()), dtype=stored.dtype, device="cpu")
        for begin in range(0, flat.numel(), step):
            part = stage[: min(step, flat.numel() - begin)]
            _read_exactly(file, stored, part)
            flat[begin : begin + part.numel()].copy_(part)


def read_part(stored: StoredTensor, cut: Cut, target: Tensor) -> None:
    """Fill a contiguous `target` with a part of a stored tensor, of whose bytes no others are read."""
    rows = range(stored.shape[0])[cut.rows]
    row_bytes = stored.nbytes // max(1, stored.shape[0])
    offset, nbytes = stored.offset + rows.start * row_bytes, len(rows) * row_bytes
    part = replace(stored, shape=(len(rows), *stored.shape[1:]), offset=offset, nbytes=nbytes)
    if cut.shape(stored.shape) == part.shape:
        read_into(part, target)
    else:
        _read_columns(part, range(stored.shape[1])[cut.columns], target)


def _read_columns(stored: StoredTensor, columns: range, target: Tensor) -> None:
    """A matrix's rows one by one: what lies between is the other ranks'."""
    (num_rows, width), size = stored.shape, stored.dtype.itemsize
    stage = torch.empty(
        max(1, min(num_rows, _STAGE_BYTES // (size * len(columns)))), len(columns), dtype=stored.dtype, device="cpu"
    )
    data = stage.view(-1).view(torch.uint8).numpy().data
    row_bytes = size * len(columns)
    with open_regular(stored.path) as file:
        for begin in range(0, num_rows, len(stage)):
            part = target[begin : begin + len(stage)]
            for row in range(len(part)):
                offset = stored.offset + ((begin + row) * width + columns.start) * size
                place = data[row * row_bytes : (row + 1) * row_bytes]
                while place:
                    count = os.preadv(file.fileno(), [place], offset)
                    if not count:
                        raise _changed(stored)
                    place, offset = place[count:], offset + count
            part.copy_(stage[: len(part)])


def read_codes(stored: StoredTensor) -> Tensor:
    """The tensor in the dtype that it is stored in, on the CPU."""
    tensor = torch.empty(stored.shape, dtype=_CODE_DTYPES[stored.code], device="cpu")
    with open_regular(stored.path) as file:
        file.seek(stored.offset)
        _read_exactly(file, stored, tensor.view(-1))
    return tensor


def _read_exactly(file: BufferedReader, stored: StoredTensor, flat: Tensor) -> None:
    rest = flat.view(torch.uint8).numpy().data
    while rest:
        count = file.readinto(rest)  # Linux reads at most 2 GiB at once
        if not count:
            raise _changed(stored)
        rest = rest[count:]


def _changed(stored: StoredTensor) -> CheckpointError:
    return CheckpointError(f"{stored.path}: ends inside {stored.name}; did the file change while it was read?")


class Stored(NamedTuple):
    """A tensor to write: its code and shape go into the header before it is made."""

    code: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> "Stored":
        return cls(_CODES[dtype], shape, make)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_SIZES[self.code]


def write(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a safetensors file; its tensors are made one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor.make().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
