"""Histograms of /metrics under vLLM's names."""

import pytest

from tests.server.helpers import NAME, user


def sums_of(server, names):
    """(count, sum) of each of these metrics."""
    lines = [line for line in server.client.get("/metrics").text.splitlines() if not line.startswith("#")]
    told = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    return [(told[f"llama_{name}_count"], told[f"llama_{name}_sum"]) for name in names]


def test_a_request_s_time_is_told_in_parts(tiny):
    """Under vLLM's names: the parts add up, and a request of one token has no time per token."""
    parts = ("queue_time", "prefill_time", "decode_time", "inference_time", "time_per_output_token")
    names = [*(f"request_{part}_seconds" for part in parts), "e2e_request_latency_seconds"]
    before = sums_of(tiny, names)
    for max_tokens in (1, 9):
        body = {"model": NAME, "prompt": "Hello", "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
        assert tiny.client.post("/v1/completions", json=body).status_code == 200
    counts, (queue, prefill, decode, inference, per_token, whole) = zip(
        *[(now - then, total - was) for (then, was), (now, total) in zip(before, sums_of(tiny, names), strict=True)],
        strict=True,
    )
    assert counts == (2, 2, 2, 2, 1, 2)
    assert min(queue, prefill, decode) > 0
    assert inference == pytest.approx(prefill + decode) and per_token <= decode / 8 * (1 + 1e-9)
    assert queue + inference <= whole * (1 + 1e-9)


def test_the_sizes_of_answers_under_vllms_names(tiny):
    """Of several completions the longest counts, and what was asked for where it was."""
    names = [f"request_{name}" for name in ("generation_tokens", "max_num_generation_tokens", "params_max_tokens")]
    before = sums_of(tiny, names)
    for more in ({"max_tokens": 3, "n": 2, "ignore_eos": True}, {"allowed_token_ids": [65], "stop_token_ids": [65]}):
        body = {"model": NAME, "messages": [user("Hello")], **more}
        assert tiny.client.post("/v1/chat/completions", json=body).status_code == 200
    after = sums_of(tiny, names)
    counts = [(now - then, total - was) for (then, was), (now, total) in zip(before, after, strict=True)]
    assert counts == [(2, 7), (2, 4), (1, 3)]
