"""Arguments of vLLM's LLM that this one does not have: harmless at vLLM's default, refused by name otherwise."""

from typing import Any

# Name -> the values that change nothing here. Defaults differ between vLLM's releases, so several may be listed.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "allowed_local_media_path": ("",),
    "allowed_media_domains": (None,),
    "async_scheduling": (None, False),
    "block_manager_version": ("v2",),
    "calculate_kv_scales": (False,),
    "code_revision": (None,),
    "compilation_config": (None, 0),
    "config_format": ("auto",),
    "convert": ("auto",),
    "cpu_offload_gb": (0,),
    "data_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "disable_async_output_proc": (False,),
    "disable_cascade_attn": (False,),
    "disable_custom_all_reduce": (False,),
    "disable_log_stats": (True, False),
    "disable_sliding_window": (False,),
    "distributed_executor_backend": (None,),
    "download_dir": (None,),
    "enable_chunked_prefill": (None, True),
    "enable_eplb": (False,),
    "enable_expert_parallel": (False,),
    "enable_lora": (False, True),  # adapters can be asked for always
    "enable_prompt_embeds": (False,),
    "enable_sleep_mode": (False,),
    "fully_sharded_loras": (False,),
    "generation_config": ("auto",),
    "guided_decoding_backend": (None, "auto"),
    "guided_decoding_disable_fallback": (None, False),
    "hf_config_path": (None,),
    "hf_overrides": (None, {}),
    "hf_token": (None,),
    "kv_cache_dtype": ("auto",),
    "kv_cache_memory_bytes": (None,),
    "kv_events_config": (None,),
    "kv_transfer_config": (None,),
    "limit_mm_per_prompt": (None, {}),
    "logits_processors": (None,),
    "logprobs_mode": ("raw_logprobs",),
    "lora_dtype": ("auto", None),
    "max_cpu_loras": (None,),
    "max_logprobs": (20,),
    "max_parallel_loading_workers": (None,),
    "max_seq_len_to_capture": (8192,),
    "mm_processor_kwargs": (None,),
    "model_impl": ("auto",),
    "model_loader_extra_config": (None, {}),
    "num_gpu_blocks_override": (None,),
    "num_scheduler_steps": (1,),
    "override_generation_config": (None, {}),
    "override_pooler_config": (None,),
    "pipeline_parallel_size": (1,),
    "pooler_config": (None,),
    "preemption_mode": (None,),
    "quantization": (None,),
    "ray_workers_use_nsight": (False,),
    "revision": (None,),
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "runner": ("auto",),
    "scheduling_policy": ("fcfs",),
    "served_model_name": (None,),
    "skip_tokenizer_init": (False,),
    "speculative_config": (None,),
    "structured_outputs_config": (None, {}),
    "swap_space": (4, 0),
    "task": (None, "auto", "generate"),
    "tensor_parallel_size": (1,),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
    "trust_remote_code": (False,),
    "use_tqdm_on_load": (True,),
    "use_v2_block_manager": (True,),
    "worker_cls": ("auto",),
}

# What to do instead, where there is something.
_INSTEAD = {
    "enable_chunked_prefill": "prompts are always computed in chunks of max_num_batched_tokens",
    "generation_config": "it is read from the model's folder; an explicit SamplingParams is taken as it stands",
    "num_gpu_blocks_override": "give num_blocks",
    "override_generation_config": "give a SamplingParams",
    "rope_scaling": "edit the model's config.json",
    "rope_theta": "edit the model's config.json",
    "served_model_name": "it belongs to the server",
    "skip_tokenizer_init": "give a Transformer as model and no tokenizer",
}


def refuse_foreign(given: dict[str, Any]) -> None:
    """ValueError for an argument of vLLM's that asks for something; TypeError for a name that nobody knows."""
    for name, value in given.items():
        if name not in _HARMLESS:
            raise TypeError(f"LLM has no argument {name!r}")
        harmless = _HARMLESS[name]
        if not any(isinstance(value, bool) is isinstance(default, bool) and value == default for default in harmless):
            instead = _INSTEAD.get(name)
            legal = " or ".join(repr(default) for default in harmless)
            hint = f": {instead}" if instead else ""
            raise ValueError(f"{name}={value!r} is not supported (only {legal}){hint}")
