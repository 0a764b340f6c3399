import json

import pytest

from llama.model.config import ModelConfig
from tests.tiny_checkpoint import make_adapter, make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> str:
    return make_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def llama_70b(tmp_path) -> str:
    """config.json and generation_config.json alone."""
    config = ModelConfig.preset("llama-3.1-70b").to_hugging_face("bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128008, 128009]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return str(tmp_path)
