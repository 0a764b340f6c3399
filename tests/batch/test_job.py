"""A batch from file to file over an engine that says what the user says."""

import asyncio

import pytest

from llama.api.errors import EngineDeadError
from llama.batch.job import Job
from tests.batch.helpers import by_custom_id, chat, completion, read_lines, responses, run_job, said, write_lines
from tests.server.helpers import scripted_llm


@pytest.fixture
def scripted():
    llm, engine = scripted_llm()
    yield llm, engine
    asyncio.run(llm.close())


@pytest.fixture
def files(tmp_path):
    return tmp_path / "input.jsonl", tmp_path / "output.jsonl"


def run(llm, files, **options) -> Job:
    return asyncio.run(run_job(llm, *files, **options))


def test_every_line_has_its_answer_rejection_or_error(scripted, files):
    llm, _ = scripted
    lines = [
        chat("good", "hallo wörld"),
        completion("text", "ab", max_tokens=3),
        chat("range", "x", temperature=7),
        chat("stream", "x", stream=True),
        chat("unknown", "x", colour="red"),
        chat("model", "x", model="gpt"),
        chat("lora", "x", lora="none"),
        chat("fails", "fail"),
        chat("good", "again"),
        "{",
        {**chat("url", "x"), "url": "/v1/embeddings"},
        chat("named", "y", model="tiny"),
        responses("item", "hallo"),
        responses("kept", "x", previous_response_id="resp_1"),
    ]
    job = run(llm, (write_lines(files[0], lines), files[1]))
    answers = read_lines(files[1])
    assert len(answers) == len({line["id"] for line in answers}) == len(lines)
    good = [line for line in answers if line["response"] and line["response"]["status_code"] == 200]
    chats = {line["custom_id"]: said(line) for line in good if line["custom_id"] not in ("text", "item")}
    assert chats == {"good": "hallo wörld", "named": "y"}
    [text] = [line for line in good if line["custom_id"] == "text"]
    [item] = [line["response"]["body"] for line in good if line["custom_id"] == "item"]
    assert item["output"][0]["content"][0]["text"] == "hallo" and item["status"] == "completed"
    assert text["response"]["body"]["object"] == "text_completion"
    assert text["response"]["request_id"] and set(text) == {"id", "custom_id", "response", "error"}
    rejected = {line["custom_id"]: line["response"] for line in answers if line["response"] and line not in good}
    assert {name: response["status_code"] for name, response in rejected.items()} == {
        "range": 400,
        "stream": 400,
        "unknown": 400,
        "model": 404,
        "lora": 400,
        "kept": 400,
    }
    assert rejected["range"]["body"]["error"]["param"] == "temperature"
    assert rejected["stream"]["body"]["error"]["param"] == "stream"
    failed = [(line["custom_id"], line["error"]["code"]) for line in answers if line["error"]]
    assert sorted(failed, key=str) == [
        ("fails", "internal_error"),
        ("good", "duplicate_custom_id"),
        ("url", "invalid_url"),
        (None, "invalid_json_line"),
    ]
    assert all(line["response"] is None for line in answers if line["error"])
    assert str(job.counts) == "14 lines: 4 answered, 6 rejected, 4 failed"


def test_answer_is_that_of_the_http_route(scripted, files):
    from tests.server.helpers import Running

    llm, _ = scripted
    asked = [
        chat("a", "hello", max_tokens=3, n=2, logprobs=True, seed=5),
        completion("b", "some text", max_tokens=4, echo=True),
        chat("c", "x", top_p=-1),
        responses("d", "some text", max_output_tokens=5, instructions="y"),
    ]
    run(llm, (write_lines(files[0], asked), files[1]))
    answers = by_custom_id(read_lines(files[1]))
    server = Running(llm)
    over_http = {}
    for line in asked:
        response = server.client.post(line["url"], json=line["body"])
        over_http[line["custom_id"]] = (response.status_code, response.json())
    server.close()
    for name, (status, body) in over_http.items():
        response = {"status_code": status, "request_id": "", "body": body}
        whole = {"id": "", "custom_id": name, "response": response, "error": None}
        expected = by_custom_id([whole])[name]["response"]
        assert answers[name]["response"] == {**expected, "request_id": answers[name]["response"]["request_id"]}


