"""The attacks, each as long as its caller wants: (victim, size, chance) -> one line that says what happened.

What must hold while it lasts is asserted here, what must hold afterwards in Victim.check.
"""

import asyncio
import json
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx

from tests.chaos.victim import NAME, PATIENCE, SAID, Victim, dumped
from tests.server.test_fuzz import FINE, RICH

ROUTES = {path.replace("/ai/run/tiny", f"/ai/run/{NAME}"): path for path in FINE}
ODD = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, 0.5, "", "x", "auto", "<|eot_id|>", "{{ 1 }}", [], {}, [[]]]
ODD += [{"type": "regex", "regex": "(a|b)*"}, {"role": "user"}, [1, 2, 3], "\x00", "🙂"]


def damaged(value, chance: random.Random):
    """The value with something inside it replaced, taken away or put in."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.2:
        return chance.choice(ODD)
    if isinstance(value, list):
        at = chance.randrange(len(value))
        return [*value[:at], damaged(value[at], chance), *value[at + 1 :]]
    key, kind = chance.choice(sorted(value)), chance.random()
    if kind < 0.1:
        return {name: inner for name, inner in value.items() if name != key}
    if kind < 0.2:
        return value | {chance.choice(["x", "lora", "model", "tools", "prompt"]): chance.choice(ODD)}
    return value | {key: damaged(value[key], chance)}


def fuzz(victim: Victim, size: int, chance: random.Random) -> str:
    """Bad requests in both dialects: no 5xx, every one is answered."""

    def request():
        path = chance.choice(sorted(ROUTES))
        rich, fine = RICH[ROUTES[path]], FINE[ROUTES[path]]
        kind = chance.random()
        if kind < 0.05:
            return path, chance.randbytes(chance.randrange(60))
        return path, dumped(damaged(rich if kind < 0.6 else fine, chance) if kind < 0.95 else chance.choice(ODD))

    def post(request) -> int:
        path, body = request
        status = victim.client.post(path, content=body).status_code
        assert status in (200, 400, 404, 405, 413, 429), (status, path, body)
        return status

    with ThreadPoolExecutor(8) as pool:
        counts = Counter(pool.map(post, [request() for _ in range(size)]))
    return f"{size} bad requests: {dict(sorted(counts.items()))}"


def aborts(victim: Victim, size: int, chance: random.Random) -> str:
    """Clients that leave at any time, under pressure for KV blocks and with adapters; some stay and must not notice."""
    survivors = wrong = 0
    path, stays = "/v1/completions", {"prompt": "I stay", "max_tokens": 40, "seed": 9, "ignore_eos": True, "lora": "a"}
    expected = victim.ask(path, stays).json()["choices"][0]["text"]

    async def leave(client: httpx.AsyncClient) -> None:
        body = {"prompt": "x" * chance.randrange(1, 300), "max_tokens": 150, "ignore_eos": True, "stream": True}
        body |= {"lora": chance.choice(["a", "b"])} if chance.random() < 0.5 else {}
        body |= {"n": 3} if chance.random() < 0.2 else {}
        lines = chance.choice([0, 0, 1, 1, 2, 2, 3, 3, 60])
        try:
            async with asyncio.timeout(chance.choice([0.001, 0.02, 60])):
                async with client.stream("POST", path, json=body) as response:
                    async for _ in response.aiter_lines():
                        lines -= 1
                        if lines < 0:
                            break
        except (TimeoutError, httpx.TransportError):
            pass

    async def stay(client: httpx.AsyncClient) -> None:
        nonlocal survivors, wrong
        response = await client.post(path, json=stays)
        if response.status_code != 429:
            survivors += 1
            wrong += response.json()["choices"][0]["text"] != expected

    async def main() -> None:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=victim.url, timeout=PATIENCE, limits=limits) as client:
            todo = iter(range(size))

            async def work() -> None:
                for i in todo:
                    await (stay(client) if i % 20 == 0 else leave(client))

            await asyncio.gather(*(work() for _ in range(32)))

    asyncio.run(main())
    assert survivors and not wrong
    preempted = victim.metric("num_preemptions_total")
    return f"{size} requests, of which {survivors} stayed and had their answer; {preempted:.0f} preemptions so far"


def connections(victim: Victim, size: int, chance: random.Random) -> str:
    """Many at once: idle ones, halves of a request, and requests, each of which gets an answer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * size + 500)), hard))
    body = dumped({"prompt": "x", "max_tokens": 2})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    )
    opened, counts = [], Counter()
    try:
        for i in range(size):
            opened.append(connection := socket.create_connection(("127.0.0.1", victim.port), timeout=PATIENCE))
            connection.sendall((b"", head[: chance.randrange(1, 40)], head + body)[i % 3])
        assert victim.client.get("/health").status_code == 200
        for connection in opened[2::3]:
            status = connection.recv(64).split(b" ")[1].decode()
            assert status in ("200", "429")
            counts[status] += 1
    finally:
        for connection in opened:
            connection.close()
    return f"{size} connections: {dict(counts)}"


