"""A server on a real socket in a thread, over an engine that says what the user's message tells it to."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import openai

from llama import LLM
from llama.api.outputs import FinishReason
from llama.async_llm.async_llm import AsyncLLM
from llama.engine.metrics import EngineMetrics
from llama.engine.sequence import TokenOutput
from llama.llm.replies import Replies
from llama.server.config import ServerConfig, take_port
from llama.server.run import Server
from llama.server.service import Service
from llama.text.tokenizer import Tokenizer
from tests.fakes import ScriptedEngine
from tests.fakes import byte_tokenizer as plain_byte_tokenizer
from tests.model.models import tiny_model

SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
FIRST_SPECIAL = 257
EOT = FIRST_SPECIAL + SPECIAL.index("<|eot_id|>")
VOCAB_SIZE = FIRST_SPECIAL + len(SPECIAL)
FAILS = -1  # an id at which a completion ends with "error"
NAME = "tiny"
RUN = f"/ai/run/{NAME}"
PATIENCE = 60  # seconds after which a test that waits for something has failed


def llama_byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are bytes; then come the control tokens of Llama 3.1's format, which chat uses here."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(plain_byte_tokenizer().backend_json)
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return Tokenizer(backend, eos_token_ids=[EOT])


TOKENIZER = llama_byte_tokenizer()
FOREVER = [ord("a")] * 1_000_000
_USER = TOKENIZER.encode("<|start_header_id|>user<|end_header_id|>\n\n")


def say_what_the_user_says(prompt: Sequence[int], index: int) -> list[int]:
    """ "forever" never ends, "fail" breaks off, "empty" ends at once; else the answer is the user's last message."""
    said = list(prompt)
    starts = [i for i in range(len(said)) if said[i : i + len(_USER)] == _USER]
    if starts:
        said = said[starts[-1] + len(_USER) :]
        said = said[: said.index(EOT)]
    text = bytes(token for token in said if token < 256).decode()
    if text == "forever":
        return FOREVER
    if text == "fail":
        return [*b"half", FAILS]
    if text == "empty":
        return [EOT]
    return [*text.encode(), EOT]


class ServedEngine(ScriptedEngine):
    """Remembers every request."""

    def __init__(self) -> None:
        super().__init__(say_what_the_user_says)
        self.config = SimpleNamespace(max_num_seqs=8, max_model_len=4096, context_len=4096, max_logprobs=20)
        self.asked: list[SimpleNamespace] = []

    def add(self, request):
        prompt, lora = request.prompt_token_ids.tolist(), request.adapter.name or None
        self.asked.append(
            SimpleNamespace(prompt=prompt, params=request.params, lora=lora, text=TOKENIZER.decode(prompt, False))
        )
        return super().add(request)

    def step(self):
        if any(len(state.said) == len(FOREVER) for state in self.running.values()):
            time.sleep(0.001)  # or max_tokens comes before those who watch have seen it run
        return super().step()

    def _next(self, key, state):
        if state.said[state.at] == FAILS:
            del self.running[key]
            return TokenOutput(*key, [], finish_reason=FinishReason.ERROR)
        if state.said[state.at] == EOT and not state.params.ignore_eos:
            del self.running[key]
            logprobs = [self._entries(EOT)] if state.params.logprobs is not None else None
            return TokenOutput(*key, [EOT], logprobs, FinishReason.STOP, None, None, 3)
        return super()._next(key, state)

    def _entries(self, token):
        from llama.api.outputs import Logprob

        return {token: Logprob(-0.5, 1)}

    def metrics(self):
        return EngineMetrics(0, len(self.running), 4, 0, 0, self.num_steps, 0, 0, 0, 0, 0)


def scripted_llm(**limits) -> tuple[AsyncLLM, ServedEngine]:
    llm = LLM(
        tiny_model(vocab_size=VOCAB_SIZE, max_position_embeddings=4096), TOKENIZER, num_blocks=512, max_num_seqs=8
    )
    engine = llm.engine = ServedEngine()
    llm.replies = Replies(engine, llm.tokenizer)
    return AsyncLLM(llm, **limits), engine


def real_llm(**arguments) -> AsyncLLM:
    model = tiny_model(vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    return AsyncLLM(model, TOKENIZER, **{"num_blocks": 256, "max_num_seqs": 8, **arguments})


class Running:
    """A server that answers at `url`."""

    def __init__(self, llm: AsyncLLM, **config) -> None:
        self.llm = llm
        self.service = Service(llm, ServerConfig(**{"model_names": (NAME,), **config}))
        self.server = Server(self.service)
        self.listening = taken = take_port("127.0.0.1", 0)
        self.port = taken.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([taken])))
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60, verify=False)  # to read certificates takes long

    def run(self, body, path=RUN, **more):
        """POST to Cloudflare's route."""
        return self.client.post(path, content=body if isinstance(body, bytes) else json.dumps(body), **more)

    def stop(self) -> None:
        self.server._loop.call_soon_threadsafe(self.server.stop)

    def close(self) -> None:
        self.client.close()
        while not self.server.started and self.thread.is_alive():
            self.thread.join(0.01)
        if self.thread.is_alive() and self.server._draining is None:
            self.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert self.llm.num_requests == 0 and self.llm.num_waiting_tokens == 0


@contextmanager
def running(llm: AsyncLLM, **config):
    server = Running(llm, **config)
    try:
        yield server
    finally:
        server.close()


def events_of(text: str) -> list:
    """The JSON values of an event stream; its [DONE] as it is."""
    parts = text.split("\n\n")
    assert parts[-1] == "" and all(part.startswith("data: ") for part in parts[:-1])
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts[:-1]]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def begin(server, body, path=RUN) -> socket.socket:
    """A request on a socket of its own, whose answer nobody reads yet."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def begin_slowly(server, body, path) -> socket.socket:
    """As `begin`, over a connection with hardly any buffers: what is not read stays with the server."""
    server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", server.port))
    connections = server.server.server_state.connections
    until(lambda: connections)
    (served,) = connections
    server.server._loop.call_soon_threadsafe(served.transport.set_write_buffer_limits, 1024)
    data = json.dumps(body).encode()
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def read_all(connection) -> str:
    parts = []
    with connection:
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts).decode()


def client_of(server):
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
