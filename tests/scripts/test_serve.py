"""The web page: real requests, and a headless browser with an image. Needs the extra ``serve``, but for its flags."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from llava_moslora.errors import Refusal
from llava_moslora.inference.generate import answer
from llava_moslora.inference.load import load, load_run
from llava_moslora.text.conversation import Turn
from scripts import serve
from support.export_runs import trained_run
from support.launching import ROOT, free_port

SCREENSHOT = os.environ.get("SERVE_SCREENSHOT")  # a file to look at


@pytest.mark.slow
def test_wrong_flags_are_answered_before_anything_is_loaded(tmp_path):
    for words, message in (
        (["a", "b", "c"], "one or two models; found 3 models"),
        (["a", "--names", "x", "y"], "--names"),
        (["a", "b", "--names", "x", "x"], "--names: two models with the same name"),
        (["a", "--max_seconds", "nan"], "--max_seconds: out of range"),
        (["a", "--max_waiting", "0"], "--max_waiting: out of range"),
    ):
        done = subprocess.run([sys.executable, "scripts/serve.py", *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("host", "port", "message"), [
    ("127.0.0.1", 99999, r"C-FLAG\] --port: no port; found 99999; expected 1 to 65535"),
    ("127.0.0.1", -1, r"C-FLAG\] --port: no port"),
    ("no such host", 7860, r"C-FLAG\] --host: not an address of this machine; found no such host: .*fix: 127\.0\.0\.1"),
    ("192.0.2.1", 7860, r"C-FLAG\] --host: not an address of this machine"),
    ("127.0.0.1", None, r"E-PORT\] --port: the port is already in use; found 127\.0\.0\.1:\d+"),
])  # fmt: skip
def test_an_address_that_cannot_be_served(monkeypatch, host, port, message):
    monkeypatch.setattr(serve, "load", lambda _: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port or taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["serve.py", "model", "--host", host, "--port", str(port)])
        with pytest.raises(Refusal, match=message):
            serve.main()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_is_taken_from_the_start(host):
    """Also from a second server that starts while the first loads its models."""
    port = free_port()
    with serve.listen(host, port), pytest.raises(Refusal, match="E-PORT"):
        serve.listen(host, port)
    serve.listen(host, port).close()


@pytest.mark.parametrize(("round_", "count", "message"), [
    ({"question": "x" * 10**6}, 1, r"too long; found 1000000; expected at most 20000 characters; fix: .*start over"),
    ({"question": "x" * 9_000}, 3, r"too long; found 27000; expected at most 20000 characters"),
    ({"answers": ["x" * 9_000]}, 3, r"too long; found 27003; expected at most 20000 characters"),
    ({"file": "0.png"}, 9, r"too long; found 9; expected at most 8 images"),
    ({"question": "<image> what?"}, 1, r"D-IMAGES\] the image placeholder must not be typed"),
])  # fmt: skip
def test_conversations_that_are_refused(round_, count, message):
    with pytest.raises(Refusal, match=message):
        serve.conversation([{"file": None, "question": "x", "answers": [""]} | round_] * count, 0)


@pytest.mark.parametrize("file", ["/etc/hostname", "http://127.0.0.1/0.png", "{}/../0.png", "{}/link", "/\0"])
def test_files_that_were_not_uploaded(tmp_path, monkeypatch, file):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "link").symlink_to("/etc/hostname")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    with pytest.raises(Refusal, match=r"I-PATH\] not an uploaded image"):
        serve.uploaded(file.format(uploads))
    assert serve.uploaded(None) is None
    assert serve.uploaded(str(uploads / "0.png")) == str(uploads / "0.png")


@pytest.mark.parametrize("values", [(0.5, 3), (1025, 0), ("1", 0), (float("nan"), 0), (16, -1), (None, 0)])
def test_sliders_out_of_range(values):
    with pytest.raises(Refusal, match=r"C-FLAG\] (tokens|temperature): out of range"):
        serve.sampling(*values)
    assert serve.sampling(1024, 1.5) == {"max_new_tokens": 1024, "temperature": 1.5}


class Server:
    """scripts/serve.py as a process, with what it prints in a file; and one client of it."""

    def __init__(self, folder: Path, *words):
        pytest.importorskip("gradio", reason="pip install 'llava_moslora[serve]'")
        self.port, self.temporary, self.log = free_port(), folder / "tmp", folder / "log"
        self.temporary.mkdir()
        command = [sys.executable, "scripts/serve.py", *words, "--port", self.port]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, stdout=log, stderr=log,
                env=os.environ | {"TMPDIR": str(self.temporary)},
            )  # fmt: skip
        while "the page: " not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.5)

    def request(self, method, path, body=None, **headers) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, content

    def ask(self, session: str, question: str, *, tokens=4, file: str | None = None) -> tuple[int, bytes]:
        """Put a question into the queue."""
        image = file and {"path": file, "orig_name": "0.png", "meta": {"_type": "gradio.FileData"}}
        body = {"data": [None, image, question, tokens, 0], "fn_index": 0, "session_hash": session}
        kind = {"Content-Type": "application/json"}
        status, _, content = self.request("POST", "/gradio_api/queue/join", json.dumps(body), **kind)
        return status, content

    def events(self, session: str) -> Iterator[dict]:
        """What the queue tells of a question. Who stops listening is taken to have left, and is not answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        response = connection.getresponse()
        while line := response.readline():
            if line.startswith(b"data:"):
                yield json.loads(line[5:])
        connection.close()

    def answer(self, session: str) -> dict:
        return next(event for event in self.events(session) if event["msg"] == "process_completed")

    def refusal(self, session: str) -> str:
        """What the page shows above the question."""
        return next(event["log"] for event in self.events(session) if event["msg"] == "log")

    def upload(self, content: bytes) -> tuple[int, bytes]:
        head = b'--B\r\nContent-Disposition: form-data; name="files"; filename="0.png"\r\n\r\n'
        kind = {"Content-Type": "multipart/form-data; boundary=B"}
        status, _, said = self.request("POST", "/gradio_api/upload", head + content + b"\r\n--B--\r\n", **kind)
        return status, said

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "run"
    trained_run(folder, parts.llm, parts.clip, parts.projector)
    return folder


