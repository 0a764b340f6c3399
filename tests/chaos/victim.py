"""A server in a process of its own, what it must look like after an attack, and neighbours whose answers are known."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from make_tiny import main as make_tiny

from tests.lora.adapters import make_adapter

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 120
NAME = "victim"
TEMPLATE = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SAID = [{"role": "user", "content": "Say something."}]
# Each answer depends on the seed alone, whoever else is served: the engine computes in float64.
NEIGHBOURS = [
    ("/v1/completions", {"prompt": "The first", "max_tokens": 30, "seed": 1, "ignore_eos": True}),
    ("/v1/completions", {"prompt": "The second", "max_tokens": 30, "temperature": 0, "ignore_eos": True, "lora": "a"}),
    (
        "/v1/completions",
        {"prompt": "The third", "max_tokens": 30, "seed": 3, "stop": ["zq"], "logprobs": 2, "lora": "b"},
    ),
    ("/v1/chat/completions", {"messages": SAID, "max_tokens": 30, "seed": 4, "n": 2, "tools": [TOOL]}),
    (
        "/v1/chat/completions",
        {"messages": SAID, "max_tokens": 40, "seed": 5, "response_format": {"type": "regex", "regex": "[a-z]{5,20}"}},
    ),
    (f"/ai/run/{NAME}", {"messages": SAID, "max_tokens": 20, "seed": 6}),
]


@dataclass(frozen=True)
class State:
    """What an attack must leave as it was."""

    threads: int
    files: int
    children: int
    megabytes: int


# Pools grow to their size when they are first needed: 4 + 2 + 2 that prepare, asyncio's own, a worker process of each
# kind and size with its two pipes. A leak of a thousand requests is far more.
SLACK = State(threads=20, files=24, children=4, megabytes=600)


class Victim:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "tiny"
        make_tiny(["--output", str(self.checkpoint), "--dtype", "float32"])
        (self.checkpoint / "chat_template.jinja").write_text(TEMPLATE)
        self.adapters = folder / "adapters"
        for seed, name in enumerate("ab"):
            make_adapter(self.checkpoint, self.adapters / name, seed=seed)
        self.order = folder / "order"
        self.log = (folder / "log").open("w+b")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = self.llama(
            *("serve", str(self.checkpoint), "--port", str(self.port), "--served-model-name", NAME),
            *("--dtype", "float64", "--num-blocks", "160", "--block-size", "4", "--max-num-seqs", "16"),
            *("--max-model-len", "512", "--lora-dir", str(self.adapters)),
            stderr=self.log,
        )
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)
        until(self._is_up)
        self.expected = [self.answer(i) for i in range(len(NEIGHBOURS))]
        self.base = self.state()

    def llama(self, *arguments: str, **options) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "tests.chaos.faulty_server", str(self.order), *arguments, "--device", "cpu"]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **options)

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.said()
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Ends it as a user does, and it must end well."""
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            self.log.close()
        assert code == 0

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-5000:]

    def ask(self, path: str, body: dict, **options) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def answer(self, number: int) -> object:
        """What the neighbour is told: its texts and ends, or the status of an error."""
        response = self.ask(*NEIGHBOURS[number])
        if response.status_code != 200:
            return response.status_code
        value = response.json()
        if "result" in value:
            return value["result"]["response"]
        return [(c.get("text") or c.get("message", {}).get("content"), c["finish_reason"]) for c in value["choices"]]

    def answers(self) -> list:
        """Of all neighbours, asked at once."""
        with ThreadPoolExecutor(len(NEIGHBOURS)) as pool:
            return list(pool.map(self.answer, range(len(NEIGHBOURS))))

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"llama_{name}{{"))

    @property
    def children(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == self.process.pid:
                found.append(int(path.parent.name))
        return found

    def state(self) -> State:
        proc = Path(f"/proc/{self.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return State(
            len(list((proc / "task").iterdir())), len(list((proc / "fd").iterdir())), len(self.children), pages >> 8
        )

    def check(self) -> State:
        """After an attack: alive, idle, nothing left over, and neighbours get what they always got."""
        assert self.process.poll() is None, self.said()
        assert self.client.get("/health").status_code == 200
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        until(lambda: not any(self.metric(name) for name in names))
        answers = self.answers()
        assert answers == self.expected
        until(self._is_within)
        return self.state()

    def _is_within(self) -> bool:
        now = self.state()
        return all(
            getattr(now, name) <= getattr(self.base, name) + getattr(SLACK, name) for name in State.__annotations__
        )


def until(condition, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()
