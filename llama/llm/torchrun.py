"""Ranks that torchrun has started: the same script runs in each, rank 0 has the user and the others serve it.

They find one another without a port or a file, by a socket that has the name of torchrun's process.
"""

import contextlib
import os
import re
import socket
import struct
import sys
import time
from pathlib import Path
from typing import NoReturn

from llama.api.errors import ParameterError
from llama.engine.parallel_runner import RankLostError
from llama.engine.wire import Message, receive
from llama.llm.rank_process import live
from llama.llm.ranks import START_SILENCE_SECONDS, Peer, Ranks


def rank_of_this(size: int) -> int | None:
    """This process's rank where torchrun started `size` processes to share a model; None where ranks are to be started.

    RANK, LOCAL_RANK and WORLD_SIZE may be left over from a job further out. They count where torchrun itself is the
    parent, and where there are as many processes as ranks wanted.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if not all(value.isdecimal() for value in values) or int(values[2]) != size:
        return None
    if not _is_started_by_torchrun():
        return None
    if values[0] != values[1]:
        what = f"are processes of one machine, got RANK={values[0]} with LOCAL_RANK={values[1]}"
        raise ParameterError(f"tensor_parallel_size={size}: ranks {what}", "tensor_parallel_size")
    return int(values[0])


def _is_started_by_torchrun() -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
        return any(re.search(rb"(^|/)torchrun$|torch[./]distributed[./]run(\.py)?$", word) for word in words)
    return False


def join(size: int, step_timeout: float) -> Ranks:
    """The ranks 1 to size - 1 that torchrun started beside this process."""
    peers: list[Peer] = []
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(_door())
        door.listen(size)
        door.settimeout(START_SILENCE_SECONDS)
        try:
            while len(peers) < size - 1:
                stream, _ = door.accept()
                if _is_sibling(stream) and (hello := receive(stream)) is not None:
                    peers.append(Peer(hello.content["rank"], stream))
        except TimeoutError:
            here = sorted(peer.rank for peer in peers)
            raise RankLostError(f"of {size} ranks that torchrun started, only {[0, *here]} came") from None
    peers.sort(key=lambda peer: peer.rank)
    return Ranks(peers, step_timeout)


def serve_sibling(rank: int) -> NoReturn:
    """Be a rank other than 0 that torchrun started, to the end of rank 0."""
    stream = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + START_SILENCE_SECONDS
    while True:
        try:
            stream.connect(_door())
            break
        except OSError:
            if time.monotonic() > deadline:
                raise RankLostError(f"rank {rank}: rank 0 did not come") from None
            time.sleep(0.05)
    if not _is_sibling(stream):
        raise RankLostError(f"rank {rank}: who waits at {_door()!r} is not rank 0")
    stream.sendall(Message({"rank": rank}, {}).encoded())
    sys.stdout.flush()
    live(stream, os.getppid())


def _door() -> str:
    """A socket without a file: torchrun's process is all that its processes have in common."""
    return f"\0llama-ranks-{os.getuid()}-{os.getppid()}"


def _is_sibling(stream: socket.socket) -> bool:
    pid, uid, _ = struct.unpack("3i", stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    with contextlib.suppress(OSError):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        return bool(uid == os.getuid() and int(parent) == os.getppid())
    return False
