"""The service as a process."""

from __future__ import annotations

import socket

import uvicorn

from ift_peft.serve.app import create_app
from ift_peft.serve.service import Service
from ift_peft.serve.settings import Settings


class _Server(uvicorn.Server):
    """Ends the streams of pages before it waits for what is being answered: they go on as long as their jobs."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.streams.close()
        await super().shutdown(sockets)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, which ends what is being answered first. Raises what keeps it from starting."""
    service = Service(settings)
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=20,
    )
    _Server(config, service).run()
