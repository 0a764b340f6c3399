"""The checkpoint's tokenizer over Hugging Face's `tokenizers`.

Two instances share one vocabulary: one reads the text of control tokens as those, the other leaves it text; no flag is
ever toggled, so any number of threads may encode. What the `decoder` of tokenizer.json means is worked out in
pieces.py; `clean_up_tokenization_spaces` is not applied, for it changes text that byte-level models mean literally.
"""

import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from llama.api.errors import CheckpointError, ParameterError, is_failure, panics_caught
from llama.files import named, read_json_if_there, read_text, token_ids
from llama.text import heap
from llama.text.tokenizer.bounds import TokenBound, check_expansion, state_of, token_bound
from llama.text.tokenizer.incremental import IncrementalDecoder, listed_ids
from llama.text.tokenizer.pieces import PieceDecoder, piece_decoder

MAX_TOKENIZER_BYTES = 2**28
MAX_TOKENIZER_CONFIG_BYTES = 2**24  # it may list every added token, and hold chat templates
_MOST_IDS = 2**32  # that the library can be asked for
_PROBE = "a"
_MARKUP = re.compile(r"[<\[{|｜].*\w.*[>\]}|｜]")  # <|im_start|>, [INST], </think>
# `encode` holds the interpreter's lock: seconds for megabytes. The batch form releases it, and wakes other threads.
_SHORT_TEXT = 4096


