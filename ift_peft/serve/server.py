"""The service as a process."""

from __future__ import annotations

import uvicorn

from ift_peft.serve.app import create_app
from ift_peft.serve.service import Service
from ift_peft.serve.settings import Settings


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, which ends what is being answered first. Raises what keeps it from starting."""
    app = create_app(Service(settings))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,  # longer than clients keep idle connections (5 s), so that none is closed as it is used
        timeout_graceful_shutdown=20,
    )
    uvicorn.Server(config).run()
