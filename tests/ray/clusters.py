"""Clusters of this machine: small ones, whose processes find this checkout."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

REPOSITORY = Path(__file__).parents[2]
_NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


def set_environment() -> None:
    """Of the processes that a cluster starts later."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tools")])
    os.environ["OMP_NUM_THREADS"] = "1"


@contextlib.contextmanager
def cluster(num_nodes: int, **options) -> Iterator[Cluster]:
    """Nodes of one CPU each, this process connected with the first."""
    set_environment()
    made = Cluster(initialize_head=True, head_node_args={**_NODE, **options})
    try:
        for _ in range(num_nodes - 1):
            add_node(made)
        ray.init(made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def add_node(made: Cluster):
    node = made.add_node(**_NODE)
    made.wait_for_nodes()
    return node


def processes(name: str) -> list[psutil.Process]:
    """Ray's workers on this machine whose name has this in it, of clusters that this process has started."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


class Front:
    """What tests know of a server, as far as it shows from outside."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=240)
        self.llm = self

    def run(self, body, path="/ai/run/tiny", **more) -> httpx.Response:
        return self.client.post(path, content=body if isinstance(body, bytes) else json.dumps(body), **more)

    @property
    def num_requests(self) -> float:
        """Of all replicas: each scrape shows one of them, drawn at random."""
        return sum(self._num_requests() for _ in range(8))

    def _num_requests(self) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}
        return values["llama_num_requests_running"] + values["llama_num_requests_waiting"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def served(make_llm: str) -> Iterator[Front]:
    """Two replicas of the server over what this function of `tests.server.helpers` makes, behind Serve's proxy."""

    @serve.deployment(num_replicas=2, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1})
    @serve.ingress()
    class Served:
        def __init__(self) -> None:
            from llama.server.config import ServerConfig
            from llama.server.service import Service
            from tests.server import helpers

            made = getattr(helpers, make_llm)()
            llm = made[0] if isinstance(made, tuple) else made
            self.service = Service(llm, ServerConfig(model_names=(helpers.NAME,)))

        def __serve_build_asgi_app__(self):
            from llama.server.app import create_app

            return create_app(self.service)

    with cluster(1, num_cpus=2):
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(Served.bind(), route_prefix="/")
        front = Front(f"http://127.0.0.1:{port}")
        with front.client:
            yield front
        serve.shutdown()
