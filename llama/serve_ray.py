"""The server on a Ray cluster: Ray Serve deploys the application of `llama serve`, an engine in each replica.

    llama serve MODEL --ray --replicas 2
    serve run llama.serve_ray:build_app model=MODEL replicas=2

Requests go to the replica that has the fewest. Each refuses on its own, in the dialect of the request, what its queue
does not take: Serve's limit lies above ours. Serve's proxy has the sockets; it starts replicas again that have ended or
whose check_health raises. Needs the extra `ray`.
"""

import logging
import signal
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, create_model
from ray import serve
from ray.serve import metrics as ray_metrics
from starlette.types import ASGIApp

from llama.async_llm.async_llm import AsyncLLM
from llama.engine.config import EngineConfig
from llama.hub import is_hub_id
from llama.llm.llm import LLM
from llama.ray_cluster import absolute, absolute_paths, check_model, resources
from llama.server.app import create_app
from llama.server.config import ServerConfig
from llama.server.run import read_vocabulary
from llama.server.service import Service
from llama.server.stopping import stop_signals

logger = logging.getLogger(__name__)

APPLICATION = "llama"
_MORE_ONGOING = 256  # requests beyond what an engine takes, which are there to be refused
_HEALTH_SECONDS = 2.0
_START_RETRIES = 3
_REPORT_SECONDS = 5.0
_TEXTS = (
    "tokenizer",
    "device",
    "dtype",
    "load_format",
    "quantization",
    "quantization_layout",
    "revision",
    "reasoning_parser",
)


def _options(config: Any) -> dict[str, Any]:
    """Pydantic's fields of these names and types; None lets the dataclass's own default hold."""
    shown: list[Any] = [option for option in fields(config) if "help" in option.metadata]
    return {option.name: (option.type | None, None) for option in shown}


_LLM = {**dict.fromkeys(_TEXTS, (str | None, None)), "check_weights": (bool | None, None), **_options(EngineConfig)}
_SERVER = _options(ServerConfig)
_Options: Any = create_model("_Options", **_LLM, **_SERVER)


class Arguments(_Options):  # type: ignore[misc]
    """What build_app takes, from the command line of `serve run` (where all are texts) or from YAML: beside the fields
    here, those of LLM, EngineConfig and ServerConfig. Others are refused.

    `replicas`, or with `max_replicas` as many from `min_replicas` on as leave each about `target_ongoing_requests`
    (max_num_seqs). `loras`: name -> folder. `model` and all folders must be at the same paths on every machine.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model: str
    replicas: int = Field(1, ge=1)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int | None = Field(None, ge=1)
    target_ongoing_requests: float | None = Field(None, gt=0)
    max_waiting_requests: int = Field(1024, ge=0)
    max_waiting_tokens: int = Field(1 << 20, ge=0)
    served_model_name: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    loras: dict[str, str] = Field(default_factory=dict)

    @property
    def llm(self) -> dict[str, Any]:
        """LLM's keyword arguments."""
        found = self._given(_LLM)
        if not self.loras and self.lora_dir is None:
            found["max_loras"] = 0
        return found

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(**self._given(_options(EngineConfig)))

    @property
    def server(self) -> ServerConfig:
        own = self.model if is_hub_id(self.model) else Path(self.model).resolve().name
        more: dict[str, Any] = {"api_keys": self.api_keys, "allow_origin": self.allow_origin}
        return ServerConfig(model_names=self.served_model_name or (own,), **more, **self._given(_SERVER))

    def with_absolute_paths(self) -> "Arguments":
        """The same for processes that run in other folders."""
        changes = absolute_paths(self._given(["tokenizer", "speculative_config"]))
        changes |= {"model": absolute(self.model), "loras": {name: absolute(at) for name, at in self.loras.items()}}
        if self.lora_dir is not None:
            changes["lora_dir"] = self.lora_dir.resolve()
        copied: Arguments = self.model_copy(update=changes)
        return copied

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@serve.ingress()
class Replica:
    """One engine and its application, in a process of Serve's."""

    def __init__(self, arguments: Arguments) -> None:
        llm = LLM(arguments.model, **arguments.llm)
        for name, path in arguments.loras.items():
            llm.load_lora(name, path)
        limits = {name: getattr(arguments, name) for name in ("max_waiting_requests", "max_waiting_tokens")}
        self._service = Service(AsyncLLM(llm, **limits), arguments.server)
        read_vocabulary(self._service.llm)
        threading.Thread(target=_report, args=(weakref.ref(self._service),), name="llama-metrics", daemon=True).start()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._service)

    async def check_health(self) -> None:
        """As /ready: Serve replaces a replica whose engine is dead or hangs in a step."""
        if not self._service.is_ready:
            raise RuntimeError("the engine is dead, or a step of it does not end")


