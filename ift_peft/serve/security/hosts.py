"""By which names the service may be called: a page elsewhere must not reach it through a name that it makes point here.

DNS rebinding: a web page's own name is pointed at 127.0.0.1, and the browser takes what is there for the page's own
server. It sends that name as Host, by which it is told.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from ift_peft.errors import SettingsError
from ift_peft.serve.settings import Settings

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{0,5}))?")
WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 they are recognised, not bound


def allowed_names(settings: Settings) -> frozenset[str]:
    """The names beside those of loopback."""
    own = () if settings.host in WILDCARDS else (settings.host,)
    return frozenset(name.lower().strip("[]") for name in (*own, *settings.allowed_hosts))


def check_name(name: str) -> SettingsError | None:
    """What is wrong with a name by which clients shall be allowed to call, if anything."""
    if split_host(name)[0] and not split_host(name)[1] and not name.endswith(":"):
        return None
    bare = re.sub(r"^\w+://|[/:].*$", "", name)
    return SettingsError(
        expected="--allowed-host NAME, as models.example: no scheme, port or path",
        found=repr(name),
        fix=f"--allowed-host {bare}" if split_host(bare)[0] else "give the name that clients have in their URL",
    )


def is_loopback(name: str) -> bool:
    """Whether a name or address can only mean this machine."""
    if name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def split_host(host: str) -> tuple[str, str]:
    """Name, in lower case, and port of a header Host; the port may be empty. Both are where it is no such header.

    An address in brackets loses them.
    """
    found = _HOST.fullmatch(host)
    return ("", "") if found is None else ((found[1] or found[2] or "").lower(), found[3] or "")


def is_allowed(host: str, names: Collection[str]) -> bool:
    """Whether the header Host is loopback or one of `names`."""
    name, _ = split_host(host)
    return is_loopback(name) or name in names


def same_origin(origin: str, host: str) -> bool:
    """Whether the header Origin, or Referer, is of the host that the request was sent to."""
    scheme, separator, place = origin.partition("://")
    if not separator or scheme not in ("http", "https"):
        return False
    standard = "443" if scheme == "https" else "80"
    (name, port), (own, own_port) = split_host(re.split(r"[/?#]", place, maxsplit=1)[0]), split_host(host)
    return name == own != "" and (port or standard) == (own_port or standard)
