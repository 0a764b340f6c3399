"""Meta's release -> Hugging Face folder: the same tokens, the same logits, whatever the number of ranks."""

import base64
import json
import os
import re

import pytest
import torch
from convert_meta import main
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from llama import LLM
from llama.cli import main as command
from llama.convert.meta import SPECIAL_TOKENS, convert, feed_forward_size, merges_from_ranks, read_ranks
from tests.convert.corpus import random_characters, texts

PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 512,  # 256 bytes and 256 special tokens
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}


@pytest.fixture(scope="module")
def meta_folder(meta_tokenizer_path):
    return meta_tokenizer_path / "llama_models" / "llama3"


@pytest.fixture(scope="module")
def converted(meta_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("meta") / "tokenizer"
    main(["--input", str(meta_folder), "--output", str(output), "--tokenizer-only"])
    return output


@pytest.fixture(scope="module")
def corpus():
    result = [*texts(220_000), random_characters(4_000)]
    assert sum(map(len, result)) >= 200_000
    return result


def test_text_with_special_tokens_parsed(converted, meta_tokenizer, corpus):
    ours = Tokenizer.from_file(str(converted / "tokenizer.json"))
    for text in corpus:
        expected = meta_tokenizer.encode(text, bos=True, eos=False, allowed_special="all")
        assert ours.encode(text).ids == expected, repr(text)
        assert ours.decode(expected, skip_special_tokens=False) == meta_tokenizer.decode(expected), repr(text)


def test_text_with_special_tokens_as_plain_text(converted, meta_tokenizer, corpus):
    ours = Tokenizer.from_file(str(converted / "tokenizer.json"))
    ours.encode_special_tokens = True
    for text in corpus:
        expected = meta_tokenizer.encode(text, bos=False, eos=False)
        assert ours.encode(text, add_special_tokens=False).ids == expected, repr(text)
        assert ours.decode(expected, skip_special_tokens=False) == text


def test_every_token_decodes_alone_and_in_any_company(converted, meta_tokenizer):
    ours = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert ours.get_vocab_size() == meta_tokenizer.n_words == 128256
    for token_id in range(meta_tokenizer.n_words):
        assert ours.decode([token_id], skip_special_tokens=False) == meta_tokenizer.decode([token_id])
    order = torch.randperm(meta_tokenizer.n_words, generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(0, len(order), 64):  # halves of characters meet
        ids = order[i : i + 64]
        assert ours.decode(ids, skip_special_tokens=False) == meta_tokenizer.decode(ids)


def test_transformers_loads_the_tokenizer(converted, meta_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "  Hello,\n\n world's <|eot_id|>  123456 end"
    assert tokenizer(text).input_ids == meta_tokenizer.encode(text, bos=True, eos=False, allowed_special="all")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (128000, 128009, 128004)
    assert not (converted / "chat_template.jinja").exists()
    assert not (converted / "config.json").exists()


def test_merges_stand_in_the_order_of_their_result():
    ranks = {b"a": 0, b"b": 1, b"ab": 2, b"ba": 3, b"aba": 4, b"xyz": 5}
    merges = [(b"a", b"b"), (b"b", b"a"), (b"a", b"ba"), (b"ab", b"a")]
    assert merges_from_ranks(ranks) == merges  # nothing makes xyz: only a whole word is that token


@pytest.mark.parametrize("line", ["YQ==", "YQ== one", "??? 1", "YQ== 5"])
def test_broken_ranks_are_refused(tmp_path, line):
    path = tmp_path / "tokenizer.model"
    path.write_text(f"Yg== 0\n{line}\n")
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        read_ranks(path)


@pytest.mark.parametrize(
    ("params", "size"),
    [
        ({"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}, 14336),  # 8B
        ({"dim": 8192, "ffn_dim_multiplier": 1.3, "multiple_of": 4096}, 28672),  # 70B
        ({"dim": 16384, "ffn_dim_multiplier": 1.2, "multiple_of": 4096}, 53248),  # 405B
        ({"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256}, 8192),  # 3.2 1B
        ({"dim": 3072, "ffn_dim_multiplier": 1.0, "multiple_of": 256}, 8192),  # 3.2 3B
        ({"dim": 4096, "multiple_of": 256}, 11008),
    ],
)
def test_feed_forward_size(params, size):
    assert feed_forward_size(params) == size


# Weights


def meta_weights(params, seed=0):
    """Whole tensors under Meta's names, random."""
    generator = torch.Generator().manual_seed(seed)
    dim, head_dim, wide = params["dim"], params["dim"] // params["n_heads"], feed_forward_size(params)
    kv_rows = params["n_kv_heads"] * head_dim

    def random(*shape):
        return torch.randn(shape, generator=generator) * (dim**-0.5 if len(shape) == 2 else 1)

    weights = {"tok_embeddings.weight": random(params["vocab_size"], dim) * dim**0.5}
    for i in range(params["n_layers"]):
        weights |= {
            f"layers.{i}.attention.wq.weight": random(dim, dim),
            f"layers.{i}.attention.wk.weight": random(kv_rows, dim),
            f"layers.{i}.attention.wv.weight": random(kv_rows, dim),
            f"layers.{i}.attention.wo.weight": random(dim, dim),
            f"layers.{i}.feed_forward.w1.weight": random(wide, dim),
            f"layers.{i}.feed_forward.w2.weight": random(dim, wide),
            f"layers.{i}.feed_forward.w3.weight": random(wide, dim),
            f"layers.{i}.attention_norm.weight": random(dim),
            f"layers.{i}.ffn_norm.weight": random(dim),
        }
    return weights | {"norm.weight": random(dim), "output.weight": random(params["vocab_size"], dim)}


# Axis along which Meta's parallel layers split each tensor (llama-models, model.py: column, row, vocabulary).
AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "tok_embeddings": 0, "output": 0}


def write_meta(folder, params, weights, ranks):
    """params.json, a tokenizer of the 256 bytes, and one .pth per rank."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (folder / "tokenizer.model").write_text("".join(lines))
    for rank in range(ranks):
        part = {}
        for name, weight in weights.items():
            axis = AXES.get(name.split(".")[-2])
            part[name] = weight if axis is None else weight.chunk(ranks, axis)[rank].clone()
        part["rope.freqs"] = torch.zeros(4, dtype=torch.float64)  # some releases hold it; it says nothing new
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")


def meta_logits(params, weights, token_ids, factor):
    """Meta's forward pass (interleaved RoPE as complex numbers) in float64. token_ids [seq] -> [seq, vocab]"""
    w = {name: weight.double() for name, weight in weights.items()}
    heads, kv_heads = params["n_heads"], params["n_kv_heads"]
    head_dim, seq = params["dim"] // heads, len(token_ids)
    frequencies = params["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    if params["use_scaled_rope"]:
        turns = 8192 * frequencies / (2 * torch.pi)
        smooth = ((turns - 1) / (4 - 1)).clamp(0, 1)
        frequencies = frequencies * ((1 - smooth) / factor + smooth)
    angles = torch.outer(torch.arange(seq).double(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + params["norm_eps"]).rsqrt() * w[name]

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(2)

    hidden = w["tok_embeddings.weight"][token_ids]
    mask = torch.full((seq, seq), -torch.inf, dtype=torch.float64).triu(1)
    for i in range(params["n_layers"]):
        x = norm(hidden, f"layers.{i}.attention_norm.weight")
        q, k, v = (x @ w[f"layers.{i}.attention.w{name}.weight"].T for name in "qkv")
        q, k = rotate(q.unflatten(-1, (heads, -1))), rotate(k.unflatten(-1, (kv_heads, -1)))
        k = k.repeat_interleave(heads // kv_heads, 1)
        v = v.unflatten(-1, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5 + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        hidden = hidden + mixed @ w[f"layers.{i}.attention.wo.weight"].T
        x = norm(hidden, f"layers.{i}.ffn_norm.weight")
        gate, up = (x @ w[f"layers.{i}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ w[f"layers.{i}.feed_forward.w2.weight"].T
    return norm(hidden, "norm.weight") @ w["output.weight"].T


STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("scaled", [True, False])
def test_shards_give_metas_logits(tmp_path, ranks, scaled):
    params = PARAMS | {"use_scaled_rope": scaled}
    weights = meta_weights(params)
    write_meta(tmp_path / "meta", params, weights, ranks)
    main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "hf")])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == (131072 if scaled else 8192)
    assert model.generation_config.eos_token_id == [256 + SPECIAL_TOKENS.index(token) for token in STOP_TOKENS]
    token_ids = torch.arange(24) * 7 % params["vocab_size"]
    expected = meta_logits(params, weights, token_ids, factor=8)
    found = model(token_ids[None]).logits[0].double()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()  # float32


def test_params_that_say_nothing_of_the_network_are_taken(tmp_path):
    params = PARAMS | {"max_seq_len": 4096, "max_batch_size": 4, "head_dim": 8, "moe_args": None, "use_qk_norm": False}
    write_meta(tmp_path / "meta", params, meta_weights(params), 1)
    main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "hf")])
    assert LLM(tmp_path / "hf", num_blocks=4).model.config.num_hidden_layers == 2


def test_the_command_converts_and_tells_the_defaults(tmp_path, capsys):
    write_meta(tmp_path / "meta", PARAMS, meta_weights(PARAMS), 1)
    assert command(["convert", str(tmp_path / "meta"), str(tmp_path / "hf"), "--rope-factor", "32"]) == 0
    said = f"wrote {tmp_path / 'hf'}\na request that names no sampling gets temperature 0.6, top_p 0.9: see"
    assert capsys.readouterr().out.startswith(said)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_scaling"]["factor"] == 32
    assert command(["convert", str(tmp_path / "meta"), str(tmp_path / "again"), "--dtype", "float32"]) == 2
    assert "--dtype and --keep-quantised are for a GGUF file" in capsys.readouterr().err
    (tmp_path / "meta" / "params.json").unlink()
    assert command(["convert", str(tmp_path / "meta"), str(tmp_path / "again")]) == 1
    assert capsys.readouterr().err.startswith(f"llama: {tmp_path}/meta/params.json is missing")
    assert command(["convert", str(tmp_path / "meta"), str(tmp_path / "tokenizer"), "--tokenizer-only"]) == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()


def test_a_pipe_in_place_of_weights_is_named(tmp_path):
    write_meta(tmp_path / "meta", PARAMS, {"norm.weight": torch.ones(64)}, 1)
    path = tmp_path / "meta" / "consolidated.00.pth"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth cannot be read as tensors .*not a regular file"):
        convert(tmp_path / "meta", tmp_path / "hf")


def test_scaling_by_another_factor(tmp_path):
    params = dict(PARAMS)
    write_meta(tmp_path / "meta", params, meta_weights(params), 1)
    main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "hf"), "--rope-factor", "32"])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == 32


def test_tied_head_is_stored_once_and_needs_the_factor(tmp_path):
    params = dict(PARAMS)
    weights = meta_weights(params)
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    write_meta(tmp_path / "meta", params, weights, 2)
    with pytest.raises(ValueError, match="--rope-factor"):
        convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "meta", tmp_path / "hf", rope_factor=32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.tie_word_embeddings
    token_ids = torch.arange(16)
    expected = meta_logits(params, weights, token_ids, factor=32)
    found = model(token_ids[None]).logits[0].double()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()  # float32


def test_bfloat16_stays_and_large_files_are_split(tmp_path):
    weights = {name: weight.bfloat16() for name, weight in meta_weights(PARAMS).items()}
    write_meta(tmp_path / "meta", PARAMS, weights, 2)
    convert(tmp_path / "meta", tmp_path / "hf", max_shard_bytes=100_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, weights["output.weight"])


ALL = "params.json, tokenizer.model and consolidated.*.pth"


@pytest.mark.parametrize(
    ("gone", "options", "message"),
    [
        ("", [], f"{{}} is no folder: the one that Meta's download made is needed, with {ALL}"),
        ("", ["--tokenizer-only"], "{} is no folder: the one that Meta's download made is needed, with tokenizer.m"),
        ("params.json", [], f"{{}}/params.json is missing: the folder that Meta's download made holds {ALL}"),
        ("tokenizer.model", [], f"{{}}/tokenizer.model is missing: the folder that Meta's download made holds {ALL}"),
        ("tokenizer.model", ["--tokenizer-only"], "{}/tokenizer.model is missing: the folder that Meta's download"),
        ("consolidated.00.pth", [], "{} holds no consolidated.*.pth"),
    ],
)
def test_what_is_missing_is_named_with_its_path(tmp_path, gone, options, message):
    folder = tmp_path / "meta"
    if gone:
        write_meta(folder, PARAMS, {"norm.weight": torch.ones(64)}, 1)
        (folder / gone).unlink()
    with pytest.raises(SystemExit, match=re.escape(message.format(folder))):
        main(["--input", str(folder), "--output", str(tmp_path / "hf"), *options])
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("gone", [[3], [1, 3], [0]])
def test_files_of_weights_that_are_missing_are_named(tmp_path, gone):
    write_meta(tmp_path / "meta", PARAMS, meta_weights(PARAMS), 4)
    names = [f"consolidated.{rank:02d}.pth" for rank in gone]
    for name in names:
        (tmp_path / "meta" / name).unlink()
    told = f"meta: the weights are cut into 4 files, and these are not there: {', '.join(names)}"
    with pytest.raises(SystemExit, match=re.escape(told)):
        main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "hf")])
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("text", "message"), [("{", "params.json: is not JSON"), ("[]", "must hold a JSON object")])
def test_params_that_cannot_be_read_are_named(tmp_path, text, message):
    write_meta(tmp_path / "meta", PARAMS, {"norm.weight": torch.ones(64)}, 1)
    (tmp_path / "meta" / "params.json").write_text(text)
    with pytest.raises(SystemExit, match=message):
        main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "hf")])


