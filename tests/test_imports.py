"""What is imported from our own modules exists: also in the files that only a GPU, Ray or another environment runs."""

import ast
from collections.abc import Iterator

from tests.test_structure import REPOSITORY, module_name

TOPS = ("llama", "kernels", "tests", "benchmarks", "tools")
PATHS = [path for top in TOPS for path in (REPOSITORY / top).rglob("*.py")]
TREES = {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}
MODULES = {module_name(path.removeprefix("tools/")): path for path in TREES}
PACKAGES = {name.rpartition(".")[0] for name in MODULES}


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


DEFINED = {module: set(names_of(TREES[path])) for module, path in MODULES.items()}


def missing(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in PACKAGES:
            known = DEFINED.get(node.module, set())
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in known]
    return [name for name in found if name not in MODULES and name not in PACKAGES]


def test_a_name_that_is_not_there_is_found():
    source = "from tests.test_imports import missing, gone\nfrom llama.kernels import ops, lost\nimport llama.nowhere"
    assert missing(ast.parse(source)) == ["tests.test_imports.gone", "llama.kernels.lost", "llama.nowhere"]


def test_what_is_imported_exists():
    assert not {path: lost for path, tree in TREES.items() if (lost := missing(tree))}
