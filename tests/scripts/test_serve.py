"""The web page in a headless browser, with an image: two models side by side, two turns. Needs the extra ``serve``."""

import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import time

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
    ):
        done = subprocess.run([sys.executable, "scripts/serve.py", *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("host", "port", "message"), [
    ("127.0.0.1", 99999, r"C-FLAG\] --port: no port; found 99999; expected 1 to 65535"),
    ("127.0.0.1", -1, r"C-FLAG\] --port: no port"),
    ("no such host", 7860, r"C-FLAG\] --host: no address of this machine; found no such host: .*fix: 127\.0\.0\.1"),
    ("192.0.2.1", 7860, r"C-FLAG\] --host: no address of this machine"),
    ("127.0.0.1", None, r"E-PORT\] --port: another process listens there; found 127\.0\.0\.1:\d+"),
])  # fmt: skip
def test_an_address_that_cannot_be_served(monkeypatch, host, port, message):
    monkeypatch.setattr(serve, "load", lambda _: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port or taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["serve.py", "model", "--host", host, "--port", str(port)])
        with pytest.raises(Refusal, match=message):
            serve.main()


def test_an_address_that_can_be_served():
    serve.check_address("127.0.0.1", free_port())
    serve.check_address("localhost", free_port())


def test_a_question_without_end_is_refused():
    rounds = [{"file": None, "question": "x" * 10**6, "answers": [""]}]
    with pytest.raises(Refusal, match=r"D-LENGTH\] the question is too long; found 1000000; expected at most 20000"):
        serve.conversation(rounds, 0)


def test_only_this_machines_name_is_answered():
    """A foreign page whose name was made to mean 127.0.0.1 sends that name, and must not reach the model."""
    pytest.importorskip("gradio", reason="pip install 'llava_moslora[serve]'")
    port = free_port()
    blocks = serve.page({"model": None})
    blocks.launch(**serve.launching("127.0.0.1", port), prevent_thread_lock=True, quiet=True)
    try:
        for host, status in ((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), ("evil.example", 400)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/config", headers={"Host": host, "Origin": f"http://{host}"})
            assert connection.getresponse().status == status, host
            connection.close()
    finally:
        blocks.close()


@pytest.fixture
def page(parts, tmp_path):
    """The page over a run and itself untrained, open in Chromium; and the run."""
    pytest.importorskip("gradio", reason="pip install 'llava_moslora[serve]'")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_file is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    run, port = tmp_path / "run", free_port()
    trained_run(run, parts.llm, parts.clip, parts.projector)
    command = [sys.executable, "scripts/serve.py", run, "--compare_untrained", "--names", "tuned", "before"]
    server = subprocess.Popen([str(word) for word in [*command, "--port", port]], cwd=ROOT)
    try:
        wait_for(server, port)
        addresses = {c.laddr.ip for c in psutil.Process(server.pid).net_connections("inet") if c.status == "LISTEN"}
        assert addresses == {"127.0.0.1"}
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
            opened = browser.new_page(viewport={"width": 1400, "height": 900})
            opened.set_default_timeout(120_000)
            opened.goto(f"http://127.0.0.1:{port}")
            yield opened, run
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_for(server, port: int) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        if any(c.laddr.port == port for c in psutil.Process(server.pid).net_connections("inet")):
            return
        time.sleep(0.5)
    raise AssertionError("the server did not begin to listen")


@pytest.mark.slow
def test_an_image_two_models_two_turns(page, parts):
    opened, run = page
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
