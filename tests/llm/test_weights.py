"""New weights for a running engine, and computed prefixes kept in files."""

import asyncio
import random
from functools import partial

import pytest
import torch

from llama import LLM, AsyncLLM, Capture, ParameterError, SamplingParams
from llama.llm.weights import update_weights
from llama.model.kv_cache import KVCache
from tests.model.models import hugging_face_weights, tiny_model

PARAMS = SamplingParams(max_tokens=8, temperature=0.7, seed=1, ignore_eos=True)
PROMPT = [random.Random(1).randrange(97) for _ in range(33)]


def tokens(runs, prompt=PROMPT):
    [output] = runs.generate(prompt, PARAMS, use_tqdm=False)
    return output.outputs[0].token_ids


def engine(model, **options):
    return LLM(model, **{"block_size": 4, "num_blocks": 60, **options})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # float32 weights are packed
def test_an_updated_model_is_the_one_that_the_weights_came_from(dtype, tied):
    changes = {"dtype": dtype, "tie_word_embeddings": tied}
    new = tiny_model(seed=5, **changes)
    model = tiny_model(**changes)
    model.prepare(packing="always")
    runs = engine(model)
    before, expected = tokens(runs), tokens(engine(tiny_model(seed=5, **changes)))
    count = runs.update_weights((name, tensor.double()) for name, tensor in hugging_face_weights(new).items())
    assert count == len(hugging_face_weights(new))
    assert tokens(runs) == expected != before
    some = {n: t for n, t in hugging_face_weights(tiny_model(**changes)).items() if "k_proj" not in n}
    runs.update_weights(some.items())
    runs.update_weights([(n, t) for n, t in hugging_face_weights(tiny_model(**changes)).items() if "k_proj" in n])
    assert tokens(runs) == before
    assert all(linear.is_prepared for linear in (runs.model.lm_head, runs.model.layers[0].mlp.down_proj)) or (
        dtype == torch.float64
    )


