import pytest

from tests.lora.adapters import save_base


@pytest.fixture(scope="session")
def base_path(tmp_path_factory):
    """A tiny untied base model, saved by transformers."""
    return save_base(tmp_path_factory.mktemp("base"), tied=False)


@pytest.fixture(scope="session")
def tied_base_path(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("tied"), tied=True)
