"""An engine across ranks gives the oracle's tokens, and log-probabilities to 1e-9, however its requests are run."""

import json
import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llama import LLM
from llama.api.errors import AdapterError, EngineDeadError, ParameterError
from llama.api.params import SamplingParams
from llama.engine import runner as engine_runner
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.engine.parallel_runner import RankLostError
from llama.engine.plan import Guided, Join, Plan
from llama.engine.wire import Frames, decode_plan, encode_plan, receive
from llama.llm import rank, ranks
from llama.llm.loras import read_lora
from llama.llm.replies import Replies
from llama.llm.requests import Inputs
from llama.model.lora.adapter import module_sizes
from tests import test_equivalence
from tests.parallel.ranks import engine_on_ranks
from tests.test_equivalence import ALONE, ASKS, DRAFTED, EOS, Case, check, combined, model

CONFIG = EngineConfig(
    max_model_len=256, max_num_batched_tokens=32, max_num_seqs=8, block_size=4, num_blocks=200, tensor_parallel_size=2
)
IN_ONE = replace(CONFIG, tensor_parallel_size=1)
MANY = pytest.param(4, marks=pytest.mark.slow)


@pytest.fixture
def on_ranks(folder, monkeypatch):
    """test_equivalence's cases run on engines across so many ranks."""
    monkeypatch.setattr(engine_runner, "num_scored_rows", lambda *_: 7)  # prompts are scored in several pieces

    def run(case, size, asks=ASKS):
        config = case.config(tensor_parallel_size=size)
        with engine_on_ranks(folder, config, frozenset({EOS})) as engine:
            engine.runner.lag = case.lag
            monkeypatch.setattr(test_equivalence, "make_engine", lambda case: engine)
            check(replace(case, poison=False), asks)
        return engine

    return run


CASES = {name: changes for name, changes in (ALONE | {"drafts": DRAFTED["ngram"]}).items() if name != "poisoned"}
QUICK = ("warm prefix cache", "few blocks", "preempted at random", "neighbours aborted", "update lags", "drafts")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_tokens_are_the_oracles(on_ranks, name):
    on_ranks(replace(Case(), **CASES[name]), 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("seed", range(24))
def test_combined(on_ranks, seed, size):
    case = combined(seed)
    on_ranks(replace(case, drafts="none" if case.drafts == "none" else "ngram"), size)


class Every:
    """A grammar: after n tokens, those whose id plus n three divides."""

    def __init__(self, count=0):
        self.count = count

    def fill_mask(self, words):
        words[:] = 0
        for token in range(-self.count % 3, 97, 3):
            words.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def advance(self, token_id):
        assert (token_id + self.count) % 3 == 0
        self.count += 1

    def rollback(self, num_tokens):
        self.count -= num_tokens

    def fork(self):
        return Every(self.count)


def make_adapter(path, modules, seed, r):
    sizes = module_sizes(model().config)
    generator = torch.Generator().manual_seed(seed)
    path.mkdir()
    names = [name for name in sizes if name.rpartition(".")[2] in modules]
    options = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": list(modules)}
    (path / "adapter_config.json").write_text(json.dumps(options))
    tensors = {}
    for name in names:
        a, b = "lora_A.weight", "lora_B.weight"
        if name == "model.embed_tokens":
            a, b = "lora_embedding_A", "lora_embedding_B"
        in_features, out_features = sizes[name]
        tensors[f"base_model.model.{name}.{a}"] = torch.randn(r, in_features, generator=generator) / 4
        tensors[f"base_model.model.{name}.{b}"] = torch.randn(out_features, r, generator=generator) / 4
    save_file(tensors, path / "adapter_model.safetensors")
    return path


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")


def answers(engine, adapters=(), **matcher):
    """Of requests with each adapter in turn, all at once."""
    found, names = {}, [None, *adapters]
    for i in range(2 * len(names)):
        params = SamplingParams(temperature=1.0, seed=i, max_tokens=10, logprobs=3, ignore_eos=True)
        engine.add(engine.request(f"{i}", [*range(i, i + 20)], params, lora=names[i % len(names)], **matcher))
    while engine.has_unfinished:
        for output in engine.step():
            assert output.finish_reason in (None, "length")
            tokens, logprobs = found.setdefault(output.request_id, ([], []))
            tokens += output.token_ids
            logprobs += [item.logprob for entry in output.logprobs for item in entry.values()]
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name][0] == expected[name][0]
        assert found[name][1] == pytest.approx(expected[name][1], abs=1e-9)