def test_run_again_asks_what_has_no_answer_alone(scripted, files):
    llm, engine = scripted
    lines = [chat("a", "one"), chat("b", "fail"), chat("c", "x", top_p=-1), "{"]
    write_lines(files[0], lines)
    run(llm, files)
    before = [line for line in read_lines(files[1]) if line["custom_id"] == "a"]
    asked = len(engine.asked)
    lines[1:] = [chat("b", "two"), chat("c", "three"), chat("d", "four")]
    job = run(llm, (write_lines(files[0], lines), files[1]))
    answers = read_lines(files[1])
    assert answers[0] == before[0] and len(engine.asked) == asked + 3
    assert {line["custom_id"]: said(line) for line in answers} == {"a": "one", "b": "two", "c": "three", "d": "four"}
    assert str(job.counts) == "4 lines: 4 answered (1 of them by an earlier run), 0 rejected, 0 failed"
    run(llm, files)
    assert read_lines(files[1]) == answers and len(engine.asked) == asked + 3


@pytest.mark.parametrize("change", ["settings", "input"])
def test_answers_to_other_questions_are_refused_and_kept(scripted, files, change):
    llm, _ = scripted
    write_lines(files[0], [chat("a", "one"), chat("b", "two")])
    run(llm, files, settings={"model": "m"})
    before = files[1].read_bytes()
    if change == "input":
        write_lines(files[0], [chat("a", "one"), chat("b", "three")])
    settings = {"model": "m" if change == "input" else "other"}
    with pytest.raises(ValueError, match=f"answers {1 if change == 'input' else 2} lines that this run does not ask"):
        Job(*files, settings)
    assert files[1].read_bytes() == before
    Job(*files[:1], files[1].with_name("new.jsonl"), settings).output.close()


def test_output_that_is_the_input_is_refused(files):
    write_lines(files[0], [chat("a", "one")])
    before = files[0].read_bytes()
    files[1].symlink_to(files[0])
    for output in (files[0], files[1]):
        with pytest.raises(ValueError, match="the output is the input"):
            Job(files[0], output, {})
    assert files[0].read_bytes() == before


def test_lines_in_flight_are_bounded_and_written_while_others_wait(files):
    write_lines(files[0], [chat(str(i), "x") for i in range(40)])
    running, most, reads = set(), 0, []
    with Job(*files, {}) as job:
        pending = job.pending
        job.pending = lambda: (reads.append(line.custom_id) or line for line in pending())

        async def answer(line):
            nonlocal most
            running.add(line.id)
            most = max(most, len(running))
            await asyncio.sleep(0.5 if line.custom_id == "0" else 0.001)
            running.remove(line.id)
            # A slow line holds nothing up, and no line is read before there is room for it.
            assert len(reads) <= len(read_lines(files[1])) + 8
            return line.answered(200, {})

        asyncio.run(job.run(answer, 8, show_progress=False))
    order = [line["custom_id"] for line in read_lines(files[1])]
    assert most == 8 and order[-1] == "0" and len(order) == 40


def test_dead_engine_ends_the_run_and_the_next_goes_on(files):
    llm, engine = scripted_llm()
    write_lines(files[0], [chat(str(i), f"text {i}") for i in range(50)])

    def die():
        if len(files[1].read_bytes().splitlines()) > 20:
            raise MemoryError("no memory")

    engine.before_step = die
    with pytest.raises(EngineDeadError, match="no memory"):
        run(llm, files)
    first = read_lines(files[1])
    assert 20 < len(first) < 50 and all(line["error"] is None for line in first)
    asyncio.run(llm.close())
    llm, engine = scripted_llm()
    run(llm, files)
    asyncio.run(llm.close())
    assert read_lines(files[1])[: len(first)] == first
    assert sorted(int(said(line)[5:]) for line in read_lines(files[1])) == list(range(50))
    assert len(engine.asked) == 50 - len(first)


def test_seed_of_the_run_gives_each_line_its_own(scripted, files):
    llm, engine = scripted
    lines = [chat("a", "x"), chat("b", "x", seed=-1), chat("c", "x", seed=3)]
    seeds = []
    for seed, order in ((1, 1), (1, -1), (2, 1)):
        write_lines(files[0], lines[::order])
        files[1].unlink(missing_ok=True)
        engine.asked.clear()
        run(llm, files, seed=seed, in_flight=1)
        seeds.append([asked.params.seed for asked in engine.asked][::order])
    assert seeds[0] == seeds[1] and seeds[0][2] == seeds[2][2] == 3
    assert len({*seeds[0], *seeds[2]}) == 5


def test_interrupted_run_leaves_whole_lines(scripted, files):
    llm, _ = scripted
    write_lines(files[0], [chat("a", "short"), chat("b", "forever")])

    async def interrupted():
        task = asyncio.ensure_future(run_job(llm, *files))
        while not read_lines(files[1]) if files[1].exists() else True:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while llm.num_requests:
            await asyncio.sleep(0.01)

    asyncio.run(interrupted())
    assert [said(line) for line in read_lines(files[1])] == ["short"]