NOT_TENSORS = {
    "list": [1],
    "numbers": {"a": 1},
    "numbered": {5: torch.ones(1)},
    "sparse": {"norm.weight": torch.eye(4).to_sparse()},
    "without data": {"norm.weight": torch.ones(4, device="meta")},
}


@pytest.mark.parametrize("data", [b"", b"junk", *NOT_TENSORS])
def test_weights_that_cannot_be_read_are_named(tmp_path, data):
    write_meta(tmp_path / "meta", PARAMS, {"norm.weight": torch.ones(64)}, 1)
    path = tmp_path / "meta" / "consolidated.00.pth"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        torch.save(NOT_TENSORS[data], path)
    with pytest.raises(SystemExit, match=r"consolidated\.00\.pth (cannot be read as tensors|holds no tensors by name)"):
        main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "hf")])


def test_a_factor_that_would_be_ignored_is_refused(tmp_path):
    params = PARAMS | {"use_scaled_rope": False}
    write_meta(tmp_path / "meta", params, meta_weights(params), 1)
    with pytest.raises(SystemExit, match="--rope-factor 32 is given"):
        main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "hf"), "--rope-factor", "32"])


EMBEDDINGS = ("tok_embeddings.weight", "output.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, w: p.pop("rope_theta"), "params.json lacks rope_theta"),
        (lambda p, w: p.update(n_heads=0), "n_heads must be a positive integer, got 0"),
        (lambda p, w: p.update(multiple_of=0), "multiple_of must be a positive integer, got 0"),
        (lambda p, w: p.update(n_heads=None), "params.json lacks n_heads"),
        (lambda p, w: p.update(ffn_dim_multiplier="1.3"), "ffn_dim_multiplier must be a number in .*, got '1.3'"),
        (lambda p, w: p.update(ffn_dim_multiplier=float("inf")), "ffn_dim_multiplier must be a number in .*, got inf"),
        (lambda p, w: p.update(use_scaled_rope="false"), "use_scaled_rope must be true or false, got 'false'"),
        (lambda p, w: w.update({"tok_embeddings.weight": torch.ones(512)}), "two dimensions, found .512"),
        (lambda p, w: w.update({"norm.weight": torch.tensor(1.0)}), r"norm.weight: shards of \(\) do not make up"),
        (lambda p, w: w.pop("tok_embeddings.weight"), "lack tok_embeddings.weight"),
        (lambda p, w: p.update(vision_model={"x": 1}), "vision_model"),
        (lambda p, w: p.update(rope_scale_factor=32), "params.json has rope_scale_factor: only plain Llama"),
        (lambda p, w: w.pop("layers.1.ffn_norm.weight"), "layers.1.ffn_norm.weight"),
        (lambda p, w: w.update({"layers.0.attention.wq.bias": torch.zeros(8)}), "layers.0.attention.wq.bias"),
        (lambda p, w: p.update(multiple_of=64), "feed_forward"),
        (lambda p, w: w.update({"norm.weight": w["norm.weight"].half()}), "float16, float32"),
        (
            lambda p, w: w.update({name: w[name][:300] for name in EMBEDDINGS}),
            "has 512 tokens, the embeddings only 300",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, change, message):
    params = dict(PARAMS)
    weights = meta_weights(params)
    change(params, weights)
    write_meta(tmp_path / "meta", params, weights, 1)
    with pytest.raises(SystemExit, match=message):
        main(["--input", str(tmp_path / "meta"), "--output", str(tmp_path / "hf")])
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]
