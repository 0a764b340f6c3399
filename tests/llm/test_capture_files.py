"""What requests have captured goes to files: whole ones, which a later run finds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama import Apply, Capture, ParameterError
from tests.llm.test_capture import engine, prompt, sampled
from tests.model.models import hugging_face_weights, tiny_model

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_means_dtypes_and_files(model, tmp_path):
    llm = engine(model)
    asks = [prompt(30, 7, 1), prompt(30, 8, 2)]
    [whole, _] = llm.generate(
        asks, sampled(1), capture=Capture("layers.1.resid_post", positions="prompt"), use_tqdm=False
    )
    [mean, _] = llm.generate(
        asks,
        sampled(1),
        capture=Capture("layers.1.resid_post", positions="prompt", reduce="mean", dtype=torch.float32),
        use_tqdm=False,
    )
    found = mean.captured["layers.1.resid_post"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole.captured["layers.1.resid_post"].mean(0).float())
    kept = Capture("layers.1.resid_post", positions="all", save_to=tmp_path)
    outputs = llm.generate(asks, sampled(1, n=2), capture=kept, request_ids=["a", "b"], use_tqdm=False)
    assert [o.request_id for o in outputs] == ["a", "b"] and not outputs[0].captured
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    file = load_file(tmp_path / "a.safetensors")
    torch.testing.assert_close(file["layers.1.resid_post"][:37], whole.captured["layers.1.resid_post"])
    assert len(file["layers.1.resid_post"]) == 37 + 8 and len(file["1.layers.1.resid_post"]) == 8
    with pytest.raises(ParameterError, match=r"names files by request_id, which '../a' cannot be"):
        llm.generate(asks[0], capture=kept, request_ids=["../a"])
    seen = {}
    llm.generate(asks[0], capture=Capture("embed", save_to=seen.__setitem__), request_ids=["c"], use_tqdm=False)
    assert list(seen) == ["c"] and list(seen["c"]) == ["embed"]


def test_a_mean_that_is_kept_is_one_row_of_prompt_and_answer_together(model):
    llm = engine(model)
    rows, means = {}, {}
    for reduce, seen in ((None, rows), ("mean", means)):
        keep = Capture(["layers.1.resid_post", "layers.0.z"], "all", reduce=reduce, save_to=seen.__setitem__)
        llm.generate(prompt(30, 7, 1), sampled(1, n=2), capture=keep, request_ids=["a"], use_tqdm=False)
    assert means["a"].keys() == rows["a"].keys()
    for point, values in rows["a"].items():
        torch.testing.assert_close(means["a"][point], values.mean(0))


def test_two_requests_of_one_id_are_refused_also_where_the_folder_has_its_file(model, tmp_path):
    llm, keep = engine(model), Capture("embed", save_to=tmp_path)
    asks = [prompt(30, 7, 1), prompt(30, 8, 2)]
    llm.generate(asks[:1], sampled(1), capture=keep, request_ids=["a"], use_tqdm=False)
    for capture in (keep, None):
        with pytest.raises(ParameterError, match="request_ids must differ, 'a' is there twice"):
            llm.generate(asks, sampled(1), capture=capture, request_ids=["a", "a"], use_tqdm=False)


KILLED = """
import os, signal, sys
import torch
from llama.model import capture
from tests.llm.test_capture_files import collect, engine
from tests.model.models import tiny_model

torch.set_num_threads(1)
saved, count = capture.save, 0

def save(folder, name, *rest):
    global count
    count += 1
    if count == 5:
        saved(folder, name, *rest)
        file = folder / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
        os.kill(os.getpid(), signal.SIGKILL)
    saved(folder, name, *rest)

