"""The process of a replica: run as a script by `llama.server.replicas`, which gives it a connection and a socket to
serve on. It ends with the connection, and with the process at its other end."""

import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = json.loads(sys.argv[3])  # that of the process that started this one
    from llama.child_process import end_with_parent
    from llama.engine.wire import Message, receive
    from llama.server.config import Listener

    end_with_parent(int(sys.argv[4]), sys.argv[5])
    taken = Listener(fileno=int(sys.argv[2]))

    told = receive(control)
    if told is None:
        return
    threading.Thread(target=_end_with, args=(control,), daemon=True).start()
    try:
        from llama.server.logs import log_to_stderr
        from llama.server.run import serve  # torch comes with it

        log = log_to_stderr()
        llm, config = open_replica(told.content)
    except BaseException as error:
        said = " ".join(str(error).split())[:1000]
        control.sendall(Message({"error": said or type(error).__name__}, {}).encoded())
        os._exit(1)
    control.sendall(Message({"ready": True}, {}).encoded())
    sys.exit(serve(llm, config, taken, log, is_replica=True))


def open_replica(told: dict[str, Any]) -> tuple[Any, Any]:
    """The AsyncLLM and the ServerConfig of what `Replicas.start` tells: its share of devices, cores and memory."""
    import torch

    from llama.async_llm.async_llm import AsyncLLM
    from llama.engine.budget import threads_of_each
    from llama.engine.config import CPU_FRACTION
    from llama.llm.llm import LLM
    from llama.llm.loading import resolve_device
    from llama.server.config import ServerConfig

    arguments, count = dict(told["arguments"]), told["count"]
    device = resolve_device(arguments.get("device", "auto"))
    if device.type == "cuda":
        first = (device.index or 0) + told["number"] * arguments.get("tensor_parallel_size", 1)
        arguments["device"] = f"cuda:{first}"
    else:
        torch.set_num_threads(threads_of_each(count, torch.get_num_threads()))
        arguments["cpu_memory_utilization"] = arguments.get("cpu_memory_utilization", CPU_FRACTION) / count
    llm = LLM(told["model"], **arguments)
    for name, path in told["loras"].items():
        llm.load_lora(name, path)
    config = told["config"]
    for name in ("model_names", "api_keys", "allow_origin"):
        config[name] = tuple(config[name])
    config["lora_dir"] = None if config["lora_dir"] is None else Path(config["lora_dir"])
    return AsyncLLM(llm, **told["limits"]), ServerConfig(**config)


def _end_with(control: socket.socket) -> None:
    control.recv(1)
    os._exit(1)


if __name__ == "__main__":
    main()
