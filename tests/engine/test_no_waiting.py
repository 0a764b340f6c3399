"""What a graph records touches nothing but the device: proven on tensors without content, where nothing can be read.

Triton's kernels are not launched; all around them runs. A tensor of the host among the arguments, or an operation whose
shape depends on values, would be a place where the host waits for the device: no graph can hold it.
"""

import contextlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from llama import SamplingParams
from llama.engine import draft_model
from llama.engine import runner as runners
from llama.engine.config import EngineConfig
from llama.engine.draft_model import DraftModel, _Feed
from llama.engine.graph_runner import GraphRunner
from llama.engine.memory import make_kv_cache, warm_up, worst_step
from llama.engine.mixed_steps import Shape
from llama.engine.plan import LAST_SAMPLED, NO_COPIES, NO_UPDATES, Plan
from llama.engine.runner import Runner
from llama.engine.sampler import SamplerTable
from llama.kernels import ops
from llama.kernels.gpu import chain, matmul
from llama.kernels.gpu.attention import decode, prefill
from llama.kernels.types import SamplerState
from llama.llm.loras import read_lora
from llama.model.config import ModelConfig
from llama.model.kv_cache import KVCache
from llama.model.transformer import Transformer
from tests.engine.test_graphs import Stand, graph_engine, save_adapters
from tests.model.models import tiny_config, tiny_model
from tests.test_equivalence import Case

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class OnDeviceAlone(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, func
        for leaf in tree_leaves((args, kwargs or {})):
            assert not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta", f"{func} of a tensor of the host"
        self.num_ops += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """Names of the Triton kernels that would have run."""
    names = []
    monkeypatch.setattr(ops, "_INTERPRETED", True)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: names.append(self.fn.__name__))
    return names


def graphed(config: ModelConfig, dtype: torch.dtype, **options) -> GraphRunner:
    model = Transformer(config, device="meta", dtype=dtype)
    kv = KVCache(config, 40, 16, dtype=dtype, device="meta")
    runner = GraphRunner(
        model, kv, EngineConfig(max_num_seqs=16, max_model_len=128, max_loras=2, **options), record=Stand()
    )
    runner.sampler.state = SamplerState(16, config.vocab_size, "meta")
    return runner


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_models_step(launched, dtype):
    made = graphed(ModelConfig.preset("llama-3.2-1b"), dtype)
    with torch.inference_mode(), OnDeviceAlone() as seen:
        made._model_step(10, has_adapters=False, has_runs=False)
    layers = 16
    assert launched.count("_decode_kernel") == launched.count("_rope_and_store_kernel") == layers
    assert launched.count("_silu_mul_kernel") == layers and not [name for name in launched if "shrink" in name]
    assert seen.num_ops > 100


@pytest.mark.parametrize("speculative", [None, {"method": "ngram"}])
def test_with_drafts_a_sequence_may_read_what_another_stores(launched, speculative, monkeypatch):
    made, seen = graphed(tiny_config(), torch.bfloat16, speculative_config=speculative), []
    hidden = made.model.hidden
    monkeypatch.setattr(made.model, "hidden", lambda batch, kv: seen.append(batch) or hidden(batch, kv))
    with torch.inference_mode():
        made._model_step(4, has_adapters=False, has_runs=False)
    assert [batch.is_disjoint for batch in seen] == [speculative is None]


@pytest.mark.parametrize("shape", [Shape(0, 32, 4), Shape(4, 256, 8)], ids=str)
def test_a_step_with_prompts(launched, shape, monkeypatch):
    monkeypatch.setattr(prefill, "multiprocessor_count", lambda device: 132)
    made = graphed(tiny_config(), torch.bfloat16, record_prompts=True, max_num_batched_tokens=512)
    with torch.inference_mode(), OnDeviceAlone():
        made._mixed_step(shape, has_adapters=True)
    layers = 2
    assert launched.count("_prefill_kernel") == layers
    assert launched.count("_decode_kernel") == layers * (shape.decodes > 0)


