"""Processes of our own: each runs one of our scripts and ends with the process that started it. No torch."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def start(program: Path, descriptors: Sequence[int]) -> "subprocess.Popen[bytes]":
    """Run a script with these files open. Its arguments: their numbers, sys.path as JSON, and what `end_with_parent`
    wants."""
    # The kernel would end a process with the thread that started it: others than the main one may end long before.
    starter = "main" if threading.current_thread() is threading.main_thread() else "another"
    arguments = [*map(str, descriptors), json.dumps(sys.path), str(os.getpid()), starter]
    return subprocess.Popen(
        # -P: the script's folder is no place to import from.
        [sys.executable, "-P", str(program), *arguments],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C is for the process that started it to understand
    )


def end_with_parent(parent: int, starter: str) -> None:
    """Have the kernel end this process with its parent, if that one's main thread started it; also while no thread here
    can run, as in a call that holds the interpreter's lock, or in a process that was stopped."""
    if starter != "main":
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)