def build_app(arguments: Arguments) -> serve.Application:
    """The application that `serve run` and `serve deploy` deploy. Ray must be connected. ValueError for what no engine
    and no machine of the cluster could mean."""
    engine, config = arguments.engine, arguments.server
    config.check_adapters(arguments.loras)
    check_model(arguments.model, engine)
    limits = _scale(arguments, engine.max_num_seqs)
    most = engine.max_num_seqs + arguments.max_waiting_requests + _MORE_ONGOING
    deployment = serve.deployment(
        Replica,
        name=APPLICATION,
        **limits,
        ray_actor_options=resources(arguments.llm, arguments.max_replicas or arguments.replicas),
        max_ongoing_requests=most,
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=config.shutdown_timeout,
        max_constructor_retry_count=_START_RETRIES,
        logging_config={"enable_access_log": config.access_log},
    )
    application: serve.Application = deployment.bind(arguments.with_absolute_paths())
    return application


def run(arguments: Arguments, host: str, port: int) -> None:
    """Deploy on the cluster that Ray is connected with, and serve until SIGTERM, SIGINT or SIGHUP, which drain."""
    stop = threading.Event()
    for number in stop_signals():
        signal.signal(number, lambda *_: stop.set())
    http = {"host": host, "port": port, "keep_alive_timeout_s": int(arguments.server.timeout_keep_alive)}
    serve.start(proxy_location="EveryNode", http_options=http)
    application = build_app(arguments)
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        why = _replicas_said() or str(error)
        serve.delete(APPLICATION)
        raise RuntimeError(f"no replica starts: {why}") from None
    logger.info("llama: serving %s on http://%s:%d, on Ray", arguments.server.name, host, port)
    while not stop.wait(1.0):
        pass
    serve.delete(APPLICATION)


def _replicas_said() -> str | None:
    """The last line of the traceback of one that did not start."""
    application = serve.status().applications.get(APPLICATION)
    deployment = None if application is None else application.deployments.get(APPLICATION)
    return None if deployment is None else deployment.message.strip().rpartition("\n")[2]


def _scale(arguments: Arguments, max_num_seqs: int) -> dict[str, Any]:
    if arguments.max_replicas is None:
        return {"num_replicas": arguments.replicas}
    if arguments.max_replicas < arguments.min_replicas:
        raise ValueError(f"max_replicas must be at least min_replicas, got {arguments.max_replicas}")
    target = arguments.target_ongoing_requests or max_num_seqs
    bounds = {"min_replicas": arguments.min_replicas, "max_replicas": arguments.max_replicas}
    return {"autoscaling_config": {**bounds, "target_ongoing_requests": target}}


def _report(service: "weakref.ref[Service]") -> None:
    """All that /metrics has goes to Ray's metrics too, as gauges of the same names with the replica's labels, for as
    long as there is a service."""
    gauges: dict[str, ray_metrics.Gauge] = {}
    while (found := service()) is not None:
        for name, text, labels, value in found.metrics.samples():
            if name not in gauges:
                gauges[name] = ray_metrics.Gauge(name, text, tuple(labels))
            gauges[name].set(value, labels)
        del found
        time.sleep(_REPORT_SECONDS)
