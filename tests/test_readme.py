"""The documents' Python, run word for word where a tiny model and an adapter stand at the paths they name."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import make_tiny
import pytest

from llama.text.tokenizer import Tokenizer
from tests.tiny_checkpoint import make_adapter

REPOSITORY = Path(__file__).resolve().parent.parent
# The token ids in README are those of a larger vocabulary than that of bytes.
CONFIG = dataclasses.replace(make_tiny.TINY, vocab_size=8192, max_position_embeddings=512)
NO_NETWORK = """
import socket
def refuse(*arguments):
    raise OSError(f"the network is asked for {arguments}")
socket.getaddrinfo = socket.socket.connect = refuse
"""
AFTERWARDS = """
assert logits.shape == (1, 5, 8192), logits.shape
"""

RESEARCHED = """
count = len(output.prompt_token_ids)
assert last_token.shape == (1, 64) and pattern.shape == (4, count, count) and len(outputs) == 4
assert len(said) == len(effect) == 30 and attribution.shape == ids.shape[1:] and len(session) == ids.shape[1] + right
print("all of it")
"""


@pytest.mark.parametrize(
    "document, afterwards, told",
    [
        ("README.md", AFTERWARDS, "The capital of France is"),
        ("docs/scaling.md", "", "['"),
        ("docs/research.md", RESEARCHED, "all of it"),
    ],
)
def test_the_python_blocks_run(tmp_path, document, afterwards, told):
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [block for block in found if "import ray" not in block]  # tests/ray runs those
    assert blocks
    deep = dataclasses.replace(make_tiny.TINY, num_hidden_layers=30, max_position_embeddings=512)
    config = deep if document == "docs/research.md" else CONFIG
    make_tiny.make(tmp_path / "checkpoints/smollm2-135m-instruct", config, dtype="float32", seed=0)
    adapter = tmp_path / "checkpoints/demo-adapter"
    adapter.mkdir()
    make_adapter(adapter)
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join([NO_NETWORK, *blocks, afterwards])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert told in ran.stdout


def test_the_prefix_that_is_kept_fills_a_block_of_the_model_that_is_named(demo_model_path):
    """Above each byte is a token."""
    text = (REPOSITORY / "docs/research.md").read_text(encoding="utf-8")
    [(name, prompt)] = re.findall(r'^(\w+) = "(.*)"\nllm\.save_prefix\(\1,', text, re.MULTILINE)
    assert len(Tokenizer.from_pretrained(demo_model_path).encode(prompt)) >= 16, name
