"""Which requests reach the web page, without gradio: the guard is driven as a server drives it."""

import asyncio
import json
import threading

import pytest

from llava_moslora.inference.web_guard import Guard, Limits

LIMITS = Limits(body_bytes=100, upload_bytes=1000, body_seconds=0.2, folder_bytes=1500)


def asked(tmp_path, *, headers=(), path="/", body=(b"",), pause=0.0, host="127.0.0.1", names=(), broken=False):
    """Status, headers and text of the answer to one request, and the body that the page got of it.

    Args:
        body: the pieces that it comes in, ``pause`` seconds apart.
        broken: whether the page fails on a request that ends early, as gradio's does.
    """
    got, sent, pieces = [], [], list(body)

    async def page(scope, receive, send):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                assert not broken, "the page's own error"
                break
            got.append(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def receive():
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    guard = Guard(
        page, host=host, names=names, upload_path="/upload", uploads=tmp_path, stopped=threading.Event(), limits=LIMITS
    )
    headers = [(name.encode(), value.encode()) for name, value in headers]
    asyncio.run(guard({"type": "http", "path": path, "headers": headers}, receive, send))
    start, end = sent
    return start["status"], dict(start["headers"]), end["body"].decode(), b"".join(got)


@pytest.mark.parametrize(("host", "names", "header", "answered"), [
    ("127.0.0.1", (), "127.0.0.1:7860", True),
    ("127.0.0.1", (), "localhost:7860", True),
    ("127.0.0.1", (), "LOCALHOST", True),
    ("127.0.0.1", (), "[::1]:7860", True),
    ("127.0.0.1", (), "evil.example", False),
    ("127.0.0.1", (), "127.0.0.1.evil.example", False),
    ("127.0.0.1", (), "localhost:7860@evil.example", False),
    ("127.0.0.1", (), "10.0.0.5", False),  # not listened on
    ("127.0.0.1", (), "[::1", False),
    ("127.0.0.1", (), "", False),
    ("127.0.0.1", ("GPU.example",), "gpu.example:443", True),
    ("gpu.example", (), "gpu.example", True),
    ("0.0.0.0", (), "10.0.0.5:7860", True),  # any address, but no name: an address cannot be made to mean another
    ("::", (), "[fe80::1]:7860", True),
    ("0.0.0.0", (), "gpu.example", False),
])  # fmt: skip
def test_only_its_own_names(tmp_path, host, names, header, answered):
    status, headers, text, _ = asked(tmp_path, host=host, names=names, headers=[("host", header)])
    assert (status, text == "page") == ((200, True) if answered else (400, False))
    assert b"frame-ancestors 'none'" in headers[b"content-security-policy"]
    if not answered:
        assert "--allowed_hosts" in json.loads(text)["detail"]


@pytest.mark.parametrize("hosts", [[], ["localhost", "evil.example"]])
def test_one_name(tmp_path, hosts):
    assert asked(tmp_path, headers=[("host", host) for host in hosts])[0] == 400


@pytest.mark.parametrize(("origin", "answered"), [
    ("http://localhost:7860", True),
    ("http://localhost:3000", False),  # another program's page on this machine
    ("http://127.0.0.1:7860", False),
    ("https://evil.example", False),
    ("null", False),
    ("http://[::1", False),
    ("https://gpu.example", True),  # a proxy that asks under another name
])  # fmt: skip
def test_only_its_own_pages(tmp_path, origin, answered):
    request = {"headers": [("host", "localhost:7860"), ("origin", origin)], "names": ("gpu.example",)}
    status, headers, *_ = asked(tmp_path, **request)
    assert status == (200 if answered else 403)
    assert b"access-control-allow-origin" not in headers


OWN = ("host", "localhost")


def test_a_body_up_to_the_limit_arrives(tmp_path):
    for path, most in (("/", 100), ("/upload", 1000)):
        pieces = [b"a" * (most - 50), b"b" * 50]
        for length in ([], [("content-length", str(most))]):
            status, _, _, got = asked(tmp_path, headers=[OWN, *length], path=path, body=pieces)
            assert status == 200 and got == b"".join(pieces)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_a_body_above_the_limit(tmp_path, told, broken):
    pieces = [b"a" * 60] * 3
    length = [("content-length", "180")] if told else []
    status, headers, text, got = asked(tmp_path, headers=[OWN, *length], body=pieces, broken=broken)
    assert status == 413 and json.loads(text) == {"detail": "the request is too large: at most 100 bytes"}
    assert headers[b"connection"] == b"close" and len(got) == (0 if told else 60)


def test_a_slow_body(tmp_path):
    assert asked(tmp_path, headers=[OWN], body=[b"a"] * 9, pause=0.05)[0] == 408


@pytest.mark.parametrize("length", ["-1", "x", "²"])
def test_a_wrong_length(tmp_path, length):
    assert asked(tmp_path, headers=[OWN, ("content-length", length.encode().decode("latin-1"))])[0] == 400


def test_all_uploads_together(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"a" * 1000)
    assert asked(tmp_path, headers=[OWN, ("content-length", "400")], path="/upload", body=[b"b" * 400])[0] == 200
    status, _, text, _ = asked(tmp_path, headers=[OWN, ("content-length", "600")], path="/upload", body=[b"b" * 600])
    assert status == 507 and "too many images" in text


def test_whoever_listens_is_left_at_the_end(tmp_path):
    """A page that is open listens for as long as it is: the server would wait for it."""
    stopped, heard = threading.Event(), []

    async def page(scope, receive, send):
        heard.append(await receive())
        stopped.set()
        heard.append(await receive())

    async def receive(bodies=[{"type": "http.request", "body": b"", "more_body": False}]):  # noqa: B006
        return bodies.pop() if bodies else await asyncio.sleep(60)

    guard = Guard(page, host="localhost", upload_path="/upload", uploads=tmp_path, stopped=stopped, limits=LIMITS)
    scope = {"type": "http", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(asyncio.wait_for(guard(scope, receive, None), 5))
    assert [message["type"] for message in heard] == ["http.request", "http.disconnect"]
