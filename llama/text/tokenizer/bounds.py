"""What can be said of a text's number of tokens before it is encoded."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from llama.text.tokenizer.pieces import byte_level_alphabet

_BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
_PLAIN = frozenset({"ByteLevel", "Digits", "Metaspace", "Split", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD"})
_EXPANSIONS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18}  # Unicode's bounds for a character
_MAX_EXPANSION = 128
_KEEPS_ALL = frozenset({"ByteLevel", "Digits", "Metaspace", "Split"})  # pre-tokenizers, Split by its behaviour


@dataclass(frozen=True, slots=True)
class TokenBound:
    """One token stands for `longest` characters of a text at most, those in `dropped` apart, which need none."""

    longest: int
    dropped: str

    def min_tokens(self, text: str) -> int:
        return -(-(len(text) - sum(map(text.count, self.dropped))) // self.longest)


def token_bound(backend: tokenizers.Tokenizer) -> TokenBound | None:
    """None where a token may stand for any number of characters, or it is not known whether it may.

    Known are byte pairs with the bytes in the vocabulary, no normaliser that makes a text shorter, no pre-tokenizer
    that removes what it splits at, no added token that takes the white space beside it.
    """
    added = backend.get_added_tokens_decoder().values()
    normalizers = list(_parts(state_of(backend.normalizer), "normalizers"))
    pre_tokenizers = list(_parts(state_of(backend.pre_tokenizer), "pretokenizers"))
    vocabulary = backend.get_vocab(with_added_tokens=True)
    is_byte_level = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
    drops_nothing = (
        isinstance(backend.model, tokenizers.models.BPE)
        and (is_byte_level or (backend.model.byte_fallback and all(piece in vocabulary for piece in _BYTE_PIECES)))
        and all(map(_lengthens, normalizers))
        and all(part["type"] in _KEEPS_ALL and part.get("behavior") != "Removed" for part in pre_tokenizers)
        and not any(token.lstrip or token.rstrip for token in added)
    )
    # A byte that the vocabulary lacks is dropped without a trace.
    missing = {byte for char, byte in byte_level_alphabet().items() if is_byte_level and char not in vocabulary}
    if not drops_nothing or any(0x80 <= byte < 0xC0 for byte in missing):  # all other characters have such a byte
        return None
    # An added token may be looked for in the normalised text, in its own normalised form.
    forms = [] if backend.normalizer is None else [backend.normalizer.normalize_str(token.content) for token in added]
    return TokenBound(max(map(len, (*vocabulary, *forms))), "".join(chr(byte) for byte in missing if byte < 0x80))


def check_expansion(backend: tokenizers.Tokenizer) -> None:
    """Raises ValueError for normalisers that make a text so much longer that a prompt could take all memory."""
    times, kinds = 1, set()
    for part in _parts(state_of(backend.normalizer), "normalizers"):
        kind = part["type"]
        if kind == "Replace":
            times *= max(1, -(-len(part["content"]) // len(part["pattern"].get("String") or "x")))
        elif kind == "Prepend":
            times *= 1 + len(part["prepend"])
        elif kind not in kinds:
            times *= _EXPANSIONS.get(kind, 4)
        kinds.add(kind)
    if times > _MAX_EXPANSION:
        raise ValueError(f"its normalisers make a text {times} times as long, more than {_MAX_EXPANSION}")


def is_plain(backend: tokenizers.Tokenizer) -> bool:
    """Whether it is byte pairs with nothing but the library's own patterns, which are known to end."""
    parts = [
        *_parts(state_of(backend.normalizer), "normalizers"),
        *_parts(state_of(backend.pre_tokenizer), "pretokenizers"),
    ]
    patterns = [part["pattern"] for part in parts if "pattern" in part]
    return (
        isinstance(backend.model, tokenizers.models.BPE)
        and all(part["type"] in _PLAIN for part in parts)
        and all("String" in pattern for pattern in patterns)
    )


def without_vocabulary(backend: tokenizers.Tokenizer) -> str | None:
    """A tokenizer.json with the patterns alone, which is read in no time. None where a model other than byte pairs may
    do something of its own."""
    if not isinstance(backend.model, tokenizers.models.BPE):
        return None
    parts = {"normalizer": state_of(backend.normalizer), "pre_tokenizer": state_of(backend.pre_tokenizer)}
    return json.dumps(json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()) | parts)


def state_of(part: Any) -> dict[str, Any] | None:
    """A part of tokenizer.json as it stands there."""
    return None if part is None else json.loads(part.__getstate__())


def _parts(state: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    if state is not None and state["type"] == "Sequence":
        for part in state[key]:
            yield from _parts(part, key)
    elif state is not None:
        yield state


def _lengthens(normalizer: Mapping[str, Any]) -> bool:
    """Whether no text becomes shorter by it."""
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return pattern is not None and len(normalizer["content"]) >= len(pattern)
    return bool(normalizer["type"] == "Prepend")
