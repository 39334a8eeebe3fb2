"""The service as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI

from ift_peft.serve.errors import install_handlers
from ift_peft.serve.pages import dashboard
from ift_peft.serve.routes import chat, files, jobs, models, operations
from ift_peft.serve.service import Service


def create_app(service: Service) -> FastAPI:
    """The application over `service`, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await anyio.to_thread.run_sync(service.start)
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(service.stop)

    app = FastAPI(title="ift_peft", summary="The OpenAI fine-tuning API on your own machine", lifespan=lifespan)
    app.state.service = service
    install_handlers(app)
    for routes in (files, jobs, models, chat):
        app.include_router(routes.router, prefix="/v1")
    app.include_router(operations.router)
    for pages in dashboard.ROUTERS:
        app.include_router(pages)
    return app
