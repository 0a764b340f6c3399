"""Adapters mixed in one batch: each request gets exactly what it gets alone, however the batch is run."""

import asyncio
import shutil
from dataclasses import replace

import pytest
import torch

from llama import LLM, AsyncLLM, LoRARequest, SamplingParams
from llama.cli import main as command
from llama.convert.merge import merge
from llama.model.lora import LoadedAdapters, read_adapter
from llama.model.lora.loaded import apart, joined
from llama.model.transformer import Transformer
from tests.lora.adapters import VOCAB, make_adapter

ADAPTERS = {
    "r1": {"r": 1, "target_modules": "all-linear"},
    "r3": {"r": 3, "target_modules": ["q_proj", "v_proj"]},
    "r8": {"r": 8, "target_modules": ["embed_tokens", "down_proj"]},
    "r16": {"r": 16, "target_modules": ["k_proj", "o_proj", "gate_proj"], "use_rslora": True},
    "r20": {"r": 20, "target_modules": ["lm_head", "up_proj"]},
    "r33": {"r": 33, "target_modules": "all-linear", "rank_pattern": {"q_proj": 5}},
}
NAMES = [None, *ADAPTERS, "r3", None][:8] * 3
PROMPTS = [[(5 * i + 3 * j) % VOCAB for j in range(2 + 3 * (i % 8))] for i in range(24)]
PARAMS = [
    SamplingParams(temperature=0 if i % 2 else 1.0, seed=i, max_tokens=10, logprobs=3, ignore_eos=True)
    for i in range(24)
]


@pytest.fixture(scope="module")
def model(base_path):
    return Transformer.from_pretrained(base_path, dtype=torch.float64)


@pytest.fixture(scope="module")
def paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        make_adapter(base_path, folder / name, seed=seed, **options)
    return {name: folder / name for name in ADAPTERS}


def engine(model, paths, names=tuple(ADAPTERS), **options):
    llm = LLM(model, **({"num_blocks": 200, "block_size": 4, "max_model_len": 64} | options))
    for name in names:
        llm.load_lora(name, paths[name])
    return llm


def told(output):
    completion = output.outputs[0]
    return list(completion.token_ids), [round(entry[token].logprob, 9) for entry, token in
                                        zip(completion.logprobs, completion.token_ids, strict=True)]  # fmt: skip


@pytest.fixture(scope="module")
def alone(model, paths):
    """Each request on an engine that has seen nothing else."""
    return [
        told(engine(model, paths, [n] if n else []).generate([p], s, lora=n)[0])
        for p, s, n in zip(PROMPTS, PARAMS, NAMES, strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"max_loras": 2},
        {"max_loras": 1, "max_num_batched_tokens": 16},
        {"num_blocks": 24},
        {"num_blocks": 11, "max_loras": 3, "max_num_batched_tokens": 9, "enable_prefix_caching": False},
        {"max_loras": 2, "speculative_config": {"method": "ngram", "disable_by_batch_size": 100}},
    ],
    ids=str,
)
def test_each_request_is_as_it_is_alone(model, paths, alone, options):
    llm = engine(model, paths, **options)
    for _ in range(2):  # the second time with a warm prefix cache
        outputs = llm.generate(PROMPTS, PARAMS, lora=NAMES)
        assert [told(output) for output in outputs] == alone
        llm.engine.check()
    metrics = llm.engine.metrics()
    assert metrics.num_used_blocks == 0
    if "num_blocks" in options:
        assert metrics.num_preemptions > 0, "the case is meant to be tight"


def test_the_base_and_each_adapter_differ(alone):
    first = {name: tokens for name, (tokens, _) in zip(NAMES[:7], alone[:7], strict=True)}
    assert len({tuple(tokens) for tokens in first.values()}) == 7


def test_the_same_prompt_is_not_shared_between_adapters(model, paths):
    llm = engine(model, paths, block_size=4)
    prompt, params = [list(range(24))] * 7, SamplingParams(temperature=0, max_tokens=6)
    names = [None, *ADAPTERS]
    cold = llm.generate(prompt, params, lora=names)
    warm = llm.generate(prompt, params, lora=names)
    assert [output.num_cached_tokens for output in cold] == [0] * 7
    assert [output.num_cached_tokens for output in warm] == [20] * 7
    assert [o.outputs[0].token_ids for o in cold] == [o.outputs[0].token_ids for o in warm]


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_checkpoints_write_the_same(model, paths, base_path, alone, name, tmp_path):
    merge(base_path, paths[name], tmp_path / "merged", dtype=torch.float64)
    llm = LLM(Transformer.from_pretrained(tmp_path / "merged"), num_blocks=64, max_model_len=64)
    at = NAMES.index(name)
    assert list(llm.generate([PROMPTS[at]], PARAMS[at])[0].outputs[0].token_ids) == alone[at][0]


