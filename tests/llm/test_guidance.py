"""Classifier-free guidance: the tokens are those of transformers, alone and in a crowd."""

import copy
import random

import pytest
import torch
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from llama import LLM, Capture, ParameterError, SamplingParams
from tests.model.pairs import SMALL, make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("guidance"), seed=5, noise=0.15, eos_token_id=None, **SMALL)


def prompt(length, seed):
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(length)]


def engine(model, **options):
    return LLM(model, **{"block_size": 4, "num_blocks": 300, "max_num_seqs": 16, **options})


def guided(scale, negative=None, **fields):
    given = {"max_tokens": 12, "temperature": 0, "guidance_scale": scale, "negative_prompt": negative}
    return SamplingParams(**{**given, **fields})


CASES = [  # prompt, negative prompt, scale
    (prompt(5, 1), prompt(5, 2), 1.5),
    (prompt(3, 3), prompt(30, 4), 3.0),
    (prompt(33, 5), prompt(2, 6), 2.0),
    (prompt(33, 5), None, 2.0),
    (prompt(33, 5), [*prompt(33, 5)[:24], *prompt(6, 7)], -1.0),
    (prompt(1, 8), prompt(1, 9), 0.0),
]


@pytest.fixture(scope="module")
def expected(pair):
    """What transformers writes for each of the cases, greedily."""
    theirs, _ = pair
    found = []
    for ids, negative, scale in CASES:
        told = None if negative is None else torch.tensor([negative])
        processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, theirs, unconditional_ids=told)
        written = theirs.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, logits_processor=[processor], pad_token_id=0
        )
        found.append(written[0, len(ids) :].tolist())
    return found


@pytest.mark.parametrize("case", range(len(CASES)))
def test_tokens_are_those_of_transformers(pair, expected, case):
    ids, negative, scale = CASES[case]
    [output] = engine(pair[1]).generate(ids, guided(scale, negative), use_tqdm=False)
    assert output.outputs[0].token_ids == expected[case]


def test_it_changes_tokens(pair, expected):
    plain = engine(pair[1]).generate([ids for ids, _, _ in CASES], SamplingParams(temperature=0, max_tokens=12))
    assert sum(o.outputs[0].token_ids != wanted for o, wanted in zip(plain, expected, strict=True)) >= 4


SETTINGS = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 11},
    "tight": {"max_num_batched_tokens": 2, "max_num_seqs": 2},
    "pressed": {"num_blocks": 24, "max_num_batched_tokens": 31},
    "few": {"max_num_seqs": 3},
    "drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}},
}


@pytest.fixture(scope="module")
def alone(pair):
    """Requests with and without guidance, and what each writes by itself in an engine without a prefix cache."""
    others = [
        (prompt(33, 5), SamplingParams(seed=1, max_tokens=15)),
        (prompt(20, 11), SamplingParams(seed=2, max_tokens=15, n=2, frequency_penalty=0.7)),
        (prompt(33, 5), guided(2.0, prompt(9, 12), seed=3, temperature=0.9, repetition_penalty=1.2, logprobs=2)),
        (prompt(6, 13), guided(2.0, prompt(9, 12), seed=4, temperature=0.9, allowed_token_ids=[*range(30)])),
        (prompt(6, 14), guided(1.0, prompt(9, 12), seed=5, temperature=0.9)),
        (prompt(6, 15), guided(2.5, seed=5, temperature=0.9, logits_processors=[lambda p, o, logits: -logits])),
    ]
    asks = [*((ids, guided(scale, negative)) for ids, negative, scale in CASES), *others]
    solo = [engine(pair[1], enable_prefix_caching=False).generate(*one, use_tqdm=False)[0] for one in asks]
    return asks, solo


@pytest.mark.parametrize("setting", SETTINGS)
def test_in_a_crowd(pair, alone, expected, setting):
    asks, solo = alone
    order = list(range(len(asks))) * 2
    random.Random(setting).shuffle(order)
    llm = engine(pair[1], **SETTINGS[setting])
    outputs = llm.generate(*map(list, zip(*(asks[i] for i in order), strict=True)), use_tqdm=False)
    for i, output in zip(order, outputs, strict=True):
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in solo[i].outputs], asks[i]
        if i < len(expected):
            assert output.outputs[0].token_ids == expected[i]
    llm.engine.check()
    if setting == "pressed":
        assert llm.engine.metrics().num_preemptions > 0


def test_the_books_are_right_after_every_step_and_every_abort(pair):
    llm = engine(pair[1], num_blocks=20, max_num_batched_tokens=9, max_num_seqs=5)
    rng = random.Random(3)
    for round in range(30):
        for i in range(4):
            ids, negative, scale = rng.choice(CASES)
            params = (
                guided(scale, negative, max_tokens=rng.randint(1, 8))
                if rng.random() < 0.7
                else SamplingParams(max_tokens=9)
            )
            llm.engine.add(llm.engine.request(f"{round}.{i}", ids, params, negative_token_ids=negative or ()))
        for _ in range(rng.randint(1, 12)):
            llm.engine.step()
            llm.engine.check()
        for i in range(4):
            llm.engine.abort(f"{round}.{i}")
            llm.engine.check()
        assert not llm.engine.has_unfinished and llm.engine.metrics().num_used_blocks == 0


