"""Every kernel in small, odd shapes through the engine, for compute-sanitizer (make memcheck).

There each tensor is an allocation of its own, so that an access past its end is seen. Graphs are not possible then;
they launch the same kernels.
"""

import pytest
import torch

from llama import SamplingParams
from llama.llm.loras import read_lora
from tests.engine import fakes
from tests.engine.test_graphs import save_adapters
from tests.gpu.engines import engine, run, small, tiny
from tests.test_equivalence import ASKS, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_every_way_of_sampling(block_size):
    made = engine(tiny(), Case(lag=1, block_size=block_size, budget=24), enforce_eager=True)
    for i, asked in enumerate(ASKS):
        fakes.add(made, f"{i}", list(asked.prompt), asked.params)
    assert len(run(made)) == sum(asked.params.n for asked in ASKS)


def test_shapes_of_real_models():
    made = engine(small(num_hidden_layers=1, max_position_embeddings=512), Case(lag=1, budget=100), enforce_eager=True)
    for i, length in enumerate((1, 17, 33, 64, 150)):
        fakes.add(made, f"{i}", list(range(length)), SamplingParams(max_tokens=3, temperature=i / 4, seed=i, top_p=0.9))
    assert len(run(made)) == 5


def test_adapters(tmp_path):
    model = tiny()
    made = engine(model, Case(lag=1), enforce_eager=True, max_loras=2)
    folder = save_adapters(tmp_path)
    for name in ("small", "large"):
        made.adapters.add(read_lora(made, model, name, folder / name))
    for i, lora in enumerate((None, "small", "large", "small", None)):
        fakes.add(made, f"{i}", list(range(1, 3 + 5 * i)), SamplingParams(max_tokens=4, temperature=0), lora=lora)
    assert len(run(made)) == 5
