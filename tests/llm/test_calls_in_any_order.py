"""Right and wrong calls of an LLM and its engine in any order: each answer is what it is alone, nothing is left."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from llama import LLM, SamplingParams
from tests.model.models import tiny_model

MODEL = tiny_model()
OPTIONS = {"num_blocks": 32, "block_size": 4, "max_num_seqs": 3, "max_model_len": 64}
ALONE = LLM(MODEL, **OPTIONS)
WRONG_CALLS = [
    lambda llm: llm.generate("text without a tokenizer", use_tqdm=False),
    lambda llm: llm.generate([[1], [99_999]], use_tqdm=False),
    lambda llm: llm.generate([[1], []], use_tqdm=False),
    lambda llm: llm.generate([1, 2], sampling_params=3, use_tqdm=False),
    lambda llm: llm.generate([1] * 64, use_tqdm=False),
    lambda llm: llm.generate([1, 2], lora="absent", use_tqdm=False),
    lambda llm: llm.stream([1, 2], SamplingParams(stop="x")),
    lambda llm: llm.stream([1, 2], tools=[{"name": "f"}]),
    lambda llm: llm.chat([{"role": "user", "content": "x"}], use_tqdm=False),
    lambda llm: llm.load_lora("no name!", "nowhere"),
    lambda llm: llm.load_lora("name", "nowhere"),
    lambda llm: llm.unload_lora("absent"),
    lambda llm: llm.engine.request("id", [1, -1], SamplingParams()),
    lambda llm: llm.engine.request(5, [1], SamplingParams()),
]


class CallsInAnyOrder(RuleBasedStateMachine):
    streams = Bundle("streams")

    def __init__(self) -> None:
        super().__init__()
        self.llm = LLM(MODEL, **OPTIONS)
        self.open = 0

    @rule(target=streams, prompt=st.lists(st.integers(1, 96), min_size=1, max_size=20), length=st.integers(1, 12))
    def stream(self, prompt, length):
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        self.open += 1
        return self.llm.stream(prompt, params), prompt, params, []

    @rule(stream=streams, count=st.integers(1, 5))
    def read(self, stream, count):
        pieces, prompt, params, tokens = stream
        for _, piece in zip(range(count), pieces, strict=False):
            tokens += piece.token_ids
        assert tokens == self.alone(prompt, params)[: len(tokens)]

    @rule(stream=consumes(streams))
    def finish(self, stream):
        pieces, prompt, params, tokens = stream
        tokens += [token for piece in pieces for token in piece.token_ids]
        assert tokens == self.alone(prompt, params)
        pieces.close()
        pieces.close()
        self.open -= 1

    @rule(stream=consumes(streams))
    def drop(self, stream):
        stream[0].close()
        assert next(stream[0], None) is None
        self.open -= 1

    @rule(prompt=st.lists(st.integers(1, 96), min_size=1, max_size=20))
    def generate(self, prompt):
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        (output,) = self.llm.generate(prompt, params, use_tqdm=False)
        assert output.outputs[0].token_ids == self.alone(prompt, params)

    @rule(call=st.sampled_from(WRONG_CALLS))
    def wrong(self, call):
        with pytest.raises(ValueError):
            call(self.llm)

    @rule(request_id=st.sampled_from(["unknown", "", "0"]))
    def of_nobody(self, request_id):
        self.llm.engine.abort(request_id)

    @rule()
    def in_use(self):
        request = self.llm.engine.request("twice", [1, 2], SamplingParams(max_tokens=3))
        self.llm.engine.add(request)
        with pytest.raises(ValueError, match="in use"):
            self.llm.engine.add(request)
        self.llm.engine.abort("twice")

    @invariant()
    def nothing_is_left_over(self):
        self.llm.engine.check()
        assert len(self.llm.replies) <= self.open

    def alone(self, prompt, params):
        return ALONE.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids

    def teardown(self):
        for reply in list(self.llm.replies._live.values()):
            self.llm.replies.abort(reply)
        assert not self.llm.engine.has_unfinished and not len(self.llm.replies)
        assert self.llm.engine.metrics().num_used_blocks == 0
        self.llm.engine.check()


CallsInAnyOrder.TestCase.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestCallsInAnyOrder = CallsInAnyOrder.TestCase
