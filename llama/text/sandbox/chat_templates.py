"""Renders chat templates, in a worker process."""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """{% generation %} marks what the assistant said; it matters in training alone."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes HTML and sorts keys, which models have not been trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for: that of transformers' apply_chat_template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def start(setup: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    """Compiles `templates`; the function renders the one that a request names with its `variables`."""
    # jinja2 imports these on first use, when no file can be opened any more.
    for module in ("jinja2.constants", "jinja2.debug", "pprint", "textwrap"):
        importlib.import_module(module)
    environment = make_environment()
    with _plain_errors():
        templates = {name: environment.from_string(source) for name, source in setup["templates"].items()}

    def render(request: Mapping[str, Any]) -> str:
        parts, length = [], 0
        with _plain_errors():
            for chunk in templates[request["template"]].generate(request["variables"]):
                length += len(chunk)
                if length > setup["max_characters"]:
                    raise ValueError(f"it wrote more than {setup['max_characters']} characters")
                parts.append(chunk)
        return "".join(parts)

    return render


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A template's own complaint, without jinja2's name for it."""
    try:
        yield
    except jinja2.TemplateError as error:
        raise ValueError(str(error)) from None
