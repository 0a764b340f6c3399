"""Decodes as recorded graphs, proven without a GPU: a graph is stood in for by calling the function again.

What was recorded is called as it was recorded, with whatever Python values it had then: a number that does not come
through the tensors that stay is a number of an old step. Between steps those tensors are filled with garbage.
"""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llama import SamplingParams
from llama.engine import graph_runner
from llama.engine.config import EngineConfig
from llama.engine.device import Mirror, fetch, pack, to_device
from llama.engine.engine import Engine
from llama.engine.graph_runner import GraphRunner
from llama.engine.graphs import Graphs, bucket_of
from llama.engine.memory import make_kv_cache, num_scored_rows, worst_step
from llama.engine.runner import Runner
from llama.llm.loras import read_lora
from tests import drafters, test_equivalence
from tests.engine.fakes import add
from tests.model.models import tiny_model
from tests.test_equivalence import ASKS, EOS, Case, Run, ask, make_engine, model, oracle


class Stand:
    """Stands in for CudaRecord, and counts."""

    def __init__(self):
        self.num_recorded = self.num_replays = 0
        self.memory_for = 10**6

    def used_bytes(self):
        return 1000 * self.num_recorded

    def __call__(self, function):
        if self.num_recorded == self.memory_for:
            raise torch.OutOfMemoryError("no memory for a graph")
        self.num_recorded += 1

        def replay():
            self.num_replays += 1
            return function()

        return replay


def graph_engine(case: Case, stand: Stand | None, model_=None, **options) -> Engine:
    """Without graphs where there is nothing to stand in for them."""

    def graphs(made, config) -> GraphRunner:
        kv = make_kv_cache(made, config, config.num_blocks)
        return GraphRunner(made, kv, config, eos_token_ids=frozenset({EOS}), record=stand)

    return make_engine(case, model_, runner=None if stand is None else graphs, **options)


def poison(engine: Engine) -> None:
    if isinstance(engine.runner, GraphRunner):
        engine.runner._logits.fill_(float("nan"))
        engine.runner._inputs._data.random_(0, 256)


class PoisonedRun(Run):
    def disturb(self) -> None:
        super().disturb()
        poison(self.engine)


def assert_as_the_oracle(engine: Engine, case: Case, asks) -> None:
    for asked, index, outputs in PoisonedRun(case, engine).answers(asks):
        expected = oracle(asked, index)
        assert [token for output in outputs for token in output.token_ids] == expected.token_ids, (asked, index)
        if expected.logprobs:
            entries = [item for output in outputs for item in output.logprobs]
            for ours, theirs in zip(entries, expected.logprobs, strict=True):
                test_equivalence.assert_same_entry(ours, theirs)
    assert engine.metrics().num_used_blocks == 0


