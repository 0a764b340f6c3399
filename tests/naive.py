"""The slow oracle: an uncached Llama straight from named weights, and a generation loop over it.

It shares nothing with what it judges: no cache, no batch, no fused weight, no kernel, nothing of llama.engine; softmax
is written out and K/V heads are repeated. Weights come under Hugging Face's names ("model.layers.0..."), and
everything is computed in their dtype, norms, rotary angles and softmax in at least float32.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from llama.model.config import ModelConfig


def _frequencies(config: ModelConfig) -> Tensor:
    """Wavelength by wavelength, as Meta's reference code does it."""
    scaling = config.rope_scaling
    frequencies = []
    for i in range(0, config.head_dim, 2):
        frequency = 1.0 / config.rope_theta ** torch.tensor(i / config.head_dim, dtype=torch.float32)
        if scaling is not None:
            wavelength = 2 * math.pi / frequency
            context = scaling.original_max_position_embeddings
            if wavelength > context / scaling.low_freq_factor:
                frequency = frequency / scaling.factor
            elif wavelength >= context / scaling.high_freq_factor:
                smooth = (context / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    return torch.stack(frequencies)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair (x[i], x[i + half]) turned by its angle; x [heads, seq, head_dim], angles [seq, half] float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = torch.cos(angles).to(wide.dtype), torch.sin(angles).to(wide.dtype)
    half = x.shape[-1] // 2
    first, second = wide[..., :half], wide[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, [heads, seq, head_dim]; q may be the last rows of a longer sequence."""
    queries, keys = q.shape[1], k.shape[1]
    repeats = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0)
    scores = (q @ k.transpose(1, 2)) / math.sqrt(q.shape[-1])
    scores = scores if scores.dtype == torch.float64 else scores.float()
    future = torch.arange(keys) > torch.arange(keys - queries, keys)[:, None]
    scores = scores.masked_fill(future, -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)).to(q.dtype) @ v


def forward(
    weights: Mapping[str, Tensor], config: ModelConfig, token_ids: Sequence[int], *, last: int | None = None
) -> Tensor:
    """Logits [seq, vocab] of one sequence, in the weights' dtype; with `last`, of that many last tokens alone."""
    ids = torch.tensor(list(token_ids))
    x = weights["model.embed_tokens.weight"][ids]
    angles = torch.arange(len(ids)).float()[:, None] * _frequencies(config)

    def heads(x: Tensor, name: str) -> Tensor:
        return (x @ weights[name].T).view(x.shape[0], -1, config.head_dim).transpose(0, 1)

    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        normed = _norm(x, weights[layer + "input_layernorm.weight"], config.rms_norm_eps)
        k, v = (heads(normed, f"{layer}self_attn.{p}_proj.weight") for p in "kv")
        k = _rotate(k, angles)
        if last is not None and i == config.num_hidden_layers - 1:
            x, normed, angles = x[-last:], normed[-last:], angles[-last:]
        q = _rotate(heads(normed, layer + "self_attn.q_proj.weight"), angles)
        mixed = _attend(q, k, v).transpose(0, 1).reshape(x.shape[0], -1)
        x = x + mixed @ weights[layer + "self_attn.o_proj.weight"].T
        normed = _norm(x, weights[layer + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = normed @ weights[layer + "mlp.gate_proj.weight"].T
        up = normed @ weights[layer + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[layer + "mlp.down_proj.weight"].T
    x = _norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return x @ weights[head].T


def greedy(logits: Tensor, token_ids: Sequence[int]) -> int:
    return int(logits.argmax())


def generate(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    choose: Callable[[Tensor, Sequence[int]], int] = greedy,
    stop_token_ids: Collection[int] = (),
) -> list[int]:
    """The tokens after `prompt`, the ending one included; everything is computed anew for each.

    `choose(logits [vocab], all tokens so far)` picks the next.
    """
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + max_tokens:
        token_ids.append(choose(forward(weights, config, token_ids, last=1)[0], token_ids))
        if token_ids[-1] in stop_token_ids:
            break
    return token_ids[len(prompt) :]
