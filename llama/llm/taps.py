"""Captures and interventions of a call, checked and handed to its requests."""

import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

from llama.api.errors import ParameterError
from llama.api.outputs import RequestMetrics, RequestOutput
from llama.engine.budget import free_cpu_bytes
from llama.engine.engine import Engine
from llama.engine.memory import kv_rounding
from llama.engine.request import Request
from llama.llm.requests import one_per_prompt
from llama.model.capture import Capture, RequestTaps, is_kept
from llama.model.interventions import Apply, Intervention, Project
from llama.model.module import hooks_of
from llama.model.taps import Interventions, each
from llama.model.transformer import Transformer

MOST_OF_FREE = 0.5  # of the memory that is free now, for what is captured


def tapped(
    engine: Engine,
    requests: Sequence[Request],
    capture: Capture | Sequence[Capture | None] | None,
    interventions: Interventions,
) -> list[Request]:
    """The requests with what each reads and changes. ParameterError for what does not fit the model or a prompt, and
    where all that is to be captured may not fit into memory."""
    captures = one_per_prompt("capture", capture, len(requests))
    changed = _as_now(each(interventions, len(requests)))
    if all(own is None for own in captures) and not any(changed):
        return list(requests)
    if engine.model is None:
        raise ParameterError("capture and interventions need a model", "capture")
    weights = _digest(engine.model, captures)
    needed: list[int] = []
    asked = []
    for request, own, changes in zip(requests, captures, changed, strict=True):
        if own is not None and not isinstance(own, Capture):
            raise ParameterError(f"capture must be a Capture, got {type(own).__name__}", "capture")
        into_folder = own is not None and isinstance(own.save_to, str | Path)
        if into_folder and Path(request.request_id).name != request.request_id:
            raise ParameterError(
                f"capture: save_to names files by request_id, which {request.request_id!r} cannot be", "request_ids"
            )
        if own is None and not changes:
            asked.append(request)
            continue
        if request.params.is_guided:
            told = "capture and interventions do not go with guidance_scale, which computes two prompts"
            raise ParameterError(told, "guidance_scale")
        for change in changes or ():
            if engine.config.deterministic and isinstance(change, Apply | Project):
                what = f"{type(change).__name__} at {change.point}: its bits follow the chunks of a prompt"
                raise ParameterError(f"interventions: deterministic=True has no {what}", "interventions")
        taps = RequestTaps(
            own,
            changes,
            engine.model.config,
            len(request.prompt_token_ids),
            num_completions=request.params.n,
            like=engine.model.norm.weight,
        )
        if own is not None and isinstance(own.save_to, str | Path):
            taps.identity = _identity(engine, weights, request, own, taps)
            taps.is_kept = is_kept(Path(own.save_to), request.request_id, taps.identity)
        limit = engine.limit(len(request.prompt_token_ids), request.params.max_tokens)
        needed.append(0 if taps.is_kept else taps.num_bytes(limit))
        asked.append(replace(request, taps=taps))
    stays = any(own is not None and own.save_to is None for own in captures)
    total = sum(needed) if stays else sum(sorted(needed)[-(engine.config.max_num_seqs or 1) :])
    free = int(MOST_OF_FREE * free_cpu_bytes())
    if total > free:
        raise ParameterError(
            f"capture may need {total:,} bytes, and there is room for {free:,}: take fewer points or positions, "
            'reduce="mean", or save_to=FOLDER',
            "capture",
        )
    return asked


def kept_output(request: Request) -> RequestOutput:
    """Of a request whose file an earlier run has written: without completions."""
    ids: list[int] = request.prompt_token_ids.tolist()
    metrics = RequestMetrics(queued=time.monotonic())
    return RequestOutput(request.request_id, request.prompt, ids, [], metrics, finished=True)


def _as_now(changed: Sequence[Sequence[Intervention]]) -> list[Sequence[Intervention]]:
    """Snapshots, one of each that several requests share: requests run while the caller's own code does, and what they
    leave in the prefix cache is found by what the changes were."""
    known: dict[int, Intervention] = {}
    for given in (given for own in changed for given in own):
        if isinstance(given, Intervention) and id(given) not in known:
            known[id(given)] = given.snapshot()
    return [[known.get(id(given), given) for given in own] for own in changed]


def _digest(model: Transformer, captures: Sequence[Any]) -> str:
    """Where any of them goes to a folder. Forward hooks may do anything: what they see is no other call's."""
    if not any(isinstance(getattr(own, "save_to", None), str | Path) for own in captures):
        return ""
    return uuid4().hex if any(hooks_of(model)) else model.digests.of(model, model.local_config)


def _identity(engine: Engine, weights: str, request: Request, capture: Capture, taps: RequestTaps) -> str:
    """Of all that decides what a file holds; `weights` is the model's digest."""
    assert engine.model is not None
    root = engine.scheduler.model + request.adapter.digest + taps.salt
    told = blake2b(root + weights.encode(), digest_size=16)
    told.update(request.prompt_token_ids.tobytes())
    asked = engine.model.dtype, list(taps.sequence.captures), capture.positions, capture.dtype, capture.reduce
    told.update(repr((*asked, kv_rounding(engine.model, engine.config))).encode())
    if capture.positions in ("all", "generated"):
        told.update(repr(request.params).encode())
    return told.hexdigest()
