"""Fields of vLLM's SamplingParams and arguments of its LLM that change what is generated or what is told of it."""

import math

import numpy as np
import pytest
import torch

from llama import LLM, SamplingParams
from llama.engine.config import EngineConfig
from tests.llm.helpers import GREEDY

HOT = {"temperature": 5.0, "max_tokens": 40, "ignore_eos": True}
TALK = [{"role": "user", "content": "Hi"}]


def one(llm, prompt="Hi", **fields):
    return llm.generate(prompt, SamplingParams(**fields), use_tqdm=False)[0].outputs[0]


def test_allowed_token_ids(llm):
    ids = llm.tokenizer.encode("abc", add_special_tokens=False)
    for seed in range(3):
        assert set(one(llm, **HOT, seed=seed, allowed_token_ids=ids).token_ids) <= set(ids)
    both = one(
        llm,
        temperature=5,
        allowed_token_ids=[*ids, *llm.tokenizer.eos_token_ids],
        response_format={"type": "regex", "regex": "[b-z]{4}"},
    )
    assert set(both.text) <= set("bc") and len(both.text) == 4
    with pytest.raises(ValueError, match=r"allowed_token_ids must hold token ids in \[0, "):
        one(llm, allowed_token_ids=[10**6])


def test_bad_words(llm):
    """Letters are single tokens here; a word of two may lose its second letter only behind the first."""
    ids = llm.tokenizer.encode("ab", add_special_tokens=False)
    free = [one(llm, **HOT, seed=seed, n=4, allowed_token_ids=ids).text for seed in range(2)]
    assert all("ab" in text and "aa" in text for text in free)
    for seed in range(3):
        output = llm.generate("Hi", SamplingParams(**HOT, seed=seed, n=2, allowed_token_ids=ids, bad_words=["ab"]))[0]
        assert all("ab" not in c.text and len(c.text) == 40 for c in output.outputs)
    assert set(one(llm, **HOT, allowed_token_ids=ids, bad_words="b").text) == {"a"}
    blanks = llm.tokenizer.encode("a\n ", add_special_tokens=False)
    assert set(one(llm, **HOT, allowed_token_ids=blanks, bad_words=["\n", " "]).text) == {"a"}
    stuck = one(llm, **HOT, allowed_token_ids=ids, bad_words=["a", "b"])
    assert (stuck.finish_reason, stuck.token_ids) == ("error", [])


def test_special_tokens_in_the_text(llm):
    special = llm.tokenizer.special_tokens["<|eom_id|>"]
    ids = [*llm.tokenizer.encode("a", add_special_tokens=False), special]
    fields = {**HOT, "seed": 1, "allowed_token_ids": ids}
    plain, shown = one(llm, **fields), one(llm, **fields, skip_special_tokens=False)
    assert plain.token_ids == shown.token_ids and special in plain.token_ids
    assert shown.text.replace("<|eom_id|>", "") == plain.text == plain.text.replace("<|eom_id|>", "") != shown.text


def test_ids_alone(llm):
    told = one(llm, temperature=0, max_tokens=5, ignore_eos=True, detokenize=False, logprobs=1)
    assert told.text == "" and told.token_ids == one(llm, temperature=0, max_tokens=5, ignore_eos=True).token_ids
    assert all(entry.decoded_token is None for entries in told.logprobs for entry in entries.values())
    with pytest.raises(ValueError, match="stop needs detokenize=True"):
        SamplingParams(stop="a", detokenize=False)
    with pytest.raises(ValueError, match="tools need detokenize=True"):
        llm.chat(TALK, SamplingParams(detokenize=False, truncate_prompt_tokens=9), tools=[{"name": "f"}])


def test_log_probabilities_of_all_tokens(llm):
    wide = LLM(llm.model, llm.tokenizer, num_blocks=50, max_logprobs=-1)
    fields = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
    asked = SamplingParams(**fields, logprobs=-1, prompt_logprobs=-1)
    (output,) = wide.generate("Hello", asked, use_tqdm=False)
    (few,) = wide.generate("Hello", SamplingParams(**fields, logprobs=20, prompt_logprobs=20), use_tqdm=False)
    size = llm.model.config.vocab_size
    told = [*output.outputs[0].logprobs, *output.prompt_logprobs[1:]]
    for entries, top in zip(told, [*few.outputs[0].logprobs, *few.prompt_logprobs[1:]], strict=True):
        assert len(entries) == size and abs(sum(math.exp(e.logprob) for e in entries.values()) - 1) < 1e-5
        assert {token: entries[token].rank for token in top} == {token: e.rank for token, e in top.items()}
    (exact,) = wide.generate("Hello", SamplingParams(**fields, logprobs=30), use_tqdm=False)
    assert all(len(entries) == 30 for entries in exact.outputs[0].logprobs)
    assert len(wide.generate("Hello", SamplingParams(**fields, logprobs=10**6))[0].outputs[0].logprobs[0]) == size
    for number in (21, -1):
        with pytest.raises(ValueError, match=r"logprobs must be an integer from 0 to 20 \(max_logprobs\)"):
            llm.generate("Hello", SamplingParams(logprobs=number))
    with pytest.raises(ValueError, match="max_logprobs must be at most 20 on cuda, got -1"):
        EngineConfig(max_logprobs=-1).resolved(llm.model.config, "cuda")


