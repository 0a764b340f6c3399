"""What deterministic=True costs: an engine with the mode and one without, in turn, step by step: decodes of several
batch sizes over contexts of unequal length, and prompts. Ratios are medians over pairs of steps side by side.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.common import close, in_turn, ratio
from llama import LLM, SamplingParams


def decodes(llm: LLM, batch: int, context: int) -> Callable[[], object]:
    """One step of `batch` sequences, half as long as `context` to as long."""
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)
    for i in range(batch):
        length = context - (i * context // 2) // batch
        prompt = torch.randint(0, llm.engine.vocab_size, (length,), generator=generator).tolist()
        llm.engine.add(llm.engine.request(f"{i}", prompt, params))
    while llm.engine.scheduler.waiting or llm.engine.scheduler.running.prefilling:
        llm.engine.step()
    return llm.engine.step


def prompt_of(llm: LLM, length: int) -> Callable[[], object]:
    ids = torch.randint(0, llm.engine.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    return lambda: llm.generate(ids, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--quantization", choices=["int8", "int4", "fp8"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--pairs", type=int, default=30, help="of steps; a fifth as many of prompts")
    given = parser.parse_args()

    results: dict[str, float] = {}
    for dtype in given.dtypes:
        options = {"device": given.device, "dtype": dtype, "quantization": given.quantization, "max_model_len": 4096}
        fixed, plain = (
            LLM(given.model, deterministic=mode, enable_prefix_caching=False, num_blocks=2000, **options)
            for mode in (True, False)
        )
        cases = {f"decode {batch}": (decodes, (batch, given.context), given.pairs) for batch in given.batches}
        cases |= {f"prompt {length}": (prompt_of, (length,), max(3, given.pairs // 5)) for length in given.prompts}
        for name, (make, arguments, pairs) in cases.items():
            ours, theirs = in_turn(make(fixed, *arguments), make(plain, *arguments), pairs)
            results[f"{dtype} {name}"] = 1 / ratio(theirs, ours)
            milliseconds = " / ".join(f"{1000 * min(times):.1f}" for times in (ours, theirs))
            print(f"{dtype:9} {name:12} {results[f'{dtype} {name}']:.2f} x   (best {milliseconds} ms)", flush=True)
            for llm in (fixed, plain):
                for i in range(max(given.batches)):
                    llm.engine.abort(f"{i}")
    close("deterministic", results=results, context=given.context, quantization=given.quantization)


if __name__ == "__main__":
    main()
