"""The output of a batch: whole lines, appended as they are finished. It is its own record of what is done.

A process that is killed leaves at most its last line torn. The next run cuts that line, and drops failures and
rejections, which it asks again; every answer stays where it is.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from llama.batch.ids import IdSet
from llama.batch.lines import ID_PREFIX
from llama.server.bodies import dump

_BEGINNING = f'{{"id":"{ID_PREFIX}'.encode()
_OK = 200


class OutputFile:
    """Open and locked from the beginning, so that no two runs write the same file. `answered` are the ids of the lines
    that an earlier run answered; a line whose `is_whole(id)` is false counts as none. ValueError if the file is no
    batch's output: then nothing in it is touched."""

    def __init__(self, path: Path, is_whole: Callable[[str], bool] = lambda line_id: True) -> None:
        self._path = path
        self._is_whole = is_whole
        self.answered = IdSet()
        self._file = _open_locked(path)
        try:
            self._resume()
        except BaseException:
            self._file.close()
            raise

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(dump(line) + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _resume(self) -> None:
        end, drops = 0, 0
        for raw, answered_id in self._lines():
            end += len(raw)
            drops += answered_id is None or not self.answered.add(answered_id)
        if drops:
            self._rewrite()
        else:
            self._file.truncate(end)
            self._file.seek(end)

    def _lines(self) -> Iterator[tuple[bytes, str | None]]:
        for raw, answered_id in _whole_lines(self._file, self._path):
            yield raw, answered_id if answered_id is not None and self._is_whole(answered_id) else None

    def _rewrite(self) -> None:
        """The answers alone, each once. A kill in between leaves the file as it was."""
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        kept = IdSet()
        file = _open_locked(temporary)
        file.truncate(0)
        for raw, answered_id in self._lines():
            if answered_id is not None and kept.add(answered_id):
                file.write(raw)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, self._path)
        self._file.close()
        self._file = file


def _open_locked(path: Path) -> BinaryIO:
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115  it stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_ours = False
    except OSError:  # a file system without locks
        is_ours = True
    else:  # unless another run has put a new file in its place since
        is_ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    if not is_ours:
        file.close()
        raise ValueError(f"{path}: another run is writing to it")
    return file


def _whole_lines(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, str | None]]:
    """(line, its id if it holds an answer) of each but a torn last one."""
    file.seek(0)
    for number, raw in enumerate(file, start=1):
        if not raw.startswith(_BEGINNING[: len(raw)]):
            raise ValueError(f"{path}: line {number} is not the output of a batch: name another file")
        if not raw.endswith(b"\n"):
            return
        try:
            value = from_json(raw)
            yield raw, value["id"] if (value["response"] or {}).get("status_code") == _OK else None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{path}: line {number} is damaged: mend or remove it") from None
