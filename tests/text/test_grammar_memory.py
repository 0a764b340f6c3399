"""What compiled grammars cost: the states of an automaton, what is kept, what requests hold."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from llama.api.errors import QueueFullError
from llama.text.grammar import GrammarCompiler, GrammarError
from tests.text.walks import VOCAB, walk


def hostile_regex(number):
    """28 KB of alternatives."""
    chance = random.Random(number)
    words = ("".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(2000))
    return "|".join(f"({word}){{2,50}}" for word in words)


@pytest.fixture
def compiler(demo_tokenizer):
    compiler = GrammarCompiler(demo_tokenizer, VOCAB)
    yield compiler
    compiler.close()


def test_a_grammar_whose_states_explode_is_bounded(compiler):
    grammar = compiler.compile({"type": "regex", "regex": "[a-z ]*[aeiou][a-z ]{20}"})
    before = grammar.automaton.nbytes
    with pytest.raises(GrammarError, match="too many states"):
        for seed in range(100):
            walk(grammar.matcher(), seed)
    assert before < 2**20 < grammar.automaton.nbytes < 2**26


def test_compiled_grammars_are_kept_by_their_bytes(demo_tokenizer, monkeypatch):
    monkeypatch.setattr("llama.text.grammar.compiler.KEPT_BYTES", 1_200_000)
    compiler = GrammarCompiler(demo_tokenizer, VOCAB)
    first = compiler.compile({"type": "regex", "regex": "first"})
    for number in range(8):
        compiler.compile({"type": "regex", "regex": f"{number}"})
        assert compiler.compile({"type": "regex", "regex": "first"}) is first
        assert 0 < compiler.kept_bytes <= 1_200_000
    compiler.compile({"type": "regex", "regex": "x" * 1300})
    assert compiler.compile({"type": "regex", "regex": "first"}) is not first
    compiler.close()


def test_grammars_that_requests_hold_are_bounded_too(demo_tokenizer, monkeypatch):
    monkeypatch.setattr("llama.text.grammar.compiler.KEPT_BYTES", 1_200_000)
    monkeypatch.setattr("llama.text.grammar.compiler.LIVE_BYTES", 3_000_000)
    compiler = GrammarCompiler(demo_tokenizer, VOCAB)
    held = []
    with pytest.raises(QueueFullError, match="grammars of the requests"):
        for number in range(60):
            held.append(compiler.compile({"type": "regex", "regex": f"{number}"}).matcher())
    assert 12 < len(held) < 40
    held.clear()
    compiler.compile({"type": "regex", "regex": "more"})
    compiler.close()


@pytest.mark.slow
def test_hostile_grammars_take_bounded_memory(demo_model_path):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.text.test_grammar_memory import VOCAB, GrammarCompiler, hostile_regex, rss, walk
from llama.text.tokenizer import Tokenizer
compiler = GrammarCompiler(Tokenizer.from_pretrained({str(demo_model_path)!r}), VOCAB)
compiler.compile({{"type": "regex", "regex": "x"}})
before = rss()
for number in range(128):
    grammar = compiler.compile({{"type": "regex", "regex": hostile_regex(number)}})
    for seed in range(3):
        walk(grammar.matcher(), seed)
print((rss() - before) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 512


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
