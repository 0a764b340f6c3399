"""The lines of a batch file in OpenAI's format: a request on each line in, its answer on a line out.

A line's id is a digest of what it asks and of the settings that it is answered with. By it a run that goes on after a
kill knows the answers that an earlier one left.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from llama.batch import parquet
from llama.batch.ids import IdSet
from llama.files import open_regular

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
ID_PREFIX = "batch_req_"
MAX_LINE_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a line is no request: OpenAI's kind of code, and one sentence."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input. With a `refusal` it has neither url nor body."""

    id: str
    custom_id: str | None
    url: str = ""
    body: Mapping[str, Any] | None = None
    refusal: Refusal | None = None

    def answered(self, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
        """The output line of a request that got an answer, be it a rejection."""
        request_id = self.id.removeprefix(ID_PREFIX)
        response = {"status_code": status, "request_id": request_id, "body": body}
        return {"id": self.id, "custom_id": self.custom_id, "response": response, "error": None}

    def failed(self, code: str, message: str) -> dict[str, Any]:
        """The output line of a request that got none."""
        return {
            "id": self.id,
            "custom_id": self.custom_id,
            "response": None,
            "error": {"code": code, "message": message},
        }


def body_of(line: Line, seed: int | None) -> dict[str, Any]:
    """What a line asks. With a `seed`, a line that names none (or -1, which is none) has one made of it and the
    custom_id, so that its answer depends on neither order nor neighbours."""
    body = dict(line.body or {})
    if seed is not None and body.get("seed") in (None, -1):
        digest = hashlib.sha256(f"{seed}:{line.custom_id}".encode()).digest()
        body["seed"] = int.from_bytes(digest[:6], "big")  # JSON's integers are exact below 2**53
    return body


def read_lines(path: Path, settings: Settings) -> Iterator[Line]:
    """Every line of the file but the blank ones, in order; what is no request, or has the custom_id of an earlier one,
    comes with its refusal."""
    custom_ids = IdSet()
    for number, raw in enumerate(_raw_lines(path), start=1):
        if raw.strip():
            line = parse_line(raw, number, settings)
            if line.refusal is None and not custom_ids.add(line.custom_id or ""):
                message = f"line {number}: an earlier line has the custom_id {line.custom_id!r}"
                line = _refused(raw, number, line.custom_id, Refusal("duplicate_custom_id", message))
            yield line


def count_lines(path: Path) -> int:
    """How many lines read_lines gives."""
    return sum(1 for raw in _raw_lines(path) if raw.strip())


def parse_line(raw: bytes, number: int, settings: Settings) -> Line:
    """A line by itself: whether its custom_id is new is not asked."""
    custom_id = None
    try:
        if len(raw) > MAX_LINE_BYTES:
            raise _LineError("line_too_long", f"a line may have {MAX_LINE_BYTES} bytes")
        value = _object(raw)
        custom_id = _custom_id(value)
        url, body = _request(value)
    except _LineError as error:
        return _refused(raw, number, custom_id, Refusal(error.code, f"line {number}: {error}"))
    line_id = _digest([custom_id, url, body, settings])
    return Line(line_id, custom_id, url, body)


class _LineError(ValueError):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise _LineError("invalid_json_line", f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _LineError("invalid_json_line", "a line must be a JSON object")
    return value


def _custom_id(value: dict[str, Any]) -> str:
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise _LineError("invalid_custom_id", f"custom_id must be a text that is not empty, got {_shown(custom_id)}")
    return custom_id


def _request(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    method, url, body = value.get("method"), value.get("url"), value.get("body")
    if method != "POST":
        raise _LineError("invalid_method", f"method must be POST, got {_shown(method)}")
    if url not in URLS:
        raise _LineError("invalid_url", f"url must be one of {', '.join(URLS)}, got {_shown(url)}")
    if not isinstance(body, dict):
        raise _LineError("invalid_body", f"body must be a JSON object, got {_shown(body)}")
    return url, body


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:100]


def _refused(raw: bytes, number: int, custom_id: str | None, refusal: Refusal) -> Line:
    # The number, because a file may hold the same bad line twice.
    return Line(_digest([number, raw.hex()]), custom_id, refusal=refusal)


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return ID_PREFIX + hashlib.sha256(text.encode()).hexdigest()[:32]


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Of a line that is too long only the beginning."""
    if parquet.is_parquet(path):
        yield from parquet.input_lines(path)
        return
    with open_regular(path) as file:
        file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
        while raw := file.readline(MAX_LINE_BYTES + 1):
            yield raw
            while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES + 1)