@pytest.fixture
def started(tmp_path):
    """``started(*words)``: the server with these flags; it is killed at the end, if it is still there."""
    servers = []

    def start(*words) -> Server:
        servers.append(Server(tmp_path, *words))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.mark.slow
def test_what_is_refused(run, parts, started):
    server = started(run)
    own = f"127.0.0.1:{server.port}"
    for host, origin, status in (
        (own, f"http://{own}", 200), (f"localhost:{server.port}", f"http://localhost:{server.port}", 200),
        ("evil.example", None, 400), ("evil.example", "http://evil.example", 400), (own, "http://evil.example", 403),
        (own, "null", 403), (own, "http://localhost:1", 403),
    ):  # fmt: skip
        for method in ("GET", "OPTIONS", "POST"):
            headers = {"Host": host} | ({"Origin": origin} if origin else {})
            if method == "OPTIONS":
                headers["Access-Control-Request-Method"] = "POST"
            path = "/gradio_api/queue/join" if method == "POST" else "/config"
            found, answered, _ = server.request(method, path, **headers)
            assert found == status if status != 200 else found not in (400, 403), (host, origin, method)
            assert answered.get("access-control-allow-origin") in (None, f"http://{host}" if status == 200 else None)

    begun = time.monotonic()
    assert server.ask("long", "x" * 10**6)[0] == 200
    assert "D-LENGTH] the conversation is too long; found 1000000" in server.refusal("long")
    status, said = server.ask("longer", "x" * 5 * 2**20)
    assert status == 413 and b"at most 4,194,304 bytes" in said
    assert time.monotonic() - begun < 2
    for megabytes in (50.5, 60):  # above the limit of a file, and of a request
        assert server.upload(bytes(int(megabytes * 2**20)))[0] == 413

    status, said = server.upload((parts.images / "0.png").read_bytes())
    server.ask("good", "what colour?", file=json.loads(said)[0])
    assert server.answer("good")["success"]
    status, said = server.upload(b"no image")
    server.ask("bad", "what colour?", file=json.loads(said)[0])
    assert "error[I-FORMAT]" in server.refusal("bad")
    server.ask("tokens", "what colour?", tokens=10**6)
    assert "error[C-FLAG] tokens: out of range" in server.refusal("tokens")
    server.ask("url", "what colour?", file=f"http://{own}/static/img/logo.svg")
    assert "error[I-PATH]" in server.refusal("url")
    assert "Traceback" not in server.log.read_text()  # a refusal is an answer, no event of the server's log
    secret = server.temporary.parent / "secret.png"
    shutil.copy(parts.images / "1.png", secret)
    server.ask("file", "what colour?", file=str(secret))
    assert not server.answer("file")["success"]
    assert server.request("GET", f"/gradio_api/file={secret}")[0] == 403
    assert not list(server.temporary.rglob("secret.png"))  # a copy there would be served


