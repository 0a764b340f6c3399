"""Regular expressions that come with a checkpoint or an adapter, matched against module names.

In a process of its own, which can be killed: such an expression may run without end. Runs without torch.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import Literal

from llama.api.errors import WorkerLostError

PATTERN_SECONDS = 10  # of processor time
_PATIENCE_SECONDS = 100  # for so much of it
_SCRIPT = (
    "import json,re,resource,sys;s,f,p,n=json.load(sys.stdin);resource.setrlimit(resource.RLIMIT_CPU,(s,s+1));"
    "f=getattr(re,f);json.dump([x for x in n if f(p,x)],sys.stdout)"
)


def matches(pattern: str, names: Iterable[str], how: Literal["match", "fullmatch"]) -> list[str]:
    """The names that `re.match` or `re.fullmatch` finds. Raises ValueError for what is no regular expression or does
    not end."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    command = [sys.executable, "-I", "-S", "-c", _SCRIPT]
    request = json.dumps([PATTERN_SECONDS, how, pattern, list(names)])
    for _ in range(2):  # the system may end it, or give it no processor time
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
            if done.returncode == 0:
                found: list[str] = json.loads(done.stdout)
                return found
            if done.returncode in (-signal.SIGXCPU, 1):
                raise ValueError(f"matching {pattern!r} does not end")
    raise WorkerLostError(f"the process that matched {pattern!r} was lost")
