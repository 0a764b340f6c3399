"""Rows on Ray Data: one local cluster of two CPUs for all tests (make test-ray)."""

import os

import pytest
import ray

from llama import LLM, SamplingParams
from llama.batch import ProcessorConfig, build_processor, processor
from tests.ray.clusters import processes, set_environment
from tests.tiny_checkpoint import make_adapter, make_model

ENGINE = {"dtype": "float64", "num_blocks": 256, "max_num_seqs": 4}
ERROR = "__inference_error__"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("ray") / "tiny"), make_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    set_environment()
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def expected(folders):
    """The token ids of the prompts 0 to 39 in one process."""
    llm = LLM(folders[0], **ENGINE)
    params = [SamplingParams(**fields(i)) for i in range(40)]
    outputs = llm.generate([f"prompt {i}" for i in range(40)], params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def fields(i: int) -> dict:
    return {"seed": i, "max_tokens": 1 + i % 7}


def asked(row: dict) -> dict:
    i = row["id"]
    return {"prompt": f"prompt {i}", "sampling_params": fields(i)}


def run(config, rows, **functions) -> dict:
    dataset = ray.data.from_items(rows, override_num_blocks=8)
    answered = build_processor(config, **functions)(dataset).take_all()
    found = {row["id"]: row for row in answered}
    assert len(found) == len(answered) == len(rows)
    return found


def test_rows_are_answered_as_in_one_process(folders, expected):
    config = ProcessorConfig(model_source=folders[0], engine_kwargs=ENGINE, loras={"tuned": folders[1]}, batch_size=5)
    rows = [{"id": i, "kept": f"column {i}", "numbers": [i] * (i % 3)} for i in range(40)]

    def bad_lora(row):
        return {**asked(row), "lora": "unknown" if row["id"] == 7 else None}

    found = run(config, rows, preprocess=bad_lora)
    for i, row in found.items():
        assert row["kept"] == f"column {i}" and list(row["numbers"]) == [i] * (i % 3)
        assert ("unknown" in row[ERROR]) if i == 7 else row[ERROR] == ""
        assert list(row["generated_tokens"]) == ([] if i == 7 else expected[i])


def test_postprocess_makes_the_rows_but_those_with_an_error(folders, expected):
    config = ProcessorConfig(model_source=folders[0], engine_kwargs=ENGINE, batch_size=5)

    def some(row):
        return {"prompt": "" if row["id"] == 3 else f"prompt {row['id']}", "sampling_params": fields(row["id"])}

    def count(row):
        return {"id": row["id"], "count": row["num_generated_tokens"]}

    found = run(config, [{"id": i} for i in range(10)], preprocess=some, postprocess=count)
    assert found[3][ERROR] == "prompt is empty" and found[3]["prompt"] == ""
    assert {i: row["count"] for i, row in found.items() if i != 3} == {i: len(expected[i]) for i in range(10) if i != 3}
    assert all(row.get("generated_text") is None for i, row in found.items() if i != 3)


def test_what_a_killed_engine_had_under_way_is_computed_again(folders, expected):
    config = ProcessorConfig(
        model_source=folders[0], engine_kwargs=ENGINE, batch_size=2, max_concurrent_batches=1, concurrency=1
    )
    dataset = ray.data.from_items([{"id": i} for i in range(40)], override_num_blocks=8)
    found, seen = {}, set()
    for row in build_processor(config, preprocess=asked)(dataset).iter_rows():
        assert row["id"] not in found
        found[row["id"]] = list(row["generated_tokens"])
        running = processes("MapBatches(Generator)")
        if not seen:
            running[0].kill()
        seen |= {process.pid for process in running}
    assert found == dict(enumerate(expected)) and len(seen) > 1


def test_a_row_that_always_ends_its_process_ends_the_job(folders, tmp_path, monkeypatch):
    """After so many restarts, and not never."""
    starts = tmp_path / "starts"

    class Poisoned(processor.Generator):
        def __init__(self, *arguments, **named):
            with starts.open("a") as file:
                file.write("x")
            super().__init__(*arguments, **named)

        async def _answer(self, row):
            if row["prompt"] == "prompt 7":
                os._exit(1)
            return await super()._answer(row)

    monkeypatch.setattr(processor, "Generator", Poisoned)
    config = ProcessorConfig(model_source=folders[0], engine_kwargs=ENGINE, batch_size=5, max_restarts=2)
    with pytest.raises(Exception, match="died"):
        run(config, [{"id": i} for i in range(10)], preprocess=asked)
    assert 1 < len(starts.read_text()) <= 3


@pytest.mark.parametrize("concurrency", [0, (2, 1), (0, 1), (1, 2, 3)])
def test_concurrency_is_checked(concurrency):
    with pytest.raises(ValueError, match="concurrency must be"):
        ProcessorConfig(model_source="x", concurrency=concurrency)
