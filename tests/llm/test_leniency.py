"""What other libraries and published files hold, and what changes nothing here: it is taken."""

import json
import shutil

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tqdm.auto import tqdm

from llama import LLM, ParameterError, SamplingParams
from tests.llm.helpers import GREEDY

SMALL = {"num_blocks": 64, "max_num_seqs": 4, "dtype": "float64"}


@pytest.fixture
def padded(folder, tmp_path):
    """A folder whose tokenizer has one more token than the model has rows, as fine-tuning with a new pad token makes
    it."""
    path = tmp_path / "padded"
    shutil.copytree(folder, path)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text())
    assert backend.get_vocab_size() <= config["vocab_size"]
    spare = [AddedToken(f"<spare{i}>") for i in range(config["vocab_size"] - backend.get_vocab_size())]
    backend.add_tokens(spare)
    backend.add_tokens([AddedToken("<pad>", special=True)])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    return path


def test_a_pad_token_without_a_row_is_refused_in_a_prompt_alone(padded):
    llm = LLM(padded, **SMALL)
    assert llm.tokenizer.vocab_size == llm.model.config.vocab_size + 1
    plain = llm.generate("Hello", GREEDY, use_tqdm=False)[0]
    assert plain.outputs[0].token_ids
    with pytest.raises(ParameterError, match=rf"got {llm.model.config.vocab_size}"):
        llm.generate("Hello <pad>", GREEDY, use_tqdm=False)
    wanted = SamplingParams(temperature=0, response_format={"type": "regex", "regex": "ab+"}, max_tokens=6)
    assert llm.generate("Hello", wanted, use_tqdm=False)[0].outputs[0].text.startswith("ab")


def test_arguments_that_change_nothing(folder):
    """As programs written for vLLM pass them on."""
    nothing = {"max_num_seqs": None, "block_size": None, "enable_prefix_caching": None, "enforce_eager": None}
    foreign = {"distributed_executor_backend": "mp", "logits_processors": [], "trust_remote_code": True}
    config = LLM(folder, num_blocks=8, load_format="safetensors", **nothing, **foreign).engine.config
    assert (config.max_num_seqs, config.block_size, config.enable_prefix_caching) == (256, 16, True)
    assert config.enforce_eager is False


def test_arguments_of_methods_that_change_nothing(llm):
    bars = []

    def bar(**asked):
        bars.append(asked)
        return tqdm(disable=True)

    hello = [{"role": "user", "content": "Hello"}]
    nothing = {"priority": None, "tokenization_kwargs": None}
    plain = llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].text
    assert llm.generate("Hello", GREEDY, use_tqdm=bar, **nothing)[0].outputs[0].text == plain
    assert [asked["total"] for asked in bars] == [1]
    llm.chat(hello, GREEDY, use_tqdm=False, chat_template_content_format="auto", mm_processor_kwargs=None, **nothing)
    for ask, prompt in ((llm.generate, "Hello"), (llm.chat, hello)):
        with pytest.raises(
            ParameterError, match=r"priority=5 is not supported .*: give it in the SamplingParams"
        ) as caught:
            ask(prompt, GREEDY, priority=5)
        assert caught.value.param == "priority"
        with pytest.raises(TypeError, match="no argument 'max_new_tokens'"):
            ask(prompt, GREEDY, max_new_tokens=5)


def test_a_seed_of_minus_one_is_none(folder):
    assert LLM(folder, num_blocks=8, seed=-1).engine.config.seed is None


@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_a_token_without_a_row_may_neither_begin_nor_end_a_text(padded, role):
    (padded / "tokenizer_config.json").write_text(json.dumps({role: "<pad>"}))
    with pytest.raises(ValueError, match="do not belong together"):
        LLM(padded, **SMALL)