def test_the_command_merges(paths, base_path, tmp_path, capsys):
    assert command(["merge", str(base_path), str(paths["r3"]), str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'merged'}\n"
    merge(base_path, paths["r3"], tmp_path / "again", dtype=torch.float32)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "again")]
    assert files[0] == files[1]
    assert command(["merge", str(base_path), str(paths["r3"]), str(tmp_path / "merged")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "exists already" in said


def test_loading_and_unloading_while_requests_run(model, paths, alone):
    async def one(llm, i):
        pieces = [piece async for piece in llm.generate(PROMPTS[i], PARAMS[i], lora=NAMES[i])]
        return [token for piece in pieces for token in piece.token_ids]

    async def churn(llm):
        for i in range(12):
            await llm.load_lora(f"other{i}", paths["r33"])
            await llm.unload_lora(f"other{i}")
        await llm.unload_lora("r16")  # requests that have it keep it

    async def main():
        async with AsyncLLM(engine(model, paths, max_loras=2)) as llm:
            running = [asyncio.create_task(one(llm, i)) for i in range(24)]
            await asyncio.sleep(0)
            while llm.num_requests < 24 and not all(task.done() for task in running):
                await asyncio.sleep(0)
            await churn(llm)
            answers = await asyncio.gather(*running)
            assert [info.name for info in llm.list_loras()] == [name for name in ADAPTERS if name != "r16"]
            with pytest.raises(ValueError, match="no adapter named 'r16'"):
                await one(llm, NAMES.index("r16"))
            return answers

    assert asyncio.run(main()) == [tokens for tokens, _ in alone]


def test_vllms_way_of_asking(model, paths, alone):
    llm = engine(model, paths, [])
    request = LoRARequest("r3", 1, str(paths["r3"]))
    at = NAMES.index("r3")
    for _ in range(2):
        output = llm.generate([PROMPTS[at]], PARAMS[at], lora_request=request)[0]
        assert told(output) == alone[at]
    with pytest.raises(ValueError, match="r3"):
        llm.generate([PROMPTS[at]], PARAMS[at], lora_request=LoRARequest("r3", 1, str(paths["r8"])))
    with pytest.raises(ValueError, match="give one of them"):
        llm.generate([PROMPTS[at]], PARAMS[at], lora="r3", lora_request=request)
    with pytest.raises(ValueError, match="unload it first"):
        llm.load_lora("r3", paths["r8"])


def test_a_new_id_says_that_the_files_are_new(model, paths, alone, tmp_path):
    """A training loop writes over its adapter and asks again; those that run keep what they began with."""
    llm, at, other = engine(model, paths, []), NAMES.index("r3"), NAMES.index("r8")
    folder = tmp_path / "policy"

    def ask(at, number, path=folder):
        output = llm.generate([PROMPTS[at]], PARAMS[at], lora_request=LoRARequest("policy", number, str(path)))[0]
        return told(output)

    shutil.copytree(paths["r3"], folder)
    assert ask(at, 1) == alone[at]
    running = llm.stream(PROMPTS[at], PARAMS[at], lora_request=LoRARequest("policy", 1, str(folder)))
    pieces = [next(running)]
    shutil.rmtree(folder)
    shutil.copytree(paths["r8"], folder)
    assert ask(at, 1) == alone[at], "the same id is the same adapter"
    assert ask(other, 2) == alone[other], "a new id is read again"
    pieces += running
    assert [token for piece in pieces for token in piece.token_ids] == alone[at][0]
    assert ask(at, 3, paths["r3"]) == alone[at], "a new id may have another place"
    assert [info.name for info in llm.list_loras()] == ["policy"]
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        ask(at, 4)
    assert ask(at, 3, paths["r3"]) == alone[at], "what cannot be read changes nothing"


def test_loading_in_place_of_another(model, paths, alone):
    llm, at = engine(model, paths, ["r3"]), NAMES.index("r8")
    llm.load_lora("r3", paths["r8"], replace=True)
    assert told(llm.generate([PROMPTS[at]], PARAMS[at], lora="r3")[0]) == alone[at]


def test_an_engine_without_slots_refuses(model, paths):
    with pytest.raises(ValueError, match="max_loras is 0"):
        engine(model, paths, ["r1"], max_loras=0)


def test_the_digest_is_of_the_content(model, paths, base_path, tmp_path):
    make_adapter(base_path, tmp_path, seed=1, **ADAPTERS["r3"])
    same, other = read_adapter(tmp_path, model, max_rank=64), read_adapter(paths["r8"], model, max_rank=64)
    assert same.digest == read_adapter(paths["r3"], model, max_rank=64).digest != other.digest


def test_a_batch_without_adapters_runs_the_ops_of_an_engine_without_any(model, paths, monkeypatch):
    llm = engine(model, paths)
    llm.generate([[1, 2]], SamplingParams(max_tokens=2), lora="r1")
    monkeypatch.setattr("llama.kernels.ops.lora_shrink", lambda *arguments: pytest.fail("an adapter op ran"))
    llm.generate([[1, 2]], SamplingParams(max_tokens=2))


def test_stacks_can_be_for_the_largest_rank_from_the_start(model, paths):
    held = LoadedAdapters(model, 2, least_rank=64)
    for index, name in enumerate(("r3", "r8"), 1):
        held.put(index, read_adapter(paths[name], model, max_rank=64))
    assert {stack.rank for stack in held.stacks.values()} == {64}
    assert held.generation == len(held.stacks)  # none was made anew


def test_an_adapters_tensors_are_what_they_were_after_a_journey_in_one(model, paths):
    pairs = read_adapter(paths["r3"], model, max_rank=64).pairs
    flat = joined(pairs, torch.float32)
    for name, pair in apart(flat, pairs).items():
        assert all(torch.equal(ours, theirs.float()) for ours, theirs in zip(pair, pairs[name], strict=True))
        assert all((x.data_ptr() - flat.data_ptr()) % 64 == 0 for x in pair)


def test_with_deterministic_each_has_the_bits_that_it_has_alone(base_path, paths):
    model = Transformer.from_pretrained(base_path, dtype=torch.bfloat16)
    params = [replace(each, prompt_logprobs=1) for each in PARAMS]
    told = []
    for size in (1, 8):
        llm = engine(model, paths, deterministic=True, max_num_batched_tokens=64)
        parts = [slice(i, i + size) for i in range(0, 8, size)]
        outputs = [
            output
            for part in parts
            for output in llm.generate(PROMPTS[part], params[part], NAMES[part], use_tqdm=False)
        ]
        told.append([(o.outputs[0].token_ids, o.outputs[0].logprobs, o.prompt_logprobs) for o in outputs])
    assert told[0] == told[1]
