"""Routes beside the dialects: health, readiness, version, metrics, and the playground, one static page that talks to
/v1. The page's policy lets its own script and style run and nothing else."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

import llama
from llama.server.bodies import json_response
from llama.server.metrics import CONTENT_TYPE
from llama.server.service import Service

_PAGE = Path(__file__).with_name("static") / "index.html"


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    page = _PAGE.read_bytes()
    headers = {
        "content-security-policy": _policy(page.decode()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @router.get("/", include_in_schema=False, response_model=None)
    async def playground() -> Response:
        return Response(page, headers=headers, media_type="text/html")

    @router.get("/health", response_model=None)
    async def health() -> Response:
        """The process is alive and its engine not dead."""
        is_dead = service.llm.is_dead
        return json_response({"status": "dead" if is_dead else "ok"}, 503 if is_dead else 200)

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


def _policy(page: str) -> str:
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(page, 'script')}",
            f"style-src {_hash(page, 'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _hash(page: str, tag: str) -> str:
    """The page has one element of each tag, and its exact content is what may run."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
