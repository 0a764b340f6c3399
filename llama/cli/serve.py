"""`llama serve`: the port first, then the weights, then requests."""

import logging
import socket
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.cli.common import (
    add_model_flags,
    add_ray_flags,
    add_replicas_flag,
    check_adapters,
    check_ray,
    keep_to_cores,
    llm_options,
)
from llama.cli.flags import Parser, UsageError, add_fields, checked, flag, given, integer, named_adapter
from llama.engine.config import EngineConfig
from llama.files import named, read_text
from llama.hub import is_hub_id
from llama.server.config import ServerConfig, take_port
from llama.server.logs import LogQueue, log_to_stderr

logger = logging.getLogger(__name__)

_SCALE = ("min_replicas", "max_replicas", "target_ongoing_requests")

DESCRIPTION = """Serve a model over HTTP, in Cloudflare's and OpenAI's dialects. The first SIGTERM drains, a second one
ends."""


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s MODEL [options]"
    parser.add_argument("model", metavar="MODEL", help="folder of the checkpoint, or an id of the hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    port = integer(0, 65535)
    parser.add_argument("--port", type=port, default=8000, help="port to listen on, 0 = any that is free (%(default)s)")
    several: dict[str, Any] = {"action": "extend", "nargs": "+", "default": []}
    text = "what clients may call the model (the folder's name, or the id)"
    parser.add_argument("--served-model-name", **several, metavar="NAME", help=text)
    parser.add_argument("--api-key", metavar="KEY", help="key that requests must bring; the list of processes shows it")
    parser.add_argument("--api-key-file", metavar="FILE", help="file with such keys, one a line")
    parser.add_argument("--lora", **several, type=named_adapter, metavar="NAME=PATH", help="adapters to load at once")
    text = "origins whose pages may ask from a browser, such as https://example.org, or *"
    parser.add_argument("--allow-origin", **several, metavar="ORIGIN", help=text)
    for name, most, what in (
        ("--max-waiting-requests", 1024, "requests that may wait beyond those that run (%(default)s)"),
        ("--max-waiting-tokens", 1 << 20, "prompt tokens that may wait for their first answer (%(default)s)"),
    ):
        parser.add_argument(name, type=integer(0), default=most, metavar="INT", help=what)
    add_replicas_flag(parser)
    group = add_ray_flags(parser)
    text = "with --ray: as many replicas as there are requests for, from --min-replicas (1) on"
    group.add_argument("--max-replicas", type=integer(1, 1024), metavar="INT", help=text)
    group.add_argument("--min-replicas", type=integer(0, 1024), metavar="INT", help="how few of them (1)")
    text = "of each replica, above and below which their number changes (--max-num-seqs)"
    group.add_argument("--target-ongoing-requests", type=integer(1), metavar="INT", help=text)
    add_fields(parser, ServerConfig, "server")
    add_model_flags(parser)


def run(options: Namespace) -> int:
    if not options.host:  # it would mean every address
        raise UsageError("--host must be an address to listen on, got ''")
    arguments = llm_options(options)
    check_ray(options)
    for name in _SCALE:
        if getattr(options, name) is not None and not options.ray:
            raise UsageError(f"{flag(name)} needs --ray")
    if not options.lora and "lora_dir" not in given(options, ServerConfig):
        arguments["max_loras"] = 0
    own_name = options.model if is_hub_id(options.model) else Path(options.model).resolve().name
    names = {"model_names": tuple(options.served_model_name) or (own_name,)}
    more = {"api_keys": _keys(options), "allow_origin": tuple(options.allow_origin)}
    config = checked(ServerConfig, names | more | given(options, ServerConfig))
    check_adapters(options, config)
    waiting = {name: getattr(options, name) for name in ("max_waiting_requests", "max_waiting_tokens")}
    if options.ray:
        return _serve_on_ray(options, arguments | given(options, ServerConfig) | waiting | more | names)
    taken = take_port(options.host, options.port)
    log = log_to_stderr()
    try:
        if options.replicas > 1:
            return _serve_replicas(options, arguments, config, waiting, taken, log)
        from llama.server.run import serve
    except ModuleNotFoundError as error:
        raise UsageError(f"serving needs {error.name}: pip install 'llama-engine[server]'") from None
    # What follows imports torch.
    from llama.async_llm.async_llm import AsyncLLM
    from llama.llm.llm import LLM

    keep_to_cores()
    llm = LLM(options.model, **arguments)
    for name, path in options.lora:
        llm.load_lora(name, path)
    _say_where(config, taken)
    return serve(AsyncLLM(llm, **waiting), config, taken, log)


def _serve_replicas(
    options: Namespace,
    arguments: Mapping[str, Any],
    config: ServerConfig,
    limits: Mapping[str, Any],
    taken: socket.socket,
    log: LogQueue,
) -> int:
    from llama.server.front import serve_replicas
    from llama.server.replicas import Replicas

    loras = {name: str(Path(path).resolve()) for name, path in options.lora}
    replicas = Replicas.start(options.replicas, options.model, arguments, config, loras=loras, limits=limits)
    _say_where(config, taken)
    return serve_replicas(replicas, config, taken, log)


def _say_where(config: ServerConfig, taken: socket.socket) -> None:
    host, port = taken.getsockname()[:2]
    logger.info("llama: serving %s on http://%s:%d", config.name, f"[{host}]" if ":" in host else host, port)


def _serve_on_ray(options: Namespace, told: dict[str, Any]) -> int:
    if options.port == 0:
        raise UsageError("--port must be a port with --ray, got 0")
    from llama.ray_cluster import check_model, connect

    check_model(options.model, checked(EngineConfig, given(options, EngineConfig)))
    log_to_stderr()
    connect(options.ray_address)
    from llama.serve_ray import Arguments, run

    scale = {name: value for name in ("replicas", *_SCALE) if (value := getattr(options, name)) is not None}
    names = {"served_model_name": told.pop("model_names"), "loras": dict(options.lora)}
    run(Arguments(model=options.model, **told, **names, **scale), options.host, options.port)
    return 0


def _keys(options: Namespace) -> tuple[str, ...]:
    keys = [] if options.api_key is None else [options.api_key]
    if options.api_key_file is not None:
        with named(Path("--api-key-file"), ValueError):
            text = read_text(Path(options.api_key_file), error=ValueError)
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise ValueError(f"{options.api_key_file} holds no key")
        keys += found
    return tuple(keys)
