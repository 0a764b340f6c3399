"""Activations read and changed per request, in a crowd: what a request gets is what it gets alone, its neighbours see
nothing of it, and blocks computed under a change serve requests with the same change only."""

import asyncio
import json
import random

import pytest
import torch
from safetensors.torch import save_file

from llama import LLM, Add, Apply, AsyncLLM, Capture, ParameterError, Project, Replace, SamplingParams, Scale
from llama.model.taps import all_points, point_shape
from tests.model.models import tiny_model

POINTS = ["embed", "layers.*.resid_post", "layers.1.q", "layers.0.k", "layers.1.z", "norm"]
SYSTEM = random.Random(1).choices(range(97), k=40)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT folder for `model`."""
    path = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(7)
    sizes = {"self_attn.q_proj": (48, 64), "mlp.down_proj": (80, 48)}
    tensors = {}
    for layer in range(2):
        for module, (columns, rows) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    save_file(tensors, path / "adapter_model.safetensors")
    modules = [module.split(".")[1] for module in sizes]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": modules}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def engine(model, **options):
    return LLM(model, **{"block_size": 4, "num_blocks": 300, "max_num_seqs": 16, **options})


def prompt(shared, own, seed):
    rng = random.Random(seed)
    return [*SYSTEM[:shared], *(rng.randrange(97) for _ in range(own))]


def vector(seed, size=48):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(seed, **fields):
    return SamplingParams(**{"max_tokens": 9, "seed": seed, "temperature": 0.8, "ignore_eos": True, **fields})


def expected(model, output, points, positions, interventions=()):
    """What one forward over all of the request's tokens leaves at the points."""
    ids = output.prompt_token_ids + output.outputs[0].token_ids[:-1]
    _, cache = model.run_with_cache(torch.tensor([ids]), points, interventions=interventions)
    return {point: value[0, positions] for point, value in cache.items()}


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for point, value in wanted.items():
        torch.testing.assert_close(found[point], value, rtol=0, atol=1e-10)


CROWD = [  # prompt, sampling, capture, interventions; the last two with an adapter
    (prompt(40, 3, 1), sampled(1), Capture(POINTS), None),
    (
        prompt(40, 3, 1),
        sampled(1),
        Capture(POINTS, positions="all"),
        [Add("layers.0.resid_post", vector(1), scale=2)],
    ),
    (prompt(40, 9, 2), sampled(2), None, None),
    (prompt(40, 9, 2), sampled(2), Capture("layers.1.resid_post", positions="generated"), None),
    (prompt(40, 9, 2), sampled(2), None, [Scale("layers.1.z", 0.0, heads=[3]), Add("layers.0.attn_out", vector(2))]),
    (prompt(21, 1, 3), sampled(3, n=3), Capture(POINTS, positions="all"), None),
    (
        prompt(0, 30, 4),
        sampled(4),
        Capture(POINTS, positions=[0, 7, -1]),
        [Add("embed", vector(4), positions="generated")],
    ),
    (prompt(30, 30, 5), sampled(5, logprobs=2), None, [Project("layers.0.mlp_out", vector(5))]),
    (prompt(30, 30, 5), sampled(5, prompt_logprobs=1), Capture("layers.0.resid_mid", positions="prompt"), None),
    (prompt(30, 2, 6), sampled(6), None, [Replace("layers.0.resid_post", vector(6), positions=[29, 31])]),
    (prompt(30, 2, 6), sampled(6, frequency_penalty=0.5), None, [Apply("layers.1.mlp_act", torch.neg)]),
    (prompt(40, 3, 1), sampled(1), Capture(POINTS, positions="all"), None),
    (prompt(40, 3, 1), sampled(7), Capture(POINTS), [Add("layers.0.resid_post", vector(1), scale=2)]),
]
WITH_ADAPTER = CROWD[-2:]


def run(llm, asks, adapter=None):
    prompts, params, captures, interventions = map(list, zip(*asks, strict=True))
    lora = None
    if adapter is not None:
        llm.load_lora("own", adapter)
        lora = ["own" if any(ask is one for one in WITH_ADAPTER) else None for ask in asks]
    return llm.generate(prompts, params, lora, capture=captures, interventions=interventions, use_tqdm=False)


@pytest.fixture(scope="module")
def alone(model, adapter):
    """Each of the crowd by itself in an engine without a prefix cache."""
    return [run(engine(model, enable_prefix_caching=False), [one], adapter)[0] for one in CROWD]


