"""Upkeep: what changes under an LLM while it lives: its weights, its prefix cache, its memory."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from llama.api.errors import ParameterError, refusal
from llama.api.outputs import RequestOutput
from llama.api.params import SamplingParams
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.llm.engines import ranks_of
from llama.llm.interrupts import interrupts_held
from llama.llm.prefixes import read_prefix, write_prefix
from llama.llm.replies import Replies
from llama.llm.requests import Inputs, Prompt
from llama.llm.weights import PAIRS, update_weights
from llama.model.kept import checked_target
from llama.model.transformer import Transformer


class Upkeep:
    """A base of LLM."""

    model: Transformer
    engine: Engine
    inputs: Inputs
    replies: Replies

    def _run(self, requests: Sequence[Request], use_tqdm: bool) -> list[RequestOutput]:
        raise NotImplementedError

    def reset_prefix_cache(self) -> bool:
        """Forget the K and V of earlier prompts, as after a change of weights. Legal while requests run: they keep
        theirs."""

        def reset() -> None:
            self.engine.reset_prefix_cache()
            if self.engine.model is not None:
                self.engine.model.digests.forget()

        self.replies.between_steps(reset)
        return True

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], wait: bool = False) -> int:
        """Put new values into the model's weights, any subset, under their names in a Hugging Face checkpoint -> how
        many. The prefix cache is dropped. Refused while requests run, unless `wait` lets them end first. ParameterError
        names what does not fit; tensors before it are in place by then."""
        try:
            named_tensors = iter(named_tensors)
        except TypeError:
            raise refusal("named_tensors", PAIRS, named_tensors) from None

        def update() -> int:
            if self.engine.has_unfinished:
                raise ParameterError("update_weights needs an idle engine: requests run (wait=True lets them end)")
            self.engine.reset_prefix_cache()
            ranks = ranks_of(self.engine)
            tensors = held.letting_through(named_tensors)
            return update_weights(self.model, tensors, None if ranks is None else ranks.ask)

        self._drain(wait)
        with interrupts_held() as held:
            return self.replies.between_steps(update)

    def sleep(self, wait: bool = False) -> None:
        """Give the KV cache's memory back, with all computed prefixes, and take no request until `wake_up`. The weights
        stay. Refused while requests run, unless `wait` lets them end first."""
        self._drain(wait)
        self.replies.between_steps(self.engine.sleep)

    def wake_up(self) -> None:
        """Take the KV cache's memory again. MemoryError where it is not there by now, and nothing changes."""
        self.replies.between_steps(self.engine.wake_up)

    def is_sleeping(self) -> bool:
        return self.engine.is_sleeping

    def _drain(self, wait: bool) -> None:
        while wait and self.engine.has_unfinished:
            with interrupts_held():
                self.replies.step(unless=lambda: not self.engine.has_unfinished)

    def save_prefix(self, prompt: Prompt, path: str | Path, lora: str | None = None) -> int:
        """Compute a prompt and keep its keys and values in a safetensors file, as far as they fill blocks -> how many
        tokens those are. 0 where they fill none, or hooks on the model leave none: no file is written then.
        ParameterError where no file can be at that path, before anything is computed; OSError where it cannot be
        written all the same."""
        path = checked_target(path)
        [output] = self._run([self.inputs.request(prompt, SamplingParams(max_tokens=1), lora)], use_tqdm=False)
        adapter = self.engine.adapters.get(lora)
        ids = output.prompt_token_ids
        return self.replies.between_steps(lambda: write_prefix(self.engine, ids, adapter, path))

    def load_prefix(self, path: str | Path, lora: str | None = None) -> int:
        """Put what save_prefix kept into the prefix cache -> how many tokens. ParameterError where another model or
        adapter has computed it, or the file is none of these."""
        adapter = self.engine.adapters.get(lora)
        return self.replies.between_steps(lambda: read_prefix(self.engine, adapter, path))
