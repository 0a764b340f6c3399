"""What a server is started with: its configuration and its port. Imports nothing heavy."""

import errno
import math
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.api.errors import ParameterError

CLOUDFLARE_PREFIX = "@cf/meta/"
CLOUDFLARE_NAME = "llama-3.1-70b-instruct"  # what Cloudflare's clients ask for, whatever model is behind it
BACKLOG = 2048  # connections


def _option(default: Any, help: str) -> Any:
    """A field that is a flag of `llama serve`, with its line of help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """`model_names`: what clients may call the model, the first being its own name. `lora_dir`: its sub-folders are
    adapters, loaded when they are first asked for. Times in seconds, sizes in bytes."""

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    lora_dir: Path | None = field(
        default=None, metadata={"help": "folder whose sub-folders are adapters, loaded when they are first asked for"}
    )
    max_body_bytes: int = _option(8 * 2**20, "the longest body of a request")
    max_bodies_bytes: int = _option(256 * 2**20, "the same of all requests that are not yet answered")
    body_timeout: float = _option(60.0, "seconds for a client to send a request's head, and again for its whole body")
    send_timeout: float = _option(60.0, "seconds for a client to take what is sent to it")
    keep_alive: float | None = _option(
        None, "seconds of silence after which a stream gets a comment (none: some clients fail on comments)"
    )
    step_deadline: float = _option(60.0, "seconds after which a step is reported as hanging and /ready answers 503")
    shutdown_timeout: float = _option(30.0, "seconds for running requests to end, once told to stop")
    timeout_keep_alive: float = _option(30.0, "seconds that an idle connection stays open for another request")
    access_log: bool = _option(True, "log a line for each request")
    allow_origin: tuple[str, ...] = ()  # origins whose pages may ask from a browser, * = any
    default_chat_template_kwargs: Mapping[str, Any] | None = _option(
        None, 'variables of the chat template where a request does not give them, such as {"thinking": true}'
    )
    enable_tokenizer_info_endpoint: bool = _option(False, "serve tokenizer_config.json at /tokenizer_info")
    exit_on_engine_death: bool = _option(True, "exit with code 70 once the engine is dead, for whoever restarts it")

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ValueError("a server needs at least one model name, and none may be empty")
        if not all(key and key.isascii() and key.isprintable() for key in self.api_keys):
            raise ValueError("an API key must be printable ASCII and not empty")
        if self.lora_dir is not None and not self.lora_dir.is_dir():
            raise ValueError(f"the folder of adapters does not exist: {self.lora_dir}")
        for name in (
            "max_body_bytes",
            "max_bodies_bytes",
            "body_timeout",
            "send_timeout",
            "keep_alive",
            "step_deadline",
            "shutdown_timeout",
            "timeout_keep_alive",
        ):
            value = getattr(self, name)
            if value is None and name == "keep_alive":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ParameterError(f"{name} must be a number above 0, got {value!r}", name)
        for name in ("exit_on_engine_death", "access_log", "enable_tokenizer_info_endpoint"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(f"{name} must be True or False, got {getattr(self, name)!r}", name)
        kwargs = self.default_chat_template_kwargs
        if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)):
            told = f"default_chat_template_kwargs must be an object, got {kwargs!r}"
            raise ParameterError(told, "default_chat_template_kwargs")
        if not all(re.fullmatch(r"\*|https?://[^/\s]+", origin) for origin in self.allow_origin):
            legal = "origins such as https://example.org, or *"
            raise ParameterError(f"allow_origin must be {legal}, got {self.allow_origin!r}", "allow_origin")
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ParameterError(
                f"max_bodies_bytes must be at least max_body_bytes, got {self.max_bodies_bytes}", "max_bodies_bytes"
            )

    @property
    def name(self) -> str:
        return self.model_names[0]

    def serves(self, model: str) -> bool:
        """Whether this is a name of the base model, with or without Cloudflare's prefix."""
        return model.removeprefix(CLOUDFLARE_PREFIX) in (*self.model_names, CLOUDFLARE_NAME) or (
            model in self.model_names
        )

    def check_adapters(self, names: Iterable[str]) -> None:
        """Raises ParameterError for a name by which requests would get the base model."""
        for name in names:
            if self.serves(name):
                taken = ", ".join(dict.fromkeys((*self.model_names, CLOUDFLARE_NAME)))
                raise ParameterError(f"lora must have a name that the model does not ({taken}), got {name!r}", "lora")


class Listener(socket.socket):
    """For asyncio, which accepts as many connections at once as may wait. Where the process is out of files it waits a
    second, but only after it has failed with all of them, each with a traceback in the log: one is enough."""

    _has_failed = False

    def accept(self) -> tuple[socket.socket, Any]:
        if self._has_failed:
            self._has_failed = False
            raise BlockingIOError(errno.EAGAIN, "nobody can be let in")
        try:
            return super().accept()
        except OSError as error:
            self._has_failed = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
            raise


def take_port(host: str, port: int) -> Listener:
    """A listening socket. Taken before the weights load, so that a second server on the port fails at once; clients
    that come meanwhile wait. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named. With it an event of a stream may wait 40 ms.
    taken = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen(BACKLOG)
    except OSError as error:
        taken.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return taken
