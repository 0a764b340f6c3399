"""The playground: one static page that talks to /v1. Its policy lets its own script and style run and nothing else."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

_PAGE = Path(__file__).with_name("static") / "index.html"


def routes() -> APIRouter:
    router = APIRouter()
    page = _PAGE.read_bytes()
    headers = {
        "content-security-policy": _policy(page.decode()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @router.head("/", include_in_schema=False, response_model=None)
    @router.get("/", include_in_schema=False, response_model=None)
    async def playground() -> Response:
        return Response(page, headers=headers, media_type="text/html")

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
