"""Batch files and running them over an engine that says what the user says."""

import asyncio
import json
from pathlib import Path

from llama.batch.answer import Answerer
from llama.batch.job import Job
from llama.server.config import ServerConfig

PATIENCE = 3600


def chat(custom_id: str, text: str, **options) -> dict:
    body = {"messages": [{"role": "user", "content": text}], **options}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(custom_id: str, prompt, **options) -> dict:
    body = {"prompt": prompt, **options}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def responses(custom_id: str, text: str, **options) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": {"input": text, **options}}


def write_lines(path: Path, lines: list) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def said(line: dict) -> str:
    """The text of a chat's answer."""
    assert line["error"] is None and line["response"]["status_code"] == 200
    return line["response"]["body"]["choices"][0]["message"]["content"]


def essence(line: dict) -> dict:
    """An output line without what differs from run to run: ids of answers and times."""
    response = line["response"]
    if response is not None and response["status_code"] == 200:
        told = response["body"]
        body = {name: value for name, value in told.items() if name not in ("id", "created", "created_at")}
        body["usage"] = told["usage"].get("completion_tokens", told["usage"].get("output_tokens"))
        if "output" in told:
            body["output"] = [{**item, "id": None} for item in told["output"]]
        response = {**response, "body": body}
    return {**line, "response": response}


def by_custom_id(lines: list[dict]) -> dict[str, dict]:
    found = {line["custom_id"]: essence(line) for line in lines}
    assert len(found) == len(lines)
    return found


async def run_job(llm, source: Path, output: Path, *, settings=None, in_flight=16, seed=None, names=("tiny",)) -> Job:
    answer = Answerer(llm, ServerConfig(model_names=names), seed)
    with Job(source, output, settings or {}) as job:
        await asyncio.wait_for(job.run(answer, in_flight, show_progress=False), PATIENCE)
    return job