@pytest.mark.slow
def test_a_long_answer_a_full_queue_and_the_end(run, started):
    server = started(run, "--max_seconds", 5, "--max_waiting", 1)
    [uploads] = [path for path in server.temporary.iterdir() if path.name.startswith("llava_moslora-")]
    assert server.ask("first", "what colour?", tokens=1024)[0] == 200
    first = server.events("first")
    assert any(event["msg"] == "process_generating" for event in first)
    assert server.ask("second", "what colour?", tokens=1)[0] == 200
    second = server.events("second")
    assert next(second)["msg"] == "estimation"
    status, said = server.ask("third", "what colour?")
    assert status == 503 and b"Queue is full" in said
    told = list(first)
    assert "stopped after 5 seconds (--max_seconds)" in next(event["log"] for event in told if event["msg"] == "log")
    assert [event["success"] for event in told if event["msg"] == "process_completed"] == [True]
    assert [event["success"] for event in second if event["msg"] == "process_completed"] == [True]

    assert server.ask("last", "what colour?", tokens=1024)[0] == 200
    last = server.events("last")
    assert any(event["msg"] == "process_generating" for event in last)
    begun = time.monotonic()
    assert server.end(signal.SIGINT) == 0 and time.monotonic() - begun < 20
    assert server.log.read_text().endswith("stopped\n") and "Traceback" not in server.log.read_text()
    assert not uploads.exists()


@pytest.mark.slow
def test_sigterm(run, started):
    server = started(run)
    assert server.end() == 0
    assert server.log.read_text().endswith("stopped\n") and not any(server.temporary.glob("llava_moslora-*"))


@pytest.fixture
def page(run, parts, started):
    """The page over a run and itself untrained, open in Chromium; the run, and what the browser asked others for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_file is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    server = started(run, "--compare_untrained", "--names", "tuned", "before")
    own = psutil.Process(server.process.pid)
    assert {c.laddr.ip for c in own.net_connections("inet") if c.status == "LISTEN"} == {"127.0.0.1"}
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        opened, elsewhere = browser.new_page(viewport={"width": 1400, "height": 900}), []
        own_address = f"http://127.0.0.1:{server.port}"
        opened.on(
            "request",
            lambda asked: asked.url.startswith((own_address, "data:", "blob:")) or elsewhere.append(asked.url),
        )
        opened.set_default_timeout(120_000)
        opened.goto(own_address)
        yield opened, elsewhere
        browser.close()


@pytest.mark.slow
def test_an_image_two_models_two_turns(page, run, parts):
    opened, elsewhere = page
    file = parts.images / "0.png"
    opened.set_input_files("input[type=file]", str(file))
    opened.wait_for_selector("img[src*='0.png']")
    image = Image.open(file).convert("RGB")
    histories = [[], []]
    for round_, text in enumerate(("what colour?", "is it red?"), start=1):
        opened.fill("#question textarea", text)
        opened.click("#ask")
        for number, chat_model in enumerate((load(run), load_run(run, trained=False))):
            turns = [*histories[number], Turn("human", ("" if round_ > 1 else "<image>\n") + text)]
            said = next(answer(chat_model, [([image], turns)], max_new_tokens=256))
            histories[number] = [*turns, Turn("gpt", said)]
            chat = opened.locator("[aria-label='chatbot conversation']").nth(number)
            wait_for_answer(chat, said)
    refused = opened.locator(".toast-body")
    for question, message in (("is <image> red?", "found is <image> red?"), ("x" * 30_000, "at most 20000 characters")):
        opened.fill("#question textarea", question)
        opened.click("#ask")
        refused.filter(has_text=message).wait_for()
        assert opened.input_value("#question textarea") == question  # to be corrected
    assert opened.get_by_text("Error", exact=True).count() == 0  # gradio's word over what it could not fill
    assert elsewhere == []
    if SCREENSHOT:
        opened.screenshot(path=SCREENSHOT)


def wait_for_answer(chat, said: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while squeezed(said)[:200] not in squeezed(chat.inner_text()):
        assert time.monotonic() < deadline, f"the page shows {chat.inner_text()!r}, the model said {said!r}"
        time.sleep(0.5)


def squeezed(text: str) -> str:
    """Without white space, and without NUL: a random model says it, and a page cannot hold it."""
    return re.sub(r"[\s\0]+", "", text)
