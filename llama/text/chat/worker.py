"""The process that runs chat templates; sandbox.py starts it and may kill it at any moment.

A script of its own: it imports the standard library and jinja2 alone. Standard input and output carry frames: eight
bytes of length, then JSON. The first frame starts the process, the second brings the templates, each later one asks for
one rendering.
"""

import importlib
import json
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

HEADER_BYTES = 8


def make_environment() -> "ImmutableSandboxedEnvironment":
    """The environment that chat templates are written for: that of transformers' apply_chat_template."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant said; it matters in training alone."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a set)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes HTML and sorts keys, which models have not been trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def limit_memory(memory_bytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_files() -> None:
    """A template that escapes jinja2's sandbox still can open no file and no connection."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _render(template: "Template", variables: dict[str, Any], max_characters: int) -> str:
    parts, length = [], 0
    for chunk in template.generate(variables):
        length += len(chunk)
        if length > max_characters:
            raise ValueError(f"it wrote more than {max_characters} characters")
        parts.append(chunk)
    return "".join(parts)


def _reason(error: BaseException) -> str:
    import jinja2

    if isinstance(error, MemoryError):
        return "it needs more memory than a chat template may use"
    if isinstance(error, jinja2.TemplateError | ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    value: dict[str, Any] = json.loads(stream.read(int.from_bytes(header, "big")))
    return value


def _answer(stream: BinaryIO, make_text: Callable[[], str]) -> None:
    try:
        answer = {"text": make_text()}
    except (Exception, RecursionError) as error:
        answer = {"error": _reason(error)}
    data = json.dumps(answer).encode()
    stream.write(len(data).to_bytes(HEADER_BYTES, "big") + data)
    stream.flush()


def main() -> None:
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    start = _read(stdin)
    if start is None:
        return
    sys.path[:] = start["path"]
    environment = make_environment()
    # jinja2 imports these on first use, when no file can be opened any more.
    for module in ("jinja2.constants", "jinja2.debug", "pprint", "textwrap"):
        importlib.import_module(module)
    limit_memory(start["memory_bytes"])
    _answer(stdout, str)
    setup = _read(stdin)
    if setup is None:
        return
    templates = {}

    def load() -> str:
        templates.update({name: environment.from_string(source) for name, source in setup["templates"].items()})
        limit_files()
        return ""

    _answer(stdout, load)
    while (request := _read(stdin)) is not None:
        template, variables = templates[request["template"]], request["variables"]
        _answer(stdout, partial(_render, template, variables, setup["max_characters"]))


if __name__ == "__main__":
    main()
