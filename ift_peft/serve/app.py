"""The service as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from fastapi import FastAPI

from ift_peft.serve.errors import install_handlers
from ift_peft.serve.objects import ErrorBody
from ift_peft.serve.operations.observed import Observed
from ift_peft.serve.pages import dashboard
from ift_peft.serve.pages.page import error_page
from ift_peft.serve.routes import chat, files, jobs, models, operations
from ift_peft.serve.security.guard import Guard
from ift_peft.serve.security.headers import SecurityHeaders
from ift_peft.serve.service import Service

FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "A request that cannot be done as it is",
        401: "No key, or none that is known",
        403: "A key without the scope, another origin, or an object that stays",
        404: "No such object",
        408: "A request that did not come in time",
        413: "A body or a file that is too large",
        421: "A host name that is not this service's",
        429: "Too many requests, or no room now; Retry-After says when to come back",
        500: "An error of the service",
        503: "The service cannot do it at the moment; Retry-After says when to come back",
        507: "No room on the service's disk",
    }.items()
}
"""What any route under /v1 may answer with, in the one form of errors."""


def create_app(service: Service) -> FastAPI:
    """The application over `service`, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await anyio.to_thread.run_sync(service.start)
        except BaseException as error:
            app.state.failure = error  # uvicorn only says that there was one
            raise
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(service.stop)

    app = _Application(
        title="ift_peft",
        summary="The OpenAI fine-tuning API on your own machine",
        lifespan=lifespan,
        docs_url=None,  # its pages fetch their scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.state.failure = None
    install_handlers(app)
    for routes in (files, jobs, models, chat):
        app.include_router(routes.router, prefix="/v1", responses=FAULTS)
    app.include_router(operations.router)
    for pages in dashboard.ROUTERS:
        app.include_router(pages)
    app.add_middleware(Guard, settings=service.settings, store=service.store, error_page=error_page)
    app.add_middleware(Observed, metrics=service.metrics)
    app.add_middleware(SecurityHeaders)  # the last is the outermost
    return app


class _Application(FastAPI):
    """Describes itself without FastAPI's form of what is wrong with a request, which has ours."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            for path in super().openapi()["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        assert self.openapi_schema is not None
        return self.openapi_schema
