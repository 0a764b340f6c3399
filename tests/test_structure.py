"""The rules of the tree: who may import whom, what runs without torch, what is never called, how long a file may be."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama.kernels import cpu

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("llama", "kernels") for path in (REPOSITORY / package).rglob("*.py"))
TREES = {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

# Modules under these run with torch absent. A folder stands for all that is in it.
WITHOUT_TORCH = (
    "llama/__init__.py",
    "llama/text/",
    "llama/api/",
    "llama/engine/sequence.py",
    "llama/engine/blocks.py",
    "llama/engine/adapters.py",
    "llama/engine/plan.py",
    "llama/engine/running.py",
    "llama/engine/step.py",
    "llama/engine/scheduler.py",
    "llama/model/config.py",
)
# What nothing but the package itself and the packages named may import: deeper layers never look up.
IMPORTERS = {
    "llama.server": {"llama.cli"},
    "llama.cli": set(),
    "llama.llm": {"llama.cli", "llama.server", "llama.async_llm"},
    "llama.async_llm": {"llama.cli", "llama.server"},
    "llama.llm.replies": {"llama.llm", "llama.async_llm", "llama.cli", "llama.server"},
    "llama.engine.engine": {"llama.llm", "llama.async_llm", "llama.cli", "llama.server"},
    "llama.engine.runner": {"llama.engine.engine"},
}
FORBIDDEN_EVERYWHERE = {"transformers", "peft", "pickle", "marshal", "tests", "tools", "benchmarks"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "os.system", "os.popen"}
ENVIRONMENT = {"TRITON_INTERPRET", "RANK", "WORLD_SIZE"}


def module_name(path: str) -> str:
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"llama.{name}" if name.startswith("kernels") else name


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, but what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if not only_for_types(child):
            yield child
            yield from run_time_nodes(child)


def imports(path: str) -> set[str]:
    """Modules that a file imports, anywhere in it; `from a import b` counts as a and as a.b."""
    found = set()
    for node in run_time_nodes(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def calls(path: str) -> Iterator[tuple[int, str, ast.Call]]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


@pytest.mark.parametrize("path", TREES)
def test_no_foreign_imports(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & FORBIDDEN_EVERYWHERE
    if path.startswith("kernels/"):
        assert roots <= set(sys.stdlib_module_names) | {"torch", "triton", "llama"}
        assert all(name.startswith("llama.kernels") for name in imports(path) if within(name, "llama"))


@pytest.mark.parametrize("path", [path for path in TREES if path.startswith("llama/")])
def test_imports_point_downwards(path):
    module = module_name(path)
    for target, importers in IMPORTERS.items():
        allowed = {target, *importers}
        if not any(within(module, name) for name in allowed):
            assert not [name for name in imports(path) if within(name, target)], f"{path} imports {target}"
    if within(module, "llama.text"):
        assert not [name for name in imports(path) if within(name, "llama.engine") or within(name, "llama.model")]
    if within(module, "llama.model"):
        assert not [name for name in imports(path) if within(name, "llama.engine") or within(name, "llama.text")]


@pytest.mark.parametrize("path", TREES)
def test_nothing_runs_what_it_reads(path):
    for line, called, call in calls(path):
        where = f"{path}:{line}: {called}"
        assert called not in NEVER_CALLED, where
        assert not any(keyword.arg in ("shell", "trust_remote_code") for keyword in call.keywords), where


@pytest.mark.parametrize("path", TREES)
def test_no_environment_variable_decides(path):
    """Each mention of the environment reads one of the names allowed: os.environ.get(NAME), os.environ[NAME]."""
    mentions, uses = [], []
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            mentions.append(node.lineno)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            uses.append(node.slice)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
            uses.append(node.args[0])
    names = {use.value for use in uses if isinstance(use, ast.Constant)}
    assert len(mentions) == len(uses), f"{path}: lines {mentions}"
    assert names <= ENVIRONMENT


def test_files_stay_small():
    others = [path for folder in ("tests", "tools", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")]
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in [*SOURCES, *others]}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_functions_stay_small():
    long = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in TREES.items()
        if path.startswith("llama/")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert long == {}


def run_python(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr


def test_runs_without_torch():
    modules = [module_name(path) for path in TREES if path.startswith(WITHOUT_TORCH)]
    assert len(modules) >= len(WITHOUT_TORCH)
    run_python(
        "import importlib, sys\n"
        "for name in ('torch', 'triton', 'transformers'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )


def test_importing_llama_is_light():
    run_python("import sys, llama; assert not {'torch', 'triton', 'tokenizers', 'jinja2'} & sys.modules.keys()")


def test_importing_kernels_leaves_triton_alone():
    run_python(
        "import sys, torch; before = 'triton' in sys.modules; import llama.kernels.ops; "
        "assert ('triton' in sys.modules) == before"
    )


def test_every_op_has_a_twin_of_the_same_signature():
    from llama.kernels import ops

    names = [name for name, value in vars(ops).items() if inspect.isfunction(value) and not name.startswith("_")]
    assert "rms_norm" in names
    for name in names:
        assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(cpu, name)), name


def test_transformers_model_imports_beside_our_kernels():
    """A package of the hub is called `kernels` too, and transformers asks for its version: it must not take ours."""
    from llama import Transformer
    from llama.kernels import ops

    transformers = importlib.import_module("transformers.models.llama.modeling_llama")
    assert Path(ops.__file__).is_relative_to(REPOSITORY)
    assert transformers.LlamaForCausalLM is not Transformer
    version = tuple(map(int, importlib.metadata.version("llama-engine").split(".")))
    assert not (0, 18) <= version < (0, 19)  # the versions that transformers 5.23 would use
