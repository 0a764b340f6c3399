"""LLM: what a response_format demands holds for every completion, whoever shares the batch, however often one is sent
back to wait. The weights are random: only the masks can make a text that validates."""

import json
import re

import jsonschema
import pytest

from llama import LLM, SamplingParams, StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bé\n", None]}, "maxItems": 2},
    },
    "required": ["name", "age"],
}
PATTERN = "[a-f]{2,5}( [0-9]{1,3}é)?"
SCHEMA = {"type": "json_schema", "json_schema": PERSON}
REGEX = {"type": "regex", "regex": PATTERN}
FORMATS = pytest.mark.parametrize("response_format", [SCHEMA, REGEX], ids=["schema", "regex"])
TALK = [{"role": "user", "content": "Hi"}]
LONGEST = 120  # tokens: more than either can take


def asking(response_format, seed: int, **fields) -> SamplingParams:
    """Hot, so that the model would say anything."""
    given = {"temperature": 5.0, "max_tokens": LONGEST, "response_format": response_format}
    return SamplingParams(**{**given, "seed": seed, **fields})


def check(completion, response_format):
    assert completion.finish_reason == "stop"
    if response_format is REGEX:
        assert re.fullmatch(PATTERN, completion.text)
    else:
        jsonschema.validate(json.loads(completion.text), PERSON)


def said(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@FORMATS
@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"repetition_penalty": 1.5, "top_k": 3}], ids=str)
def test_alone_it_validates(llm, response_format, fields):
    params = asking(response_format, 5, **fields)
    for output in (llm.generate("Hi", params, use_tqdm=False)[0], llm.chat(TALK, params, use_tqdm=False)[0]):
        check(output.outputs[0], response_format)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        (StructuredOutputsParams(choice=["left", "right turn"]), "left|right turn"),
        ({"regex": PATTERN}, PATTERN),
        ({"grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
        ({"json": '{"enum": [1, "two"]}'}, '1|"two"'),
        ({"json_object": True}, r"\{.*"),
    ],
    ids=str,
)
def test_structured_outputs(llm, wanted, pattern):
    params = SamplingParams(temperature=5.0, max_tokens=LONGEST, seed=3, structured_outputs=wanted)
    assert re.fullmatch(pattern, llm.generate("Hi", params, use_tqdm=False)[0].outputs[0].text, re.DOTALL)


@FORMATS
def test_each_of_n_validates_and_is_the_streams(llm, response_format):
    params = asking(response_format, 1, n=4, logprobs=1)
    output = llm.chat(TALK, params, use_tqdm=False)[0]
    pieces = list(llm.stream(TALK, params))
    for completion in output.outputs:
        check(completion, response_format)
        mine = [piece for piece in pieces if piece.index == completion.index]
        assert "".join(piece.text for piece in mine) == completion.text
        assert len(completion.logprobs) == len(completion.token_ids)
    assert len({completion.text for completion in output.outputs}) > 1


def crowd():
    """Constrained in both ways and not at all, one and several, short and long, in turn."""
    formats = [SCHEMA, None, REGEX, SCHEMA, None, SCHEMA]
    counts = [1, 2, 2, 3, 1, 1]
    params = [
        asking(response_format, seed, n=n) if response_format else asking(None, seed, n=n, max_tokens=60)
        for seed, (response_format, n) in enumerate(zip(formats, counts, strict=True))
    ]
    return formats, [f"{'x' * (3 * number)} prompt" for number in range(len(params))], params


def test_in_a_batch_each_says_what_it_says_alone(llm):
    formats, prompts, params = crowd()
    together = llm.generate(prompts, params, use_tqdm=False)
    alone = [llm.generate(*one, use_tqdm=False)[0] for one in zip(prompts, params, strict=True)]
    assert said(together) == said(alone)
    for response_format, output in zip(formats, together, strict=True):
        for completion in output.outputs:
            if response_format is not None:
                check(completion, response_format)


