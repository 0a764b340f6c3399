"""The `llama` command. Exit codes: 0, 2 for a command line that cannot be meant, 1 for a failure; one line on stderr
says what to do. Each command is a module with `add_arguments` and `run`, which imports what it needs when it is called,
so that --help answers at once."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

try:
    from llama import __version__
    from llama.cli.flags import Parser, UsageError
    from llama.server.logs import open_standard_streams
except ImportError:  # another distribution has put a package of its own over ours
    sys.exit("llama: the package `llama` is not llama-engine's: uninstall the other one, then reinstall llama-engine")

_COMMANDS = {
    "chat": "talk with a model",
    "generate": "continue a prompt, or answer it",
    "serve": "serve a model over HTTP",
    "batch": "answer a file of requests",
    "info": "say what a model is and what it needs",
    "convert": "make a Hugging Face folder of Meta's release or of a GGUF file",
    "merge": "make a checkpoint of a model and an adapter",
    "quantize": "make a quantised checkpoint of a dense one",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Raises SystemExit(0) after --help and --version."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        _parser().print_help(sys.stderr)
        return 2
    _mend_streams()
    try:
        options = parse(words)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except UsageError as error:
        command = f"{words[0]} " if words[0] in _COMMANDS else ""
        return _fail(2, f"{error}; llama {command}--help says more")
    except BrokenPipeError:
        # The reader has closed the pipe; Python must not find it closed again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        named = error.filename is not None and error.strerror
        return _fail(1, f"{error.filename}: {error.strerror}" if named else error.strerror or str(error))
    except (ValueError, MemoryError, RuntimeError, ImportError) as error:
        # A RuntimeError is torch's (no memory, no device) or tells that the engine is dead; an ImportError says which
        # extra is to be installed.
        return _fail(1, str(error) or type(error).__name__)
    except KeyboardInterrupt:
        return 130  # what shells expect of an interrupted command


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What the command line says; `run` is the command's function, to be called with it. Raises UsageError."""
    return _parser().parse(words)


def _parser() -> Parser:
    parser = Parser(prog="llama", epilog="llama COMMAND --help lists what a command takes.")
    parser.add_argument("--version", action="version", version=f"llama-engine {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in _COMMANDS.items():
        module = import_module(f"llama.cli.{name}")
        command = commands.add_parser(name, help=text, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    return parser


def _mend_streams() -> None:
    """One that is closed is opened to nowhere, as Python has none in its place. What stdout cannot encode is escaped,
    as on stderr: half an answer would be lost otherwise. Bytes on stdin that are no text are told where it is read."""
    open_standard_streams()
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "strict":
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(code: int, message: str) -> int:
    print(f"llama: {' '.join(message.split())}", file=sys.stderr)
    return code