def test_running_requests_are_waited_for_or_the_update_is_refused():
    runs = engine(tiny_model())
    expected = tokens(engine(tiny_model()))
    stream = runs.stream(PROMPT, PARAMS)
    next(stream)
    weights = hugging_face_weights(tiny_model(seed=5))
    with pytest.raises(ParameterError, match="update_weights needs an idle engine"):
        runs.update_weights(weights.items())
    runs.update_weights(weights.items(), wait=True)
    assert [token for piece in stream for token in piece.token_ids] == expected[1:]
    assert tokens(runs) == tokens(engine(tiny_model(seed=5)))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.0.mlp.up.weight", torch.zeros(2), "the model has no tensor"),
        ("model.norm.weight", torch.zeros(47), r"model.norm.weight must be floats \[48\], got torch.float32 \[47\]"),
        ("model.norm.weight", torch.zeros(48, dtype=torch.int64), "must be floats"),
        ("model.norm.weight", torch.zeros(48, device="meta"), "must hold its numbers"),
        ("model.norm.weight", torch.zeros(48).to_sparse(), "must hold its numbers"),
        ("model.norm.weight", torch.full((48,), torch.inf), "holds NaN or infinities"),
        ("model.norm.weight", [0.0], "got list"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(name, tensor, message):
    runs = engine(tiny_model())
    before = tokens(runs)
    with pytest.raises(ParameterError, match=message):
        runs.update_weights([(name, tensor)])
    assert tokens(runs) == before


def test_what_is_no_pair_of_a_name_and_a_tensor_is_refused():
    runs = engine(tiny_model())
    wrongs = (None, 5, len, torch.tensor(1.0), {"model.norm.weight": torch.ones(48)}, [3], [("model.norm.weight",)])
    for wrong in wrongs:
        with pytest.raises(ParameterError, match=r"^named_tensors must be pairs of a name and a tensor, .* got ") as e:
            runs.update_weights(wrong)
        assert e.value.param == "named_tensors"
    with pytest.raises(ParameterError, match=r"the model has no tensor \[\]"):
        runs.update_weights([([], torch.ones(48))])


def test_a_kept_prefix_is_found_by_another_engine(tmp_path):
    path = tmp_path / "prefix.safetensors"
    assert engine(tiny_model()).save_prefix(PROMPT, path) == 32
    other = engine(tiny_model(), block_size=8)
    assert other.load_prefix(path) == 32
    [output] = other.generate([*PROMPT[:32], 5, 6], PARAMS, use_tqdm=False)
    assert output.num_cached_tokens == 32
    assert output.outputs[0].token_ids == tokens(engine(tiny_model()), [*PROMPT[:32], 5, 6])
    assert other.load_prefix(path) == 32  # once more changes nothing
    other.engine.check()
    assert other.engine.metrics().num_cached_blocks <= 6


@pytest.mark.parametrize("changes", [{"seed": 3}, {"dtype": torch.float32}])
def test_a_prefix_of_another_model_is_refused(tmp_path, changes):
    path = tmp_path / "prefix.safetensors"
    engine(tiny_model()).save_prefix(PROMPT, path)
    with pytest.raises(ParameterError, match="does not hold a prefix that this model"):
        engine(tiny_model(**changes)).load_prefix(path)
    with pytest.raises(ParameterError, match="needs 8 blocks of the KV cache, 7 are free"):
        engine(tiny_model(), num_blocks=7, max_model_len=24).load_prefix(path)
    with pytest.raises(ParameterError, match="enable_prefix_caching"):
        engine(tiny_model(), enable_prefix_caching=False).load_prefix(path)


def test_a_prefix_in_float8_with_other_scales_is_refused(tmp_path):
    path, model = tmp_path / "prefix.safetensors", tiny_model()
    scales = torch.full((model.config.num_hidden_layers, 2, model.config.num_key_value_heads), 0.01)
    model.kv_scales = scales
    runs = engine(model, kv_cache_dtype="fp8")
    assert runs.save_prefix(PROMPT, path) == runs.load_prefix(path) == 32
    for others in (None, 2 * scales):
        model.kv_scales = others
        with pytest.raises(ParameterError, match="does not hold a prefix that this model"):
            engine(model, kv_cache_dtype="fp8").load_prefix(path)


def test_a_file_that_holds_no_prefix_is_named(tmp_path):
    runs = engine(tiny_model())
    (tmp_path / "garbage").write_bytes(b"garbage" * 9)
    with pytest.raises(ParameterError, match="garbage: is not a safetensors file"):
        runs.load_prefix(tmp_path / "garbage")
    with pytest.raises(ParameterError, match="none: there is no such file"):
        runs.load_prefix(str(tmp_path / "none"))
    runs.engine.check()


def test_a_prefix_is_not_computed_for_a_path_where_it_cannot_be_kept(tmp_path):
    runs = engine(tiny_model())
    with pytest.raises(ParameterError, match="no/file: there is no folder") as caught:
        runs.save_prefix(PROMPT, tmp_path / "no" / "file")
    assert caught.value.param == "path" and runs.engine.metrics().num_prompt_tokens == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # float32 weights are packed
def test_a_prefix_from_before_a_weight_was_edited_is_refused(tmp_path, dtype):
    path, name = tmp_path / "prefix.safetensors", "model.layers.0.self_attn.o_proj.weight"
    model = tiny_model(dtype=dtype)
    model.prepare(packing="always")
    runs = engine(model)
    runs.save_prefix(PROMPT, path)
    kept = hugging_face_weights(model)[name].clone()
    edited = kept.clone()
    edited[:, 16:32] = 0  # one head
    runs.update_weights([(name, edited)])
    with pytest.raises(ParameterError, match="does not hold a prefix that this model"):
        runs.load_prefix(path)
    runs.update_weights([(name, kept)])
    assert runs.load_prefix(path) == 32


def test_weights_that_were_changed_by_hand_are_seen_after_the_prefix_cache_was_dropped(tmp_path):
    runs = engine(tiny_model())
    runs.save_prefix(PROMPT, tmp_path / "prefix.safetensors")
    runs.model.layers[0].mlp.down_proj.weight.data[5] += 1
    runs.reset_prefix_cache()
    with pytest.raises(ParameterError, match="does not hold a prefix that this model"):
        runs.load_prefix(tmp_path / "prefix.safetensors")


def halved(parameter):
    with torch.no_grad():
        parameter.mul_(0.5)


CHANGES = {
    "in place": lambda model: halved(model.layers[0].mlp.down_proj.weight),
    "by an optimizer": lambda model: one_step(model, torch.optim.SGD),
    "by a fused optimizer": lambda model: one_step(model, partial(torch.optim.SGD, fused=True)),
    "by another library's optimizer": lambda model: one_step(model, Uncounted),
    "state dict": lambda model: model.load_state_dict(tiny_model(seed=5).state_dict()),
    "others in their place": lambda model: model.load_state_dict(tiny_model(seed=5).state_dict(), assign=True),
    "another module": lambda model: setattr(model.layers[0], "mlp", tiny_model(seed=5).layers[0].mlp),
    "another parameter": lambda model: setattr(
        model.norm, "weight", torch.nn.Parameter(-model.norm.weight, requires_grad=False)
    ),
}


class Uncounted(torch.optim.SGD):
    """Writes as a kernel of one's own does: PyTorch does not notice."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad


def one_step(model, optimizer):
    model.requires_grad_(True)
    optimizer = optimizer(model.parameters(), lr=1.0)
    logits = model.logits(torch.tensor([PROMPT]), grad=True)[0]
    torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(PROMPT[1:])).backward()
    optimizer.step()
    model.requires_grad_(False)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_prefixes_of_a_model_that_was_changed_by_hand_are_forgotten(change, tmp_path):
    runs = engine(tiny_model())
    before, digest = tokens(runs), runs.model.digest()
    change(runs.model)
    expected = tokens(engine(runs.model, enable_prefix_caching=False))
    [found] = runs.generate(PROMPT, PARAMS, use_tqdm=False)
    assert found.num_cached_tokens == 0 and runs.model.digest() != digest
    assert found.outputs[0].token_ids == expected != before
    runs.save_prefix(PROMPT, tmp_path / "prefix.safetensors")
    other = engine(tiny_model())
    change(other.model)
    assert other.load_prefix(tmp_path / "prefix.safetensors") == 32
    assert tokens(other) == expected
    assert other.engine.metrics().num_prefix_hits == 32  # what was read just before is not forgotten


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, fused=True), Uncounted])
def test_training_another_model_leaves_the_prefix_cache(optimizer):
    runs = engine(tiny_model())
    tokens(runs)
    one_step(tiny_model(), optimizer)
    [found] = runs.generate(PROMPT, PARAMS, use_tqdm=False)
    assert found.num_cached_tokens > 0


def test_a_module_that_was_replaced_is_read():
    runs = engine(tiny_model())
    tokens(runs)
    CHANGES["another module"](runs.model)
    points = ["layers.0.mlp_act", "layers.1.resid_post"]
    one, read = SamplingParams(max_tokens=1), Capture(points, positions="prompt")
    [output] = runs.generate([PROMPT], one, capture=read, use_tqdm=False)
    _, expected = runs.model.run_with_cache(torch.tensor([PROMPT]), points)
    for point in points:
        torch.testing.assert_close(output.captured[point], expected[point][0], rtol=0, atol=1e-10)


def test_a_model_that_was_cast_under_its_engine_is_one_clear_error():
    runs = engine(tiny_model())
    tokens(runs)
    runs.model.float()
    with pytest.raises(ParameterError, match=r"was torch.float64 on cpu .* it is torch.float32 on cpu"):
        tokens(runs)
    runs.model.double()
    tokens(runs)


def test_a_request_that_runs_while_the_prefix_cache_is_dropped_shares_nothing_of_its_own():
    runs = engine(tiny_model())
    stream = runs.stream(PROMPT, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    written = [*next(stream).token_ids]
    runs.model.load_state_dict(tiny_model(seed=5).state_dict())
    runs.reset_prefix_cache()
    tokens(runs)  # its prompt's blocks are computed anew and shared
    written += [token for piece in stream for token in piece.token_ids]
    longer = [*PROMPT, *written]
    assert tokens(runs, longer) == tokens(engine(runs.model, enable_prefix_caching=False), longer)
    hits = runs.engine.metrics().num_prefix_hits
    tokens(runs, longer)
    assert runs.engine.metrics().num_prefix_hits == hits + len(longer) // 4 * 4


def test_weights_that_ranks_share_count_as_a_whole_for_what_is_kept():
    model, told = tiny_model(), []
    before = model.digests.of(model, model.config)
    update_weights(model, hugging_face_weights(model).items(), told.append)
    assert told[-1] == {"weights": None} and model.digests.of(model, model.config) != before


@pytest.mark.parametrize("options", [{}, {"speculative_config": {"method": "draft_model", "model": "DRAFT"}}])
def test_an_engine_that_slept_goes_on_as_before(options, tmp_path):
    if options:
        tiny_model(seed=3).save_pretrained(tmp_path)
        options = {"speculative_config": {**options["speculative_config"], "model": str(tmp_path)}}
    runs = engine(tiny_model(), **options)
    expected = tokens(runs)
    storages = {cache.data.untyped_storage() for cache in vars(runs.engine).values() if isinstance(cache, KVCache)}
    storages.add(runs.engine.runner.kv.data.untyped_storage())
    sizes = [storage.nbytes() for storage in storages]
    assert len(storages) == 1 + bool(options) and all(sizes)
    stream = runs.stream(PROMPT, PARAMS)
    next(stream)
    with pytest.raises(ParameterError, match="sleep needs an idle engine"):
        runs.sleep()
    runs.sleep(wait=True)
    assert [token for piece in stream for token in piece.token_ids] == expected[1:]
    runs.sleep()
    assert runs.is_sleeping() and not any(storage.nbytes() for storage in storages)
    for call in (lambda: runs.generate(PROMPT, PARAMS), lambda: runs.load_prefix(tmp_path / "none")):
        with pytest.raises(ParameterError, match="the engine sleeps"):
            call()
    runs.update_weights([])
    runs.wake_up()
    runs.wake_up()
    assert not runs.is_sleeping() and [storage.nbytes() for storage in storages] == sizes
    [output] = runs.generate(PROMPT, PARAMS, use_tqdm=False)
    assert output.outputs[0].token_ids == expected and output.num_cached_tokens == 0


def test_where_the_memory_is_gone_the_engine_sleeps_on(monkeypatch):
    runs = engine(tiny_model())
    expected = tokens(runs)
    runs.sleep()
    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "resize_", lambda *_: (_ for _ in ()).throw(RuntimeError("none")))
        with pytest.raises(MemoryError, match="the KV cache takes"):
            runs.wake_up()
    assert runs.is_sleeping()
    runs.wake_up()
    assert tokens(runs) == expected


def test_async_llm_changes_weights_and_sleeps_between_requests():
    async def main():
        async with AsyncLLM(engine(tiny_model())) as llm:
            old, new = tokens(engine(tiny_model())), tokens(engine(tiny_model(seed=5)))
            weights = hugging_face_weights(tiny_model(seed=5))
            first = await llm.submit(PROMPT, PARAMS)
            with pytest.raises(ParameterError, match="update_weights needs an idle engine"):
                await llm.update_weights(weights.items())
            update = asyncio.create_task(llm.update_weights(weights.items(), wait=True))
            await asyncio.sleep(0)
            waiting = [asyncio.create_task(llm.submit(PROMPT, PARAMS)) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            assert not update.done() and (await first.result()).outputs[0].token_ids == old
            assert await update == len(weights)
            for each in waiting[1:]:
                assert (await (await each).result()).outputs[0].token_ids == new
            await llm.sleep(wait=True)
            with pytest.raises(ParameterError, match="the engine sleeps"):
                await llm.submit(PROMPT, PARAMS)
            await llm.wake_up()
            return (await (await llm.submit(PROMPT, PARAMS)).result()).outputs[0].token_ids == new

    assert asyncio.run(main())
