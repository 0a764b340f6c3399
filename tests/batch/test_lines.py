"""What is a request and what is not: each bad line is told off by itself, and the lines around it are read."""

import json
import os
from pathlib import Path

import pytest

from llama.batch import lines
from llama.batch.lines import count_lines, read_lines


def request(custom_id="a", **changes) -> dict:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}


@pytest.fixture
def read(tmp_path):
    def read(data: bytes, **settings):
        path = tmp_path / "input.jsonl"
        path.write_bytes(data)
        found = list(read_lines(path, settings))
        assert count_lines(path) == len(found)
        return found

    return read


def encoded(*values) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def test_requests_come_in_order_with_their_bodies(read):
    first, second = read(encoded(request("a"), request("b", url="/v1/completions", body={"prompt": "x"})))
    assert (first.custom_id, first.url, first.refusal) == ("a", "/v1/chat/completions", None)
    assert (second.custom_id, second.url, second.body) == ("b", "/v1/completions", {"prompt": "x"})


@pytest.mark.parametrize(
    "line, code, custom_id",
    [
        (b'{"custom_id": "x", ', "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b'{"custom_id": "x", "body": {"temperature": NaN}}', "invalid_json_line", None),
        (b'{"custom_id": "\\ud800"}', "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (json.dumps(request(None)).encode(), "invalid_custom_id", None),
        (json.dumps(request("")).encode(), "invalid_custom_id", None),
        (json.dumps(request(7)).encode(), "invalid_custom_id", None),
        (json.dumps(request("x", method="GET")).encode(), "invalid_method", "x"),
        (json.dumps(request("x", url="/v1/embeddings")).encode(), "invalid_url", "x"),
        (json.dumps(request("x", url=["/v1/completions"])).encode(), "invalid_url", "x"),
        (json.dumps(request("x", body="hi")).encode(), "invalid_body", "x"),
        (json.dumps(request("a")).encode(), "duplicate_custom_id", "a"),
    ],
)
def test_bad_line_has_its_own_refusal(read, line, code, custom_id):
    before, bad, after = read(encoded(request("a")) + line + b"\n" + encoded(request("b")))
    assert (before.custom_id, before.refusal, after.custom_id, after.refusal) == ("a", None, "b", None)
    assert (bad.refusal.code, bad.custom_id) == (code, custom_id)
    assert bad.refusal.message.startswith("line 2: ") and len(bad.refusal.message) < 300


def test_url_that_is_not_there_is_named(read):
    [line] = read(encoded(request(url="/v1/images")))
    assert (
        "/v1/images" in line.refusal.message
        and "/v1/responses" in line.refusal.message
        and "/v1/chat/completions" in line.refusal.message
    )


def test_line_that_is_too_long_is_refused_and_skipped(read, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 200)
    exact = json.dumps(request("e")).encode()
    exact = exact + b" " * (199 - len(exact)) + b"\n"
    long = encoded(request("x" * 1000))
    found = read(encoded(request("a")) + long + exact + encoded(request("b")) + long.rstrip())
    assert [line.refusal and line.refusal.code for line in found] == [
        None,
        "line_too_long",
        None,
        None,
        "line_too_long",
    ]
    assert found[1].id != found[4].id


def test_byte_order_mark_line_ends_and_blank_lines(read):
    data = b"\xef\xbb\xbf" + encoded(request("a")).replace(b"\n", b"\r\n") + b"\n  \r\n" + encoded(request("b"))
    found = read(data + json.dumps(request("c")).encode())
    assert [(line.custom_id, line.refusal) for line in found] == [("a", None), ("b", None), ("c", None)]
    assert read(b"") == read(b"\xef\xbb\xbf") == read(b"\n\n") == []


def test_id_depends_on_what_is_asked_and_how_alone(read):
    [plain] = read(encoded(request("a")))
    reordered = dict(reversed(request("a").items()))
    [_, moved] = read(encoded(request("z"), reordered))
    assert moved.id == plain.id and plain.id.startswith("batch_req_")
    [other_body] = read(encoded(request("a", body={"messages": []})))
    [other_name] = read(encoded(request("b")))
    [other_model] = read(encoded(request("a")), model="another")
    assert len({plain.id, other_body.id, other_name.id, other_model.id}) == 4


def test_same_bad_line_twice_has_two_ids(read):
    first, second = read(b"{\n{\n")
    assert first.id != second.id


def test_the_lines_of_the_document_are_requests(read):
    document = (Path(__file__).parents[2] / "docs/scaling.md").read_text(encoding="utf-8")
    shown = [line.strip() for line in document.splitlines() if line.startswith('    {"custom_id"')]
    found = read("\n".join(shown).encode())
    assert [(line.custom_id, line.refusal) for line in found] == [("1", None), ("2", None)]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (count_lines, lambda path: list(read_lines(path, {}))):
        with pytest.raises(OSError, match=r"not a regular file.*pipe"):
            read(tmp_path / "pipe")
