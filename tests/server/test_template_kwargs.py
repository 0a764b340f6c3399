"""--default-chat-template-kwargs: the chat template's variables where a request does not give them."""

import pytest

from llama.api.errors import ParameterError
from llama.server.config import ServerConfig
from llama.server.service import Service
from llama.text.chat import ChatTemplate
from tests.server.helpers import NAME, TOKENIZER, running, scripted_llm, user

TEMPLATE = """{{- bos_token }}{{- 'mood ' ~ (mood or 'none') ~ ' style ' ~ (style or 'none') }}
{%- for message in messages %}{{- message.content + '<|eot_id|>' }}{%- endfor %}"""
ROUTES = {
    "/v1/chat/completions": {"messages": [user("x")]},
    "/v1/responses": {"input": "x"},
    f"/ai/run/{NAME}": {"messages": [user("x")]},
}


@pytest.fixture(scope="module")
def server():
    llm, engine = scripted_llm()
    llm.llm.inputs.template = ChatTemplate(TOKENIZER, {"default": TEMPLATE})
    with running(llm, default_chat_template_kwargs={"mood": "good", "style": "old"}) as server:
        server.engine = engine
        yield server


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_has_the_defaults(server, route):
    assert server.run(ROUTES[route], path=route).status_code == 200
    assert "mood good style old" in server.engine.asked[-1].text


@pytest.mark.parametrize("route", [*ROUTES][:2])
def test_a_request_goes_before(server, route):
    server.run(ROUTES[route] | {"chat_template_kwargs": {"mood": "bad"}}, path=route)
    assert "mood bad style old" in server.engine.asked[-1].text
    response = server.run(ROUTES[route] | {"chat_template_kwargs": {"other": 1}}, path=route)
    assert response.status_code == 400 and response.json()["error"]["param"] == "chat_template_kwargs"


def test_tokenize_renders_alike(server):
    tokens = server.run({"messages": [user("x")]}, path="/tokenize").json()["tokens"]
    assert "mood good style old" in TOKENIZER.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("kwargs", [5, ["mood"], {1: "x"}])
def test_what_is_no_object(kwargs):
    with pytest.raises(ParameterError, match="default_chat_template_kwargs must be an object") as caught:
        ServerConfig(model_names=(NAME,), default_chat_template_kwargs=kwargs)
    assert caught.value.param == "default_chat_template_kwargs"


def test_what_the_template_does_not_read_is_refused_at_the_start():
    llm, _ = scripted_llm()
    with pytest.raises(ParameterError, match=r"default_chat_template_kwargs: .* does not read .*mood") as caught:
        Service(llm, ServerConfig(model_names=(NAME,), default_chat_template_kwargs={"mood": "good"}))
    assert caught.value.param == "default_chat_template_kwargs"
