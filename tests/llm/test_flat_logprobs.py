"""Log-probabilities as arrays: they are those of the dicts, and read like them."""

import asyncio
import copy
import pickle

import numpy as np
import pytest

from llama import LLM, AsyncLLM, FlatLogprobs, SamplingParams
from tests.model.models import tiny_model

PROMPT = [5, 6, 7, 8, 9, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def runs():
    options = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    return LLM(tiny_model(), block_size=4, num_blocks=90, max_logprobs=-1, speculative_config=options)


def asked(number, **fields):
    return SamplingParams(max_tokens=9, seed=3, top_k=40, logprobs=number, prompt_logprobs=number, **fields)


@pytest.mark.parametrize("mode", ["raw", "processed"])
@pytest.mark.parametrize("number", [0, 1, 5, -1])
def test_the_arrays_are_the_dicts(runs, number, mode):
    [plain] = runs.generate(PROMPT, asked(number, logprobs_mode=mode), use_tqdm=False)
    [flat] = runs.generate(PROMPT, asked(number, logprobs_mode=mode, flat_logprobs=True), use_tqdm=False)
    assert flat.outputs[0].token_ids == plain.outputs[0].token_ids
    assert flat.outputs[0].cumulative_logprob == pytest.approx(plain.outputs[0].cumulative_logprob, abs=1e-12)
    pairs = (flat.outputs[0].logprobs, plain.outputs[0].logprobs), (flat.prompt_logprobs, plain.prompt_logprobs)
    for arrays, dicts in pairs:
        assert isinstance(arrays, FlatLogprobs) and arrays == dicts and len(arrays) == len(dicts)
        assert list(arrays[2:5]) == dicts[2:5] and arrays[-1] == dicts[-1] and isinstance(arrays[2:5], FlatLogprobs)
        entries = [(t, e.logprob, e.rank) for each in dicts for t, e in (each or {}).items()]
        told = arrays.token_ids.tolist(), arrays.logprobs.tolist(), arrays.ranks.tolist()
        assert list(zip(*told, strict=True)) == entries and arrays.logprobs.dtype == np.float64
        for place, each in enumerate(dicts):
            start, stop = arrays.start_indices[place], arrays.end_indices[place]
            assert arrays.token_ids[start:stop].tolist() == list(each or {})
        with pytest.raises(IndexError):
            arrays[len(dicts)]
    assert flat.prompt_logprobs[0] is None and flat.outputs[0].logprobs != plain.outputs[0].logprobs[1:]


def test_streams_and_merged_pieces_have_them_too(runs):
    [plain] = runs.generate(PROMPT, asked(2), use_tqdm=False)
    whole = FlatLogprobs()
    for piece in runs.stream(PROMPT, asked(2, flat_logprobs=True)):
        if piece.token_ids:
            whole.extend(piece.logprobs)
    assert whole == plain.outputs[0].logprobs

    async def main():
        async with AsyncLLM(runs) as llm:
            stream = await llm.submit(PROMPT, asked(2, flat_logprobs=True))
            while not stream.reply.finished:  # so that all pieces are read as one
                await asyncio.sleep(0.01)
            return [piece async for piece in stream]

    [piece] = asyncio.run(main())
    assert isinstance(piece.logprobs, FlatLogprobs) and piece.logprobs == plain.outputs[0].logprobs


def test_texts_of_tokens_come_when_they_are_asked_for(llm):
    params = {"max_tokens": 4, "temperature": 0, "logprobs": 3}
    [plain] = llm.generate("abc", SamplingParams(**params), use_tqdm=False)
    [flat] = llm.generate("abc", SamplingParams(**params, flat_logprobs=True), use_tqdm=False)
    found = flat.outputs[0].logprobs
    assert found == plain.outputs[0].logprobs
    texts = [entry.decoded_token for each in plain.outputs[0].logprobs for entry in each.values()]
    assert found.decoded_tokens == texts and all(texts)
    assert repr(found) == f"FlatLogprobs(4 positions, {len(texts)} entries)"


def test_a_pickle_has_the_texts_and_no_tokenizer(llm):
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=3, prompt_logprobs=1, flat_logprobs=True)
    [output] = llm.generate("abc", params, use_tqdm=False)
    data = pickle.dumps(output)
    assert len(data) < 10_000
    assert pickle.loads(data) == output == copy.deepcopy(output)
