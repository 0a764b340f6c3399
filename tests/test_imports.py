"""What is imported from our own modules exists: also in the files that only a GPU, Ray or another environment runs.
And a process imports nothing that makes every start slower."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_structure import REPOSITORY, module_name
from tests.tiny_checkpoint import make_adapter, make_model

TOPS = ("llama", "kernels", "tests", "benchmarks", "tools")
PATHS = [path for top in TOPS for path in (REPOSITORY / top).rglob("*.py")]
MODULES = {module_name(path.relative_to(REPOSITORY).as_posix().removeprefix("tools/")): path for path in PATHS}
PACKAGES = {name.rpartition(".")[0] for name in MODULES}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True, scope="module")
def trees_are_dropped() -> Iterator[None]:
    yield
    tree_of.cache_clear()


def names_of(tree: ast.Module) -> Iterator[str]:
    """What a module defines or imports, outside of functions and classes."""
    waiting: list[ast.AST] = [*tree.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        else:
            waiting += ast.iter_child_nodes(node)


@functools.cache
def defined(module: str) -> set[str]:
    return set(names_of(tree_of(MODULES[module]))) if module in MODULES else set()


def missing(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
            known = defined(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in known]
    return [name for name in found if name not in MODULES and name not in PACKAGES]


def test_a_name_that_is_not_there_is_found():
    source = "from tests.test_imports import missing, gone\nfrom llama.kernels import ops, lost\nimport llama.nowhere"
    assert missing(ast.parse(source)) == ["tests.test_imports.gone", "llama.kernels.lost", "llama.nowhere"]


def test_what_is_imported_exists():
    assert not {path: lost for path in PATHS if (lost := missing(tree_of(path)))}


LOADING = """
import sys
from llama import LLM, SamplingParams
model, adapter = sys.argv[1:]
for given in (
    {"deterministic": True},
    {"quantization": "int8", "speculative_config": {"method": "draft_model", "model": model}},
    {"quantization": "int4", "dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    {"quantization": "fp8", "tensor_parallel_size": 2},
):
    llm = LLM(model, num_blocks=16, **given)
    if "deterministic" in given:
        llm.load_lora("tuned", adapter)
    llm.generate(["hi", "ho"], SamplingParams(max_tokens=2, seed=1, top_p=0.9), use_tqdm=False)
    found = {"sympy", "torch._dynamo", "torch._inductor"} & sys.modules.keys()
    assert not found, (given, found)
"""


def test_whoever_loads_a_model_does_not_wait_for_torchs_compiler(tmp_path):
    """Its import takes as long as torch's own, and arithmetic on meta tensors is enough to cause it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    folders = [make_model(tmp_path / "model"), make_adapter(adapter)]
    done = subprocess.run(
        [sys.executable, "-c", LOADING, *folders], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