CASES = {
    "lag 1": {"lag": 1},
    "lag 0, blocks of one": {"block_size": 1},
    "lag 1, three at a time": {"lag": 1, "max_num_seqs": 3},
    "lag 1, preempted": {"lag": 1, "preempt": True, "num_tokens": 128},
    "lag 1, poisoned cache, neighbours aborted": {"lag": 1, "poison": True, "strangers": True},
    "lag 1, drafts, poisoned cache": {"lag": 1, "poison": True, "drafts": "mixed"},
    "lag 0, drafts, preempted, blocks of one": {"drafts": "mixed", "preempt": True, "block_size": 1},
    "lag 1, drafts, six at a time": {"lag": 1, "drafts": "right", "max_num_seqs": 6},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_tokens_are_the_oracles(changes, monkeypatch):
    if "max_num_seqs" not in changes:
        monkeypatch.setattr(graph_runner, "bucket_of", lambda count: 1000)  # every step is padded to all rows
    case, stand = replace(Case(), **changes), Stand()
    engine = graph_engine(case, stand)
    if case.poison:
        engine.runner.kv.data.fill_(float("nan"))
    for _ in range(2):  # the second time most of it is replayed
        assert_as_the_oracle(engine, case, ASKS)
    assert stand.num_replays > (40 if case.drafts == "none" else 6)  # with drafts there are fewer steps


def run(engine: Engine) -> dict[tuple[str, int], list[int]]:
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.has_unfinished:
        poison(engine)
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return tokens


def keys(engine: Engine) -> set:
    return set(engine.runner._graphs._graphs)


def test_a_bucket_is_the_next_size_that_has_a_graph():
    sizes = [bucket_of(count) for count in range(1, 257)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112,
                                  128, 160, 192, 224, 256]  # fmt: skip
    assert all(count <= size <= max(count * 1.25, 1) for count, size in enumerate(sizes, 1))
    assert all(bucket_of(size) == size for size in sizes)


def test_a_step_takes_the_graph_of_its_bucket_and_of_no_more_than_all_rows():
    engine = graph_engine(Case(max_num_seqs=11), Stand())
    for count in (9, 11):
        for i in range(count):
            params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
            add(engine, f"{i}", [i + 1, 2], params)
        run(engine)
    assert {key[1] for key in keys(engine) if key[0] == "model"} == {10, 11}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_tokens_of_runs_take_the_graph_of_their_bucket(count):
    """Requests like ASKS[2] get six tokens a step: the bucket is that of count * 6 tokens."""
    case, stand = Case(max_num_seqs=4, drafts="right"), Stand()
    engine = graph_engine(case, stand)
    for _ in range(3):
        assert_as_the_oracle_of(engine, [ASKS[2]] * count)
    sizes = {key[1] for key in keys(engine) if key[0] == "model"}
    assert bucket_of(6 * count) in sizes and max(sizes) <= len(engine.runner._logits) == 4 + 4 * 5
    assert {key[3] for key in keys(engine) if key[0] == "model" and key[1] >= bucket_of(6 * count)} == {True}
    counts = engine.metrics()
    assert counts.num_accepted_tokens == counts.num_draft_tokens > 30


def test_runs_that_no_tile_holds_are_decodes():
    config = {"method": "ngram", "num_speculative_tokens": 32, "disable_by_batch_size": 1000}
    engine = graph_engine(Case(max_num_seqs=4, drafts="right"), Stand(), speculative_config=config)
    for _ in range(3):
        assert_as_the_oracle_of(engine, [ASKS[2]] * 2)
    assert engine.metrics().num_accepted_tokens > 20
    assert not any(key[3] for key in keys(engine) if key[0] == "model")


def assert_as_the_oracle_of(engine: Engine, asks) -> None:
    """All of them at once, answered as ASKS[2] is."""
    drafters.use(engine, lambda *_: drafters.KINDS["right"](oracle(ASKS[2], 0).token_ids))
    for i, asked in enumerate(asks):
        add(engine, f"{i}", list(asked.prompt), asked.params)
    assert all(tokens == oracle(ASKS[2], 0).token_ids for tokens in run(engine).values())


def test_the_first_step_of_a_kind_runs_as_it_is_the_second_is_recorded():
    stand = Stand()
    graphs, calls = Graphs(stand), []
    for _ in range(3):
        graphs.run("a", lambda: calls.append("a"))
    assert (len(calls), stand.num_recorded, stand.num_replays, len(graphs)) == (3, 1, 2, 1)
    graphs.run("b", lambda: calls.append("b"))
    graphs.forget(lambda key: key == "a")
    assert len(graphs) == 0
    graphs.run("a", lambda: calls.append("a"))
    assert stand.num_recorded == 1
    graphs.run("b", lambda: None)
    assert stand.num_recorded == 2


def test_a_kind_that_failed_is_not_recorded_at_its_next_step():
    stand, graphs = Stand(), Graphs(Stand())
    with pytest.raises(RuntimeError):
        graphs.run("a", lambda: (_ for _ in ()).throw(RuntimeError("no")))
    graphs.run("a", lambda: None)
    assert stand.num_recorded == 0 and len(graphs) == 0


def test_without_memory_for_more_graphs_the_rest_runs_as_it_is(caplog):
    stand = Stand()
    stand.memory_for = 1
    with caplog.at_level(logging.WARNING):
        assert_as_the_oracle(graph_engine(Case(lag=1), stand), Case(lag=1), ASKS[:6])
    assert stand.num_recorded == 1
    assert [record.message for record in caplog.records if "no memory for more than 1 graphs" in record.message]


def test_dropped_graphs_make_room_for_others():
    stand = Stand()
    stand.memory_for = 1
    graphs = Graphs(stand)
    for key in "aabb":
        graphs.run(key, lambda: None)
    assert list(graphs._graphs) == ["a"]
    stand.memory_for = 10
    graphs.forget(lambda key: key == "a")
    graphs.run("b", lambda: None)
    assert list(graphs._graphs) == ["b"]


def test_graphs_beyond_their_bytes_are_dropped_the_least_lately_used_first():
    graphs, ran = Graphs(Stand(), max_bytes=2000), []
    for key in "aabbabcccaac":
        graphs.run(key, lambda key=key: ran.append(key))
        assert graphs.nbytes == 1000 * len(graphs) <= 2000
    assert "".join(ran) == "aabbabcccaac"
    assert set(graphs._graphs) == {"a", "c"}  # b was dropped for c, and c used since a


def test_an_engine_whose_graphs_find_no_room_answers_all_the_same(monkeypatch):
    stand = Stand()
    engine = graph_engine(Case(lag=1), stand)
    monkeypatch.setattr(engine.runner._graphs, "_max_bytes", 1500)
    for _ in range(2):
        assert_as_the_oracle(engine, Case(lag=1), ASKS)
    assert len(engine.runner._graphs) == 1 and engine.graph_bytes == 1000 and stand.num_recorded > 10


class OneToken:
    """A grammar."""

    def fill_mask(self, row):
        row[:] = 0
        row[1] = 1 << 5  # token 37

    def advance(self, token):
        assert token == 37

    def fork(self):
        return self


def test_what_has_no_fixed_place_is_drawn_without_a_graph():
    """Biases, bans of stop ids and grammars: the model's graph still runs, the sampler's does not."""
    engine = graph_engine(Case(lag=1), Stand())
    asked = ask(4, 9, temperature=1.0, logit_bias={3: 5.0}, ignore_eos=True)
    assert_as_the_oracle(engine, Case(lag=1), [asked])
    assert keys(engine) == {("model", 1, False, False)}

    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, response_format={"type": "json_object"})
    add(engine, "grammar", [1, 2, 3], params, new_matcher=OneToken)
    assert run(engine)["grammar", 0] == [37] * 5
    assert keys(engine) == {("model", 1, False, False)}


