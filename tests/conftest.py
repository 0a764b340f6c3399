"""What all tests share: few threads, no network, and the fixtures of real files that `make demo-model` fetches."""

import gc
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.failures_at_once import pytest_configure  # noqa: F401 (a hook)
from tests.settled import forget_settled

REPOSITORY = Path(__file__).resolve().parent.parent

# The hub is never asked: every file that a test reads is made by the test or fetched by `make demo-model`.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two OpenMP threads on a busy machine of two cores spin against each other; tiny tensors gain nothing from them.
torch.set_num_threads(1)

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a machine that runs the GPU tests alone has torch, Triton and pytest
    pass
else:
    # A busy machine is no failure. What every commit must pass draws the same examples each time; make test-slow new
    # ones.
    settings.register_profile("new-examples", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("same-examples", settings.get_profile("new-examples"), derandomize=True)
    settings.load_profile("same-examples")

# Triton reads this when it is imported, so a process is interpreted or it is not (make test-kernels).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
# Ray is in a venv of its own (make test-ray).
if importlib.util.find_spec("ray") is None:
    collect_ignore.append("ray")
# So is lm-evaluation-harness (make test-lm-eval).
if importlib.util.find_spec("lm_eval") is None:
    collect_ignore.append("lm_eval")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Asked for the GPU's tests, look nowhere else: their machine need not have what other tests import."""
    is_elsewhere = collection_path.relative_to(Path(__file__).parent).parts[:1] not in ((), ("gpu",))
    return True if is_elsewhere and config.option.markexpr.split(" ")[0] == "gpu" else None


def pytest_collection_finish() -> None:
    """What was imported is there to the end: the collector need not look at it in each of a run's collections."""
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_settled() -> None:
    forget_settled()


@pytest.fixture(autouse=True)
def levels_of_logs_stay() -> Iterator[None]:
    """`llama serve` sets them for a process of its own, also where a test calls it in this one."""
    loggers = [logging.getLogger(name) for name in ("llama", "llama.access")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def _fetched(relative: str) -> Path:
    path = REPOSITORY / relative
    if not path.is_dir():
        pytest.fail(f"{relative} is missing: run make demo-model", pytrace=False)
    return path


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """SmolLM2-135M-Instruct in bf16, Hugging Face layout."""
    return _fetched("checkpoints/smollm2-135m-instruct")


@pytest.fixture(scope="session")
def meta_tokenizer_path() -> Path:
    """Folder with the package `llama_models`: Meta's Tokenizer class and its tokenizer.model."""
    return _fetched(".cache/meta-llama3-tokenizer")


@pytest.fixture(scope="session")
def meta_tokenizer(meta_tokenizer_path):
    """Meta's own Tokenizer, the oracle for everything that converts or encodes Llama 3 text."""
    sys.path.insert(0, str(meta_tokenizer_path))
    try:
        from llama_models.llama3.tokenizer import Tokenizer
    finally:
        sys.path.remove(str(meta_tokenizer_path))
    return Tokenizer(meta_tokenizer_path / "llama_models" / "llama3" / "tokenizer.model")
