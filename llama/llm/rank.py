"""What a rank other than 0 does: loads its part of the model, and computes the steps that it is told."""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from llama.engine.adapters import Adapter
from llama.engine.config import EngineConfig
from llama.engine.graph_runner import make_runner
from llama.engine.memory import fitting_blocks
from llama.engine.parallel_runner import Follower
from llama.engine.runner import Runner
from llama.engine.wire import receive
from llama.llm.loading import load_model
from llama.llm.weights import Update
from llama.model.communicator import Communicator
from llama.model.config import ModelConfig
from llama.model.lora import AdapterError, read_adapter
from llama.model.parallel import Shard
from llama.model.transformer import Transformer

START_SECONDS = 600.0  # that ranks wait for one another while weights are read


def serve(stream: socket.socket, say: Callable[[dict[str, Any]], None]) -> None:
    """Until the other side of `stream` goes. It tells first what there is to load, then the number of KV blocks."""
    first = receive(stream)
    if first is None:
        return
    say({"up": True})
    told = first.content
    config = EngineConfig(**told["engine"])
    model = load_part(told, told["rank"])
    say({"ready": True})
    while (message := receive(stream)) is not None:
        if "measure" in message.content:
            say({"num_blocks": fitting_blocks(model, config)})
            continue
        runner = make_runner(model, config, message.content["num_blocks"], frozenset(told["eos_token_ids"]))
        say({"started": True})
        follower = Follower(runner, lambda adapter: _read(adapter, model, config), say)
        upkeep = Upkeep(model, runner)
        while (step := receive(stream)) is not None:
            answer = upkeep.take(step.content) or follower.take(step)
            if answer is not None:
                say(answer)
        return


class Upkeep:
    """What changes under a rank between its steps."""

    def __init__(self, model: Transformer, runner: Runner) -> None:
        self._model, self._runner = model, runner
        self._update: Update | None = None

    def take(self, content: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer; None where the message is something else."""
        if "weights" in content:
            self._update = self._update or Update(self._model)
            if (name := content["weights"]) is not None:
                self._update.read(name, content["path"])
            else:
                self._update.finish()
                self._update = None
        elif "sleep" in content:
            self._runner.sleep()
        elif "wake_up" in content:
            try:
                self._runner.wake_up()
            except MemoryError as error:
                return {"refused": str(error)}
        else:
            return None
        return {"done": True}


def load_part(
    told: Mapping[str, Any],
    rank: int,
    patient: Callable[[Callable[[], Communicator]], Communicator] = lambda meet: meet(),
) -> Transformer:
    """The part of a rank of what `told` describes; the ranks meet here, as long as `patient` lets them wait."""
    device = torch.device("cpu")
    if told["device"] == "cuda":
        device = torch.device("cuda", told["first_device"] + rank)
        torch.cuda.set_device(device)
    elif told["threads"]:
        torch.set_num_threads(told["threads"])
    path, loading = Path(told["model"]), told["loading"]
    shard = Shard(ModelConfig.from_pretrained(path), rank, told["size"])
    seconds = max(START_SECONDS, told["engine"]["step_timeout"])
    communicator = patient(lambda: Communicator(shard, FileStore(told["store"], told["size"]), device, seconds=seconds))
    return load_model(path, device, communicator=communicator, **loading)


def _read(told: Mapping[str, Any], model: Transformer, config: EngineConfig) -> Adapter:
    content = read_adapter(told["path"], model, max_rank=config.max_lora_rank)
    if content.digest.hex() != told["digest"]:
        raise AdapterError(f"{told['path']}: its files changed while they were read")
    return Adapter(str(told["number"]), content.digest, content, content.nbytes)
