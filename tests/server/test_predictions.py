"""OpenAI's `prediction`, and what /metrics tells of drafts."""

import openai
import pytest

from tests.server.helpers import NAME, real_llm, running, user

LETTERS = {str(ord(letter)): 30 for letter in "abcde "}


@pytest.fixture(scope="module")
def server():
    with running(real_llm(speculative_config={"method": "ngram"})) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client, **more):
    wanted = {"model": NAME, "messages": [user("Hello")], "max_tokens": 40, "seed": 3, "logit_bias": LETTERS}
    return client.chat.completions.create(**{**wanted, **more})


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_prediction_changes_no_token_and_its_tokens_are_counted(client, in_parts):
    answer = chat(client)
    text = answer.choices[0].message.content
    content = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}] if in_parts else text
    predicted = chat(client, prediction={"type": "content", "content": content})
    assert predicted.choices[0].message.content == text and answer.usage.completion_tokens_details is None
    details = predicted.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 20 and details.rejected_prediction_tokens >= 0
    last = list(
        chat(client, prediction={"type": "content", "content": content}, stream=True,
             stream_options={"include_usage": True})
    )[-1]  # fmt: skip
    assert last.usage.completion_tokens_details.accepted_prediction_tokens == details.accepted_prediction_tokens


@pytest.mark.parametrize(
    "given",
    [
        {"type": "content"},
        {"type": "text", "content": "a"},
        {"type": "content", "content": [{"type": "image"}]},
        {"type": "content", "content": [{"type": "text", "text": 3}]},
    ],
)
def test_a_prediction_of_another_form_is_refused(client, given):
    with pytest.raises(openai.BadRequestError, match="prediction must be") as caught:
        chat(client, prediction=given)
    assert caught.value.body["param"] == "prediction"


def test_metrics_have_vllms_names(client, server):
    chat(client)
    lines = dict(
        line.rsplit(" ", 1)
        for line in server.client.get("/metrics").text.splitlines()
        if line.startswith("llama_spec_decode")
    )
    label = f'{{model_name="{NAME}"}}'
    drafts, tokens, accepted = (
        float(lines[f"llama_spec_decode_num_{name}_total{label}"])
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    per_position = [
        float(lines[f'llama_spec_decode_num_accepted_tokens_per_pos_total{{model_name="{NAME}",position="{i}"}}'])
        for i in range(4)
    ]
    assert 0 < drafts <= tokens and sum(per_position) == accepted <= tokens
