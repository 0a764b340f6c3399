"""The process of a Worker: it imports one module and answers requests until its input ends or it is killed.

It is run as a script, without site: the first frame brings the paths to import from. Standard input and output
carry frames: eight bytes of length, then JSON. First the module's name and the process's limits, then the argument of
the module's `start`, then requests for the function that `start` returned. Each frame is answered by {"value"} or
{"error"}.
"""

import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

HEADER_BYTES = 8


def limit_memory(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_files() -> None:
    """Nothing that runs here from now on can open a file or a connection."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _read(stream: BinaryIO) -> dict[str, Any]:
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise EOFError
    value: dict[str, Any] = json.loads(stream.read(int.from_bytes(header, "big")))
    return value


def _answer(stream: BinaryIO, make_value: Callable[[], Any]) -> None:
    try:
        answer = {"value": make_value()}
    except MemoryError:
        answer = {"error": "it needs more memory than it may use"}
    except ValueError as error:
        answer = {"error": str(error)}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also a native library's panic
        answer = {"error": f"{type(error).__name__}: {error}"[:10_000]}
    data = json.dumps(answer).encode()
    stream.write(len(data).to_bytes(HEADER_BYTES, "big") + data)
    stream.flush()


def main() -> None:
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    first = _read(stdin)
    sys.path[:] = first["path"]
    handlers = []

    def load() -> None:
        os.nice(first["niceness"])
        handlers.append(importlib.import_module(first["module"]).start)
        limit_memory(first["memory_bytes"])

    def start(setup: dict[str, Any]) -> None:
        handlers.append(handlers.pop()(setup))
        limit_files()

    _answer(stdout, load)
    _answer(stdout, partial(start, _read(stdin)))
    while True:
        _answer(stdout, partial(handlers[0], _read(stdin)))


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        sys.exit(0)
