"""Token ids to text, piece by piece, never half a character.

A character whose UTF-8 bytes are spread over several tokens appears with its last token. The pieces always add up to
`Tokenizer.decode` of all the ids, however they are cut; each token costs one table look-up.
"""

import codecs
import reprlib
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral
from typing import Any, Protocol

from llama.api.errors import ParameterError
from llama.text.tokenizer.pieces import PieceDecoder

_LONGEST_PARTIAL = 3  # bytes of a UTF-8 character that is still incomplete


def listed_ids(ids: Any, vocab_size: int) -> list[int]:
    """A list, an array or a tensor of ids, or one id, as a list. ParameterError for one that is not in
    [0, vocab_size)."""
    given = ids.tolist() if hasattr(ids, "tolist") else ids
    listed = list(given) if isinstance(given, Iterable) else [given]
    for token_id in listed:
        if isinstance(token_id, bool) or not isinstance(token_id, Integral) or not 0 <= int(token_id) < vocab_size:
            raise ParameterError(f"token ids must be integers in [0, {vocab_size}), got {reprlib.repr(token_id)}")
    return [int(token_id) for token_id in listed]


class _Vocabulary(Protocol):
    """What the decoder needs of a Tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def piece_decoder(self) -> PieceDecoder: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class IncrementalDecoder:
    """Decodes one stream of ids. Special tokens are left out of the text, those in `keep` apart.

    With `prompt_ids` the text continues theirs: a leading space stays, and bytes of a character that the prompt left
    incomplete are completed here. Ids outside the tokenizer's vocabulary (a padded model vocabulary) have no text.
    """

    def __init__(
        self,
        tokenizer: _Vocabulary,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        keep: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids.difference(keep) if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_first = True
        self._spaces_to_strip = tokenizer.piece_decoder.strip_spaces
        if prompt_ids:
            self._is_first = False
            self._utf8.decode(b"".join(map(self._bytes, prompt_ids[-_LONGEST_PARTIAL:])))
            self._spaces_to_strip = 0

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._stripped(self._utf8.decode(b"".join(map(self._bytes, ids))))

    def flush(self) -> str:
        """What is still held: U+FFFD if the ids ended inside a character, else nothing."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._skip:
            return b""
        if not self._is_first:
            return self._tokenizer.token_bytes(token_id)
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        self._is_first = False
        return self._tokenizer.piece_decoder.first(piece)

    def _stripped(self, text: str) -> str:
        while self._spaces_to_strip and text:
            if text[0] != " ":
                self._spaces_to_strip = 0
            else:
                self._spaces_to_strip -= 1
                text = text[1:]
        return text
