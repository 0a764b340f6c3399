"""Speculative decoding from n-grams against none: tokens per second, drafts that were right, whether tokens agree.

Two texts that repeat what the prompt holds (a passage of 400 tokens that is quoted, code that is edited) and one that
does not, alone and eight at once. With and without drafts in turn on the same weights in one run, and without against
without, which says what the machine's noise is. `--peer` lets transformers do the same on the same prompts, with its
prompt look-up and without.
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import REPOSITORY, close, ratio, summary
from llama import LLM, SamplingParams, Transformer
from llama.text.tokenizer import Tokenizer

NEW = {"quote": 200, "edit": 150, "free": 150}
MAX_MODEL_LEN = 2048
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 4}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def tasks(tokenizer: Tokenizer) -> dict[str, tuple[list[int], SamplingParams]]:
    """Prompts in tokens. A model of 135 million parameters copies what it has begun to copy."""
    passage = tokenizer.encode((REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8"))[200:600]
    code = (REPOSITORY / "llama/engine/blocks.py").read_text(encoding="utf-8")
    function = tokenizer.encode(code[code.index("    def allocate") : code.index("    def _child")])[:300]
    renamed = re.sub("blocks", "pages", code[code.index("    def allocate") : code.index("    def share")])
    free = "Once upon a time, in a village that no map shows, an old clockmaker found a letter under his door. It said"
    return {
        "quote": (passage + passage[:20], SamplingParams(**GREEDY, max_tokens=NEW["quote"])),
        "edit": (function + tokenizer.encode(f"\n\n{renamed[:200]}"), SamplingParams(**GREEDY, max_tokens=NEW["edit"])),
        "free": (tokenizer.encode(free), SamplingParams(temperature=1.0, top_p=0.95, seed=3, max_tokens=NEW["free"])),
    }


def run(llm: LLM, prompt: list[int], params: SamplingParams, batch: int) -> tuple[float, list[list[int]], Any]:
    """Seconds, tokens and the metrics of the first request."""
    start = time.perf_counter()
    outputs = llm.generate([prompt] * batch, params, use_tqdm=False)
    return time.perf_counter() - start, [output.outputs[0].token_ids for output in outputs], outputs[0].metrics


def compare(
    plain: LLM, drafting: LLM, task: tuple[list[int], SamplingParams], batch: int, rounds: int
) -> dict[str, Any]:
    """Seconds without, with, and without again, in turn; the first of each does not count."""
    seconds: dict[str, list[float]] = {"none": [], "ngram": [], "none again": []}
    for number in range(rounds + 1):
        for name, llm in (("none", plain), ("ngram", drafting), ("none again", plain)):
            elapsed, tokens, metrics = run(llm, *task, batch)
            if number:
                seconds[name].append(elapsed)
            if name == "none":
                expected, count = tokens, sum(map(len, tokens))
            elif name == "ngram":
                told, equal = metrics, tokens == expected
    faster, noise = ratio(seconds["none"], seconds["ngram"]), ratio(seconds["none"], seconds["none again"])
    return {
        "tokens/s none": count / summary(seconds["none"])["median"],
        "tokens/s ngram": count / summary(seconds["ngram"])["median"],
        "times faster": faster,
        "none against itself": noise,
        "accepted": told.num_accepted_tokens / max(1, told.num_draft_tokens),
        "tokens per run": told.mean_acceptance_length,
        "equal tokens": equal,
    }


def peer(path: Path, dtype: torch.dtype, prompt: list[int], new: int) -> Callable[[bool], float]:
    """transformers' greedy generate on the same prompt -> seconds with its prompt look-up or without."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    ids = torch.tensor([prompt])
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

    def seconds(with_lookup: bool) -> float:
        more = {"prompt_lookup_num_tokens": SPECULATIVE["num_speculative_tokens"]} if with_lookup else {}
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **more)
        return time.perf_counter() - start

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of each task, a minute each at batch 8")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tasks", choices=NEW, nargs="+", default=list(NEW))
    parser.add_argument("--peer", action="store_true", help="transformers too")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    model = Transformer.from_pretrained(args.model, dtype=dtype)
    tokenizer = Tokenizer.from_pretrained(args.model)
    options = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8, "num_blocks": 8 * MAX_MODEL_LEN // 16}
    plain = LLM(model, tokenizer, **options)
    drafting = LLM(model, tokenizer, speculative_config=SPECULATIVE, **options)
    results: dict[str, dict[str, Any]] = {}
    chosen = {name: task for name, task in tasks(tokenizer).items() if name in args.tasks}
    for name, task in chosen.items():
        for batch in args.batches:
            row = results[f"{name}, batch {batch}"] = compare(plain, drafting, task, batch, args.rounds)
            print(
                f"{name}, batch {batch}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True
            )
        if args.peer and name != "free":
            generate = peer(args.model, dtype, task[0], NEW[name])
            pairs = [(generate(False), generate(True)) for _ in range(max(2, args.rounds // 4))][1:]
            without, with_lookup = zip(*pairs, strict=True)
            row = {"tokens/s": NEW[name] / summary(with_lookup)["median"], "times faster": ratio(without, with_lookup)}
            results[f"{name}, transformers' prompt look-up"] = row
            print(f"{name}, transformers: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
    close("speculation", dtype=args.dtype, rounds=args.rounds, speculative=SPECULATIVE, results=results)


if __name__ == "__main__":
    main()
