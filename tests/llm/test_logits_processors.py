"""Functions of a request's own over its logits: where they stand among the rules, in a crowd, and when they fail."""

import asyncio
import logging
import random
from functools import partial

import pytest
import torch

from llama import LLM, AsyncLLM, ParameterError, SamplingParams
from tests.model.models import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def engine(model, **options):
    return LLM(model, **{"block_size": 4, "num_blocks": 300, "max_num_seqs": 16, **options})


def prompt(length, seed):
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(length)]


def stirred(strength, prompt_ids, output_ids, logits):
    """What it adds depends on every token so far, on their order, and on which of them were given."""
    state = sum((i + 1) * token for i, token in enumerate([*prompt_ids, *output_ids])) + 31 * len(output_ids)
    noise = torch.randn(len(logits), generator=torch.Generator().manual_seed(state), dtype=torch.float64)
    return logits + strength * noise.to(logits.dtype)


def in_place(prompt_ids, output_ids, logits):
    logits[output_ids] = -torch.inf
    return logits


def asked(seed, strength=3.0, **fields):
    functions = [partial(stirred, strength), in_place]
    given = {"max_tokens": 9, "seed": seed, "temperature": 0.8, "ignore_eos": True, "logits_processors": functions}
    return SamplingParams(**{**given, **fields})


CROWD = [
    (prompt(30, 1), asked(1)),
    (prompt(30, 1), asked(1, logits_processors=[])),
    (prompt(30, 1), asked(2, n=3)),
    (prompt(30, 1), asked(3, temperature=0, repetition_penalty=1.3, logprobs=2)),
    (prompt(9, 2), asked(4, frequency_penalty=0.5, presence_penalty=0.2, logit_bias={5: 2.0, 6: -3.0})),
    (prompt(9, 2), asked(4, frequency_penalty=0.5, logit_bias={5: 2.0}, logits_processors=[])),
    (prompt(41, 3), asked(5, 9.0, allowed_token_ids=[*range(40)], min_tokens=4, stop_token_ids=[7], logprobs=1)),
    (prompt(41, 3), asked(5, top_k=5, logprobs=3, logits_processors=[])),
    (prompt(2, 4), asked(6, top_p=0.6, logprobs=3, logprobs_mode="processed")),
]
SETTINGS = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 19},
    "pressed": {"num_blocks": 30, "max_num_batched_tokens": 31},
    "few": {"max_num_seqs": 3},
    "drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}},
}


