"""A batch on a Ray cluster: one engine in each actor, anywhere in the cluster. The job, its files and its record of
what is done stay with the caller: it is resumed as a job of one process is, and no other machine needs the files. The
model and adapters must lie at the same paths on all.

Lines go to the actors one by one, not in Ray Data's blocks: each is written as soon as it is known, and when a machine
is lost its lines go to the engines that are left, whether or not there is room for another.
"""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from llama.api.errors import EngineDeadError
from llama.batch.engines import EngineLostError, Engines
from llama.batch.job import Job
from llama.batch.lines import Line
from llama.engine.config import EngineConfig
from llama.ray_cluster import absolute, absolute_paths, resources

logger = logging.getLogger(__name__)


async def answer_on_ray(
    job: Job,
    model: str,
    names: tuple[str, ...],
    loras: Mapping[str, str],
    arguments: Mapping[str, Any],
    replicas: int,
) -> None:
    """Have every pending line answered by `replicas` engines with these arguments of LLM, on the cluster that Ray is
    connected with. `names`: what requests may call the model."""
    import ray

    room = 2 * EngineConfig(max_num_seqs=arguments.get("max_num_seqs") or EngineConfig().max_num_seqs).max_num_seqs
    options = {"max_restarts": 0, "max_concurrency": room + 8, **resources(arguments, replicas)}
    actors = ray.remote(**options)(_Actor)
    folders = {name: absolute(path) for name, path in loras.items()}
    told = (absolute(model), names, folders, absolute_paths(arguments))
    async with Engines(lambda: _RayEngine(actors.remote(), told), replicas, room) as engines:
        await job.run(engines, engines.max_in_flight)


class _Actor:
    """An engine, in the actor's process."""

    async def load(self, model: str, names: tuple[str, ...], loras: dict[str, str], arguments: dict[str, Any]) -> None:
        from llama.batch.answer import Answerer
        from llama.batch.opening import open_llm
        from llama.server.config import ServerConfig

        llm = open_llm(model, loras, **arguments)
        self._answerer = Answerer(llm, ServerConfig(model_names=names), arguments.get("seed"))

    async def answer(self, line: Line) -> str:
        try:
            return json.dumps(await self._answerer(line), ensure_ascii=False)
        except EngineDeadError:
            logger.critical("the engine is dead: its process ends", exc_info=True)
            os._exit(os.EX_SOFTWARE)


class _RayEngine:
    """The same, in the caller's process."""

    def __init__(self, actor: Any, told: tuple[Any, ...]) -> None:
        self._actor = actor
        self._told = told

    async def load(self) -> None:
        await _result(self._actor.load.remote(*self._told))

    async def answer(self, line: Line) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(await _result(self._actor.answer.remote(line)))
        return answer

    def end(self) -> None:
        import ray

        ray.kill(self._actor)


async def _result(reference: Any) -> Any:
    from ray import exceptions

    try:
        return await reference
    except exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except exceptions.RayError as error:  # all others tell that the process, its machine or what it said is gone
        raise EngineLostError(" ".join(str(error).split())[:300]) from None
