"""Beams equal those of transformers, token for token."""

import pytest
import torch

from llama import LLM, BeamSearchParams, ParameterError
from tests.model.pairs import SMALL, float64_throughout, make_pair

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


def test_misuse_is_one_clear_error(pair):
    with pytest.raises(ParameterError, match="beam_width must be an integer of at least 1, got 0"):
        BeamSearchParams(beam_width=0, max_tokens=4)
    with pytest.raises(ParameterError, match="temperature must be 0"):
        BeamSearchParams(beam_width=2, max_tokens=4, temperature=1.0)
    with pytest.raises(ParameterError, match="no room is left"):
        LLM(pair[1], max_model_len=8).beam_search([5] * 8, BeamSearchParams(beam_width=2, max_tokens=4))
