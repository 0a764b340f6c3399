"""`llama batch`: a file of requests in, a file of answers out. Run again after a kill, it goes on where it was."""

import asyncio
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama.cli.common import (
    add_model_flags,
    add_ray_flags,
    add_replicas_flag,
    check_adapters,
    check_ray,
    keep_to_cores,
    llm_options,
)
from llama.cli.flags import Once, Parser, UsageError, checked, flag, given, named_adapter
from llama.engine.config import EngineConfig
from llama.server.config import ServerConfig

DESCRIPTION = (
    "Answer a file of requests in OpenAI's batch format: one JSON object a line with custom_id, method, url and body. "
    "Answers are written as they are finished. A run that was stopped or killed goes on when it is started again; what "
    "failed or was rejected is then asked again."
)
# Options that change how fast answers come, and not what they are.
SPEED_ONLY = frozenset(
    "device check_weights max_num_seqs max_num_batched_tokens block_size num_blocks gpu_memory_utilization "
    "cpu_memory_utilization enable_prefix_caching enforce_eager max_loras max_lora_rank max_lora_bytes "
    "tensor_parallel_size step_timeout scheduling_policy".split()
)
_PATHS = {"model": "folder of the checkpoint", "input": "file of requests", "output": "file of answers"}


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s MODEL INPUT OUTPUT [options]"
    parser.add_argument(
        "paths", nargs="*", metavar="MODEL INPUT OUTPUT", help=f"{', '.join(_PATHS.values())}, where no flag names them"
    )
    for flags, name in ((["--model"], "model"), (["-i", "--input-file"], "input"), (["-o", "--output-file"], "output")):
        parser.add_argument(*flags, dest=name, metavar=name.upper(), help=_PATHS[name])
    several: dict[str, Any] = {"action": "extend", "nargs": "+", "default": []}
    parser.add_argument(
        "--served-model-name", **several, metavar="NAME", help="what requests may call the model (the folder's name)"
    )
    parser.add_argument("--lora", **several, type=named_adapter, metavar="NAME=PATH", help="adapters to load")
    add_replicas_flag(parser)
    add_ray_flags(parser)
    captures = parser.add_argument_group("activations (docs/research.md)")
    help = "points to keep, such as layers.14.resid_post; one safetensors file for each line, named by its id"
    captures.add_argument("--capture", action="extend", nargs="+", metavar="POINT", help=help)
    captures.add_argument("--capture-to", action=Once, metavar="FOLDER", help="where the files go")
    places = ("last", "prompt", "generated", "all")
    captures.add_argument("--capture-positions", choices=places, help="of these tokens (last)")
    captures.add_argument("--capture-mean", action="store_true", help="their mean alone")
    add_model_flags(parser)


def run(options: Namespace) -> int:
    model, source, output = _paths(options)
    arguments = llm_options(options)
    check_ray(options)
    names = tuple(options.served_model_name) or (Path(model).resolve().name,)
    config = checked(ServerConfig, {"model_names": names})
    check_adapters(options, config)
    try:
        from llama.batch.job import Job
    except ModuleNotFoundError as error:
        raise UsageError(f"batches need {error.name}: install llama-engine[server]") from None
    settings = {name: value for name, value in arguments.items() if name not in SPEED_ONLY}
    settings |= {"model": str(Path(model).resolve()), "loras": [[n, str(Path(p).resolve())] for n, p in options.lora]}
    if bool(options.capture) != bool(options.capture_to):
        raise UsageError("--capture and --capture-to need each other")
    for name in ("capture_positions", "capture_mean"):
        if getattr(options, name) and not options.capture:
            raise UsageError(f"{flag(name)} needs --capture")
    if options.capture and options.ray:
        raise UsageError("--capture is not there with --ray: run it on one machine")
    if options.capture and options.replicas > 1:
        raise UsageError("--capture needs --replicas 1")
    if options.capture:
        settings["capture"] = [options.capture, options.capture_positions or "last", options.capture_mean]
    captures = Path(options.capture_to) if options.capture_to else None
    with Job(Path(source), Path(output), settings, captures) as job:
        if job.counts.kept < job.num_lines:
            alone = _answer if options.replicas == 1 else _answer_by_replicas
            answer = _answer_on_ray if options.ray else alone
            answer(job, model, options, arguments, config)
        print(f"llama: {output}: {job.counts}", file=sys.stderr)
    return 0


def _paths(options: Namespace) -> list[str]:
    """Model, input and output, each from its flag or from what stands without one. Raises UsageError."""
    rest = list(options.paths)
    found: list[str] = [getattr(options, name) or (rest.pop(0) if rest else "") for name in _PATHS]
    missing = [name.upper() for name, path in zip(_PATHS, found, strict=True) if not path]
    if missing or rest:
        raise UsageError(f"missing: {', '.join(missing)}" if missing else f"{rest[0]!r} is one path too many")
    return found


def _answer(job: Any, model: str, options: Namespace, arguments: dict[str, Any], config: ServerConfig) -> None:
    # What follows imports torch.
    from llama.batch.answer import Answerer
    from llama.batch.opening import open_llm
    from llama.model.capture import Capture
    from llama.model.taps import resolve_points

    capture = None
    if options.capture:
        reduce: Any = "mean" if options.capture_mean else None
        positions = options.capture_positions or "last"
        capture = Capture(options.capture, positions, reduce=reduce, save_to=options.capture_to)

    keep_to_cores()

    async def answer_all() -> None:
        llm = open_llm(model, dict(options.lora), **arguments)
        try:
            if capture is not None:
                resolve_points(capture.points, llm.llm.model.config.num_hidden_layers)
            answerer = Answerer(llm, config, arguments.get("seed"), capture)
            await job.run(answerer, answerer.max_in_flight)
        finally:
            await llm.close()

    asyncio.run(answer_all())


def _answer_on_ray(job: Any, model: str, options: Namespace, arguments: dict[str, Any], config: ServerConfig) -> None:
    from llama.batch.on_ray import answer_on_ray
    from llama.ray_cluster import check_model, connect

    check_model(model, checked(EngineConfig, given(options, EngineConfig)))
    connect(options.ray_address)
    asyncio.run(answer_on_ray(job, model, config.model_names, dict(options.lora), arguments, options.replicas))


def _answer_by_replicas(
    job: Any, model: str, options: Namespace, arguments: dict[str, Any], config: ServerConfig
) -> None:
    from llama.batch.lines import MAX_LINE_BYTES
    from llama.batch.replicas import ReplicasAnswerer
    from llama.server.replicas import Replicas

    limits = {"max_waiting_requests": 1 << 40, "max_waiting_tokens": 1 << 60, "slow_reader_timeout": 1e9}
    most = 2 * MAX_LINE_BYTES
    patient = replace(config, max_body_bytes=most, max_bodies_bytes=1 << 60, body_timeout=1e9, send_timeout=1e9)
    config = replace(patient, access_log=False)
    loras = {name: str(Path(path).resolve()) for name, path in options.lora}
    arguments = {"max_loras": len(loras), **arguments}
    in_flight = 2 * options.replicas * checked(EngineConfig, given(options, EngineConfig)).max_num_seqs
    with Replicas.start(options.replicas, model, arguments, config, loras=loras, limits=limits) as replicas:

        async def answer_all() -> None:
            async with replicas.watched(config.step_deadline):
                await job.run(ReplicasAnswerer(replicas, arguments.get("seed")), in_flight)

        asyncio.run(answer_all())
