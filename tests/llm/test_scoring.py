"""Log-likelihoods, perplexity and embeddings equal those computed by hand from whole forwards, which equal
transformers' (tests/model)."""

import math
import random

import numpy as np
import pytest
import torch

from llama import LLM, BeamSearchParams, ParameterError
from tests.model.models import tiny_model

PROMPT = [random.Random(1).randrange(97) for _ in range(40)]
TEXT = [random.Random(2).randrange(97) for _ in range(150)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def scorer(model):
    return LLM(model, max_model_len=64, block_size=4, num_blocks=200, max_num_batched_tokens=50)


def logprobs(model, ids):
    return model.logits(torch.tensor([ids]))[0].log_softmax(-1)


def by_hand(model, prompt, continuation):
    rows = logprobs(model, prompt + continuation)[len(prompt) - 1 : -1]
    each = rows.gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist()
    return each, rows.argmax(-1).tolist() == continuation


def test_scores_are_those_of_a_forward_over_prompt_and_continuation(model, scorer):
    greedy = [int(logprobs(model, PROMPT)[-1].argmax())]
    greedy.append(int(logprobs(model, PROMPT + greedy)[-1].argmax()))
    continuations = [[5], [5, 6, 7], greedy, [*greedy, 0], TEXT[:24]]  # the last one fills the context
    scores = scorer.score(PROMPT, continuations, use_tqdm=False)
    for score, continuation in zip(scores, continuations, strict=True):
        each, is_greedy = by_hand(model, PROMPT, continuation)
        assert score.token_logprobs == pytest.approx(each, abs=1e-9)
        assert score.logprob == pytest.approx(math.fsum(each), abs=1e-9)
        assert score.is_greedy == is_greedy and score.token_ids == continuation
    assert [score.is_greedy for score in scores] == [False, False, True, False, False]
    # 40 tokens are 10 blocks; the last of them is computed again, since its logits are wanted.
    assert scorer.engine.metrics().num_prefix_hits == 4 * 36
    scorer.engine.check()


def test_each_prompt_has_its_continuation(model, scorer):
    prompts = [PROMPT[:n] for n in (1, 7, 33)]
    for score, prompt in zip(scorer.score(prompts, [[3, 4]] * 3, use_tqdm=False), prompts, strict=True):
        assert score.token_logprobs == pytest.approx(by_hand(model, prompt, [3, 4])[0], abs=1e-9)


@pytest.mark.parametrize(
    ("window", "stride", "length"),
    [
        (None, None, 150),
        (32, 32, 150),
        (32, 7, 150),
        (50, 20, 150),
        (2, 1, 150),
        (64, 64, 150),
        (None, None, 129),  # the last window has one token, with nothing before it
        (4, 4, 9),
        (4, 3, 10),
        (2, 2, 3),
        (32, 32, 128),
    ],
)
def test_perplexity_is_that_of_sliding_windows(model, scorer, window, stride, length):
    """The loop of transformers' documentation: each window scores what the one before it did not."""
    size, step, text = window or 64, stride or window or 64, TEXT[:length]
    total, count, end = 0.0, 0, 0
    for start in range(0, len(text), step):
        stop = min(start + size, len(text))
        rows = logprobs(model, text[start:stop])
        for position in range(max(end, start + 1), stop):
            total -= float(rows[position - start - 1, text[position]])
            count += 1
        end = stop
        if stop == len(text):
            break
    assert scorer.perplexity(text, window, stride) == pytest.approx(math.exp(total / count), rel=1e-9)


@pytest.mark.parametrize(("layer", "point"), [(None, "norm"), (-1, "layers.1.resid_post"), (0, "layers.0.resid_post")])
def test_embeddings_pool_the_states_of_every_token(model, scorer, layer, point):
    texts = [PROMPT, PROMPT[:9], [*PROMPT, 5]]  # with a prefix in the cache
    mean, last = (scorer.embed(texts, pooling, layer, use_tqdm=False) for pooling in ("mean", "last"))
    assert mean.dtype == torch.float32 and mean.shape == last.shape == (3, 48)
    for i, text in enumerate(texts):
        states = model.run_with_cache(torch.tensor([text]), point)[1][point][0]
        torch.testing.assert_close(mean[i], states.mean(0).float())
        torch.testing.assert_close(last[i], states[-1].float())


def test_texts_are_split_where_the_prompt_ends(demo_model_path):
    llm = LLM(demo_model_path, device="cpu", dtype="float32", max_model_len=128)
    [good, bad] = llm.score("The capital of France is ", ["Paris.", "purple."], use_tqdm=False)
    assert good.logprob > bad.logprob + 5
    assert llm.tokenizer.decode(good.token_ids) == " Paris."
    [again] = llm.score({"prompt": "The capital of France is "}, {"prompt": "Paris."}, use_tqdm=False)
    assert again == good
    sentence = "The quick brown fox jumps over the lazy dog."
    assert llm.perplexity(sentence) < llm.perplexity(sentence[::-1])


def forms(ids):
    """Of token ids, as `generate` takes them."""
    yield from (np.array(ids), torch.tensor(ids), tuple(ids), {"prompt_token_ids": ids})
    yield {"prompt": "what they say", "prompt_token_ids": np.array(ids)}


def test_prompts_have_the_forms_that_generate_takes(scorer):
    params = BeamSearchParams(beam_width=2, max_tokens=2)
    quiet = {"use_tqdm": False}
    [score] = scorer.score(PROMPT, [5, 6], **quiet)
    [beams] = scorer.beam_search(PROMPT, params)
    state, perplexity = scorer.embed(PROMPT, **quiet), scorer.perplexity(PROMPT)
    for prompt, continuation in zip(forms(PROMPT), forms([5, 6]), strict=True):
        for prompts, continuations in ((prompt, continuation), ([prompt], [continuation])):
            [found] = scorer.score(prompts, continuations, **quiet)
            assert found.token_ids == [5, 6] and found.token_logprobs == pytest.approx(score.token_logprobs, abs=1e-9)
            [found] = scorer.beam_search(prompts, params)
            assert [one.tokens for one in found.sequences] == [one.tokens for one in beams.sequences]
            torch.testing.assert_close(scorer.embed(prompts, **quiet), state)
        assert scorer.perplexity(prompt) == pytest.approx(perplexity)
    assert len(scorer.beam_search(np.array([PROMPT, PROMPT]), params)) == 2
    for wrong, message in (
        ([[1], {"prompt": 3}], r"^prompts\[1\]: prompt must be a string, got int"),
        ({"tokens": [1]}, r"^a prompt dict holds prompt_token_ids or prompt, got \['tokens'\]"),
        ([[1], None], r"^prompts\[1\]: a prompt must be a string, token ids or a dict, got NoneType"),
        ({"prompt_token_ids": 5}, "^prompt_token_ids must be a list of token ids, got int"),
        (None, "^prompts must be a string, token ids, a dict or a list of these, got NoneType"),
    ):
        with pytest.raises(ParameterError, match=message) as caught:
            scorer.beam_search(wrong, params)
        assert caught.value.param == "prompts"


def test_of_no_texts_there_are_no_results(scorer):
    assert scorer.generate([]) == scorer.beam_search([], BeamSearchParams(beam_width=2, max_tokens=2)) == []
    assert scorer.score([1, 2], []) == scorer.score([], []) == scorer.score(np.array([]), ()) == []
    found = scorer.embed([])
    assert found.shape == (0, 48) and found.dtype == torch.float32 and found.device.type == "cpu"
    for prompts, continuations in (([], [[1]]), ([[1], [2]], [])):
        with pytest.raises(ParameterError, match=f"^{len(prompts)} prompts for {len(continuations)} continuations$"):
            scorer.score(prompts, continuations)


def test_misuse_is_one_clear_error(scorer):
    with pytest.raises(ParameterError, match="2 prompts for 3 continuations"):
        scorer.score([[1], [2]], [[1], [2], [3]])
    with pytest.raises(ParameterError, match="at least one token each"):
        scorer.score([1], [[]])
    for window, stride in ((65, None), (2.5, None), ("3", None), (3, 1.5), (3, True)):
        with pytest.raises(ParameterError, match=f"integers window in .2, 64. and stride .*, got {window!r} and "):
            scorer.perplexity(TEXT, window, stride)
    for wrong in (-1, 999, True, None):
        with pytest.raises(ParameterError, match=rf"^continuations must hold token ids in \[0, \d+\], got {wrong}$"):
            scorer.score([1], [2, wrong])
    with pytest.raises(ParameterError, match="at least two tokens"):
        scorer.perplexity([1])
    for wrong in (["one text", "another"], [1, 2, 999], [1, -1, 2], [1, 2.0]):
        with pytest.raises(ParameterError, match=r"^text must be one text, or token ids in \[0, \d+\], got ") as caught:
            scorer.perplexity(wrong)
        assert caught.value.param == "text"
    with pytest.raises(ParameterError, match='pooling must be "mean" or "last"'):
        scorer.embed([1, 2], "max")
    for wrong in (2, -3, "*", "0:2", True, 1.0):
        with pytest.raises(ParameterError) as caught:
            scorer.embed([1, 2], layer=wrong)
        assert str(caught.value) == f"layer must be an integer from -2 to 1, got {wrong!r}"
    with pytest.raises(ParameterError, match="need a tokenizer"):
        scorer.score("a", "b")
    with pytest.raises(ParameterError, match=r"^continuations\[1\]: .* at least one token each"):
        scorer.score([[1], [2]], [[1], []])
    with pytest.raises(ParameterError, match=r"^texts\[2\]: prompt_token_ids must be .* got 999"):
        scorer.embed([[1], [2], [999]])
    with pytest.raises(ParameterError, match=r"^prompts\[1\]: the prompt has 150 tokens"):
        scorer.beam_search([[1], TEXT], BeamSearchParams(beam_width=2, max_tokens=2))
    assert not scorer.engine.has_unfinished
