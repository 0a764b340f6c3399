"""Files of tensors that a later call takes up again: written whole or not at all, looked at before they are read."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from llama.api.errors import ParameterError, blamed_on
from llama.model.checkpoint.shards import read_header


def write(path: str | Path, tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    """One safetensors file with `told` as its metadata. OSError names the file that cannot be written."""
    from safetensors import SafetensorError  # here and below: machines that only run kernels have no safetensors
    from safetensors.torch import save_file

    path = Path(path)
    number = errno.EISDIR if path.is_dir() else 0 if path.parent.is_dir() else errno.ENOENT
    if number:
        raise OSError(number, os.strerror(number), str(path))
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, building, dict(told))
        os.replace(building, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """What `write` has written, as safetensors' `safe_open` gives it. ParameterError for any other file."""
    with blamed_on("path"):
        read_header(Path(path))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ParameterError(f"{path}: {error}", "path") from None
