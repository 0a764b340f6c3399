"""What a second rank gives on the CPU: two ranks of one thread each beside one process of one thread, in turn, decodes
and prompts, on random weights of the model's shape with 8 heads and 4 KV heads. Ratios are medians over pairs of steps
side by side.

Where the rest goes is rank 0's time in sums and gatherings, which is transport and waiting for the other rank, and in
the message of the step. What is said in a step is counted, beside the least that it takes: two sums for each layer and
one for the embedding, one gathering of the logits of the rows drawn, one message.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import close, in_turn, ratio, timed
from benchmarks.deterministic import decodes, prompt_of
from llama import LLM


class Said:
    """Stands between a rank and its process group, and counts."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.seconds = 0.0
        self.sums: list[int] = []  # bytes of each
        self.gatherings: list[int] = []
        self.messages: list[int] = []

    def allreduce(self, tensors: list[torch.Tensor]) -> "Said":
        self.sums.append(tensors[0].nbytes)
        return self._wait(lambda: self._group.allreduce(tensors).wait())

    def allgather(self, parts: Any, tensors: list[torch.Tensor]) -> "Said":
        self.gatherings.append(tensors[0].nbytes)
        return self._wait(lambda: self._group.allgather(parts, tensors).wait())

    def send(self, data: bytes) -> None:
        self.messages.append(len(data))
        self._wait(lambda: self._plain_send(data))

    def wait(self) -> None:
        """Done already."""

    def _wait(self, run: Callable[[], object]) -> "Said":
        self.seconds += timed(run)
        return self

    def listen_to(self, llm: LLM) -> None:
        communicator = llm.model.communicator
        peers = llm.engine.runner._peers
        self._plain_send = peers.send
        communicator._group = self
        peers.send = self.send

    @classmethod
    def of(cls, llm: LLM) -> "Said":
        said = cls(llm.model.communicator._group)
        said.listen_to(llm)
        return said

    def forget(self) -> None:
        self.seconds = 0.0
        for counted in (self.sums, self.gatherings, self.messages):
            counted.clear()


def spoken(said: Said, llm: LLM, rows: int, tokens: int) -> dict[str, Any]:
    """What was said in the one step since `forget`, and the least for its tokens, of which `rows` are drawn."""
    config, itemsize = llm.model.config, llm.model.dtype.itemsize
    least = (2 * config.num_hidden_layers + 1) * tokens * config.hidden_size * itemsize
    vocabulary = -(-config.vocab_size // llm.engine.config.tensor_parallel_size)
    return {
        "sums": len(said.sums),
        "least_sums": 2 * config.num_hidden_layers + 1,
        "sum_bytes": sum(said.sums),
        "least_sum_bytes": least,
        "gatherings": len(said.gatherings),
        "gathered_bytes": sum(said.gatherings),
        "least_gathered_bytes": rows * vocabulary * itemsize,
        "messages": len(said.messages),
        "message_bytes": sum(said.messages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--pairs", type=int, default=30, help="of steps; a fifth as many of prompts")
    given = parser.parse_args()

    options = {"device": "cpu", "dtype": given.dtype, "max_model_len": 4096, "num_blocks": 2000}
    options |= {"load_format": "dummy", "enable_prefix_caching": False}
    with tempfile.TemporaryDirectory() as folder:
        # Nine heads are not shared by two; what the weights are takes no time.
        config = json.loads((Path(given.model) / "config.json").read_text())
        config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        torch.set_num_threads(2)  # which the ranks share
        two = LLM(folder, tensor_parallel_size=2, **options)
        one = LLM(folder, **options)  # this process has one thread by now
    said, results, counts = Said.of(two), {}, {}
    cases = {f"decode {batch}": (decodes, (batch, given.context), given.pairs) for batch in given.batches}
    cases |= {f"prompt {length}": (prompt_of, (length,), max(3, given.pairs // 5)) for length in given.prompts}
    for name, (make, arguments, pairs) in cases.items():
        step, times = make(two, *arguments), []

        def ours(step: Callable[[], object] = step, times: list[float] = times) -> None:
            said.forget()
            step()
            times.append(said.seconds)

        seconds, alone = in_turn(ours, make(one, *arguments), pairs)
        is_prompt = make is prompt_of
        counts[name] = spoken(said, two, 1 if is_prompt else arguments[0], arguments[0])
        speed, shared = ratio(alone, seconds), statistics.median(times) / statistics.median(seconds)
        results[name] = {"times_faster": speed, "in_communication": shared, "ideal": 2}
        milliseconds = " / ".join(f"{1000 * min(each):.1f}" for each in (seconds, alone))
        print(f"{name:12} {speed:.2f} x, {shared:.0%} in communication   (best {milliseconds} ms)", flush=True)
        for llm in (two, one):
            for i in range(max(given.batches)):
                llm.engine.abort(f"{i}")
    for name, count in counts.items():
        print(f"{name:12} {count}", flush=True)
    two.close()
    close("parallel", results=results, said=counts, context=given.context, dtype=given.dtype)


if __name__ == "__main__":
    main()
