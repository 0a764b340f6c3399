"""Drafts under text: stop strings, streams, predictions, and what is told of them."""

import pytest
import torch

from llama import LLM, Capture, SamplingParams
from tests.fakes import byte_tokenizer
from tests.model.models import tiny_model

LETTERS = {ord(letter): 30.0 for letter in "abcde "}  # an answer of these is text whose tokens are its letters
PROMPT = "abacadabra abacadabra"


def made(**options) -> LLM:
    model = tiny_model(vocab_size=257, max_position_embeddings=256)
    return LLM(model, byte_tokenizer(), num_blocks=60, max_num_seqs=4, **options)


@pytest.fixture(scope="module")
def plain() -> LLM:
    return made()


@pytest.fixture(scope="module")
def drafting() -> LLM:
    return made(speculative_config={"method": "ngram", "num_speculative_tokens": 6})


def ask(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.7, "seed": 4, "max_tokens": 60, "logit_bias": LETTERS, **fields})


def told(llm: LLM, params: SamplingParams) -> list:
    output = llm.generate(PROMPT, params, use_tqdm=False)[0]
    return [(c.text, c.token_ids, c.finish_reason, c.stop_reason, c.seed) for c in output.outputs]


def streamed(llm: LLM, params: SamplingParams):
    pieces = list(llm.stream(PROMPT, params))
    tokens = [token for piece in pieces for token in piece.token_ids]
    return "".join(piece.text for piece in pieces), tokens, pieces[-1]


@pytest.mark.parametrize("start", [1, 2, 4, 6, 9, 13])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_where_it_does_without_drafts(plain, drafting, start, include):
    """The text is known to the drafter, so the stop string lies within a run or over two."""
    [(text, *_)] = told(plain, ask())
    wanted = {"stop": text[start : start + 3], "include_stop_str_in_output": include, "logprobs": 0}
    for prediction in (None, text):
        params = ask(prediction=prediction, **wanted)
        assert told(drafting, params) == told(plain, params)
        (ours, our_tokens, last), (theirs, their_tokens, other) = streamed(drafting, params), streamed(plain, params)
        assert (ours, our_tokens, last.finish_reason) == (theirs, their_tokens, other.finish_reason)
        assert last.usage.completion_tokens == other.usage.completion_tokens
    assert not drafting.engine.has_unfinished and drafting.engine.metrics().num_used_blocks == 0


@pytest.mark.parametrize("form", ["text", "tokens"])
def test_a_right_prediction_saves_steps_and_is_counted(plain, drafting, form):
    [(text, tokens, *_)] = expected = told(plain, ask())
    params = ask(prediction=text if form == "text" else tokens)
    before = drafting.engine.metrics().num_steps
    output = drafting.generate(PROMPT, params, use_tqdm=False)[0]
    assert told(drafting, params) == expected
    metrics = output.metrics
    assert metrics.num_accepted_prediction_tokens > 40 and metrics.num_prediction_tokens < 60
    assert metrics.num_accepted_tokens + metrics.num_drafts <= 60 == len(output.outputs[0].token_ids)
    assert metrics.mean_acceptance_length > 4
    assert drafting.engine.metrics().num_steps - before < 40
    usage = streamed(drafting, params)[2].usage
    assert usage.accepted_prediction_tokens == metrics.num_accepted_prediction_tokens
    assert usage.rejected_prediction_tokens == metrics.num_prediction_tokens - usage.accepted_prediction_tokens
    assert usage.mean_acceptance_length == metrics.mean_acceptance_length


def test_a_prediction_of_something_else_changes_nothing(plain, drafting):
    params = ask(prediction="abe cad bee dad " * 5, n=3, temperature=1.0)
    assert told(drafting, params) == told(plain, params)
    usage = streamed(drafting, params)[2].usage
    assert usage.rejected_prediction_tokens > 0


def test_without_drafts_nothing_is_told_of_them(plain, drafting):
    for llm, params in ((plain, ask(prediction="abc")), (drafting, ask(prediction="abc", speculative=False))):
        output = llm.generate(PROMPT, params, use_tqdm=False)[0]
        assert output.metrics.mean_acceptance_length is None and output.metrics.num_draft_tokens == 0
    assert plain.engine.metrics().num_accepted_tokens_per_pos == ()


def test_the_control_tokens_of_a_prediction_are_text(drafting):
    request = drafting.inputs.request(PROMPT, ask(prediction="a<|end|>"), None)
    assert list(request.prediction_token_ids) == list(b"a<|end|>")


def captured(llm: LLM, params: SamplingParams, capture: Capture) -> dict[str, torch.Tensor]:
    return llm.generate(PROMPT, params, capture=capture, use_tqdm=False)[0].outputs[0].captured


def test_logits_behind_every_draft_that_was_right_are_captured(plain, drafting):
    capture = Capture(["logits", "norm"], positions="generated")
    expected = captured(plain, ask(), capture)
    assert {point: len(rows) for point, rows in expected.items()} == {"logits": 59, "norm": 59}
    found = captured(drafting, ask(prediction=told(plain, ask())[0][0]), capture)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("reduce", [None, "mean"])
@pytest.mark.parametrize("start", [2, 4, 9])
def test_nothing_is_captured_behind_a_stop_string(plain, drafting, start, reduce):
    """Whose end lies within a run."""
    [(text, *_)] = told(plain, ask())
    capture = Capture("norm", positions="all", reduce=reduce)
    expected = captured(plain, ask(stop=text[start : start + 3]), capture)
    found = captured(drafting, ask(stop=text[start : start + 3], prediction=text), capture)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
