"""What we answer is history that every template takes, and nothing of it is lost on the way into the prompt."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.chat import ChatTemplate
from tests.text.helpers import TOOL_TEMPLATE
from tests.text.template_shapes import SHAPES
from tests.text.test_chat import SHARED_TEMPLATE

PARALLEL = Path(__file__).parents[2] / ".." / "shared" / "cases" / "parallel_calls_llama31.json"


@pytest.fixture(scope="module")
def templates(llama_tokenizer):
    sources = SHAPES | {"tools": TOOL_TEMPLATE}
    if SHARED_TEMPLATE.exists():  # Meta's text, which is not part of the repository
        sources["llama-3.1"] = SHARED_TEMPLATE.read_text()
    made = {name: ChatTemplate(llama_tokenizer, {"default": source}) for name, source in sources.items()}
    made["builtin"] = ChatTemplate(llama_tokenizer)
    yield made
    for template in made.values():
        template.close()


NAMES = [*SHAPES, "tools", "builtin", "llama-3.1"]


def template_of(templates, name):
    return templates.get(name) or pytest.skip("needs ../shared/data/llama_3_1_chat_template.jinja")


TURNS = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=3)  # with text; number of calls
DECORATIONS = st.sampled_from(["", ' "é"', "\\", " {'a': 1}", "\nb", " 👍 </tool_call>"])


class Conversation:
    """What a client holds after some turns: answers in the OpenAI form, a result for each call, another question.

    Each text has a word of its own, so that it can be found in the prompt.
    """

    def __init__(self, turns, decoration):
        self.messages = []
        self.texts = []  # the words of users and of answers without calls, in order
        self.calls = []  # (name, the words of a call's arguments, the word of its result)
        self._count, self._decoration = 0, decoration
        for with_text, num_calls in turns:
            self._say("user")
            if num_calls:
                self._call(num_calls, self._text() if with_text else None)
            self._say("assistant")
        self._say("user")

    def _text(self):
        self._count += 1
        return f"w{self._count}w{self._decoration}"

    def _say(self, role):
        self.messages.append({"role": role, "content": self._text()})
        self.texts.append(f"w{self._count}w")

    def _call(self, count, text):
        calls, results = [], []
        for i in range(count):
            name, call_id = f"tool_{i % 2}", f"call-{self._count}"
            arguments = {"a": self._text(), "b": [{"c": self._text()}, 1.5, None]}
            words = [f"w{self._count - 1}w", f"w{self._count}w"]
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            calls.append({"id": call_id, "type": "function", "function": function})
            results.append({"role": "tool", "tool_call_id": call_id, "content": self._text()})
            self.calls.append((name, words, f"w{self._count}w"))
        self.messages += [{"role": "assistant", "content": text, "tool_calls": calls}, *results]


@pytest.mark.parametrize("name", NAMES)
@given(turns=TURNS, decoration=DECORATIONS)
@settings(max_examples=25, deadline=None)
def test_answers_are_valid_history_and_nothing_is_lost(templates, name, turns, decoration):
    template = template_of(templates, name)
    conversation = Conversation(turns, decoration)
    rendered = template.render(conversation.messages)
    assert [rendered.count(text) for text in conversation.texts] == [1] * len(conversation.texts)
    assert sorted(conversation.texts, key=rendered.index) == conversation.texts
    for tool, arguments, result in conversation.calls:
        places = [rendered.index(word) for word in (*arguments, result)]
        assert places == sorted(places)
        assert rendered.rindex(tool, 0, places[0]) > places[0] - 80
    template.encode(conversation.messages)


@pytest.mark.parametrize("name", ["deepseek-r1", "hermes", "llama-3", "builtin", "tools", "chatml"])
def test_arguments_are_the_same_json_however_they_were_given(templates, name):
    template = template_of(templates, name)
    arguments = {"city": "Zürich", "n": [1, 2.5, None, True], "o": {"q": 'say "hi"\n'}}

    def rendered(given):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
        user = {"role": "user", "content": "u"}
        return template.render([user, {"role": "assistant", "content": None, "tool_calls": [call]}])

    whole = rendered(arguments)
    assert whole == rendered(json.dumps(arguments, ensure_ascii=False))
    start = whole.index('{"city"')
    assert json.JSONDecoder().raw_decode(whole, start)[0] == arguments


def test_two_calls_of_a_turn_become_turns_where_a_template_takes_one(templates):
    call = [{"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": {"i": i}}} for i in range(3)]
    result = [{"role": "tool", "tool_call_id": f"c{i}", "content": f"r{i}"} for i in range(3)]
    user, turn = {"role": "user", "content": "u"}, {"role": "assistant", "content": None}

    def rendered(*messages):
        return templates["llama-3"].render([user, *messages])

    def turns(*pairs):
        return [message for c, *r in pairs for message in (turn | {"tool_calls": [call[c]]}, *(result[i] for i in r))]

    several = turn | {"tool_calls": call}
    in_order = turns((0, 0), (1, 1), (2, 2))
    assert rendered(several, *result) == rendered(*in_order)
    assert rendered(several, *result[::-1]) == rendered(*in_order)
    assert rendered(several, *[{"role": "tool", "content": f"r{i}"} for i in range(3)]) == rendered(*in_order)
    assert rendered(several) == rendered(*turns((0,), (1,), (2,)))
    assert rendered(several, result[1]) == rendered(*turns((0,), (1, 1), (2,)))
    stray = {"role": "tool", "tool_call_id": "other", "content": "r9"}
    assert rendered(several, *result, stray) == rendered(*in_order, stray)
    same_ids = turn | {"tool_calls": [call[0], call[1] | {"id": "c0"}]}
    assert rendered(same_ids, result[0], result[0]) == rendered(*turns((0, 0), (1, 0)))


def test_the_request_that_clients_send_after_two_calls(templates):
    name = "llama-3.1" if "llama-3.1" in templates else "llama-3"
    body = json.loads(PARALLEL.read_text()) if PARALLEL.exists() else None
    if body is None:
        pytest.skip("needs ../shared/cases/parallel_calls_llama31.json")
    rendered = templates[name].render(body["messages"], body["tools"])
    assert rendered.index("Paris") < rendered.index("sunny") < rendered.index('"Rome"') < rendered.index("rain")


@pytest.mark.parametrize("name", NAMES)
def test_text_shows_as_text_and_as_parts(templates, name):
    """The same prompt, whichever of the two was given; nothing of it is lost."""
    template = template_of(templates, name)
    said = [("user", "Hello there"), ("assistant", "General"), ("user", "Kenobi")]
    plain = template.render([{"role": role, "content": text} for role, text in said])
    assert plain.index("Hello there") < plain.index("General") < plain.index("Kenobi")
    for kind, key in (("text", "text"), ("input_text", "text"), ("output_text", "text"), ("refusal", "refusal")):
        cut = [{"role": r, "content": [{"type": kind, key: t[:3]}, {"type": kind, key: t[3:]}]} for r, t in said]
        assert template.render(cut) == plain


def test_equal_to_transformers_where_that_takes_the_messages(templates, llama_tokenizer):
    """transformers gives a template what the caller gives: here the form that each template reads."""
    from transformers.utils.chat_template_utils import render_jinja_template

    user, parts = {"role": "user", "content": "u"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    as_text = call | {"function": {"name": "f", "arguments": '{"a": "é"}'}}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "r"}

    def turn(call, content=None):
        return {"role": "assistant", "content": content, "tool_calls": [call]}

    for name, messages in (
        ("deepseek-r1", [user, turn(as_text), result]),
        ("hermes", [user, turn(call), result]),
        ("hermes", [user, turn(call, ""), result]),
        ("hermes", [user, turn(call, "text"), result]),
        ("llama-3", [user, turn(call), result]),
        ("llama-3", [user, turn(call, "text"), result | {"content": {"t": 21}}]),
        ("llama-guard-3", [parts, {"role": "assistant", "content": parts["content"]}]),
        ("llama-2", [{"role": "system", "content": "s"}, user]),
    ):
        [[expected], _] = render_jinja_template(
            [messages], chat_template=SHAPES[name], add_generation_prompt=True, **llama_tokenizer.template_tokens
        )
        assert templates[name].render(messages) == expected, name
        if name == "llama-guard-3":
            assert templates[name].render([user, {"role": "assistant", "content": "u"}]) == expected


@pytest.mark.parametrize("text", ["Sure", "Sure, ", "  a\n\n", "x</think>y", "<|eot_id|>"])
def test_continuing_the_final_message_equals_transformers(templates, llama_tokenizer, text):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": text}]
    names = ["llama-3", "hermes", "chatml", "llama-2"]
    arguments = {"add_generation_prompt": False, "continue_final_message": True}
    if "</think>" in text:  # of which this one drops a part
        with pytest.raises(ValueError, match="does not show all of the last message"):
            templates["deepseek-r1"].render(messages, **arguments)
    else:
        names.append("deepseek-r1")
    for name in names:
        [[expected], _] = render_jinja_template(
            [messages], chat_template=SHAPES[name], continue_final_message=True, **llama_tokenizer.template_tokens
        )
        assert templates[name].render(messages, **arguments) == expected, name
    last_user = ChatTemplate(llama_tokenizer, {"default": "{{ messages[0].content }}"})
    with pytest.raises(ValueError, match="does not show all of the last message"):
        last_user.render(messages, add_generation_prompt=False, continue_final_message=True)
    last_user.close()


def test_text_beside_a_call_that_would_hide_it_gets_a_turn_of_its_own(templates):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "Let me see", "tool_calls": [call]}]
    rendered = templates["deepseek-r1"].render(messages)
    assert "<|Assistant|>Let me see<|eot_id|><|Assistant|><|calls_begin|>" in rendered


def test_developers_speak_as_the_system(templates):
    for name in ("llama-3", "hermes", "chatml", "builtin", "llama-2"):
        user = {"role": "user", "content": "u"}
        system, developer = ([{"role": role, "content": "Be brief"}, user] for role in ("system", "developer"))
        assert templates[name].render(developer) == templates[name].render(system)


def test_a_template_that_knows_developers_gets_them(llama_tokenizer):
    source = "{% for m in messages %}{% if m.role == 'developer' %}DEV {% endif %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(llama_tokenizer, {"default": source})
    assert template.render([{"role": "developer", "content": "x"}]) == "DEV x"
    template.close()


@pytest.mark.parametrize("name", NAMES)
def test_functions_of_old_are_tools(templates, name):
    """`function_call` and the role `function`, as OpenAI had them before tools."""
    template = template_of(templates, name)
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    user = {"role": "user", "content": "u"}
    old = [
        user,
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "get_weather", "content": "sunny"},
    ]
    new = [
        user,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "get_weather", "content": "sunny"},
    ]
    rendered = template.render(old)
    assert rendered == template.render(new)
    assert rendered.index("get_weather") < rendered.index("Paris") < rendered.index("sunny")


def test_a_template_that_is_hostile_is_refused_with_its_limit(llama_tokenizer):
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(llama_tokenizer, {"default": endless}, deadline_seconds=0.5)
    with pytest.raises(ValueError, match="did not finish within"):
        template.render([{"role": "user", "content": "u"}])
    template.close()
