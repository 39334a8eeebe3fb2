"""The service as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI

from ift_peft.serve.errors import install_handlers
from ift_peft.serve.operations.observed import Observed
from ift_peft.serve.pages import dashboard
from ift_peft.serve.routes import chat, files, jobs, models, operations
from ift_peft.serve.security.guard import Guard
from ift_peft.serve.security.headers import SecurityHeaders
from ift_peft.serve.service import Service


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

    app = FastAPI(
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
        app.include_router(routes.router, prefix="/v1")
    app.include_router(operations.router)
    for pages in dashboard.ROUTERS:
        app.include_router(pages)
    app.add_middleware(Guard, settings=service.settings, store=service.store)
    app.add_middleware(Observed, metrics=service.metrics)
    app.add_middleware(SecurityHeaders)  # the last is the outermost
    return app
