"""/v1/completions: every form of prompt, echo with exact log-likelihoods, streams of several prompts."""

import openai
import pytest
import torch

from llama.async_llm.async_llm import AsyncLLM
from tests.server.helpers import NAME, TOKENIZER, VOCAB_SIZE, client_of, real_llm, running, until
from tests.tiny_checkpoint import make_model


def complete(client, prompt, **more):
    return client.completions.create(**{"model": NAME, "prompt": prompt, **more})


def test_every_form_of_prompt(client, scripted):
    for prompt, texts in (("ab", ["ab"]), ([97, 98], ["ab"]), (["ab", "c"], ["ab", "c"]), ([[97], [98]], ["a", "b"])):
        answer = complete(client, prompt)
        assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(texts))
        assert [choice.finish_reason for choice in answer.choices] == ["stop"] * len(texts)
        assert answer.usage.prompt_tokens == sum(map(len, texts))
    assert scripted.engine.asked[-1].params.max_tokens == 16
    assert [c.index for c in complete(client, ["ab", "c"], n=2).choices] == [0, 1, 2, 3]
    assert complete(client, "a<|eot_id|>b").usage.prompt_tokens == 3


def test_streams_of_several_prompts(client):
    texts = dict.fromkeys(range(4), "")
    reasons = {}
    options = {"include_usage": True}
    *parts, last = complete(client, ["one", "zwei"], n=2, stream=True, echo=True, stream_options=options)
    for part in parts:
        (choice,) = part.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == {0: "oneone", 1: "oneone", 2: "zweizwei", 3: "zweizwei"}
    assert reasons == dict.fromkeys(range(4), "stop")
    assert last.choices == [] and (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 18)


FORMS = "'/prompt' must be a string, an array of token ids, or an array of either"
TOO_LONG = "the prompt has 5000 tokens and the context is 4096 (max_model_len): no room is left for an answer"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": []}, "'/prompt' must hold 1 to 256 prompts"),
        ({"prompt": 5}, FORMS),
        ({"prompt": [[]]}, f"{FORMS}: its entry 0 is neither"),
        ({"prompt": [[97], "b", 3]}, f"{FORMS}: its entry 2 is neither"),
        ({"prompt": [1.5]}, f"{FORMS}: its entry 0 is neither"),
        ({"prompt": [True]}, f"{FORMS}: its entry 0 is neither"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": [-1]}, "prompt_token_ids must be integers in [0, 263], got -1"),
        ({"prompt": [264]}, "prompt_token_ids must be integers in [0, 263], got 264"),
        ({"prompt": [2**70]}, f"prompt_token_ids must be integers in [0, 263], got {2**70}"),
        ({"prompt": ["ok", ""]}, "prompt[1]: prompt is empty"),
        ({"prompt": ["ok"] * 200 + ["x" * 5000, "ok"]}, f"prompt[200]: {TOO_LONG}"),
        (
            {"prompt": ["ok"] * 2, "extra_body": {"stop_token_ids": [999]}},
            "stop_token_ids must hold token ids in [0, 263], got 999",
        ),
        ({"max_tokens": 0}, "max_tokens=0 needs echo"),
        ({"best_of": 3}, "best_of is not supported: it must be absent or equal n"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"prompt": [2**70]}, f"prompt_token_ids must be integers in [0, 263], got {2**70}"),
        ({"logprobs": 21}, "'/logprobs' must be <= 20"),
    ],
)
def test_what_is_refused(client, scripted, given, message):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **{"prompt": "x", **given})
    assert caught.value.body["message"] == message
    if "prompt" in given:
        assert caught.value.body["param"] == ("stop_token_ids" if "extra_body" in given else "prompt")
    until(lambda: scripted.server.llm.num_requests == 0)  # what was let in before the refusal is aborted


# Log-likelihoods of a real model


@pytest.fixture(scope="module")
def exact():
    """A client of a real model, and the log-probabilities [positions, vocabulary] that the model itself gives."""
    llm = real_llm()

    def truth(token_ids):
        return torch.log_softmax(llm.llm.model.logits(torch.tensor([token_ids]))[0], dim=-1)

    with running(llm) as server, client_of(server) as client:
        yield client, truth


