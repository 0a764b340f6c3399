"""Of a run on a GPU that is cut off, what failed before is known."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = """
import time, pytest
pytestmark = pytest.mark.gpu

def test_that_fails():
    assert False, "seen too late"

def test_that_takes_long():
    time.sleep(90)  # it is killed as soon as the failure is told
"""


@pytest.mark.parametrize("processes", [[], ["-p", "xdist", "-n", "1"]], ids=["one process", "xdist"])
def test_failures_are_told_at_once(processes, tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.failures_at_once import pytest_configure\n")
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "test_cut_off.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}  # this run's
    how = "-q --continue-on-collection-errors -m".split()
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "pytest", *how, "gpu and not alone", *processes],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(REPOSITORY), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # they take seconds
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    seen: list[str] = []
    try:
        assert child.stdout is not None
        for line in child.stdout:
            seen.append(line)
            if "seen too late" in line:
                break
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert "test_cut_off.py::test_that_fails\n" in seen and "seen too late" in seen[-1]
    assert any("No module named 'no_such_module'" in line for line in seen)
    assert not any("FAILURES" in line for line in seen)  # which pytest tells at the end
