"""`llama chat`: the conversation that it keeps, its commands, interruption."""

import io
import json
import sys

from llama.api.errors import ContextLengthError, EngineDeadError
from llama.api.outputs import FinishReason, Piece, Usage
from llama.api.params import SamplingParams
from llama.cli import chat as chat_command
from tests.cli.helpers import one_line, run


class FakeLLM:
    """Says the number of messages; `stop_at` raises KeyboardInterrupt after that many pieces."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.seen = []
        self.loras = []

    def stream(self, messages, params, lora):
        self.loras.append(lora)
        if sum(len(m["content"]) for m in messages) > 100:
            raise ContextLengthError("the prompt has 101 tokens and the context is 100", 101, 100)
        self.seen.append(messages)
        return self._pieces(len(messages))

    def _pieces(self, count):
        for number, text in enumerate(["I see ", str(count), " messages"]):
            if number == self.stop_at:
                raise KeyboardInterrupt
            yield Piece(0, text, [number], usage=Usage(count, 3) if number == 2 else None)


def talk(monkeypatch, capsys, llm, *lines, arguments=()):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    monkeypatch.setattr(chat_command, "load", lambda options, values: llm)
    monkeypatch.setattr(chat_command, "params_for", lambda llm, values: SamplingParams(**values))
    return run(capsys, "chat", "folder", *arguments)


def test_chat_tells_how_many_tokens_a_step_with_drafts_gave(monkeypatch, capsys):
    llm = FakeLLM()
    monkeypatch.setattr(llm, "_pieces", lambda count: iter([Piece(0, "a", [1], usage=Usage(9, 1, 0, 2.5))]))
    _, _, err = talk(monkeypatch, capsys, llm, "one")
    assert "2.50 tokens per step with drafts]" in err


def test_chat_keeps_the_conversation(monkeypatch, capsys, tmp_path):
    llm = FakeLLM()
    saved = tmp_path / "talk.json"
    code, out, err = talk(
        monkeypatch, capsys, llm, "one", "", "two", f"/save {saved}", "/reset", "three", arguments=["--system", "S"]
    )
    assert code == 0
    assert out.splitlines() == ["I see 2 messages", "I see 4 messages", "I see 2 messages"]
    assert err.count("tokens/s, time to first token") == 3 and "[4 prompt tokens, " in err
    assert json.loads(saved.read_text()) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "I see 2 messages"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "I see 4 messages"},
    ]
    assert [m["role"] for m in llm.seen[2]] == ["system", "user"]


def test_every_answer_of_a_chat_comes_from_its_adapter(monkeypatch, capsys):
    for arguments, name in ((["--lora", "mine=folder"], "mine"), ([], None)):
        llm = FakeLLM()
        code, _, _ = talk(monkeypatch, capsys, llm, "one", "/reset", "two", arguments=arguments)
        assert code == 0 and llm.loras == [name, name]


def test_chat_commands(monkeypatch, capsys, tmp_path):
    code, out, err = talk(monkeypatch, capsys, FakeLLM(), "/help", f"/save {tmp_path}/no/where", "/quit", "one")
    assert (code, out) == (0, "") and "/reset forgets" in err and "cannot save" in err


def test_an_interrupt_stops_the_answer_and_not_the_program(monkeypatch, capsys):
    llm = FakeLLM(stop_at=2)
    code, out, err = talk(monkeypatch, capsys, llm, "one", "two")
    assert code == 0 and out.splitlines() == ["I see 1", "I see 3"] and err.count("[stopped]") == 2
    assert llm.seen[1][1] == {"role": "assistant", "content": "I see 1"}


def test_an_interrupt_before_the_first_word_asks_for_the_next_message(monkeypatch, capsys):
    llm = FakeLLM()
    answers = iter([KeyboardInterrupt, None])

    def stream(messages, params, lora, really=llm.stream):
        if (error := next(answers)) is not None:
            raise error
        return really(messages, params, lora)

    llm.stream = stream
    code, out, err = talk(monkeypatch, capsys, llm, "one", "two")
    assert code == 0 and out == "I see 1 messages\n" and "[stopped]" in err
    assert llm.seen == [[{"role": "user", "content": "two"}]]


def test_an_answer_that_was_stopped_before_its_first_word_is_not_kept(monkeypatch, capsys):
    llm = FakeLLM(stop_at=0)
    code, out, err = talk(monkeypatch, capsys, llm, "one", "two")
    assert (code, out, err) == (0, "", "[stopped]\n" * 2) and [len(messages) for messages in llm.seen] == [1, 1]


def test_a_failed_answer_is_told_and_leaves_the_conversation_as_it_was(monkeypatch, capsys):
    llm = FakeLLM()
    failed = Piece(0, "half", [1], finish_reason=FinishReason.ERROR, usage=Usage(3, 1))
    monkeypatch.setattr(llm, "_pieces", lambda count: iter([failed]))
    code, out, err = talk(monkeypatch, capsys, llm, "one", "two")
    assert (code, out) == (0, "half\nhalf\n") and err.count("the model failed while it wrote this answer\n") == 2
    assert [len(messages) for messages in llm.seen] == [1, 1]


def test_a_refused_message_leaves_the_conversation_as_it_was(monkeypatch, capsys):
    llm = FakeLLM()
    code, out, err = talk(monkeypatch, capsys, llm, "x" * 101, "caf\udce9", "one", "y" * 90, "/reset", "two")
    assert code == 0 and out == "I see 1 messages\n" * 2
    told = [line for line in err.splitlines() if not line.startswith("[")]
    assert told == [
        "the prompt has 101 tokens and the context is 100",
        "the message is not UTF-8 text: byte 0xe9 behind 3 characters",
        "the prompt has 101 tokens and the context is 100; /reset begins anew",
    ]


def test_without_the_demo_model_it_says_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "chat")
    assert (code, out) == (1, "") and one_line(err) and err.endswith("name another model, or run make demo-model\n")


def test_a_dead_engine_is_one_line_and_code_1(monkeypatch, capsys):
    def stream(messages, params, lora):
        raise EngineDeadError("the engine is dead: its device computes no more")

    llm = FakeLLM()
    llm.stream = stream
    code, out, err = talk(monkeypatch, capsys, llm, "one")
    assert (code, out) == (1, "") and one_line(err) and "computes no more" in err


def test_chat_answers_with_a_real_model(capsys, tiny, adapter, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/quit\n"))
    code, out, err = run(capsys, "chat", tiny, "--max-tokens", "3", "--seed", "1", "--lora", f"mine={adapter}")
    assert code == 0 and out.endswith("\n") and "prompt tokens" in err and "Traceback" not in err


def test_chat_answers_with_guidance(capsys, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/quit\n"))
    flags = ("--max-tokens", "3", "--seed", "1", "--guidance-scale", "1.5", "--negative-prompt", "dull")
    code, out, err = run(capsys, "chat", tiny, *flags)
    assert code == 0 and out.endswith("\n") and err.startswith("[") and "prompt tokens" in err