class Tokenizer:
    """Encodes text as the checkpoint does and decodes ids. Holds no state that a call could change."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        eos_token_ids: Iterable[int] = (),
        bos_token_id: int | None = None,
        control_tokens: Iterable[str] = (),
    ) -> None:
        """`config` is tokenizer_config.json; the ids are those that the model's own files name. `control_tokens` are
        added tokens that count as such beside those that show it: by their flag, their role, or their shape."""
        backend.no_truncation()
        backend.no_padding()
        self.template_tokens = _named_tokens(config or {})
        self._config = config or {}
        self.control_tokens = _control_tokens(backend, {*self.template_tokens.values(), *control_tokens})
        self._parsing, self._plain = _two_instances(backend, self.template_tokens.values(), self.control_tokens)
        self._edge = secrets.token_hex(16)  # one token of the plain instance, for what stands before a text
        self._plain.add_tokens([tokenizers.AddedToken(self._edge, normalized=False, special=False)])
        added = self._parsing.get_added_tokens_decoder()
        self.added_tokens = frozenset(token.content for token in added.values())
        self.special_tokens: dict[str, int] = {t.content: i for i, t in added.items() if t.special}
        self.special_ids = frozenset(self.special_tokens.values())
        self.piece_decoder: PieceDecoder = piece_decoder(state_of(self._parsing.decoder))
        self.bos_token_id = self._id_of("bos_token", bos_token_id)
        eos = self._id_of("eos_token", None)
        self.eos_token_ids = frozenset(eos_token_ids) | ({eos} if eos is not None else set())
        self._prefix, self._suffix = self._affixes()
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Reads tokenizer.json, tokenizer_config.json and the BOS and EOS ids of (generation_)config.json.

        Raises CheckpointError, in one line that names the file.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        text = read_text(file, limit=MAX_TOKENIZER_BYTES, hint=_conversion(folder))
        with _usable(file):
            backend = tokenizers.Tokenizer.from_str(text)
        config = read_json_if_there(folder / "special_tokens_map.json") | read_tokenizer_config(folder)
        eos, bos = _model_ids(folder)
        with named(folder / "tokenizer_config.json"):
            _add_tokens(backend, config.get("added_tokens_decoder"))
            _add_special_tokens(backend, config)
        with _usable(file), named(file):
            check_expansion(backend)
            return cls(backend, config=config, eos_token_ids=eos, bos_token_id=bos)

    # Text to ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Special-token text is parsed. BOS is added where the checkpoint's tokenizer adds it, never a second time."""
        ids = self._encode(self._parsing, text)
        if not add_special_tokens:
            return ids
        prefix = () if ids[: len(self._prefix)] == list(self._prefix) else self._prefix
        return [*prefix, *ids, *self._suffix]

    def encode_plain(self, text: str, *, is_beginning: bool = True) -> list[int]:
        """The text of control tokens stays text: none of their ids comes out. Nothing is added, but for the space that
        some tokenizers put before the `is_beginning` of a text and not behind a control token."""
        ids = self._encode(self._plain, text) if is_beginning else self._encode(self._plain, self._edge + text)[1:]
        if not self._control_ids.isdisjoint(ids):
            found = next(i for i in ids if i in self._control_ids)
            raise ValueError(f"the tokenizer cannot spell {self.id_to_token(found)!r} as plain text")
        return ids

    @staticmethod
    def _encode(instance: tokenizers.Tokenizer, text: str) -> list[int]:
        if not isinstance(text, str):
            raise ParameterError(f"text must be a string, got {type(text).__name__}")
        check_unicode(text)
        with panics_caught("the tokenizer"):
            if len(text) <= _SHORT_TEXT:
                return list(instance.encode(text, add_special_tokens=False).ids)
            ids: list[int] = instance.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if len(text) >= heap.LARGE_TEXT:
            heap.give_back()  # a hundred bytes and more for each token
        return ids

    def min_tokens(self, text: str) -> int:
        """No encoding of this text has fewer tokens: known at once, and far below the true number."""
        return 0 if self._token_bound is None else self._token_bound.min_tokens(text)

    # Ids to text

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """The text of these ids: a list, an array or a tensor of them, or one. Raises ParameterError for an id that the
        tokenizer does not have."""
        decoder = IncrementalDecoder(self, skip_special_tokens=skip_special_tokens)
        return decoder.push(listed_ids(ids, self.vocab_size)) + decoder.flush()

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling ("Ġhello"), None for an id that it does not have."""
        return self._parsing.id_to_token(token_id) if 0 <= token_id < _MOST_IDS else None

    def token_to_id(self, token: str) -> int | None:
        return self._parsing.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, perhaps part of a character, that this id adds in the middle of a text."""
        known = self._bytes.get(token_id)
        if known is None:
            piece = self.id_to_token(token_id)
            known = self._bytes[token_id] = b"" if piece is None else self.piece_decoder.rest(piece)
        return known

    def token_text(self, token_id: int) -> str:
        """The same as text, with U+FFFD for a part of a character: for displaying log-probabilities."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    # The vocabulary

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's own, which is not to be changed."""
        return self._parsing

    @property
    def config(self) -> Mapping[str, Any]:
        """tokenizer_config.json, over special_tokens_map.json."""
        return self._config

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        count = self._parsing.get_vocab_size(with_added_tokens=True)
        if count == 0 or self.id_to_token(count - 1) is not None:
            return count
        return max(self._parsing.get_vocab(with_added_tokens=True).values()) + 1

    def check_vocab(self, vocab_size: int) -> None:
        """Raises ValueError if the model has fewer embedding rows than the tokenizer has ids. One added token, which
        neither begins nor ends a text, may have no row: fine-tuning adds a pad token so."""
        beyond = self.id_to_token(vocab_size) if self.vocab_size == vocab_size + 1 else None
        is_idle = beyond in self.added_tokens and vocab_size not in {*self.eos_token_ids, self.bos_token_id}
        if self.vocab_size > vocab_size and not is_idle:
            raise ValueError(
                f"the tokenizer has ids up to {self.vocab_size - 1}, the model's vocab_size is {vocab_size}: "
                "tokenizer.json and config.json do not belong together"
            )

    def with_control_tokens(self, tokens: Iterable[str]) -> Self:
        """The same tokenizer, for which these added tokens are control tokens too."""
        return type(self)(
            self._parsing,
            config=self._config,
            eos_token_ids=self.eos_token_ids,
            bos_token_id=self.bos_token_id,
            control_tokens={*self.control_tokens, *tokens},
        )

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches the text of any control token, the longest first."""
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def normalizes_to_control(self, text: str) -> bool:
        """Whether the text of a control token appears where the tokenizer normalises this text."""
        normalizer = self._parsing.normalizer
        if normalizer is None:
            return False
        with panics_caught("the tokenizer's normaliser"):
            normalized = normalizer.normalize_str(text)
        return any(form in normalized for form in self._normalized_controls)

    @cached_property
    def _normalized_controls(self) -> frozenset[str]:
        forms = map(self._parsing.normalizer.normalize_str, self.control_tokens)
        return self.control_tokens | {form.strip("▁ ") for form in forms} - {""}

    @cached_property
    def _token_bound(self) -> TokenBound | None:
        return token_bound(self._parsing)

    @cached_property
    def control_affixes(self) -> tuple[frozenset[str], frozenset[str], int]:
        """(what control tokens begin with, what they end with, the longest of both); whole tokens excepted."""
        beginnings = {token[:size] for token in self.control_tokens for size in range(1, len(token))}
        endings = {token[size:] for token in self.control_tokens for size in range(1, len(token))}
        return frozenset(beginnings), frozenset(endings), max(map(len, beginnings), default=0)

    @cached_property
    def backend_json(self) -> str:
        """tokenizer.json as the parsing instance holds it, for grammars."""
        return self._parsing.to_str()

    @cached_property
    def _control_ids(self) -> frozenset[int | None]:
        # The unknown token is what plain text may well become.
        unknown = getattr(self._parsing.model, "unk_token", None)
        return frozenset(self.token_to_id(token) for token in self.control_tokens if token != unknown)

    def _id_of(self, name: str, fallback: int | None) -> int | None:
        token = self.template_tokens.get(name)
        found = None if token is None else self.token_to_id(token)
        return fallback if found is None else found

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What encoding puts before and after a text by the post-processor. As in transformers 5, `add_bos_token` and
        `add_eos_token` of tokenizer_config.json change nothing beside a tokenizer.json."""
        bare = self._parsing.encode(_PROBE, add_special_tokens=False).ids
        full = self._parsing.encode(_PROBE, add_special_tokens=True).ids
        starts = range(len(full) - len(bare) + 1)
        start = next((i for i in starts if full[i : i + len(bare)] == bare), 0)
        return tuple(full[:start]), tuple(full[start + len(bare) :])


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty where there is none."""
    return read_json_if_there(folder / "tokenizer_config.json", limit=MAX_TOKENIZER_CONFIG_BYTES)


def other_tokenizer(folder: Path) -> str | None:
    """The file of a tokenizer in another form than tokenizer.json, where there is one in its place."""
    if (folder / "tokenizer.json").exists() or (folder / "params.json").exists():  # Meta's release is no such folder
        return None
    return next((name for name in ("tokenizer.model", "vocab.json") if (folder / name).exists()), None)


def _conversion(folder: Path) -> str:
    name = other_tokenizer(folder)
    if name is None:
        return ""
    where = str(folder)
    return f"make it of {name} with transformers: AutoTokenizer.from_pretrained({where!r}).save_pretrained({where!r})"


def _add_tokens(backend: tokenizers.Tokenizer, listed: Any) -> None:
    """Tokens that stand only in `added_tokens_decoder`, in the order of their ids."""
    if not isinstance(entries := listed or {}, dict):
        raise ValueError(f"added_tokens_decoder must be an object of tokens by their ids, got {type(listed).__name__}")
    for key, entry in sorted(entries.items(), key=lambda item: (len(item[0]), item[0])):
        if not isinstance(entry, dict) or not isinstance(content := entry.get("content"), str) or not content:
            raise ValueError(f"added_tokens_decoder[{key!r}] must be an object with content")
        if backend.token_to_id(content) is not None:
            continue
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        given = {flag: entry[flag] for flag in flags if isinstance(entry.get(flag), bool)}
        backend.add_tokens([tokenizers.AddedToken(content, **given)])
        if str(got := backend.token_to_id(content)) != key:
            raise ValueError(f"added_tokens_decoder: {content!r} cannot have the id {key}, the next one is {got}")


def _add_special_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that are named in lists alone. Refuses what splits all of them, and a role for what is no token."""
    if config.get("split_special_tokens"):
        raise ValueError("split_special_tokens is not supported: no chat template would work")
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        entry = config.get(name)
        if not isinstance(entry.get("content", entry) if isinstance(entry, dict) else entry, str | None):
            raise ValueError(f"{name} must be a token, got {entry!r}")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(name) or []
        for entry in listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else [None]:
            content = entry.get("content") if isinstance(entry, dict) else entry
            if not isinstance(content, str) or not content:
                raise ValueError(f"{name} must list tokens, got {entry!r}")
            if content not in known:
                backend.add_special_tokens([content])