def test_bans_end_within_a_graphed_run():
    asked = ask(5, 8, temperature=0, min_tokens=6, stop_token_ids=(1, 2, 4, 8, 16, 32, 64))
    engine = graph_engine(Case(lag=1), Stand())
    for _ in range(2):
        assert_as_the_oracle(engine, Case(lag=1), [asked])


def test_prompt_logprobs_are_computed_without_graphs():
    stand = Stand()
    engine = graph_engine(Case(), stand)
    add(engine, "a", list(range(1, 30)), SamplingParams(max_tokens=1, prompt_logprobs=1))
    (output,) = engine.step()
    assert len(output.prompt_logprobs) == 29
    assert not engine.runner._graphs._ready


def test_an_engine_that_enforces_eager_and_one_on_the_cpu_have_no_graphs():
    engine = Engine(tiny_model(), EngineConfig(max_model_len=64, max_num_batched_tokens=64, num_blocks=16))
    assert type(engine.runner) is Runner and engine.runner.lag == 0


def save_adapters(folder):
    """Adapters of tiny_model() named small and large, in folders of their names."""
    generator = torch.Generator().manual_seed(0)
    for name, rank in {"small": 4, "large": 40}.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(
            f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {2 * rank}, "target_modules": ["q_proj", "down_proj"]}}'
        )
        tensors = {}
        for layer in range(2):
            for module, (size_in, size_out) in {"self_attn.q_proj": (48, 64), "mlp.down_proj": (80, 48)}.items():
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, size_in, generator=generator) * 0.3
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(size_out, rank, generator=generator) * 0.3
        save_file(tensors, folder / name / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("adapters"))


