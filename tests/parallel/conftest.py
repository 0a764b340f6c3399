import pytest

from llama.llm import engines, rank
from tests.test_equivalence import model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model().save_pretrained(path)
    return path


@pytest.fixture
def runners(monkeypatch):
    """Those of all ranks, as they are made."""
    made = []
    for module in (rank, engines):
        make = module.make_runner
        monkeypatch.setattr(module, "make_runner", lambda *a, make=make: made.append(make(*a)) or made[-1])
    return made
