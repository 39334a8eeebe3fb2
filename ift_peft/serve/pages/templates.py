"""The templates of the dashboard, over the macros and colours of the report, and the files that pages load."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ift_peft.report.examples import Text, cut

HERE = Path(__file__).parent
REPORT = HERE.parent.parent / "report"
ASSETS = {  # what a page may load: its media type, and the files that it is made of
    "pages.css": ("text/css", (REPORT / "report.css", HERE / "pages.css")),
    "pages.js": ("text/javascript", (HERE / "pages.js",)),
    "mark.svg": ("image/svg+xml", (HERE / "mark.svg",)),
}


@cache
def asset(name: str) -> tuple[bytes, str, str]:
    """Content, media type and a hash of what pages load."""
    media_type, paths = ASSETS[name]
    content = b"".join(path.read_bytes() for path in paths)
    return content, media_type, hashlib.sha256(content).hexdigest()[:16]


def when(seconds: float | None) -> Markup:
    """A time as people read it, in UTC; empty without one."""
    if seconds is None:
        return Markup("")
    moment = datetime.fromtimestamp(seconds, UTC)
    shown = f"{moment.day} {moment:%b %Y, %H:%M}"
    return Markup('<time datetime="{}">{}</time>').format(f"{moment:%Y-%m-%dT%H:%M:%SZ}", shown)


def lasting(seconds: float) -> str:
    """A span of time in its two largest units."""
    whole = max(0, round(seconds))
    for size, name, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {name}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"


def in_bytes(size: int) -> str:
    """A size in the largest unit that leaves it above one."""
    shown, unit = float(size), "bytes"
    for unit in ("bytes", "kB", "MB", "GB"):
        if shown < 1000 or unit == "GB":
            break
        shown /= 1000
    return f"{shown:,.0f} {unit}" if unit == "bytes" or shown >= 100 else f"{shown:.1f} {unit}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader([HERE, REPORT]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "when": when,
        "lasting": lasting,
        "in_bytes": in_bytes,
        "segment": lambda text: quote(str(text), safe=""),
    }
    environment.globals |= {"as_text": Text, "cut": cut, "asset": lambda name: f"/static/{name}?v={asset(name)[2]}"}
    return environment


def template(name: str) -> Template:
    return _environment().get_template(name)


def macro(file: str, name: str, *arguments: Any) -> str:
    """What one macro of a file of macros makes of `arguments`."""
    return str(getattr(template(file).module, name)(*arguments))
