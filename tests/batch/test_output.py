"""The output file after kills at any place: answers stay, torn ends and failures go, foreign files are not touched."""

import json
import subprocess
import sys

import pytest

from llama.batch.output import OutputFile


def line(number: int, status: int | None = 200) -> dict:
    response = None if status is None else {"status_code": status, "request_id": "r", "body": {"text": "é\n\u2028\x85"}}
    error = {"code": "internal_error", "message": "m"} if status is None else None
    return {"id": f"batch_req_{number:032x}", "custom_id": str(number), "response": response, "error": error}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "output.jsonl"


def write(path, *lines) -> list[str]:
    """-> the ids that were answered before."""
    output = OutputFile(path)
    before = [each["id"] for each in lines if each["id"] in output.answered]
    for each in lines:
        if each["id"] not in output.answered:
            output.write(each)
    output.close()
    return before


def read(path) -> list[dict]:
    return [json.loads(each) for each in path.read_text(encoding="utf-8").splitlines()]


def test_every_line_is_in_the_file_at_once(path):
    output = OutputFile(path)
    for number in range(3):
        output.write(line(number))
        assert read(path) == [line(i) for i in range(number + 1)]
    output.close()


def test_cut_at_any_byte_it_goes_on(path):
    write(path, line(0), line(1), line(2))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        before = write(path, line(0), line(1), line(2))
        assert len(before) == sum(end <= cut for end in ends)
        assert path.read_bytes() == whole


def test_failures_and_rejections_are_asked_again_and_doubles_dropped(path):
    path.write_text("".join(json.dumps(each, separators=(",", ":")) + "\n" for each in [line(0), line(1, None)]))
    with path.open("a") as file:
        for each in (line(2, 400), line(0), line(3)):
            file.write(json.dumps(each, separators=(",", ":")) + "\n")
        file.write('{"id":"batch_req_')
    before = write(path, *[line(number) for number in range(4)])
    assert before == [line(0)["id"], line(3)["id"]]
    assert read(path) == [line(0), line(3), line(1), line(2)]
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_rewrite_left_does_not_matter(path):
    write(path, line(0), line(1, None))
    path.with_name("output.jsonl.tmp").write_text("torn")
    assert write(path, line(0), line(1)) == [line(0)["id"]]
    assert read(path) == [line(0), line(1)]


@pytest.mark.parametrize(
    "content", ['{"custom_id": "a", "method": "POST"}\n', "notes without an end", "\n", '{"id":"batch_req_', "{"]
)
def test_foreign_file_is_not_touched(path, content):
    path.write_text('{"question": 1}\n' + content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 1 is not the output of a batch"):
        OutputFile(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damaged", ['{"id":"batch_req_1"}', '{"id":"batch_req_1', '{"id":"batch_req_1","response":7}'])
def test_damage_before_the_end_is_said(path, damaged):
    content = json.dumps(line(0), separators=(",", ":")) + f"\n{damaged}\n"
    path.write_text(content)
    with pytest.raises(ValueError, match="line 2 is damaged"):
        OutputFile(path)
    assert path.read_text() == content


def test_second_writer_is_refused(path):
    output = OutputFile(path)
    open_it = "import pathlib, sys; from llama.batch import output; output.OutputFile(pathlib.Path(sys.argv[1]))"
    result = subprocess.run([sys.executable, "-c", open_it, str(path)], capture_output=True, text=True, check=False)
    assert "another run is writing to it" in result.stderr
    output.close()
    OutputFile(path).close()


def test_lock_stays_after_a_rewrite(path):
    write(path, line(0), line(1, None))
    output = OutputFile(path)  # rewrites
    with pytest.raises(ValueError, match="another run is writing"):
        OutputFile(path)
    output.close()