def run(llm, asks):
    outputs = llm.generate(*map(list, zip(*asks, strict=True)), use_tqdm=False)
    return [[(o.token_ids, o.finish_reason, o.logprobs) for o in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def alone(model):
    return [run(engine(model, enable_prefix_caching=False), [one])[0] for one in CROWD]


@pytest.mark.parametrize("setting", SETTINGS)
def test_in_a_crowd_each_request_gets_what_it_gets_alone(model, alone, setting):
    llm = engine(model, **SETTINGS[setting])
    order = list(range(len(CROWD))) * 2
    random.Random(setting).shuffle(order)
    for i, found in zip(order, run(llm, [CROWD[i] for i in order]), strict=True):
        assert [part[:2] for part in found] == [part[:2] for part in alone[i]], CROWD[i]
        for (_, _, one), (_, _, other) in zip(found, alone[i], strict=True):
            for entries, wanted in zip(one or (), other or (), strict=True):
                assert {t: (pytest.approx(e.logprob, abs=1e-9), e.rank) for t, e in wanted.items()} == {
                    t: (e.logprob, e.rank) for t, e in entries.items()
                }
    llm.engine.check()
    if setting == "pressed":
        assert llm.engine.metrics().num_preemptions > 0
    if setting == "drafts":
        assert llm.engine.metrics().num_drafts > 0


def test_they_come_behind_bias_and_penalties_and_before_the_temperature(model):
    tokens = prompt(12, 5)
    params = asked(0, temperature=0, repetition_penalty=1.5, frequency_penalty=0.3, logit_bias={3: 1.0}, logprobs=0)
    [output] = engine(model).generate(tokens, params, use_tqdm=False)
    written: list[int] = []
    for entry in output.outputs[0].logprobs:
        raw = model.logits(torch.tensor([[*tokens, *written]]))[0, -1]
        logits = raw.clone()
        logits[3] += 1.0
        for token in {*tokens, *written}:
            logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
        for token in written:
            logits[token] -= 0.3
        for function in params.logits_processors:
            logits = function(tokens, written, logits)
        written.append(int(logits.argmax()))
        assert entry[written[-1]].logprob == pytest.approx(float(raw.log_softmax(-1)[written[-1]]), abs=1e-9)
    assert output.outputs[0].token_ids == written


@pytest.mark.parametrize("seed", [0, 1])
def test_a_constant_row_added_is_a_logit_bias(model, seed):
    bias = {5: 3.0, 20: 2.5, 41: -100.0}
    row = torch.zeros(97, dtype=torch.float64)
    row[list(bias)] = torch.tensor(list(bias.values()), dtype=torch.float64)
    fields = {"seed": seed, "max_tokens": 20, "top_p": 0.9, "logprobs": 3, "logprobs_mode": "processed"}
    biased, added = engine(model).generate(
        [prompt(5, 6)] * 2,
        [
            SamplingParams(**fields, logit_bias=bias),
            SamplingParams(**fields, logits_processors=[lambda _, written, logits: logits + row]),
        ],
        use_tqdm=False,
    )
    assert biased.outputs[0].token_ids == added.outputs[0].token_ids
    assert added.outputs[0].cumulative_logprob == pytest.approx(biased.outputs[0].cumulative_logprob, abs=1e-9)


def test_what_is_masked_stays_masked(model):
    def lift(prompt_ids, output_ids, logits):
        assert logits[50] == -torch.inf and logits[7] > -torch.inf
        return torch.where(torch.arange(97) == 50, 100.0, 0.0).double()

    params = asked(0, allowed_token_ids=[7, 8, 9], logits_processors=[lift])
    [output] = engine(model).generate(prompt(5, 7), params, use_tqdm=False)
    assert {*output.outputs[0].token_ids} <= {7, 8, 9} and len(output.outputs[0].token_ids) == 9


def raises(prompt_ids, output_ids, logits):
    if len(output_ids) == 2:
        raise RuntimeError("too far")
    return logits


BROKEN = {
    "raises": (raises, 2, "too far"),
    "nothing": (lambda *_: None, 0, "got NoneType"),
    "shape": (lambda p, o, logits: logits[:-1], 0, r"must give torch.float64 \[97\], got torch.float64 \[96\]"),
    "dtype": (lambda p, o, logits: logits.float(), 0, "got torch.float32"),
    "NaN": (lambda p, o, logits: logits * torch.nan, 0, "gave NaN, infinity or no finite logit"),
    "no token": (lambda p, o, logits: logits - torch.inf, 0, "no finite logit"),
    "infinity": (lambda p, o, logits: logits + torch.inf, 0, "gave NaN, infinity"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_that_fails_ends_its_own_request_alone(model, alone, caplog, name):
    function, count, told = BROKEN[name]
    llm = engine(model)
    healthy = [CROWD[0], CROWD[1], CROWD[4]]
    requests = [*healthy[:2], (prompt(30, 1), asked(9, logits_processors=[function], logprobs=1)), healthy[2]]
    with caplog.at_level(logging.ERROR):
        outputs = llm.generate(
            *map(list, zip(*requests, strict=True)), request_ids=["a", "b", "bad", "c"], use_tqdm=False
        )
    assert outputs[2].outputs[0].finish_reason == "error" and outputs[2].outputs[0].stop_reason == "logits_processors"
    assert len(outputs[2].outputs[0].token_ids) == count
    [record] = caplog.records
    assert "request bad: one of its logits_processors failed" in record.getMessage()
    assert pytest.raises(type(record.exc_info[1]), match=told).matches(record.exc_info[1])
    for output, i in zip([outputs[0], outputs[1], outputs[3]], [0, 1, 4], strict=True):
        assert output.outputs[0].token_ids == alone[i][0][0]
    llm.engine.check()


def test_through_async_llm(model, alone):
    async def main():
        async with AsyncLLM(engine(model)) as llm:
            stream = await llm.submit(*CROWD[0])
            return await stream.result()

    assert asyncio.run(main()).outputs[0].token_ids == alone[0][0][0]


def test_what_is_no_function_is_refused():
    with pytest.raises(ParameterError, match="logits_processors must be a list of functions, got"):
        SamplingParams(logits_processors=[torch.zeros(3)])
