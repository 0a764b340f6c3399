"""benchmarks/ops.py on tiny shapes: it runs to its end, peers included, and closes with one JSON document."""

import json
import sys

from benchmarks import ops
from benchmarks.random_models import KINDS


def test_every_op_runs_and_the_last_line_is_one_document(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ops", "--tiny", "--rounds", "1"])
    ops.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["name"] == "ops"
    results = document["results"]
    norms, attention = {"rms_norm", "add_rms_norm"}, {"decode_attention", "prefill_attention"}
    others = {"silu_mul", "rope_and_store", "quantized_matmul", "sample"}
    assert {row["op"] for row in results} == norms | attention | others
    assert [row["shape"]["kind"] for row in results if row["op"] == "quantized_matmul"] == list(KINDS)
    assert {row["op"] for row in results if "cache" in row["shape"]} == attention
    for row in results:
        assert row["median"] > 0 and row["bytes"] > 0 and row["peers"] and not row["absent_peers"], row
