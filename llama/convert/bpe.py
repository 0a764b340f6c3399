"""The tokenizer files of a byte-level BPE, built from its vocabulary, merges and special tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from llama.model.checkpoint.save import write_json

# Meta's pattern (llama-models, tokenizer.py): how text is cut into words before any merge.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """GPT-2's pattern between digits that each stand alone (so whitespace before a digit keeps together)."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def gpt2_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Bytes that print keep their own code point; the others follow one another from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def build_tokenizer(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    *,
    special_tokens: Sequence[str],
    user_tokens: Sequence[str] = (),
    bos_token: str | None,
    ignore_merges: bool,
) -> Tokenizer:
    """`ignore_merges`: a word that is in the vocabulary is one token, whatever the merges make of it (tiktoken).

    `bos_token` is put before every text that is encoded with special tokens; None = never.
    """
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_tokens])
    byte_level = processors.ByteLevel(trim_offsets=False)
    if bos_token is None:
        tokenizer.post_processor = byte_level
    else:
        bos = processors.TemplateProcessing(
            single=f"{bos_token}:0 $A:0",
            pair=f"{bos_token}:0 $A:0 {bos_token}:1 $B:1",
            special_tokens=[(bos_token, tokenizer.token_to_id(bos_token))],
        )
        tokenizer.post_processor = processors.Sequence([byte_level, bos])
    return tokenizer


def write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    model_max_length: int,
    special: Mapping[str, str | None],
    chat_template: str | None,
) -> None:
    """Write the tokenizer's files. `special` maps bos_token, eos_token, pad_token, unk_token to text."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    config.update({name: text for name, text in special.items() if text is not None})
    write_json(folder / "tokenizer_config.json", config)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
