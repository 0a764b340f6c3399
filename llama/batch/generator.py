"""Generator: rows in, the same rows with their answers out. Made for Ray Data's map_batches; it needs no Ray.

    dataset.map_batches(
        Generator, fn_constructor_kwargs={"model": path}, batch_size=64, batch_format="pyarrow",
        compute=ActorPoolStrategy(size=2), max_concurrency=8,
    )

All rows of a batch are asked at once, and batches overlap: let more rows be on their way than max_num_seqs. A row that
is refused keeps its error in a column of its own and stops no other.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama.api.errors import EngineDeadError, WorkerLostError
from llama.api.outputs import FinishReason, RequestOutput
from llama.api.params import SamplingParams
from llama.async_llm.async_llm import Stream
from llama.batch.opening import open_llm

ERROR_COLUMN = "__inference_error__"
# The columns that may be read, and those that come, with the names of their Arrow types.
_PROMPTS = ("messages", "prompt_token_ids", "prompt")
_INPUTS = (*_PROMPTS, "sampling_params", "lora")
_RESULTS = {
    "generated_text": "string",
    "generated_tokens": "int64s",
    "num_input_tokens": "int64",
    "num_generated_tokens": "int64",
    "finish_reason": "string",
    "logprobs": "float64s",
    "top_logprobs": "string",
    ERROR_COLUMN: "string",
}
_FAILED = "the model failed while it wrote this answer"

Row = dict[str, Any]


class Generator:
    """`model` and `llm_arguments` as LLM takes them; `sampling_params` (an object or its fields) for rows that have
    none of their own; `loras`: adapters to load, name -> folder.

    A row has one of `messages`, `prompt_token_ids` and `prompt`, and where wanted `sampling_params` (its fields) and
    `lora` (a name); messages and sampling_params may also be JSON in a text. Columns that come: generated_text,
    generated_tokens, num_input_tokens, num_generated_tokens, finish_reason, logprobs (of the tokens generated),
    top_logprobs (JSON: for each token an object, token id -> log-probability), and __inference_error__, which is empty
    where all went well. All other columns pass through. `exit_on_death`: end the process when the engine dies, so that
    Ray starts another.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        loras: Mapping[str, str | Path] | None = None,
        exit_on_death: bool = False,
        **llm_arguments: Any,
    ) -> None:
        self._params = _sampling_params(sampling_params)
        self._exit_on_death = exit_on_death
        self._llm = open_llm(model, loras or {}, **llm_arguments)

    async def __call__(self, batch: Any) -> AsyncIterator[Any]:
        """A batch of columns, a pyarrow.Table or a dict of sequences -> one of the same kind, its rows in the same
        order."""
        names = list(batch) if isinstance(batch, Mapping) else batch.column_names
        columns = {name: _readable(batch[name]) for name in _INPUTS if name in names}
        if not columns.keys() & set(_PROMPTS):
            raise ValueError(f"a batch needs one of the columns {', '.join(_PROMPTS)}, got {', '.join(names)}")
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        try:
            answers = await asyncio.gather(*map(self._answer, rows))
        except EngineDeadError:
            if self._exit_on_death:
                os._exit(1)
            raise
        results = {name: [answer[name] for answer in answers] for name in _RESULTS}
        yield {**batch, **columns, **results} if isinstance(batch, Mapping) else _appended(batch, results)

    async def _answer(self, row: Row) -> Row:
        try:
            async with await self._submit(row) as stream:
                output = await stream.result()
        except (ValueError, WorkerLostError) as error:
            return {**_result(None), ERROR_COLUMN: str(error)}
        failed = output.outputs[0].finish_reason in (FinishReason.ERROR, FinishReason.ABORT)
        return {**_result(None), ERROR_COLUMN: _FAILED} if failed else _result(output)

    async def _submit(self, row: Row) -> Stream:
        names = [name for name in _PROMPTS if row.get(name) is not None]
        if len(names) != 1:
            raise ValueError(
                f"a row must have one of {', '.join(_PROMPTS)}, got {' and '.join(names) or 'none of them'}"
            )
        params, lora = _sampling_params(row.get("sampling_params")) or self._params, row.get("lora") or None
        if params is not None and params.n > 1:
            raise ValueError(f"n must be 1, got {params.n}: a row has one answer, repeat the row instead")
        prompt = row[names[0]]
        if names == ["messages"]:
            messages = _parsed("messages", prompt)
            if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
                raise ValueError('messages must be a list of {"role": ..., "content": ...}')
            return await self._llm.submit_chat([_message(each) for each in messages], params, lora=lora)
        if not isinstance(prompt, str if names == ["prompt"] else list):
            raise ValueError(f"{names[0]} must be {'a text' if names == ['prompt'] else 'a list of token ids'}")
        return await self._llm.submit({names[0]: prompt}, params, lora)


def _readable(column: Any) -> list[Any]:
    """A column's values without the types of pyarrow and NumPy."""
    return column.to_pylist() if hasattr(column, "to_pylist") else [_plain(value) for value in column]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value


def _appended(table: Any, results: Mapping[str, list[Any]]) -> Any:
    """With its types said: those of an empty list cannot be guessed."""
    import pyarrow as pa

    types = {"int64s": pa.list_(pa.int64()), "float64s": pa.list_(pa.float64())}
    table = table.drop_columns([name for name in results if name in table.column_names])
    for name, values in results.items():
        table = table.append_column(name, pa.array(values, types.get(_RESULTS[name], _RESULTS[name])))
    return table


def _parsed(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A column of objects has the keys of all rows in each row, None where the row itself has it not."""
    return {name: value for name, value in message.items() if value is not None or name == "content"}


def _sampling_params(value: Any) -> SamplingParams | None:
    value = _parsed("sampling_params", value)
    if value is None or isinstance(value, SamplingParams):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"sampling_params must be an object with its fields, got {type(value).__name__}")
    given = {name: _whole(field) for name, field in value.items() if field is not None}
    if isinstance(bias := given.get("logit_bias"), Mapping):
        given["logit_bias"] = {int(token): each for token, each in bias.items() if each is not None}
    try:
        return SamplingParams(**given)
    except TypeError as error:
        raise ValueError(f"sampling_params: {error}") from None


def _whole(value: Any) -> Any:
    """A column of integers that some rows do not have is one of floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _result(output: RequestOutput | None) -> Row:
    """The columns of an answer; None: of none."""
    completion = None if output is None else output.outputs[0]
    tokens = [] if completion is None else completion.token_ids
    entries = (None if completion is None else completion.logprobs) or []
    tops = [{token: entry.logprob for token, entry in each.items()} for each in entries]
    return {
        "generated_text": "" if completion is None else completion.text,
        "generated_tokens": tokens,
        "num_input_tokens": 0 if output is None else len(output.prompt_token_ids),
        "num_generated_tokens": len(tokens),
        "finish_reason": "" if completion is None else str(completion.finish_reason),
        "logprobs": [top[token] for token, top in zip(tokens, tops, strict=False)],
        "top_logprobs": json.dumps(tops) if tops else "",
        ERROR_COLUMN: "",
    }
