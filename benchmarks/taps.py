"""What it costs to look inside: a batch of decodes on the demo model with captures and interventions, in turn with the
same batch without them; first the batch beside itself, whose difference is the weather. Then hidden states of many
prompts of unequal length beside a padded loop of transformers.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import close, in_turn, ratio, timed
from llama import LLM, Add, Capture, SamplingParams

BOUNDS = {"capture one": 0.03, "capture all layers": 0.10, "steer each its own way": 0.05}


def run_of(llm: LLM, prompts: list[list[int]], tokens: int, **options: Any) -> Callable[[], object]:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return lambda: llm.generate(prompts, params, use_tqdm=False, **options)


def padded_states(path: str, prompts: list[list[int]], layer: int, dtype: torch.dtype) -> Callable[[], object]:
    """The usual loop: batches of 8, padded on the left, all hidden states, the last position kept."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    @torch.inference_mode()
    def states() -> None:
        for i in range(0, len(prompts), 8):
            batch = prompts[i : i + 8]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
            out = model.model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            out.hidden_states[layer + 1][:, -1].clone()

    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--probes", type=int, default=500, help="prompts of which one layer is collected, 0 = none")
    given = parser.parse_args()

    llm = LLM(given.model, device="cpu", dtype=given.dtype, max_model_len=512, enable_prefix_caching=False)
    generator = torch.Generator().manual_seed(0)
    vocab, layers, hidden = llm.engine.vocab_size, llm.model.config.num_hidden_layers, llm.model.config.hidden_size
    prompts = torch.randint(0, vocab, (given.batch, 32), generator=generator).tolist()
    middle = f"layers.{layers // 2}.resid_post"
    vectors = torch.randn(given.batch, hidden, generator=generator)
    variants: dict[str, dict[str, Any]] = {
        "itself": {},
        "capture one": {"capture": Capture(middle)},
        "capture all layers": {"capture": Capture("layers.*.resid_post")},
        "capture one, every step": {"capture": Capture(middle, positions="all")},
        "steer each its own way": {"interventions": [[Add(middle, v, scale=1.0 + i)] for i, v in enumerate(vectors)]},
    }
    plain, results = run_of(llm, prompts, given.tokens), {}
    for name, options in variants.items():
        ours, without = in_turn(run_of(llm, prompts, given.tokens, **options), plain, given.pairs)
        results[name] = statistics.median(a / b for a, b in zip(ours, without, strict=True)) - 1
        print(f"{name:26} {results[name]:+.1%}")
    excess = {name: results[name] - results["itself"] for name in BOUNDS}
    for name, bound in BOUNDS.items():
        print(f"{name:26} {excess[name]:+.1%} beside the batch with itself, bound {bound:.0%}")

    probes: dict[str, float] = {}
    if given.probes:
        lengths = torch.randint(16, 257, (given.probes,), generator=generator).tolist()
        texts = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]
        collect = run_of(llm, texts, 1, capture=Capture(middle))
        loop = padded_states(given.model, texts, layers // 2, getattr(torch, given.dtype))
        pairs = [(timed(collect), timed(loop)) for _ in range(3)]
        probes = {"ratio": ratio([b for _, b in pairs], [a for a, _ in pairs]), "seconds": min(a for a, _ in pairs)}
        print(f"states of {given.probes} prompts: {probes['ratio']:.2f} x a padded loop of transformers")
    close("taps", results=results, excess=excess, probes=probes, batch=given.batch, dtype=given.dtype)


if __name__ == "__main__":
    main()
