"""A tool without a package that it needs: one line that names what to install."""

import subprocess
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
def test_it_is_named_with_the_extra_that_brings_it(tool, package, told, tmp_path):
    script = (
        f"import sys, runpy; sys.modules[{package!r}] = None; sys.path.insert(0, {str(TOOLS)!r});"
        f"runpy.run_path({str(TOOLS / tool)!r} + '.py', run_name='__main__')"
    )
    arguments = ["--output", tmp_path / "out"]
    if tool == "convert_gguf":
        arguments += ["--input", tmp_path / "model.gguf"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == f"{told}\n" and not any(tmp_path.iterdir())
