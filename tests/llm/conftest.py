import dataclasses
import json
from pathlib import Path

import make_tiny
import pytest

from llama import LLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with random weights and a tokenizer of bytes, chat in the Llama 3.1 format."""
    path = tmp_path_factory.mktemp("llm") / "tiny"
    make_tiny.make(path, dataclasses.replace(make_tiny.TINY, max_position_embeddings=256), dtype="float32", seed=0)
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_p": 0.25, "max_new_tokens": 7}))
    return path


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(folder, dtype="float64", num_blocks=200, max_num_seqs=8)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        assert not llm.engine.has_unfinished and not len(llm.replies)
        llm.engine.check()
