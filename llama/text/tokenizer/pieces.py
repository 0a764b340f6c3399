"""What one vocabulary piece stands for in bytes, by the `decoder` of tokenizer.json.

Text is the concatenation of the pieces' bytes, decoded as UTF-8 with one U+FFFD per ill-formed part. So a piece's
bytes can be looked up once, and text can be decoded token by token. Decoders that do not work piece by piece are
refused by name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class PieceDecoder:
    """`first` turns the first piece of a text into bytes, `rest` every later one.

    `strip_spaces` is how many spaces at the start of the text are dropped.
    """

    first: Callable[[str], bytes]
    rest: Callable[[str], bytes]
    strip_spaces: int = 0


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: visible Latin-1 characters stand for themselves, the other bytes for 256, 257, ..."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _byte_level() -> PieceDecoder:
    alphabet = byte_level_alphabet()

    def to_bytes(piece: str) -> bytes:
        try:
            return bytes([alphabet[character] for character in piece])
        except KeyError:  # an added token that holds a character outside the alphabet stands for its own text
            return piece.encode()

    return PieceDecoder(to_bytes, to_bytes)


def _joined_by_spaces() -> PieceDecoder:
    return PieceDecoder(str.encode, lambda piece: b" " + piece.encode())


def _metaspace(spec: Mapping[str, Any]) -> PieceDecoder:
    mark = str(spec.get("replacement", "▁"))
    first_mark = " " if spec.get("prepend_scheme", "always") == "never" else ""
    return PieceDecoder(
        lambda piece: piece.replace(mark, first_mark).encode(),
        lambda piece: piece.replace(mark, " ").encode(),
    )


def _sentencepiece(stages: list[Mapping[str, Any]]) -> PieceDecoder:
    """Replace, ByteFallback, Fuse and Strip, as converted SentencePiece tokenizers list them."""
    replacements: list[tuple[str, str]] = []
    strip_spaces = 0
    byte_pieces = False
    fused = False
    for stage in stages:
        kind = stage.get("type")
        if kind == "Replace" and isinstance(stage.get("pattern"), dict) and "String" in stage["pattern"]:
            replacements.append((str(stage["pattern"]["String"]), str(stage.get("content", ""))))
        elif kind == "ByteFallback":
            byte_pieces = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and stage.get("content") == " " and not stage.get("stop"):
            strip_spaces = int(stage.get("start", 0))
        else:
            raise ValueError(f"the decoder stage {dict(stage)!r} is not supported")

    def to_bytes(piece: str) -> bytes:
        for pattern, content in replacements:
            piece = piece.replace(pattern, content)
        if byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return piece.encode()

    return PieceDecoder(to_bytes, to_bytes, strip_spaces)


def piece_decoder(spec: Mapping[str, Any] | None) -> PieceDecoder:
    """Reads the `decoder` entry of tokenizer.json. Raises ValueError that names a decoder we do not have."""
    if spec is None:
        return _joined_by_spaces()
    kind = spec.get("type")
    if kind == "ByteLevel":
        return _byte_level()
    if kind == "Metaspace":
        return _metaspace(spec)
    if kind == "Sequence":
        stages = list(spec.get("decoders", ()))
        return piece_decoder(stages[0]) if len(stages) == 1 else _sentencepiece(stages)
    if kind in ("ByteFallback", "Fuse", "Replace"):
        return _sentencepiece([spec])
    raise ValueError(f"the decoder {kind!r} is not supported, only ByteLevel, Metaspace and SentencePiece's sequence")
