import pytest

from tests.tiny_checkpoint import make_adapter, make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("batch") / "tiny")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> str:
    return make_adapter(tmp_path_factory.mktemp("adapter"))
