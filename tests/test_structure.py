"""The rules of the tree: who may import whom, what runs without torch, what is never called, how long things may be."""

import ast
import functools
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("llama", "kernels") for path in (REPOSITORY / package).rglob("*.py"))
PATHS = [path.relative_to(REPOSITORY).as_posix() for path in SOURCES]

# The import order of a package's parts, lowest first: each may import what stands on the lines above it. Parts that
# share a line do not import each other.
IMPORT_ORDER = {
    "llama": """
        api
        child_process files patterns
        hub
        kernels
        text model
        engine
        llm
        async_llm
        server ray_cluster
        batch convert serve_ray
        cli""",
    "llama.model": """
        autocast rope_scaling
        config generation_config module
        parallel
        communicator
        rope kv_cache weights
        adapters
        linear interventions
        checkpoint digest packing
        taps kept
        batch capture
        session
        research
        transformer
        fixed_rows fused
        lora""",
    "llama.engine": """
        speculative_config ngrams
        config adapters blocks device graphs metrics
        request budget
        sequence token_rules
        plan
        wire sampler
        memory verification logit_changes
        runner mixed_steps
        graph_runner tap_messages
        parallel_runner
        running
        draft_model guidance
        step
        speculation
        scheduler
        engine""",
}
# Modules under these run with torch absent. A folder stands for all that is in it.
WITHOUT_TORCH = (
    "llama/__init__.py",
    "llama/api/",
    "llama/child_process.py",
    "llama/files.py",
    "llama/hub.py",
    "llama/patterns.py",
    "llama/text/",
    "llama/model/config.py",
    "llama/model/parallel.py",
    "llama/model/rope_scaling.py",
    "llama/engine/config.py",
    "llama/engine/budget.py",
    "llama/engine/speculative_config.py",
    "llama/engine/ngrams.py",
    "llama/engine/speculation.py",
    "llama/engine/request.py",
    "llama/engine/sequence.py",
    "llama/engine/token_rules.py",
    "llama/engine/blocks.py",
    "llama/engine/plan.py",
    "llama/engine/wire.py",
    "llama/engine/adapters.py",
    "llama/engine/running.py",
    "llama/engine/guidance.py",
    "llama/engine/step.py",
    "llama/engine/scheduler.py",
)
MOST_LINES = {"file": 400, "function": 60}
MOST_POSITIONAL = 6
FORBIDDEN_EVERYWHERE = {"transformers", "peft", "pickle", "marshal", "tests", "tools", "benchmarks"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "os.system", "os.popen"}
ENVIRONMENT = {"TRITON_INTERPRET", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}


def module_name(path: str) -> str:
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"llama.{name}" if name.startswith("kernels") else name


MODULES = {module_name(path): path for path in PATHS}


@functools.cache
def tree_of(path: str) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))


@pytest.fixture(autouse=True, scope="module")
def trees_are_dropped() -> Iterator[None]:
    """They are millions of objects, at which the collector would look in every other test."""
    yield
    tree_of.cache_clear()
    all_calls.cache_clear()


def imports(path: str) -> set[str]:
    """Modules that a file imports, anywhere in it and for its types too; `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def import_graph() -> dict[str, set[str]]:
    """Module -> the package's own modules whose code must run before its own does.

    That includes the __init__ of each package that is entered on the way, but not of those that a module is in, unless
    it takes a name from there. `llama` is left out: it imports its public names on first use.
    """
    graph: dict[str, set[str]] = {module: set() for module in MODULES if module != "llama"}
    for module, edges in graph.items():
        for node in ast.walk(tree_of(MODULES[module])):
            if isinstance(node, ast.Import):
                targets = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                targets = {f"{node.module}.{alias.name}" for alias in node.names}
                if not targets <= MODULES.keys():
                    edges.update({node.module} & graph.keys())
            else:
                continue
            names = (target.split(".") for target in targets)
            entered = {".".join(name[:i]) for name in names for i in range(1, len(name) + 1)} & graph.keys()
            edges.update(name for name in entered if not is_within(module, name))
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules of which each imports each, directly or through others."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reached = {module: reachable(module) for module in graph}
    found: list[set[str]] = []
    for module in sorted(graph):
        circle = {other for other in reached[module] if module in reached[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


@functools.cache
def all_calls() -> list[tuple[str, int, str, ast.Call]]:
    calls = [(path, node) for path in PATHS for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    return [(path, call.lineno, ast.unparse(call.func), call) for path, call in calls]


def test_no_foreign_imports():
    for path in PATHS:
        found = imports(path)
        roots = {name.split(".")[0] for name in found}
        assert not roots & FORBIDDEN_EVERYWHERE, path
        if path.startswith("kernels/"):
            assert roots <= set(sys.stdlib_module_names) | {"torch", "triton", "llama"}, path
            assert all(name.startswith("llama.kernels") for name in found if is_within(name, "llama")), path


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"d"}, "e": {"a"}}
    assert circles(graph) == [{"b", "c"}, {"d"}]


def test_no_import_circle():
    assert circles(import_graph()) == []


@pytest.mark.parametrize("package", IMPORT_ORDER)
def test_every_module_has_its_place_in_the_import_order(package):
    named = IMPORT_ORDER[package].split()
    parts = {module.removeprefix(f"{package}.").split(".")[0] for module in MODULES if module.startswith(f"{package}.")}
    assert len(set(named)) == len(named)
    assert parts == set(named)


def test_imports_point_downwards():
    upwards, graph = set(), import_graph()
    for package, lines in IMPORT_ORDER.items():
        floors = {part: i for i, line in enumerate(lines.strip().splitlines()) for part in line.split()}
        for module, targets in graph.items():
            for target in targets:
                if module.startswith(f"{package}.") and target.startswith(f"{package}."):
                    part, other = (name.removeprefix(f"{package}.").split(".")[0] for name in (module, target))
                    if part != other and floors[part] <= floors[other]:
                        upwards.add((module, target))
    assert upwards == set()


def test_nothing_runs_what_it_reads():
    for path, line, called, call in all_calls():
        where = f"{path}:{line}: {called}"
        if (path, called) == ("llama/convert/meta.py", "torch.load"):  # Meta's files are pickles, read once as tensors
            assert "weights_only=True" in ast.unparse(call), where
        else:
            assert called not in NEVER_CALLED, where
        assert not any(keyword.arg in ("shell", "trust_remote_code") for keyword in call.keywords), where


def test_what_makes_a_tensor_says_where():
    """Else torch.set_default_device, which is for the caller's own code, would say it."""
    makers = {f"torch.{function.__name__}" for function in _device_constructors()}
    for path, line, called, call in all_calls():
        told = {keyword.arg for keyword in call.keywords}  # None for **options
        assert called not in makers or told & {"device", None}, f"{path}:{line}: {ast.unparse(call)}"


