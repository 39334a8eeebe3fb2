"""ift jobs: the fine-tuning jobs of a service, over HTTP."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

import typer

from ift_peft.cli.app import app, errors_to_exit_codes
from ift_peft.errors import RunError

TIMEOUT_SECONDS = 60
COLUMNS = ("id", "status", "created", "finishes", "model")


class Action(StrEnum):
    list = "list"
    show = "show"
    events = "events"
    cancel = "cancel"
    pause = "pause"
    resume = "resume"


@app.command()
@errors_to_exit_codes
def jobs(
    action: Annotated[Action, typer.Argument(help="What to do.")] = Action.list,
    job: Annotated[str | None, typer.Argument(help="The id of a job, ftjob-…; of all but list.")] = None,
    url: Annotated[str, typer.Option(help="Where the service listens.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None,
        typer.Option(help="Its key; without it $OPENAI_API_KEY.", envvar="OPENAI_API_KEY", show_envvar=False),
    ] = None,
    limit: Annotated[int, typer.Option(help="Show this many jobs or events, the newest.", min=1, max=100)] = 20,
) -> None:
    """List, show, cancel, pause or resume the fine-tuning jobs of a running `ift serve`.

    Example: ift jobs events ftjob-… --url http://127.0.0.1:8000
    """
    from ift_peft.console import out

    if (job is None) != (action is Action.list):
        found = "no job" if job is None else f"the job {job}"
        raise RunError(
            expected=f"ift jobs {action}{'' if action is Action.list else ' ftjob-…'}",
            found=found,
            fix="see the ids with: ift jobs list",
        )
    path = "/v1/fine_tuning/jobs" + ("" if job is None else f"/{quote(job, safe='')}")
    if action is Action.list:
        _print_jobs(_ask(f"{url}{path}?{urlencode({'limit': limit})}", api_key)["data"])
    elif action is Action.events:
        found_events = _ask(f"{url}{path}/events?{urlencode({'limit': limit})}", api_key)["data"]
        for event in reversed(found_events):
            out.print(f"{_time(event['created_at'])}  {event['level']:<5}  {event['message']}", markup=False)
    else:
        posted = action in (Action.cancel, Action.pause, Action.resume)
        answer = _ask(f"{url}{path}/{action}" if posted else f"{url}{path}", api_key, posted=posted)
        if posted:
            out.print(f"{answer['id']} is {answer['status']}", markup=False)
        else:
            _print_job(answer)


def _print_jobs(found: list[dict[str, Any]]) -> None:
    """A line for each job, however wide: names are there to be copied."""
    from ift_peft.console import out

    lines = [COLUMNS]
    for job in found:
        times = (_time(job["created_at"]), _time(job["finished_at"] or job["estimated_finish"]))
        lines.append((job["id"], job["status"], *times, job["fine_tuned_model"] or job["model"]))
    widths = [max(len(line[at]) for line in lines) for at in range(len(COLUMNS))]
    for line in lines:
        out.print("  ".join(map(str.ljust, line, widths)).rstrip(), markup=False)


def _print_job(job: dict[str, Any]) -> None:
    """Every field that is set, one a line."""
    from ift_peft.console import out

    for name, value in job.items():
        if value in (None, [], {}) or name in ("object", "method"):
            continue
        shown = _time(value) if name in ("created_at", "finished_at", "estimated_finish") else value
        if isinstance(shown, dict):
            shown = ", ".join(f"{key}={part}" for key, part in shown.items() if part is not None)
        elif isinstance(shown, list):
            shown = ", ".join(map(str, shown))
        out.print(f"{name:<17}  {shown}", markup=False)


def _time(seconds: int | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _ask(address: str, api_key: str | None, *, posted: bool = False) -> dict[str, Any]:
    """The JSON of the service's answer. Raises `RunError` where it is an error, or where none comes."""
    if not address.startswith(("http://", "https://")):
        raise RunError(expected="--url with http:// or https://", found=address, fix="--url http://127.0.0.1:8000")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = Request(address, method="POST" if posted else "GET", headers=headers)  # noqa: S310 - checked above
    try:
        with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            return dict(json.load(answer))
    except HTTPError as error:
        raise RunError(expected="an answer of the service", found=_message(error), fix="see: ift jobs --help") from None
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RunError(
            expected=f"a service at {address.partition('/v1/')[0]}",
            found=str(reason),
            fix="start one with ift serve, or name it with --url",
        ) from None


def _message(error: HTTPError) -> str:
    try:
        return f"{error.code}: {json.load(error)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
