"""Many more requests than the queue holds: those refused hear of it at once, the others are served."""

import asyncio
import json
import logging
import resource
from contextlib import contextmanager

import pytest

from tests.server.helpers import RUN, running, scripted_llm

pytestmark = pytest.mark.slow

CLIENTS, QUEUE = 2_000, 200


async def ask(port: int) -> tuple[int, str]:
    body = json.dumps({"prompt": "text " * 4, "max_tokens": 50}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"POST {RUN} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )
    answer = (await reader.read()).decode()
    writer.close()
    return int(answer.split()[1]), answer


@contextmanager
def access_log():
    """Its lines, kept out of pytest's report."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.loads(record.getMessage()))
    logger = logging.getLogger("llama.access")
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def test_two_thousand_at_once():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 3 * CLIENTS), hard))
    llm, engine = scripted_llm(max_waiting_requests=QUEUE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with access_log() as lines, running(llm) as server:

            async def crowd():
                return await asyncio.gather(*(ask(server.port) for _ in range(CLIENTS)))

            answers = asyncio.run(crowd())
            assert engine.running == {}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= QUEUE
    assert all('"response":"text text text text ' in text for status, text in answers if status == 200)
    assert all("retry-after: " in text for status, text in answers if status == 429)
    seconds = sorted(line["seconds"] for line in lines if line["status"] == 429)
    assert seconds[int(len(seconds) * 0.99)] < 1.0
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth < 300 * 1024, f"{growth} KiB"
