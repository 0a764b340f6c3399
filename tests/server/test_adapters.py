"""Adapters over HTTP: by `lora`, as `model`, from a folder on first use, and never from a path."""

import asyncio
import contextlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama import LLM, SamplingParams
from llama.api.errors import ParameterError, WorkerLostError
from llama.async_llm.async_llm import AsyncLLM
from llama.engine.engine import Engine
from llama.server.adapters import AdapterRegistry
from llama.server.config import ServerConfig
from llama.server.errors import ApiError
from llama.server.service import Service
from tests.lora.adapters import make_adapter, save_base
from tests.server.helpers import NAME, RUN, running

PROMPT = [5, 6, 7, 8, 9]
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    base = save_base(root / "base", tied=False)
    shelf = root / "shelf"
    shelf.mkdir()
    for seed, path in enumerate((root / "first", shelf / "second", root / "outside")):
        make_adapter(base, path, seed=seed, target_modules=["q_proj", "v_proj", "down_proj"])
    (shelf / "linked").symlink_to(root / "outside")
    (shelf / "broken").mkdir()
    (shelf / "broken" / "adapter_config.json").write_text("{")
    (shelf / "empty").mkdir()
    make_adapter(base, shelf / NAME, seed=9, target_modules=["q_proj"])  # the name is the base model's
    return root


@pytest.fixture(scope="module")
def expected(folders):
    """Greedy tokens by adapter, from the library."""
    llm = LLM(folders / "base", dtype="float64", num_blocks=64, max_num_seqs=4)
    llm.load_lora("first", folders / "first")
    llm.load_lora("second", folders / "shelf" / "second")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    names = (None, "first", "second")
    return {name: llm.generate([PROMPT], params, lora=name, use_tqdm=False)[0].outputs[0].token_ids for name in names}


@pytest.fixture(scope="module")
def server(folders):
    llm = LLM(folders / "base", dtype="float64", num_blocks=64, max_num_seqs=4)
    llm.load_lora("first", folders / "first")
    with running(AsyncLLM(llm), lora_dir=folders / "shelf") as made:
        yield made


def test_what_steps_with_an_adapter_need_is_ready_before_it_is_loaded(folders, monkeypatch):
    warmed = []
    monkeypatch.setattr(
        Engine, "warm", lambda self, adapter: warmed.append((adapter.name, list(self.adapters.by_name)))
    )
    llm = LLM(folders / "base", dtype="float64", num_blocks=64, max_num_seqs=4)
    llm.load_lora("first", folders / "first")

    async def load() -> None:
        async with AsyncLLM(llm) as served:
            await served.load_lora("second", folders / "shelf" / "second")

    asyncio.run(load())
    assert warmed == [("first", []), ("second", ["first"])]


def tokens_of(response) -> list[int]:
    assert response.status_code == 200, response.text
    names = response.json()["choices"][0]["logprobs"]["tokens"]
    return [int(name.removeprefix("token_id:")) for name in names]


def complete(server, **more):
    return server.run({"prompt": PROMPT, **GREEDY, **more}, path="/v1/completions")


def test_each_request_of_a_batch_gets_its_own_adapter(server, expected):
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    asked = [{}, {"lora": "first"}, {"model": "first"}, {"lora": "second"}, {"model": "second"}, {"model": NAME}] * 2
    asked.append({"model": "@cf/meta/first"})
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda more: complete(server, **more), asked))
    for more, answer in zip(asked, answers, strict=True):
        name = (more.get("lora") or more.get("model") or NAME).removeprefix("@cf/meta/")
        assert tokens_of(answer) == expected[None if name == NAME else name]


def test_no_adapter_that_is_loaded_has_a_name_of_the_model(folders):
    llm = LLM(folders / "base", dtype="float64", num_blocks=64, max_num_seqs=4)
    llm.load_lora("first", folders / "first")
    with pytest.raises(ParameterError, match=r"lora must have a name that the model does not \(.*\), got 'first'"):
        Service(AsyncLLM(llm), ServerConfig(model_names=(NAME, "first")))