capture.save = save
collect(engine(tiny_model(), max_num_seqs=2), sys.argv[1])
"""
COLLECTED = {str(i): prompt(20, 3 + i, i) for i in range(9)}


def collect(llm, folder, **changed):
    asked = {"positions": "all", **changed}
    read = Capture("layers.*.resid_post", save_to=folder, **asked)
    return llm.generate(list(COLLECTED.values()), sampled(1), request_ids=list(COLLECTED), capture=read, use_tqdm=False)


def test_a_folder_of_captures_is_gone_on_with_after_a_kill(model, tmp_path):
    """What is whole is not computed again; what is torn, missing or of something else is."""
    collect(engine(model), tmp_path / "unbroken")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    kept = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.safetensors")}
    assert len(kept) == 5
    llm = engine(model)
    outputs = collect(llm, tmp_path / "killed")
    assert [output.request_id for output in outputs] == list(COLLECTED) and all(output.finished for output in outputs)
    computed = [output for output in outputs if output.outputs]
    assert len(computed) == 5  # four were missing, one was torn
    assert llm.engine.metrics().num_prompt_tokens == sum(len(output.prompt_token_ids) for output in computed)
    for name in COLLECTED:
        files = [load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("unbroken", "killed")]
        torch.testing.assert_close(*files, rtol=0, atol=1e-10)
    assert not any(output.outputs for output in collect(llm, str(tmp_path / "killed")))
    assert all(output.outputs for output in collect(llm, tmp_path / "killed", positions="prompt"))
    COLLECTED["0"][3] += 1
    again = collect(llm, tmp_path / "killed", positions="prompt")
    COLLECTED["0"][3] -= 1
    assert [bool(output.outputs) for output in again] == [True] + [False] * 8


def test_states_of_weights_that_were_edited_since_are_computed_again(tmp_path):
    llm = engine(tiny_model())
    read = Capture("layers.1.resid_post", save_to=tmp_path)
    ask = {"sampling_params": sampled(1), "request_ids": ["a"], "use_tqdm": False}
    assert llm.generate(prompt(9, 9, 1), capture=read, **ask)[0].outputs
    assert not llm.generate(prompt(9, 9, 1), capture=read, **ask)[0].outputs
    name = "model.layers.1.mlp.down_proj.weight"
    llm.update_weights([(name, hugging_face_weights(llm.model)[name] * 0.5)])
    assert llm.generate(prompt(9, 9, 1), capture=read, **ask)[0].outputs
    expected = llm.generate(prompt(9, 9, 1), capture=Capture("layers.1.resid_post"), **ask)[0].captured
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors"), expected)


@pytest.mark.filterwarnings("ignore:the model of an engine has forward hooks")
def test_states_under_a_hook_are_neither_found_nor_taken_for_others(tmp_path):
    model = tiny_model()
    runs = engine(model)
    keep = Capture("layers.1.resid_post", save_to=tmp_path)

    def state():
        [output] = runs.generate([prompt(30, 7, 1)], sampled(1), capture=keep, request_ids=["a"], use_tqdm=False)
        return len(output.outputs), load_file(tmp_path / "a.safetensors")["layers.1.resid_post"]

    _, plain = state()
    hook = model.layers[0].mlp.register_forward_hook(lambda module, arguments, output: output + 1)
    for _ in range(2):
        count, hooked = state()
        assert count == 1 and not torch.allclose(hooked, plain)
    hook.remove()
    count, again = state()
    assert count == 1
    torch.testing.assert_close(again, plain)


def test_states_over_a_cache_that_rounds_otherwise_are_computed_again(tmp_path):
    model = tiny_model()
    asks, keep = [prompt(30, 7, 1)], Capture("layers.1.resid_post", save_to=tmp_path)
    seen = []
    for cache, scale in (("auto", None), ("fp8", None), ("fp8_e4m3", 0.01), ("auto", 0.01)):
        model.kv_scales = None if scale is None else torch.full((2, 2, model.config.num_key_value_heads), scale)
        runs = engine(model, kv_cache_dtype=cache)
        for is_kept in (False, True):
            [output] = runs.generate(asks, sampled(1), capture=keep, request_ids=["a"], use_tqdm=False)
            assert bool(output.outputs) != is_kept
        seen.append(load_file(tmp_path / "a.safetensors")["layers.1.resid_post"])
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_request_that_is_aborted_or_fails_leaves_no_file(model, tmp_path):
    llm = engine(model)
    read = Capture("norm", positions="all", save_to=tmp_path)
    stream = llm.stream(prompt(9, 9, 1), sampled(1), capture=read)
    next(stream)
    stream.close()
    fails = [Apply("embed", lambda x: 1 / 0)]
    llm.generate(prompt(9, 9, 1), sampled(1), capture=read, interventions=fails, use_tqdm=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_whose_capture_cannot_be_kept_ends_with_an_error_alone(model, tmp_path, caplog, n):
    (tmp_path / "file").write_text("no folder")

    def full(request_id, values):
        raise OSError("no space left on device")

    llm = engine(model)
    for save_to in (tmp_path / "file", full):
        asked = [Capture("norm", save_to=save_to), None]
        bad, good = llm.generate([prompt(9, 9, 1)] * 2, sampled(1, n=n), capture=asked, use_tqdm=False)
        assert bad.finished and [o.token_ids for o in bad.outputs] == [o.token_ids for o in good.outputs]
        assert [(o.finish_reason, o.stop_reason) for o in bad.outputs][n - 1 :] == [("error", "capture")]
        assert {o.finish_reason for o in good.outputs} == {"length"}
        *_, last = llm.stream(prompt(9, 9, 1), sampled(1, n=n), capture=asked[0])
        assert (last.finish_reason, last.stop_reason) == ("error", "capture") and last.usage is not None
        assert not len(llm.replies) and not llm.engine.has_unfinished
    assert sum("save_to failed" in record.message for record in caplog.records) == 4
