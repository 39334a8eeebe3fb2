"""The log: one JSON object a line on stderr. Never a body, a query or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from types import TracebackType

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
# Libraries whose messages quote what they were given, or say nothing of use.
_QUIET = ("python_multipart", "uvicorn.access", "httpx", "httpcore", "asyncio")


class JsonLines(logging.Formatter):
    """Time, level, event, and what `extra` adds.

    Of an error its kind and the places it came through: its text may quote what the service was given.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _STANDARD and value is not None},
        }
        if record.exc_info and record.exc_info[0] is not None:
            kind, error, trace = record.exc_info
            line["error"] = kind.__name__
            line["trace"] = _places(trace)
            if isinstance(error, OSError) and error.strerror:
                line["reason"] = error.strerror
        return json.dumps(line, ensure_ascii=False, default=str)


def _places(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)
    return "Traceback: " + " > ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames)


def configure_logs() -> None:
    """Write all logs of this process as JSON lines: those of the service from `info` on, those of others warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("ift_peft").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.captureWarnings(True)
