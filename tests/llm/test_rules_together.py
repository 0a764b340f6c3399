"""Grammars, functions over logits, guidance, penalties, seeds and changed activations in one request: each keeps what
it promises, in a crowd as alone; and with deterministic=True the bits do."""

import random
import re
from functools import partial

import pytest
import torch

from llama import LLM, Add, Capture, Replace, SamplingParams, Scale
from tests.llm.test_logits_processors import stirred
from tests.llm.test_response_formats import LONGEST, REGEX, SCHEMA, check
from tests.model.models import tiny_model

CHOICES = {"choice": ["left", "right turn", "rightly", "lest"]}
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2, "logit_bias": {101: 2.0}}
MOVED = partial(stirred, 4.0)


def asking(seed, **fields):
    return SamplingParams(**{"temperature": 1.5, "max_tokens": LONGEST, "seed": seed, "logprobs": 1, **fields})


CROWD = [
    asking(1, response_format=SCHEMA, logits_processors=[MOVED], **PENALTIES),
    asking(2, response_format=REGEX, logits_processors=[MOVED], n=3),
    asking(3, response_format=REGEX, **PENALTIES),
    asking(4, response_format=SCHEMA, guidance_scale=1.7, negative_prompt="no", logits_processors=[MOVED]),
    asking(5, response_format=REGEX, guidance_scale=-0.5, **PENALTIES),
    asking(6, structured_outputs=CHOICES, logits_processors=[MOVED], temperature=0),
    asking(7, logits_processors=[MOVED], max_tokens=20, **PENALTIES),
    asking(8, max_tokens=20, min_tokens=5),
]
FORMATS = {0: SCHEMA, 1: REGEX, 2: REGEX, 3: SCHEMA, 4: REGEX}
CHANGED = {0: [Scale("layers.0.z", 0.5, heads=[1])], 2: [Scale("layers.*.mlp_out", 2.0)]}
SETTINGS = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 17},
    "preempted": {"max_num_batched_tokens": 31},
    "drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}},
}


def run(llm, numbers):
    prompts = ["What is asked here" + "?" * (3 * number) for number in numbers]
    changes = [CHANGED.get(number) for number in numbers]
    outputs = llm.generate(prompts, [CROWD[number] for number in numbers], interventions=changes, use_tqdm=False)
    return [[(o.token_ids, o.finish_reason, o.text) for o in output.outputs] for output in outputs], outputs


def preempt_at_random(llm):
    scheduler, step, draw = llm.engine.scheduler, llm.engine.step, random.Random(3)

    def disturbed():
        running = [*scheduler.running.prefilling, *scheduler.running.decoding]
        if running and scheduler.num_preemptions < 40 and draw.random() < 0.4:
            scheduler.preempt(draw.choice(running))
        return step()

    llm.engine.step = disturbed


@pytest.fixture(scope="module")
def alone(llm):
    return [run(llm, [number])[0][0] for number in range(len(CROWD))]


@pytest.mark.parametrize("setting", SETTINGS)
def test_in_a_crowd_each_request_gets_what_it_gets_alone(folder, alone, setting):
    crowded = LLM(folder, dtype="float64", **{"num_blocks": 200, "max_num_seqs": 8, **SETTINGS[setting]})
    if setting == "preempted":
        preempt_at_random(crowded)
    order = list(range(len(CROWD))) * 2
    random.Random(setting).shuffle(order)
    found, outputs = run(crowded, order)
    assert found == [alone[number] for number in order]
    for number, output in zip(order, outputs, strict=True):
        for completion in output.outputs:
            if number in FORMATS:
                check(completion, FORMATS[number])
    assert (crowded.engine.metrics().num_preemptions > 10) == (setting == "preempted")
    crowded.engine.check()


def test_each_of_the_rules_shows(llm, alone):
    """Without one of them another text comes, or the tests above would show nothing."""
    without = {0: "logits_processors", 1: "logits_processors", 3: "guidance_scale", 4: "guidance_scale"}
    for number, name in without.items():
        neutral: object = [] if name == "logits_processors" else None
        fields = {field: getattr(CROWD[number], field) for field in CROWD[number].__dataclass_fields__}
        fields |= {name: neutral} | ({"negative_prompt": None} if name == "guidance_scale" else {})
        [output] = llm.generate(
            "What is asked here" + "?" * (3 * number),
            SamplingParams(**fields),
            interventions=CHANGED.get(number),
            use_tqdm=False,
        )
        assert output.outputs[0].token_ids != alone[number][0][0], (number, name)


def test_functions_see_what_the_grammar_allows_and_no_more(llm):
    tokenizer, seen = llm.get_tokenizer(), []

    def watch(prompt_ids, output_ids, logits):
        text = tokenizer.decode(output_ids)
        seen.append(text)
        for token in (logits > -torch.inf).nonzero().flatten().tolist():
            said = text + tokenizer.decode([token])
            assert any(choice.startswith(said) for choice in CHOICES["choice"]) or said in CHOICES["choice"]
        return -logits  # the least likely, of what is allowed

    [output] = llm.generate("x", asking(0, structured_outputs=CHOICES, temperature=0, logits_processors=[watch]))
    assert output.outputs[0].text in CHOICES["choice"] and output.outputs[0].finish_reason == "stop"
    assert len(seen) == len(output.outputs[0].token_ids)


