"""LLM: prompts in all forms, parameters, and what an output holds."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from llama import LLM, SamplingParams, Transformer
from llama.api.errors import ConfigError
from tests import naive
from tests.fakes import byte_tokenizer
from tests.llm.helpers import GREEDY
from tests.model.models import hugging_face_weights, tiny_model


@pytest.fixture(scope="module")
def ids_only() -> tuple[LLM, Transformer]:
    model = tiny_model(vocab_size=257)
    return LLM(model, num_blocks=64, max_num_seqs=4), model


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


def test_the_calls_of_lm_evaluation_harness_s_vllm_model(folder):
    """As lm_eval.models.vllm_causallms of 0.4.13 writes them; make test-lm-eval runs that module itself."""
    nothing = {"revision": None, "tokenizer": None, "tokenizer_revision": None, "quantization": None}
    nothing |= {"tokenizer_mode": "auto", "trust_remote_code": False, "enable_lora": False, "max_lora_rank": 16}
    sizes = {"tensor_parallel_size": 1, "max_model_len": 64, "max_num_seqs": None}
    llm = LLM(model=str(folder), dtype="float32", seed=1234, num_blocks=64, **sizes, **nothing)
    score = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in ([40, 41, 42], [50] * 63)]
    outputs = llm.generate(prompts, sampling_params=[score] * 2, use_tqdm=True, lora_request=None)
    for output, prompt in zip(outputs, prompts, strict=True):
        first, *told = output.prompt_logprobs
        assert first is None and len(told) == len(prompt["prompt_token_ids"]) - 1
        assert all(entries[t].logprob <= 0 for t, entries in zip(prompt["prompt_token_ids"][1:], told, strict=True))
    spelled = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    until = SamplingParams(max_tokens=5, stop=["\n\n", "<|end_of_text|>"], temperature=0.0, **spelled)
    assert isinstance(llm.generate(prompts[:1], [until], use_tqdm=True, lora_request=None)[0].outputs[0].text, str)


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


def test_generation_config_is_used_or_told(folder, tmp_path, caplog):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text((folder / name).read_text())
    said = {"stop_strings": ["END"], "min_new_tokens": 2, "no_repeat_ngram_size": 3, "num_beams": 1, "max_length": 99}
    (model / "generation_config.json").write_text(json.dumps(said))
    llm = LLM(model, load_format="dummy", num_blocks=8)
    assert llm.inputs.defaults == SamplingParams(stop="END", min_tokens=2)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.endswith("generation_config.json asks for what has no effect here: no_repeat_ngram_size=3")


def test_a_checkpoint_may_ask_for_more_than_the_default_of_max_tokens(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    file = model / "generation_config.json"
    file.write_text(json.dumps({"min_new_tokens": 300}))
    llm = LLM(model, load_format="dummy", num_blocks=8)
    assert llm.inputs.defaults == SamplingParams(min_tokens=300, max_tokens=None)
    file.write_text(json.dumps({"min_new_tokens": 300, "max_new_tokens": 20}))
    with pytest.raises(
        ConfigError, match=r"generation_config.json: min_new_tokens must be at most max_new_tokens \(20\), got 300"
    ):
        LLM(model, load_format="dummy", num_blocks=8)
    file.write_text(json.dumps({"stop_strings": [3]}))
    with pytest.raises(ConfigError, match=r"generation_config.json: stop_strings must hold strings .*, got 3"):
        LLM(model, load_format="dummy", num_blocks=8)


def test_an_end_that_no_text_can_have_is_told(folder, tmp_path, caplog):
    model = shutil.copytree(folder, tmp_path / "model")
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, size, 9999]}))
    LLM(model, load_format="dummy", num_blocks=8)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = f"generation_config.json: no text can end at eos_token_id {size}, 9999: the model's vocab_size is {size}"
    assert warning.endswith(expected)


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


def test_a_salt_has_prefixes_of_its_own():
    llm = LLM(tiny_model(), num_blocks=64, max_num_seqs=2, seed=0)
    plain = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    guided = dataclasses.replace(plain, guidance_scale=2.0, negative_prompt=[6] * 40)

    def cached(params, salt):
        [output] = llm.generate([5] * 40, dataclasses.replace(params, cache_salt=salt), use_tqdm=False)
        return output.num_cached_tokens, output.outputs[0].token_ids

    for params in (guided, plain):
        found = [cached(params, salt) for salt in ("a", "a", "b", None, "b", None)]
        assert [count for count, _ in found] == ([0, 32, 0, 0, 32, 32] if params is guided else [32] * 6)
        assert len({tuple(tokens) for _, tokens in found}) == 1
    llm.reset_prefix_cache()
    assert [cached(plain, salt)[0] for salt in ("a", None)] == [0, 0]


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


def test_an_answer_is_clipped_to_the_context(llm):
    output = llm.generate("x" * 250, dataclasses.replace(GREEDY, max_tokens=100), use_tqdm=False)[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 256
    assert output.outputs[0].finish_reason == "length"
    rest = llm.generate("x" * 250, dataclasses.replace(GREEDY, max_tokens=None), use_tqdm=False)[0]
    assert rest.outputs[0].token_ids == output.outputs[0].token_ids


def test_a_seed_makes_the_whole_run_repeatable(folder):
    def run(seed):
        llm = LLM(folder, load_format="dummy", num_blocks=64, max_num_seqs=4, seed=seed)
        outputs = llm.generate(["a", "b"], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
        return [o.outputs[0].token_ids for o in outputs]

    assert run(1) == run(1) != run(2)


def test_no_number_that_is_let_in_harms_the_others(llm):
    """All of them in one batch with one that asks for as much as it may."""
    most = SamplingParams(
        max_tokens=2**63 - 1, min_tokens=2**63 - 1, top_k=2**63, seed=2**63 - 1, repetition_penalty=1e308, logprobs=20
    )
    alone = llm.generate("neighbour", GREEDY, use_tqdm=False)[0].outputs[0]
    first, bad, last = llm.generate(["neighbour", "bad", "neighbour"], [GREEDY, most, GREEDY], use_tqdm=False)
    assert first.outputs[0].token_ids == last.outputs[0].token_ids == alone.token_ids
    assert bad.outputs[0].finish_reason == "length"
