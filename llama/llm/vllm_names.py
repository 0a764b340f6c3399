"""Arguments of vLLM's LLM that this one does not have: harmless at vLLM's default, refused by name otherwise."""

from collections.abc import Mapping
from typing import Any

from llama.api.errors import ParameterError
from llama.api.neutral import is_neutral

# Name -> the values that change nothing here. Defaults differ between vLLM's releases, so several may be listed.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "additional_config": (None, {}),
    "aggregate_engine_logging": (False,),
    "all2all_backend": (None,),
    "allow_deprecated_quantization": (False,),
    "allowed_local_media_path": ("",),
    "allowed_media_domains": (None,),
    "async_scheduling": (None, False),
    "attention_backend": (None,),
    "block_manager_version": ("v2",),
    "calculate_kv_scales": (False,),
    "code_revision": (None,),
    "collect_detailed_traces": (None,),
    "compilation_config": (None, 0),
    "config_format": ("auto",),
    "convert": ("auto",),
    "cpu_offload_gb": (0,),
    "cudagraph_capture_sizes": (None,),
    "data_parallel_backend": ("mp",),
    "data_parallel_rank": (None,),
    "data_parallel_size": (1,),  # engines of their own, and a balancer in front of them
    "data_parallel_size_local": (None,),
    "decode_context_parallel_size": (1,),
    "disable_async_output_proc": (False,),
    "disable_cascade_attn": (False,),
    "disable_chunked_mm_input": (False,),
    "disable_custom_all_reduce": (False,),
    "disable_hybrid_kv_cache_manager": (None, False),
    "disable_log_requests": (True, False),
    "disable_log_stats": (True, False),
    "disable_mm_preprocessor_cache": (False,),
    "disable_sliding_window": (False,),
    "distributed_executor_backend": (None, "mp", "uni"),  # ranks are processes of this machine
    "download_dir": (None,),
    "enable_chunked_prefill": (None, True),
    "enable_dbo": (False,),
    "enable_eplb": (False,),
    "enable_expert_parallel": (False,),
    "enable_lora": (None, False, True),  # adapters can be asked for always
    "enable_lora_bias": (False,),
    "enable_mm_embeds": (False,),
    "enable_prompt_embeds": (False,),
    "enable_sleep_mode": (False,),
    "fully_sharded_loras": (False,),
    "generation_config": ("auto",),
    "guided_decoding_backend": (None, "auto"),
    "guided_decoding_disable_fallback": (None, False),
    "hf_config_path": (None,),
    "hf_overrides": (None, {}),
    "hf_token": (None,),
    "ignore_patterns": (None, "original/**/*", ["original/**/*"]),
    "interleave_mm_strings": (False,),
    "io_processor_plugin": (None,),
    "kv_cache_memory_bytes": (None,),
    "kv_events_config": (None,),
    "kv_sharing_fast_prefill": (False,),
    "kv_transfer_config": (None,),
    "limit_mm_per_prompt": (None, {}),
    "logits_processor_pattern": (None,),
    "logits_processors": (None, []),
    "logprobs_mode": ("raw_logprobs",),
    "long_prefill_token_threshold": (0,),
    "lora_dtype": ("auto", None),
    "max_cpu_loras": (None,),
    "max_long_partial_prefills": (1,),
    "max_num_partial_prefills": (1,),
    "max_parallel_loading_workers": (None,),
    "max_seq_len_to_capture": (8192,),
    "media_io_kwargs": (None, {}),
    "mm_encoder_only": (False,),
    "mm_processor_cache_gb": (4, 0),
    "mm_processor_kwargs": (None,),
    "model_impl": ("auto",),
    "model_loader_extra_config": (None, {}),
    "nnodes": (1,),
    "node_rank": (0,),
    "num_gpu_blocks_override": (None,),
    "num_scheduler_steps": (1,),
    "otlp_traces_endpoint": (None,),
    "override_attention_dtype": (None,),
    "override_generation_config": (None, {}),
    "override_pooler_config": (None,),
    "pipeline_parallel_size": (1,),
    "pooler_config": (None,),
    "preemption_mode": (None,),
    "prefill_context_parallel_size": (1,),
    "prefix_caching_hash_algo": ("builtin", "sha256"),
    "pt_load_map_location": ("cpu",),
    "ray_workers_use_nsight": (False,),
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "runner": ("auto",),
    "safetensors_load_strategy": ("lazy", None),
    "scheduler_cls": (None,),
    "served_model_name": (None,),
    "show_hidden_metrics_for_version": (None,),
    "skip_mm_profiling": (False,),
    "skip_tokenizer_init": (False,),
    "stream_interval": (1,),
    "structured_outputs_config": (None, {}),
    "swap_space": (4, 0),
    "task": (None, "auto", "generate"),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
    "trust_remote_code": (False, True),  # none is ever run
    "use_tqdm_on_load": (True,),
    "use_v2_block_manager": (True,),
    "worker_cls": ("auto",),
    "worker_extension_cls": ("",),
}

# The same of arguments of its methods `generate` and `chat`.
METHOD_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "chat_template_content_format": ("auto",),  # the template decides
    "mm_processor_kwargs": (None, {}),
    "priority": (None, 0),
    "prompt_adapter_request": (None,),
    "tokenization_kwargs": (None, {}),
}

# What to do instead, where there is something.
_INSTEAD = {
    "data_parallel_size": "llama serve and llama batch have --replicas",
    "distributed_executor_backend": "ranks are processes of one machine; for Ray, llama.batch.build_processor runs "
    "one engine in each actor",
    "enable_chunked_prefill": "prompts are always computed in chunks of max_num_batched_tokens",
    "generation_config": "it is read from the model's folder; an explicit SamplingParams is taken as it stands",
    "num_gpu_blocks_override": "give num_blocks",
    "override_generation_config": "give a SamplingParams",
    "priority": "give it in the SamplingParams",
    "rope_scaling": "edit the model's config.json",
    "rope_theta": "edit the model's config.json",
    "served_model_name": "it belongs to the server",
    "skip_tokenizer_init": "give a Transformer as model and no tokenizer",
}


def without_foreign(given: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """The keyword arguments of a method but vLLM's, which are refused unless they change nothing."""
    own = {name: value for name, value in given.items() if name not in METHOD_ARGUMENTS}
    refuse_foreign({name: value for name, value in given.items() if name not in own}, METHOD_ARGUMENTS, whose)
    return own


def refuse_foreign(
    given: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]] = HARMLESS, whose: str = "LLM"
) -> None:
    """ParameterError for an argument of vLLM's that asks for something; TypeError for an unknown name."""
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{whose} has no argument {name!r}")
        harmless = known[name]
        if not is_neutral(value, harmless):
            instead = _INSTEAD.get(name)
            legal = " or ".join(repr(default) for default in harmless)
            hint = f": {instead}" if instead else ""
            raise ParameterError(f"{name}={value!r} is not supported (only {legal}){hint}", name)