@pytest.mark.parametrize("has_runs", [True, False])
def test_a_models_step_with_drafts(launched, has_runs):
    made = graphed(tiny_config(), torch.bfloat16, speculative_config={"method": "ngram"})
    with torch.inference_mode(), OnDeviceAlone():
        made._model_step(24, False, has_runs)  # more than there are sequences
    assert launched.count("_decode_kernel") == 2 and not [name for name in launched if "prefill" in name]


def test_a_step_with_adapters(launched, tmp_path):
    made = graphed(tiny_config(), torch.bfloat16)
    folder = save_adapters(tmp_path)
    adapter = read_lora(graph_engine(Case(), Stand(), max_loras=1), tiny_model(), "large", folder / "large")
    made.adapters.put(1, adapter.content)
    with torch.inference_mode(), OnDeviceAlone():
        made._model_step(3, has_adapters=True, has_runs=False)
    assert len([name for name in launched if "shrink" in name]) == 4  # two layers, two modules each
    assert len([name for name in launched if "expand" in name]) == 4


FILTERED = ["scan_kernel", "few_groups_kernel", "count_kernel", "choose_kernel", "finish_kernel"]
OF_LOGPROBS = ["logprob_parts_kernel", "logprob_merge_kernel"]


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        ({"all_greedy": True}, ["scan_kernel", "finish_kernel"]),
        ({}, ["scan_kernel", "choose_kernel", "finish_kernel"]),
        ({"any_filter": True}, FILTERED),
        (
            {"any_filter": True, "any_penalty": True, "num_logprobs": 20, "any_processed": True},
            FILTERED + OF_LOGPROBS,
        ),
        ({"all_greedy": True, "num_logprobs": 0}, ["scan_kernel", "finish_kernel", *OF_LOGPROBS]),
    ],
    ids=str,
)
def test_a_samplers_step(launched, flags, kernels):
    """Each kernel costs a step more than a microsecond, whatever it does."""
    made = graphed(tiny_config(), torch.bfloat16)
    with torch.inference_mode(), OnDeviceAlone():
        packed, sampled = made._sampler_step(5, flags)
    assert launched == kernels
    told = [sampled.token_ids, sampled.is_bad, *(sampled.logprobs or ())]
    assert packed.shape[0] == sum(tensor.nbytes for tensor in told)


@pytest.mark.parametrize("is_decode", [False, True])
def test_the_worst_step(launched, is_decode, monkeypatch):
    """It must need nothing of the host either: kernels take their parts of it as they do in a real step."""
    monkeypatch.setattr(prefill, "multiprocessor_count", lambda device: 132)
    preset = ModelConfig.preset("llama-3.1-8b")
    model = Transformer(preset, device="meta", dtype=torch.bfloat16)
    config = EngineConfig(max_num_batched_tokens=8192).resolved(preset, "cuda")
    with OnDeviceAlone():
        worst_step(model, config, is_decode=is_decode)
    assert ("_decode_kernel" in launched) == is_decode and ("_prefill_kernel" in launched) != is_decode
    assert ("_merge_kernel" in launched) == is_decode and ("_merge_chunks_kernel" in launched) != is_decode
    assert {"choose_kernel", "count_kernel", "logprob_merge_kernel"} <= set(launched)


def variants(monkeypatch, call) -> set:
    """What is compiled for the kernels that a call launches: dtypes, constants, and the numbers that a kernel may be
    specialised for."""
    found = set()

    def note(self, *args, grid, **options):
        names = [name for name in self.arg_names if name not in options]
        given = []
        for name, arg in zip(names, args, strict=False):
            leaves = [leaf.dtype if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(arg)]
            given += [name] if name in self.do_not_specialize else leaves
        found.add((self.fn.__name__, *given, *sorted(options.items())))

    monkeypatch.setattr(ops, "_INTERPRETED", True)
    monkeypatch.setattr(JITFunction, "run", note)
    with torch.inference_mode():
        call()
    return found