SETTINGS = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 19},
    "pressed": {"num_blocks": 40, "max_num_batched_tokens": 31},
    "few": {"max_num_seqs": 3},
    "uncached": {"enable_prefix_caching": False},
    "drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_in_a_crowd_each_request_gets_what_it_gets_alone(model, alone, adapter, setting):
    llm = engine(model, **SETTINGS[setting])
    order = list(range(len(CROWD))) * (2 if setting != "whole" else 4)
    random.Random(setting).shuffle(order)
    for i, found in zip(order, run(llm, [CROWD[i] for i in order], adapter), strict=True):
        assert [o.token_ids for o in found.outputs] == [o.token_ids for o in alone[i].outputs], CROWD[i]
        close(found.captured, alone[i].captured)
        for one, other in zip(found.outputs, alone[i].outputs, strict=True):
            close(one.captured, other.captured)
    llm.engine.check()
    assert alone[-2].outputs[0].token_ids != alone[1].outputs[0].token_ids
    if setting == "pressed":
        assert llm.engine.metrics().num_preemptions > 0
    if setting == "whole":
        assert llm.engine.metrics().num_prefix_hits > 0


def test_what_is_captured_is_what_one_forward_over_all_tokens_leaves(model, alone):
    close(alone[0].captured, expected(model, alone[0], POINTS, slice(42, 43)))
    changes = CROWD[1][3]
    close(alone[1].captured, expected(model, alone[1], POINTS, slice(43), changes))
    close(alone[1].outputs[0].captured, expected(model, alone[1], POINTS, slice(43, None), changes))
    assert alone[3].captured == {}
    close(alone[3].outputs[0].captured, expected(model, alone[3], "layers.1.resid_post", slice(49, None)))
    close(alone[6].captured, expected(model, alone[6], POINTS, [0, 7, 29]))
    close(alone[8].captured, expected(model, alone[8], "layers.0.resid_mid", slice(60)))
    assert {k: list(v.shape) for k, v in alone[5].outputs[2].captured.items()} == {
        p: [8, *point_shape(p, model.config)] for p in alone[5].captured
    }


@pytest.mark.parametrize("i", [i for i, ask in enumerate(CROWD) if ask[3] and i < len(CROWD) - 2])
def test_a_changed_request_writes_what_the_changed_network_would_write(model, alone, i):
    """Greedily over the same tokens: the network with its changes, without any cache."""
    asked, _, _, changes = CROWD[i]
    [output] = run(engine(model), [(asked, sampled(0, temperature=0, frequency_penalty=0), None, changes)])
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    resolved = [
        c if c.positions != "generated" else type(c)(c.point, c.vector, positions=range(30, 38)) for c in changes
    ]
    logits = model.logits(torch.tensor([ids]), interventions=resolved)[0]
    assert logits[len(asked) - 1 : -1].argmax(-1).tolist() == output.outputs[0].token_ids


def test_equal_changes_share_blocks_and_unequal_ones_do_not(model):
    llm = engine(model)
    long = prompt(40, 0, 0)
    steer = Add("layers.0.resid_post", vector(1))

    def hits(interventions):
        return llm.generate(long, sampled(1), interventions=interventions, use_tqdm=False)[0].num_cached_tokens

    assert hits(None) == 0 and hits(None) == 36
    assert hits([steer]) == 0 and hits([Add("layers.0.resid_post", vector(1).clone())]) == 36
    assert hits([Add("layers.0.resid_post", vector(1), scale=2.0)]) == 0
    # What lies before the first change is everybody's.
    assert hits([Add("embed", vector(1), positions=[21])]) == 20
    assert hits([Add("embed", vector(1), positions=[21])]) == 36
    assert hits([Add("embed", vector(1), positions="generated")]) == 36
    assert hits([Apply("embed", torch.neg)]) == 0 and hits([Apply("embed", torch.neg)]) == 0
    assert hits(None) == 36
    llm.engine.check()


def test_captured_positions_are_computed_although_the_cache_has_them(model):
    llm = engine(model)
    long = prompt(40, 0, 0)
    for _ in range(2):
        [output] = llm.generate(long, sampled(1), capture=Capture("layers.1.z", positions="prompt"), use_tqdm=False)
        assert output.num_cached_tokens == 0 and len(output.captured["layers.1.z"]) == 40
        [output] = llm.generate(long, sampled(1), capture=Capture("layers.1.z", positions=[10, 30]), use_tqdm=False)
        assert output.num_cached_tokens == 8 and len(output.captured["layers.1.z"]) == 2
        [output] = llm.generate(long, sampled(1), capture=Capture("layers.1.z"), use_tqdm=False)
        assert output.num_cached_tokens == 36