def test_adapters_are_listed_with_their_parent(server):
    data = server.client.get("/v1/models").json()["data"]
    assert [(entry["id"], entry["parent"]) for entry in data] == [
        (NAME, None),
        ("broken", NAME),
        ("first", NAME),
        ("second", NAME),
    ]
    for name in ("second", "@cf/meta/second", "@cf%2Fmeta%2Fsecond"):
        found = server.client.get(f"/v1/models/{name}").json()
        assert (found["id"], found["parent"]) == (name.replace("%2F", "/"), NAME)
    for name in (NAME, f"@cf/meta/{NAME}", "llama-3.1-70b-instruct", "@cf/meta/llama-3.1-70b-instruct"):
        found = server.client.get(f"/v1/models/{name}").json()
        assert (found["id"], found["max_model_len"]) == (name, data[0]["max_model_len"])
    assert server.client.get("/v1/models/@cf/meta/third").status_code == 404


@pytest.mark.parametrize(
    "name", ["other", "linked", "empty", "../first", "..", ".", "", "/etc", "shelf/second", "\x00"]
)
def test_unknown_names_are_refused_and_the_known_listed(server, name):
    response = complete(server, lora=name)
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith("there are broken, first, second")
    if name:
        assert complete(server, model=name).status_code == 404


def test_a_broken_adapter_is_refused_without_its_path(server, folders):
    response = complete(server, lora="broken")
    assert response.status_code == 400 and str(folders) not in response.text
    assert complete(server, model="first", lora="second").status_code == 400
    assert complete(server, model="broken").json()["error"]["param"] == "model"


def test_cloudflare_s_field_and_model(server):
    response = server.run({"prompt": "x", "lora": "other"})
    assert response.json()["errors"][0]["code"] == 5006
    assert server.run({"prompt": "x"}, path="/ai/run/other").json()["errors"][0]["code"] == 5007
    # This model has no tokenizer: what matters is which error comes, and that the names are known.
    for body, path in (({"prompt": "x", "lora": "first"}, RUN), ({"prompt": "x"}, "/ai/run/second")):
        message = server.run(body, path=path).json()["errors"][0]["message"]
        assert message == "AiError: Bad input: Error: chat needs a tokenizer: this model takes token ids only"


def test_an_adapter_that_was_written_anew_is_read_anew(server, folders, expected):
    folder = folders / "shelf" / "changing"
    try:
        for source in ("first", "outside", "shelf/second"):
            shutil.copytree(folders / source, folder, dirs_exist_ok=True)
            answers = [tokens_of(complete(server, lora="changing")) for _ in range(2)]
            assert answers[0] == answers[1] == expected.get(Path(source).name, answers[0])
        (folder / "adapter_config.json").write_text("{")
        assert tokens_of(complete(server, lora="changing")) == expected["second"], (
            "half written: what was loaded serves"
        )
    finally:
        shutil.rmtree(folder)


class SlowLoader:
    """In the place of an AsyncLLM: its second load never ends, or raises `second`."""

    def __init__(self, second):
        self.second, self.num_loads, self.names = second, 0, set()

    def list_loras(self):
        return [SimpleNamespace(name=name) for name in self.names]

    async def load_lora(self, name, path, replace):
        self.num_loads += 1
        if self.num_loads == 2 and self.second is None:
            await asyncio.Event().wait()
        if self.num_loads == 2:
            raise self.second
        self.names.add(name)


@pytest.mark.parametrize("second", [None, WorkerLostError()], ids=["the client leaves", "the process is lost"])
def test_an_adapter_whose_reading_was_cut_off_is_read_by_the_next_request(tmp_path, second):
    config = tmp_path / "changing" / "adapter_config.json"
    config.parent.mkdir()
    config.write_text("{}")
    llm = SlowLoader(second)

    async def ask():
        registry = AdapterRegistry(llm, ServerConfig(model_names=(NAME,), lora_dir=tmp_path))
        await registry.take("changing")
        config.write_text("{ }")
        with contextlib.suppress(TimeoutError, ApiError):
            await asyncio.wait_for(registry.take("changing"), 0.05)
        for _ in range(2):
            await registry.take("changing")

    asyncio.run(ask())
    assert llm.num_loads == 3
