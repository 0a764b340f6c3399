"""The harness's tool where lm-evaluation-harness is not installed; tests/lm_eval has the rest."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "lm_eval_model.py"
MESSAGE = "lm_eval_model needs lm_eval: pip install 'llama-engine[lm-eval]'"


@pytest.mark.parametrize("name", ["__main__", "lm_eval_model"])
def test_without_the_harness_it_says_what_to_install(name):
    script = f"import sys, runpy; sys.modules['lm_eval'] = None; runpy.run_path({str(TOOL)!r}, run_name={name!r})"
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    if name == "__main__":
        assert done.stderr == f"{last}\n" and last == MESSAGE
    else:
        assert last == f"ModuleNotFoundError: {MESSAGE}"