FAULTS = [
    (place, error) for place in ("decoder", "stop", "tools", "naming") for error in ("exception", "memory", "panic")
]
FAULTS += [("step", "exception"), ("step", "memory"), ("step", "oom"), ("logits", "exception"), ("logits", "nan")]


def faults(victim: Victim, size: int, chance: random.Random) -> str:
    """A fault in a part of one request is its own; one in a step is that step's requests'; none is the server's."""
    told = []
    for place, error in FAULTS[:size]:
        victim.order.write_text(f"{place} {error}")
        answers = victim.answers()
        assert not victim.order.exists(), f"nobody came by: {place}"
        failed = [i for i, answer in enumerate(answers) if answer != victim.expected[i]]
        assert all(answers[i] == 500 for i in failed), (place, error, answers)
        most = len(answers) if place in ("step", "logits") else 1
        assert len(failed) <= most and (failed or error == "oom"), (place, error, failed)
        assert victim.answers() == victim.expected
        told.append(f"{place}/{error}: {len(failed)}")
    return f"{len(told)} faults, requests that failed: {', '.join(told)}"


def stops(victim: Victim, size: int, chance: random.Random) -> str:
    """The whole process stands still, and its worker processes: whoever waits has the same answer, later."""
    for _ in range(size):
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(victim.answers)
            time.sleep(chance.random() * 0.2)
            victim.process.send_signal(signal.SIGSTOP)
            time.sleep(1)
            victim.process.send_signal(signal.SIGCONT)
            assert asked.result() == victim.expected
        for child in victim.children:
            os.kill(child, signal.SIGSTOP)
        assert victim.answers() == victim.expected
    return f"stopped {size} times, and its workers"


def kills(victim: Victim, size: int, chance: random.Random) -> str:
    """kill -9 of its worker processes, four times a second: no innocent 400."""
    done, killed, counts = threading.Event(), 0, Counter()

    def kill() -> None:
        nonlocal killed
        while not done.wait(0.25):
            for child in victim.children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                    killed += 1

    def ask(number: int) -> None:
        regex = f"[a-z]{{3,9}}|{chance.random()}"
        body = {"messages": SAID, "max_tokens": 12, "response_format": {"type": "regex", "regex": regex}}
        response = victim.ask("/v1/chat/completions", body if number % 2 else {"messages": SAID, "max_tokens": 3})
        counts[response.status_code] += 1
        assert response.status_code == 200 or (response.status_code == 503 and "retry-after" in response.headers)

    killer = threading.Thread(target=kill)
    killer.start()
    ends = time.monotonic() + size
    try:
        with ThreadPoolExecutor(4) as pool:
            while time.monotonic() < ends:
                list(pool.map(ask, range(8)))
    finally:
        done.set()
        killer.join()
    assert counts[200]
    return (
        f"{killed} worker processes killed in {size} s: {dict(counts)}, {victim.metric('workers_lost_total'):.0f} lost"
    )


