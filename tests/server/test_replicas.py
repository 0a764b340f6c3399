"""Several engines behind one address: requests go by load, a lost one costs its own requests alone."""

import asyncio
import json
import socket
import threading
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llama.server.config import ServerConfig, take_port
from llama.server.front import FrontServer, labelled
from llama.server.replicas import Replica, Replicas
from llama.server.run import Server
from llama.server.service import Service
from tests.server.helpers import NAME, PATIENCE, RUN, events_of, scripted_llm, until, user

KEY = {"authorization": "Bearer key"}


class Process:
    """What a Replica knows of its process; here it is a server in a thread."""

    pid = 7
    code: int | None = None

    def poll(self):
        return self.code

    def kill(self):
        self.code = self.code or -9

    def terminate(self):
        self.code = 0

    def wait(self):
        return self.code


class Served:
    """A server over an engine that says what it is asked to, on a socket without a file."""

    def __init__(self, number: int) -> None:
        self.llm, self.engine = scripted_llm()
        self.server = Server(Service(self.llm, ServerConfig(model_names=(NAME,), api_keys=("key",), access_log=False)))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        listener.listen()
        self.replica = Replica(number, Process(), socket.socketpair()[0], listener.getsockname())
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([listener])))
        self.thread.start()
        until(lambda: self.server.started)

    def close(self) -> None:
        self.server._loop.call_soon_threadsafe(self.server.stop)
        self.thread.join(PATIENCE)
        assert self.llm.num_requests == 0


@pytest.fixture
def front():
    """A client of two replicas' front, and what is behind it."""
    served = [Served(0), Served(1)]
    replicas = Replicas()
    replicas.all = [each.replica for each in served]
    server = FrontServer(replicas, ServerConfig(model_names=(NAME,), step_deadline=2.0))
    taken = take_port("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([taken])))
    thread.start()
    url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=PATIENCE, headers=KEY) as client:
        yield SimpleNamespace(client=client, served=served, url=url, replicas=replicas, server=server)
    for each in served:
        each.close()
    server._loop.call_soon_threadsafe(server.stop)
    thread.join(PATIENCE)
    assert not thread.is_alive() and server.exit_code == 0


def test_answers_are_the_replicas_own(front):
    client = front.client
    body = {"messages": [user("hello")]}
    direct = client.post(RUN, json=body)
    assert direct.json()["result"]["response"] == "hello" and direct.headers["x-request-id"]
    answer = client.post("/v1/chat/completions", json=body | {"model": NAME}, headers={"x-request-id": "mine"})
    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    assert answer.headers["x-request-id"] == "mine" and len(answer.headers.get_list("date")) == 1
    streamed = client.post("/v1/chat/completions", json=body | {"stream": True})
    events = events_of(streamed.text)
    assert (
        events[-1] == "[DONE]" and "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == "hello"
    )
    assert client.get("/v1/models?x=1").json()["data"][0]["id"] == NAME
    assert client.get("/nowhere").status_code == 404
    for target, status in ((b"http://x/health", 200), (b"http://x/v1/models?x=1", 200), (b"http://x/nowhere", 404)):
        assert client.get("/", extensions={"target": target}).status_code == status
    assert client.post(RUN, content=b"{").status_code == 400
    assert client.post(RUN, json=body, headers={"authorization": "Bearer no"}).status_code == 401
    assert client.head("/health").status_code == 200 and client.head("/v1/models").content == b""
    large = "a" * 300_000
    assert client.post(RUN, json={"messages": [user(large)]}).status_code in (400, 413)
    chunks = iter([json.dumps(body).encode()[:9], json.dumps(body).encode()[9:]])
    assert client.post(RUN, content=chunks).json()["result"]["response"] == "hello"


def test_requests_go_to_the_replica_with_the_fewest(front):
    for loads, asked in (([2, 1], [0, 1]), ([1, 2], [1, 1]), ([0, 5], [2, 1])):
        for replica, load in zip(front.replicas.all, loads, strict=True):
            replica.num_requests = load
        assert front.client.post(RUN, json={"messages": [user("x")]}).status_code == 200
        assert [len(each.engine.asked) for each in front.served] == asked
        until(lambda loads=loads: [replica.num_requests for replica in front.replicas.all] == loads)
    for replica in front.replicas.all:
        replica.num_requests = 0


def test_a_client_that_leaves_ends_its_request(front):
    forever = {"messages": [user("forever")], "stream": True, "max_tokens": 4000}
    with front.client.stream("POST", "/v1/chat/completions", json=forever) as answer:
        next(answer.iter_lines())
    until(lambda: all(each.llm.num_requests == 0 for each in front.served))
    until(lambda: front.replicas.all[0].num_requests == 0)


def test_a_lost_replica_costs_its_own_requests(front):
    process = front.replicas.all[0].process
    process.code = -9  # gone, and nobody will say so
    assert front.client.get("/health").json() == {
        "status": "degraded",
        "replicas": [
            {"replica": 0, "status": "replica 0 (process 7) was ended by SIGKILL"},
            {"replica": 1, "status": "ok"},
        ],
    }
    assert front.client.post(RUN, json={"messages": [user("hello")]}).status_code == 200
    assert [len(each.engine.asked) for each in front.served] == [0, 1]
    process.code = None
    front.replicas.all[0].address = b"\0nobody listens here"
    assert front.client.post(RUN, json={"messages": [user("hello")]}).status_code == 200
    ready = front.client.get("/ready")
    assert (ready.status_code, ready.json()["replicas"]) == (200, [{"replica": 1, "status": 200}])
    front.replicas.all[1].address = b"\0nobody listens here"
    answer = front.client.post(RUN, json={"messages": [user("hello")]})
    assert answer.status_code == 503 and answer.json()["success"] is False
    assert front.client.get("/ready").status_code == 503


