"""Networks with parts of one's own: they load, save, generate, capture; what does not fit is told."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llama import LLM, Capture, CheckpointError, SamplingParams, Transformer
from llama.kernels import ops
from llama.model.linear import Linear
from llama.model.module import Module
from llama.model.transformer import Attention, RMSNorm
from tests.model.models import tiny_config, tiny_model


class QKNormAttention(Attention):
    """Queries and keys are normed, each head by itself, before they are rotated."""

    def __init__(self, config, *, device, dtype):
        super().__init__(config, device=device, dtype=dtype)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, device=device, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, device=device, dtype=dtype)

    def forward(self, x, batch, cos_sin, kv_layer):
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv_proj(x, batch.adapters).view(len(x), heads, self.head_dim)
        q, k, v = qkv.split_with_sizes((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q = self.q_norm(q.reshape(-1, self.head_dim))[0].view(q.shape)
        k = self.k_norm(k.reshape(-1, self.head_dim))[0].view(k.shape)
        q = ops.rope_and_store(q, k, v, cos_sin, kv_layer, batch)
        return self.o_proj(ops.paged_attention(q, kv_layer, batch, self.scale).flatten(1), batch.adapters)


class GeluMLP(Module):
    def __init__(self, config, *, device, dtype):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, device=device, dtype=dtype)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, device=device, dtype=dtype)

    def forward(self, x, batch):
        return self.down_proj(F.gelu(self.up_proj(x)))


IDS = torch.randint(0, 97, (2, 23), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    model = Transformer(tiny_config(), dtype=torch.float64, attention=QKNormAttention, mlp=GeluMLP)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def test_every_parameter_is_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "own")
    again = Transformer.from_pretrained(tmp_path / "own", attention=QKNormAttention, mlp=GeluMLP)
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert torch.equal(again.logits(IDS), model.logits(IDS))
    with pytest.raises(CheckpointError, match=r"(?s)missing tensors.*gate_proj"):
        Transformer.from_pretrained(tmp_path / "own")


def test_an_engine_runs_it(model):
    llm = LLM(model, block_size=4, num_blocks=100, max_num_batched_tokens=9)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    outputs = llm.generate(IDS.tolist(), params, capture=Capture("layers.1.resid_post"), use_tqdm=False)
    for prompt, output in zip(IDS.tolist(), outputs, strict=True):
        ids = prompt + output.outputs[0].token_ids
        logits = model.logits(torch.tensor([ids]))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output.outputs[0].token_ids
        assert output.captured["layers.1.resid_post"].shape == (1, 48)


def test_it_can_be_differentiated(model):
    logits, cache = model.run_with_cache(IDS, "embed", logits=True, grad=True)
    assert torch.autograd.grad(logits.sum(), cache["embed"])[0].abs().max() > 0


def test_what_a_checkpoint_lacks_starts_at_random_and_is_named(tmp_path):
    llama = tiny_model()
    llama.save_pretrained(tmp_path / "llama")
    with pytest.warns(UserWarning, match=r"has nothing for layers\.0\.self_attn\.q_norm\.weight, .*start at random"):
        grown = Transformer.from_pretrained(tmp_path / "llama", attention=QKNormAttention)
    assert torch.equal(grown.layers[0].self_attn.q_norm.weight, torch.ones(16, dtype=torch.float64))
    assert torch.equal(grown.layers[1].self_attn.qkv_proj.weight, llama.layers[1].self_attn.qkv_proj.weight)
    with pytest.raises(CheckpointError, match=r"tensors that no part of the model takes: .*gate_proj"):
        Transformer.from_pretrained(tmp_path / "llama", mlp=GeluMLP)


def test_another_rope_base_is_a_config_of_its_own(tmp_path):
    llama = tiny_model()
    llama.save_pretrained(tmp_path / "llama")
    changed = Transformer.from_pretrained(tmp_path / "llama", config=replace(llama.config, rope_theta=500.0))
    expected = tiny_model(rope_theta=500.0).logits(IDS)
    assert torch.equal(changed.logits(IDS), expected) and not torch.equal(llama.logits(IDS), expected)
    with pytest.raises(AttributeError):
        llama.config = changed.config
