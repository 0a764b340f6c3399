"""Seconds per gigabyte and peak memory of loading a checkpoint, in a fresh process; packing for the CPU apart.

Without --model, a random checkpoint of two gigabytes is made and thrown away.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import close, summary
from llama import ModelConfig, Transformer

SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 128}
COUNTS = {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 40_000, "max_position_embeddings": 4096}

CHILD = """
import json, sys, time
import torch

def memory(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

torch.zeros(1)
before = memory("VmRSS")
from llama.model.transformer import Transformer
start = time.perf_counter()
model = Transformer.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
size = sum(p.numel() * p.itemsize for p in model.parameters())
peak = memory("VmHWM") - before
model.prepare()
packed = time.perf_counter()
after = {"peak": memory("VmHWM") - before, "kept": memory("VmRSS") - before}
print(json.dumps({"bytes": size, "seconds": loaded - start, "peak": peak, "pack": packed - loaded, "packed": after}))
"""


def measure(path: Path, rounds: int) -> list[dict]:
    command = [sys.executable, "-c", CHILD, str(path)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(rounds + 1)]
    return [json.loads(run.stdout) for run in runs[1:]]  # the first one warms the page cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model
        if path is None:
            path = Path(folder) / "random"
            Transformer(ModelConfig(**SIZES, **COUNTS), dtype=torch.bfloat16).save_pretrained(path)
        runs = measure(path, arguments.rounds)
    size = runs[0]["bytes"]
    results = {
        "bytes": size,
        "seconds_per_gigabyte": summary([run["seconds"] / size * 1e9 for run in runs]),
        "peak_over_weights": summary([run["peak"] / size for run in runs]),
        "packing_seconds_per_gigabyte": summary([run["pack"] / size * 1e9 for run in runs]),
        "peak_over_weights_with_packing": summary([run["packed"]["peak"] / size for run in runs]),
        "kept_over_weights_when_packed": summary([run["packed"]["kept"] / size for run in runs]),
    }
    print(f"{size / 1e9:.2f} GB of weights")
    for name, row in results.items():
        if name != "bytes":
            print(f"{name:<32} {row['median']:8.3f}   p10 {row['p10']:8.3f}   p90 {row['p90']:8.3f}")
    close("loading", dtype="bfloat16", results=results)


if __name__ == "__main__":
    main()
