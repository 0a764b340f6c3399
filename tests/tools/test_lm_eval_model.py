"""The harness's tool where lm-evaluation-harness is not installed; tests/lm_eval has the rest."""

import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "lm_eval_model.py"
MESSAGE = "lm_eval_model needs lm_eval: pip install 'llama-engine[lm-eval]'"


@pytest.mark.parametrize(("name", "error"), [("__main__", SystemExit), ("lm_eval_model", ModuleNotFoundError)])
def test_without_the_harness_it_says_what_to_install(name, error, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(error) as raised:
        runpy.run_path(str(TOOL), run_name=name)
    assert raised.value.args == (MESSAGE,)
