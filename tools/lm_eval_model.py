"""lm-evaluation-harness over this engine, in one process: `LlamaEngineLM(llm)` is what `simple_evaluate` takes.

    python tools/lm_eval_model.py MODEL --tasks hellaswag,arc_easy [--limit N] [--dtype float32] [--device cpu]

Log-likelihoods are those of the harness's own `hf` model. Prompts that requests share are computed once. The harness is
installed beside the project (`pip install 'llama-engine[lm-eval]'`; `make test-lm-eval` has it in a venv of its own).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from llama import LLM, SamplingParams

try:
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError as error:
    message = f"lm_eval_model needs {error.name}: pip install 'llama-engine[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(message)
    raise ModuleNotFoundError(message, name=error.name) from None

MAX_NEW_TOKENS = 256  # where a task names none, as the harness's hf model has it


class LlamaEngineLM(TemplateLM):
    """`max_length` is one token less than the context: one is always left to be drawn."""

    def __init__(self, llm: LLM, *, lora: str | None = None) -> None:
        super().__init__()
        self.llm = llm
        self.lora = lora
        self.tokenizer = llm.get_tokenizer()
        self.max_length = llm.engine.config.context_len - 1

    @property
    def eot_token_id(self) -> int:
        return min(self.tokenizer.eos_token_ids)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without any context: the text that encodes to nothing but BOS, else the end."""
        bos: list[int] = list(self.tokenizer.encode(""))
        return bos[0] if bos else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return "llama-engine"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _texts, context, continuation in requests:
            whole = [*context, *continuation][-(self.max_length + 1) :]
            pairs.append((whole[: -len(continuation)], whole[-len(continuation) :]))
        prompts, continuations = zip(*pairs, strict=True)
        scores = self.llm.score(list(prompts), list(continuations), self.lora)
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [
            [
                (None, *utils.make_disjoint_window(window))
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([window for each in windows for window in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts, params = [], []
        for context, asked in (request.args for request in requests):
            until = asked.get("until") or ()
            max_tokens = asked.get("max_gen_toks", MAX_NEW_TOKENS)
            is_sampled = asked.get("do_sample", asked.get("temperature", 0.0) > 0)
            params.append(
                SamplingParams(
                    temperature=asked.get("temperature", 1.0) if is_sampled else 0,
                    top_p=asked.get("top_p", 1.0),
                    max_tokens=max_tokens,
                    stop=[until] if isinstance(until, str) else until,
                )
            )
            prompts.append(self.tok_encode(context)[-(self.max_length + 1 - max_tokens) :])
        outputs = self.llm.generate(prompts, params, self.lora)
        return [output.outputs[0].text for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a model with lm-evaluation-harness.")
    parser.add_argument("model")
    parser.add_argument("--tasks", required=True, help="names of tasks, with commas between")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    model = LlamaEngineLM(LLM(options.model, dtype=options.dtype, device=options.device))
    found = lm_eval.simple_evaluate(model, tasks=options.tasks.split(","), limit=options.limit)
    print(json.dumps(found["results"], indent=2, default=str))


if __name__ == "__main__":
    main()
