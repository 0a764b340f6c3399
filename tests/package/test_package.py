"""The wheel as a user gets it: what is in it, its types, and its neighbours. Everything but the wheel comes from the
environment of these tests, by a .pth file."""

import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from wheels import fetch_wheel

from tests.tiny_checkpoint import make_model

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path | None = None) -> str:
    """stdout and stderr of a command that must succeed, without this checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(source: Path, output: Path, *targets: str) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-d", output, *targets, cwd=source)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("built")
    build(REPOSITORY, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


class Environment:
    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder)
        self.python = folder / "bin/python"
        self.packages = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (self.packages / "project.pth").write_text(sysconfig.get_path("purelib"))

    def pip(self, *words: object) -> None:
        run(self.python, "-m", "pip", *words)

    def install(self, wheel: Path) -> None:
        self.pip("install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel)

    def home(self, package: str, cwd: Path) -> Path:
        return Path(run(self.python, "-c", f"import {package}; print({package}.__file__)", cwd=cwd).strip())

    def llama(self, *words: object, cwd: Path) -> str:
        return run(self.python.with_name("llama"), *words, cwd=cwd)


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "environment")


def test_a_wheel_of_the_checkout_and_one_of_the_sdist_are_the_same(built, wheel, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.glob("llama_engine-*"))
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "docs/http.md", "tests/test_structure.py"):
        assert (source / name).is_file(), name
    build(source, tmp_path / "again", "-t", "wheel")
    with zipfile.ZipFile(wheel) as direct, zipfile.ZipFile(next((tmp_path / "again").glob("*.whl"))) as through_sdist:
        contents = [{name: archive.read(name) for name in archive.namelist()} for archive in (direct, through_sdist)]
    assert contents[0] == contents[1]
    assert {name.split("/")[0] for name in contents[0]} == {"llama", "llama_engine-0.1.0.dist-info"}
    assert {"llama/py.typed", "llama/kernels/ops.py", "llama/server/static/index.html"} <= contents[0].keys()


def test_what_an_index_shows_leads_somewhere(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("llama_engine-0.1.0.dist-info/METADATA").decode()
    assert re.findall(r"\]\((?!https:).*?\)", metadata) == []
    assert "# llama-engine" in metadata and "docs/http.md" in metadata
    assert not re.search(r"^Requires-Dist: triton[^;]*$", metadata, re.MULTILINE)


def test_a_users_type_checker_sees_the_types(environment, wheel, tmp_path):
    environment.install(wheel)
    (tmp_path / "right.py").write_text(
        "from llama import LLM, RequestOutput, SamplingParams\n"
        "def ask(llm: LLM) -> list[RequestOutput]:\n"
        "    return llm.generate('Hello', SamplingParams(temperature=0.5, max_tokens=None))\n"
    )
    (tmp_path / "wrong.py").write_text(
        "from llama import LLM, SamplingParams\n"
        "def ask(llm: LLM) -> int:\n"
        "    return llm.generate('Hello', SamplingParams(temperature=0))\n"
    )
    check = [sys.executable, "-m", "mypy", "--python-executable", environment.python, "--follow-imports=silent"]
    run(*check, "--strict", "right.py", cwd=tmp_path)
    with pytest.raises(AssertionError, match=r'got "list\[RequestOutput\]", expected "int"'):
        run(*check, "wrong.py", cwd=tmp_path)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the wheel of `kernels` is pinned for x86-64")
def test_beside_hugging_faces_kernels(environment, wheel, tmp_path, ours_first):
    model = make_model(tmp_path / "tiny")
    theirs = fetch_wheel(
        "kernels",
        "0.17.2",
        "f4be3337070e6979bb419e513d9a51ddfbfe61a707afd6aa7f3cb6a61764a46a",
        tag="cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64",
    )
    for each in (wheel, theirs) if ours_first else (theirs, wheel):
        environment.install(each)
    assert environment.home("llama", tmp_path).is_relative_to(environment.packages)
    assert environment.home("llama.kernels.ops", tmp_path).is_relative_to(environment.packages / "llama")
    assert "tokens/s" in environment.llama(
        "generate", model, "Hello", "--max-tokens", "4", "--ignore-eos", cwd=tmp_path
    )
    assert environment.home("kernels", tmp_path) == environment.packages / "kernels/__init__.py"
    environment.pip("uninstall", "--quiet", "--yes", "llama-engine")
    assert not (environment.packages / "llama").exists()
    run(environment.python, "-c", "from kernels import get_kernel, has_kernel", cwd=tmp_path)


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_metas_llama_models(environment, wheel, tmp_path, ours_first):
    theirs = fetch_wheel("llama-models", "0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f")
    for each in (wheel, theirs) if ours_first else (theirs, wheel):
        environment.install(each)
    assert environment.llama("--version", cwd=tmp_path) == "llama-engine 0.1.0\n"
    assert environment.home("llama_models", tmp_path).is_relative_to(environment.packages)
    environment.pip("uninstall", "--quiet", "--yes", "llama-engine")
    assert environment.home("llama_models.llama3.tokenizer", tmp_path).is_relative_to(environment.packages)


def test_another_package_over_ours_is_told_in_one_line(environment, wheel, tmp_path):
    environment.install(wheel)
    (environment.packages / "llama/__init__.py").write_text("")
    with pytest.raises(AssertionError) as failed:
        environment.llama("--version", cwd=tmp_path)
    said = "llama: the package `llama` is not llama-engine's: uninstall the other one, then reinstall llama-engine"
    assert str(failed.value).splitlines()[0] == said
