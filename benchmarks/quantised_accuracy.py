"""What rounding costs: perplexity and KL divergence over a text, against the dense model in float32.

python -m benchmarks.quantised_accuracy --model checkpoints/smollm2-135m-instruct --windows 12

Windows of 512 tokens, evenly spread over tests/golden/python_reference.txt (Python's help texts, PSF licence). float32
models are weight-only; the bfloat16 ones compute as an engine on a CPU does in the balanced layout, int8 with x in two
parts of 7 bits for up to 64 tokens, which is why their windows are computed in pieces of 64.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llama.model.batch import rectangle
from llama.model.kv_cache import KVCache
from llama.model.transformer import Transformer
from llama.text.tokenizer import Tokenizer

TEXT = Path(__file__).parents[1] / "tests" / "golden" / "python_reference.txt"
WINDOW, PIECE, BLOCK = 512, 64, 16


def whole(model: Transformer) -> Callable[[Tensor], Tensor]:
    return lambda ids: model.logits(ids[None])[0]


def in_pieces(model: Transformer, kv_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The window as an engine's chunks, over a KV cache of that dtype (uint8 = e4m3)."""

    def compute(ids: Tensor) -> Tensor:
        kv = KVCache(model.config, len(ids) // BLOCK, BLOCK, dtype=kv_dtype, device="cpu")
        parts = [
            model(rectangle(ids[None, start : start + PIECE], start, len(ids) // BLOCK, BLOCK), kv)
            for start in range(0, len(ids), PIECE)
        ]
        return torch.cat(parts).float()

    return compute


def variants(path: Path, kept: Path | None) -> dict[str, Callable[[Tensor], Tensor]]:
    def loaded(dtype: str, scheme: str | None = None, folder: Path = path) -> Transformer:
        model = Transformer.from_pretrained(folder, dtype=dtype, quantization=scheme)
        model.prepare("balanced")
        return model

    dense = loaded("float32")
    if kept is not None:
        return {
            "float32": whole(dense),
            "bfloat16": in_pieces(loaded("bfloat16"), torch.bfloat16),
            "kept, float32": whole(loaded("float32", folder=kept)),
            "kept, bfloat16": in_pieces(loaded("bfloat16", folder=kept), torch.bfloat16),
        }
    return {
        "float32": whole(dense),
        "bfloat16": in_pieces(loaded("bfloat16"), torch.bfloat16),
        "int8, float32": whole(loaded("float32", "int8")),
        "int8, bfloat16": in_pieces(loaded("bfloat16", "int8"), torch.bfloat16),
        "fp8, float32": whole(loaded("float32", "fp8")),
        "int4, float32": whole(loaded("float32", "int4")),
        "KV cache fp8, float32": in_pieces(dense, torch.uint8),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    told = "a folder of the same model whose codes `llama convert --keep-quantised` kept: compare it alone"
    parser.add_argument("--kept", type=Path, help=told)
    arguments = parser.parse_args()
    ids = torch.tensor(Tokenizer.from_pretrained(arguments.model).encode(TEXT.read_text(encoding="ascii")))
    starts = torch.linspace(0, len(ids) - WINDOW, arguments.windows).long().tolist()
    models = variants(arguments.model, arguments.kept)
    nll, divergence = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    for done, start in enumerate(starts, 1):
        window = ids[start : start + WINDOW]
        expected = models["float32"](window).log_softmax(-1)
        for name, compute in models.items():
            found = compute(window).log_softmax(-1)
            nll[name] -= found[:-1].gather(1, window[1:, None]).mean().item()
            divergence[name] += (expected.exp() * (expected - found)).sum(-1).mean().item()
        print(f"after {done} of {len(starts)} windows of {len(ids)} tokens")
        best = torch.tensor(nll["float32"] / done).exp().item()
        for name in models:
            perplexity = torch.tensor(nll[name] / done).exp().item()
            told = f"ppl {perplexity:.3f} (x {perplexity / best:.4f}), KLD {divergence[name] / done:.5f}"
            print(f"  {name:24}{told}", flush=True)


if __name__ == "__main__":
    main()