@pytest.mark.parametrize("size", [2, MANY])
def test_adapters_of_every_module_are_cut_as_their_weights(folder, tmp_path, size):
    """Ranks below the largest one, two adapters in one step, one that makes way for another, files that go."""
    folders = {"all": make_adapter(tmp_path / "all", MODULES, 1, 5)}
    modules = MODULES if size == 4 else ("o_proj", "embed_tokens", "lm_head")
    folders |= {name: make_adapter(tmp_path / name, (name,), i, 3) for i, name in enumerate(modules)}
    alone = Engine(model(), replace(IN_ONE, max_loras=2), eos_token_ids={EOS})
    config = replace(CONFIG, max_loras=2, tensor_parallel_size=size)
    with engine_on_ranks(folder, config, frozenset({EOS})) as engine:
        for each in (alone, engine):
            for name, path in folders.items():
                each.adapters.add(read_lora(each, each.model, name, path))
        for path in folders.values():
            (path / "adapter_model.safetensors").unlink()
        expected = answers(alone, folders)
        assert_same(answers(engine, folders), expected)
        assert len({tuple(tokens) for tokens, _ in expected.values()}) == len(expected)
        engine.adapters.remove("all")
        assert_same(answers(engine), answers(alone))


def test_an_adapter_that_another_rank_cannot_read_is_refused(folder, tmp_path):
    path = make_adapter(tmp_path / "adapter", ("q_proj",), 1, 4)
    with engine_on_ranks(folder, CONFIG) as engine:
        adapter = read_lora(engine, engine.model, "adapter", path)
        (path / "adapter_model.safetensors").unlink()
        with pytest.raises(AdapterError, match=r"^rank 1: .*has no adapter_model.safetensors"):
            engine.adapters.add(adapter)
        make_adapter(tmp_path / "other", ("q_proj",), 2, 4)
        (tmp_path / "other" / "adapter_model.safetensors").rename(path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=r"^rank 1: .*changed"):
            engine.adapters.add(adapter)
        assert_same(answers(engine), answers(Engine(model(), IN_ONE)))


def test_grammars(folder):
    matcher = {"new_matcher": Every}
    with engine_on_ranks(folder, CONFIG) as engine:
        assert_same(answers(engine, **matcher), answers(Engine(model(), IN_ONE), **matcher))


def test_a_whole_model_is_refused_for_several_ranks():
    with pytest.raises(ParameterError, match="tensor_parallel_size must be 1 for a model in one process, got 2"):
        Engine(model(), CONFIG)


def test_blocks_are_counted_by_rank_and_each_has_half_of_the_kv_heads(folder):
    config = replace(CONFIG, num_blocks=None, max_num_seqs=2)
    with engine_on_ranks(folder, config) as engine:
        assert engine.pool.num_blocks == 2 * 256 // 4
        assert engine.runner.own.kv.data.shape[-2] == model().config.num_key_value_heads // 2


def test_two_ranks_give_the_same_bits_alone_and_in_a_crowd(folder):
    config = replace(CONFIG, deterministic=True, enable_prefix_caching=False)
    prompts = [[(7 * i + j) % 97 for j in range(5 + 9 * i)] for i in range(6)]

    def logprobs(engine, numbers):
        found = {number: [] for number in numbers}
        for number in numbers:
            params = SamplingParams(temperature=1.0, seed=number, max_tokens=6, logprobs=2, ignore_eos=True)
            engine.add(engine.request(str(number), prompts[number], params))
        while engine.has_unfinished:
            for output in engine.step():
                found[int(output.request_id)] += [(t, e.logprob) for entry in output.logprobs for t, e in entry.items()]
        return found

    with engine_on_ranks(folder, config, dtype="float32") as engine:
        crowd = logprobs(engine, range(6))
        assert all(logprobs(engine, [number])[number] == crowd[number] for number in range(6))


