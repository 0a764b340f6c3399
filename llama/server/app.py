"""The ASGI application: both dialects and the operations routes over one Service, behind RequestMiddleware."""

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

import llama
from llama.server import pages
from llama.server.bodies import json_response
from llama.server.cloudflare.routes import routes as cloudflare_routes
from llama.server.errors import ApiError, dialect_of, internal, no_method, no_route
from llama.server.middleware import RequestMiddleware
from llama.server.openai import tokens
from llama.server.openai.routes import routes as openai_routes
from llama.server.openapi import describe
from llama.server.service import Service


def create_app(service: Service) -> ASGIApp:
    # The interactive pages of FastAPI load scripts from elsewhere.
    app = FastAPI(
        title="llama-engine", version=llama.__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    for routes in (cloudflare_routes, openai_routes, tokens.routes, pages.routes):
        app.include_router(routes(service))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        dialect = dialect_of(request.url.path)
        service.refused(error, dialect, request.state.record)
        return json_response(error.body(dialect), error.status_in(dialect), error.headers)

    async def unrouted(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        is_method = error.status_code == 405
        path = request.url.path
        return await refused(
            request, no_method(request.method, dict(error.headers or {})) if is_method else no_route(path)
        )

    async def failed(request: Request, error: Exception) -> Response:
        return await refused(request, internal(request.state.record.request_id))

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, unrouted)
    app.add_exception_handler(Exception, failed)
    describe(app, needs_key=bool(service.config.api_keys))
    guarded = RequestMiddleware(app, service)
    if not service.config.allow_origin:
        return guarded
    # Outside, so that a browser may ask without a key whether it may ask.
    origins, told = list(service.config.allow_origin), ["x-request-id", "retry-after"]
    return CORSMiddleware(guarded, origins, ["*"], ["*"], expose_headers=told)
