from types import SimpleNamespace

import pytest

from tests.browser.browser import CHROMIUM, DRIVER, chromium
from tests.server.helpers import running, scripted_llm


def pytest_collection_modifyitems(items):
    for item in items:
        if "browser" in item.path.parts:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.fail("chromium and chromedriver are missing: run make test-browser", pytrace=False)
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="session")
def site():
    """A server whose engine says what the user says."""
    llm, engine = scripted_llm()
    with running(llm, api_keys=("secret",)) as server:
        yield SimpleNamespace(url=server.url, engine=engine, llm=llm)
