"""Constraints as vLLM's clients send them, in the body beside OpenAI's fields."""

import re

import openai
import pytest

from tests.server.helpers import user


def chat(client, text, **more):
    return client.chat.completions.create(**{"model": "tiny", "messages": [user(text)], **more})


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"guided_choice": ["yes", "no"], "guided_decoding_backend": "outlines"}, "yes|no"),
        ({"guided_regex": "[ab]{3}", "guided_json": None}, "[ab]{3}"),
        ({"guided_json": {"enum": [1, 2]}}, "[12]"),
        ({"guided_json": '{"const": "x"}', "response_format": {"type": "text"}}, '"x"'),
        ({"guided_grammar": 'root ::= "a" | "b"'}, "[ab]"),
    ],
)
def test_structured_outputs_and_their_older_names(tiny_client, extra, pattern):
    answer = chat(tiny_client, "x", extra_body=extra, max_tokens=60, temperature=1, seed=1)
    assert re.fullmatch(pattern, answer.choices[0].message.content)
    body = {"model": "tiny", "prompt": "x", "extra_body": extra, "max_tokens": 60}
    assert re.fullmatch(pattern, tiny_client.completions.create(**body).choices[0].text)


def given_to_completions(given):
    """OpenAI's client has no response_format for this route, which takes one."""
    return {"extra_body": {**given["extra_body"], **{k: v for k, v in given.items() if k != "extra_body"}}}


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        (
            {"extra_body": {"guided_regex": "a", "structured_outputs": {"choice": ["a"]}}},
            "structured_outputs",
            None,
        ),
        (
            {"extra_body": {"guided_regex": "a", "structured_outputs": {"regex": "a"}}},
            "guided_regex",
            "guided_regex and structured_outputs.regex say the same thing: give one of them",
        ),
        (
            {"extra_body": {"guided_choice": ["a"]}, "response_format": {"type": "json_object"}},
            "guided_choice",
            "guided_choice and response_format both constrain the answer: give one of them",
        ),
        (
            {"extra_body": {"guided_choice": ["a"], "guided_regex": "a"}},
            "guided_choice",
            "guided_regex and guided_choice both constrain the answer: give one of them",
        ),
        (
            {"extra_body": {"structured_outputs": {"choice": ["a"]}}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "structured_outputs and response_format both constrain the answer: give one of them",
        ),
        (
            {"extra_body": {"guided_choice": []}},
            "guided_choice",
            "guided_choice must be a list of at least one text, got []",
        ),
        (
            {"extra_body": {"guided_json": "{bad"}},
            "guided_json",
            "guided_json must be a JSON schema, or the text of one, got '{bad'",
        ),
        ({"extra_body": {"guided_json": {"type": "nope"}}}, "guided_json", "guided_json: Invalid type: nope"),
        (
            {"extra_body": {"guided_regex": "["}},
            "guided_regex",
            "guided_regex: invalid regex: unclosed character class",
        ),
        (
            {"extra_body": {"guided_regex": "[", "structured_outputs": {"disable_any_whitespace": True}}},
            "guided_regex",
            "guided_regex: invalid regex: unclosed character class",
        ),
        (
            {"extra_body": {"structured_outputs": {"regex": "["}}},
            "structured_outputs",
            "structured_outputs.regex: invalid regex: unclosed character class",
        ),
        ({"extra_body": {"guided_grammar": "x y"}}, "guided_grammar", None),
        ({"extra_body": {"structured_outputs": {}}}, "structured_outputs", None),
    ],
)
def test_constraints_that_are_refused(tiny_client, given, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(tiny_client, "x", **given)
    assert caught.value.body["param"] == param
    assert message is None or caught.value.body["message"] == message
    with pytest.raises(openai.BadRequestError) as again:
        tiny_client.completions.create(**{"model": "tiny", "prompt": ["x", "y"], **given_to_completions(given)})
    assert again.value.body == caught.value.body


def test_a_grammar_beside_tools_is_told_by_the_name_that_was_sent(tiny_client):
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given, named in (
        ({"guided_grammar": 'start: "a"'}, "guided_grammar"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "structured_outputs.grammar"),
    ):
        with pytest.raises(openai.BadRequestError, match=f"{named} cannot stand beside tools"):
            chat(tiny_client, "x", tools=tools, extra_body=given)