def test_logits_are_read_and_changed(model):
    llm = engine(model)
    asked = prompt(5, 5, 9)
    push = torch.zeros(97, dtype=torch.float64)
    push[33] = 100.0
    params = sampled(0, temperature=0, n=1)
    [output] = llm.generate(
        asked, params, capture=Capture("logits"), interventions=[Add("logits", push)], use_tqdm=False
    )
    assert output.outputs[0].token_ids == [33] * 9
    expected = model.logits(torch.tensor([asked]))[0, -1:] + push
    torch.testing.assert_close(output.captured["logits"], expected, rtol=0, atol=1e-10)
    with pytest.raises(ParameterError, match="logits are computed from the prompt's last token on"):
        llm.generate(asked, capture=Capture("logits", positions="prompt"))


@pytest.mark.parametrize("budget", [4, 64])
def test_what_a_prompt_scores_is_of_the_changed_logits(model, budget):
    llm, ids = engine(model, max_num_batched_tokens=budget), prompt(10, 3, 0)
    changes = [Scale("logits", 0.5, positions=[2, 5]), Apply("logits", torch.tanh, positions="last")]
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    [output] = llm.generate(
        [ids], asked, interventions=changes, capture=Capture("logits", positions=[-1]), use_tqdm=False
    )
    expected = model.logits(torch.tensor([ids]), interventions=changes)[0]
    scores = expected.log_softmax(-1)
    for i, (entry, token) in enumerate(zip(output.prompt_logprobs[1:], ids[1:], strict=True)):
        assert entry[token].logprob == pytest.approx(float(scores[i, token]), abs=1e-9), i
    torch.testing.assert_close(output.captured["logits"], expected[-1:], rtol=0, atol=1e-9)


def test_too_much_memory_is_refused_before_anything_runs(model, monkeypatch):
    llm = engine(model)
    monkeypatch.setattr("llama.llm.taps.free_cpu_bytes", lambda: 100_000)
    # 40 positions of 2 layers, each 7 x 48 (hidden) + 3 x 64 (q_pre, q, z) + 3 x 32 (k_pre, k, v) + 80, of 8 bytes
    with pytest.raises(ParameterError, match=r"capture may need 450,560 bytes, and there is room for 50,000"):
        llm.generate(prompt(40, 0, 0), sampled(1), capture=Capture("layers.*.*", positions="prompt"))
    llm.generate(prompt(40, 0, 0), sampled(1), capture=Capture("layers.*.*"), use_tqdm=False)
    assert llm.engine.metrics().num_running == 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"capture": Capture("layers.7.z")}, "names no layer"),
        ({"capture": Capture("embed", positions=[10])}, "positions has 10, and the prompt has 10 tokens"),
        ({"capture": Capture("embed", reduce="max")}, "reduce must be"),
        ({"capture": Capture("embed", positions=3)}, "positions must be all, prompt, .* got 3"),
        ({"capture": Capture(3)}, "a point must be a string, got 3"),
        ({"capture": Capture("embed", dtype="float32")}, "dtype must be a float dtype of torch, got 'float32'"),
        ({"capture": Capture("embed", dtype=torch.int8)}, "dtype must be a float dtype of torch, got torch.int8"),
        ({"capture": Capture("embed", save_to=3)}, "save_to must be a folder or a function, got 3"),
        ({"capture": Capture("embed", save_to="")}, "save_to must be a folder or a function, got ''"),
        ({"interventions": [Add("embed", vector(0), scale="2")]}, "scale must be a number, got '2'"),
        ({"capture": "embed"}, "capture must be a Capture"),
        ({"interventions": [Add("embed", vector(0, 47))]}, "Add does not fit embed"),
        ({"interventions": [None, None]}, "interventions must be one list"),
        ({"capture": [Capture("embed")] * 2}, "capture has 2 entries for 1 prompts"),
    ],
)
def test_misuse_is_one_clear_error(model, asked, message):
    llm = engine(model)
    with pytest.raises(ParameterError, match=message):
        llm.generate([prompt(5, 5, 0)], **asked)
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: 1 / 0, "division by zero"),
        (lambda x: x[:, :1], r"Apply at layers.0.resid_post must give torch.float64 \[10, 48\], got torch.float64"),
        (lambda x: None, "got NoneType"),
        (lambda x: x * torch.nan, "gave nothing but NaN"),
    ],
)
@pytest.mark.parametrize("positions", ["all", [0]])
def test_a_function_that_fails_ends_its_own_request_alone(model, alone, caplog, function, told, positions):
    """Also one at a position from which nothing is drawn, in a chunk before the last one."""
    llm = engine(model, max_num_batched_tokens=64 if positions == "all" else 7)
    broken = (prompt(5, 5, 0), sampled(0), None, [Apply("layers.0.resid_post", function, positions=positions)])
    found = run(llm, [CROWD[0], broken, CROWD[1]])
    assert [output.outputs[0].finish_reason for output in found] == ["length", "error", "length"]
    assert [found[i].outputs[0].token_ids for i in (0, 2)] == [alone[i].outputs[0].token_ids for i in (0, 1)]
    assert positions == [0] or pytest.raises(Exception, match=told).matches(caplog.records[0].exc_info[1])
    assert llm.generate(prompt(5, 5, 0), sampled(1), use_tqdm=False)[0].outputs[0].finish_reason == "length"
    llm.engine.check()


