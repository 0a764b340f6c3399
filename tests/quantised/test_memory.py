"""Memory of loading quantised models, as Linux counts it for a process of its own."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from llama.convert.quantise import quantise
from llama.model.checkpoint.save import new_folder, write_checkpoint
from llama.model.transformer import Transformer
from llama.model.weights.quantised import SCHEMES
from tests.model.models import tiny_config, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the kernel's account of memory"),
]

MEASURE = """
import ctypes, sys
from llama.model.transformer import Transformer
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
def load(folder):
    return Transformer.from_pretrained(folder, quantization=scheme or None)
small, folder, scheme, layout = sys.argv[1:]
load(small).prepare(layout)  # the libraries' own pages
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak is what is there now
before = status("VmRSS")
model = load(folder)
loaded = status("VmHWM") - before
model.prepare(layout)
peak = status("VmHWM") - before
ctypes.CDLL(None).malloc_trim(0)
print(loaded, peak, status("VmRSS") - before)
"""
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 4000}
LAYER = 2 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4096)  # bytes in bfloat16
# Layers of Llama 3.2 1B, as many as make 2 GB with a head of its own.
LARGE_SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 16_000}
LARGE_LAYER = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """380 MB, an untied head; and a small one of the same kind beside it."""
    config = tiny_config(num_attention_heads=8, num_key_value_heads=2, head_dim=128, **SIZES)
    folder = tmp_path_factory.mktemp("memory") / "dense"
    Transformer(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_model(dtype=torch.bfloat16).save_pretrained(folder.parent / "small-dense")
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """2 GB, written tensor by tensor into shards of half a gigabyte."""
    config = tiny_config(num_attention_heads=32, num_key_value_heads=8, head_dim=64, **LARGE_SIZES)
    generator = torch.Generator().manual_seed(0)

    def drawn(entry):
        return torch.randn(entry.shape, generator=generator).mul_(0.02).bfloat16()

    target = tmp_path_factory.mktemp("memory") / "large"
    with new_folder(target) as folder:
        write_checkpoint(folder, config, torch.bfloat16, drawn, 500_000_000)
    tiny_model(dtype=torch.bfloat16).save_pretrained(target.parent / "small-large")
    yield target
    shutil.rmtree(target)


def measure(folder, scheme="", layout="balanced"):
    """-> bytes (of the folder's weights, at most while loading, at most until prepared, in the end)"""
    words = [sys.executable, "-c", MEASURE, folder.parent / f"small-{folder.name}", folder, scheme, layout]
    # Two threads read; what glibc keeps for each of them, between 0 and 10 MB, is not what is measured here.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(words, capture_output=True, text=True, check=True, timeout=500, env=environment)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return size, *map(int, run.stdout.split())


@pytest.mark.parametrize(("layout", "bound"), [("compact", 0.45), ("balanced", 0.95)])
def test_a_dense_checkpoint_rounded_to_int4(large, layout, bound):
    size, _, peak, held = measure(large, "int4", layout)
    assert size > 2e9 and len(list(large.glob("*.safetensors"))) > 3
    assert held <= bound * size
    assert peak <= held + 2 * LARGE_LAYER  # two modules lie dense, one on each thread, and what rounds them


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_folders(dense, scheme):
    """Modules lie dense in part while they are read, one on each of two threads: that adds a constant."""
    folder = dense.parent / scheme
    quantise(dense, folder, scheme)
    quantise(dense.parent / "small-dense", dense.parent / f"small-{scheme}", scheme)
    size, loaded, _, held = measure(folder, layout="compact")
    assert held <= 1.05 * size
    assert loaded <= 1.05 * size + 2 * LAYER
    if scheme == "fp8":  # float16 codes in their place
        size, _, peak, held = measure(folder)
        assert held <= 2.1 * size
        assert peak <= 2.1 * size + 2 * LAYER
