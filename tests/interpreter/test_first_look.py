"""benchmarks/first_look.py without a GPU: every section on tiny shapes, every step's command, and time limits."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import first_look, first_look_device, first_look_engine, first_look_forms
from benchmarks.first_look import PARTS, Step, main

SECTIONS = first_look_device.SECTIONS | first_look_engine.SECTIONS | first_look_forms.SECTIONS
STEPS = [step for steps in PARTS.values() for step in steps]
REPOSITORY = Path(__file__).resolve().parents[2]
# What the engine imports beside these is Python's own, or NumPy, which torch brings.
ABSENT = "tokenizers jinja2 safetensors tqdm transformers peft fastapi hypothesis xdist llguidance".split()


@pytest.fixture(scope="module")
def look():
    return first_look_device.Look(is_tiny=True)


LONG = ("deterministic", "fused", "prompts")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in SECTIONS])
def test_a_section_runs(name, look):
    found = json.loads(json.dumps(SECTIONS[name](look)))
    assert found
    assert "Error" not in json.dumps(found)


def test_every_section_belongs_to_a_step():
    assert sorted(name for step in STEPS for name in step.sections) == sorted(SECTIONS)


def test_each_part_takes_five_minutes():
    for steps in PARTS.values():
        assert first_look.PART_SECONDS == 300
        assert sum(step.seconds for step in steps if step.tests != "not alone") <= 300
    assert [step.tests for step in PARTS["1"]] == ["", "", "", "not alone"]  # which take what is left
    assert sum(step.seconds for step in PARTS["1"][:-1]) <= 170


def test_every_node_of_a_step_is_told_apart():
    layer = "_norm_kernel gemm _rope_and_store_kernel _decode_kernel _merge_kernel gemv splitK _norm_kernel gemm"
    names = f"gather embedding _cos_sin_kernel {layer} _silu_mul_kernel gemm {layer} _silu_mul_kernel gemm _norm_kernel"
    names += " gemm scan_kernel finish_kernel scatter Memcpy"
    told = first_look_engine.labels(names.split())
    half = "norm qkv rope attention merge o o norm gate_up silu down".split()
    assert told == ["rest", "rest", "cos_sin", *half, *half, "norm", "head", "sampler", "sampler", "rest", "rest"]
    short = first_look_engine.labels("_norm_kernel a _rope_and_store_kernel _decode_kernel b _norm_kernel".split())
    assert short == "norm qkv rope attention o norm".split()
    drawn = "_norm_kernel a scan_kernel finish_kernel logprob_parts_kernel logprob_merge_kernel b".split()
    assert first_look_engine.labels(drawn) == "norm head sampler sampler sampler sampler rest".split()
    prompt = "_norm_kernel a _rope_and_store_kernel _prefill_kernel _merge_chunks_kernel b _norm_kernel"
    assert first_look_engine.labels(prompt.split()) == "norm qkv rope attention merge o norm".split()


def test_it_needs_nothing_but_torch_and_triton(tmp_path):
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); from benchmarks.first_look import main; "
    code += f"sys.exit(main(['machine', 'nodes', '--tiny', '--out', {str(tmp_path)!r}]))"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"machine.json", "nodes.json"}


def test_the_tests_of_a_gpu_need_safetensors_beside():
    absent = [name for name in ABSENT if name != "safetensors"]
    options = "-m gpu --collect-only -q -p no:cacheprovider".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import pytest; "
    code += f"sys.exit(pytest.main({options!r}))"
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-2000:]


def run(monkeypatch, capsys, tmp_path, *steps: Step) -> tuple[int, dict]:
    monkeypatch.setitem(PARTS, "1", steps)
    status = main(["1", "--out", str(tmp_path)])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_step_that_hangs_or_fails_takes_no_other_with_it(monkeypatch, capsys, tmp_path):
    sleeps = ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)")
    passes = ("timeit", "-n", "1", "-r", "1", "pass")
    steps = [
        Step("hangs", 1, module=sleeps),
        Step("fails", 60, module=("no_such_module",)),
        Step("ok", 60, module=passes),
    ]
    status, document = run(monkeypatch, capsys, tmp_path, *steps)
    assert status == 1
    assert [step["status"] for step in document["steps"].values()] == ["timeout", 1, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["part-1.tar.gz"]
    with tarfile.open(tmp_path / "part-1.tar.gz") as archive:
        assert sorted(archive.getnames())[1:] == ["fails.txt", "hangs.txt", "ok.txt"]
        assert b"no_such_module" in archive.extractfile("fails.txt").read()


def test_a_file_of_tests_that_cannot_be_imported_takes_no_other_with_it(monkeypatch, tmp_path):
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "test_sound.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_sound(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n    alone\n")
    monkeypatch.setattr(first_look, "_has", lambda package: False)  # one process
    command = Step("tests", 60, tests="not alone").command(tmp_path, is_tiny=False)
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "no_such_module" in ran.stdout and "1 passed" in ran.stdout, ran.stdout


def test_what_no_json_can_hold_fails_its_section_alone(monkeypatch, tmp_path):
    monkeypatch.setitem(first_look_device.SECTIONS, "machine", lambda look: {"device": look.device})
    monkeypatch.setitem(first_look_device.SECTIONS, "nodes", lambda look: {"is": "told"})
    assert main(["machine", "nodes", "--tiny", "--out", str(tmp_path)]) == 1
    assert "FAILED TypeError" in json.loads((tmp_path / "machine.json").read_text())
    assert json.loads((tmp_path / "nodes.json").read_text()) == {"is": "told"}


@pytest.mark.slow
def test_sections_behind_one_that_loses_the_device_have_a_process_of_their_own(monkeypatch, tmp_path):
    """After an illegal access all later calls of a process fail."""

    def lose(look):
        def wait():
            raise RuntimeError("an illegal memory access")

        look.timer.wait = wait
        return {"is": "lost"}

    monkeypatch.setitem(first_look_device.SECTIONS, "machine", lose)
    monkeypatch.setitem(first_look_device.SECTIONS, "nodes", lambda look: {"is": "here"})
    assert main(["machine", "nodes", "--tiny", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "machine.json").read_text()) == {"is": "lost"}
    assert "torch, elementwise" in json.loads((tmp_path / "nodes.json").read_text())


def test_an_archive_that_is_cut_off_leaves_the_one_before(monkeypatch, tmp_path):
    archive = tmp_path / "part-1.tar.gz"
    archive.write_bytes(b"of the steps before")
    monkeypatch.setattr(tarfile.TarFile, "add", lambda *_: 1 / 0)
    monkeypatch.setitem(PARTS, "1", (Step("ok", 60, module=("timeit", "-n", "1", "-r", "1", "pass")),))
    with pytest.raises(ZeroDivisionError):
        main(["1", "--out", str(tmp_path)])
    assert archive.read_bytes() == b"of the steps before"


LOST = """
import pytest, torch
from tests.gpu.conftest import memory_is_given_back

