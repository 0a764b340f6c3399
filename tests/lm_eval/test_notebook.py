"""In a notebook: a progress bar of its own, and ranks, whose processes import nothing of its cells, which are nobody's
main module."""

import nbformat
from nbclient import NotebookClient

from llama import LLM, SamplingParams
from tests.model.models import tiny_model

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
CELLS = (
    """
from llama import LLM, SamplingParams
llm = LLM({folder!r}, num_blocks=64, max_model_len=256, tensor_parallel_size=2)
params = SamplingParams(**{greedy})
print(llm.generate([1, 2, 3], params, use_tqdm=False)[0].outputs[0].token_ids)
""",
    """
from llama import AsyncLLM
async with AsyncLLM(llm) as engine:
    print((await (await engine.submit([1, 2, 3], params)).result()).outputs[0].token_ids)
""",
)


def test_a_notebook_has_its_own_progress_bar(tmp_path):
    """A widget; without ipywidgets it is text, as elsewhere."""
    tiny_model().save_pretrained(tmp_path)
    cell = f"from llama import LLM\nLLM({str(tmp_path)!r}, num_blocks=64, max_model_len=64).generate([[1], [2]])"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [output["data"] for output in notebook.cells[0]["outputs"] if output["output_type"] == "display_data"]
    bars = [data["text/plain"] for data in shown if "application/vnd.jupyter.widget-view+json" in data]
    assert any(bar.startswith("Prompts:") for bar in bars)


def test_two_ranks_answer_in_a_notebook(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    cells = [cell.replace("{folder!r}", repr(str(tmp_path))).replace("{greedy}", repr(GREEDY)) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    alone = LLM(tmp_path, num_blocks=64, max_model_len=256)
    expected = alone.generate([1, 2, 3], SamplingParams(**GREEDY), use_tqdm=False)[0].outputs[0].token_ids
    for cell in notebook.cells:
        said = [output["text"] for output in cell["outputs"] if output.get("name") == "stdout"]
        assert said == [f"{expected}\n"]
