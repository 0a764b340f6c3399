"""What rank 0 tells the other ranks: frames of typed JSON and flat integers, nothing that runs. No torch.

A frame is 8 bytes of length, 4 of the JSON's length, the JSON, and the arrays that it names, all int32. A step is one
frame. What joins a row comes as the fields that a sampler reads; an adapter as the number that it was shared under.
"""

import json
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from llama.api.params import SamplingParams
from llama.engine.adapters import Adapter
from llama.engine.plan import Array, Guided, Join, Plan, Processed

_LENGTH, _JSON_LENGTH = 8, 4
_ITEM = 4  # bytes
_NUMBERS = ("step", "num_decodes", "num_prompt_logprobs")
_OTHERS = (*_NUMBERS, "joins", "adapters", "guided", "processed", "taps")
_ARRAYS = tuple(name for name in Plan._fields if name not in _OTHERS)
# What `SamplerTable.set_row` reads of the parameters; logit_bias apart, whose keys JSON would make texts of.
_PARAMS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("min_tokens", "stop_token_ids", "ignore_eos", "logprobs", "logprobs_mode"),
)


@dataclass(frozen=True, slots=True)
class Message:
    """One frame: `content` is JSON."""

    content: dict[str, Any]
    arrays: Mapping[str, Array]

    def encoded(self) -> bytes:
        named = [[name, list(array.shape)] for name, array in self.arrays.items()]
        text = json.dumps({**self.content, "arrays": named}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ITEM)
        parts = [np.ascontiguousarray(array, np.int32).tobytes() for array in self.arrays.values()]
        length = _JSON_LENGTH + len(text) + sum(map(len, parts))
        return b"".join([length.to_bytes(_LENGTH, "big"), len(text).to_bytes(_JSON_LENGTH, "big"), text, *parts])

    @classmethod
    def decoded(cls, body: bytes) -> "Message":
        """Of a frame without its length. The arrays are views of it."""
        offset = _JSON_LENGTH + int.from_bytes(body[:_JSON_LENGTH], "big")
        content = json.loads(body[_JSON_LENGTH:offset])
        arrays = {}
        for name, shape in content.pop("arrays"):
            count = int(np.prod(shape))
            arrays[name] = np.frombuffer(body, np.int32, count, offset).reshape(shape)
            offset += count * _ITEM
        return cls(content, arrays)


class Frames:
    """Bytes as they come from a stream -> the messages that are complete."""

    def __init__(self) -> None:
        self._data = bytearray()

    def take(self, data: bytes) -> Iterable[Message]:
        self._data += data
        while len(self._data) >= _LENGTH:
            stop = _LENGTH + int.from_bytes(self._data[:_LENGTH], "big")
            if len(self._data) < stop:
                return
            body = bytes(self._data[_LENGTH:stop])
            del self._data[:stop]
            yield Message.decoded(body)


def receive(stream: socket.socket) -> Message | None:
    """The next message; None where the other side has gone."""
    header = _exactly(stream, _LENGTH)
    body = header and _exactly(stream, int.from_bytes(header, "big"))
    return Message.decoded(body) if body else None


def _exactly(stream: socket.socket, count: int) -> bytes | None:
    data = bytearray(count)
    view = memoryview(data)
    try:
        while view:
            got = stream.recv_into(view)
            if not got:
                return None
            view = view[got:]
    except ConnectionError:
        return None
    return bytes(data)


def encode_plan(
    plan: Plan,
    number_of: Callable[[Adapter], int],
    extra: Mapping[str, Any],
    more: Mapping[str, Array] = MappingProxyType({}),
) -> bytes:
    """One step. `number_of`: the number that an adapter was shared under; `extra` is more JSON beside it, `more` are
    arrays that are not the plan's."""
    arrays = {name: value for name in _ARRAYS if (value := getattr(plan, name)) is not None}
    joins = []
    for i, join in enumerate(plan.joins):
        arrays[f"prompt {i}"] = join.prompt
        arrays[f"output {i}"] = np.array(join.output_token_ids, np.int32)
        params = {name: getattr(join.params, name) for name in _PARAMS}
        params["stop_token_ids"] = list(params["stop_token_ids"])
        bias = [[token, value] for token, value in (join.params.logit_bias or {}).items()]
        joins.append({"row": join.row, "seed": join.seed, "params": params, "logit_bias": bias})
    content = {name: getattr(plan, name) for name in _NUMBERS}
    content["joins"] = joins
    content["guided"] = plan.guided
    content["processed"] = [one.sample for one in plan.processed]
    content["adapters"] = [[number_of(adapter), adapter.index] for adapter in plan.adapters]
    return Message({"plan": content, "more": list(more), **extra}, {**arrays, **more}).encoded()


def decode_plan(message: Message, adapters: Mapping[int, Adapter]) -> Plan:
    """`adapters` by the numbers that they were shared under."""
    content = message.content["plan"]
    arrays = {name: array for name, array in message.arrays.items() if name not in message.content["more"]}
    joins = []
    for i, join in enumerate(content["joins"]):
        bias = dict(join["logit_bias"])
        params = SamplingParams(**join["params"], max_tokens=None, logit_bias=bias or None)
        prompt, outputs = arrays.pop(f"prompt {i}"), arrays.pop(f"output {i}").tolist()
        joins.append(Join(join["row"], params, join["seed"], prompt, outputs))
    used = []
    for number, index in content["adapters"]:
        adapters[number].index = index
        used.append(adapters[number])
    guided = tuple(Guided(*one) for one in content["guided"])
    nothing = np.zeros(0, np.int32)
    processed = tuple(Processed(sample, "", (), nothing, []) for sample in content["processed"])
    told: dict[str, Any] = {name: content[name] for name in _NUMBERS} | arrays
    return Plan(**told, joins=tuple(joins), adapters=tuple(used), guided=guided, processed=processed)
