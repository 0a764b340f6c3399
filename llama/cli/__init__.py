"""The `llama` command. Exit codes: 0, 2 for a command line that cannot be meant, 1 for a failure; one line on stderr
says what to do. What a command needs is imported when it runs, so that --help answers at once."""

import os
import sys
from collections.abc import Sequence

from llama.cli.usage import UsageError

_COMMANDS = {
    "chat": "talk with a model",
    "generate": "write on from a prompt, or answer it",
    "serve": "serve a model over HTTP",
    "info": "say what a model is and what it needs",
}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    try:
        if name in ("-h", "--help"):
            print(_help())
            return 0
        if not arguments:
            print(_help(), file=sys.stderr)
            return 2
        if name not in _COMMANDS:
            raise UsageError(f"{name!r} is not a command: there are {', '.join(_COMMANDS)}")
        code = _run(name, arguments[1:])
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _fail(2, f"{error}; llama {f'{name} ' if name in _COMMANDS else ''}--help says more")
    except BrokenPipeError:
        # Whoever read us has enough; Python must not find the closed pipe again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        # A RuntimeError is torch's (no memory, no device) or tells that the engine is dead.
        return _fail(1, str(error) or type(error).__name__)
    except KeyboardInterrupt:
        return 130  # what shells expect of an interrupted command


def _run(name: str, arguments: Sequence[str]) -> int:
    from llama.cli.flags import Chat, Generate, Serve, parse

    command = parse(name, arguments)
    if isinstance(command, Chat):
        from llama.cli.chat import run_chat

        return run_chat(command)
    if isinstance(command, Generate):
        from llama.cli.generate import run_generate

        return run_generate(command)
    if isinstance(command, Serve):
        from llama.cli.serve import run_serve

        return run_serve(command)
    from llama.cli.info import run_info

    return run_info(command)


def _help() -> str:
    lines = [f"  {name:10}{what}" for name, what in _COMMANDS.items()]
    return "\n".join(["usage: llama COMMAND ...", "", *lines, "", "llama COMMAND --help lists what a command takes."])


def _fail(code: int, message: str) -> int:
    print(f"llama: {' '.join(message.split())}", file=sys.stderr)
    return code
