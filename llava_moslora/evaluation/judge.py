"""A judge for MathVista and MM-Vet: any OpenAI-compatible server, prompted as VLMEvalKit prompts GPT-4.

MathVista's judge extracts an answer if the rules cannot parse one, MM-Vet's grades every answer. Every reply is saved
in ``NAME/judge.jsonl`` as it arrives, under the row and a hash of the request. The hash covers the judge's model, so
that replies of several judges never mix; a second evaluation sends only requests that have no reply::

    {"header": {"benchmark": "mmvet", "judge_prompts": "…"}}
    {"index": "v1_0", "request": "6fb1…", "judge": "gpt-4-1106-preview", "host": "api.openai.com", "reply": "0.5"}

The key, if the server needs one, is the environment variable OPENAI_API_KEY; it is sent only to that server (through a
proxy, if the environment sets one).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from tqdm import tqdm

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.ask import Questions
from llava_moslora.evaluation.judge_prompts import JUDGE_PROMPTS, judge_prompt
from llava_moslora.evaluation.kept import Header, append, drop_unfinished, read_lines
from llava_moslora.evaluation.reading import Rules, read_mathvista
from llava_moslora.evaluation.rows import Row
from llava_moslora.evaluation.scoring import read_grade

JUDGE = "judge.jsonl"
KEY = "OPENAI_API_KEY"
# As the kit: the reply may be so long, and a reply that is none is asked for again at the next temperature.
MAX_TOKENS = {"mathvista": 128, "mmvet": 3}
TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
AT_ONCE = 4  # requests
MAX_REPLY = 2**20  # bytes
FIXES = dict.fromkeys((401, 403), f"set {KEY} to a key of this server") | {404: "check the URL and the model's name"}
FIXES |= {429: "wait, or see the limits of the account"}
LONGEST_WAIT = 60.0  # maximum of Retry-After, in seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would be followed without the question, but with the key."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Judge:
    """A model behind a server.

    Attributes:
        url: where requests go, ``…/v1/chat/completions``.
        model: its name on the server.
        timeout: seconds without a byte from the server.
        waits: seconds before the second, third, … attempt if the server is down, busy or fails.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0
    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)

    @classmethod
    def of(cls, url: str, model: str) -> Judge:
        """The judge that ``--judge URL MODEL`` names; URL with or without ``/v1``.

        Raises:
            Refusal: C-FLAG, no URL or no name; C-KEY, OPENAI_API_KEY cannot be sent.
        """
        where: dict[str, Any] = {"key": "--judge", "expected": "http://HOST:PORT/v1 or https://…"}
        if re.search("[@?#]", url):  # not repeated: it may be a password
            raise Refusal(
                "C-FLAG", "the URL may only have host, port and path", **where,
                fix=f"set a key in the environment, as {KEY}",
            )  # fmt: skip
        try:
            parts = urlsplit(url)
            known = bool(re.fullmatch("https?://[!-~]+", url) and parts.hostname and parts.port != 0)
            (parts.hostname or "").encode("idna")
        except ValueError:  # a port that is no number, brackets that do not match, a part of the name too long
            known = False
        if not known:
            raise Refusal("C-FLAG", "not the URL of a server", found=url, **where)
        if not (model.strip() and model.isprintable()):
            raise Refusal("C-FLAG", "no model name", key="--judge", found=model, expected="--judge URL MODEL")
        key = os.environ.get(KEY, "").strip()
        if not re.fullmatch("[!-~]*", key):
            raise Refusal("C-KEY", "not a key: it has a space or an invalid character", key=KEY)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        if not re.search(r"/v\d", path):
            path += "/v1"
        return cls(f"{parts.scheme}://{parts.netloc}{path}/chat/completions", model, key)

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def request(self, prompt: str, temperature: float, max_tokens: int) -> bytes:
        """The body of one request."""
        content: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        return json.dumps(content | {"max_tokens": max_tokens, "temperature": temperature}).encode()

    def reply(self, body: bytes, stopped: threading.Event) -> str:
        """The server's reply without white space around it; "" if the model said nothing.

        Args:
            stopped: once it is set, a request that failed is not sent again.

        Raises:
            Refusal: E-JUDGE.
        """
        for wait in (*self.waits, None):
            status, retry_after = 0, ""
            try:
                status, text, retry_after = self._send(body)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                text = str(reason) or type(reason).__name__
            if status // 100 == 2:
                return self._content(text)
            if wait is None or not (status in (0, 408, 429) or status >= 500):
                break
            asked_for = float(retry_after) if retry_after.isdecimal() else 0.0
            if stopped.wait(max(wait, min(asked_for, LONGEST_WAIT))):
                break
        found = f"status {status}: {text}" if status else text
        fix = "see what the server says" if 0 < status < 500 else "see that the server runs"
        raise self.refusal("the judge cannot be asked", found, FIXES.get(status, fix))

    def try_out(self) -> None:
        """Send a one-word request, so that a wrong URL, model or key is reported before hours of evaluation.

        Raises:
            Refusal: E-JUDGE.
        """
        self.reply(self.request("Reply with the digit 1.", TEMPERATURES[0], MAX_TOKENS["mmvet"]), threading.Event())

    def _send(self, body: bytes) -> tuple[int, str, str]:
        """Status and text of the server's response, and its Retry-After in seconds."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            response = _OPENER.open(urllib.request.Request(self.url, body, headers), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            text = response.read(MAX_REPLY).decode("utf-8", "replace")
            return response.status, text, response.headers.get("Retry-After", "")

    def _content(self, text: str) -> str:
        try:
            content = (json.loads(text)["choices"][0]["message"].get("content") or "").strip()
            if content.startswith("<think>"):  # of a reasoning model, which would be cut off before it answers
                return ""
            return content.encode("utf-8", "replace").decode()  # without halves of surrogate pairs
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            fix = "check the URL: it must be an OpenAI-compatible server's"
            raise self.refusal("not the reply of a chat model", text, fix) from None

    def refusal(self, what: str, found: str, fix: str) -> Refusal:
        """With the first 200 characters of the server's response, with the key redacted."""
        found = (found.replace(self.key, "…") if self.key else found)[:200] or "nothing"
        fix += "; answers and replies are kept: the same command asks only what is open"
        return Refusal("E-JUDGE", what, file=self.url, key="--judge", found=found, fix=fix)


