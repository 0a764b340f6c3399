"""Requests that arrive at random (Poisson) at running servers: how long their clients wait.

    llama serve checkpoints/smollm2-135m-instruct --port 8000 &
    python -m benchmarks.serving ours=http://127.0.0.1:8000/v1 [peer=http://127.0.0.1:8081/v1] --rate 2

Every server gets the same prompts at the same moments, one server after the other, round by round and first in turn, so
that all see the same weather; before that, one request that does not count. Times are the client's: to the first text,
between two events of a stream, to the end; and, twenty times a second while requests run, to an answer that needs no
model (/models): so long a server's event loop keeps others waiting.

A peer on the same weights is llama-cpp-python's server (the extra `peers`) on a GGUF of the same checkpoint
(tools/float16_gguf.py), with --interrupt_requests False: otherwise it drops a request when another arrives.
"""

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import httpx

from benchmarks.common import close

_INTERVAL = 0.05  # seconds between two questions that need no model
WORDS = (
    "the of and to in is was for on that with as by at from it an be this which or are not have had but one all".split()
)


@dataclass(slots=True)
class Timing:
    """Seconds of one request; `gaps` lie between two events with text."""

    first: float = 0.0
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0


async def ask(client: httpx.AsyncClient, url: str, prompt: str, max_tokens: int) -> Timing:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    timing, began = Timing(), time.perf_counter()
    last, events = began, 0
    async with client.stream("POST", f"{url}/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                timing.tokens = event["usage"]["completion_tokens"]
            if not any(choice["text"] for choice in event["choices"]):
                continue
            now, events = time.perf_counter(), events + 1
            if not timing.first:
                timing.first = now - began
            else:
                timing.gaps.append(now - last)
            last = now
    timing.total = time.perf_counter() - began
    timing.tokens = timing.tokens or events  # a server that tells no usage sends about one token per event
    return timing


async def knock(client: httpx.AsyncClient, url: str, seconds: list[float]) -> None:
    """For ever."""
    while True:
        began = time.perf_counter()
        (await client.get(f"{url}/models")).raise_for_status()
        seconds.append(time.perf_counter() - began)
        await asyncio.sleep(_INTERVAL)


async def crowd(
    url: str, prompts: list[str], arrivals: list[float], max_tokens: int
) -> tuple[list[Timing], list[float], float]:
    """-> (timings, seconds to answers that need no model, seconds from the first arrival to the last answer)"""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        began = time.perf_counter()

        async def arrive(prompt: str, at: float) -> Timing:
            await asyncio.sleep(at - (time.perf_counter() - began))
            return await ask(client, url, prompt, max_tokens)

        knocks: list[float] = []
        knocking = asyncio.create_task(knock(client, url, knocks))
        timings = await asyncio.gather(*map(arrive, prompts, arrivals))
        seconds = time.perf_counter() - began
        if knocking.done():
            knocking.result()
        knocking.cancel()
        return list(timings), knocks, seconds


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 5) for p in (50, 90, 99)}


def named_url(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if not (name and url.startswith(("http://", "https://"))):
        raise argparse.ArgumentTypeError(f"must be NAME=http://HOST:PORT/v1, got {text!r}")
    return name, url.rstrip("/")


def above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return value


def at_least_1(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    server_help = "a base URL of OpenAI's dialect, with /v1"
    parser.add_argument("servers", nargs="+", type=named_url, metavar="NAME=URL", help=server_help)
    parser.add_argument("--rate", type=above_0, default=2.0, help="requests per second")
    parser.add_argument("--requests", type=at_least_1, default=40, help="per round")
    parser.add_argument("--rounds", type=at_least_1, default=2)
    parser.add_argument("--words", type=at_least_1, default=100, help="of a prompt, about as many tokens")
    parser.add_argument("--max-tokens", type=at_least_1, default=64)
    seed_help = "of prompts and arrivals; drawn anew if not given, for a server may know the prompts of the run before"
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help=seed_help)
    options = parser.parse_args()
    servers = dict(options.servers)
    chance = random.Random(options.seed)
    timings: dict[str, list[Timing]] = {name: [] for name in servers}
    knocks: dict[str, list[float]] = {name: [] for name in servers}
    seconds = dict.fromkeys(servers, 0.0)
    for url in servers.values():
        asyncio.run(crowd(url, [" ".join(WORDS)], [0.0], options.max_tokens))
    for turn in range(options.rounds):
        prompts = [" ".join(chance.choices(WORDS, k=options.words)) for _ in range(options.requests)]
        arrivals, now = [], 0.0
        for _ in range(options.requests):
            arrivals.append(now)
            now += chance.expovariate(options.rate)
        for name, url in list(servers.items())[:: -1 if turn % 2 else 1]:
            found, answered, took = asyncio.run(crowd(url, prompts, arrivals, options.max_tokens))
            timings[name] += found
            knocks[name] += answered
            seconds[name] += took
    results = {}
    for name, found in timings.items():
        results[name] = {
            "time_to_first_text": percentiles([timing.first for timing in found]),
            "between_events": percentiles([gap for timing in found for gap in timing.gaps]),
            "end_to_end": percentiles([timing.total for timing in found]),
            "answers_without_model": percentiles(knocks[name]),
            "tokens_per_second": round(sum(timing.tokens for timing in found) / seconds[name], 2),
        }
        print(f"{name}: {results[name]['tokens_per_second']} tokens/s")
        for what in ("time_to_first_text", "between_events", "end_to_end", "answers_without_model"):
            print(f"  {what:22}" + "".join(f"{p} {value:9.4f} s   " for p, value in results[name][what].items()))
    close("serving", shapes=vars(options) | {"servers": servers}, results=results)


if __name__ == "__main__":
    main()
