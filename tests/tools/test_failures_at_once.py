"""Of a run on a GPU that is cut off, what failed before is known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = """
import os, signal, pytest
pytestmark = pytest.mark.gpu

def test_that_fails():
    assert False, "seen too late"

def test_that_is_cut_off():
    os.kill(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("processes", [[], ["-n", "1"]], ids=["one process", "xdist"])
def test_failures_are_told_at_once(processes, tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_configure\n")
    (tmp_path / "test_cut_off.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu and not alone", "-q", *processes],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == -9
    assert "test_cut_off.py::test_that_fails\n" in ran.stdout and "seen too late" in ran.stdout
