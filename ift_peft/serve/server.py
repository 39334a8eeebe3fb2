"""The service as a process."""

from __future__ import annotations

import logging
import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ift_peft.errors import SettingsError
from ift_peft.serve.app import create_app
from ift_peft.serve.operations.logs import configure_logs
from ift_peft.serve.security.guard import require_key
from ift_peft.serve.security.heads import timed_heads
from ift_peft.serve.service import Service
from ift_peft.serve.settings import Settings
from ift_peft.serve.store.check import opening

log = logging.getLogger("ift_peft.serve")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it when what is being answered is; the second at once, as if it had lost power."""
        if self.should_exit:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Streams of pages go on as long as their jobs: they are ended before other answers are waited for."""
        self._service.streams.close()
        await super().shutdown(sockets)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, which ends what is being answered first. Raises what keeps it from starting."""
    os.umask(0o077)  # what is made from here on, databases too, is the owner's alone
    with opening(settings.database_url):
        service = Service(settings)
    try:
        with opening(settings.database_url):
            require_key(settings, service.store)
        listening = _listen(settings)
    except BaseException:
        service.release()
        raise
    configure_logs()
    app = create_app(service)
    logging.getLogger("uvicorn.error").addFilter(lambda _: app.state.failure is None)  # which is raised below
    host, port = listening.getsockname()[:2]
    log.info("serving", extra={"host": host, "port": port, "data_dir": str(settings.data_dir)})
    try:
        _Server(configured(app, settings), service).run(sockets=[listening])
    except SystemExit:  # uvicorn's word for a start that failed
        if app.state.failure is not None:
            with opening(settings.database_url):
                raise app.state.failure from None
        raise


def configured(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=timed_heads(settings.limits.body_seconds),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # who asks is who is connected; a proxy's word for it is not taken
        ws="none",
        timeout_keep_alive=75,  # longer than clients keep idle connections (5 s), so that none is closed as it is used
        timeout_graceful_shutdown=20,
    )


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(
            expected=f"to listen at {settings.host}, port {settings.port}",
            found=error.strerror or str(error),
            fix="stop what listens there, or give another --host or --port",
        ) from None
