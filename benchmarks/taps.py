"""What it costs to look inside: a batch of decodes on the demo model with captures and interventions, in turn with the
same batch without them; first the batch beside itself, whose difference is the weather. Then hidden states of many
prompts of unequal length in turn with a padded loop of transformers, and the memory that each hundred of them takes.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import close, in_turn, ratio, timed
from llama import LLM, Add, Capture, SamplingParams

AT_LEAST, EACH = 1.5, 100  # times as fast as the padded loop; prompts of which the memory is told together
BOUNDS = {"capture one": 0.03, "capture all layers": 0.10, "steer each its own way": 0.05}


def run_of(llm: LLM, prompts: list[list[int]], tokens: int, **options: Any) -> Callable[[], object]:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return lambda: llm.generate(prompts, params, use_tqdm=False, **options)


def padded_states(path: str, prompts: list[list[int]], layer: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """The usual loop: batches of 8, padded on the left, all hidden states, the last position kept."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    @torch.inference_mode()
    def states() -> torch.Tensor:
        found = []
        for i in range(0, len(prompts), 8):
            batch = prompts[i : i + 8]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            told = {"attention_mask": mask, "position_ids": positions, "output_hidden_states": True, "use_cache": False}
            found.append(model.model(ids, **told).hidden_states[layer + 1][:, -1].clone())
        return torch.cat(found)

    return states


def resident(name: str) -> int:
    """Bytes of this process's memory: VmRSS is now, VmHWM the most since `forget_peak`."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def collected(llm: LLM, prompts: list[list[int]], point: str) -> tuple[torch.Tensor, list[int]]:
    """The states of all prompts, and the peak of memory while each hundred of them ended."""
    states: dict[str, torch.Tensor] = {}
    peaks: list[int] = []

    def keep(request_id: str, values: dict[str, torch.Tensor]) -> None:
        states[request_id] = values[point][0]
        if len(states) % EACH == 0:
            peaks.append(resident("VmHWM"))
            forget_peak()

    forget_peak()
    names = [str(i) for i in range(len(prompts))]
    params = SamplingParams(max_tokens=1, temperature=0)
    llm.generate(prompts, params, request_ids=names, capture=Capture(point, save_to=keep), use_tqdm=False)
    return torch.stack([states[name] for name in names]), peaks


def probes_of(llm: LLM, given: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    """Both in turn, their states compared."""
    config = llm.model.config
    layer = (config.num_hidden_layers - 1) // 2  # not the last one, which transformers gives behind the norm
    lengths = torch.randint(16, 257, (given.probes,), generator=generator).tolist()
    prompts = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    loop = padded_states(given.model, prompts, layer, getattr(torch, given.dtype))
    ours: list[float] = []
    theirs: list[float] = []
    found = wanted = torch.empty(0)
    peaks: list[int] = []

    def collect() -> None:
        nonlocal found
        found, told = collected(llm, prompts, f"layers.{layer}.resid_post")
        peaks.extend(told)

    def pad() -> None:
        nonlocal wanted
        wanted = loop()

    for _ in range(given.probe_pairs):
        ours.append(timed(collect))
        theirs.append(timed(pad))
    apart = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    times = ratio(theirs, ours)
    print(f"states of {given.probes} prompts: {times:.2f} x a padded loop of transformers, bound {AT_LEAST}")
    print(f"they differ by {apart:.1e} of their norm; {min(ours):.0f} s and {min(theirs):.0f} s")
    print(f"peak memory of each {EACH} prompts, MiB: {[peak >> 20 for peak in peaks]}")
    return {"ratio": times, "ours": ours, "theirs": theirs, "apart": apart, "peaks": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--probes", type=int, default=500, help="prompts of which one layer is collected, 0 = none")
    parser.add_argument("--probe-pairs", type=int, default=3)
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

    probes = probes_of(llm, given, generator) if given.probes else {}
    close("taps", results=results, excess=excess, probes=probes, batch=given.batch, dtype=given.dtype)


if __name__ == "__main__":
    main()
