"""`llama serve`: the port first, then the weights, then requests."""

import logging
import sys
from pathlib import Path

from llama.cli.errors import UsageError
from llama.cli.flags import Serve


def run_serve(command: Serve) -> int:
    keys = _keys(command)
    if not 0 <= command.port <= 65535:
        raise UsageError(f"--port must be from 0 to 65535, got {command.port}")
    try:
        from llama.server.config import ServerConfig
        from llama.server.run import serve, take_port
    except ModuleNotFoundError as error:
        raise UsageError(f"serving needs {error.name}: install llama-engine[server]") from None
    from llama.async_llm import AsyncLLM

    config = ServerConfig(
        model_names=tuple(command.served_model_name) or (Path(command.model).resolve().name,),
        api_keys=keys,
        shutdown_timeout=command.shutdown_timeout,
    )
    taken = take_port(command.host, command.port)
    _log_to_stderr()
    llm = AsyncLLM(
        command.model,
        device=command.engine.device,
        dtype=command.engine.dtype,
        max_model_len=command.engine.max_model_len,
        max_num_seqs=command.max_num_seqs,
        max_waiting_requests=command.max_waiting_requests,
        num_blocks=command.num_blocks,
    )
    host, port = taken.getsockname()[:2]
    print(f"llama: serving {config.name} on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr)
    serve(llm, config, taken)
    return 0


def _keys(command: Serve) -> tuple[str, ...]:
    keys = [] if command.api_key is None else [command.api_key]
    if command.api_key_file is not None:
        lines = Path(command.api_key_file).read_text(encoding="utf-8").splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"{command.api_key_file} holds no key")
        keys += found
    return tuple(keys)


def _log_to_stderr() -> None:
    """Messages as they are: the access log's lines are JSON already."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("llama", "llama.access"):
        logging.getLogger(name).setLevel(logging.INFO)
