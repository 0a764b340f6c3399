"""The process of a rank: run as a script by `llama.llm.ranks`, which gives it one end of a connection.

It lives as long as the connection and the process at the other end: a thread looks after both once a second, and says
there that this process lives. Where that process's main thread started it, the kernel ends it too. Ctrl-C, SIGTERM
and SIGHUP reach whole groups of processes; what they mean is for rank 0 to say.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

BEAT_SECONDS = 1.0


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stream = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = json.loads(sys.argv[2])  # that of rank 0's process, whatever made it
    from llama.child_process import end_with_parent

    parent = int(sys.argv[3])
    end_with_parent(parent, sys.argv[4])
    live(stream, parent)


def live(stream: socket.socket, parent: int) -> NoReturn:
    """Do as rank 0 says at the other end of `stream`, until that or the process that started this one is gone."""
    from llama.engine.wire import Message

    lock = threading.Lock()

    def say(content: dict[str, Any]) -> None:
        with lock:
            stream.sendall(Message(content, {}).encoded())

    def beat() -> None:
        try:
            while os.getppid() == parent:
                say({"beat": True})
                time.sleep(BEAT_SECONDS)
        finally:
            os._exit(1)  # the main thread may wait for a rank that is not there any more

    threading.Thread(target=beat, daemon=True).start()
    try:
        from llama.llm.rank import serve  # torch comes with it, which takes seconds

        serve(stream, say)
    except BaseException as error:
        said = " ".join(str(error).split())[:1000]
        say({"error": f"{type(error).__name__}: {said}", "trace": traceback.format_exc()[-10_000:]})
        os._exit(1)
    os._exit(0)  # no exit handler of a library may wait for others


if __name__ == "__main__":
    main()