def test_weights_in_place_of_others_are_recorded_anew(monkeypatch):
    engine = graph_engine(Case(lag=1), Stand())
    add(engine, "before", [7, 8, 9], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    run(engine)
    assert len(engine.runner._graphs)
    norm = engine.model.norm
    monkeypatch.setitem(norm._parameters, "weight", torch.nn.Parameter(-norm.weight, requires_grad=False))
    add(engine, "after", [7, 8, 9], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    assert not len(engine.runner._graphs)


def test_graphs_with_adapters_are_apart_and_recorded_anew_when_their_tensors_move(adapters, monkeypatch):
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    engine, eager = (graph_engine(Case(lag=1), stand, max_loras=2) for stand in (Stand(), None))
    for each in (engine, eager):
        for name in ("small", "large"):
            each.adapters.add(read_lora(each, model(), name, adapters / name))
    recorded = []
    graphs = engine.runner._graphs
    try_record = graphs._try_record
    monkeypatch.setattr(graphs, "_try_record", lambda key, f: recorded.append(key) or try_record(key, f))
    told = []
    for loras in ([None, None], ["small", None], ["small", "small"], ["large", "small"], ["large", None]):
        for each in (engine, eager):
            for i, lora in enumerate(loras):
                add(each, f"{i}", [7 + i, 8, 9], params, lora=lora)
        told.append(run(engine))
        assert told[-1] == run(eager)
    assert len({tuple(tokens["0", 0]) for tokens in told}) == 3
    assert recorded.count(("model", 2, True, False)) == 2  # the large one has made the small one's tensors grow
    assert recorded.count(("model", 2, False, False)) == 1


def test_packed_tensors_come_back_as_they_were():
    tensors = (
        torch.tensor([2**40, -1]),
        torch.empty(2, 0, dtype=torch.int64),
        torch.tensor([[1.5, float("nan")], [-0.0, float("-inf")]]),
        torch.tensor([0.1, 0.2], dtype=torch.float64),
        torch.tensor([True, False]),
    )
    for ours, theirs in zip(fetch(pack(tensors), tensors)(), tensors, strict=True):
        assert ours.dtype == theirs.numpy().dtype
        np.testing.assert_array_equal(ours, theirs.numpy())


def test_a_mirror_sends_all_fields_at_once_and_keeps_its_tensors():
    fields = {"a": ((3,), np.int64), "b": ((3, 2), np.int32), "c": ((3,), np.int8), "d": ((3,), np.float64)}
    mirror = Mirror(fields, torch.device("cpu"))
    kept = {name: tensor.data_ptr() for name, tensor in mirror.device.items()}
    for i, array in enumerate(mirror.host.values()):
        array[...] = i + 1
    assert not any(tensor.any() for tensor in mirror.device.values())
    mirror.send()
    for name, array in mirror.host.items():
        np.testing.assert_array_equal(mirror.device[name].numpy(), array)
        assert mirror.device[name].data_ptr() == kept[name] and (kept[name] - kept["a"]) % 256 == 0


def test_a_tensor_sees_nothing_of_what_becomes_of_its_array():
    array = np.arange(3, dtype=np.int32)
    tensor = to_device(array, torch.device("cpu"))
    array[:] = 7
    assert tensor.tolist() == [0, 1, 2] and tensor.dtype == torch.int32


@pytest.mark.parametrize("is_decode", [False, True])
@pytest.mark.parametrize("num_samples", [1, 5])
def test_the_worst_step_runs(is_decode, num_samples):
    speculative = {"method": "ngram"} if num_samples > 1 else None
    config = EngineConfig(
        max_num_batched_tokens=33, max_num_seqs=num_samples, block_size=4, speculative_config=speculative
    )
    made = tiny_model()
    worst_step(made, config.resolved(made.config, "cpu"), is_decode=is_decode)


def test_a_gpu_scores_more_of_a_prompt_at_once():
    assert [num_scored_rows(128_256, torch.device(name)) for name in ("cpu", "cuda", "meta")] == [32, 261, 32]
    assert num_scored_rows(1 << 30, torch.device("cuda")) == 1
