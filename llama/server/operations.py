"""Routes for those who run the server: health, readiness, version, metrics."""

from fastapi import APIRouter
from starlette.responses import Response

import llama
from llama.server.bodies import json_response
from llama.server.metrics import CONTENT_TYPE
from llama.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.head("/health", response_model=None, include_in_schema=False)
    @router.get("/health", response_model=None)
    async def health() -> Response:
        """The process turns."""
        return json_response({"status": "ok"})

    @router.head("/ready", response_model=None, include_in_schema=False)
    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        """The engine steps and takes requests."""
        if service.is_ready:
            return json_response({"status": "ready"})
        llm = service.llm
        status = "dead" if llm.is_dead else "draining" if llm.is_draining else "stalled"
        return json_response({"status": status}, 503)

    @router.get("/version", response_model=None)
    async def version() -> Response:
        return json_response({"version": llama.__version__})

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(service.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    return router
