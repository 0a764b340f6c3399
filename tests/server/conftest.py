from types import SimpleNamespace

import pytest

from tests.server.helpers import client_of, real_llm, running, scripted_llm


@pytest.fixture(scope="module")
def scripted():
    """(a server whose engine says what the user says, that engine)"""
    llm, engine = scripted_llm()
    with running(llm, shutdown_timeout=2.0) as server:
        yield SimpleNamespace(server=server, engine=engine, run=server.run)


@pytest.fixture(scope="module")
def tiny():
    """A server over a real tiny model in float64."""
    with running(real_llm()) as server:
        yield server


@pytest.fixture(scope="module")
def client(scripted):
    with client_of(scripted.server) as made:
        yield made


@pytest.fixture(scope="module")
def tiny_client(tiny):
    with client_of(tiny) as made:
        yield made