@pytest.mark.parametrize(
    "said, ends_with",
    [
        (b"", None),
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n",
            "lost",
        ),
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\nhi", "broken"),
    ],
)
def test_an_answer_that_breaks_off_is_told(front, said, ends_with):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    front.replicas.all[0].address = listener.getsockname()

    def answer():
        connection, _ = listener.accept()
        with connection, listener:
            heard = b""
            while b"hello" not in heard:  # closed before all is read, a connection is reset
                heard += connection.recv(1 << 16)
            connection.sendall(said)

    threading.Thread(target=answer).start()
    body = {"messages": [user("hello")]}
    if ends_with == "broken":
        with pytest.raises(httpx.RemoteProtocolError):
            front.client.post("/v1/chat/completions", json=body)
        return
    found = front.client.post("/v1/chat/completions", json=body)
    if ends_with is None:
        assert found.status_code == 503 and found.json()["error"]["code"] == "unavailable"
    else:
        assert (
            found.text.startswith("hi")
            and "was lost" in json.loads(found.text.partition("data: ")[2])["error"]["message"]
        )


def test_a_replica_whose_queue_of_connections_is_full(front):
    front.replicas.all.pop()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as before:
        listener.bind("")
        listener.listen(0)
        address, front.replicas.all[0].address = front.replicas.all[0].address, listener.getsockname()
        before.connect(listener.getsockname())
        answer = front.client.post(RUN, json={"messages": [user("hello")]})
        assert answer.status_code == 503 and answer.json()["success"] is False
    front.replicas.all[0].address = address


def test_a_replica_that_hangs_keeps_no_other_s_answer(front):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        front.replicas.all[0].address = listener.getsockname()
        ready = front.client.get("/ready", timeout=10)
        assert (ready.status_code, ready.json()["replicas"]) == (200, [{"replica": 1, "status": 200}])
        assert 'replica="1"' in front.client.get("/metrics", timeout=10).text


def test_a_replica_that_hangs_gets_no_requests_until_it_answers(front, monkeypatch, caplog):
    """Those that it has fail, once it has said nothing for as long as a step may take."""
    monkeypatch.setattr("llama.server.replicas._SILENCE_SECONDS", 0.3)
    monkeypatch.setattr("llama.server.replicas._PROBE_SECONDS", 0.05)
    hanging = front.replicas.all[0]
    address = hanging.address
    body = {"messages": [user("hello")]}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        hanging.address = listener.getsockname()
        stuck = front.client.post("/v1/chat/completions", json=body)
        assert stuck.status_code == 503 and stuck.json()["error"]["code"] == "unavailable"
        assert hanging.is_silent and hanging.num_requests == 0
        assert front.client.get("/health").json() == {
            "status": "degraded",
            "replicas": [
                {"replica": 0, "status": "replica 0 (process 7) does not answer"},
                {"replica": 1, "status": "ok"},
            ],
        }
        assert [front.client.post(RUN, json=body).status_code for _ in range(3)] == [200] * 3
        front.replicas.all[1].process.code = -9
        assert front.client.post(RUN, json=body).status_code == 503
        hanging.address = address
    until(lambda: not hanging.is_silent)
    assert front.client.post(RUN, json=body).status_code == 200
    assert front.client.get("/health").json()["replicas"][0] == {"replica": 0, "status": "ok"}
    front.replicas.all[1].process.code = None
    assert "replica 0 (process 7) does not answer: its requests failed" in caplog.text
    assert "replica 0 (process 7) answers again" in caplog.text


def test_a_replica_that_fails_at_once_hurries_no_other(front, monkeypatch):
    monkeypatch.setattr("llama.server.front._LATER_SECONDS", 0.0)
    front.replicas.all[0].address = "\0nobody listens here"
    assert front.client.get("/ready").json()["replicas"] == [{"replica": 1, "status": 200}]


def test_a_body_where_none_is_read(front):
    assert front.client.request("GET", "/ready", content=b"a").status_code == 200
    assert "llama_engine_steps_total" in front.client.request("GET", "/metrics", content=b"a").text


def test_metrics_have_the_replica_as_a_label(front):
    front.client.post(RUN, json={"messages": [user("hello")]})
    text = front.client.get("/metrics").text
    [family] = [f for f in text_string_to_metric_families(text) if f.name == "llama_num_requests_running"]
    assert {sample.labels["replica"] for sample in family.samples} == {"0", "1"}
    sums = [
        s for f in text_string_to_metric_families(text) for s in f.samples if s.name == "llama_request_success_total"
    ]
    assert sum(sample.value for sample in sums) == 1
    assert front.client.get("/metrics", headers={"authorization": ""}).status_code == 401
    once = labelled({3: '# HELP a_total A.\n# TYPE a_total counter\na_total{b="c"} 2.0\n'}).decode()
    assert once == '# HELP a_total A.\n# TYPE a_total counter\na_total{b="c",replica="3"} 2.0\n'
