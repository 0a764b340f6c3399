"""What is built and installed: every module once, the kernels under `llama` alone, from a wheel and from an sdist."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = {
    path.relative_to(REPOSITORY).as_posix()
    for package in ("llama", "kernels")
    for path in (REPOSITORY / package).rglob("*.py")
}
WANTED = {f"llama/{name}" if name.startswith("kernels/") else name for name in SOURCES}

GENERATE = """
import sys
from pathlib import Path

import llama.kernels.ops
from llama import LLM, ModelConfig, SamplingParams, Transformer

model = Transformer(ModelConfig.preset("tiny"))
(output,) = LLM(model, num_blocks=8).generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))
assert len(output.outputs[0].token_ids) == 2
files = [str(Path(module.__file__).resolve()) for name, module in list(sys.modules.items())
         if name.split(".")[0] in ("llama", "kernels") and getattr(module, "__file__", None)]
assert len(files) == len(set(files)) > 50, "a module is there twice"
assert all(Path(file).is_relative_to(sys.argv[1]) for file in files), files
"""


def run(*command: str | Path, cwd: Path = REPOSITORY, path: Path = REPOSITORY) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


def build(kind: str, project: Path, target: Path) -> Path:
    done = run("-m", "hatchling", "build", "-t", kind, "-d", target, cwd=project, path=project)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Folders that hold what a wheel installs, built directly and out of the sdist."""
    folder = tmp_path_factory.mktemp("built")
    sdist = build("sdist", REPOSITORY, folder / "archive")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    wheels = {"wheel": build("wheel", REPOSITORY, folder / "direct"), "sdist": build("wheel", source, folder / "again")}
    for name, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / name)
    return {name: folder / name for name in wheels}


@pytest.mark.parametrize("origin", ["wheel", "sdist"])
def test_a_wheel_holds_every_module_once(unpacked, origin):
    modules = {path.relative_to(unpacked[origin]).as_posix() for path in unpacked[origin].rglob("*.py")}
    assert modules == WANTED
    assert {path.name for path in unpacked[origin].iterdir() if path.suffix != ".dist-info"} == {"llama"}


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["wheel", "sdist"])
def test_what_is_installed_generates(unpacked, origin, tmp_path):
    done = run("-c", GENERATE, unpacked[origin], cwd=tmp_path, path=unpacked[origin])
    assert done.returncode == 0, done.stderr


def test_a_checkout_has_the_kernels_under_one_name(tmp_path):
    """Other packages look for `kernels`, Hugging Face's, and may find our folder: that does no harm. A second set of
    compiled kernels would."""
    script = """
import importlib
import kernels
assert kernels.__file__ is None
for name in ("kernels.ops", "kernels.cpu.norm", "kernels.gpu.norm"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "llama.kernels" in str(error), error
    else:
        raise AssertionError(name)
"""
    done = run("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["checkout", "wheel"])
def test_transformers_runs_beside_it(unpacked, origin, tmp_path):
    """It asks whether a package `kernels` is installed, and in which version."""
    script = """
import torch
import llama.kernels.ops
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = LlamaForCausalLM(LlamaConfig(**sizes))
assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 32)
"""
    done = run("-c", script, cwd=tmp_path, path=REPOSITORY if origin == "checkout" else unpacked[origin])
    assert done.returncode == 0, done.stderr
