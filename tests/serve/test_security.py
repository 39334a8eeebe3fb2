"""Who is let in: keys, scopes, names, origins, rates and sizes, each asked through a real socket."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import pytest
from sqlalchemy import update
from starlette.exceptions import HTTPException
from typer.testing import CliRunner

from ift_peft.cli.app import app
from ift_peft.errors import SettingsError
from ift_peft.serve.operations.logs import JsonLines
from ift_peft.serve.security.bodies import limited
from ift_peft.serve.security.hosts import check_name, is_loopback, same_origin
from ift_peft.serve.security.keys import check_key, create_key, list_keys, revoke_key, rotate_key
from ift_peft.serve.security.rates import Rates
from ift_peft.serve.security.scopes import RULES, scopes_for
from ift_peft.serve.security.sessions import COOKIE, MOST, check_session, sign_in, sign_out
from ift_peft.serve.settings import Limits
from ift_peft.serve.store.tables import keys
from tests.serve.inside import Inside, serving, wait_for

pytestmark = pytest.mark.slow

LIMITS = Limits(body_bytes=5_000, body_seconds=0.5, requests_per_minute=100_000)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """With a key, so that every route needs one."""
    folder = tmp_path_factory.mktemp("security")
    with serving(folder / "data", limits=LIMITS, allowed_hosts=("Models.Example",)) as running:
        create_key(running.service.store, "first", scopes=["admin"])
        yield running


@pytest.fixture(scope="module")
def http(service: Inside) -> Iterator[httpx.Client]:
    with service.http() as client:
        yield client


def bearer(service: Inside, *scopes: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {create_key(service.service.store, 'test', scopes=scopes)[1]}"}


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_every_route_but_healthz_needs_a_key(service: Inside, http: httpx.Client) -> None:
    assert http.get("/healthz").status_code == 200
    described = service.service_routes()
    asked = {path for _, path in described}
    assert {"/v1/files", "/v1/files/{file_id}/content", "/metrics"} <= asked
    for method, path in described:
        if path not in ("/healthz", "/login", "/logout", "/static/{name}"):
            answer = http.request(method, path.replace("{", "").replace("}", ""))
            assert code_of(answer) == (401, "invalid_api_key"), (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
    assert http.get("/openapi.json").status_code == 401
    for text in ("", "Bearer", "Bearer none", "Basic abc", "Bearer sk-ift-" + "a" * 16 + "." + "b" * 43):
        assert http.get("/v1/files", headers={"Authorization": text}).status_code == 401
    with pytest.raises(openai.AuthenticationError) as caught:
        service.client("sk-wrong").files.list()
    assert caught.value.code == "invalid_api_key"


def test_a_key_does_what_its_scopes_say(service: Inside, http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ift_peft.serve.requests")
    read, write, admin = (bearer(service, scope) for scope in ("read", "write", "admin"))
    assert http.get("/v1/files", headers=read).status_code == 200
    assert code_of(http.get("/v1/files", headers=write)) == (403, "insufficient_scope")
    assert code_of(http.delete("/v1/files/file-x", headers=read)) == (403, "insufficient_scope")
    assert http.delete("/v1/files/file-x", headers=write).status_code == 404
    assert code_of(http.get("/metrics", headers=read)) == (403, "insufficient_scope")
    read_id = read["Authorization"][14:30]
    wait_for(lambda: (403, read_id) in [(vars(one).get("status"), vars(one).get("key")) for one in caplog.records])
    for path in ("/metrics", "/v1/files", "/openapi.json"):
        assert http.get(path, headers=admin).status_code == 200
    assert code_of(http.post("/v1/completions", headers=read, json={})) == (403, "insufficient_scope")
    assert http.put("/v1/files", headers=read).status_code == 403, "what no rule is about is for admin"


def test_the_table_of_scopes_knows_every_route(service: Inside) -> None:
    """A route that is forgotten in it would be for admin alone, and so would not be let in wrongly; it is noticed."""
    for method, path in service.service_routes():
        if path != "/metrics":
            assert any(method in rule.methods and rule.path.fullmatch(path) for rule in RULES), (method, path)
    assert scopes_for("GET", "/v1/files/../../metrics") == ("read",), "routes see the same path, which is no file"
    assert scopes_for("GET", "/v1/filesystem") == ("admin",)
    assert scopes_for("POST", "/healthz") == ("admin",)


def test_a_key_ends_when_it_is_revoked_expires_or_is_rotated(service: Inside) -> None:
    store = service.service.store
    revoked, expired, old = (create_key(store, name, scopes=["read"]) for name in ("one", "two", "three"))
    assert all(check_key(store, text) for _, text in (revoked, expired, old))
    revoke_key(store, revoked[0])
    with store.begin() as connection:
        connection.execute(update(keys).where(keys.c.id == expired[0]).values(expires_at=int(time.time())))
    assert check_key(store, revoked[1]) is None
    assert check_key(store, expired[1]) is None
    new = rotate_key(store, old[0], grace_hours=1)
    assert check_key(store, old[1]) and check_key(store, new[1])
    assert check_key(store, new[1]).scopes == frozenset({"read"})  # type: ignore[union-attr]
    at_once = rotate_key(store, new[0], grace_hours=0)
    assert check_key(store, new[1]) is None
    assert check_key(store, at_once[1])
    swapped = f"sk-ift-{old[0]}.{at_once[1].partition('.')[2]}"
    assert check_key(store, swapped) is None, "the secret of one key with the id of another"


def test_neither_keys_nor_their_secrets_are_stored(service: Inside) -> None:
    _, text = create_key(service.service.store, "kept", scopes=["read"])
    secret = text.partition(".")[2].encode()
    assert len(secret) == 43
    assert not [path for path in service.data_dir.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert all(secret.decode() not in str(dict(key)) for key in list_keys(service.service.store))


def test_no_key_is_needed_on_the_same_machine_until_one_is_made(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as running, running.http() as http:
        assert http.get("/metrics").status_code == 200
        for name in ("X-Forwarded-For", "Forwarded", "Via"):
            answer = http.get("/metrics", headers={name: "203.0.113.5"})
            assert code_of(answer) == (401, "invalid_api_key"), "behind a proxy everyone seems to be here"
        key_id, text = create_key(running.service.store, "first", scopes=["admin"])
        assert http.get("/metrics").status_code == 401
        assert http.get("/metrics", headers={"Authorization": f"Bearer {text}"}).status_code == 200
        revoke_key(running.service.store, key_id)
        assert http.get("/metrics").status_code == 401, "the end of the last key opens nothing"


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True),
        ("localhost:8000", True),
        ("[::1]:8000", True),
        ("models.example", True),
        ("MODELS.EXAMPLE:8000", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8000", False),
        ("", False),
        ("127.0.0.1:<b>", False),
        ("127.0.0.1:123456", False),
        ("127.0.0.1:80:80", False),
        ("[127.0.0.1]@evil.example", False),
        ("[::1]evil.example", False),
        ("[::1", False),
        ("a@127.0.0.1", False),
    ],
)
def test_a_name_that_is_not_ours_is_refused(service: Inside, http: httpx.Client, host: str, allowed: bool) -> None:
    answer = http.get("/v1/files", headers={"Host": host, **bearer(service, "read")})
    if allowed:
        assert answer.status_code == 200
    else:
        assert code_of(answer) == (421, "host_not_allowed")


@pytest.mark.parametrize("name", ["https://models.example", "models.example:8000", "models.example/", "a b", "", "x:"])
def test_a_name_that_no_header_host_could_have_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["serve", "--data-dir", str(tmp_path / "data"), "--allowed-host", name])
    assert told.exit_code == SettingsError.exit_code
    assert "no scheme, port or path" in " ".join(told.output.split())
    assert not (tmp_path / "data").exists()
    assert check_name("models.example") is None and check_name("[::1]") is None
    fault = check_name("https://models.example:80/v1")
    assert fault is not None and fault.fix == "--allowed-host models.example"


def test_pages_of_other_origins_change_nothing(service: Inside, http: httpx.Client) -> None:
    write = bearer(service, "write")
    for origin in (
        "http://evil.example",
        "null",
        "file://",
        f"http://127.0.0.1:{service.port + 1}",
        "https://127.0.0.1",
    ):
        answer = http.delete("/v1/files/file-x", headers={"Origin": origin, **write})
        assert code_of(answer) == (403, "origin_not_allowed"), origin
    assert http.delete("/v1/files/file-x", headers={"Origin": service.url, **write}).status_code == 404
    assert same_origin("https://models.example", "models.example")
    assert same_origin("https://models.example", "models.example:443")
    assert not same_origin("http://models.example", "models.example:443")
    assert not same_origin("http://models.example@evil.example/", "models.example")
    assert not same_origin("http://", "") and not same_origin("http://[", "[")
    assert is_loopback("::ffff:127.0.0.1") and not is_loopback("::ffff:8.8.8.8")


def test_what_browsers_say_of_where_a_form_is_from_decides_without_a_session_too(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as running, running.http() as http:
        own = f"{running.url}/start?x=1"
        for referer, status in (("http://[", 403), ("http://evil.example/", 403), ("", 403), (own, 303)):
            assert http.post("/logout", headers={"Referer": referer}).status_code == status, referer
        assert http.post("/logout").status_code == 303, "a program may say nothing"
        cookie = {"Cookie": f"{COOKIE}=x"}
        assert http.post("/logout", headers=cookie).status_code == 403, "but no browser that has a session"
        assert http.post("/logout", headers={**cookie, "Origin": running.url}).status_code == 303
        session = sign_in(running.service.store, create_key(running.service.store, "one", scopes=["write"])[1])
        assert session is not None
        signed_in = {"Cookie": f"{COOKIE}={session.secret}"}
        for referer, status in (("http://[", 403), (own, 404)):
            answer = http.delete("/v1/files/file-x", headers={**signed_in, "Referer": referer})
            assert answer.status_code == status, referer
        elsewhere = {"Referer": "http://evil.example/", **bearer(running, "write")}
        assert http.delete("/v1/files/file-x", headers=elsewhere).status_code == 404, "a key comes from no browser"


def test_a_session_is_a_browsers_and_ends_with_its_key(service: Inside, http: httpx.Client) -> None:
    store = service.service.store
    key_id, text = create_key(store, "person", scopes=["read", "write"])
    session = sign_in(store, text)
    assert session is not None and sign_in(store, "sk-ift-wrong") is None
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(session.cookie.split("; "))
    cookie = {"Cookie": f"{COOKIE}={session.secret}"}
    assert http.get("/v1/files", headers=cookie).status_code == 200
    assert code_of(http.get("/metrics", headers=cookie)) == (403, "insufficient_scope")
    assert http.get("/v1/files", headers={"Authorization": f"Bearer {session.secret}"}).status_code == 401
    assert http.get("/v1/files", headers={"Cookie": f"{COOKIE}={text}"}).status_code == 401, "a key is no session"
    assert sign_in(store, session.secret) is None
    path = "/v1/files/file-x"
    assert code_of(http.delete(path, headers=cookie)) == (403, "origin_not_allowed")
    assert http.delete(path, headers={**cookie, "Origin": service.url}).status_code == 404
    assert http.delete(path, headers={**cookie, "Sec-Fetch-Site": "same-origin"}).status_code == 404
    assert http.delete(path, headers={**cookie, "Referer": f"{service.url}/files"}).status_code == 404
    other = sign_in(store, text)
    assert other is not None
    sign_out(store, session.secret)
    assert http.get("/v1/files", headers=cookie).status_code == 401
    cookie = {"Cookie": f"{COOKIE}={other.secret}"}
    assert http.get("/v1/files", headers=cookie).status_code == 200
    revoke_key(store, key_id)
    assert http.get("/v1/files", headers=cookie).status_code == 401
    answer = http.get("/", headers={"Accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login"), "a person is shown where to sign in"


def test_requests_have_a_rate(tmp_path: Path) -> None:
    now = 0.0
    rates = Rates(60, clock=lambda: now)
    assert [rates.wait("a") for _ in range(60)] == [0.0] * 60
    assert rates.wait("a") == 1.0
    assert rates.wait("b") == 0.0, "each caller has a bucket"
    now = 2.5
    assert [rates.wait("a"), rates.wait("a"), rates.wait("a")] == [0.0, 0.0, 0.5]
    with serving(tmp_path / "data", limits=Limits(requests_per_minute=5)) as running, running.http() as http:
        answers = [http.get("/v1/files") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        assert code_of(answers[-1]) == (429, "rate_limit_exceeded")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 12
        assert http.get("/healthz").status_code == 200
        one, two = (bearer(running, "read") for _ in range(2))
        assert [http.get("/v1/files", headers=one).status_code for _ in range(6)] == [200] * 5 + [429]
        assert http.get("/v1/files", headers=two).status_code == 200
        guesses = [http.get("/v1/files", headers={"Authorization": f"Bearer {n}"}).status_code for n in range(6)]
        assert guesses == [401] * 5 + [429]
    with serving(tmp_path / "other", limits=Limits(requests_per_minute=5)) as running, running.http() as http:
        create_key(running.service.store, "first", scopes=["read"])
        assert [http.get("/v1/files").status_code for _ in range(6)] == [401] * 5 + [429]
        assert [http.get("/static/pages.css").status_code for _ in range(9)] == [200] * 9
        assert [http.get("/login").status_code for _ in range(6)] == [200] * 5 + [429], "guesses are counted apart"


def test_sessions_share_the_rate_of_their_key_and_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path / "data", limits=Limits(requests_per_minute=5)) as running, running.http() as http:
        store = running.service.store
        _, text = create_key(store, "person", scopes=["read"])
        secrets = [session.secret for _ in range(MOST + 2) if (session := sign_in(store, text))]
        valid = [check_session(store, secret) is not None for secret in secrets]
        assert valid == [False] * 2 + [True] * MOST, "the oldest end"
        cookies = [{"Cookie": f"{COOKIE}={secret}"} for secret in secrets[-3:]]
        asked = [*cookies, *cookies, {"Authorization": f"Bearer {text}"}]
        assert [http.get("/v1/files", headers=one).status_code for one in asked] == [200] * 5 + [429] * 2


def test_bodies_are_bounded_as_they_come(service: Inside, http: httpx.Client) -> None:
    write, chat = bearer(service, "write"), bearer(service, "inference")
    large = json.dumps({"x": "y" * 6_000}).encode()
    assert code_of(http.post("/v1/chat/completions", content=large, headers=chat)) == (413, "request_too_large")
    assert http.delete("/v1/files/file-x", headers=write).status_code == 404

    messages = [{"type": "http.request", "body": b"x" * 600, "more_body": True} for _ in range(9)]

    async def receive() -> Any:
        return messages.pop(0)

    async def read() -> None:
        limited_receive = limited(receive, most=5_000, seconds=10)
        for _ in range(9):
            assert (await limited_receive())["more_body"]

    with pytest.raises(HTTPException) as caught:  # of a body whose length is not told before
        anyio.run(read)
    assert (caught.value.status_code, len(messages)) == (413, 0)


def test_a_body_that_trickles_is_given_up(service: Inside) -> None:
    started = time.monotonic()
    key = bearer(service, "write")["Authorization"]
    head = f"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {key}\r\nContent-Length: 50000\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as client:
        client.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x".encode())
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b"408 Request Timeout" in answer.splitlines()[0]
    assert b"request_timeout" in answer
    assert time.monotonic() - started >= LIMITS.body_seconds
    assert not list((service.data_dir / "files").iterdir())


def answered(client: socket.socket) -> None:
    told = b""
    while not told.endswith(b"}"):
        piece = client.recv(4096)
        assert piece
        told += piece
    assert b"200 OK" in told


def test_a_head_that_trickles_ends_its_connection(service: Inside) -> None:
    """From the start of the connection, or of a further request on it; idle in between it may stay."""
    whole = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    for before, sent in ((b"", b""), (b"", b"GET /healthz HT"), (whole, b"GET /hea"), (whole + b"GET /h", b"")):
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as client:
            if before:
                client.sendall(before)
                answered(client)
            ended = started = time.monotonic()
            client.sendall(sent)
            client.settimeout(0.1)
            while ended - started < 20:
                ended = time.monotonic()
                try:
                    if client.recv(4096) == b"":
                        break
                except TimeoutError:
                    with suppress(ConnectionError):
                        client.sendall(b"x" if sent else b"")
                except ConnectionError:
                    break
            assert LIMITS.body_seconds * 0.8 < ended - started < 20, (before, sent)
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as client:
        for _ in range(2):
            client.sendall(whole)
            answered(client)
            time.sleep(2 * LIMITS.body_seconds)


def test_answers_tell_browsers_to_be_careful(service: Inside, http: httpx.Client) -> None:
    for answer in (
        http.get("/healthz"),
        http.get("/v1/files"),
        http.get("/v1/files", headers={"Host": "evil.example"}),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"


def test_two_headers_host_are_refused(service: Inside) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as client:
        client.sendall(b"GET /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n")
        assert client.recv(4096).split()[1] in (b"400", b"421")


def test_the_log_tells_requests_and_no_secret(
    service: Inside, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(JsonLines().format(record))  # type: ignore[method-assign]
    log = logging.getLogger("ift_peft.serve")
    log.addHandler(handler)
    level, _ = log.level, log.setLevel(logging.INFO)
    try:
        key = bearer(service, "read")
        secret = key["Authorization"].split()[-1]
        http.get(f"/v1/files?after=QUERYTEXT&api_key={secret}", headers={**key, "X-Request-Id": "mine-1"})
        http.get("/v1/files/PATHTEXT", headers={"Authorization": f"Bearer {secret}x"})
        answer = http.get("/v1/files/PATHTEXT", headers={**key, "X-Request-Id": "a b"})
        with monkeypatch.context() as patched:
            patched.setattr(service.service.store, "page", fails)
            broken = http.get("/v1/files", headers=key)
        wait_for(lambda: len(lines) == 5)  # the last is written when the answer is already there
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    told = "".join(lines)
    for text in (secret, secret.partition(".")[2], "QUERYTEXT", "PATHTEXT", "ROWTEXT"):
        assert text not in told
    first, second, third, failed, last = map(json.loads, lines)
    assert (first["request"], first["route"], first["method"], first["status"]) == ("mine-1", "/v1/files", "GET", 400)
    assert first["key"] == secret[7:23]
    assert second["status"] == 401 and "key" not in second
    assert third["route"] == "/v1/files/{file_id}"
    assert third["request"] == answer.headers["x-request-id"] != "a b"
    assert failed["error"] == "ValueError" and "Traceback" in failed["trace"]
    assert code_of(broken) == (500, "internal_error")
    assert broken.headers["x-request-id"] == failed["request"] == last["request"]
    assert broken.headers["x-content-type-options"] == "nosniff"
    assert "ROWTEXT" not in broken.text


def fails(*arguments: Any, **options: Any) -> Any:
    raise ValueError("ROWTEXT")