def test_truncated_prompts(llm):
    ids = list(range(30, 60))
    for asked, kept in ((4, ids[-4:]), (100, ids), (-1, ids)):
        params = SamplingParams(temperature=0, max_tokens=3, truncate_prompt_tokens=asked)
        assert llm.generate([ids], params, use_tqdm=False)[0].prompt_token_ids == kept
    context = llm.engine.config.max_model_len
    params = SamplingParams(temperature=0, max_tokens=10, truncate_prompt_tokens=-1, ignore_eos=True)
    (long,) = llm.generate([ids * 20], params, use_tqdm=False)
    assert long.prompt_token_ids == (ids * 20)[-(context - 10) :] and len(long.outputs[0].token_ids) == 10


@pytest.mark.parametrize("make", [np.array, torch.tensor, lambda ids: list(map(np.int64, ids)), tuple])
def test_token_ids_of_any_kind(llm, make):
    first, second = [40, 41, 42], [50, 51, 52]
    expected = [output.outputs[0].token_ids for output in llm.generate([first, second], GREEDY, use_tqdm=False)]
    forms = [[make(first), make(second)], [{"prompt_token_ids": make(first)}, make(second)]]
    if make in (np.array, torch.tensor):
        forms.append(make([first, second]))
        assert llm.generate(make(first), GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected[0]
        with pytest.raises(ValueError, match="got float"):
            llm.generate(make([0.5, 1.0]))
    for prompts in forms:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert all(type(token) is int for output in outputs for token in output.prompt_token_ids)


def test_the_prefix_cache_can_be_emptied(llm):
    prompt = "A prompt of some length, so that it fills several blocks of the cache."
    llm.generate(prompt, GREEDY, use_tqdm=False)
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens > 0
    pieces = llm.stream(prompt, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
    next(pieces)
    assert llm.reset_prefix_cache() is True
    llm.engine.check()
    assert list(pieces)[-1].finish_reason == "length"
    assert llm.reset_prefix_cache() and llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_what_an_llm_tells_of_itself(llm):
    assert llm.get_tokenizer() is llm.tokenizer
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5, top_p=0.25, max_tokens=7)
    bare = LLM(llm.model, num_blocks=20)
    with pytest.raises(ValueError, match="token ids only"):
        bare.get_tokenizer()


def test_a_final_message_is_continued(llm):
    begun = [*TALK, {"role": "assistant", "content": "Sure, <|eot_id|>"}]
    (output,) = llm.chat(begun, GREEDY, use_tqdm=False, continue_final_message=True)
    assert output.prompt.endswith("<|end_header_id|>\n\nSure, <|eot_id|>")
    eot = llm.tokenizer.token_to_id("<|eot_id|>")
    assert output.prompt_token_ids[-3:].count(eot) == 0, "a message's text is no control token"
    assert "".join(p.text for p in llm.stream(begun, GREEDY, continue_final_message=True)) == output.outputs[0].text
    (bare,) = llm.chat(TALK, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert bare.prompt.endswith("Hi<|eot_id|>")
    for wrong, message in (
        ({"continue_final_message": True, "add_generation_prompt": True}, "contradict each other"),
        ({"continue_final_message": 1}, "continue_final_message must be True or False"),
        ({"chat_template_kwargs": {"x": 1}}, r"does not read the arguments \['x'\]"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs must not hold 'messages'"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "does not read the arguments"),
        ({"chat_template": "{% if"}, "chat_template: line 1"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.chat(begun, GREEDY, **wrong)
    with pytest.raises(ValueError, match="needs a last message with text"):
        llm.chat([*TALK, {"role": "assistant", "content": ""}], GREEDY, continue_final_message=True)
    with pytest.raises(TypeError, match="no argument 'template'"):
        llm.chat(TALK, GREEDY, template="x")
    with pytest.raises(ValueError, match="needs a conversation"):
        llm.stream("Hi", GREEDY, continue_final_message=True)


def test_another_template(llm):
    texts = [
        f"{i}: {{{{ messages[0].content }}}}{{% if thing is defined %}}{{{{ thing }}}}{{% endif %}}" for i in range(6)
    ]
    for i, text in enumerate([*texts, texts[0]]):
        (output,) = llm.chat(TALK, GREEDY, use_tqdm=False, chat_template=text, chat_template_kwargs={"thing": "!"})
        assert output.prompt == f"{i % 6}: Hi!"
    (off,) = llm.chat(TALK, GREEDY, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
    assert off.prompt == llm.chat(TALK, GREEDY, use_tqdm=False)[0].prompt
