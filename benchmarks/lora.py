"""What adapters cost a decode step: a batch with n adapters and the same batch without, in turn, on the same weights.

On the CPU: the demo model in float32, adapters of q and v, rank 16, in a batch of 16. On a GPU: Llama 3.1 8B with
random weights in bfloat16, a batch of 32. Requests take the adapters in rotation. The byte floor is what the step must
read more: each adapter in use once. In the JSON, above_floor is (time / bytes) / (time / bytes of the base) - 1.
--tiny shrinks the model, so that the whole script can be tried where there is no GPU; its figures mean nothing.
"""

import argparse

import torch

from benchmarks.common import close, in_turn, ratio, summary
from benchmarks.decode_gpu import stepped
from llama import ModelConfig, SamplingParams, Transformer
from llama.engine.adapters import Adapter
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.model.lora.adapter import AdapterWeights, Pair, module_sizes
from llama.model.lora.loaded import module_places

TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "qkvo": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def random_adapter(model: Transformer, targets: tuple[str, ...], rank: int, seed: int) -> AdapterWeights:
    """Too weak to move the answers far: what is measured is time."""
    generator = torch.Generator(model.device).manual_seed(seed)

    def values(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=model.device)
        return (drawn * 0.01).to("cpu", model.dtype)

    pairs, sizes = {}, module_sizes(model.config)
    for name in module_places(model):
        if name.endswith(targets):
            in_features, out_features = sizes[name]
            pairs[name] = Pair(values(rank, in_features), values(out_features, rank))
    nbytes = sum(tensor.nbytes for pair in pairs.values() for tensor in pair)
    return AdapterWeights("", pairs, rank, targets, nbytes, seed.to_bytes(16))


class Decode:
    """An engine of its own whose requests are all decoding; request i uses adapter i mod n."""

    def __init__(
        self, model: Transformer, adapters: list[AdapterWeights], batch: int, context: int, steps: int
    ) -> None:
        length = context + steps + 1
        config = EngineConfig(
            max_model_len=length,
            max_num_seqs=batch,
            max_num_batched_tokens=max(2048, batch),
            num_blocks=batch * (-(-length // 16) + 1),
            enable_prefix_caching=False,
            max_loras=len(adapters),
            max_lora_rank=1024,
        )
        self.engine = Engine(model, config, eos_token_ids=frozenset())
        for i, content in enumerate(adapters):
            self.engine.adapters.add(Adapter(str(i), content.digest, content))
        params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(model.config.vocab_size, (batch, context), generator=generator).tolist()
        for i, prompt in enumerate(prompts):
            lora = str(i % len(adapters)) if adapters else None
            self.engine.add(self.engine.request(str(i), prompt, params, lora=lora))
        while self.engine.metrics().num_running < batch or self.engine.metrics().num_waiting:
            stepped(self.engine)

    def sample(self, steps: int) -> None:
        for _ in range(steps):
            stepped(self.engine)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def base_bytes(model: Transformer, batch: int, context: int) -> int:
    config = model.config
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return (config.num_parameters - embedding + batch * context * config.kv_values_per_token) * model.dtype.itemsize


def compare(model: Transformer, count: int, rank: int, arguments: argparse.Namespace) -> dict:
    """The base batch and one with `count` adapters in turn; 0 adapters is the noise of the measurement."""
    adapters = [random_adapter(model, TARGETS[arguments.targets], rank, seed) for seed in range(count)]
    batch, context, each = arguments.batch, arguments.context, arguments.steps
    # One more sample does not count, and filling the batch takes some steps of those who came first.
    steps = (arguments.rounds + 1) * each + 64
    base = Decode(model, [], batch, context, steps)
    adapted = Decode(model, adapters, batch, context, steps)
    base_seconds, seconds = in_turn(lambda: base.sample(each), lambda: adapted.sample(each), arguments.rounds)
    needed = base_bytes(model, batch, context)
    more = sum(adapter.nbytes for adapter in adapters)
    overhead = ratio(seconds, base_seconds) - 1
    return {
        "adapters": count,
        "rank": rank,
        "base": summary([value / each for value in base_seconds]),
        "adapted": summary([value / each for value in seconds]),
        "bytes": needed + more,
        "overhead": overhead,
        "floor": more / needed,
        "above_floor": (1 + overhead) / (1 + more / needed) - 1,
    }


def build_model(arguments: argparse.Namespace) -> tuple[str, Transformer]:
    dtype = getattr(torch, arguments.dtype)
    if arguments.tiny:
        return "tiny", Transformer(ModelConfig.preset("tiny"), dtype=dtype, device=arguments.device)
    if arguments.device == "cuda":
        return "llama-3.1-8b", Transformer(ModelConfig.preset("llama-3.1-8b"), dtype=dtype, device="cuda")
    return arguments.model, Transformer.from_pretrained(arguments.model, dtype=dtype)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct", help="on the CPU (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--tiny", action="store_true", help="the GPU's batches on a tiny model, anywhere")
    parser.add_argument("--dtype", help="bfloat16 on a GPU, else float32")
    parser.add_argument("--targets", choices=TARGETS, default="qv")
    parser.add_argument("--adapters", nargs="+", type=int)
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--context", type=int, default=128, help="tokens before the first measured step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, help="decode steps of one sample")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    large = arguments.device == "cuda" or arguments.tiny
    defaults = {
        "dtype": "bfloat16" if arguments.device == "cuda" else "float32",
        "adapters": [0, 1, 8, 32] if large else [0, 1, 8],
        "ranks": [8, 16, 64] if large else [16],
        "batch": 32 if large else 16,
        # A GPU's step overlaps with the next one's preparation: only many in a row tell what one takes.
        "steps": 20 if arguments.device == "cuda" else 1,
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)

    name, model = build_model(arguments)
    model.prepare()
    print(f"{name}, {arguments.dtype}, batch {arguments.batch}, adapters of {arguments.targets}, ms per step")
    print(f"{'adapters':>8} {'rank':>5} {'base':>9} {'adapted':>9} {'p10':>9} {'p90':>9} {'overhead':>9} {'floor':>7}")
    rows = []
    for count in arguments.adapters:
        for rank in arguments.ranks if count else arguments.ranks[:1]:
            row = compare(model, count, rank, arguments)
            times = [row["base"]["median"], *(row["adapted"][key] for key in ("median", "p10", "p90"))]
            print(
                f"{count:8} {rank if count else '-':>5} "
                + " ".join(f"{value * 1e3:9.3f}" for value in times)
                + f" {row['overhead']:9.1%} {row['floor']:7.1%}",
                flush=True,
            )
            rows.append(row)
    shapes = {"batch": arguments.batch, "context": arguments.context, "targets": arguments.targets}
    ratios = {f"{row['adapters']} adapters, rank {row['rank']}": 1 + row["overhead"] for row in rows}
    close("lora", unit="s", model=name, dtype=arguments.dtype, shapes=shapes, rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