def test_keys_of_a_cache_in_fp8_are_read_and_changed_as_numbers():
    model = tiny_model(dtype=torch.bfloat16)
    whole, rounded = (engine(model, kv_cache_dtype=dtype) for dtype in ("auto", "fp8"))
    read = Capture("layers.0.k", positions="prompt")
    asked = prompt(9, 9, 1), sampled(1)
    [expected], [found] = (llm.generate(*asked, capture=read, use_tqdm=False) for llm in (whole, rounded))
    keys, close_to = found.captured["layers.0.k"], expected.captured["layers.0.k"]
    assert keys.dtype == torch.bfloat16 and not torch.equal(keys, close_to)
    torch.testing.assert_close(keys, close_to, rtol=2**-4, atol=2**-9)
    same, other = (
        rounded.generate(*asked, interventions=[Scale("layers.0.k", factor)], use_tqdm=False)[0] for factor in (1, 8)
    )
    assert found.outputs[0].token_ids == same.outputs[0].token_ids != other.outputs[0].token_ids
    assert other.outputs[0].finish_reason == "length"


def test_the_async_engine_captures_too(model):
    async def ask():
        async with AsyncLLM(engine(model)) as llm:
            stream = await llm.submit(prompt(40, 3, 1), sampled(1), capture=Capture(POINTS))
            async with stream:
                async for _ in stream:
                    pass
            return stream.reply.output

    close(asyncio.run(ask()).captured, run(engine(model), [CROWD[0]])[0].captured)


def test_a_hook_on_the_model_poisons_no_cache(model):
    """The property, over interleavings: whatever ran while hooks were there, a clean request gets the clean tokens, and
    one that runs under hooks has all of its positions computed."""
    asked = prompt(40, 5, 1)
    [clean] = engine(model).generate(asked, sampled(1), use_tqdm=False)
    for seed in range(6):
        rng, seen = random.Random(seed), []
        llm = engine(model, max_num_batched_tokens=rng.choice([7, 64]))

        def change(module, args, output, seen=seen):
            seen.append(len(output[0]))
            return output[0] * 0.5, output[1]

        streams = [llm.stream(asked, sampled(1))] if rng.random() < 0.5 else []
        for stream in streams:
            next(stream)
        handle = model.layers[0].register_forward_hook(change)
        with pytest.warns(UserWarning, match="forward hooks") if seed == 0 else pytest.warns(UserWarning):
            [hooked] = llm.generate(asked, sampled(2), use_tqdm=False)
        assert sum(seen) >= len(asked) and hooked.num_cached_tokens == 0
        handle.remove()
        for stream in streams:
            list(stream)
        for _ in range(2):
            [after] = llm.generate(asked, sampled(1), use_tqdm=False)
            assert after.outputs[0].token_ids == clean.outputs[0].token_ids
        assert after.num_cached_tokens == 44
        llm.engine.check()


def test_without_taps_the_ops_are_those_of_an_engine_without_the_feature(model):
    """No op more: counted by torch's own dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ops(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def ops(before):
        llm = engine(model, enable_prefix_caching=False)
        before(llm)
        llm.generate(prompt(9, 9, 1), sampled(1), use_tqdm=False)  # a step makes what the next ones keep
        with Ops() as counted:
            llm.generate(prompt(9, 9, 1), sampled(1), use_tqdm=False)
        return counted.names

    plain = ops(lambda llm: None)
    assert ops(lambda llm: run(llm, CROWD[:3])) == plain and len(plain) > 100


def test_every_point_can_be_captured(model):
    [output] = engine(model).generate(prompt(9, 9, 1), sampled(1), capture=Capture(all_points(2)), use_tqdm=False)
    assert list(output.captured) == sorted(all_points(2), key=list(output.captured).index)
    assert {p: list(v.shape[1:]) for p, v in output.captured.items()} == {
        p: list(point_shape(p, model.config)) for p in all_points(2)
    }