def test_a_step_says_as_little_as_it_can(folder, monkeypatch):
    """One message; two sums a layer and one for the embedding, each of hidden x tokens; the logits of drawn rows."""
    sent, sums, gathers = [], [], []
    with engine_on_ranks(folder, CONFIG) as engine:
        config, send = model().config, engine.runner._peers.send
        for i in range(3):
            params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            engine.add(engine.request(f"{i}", [i, 2, 3, 4], params))
        engine.step()  # all prompts
        monkeypatch.setattr(engine.runner._peers, "send", lambda data: (sent.append(len(data)), send(data)))
        group = engine.model.lm_head.finish.__self__._group
        ours = SimpleNamespace(
            allreduce=lambda tensors: (sums.append(tensors[0].nbytes), group.allreduce(tensors))[1],
            allgather=lambda parts, tensors: (gathers.append(tensors[0].nbytes), group.allgather(parts, tensors))[1],
        )
        engine.model.lm_head.finish.__self__._group = ours
        engine.step()  # three decodes
        assert len(sent) == 1 and sent[0] < 1000
        assert sums == [3 * config.hidden_size * 8] * (2 * config.num_hidden_layers + 1)
        assert gathers == [3 * -(-config.vocab_size // 2) * 8]


def test_ranks_that_draw_other_tokens_end_the_engine(folder, caplog):
    with engine_on_ranks(folder, CONFIG) as engine:
        engine.add(engine.request("0", [1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True)))
        engine.step()
        engine.runner._drawn = {step: checksum + 1 for step, checksum in engine.runner._drawn.items()}
        with pytest.raises(EngineDeadError, match="rank 1: RuntimeError: in step 0 it drew other tokens than rank 0"):
            engine.step()
        with pytest.raises(EngineDeadError, match="drew other tokens"):
            engine.add(engine.request("1", [1], SamplingParams()))


@pytest.mark.parametrize("name", ["Communicator", "load_model", "fitting_blocks", "make_runner"])
def test_a_rank_that_fails_before_the_first_step_is_named(folder, monkeypatch, name):
    """Where ranks meet, while weights are read, in profiling, in the constructor: none waits for it."""
    plain = getattr(rank, name)

    def of_rank_1(*arguments, **named):
        if threading.current_thread().name == "rank 1":
            raise ZeroDivisionError("division by zero")
        return plain(*arguments, **named)

    monkeypatch.setattr(rank, name, of_rank_1)
    started = time.monotonic()
    with (
        pytest.raises(RankLostError, match="rank 1: ZeroDivisionError: division by zero"),
        engine_on_ranks(folder, replace(CONFIG, num_blocks=None)),
    ):
        pass
    assert time.monotonic() - started < 30


def test_ranks_that_do_not_meet_are_given_up_and_what_may_help_is_named(folder, monkeypatch):
    """On some machines the first sum over GPUs never comes back, on others it is nonsense."""
    check = rank.Communicator._check

    def never(communicator, device):
        if threading.current_thread().name == "rank 1":
            time.sleep(2)  # longer than the other one waits
        check(communicator, device)

    for name, function, patience, told in (
        ("_check", never, 0.5, r"did not meet within 0.5 seconds; .*NCCL_P2P_DISABLE=1"),
        ("sum", lambda communicator, x: x, ranks.MEET_SECONDS, r"first sum is .*NCCL_P2P_DISABLE=1"),
    ):
        with (
            monkeypatch.context() as patch,
            pytest.raises(RuntimeError, match=told),
        ):
            patch.setattr(ranks, "MEET_SECONDS", patience)
            patch.setattr(rank.Communicator, name, function)
            with engine_on_ranks(folder, CONFIG):
                pass


def test_a_step_past_its_deadline_ends_the_engine(folder, monkeypatch):
    with engine_on_ranks(folder, replace(CONFIG, step_timeout=1)) as engine:
        monkeypatch.setattr(engine.runner._peers, "send", lambda data: None)  # the other rank never hears of the step
        engine.add(engine.request("0", [1, 2, 3], SamplingParams()))
        with pytest.raises(EngineDeadError, match=r"longer than 1 seconds \(step_timeout\)"):
            engine.step()


@pytest.mark.parametrize("how", ["lost", "closed"])
def test_whatever_is_asked_of_an_engine_without_its_ranks_is_one_clear_error(folder, tmp_path, how, caplog):
    why = "it was closed" if how == "closed" else "rank 1 closed its connection"
    adapter = make_adapter(tmp_path / "adapter", ("q_proj",), 1, 4)
    with engine_on_ranks(folder, CONFIG) as engine:
        llm = object.__new__(LLM)
        llm.engine, llm.model, llm.replies = engine, engine.model, Replies(engine, None)
        llm.inputs = Inputs(engine, None, None, SamplingParams(), None)
        if how == "closed":
            llm.close()
        else:
            engine.runner._peers._state.peers[0].stream.shutdown(socket.SHUT_RDWR)
            with pytest.raises(EngineDeadError, match=why):  # as one learns of it who asks first
                engine.runner.ask({"sleep": True})
        caplog.clear()
        for call in (
            llm.sleep,
            llm.wake_up,
            llm.reset_prefix_cache,
            lambda: llm.update_weights([("model.norm.weight", torch.ones(48))]),
            lambda: llm.load_lora("name", adapter),
            lambda: llm.generate([1, 2, 3], use_tqdm=False),
        ):
            with pytest.raises(EngineDeadError, match=f"the engine is dead: {why}"):
                call()
    assert not caplog.records


def test_a_plan_comes_back_from_its_bytes():
    ints = lambda *values: np.array(values, np.int32)  # noqa: E731
    params = SamplingParams(
        temperature=0.1,
        logit_bias={3: -1.5, 7: -100.0},
        stop_token_ids=(5,),
        max_tokens=600,
        min_tokens=600,
        logprobs=2,
    )
    empty = {name: ints() for name in ("sample_rows", "sample_sources", "sample_positions")}
    plan = Plan(
        step=7,
        rows=ints(3, 1),
        query_lens=ints(1, 4),
        context_lens=ints(9, 4),
        num_decodes=1,
        token_ids=ints(-1, 5, 6, 7, 8),
        table_updates=np.arange(6, dtype=np.int32).reshape(3, 2),
        copies=np.zeros((0, 2), np.int32),
        guided=(Guided(1, 4, 1.3),),
        joins=(Join(1, params, 2**53 - 1, ints(5, 6, 7, 8), [9, 10]),),
        masks=ints(-1, 5).reshape(1, 2),
        **empty,
    )
    data = encode_plan(plan, lambda adapter: 0, {"forget": []})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        message = receive(theirs)
    found = decode_plan(message, {})
    for name in ("rows", "query_lens", "context_lens", "token_ids", "table_updates", "copies", "masks", "sample_rows"):
        assert np.array_equal(getattr(found, name), getattr(plan, name)), name
        assert getattr(found, name).dtype == np.int32
    assert (found.step, found.num_decodes, found.drafts, found.guided) == (7, 1, None, plan.guided)
    [join] = found.joins
    assert join.prompt.tolist() == [5, 6, 7, 8]
    assert (join.row, join.seed, join.output_token_ids) == (1, 2**53 - 1, [9, 10])
    assert join.params == replace(params, max_tokens=None)
    frames = Frames()
    assert [m.content["plan"]["step"] for byte in data + data for m in frames.take(bytes([byte]))] == [7, 7]