class _Replies:
    """One judge's replies to one benchmark's rows, by row and request, in a file appended with every reply.

    Attributes:
        known: (index, hash of the request) → (reply, host it came from), from an earlier evaluation.
        hosts: of the replies in use.
    """

    def __init__(self, judge: Judge, file: TextIO, known: Mapping[tuple[str, str], tuple[str, str]]):
        self.judge, self.file, self.known = judge, file, known
        self.hosts: set[str] = set()
        self.stopped, self._lock = threading.Event(), threading.Lock()

    def judged(self, row: Row, kind: str, answer: str) -> str:
        """As :meth:`_judged`; after a failure no further request is sent, and the result is meaningless."""
        try:
            return self._judged(row, kind, answer)
        except BaseException:
            self.stopped.set()
            raise

    def _judged(self, row: Row, kind: str, answer: str) -> str:
        """The first usable reply at rising temperatures, else the last one.

        Raises:
            Refusal: E-JUDGE; also where every reply is empty, which would silently count as wrong.
        """
        prompt, last = judge_prompt(row, kind, answer), ""
        for temperature in TEMPERATURES:
            if self.stopped.is_set():
                return ""
            reply = self._reply(row, prompt, temperature, MAX_TOKENS[kind])
            if kind == "mmvet" and re.fullmatch(r"[01]\.", reply):
                # To some tokenizers 0.5 is four tokens: cut off after three it would count as 0.
                reply = self._reply(row, prompt, temperature, MAX_TOKENS[kind] + 1)
            if reply and (kind == "mathvista" or read_grade(reply) is not None):
                return reply
            last = reply or last
        if not last:
            what = f"no answer in any reply to question {row['index']}"
            fix = "use a non-reasoning judge: a reply may have 128 tokens for MathVista, 3 for MM-Vet"
            raise self.judge.refusal(what, "", fix)
        return last

    def _reply(self, row: Row, prompt: str, temperature: float, max_tokens: int) -> str:
        body = self.judge.request(prompt, temperature, max_tokens)
        place = row["index"], hashlib.sha256(body).hexdigest()
        reply, host = self.known.get(place, ("", self.judge.host))
        if place not in self.known:
            reply = self.judge.reply(body, self.stopped)
        with self._lock:
            self.hosts.add(host)
            if reply and place not in self.known:  # empty replies are requested again by the next command
                line = {"index": place[0], "request": place[1], "judge": self.judge.model, "host": host}
                append(self.file, [line | {"reply": reply}])
        return reply


def judge_answers(
    judge: Judge, questions: Questions, answers: Mapping[str, str], rules: Rules, folder: Path
) -> tuple[dict[str, str], Header]:
    """Index → reply: MathVista's rows that ``rules`` cannot parse, every row of MM-Vet; and fields for the result.

    If no attempt gave a grade for MM-Vet, the reply counts 0, as in VLMEvalKit.

    Args:
        folder: of the benchmark's answers, where replies are saved too.

    Raises:
        Refusal: E-JUDGE, the judge failed; C-ANSWERS, a line of the file of replies is damaged.
    """
    kind, file = questions.benchmark.kind, folder / JUDGE
    rows = [
        row
        for row in questions.rows
        if kind != "mathvista" or read_mathvista(row, answers[row["index"]], rules).value is None
    ]
    known: dict[tuple[str, str], tuple[str, str]] = {}
    if file.is_file():
        _, lines = read_lines(file, ("index", "request", "reply", "host"))
        known = {(line["index"], line["request"]): (line["reply"], line["host"]) for line in lines}
        drop_unfinished(file)
    judged: dict[str, str] = {}
    bar = tqdm(total=len(rows), desc=f"{questions.benchmark.title}, judge", unit="answer", disable=not rows)
    with open(file, "a", encoding="utf-8") as stream, bar, ThreadPoolExecutor(AT_ONCE) as pool:
        if stream.tell() == 0:
            append(stream, [{"header": {"benchmark": questions.benchmark.name, "judge_prompts": JUDGE_PROMPTS}}])
        replies = _Replies(judge, stream, known)
        futures = {pool.submit(replies.judged, row, kind, answers[row["index"]]): row["index"] for row in rows}
        try:
            for future in as_completed(futures):
                judged[futures[future]] = future.result()
                bar.update()
        except BaseException:
            replies.stopped.set()
            pool.shutdown(cancel_futures=True)  # waits: a reply under way is still kept
            raise
    host = " and ".join(sorted(replies.hosts)) or judge.host
    return judged, {"judge": judge.model, "judge_host": host, "judge_prompts": JUDGE_PROMPTS}
