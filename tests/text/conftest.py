import pytest

from llama.text.tokenizer import Tokenizer
from tests.text.helpers import BOS, EOT, llama_backend, sentencepiece_backend, write_checkpoint


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory):
    """A folder with a small tokenizer in Llama 3.1's shape."""
    backend = llama_backend()
    eos = [backend.token_to_id(t) for t in ("<|end_of_text|>", "<|eom_id|>", EOT)]
    return write_checkpoint(
        tmp_path_factory.mktemp("llama"),
        backend,
        tokenizer_config={"bos_token": BOS, "eos_token": EOT},
        generation_config={"bos_token_id": backend.token_to_id(BOS), "eos_token_id": eos},
    )


@pytest.fixture(scope="session")
def llama_tokenizer(llama_path):
    return Tokenizer.from_pretrained(llama_path)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory):
    path = write_checkpoint(
        tmp_path_factory.mktemp("sentencepiece"),
        sentencepiece_backend(),
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}},
    )
    return Tokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def demo_tokenizer(demo_model_path):
    return Tokenizer.from_pretrained(demo_model_path)


@pytest.fixture(autouse=True, scope="session")
def only_processor_time_counts():
    """A busy machine is no failure: worker processes wait for theirs as long as it takes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llama.text.sandbox.worker._PATIENCE", 1000)
        yield
