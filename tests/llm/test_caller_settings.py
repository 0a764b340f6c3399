"""What a caller has set in PyTorch for its own code changes nothing here: where tensors are made, in which dtype, and
in which dtype products are computed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from llama import LLM, Add, Capture, Replace, SamplingParams
from llama.model.transformer import Transformer
from tests import tiny_checkpoint


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# Where a tensor is made without a device, "meta" takes its numbers away; a GPU would only have moved it.
SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default device": default_device,
    "device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "grad": torch.enable_grad,
}
ENGINES = {
    "float32": {},
    "int8": {"quantization": "int8", "quantization_layout": "fast"},
    "int4": {"quantization": "int4", "dtype": "bfloat16"},
    "deterministic": {"deterministic": True, "dtype": "bfloat16"},
    "drafts": {"speculative_config": {"method": "ngram"}},
}
STEER = torch.linspace(-1, 1, 64)
RULES = [
    SamplingParams(max_tokens=6, temperature=0, logprobs=2, prompt_logprobs=2),
    SamplingParams(max_tokens=6, seed=3, top_p=0.9, top_k=20, repetition_penalty=1.2, logit_bias={5: 2.0}, n=2),
    SamplingParams(max_tokens=6, seed=4, min_p=0.01, presence_penalty=1.0, frequency_penalty=0.5, min_tokens=2),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    (folder / "adapter").mkdir()
    return tiny_checkpoint.make_model(folder / "model"), tiny_checkpoint.make_adapter(folder / "adapter")


def answers(folders: tuple[str, str], options: dict[str, object]) -> list[object]:
    model, adapter = folders
    llm = LLM(model, device="cpu", num_blocks=64, **options)
    llm.load_lora("a", adapter)
    outputs = llm.generate(["One two one two one", "Three", [1, 2, 3]], RULES, lora=["a", None, "a"])
    [steered] = llm.generate(
        "Five five five",
        RULES[0],
        capture=Capture("layers.*.resid_post", positions="all"),
        interventions=[Add("layers.0.resid_post", STEER)],
    )
    return [
        [[(one.token_ids, one.logprobs) for one in output.outputs] for output in outputs],
        [output.prompt_logprobs for output in outputs],
        {point: values.tolist() for point, values in steered.captured.items()},
        llm.embed("six", pooling="mean").tolist(),
        llm.score("Seven", [" eight"]),
        llm.perplexity("Nine ten"),
    ]


@pytest.fixture(scope="module")
def expected(folders):
    return {name: answers(folders, options) for name, options in ENGINES.items()}


OF_ALL_ENGINES = ("default device", "autocast")


@pytest.mark.parametrize(
    ("setting", "options"),
    [(setting, name) for setting in SETTINGS for name in ENGINES if setting in OF_ALL_ENGINES or name == "float32"],
)
def test_an_engine_answers_as_without_it(folders, expected, setting, options):
    with SETTINGS[setting]():
        found = answers(folders, ENGINES[options])
    assert found == expected[options]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_network_alone_computes_as_without_it(folders, tmp_path, setting):
    ids = torch.tensor([[1, 2, 3, 4]])

    def computed(name: str) -> list[torch.Tensor]:
        model = Transformer.from_pretrained(folders[0], device="cpu")
        logits, read = model.run_with_cache(ids, logits=True, interventions=[Replace("layers.0.resid_post", STEER)])
        session = model.session(8)
        rows = session([1, 2, 3])
        session.rollback(1)
        session.save(tmp_path / name)
        loaded = model.session(8)
        loaded.load(tmp_path / name)
        return [logits, *read.values(), model.unembed(read["layers.0.resid_post"]), rows, loaded([5])]

    plain = computed("plain")
    with SETTINGS[setting]():
        found = computed("set")
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
