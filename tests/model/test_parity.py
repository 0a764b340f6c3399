"""Logits equal transformers' LlamaForCausalLM, from checkpoints that transformers saved and our loader read."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama import LLM, SamplingParams
from llama.model.transformer import Transformer

LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA_3_2 = {**LLAMA_3_1, "factor": 32.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}

# heads, kv heads, head_dim, hidden, tied, rope scaling, batch
GRID = [
    (4, 2, 16, 64, False, None, 1),
    (4, 4, 16, 64, True, None, 2),
    (4, 1, 32, 128, False, LLAMA_3_1, 3),
    (6, 2, 64, 96, True, LLAMA_3_2, 2),  # head_dim is not hidden / heads
    (2, 1, 128, 96, False, LLAMA_3_1, 1),
    (9, 3, 16, 144, True, LLAMA_3_1, 3),
    (8, 1, 16, 128, True, None, 1),
    (3, 3, 80, 48, False, LLAMA_3_2, 2),
]


def name(case):
    heads, kv_heads, head_dim, hidden, tied, scaling, batch = case
    rope = f"llama3x{scaling['factor']:g}" if scaling else "default"
    return f"{heads}q{kv_heads}kv-{head_dim}-of-{hidden}-{'tied' if tied else 'untied'}-{rope}-batch{batch}"


def build(heads, kv_heads, head_dim, hidden, tied, scaling, dtype, **options):
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=hidden,
        intermediate_size=2 * hidden + 6,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})},
        **options,
    )
    torch.manual_seed(heads * 1000 + head_dim)
    model = LlamaForCausalLM(config).eval().to(dtype)
    for parameter in model.parameters():  # far from the tame initial values, so that attention is sharp
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def both_logits(model, path, batch):
    model.save_pretrained(path)
    ids = torch.randint(0, 131, (batch, 150))  # past original_max_position_embeddings
    with torch.no_grad():
        expected = model(ids).logits
    return Transformer.from_pretrained(path).logits(ids), expected


@pytest.mark.parametrize("case", GRID, ids=name)
def test_float32_logits(case, tmp_path):
    *sizes, batch = case
    ours, theirs = both_logits(build(*sizes, torch.float32), tmp_path, batch)
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.fixture
def float64_norms(monkeypatch):
    # transformers computes its norms in float32 whatever the model's dtype, which alone moves a float64 logit by 1e-7;
    # so its norm is given the same formula in float64 here. Its rotary angles are float32 in float64 models, as ours.
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.mark.parametrize("case", GRID, ids=name)
def test_float64_logits(case, tmp_path, float64_norms):
    *sizes, batch = case
    ours, theirs = both_logits(build(*sizes, torch.float64), tmp_path, batch)
    assert ours.dtype == torch.float64
    assert (ours - theirs).abs().max() <= 1e-9


# Rope scaling and biases of what people published beside Llama 3: long-context Llama 2, DeepSeek-Coder, Yi, InternLM.
VARIANTS = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {}),
    "linear below one": ({"rope_type": "linear", "factor": 0.5}, {}),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, {}),
    "yarn": (YARN, {}),
    "yarn, untruncated": ({**YARN, "truncate": False, "beta_fast": 16, "beta_slow": 2}, {}),
    "yarn, factor of attention": ({**YARN, "attention_factor": 0.7}, {}),
    "yarn, mscale": ({**YARN, "mscale": 0.707, "mscale_all_dim": 1.3}, {}),
    "yarn, steep": ({**YARN, "original_max_position_embeddings": 1}, {}),
    "attention bias": (None, {"attention_bias": True}),
    "mlp bias": (LLAMA_3_1, {"mlp_bias": True}),
    "both biases": (YARN, {"attention_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_variants(variant, tmp_path, float64_norms):
    scaling, options = VARIANTS[variant]
    heads, head_dim, hidden = (6, 32, 96) if variant.startswith("yarn") else (4, 16, 64)
    model = build(heads, 2, head_dim, hidden, True, scaling, torch.float64, **options)
    ours, theirs = both_logits(model, tmp_path / "theirs", 1)
    assert (ours - theirs).abs().max() <= 1e-10
    saved = Transformer.from_pretrained(tmp_path / "theirs")
    saved.save_pretrained(tmp_path / "ours")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    ids = torch.randint(0, 131, (1, 40))
    with torch.no_grad():
        assert (saved.logits(ids) - again(ids).logits).abs().max() <= 1e-10
    assert Transformer.from_pretrained(tmp_path / "ours").config == saved.config
    saved.float().prepare()
    assert (saved.logits(ids) - again(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("scaling", [VARIANTS["linear"][0], {**YARN, "factor": 16.0}], ids=["linear", "yarn"])
def test_beyond_max_position_embeddings(scaling, tmp_path, float64_norms):
    """That key is the context before the stretching or behind it: transformers never multiplies it, nor stops there."""
    model = build(4, 2, 16, 64, True, scaling, torch.float64)
    ids = torch.randint(0, 131, (1, 400))
    model.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (ours.logits(ids) - model(ids).logits).abs().max() <= 1e-10
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 400:]
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm = LLM(ours, max_model_len=410, num_blocks=32)
    assert llm.generate(ids[0].tolist(), greedy, use_tqdm=False)[0].outputs[0].token_ids == expected.tolist()
    assert LLM(ours, num_blocks=32).engine.config.max_model_len == 256 < ours.config.longest_context


def test_float64_logits_with_float32_norms(tmp_path):
    *sizes, batch = GRID[2]
    ours, theirs = both_logits(build(*sizes, torch.float64), tmp_path, batch)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_close_to_float32_as_transformers(dtype, tmp_path):
    model = build(4, 2, 32, 128, False, LLAMA_3_1, torch.float32)
    ours, exact = both_logits(model, tmp_path, 2)
    torch.manual_seed(5)
    ids = torch.randint(0, 131, (2, 60))
    with torch.no_grad():
        exact = model(ids).logits
        theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)(ids).logits.float()
    ours = Transformer.from_pretrained(tmp_path, dtype=dtype).logits(ids)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()


def test_demo_weights(demo_model_path):
    reference = LlamaForCausalLM.from_pretrained(demo_model_path, dtype=torch.float32)
    ids = torch.randint(0, reference.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids).logits
    ours = Transformer.from_pretrained(demo_model_path, dtype=torch.float32).logits(ids)
    assert (ours - expected).abs().max() <= 2e-3
