"""Flags made from dataclasses: a field with a line of help is a flag, and its type says of which kind.

The dataclass alone checks the values and says what is legal. What is not given is left out, so that the dataclass's own
defaults hold, or the checkpoint's.
"""

import argparse
import difflib
import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from llama.api.errors import ParameterError
from llama.api.structured import StructuredOutputsParams

T = TypeVar("T")

_OURS = {"--data-parallel-size": "--replicas"}  # others' flags that have another name here


class UsageError(Exception):
    """A command line that cannot be meant; the message is one line."""


class Parser(argparse.ArgumentParser):
    """argparse, but every error is a UsageError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        # argparse takes these for flags, unless it is told that they are numbers: -1e-5, -6=2 and the stop text ---.
        self._negative_number_matcher = re.compile(r"-+[^a-zA-Z-]|---")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """What the words say; `command` is the command's own parser. A flag may be spelled with _ for -."""
        spelled = [re.sub(r"^--[a-z][a-z_-]*(?=$|=)", lambda name: name[0].replace("_", "-"), word) for word in words]
        options, unknown = self.parse_known_args(spelled)
        if unknown:
            word = unknown[0].partition("=")[0]
            flags = [name for name in options.command._option_string_actions if name.startswith("--")]
            near = [name for name in flags if name.startswith(word)] or difflib.get_close_matches(word, flags)
            near = [_OURS[word]] if word in _OURS else near
            hint = f" (perhaps {near[0]})" if word.startswith("--") and near else ""
            raise UsageError(f"{unknown[0]!r} is not understood{hint}")
        return options


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_fields(parser: Parser, config: type, title: str, without: Sequence[str] = ()) -> None:
    """A flag for each field of the dataclass `config` that has metadata "help", but those in `without`."""
    group = parser.add_argument_group(title)
    for option in fields(config):
        if "help" in option.metadata and option.name not in without:
            is_shown = option.default is not None and option.default != () and not isinstance(option.default, bool)
            text = f"{option.metadata['help']} ({option.default})" if is_shown else option.metadata["help"]
            kind: dict[str, Any] = {"dest": f"{config.__name__}.{option.name}", "default": argparse.SUPPRESS}
            short = [option.metadata["short"]] if option.metadata.get("short") else []
            group.add_argument(*short, flag(option.name), help=text.replace("%", "%%"), **kind, **_kind(option))


def given(options: argparse.Namespace, config: type) -> dict[str, Any]:
    """The values of `config`'s fields that the command line names."""
    start = f"{config.__name__}."
    return {name.removeprefix(start): value for name, value in vars(options).items() if name.startswith(start)}


def checked(make: Callable[..., T], values: Mapping[str, Any]) -> T:
    """make(**values). Raises UsageError for a value that is not legal, and names it as the flag that it is."""
    try:
        return make(**values)
    except ParameterError as error:
        name, message = error.param, str(error)
        raise UsageError(message if name is None else message.replace(name, flag(name), 1)) from None


def named_adapter(word: str) -> tuple[str, str]:
    """(name, path) that --lora gives."""
    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"takes NAME=PATH, got {word!r}")
    return name, path


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """What reads an integer between these, both included."""

    def read(word: str) -> int:
        if not isinstance(value := _integer(word), int) or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, got {word!r}")
        return value

    return read


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(word: str) -> Any:
        try:
            return kind(word)
        except ValueError:
            return word  # for the dataclass to refuse

    return read


_integer, _float = _number(int), _number(float)


def _bias(word: str) -> tuple[Any, Any]:
    token, equals, value = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"takes ID=NUMBER, got {word!r}")
    return _integer(token), _float(value)


def _json(word: str) -> Any:
    try:
        return json.loads(word)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"takes JSON, got {reprlib.repr(word)}: {error}") from None


class _Pairs(argparse.Action):
    """The values of a flag as a dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = getattr(namespace, self.dest, {})
        for key, value in values:
            if key in pairs:
                raise argparse.ArgumentError(self, f"names {key} twice")
            pairs[key] = value
        setattr(namespace, self.dest, pairs)


class Once(argparse.Action):
    """A flag that may not be repeated: its first value would be lost."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "is given twice")
        setattr(namespace, self.dest, values)


_SEVERAL = {"action": "extend", "nargs": "+"}
_KINDS: dict[Any, dict[str, Any]] = {
    int: {"type": _integer, "metavar": "INT"},
    float: {"type": _float, "metavar": "NUMBER"},
    str: {"metavar": "TEXT"},
    Path: {"type": Path, "metavar": "PATH"},
    str | Sequence[int]: {"metavar": "TEXT"},
    Sequence[int]: _SEVERAL | {"type": _integer, "metavar": "INT"},
    str | Sequence[str]: _SEVERAL | {"metavar": "TEXT"},
    Mapping[int, float]: {"action": _Pairs, "nargs": "+", "type": _bias, "metavar": "ID=NUMBER"},
    Mapping[str, Any]: {"type": _json, "metavar": "JSON"},
    StructuredOutputsParams | Mapping[str, Any]: {"type": _json, "metavar": "JSON"},
}


def _kind(option: "Field[Any]") -> dict[str, Any]:
    """What add_argument is told of a field of this type."""
    if option.type is bool:
        return {"action": argparse.BooleanOptionalAction if option.default else "store_true"}
    if get_origin(option.type) is Literal:
        return {"choices": get_args(option.type)}
    kind = next(kind for kind in _KINDS if option.type in (kind, kind | None))
    arguments = _KINDS[kind]
    if option.type != kind and option.default is not None:  # None is a value to give, not the lack of one
        return arguments | {"type": lambda word: None if word.lower() == "none" else arguments["type"](word)}
    return arguments
