"""How many threads a command computes with, in a container that may use fewer cores than its machine has."""

import pytest
import torch

from llama import LLM
from llama.engine import budget
from tests.cli.helpers import run


@pytest.mark.parametrize(
    "command",
    [["serve", "--port", "0"], ["generate", "x"], ["batch", "in", "out"]],
)
@pytest.mark.parametrize(
    ("quota", "named", "threads"),
    [("200000 100000", None, 2), ("800000 100000", None, 4), ("max 100000", None, 4)]
    + [("200000 100000", name, 4) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")],
)
def test_a_command_has_the_cores_of_its_container(tiny, tmp_path, capsys, monkeypatch, command, quota, named, threads):
    """A number that the user has set stays."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if named is not None:
        monkeypatch.setenv(named, "4")
    monkeypatch.setattr(budget, "_GROUP", tmp_path)
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    (tmp_path / "in").write_text("{}\n")
    monkeypatch.chdir(tmp_path)

    def told(*_, **options):
        raise ValueError(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(LLM, "__init__", told)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert run(capsys, command[0], tiny, *command[1:])[::2] == (1, f"llama: {threads} threads\n")
    finally:
        torch.set_num_threads(before)