def test_a_function_that_forbids_all_that_the_grammar_allows_ends_its_request(llm):
    def forbid(prompt_ids, output_ids, logits):
        return torch.where(logits > -torch.inf, -torch.inf, 0.0).to(logits.dtype)

    params = asking(0, structured_outputs=CHOICES, logits_processors=[forbid])
    broken, healthy = llm.generate(["x", "What is asked here?"], [params, asking(1, max_tokens=4)], use_tqdm=False)
    assert (broken.outputs[0].finish_reason, broken.outputs[0].stop_reason) == ("error", "logits_processors")
    assert healthy.outputs[0].finish_reason == "length"


def test_stop_strings_n_and_prompt_logprobs_beside_functions(llm):
    """The function is called for each completion with its own tokens."""
    lengths = []

    def watch(prompt_ids, output_ids, logits):
        lengths.append(len(output_ids))
        return logits

    params = asking(3, n=3, max_tokens=8, ignore_eos=True, prompt_logprobs=1, logits_processors=[watch], stop="zzz")
    [output] = llm.generate("abc", params, use_tqdm=False)
    assert sorted(lengths) == sorted([*range(8)] * 3)
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    plain = llm.generate("abc", asking(3, n=3, max_tokens=8, ignore_eos=True, stop="zzz"), use_tqdm=False)[0]
    assert [o.token_ids for o in output.outputs] == [o.token_ids for o in plain.outputs]


def bits(length, seed):
    return torch.randn(length, generator=torch.Generator().manual_seed(seed))


def prompt(length, seed):
    return random.Random(seed).choices(range(97), k=length)


def fixed(seed, **fields):
    return SamplingParams(
        **{"temperature": 1.0, "max_tokens": 9, "seed": seed, "ignore_eos": True, "logprobs": 3, **fields}
    )


READ = Capture(["layers.*.resid_post", "layers.1.q", "layers.0.mlp_act", "norm"], positions="all")
DETERMINISTIC = [
    (prompt(30, 1), fixed(1), READ, None),
    (prompt(30, 1), fixed(1), READ, [Add("layers.0.resid_post", bits(64, 1), scale=2)]),
    (prompt(30, 1), fixed(2), READ, [Add("layers.*.attn_out", bits(64, 2), norm_match=True)]),
    (prompt(33, 2), fixed(3), READ, [Scale("layers.1.z", 0.0, heads=[1]), Scale("layers.0.k", 1.5)]),
    (prompt(33, 2), fixed(4), READ, [Replace("layers.0.resid_mid", bits(64, 3), positions=[5, 21])]),
    (prompt(33, 2), fixed(5, logits_processors=[MOVED], frequency_penalty=0.3), READ, None),
    (prompt(20, 3), fixed(6, guidance_scale=1.5, negative_prompt=prompt(11, 4)), None, None),
    (prompt(20, 3), fixed(7, guidance_scale=2.0, logits_processors=[MOVED], repetition_penalty=1.2), None, None),
    (prompt(41, 5), fixed(8, allowed_token_ids=[*range(30)], logits_processors=[MOVED]), READ, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_request_alone_with_deterministic(dtype):
    model = tiny_model(dtype=dtype, hidden_size=64, intermediate_size=172)
    model.prepare()

    def answers(llm, numbers):
        outputs = llm.generate(
            *map(list, zip(*((DETERMINISTIC[i][0], DETERMINISTIC[i][1]) for i in numbers), strict=True)),
            capture=[DETERMINISTIC[i][2] for i in numbers],
            interventions=[DETERMINISTIC[i][3] for i in numbers],
            use_tqdm=False,
        )
        return [(o.outputs[0].token_ids, o.outputs[0].logprobs, o.captured, o.outputs[0].captured) for o in outputs]

    def llm(**options):
        options = {"block_size": 4, "num_blocks": 300, "max_num_seqs": 16, "deterministic": True, **options}
        return LLM(model, **options)

    alone = [answers(llm(enable_prefix_caching=False), [i])[0] for i in range(len(DETERMINISTIC))]
    for options in ({}, {"max_num_batched_tokens": 13}, {"num_blocks": 45, "max_num_batched_tokens": 37}):
        order = [*range(len(DETERMINISTIC))] * 2
        random.Random(len(options)).shuffle(order)
        for i, found in zip(order, answers(llm(**options), order), strict=True):
            assert found[:2] == alone[i][:2], (i, options)
            for ours, theirs in zip(found[2:], alone[i][2:], strict=True):
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[point], theirs[point]) for point in ours), (i, options)
    assert len({tuple(tokens) for tokens, *_ in alone}) == len(alone)
    assert re.fullmatch(r"torch\.(float32|bfloat16)", str(alone[0][2]["norm"].dtype))
