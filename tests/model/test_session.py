"""A sequence computed by hand: pieces, steps back, forks and files give the logits of the whole."""

import numpy as np
import pytest
import torch

from llama.api.errors import ParameterError
from llama.llm.llm import LLM
from tests.model.models import tiny_model

IDS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def whole(model, ids):
    return model.logits(torch.tensor([ids]))[0]


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_pieces_are_the_whole(model):
    session = model.session(40)
    parts = [session(IDS[:17]), session(IDS[17:18]), session(torch.tensor(IDS[18:]))]
    close(torch.cat(parts), whole(model, IDS))
    assert session.token_ids == IDS and len(session) == 40


def test_rollback_and_fork(model):
    session = model.session(64)
    session(IDS[:20])
    other = session.fork()
    session.rollback(5)
    close(session([7, 8, 9]), whole(model, [*IDS[:15], 7, 8, 9])[15:])
    close(other([7, 8, 9]), whole(model, [*IDS[:20], 7, 8, 9])[20:])
    assert session.token_ids == [*IDS[:15], 7, 8, 9] and other.token_ids == [*IDS[:20], 7, 8, 9]


def test_a_file_holds_a_session(model, tmp_path):
    session = model.session(64)
    session(IDS)
    session.save(tmp_path / "kept.safetensors")
    again = model.session(48)
    again.load(tmp_path / "kept.safetensors")
    close(again([1, 2]), whole(model, [*IDS, 1, 2])[40:])
    assert again.token_ids == [*IDS, 1, 2]
    with pytest.raises(ParameterError, match="40 tokens, more than max_tokens=39"):
        model.session(39).load(tmp_path / "kept.safetensors")


@pytest.mark.parametrize("changes", [{"seed": 1}, {"rope_theta": 500.0}, {"dtype": torch.float32}])
def test_another_models_file_is_refused(model, tmp_path, changes):
    session = model.session(8)
    session([1, 2, 3])
    session.save(tmp_path / "kept.safetensors")
    with pytest.raises(ParameterError, match="computed by another model"):
        tiny_model(**changes).session(8).load(tmp_path / "kept.safetensors")


def test_a_file_that_holds_no_session_is_named(model, tmp_path):
    session = model.session(8)
    session([1, 2])
    (tmp_path / "empty").touch()
    with pytest.raises(ParameterError, match="empty: is not a safetensors file"):
        session.load(tmp_path / "empty")
    with pytest.raises(ParameterError, match="none: there is no such file"):
        session.load(tmp_path / "none")
    with pytest.raises(ParameterError, match="no/file: there is no folder"):
        session.save(tmp_path / "no" / "file")
    assert session.token_ids == [1, 2]


def test_a_prefix_that_an_engine_kept_is_no_session(model, tmp_path):
    """It may be an adapter's, or in float8."""
    llm = LLM(model, num_blocks=8, block_size=4, kv_cache_dtype="fp8")
    assert llm.save_prefix([1, 2, 3, 4, 5], tmp_path / "prefix.safetensors") == 4
    with pytest.raises(ParameterError, match="was computed by another model, or holds no session"):
        model.session(8).load(tmp_path / "prefix.safetensors")


def test_a_file_of_the_same_model_before_a_weight_was_edited_is_refused(tmp_path):
    model = tiny_model()
    session = model.session(8)
    session([1, 2, 3])
    session.save(tmp_path / "kept.safetensors")
    model.layers[1].self_attn.o_proj.weight[10:20] += 1
    with pytest.raises(ParameterError, match="computed by another model"):
        session.load(tmp_path / "kept.safetensors")


def test_the_digest_does_not_depend_on_the_form_of_the_weights():
    plain, packed = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32)
    packed.prepare(packing="always")
    assert plain.digest() == packed.digest()


def test_misuse_is_one_clear_error(model):
    session = model.session(4)
    session([1, 2])
    with pytest.raises(ParameterError, match="5 tokens are more than the session's max_tokens=4"):
        session([3, 4, 5])
    with pytest.raises(ParameterError, match=r"token_ids must be in \[0, 97\), got 97"):
        session([97])
    for wrong in (3, -1, 1.0, True, "1", None):
        with pytest.raises(ParameterError, match=f"num_tokens must be an integer from 0 to 2, got {wrong!r}"):
            session.rollback(wrong)
    for wrong in (513, 0, 2.5, float("nan"), True, "3", None):
        with pytest.raises(ParameterError, match=f"max_tokens must be an integer from 1 to 512.*, got {wrong!r}"):
            model.session(wrong)
    for wrong in ([], [1.5], ["a"], "ab", None, 5, [True], torch.tensor([[1], [2]]), torch.tensor([1.0])):
        with pytest.raises(
            ParameterError, match=r"token_ids must be a list or an int64 tensor of token ids \[tokens\]"
        ):
            session(wrong)
    assert session.rollback(np.int64(0)) is None and model.session(np.int64(4)).max_tokens == 4
    assert session.token_ids == [1, 2]
    expected = model.logits(torch.tensor([[1, 2, 3]]))[0, -1:]
    torch.testing.assert_close(session(torch.tensor([[3]])), expected, rtol=1e-12, atol=1e-12)
