"""Decode steps over their byte floor and prefills over the matmul rate: the whole engine on a preset's shapes.

python -m benchmarks.decode_gpu                                 on a GPU: Llama 3.1 8B in bfloat16, random weights
python -m benchmarks.decode_gpu --preset llama-3.1-70b --quantization fp8 --kv-cache-dtype fp8 --contexts 1024 131072
python -m benchmarks.decode_gpu --preset tiny --contexts 16 100 --prefill 64     anywhere, as a dry run

A step is timed from result to result while steps follow one another, scheduling, sampling and bookkeeping included.
Beside it stands transformers on a static cache, compiled with CUDA graphs where there is a GPU, with an argmax; beside
quantised weights, which are drawn as codes and never lie dense, nothing does.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.common import close, summary, timed
from benchmarks.device import Timer, ceilings
from benchmarks.random_models import random_model
from llama import ModelConfig, SamplingParams, Transformer
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.engine.sequence import TokenOutput
from llama.model.linear import Linear
from llama.model.weights.quantised import SCHEMES, Quantised

WARM_STEPS = 8  # kernels compile, graphs are recorded
PREFILL_ROUNDS = 3
PEER_CHUNK = 2048


def prompt_of(length: int, vocab_size: int) -> list[int]:
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def floor_bytes(model: Transformer, batch: int, context: int, kv_itemsize: int) -> int:
    """What a decode step must read: every weight but the input embedding's other rows, and K and V."""
    config = model.config
    weights = config.num_parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    size = weights * model.dtype.itemsize + batch * context * config.kv_values_per_token * kv_itemsize
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(form := module.form, Quantised):
            dense = module.out_features * module.in_features * model.dtype.itemsize
            size += sum(tensor.nbytes for tensor in form.weight.tensors) - dense
    return size


def prefill_flops(config: ModelConfig, length: int) -> int:
    body = config.num_parameters - config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return 2 * length * body + 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length**2


class DeviceClock:
    """Seconds that the device spends on each step that is launched; on the CPU there is no telling them apart.

    A recorded step begins with the copy of its inputs: until then the host works, and a device whose queue has run dry
    waits for it.
    """

    def __init__(self, engine: Engine) -> None:
        self.runner, self.marks = engine.runner, []
        self.is_cuda = engine.runner.model.device.type == "cuda"
        self.launch = self.runner.launch
        self.inputs = getattr(self.runner, "_inputs", None)

    def __enter__(self) -> "DeviceClock":
        if self.is_cuda:
            self.runner.launch = self._launch
            if self.inputs is not None:
                self.inputs.send = self._send
        return self

    def __exit__(self, *error: object) -> None:
        self.runner.launch = self.launch
        if self.inputs is not None:
            vars(self.inputs).pop("send", None)

    def _launch(self, plan):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.marks.append((start, end))
        start.record()
        result_of = self.launch(plan)
        end.record()
        return result_of

    def _send(self) -> None:
        self.marks[-1][0].record()  # again: the last time counts
        type(self.inputs).send(self.inputs)

    def seconds(self) -> list[float]:
        if self.is_cuda:
            torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in self.marks]


def stepped(engine: Engine) -> list[TokenOutput]:
    """What a step gave. An engine logs a step that failed and goes on without its requests: here it is an error."""
    outputs = engine.step()
    if any(output.finish_reason == "error" for output in outputs):
        raise RuntimeError("a step failed: the log says why")
    return outputs


@contextmanager
def decoding(engine: Engine, batch: int, context: int, steps: int, params: dict) -> Iterator[int]:
    """Inside, every step of the engine is one decode of `batch` sequences, for `steps` of them. -> their length."""
    length = min(context, engine.config.context_len - steps - WARM_STEPS - 2)
    # All the room there is: the first sequences decode while the others' prompts are computed.
    room = engine.config.context_len - length - 1
    settings = SamplingParams(max_tokens=room, ignore_eos=True, seed=0, **params)
    try:
        for i in range(batch):
            engine.add(engine.request(f"{i}", prompt_of(length + i % 2, engine.runner.vocab_size), settings))
        while engine.scheduler.waiting or engine.scheduler.running.prefilling:
            stepped(engine)
        for _ in range(WARM_STEPS):
            stepped(engine)
        yield length
        if engine.metrics().num_running != batch:
            raise RuntimeError(f"{engine.metrics().num_running} of {batch} sequences are left: a step failed, which "
                               f"the log tells, or they are at their end of {room} tokens")  # fmt: skip
    finally:
        for i in range(batch):
            engine.abort(f"{i}")
        while engine.has_unfinished:
            engine.step()