def test_no_environment_variable_decides():
    """Each mention of the environment reads one of the names allowed: os.environ.get(NAME), os.environ[NAME]."""
    for path in PATHS:
        mentions, uses = [], []
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
                mentions.append(node.lineno)
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                uses.append(node.slice)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
                uses.append(node.args[0])
        names = {use.value for use in uses if isinstance(use, ast.Constant)}
        assert len(mentions) == len(uses), f"{path}: lines {mentions}"
        assert names <= ENVIRONMENT, path


def functions(path: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """-> where, the function, and whether it is a method. Kernels are left out: a device dictates their shape."""
    methods = {function for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef) for function in node.body}
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list):
            yield f"{path}:{node.name}", node, node in methods


def test_files_stay_small():
    others = [path for folder in ("tests", "tools", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")]
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in [*SOURCES, *others]}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES["file"]} == {}


def test_functions_stay_small():
    lengths = {
        where: function.end_lineno - function.lineno + 1 for path in PATHS for where, function, _ in functions(path)
    }
    assert {where: length for where, length in lengths.items() if length > MOST_LINES["function"]} == {}


def test_few_parameters_go_by_position():
    wide = set()
    for path in PATHS:
        for where, function, is_method in functions(path):
            names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
            if len(names) - (is_method and names[:1] in (["self"], ["cls"])) > MOST_POSITIONAL:
                wide.add(where)
    assert wide == set()


def run_python(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr


def test_runs_without_torch():
    modules = [module_name(path) for path in PATHS if path.startswith(WITHOUT_TORCH)]
    assert len(modules) >= len(WITHOUT_TORCH)
    run_python(
        "import importlib, sys\n"
        "for name in ('torch', 'triton', 'transformers'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )


def test_importing_llama_is_light():
    run_python("import sys, llama; assert not {'torch', 'triton', 'tokenizers', 'jinja2'} & sys.modules.keys()")


def test_a_process_that_generates_is_light():
    """A model of one's own and token ids need neither files of a checkpoint nor text, no thread and no process."""
    run_python(
        "import multiprocessing, sys, threading, torch\n"
        "before = 'triton' in sys.modules\n"
        "from llama import LLM, ModelConfig, SamplingParams, Transformer\n"
        "llm = LLM(Transformer(ModelConfig.preset('tiny')), num_blocks=4)\n"
        "llm.generate([[1, 2]], SamplingParams(max_tokens=2), use_tqdm=False)\n"
        "heavy = {'transformers', 'jinja2', 'llguidance', 'safetensors', 'pydantic', 'starlette', 'llama.server'}\n"
        "assert not {*heavy, 'llama.async_llm', 'llama.batch'} & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "assert threading.active_count() == 1 and not multiprocessing.active_children()\n"
        "assert ('triton' in sys.modules) == before"
    )


def test_every_op_exists_on_cpu_and_gpu_in_the_same_file_under_the_same_signature():
    from llama.kernels import ops

    functions = [name for name, value in vars(ops).items() if inspect.isfunction(value) and not name.startswith("_")]
    names = [name for name in functions if name not in ("on_triton", "on_device")]  # which say where an op goes
    assert "rms_norm" in names
    places = {}
    for backend in ("cpu", "gpu"):
        folder = importlib.import_module(f"llama.kernels.{backend}").__path__
        for file in (info.name for info in pkgutil.iter_modules(folder)):
            module = importlib.import_module(f"llama.kernels.{backend}.{file}")
            for name in names:
                if hasattr(module, name):
                    assert inspect.signature(getattr(module, name)) == inspect.signature(getattr(ops, name)), name
                    places.setdefault(name, {})[backend] = file
    for name in names:
        assert places[name]["cpu"] == places[name]["gpu"], name


def test_transformers_model_imports_beside_our_kernels():
    """A package of the hub is called `kernels` too, and transformers asks for its version: it must not take ours."""
    from llama import Transformer
    from llama.kernels import ops

    transformers = importlib.import_module("transformers.models.llama.modeling_llama")
    assert Path(ops.__file__).is_relative_to(REPOSITORY)
    assert transformers.LlamaForCausalLM is not Transformer
    version = tuple(map(int, importlib.metadata.version("llama-engine").split(".")))
    assert not (0, 18) <= version < (0, 19)  # the versions that transformers 5.23 would use
