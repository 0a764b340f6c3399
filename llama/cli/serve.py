"""`llama serve`: the port first, then the weights, then requests."""

import logging
import sys
from pathlib import Path

from llama.cli.common import check_engine, named_adapter
from llama.cli.flags import Serve
from llama.cli.usage import UsageError
from llama.server.config import ServerConfig
from llama.server.port import take_port


def run_serve(command: Serve) -> int:
    keys, loras = _keys(command), [named_adapter(text) for text in command.lora]
    if not command.host:  # it would mean every address
        raise UsageError("--host must be an address to listen on, got ''")
    check_engine(command.engine)
    config = ServerConfig(
        model_names=tuple(command.served_model_name) or (Path(command.model).resolve().name,),
        api_keys=keys,
        lora_dir=None if command.lora_dir is None else Path(command.lora_dir),
        shutdown_timeout=command.shutdown_timeout,
    )
    taken = take_port(command.host, command.port)
    # What follows imports torch.
    from llama.async_llm.async_llm import AsyncLLM
    from llama.llm.llm import LLM

    try:
        from llama.server.run import serve
    except ModuleNotFoundError as error:
        raise UsageError(f"serving needs {error.name}: install llama-engine[server]") from None
    _log_to_stderr()
    llm = LLM(
        command.model,
        device=command.engine.device,
        dtype=command.engine.dtype,
        max_model_len=command.engine.max_model_len,
        check_weights=command.engine.check_weights,
        max_num_seqs=command.max_num_seqs,
        num_blocks=command.num_blocks,
        max_loras=command.max_loras if loras or command.lora_dir else 0,
        max_lora_rank=command.max_lora_rank,
    )
    for name, path in loras:
        llm.load_lora(name, path)
    host, port = taken.getsockname()[:2]
    print(f"llama: serving {config.name} on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr)
    serve(AsyncLLM(llm, max_waiting_requests=command.max_waiting_requests), config, taken)
    return 0


def _keys(command: Serve) -> tuple[str, ...]:
    keys = [] if command.api_key is None else [command.api_key]
    if command.api_key_file is not None:
        try:
            lines = Path(command.api_key_file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"--api-key-file {command.api_key_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"--api-key-file {command.api_key_file} is no text in UTF-8") from None
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