def test_a_step_without_memory_is_tried_again_with_both_prompts_or_fails(pair, monkeypatch):
    llm = engine(pair[1])
    ids, negative, scale = CASES[0]
    launch, failures = llm.engine.runner.launch, [True, False, True, True, False]

    def without_memory(plan):
        if failures and failures.pop(0):
            raise torch.OutOfMemoryError("none left")
        return launch(plan)

    monkeypatch.setattr(llm.engine.runner, "launch", without_memory)
    [wanted] = engine(pair[1]).generate(ids, guided(scale, negative), use_tqdm=False)
    [output] = llm.generate(ids, guided(scale, negative), use_tqdm=False)
    assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
    failures += [True] * 100
    [output] = llm.generate(ids, guided(scale, negative), use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"
    llm.engine.check()


def test_the_longer_of_both_prompts_clips_the_answer(pair):
    llm = engine(pair[1], max_model_len=40)
    [output] = llm.generate(prompt(3, 1), guided(2.0, prompt(36, 2), max_tokens=30), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4 and output.outputs[0].finish_reason == "length"


def test_raw_log_probabilities_are_those_of_the_prompt_alone(pair):
    _, model = pair
    ids, negative, scale = CASES[0]
    [output] = engine(model).generate(ids, guided(scale, negative, logprobs=0), use_tqdm=False)
    whole = [*ids, *output.outputs[0].token_ids]
    wanted = model.logits(torch.tensor([whole]))[0].log_softmax(-1)
    for i, entry in enumerate(output.outputs[0].logprobs):
        [(token, found)] = entry.items()
        assert found.logprob == pytest.approx(float(wanted[len(ids) + i - 1, token]), abs=1e-9)


@pytest.mark.parametrize("scale", [1e30, -1e30])
@pytest.mark.parametrize("temperature", [0, 1e-30, 5])
def test_the_largest_scale_leaves_finite_logits_in_float32(pair, scale, temperature):
    llm = engine(copy.deepcopy(pair[1]).float())
    [output] = llm.generate(CASES[0][0], guided(scale, CASES[0][1], temperature=temperature), use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "fields", "capture", "message"),
    [
        ({}, {"n": 2}, None, "guidance_scale needs n=1, got n=2"),
        ({}, {"guidance_scale": None}, None, "negative_prompt needs guidance_scale"),
        ({}, {"guidance_scale": float("nan")}, None, r"guidance_scale must be a number from -1e\+30 to 1e\+30"),
        ({}, {"negative_prompt": ()}, None, "negative_prompt must be a text or token ids that are not empty"),
        ({}, {"negative_prompt": [97]}, None, r"negative_prompt must hold token ids in \[0, 96\], got 97"),
        ({}, {"negative_prompt": "text"}, None, "negative_prompt as text needs a tokenizer"),
        ({"max_num_seqs": 1}, {}, None, "guidance_scale needs max_num_seqs and max_num_batched_tokens of at least 2"),
        ({"max_model_len": 20}, {"negative_prompt": prompt(20, 1)}, None, "negative_prompt has 20 tokens"),
        ({"num_blocks": 8}, {"negative_prompt": prompt(20, 1)}, None, "can never run: the KV cache has 8 blocks of 4"),
        ({}, {}, Capture("norm"), "capture and interventions do not go with guidance_scale"),
    ],
)
def test_what_cannot_be_is_refused(pair, options, fields, capture, message):
    llm = engine(pair[1], **options)
    with pytest.raises(ParameterError, match=message):
        llm.generate(prompt(5, 1), guided(**{"scale": 2.0, "negative": [1], **_renamed(fields)}), capture=capture)
    assert not llm.engine.has_unfinished


def test_a_text_that_is_not_used_or_cannot_fit_is_not_encoded(folder, monkeypatch):
    llm = LLM(folder, num_blocks=32)
    encode = llm.tokenizer.encode
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, **options: encode({"x": text}[text[0]], **options))
    with pytest.raises(ParameterError, match=r"negative_prompt has at least \d+ tokens and the context is 256") as told:
        llm.generate("x", guided(2.0, "y" * 10_000))
    assert told.value.param == "negative_prompt"
    assert llm.generate("x", guided(1.0, "y" * 10_000, max_tokens=1), use_tqdm=False)[0].finished


def _renamed(fields):
    names = {"guidance_scale": "scale", "negative_prompt": "negative"}
    return {names.get(name, name): value for name, value in fields.items()}
