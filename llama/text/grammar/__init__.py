"""Constrained decoding: what a response may look like, as a mask over the next token.

Needs the extra `structured` (llguidance), which is imported when the first grammar is compiled.
"""

from llama.text.grammar.after_thought import AfterThought, ThoughtMasks
from llama.text.grammar.compiler import Grammar, GrammarCompiler, is_strict
from llama.text.grammar.matcher import GrammarError, Matcher

__all__ = ["AfterThought", "Grammar", "GrammarCompiler", "GrammarError", "Matcher", "ThoughtMasks", "is_strict"]