def hostile_adapters(victim: Victim, size: int, chance: random.Random) -> str:
    """Folders that never end when they are read."""
    source = victim.adapters / "a"
    for number in range(size):
        for kind in ("fifo", "zero", "sparse", "text", "cut"):
            folder = victim.adapters / f"{kind}{number}"
            folder.mkdir(exist_ok=True)
            config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
            for path in (config, weights):
                path.unlink(missing_ok=True)
            config.write_bytes((source / config.name).read_bytes())
            if kind == "fifo":
                os.mkfifo(weights)
            elif kind == "zero":
                weights.symlink_to("/dev/zero")
            elif kind == "sparse":
                os.truncate(config, 3 << 30)
            elif kind == "text":
                weights.write_text("<html>")
            else:
                weights.write_bytes((source / weights.name).read_bytes()[:-100])
            began = time.monotonic()
            response = victim.ask("/v1/completions", {"prompt": "x", "max_tokens": 1, "lora": folder.name})
            assert response.status_code == 400 and time.monotonic() - began < 30, response.text
            for path in (config, weights):
                path.unlink(missing_ok=True)
            folder.rmdir()
    return f"{5 * size} hostile adapters refused"


def large_prompts(victim: Victim, size: int, chance: random.Random) -> str:
    """8 MB for a context of 512: refused at once, and what they took is given back."""
    body = dumped({"prompt": "hello, " * 1_100_000})
    chat = dumped({"messages": [{"role": "user", "content": "hello, " * 1_100_000}]})
    before, slowest, times = victim.state().megabytes, 0.0, []
    with health(victim) as latencies:
        for i in range(size):
            began = time.monotonic()
            path = "/v1/chat/completions" if i % 2 else "/v1/completions"
            response = victim.client.post(path, content=chat if i % 2 else body)
            times.append(time.monotonic() - began)
            assert response.json()["error"]["code"] == "context_length_exceeded"
    slowest = max(latencies)
    grown = victim.state().megabytes - before
    assert grown < 150
    return (
        f"{size} prompts of 8 MB: {min(times):.2f} to {max(times):.2f} s, {grown:+d} MB, /health within {slowest:.2f} s"
    )


@contextmanager
def health(victim: Victim):
    latencies, done = [], threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=victim.url, timeout=PATIENCE) as client:
            while not done.wait(0.02):
                began = time.monotonic()
                assert client.get("/health").status_code == 200
                latencies.append(time.monotonic() - began)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield latencies
    finally:
        done.set()
        thread.join()


def full_disk(victim: Victim, size: int, chance: random.Random) -> str:
    """A batch whose output has no room left says so in a line, and goes on when it is started again."""
    source, output = victim.folder / "batch.jsonl", victim.folder / "answers.jsonl"
    body = {"prompt": "x", "max_tokens": 3, "seed": 1}
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i in range(8 * size)]
    source.write_text("\n".join(map(json.dumps, lines)))
    output.unlink(missing_ok=True)
    arguments = ("batch", str(victim.checkpoint), str(source), str(output), "--num-blocks", "64")

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    first = victim.llama(*arguments, preexec_fn=no_room, stderr=subprocess.PIPE, text=True)
    said = first.communicate(timeout=PATIENCE)[1]
    assert first.returncode == 1 and "Traceback" not in said and "File too large" in said, said
    second = victim.llama(*arguments, stderr=subprocess.PIPE, text=True)
    said = second.communicate(timeout=PATIENCE)[1]
    assert second.returncode == 0, said
    assert len({json.loads(line)["custom_id"] for line in output.read_text().splitlines()}) == len(lines)
    return f"a batch of {len(lines)} lines, stopped by a full disk, went on"


# name -> (the attack, its size in `make chaos`, its size for each round of a soak)
ATTACKS = {
    "fuzz": (fuzz, 5000, 200),
    "aborts": (aborts, 5000, 200),
    "connections": (connections, 2000, 200),
    "faults": (faults, len(FAULTS), len(FAULTS)),
    "stops": (stops, 3, 1),
    "kills": (kills, 25, 5),
    "hostile_adapters": (hostile_adapters, 2, 1),
    "large_prompts": (large_prompts, 8, 2),
    "full_disk": (full_disk, 1, 1),
}
