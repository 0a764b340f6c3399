"""A draft model changes no token, and where it is the model itself all of its drafts are right."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.api.errors import ConfigError
from llama.engine.engine import Engine
from llama.llm.llm import LLM
from llama.model.linear import Linear
from llama.model.transformer import Transformer
from tests.engine.fakes import add
from tests.engine.test_speculation import Toy, make_engine, run
from tests.model.models import tiny_model
from tests.test_equivalence import EOS, Case, Run, ask, check, model, oracle


def opposite() -> Transformer:
    """It holds the least likely token for the most likely."""
    made = tiny_model()
    made.lm_head.weight.neg_()
    return made


DRAFTS = {
    "the model itself": model,
    "a smaller one": lambda: tiny_model(seed=5, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1),
    "one that is always wrong": opposite,
}


def drafting(draft: Transformer, case: Case | None = None, *, most: int = 4, **options) -> Engine:
    speculative = {"method": "draft_model", "model": "x", "num_speculative_tokens": most, "disable_by_batch_size": 1000}
    config = (case or Case()).config(**options, speculative_config=speculative)
    return Engine(model(), config, eos_token_ids={EOS}, draft=draft)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"budget": 7, "block_size": 2},
        {"num_tokens": 96, "cache": "warm"},
        {"preempt": True, "lag": 1, "strangers": True},
    ],
    ids=str,
)
def test_tokens_are_the_oracles(draft, changes, monkeypatch):
    case = replace(Case(), **changes)

    def make(case: Case) -> Engine:
        engine = drafting(DRAFTS[draft](), case)
        engine.runner.lag, engine.runner._scored_rows = case.lag, 7
        return engine

    monkeypatch.setattr("tests.test_equivalence.make_engine", make)
    metrics = check(case).metrics()
    assert metrics.num_draft_tokens > 5
    share = metrics.num_accepted_tokens / metrics.num_draft_tokens
    assert {"the model itself": share > 0.7, "one that is always wrong": share < 0.5}.get(draft, share > 0)


PLAIN = {"ignore_eos": True, "max_tokens": 21}
RULES = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "hot": {"temperature": 2.0, "min_p": 0.01},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "penalised": {"temperature": 1.0, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    "biased": {"temperature": 1.0, "logit_bias": {3: 5.0, 7: -100.0}, "min_tokens": 8, "stop_token_ids": (3,)},
    "several": {"temperature": 1.5, "n": 3},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_model_itself_is_always_right(rule):
    """In batches, behind prefix hits, after preemption and after full acceptance."""
    asked = [ask(40, 3 + i, **PLAIN | rule) for i in range(2)]
    engine = drafting(model(), max_num_batched_tokens=512)
    for _ in range(2):  # the second time the prompts are prefix hits
        answers = Run(Case(), engine).answers(asked)
        assert all(o.num_draft_tokens + 1 >= len(o.token_ids) for _, _, outputs in answers for o in outputs)
        if "stop_token_ids" not in rule:
            for _, _, outputs in answers:
                assert all(len(o.token_ids) == o.num_draft_tokens + 1 for o in outputs if o.num_draft_tokens)
                assert [len(o.token_ids) for o in outputs] == [1, 5, 5, 5, 5]
    assert engine.metrics().num_prefix_hits > 0
    engine = drafting(model(), num_blocks=17)
    answers = Run(Case(preempt=True), engine).answers(asked)
    assert engine.metrics().num_preemptions > 0
    if "stop_token_ids" not in rule:
        assert engine.metrics().num_accepted_tokens == engine.metrics().num_draft_tokens > 0


def test_what_it_lacks_is_caught_up_when_drafts_are_wanted_again():
    engine = drafting(model())
    asked = [ask(30, 4, temperature=1.0, ignore_eos=True, max_tokens=40)]
    engine.scheduler.speculation._most_sequences = 0  # as in a batch that is too large
    waiting = Run(Case(), engine)
    waiting.disturb = lambda: setattr(
        engine.scheduler.speculation, "_most_sequences", 1000 if engine.metrics().num_steps > 12 else 0
    )
    [(_, _, outputs)] = waiting.answers(asked)
    assert [t for o in outputs for t in o.token_ids] == oracle(asked[0], 0).token_ids
    metrics = engine.metrics()
    assert metrics.num_accepted_tokens == metrics.num_draft_tokens > 20 and metrics.num_steps < 22


def test_a_prompt_longer_than_a_step_is_caught_up_in_several():
    engine = drafting(model(), max_num_batched_tokens=16)
    asked = ask(48, 16, temperature=1.0, ignore_eos=True, max_tokens=24)
    [(_, _, outputs)] = Run(Case(), engine).answers([asked])
    assert [t for o in outputs for t in o.token_ids] == oracle(asked, 0).token_ids
    assert [o.num_draft_tokens for o in outputs][:7] == [0, 0, 0, 0, 0, 4, 4]
    assert engine.metrics().num_accepted_tokens == engine.metrics().num_draft_tokens


POOL = [
    ask(6, 3 + i, **PLAIN | rule, logprobs=i % 2)
    for i, rule in enumerate([*RULES.values(), {"temperature": 0, "n": 2}])
]


@settings(max_examples=8, deadline=None)
@given(
    draft=st.sampled_from(sorted(DRAFTS)),
    asked=st.lists(st.tuples(st.integers(0, len(POOL) - 1), st.integers(0, 6)), min_size=1, max_size=7),
    aborted=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 12)), max_size=3),
    budget=st.sampled_from([20, 64]),
    block_size=st.sampled_from([2, 4, 16]),
    spare_blocks=st.integers(0, 12),
    lag=st.integers(0, 1),
)
def test_interleavings_change_no_token(draft, asked, aborted, budget, block_size, spare_blocks, lag):
    """Requests that come and go at any step, in little memory."""
    num_blocks = 3 * (48 // block_size + 1) + spare_blocks
    engine = drafting(
        DRAFTS[draft](), max_num_batched_tokens=budget, block_size=block_size, num_blocks=num_blocks, max_num_seqs=5,
        max_model_len=48,
    )  # fmt: skip
    engine.runner.lag = lag
    arrivals, ends = [(delay, i, POOL[number]) for i, (number, delay) in enumerate(asked)], dict(aborted)
    told: dict[tuple[int, int], list[int]] = {}
    for step in range(10_000):
        for _, i, each in [arrival for arrival in arrivals if arrival[0] == step]:
            add(engine, str(i), list(each.prompt), each.params)
        for i in [i for i, at in ends.items() if at == step]:
            engine.abort(str(i))
        for output in engine.step():
            told.setdefault((int(output.request_id), output.index), []).extend(output.token_ids)
        engine.check()
        if step > 12 and not engine.has_unfinished:
            break
    assert engine.metrics().num_used_blocks == 0
    for i, (number, _) in enumerate(asked):
        for index in range(POOL[number].params.n):
            expected, tokens = oracle(POOL[number], index).token_ids, told.get((i, index), [])
            assert tokens == (expected[: len(tokens)] if i in ends else expected)


def test_a_grammar_holds():
    asks = [ask(5, 8, n=2, temperature=1.0, max_tokens=15, min_tokens=3), ask(5, 9, temperature=0, logprobs=1)]
    for draft in DRAFTS.values():
        ours, theirs = run(drafting(draft()), asks, Toy), run(make_engine(), asks, Toy)
        assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in theirs]


def test_drafts_stay_on_the_device_until_all_are_drawn(monkeypatch):
    """What one step of the draft model draws is what the next one computes, the tensor itself."""
    engine = drafting(model())
    draft_model = engine.scheduler.speculation.draft_model
    really, drawn, num_fed = draft_model._step, [], 0

    def step(feeds, token_ids, states):
        nonlocal num_fed
        num_fed += any(token_ids is tensor for tensor in drawn)
        drawn.append(really(feeds, token_ids, states))
        return drawn[-1]

    monkeypatch.setattr(draft_model, "_step", step)
    asks = [ask(3, 4 + i, temperature=1.0, max_tokens=21, ignore_eos=True) for i in range(3)]
    for (_, _, outputs), asked in zip(Run(Case(), engine).answers(asks), asks, strict=True):
        assert [t for o in outputs for t in o.token_ids] == oracle(asked, 0).token_ids
    assert len(drawn) == 4 * 4 and num_fed == 4 * 3


def test_where_its_context_ends_there_are_no_more_drafts():
    short = tiny_model(max_position_embeddings=32)
    engine = drafting(short)
    asked = ask(20, 4, temperature=0, ignore_eos=True, max_tokens=30)
    [(_, _, outputs)] = Run(Case(), engine).answers([asked])
    assert [t for o in outputs for t in o.token_ids] == oracle(asked, 0).token_ids
    assert sum(o.num_draft_tokens for o in outputs) == engine.metrics().num_accepted_tokens == 32 - 25


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft")
    for name, changes in {"target": {}, "draft": {"num_hidden_layers": 1}, "other": {"vocab_size": 98}}.items():
        tiny_model(dtype=torch.float32, **changes).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
def test_llm_loads_it_beside_the_model(folders, quantization):
    speculative = {"method": "draft_model", "model": str(folders / "draft"), "quantization": quantization}
    llm = LLM(folders / "target", dtype="float64", max_num_seqs=2, speculative_config=speculative)
    plain = LLM(folders / "target", dtype="float64", max_num_seqs=2)
    params = ask(1, 1, temperature=0.5, max_tokens=20).params
    ours, theirs = (each.generate([[1, 2, 3]], params, use_tqdm=False)[0] for each in (llm, plain))
    assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids and ours.metrics.num_draft_tokens > 0
    draft = llm.engine.scheduler.speculation.draft_model._model
    expected = tiny_model(dtype=torch.float32, num_hidden_layers=1).to(torch.float64)
    if quantization is not None:
        expected.quantise(quantization)
    for linear, other in zip((m for m in draft.modules() if isinstance(m, Linear)),
                             (m for m in expected.modules() if isinstance(m, Linear)), strict=True):  # fmt: skip
        assert linear.dense_weight().dtype == torch.float64 and torch.equal(linear.dense_weight(), other.dense_weight())


@pytest.mark.parametrize(("name", "told"), [("other", "has a vocab_size of 98, the model has 97"), ("no", "no such")])
def test_one_that_does_not_belong_to_the_model_is_refused(folders, name, told):
    speculative = {"method": "draft_model", "model": str(folders / name)}
    with pytest.raises((ConfigError, ValueError), match=told):
        LLM(folders / "target", speculative_config=speculative)
