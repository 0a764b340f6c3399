"""The small files of a checkpoint or an adapter: text and JSON, with a limit, and errors that name the file.

Anything may lie under a file's name: a Git LFS pointer, a web page, a pipe without a writer, an endless device.
One line says what was found and what to do. Runs without torch.
"""

import errno
import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from llama.api.errors import CheckpointError

MAX_BYTES = 2**20  # of a file whose reader names no other limit
MAX_TOKEN_IDS = 1024
# Where older folders say how they are quantised: those of ModelOpt, of AutoGPTQ, of AutoAWQ.
QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")

_LFS_POINTER = b"version https://git-lfs"
_HTML = (b"<!doctype", b"<html")


def check_path(path: str | Path, error: type[ValueError] = CheckpointError) -> None:
    """Raises `error` for a name that no file can have, such as one that is too long or no text. Whether there is
    something of that name, others say."""
    if not isinstance(path, str | os.PathLike):
        raise error(f"a path must be a text or a Path, got {type(path).__name__}")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as failure:
        what = failure.strerror if isinstance(failure, OSError) else str(failure)
        raise error(f"{reprlib.repr(str(path))} names no file or folder: {what}") from None


def open_regular(path: Path) -> BufferedReader:
    """As open(path, "rb"), but an OSError for a pipe or a device, which may block or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(descriptor, "rb")


def read_text(path: Path, *, limit: int = MAX_BYTES, error: type[ValueError] = CheckpointError, hint: str = "") -> str:
    """The file as UTF-8 text of at most `limit` bytes. Raises `error`; `hint` is added where there is no such file."""
    try:
        return _text(path, limit, error)
    except FileNotFoundError:
        raise error(f"{path}: there is no such file{hint and f'; {hint}'}") from None


def read_json(
    path: Path, *, limit: int = MAX_BYTES, error: type[ValueError] = CheckpointError, hint: str = ""
) -> dict[str, Any]:
    """The JSON object in the file. Raises `error` as `read_text` does, and for a key that an object has twice."""
    return _json_object(path, read_text(path, limit=limit, error=error, hint=hint), error)


def read_json_if_there(
    path: Path, *, limit: int = MAX_BYTES, error: type[ValueError] = CheckpointError
) -> dict[str, Any]:
    """As `read_json`, and empty where there is no such file."""
    try:
        text = _text(path, limit, error)
    except FileNotFoundError:
        return {}
    return _json_object(path, text, error)


def some_of(names: Iterable[str]) -> str:
    """The first ten of names, for a message."""
    names = sorted(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads, which would silently take the last of several values. Raises ValueError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def token_ids(key: str, value: Any, error: type[ValueError] = ValueError) -> tuple[int, ...]:
    """`eos_token_id` or `bos_token_id` in their spellings: absent, one id, or a list of them. Raises `error`."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if len(ids) > MAX_TOKEN_IDS:
        raise error(f"{key} has {len(ids)} token ids, more than {MAX_TOKEN_IDS}")
    if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in ids):
        raise error(f"{key} must be a token id or a list of them, got {value!r}")
    return ids


@contextmanager
def named(path: Path, error: type[ValueError] = CheckpointError) -> Iterator[None]:
    """A ValueError from inside becomes an `error` that names the file."""
    try:
        yield
    except ValueError as failure:
        raise error(f"{path}: {failure}") from None


def _text(path: Path, limit: int, error: type[ValueError]) -> str:
    """Lets a FileNotFoundError through."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1) if size <= limit else b""
    except FileNotFoundError:
        raise
    except OSError as failure:
        raise error(f"{path}: cannot be read: {failure.strerror}") from None
    except ValueError as failure:  # of a path that no file can have
        raise error(f"{str(path)!r}: cannot be read: {failure}") from None
    if max(size, len(data)) > limit:
        raise error(f"{path}: is larger than the {limit} bytes that such a file may have")
    if data.startswith(_LFS_POINTER):
        raise error(f"{path}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if data.lstrip()[:9].lower().startswith(_HTML):
        raise error(f"{path}: is an HTML page, not the file itself; was the download redirected to a login page?")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise error(f"{path}: cannot be read: byte {failure.start} is not UTF-8 text") from None


def _json_object(path: Path, text: str, error: type[ValueError]) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as failure:
        raise error(f"{path}: is not JSON: {failure}") from None
    except RecursionError:
        raise error(f"{path}: is not JSON: it is nested too deeply") from None
    except ValueError as failure:
        raise error(f"{path}: {failure}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value
