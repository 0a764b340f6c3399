"""LLM: prompts in all forms, batches, streams, interruption, and the demo model against transformers."""

import dataclasses
import json
import signal
import sys
import time
from pathlib import Path

import make_tiny
import numpy as np
import pytest
import torch

from llama import LLM, SamplingParams, Transformer
from llama.llm.inputs import as_prompts
from llama.llm.loading import resolve_device, resolve_dtype
from llama.model.config import ConfigError
from tests import naive
from tests.fakes import byte_tokenizer
from tests.model.models import hugging_face_weights, tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with random weights and a tokenizer of bytes, chat in the Llama 3.1 format."""
    path = tmp_path_factory.mktemp("llm") / "tiny"
    make_tiny.make(path, dataclasses.replace(make_tiny.TINY, max_position_embeddings=256), dtype="float32", seed=0)
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_p": 0.25, "max_new_tokens": 7}))
    return path


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(folder, dtype="float64", num_blocks=200, max_num_seqs=8)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        assert not llm.engine.has_unfinished and not len(llm.replies)
        llm.engine.check()


@pytest.fixture(scope="module")
def ids_only() -> tuple[LLM, Transformer]:
    model = tiny_model(vocab_size=257)
    return LLM(model, num_blocks=64, max_num_seqs=4), model


# ---- prompts, parameters, outputs


def test_a_vllm_script_runs_with_only_its_import_changed(folder):
    model = str(folder)
    script = """
