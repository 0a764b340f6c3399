"""EngineConfig: the sizes and switches of an engine, each declared once. Runs without torch.

Whatever needs one of them is handed the whole value. LLM's keyword arguments and the command line's flags are these
fields: a new option is one field here, with its line of help.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin

from llama.api.errors import is_one_of, refusal
from llama.api.params import MAX_LOGPROBS
from llama.engine.speculative_config import BATCH_SIZES, SpeculativeConfig
from llama.model.config import ModelConfig
from llama.model.parallel import check_size
from llama.model.rope_scaling import DynamicScaling

# max_num_batched_tokens by the type of the device, which are also the devices that there are.
BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}
CPU_FRACTION = 0.4  # of what is free, for the KV cache


def _option(
    default: Any, help: str, least: int | None = None, most: int = 2**31 - 1, *, short: str | None = None
) -> Any:
    """`least` and `most`: the legal values of an integer; `short`: the flag's other name."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "short": short})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Every value is checked; a ParameterError names the field and what is legal.

    None stands for the default. Where that is None itself it is the model's or the device's own: `resolved` puts it in.
    """

    max_model_len: int | None = _option(None, "tokens of context, prompt and answer together (the model's)", least=2)
    max_num_seqs: int = _option(256, "completions that may run at once", least=1, most=65536)
    max_num_batched_tokens: int | None = _option(
        None, "the most tokens of one step (8192 on CUDA, 2048 on the CPU)", least=1
    )
    scheduling_policy: Literal["fcfs", "priority"] = _option(
        "fcfs", "who runs first: fcfs = who came first, priority = whose SamplingParams.priority is lower"
    )
    block_size: int = _option(16, "tokens of a block of KV cache, a power of two", least=1)
    num_blocks: int | None = _option(None, "blocks of KV cache (what memory allows)", least=1)
    gpu_memory_utilization: float = _option(0.9, "share of the GPU's memory that may be used, above 0 and up to 1")
    cpu_memory_utilization: float = _option(
        CPU_FRACTION, "share of the CPU's free memory that the KV cache may take, above 0 and up to 1"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "fp8", "fp8_e4m3"] = _option(
        "auto", "dtype of K and V, auto = the model's; fp8 takes half of bfloat16, with the checkpoint's scales or 1"
    )
    enable_prefix_caching: bool = _option(True, "keep K and V of prompts for later ones that begin alike")
    enforce_eager: bool = _option(False, "run without CUDA graphs")
    record_prompts: bool = _option(False, "CUDA graphs for steps with few tokens of prompts too, not for decodes alone")
    deterministic: bool = _option(False, "the same bits for a request alone and in any batch (docs/deterministic.md)")
    fused_decode: bool = _option(
        False, "norms, SwiGLU and residuals within the matrix products of steps of up to 64 tokens (CUDA)"
    )
    max_loras: int = _option(8, "adapters that may work in one step, 0 = none are taken", least=0)
    max_lora_rank: int = _option(64, "the largest rank of an adapter", least=1)
    max_lora_bytes: int | None = _option(
        None, "bytes of adapters that may be loaded (a tenth of the free memory)", least=1, most=2**63 - 1
    )
    speculative_config: Mapping[str, Any] | None = _option(
        None, 'verify drafts of the next tokens, such as {"method": "ngram", "num_speculative_tokens": 4}'
    )
    max_logprobs: int = _option(
        MAX_LOGPROBS, "log-probabilities of a token that a request may ask for, -1 = all (on the CPU)", least=-1
    )
    tensor_parallel_size: int = _option(
        1, "ranks that share the model: GPUs, or processes on the CPU", least=1, most=1024, short="-tp"
    )
    step_timeout: int = _option(60, "seconds after which ranks that are stuck in a step are given up", least=1)
    seed: int | None = _option(None, "makes the whole run repeatable (fresh entropy for requests without a seed)")

    def __post_init__(self) -> None:
        for option in fields(self):
            if getattr(self, option.name) is None:
                object.__setattr__(self, option.name, option.default)
            name, value, least = option.name, getattr(self, option.name), option.metadata["least"]
            most = option.metadata["most"]
            if least is not None and value is not None and not (_is_integer(value) and least <= value <= most):
                raise refusal(name, f"an integer from {least} to {most}", value)
            if get_origin(option.type) is Literal and not is_one_of(value, get_args(option.type)):
                raise refusal(name, f"one of {', '.join(get_args(option.type))}", value)
            if isinstance(option.default, bool) and not isinstance(value, bool):
                raise refusal(name, "True or False", value)
        if self.block_size & (self.block_size - 1):
            raise refusal("block_size", "a power of two", self.block_size)
        for name in ("gpu_memory_utilization", "cpu_memory_utilization"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise refusal(name, "in (0, 1]", share)
        if _is_integer(self.seed) and self.seed == -1:  # as others write None
            object.__setattr__(self, "seed", None)
        if self.seed is not None and (not _is_integer(self.seed) or not 0 <= self.seed < 1 << 64):
            raise refusal("seed", "an integer from 0 to 2**64 - 1, or None", self.seed)
        if self.speculative_config is not None:
            SpeculativeConfig.of(self.speculative_config)

    def resolved(self, model: ModelConfig, device: str) -> "EngineConfig":
        """With the context of this model and the budget of this type of device where none is given."""
        most = model.longest_context
        asked = model.max_position_embeddings if self.max_model_len is None else self.max_model_len
        if asked > most:
            why = "max_position_embeddings"
            if most > model.max_position_embeddings:
                why = "the context that RoPE was stretched to"
            elif isinstance(model.rope_scaling, DynamicScaling):
                why += "; beyond it dynamic RoPE would make a text depend on its neighbours"
            raise refusal("max_model_len", f"an integer in [2, {most}] ({why})", asked)
        if device != "cpu" and not 0 <= self.max_logprobs <= MAX_LOGPROBS:
            raise refusal("max_logprobs", f"at most {MAX_LOGPROBS} on {device}", self.max_logprobs)
        check_size(model, self.tensor_parallel_size)
        if self.deterministic and self.tensor_parallel_size > 2:  # the order of three summands is the library's
            raise refusal("tensor_parallel_size", "1 or 2 with deterministic", self.tensor_parallel_size)
        if self.fused_decode and (self.deterministic or self.tensor_parallel_size > 1):
            raise refusal("fused_decode", "False with deterministic or several ranks", True)
        if self.record_prompts and (self.deterministic or self.enforce_eager or self.speculative_config is not None):
            raise refusal("record_prompts", "False with deterministic, enforce_eager or speculative_config", True)
        budget = self.max_num_batched_tokens or BATCHED_TOKENS[device]
        speculative = self.speculative_config
        if speculative is not None:
            most_sequences = speculative.get("disable_by_batch_size") or BATCH_SIZES[device]
            speculative = {**speculative, "disable_by_batch_size": most_sequences}
        return replace(self, max_model_len=asked, max_num_batched_tokens=budget, speculative_config=speculative)

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """What speculative_config says; None = there are no drafts."""
        return None if self.speculative_config is None else SpeculativeConfig.of(self.speculative_config)

    @property
    def most_samples(self) -> int:
        """The most tokens drawn in one step."""
        speculation = self.speculation
        if speculation is None:
            return self.max_num_seqs
        most_runs = min(self.max_num_seqs, speculation.disable_by_batch_size or self.max_num_seqs)
        return self.max_num_seqs + most_runs * speculation.num_speculative_tokens

    @property
    def context_len(self) -> int:
        """max_model_len, which must be resolved."""
        assert self.max_model_len is not None, "the configuration is not resolved"
        return self.max_model_len

    @property
    def token_budget(self) -> int:
        """max_num_batched_tokens, which must be resolved."""
        assert self.max_num_batched_tokens is not None, "the configuration is not resolved"
        return self.max_num_batched_tokens

    @property
    def blocks_per_sequence(self) -> int:
        """The most blocks that one sequence can fill: the width of block tables."""
        return -(-self.context_len // self.block_size)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