def finish(engine: Engine) -> None:
    while engine.has_unfinished:
        stepped(engine)


def decode(engine: Engine, batch: int, context: int, rounds: int, params: dict) -> dict:
    with decoding(engine, batch, context, rounds, params) as length, DeviceClock(engine) as clock:
        seconds = [timed(engine.step) for _ in range(rounds - 2)]
    num_bytes = floor_bytes(engine.runner.model, batch, length, engine.runner.kv.data.itemsize)
    row = {"batch": batch, "context": length, **summary(seconds), "bytes": num_bytes}
    if device_seconds := clock.seconds():
        row["device"] = summary(device_seconds)
        row["engine_overhead"] = 1 - row["device"]["median"] / row["median"]
    return row


def prefill(engine: Engine, length: int) -> dict:
    length = min(length, engine.config.context_len - 1)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    prompt = prompt_of(length, engine.runner.vocab_size)

    def once() -> None:
        engine.add(engine.request("prefill", prompt, params))
        finish(engine)

    once()
    seconds = [timed(once) for _ in range(PREFILL_ROUNDS)]
    return {"length": length, **summary(seconds), "flops": prefill_flops(engine.runner.model.config, length)}


class Peer:
    """transformers' Llama of the same shapes and dtype, with random weights of its own."""

    def __init__(self, model: Transformer, compiled: bool) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        ours = model.config
        names = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim rms_norm_eps "
                 "num_key_value_heads max_position_embeddings tie_word_embeddings").split()  # fmt: skip
        self.config = LlamaConfig(**{name: getattr(ours, name) for name in names})
        with torch.device(model.device):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=model.dtype).eval()
        self.forward: Callable = self.model
        if compiled:
            self.forward = torch.compile(self.model, mode="reduce-overhead", fullgraph=True)

    @torch.inference_mode()
    def decode(self, batch: int, context: int, rounds: int) -> dict:
        from transformers import StaticCache

        device = self.model.device
        length = min(context, self.config.max_position_embeddings - rounds - WARM_STEPS - 2)
        cache = StaticCache(config=self.config, max_cache_len=length + rounds + WARM_STEPS + 2)
        ids = torch.tensor([prompt_of(length, self.config.vocab_size)] * batch, device=device)
        for chunk in ids.split(PEER_CHUNK, dim=1):
            logits = self.model(chunk, past_key_values=cache, logits_to_keep=1).logits
        tokens = logits[:, -1:].argmax(-1)

        def step() -> None:
            nonlocal tokens
            # A copy: compiled with CUDA graphs, an output's memory is the next call's.
            tokens = self.forward(tokens, past_key_values=cache).logits[:, -1:].argmax(-1).clone()
            tokens.tolist()  # as an engine must tell its callers

        for _ in range(WARM_STEPS):
            step()
        return summary([timed(step) for _ in range(rounds)])

    @torch.inference_mode()
    def prefill(self, length: int) -> dict:
        ids = torch.tensor([prompt_of(length, self.config.vocab_size)], device=self.model.device)

        def once() -> None:
            self.model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

        once()
        return summary([timed(once) for _ in range(PREFILL_ROUNDS)])