prompts = ["Hello, my name is", "The future of AI is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=5, seed=1)
llm = LLM(model=model, tensor_parallel_size=1, trust_remote_code=False, dtype="float32", gpu_memory_utilization=0.8)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
conversation = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Hello"}]
answers = llm.chat(conversation, sampling_params, use_tqdm=False)
"""
    names = {"model": model}
    exec("from llama import LLM, SamplingParams" + script, names)
    assert [o.prompt for o in names["outputs"]] == names["prompts"]
    output = names["outputs"][0]
    for name in ("request_id", "prompt_token_ids", "prompt_logprobs", "finished", "metrics", "num_cached_tokens"):
        assert hasattr(output, name)
    completion = output.outputs[0]
    assert len(completion.token_ids) <= 5 and isinstance(completion.text, str) and completion.index == 0
    for name in ("cumulative_logprob", "logprobs", "finish_reason", "stop_reason"):
        assert hasattr(completion, name)
    assert names["answers"][0].prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_every_form_of_a_prompt_is_the_same_prompt(llm):
    ids = llm.tokenizer.encode("Hi")
    assert ids == [256, *b"Hi"]
    forms = [
        "Hi",
        ids,
        tuple(ids),
        {"prompt": "Hi"},
        {"prompt_token_ids": ids},
        {"prompt": "Hi", "prompt_token_ids": ids},
    ]
    answers = [llm.generate(form, GREEDY, use_tqdm=False) for form in forms] + [
        [output] for output in llm.generate(forms, GREEDY, use_tqdm=False)
    ]
    assert all(len(a) == 1 and a[0].prompt_token_ids == ids and a[0].finished for a in answers)
    assert len({tuple(a[0].outputs[0].token_ids) for a in answers}) == 1
    assert [a[0].prompt for a in answers[:6]] == ["Hi", None, None, "Hi", None, "Hi"]
    assert len({a[0].request_id for a in answers}) == len(answers)
    assert llm.generate([], GREEDY) == []


def test_special_token_text_in_a_raw_prompt_is_parsed_and_bos_never_doubled(llm):
    output = llm.generate("<|begin_of_text|>Hi<|eot_id|>", GREEDY, use_tqdm=False)[0]
    assert output.prompt_token_ids[0] == 256 and output.prompt_token_ids.count(256) == 1
    assert output.prompt_token_ids[-1] == llm.tokenizer.special_tokens["<|eot_id|>"]


def test_outputs_come_in_the_order_asked_each_with_its_own_parameters(llm):
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (9, 1, 5, 3, 7, 2, 8, 4, 6, 10)]
    prompts = [f"prompt {i}" for i in range(10)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]
    alone = [llm.generate(p, q, use_tqdm=False)[0].outputs[0].token_ids for p, q in zip(prompts, params, strict=True)]
    assert [o.outputs[0].token_ids for o in outputs] == alone


def test_none_takes_the_checkpoints_generation_config_over_neutral_values(llm):
    assert llm.inputs.defaults == SamplingParams(temperature=0.5, top_p=0.25, max_tokens=7)
    output = llm.generate("Hi", use_tqdm=False)[0].outputs[0]
    again = llm.generate("Hi", dataclasses.replace(llm.inputs.defaults, seed=output.seed), use_tqdm=False)[0].outputs[0]
    assert output.token_ids == again.token_ids and len(output.token_ids) <= 7


def test_a_bad_generation_config_is_named(folder, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((folder / "config.json").read_text())
    for text, words in (("{", "is not JSON"), ('{"temperature": 7}', "temperature"), ('{"eos_token_id": "x"}', "eos")):
        (model / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"generation_config.json: .*{words}"):
            LLM(model, load_format="dummy", num_blocks=8)


def test_n_completions_differ_and_the_first_is_that_of_n_1(llm):
    params = SamplingParams(n=4, seed=3, max_tokens=12, ignore_eos=True)
    output = llm.generate("Hi", params, use_tqdm=False)[0]
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 4
    assert len({c.seed for c in output.outputs}) == 4 and output.outputs[0].seed == 3
    alone = llm.generate("Hi", dataclasses.replace(params, n=1), use_tqdm=False)[0].outputs[0]
    assert alone.token_ids == output.outputs[0].token_ids
    third = llm.generate("Hi", dataclasses.replace(params, n=1, seed=output.outputs[2].seed), use_tqdm=False)[0]
    assert third.outputs[0].token_ids == output.outputs[2].token_ids


def test_what_completions_find_of_one_another_is_not_called_cached():
    llm = LLM(tiny_model(), num_blocks=32, max_num_seqs=1, seed=0)
    asked = SamplingParams(n=3, max_tokens=2)
    assert [llm.generate([5] * 40, asked, use_tqdm=False)[0].num_cached_tokens for _ in range(2)] == [0, 32]


def test_stop_strings_cut_the_text_and_end_the_request(llm):
    whole = llm.generate("Hi", dataclasses.replace(GREEDY, max_tokens=40), use_tqdm=False)[0].outputs[0]
    stop = next(c for c in whole.text[5:] if c.isprintable() and c.isascii() and c not in whole.text[:5])
    params = dataclasses.replace(GREEDY, max_tokens=40, stop=stop)
    cut = llm.generate("Hi", params, use_tqdm=False)[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 40
    kept = dataclasses.replace(params, include_stop_str_in_output=True)
    assert llm.generate("Hi", kept, use_tqdm=False)[0].outputs[0].text == cut.text + stop


def test_logprobs_come_with_text_and_add_up(llm):
    params = dataclasses.replace(GREEDY, logprobs=2, prompt_logprobs=1)
    output = llm.generate("Hi", params, use_tqdm=False)[0]
    completion = output.outputs[0]
    chosen = [entries[t] for entries, t in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert all(entry.rank == 1 for entry in chosen)
    assert completion.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in chosen), abs=1e-12)
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == 3
    assert output.prompt_logprobs[1][ord("H")].decoded_token == "H"


def test_without_a_tokenizer_ids_come_as_the_oracle_says(ids_only):
    llm, model = ids_only
    weights = hugging_face_weights(model)
    outputs = llm.generate([[1, 2, 3], {"prompt_token_ids": [200, 4]}], GREEDY, use_tqdm=False)
    for output, prompt in zip(outputs, ([1, 2, 3], [200, 4]), strict=True):
        assert output.outputs[0].token_ids == naive.generate(weights, model.config, prompt, 12)
        assert output.outputs[0].text == "" and output.prompt is None
    as_numpy = llm.generate(list(np.array([1, 2, 3])), GREEDY, use_tqdm=False)[0]
    assert as_numpy.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert set(map(type, as_numpy.prompt_token_ids)) == {int}
    with pytest.raises(ValueError, match="need a tokenizer"):
        llm.generate("text")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        llm.chat([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="stop needs a tokenizer"):
        llm.generate([1], SamplingParams(stop="x"))


def test_a_tokenizer_can_be_given_to_a_transformer():
    llm = LLM(tiny_model(vocab_size=257), byte_tokenizer(), num_blocks=64, max_num_seqs=4)
    output = llm.generate("Hi", GREEDY, use_tqdm=False)[0]
    assert output.prompt_token_ids == list(b"Hi") and output.outputs[0].text


def test_dummy_weights_need_config_json_alone(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    llm = LLM(tmp_path, load_format="dummy", dtype="bfloat16", num_blocks=8, max_num_seqs=2)
    assert llm.tokenizer is None and llm.model.dtype == torch.bfloat16
    assert len(llm.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids) == 3


# ---- refusals: all before anything runs

BAD_PROMPTS = [
    ("", "prompt is empty"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt_token_ids": []}, "prompt is empty"),
    ([[]], "prompt is empty"),
    ([1, 2, 99999], r"integers in \[0, \d+\], got 99999"),
    ([1, -1], "got -1"),
    ([1, True], "got True"),
    ([1, 2.0], "got 2.0"),
    ({"text": "x"}, "prompt_token_ids or prompt"),
    ({}, "prompt_token_ids or prompt"),
    ({"prompt_token_ids": "x"}, "must be a list"),
    ({"prompt": 5}, "must be a string"),
    ([None], "got NoneType"),
    (5, "got int"),
    ("lone \ud800 surrogate", "surrogate"),
    ("x" * 255, "256 tokens and the context is 256"),
]


@pytest.mark.parametrize("bad, words", BAD_PROMPTS)
def test_one_bad_prompt_refuses_the_batch_before_anything_is_enqueued(llm, bad, words):
    with pytest.raises(ValueError, match=words):
        llm.generate(bad, GREEDY)
    single = as_prompts(bad) if not isinstance(bad, int) else [bad]
    with pytest.raises(ValueError, match=words):
        llm.generate(["good", *single], GREEDY)
    assert not llm.engine.has_unfinished


def test_bad_parameters_are_refused_by_name(llm):
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="must be a SamplingParams, got dict"):
        llm.generate("x", {"temperature": 0})
    with pytest.raises(ValueError, match="no adapter named 'style'"):
        llm.generate("x", GREEDY, lora="style")
    with pytest.raises(ValueError, match="stop_token_ids must hold"):
        llm.generate("x", SamplingParams(stop_token_ids=[10**6]))
    with pytest.raises(ValueError, match="logit_bias must hold"):
        llm.generate("x", SamplingParams(logit_bias={10**6: 1.0}))
    for messages in ("hello", [[]], {"role": "user"}, ["x"], [{"content": "x"}]):
        with pytest.raises(ValueError):
            llm.chat(messages)
    with pytest.raises(ValueError, match="tools need a conversation"):
        llm.stream("x", tools=[{"name": "f"}])


def test_a_refusal_by_the_engine_leaves_nothing_of_the_batch(llm, monkeypatch):
    def add(request_id, prompt, params, *, really=llm.engine.add, **rest):
        if len(prompt) == 4:
            raise ValueError("can never fit")
        return really(request_id, prompt, params, **rest)

    monkeypatch.setattr(llm.engine, "add", add)
    with pytest.raises(ValueError, match="never fit"):
        llm.generate(["a", "b", "ccc", "d"], GREEDY)


def test_constructor_refuses_by_name(folder, tmp_path):
    small = {"num_blocks": 8, "load_format": "dummy"}
    for arguments, words in (
        ({"device": "tpu"}, "device must be"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"load_format": "pickle"}, "load_format must be"),
        ({"max_model_len": 257}, r"max_model_len must be an integer in \[2, 256\].* got 257"),
        ({"max_model_len": "64"}, r"max_model_len must be an integer in \[2, 256\].* got '64'"),
        ({"gpu_memory_utilization": "0.9"}, r"gpu_memory_utilization must be in \(0, 1\], got '0.9'"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
        ({"enforce_eager": 1}, "enforce_eager must be True or False, got 1"),
        ({"tensor_parallel_size": 2}, r"tensor_parallel_size=2 is not supported \(only 1\)"),
        ({"trust_remote_code": True}, "trust_remote_code=True"),
        ({"quantization": "awq"}, "quantization='awq'"),
        ({"rope_theta": 5.0}, "edit the model's config.json"),
    ):
        with pytest.raises(ValueError, match=words):
            LLM(folder, **{**small, **arguments})
    with pytest.raises(TypeError, match="no argument 'temprature'"):
        LLM(folder, temprature=1)
    LLM(folder, **small, tensor_parallel_size=1, trust_remote_code=False, swap_space=4, quantization=None)
    with pytest.raises(ValueError, match="there is no such folder"):
        LLM(tmp_path / "missing")
    with pytest.raises(ValueError, match="model must be a folder or a Transformer, got NoneType"):
        LLM(None)
    with pytest.raises(ConfigError, match=r"generation_config\.json: cannot be read: Not a directory"):
        LLM(folder / "config.json", tokenizer=folder)
    model = tiny_model()
    with pytest.raises(MemoryError, match=r"num_blocks=1000000000000 blocks of 16 tokens take [0-9]+ bytes"):
        LLM(model, num_blocks=10**12)
    with pytest.raises(ValueError, match="a Transformer has its weights"):
        LLM(model, load_format="dummy")
    with pytest.raises(ValueError, match="device must be"):
        LLM(model, device="tpu")
    with pytest.raises(ValueError, match="convert it first"):
        LLM(model, dtype="float32")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            LLM(folder, **small, device="cuda")


def test_device_and_dtype_names():
    assert resolve_device("cpu") == torch.device("cpu") == resolve_device(torch.device("cpu"))
    assert resolve_dtype("auto") is None and resolve_dtype("half") == resolve_dtype(torch.float16) == torch.float16


def test_an_answer_is_clipped_to_the_context(llm):
    output = llm.generate("x" * 250, dataclasses.replace(GREEDY, max_tokens=100), use_tqdm=False)[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 256
    assert output.outputs[0].finish_reason == "length"
    rest = llm.generate("x" * 250, dataclasses.replace(GREEDY, max_tokens=None), use_tqdm=False)[0]
    assert rest.outputs[0].token_ids == output.outputs[0].token_ids


# ---- chat, streams, interruption


def test_chat_takes_one_conversation_or_several(llm):
    talks = [[{"role": "user", "content": text}] for text in ("one", "two <|eot_id|>")]
    outputs = llm.chat(talks, GREEDY, use_tqdm=False)
    singles = [llm.chat(talk, GREEDY, use_tqdm=False)[0] for talk in talks]
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in singles]
    eot = llm.tokenizer.special_tokens["<|eot_id|>"]
    assert [o.prompt_token_ids.count(eot) for o in outputs] == [1, 1]  # the template's own


@pytest.mark.parametrize("n", [1, 3])
def test_the_pieces_of_a_stream_add_up_to_what_generate_says(llm, n):
    params = SamplingParams(n=n, seed=5, max_tokens=30, stop=["zq", "\n"], logprobs=0)
    whole = llm.generate("Hi", params, use_tqdm=False)[0]
    pieces = list(llm.stream("Hi", params))
    for completion in whole.outputs:
        mine = [p for p in pieces if p.index == completion.index]
        assert "".join(p.text for p in mine) == completion.text
        assert [t for p in mine for t in p.token_ids] == completion.token_ids
        assert len([e for p in mine for e in p.logprobs]) == len(completion.token_ids)
        assert mine[-1].finish_reason == completion.finish_reason
    assert [p.usage is not None for p in pieces].index(True) == len(pieces) - 1
    assert pieces[-1].usage.prompt_tokens == 3


def test_a_stream_of_messages_is_a_chat(llm):
    talk = [{"role": "user", "content": "Hello"}]
    text = "".join(piece.text for piece in llm.stream(talk, GREEDY))
    assert text == llm.chat(talk, GREEDY, use_tqdm=False)[0].outputs[0].text


def test_streams_interleave_with_each_other_and_with_generate(llm):
    expected = [o.outputs[0].token_ids for o in llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False)]
    first, second = llm.stream("a", GREEDY), llm.stream("b", GREEDY)
    got = [[], []]
    for turn in range(3):
        got[0] += next(first).token_ids
        got[1] += next(second).token_ids
        if turn == 1:
            assert llm.generate("c", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected[2]
    for tokens, stream in zip(got, (first, second), strict=True):
        for piece in stream:
            tokens += piece.token_ids
    assert got == expected[:2]


def test_closing_a_stream_aborts_its_request_alone(llm):
    kept, dropped, unread = llm.stream("a", GREEDY), llm.stream("b", GREEDY), llm.stream("c", GREEDY)
    next(kept), next(dropped)
    dropped.close()
    unread.close()
    assert len(llm.replies) == 1
    assert len(list(kept)) == 11
    next(llm.stream("a", GREEDY))  # nobody keeps this one


def test_a_stream_is_checked_before_it_is_read(llm):
    with pytest.raises(ValueError, match="prompt is empty"):
        llm.stream("", GREEDY)


def test_an_interrupt_aborts_after_the_step_and_leaves_the_engine_usable(llm, monkeypatch):
    expected = llm.generate("a", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    steps = []

    def step(really=llm.engine.step):
        steps.append(len(steps))
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
            steps.append("the step went on")
        return really()

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", step)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert steps == [0, 1, 2, "the step went on"] and signal.getsignal(signal.SIGINT) is before
    assert not llm.engine.has_unfinished
    assert llm.generate("a", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_no_progress_bar_where_stderr_is_no_terminal(llm, capsys, monkeypatch):
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_a_seed_makes_the_whole_run_repeatable(folder):
    def run(seed):
        llm = LLM(folder, load_format="dummy", num_blocks=64, max_num_seqs=4, seed=seed)
        outputs = llm.generate(["a", "b"], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
        return [o.outputs[0].token_ids for o in outputs]

    assert run(1) == run(1) != run(2)


# ---- the demo model against transformers


@pytest.fixture(scope="module")
def demo(demo_model_path) -> LLM:
    return LLM(demo_model_path, dtype="float32", max_model_len=1024, num_blocks=512, max_num_seqs=32)


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    return json.loads((Path(__file__).parent / "golden" / "demo_generation.json").read_text())["cases"]


def agree(cases, outputs):
    """All but at most one answer are transformers' own; that one leaves them where two logits are within 1e-3."""
    strangers = []
    for case, output in zip(cases, outputs, strict=True):
        assert output.prompt_token_ids == case["prompt_token_ids"]
        ours, theirs = output.outputs[0].token_ids, case["token_ids"]
        assert len(ours) == len(theirs) == 64
        if ours == theirs:
            assert output.outputs[0].text == case["text"]
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        assert dict(map(tuple, case["close"])).get(at, 1.0) < 1e-3, f"{case['prompt']!r} differs at token {at}"
        strangers.append(case["prompt"])
    assert len(strangers) <= 1


SIXTY_FOUR = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def test_demo_model_says_what_transformers_says_together_in_one_batch(demo, cases):
    agree(cases, demo.generate([case["prompt"] for case in cases], SIXTY_FOUR, use_tqdm=False))


@pytest.mark.slow
def test_demo_model_says_what_transformers_says_one_by_one(demo, cases):
    agree(cases, [demo.generate(case["prompt"], SIXTY_FOUR, use_tqdm=False)[0] for case in cases])


def test_demo_model_knows_the_capital_of_france(demo):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    output = demo.chat(question, SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason) == ("The capital of France is Paris.", "stop")


@pytest.mark.slow
def test_a_shared_prompt_is_computed_once_and_changes_no_text(demo_model_path, capsys):
    """32 requests with a system prompt of about 400 tokens in common, with the prefix cache and without, in turn."""
    system = "You are a careful assistant. " * 66
    talks = [[{"role": "system", "content": system}, {"role": "user", "content": f"Count to {i}."}] for i in range(32)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    arguments = {"dtype": "float32", "max_model_len": 1024, "num_blocks": 1200, "max_num_batched_tokens": 512}
    texts, seconds, cached = {}, {}, {}
    for caching in (True, False):
        llm = LLM(demo_model_path, enable_prefix_caching=caching, **arguments)
        llm.generate("warm up", params, use_tqdm=False)
        began = time.monotonic()
        outputs = llm.chat(talks, params, use_tqdm=False)
        seconds[caching] = time.monotonic() - began
        texts[caching] = [o.outputs[0].text for o in outputs]
        cached[caching] = sum(o.num_cached_tokens for o in outputs)
    with capsys.disabled():
        print(f"\nshared prompt: {seconds[False]:.1f} s without, {seconds[True]:.1f} s with the prefix cache")
        print(f"ratio {seconds[False] / seconds[True]:.2f}, {cached[True]} prompt tokens not computed")
    assert texts[True] == texts[False]
    assert cached[False] == 0 and cached[True] > 31 * 350