lost = []

@pytest.fixture(autouse=True)
def device(monkeypatch):
    def synchronize():
        if lost:
            raise torch.AcceleratorError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

def test_first(memory_is_given_back):
    lost.append(True)
    assert False, "told"

@pytest.mark.parametrize("i", range(6))
def test_other(i, memory_is_given_back):
    assert not lost
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "0"])
def test_a_test_that_loses_the_device_fails_no_other(processes, tmp_path):
    """In processes of xdist's all others run; in one none does."""
    (tmp_path / "test_lost.py").write_text(LOST)
    options = ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path), "-n", processes]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    environment.pop("PYTEST_XDIST_WORKER", None)  # this test's own
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "AssertionError: told" in ran.stdout
    assert ran.returncode == 1
    passed = "6 passed" in ran.stdout if processes == "1" else "lost its device" in ran.stdout
    assert passed and "test_other" not in ran.stdout.split("short test summary")[-1], ran.stdout


def test_an_op_that_raises_or_draws_other_tokens_fails_its_section(look, monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"\['silu_mul'\] failed"):
        patch.setattr(first_look_engine.ours, "silu_mul", broken)
        first_look_engine.ops(look)
    monkeypatch.setattr(first_look_engine, "_wrong_tokens", lambda *_: 0.2)
    with pytest.raises(RuntimeError, match=r"\['sample'\] failed"):
        first_look_engine.ops(look)


def test_no_step_begins_when_the_time_is_up(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(first_look, "PART_SECONDS", 4.0)
    status, document = run(monkeypatch, capsys, tmp_path, Step("late", 60, module=("timeit", "pass")))
    assert status == 1
    assert document["steps"] == {"late": {"status": "no time left"}}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_whole_part(part, capsys, tmp_path):
    status = main([part, "--tiny", "--out", str(tmp_path)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0, document["steps"]
    with tarfile.open(tmp_path / f"part-{part}.tar.gz") as archive:
        found = {name.removesuffix(".json") for name in archive.getnames() if name.endswith(".json")}
    assert found == {name for step in PARTS[part] for name in step.sections}
