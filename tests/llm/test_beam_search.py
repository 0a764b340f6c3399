"""Beams equal those of transformers, token for token."""

import numpy as np
import pytest
import torch

from llama import LLM, BeamSearchParams, ParameterError, SamplingParams
from tests.model.pairs import SMALL, float64_throughout, make_pair
from tests.tiny_checkpoint import make_adapter, make_model

EOS = [3, 7, 11, 20, 30]  # often among the best, so that beams end at different lengths


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with float64_throughout():
        yield make_pair(tmp_path_factory.mktemp("beams"), seed=6, vocab_size=41, eos_token_id=EOS, **SMALL)


@pytest.mark.parametrize(
    ("width", "max_tokens", "penalty", "ignore_eos"),
    [
        (1, 6, 1.0, False),
        (3, 10, 1.0, False),
        (4, 12, 0.0, False),
        (5, 9, 2.0, False),
        (4, 8, 1.0, True),
        (12, 3, 1.0, False),
    ],
)
def test_beams_are_those_of_transformers(pair, width, max_tokens, penalty, ignore_eos):
    theirs, ours = pair
    scorer = LLM(ours, block_size=4, num_blocks=200)
    prompts = [torch.randint(4, 41, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 6, 13)]
    outputs = scorer.beam_search(
        prompts,
        BeamSearchParams(beam_width=width, max_tokens=max_tokens, length_penalty=penalty, ignore_eos=ignore_eos),
    )
    ended = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=max_tokens,
            length_penalty=penalty,
            do_sample=False,
            eos_token_id=None if ignore_eos else EOS,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        rows = [row[: len(s.tokens)] for row, s in zip(expected.sequences.tolist(), output.sequences, strict=True)]
        assert [s.tokens for s in output.sequences] == rows
        ended += sum(s.finish_reason == "stop" for s in output.sequences)
        if width > 1:
            lengths = [len(s.tokens) - len(prompt) for s in output.sequences]
            scores = [s.cum_logprob / n**penalty for s, n in zip(output.sequences, lengths, strict=True)]
            assert scores == pytest.approx(expected.sequences_scores.tolist(), abs=1e-5)  # theirs are float32
    assert ignore_eos == (ended == 0)
    assert not scorer.engine.has_unfinished


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0}, "beam_width must be an integer of at least 1, got 0"),
        ({"beam_width": True}, "beam_width must be an integer of at least 1, got True"),
        ({"max_tokens": 2.5}, "max_tokens must be an integer of at least 1, got 2.5"),
        ({"temperature": 1.0}, "temperature must be 0, got 1.0"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        ({"length_penalty": "x"}, "length_penalty must be a number from -10 to 10, got 'x'"),
        ({"length_penalty": float("nan")}, "length_penalty must be a number from -10 to 10, got nan"),
        ({"length_penalty": 1000}, "length_penalty must be a number from -10 to 10, got 1000"),
    ],
)
def test_misuse_is_one_clear_error(fields, message):
    with pytest.raises(ParameterError, match=message) as caught:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4} | fields)
    assert caught.value.param == next(iter(fields))


def test_what_can_never_run_is_refused_before_a_beam_is_computed(pair):
    params = BeamSearchParams(beam_width=np.int64(2), max_tokens=15)
    llm = LLM(pair[1], num_blocks=4, block_size=4)
    with pytest.raises(
        ParameterError, match=r"prompts\[1\]: a prompt of 3 tokens and up to 15 new ones can never run: the KV"
    ):
        llm.beam_search([[5], [5] * 3], params)
    with pytest.raises(ParameterError, match="no adapter named 'x' is loaded"):
        llm.beam_search([5], params, lora="x")
    with pytest.raises(ParameterError, match="params must be a BeamSearchParams, got SamplingParams"):
        llm.beam_search([5], SamplingParams())
    assert llm.engine.metrics().num_steps == 0
    with pytest.raises(ParameterError, match="no room is left"):
        LLM(pair[1], max_model_len=8).beam_search([5] * 8, params)


def test_beams_of_an_adapter_beside_those_of_the_base(tmp_path):
    llm = LLM(make_model(tmp_path / "model"), num_blocks=40)
    path = tmp_path / "adapter"
    path.mkdir()
    llm.load_lora("mine", make_adapter(path))
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts, loras = [[5, 6, 7]] * 2, ["mine", None]
    wanted = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy, lora=loras, use_tqdm=False)]
    assert wanted[0] != wanted[1]
    params = BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
    found = llm.beam_search(prompts, params, lora=loras)
    assert [output.sequences[0].tokens[3:] for output in found] == wanted


def test_a_model_whose_numbers_are_broken_is_told(tmp_path):
    model = make_pair(tmp_path, seed=6, vocab_size=41, **SMALL)[1]
    model.lm_head.weight[5] = torch.nan
    llm = LLM(model, num_blocks=40)
    for ask in (
        lambda: llm.beam_search([[5], [6]], BeamSearchParams(beam_width=2, max_tokens=3)),
        lambda: llm.score([5], [6, 7], use_tqdm=False),
        lambda: llm.perplexity([5, 6, 7]),
        lambda: llm.embed([5], use_tqdm=False),
    ):
        with pytest.raises(RuntimeError, match=r"the model failed on sequence 1 of \d: its logits are NaN or infinite"):
            ask()
        assert not llm.engine.has_unfinished