def beside(row: dict, run: Callable[[], dict] | None) -> None:
    """Put the peer's time into the row, or why it has none."""
    if run is None:
        return
    try:
        row["peer"] = run()
        row["ratio"] = row["peer"]["median"] / row["median"]
    except Exception as error:  # out of memory, or what this version cannot compile
        row["peer_failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def show(name: str, row: dict, ceiling: str) -> None:
    told = f"{name:<28} " + " ".join(f"{row[key] * 1e3:10.3f}" for key in ("median", "p10", "p90"))
    told += f"  {row['of_ceiling']:6.1%} of {ceiling}"
    if "engine_overhead" in row:
        told += f", device {row['device']['median'] * 1e3:.3f} ms, overhead {row['engine_overhead']:.1%}"
    if "peer" in row:
        told += f", transformers {row['peer']['median'] * 1e3:.3f} ms ({row['ratio']:.2f}x)"
    print(told + (f", transformers: {row['peer_failed']}" if "peer_failed" in row else ""), flush=True)


def build(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Engine, dict[str, float]]:
    """-> an engine with room for all that is asked for, and the seconds that its parts took."""
    seconds = {}
    started = time.perf_counter()
    shapes, scheme = ModelConfig.preset(arguments.preset), arguments.quantization
    if scheme is None:
        model = Transformer(shapes, device=device, dtype=dtype)
    else:
        model = random_model(shapes, scheme, device=device, dtype=dtype)
    seconds["fill"] = time.perf_counter() - started
    longest = min(model.config.max_position_embeddings, max(*arguments.contexts, *arguments.prefill, 0) + 256)
    tokens = max(arguments.batch) * (max(arguments.contexts, default=0) + arguments.rounds + 64)
    started = time.perf_counter()
    model.prepare()
    config = EngineConfig(
        max_model_len=longest,
        num_blocks=-(-max(tokens, longest) // 16) + max(arguments.batch),
        max_num_seqs=max(arguments.batch),
        enable_prefix_caching=False,
        enforce_eager=arguments.enforce_eager,
        kv_cache_dtype=arguments.kv_cache_dtype,
    )
    engine = Engine(model, config)
    seconds["engine"] = time.perf_counter() - started
    return engine, seconds


def measure(engine: Engine, limits: dict, params: dict, arguments: argparse.Namespace) -> dict[str, dict]:
    model = engine.runner.model
    is_cuda = model.device.type == "cuda"
    peer = None if arguments.no_peer or arguments.quantization else Peer(model, compiled=is_cuda)
    print(f"{'ms':<28} {'median':>10} {'p10':>10} {'p90':>10}")
    rows = {}
    for batch in arguments.batch:
        for context in arguments.contexts:
            name = f"decode batch {batch} context {context}"
            row = rows[name] = decode(engine, batch, context, arguments.rounds, params)
            row["of_ceiling"] = row["bytes"] / limits["copy_bytes_per_second"] / row["median"]
            has_peer = peer is not None and context <= arguments.peer_up_to
            beside(row, (lambda b=batch, c=row["context"]: peer.decode(b, c, arguments.rounds)) if has_peer else None)
            show(name, row, "the byte floor")
    for length in arguments.prefill:
        name = f"prefill {length}"
        row = rows[name] = prefill(engine, length)
        row["of_ceiling"] = row["flops"] / limits["matmul_flops_per_second"] / row["median"]
        has_peer = peer is not None and length <= arguments.peer_up_to
        beside(row, (lambda n=row["length"]: peer.prefill(n)) if has_peer else None)
        show(name, row, "the matmul rate")
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.1-8b", help="its shapes, with random weights (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="bfloat16 on a GPU, else float32")
    parser.add_argument("--quantization", choices=SCHEMES, help="of the linear layers, as LLM(quantization=...) has it")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--contexts", nargs="*", type=int, default=[128, 1024, 8192, 131_072])
    parser.add_argument("--prefill", nargs="*", type=int, default=[2048, 8192, 131_072])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--sampling", action="store_true", help="temperature, top_p and top_k, in place of greedy")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-up-to", type=int, default=8192, help="longest context and prompt for transformers")
    arguments = parser.parse_args(given)
    device, is_cuda = torch.device(arguments.device), arguments.device.startswith("cuda")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if is_cuda else "float32"))
    limits = ceilings(Timer(device, 20 if is_cuda else 3), dtype, tiny=not is_cuda)
    engine, seconds = build(arguments, device, dtype)
    scheme = f" {arguments.quantization}" if arguments.quantization else ""
    print(
        f"{arguments.preset}{scheme}, {dtype}, {device}: copy {limits['copy_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"matmul {limits['matmul_flops_per_second'] / 1e12:.2f} TFLOP/s, {seconds}"
    )
    params = {"temperature": 0.7, "top_p": 0.9, "top_k": 50} if arguments.sampling else {"temperature": 0}
    rows = measure(engine, limits, params, arguments)
    names = ("preset", "quantization", "kv_cache_dtype", "batch", "enforce_eager")
    shapes = {name: getattr(arguments, name) for name in names} | {"sampling": params}
    close("decode_gpu", unit="s", dtype=str(dtype)[6:], shapes=shapes, ceilings=limits, seconds=seconds, rows=rows)


if __name__ == "__main__":
    main()
