"""What batches and servers on Ray share: the connection, and what an engine asks of the cluster."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.engine.config import EngineConfig
from llama.hub import is_hub_id
from llama.model.config import ModelConfig


def connect(address: str | None) -> None:
    """Join the cluster at `address`; None: the one that RAY_ADDRESS names or that runs on this machine, else one of
    this process alone. Nothing is done where Ray is connected already. ConnectionError where there is no such
    cluster."""
    import ray

    if not ray.is_initialized():
        ray.init(address, include_dashboard=False, logging_level=logging.WARNING)


def check_model(model: str, engine: EngineConfig) -> None:
    """ValueError, from config.json alone, for what every engine of the cluster would refuse after it had started."""
    if not is_hub_id(model):
        engine.resolved(ModelConfig.from_pretrained(model), "cpu")


def resources(arguments: Mapping[str, Any], replicas: int) -> dict[str, float]:
    """num_gpus and num_cpus of each of `replicas` engines with these arguments of LLM: a GPU for each rank where there
    are GPUs, else an equal share of a machine's CPUs. ValueError if no machine of the cluster could ever hold one."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    size, device = arguments.get("tensor_parallel_size") or 1, arguments.get("device") or "auto"
    most = max((int(node.get("GPU", 0)) for node in nodes), default=0)
    if device == "cpu" or (device == "auto" and not most):
        fewest = min((int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1), default=1)
        return {"num_gpus": 0, "num_cpus": max(1, fewest // -(-replicas // max(1, len(nodes))))}
    if size > most:
        raise ValueError(f"an engine of {size} GPUs fits on no machine of the cluster: they have {most} at most")
    return {"num_gpus": size, "num_cpus": 1}


def absolute(path: str) -> str:
    """The same model for processes that run in other folders."""
    return path if is_hub_id(path) else str(Path(path).resolve())


def absolute_paths(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the tokenizer and a draft model among LLM's arguments."""
    found = dict(arguments)
    if found.get("tokenizer"):
        found["tokenizer"] = absolute(found["tokenizer"])
    if (draft := found.get("speculative_config")) and draft.get("model"):
        found["speculative_config"] = {**draft, "model": absolute(draft["model"])}
    return found
