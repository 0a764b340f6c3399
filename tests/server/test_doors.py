"""Routes beside the answers: token ids, the search for models, HEAD, pages of other origins."""

import logging
import re
from pathlib import Path

import pytest
from fastapi.routing import iter_route_contexts

from llama.server.app import create_app
from tests.server.helpers import NAME, RUN, TOKENIZER, VOCAB_SIZE, real_llm, running, scripted_llm, user

DOCS = Path(__file__).parents[2] / "docs" / "http.md"


def post(scripted, path, **body):
    return scripted.server.client.post(path, json=body)


def test_the_docs_list_every_route(scripted):
    table = DOCS.read_text().split("\n## Routes\n\n")[1].split("\n\n")[0]
    listed = []
    for named, what in re.findall(r"^\| (`.+`) \| (.*) \|$", table, re.MULTILINE):
        routes = re.findall(r"`([A-Z]+) (/\S*)`", named)
        below = re.search(r"also below `(\S+)`", what)
        listed += [*routes, *((method, below[1] + path) for method, path in routes if below)]
    app = create_app(scripted.server.service)._app
    known = [(method, r.path) for r in iter_route_contexts(app.routes) for method in r.methods if method != "HEAD"]
    assert sorted(listed) == sorted((method, path.replace(":path", "")) for method, path in known)


def test_a_conversation_has_the_ids_that_chat_uses(scripted):
    tools = [{"type": "function", "function": {"name": "f"}}]
    for more in ({}, {"tools": tools}):
        told = post(scripted, "/tokenize", model=NAME, messages=[user("Hello")], **more).json()
        post(scripted, "/v1/chat/completions", model=NAME, messages=[user("Hello")], max_tokens=1, **more)
        assert told["tokens"] == scripted.engine.asked[-1].prompt and told["count"] == len(told["tokens"])
    begun = [user("Hello"), {"role": "assistant", "content": "Wel"}]
    told = post(scripted, "/tokenize", messages=begun, continue_final_message=True).json()
    assert TOKENIZER.decode(told["tokens"], False).endswith("Wel") and told["max_model_len"] == 4096


def test_a_prompt_and_back(scripted):
    told = post(scripted, "/tokenize", prompt="a<|eot_id|>é", return_token_strs=True).json()
    assert told["tokens"] == TOKENIZER.encode("a<|eot_id|>é") and told["token_strs"][1] == "<|eot_id|>"
    assert post(scripted, "/detokenize", tokens=told["tokens"]).json() == {"prompt": "a<|eot_id|>é"}
    assert post(scripted, "/tokenize", prompt="a", chat_template=None).json()["token_strs"] is None


def test_what_clients_write_out_as_defaults_changes_no_ids(scripted):
    both = {"add_generation_prompt": True, "continue_final_message": False, "return_token_strs": False}
    both |= {"tools": [], "chat_template_kwargs": {}, "chat_template": None, "mm_processor_kwargs": None}
    for given, more in (({"prompt": "a"}, True), ({"messages": [user("a")]}, False)):
        plain = post(scripted, "/tokenize", **given).json()
        assert plain["count"] > 0
        assert post(scripted, "/tokenize", **given, **both, add_special_tokens=more).json() == plain
        assert post(scripted, "/tokenize", **given, **dict.fromkeys(both), add_special_tokens=None).json() == plain


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [user("a")]}, "prompt", "either prompt or messages"),
        ("/tokenize", {"messages": [user("a")], "add_special_tokens": True}, "add_special_tokens", "is for a prompt"),
        ("/tokenize", {"prompt": "a", "tools": [{}]}, "tools", "is for messages"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt", "is for messages"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message", "is for messages"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "is for messages"),
        ("/tokenize", {"messages": [user("a")], "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "not read"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template", "not a parameter"),
        ("/tokenize", {"messages": [{"role": 1}]}, "messages", "role"),
        ("/detokenize", {"tokens": [10**6]}, "tokens", "token ids must be integers in"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "token ids must be integers in"),
        ("/detokenize", {}, "tokens", "required"),
    ],
)
def test_what_is_refused(scripted, path, body, param, message):
    response = post(scripted, path, **body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and message in error["message"]
    assert post(scripted, path, model="other", prompt="a", tokens=[1]).status_code in (400, 404)


def test_the_search_for_models(scripted):
    path = "/client/v4/accounts/1/ai/models/search"
    (found,) = scripted.server.client.get(path).json()["result"]
    assert found["name"] == NAME and found["task"]["name"] == "Text Generation"
    assert found["properties"] == [{"property_id": "context_window", "value": "4096"}]
    assert scripted.server.client.get(path, params={"search": "other"}).json()["result"] == []


def test_run_tells_why_it_ended(scripted):
    for more, reason in (({}, "stop"), ({"max_tokens": 1}, "length")):
        body = {"messages": [user("Hello")], **more}
        assert scripted.run(body, path=RUN).json()["result"]["finish_reason"] == reason
        assert f'"finish_reason":"{reason}"' in scripted.run(body | {"stream": True}, path=RUN).text


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/version", "/v1/models", f"/v1/models/{NAME}", "/metrics"])
def test_head_is_get_without_the_body(scripted, path):
    got, head = scripted.server.client.get(path), scripted.server.client.head(path)
    assert head.status_code == got.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]


def test_pages_of_allowed_origins_may_ask(caplog):
    llm, _ = scripted_llm()
    options = {"allow_origin": ("https://a.example",), "api_keys": ("k",), "access_log": False}
    with running(llm, **options, enable_tokenizer_info_endpoint=True) as server, caplog.at_level(logging.INFO):
        asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        asks["Access-Control-Request-Headers"] = "authorization,content-type"
        allowed = server.client.options("/v1/chat/completions", headers=asks)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = server.client.options("/v1/chat/completions", headers=asks | {"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in refused.headers
        answer = server.client.get("/v1/models", headers={"Origin": "https://a.example", "Authorization": "Bearer k"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert server.client.get("/tokenizer_info").status_code == 401
        info = server.client.get("/tokenizer_info", headers={"Authorization": "Bearer k"}).json()
        assert info["tokenizer_class"]
    assert not [record for record in caplog.records if record.name == "llama.access"]


def test_without_flags_there_is_neither(scripted):
    response = scripted.server.client.get("/tokenizer_info", headers={"Origin": "https://a.example"})
    assert response.status_code == 404 and "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(("most", "bound"), [(50, 50), (-1, VOCAB_SIZE)])
def test_logprobs_up_to_what_the_engine_gives(most, bound):
    with running(real_llm(max_logprobs=most)) as server:
        for path, body, name in (
            ("chat/completions", {"messages": [user("x")], "logprobs": True}, "top_logprobs"),
            ("completions", {"prompt": "x"}, "logprobs"),
        ):
            asked = {"model": NAME, "max_tokens": 1, **body, name: bound}
            told = server.client.post(f"/v1/{path}", json=asked).json()["choices"][0]["logprobs"]
            assert len(told["content"][0]["top_logprobs"] if name == "top_logprobs" else told["top_logprobs"][0]) > 20
            if most == bound:
                refused = server.client.post(f"/v1/{path}", json=asked | {name: 51})
                assert refused.status_code == 400 and refused.json()["error"]["message"] == f"'/{name}' must be <= 50"
