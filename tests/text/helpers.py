"""Small tokenizers in the shape of Llama 3.1's and of SentencePiece's, written as checkpoint folders."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOT, EOM, PYTHON_TAG = "<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"
LLAMA_SPECIAL = [
    BOS,
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    EOM,
    EOT,
    PYTHON_TAG,
    "<|finetune_right_pad_id|>",
]
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    'The user asks for the weather in Paris: {"name": "get_weather", "parameters": {"city": "Paris"}}',
    "system user assistant ipython hello there, how are you today? \n\n  4 spaces and 12345 digits\n",
    "naïve café, 你好世界, مرحبا, नमस्ते, 👩‍👩‍👧 🇫🇷 👍🏽",
]


def llama_backend() -> tokenizers.Tokenizer:
    """Byte-level BPE with Llama 3.1's pre-tokenizer, special tokens (after the vocabulary) and BOS post-processor."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    backend.add_special_tokens(LLAMA_SPECIAL)
    bos = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return backend


def sentencepiece_backend() -> tokenizers.Tokenizer:
    """BPE with byte fallback and the Prepend/Replace normaliser, as Llama 2's converted tokenizer has it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdehilorstuwy", "▁h", "he", "ll"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "h"), ("h", "e"), ("l", "l")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in pieces[:3]])
    bos = ("<s>", 1)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return backend


def metaspace_backend(prepend_scheme: str) -> tokenizers.Tokenizer:
    """The same with a pre-tokenizer in the normaliser's place, as newer conversions have it. "first": the space stands
    before the beginning of a text alone, "always" behind special tokens too."""
    backend = sentencepiece_backend()
    state = json.loads(backend.to_str()) | {"normalizer": None}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    return backend


def write_checkpoint(folder: Path, backend: tokenizers.Tokenizer, **files: object) -> Path:
    """A folder with tokenizer.json and the named JSON files: write_checkpoint(p, b, config={"eos_token_id": 2})."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def every_cut(text: str):
    """All ways to cut a text into two pieces, and the way into single characters."""
    for i in range(len(text) + 1):
        yield [text[:i], text[i:]]
    yield list(text)


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

# Trims, quotes and refuses like the templates of instruct checkpoints, and prints each thing that it is given.
TOOL_TEMPLATE = """
{{- bos_token }}
{%- if date_string is defined %}{{ "DATE " + date_string }}{% endif %}
{%- if tools is not none %}
    {%- for tool in tools %}{{- "TOOL " + (tool | tojson) + "\\n" }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
    {%- if "tool_calls" in message %}
        {%- for call in message.tool_calls %}
            {{- "CALL " + call.function.name + " " + (call.function.arguments | tojson) }}
        {%- endfor %}
    {%- elif message.role == "tool" %}
        {{- "RESULT " + (message.content | tojson) }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}
"""
