"""However long the file, it is read and written line by line."""

import json
import subprocess
import sys

import pytest

from tests.batch.helpers import completion


def growth(folder, num_bytes: int, extra: int) -> tuple[int, int]:
    """-> (bytes by which a run's memory grew, lines)."""
    num_lines = 0
    source, output = folder / "input.jsonl", folder / "output.jsonl"
    with source.open("w") as file:
        while file.tell() < num_bytes:
            # What does not change the answer makes the line long, so that the null model has little to do.
            file.write(json.dumps(completion(f"line {num_lines}", "hi", metadata={"note": "n" * extra})) + "\n")
            num_lines += 1
    command = [sys.executable, "-m", "tests.batch.null_model", source, output]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    with output.open() as file:
        assert told["answered"] == num_lines == sum(1 for _ in file)
    return told["peak"] - told["before"], num_lines


@pytest.mark.slow
def test_flat_over_many_short_lines(tmp_path):
    grown, num_lines = growth(tmp_path, 1_000_000, 0)
    assert num_lines > 5_000 and grown < 20_000_000


@pytest.mark.slow
def test_flat_over_half_a_gigabyte(tmp_path):
    grown, num_lines = growth(tmp_path, 500_000_000, 4_000)
    assert num_lines > 100_000 and grown < 32_000_000
