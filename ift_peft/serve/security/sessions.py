"""Sessions of the dashboard: a browser holds a secret of its own instead of the key it was made from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from sqlalchemy import delete, select

from ift_peft.serve.security.keys import Caller, check_key, create_key
from ift_peft.serve.store import Store
from ift_peft.serve.store.tables import keys

COOKIE = "ift_session"
SECONDS = 12 * 3600
MOST = 20  # of one key


@dataclass(frozen=True)
class Session:
    """What a browser is given: the cookie's value, and the Unix second at which it ends."""

    secret: str
    expires_at: int

    @property
    def cookie(self) -> str:
        """The header `Set-Cookie`. Behind TLS the proxy adds `Secure`: without TLS no browser would send it."""
        return f"{COOKIE}={self.secret}; HttpOnly; SameSite=Strict; Path=/; Max-Age={SECONDS}"


NO_COOKIE = f"{COOKIE}=; HttpOnly; SameSite=Strict; Path=/; Max-Age=0"
"""The header `Set-Cookie` of a browser that is signed out."""


def sign_in(store: Store, key: str) -> Session | None:
    """A session with the scopes of `key`, which ends with it; None where that is not valid. More than `MOST` end the
    oldest."""
    caller = check_key(store, key.strip())
    if caller is None or caller.id is None:
        return None
    expires_at = int(time.time()) + SECONDS
    _, secret = create_key(store, "session", scopes=sorted(caller.scopes), expires_at=expires_at, made_from=caller.id)
    newest = select(keys.c.number).where(keys.c.made_from == caller.id).order_by(keys.c.number.desc()).limit(MOST)
    with store.begin() as connection:
        kept = connection.execute(newest).scalars().all()
        connection.execute(delete(keys).where(keys.c.made_from == caller.id, keys.c.number < min(kept)))
    return Session(secret, expires_at)


def sign_out(store: Store, secret: str) -> None:
    """End a session; of one that is none, nothing."""
    caller = check_session(store, secret)
    if caller is not None:
        with store.begin() as connection:
            connection.execute(delete(keys).where(keys.c.id == caller.id, keys.c.session.is_(True)))


def check_session(store: Store, secret: str) -> Caller | None:
    """Who the session is of; None where it is not valid, or no more."""
    return check_key(store, secret, session=True)


def secret_of(cookies: str) -> str | None:
    """The session's secret in a header `Cookie`, if any."""
    try:
        found = SimpleCookie(cookies).get(COOKIE)
    except CookieError:
        return None
    return None if found is None else found.value
