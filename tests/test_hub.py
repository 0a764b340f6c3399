"""Models by id, from a small hub on this machine: what comes, what does not, and one clear line for what goes wrong."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import make_tiny
import pytest
from huggingface_hub import constants, file_download

from llama import LLM, CheckpointError, SamplingParams
from llama.hub import adapter_folder, is_hub_id, model_folder
from tests.lora.adapters import make_adapter, save_base

SHA = "0123456789abcdef0123456789abcdef01234567"
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


class Hub(BaseHTTPRequestHandler):
    """The three routes that a download uses. `server.files` is what a repository holds: id -> path -> bytes."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def log_message(self, *_):
        pass

    def answer(self):
        hub = self.server
        hub.asked.append((self.command, self.path))
        parts = self.path.split("?")[0].strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo == "org/gated":
            return self.fail(403, "GatedRepo")
        if repo not in hub.files:
            return self.fail(401 if repo == "org/private" else 404, "RepoNotFound")
        files = hub.files[repo]
        if parts[0] == "api" and parts[4] == "revision":
            if parts[5] not in ("main", "v2", SHA):
                return self.fail(404, "RevisionNotFound")
            return self.send(
                json.dumps({"id": repo, "sha": SHA, "siblings": [{"rfilename": f} for f in files]}).encode()
            )
        if parts[0] == "api":
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files.items()
            ]
            return self.send(json.dumps(listed).encode())
        path = "/".join(parts[4:])
        if path not in files:
            return self.fail(404, "EntryNotFound")
        data = files[path]
        etag = hub.digests.get(path) or hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}
        if self.command == "GET" and path in hub.broken:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        return self.send(data, **headers)

    def fail(self, status, code):
        self.send(b"{}", status, **{"X-Error-Code": code, "X-Error-Message": code})

    def send(self, data, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def read(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub")
    make_tiny.make(path / "tiny", make_tiny.TINY, dtype="float32", seed=0)
    save_base(path / "base", tied=False)
    make_adapter(path / "base", path / "adapter", target_modules=["q_proj"])
    return SimpleNamespace(tiny=path / "tiny", base=path / "base", adapter=path / "adapter")


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    extra = {"original/consolidated.00.pth": b"x", "pytorch_model.bin": b"x", "modeling.py": b"x", "README.md": b"x"}
    extra |= {"consolidated.safetensors": b"x", "onnx/model.safetensors": b"x"}
    server.files = {
        "org/tiny": read(folders.tiny) | extra,
        "org/base": read(folders.base),
        "org/adapter": read(folders.adapter),
        "org/text": {"README.md": b"x"},
    }
    server.asked, server.broken, server.digests = [], set(), {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    for module in (constants, file_download):
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_by_its_id_says_what_its_folder_says(hub, folders):
    ours, local = LLM("org/tiny", revision="v2", num_blocks=50), LLM(folders.tiny, num_blocks=50)
    for llm in (ours, local):
        assert llm.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    first, second = (llm.generate("Hi", GREEDY, use_tqdm=False)[0].outputs[0].token_ids for llm in (ours, local))
    assert first == second
    folder = model_folder("org/tiny")
    assert folder.name == SHA and {f.name for f in folder.rglob("*")} == set(read(folders.tiny)), (
        "and nothing else came"
    )


def test_what_is_cached_is_not_fetched_again(hub):
    model_folder("org/tiny", SHA)
    fetched = len(hub.asked)
    model_folder("org/tiny", SHA)
    assert len(hub.asked) == fetched
    model_folder("org/tiny")
    assert [path for command, path in hub.asked[fetched:] if "/resolve/" in path] == []


def test_an_adapter_by_its_id(hub):
    llm = LLM("org/base", num_blocks=50)
    llm.load_lora("a", "org/adapter")
    plain, adapted = (
        llm.generate([[1, 2, 3]], GREEDY, lora=lora, use_tqdm=False)[0].outputs[0].token_ids for lora in (None, "a")
    )
    assert plain != adapted
    with pytest.raises(ValueError, match=r"org/text: has no adapter_config.json on the hub"):
        adapter_folder("org/text")


def test_a_folder_goes_before_an_id_and_is_told(hub, folders, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(folders.tiny)
    with caplog.at_level("INFO", "llama"):
        assert not is_hub_id("org/tiny") and model_folder("org/tiny") == Path("org/tiny") and not hub.asked
        model_folder(tmp_path / "org/tiny")
    assert caplog.messages == ["org/tiny: the folder of that name here, not the hub's"]
    with pytest.raises(CheckpointError, match="is for an id of the hub"):
        model_folder("org/tiny", "v2")
    for name in ("/org/tiny", "./x", "a/b/c", "tiny", "../a", Path("other/tiny")):
        assert not is_hub_id(name)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("org/gated", None, "org/gated: on .* it is gated: ask for access"),
        ("org/none", None, "org/none: there is no such folder, and no such model on http.*HF_TOKEN"),
        ("org/private", None, "org/private: there is no such folder, and no such model on"),
        ("org/tiny", "v3", "org/tiny: on .* it has no revision 'v3'"),
        ("org/text", None, "org/text: has no config.json on the hub"),
        ("org/a--b", None, "org/a--b: there is no such folder, and it is no id of the hub: Cannot have --"),
    ],
)
def test_what_is_not_there_is_one_line(hub, name, revision, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        model_folder(name, revision)
    assert "\n" not in str(caught.value)


def test_a_part_in_the_cache_is_no_model_without_a_network(hub, monkeypatch):
    model_folder("org/tiny", config_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder("org/tiny", config_only=True).name == SHA
    with pytest.raises(CheckpointError, match=r"org/tiny: .* HF_HUB_OFFLINE is set, and the cache lacks it") as caught:
        model_folder("org/tiny")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused_and_removed(hub):
    hub.digests["model.safetensors"] = "ab" * 32
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model\.safetensors came damaged"):
            model_folder("org/tiny")
    hub.digests.clear()
    assert (model_folder("org/tiny") / "model.safetensors").exists()


def test_a_download_that_breaks_off_goes_on_when_it_is_tried_again(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.broken.add("model.safetensors")
    with pytest.raises(CheckpointError, match="org/tiny: ") as caught:
        model_folder("org/tiny")
    assert "\n" not in str(caught.value)
    hub.broken.clear()
    fetched = len(hub.asked)
    model_folder("org/tiny")
    assert {
        path.rsplit("/", 1)[1] for command, path in hub.asked[fetched:] if command == "GET" and "/resolve/" in path
    } == {"model.safetensors"}


COMMAND = [sys.executable, "-c", "import sys; from llama.cli import main; sys.exit(main())"]


def environment_of(hub):
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.cache), "HF_HUB_DISABLE_XET": "1"}
    return os.environ | told | {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}


def test_the_command_line_and_the_environment(hub, folders):
    environment = environment_of(hub)

    def info(*words, **more):
        command = [*COMMAND, "info", *words]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, check=False)

    done = info("org/tiny", "--revision", "main")
    assert done.returncode == 0 and "Llama, 2 layers" in done.stdout, done.stderr
    assert not any("safetensors" in path for _, path in hub.asked), "info needs no weights"
    offline = info("org/tiny", HF_HUB_OFFLINE="1")
    assert offline.stdout.split("fits")[0] == done.stdout.split("fits")[0]
    for name in ("org/base",):
        missing = info(name, HF_HUB_OFFLINE="1")
        assert missing.returncode == 1 and missing.stderr.count("\n") == 1 and "HF_HUB_OFFLINE is set" in missing.stderr


def test_serving_a_model_and_an_adapter_by_their_ids(hub):
    words = ["serve", "org/base", "--revision", "v2", "--port", "0", "--num-blocks", "50", "--lora", "a=org/adapter"]
    process = subprocess.Popen([*COMMAND, *words], env=environment_of(hub), stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        line = next(line for line in lines if line.startswith("llama: serving org/base on http://127.0.0.1:"))
        with httpx.Client(base_url=line.split()[-1], timeout=60) as client:
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["org/base", "a"]
            body = {"model": "org/base", "prompt": [1, 2, 3], "max_tokens": 3, "ignore_eos": True}
            assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 3
    finally:
        process.kill()
        process.communicate()