def check_unicode(text: str, field: str | None = None) -> None:
    """Raises ParameterError, about this field of a request, for a lone surrogate, which no UTF-8 text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        what = f"{field or 'text'} holds the lone surrogate U+{found:04X} at position {error.start}"
        raise ParameterError(what, field) from None


def _control_tokens(backend: tokenizers.Tokenizer, named: Collection[str]) -> frozenset[str]:
    """The added tokens that steer the model. Fine-tunes do not always flag theirs as special: what looks like markup
    counts all the same."""
    added = backend.get_added_tokens_decoder().values()
    return frozenset(t.content for t in added if t.special or t.content in named or _MARKUP.fullmatch(t.content))


def _two_instances(
    backend: tokenizers.Tokenizer, named: Collection[str], control: Collection[str]
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """(parsing, plain). A special token, and an added token that has a role, is special for both.

    If it were matched after normalisation, text that merely normalises to it could forge it, so both match it
    literally. The other control tokens are parsed as the file says: see `normalizes_to_control`.
    """
    added = sorted(backend.get_added_tokens_decoder().items())
    tokens = [t for _, t in added]
    parsing = backend
    if any((t.special or t.content in named) and (not t.special or t.normalized) for t in tokens):
        parsing = _rebuilt(backend, [_literal(t) if t.special or t.content in named else t for t in tokens])
    plain = _rebuilt(backend, [_literal(t) if t.content in control else t for t in tokens])
    plain.encode_special_tokens = True
    for instance in (parsing, plain):
        if any(instance.token_to_id(t.content) != i for i, t in added):
            raise ValueError("its added tokens do not have the ids that follow from its vocabulary")
    return parsing, plain


def _literal(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=True,
    )


def _rebuilt(backend: tokenizers.Tokenizer, added: list[tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    """Another tokenizer over the same model: the vocabulary, by far the largest part, is shared."""
    other = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(backend, part) is not None:
            setattr(other, part, getattr(backend, part))
    other.add_tokens(added)
    return other


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, in either of their two spellings."""
    named = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str) and text:
            named[name] = text
    return named


def _model_ids(folder: Path) -> tuple[frozenset[int], int | None]:
    """EOS ids and the BOS id of generation_config.json, else of config.json."""
    found: dict[str, tuple[int, ...]] = {}
    for file in (folder / "generation_config.json", folder / "config.json"):
        values = read_json_if_there(file)
        for key in ("eos_token_id", "bos_token_id"):
            if not found.get(key):
                with named(file):
                    found[key] = token_ids(key, values.get(key))
    return frozenset(found["eos_token_id"]), next(iter(found["bos_token_id"]), None)


@contextmanager
def _usable(file: Path) -> Iterator[None]:
    """tokenizers raises a bare Exception for whatever its parser finds, and panics."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise CheckpointError(f"{file}: is not a usable tokenizer: {' '.join(str(error).split())[:200]}") from None