@pytest.mark.parametrize("arguments", [{}, {"enable_prefix_caching": False}, {"max_num_batched_tokens": 7}], ids=str)
def test_who_is_sent_back_to_wait_goes_on_where_its_grammar_was(llm, folder, arguments):
    formats, prompts, params = crowd()
    small = {"block_size": 4, "num_blocks": 40, "max_num_seqs": 8, "dtype": "float64"}
    pressed = LLM(folder, **small, **arguments)
    outputs = pressed.generate(prompts, params, use_tqdm=False)
    assert pressed.engine.metrics().num_preemptions > 3
    assert said(outputs) == said(llm.generate(prompts, params, use_tqdm=False))
    for response_format, output in zip(formats, outputs, strict=True):
        for completion in output.outputs:
            if response_format is not None:
                check(completion, response_format)
    pressed.engine.check()


@FORMATS
def test_min_tokens_add_nothing_to_a_complete_answer(llm, response_format):
    params = asking(response_format, 2, min_tokens=LONGEST - 1)
    completion = llm.generate("Hi", params, use_tqdm=False)[0].outputs[0]
    check(completion, response_format)
    ends = [token in llm.tokenizer.eos_token_ids for token in completion.token_ids]
    assert ends.index(True) == len(ends) - 1 < params.min_tokens


def test_past_its_end_nothing_but_the_end_is_written(llm):
    params = asking(REGEX, 3, ignore_eos=True, max_tokens=40)
    completion = llm.generate("Hi", params, use_tqdm=False)[0].outputs[0]
    assert re.fullmatch(PATTERN, completion.text) and completion.finish_reason == "length"
    assert len(completion.token_ids) == 40 and completion.token_ids[-1] in llm.tokenizer.eos_token_ids


def test_an_answer_that_is_cut_off_is_the_beginning_of_one(llm):
    whole = llm.generate("Hi", asking(SCHEMA, 4), use_tqdm=False)[0].outputs[0]
    for count in range(1, len(whole.token_ids) - 1, 7):
        cut = llm.generate("Hi", asking(SCHEMA, 4, max_tokens=count), use_tqdm=False)[0].outputs[0]
        assert cut.finish_reason == "length" and cut.token_ids == whole.token_ids[:count]


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize("seed", range(40))
def test_many_answers_validate(llm, response_format, seed):
    for completion in llm.generate("Hi", asking(response_format, seed, n=6), use_tqdm=False)[0].outputs:
        check(completion, response_format)


def test_a_format_that_cannot_be_is_refused_before_anything_runs(llm):
    unknown = SamplingParams(response_format={"type": "regex", "regex": "("})
    for ask in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=r"response_format\.regex"):
            ask("Hi", unknown)
    with pytest.raises(ValueError, match=r"response_format\.json_schema"):
        llm.chat([TALK, TALK], [asking(SCHEMA, 1), asking({"type": "json_schema", "json_schema": {"type": "x"}}, 1)])
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"choice": ["<|eot_id|>x", "<|eot_id|>y"]}, r"<\|eot_id\|>[xy]"),
        ({"json": {"const": "<|python_tag|>"}}, r'"<\|python_tag\|>"'),
        ({"grammar": 'start: "a" <|python_tag|> "b<|eot_id|>"'}, r"ab<\|eot_id\|>"),
        ({"grammar": 'start: "a" <|eot_id|> "b"'}, "a"),  # it ends the text
    ],
    ids=str,
)
def test_control_tokens_in_a_grammar(llm, wanted, text):
    """Their text in an answer is text, then as history too; others see nothing of it."""
    params = [SamplingParams(structured_outputs=wanted, max_tokens=30, seed=3), SamplingParams(max_tokens=9, seed=1)]
    answer, other = (output.outputs[0] for output in llm.chat([TALK, TALK], params, use_tqdm=False))
    assert re.fullmatch(text, answer.text) and answer.finish_reason == "stop"
    assert other.token_ids == llm.chat(TALK, params[1], use_tqdm=False)[0].outputs[0].token_ids

    def controls(said):
        history = [*TALK, {"role": "assistant", "content": said}, *TALK]
        prompt = llm.chat(history, params[1], use_tqdm=False)[0].prompt_token_ids
        return [token for token in prompt if token in llm.tokenizer.special_ids]

    assert controls(answer.text) == controls("x")
