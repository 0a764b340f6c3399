"""Batch files as Parquet: the fields of a line are columns, and what is an object in a line is JSON in a text here, so
that absent fields and mixed types stay as they are. Needs pyarrow, which the extra `ray` brings along.

Nothing can be appended to a Parquet file. So a run writes lines to a journal beside the output, and makes the output of
it when all lines are in; a run that goes on after a kill finds the journal, a later one makes it anew of the output.
"""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

SUFFIX = ".parquet"
INPUT_COLUMNS = ("custom_id", "method", "url", "body")
OUTPUT_COLUMNS = ("id", "custom_id", "response", "error")
_ROWS = 1024  # at a time


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def journal_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.jsonl")


def input_lines(path: Path) -> Iterator[bytes]:
    """Each row as the line of a batch file that it stands for."""
    for row in _rows(path, INPUT_COLUMNS, ("body",)):
        yield json.dumps({name: value for name, value in row.items() if value is not None}).encode()


def open_journal(output: Path) -> Path:
    """The journal of this output, made of it where an earlier run has ended well."""
    _pyarrow(output)  # better missing now than when all is done
    journal = journal_of(output)
    if output.exists() and not journal.exists():
        temporary = output.with_name(f"{output.name}.tmp")
        with temporary.open("wb") as file:
            for row in _rows(output, OUTPUT_COLUMNS, ("response", "error")):
                line = {name: row[name] for name in OUTPUT_COLUMNS}
                file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        os.replace(temporary, journal)
    return journal


def close_journal(output: Path) -> None:
    """Make the output of its journal, which then goes. A kill in between leaves one that is whole."""
    pyarrow, parquet = _pyarrow(output)
    journal, temporary = journal_of(output), output.with_name(f"{output.name}.tmp")
    schema = pyarrow.schema([(name, pyarrow.string()) for name in OUTPUT_COLUMNS])
    with journal.open("rb") as file, parquet.ParquetWriter(temporary, schema) as writer:
        while lines := list(islice(file, _ROWS)):
            rows = [json.loads(line) for line in lines]
            texts = [{**row, **{name: _text(row[name]) for name in ("response", "error")}} for row in rows]
            writer.write_table(pyarrow.Table.from_pylist(texts, schema))
    os.replace(temporary, output)
    journal.unlink()


def _rows(path: Path, columns: tuple[str, ...], objects: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows with `objects` read; what is not JSON stays a text, for the reader of the line to refuse."""
    pyarrow, parquet = _pyarrow(path)
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None
    with file:
        schema = file.schema_arrow
        if missing := [name for name in columns if name not in schema.names]:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
        for name in objects:
            kind = schema.field(name).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or kind == pyarrow.null()):
                raise ValueError(f"{path}: the column {name} must hold JSON as texts, got {kind}")
        for batch in file.iter_batches(_ROWS, columns=list(columns)):
            for row in batch.to_pylist():
                yield {**row, **{name: _object(row[name]) for name in objects}}


def _object(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: Parquet files need pyarrow: pip install 'llama-engine[ray]'") from None
    return pyarrow, parquet