def test_echo_scores_integer_prompts_as_evaluation_harnesses_ask(exact):
    """lm-evaluation-harness: integer prompts in one batch, echo, logprobs=1, max_tokens=1; it sums the continuation's
    log-probabilities and compares each token with the best of its position."""
    client, truth = exact
    prompts = [[10, 20, 30, 40, 50], [65, 66], list(range(100, 140))]
    answer = complete(client, prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234)
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        scores, expected = choice.logprobs, truth(prompt)
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(prompt) + 1
        wanted = [float(expected[i, token]) for i, token in enumerate(prompt[1:])]
        assert scores.token_logprobs[1:-1] == pytest.approx(wanted, rel=1e-9)
        best = [max(top, key=lambda name, top=top: top[name]) for top in scores.top_logprobs[1:-1]]
        is_best = [int(expected[i].argmax()) == token for i, token in enumerate(prompt[1:])]
        assert [name == token for name, token in zip(best, scores.tokens[1:-1], strict=True)] == is_best
        assert scores.token_logprobs[-1] == pytest.approx(float(expected[-1].max()), rel=1e-9)


def test_a_greedy_continuation_is_the_best_of_its_positions(exact):
    client, _ = exact
    prompt = [65, 66, 67]
    text = complete(client, prompt, max_tokens=6, temperature=0, logprobs=0)
    ids = [TOKENIZER.encode(token)[0] for token in text.choices[0].logprobs.tokens if not token.startswith("bytes:")]
    scores = complete(client, prompt + ids[:1], echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
    assert len(scores.tokens) == 4 and max(scores.top_logprobs[-1].values()) == scores.token_logprobs[-1]


def test_names_of_tokens_and_offsets(exact):
    client, _ = exact
    prompt = [*"aß".encode(), 261]
    completion = complete(client, prompt, echo=True, logprobs=2, max_tokens=0)
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (4, 0)
    choice = completion.choices[0]
    assert choice.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\x9f", "<|eot_id|>"]
    assert choice.logprobs.text_offset == [0, 1, 1, 2]  # no character begins between two tokens of one
    assert choice.text == "aß<|eot_id|>"
    assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs[1:])
    assert VOCAB_SIZE == 264


@pytest.mark.parametrize(("asked", "kept"), [(3, "rld"), (-1, "hello world"), (99, "hello world")])
def test_echo_of_a_prompt_that_was_cut_is_what_was_kept(exact, asked, kept):
    client, _ = exact
    wanted = {"echo": True, "logprobs": 0, "max_tokens": 2, "temperature": 0}
    wanted["extra_body"] = {"truncate_prompt_tokens": asked}
    answer = complete(client, "hello world", **wanted)
    (choice,) = answer.choices
    assert choice.text.startswith(kept) and answer.usage.prompt_tokens == len(kept)
    assert choice.logprobs.tokens[: len(kept)] == list(kept)
    for token, offset in list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))[: len(kept)]:
        assert choice.text[offset:].startswith(token)
    parts = complete(client, "hello world", stream=True, **wanted)
    assert "".join(part.choices[0].text for part in parts) == choice.text


@pytest.mark.parametrize("more", [{}, {"truncate_prompt_tokens": 50}, {"truncate_prompt_tokens": 11}])
def test_offsets_are_those_of_the_text_also_behind_a_token_that_was_put_in_front(tmp_path, more):
    llm = AsyncLLM(make_model(tmp_path / "tiny"), num_blocks=64, max_num_seqs=2)
    with running(llm) as server, client_of(server) as client:
        answer = complete(client, "hello world", echo=True, logprobs=0, max_tokens=1, temperature=0, extra_body=more)
    (choice,) = answer.choices
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    start = 0 if more == {"truncate_prompt_tokens": 11} else 1
    assert tokens[:start] == ["<|begin_of_text|>"][:start] and offsets[:start] == [0][:start]
    assert choice.text.startswith("hello world") and tokens[start:-1] == list("hello world")
    assert offsets[start:] == list(range(12))


def test_streamed_echo_is_the_same(exact):
    client, _ = exact
    wanted = {"echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0}
    whole = complete(client, [70, 71, 72], **wanted).choices[0]
    parts = [part.choices[0] for part in complete(client, [70, 71, 72], stream=True, **wanted)]
    assert "".join(part.text for part in parts) == whole.text
    scores = [part.logprobs for part in parts if part.logprobs]
    assert [token for part in scores for token in part.tokens] == whole.logprobs.tokens
    assert [offset for part in scores for offset in part.text_offset] == whole.logprobs.text_offset
    again = [value for part in scores for value in part.token_logprobs]
    assert again[0] is None and again[1:] == pytest.approx(whole.logprobs.token_logprobs[1:], rel=1e-9)
