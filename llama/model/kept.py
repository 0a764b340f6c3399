"""Files of tensors that a later call takes up again: written whole or not at all, looked at before they are read."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from llama.api.errors import ParameterError, blamed_on, refusal
from llama.files import check_path
from llama.model.checkpoint.shards import read_header


def checked_target(path: str | Path) -> Path:
    """ParameterError where no file can be written, or where a folder or a device lies, which it would replace."""
    path = _checked_path(path)
    if not path.parent.is_dir():
        raise ParameterError(f"{path}: there is no folder {path.parent} for it", "path")
    if path.is_dir():
        raise ParameterError(f"{path}: is a folder, and the path must be a file's", "path")
    if path.exists() and not path.is_file():
        raise ParameterError(f"{path}: is there already and is not a regular file", "path")
    return path


def write(path: str | Path, tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    """One safetensors file with `told` as its metadata. ParameterError as `checked_target`; OSError names a file that
    cannot be written all the same."""
    from safetensors import SafetensorError  # here and below: machines that only run kernels have no safetensors
    from safetensors.torch import save_file

    path = checked_target(path)
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
    path = _checked_path(path)
    with blamed_on("path"):
        read_header(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ParameterError(f"{path}: {error}", "path") from None


def _checked_path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not (text := str(path)) or "\0" in text:
        raise refusal("path", "a file's path", path)
    with blamed_on("path"):
        check_path(Path(path))
    return Path(path)
