"""API keys: `sk-ift-<id>.<43 characters>`, of which the store keeps the sha256 and nothing else."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import delete, exists, insert, or_, select, update

from ift_peft.errors import SettingsError
from ift_peft.serve.ids import random_name
from ift_peft.serve.store import Record, Store
from ift_peft.serve.store.tables import keys

Scope = Literal["inference", "read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("inference", "read", "write", "admin")
MOST_DAYS = 36_500
USED_EVERY = 60.0  # seconds between two records of a key's use
_FORM = re.compile(r"sk-ift-([A-Za-z0-9]{16})\.[A-Za-z0-9_-]{43}")
_NOBODY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Caller:
    """Who asks: the id of a key, or of a session made from it; None where no key is needed."""

    id: str | None
    scopes: frozenset[str]
    session: bool = False
    key: str | None = None
    """The id of the key, also of a session: all that come from one share its rate."""

    def may(self, accepted: Collection[str]) -> bool:
        """Whether one of the scopes `accepted` is among the caller's. `admin` is all of them."""
        return "admin" in self.scopes or not self.scopes.isdisjoint(accepted)


def create_key(
    store: Store,
    name: str,
    *,
    scopes: Sequence[str],
    days: float | None = None,
    expires_at: int | None = None,
    made_from: str | None = None,
) -> tuple[str, str]:
    """Id and text of a new key, valid for `days` or until `expires_at`. The text is told once: only its hash is kept.

    With `made_from`, the id of a key, it is the secret of a browser's session.
    """
    if days is not None and not 0 < days <= MOST_DAYS:  # nor NaN
        raise _no_time("days", days, MOST_DAYS)
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise SettingsError(
            expected=f"scopes out of {', '.join(SCOPES)}", found=", ".join(unknown) or "none", fix="name one or several"
        )
    now = int(time.time())
    key_id = random_name(16)
    text = f"sk-ift-{key_id}.{secrets.token_urlsafe(32)}"
    values = {
        "id": key_id,
        "name": name,
        "hash": _hash(text),
        "scopes": sorted(set(scopes)),
        "created_at": now,
        "expires_at": expires_at if days is None else now + round(days * 86_400),
        "session": made_from is not None,
        "made_from": made_from,
    }
    with store.begin() as connection:
        connection.execute(insert(keys).values(**values))
    return key_id, text


def check_key(store: Store, text: str, *, session: bool = False) -> Caller | None:
    """The caller who has this key, or session; None where it is not valid, or no more. Takes no longer to say no."""
    form = _FORM.fullmatch(text)
    key_id = form[1] if form else "-"
    parent = keys.alias("parent")
    living = or_(keys.c.made_from.is_(None), exists().where(parent.c.id == keys.c.made_from, *_valid(parent)))
    record = store.one(select(keys).where(keys.c.id == key_id, keys.c.session == session, *_valid(keys), living))
    same = hmac.compare_digest(_hash(text), _NOBODY if record is None else record["hash"])
    if record is None or not same:
        return None
    _note_use(store, record)
    return Caller(key_id, frozenset(record["scopes"]), session, record["made_from"] or key_id)


def is_valid(store: Store, caller: Caller) -> bool:
    """Whether one who was let in still would be; without a key, as long as there is none."""
    if caller.id is None:
        return not key_exists(store)
    ids = {caller.id, caller.key}  # a session, and the key that it was made from
    found = store.every(select(keys.c.id).where(keys.c.id.in_(ids), *_valid(keys)))
    return len(found) == len(ids)


def key_exists(store: Store) -> bool:
    """Whether a key was ever made. One that is revoked or expired still counts: its end opens nothing."""
    return store.one(select(keys.c.id).where(keys.c.session.is_(False)).limit(1)) is not None


def list_keys(store: Store) -> list[Record]:
    """Every key, the oldest first; no sessions."""
    return store.every(select(keys).where(keys.c.session.is_(False)).order_by(keys.c.number))


def revoke_key(store: Store, key_id: str) -> None:
    """End a key now, and the sessions made from it. Raises `SettingsError` where there is none."""
    _existing(store, key_id)
    with store.begin() as connection:
        connection.execute(
            update(keys).where(keys.c.id == key_id, keys.c.revoked_at.is_(None)).values(revoked_at=int(time.time()))
        )
        connection.execute(delete(keys).where(keys.c.made_from == key_id))


def rotate_key(store: Store, key_id: str, *, grace_hours: float) -> tuple[str, str]:
    """A new key in the place of one, which stays valid for `grace_hours`; the new one's id and text."""
    if not 0 <= grace_hours <= 24 * MOST_DAYS:
        raise _no_time("grace hours", grace_hours, 24 * MOST_DAYS)
    old = _existing(store, key_id)
    if old["revoked_at"] is not None or (old["expires_at"] or time.time() + 1) <= time.time():
        raise SettingsError(
            expected="a key that is valid", found=f"{key_id}, which has ended", fix="create one: ift keys create"
        )
    made = create_key(store, old["name"], scopes=old["scopes"], expires_at=old["expires_at"])
    end = int(time.time() + grace_hours * 3600)
    end = end if old["expires_at"] is None else min(end, old["expires_at"])
    with store.begin() as connection:
        connection.execute(update(keys).where(keys.c.id == key_id).values(expires_at=end))
    return made


def remove_ended_sessions(store: Store) -> None:
    """Forget sessions that have expired."""
    with store.begin() as connection:
        connection.execute(delete(keys).where(keys.c.session.is_(True), keys.c.expires_at <= int(time.time())))


def _valid(table: Any) -> Sequence[Any]:
    """The conditions of a key that has neither expired nor been revoked."""
    now = int(time.time())
    return table.c.revoked_at.is_(None), or_(table.c.expires_at.is_(None), table.c.expires_at > now)


def _note_use(store: Store, record: Record) -> None:
    now = time.time()
    if now - (record["used_at"] or 0) > USED_EVERY:
        with store.begin() as connection:
            connection.execute(update(keys).where(keys.c.id == record["id"]).values(used_at=now))


def _no_time(what: str, given: float, most: int) -> SettingsError:
    return SettingsError(expected=f"{what} of at most {most:,}", found=f"{given:g}", fix="give fewer, or leave it out")


def _existing(store: Store, key_id: str) -> Record:
    found = store.one(select(keys).where(keys.c.id == key_id, keys.c.session.is_(False)))
    if found is None:
        raise SettingsError(expected="the id of a key", found=repr(key_id), fix="list them: ift keys list")
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()