@pytest.mark.parametrize("speculative", [None, {"method": "ngram"}])
def test_a_small_step_needs_the_kernels_of_the_worst_one(monkeypatch, speculative):
    monkeypatch.setattr(prefill, "multiprocessor_count", lambda device: 132)
    preset = replace(ModelConfig.preset("llama-3.1-8b"), num_hidden_layers=1)
    model = Transformer(preset, device="meta", dtype=torch.bfloat16)
    config = EngineConfig(max_num_batched_tokens=8192, speculative_config=speculative).resolved(preset, "cuda")

    def worst() -> None:
        for is_decode in (False, True):
            worst_step(model, config, is_decode=is_decode)

    assert variants(monkeypatch, lambda: warm_up(model, config)) == variants(monkeypatch, worst)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_need_no_kernels_that_were_not_warmed(monkeypatch, fused):
    monkeypatch.setattr(chain, "is_native", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(runners, "fetch_result", lambda *arguments: lambda: None)
    for module in (prefill, decode, matmul):
        monkeypatch.setattr(module, "multiprocessor_count", lambda device: 132)
    preset = replace(ModelConfig.preset("llama-3.1-8b"), num_hidden_layers=1)
    model = Transformer(preset, device="meta", dtype=torch.bfloat16)
    config = EngineConfig(max_num_batched_tokens=512, max_num_seqs=4, max_model_len=8192, fused_decode=fused)
    config = config.resolved(preset, "cuda")
    monkeypatch.setattr(ops, "_INTERPRETED", True)
    runner = Runner(model, make_kv_cache(model, config, 2), config)
    for row in range(4):
        runner.sampler.set_row(row, SamplingParams(top_p=0.9, frequency_penalty=0.5), row, np.ones(1, np.int32), [])

    def steps() -> None:
        for queries, contexts, num_decodes in (
            ([1, 1, 1], [1000, 5, 8000], 3),
            ([1, 1, 20], [1000, 5, 20], 2),
            ([1, 30], [1000, 8000], 1),
            ([1, 500], [9, 500], 1),
            ([512], [512], 0),
            ([512], [8000], 0),
        ):
            rows, lens = np.arange(len(queries), dtype=np.int32), np.array(queries, np.int32)
            token_ids = np.where(np.arange(lens.sum()) < num_decodes, LAST_SAMPLED, 1).astype(np.int32)
            runner.launch(
                Plan(
                    step=0,
                    rows=rows,
                    query_lens=lens,
                    context_lens=np.array(contexts, np.int32),
                    num_decodes=num_decodes,
                    token_ids=token_ids,
                    sample_rows=rows,
                    sample_sources=lens.cumsum(dtype=np.int32) - 1,
                    sample_positions=rows,
                    table_updates=NO_UPDATES,
                    copies=NO_COPIES,
                )
            )

    needed, warmed = variants(monkeypatch, steps), variants(monkeypatch, lambda: warm_up(model, config))
    assert needed <= warmed, needed - warmed


def test_a_draft_model_is_warmed_with_the_kernels_of_its_steps(monkeypatch):
    preset = replace(ModelConfig.preset("llama-3.1-8b"), num_hidden_layers=1)
    draft = Transformer(preset, device="meta", dtype=torch.bfloat16)
    speculative = {"method": "draft_model", "model": "x"}
    config = EngineConfig(max_num_seqs=4, kv_cache_dtype="fp8", speculative_config=speculative).resolved(preset, "cuda")
    table = SamplerTable(4, preset.vocab_size, (), device="meta")
    for row in range(4):
        table.set_row(row, SamplingParams(top_p=0.9, frequency_penalty=0.5), row, [1])
    running = SimpleNamespace(table=np.zeros((4, config.blocks_per_sequence), np.int32))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    warmed = []
    monkeypatch.setattr(draft_model, "warm_up", lambda *given: warmed.append(given))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    DraftModel(on_cuda, None, running, table, config)
    ((of, given),) = warmed
    assert of is on_cuda
    kv = KVCache(preset, 40, config.block_size, dtype=torch.bfloat16, device="meta")
    made = DraftModel(draft, kv, running, table, config)
    assert len(warmed) == 1

    def steps() -> None:
        for lens in ((1, 1, 1), (1, 300, 7), (900,)):
            feeds = [_Feed(i, i, 1000, 1000 + length, True) for i, length in enumerate(lens)]
            made._step(feeds, torch.empty(sum(lens), dtype=torch.int64, device="meta"), table.state)

    needed = variants(monkeypatch, steps)
    assert {"_decode_kernel", "_merge_kernel", "_prefill_kernel", "choose_kernel"} <= {name for name, *_ in needed}
    assert needed <= variants(monkeypatch, lambda: warm_up(draft, given))


@pytest.mark.parametrize("multiprocessors", [1, 132, 1000])
def test_a_worst_step_has_prefill_whole_and_in_chunks(monkeypatch, multiprocessors):
    """Whatever the largest step alone would take on such a GPU."""
    monkeypatch.setattr(prefill, "multiprocessor_count", lambda device: multiprocessors)
    preset = replace(ModelConfig.preset("llama-3.1-8b"), num_hidden_layers=1)
    model = Transformer(preset, device="meta", dtype=torch.bfloat16)
    config = EngineConfig(max_num_batched_tokens=1024).resolved(preset, "cuda")
    found = variants(monkeypatch, lambda: worst_step(model, config, is_decode=False))
    splits = {split for split in (False, True) for each in found if ("SPLIT", split) in each}
    assert splits == ({False} if multiprocessors == 1 else {False, True})


def test_a_draw_by_any_rules_needs_the_kernels_of_the_worst_step(monkeypatch):
    preset = replace(ModelConfig.preset("llama-3.1-8b"), num_hidden_layers=1)
    made = graphed(preset, torch.bfloat16)
    config = EngineConfig(max_num_seqs=16, max_num_batched_tokens=64).resolved(preset, "cuda")

    def worst() -> None:
        for is_decode in (False, True):
            worst_step(made.model, config, is_decode=is_decode)

    def draws() -> None:
        names = ("any_penalty", "any_filter", "all_greedy", "any_processed")
        for num_logprobs, *flags in itertools.product((-1, 0, 3, 20), *[(False, True)] * len(names)):
            for rows in (1, 3, 16):
                made._sampler_step(rows, {"num_logprobs": num_logprobs} | dict(zip(names, flags, strict=True)))

    needed = variants(monkeypatch, draws)
    assert len({name for name, *_ in needed}) == 7 and needed <= variants(monkeypatch, worst)


def test_loading_an_adapter_needs_the_kernels_of_its_steps(monkeypatch, tmp_path):
    """And moves no tensor that steps use. The second adapter is wider; with it the first one's kernels are others."""
    made = graphed(tiny_config(), torch.bfloat16)
    folder = save_adapters(tmp_path)
    host = graph_engine(Case(), Stand(), max_loras=1)
    for index, name in enumerate(("small", "large", "small"), start=1):
        content = read_lora(host, tiny_model(), name, folder / name).content
        warmed = variants(monkeypatch, lambda content=content: made.adapters.warm(content))
        generation = made.adapters.generation
        made.adapters.put(min(index, 2), content)
        assert index == 3 or generation == (0, 4)[index - 1]
        step = variants(monkeypatch, lambda: made._model_step(3, has_adapters=True, has_runs=False))
        assert warmed == {each for each in step if "shrink" in each[0] or "expand" in each[0]}
        assert len(warmed) == 4
