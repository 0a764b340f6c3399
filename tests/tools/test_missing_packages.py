"""A tool without a package that it needs: one line that names what to install."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.parametrize(
    ("tool", "package", "told"),
    [
        ("convert_gguf", "gguf", "convert_gguf: GGUF files need gguf: pip install 'llama-engine[tools]'"),
        ("fetch_demo_model", "gguf", "fetch_demo_model: GGUF files need gguf: pip install 'llama-engine[tools]'"),
        ("float16_gguf", "gguf", "float16_gguf needs gguf: pip install 'llama-engine[tools]'"),
        ("train_lora_demo", "peft", "train_lora_demo needs peft: pip install 'llama-engine[dev]'"),
        ("train_lora_demo", "transformers", "train_lora_demo needs transformers: pip install 'llama-engine[dev]'"),
    ],
)
def test_it_is_named_with_the_extra_that_brings_it(tool, package, told, tmp_path, monkeypatch):
    importlib.import_module(package)  # whole: what a module imports in vain is left half done
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "llama.convert.gguf", raising=False)
    arguments = ["--output", str(tmp_path / "out")]
    if tool == "convert_gguf":
        arguments += ["--input", str(tmp_path / "model.gguf")]
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
    assert raised.value.code == told and not any(tmp_path.iterdir())
