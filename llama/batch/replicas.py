"""The lines of a batch, answered by several replicas: each goes to the one with the fewest. No torch."""

import json
from typing import Any

from llama.batch.lines import Line, body_of
from llama.server.errors import Dialect, bad_input
from llama.server.replicas import Replicas
from llama.server.upstream import UpstreamLostError


class ReplicasAnswerer:
    """As `llama.batch.answer.Answerer`. Lines whose replica is lost fail; once all are, the run ends with
    ReplicaLostError."""

    def __init__(self, replicas: Replicas, seed: int | None = None) -> None:
        self._replicas = replicas
        self._seed = seed

    async def __call__(self, line: Line) -> dict[str, Any]:
        body = body_of(line, self._seed)
        if body.get("stream"):
            return line.answered(
                400, bad_input("stream must be false or absent in a batch", "stream").body(Dialect.OPENAI)
            )
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        headers = [(b"content-type", b"application/json"), (b"x-request-id", line.id.encode())]
        async with self._replicas.idlest() as (replica, upstream):
            try:
                status, said = await upstream.exchange("POST", line.url.encode(), headers, data)
            except UpstreamLostError:
                return line.failed("internal_error", await replica.told_ending())
        answer = json.loads(said)
        if status < 500:
            return line.answered(status, answer)
        error = answer["error"]
        return line.failed(error["code"] or error["type"], error["message"])
